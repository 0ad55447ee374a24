"""Where images come from: simulated hospitals of two tasks, or folders of real images and volumes.

Read `Split`, `Site` and `DataSet`, then the tables of hospitals: the rest is how hospitals are
drawn and how files are read. All of it is ours. An image is normalised to mean 0 and variance 1
over all its pixels and channels together: a colour cast stays, a scanner's gain goes.
"""

import re
import warnings
import zlib
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

STRUCTURES = {"prostate": {"prostate": (1,)}, "fundus": {"disc": (1, 2), "cup": (2,)}}
CHANNELS = {"prostate": 1, "fundus": 3}


@dataclass
class Split:
    """images: (N, C, H, W) float32; of volumes (N, 3, H, W) float16, a slice between its two;
    masks: (N, H, W) uint8, classes; cases: N names, that of a volume for each of its slices."""

    images: Tensor
    masks: Tensor
    cases: list[str]

    def to(self, device: str) -> "Split":
        """The same on a device, images with their channels last in memory."""
        images = self.images.to(device, memory_format=torch.channels_last)
        return Split(images, self.masks.to(device), self.cases)

    def shown(self, number: int) -> Tensor:
        """One image as pictures show it, (C, H, W) float32: of a stack the middle slice alone."""
        image = self.images[number].float()
        return image[1:2] if self.images.dtype == torch.float16 else image


def joined(splits: list[Split]) -> Split:
    """All their images, one split after the other."""
    images = torch.cat([split.images for split in splits])
    masks = torch.cat([split.masks for split in splits])
    return Split(images, masks, sum((split.cases for split in splits), []))


@dataclass
class Site:
    """One hospital. spacing: of each case the size of a pixel (row, column) or voxel (slice, row,
    column), in mm, or in pixels where mm are not known; shapes: of the files as read, or []."""

    name: str
    train: Split
    validation: Split
    test: Split
    spacing: dict[str, tuple[float, ...]]
    shapes: list[tuple[int, ...]]

    @property
    def everything(self) -> Split:
        """The three parts one after the other."""
        return joined([self.train, self.validation, self.test])


@dataclass
class DataSet:
    """Sites and what they share: channels, classes of each structure, unit of the spacing ("mm" or
    "px"), kind ("simulated", "images", "fundus", "volumes"), grey values of the masks if given."""

    sites: list[Site]
    channels: int
    structures: dict[str, tuple[int, ...]]
    unit: str
    kind: str
    mask_values: list[int] | None = None

    @property
    def classes(self) -> int:
        return 1 + max(max(classes) for classes in self.structures.values())

    def fingerprint(self) -> str:
        """8 hex digits: the CRC-32 of all images and masks."""
        crc = 0
        for site in self.sites:
            for part in (site.train, site.validation, site.test):
                crc = zlib.crc32(part.images.cpu().contiguous().numpy(), crc)
                crc = zlib.crc32(part.masks.cpu().contiguous().numpy(), crc)
        return f"{crc:08x}"


def split_indices(count: int) -> list[np.ndarray]:
    """0 … count-1 cut into train, validation and test: 60, 15 and 25 per cent, none empty."""
    test = max(1, round(0.25 * count))
    validation = max(1, round(0.15 * count))
    return np.split(np.arange(count), [count - test - validation, count - test])


