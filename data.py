"""Where images come from: simulated hospitals of two tasks, or a folder of real images.

The simulated hospitals were calibrated with local training and FedAvg only, on seed 100, which no table
reports (train.py's defaults: 96 × 96, 60 images a hospital, 30 rounds). FedAvg over all six, mean foreground
Dice in %: prostate 89.3 (Linden 86.4 … Alder 93.8), fundus 88.8 (Heron 83.7 … Crane 92.2). Points lost on
the test images of a hospital held out:
    Alder 0.3, Birch 4.9, Cedar -0.2, Hazel 12.0, Linden 2.4, Rowan 7.4: mean 4.5
    Crane 0.0, Finch 3.9, Heron 1.4, Plover 13.2, Robin 0.0, Swift 9.6: mean 4.7
Replacing the global model's BatchNorm statistics by those of the hospital held out changes its Dice by
    Alder +0.2, Birch +4.1, Cedar -1.0, Hazel +3.7, Linden 0.0, Rowan +2.4
    Crane -1.4, Finch +6.6, Heron +7.7, Plover +21.4, Robin -0.7, Swift +10.1 points.

Everything here is ours. Images are float32, each normalised to mean 0 and variance 1 over all its
pixels and channels together (a colour cast stays, a scanner's gain goes); masks are int64 class indices.
"""

import zlib
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

STRUCTURES = {"prostate": {"prostate": (1,)}, "fundus": {"disc": (1, 2), "cup": (2,)}}
CHANNELS = {"prostate": 1, "fundus": 3}


@dataclass
class Split:
    """images: (N, C, H, W) float32; masks: (N, H, W) int64; cases: N identifiers."""

    images: Tensor
    masks: Tensor
    cases: list[str]


@dataclass
class Site:
    """One hospital. spacing: size of a pixel (row, column), in mm, or in pixels where mm are not known."""

    name: str
    train: Split
    validation: Split
    test: Split
    spacing: tuple[float, ...] = (1.0, 1.0)

    def everything(self) -> Split:
        """All images of the site, in the order of their case identifiers."""
        splits = (self.train, self.validation, self.test)
        cases = [case for split in splits for case in split.cases]
        order = sorted(range(len(cases)), key=cases.__getitem__)
        return Split(torch.cat([s.images for s in splits])[order], torch.cat([s.masks for s in splits])[order],
                     [cases[i] for i in order])


def make_site(name: str, images: list[np.ndarray], masks: list[np.ndarray], cases: list[str],
              parts: list[np.ndarray], spacing: tuple[float, ...] = (1.0, 1.0)) -> Site:
    """A Site of images (C, H, W) and masks (H, W); parts: indices of train, validation and test."""
    splits = [Split(torch.from_numpy(np.stack([images[i] for i in part])),
                    torch.from_numpy(np.stack([masks[i] for i in part]).astype(np.int64)),
                    [cases[i] for i in part]) for part in parts]
    return Site(name, *splits, spacing=spacing)


def split_indices(count: int) -> list[np.ndarray]:
    """The numbers 0 … count-1 cut into train, validation and test: 60, 15 and 25 per cent, none empty."""
    test = max(1, round(0.25 * count))
    validation = max(1, round(0.15 * count))
    return np.split(np.arange(count), [count - test - validation, count - test])


