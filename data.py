"""Where images come from: simulated hospitals of two tasks, or folders of real images and volumes.

Read `Split`, `Site` and `DataSet`, then the table HOSPITALS: the rest is how hospitals are drawn
and how files are read. All of it is ours. An image is normalised to mean 0 and variance 1 over
all its pixels and channels together: a colour cast stays, a scanner's gain goes."""

import re
import warnings
import zlib
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


@dataclass
class Split:
    """images: (N, C, H, W) float32; of volumes (N, 3, H, W) float16, a slice amid its neighbours;
    masks: (N, H, W) uint8, classes; cases: N names, that of a volume for each of its slices."""
    images: Tensor
    masks: Tensor
    cases: list[str]

    def to(self, device: str) -> "Split":
        images = self.images.to(device, memory_format=torch.channels_last)
        return Split(images, self.masks.to(device), self.cases)

    def shown(self, number: int) -> Tensor:
        """One image as pictures show it, (C, H, W) float32: of a stack the middle slice alone."""
        image = self.images[number].float()
        return image[1:2] if self.images.dtype == torch.float16 else image


def joined(splits: list[Split]) -> Split:
    """All their images, one split after the other."""
    with torch.autocast("cpu", enabled=False):  # which knows no float16
        images = torch.cat([split.images for split in splits])
    masks = torch.cat([split.masks for split in splits])
    return Split(images, masks, sum([split.cases for split in splits], []))


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
        for split in (site.everything for site in self.sites):
            crc = zlib.crc32(split.masks.numpy(), zlib.crc32(split.images.numpy(), crc))
        return f"{crc:08x}"


def cut(cases: list) -> list[list]:
    """Train, validation and test: the first 60, next 15 and last 25 per cent, none empty."""
    test, validation = max(1, round(0.25 * len(cases))), max(1, round(0.15 * len(cases)))
    return [cases[:-test - validation], cases[-test - validation:-test], cases[-test:]]