def normalise(image: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1 over the whole image, float32; a constant image becomes zero."""
    image = image.astype(np.float64)  # the squares of large values overflow float32
    return ((image - image.mean()) / max(float(image.std()), 1e-6)).astype(np.float32)


# ---------------------------------------------------------------- simulated hospitals: differences
# gamma: contrast curve, intensity ** gamma    bias: amplitude of the bias field, log scale
# noise: Rician, share of the brightest tissue    blur: Gaussian sigma, mm
# coil: share of patients with an endorectal coil    gland: mean half-width of the gland, mm
# spread: its relative standard deviation    zonal: brightness of the peripheral over central zone
# offset: contour drawn outside (+) or inside (-) of the capsule, mm    rough: its unsteadiness, mm
Prostate = namedtuple("Prostate", "gamma bias noise blur coil gland spread zonal offset rough")

# red, green, blue: colour cast, gain of each channel    gamma: contrast curve
# vignette: loss of light towards the rim    blur: Gaussian sigma, per cent of the image
# noise: Gaussian, share of full scale    field: radius of the disc, share of half the image
# off_centre: standard deviation of its position, likewise    glaucoma: share with a large cup
# disc, cup: drawn over visible radius    rough: unsteadiness of the contours, relative
Fundus = namedtuple("Fundus", "red green blue gamma vignette blur noise field off_centre "
                              "glaucoma disc cup rough")

PROSTATE = {
    #                gamma  bias noise blur  coil gland spread zonal offset rough
    "Alder": Prostate(1.00, 0.15, 0.04, 0.8, 0.00, 24.0, 0.12, 0.26, 0.0, 0.6),
    "Birch": Prostate(0.55, 0.35, 0.06, 1.2, 0.00, 22.0, 0.15, 0.18, 1.6, 0.9),
    "Cedar": Prostate(1.40, 0.30, 0.07, 1.0, 1.00, 23.0, 0.15, 0.28, -1.4, 0.7),
    "Hazel": Prostate(1.20, 0.25, 0.12, 2.2, 0.00, 28.0, 0.17, 0.06, 1.0, 1.3),
    "Linden": Prostate(0.80, 0.60, 0.05, 0.9, 0.20, 25.0, 0.18, 0.20, -2.2, 0.7),
    "Rowan": Prostate(1.90, 0.40, 0.09, 1.5, 0.00, 19.0, 0.18, 0.12, 2.2, 1.0),
}
FUNDUS = {
    #                 red  green  blue gamma vign. blur noise field off-c. glau. disc  cup  rough
    "Crane": Fundus(1.00, 1.00, 1.00, 1.00, 0.20, 0.8, 0.02, 0.44, 0.06, 0.20, 1.00, 1.00, 0.02),
    "Finch": Fundus(1.12, 0.88, 0.75, 0.85, 0.35, 1.2, 0.03, 0.40, 0.10, 0.50, 1.03, 1.12, 0.03),
    "Heron": Fundus(0.88, 1.05, 1.15, 1.20, 0.30, 1.6, 0.04, 0.47, 0.08, 0.30, 0.97, 0.88, 0.03),
    "Plover": Fundus(1.08, 1.00, 0.75, 1.18, 0.40, 1.0, 0.04, 0.39, 0.12, 0.60, 1.04, 0.92, 0.03),
    "Robin": Fundus(0.95, 0.85, 0.90, 0.80, 0.25, 2.0, 0.03, 0.45, 0.10, 0.40, 0.98, 1.15, 0.03),
    "Swift": Fundus(1.12, 1.10, 0.85, 1.10, 0.45, 1.4, 0.05, 0.42, 0.12, 0.60, 1.02, 1.04, 0.02),
}
HOSPITALS = {"prostate": PROSTATE, "fundus": FUNDUS}
FIELD_OF_VIEW = 150.0  # mm, of the simulated MRI


def hospital_table(task: str, sites: int = 6) -> dict[str, Prostate | Fundus]:
    """The first `sites` hospitals; those beyond six draw each property from the six's range."""
    table = dict(list(HOSPITALS[task].items())[:sites])
    columns = np.array(list(HOSPITALS[task].values()))
    for number in range(len(HOSPITALS[task]) + 1, sites + 1):
        name = f"site{number:02d}"
        values = _generator(0, task, name).uniform(columns.min(axis=0), columns.max(axis=0))
        table[name] = (Prostate if task == "prostate" else Fundus)(*values)
    return table


def simulate_sites(task: str, seed: int, size: int = 96, images_per_site: int = 60,
                   sites: int = 6) -> DataSet:
    """Simulated hospitals; the same arguments give the same bytes, whatever other hospitals exist.

    task: "prostate" (1 channel; prostate = 1) or "fundus" (RGB; rim = 1, cup = 2).
    size: height and width in pixels; the field of view stays the same.
    """
    draw = _prostate if task == "prostate" else _fundus
    pixel, unit = (FIELD_OF_VIEW / size, "mm") if task == "prostate" else (1.0, "px")
    result = []
    for name, hospital in hospital_table(task, sites).items():
        rng = _generator(seed, task, name)
        pairs = [draw(hospital, rng, size) for _ in range(images_per_site)]
        cases = [f"{name}-{number:03d}" for number in range(images_per_site)]
        splits = []
        for numbers in split_indices(images_per_site):
            images = np.stack([normalise(pairs[i][0]) for i in numbers])
            masks = np.stack([pairs[i][1] for i in numbers]).astype(np.uint8)
            splits.append(Split(torch.from_numpy(images), torch.from_numpy(masks),
                                [cases[i] for i in numbers]))
        result.append(Site(name, *splits, {case: (pixel, pixel) for case in cases}, []))
    return DataSet(result, CHANNELS[task], STRUCTURES[task], unit, "simulated")


# ---------------------------------------------------------------- simulated hospitals: the drawing
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
    """A random periodic function of the angle, variance about 1, of the harmonics in `orders`."""
    waves = [rng.normal() * np.cos(k * angle) + rng.normal() * np.sin(k * angle) for k in orders]
    return sum(waves) / len(orders) ** 0.5


def _ellipse(x, y, cx, cy, a, b, power=2.0):
    """About the distance to an ellipse of half axes a, b; positive inside; power > 2: squarer."""
    radius = (np.abs((x - cx) / a) ** power + np.abs((y - cy) / b) ** power) ** (1 / power)
    return (1 - radius) * min(a, b)


def _paint(image: np.ndarray, inside: np.ndarray, value, edge: float) -> None:
    """Where the distance `inside` is positive: `value`, with a soft edge; (..., H, W), in place."""
    alpha = 1 / (1 + np.exp(np.clip(-inside / edge, -50, 50)))
    image += alpha * (value - image)


def _prostate(h: Prostate, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An axial T2 slice (1, size, size) and its mask: x to the right, y to the back, in mm."""
    pixel = FIELD_OF_VIEW / size
    y, x = (np.mgrid[:size, :size] + 0.5) * pixel - FIELD_OF_VIEW / 2
    image = np.full((size, size), 0.02)

    def tissue(cx, cy, a, b, value, edge=1.0, power=2.0):
        _paint(image, _ellipse(x, y, cx, cy, a, b, power), value, edge)

    half_width = h.gland * np.exp(h.spread * rng.normal())
    half_height = half_width * rng.uniform(0.68, 0.85)
    gx, gy = rng.normal(0, 3), rng.normal(-4, 4)  # centre of the gland
    with_coil = rng.random() < h.coil
    tissue(0, 2, 96, rng.uniform(67, 72), 0.75, power=2.8)  # skin, subcutaneous fat
    tissue(0, 2, 86, rng.uniform(55, 60), 0.24, power=2.8)  # muscle of wall and buttocks
    tissue(0, 3, 56, rng.uniform(44, 49), 0.58, 2, power=2.5)  # pelvic fat
    for side in (-1, 1):
        hip = side * rng.uniform(67, 73)
        tissue(hip, -6, 23, 23, 0.06)  # cortical bone
        tissue(hip, -6, 20, 20, 0.55)  # marrow of the femoral head
        tissue(side * rng.uniform(41, 46), 2, 7, 27, 0.20, 1.5)  # obturator internus
        tissue(gx + side * (half_width + 4), gy + 5, 2.5, 17, 0.22)  # levator ani
    if rng.random() < 0.5:  # towards the base the bladder lies in front of the gland
        height = rng.uniform(10, 20)
        bladder = gx + rng.normal(0, 3), gy - half_height - 0.7 * height
        width = rng.uniform(22, 36)
        tissue(*bladder, width + 3, height + 3, 0.22)
        tissue(*bladder, width, height, 0.92)
    widths, heights = ((19, 24), (14, 18)) if with_coil else ((11, 19), (8, 13))
    width, height = rng.uniform(*widths), rng.uniform(*heights)
    rectum = gx + rng.normal(0, 2), gy + half_height + height - (1 if with_coil else -1)
    tissue(*rectum, width, height, 0.34)
    content = 0.02 if with_coil else rng.choice([0.03, 0.4, 0.7])  # coil balloon; gas, stool, gel
    wall = 2.0 if with_coil else 4.0
    tissue(*rectum, width - wall, height - wall, content)

    # The gland: distance from its centre over R(angle); flatter where the rectum pushes.
    angle, distance = np.arctan2(y - gy, x - gx), np.hypot(x - gx, y - gy)
    outline = np.hypot(half_height * np.cos(angle), half_width * np.sin(angle))
    outline = half_width * half_height / outline
    outline = outline * (1 + 0.04 * _wobble(rng, angle, range(2, 5)))
    outline -= (3.0 if with_coil else 1.0) * np.clip(np.sin(angle), 0, 1) ** 4
    central = 0.42 + rng.normal(0, 0.03)
    peripheral = central + h.zonal + rng.normal(0, 0.06)
    nodules = 0.07 * _texture(rng, size, 3.0 / pixel)
    _paint(image, outline - distance, 0.25, 0.6)  # capsule
    _paint(image, outline - distance - 1.0, peripheral + 0.5 * nodules, 0.6)
    zone = rng.uniform(0.60, 0.80)
    tissue(gx, gy - 0.22 * half_height, zone * half_width, zone * half_height, central + nodules)
    tissue(gx, gy - 0.85 * half_height, 0.4 * half_width, 4, 0.22, 1.5)  # anterior stroma
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


def _fundus(h: Fundus, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A crop around the optic disc, RGB (3, size, size), and its mask; coordinates from -1 to 1."""
    def colour(*rgb):
        return np.array(rgb)[:, None, None]

    y, x = (np.mgrid[:size, :size] + 0.5) * 2 / size - 1
    nasal = rng.choice([-1, 1])  # left or right eye
    dx, dy = np.clip(rng.normal(0, h.off_centre, 2), -0.35, 0.35)
    x, y = x - dx, y - dy
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    radius = h.field * np.exp(rng.normal(0, 0.07))
    disc = radius * (1 + 0.06 * np.sin(angle) ** 2 + 0.02 * _wobble(rng, angle, range(2, 5)))
    ratio = rng.normal(0.70, 0.06) if rng.random() < h.glaucoma else rng.normal(0.45, 0.08)
    ratio = np.clip(ratio, 0.25, 0.85)
    shift = nasal * rng.normal(-0.05, 0.03) * radius  # the cup lies a little to the temple
    cup_angle, cup_distance = np.arctan2(y, x - shift), np.hypot(x - shift, y)
    waves = 0.08 * np.sin(cup_angle) ** 2
    cup = ratio * radius * (1 + waves + 0.04 * _wobble(rng, cup_angle, range(2, 5)))
    image = np.exp(0.10 * _texture(rng, size, 0.05 * size) + rng.normal(0, 0.08))
    image = colour(0.58, 0.27, 0.10) * image
    if rng.random() < 0.3:  # peripapillary atrophy: a pale crescent at the temporal rim
        crescent = _ellipse(x, y, -nasal * 0.22 * radius, 0, 1.12 * radius, 1.12 * radius)
        _paint(image, crescent, colour(0.78, 0.50, 0.28), 0.02)
    rim = colour(0.76, 0.43, 0.20)
    _paint(image, disc - distance, rim * np.exp(rng.normal(0, 0.05)), 0.02)
    pallor = rng.uniform(0.6, 1.0)  # how clearly the cup stands out
    pale = rim * (1 - pallor) + colour(0.98, 0.82, 0.58) * pallor
    _paint(image, cup - cup_distance, pale, rng.uniform(0.03, 0.06))

    # Vessels: rays that bend with the distance r from the point where all of them converge.
    origin_x, origin_y = x - nasal * 0.25 * radius, y
    ray, r = np.arctan2(origin_y, origin_x), np.hypot(origin_x, origin_y)
    for number in range(12):
        start = np.pi / 2 * (1 if number % 2 else -1) + rng.normal(0, 0.5)
        turn = 0.6 if np.cos(start) * nasal < 0 else -0.2
        bend = rng.normal(0, 0.5) + turn * np.sin(start) * nasal
        path = start + bend * r + 0.08 * np.sin(rng.uniform(4, 9) * r + rng.uniform(0, 6))
        away = np.abs(np.angle(np.exp(1j * (ray - path)))) * r
        thick = (0.028 if number < 6 else 0.015) * rng.uniform(0.7, 1.2)
        thick = thick * (1 - 0.35 * np.clip(r, 0, 1.4))
        red = colour(0.42, 0.10, 0.06) if number % 3 else colour(0.55, 0.17, 0.09)  # vein, artery
        vessel = np.where(r > rng.uniform(0, 0.1), thick - away, -1)
        _paint(image, vessel, 0.75 * red + 0.25 * image, 0.008)
    tilt_x, tilt_y = rng.normal(0, 0.3, 2)
    image *= np.clip(1 - h.vignette * ((x - tilt_x) ** 2 + (y - tilt_y) ** 2) / 2, 0.1, None)
    image = np.clip(image * colour(h.red, h.green, h.blue), 0, 1) ** h.gamma
    image = _blur(image, h.blur / 100 * size) + h.noise * rng.normal(size=(3, size, size))
    disc_drawn = h.disc * disc * (1 + h.rough * _wobble(rng, angle, range(2, 7)))
    cup_drawn = h.cup * cup * (1 + 2 * h.rough * _wobble(rng, cup_angle, range(2, 7)))
    in_disc = distance < disc_drawn
    return np.clip(image, 0, 1), in_disc.astype(int) + (in_disc & (cup_distance < cup_drawn))


# ---------------------------------------------------------------- folders of real images
MOST_CLASSES = 32  # a photograph among the masks would make 256
MOST_VOXELS = 2**28  # of a volume: 1 GiB as float32
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
FUNDUS_VALUES = [255, 128, 0]  # background, rim, cup
RENAMED = {"ISBI": "RUNMC", "ISBI_1.5": "BMC"}  # older names of two prostate sites
RESERVED = ("global", "all", "none", "pooled")  # words of the command line and the tables
LAYOUTS = ("known layouts: <site>/{images,masks}/<same stem>.png, also with {train,val,test}.txt; "
           "<site>/{train,val,test}/{images,masks}/; <site>/{train,test}/ROIs/{image,mask}/ for "
           "fundus photographs; <site>/CaseNN.nii.gz with CaseNN_segmentation.nii.gz")


def load_folder(root: str | Path, size: int = 96, mask_values: list[int] | None = None,
                seed: int = 0, skip_empty: bool = False) -> DataSet:
    """Real images or volumes in one of LAYOUTS; capitals of folders do not matter.

    Images: of IMAGE_TYPES, grey or RGB, any size; grey everywhere: 1 channel, else all are RGB.
    Masks: class indices, or the grey values `mask_values`, one a class; those of fundus ROIs are
    255 background, 128 rim, 0 cup unless three others are given, values between go to the nearest.
    Volumes: 3-D NIfTI, clipped at the 0.5 and 99.5 percentile; every slice with its neighbours is
    one image; labels above 0 are prostate. skip_empty: train without slices that hold none.
    All become size × size: images by a bilinear filter that averages, masks by the nearest pixel.
    A site without a split is split by a shuffle of (seed, site), volumes as wholes.
    Raises ValueError, FileNotFoundError or ImportError, naming the file and a way out; warns of
    what is left out.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found, nothing = {}, []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name[0] == ".":
            continue
        name = RENAMED.get(folder.name, folder.name)
        if not name.isprintable() or name.lower() in RESERVED:
            why = "is a word of the program" if name.isprintable() else "cannot be printed"
            raise ValueError(f"{root}: the name of the site {name!r} {why}; rename it")
        parts = _parts(folder)
        if parts and name in found:
            raise ValueError(f"{root}: two folders hold the site {name}, one by its older name; "
                             "remove one")
        if parts:
            found[name] = _split(parts, seed, name)
        else:
            nothing.append(folder)
    if not found:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
        raise FileNotFoundError(f"{root}: no sites found, only "
                                f"{', '.join(entries[:8]) or 'nothing'}; {LAYOUTS}")
    _left_out(nothing, "in no known layout (README: folders)")
    images = [image for parts in found.values() for image, _ in sum(parts, [])]
    kinds = {"volumes" if is_volume(image) else "fundus"
             if image.parent.parent.name.lower() == "rois" else "images" for image in images}
    if len(kinds) > 1:
        raise ValueError(f"{root}: different layouts in one folder; {LAYOUTS}")
    kind = kinds.pop()
    if kind == "volumes":
        if mask_values:
            raise ValueError(f"{root}: labels of volumes above 0 are prostate; "
                             "leave out --mask-values")
        sites = [_volume_site(name, parts, size, skip_empty) for name, parts in found.items()]
        return DataSet(sites, 3, STRUCTURES["prostate"], "mm", kind)
    if mask_values and (len(set(mask_values)) < len(mask_values)
                        or kind == "fundus" and len(mask_values) != 3):
        wanted = "three values (background, rim, cup)" if kind == "fundus" else "a value a class"
        raise ValueError(f"{root}: --mask-values takes {wanted}, each once, not {mask_values}")
    values = FUNDUS_VALUES if kind == "fundus" and not mask_values else mask_values
    return _image_sites(root, found, size, values, kind)


def _left_out(paths: list[Path], why: str) -> None:
    if paths:
        warnings.warn(f"left out: {len(paths)} {why}, such as {paths[0]}", stacklevel=2)


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def stem(path: Path) -> str:
    """The name without its ending, .nii.gz being one."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I) if is_volume(path) else path.stem


def pairs_of(images: Path, masks: Path | None = None,
             strict: bool = True) -> list[tuple[Path, Path | None]]:
    """The images and volumes of a folder with their masks: those of the same stem in the folder
    `masks`, or of the stem with _segmentation, also in the same folder. Without `masks`: no masks,
    and none is taken for an image. A mask or image that is missing is an error where `strict`."""
    own, together, drawn = _files(images), masks == images, {}
    theirs = own if masks is None or together else _files(masks)
    for name, file in theirs.items():
        if name.lower().endswith("_segmentation"):
            drawn[name[:-len("_segmentation")]] = file
        elif not together:
            drawn.setdefault(name, file)
    if theirs is own:
        own = {name: file for name, file in own.items()
               if not name.lower().endswith("_segmentation")}
    if masks is None:
        return [(file, None) for file in own.values()]
    alone = [file for name, file in drawn.items() if name not in own]
    if strict and together and alone:
        raise FileNotFoundError(f"{alone[0]} is a segmentation without its volume")
    missing = [file for name, file in own.items() if name not in drawn]
    if strict and missing:
        name = stem(missing[0]) + ("_segmentation.nii.gz" if is_volume(missing[0]) else ".png")
        raise FileNotFoundError(f"{missing[0]} has no mask {masks / name} ({len(missing)} of "
                                f"{len(own)} images without; names must match)")
    _left_out(alone, "masks without an image of the same name")
    return [(file, drawn.get(name)) for name, file in own.items()]


def _files(folder: Path) -> dict[str, Path]:
    """Images and volumes of a folder by their stems."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files, unknown = {}, []
    for file in sorted(folder.iterdir()):
        if not is_volume(file) and file.suffix.lower() not in IMAGE_TYPES:
            if file.name[0] != "." and file not in _lists(folder).values():
                unknown.append(file)
        elif file.name[0] != "." and files.setdefault(stem(file), file) != file:
            raise ValueError(f"{files[stem(file)]} and {file.name} differ only in their endings")
    _left_out(unknown, "that are neither images nor volumes")
    return files


def _below(folder: Path | None, *names: str) -> Path | None:
    """The folder in a folder that has one of these names, whatever its capitals."""
    entries = sorted(folder.iterdir()) if folder else []
    found = [entry for entry in entries if entry.name.lower() in names and entry.is_dir()]
    if len(found) > 1:
        raise ValueError(f"two folders hold one thing, {found[0]} and {found[1].name}; keep one")
    return found[0] if found else None


def _parts(site: Path) -> dict[str, list[tuple[Path, Path]]]:
    """(image, mask) files of a site by part: "all", or "train", "test" and perhaps "val"; or {}."""
    result, used = {}, []
    lists = _lists(site)
    if any(is_volume(file) for file in site.iterdir()):
        return _listed(site, pairs_of(site, site), lists)
    places = [("all", site), *((part, _below(site, *names)) for part, names in PARTS.items())]
    for part, place in places:
        for folder in (place, _below(place, "rois")):
            images, masks = _below(folder, "images", "image"), _below(folder, "masks", "mask")
            used += [place, images, masks] if images or masks else []
            if not images and not masks:
                continue
            if not images or not masks:
                raise FileNotFoundError(f"site '{site.name}': no folder "
                                        f"{folder / ('masks' if images else 'images')}")
            if part in result:
                raise ValueError(f"site '{site.name}': two folders hold images for {part}, one is "
                                 f"{folder}; keep one")
            result[part] = pairs_of(images, masks)
            if not result[part]:
                raise ValueError(f"site '{site.name}': no images in {images}")
    if not result:
        return {}
    unused = []
    for entry in sorted(site.iterdir()):
        counts = entry.is_dir() or entry.suffix.lower() in IMAGE_TYPES
        if counts and entry not in used and entry.name[0] != "." and entry.name.lower() != "rois":
            unused.append(entry)
    _left_out(unused, "beside the folders of images and masks")
    if list(result) == ["all"]:
        return _listed(site, result["all"], lists)
    _left_out(list(lists.values()), "lists of cases beside folders that are split already")
    return result


def _lists(site: Path) -> dict[str, Path]:
    """The lists of cases of a site by part: train.txt, val.txt and test.txt."""
    files = {file.name.lower(): file for file in site.glob("*.[tT][xX][tT]") if file.is_file()}
    named = [(part, name) for part, names in PARTS.items() for name in names]
    return {part: files[f"{name}.txt"] for part, name in named if f"{name}.txt" in files}


def _listed(site: Path, pairs: list, lists: dict[str, Path]) -> dict[str, list]:
    """Pairs by lists of one case a line, with or without its ending; without lists under "all"."""
    if not lists:
        return {"all": pairs}
    by_name = {stem(image): (image, mask) for image, mask in pairs}
    result = {}
    for part, file in lists.items():
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        result[part] = []
        for line in filter(None, map(str.strip, lines)):
            name = line if line in by_name else stem(Path(line))
            if name not in by_name:
                raise ValueError(f"{file}: no case {line} in {site}, or it is in two lists")
            result[part].append(by_name.pop(name))
        if not result[part]:
            raise ValueError(f"{file}: an empty list of cases; fill it or remove it")
    _left_out([image for image, _ in by_name.values()], "cases that are in no list")
    return result


def _split(parts: dict[str, list], seed: int, name: str) -> list[list[tuple[Path, Path]]]:
    """The pairs that train, validate and test."""
    rng = _generator(seed, "folder", name)
    if "all" in parts:
        pairs = parts["all"]
        if len(parts) > 1:
            raise ValueError(f"site '{name}': images lie in the folder itself and in "
                             f"{', '.join(list(parts)[1:])}; keep one of the two")
        if len(pairs) < 4:
            raise ValueError(f"site '{name}': {len(pairs)} images, at least 4 are needed")
        order = rng.permutation(len(pairs))
        return [[pairs[i] for i in order[numbers]] for numbers in split_indices(len(pairs))]
    for part in ("train", "test"):
        if part not in parts:
            raise FileNotFoundError(f"site '{name}': no images for {part}, only for "
                                    f"{', '.join(parts)}")
    train, test = parts["train"], parts["test"]
    if "val" in parts:
        return [train, parts["val"], test]
    if len(train) < 2:
        raise ValueError(f"site '{name}': 1 image to train with and none to validate; at least 2 "
                         "are needed")
    train = [train[i] for i in rng.permutation(len(train))]
    count = max(1, round(0.2 * len(train)))  # 15 of the 75 per cent that do not test
    return [train[count:], train[:count], test]


def _image_sites(root: Path, found: dict[str, list], size: int, mask_values: list[int] | None,
                 kind: str) -> DataSet:
    images, masks, shapes, values = {}, {}, {}, {}  # only the resized ones stay in memory
    for name, parts in found.items():
        for file, mask_file in sum(parts, []):
            image, mask = read_image(file), read_mask(mask_file, mask_values, kind == "fundus")
            if image.shape[:2] != mask.shape:
                raise ValueError(f"site '{name}': image {file} is {times(image.shape[:2])} but its "
                                 f"mask is {times(mask.shape)}")
            values[mask_file], shapes[file] = np.unique(mask).tolist(), mask.shape
            images[file] = resize(image.transpose(2, 0, 1), size)
            masks[file] = resize(mask[None], size, Image.Resampling.NEAREST)[0]
    every = sorted(set().union(*values.values()))
    classes = len(mask_values or every)
    for mask_file, own in values.items():
        if own[-1] >= classes:
            raise ValueError(
                f"mask {mask_file}: class index {own[-1]} is out of range; all masks together hold "
                f"{classes} values, so indices 0 … {classes - 1} were expected; if they are grey "
                f"values, say --mask-values {' '.join(map(str, every))}")
    if len(every) < 2:
        raise ValueError(f"{root}: every mask pixel is {every[0]}; two classes are needed")
    if classes > MOST_CLASSES:
        raise ValueError(f"{root}: the masks hold {classes} different values, more than "
                         f"{MOST_CLASSES} classes; if the files are masks, say which grey values "
                         "count, as --mask-values 0 255")
    channels, sites = max(map(len, images.values())), []
    for name, parts in found.items():
        splits, sizes, spacing = [], [], {}
        for pairs in parts:
            files = [file for file, _ in pairs]
            cases = ["/".join(file.relative_to(root).parts[1:]) for file in files]
            inputs = np.stack([as_input(images[file], channels) for file in files])
            truth = np.stack([masks[file] for file in files]).astype(np.uint8)
            splits.append(Split(torch.from_numpy(inputs), torch.from_numpy(truth), cases))
            sizes += [shapes[file] for file in files]
            spacing.update(dict.fromkeys(cases, (1.0, 1.0)))
        sites.append(Site(name, *splits, spacing, sizes))
    named = {f"class {number}": (number,) for number in range(1, classes)}
    structures = STRUCTURES["fundus"] if kind == "fundus" else named
    return DataSet(sites, channels, structures, "px", kind, mask_values)


def _volume_site(name: str, parts: list[list], size: int, skip_empty: bool) -> Site:
    splits, spacing, shapes = [], {}, []
    for pairs in parts:
        stacks, masks, cases = [], [], []
        for file, mask_file in pairs:
            volume, affine = read_volume(file)
            mask, mask_affine = read_volume(mask_file)
            if volume.shape != mask.shape:
                raise ValueError(f"site '{name}': volume {file} is {times(volume.shape)} but its "
                                 f"mask is {times(mask.shape)}")
            voxel = np.linalg.norm(affine[:3, :3], axis=0)
            apart = (np.abs(affine - mask_affine) @ (*volume.shape, 1))[:3].max()
            if apart > voxel.max():
                raise ValueError(f"site '{name}': by its affine {mask_file} lies {apart:.1f} mm "
                                 f"off its volume {file.name}; give it the volume's affine")
            stacks.append(normalise_volume(volume, size)[neighbours(len(volume))])
            masks.append(resize((mask > 0).astype(np.uint8), size, Image.Resampling.NEAREST))
            cases += [stem(file)] * len(volume)
            scale = (1, volume.shape[1] / size, volume.shape[2] / size)
            spacing[stem(file)] = tuple((voxel * scale).tolist())
            shapes.append(volume.shape)
        splits.append(Split(torch.from_numpy(np.concatenate(stacks)),
                            torch.from_numpy(np.concatenate(masks)), cases))
    if skip_empty:
        train = splits[0]
        kept = (train.masks > 0).flatten(1).any(dim=1)
        if not kept.any():
            raise ValueError(f"site '{name}': no slice to train with holds prostate; leave out "
                             "--skip-empty")
        cases = [train.cases[i] for i in kept.nonzero().flatten()]
        splits[0] = Split(train.images[kept], train.masks[kept], cases)
    return Site(name, *splits, spacing, shapes)


# ---------------------------------------------------------------- single files
def times(shape) -> str:
    return "×".join(map(str, shape))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 1 or 3) float32, turned as its EXIF says."""
    image = _open(path)
    grey = image.mode in ("1", "L", "LA") or image.mode[0] in "IF"
    with decoding(path):
        image = image.convert("L") if image.mode == "LA" else image
        pixels = np.array(image if grey else image.convert("RGB"), dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("it holds values that are not finite")
    return pixels.reshape(*pixels.shape[:2], -1)


def read_mask(path: Path, mask_values: list[int] | None = None,
              nearest: bool = False) -> np.ndarray:
    """(H, W) int32 class indices: the values themselves, or the place of each in `mask_values`
    (nearest: of the nearest). A palette gives its indices, a GIF and colours their greys."""
    image = _open(path)
    if path.suffix.lower() == ".gif":  # its palette differs from file to file
        image = image.convert("RGB")
    mask = np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        colours = mask[:, :, :len(image.mode.rstrip("A"))]
        mask = colours[:, :, 0] if (colours == colours[:, :, :1]).all() else mask
    if mask.ndim != 2:
        raise ValueError(f"mask {path}: one channel of class indices is expected, found mode "
                         f"{image.mode}")
    with np.errstate(invalid="ignore"):
        whole = mask.astype(np.int32)
    if (whole != mask).any() or whole.min() < 0:
        raise ValueError(f"mask {path}: class indices must be whole numbers from 0")
    if mask_values is None:
        return whole
    values, place = np.unique(whole, return_inverse=True)
    unknown = np.setdiff1d(values, mask_values)
    if len(unknown) and not nearest:
        raise ValueError(f"mask {path}: grey value {unknown[0]} is not among --mask-values "
                         f"{' '.join(map(str, mask_values))}")
    classes = np.abs(values[:, None] - np.array(mask_values)).argmin(axis=1)
    return classes[place].reshape(whole.shape).astype(np.int32)


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI volume as float32 (slice, row, column), from feet to head, front to back and the
    patient's right to left, however the file stores it; and the (4, 4) affine of this order, mm."""
    try:
        import nibabel
    except ImportError:
        raise ImportError(f"{path}: NIfTI files need nibabel; pip install nibabel") from None
    # A header that has to be repaired is an error, since its axes might be others.
    nibabel.imageglobals.logger.setLevel(100)
    with decoding(path), nibabel.imageglobals.ErrorLevel(30):
        file = nibabel.load(path)
        if len(file.shape) != 3 or not 0 < np.prod(file.shape, dtype=float) <= MOST_VOXELS:
            raise ValueError(f"a volume of three dimensions and at most {MOST_VOXELS} voxels is "
                             f"expected, found {times(file.shape)}")
        own, edge = nibabel.io_orientation(file.affine), np.linalg.norm(file.affine[:, :3], axis=0)
        if np.isnan(own).any() or not (np.isfinite(edge) & (edge > 0)).all():
            raise ValueError("its affine matrix has no direction or size for some axis")
        ours = nibabel.orientations.axcodes2ornt("SPL")
        file = file.as_reoriented(nibabel.orientations.ornt_transform(own, ours))
        values = np.ascontiguousarray(file.dataobj, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
    return values, file.affine


def write_volume(path: Path, mask: np.ndarray, like: Path) -> None:
    """A mask in `read_volume`'s order into a NIfTI file with the axes and affine of `like`."""
    import nibabel
    file = nibabel.load(like)  # the header alone
    own, ours = nibabel.io_orientation(file.affine), nibabel.orientations.axcodes2ornt("SPL")
    to_own = nibabel.orientations.ornt_transform(ours, own)
    header = file.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the grey window of the volume would hide a mask
    mask = nibabel.orientations.apply_orientation(mask.astype(np.uint8), to_own)
    nibabel.save(type(file)(mask, file.affine, header), path)


def read_pixels(path: Path) -> np.ndarray:
    """A volume of n slices, (n, H, W, 1), or one image, (1, H, W, 1 or 3)."""
    return read_volume(path)[0][..., None] if is_volume(path) else read_image(path)[None]


def read_truth(path: Path, mask_values: list[int] | None, kind: str, shape: tuple[int, ...],
               classes: int) -> np.ndarray:
    """The mask of a file of this shape (n, H, W), as classes; ValueError where it differs."""
    if is_volume(path):
        mask = (read_volume(path)[0] > 0).astype(np.int32)
    else:
        mask = read_mask(path, mask_values, kind == "fundus")[None]
    if mask.shape != shape or mask.max() >= classes:
        raise ValueError(f"mask {path}: {times(mask.shape)} with classes up to {mask.max()}, "
                         f"expected {times(shape)} up to {classes - 1}; mind --mask-values")
    return mask


def network_input(path: Path, pixels: np.ndarray, size: int, channels: int,
                  kind: str) -> np.ndarray:
    """What a network trained on this kind sees of a file: (n, channels, size, size) float32."""
    if is_volume(path) != (kind == "volumes") and (channels > 1 or kind == "volumes"):
        raise ValueError(f"{path}: the run was trained on "
                         f"{'volumes' if kind == 'volumes' else 'colour images'}")
    if is_volume(path):
        slices = normalise_volume(pixels[..., 0], size)
        stacks = slices[neighbours(len(slices))] if channels == 3 else slices[:, None]
        return stacks.astype(np.float32)
    image = pixels[0]
    if channels == 1 and (image != image[:, :, :1]).any():
        raise ValueError(f"{path}: holds colours, the run was trained on grey images")
    image = image[:, :, :1] if channels == 1 else image
    return as_input(resize(image.transpose(2, 0, 1), size), channels)[None]


@contextmanager
def decoding(path: Path):
    """What a decoder makes of a damaged, foreign or too large file becomes one ValueError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 Mpixels
            yield
    except Exception as error:
        text = " ".join(str(error).replace(str(path), "it").split())
        raise ValueError(f"{path}: not a readable {'NIfTI file' if is_volume(path) else 'image'} "
                         f"({text or type(error).__name__}); replace or remove it") from None


def _open(path: Path) -> Image.Image:
    with decoding(path):
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} pages, one image is expected")
            return ImageOps.exif_transpose(image)


def resize(planes: np.ndarray, size: int,
           filter: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """(C, H, W) → (C, size, size) by pillow; its bilinear filter averages where it shrinks."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    return np.stack([np.asarray(plane.resize((size, size), filter)) for plane in planes])


def as_input(planes: np.ndarray, channels: int) -> np.ndarray:
    """Grey or RGB planes as a network of `channels` channels wants them, normalised."""
    return normalise(np.repeat(planes, channels // len(planes), axis=0))


def normalise_volume(volume: np.ndarray, size: int) -> np.ndarray:
    """(D, H, W) → (D, size, size) float16, clipped at the 0.5 and 99.5 percentile, normalised."""
    clipped = np.clip(volume, *np.percentile(volume, [0.5, 99.5]))
    return normalise(resize(clipped, size)).astype(np.float16)


def neighbours(count: int) -> np.ndarray:
    """Numbers (count, 3) of the slice before each slice, itself and the one after; clamped."""
    return np.clip(np.arange(count)[:, None] + [-1, 0, 1], 0, count - 1)