def normalise(image: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1 over the whole image, float32; a constant image becomes zero."""
    return ((image - image.mean()) / max(float(image.std()), 1e-6)).astype(np.float32)


# ---------------------------------------------------------------- simulated hospitals: what differs
@dataclass
class ProstateHospital:
    """A scanner (gamma … coil), its patients (gland, spread, zonal) and an annotator (offset, rough)."""

    gamma: float  # contrast curve: intensity ** gamma
    bias: float  # amplitude of the bias field, log scale
    noise: float  # Rician noise, share of the brightest tissue
    blur: float  # resolution: Gaussian sigma, mm
    coil: float  # share of patients imaged with an endorectal coil
    gland: float  # mean half-width of the gland, mm
    spread: float  # its relative standard deviation between patients
    zonal: float  # brightness of the peripheral over the central zone
    offset: float  # contour drawn outside (+) or inside (-) of the capsule, mm
    rough: float  # unsteadiness of the contour, mm


@dataclass
class FundusHospital:
    """A camera (red … off_centre), its patients (glaucoma) and an annotator (disc, cup, rough)."""

    red: float  # colour cast: gain of each channel
    green: float
    blue: float
    gamma: float  # contrast curve
    vignette: float  # loss of light towards the rim
    blur: float  # Gaussian sigma, per cent of the image
    noise: float  # Gaussian, share of full scale
    field: float  # radius of the disc, share of half the image
    off_centre: float  # standard deviation of the disc's position, share of half the image
    glaucoma: float  # share of patients with a large cup
    disc: float  # drawn radius over visible radius of the disc
    cup: float  # the same for the cup
    rough: float  # unsteadiness of the contours, relative


HOSPITALS: dict[str, dict] = {
    "prostate": {
        #                        gamma  bias noise blur  coil gland spread zonal offset rough
        "Alder": ProstateHospital(1.00, 0.15, 0.04, 0.8, 0.00, 24.0, 0.12, 0.26, 0.0, 0.6),
        "Birch": ProstateHospital(0.55, 0.35, 0.06, 1.2, 0.00, 22.0, 0.15, 0.18, 1.6, 0.9),
        "Cedar": ProstateHospital(1.40, 0.30, 0.07, 1.0, 1.00, 23.0, 0.15, 0.28, -1.4, 0.7),
        "Hazel": ProstateHospital(1.20, 0.25, 0.12, 2.2, 0.00, 28.0, 0.17, 0.06, 1.0, 1.3),
        "Linden": ProstateHospital(0.80, 0.60, 0.05, 0.9, 0.20, 25.0, 0.18, 0.20, -2.2, 0.7),
        "Rowan": ProstateHospital(1.90, 0.40, 0.09, 1.5, 0.00, 19.0, 0.18, 0.12, 2.2, 1.0),
    },
    "fundus": {
        #                         red  green  blue gamma vign. blur noise field off-c. glauc. disc  cup  rough
        "Crane": FundusHospital(1.00, 1.00, 1.00, 1.00, 0.20, 0.8, 0.02, 0.44, 0.06, 0.20, 1.00, 1.00, 0.02),
        "Finch": FundusHospital(1.12, 0.88, 0.75, 0.85, 0.35, 1.2, 0.03, 0.40, 0.10, 0.50, 1.03, 1.12, 0.03),
        "Heron": FundusHospital(0.88, 1.05, 1.15, 1.20, 0.30, 1.6, 0.04, 0.47, 0.08, 0.30, 0.97, 0.88, 0.03),
        "Plover": FundusHospital(1.08, 1.00, 0.75, 1.18, 0.40, 1.0, 0.04, 0.39, 0.12, 0.60, 1.04, 0.92, 0.03),
        "Robin": FundusHospital(0.95, 0.85, 0.90, 0.80, 0.25, 2.0, 0.03, 0.45, 0.10, 0.40, 0.98, 1.15, 0.03),
        "Swift": FundusHospital(1.12, 1.10, 0.85, 1.10, 0.45, 1.4, 0.05, 0.42, 0.12, 0.60, 1.02, 1.04, 0.02),
    },
}


def hospital_table(task: str, sites: int = 6) -> dict:
    """The first `sites` hospitals of a task; those beyond six draw each property from the six's range."""
    table = dict(list(HOSPITALS[task].items())[:sites])
    columns = np.array([astuple(hospital) for hospital in HOSPITALS[task].values()])
    for number in range(len(HOSPITALS[task]) + 1, sites + 1):
        rng = _generator(0, task, f"site{number:02d}")
        values = rng.uniform(columns.min(axis=0), columns.max(axis=0))
        table[f"site{number:02d}"] = type(table[next(iter(table))])(*values)
    return table


def simulate_sites(task: str, seed: int, size: int = 96, images_per_site: int = 60, sites: int = 6) -> list[Site]:
    """Simulated hospitals; the same arguments give the same bytes, whatever other hospitals exist.

    task: "prostate" (1 channel; prostate = 1) or "fundus" (RGB; rim = 1, cup = 2).
    size: height and width in pixels; the field of view stays the same.
    """
    draw = {"prostate": _prostate, "fundus": _fundus}[task]
    result = []
    for name, hospital in hospital_table(task, sites).items():
        rng = _generator(seed, task, name)
        images, masks = zip(*(draw(hospital, rng, size) for _ in range(images_per_site)))
        spacing = (FIELD_OF_VIEW / size,) * 2 if task == "prostate" else (1.0, 1.0)
        cases = [f"{name}-{number:03d}" for number in range(images_per_site)]
        result.append(make_site(name, [normalise(image) for image in images], masks, cases,
                                split_indices(images_per_site), spacing))
    return result


# ---------------------------------------------------------------- simulated hospitals: how it is drawn
FIELD_OF_VIEW = 150.0  # mm, of the simulated MRI


def _generator(seed: int, task: str, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(task.encode()), zlib.crc32(name.encode())])


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of the last two axes; sigma in pixels; weights renormalised at the border."""
    position = np.arange(image.shape[-1])
    kernel = np.exp(-0.5 * ((position[:, None] - position) / max(sigma, 1e-3)) ** 2)
    kernel /= kernel.sum(axis=1, keepdims=True)
    return kernel @ image @ kernel.T


def _texture(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """Smooth noise (size, size) with mean 0 and variance 1."""
    return normalise(_blur(rng.normal(size=(size, size)), sigma))


def _wobble(rng: np.random.Generator, angle: np.ndarray, orders: range) -> np.ndarray:
    """A random periodic function of the angle with variance about 1, from the harmonics in `orders`."""
    waves = [rng.normal() * np.cos(k * angle) + rng.normal() * np.sin(k * angle) for k in orders]
    return sum(waves) / len(orders) ** 0.5


def _ellipse(x, y, cx, cy, a, b, power=2.0):
    """About the distance to an ellipse with half axes a, b; positive inside; power above 2: squarer."""
    return (1 - (np.abs((x - cx) / a) ** power + np.abs((y - cy) / b) ** power) ** (1 / power)) * min(a, b)


def _paint(image: np.ndarray, inside: np.ndarray, value, edge: float) -> None:
    """Put `value` where the distance `inside` is positive, with a soft edge; image (..., H, W), in place."""
    alpha = 1 / (1 + np.exp(np.clip(-inside / edge, -50, 50)))
    image += alpha * (value - image)


def _prostate(h: ProstateHospital, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An axial T2 slice (1, size, size) and its mask: x to the right, y to the back, in mm."""
    pixel = FIELD_OF_VIEW / size
    y, x = (np.mgrid[:size, :size] + 0.5) * pixel - FIELD_OF_VIEW / 2
    half_width = h.gland * np.exp(h.spread * rng.normal())
    half_height = half_width * rng.uniform(0.68, 0.85)
    gx, gy = rng.normal(0, 3), rng.normal(-4, 4)  # centre of the gland
    with_coil = rng.random() < h.coil

    image = np.full((size, size), 0.02)
    _paint(image, _ellipse(x, y, 0, 2, 96, rng.uniform(67, 72), power=2.8), 0.75, 1)  # skin, subcutaneous fat
    _paint(image, _ellipse(x, y, 0, 2, 86, rng.uniform(55, 60), power=2.8), 0.24, 1)  # muscle of wall and buttocks
    _paint(image, _ellipse(x, y, 0, 3, 56, rng.uniform(44, 49), power=2.5), 0.58, 2)  # pelvic fat
    for side in (-1, 1):
        hip = side * rng.uniform(67, 73)
        _paint(image, _ellipse(x, y, hip, -6, 23, 23), 0.06, 1)  # cortical bone
        _paint(image, _ellipse(x, y, hip, -6, 20, 20), 0.55, 1)  # marrow of the femoral head
        _paint(image, _ellipse(x, y, side * rng.uniform(41, 46), 2, 7, 27), 0.20, 1.5)  # obturator internus
        _paint(image, _ellipse(x, y, gx + side * (half_width + 4), gy + 5, 2.5, 17), 0.22, 1)  # levator ani
    if rng.random() < 0.5:  # towards the base the bladder lies in front of the gland
        height = rng.uniform(10, 20)
        bladder = gx + rng.normal(0, 3), gy - half_height - 0.7 * height
        width = rng.uniform(22, 36)
        _paint(image, _ellipse(x, y, *bladder, width + 3, height + 3), 0.22, 1)
        _paint(image, _ellipse(x, y, *bladder, width, height), 0.92, 1)
    width, height = (rng.uniform(19, 24), rng.uniform(14, 18)) if with_coil else (
        rng.uniform(11, 19), rng.uniform(8, 13))
    rectum = gx + rng.normal(0, 2), gy + half_height + height - (1 if with_coil else -1)
    _paint(image, _ellipse(x, y, *rectum, width, height), 0.34, 1)
    content = 0.02 if with_coil else rng.choice([0.03, 0.4, 0.7])  # coil balloon; gas, stool or gel
    wall = 2.0 if with_coil else 4.0
    _paint(image, _ellipse(x, y, *rectum, width - wall, height - wall), content, 1)

    # The gland: distance from its centre over R(angle); the outline is flatter where the rectum pushes.
    angle, distance = np.arctan2(y - gy, x - gx), np.hypot(x - gx, y - gy)
    outline = half_width * half_height / np.hypot(half_height * np.cos(angle), half_width * np.sin(angle))
    outline = outline * (1 + 0.04 * _wobble(rng, angle, range(2, 5)))
    outline -= (3.0 if with_coil else 1.0) * np.clip(np.sin(angle), 0, 1) ** 4
    central = 0.42 + rng.normal(0, 0.03)
    peripheral = central + h.zonal + rng.normal(0, 0.06)
    nodules = 0.07 * _texture(rng, size, 3.0 / pixel)
    _paint(image, outline - distance, 0.25, 0.6)  # capsule
    _paint(image, outline - distance - 1.0, peripheral + 0.5 * nodules, 0.6)
    zone = rng.uniform(0.60, 0.80)
    _paint(image, _ellipse(x, y, gx, gy - 0.22 * half_height, zone * half_width, zone * half_height),
           central + nodules, 1)
    _paint(image, _ellipse(x, y, gx, gy - 0.85 * half_height, 0.4 * half_width, 4), 0.22, 1.5)  # anterior stroma

    image = image * (1 + 0.06 * _texture(rng, size, 2.0 / pixel))
    image = np.clip(image, 0, None) ** h.gamma
    direction = rng.uniform(0, 2 * np.pi)
    slope = (x * np.cos(direction) + y * np.sin(direction)) / (FIELD_OF_VIEW / 2)
    image *= np.exp(h.bias * (slope + 0.5 * _texture(rng, size, 40.0 / pixel)))
    if with_coil:  # the signal flares towards the coil
        image *= 1 + 2.5 * np.exp(-np.hypot(x - rectum[0], y - rectum[1]) / 22)
    image = _blur(image, h.blur / pixel)
    noise = h.noise * rng.normal(size=(2, size, size))
    image = np.hypot(image + noise[0], noise[1])  # Rician

    drawn = outline + h.offset + h.rough * _wobble(rng, angle, range(3, 9))
    return image[None], distance < drawn