def normalise(image: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1 over the whole image, float32; a constant image becomes zero."""
    image = image.astype(np.float64)  # the squares of large values overflow float32
    return ((image - image.mean()) / max(float(image.std()), 1e-6)).astype(np.float32)


# ---------------------------------------------------------------- simulated hospitals: differences
STRUCTURES = {"prostate": {"prostate": (1,)}, "fundus": {"disc": (1, 2), "cup": (2,)}}
FIELD_OF_VIEW = 150.0  # mm, of the simulated MRI
# mm: blur (sigma), gland (mean half-width), offset of the drawn contour (+: outside), rough (its
# unsteadiness). bias: amplitude, log scale. noise: share of the brightest tissue. coil: share of
# patients with one. spread: of the gland, relative. zonal: peripheral over central brightness
Prostate = namedtuple("Prostate", "gamma bias noise blur coil gland spread zonal offset rough")
# red, green, blue: gains. vignette: loss of light at the rim. blur: sigma, per cent of the image.
# noise: of full scale. field, off_centre: radius of the disc, deviation of its place, of half the
# image. glaucoma: share with a large cup. disc, cup: drawn over visible radius. rough: relative
Fundus = namedtuple(
    "Fundus", "red green blue gamma vignette blur noise field off_centre glaucoma disc cup rough")
HOSPITALS = {"prostate": {  # gamma bias noise blur  coil gland spread zonal offset rough
    "Alder": Prostate(1.00, 0.15, 0.04, 0.8, 0.00, 24.0, 0.12, 0.26, 0.0, 0.6),
    "Birch": Prostate(0.55, 0.35, 0.06, 1.2, 0.00, 22.0, 0.15, 0.18, 1.6, 0.9),
    "Cedar": Prostate(1.40, 0.30, 0.07, 1.0, 1.00, 23.0, 0.15, 0.28, -1.4, 0.7),
    "Hazel": Prostate(1.20, 0.25, 0.12, 2.2, 0.00, 28.0, 0.17, 0.06, 1.0, 1.3),
    "Linden": Prostate(0.80, 0.60, 0.05, 0.9, 0.20, 25.0, 0.18, 0.20, -2.2, 0.7),
    "Rowan": Prostate(1.90, 0.40, 0.09, 1.5, 0.00, 19.0, 0.18, 0.12, 2.2, 1.0),
}, "fundus": {  # red  green  blue gamma vign. blur noise field off-c. glau. disc  cup  rough
    "Crane": Fundus(1.00, 1.00, 1.00, 1.00, 0.20, 0.8, 0.02, 0.44, 0.06, 0.20, 1.00, 1.00, 0.02),
    "Finch": Fundus(1.12, 0.88, 0.75, 0.85, 0.35, 1.2, 0.03, 0.40, 0.10, 0.50, 1.03, 1.12, 0.03),
    "Heron": Fundus(0.88, 1.05, 1.15, 1.20, 0.30, 1.6, 0.04, 0.47, 0.08, 0.30, 0.97, 0.88, 0.03),
    "Plover": Fundus(1.08, 1.00, 0.75, 1.18, 0.40, 1.0, 0.04, 0.39, 0.12, 0.60, 1.04, 0.92, 0.03),
    "Robin": Fundus(0.95, 0.85, 0.90, 0.80, 0.25, 2.0, 0.03, 0.45, 0.10, 0.40, 0.98, 1.15, 0.03),
    "Swift": Fundus(1.12, 1.10, 0.85, 1.10, 0.45, 1.4, 0.05, 0.42, 0.12, 0.60, 1.02, 1.04, 0.02),
}}


def hospital_table(task: str, sites: int = 6) -> dict[str, Prostate | Fundus]:
    """The first `sites` hospitals; those beyond six draw each property from the six's range."""
    columns, table = np.array([*HOSPITALS[task].values()]), dict([*HOSPITALS[task].items()][:sites])
    for name in [f"site{number:02d}" for number in range(7, sites + 1)]:
        values = _generator(0, task, name).uniform(columns.min(axis=0), columns.max(axis=0))
        table[name] = (Prostate if task == "prostate" else Fundus)(*values)
    return table


def simulate_sites(task: str, seed: int, size: int = 96, images_per_site: int = 60,
                   sites: int = 6) -> DataSet:
    """Simulated hospitals; the same arguments give the same bytes, whatever other hospitals exist.

    task: "prostate" (1 channel; prostate = 1) or "fundus" (RGB; rim = 1, cup = 2).
    size: height and width in pixels; the field of view stays the same."""
    result, fundus = [], task == "fundus"
    pixel = 1.0 if fundus else FIELD_OF_VIEW / size
    for name, hospital in hospital_table(task, sites).items():
        rng, cases = _generator(seed, task, name), []
        for number in range(images_per_site):
            image, mask = (_fundus if fundus else _prostate)(hospital, rng, size)
            image, mask = torch.tensor(normalise(image)[None]), torch.tensor(mask[None]).byte()
            cases.append(Split(image, mask, [f"{name}-{number:03d}"]))
        splits = [joined(part) for part in cut(cases)]
        result.append(Site(name, *splits, {case.cases[0]: (pixel, pixel) for case in cases}, []))
    channels, unit = (3, "px") if fundus else (1, "mm")
    return DataSet(result, channels, STRUCTURES[task], unit, "simulated")


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
    width, height = rng.uniform(*((19, 14), (24, 18)) if with_coil else ((11, 8), (19, 13)))
    rectum = gx + rng.normal(0, 2), gy + half_height + height - (1 if with_coil else -1)
    tissue(*rectum, width, height, 0.34)
    content, wall = (0.02, 2.0) if with_coil else (rng.choice([0.03, 0.4, 0.7]), 4.0)
    tissue(*rectum, width - wall, height - wall, content)
    # The gland: distance from its centre over R(angle); flatter where the rectum pushes.
    angle, distance = np.arctan2(y - gy, x - gx), np.hypot(x - gx, y - gy)
    outline = np.hypot(half_height * np.cos(angle), half_width * np.sin(angle))
    outline = half_width * half_height / outline * (1 + 0.04 * _wobble(rng, angle, range(2, 5)))
    outline -= (3.0 if with_coil else 1.0) * np.clip(np.sin(angle), 0, 1) ** 4
    central = 0.42 + rng.normal(0, 0.03)
    peripheral = central + h.zonal + rng.normal(0, 0.06)
    nodules = 0.07 * _texture(rng, size, 3.0 / pixel)
    _paint(image, outline - distance, 0.25, 0.6)  # capsule
    _paint(image, outline - distance - 1.0, peripheral + 0.5 * nodules, 0.6)
    zone = rng.uniform(0.60, 0.80)
    tissue(gx, gy - 0.22 * half_height, zone * half_width, zone * half_height, central + nodules)
    tissue(gx, gy - 0.85 * half_height, 0.4 * half_width, 4, 0.22, 1.5)  # anterior stroma
    image = np.clip(image * (1 + 0.06 * _texture(rng, size, 2.0 / pixel)), 0, None) ** h.gamma
    direction = rng.uniform(0, 2 * np.pi)
    slope = (x * np.cos(direction) + y * np.sin(direction)) / (FIELD_OF_VIEW / 2)
    image *= np.exp(h.bias * (slope + 0.5 * _texture(rng, size, 40.0 / pixel)))
    if with_coil:  # the signal flares towards the coil
        image *= 1 + 2.5 * np.exp(-np.hypot(x - rectum[0], y - rectum[1]) / 22)
    real, imaginary = h.noise * rng.normal(size=(2, size, size))
    image = np.hypot(_blur(image, h.blur / pixel) + real, imaginary)  # Rician
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
    mean, deviation = (0.70, 0.06) if rng.random() < h.glaucoma else (0.45, 0.08)
    ratio = np.clip(rng.normal(mean, deviation), 0.25, 0.85)
    shift = nasal * rng.normal(-0.05, 0.03) * radius  # the cup lies a little to the temple
    cup_angle, cup_distance = np.arctan2(y, x - shift), np.hypot(x - shift, y)
    waves = 0.08 * np.sin(cup_angle) ** 2
    cup = ratio * radius * (1 + waves + 0.04 * _wobble(rng, cup_angle, range(2, 5)))
    shade = np.exp(0.10 * _texture(rng, size, 0.05 * size) + rng.normal(0, 0.08))
    image = colour(0.58, 0.27, 0.10) * shade
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
        thick *= 1 - 0.35 * np.clip(r, 0, 1.4)
        red = colour(0.42, 0.10, 0.06) if number % 3 else colour(0.55, 0.17, 0.09)  # vein, artery
        vessel = np.where(r > rng.uniform(0, 0.1), thick - away, -1)
        _paint(image, vessel, 0.75 * red + 0.25 * image, 0.008)
    rim_x, rim_y = np.stack([x, y]) - rng.normal(0, 0.3, (2, 1, 1))
    image *= np.clip(1 - h.vignette * (rim_x**2 + rim_y**2) / 2, 0.1, None)
    image = np.clip(image * colour(h.red, h.green, h.blue), 0, 1) ** h.gamma
    image = _blur(image, h.blur / 100 * size) + h.noise * rng.normal(size=(3, size, size))
    in_disc = distance < h.disc * disc * (1 + h.rough * _wobble(rng, angle, range(2, 7)))
    cup_drawn = h.cup * cup * (1 + 2 * h.rough * _wobble(rng, cup_angle, range(2, 7)))
    return np.clip(image, 0, 1), in_disc.astype(int) + (in_disc & (cup_distance < cup_drawn))


# ---------------------------------------------------------------- folders of real images
MOST_VOXELS = 2**28  # of a volume: 1 GiB as float32
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LISTS = {f"{name}.txt": part for name, part in PARTS.items()}
PLACE = re.compile(rf"(?:({'|'.join(PARTS)})/)?(?:rois/)?images?", re.I)  # of images in a site
FUNDUS_VALUES = [255, 128, 0]  # background, rim, cup
RENAMED = {"ISBI": "RUNMC", "ISBI_1.5": "BMC"}  # older names of two prostate sites
RESERVED = ("global", "all", "none", "pooled")  # words of the command line and the tables
LAYOUTS = ("known layouts: <site>/{images,masks}/<same stem>.png, also with {train,val,test}.txt; "
           "<site>/{train,val,test}/{images,masks}/; <site>/{train,test}/ROIs/{image,mask}/ for "
           "fundus photographs; <site>/CaseNN.nii.gz with CaseNN_segmentation.nii.gz")


def load_folder(root: str | Path, size: int = 96, mask_values: list[int] | None = None,
                seed: int = 0, skip_empty: bool = False) -> DataSet:
    """Real images or volumes in one of LAYOUTS, resized to size × size, masks by nearest pixel.
    Images are grey (all of them: 1 channel) or RGB; masks hold class indices or the grey values
    `mask_values`, one a class; of fundus ROIs the nearest of 255 background, 128 rim, 0 cup, or of
    three others. Every slice of a volume is an image with its neighbours; labels above 0 are
    prostate. skip_empty: train without images that hold background alone. A site without a split
    is split by a shuffle of (seed, site). Errors name a file and a way out, warnings what is left
    out."""
    root, found = Path(root), {}
    entries = [entry for entry in sorted(root.iterdir()) if entry.name[0] != "."]
    _left_out([entry for entry in entries if not entry.is_dir()], "files beside the sites")
    for folder in filter(Path.is_dir, entries):
        name = RENAMED.get(folder.name, folder.name)
        if not name.isprintable() or name.lower() in RESERVED or name in found:
            raise ValueError(f"{root}: {name!r} is reserved, taken or unprintable; rename it")
        if parts := _parts(folder, name, seed):
            found[name] = parts
    files = [file for parts in found.values() for file, _ in sum(parts, [])]
    kinds = {(is_volume(file), file.parent.parent.name.lower() == "rois") for file in files}
    if len(kinds) != 1:
        raise ValueError(f"{root}: {'different layouts' if kinds else 'no sites found'}; {LAYOUTS}")
    (volume, rois), given = kinds.pop(), mask_values or []
    if len(set(given)) < len(given) or volume and given or rois and len(given) not in (0, 3):
        raise ValueError(f"{root}: --mask-values takes each once; three for fundus ROIs; none "
                         "for volumes, whose labels above 0 are prostate")
    kind = "volumes" if volume else "fundus" if rois else "images"
    values = FUNDUS_VALUES if rois and not given else mask_values
    sites, classes, channels = [], {}, 3 if volume else 1
    for name, parts in found.items():
        splits, spacing, shapes = [], {}, []
        for pairs in parts:
            cases = []
            for file, mask_file in pairs:
                pixels, affine = read_file(file)
                mask = read_truth(mask_file, values, kind, pixels.shape[:3], affine=affine)
                channels = max(channels, pixels.shape[-1])
                classes[mask_file] = np.unique(mask).tolist()
                case = stem(file) if volume else "/".join(file.relative_to(root).parts[1:])
                scale = np.array((size, *mask.shape[1:])) / size
                voxel = np.linalg.norm(affine[:3, :3], axis=0) * scale
                spacing[case] = tuple(voxel.tolist()) if volume else (1.0, 1.0)
                shapes.append(mask.shape if volume else mask.shape[1:])
                images = torch.from_numpy(network_input(file, pixels, size, 3, kind))
                images = images.half() if volume else images
                mask = torch.from_numpy(resize(mask, size, Image.Resampling.NEAREST)).byte()
                kept = mask.flatten(1).any(dim=1).bool() | (not skip_empty or len(splits) > 0)
                cases.append(Split(images[kept], mask[kept], [case] * int(kept.sum())))
            splits.append(joined(cases))
        if not splits[0].cases:
            raise ValueError(f"site '{name}': nothing to train with; leave out --skip-empty")
        sites.append(Site(name, *splits, spacing, shapes))
    every = sorted(set().union(*classes.values()))
    worst = max(classes, key=lambda file: classes[file][-1])
    if not volume and not (2 <= len(every) <= 32 and every[-1] < len(values or every)):
        raise ValueError(f"{worst}: all masks hold {len(every)} values up to {every[-1]}, expected "
                         f"2 to 32: 0, 1 … or greys, --mask-values "
                         f"{' '.join(map(str, every[:32]))}")
    for site in sites:  # grey images lie there three times
        for split in (site.train, site.validation, site.test):
            split.images = split.images[:, :channels].contiguous()
    named = {f"class {number}": (number,) for number in range(1, len(values or every))}
    structures = STRUCTURES["prostate"] if volume else STRUCTURES["fundus"] if rois else named
    return DataSet(sites, channels, structures, "mm" if volume else "px", kind, values)


def _left_out(paths: list[Path], why: str) -> None:
    if paths:
        warnings.warn(f"left out: {len(paths)} {why}, such as {paths[0]}", stacklevel=2)


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def stem(path: Path) -> str:
    """The name without its ending, .nii.gz being one."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I) if is_volume(path) else path.stem


def pairs_of(images: Path, masks: Path | None = None, strict: bool = True) -> list[tuple]:
    """(image, mask or None) for the images and volumes of a folder; masks have the same stem in the
    folder `masks`, or end in _segmentation, also in the same folder, where none is an image.
    strict: an image without a mask is an error."""
    own, drawn, unknown = {}, {}, []
    for folder in dict.fromkeys((images, masks or images)):
        for file in sorted(folder.iterdir()):
            base = re.sub("_segmentation$", "", stem(file), flags=re.I)
            files = own if folder == images and base == stem(file) else drawn
            if file.name[0] == "." or file.name.lower() in LISTS:
                continue
            if not is_volume(file) and file.suffix.lower() not in IMAGE_TYPES:
                unknown.append(file)
            elif files.setdefault(base, file) != file:
                raise ValueError(f"{files[base]} and {file.name} differ only in their endings")
    _left_out(unknown, "that are neither images nor volumes")
    missing = [file for name, file in own.items() if masks and name not in drawn]
    if strict and missing:
        raise FileNotFoundError(f"{missing[0]} has no mask of its name in {masks} ({len(missing)} "
                                f"of {len(own)} images without)")
    alone = [file for name, file in drawn.items() if masks and name not in own]
    _left_out(alone, "masks without an image of the same name")
    return [(file, drawn.get(name) if masks else None) for name, file in own.items()]


def _places(site: Path) -> dict[str, tuple[Path, Path]]:
    """Folders of images and of masks by part: "all", "train", "val", "test"; volumes: the site."""
    entries = [entry for entry in sorted(site.iterdir()) if entry.name[0] != "."]
    if any(map(is_volume, entries)):
        return {"all": (site, site)}
    found, used = {}, []
    below = [*entries, *sorted(site.glob("*/*")), *sorted(site.glob("*/*/*"))]
    for folder in below:
        place = PLACE.fullmatch(folder.relative_to(site).as_posix())
        if place and folder.is_dir():
            masks = [f for f in folder.parent.iterdir() if f.name.lower() in ("mask", "masks")]
            part = PARTS.get((place[1] or "").lower(), "all")
            if part in found or len(masks) > 1:
                raise ValueError(f"{folder.parent}: images or masks of {part} lie twice; keep one")
            found[part] = folder, *(masks or [folder.with_name("masks")])
            used += [*found[part], *folder.parents]
    read = [folder for folders in found.values() for folder in folders]
    _left_out([entry for entry in below if found and entry not in used and entry.parent not in read
               and (entry in entries and entry.is_dir() or entry.suffix.lower() in IMAGE_TYPES)],
              "beside images and masks")
    return found


def _parts(site: Path, name: str, seed: int) -> list[list[tuple[Path, Path]]]:
    """The (image, mask) files that train, validate and test; [] of a folder in no known layout."""
    parts = {part: pairs_of(*folders) for part, folders in _places(site).items()}
    lists = [file for file in sorted(site.iterdir()) if file.name.lower() in LISTS]
    if not parts:
        _left_out([site], "in no known layout (README: Your own images)")
        return []
    if lists and list(parts) != ["all"]:
        _left_out(lists, "lists of cases beside folders that are split already")
    elif lists:  # one case a line, with or without its ending
        by_name = {stem(image): (image, mask) for image, mask in parts.pop("all")}
        for file in lists:
            listed = parts.setdefault(LISTS[file.name.lower()], [])
            text = file.read_text(encoding="utf-8-sig", errors="replace")
            for line in filter(None, map(str.strip, text.splitlines())):
                case = line if line in by_name else stem(Path(line))
                if case not in by_name:
                    raise ValueError(f"{file}: no case {line} in {site}, or it is in two lists")
                listed.append(by_name.pop(case))
        _left_out([image for image, _ in by_name.values()], "cases that are in no list")
    names, rng = ("train", "val", "test"), _generator(seed, "folder", name)
    if list(parts) == ["all"]:
        pairs = [parts["all"][i] for i in rng.permutation(len(parts["all"]))]
        parts = dict(zip(names, cut(pairs)))
    elif "val" not in parts:
        train = parts.get("train", [])
        train = [train[i] for i in rng.permutation(len(train))]
        count = max(1, round(0.2 * len(train)))  # 15 of the 75 per cent that do not test
        parts |= {"train": train[count:], "val": train[:count]}
    if "all" in parts or not all(parts.get(part) for part in names):
        counts = ", ".join(f"{len(pairs)} in {part}" for part, pairs in parts.items())
        raise ValueError(f"site '{name}': images: {counts}; at least 3 belong in the folder itself "
                         "or 2 in train and 1 in test (val may be given), none elsewhere")
    return [parts[part] for part in names]


# ---------------------------------------------------------------- single files
def read_file(path: Path, mask: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, float32, and an affine, mm: of a volume (slice, row, column, 1) from feet to head,
    front to back and the patient's right to left, or of an image (1, H, W, 1 or 3), turned as its
    EXIF says. Whatever a decoder says becomes one ValueError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 Mpixels
            values, affine = _volume(path) if is_volume(path) else (_image(path, mask), np.eye(4))
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        return values, affine
    except ImportError as error:
        raise ImportError(f"{path}: {error}; pip install nibabel") from None
    except Exception as error:
        text = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        kind = "NIfTI file" if is_volume(path) else "image"
        raise ValueError(f"{path}: not a readable {kind} ({text}); replace or remove it") from None


def _image(path: Path, mask: bool) -> np.ndarray:
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{image.n_frames} pages, one image is expected")
        image, mode = ImageOps.exif_transpose(image), image.mode.rstrip("A")
    indices = mask and mode == "P" and path.suffix.lower() != ".gif"  # GIF: palettes differ
    image = image.convert(mode if mode[0] in "1IF" or mode == "L" or indices else "RGB")
    return np.array(image, dtype=np.float32).reshape(1, image.height, image.width, -1)


def _volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel
    nibabel.imageglobals.logger.setLevel(100)
    with nibabel.imageglobals.ErrorLevel(30):  # a header to be repaired might have other axes
        file = nibabel.load(path)
    own, ours = nibabel.io_orientation(file.affine), nibabel.orientations.axcodes2ornt("SPL")
    voxels = np.prod(file.shape, dtype=float)
    if len(file.shape) != 3 or not 0 < voxels <= MOST_VOXELS or np.isnan(own).any():
        raise ValueError("three dimensions, each with a direction in the affine, and at most "
                         f"{MOST_VOXELS} voxels expected, found {'×'.join(map(str, file.shape))}")
    file = file.as_reoriented(nibabel.orientations.ornt_transform(own, ours))
    return np.ascontiguousarray(file.dataobj, dtype=np.float32)[..., None], file.affine


def write_volume(path: Path, mask: np.ndarray, like: Path) -> None:
    """A mask in `read_file`'s order into a NIfTI file with the axes and affine of `like`."""
    import nibabel
    file = nibabel.load(like)  # the header alone
    own, ours = nibabel.io_orientation(file.affine), nibabel.orientations.axcodes2ornt("SPL")
    to_own, header = nibabel.orientations.ornt_transform(ours, own), file.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the grey window of the volume would hide a mask
    mask = nibabel.orientations.apply_orientation(mask.astype(np.uint8), to_own)
    nibabel.save(type(file)(mask, file.affine, header), path)


def read_truth(path: Path, mask_values: list[int] | None, kind: str, shape: tuple[int, ...],
               classes: int = 2**16, affine: np.ndarray | None = None) -> np.ndarray:
    """The mask of a file of this shape (n, H, W) and affine, int32 classes: its values, or their
    places in `mask_values` (fundus: of the nearest); of a volume 1 where they are above 0."""
    mask, own = read_file(path, mask=True)
    mask = mask > 0 if is_volume(path) and (kind == "volumes" or classes == 2) else mask
    if (mask != mask[..., :1] // 1).any() or mask.min() < 0 or mask.max() >= 2**16:
        raise ValueError(f"mask {path}: one channel of whole numbers from 0 to 65535 is expected")
    mask = mask[..., 0].astype(np.int32)
    if mask_values and not is_volume(path):
        distance = np.abs(np.arange(mask.max() + 1)[:, None] - np.array(mask_values))
        unknown = mask[distance.min(axis=1)[mask] > 0]
        if kind != "fundus" and len(unknown):
            raise ValueError(f"mask {path}: {unknown[0]} is not among --mask-values {mask_values}")
        mask = distance.argmin(axis=1)[mask].astype(np.int32)
    far = affine is not None and bool((np.abs(affine - own) @ (*shape, 1))[:3].max()
                                      > np.linalg.norm(affine[:3, :3], axis=0).max())
    if mask.shape != shape or mask.max() >= classes or far:
        sizes = ["×".join(map(str, size)).removeprefix("1×") for size in (mask.shape, shape)]
        raise ValueError(f"mask {path}: {sizes[0]}, classes up to {mask.max()}; expected {sizes[1]}"
                         f"{', its affine' * far}, up to {classes - 1}: --mask-values?")
    return mask


def network_input(path: Path, pixels: np.ndarray, size: int, channels: int, kind: str):
    """What a network trained on this kind sees of a file: (n, channels, size, size) float32."""
    volume, of_volumes = is_volume(path), kind == "volumes"
    colours = channels == 1 and (pixels != pixels[..., :1]).any()
    if colours or volume != of_volumes and (channels > 1 or of_volumes):
        wanted = "volumes" if of_volumes else "colour images" if channels > 1 else "grey images"
        raise ValueError(f"{path}: the run was trained on {wanted}")
    if not volume:
        planes = resize(pixels[0, ..., :channels].transpose(2, 0, 1), size)
        return normalise(np.repeat(planes, channels // len(planes), axis=0))[None]
    slices = np.clip(pixels[..., 0], *np.percentile(pixels, [0.5, 99.5]))
    slices, count = normalise(resize(slices, size)), len(slices)
    beside = np.arange(count)[:, None] + ([-1, 0, 1] if channels == 3 else [0])
    return slices[np.clip(beside, 0, count - 1)]


def resize(planes: np.ndarray, size: int, filter=Image.Resampling.BILINEAR) -> np.ndarray:
    """(C, H, W) → (C, size, size) by pillow; its bilinear filter averages where it shrinks."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    return np.stack([np.asarray(plane.resize((size, size), filter)) for plane in planes])