def _fundus(h: FundusHospital, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A crop around the optic disc, RGB (3, size, size), and its mask; coordinates from -1 to 1."""
    y, x = (np.mgrid[:size, :size] + 0.5) * 2 / size - 1
    nasal = rng.choice([-1, 1])  # left or right eye
    dx, dy = np.clip(rng.normal(0, h.off_centre, 2), -0.35, 0.35)
    x, y = x - dx, y - dy
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    radius = h.field * np.exp(rng.normal(0, 0.07))
    disc = radius * (1 + 0.06 * np.sin(angle) ** 2 + 0.02 * _wobble(rng, angle, range(2, 5)))
    ratio = np.clip(rng.normal(0.70, 0.06) if rng.random() < h.glaucoma else rng.normal(0.45, 0.08), 0.25, 0.85)
    shift = nasal * rng.normal(-0.05, 0.03) * radius  # the cup lies a little to the temple
    cup_angle, cup_distance = np.arctan2(y, x - shift), np.hypot(x - shift, y)
    cup = ratio * radius * (1 + 0.08 * np.sin(cup_angle) ** 2 + 0.04 * _wobble(rng, cup_angle, range(2, 5)))

    def colour(*rgb):
        return np.array(rgb)[:, None, None]

    image = colour(0.58, 0.27, 0.10) * np.exp(0.10 * _texture(rng, size, 0.05 * size) + rng.normal(0, 0.08))
    if rng.random() < 0.3:  # peripapillary atrophy: a pale crescent at the temporal rim
        _paint(image, _ellipse(x, y, -nasal * 0.22 * radius, 0, 1.12 * radius, 1.12 * radius),
               colour(0.78, 0.50, 0.28), 0.02)
    _paint(image, disc - distance, colour(0.76, 0.43, 0.20) * np.exp(rng.normal(0, 0.05)), 0.02)
    pallor = rng.uniform(0.6, 1.0)  # how clearly the cup stands out
    pale = colour(0.76, 0.43, 0.20) * (1 - pallor) + colour(0.98, 0.82, 0.58) * pallor
    _paint(image, cup - cup_distance, pale, rng.uniform(0.03, 0.06))

    # Vessels: each follows a ray that bends with the distance r from the point where all converge.
    origin_x, origin_y = x - nasal * 0.25 * radius, y
    ray, r = np.arctan2(origin_y, origin_x), np.hypot(origin_x, origin_y)
    for number in range(12):
        start = np.pi / 2 * (1 if number % 2 else -1) + rng.normal(0, 0.5)
        bend = rng.normal(0, 0.5) + (0.6 if np.cos(start) * nasal < 0 else -0.2) * np.sin(start) * nasal
        path = start + bend * r + 0.08 * np.sin(rng.uniform(4, 9) * r + rng.uniform(0, 6))
        apart = np.abs(np.angle(np.exp(1j * (ray - path)))) * r
        thick = (0.028 if number < 6 else 0.015) * rng.uniform(0.7, 1.2) * (1 - 0.35 * np.clip(r, 0, 1.4))
        red = colour(0.42, 0.10, 0.06) if number % 3 else colour(0.55, 0.17, 0.09)  # vein, artery
        _paint(image, np.where(r > rng.uniform(0, 0.1), thick - apart, -1), 0.75 * red + 0.25 * image, 0.008)

    tilt_x, tilt_y = rng.normal(0, 0.3, 2)
    image *= np.clip(1 - h.vignette * ((x - tilt_x) ** 2 + (y - tilt_y) ** 2) / 2, 0.1, None)
    image = np.clip(image * colour(h.red, h.green, h.blue), 0, 1) ** h.gamma
    image = _blur(image, h.blur / 100 * size) + h.noise * rng.normal(size=(3, size, size))

    disc_drawn = h.disc * disc * (1 + h.rough * _wobble(rng, angle, range(2, 7)))
    cup_drawn = h.cup * cup * (1 + 2 * h.rough * _wobble(rng, cup_angle, range(2, 7)))
    in_disc = distance < disc_drawn
    return np.clip(image, 0, 1), in_disc.astype(int) + (in_disc & (cup_distance < cup_drawn))


# ---------------------------------------------------------------- a folder of real images
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = ("train", "val", "test")


def load_folder(root: str | Path, size: int = 96, mask_values: list[int] | None = None,
                seed: int = 0) -> tuple[list[Site], int, int]:
    """Real images: `root/<site>/images/*` with `root/<site>/masks/<same stem>.png`.

    Images: PNG, JPEG or TIFF, grey or RGB, any size; grey everywhere gives one channel, else all become RGB.
    Masks: one channel of class indices 0 … K-1, or of the grey values `mask_values`, one a class.
    Both are resized to size × size, images by an antialiasing bilinear filter, masks by the nearest pixel;
    distances then count resized pixels. A site is split by a shuffle of (seed, site), 60 : 15 : 25, or by
    folders `root/<site>/{train,val,test}/{images,masks}`.
    Returns sites by name, number of channels, number of classes.
    Raises ValueError or FileNotFoundError, naming the file and a way out.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders = [f for f in sorted(root.iterdir()) if (f / "images").is_dir() or any((f / s).is_dir() for s in SPLITS)]
    if not folders:
        raise FileNotFoundError(f"{root}: no sites found; expected {root}/<site>/images and {root}/<site>/masks, "
                                f"or <site>/train, val and test with these two in each")
    found = {folder.name: _pairs(folder) for folder in folders}
    images, masks, values = {}, {}, {}  # by image file; only the resized ones stay in memory
    for name, parts in found.items():
        for file, mask_file in (pair for part in parts for pair in part):
            image, mask = _read_image(file), _read_mask(mask_file, mask_values)
            if image.shape[:2] != mask.shape:
                raise ValueError(f"site '{name}': image {file} is {image.shape[0]}×{image.shape[1]} "
                                 f"but its mask is {mask.shape[0]}×{mask.shape[1]}")
            values[mask_file] = np.unique(mask).tolist()
            images[file] = _resize(image, size)
            masks[file] = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    every_value = sorted(set().union(*values.values()))
    classes = len(mask_values or every_value)
    for mask_file, own in values.items():
        if own[-1] >= classes:
            raise ValueError(f"mask {mask_file}: class index {own[-1]} is out of range; all masks together hold "
                             f"{classes} values, so indices 0 … {classes - 1} were expected; if they are grey "
                             f"values, say --mask-values {' '.join(map(str, every_value))}")
    if len(every_value) < 2:
        raise ValueError(f"{root}: every mask pixel is {every_value[0]}; at least two classes are needed")
    channels = max(len(image) for image in images.values())

    sites = []
    for name, parts in found.items():
        if len(parts) == 1:
            order = _generator(seed, "folder", name).permutation(len(parts[0]))
            indices = [order[part] for part in split_indices(len(order))]
        else:
            indices = np.split(np.arange(sum(map(len, parts))), np.cumsum([len(part) for part in parts])[:-1])
        files = [file for part in parts for file, _ in part]
        cases = [str(file.relative_to(root / name)) for file in files]
        planes = [normalise(np.repeat(images[f], channels // len(images[f]), axis=0)) for f in files]
        sites.append(make_site(name, planes, [masks[f] for f in files], cases, indices))
    return sites, channels, classes


def _pairs(site: Path) -> list[list[tuple[Path, Path]]]:
    """(image, mask) files of a site, in one list or in three: train, validation, test."""
    folders = [site] if (site / "images").is_dir() else [site / split for split in SPLITS]
    parts = []
    for folder in folders:
        images, masks = folder / "images", folder / "masks"
        for wanted in (images, masks):
            if not wanted.is_dir():
                raise FileNotFoundError(f"site '{site.name}': no folder {wanted}")
        files = [f for f in sorted(images.iterdir()) if f.suffix.lower() in IMAGE_TYPES and f.name[0] != "."]
        missing = [f for f in files if not (masks / f"{f.stem}.png").is_file()]
        if missing:
            raise FileNotFoundError(f"site '{site.name}': {missing[0]} has no mask {masks / missing[0].stem}.png "
                                    f"({len(missing)} of {len(files)} images without; names must match)")
        least = 4 if len(folders) == 1 else 1
        if len(files) < least:
            raise ValueError(f"site '{site.name}': {len(files)} images in {images}, at least {least} are needed")
        parts.append([(f, masks / f"{f.stem}.png") for f in files])
    return parts


def _open(path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); replace or remove the file") from None


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 1 or 3) float32."""
    image = _open(path)
    if image.mode == "LA":
        image = image.convert("L")
    if image.mode in ("1", "L") or image.mode[0] in "IF":
        return np.asarray(image, dtype=np.float32)[:, :, None]
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _read_mask(path: Path, mask_values: list[int] | None) -> np.ndarray:
    """(H, W) class indices, uint8 or as stored."""
    image = _open(path)
    mask = np.asarray(image)
    if mask.ndim != 2:
        raise ValueError(f"mask {path}: one channel of class indices is expected, found mode {image.mode}")
    if mask_values is None:
        return mask.astype(np.int32)
    unknown = np.setdiff1d(mask, mask_values)
    if len(unknown):
        raise ValueError(f"mask {path}: grey value {unknown[0]} is not among --mask-values "
                         f"{' '.join(map(str, mask_values))}")
    order = np.argsort(mask_values)
    return order[np.searchsorted(np.asarray(mask_values)[order], mask)].astype(np.int32)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C) → (C, size, size) by pillow's bilinear filter, which averages where it shrinks."""
    return np.stack([Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR)
                     for plane in np.ascontiguousarray(image.transpose(2, 0, 1))])
