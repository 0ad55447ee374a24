"""Where images come from: simulated hospitals of two tasks, or folders of real images and volumes.

Read `Split`, `Site` and `DataSet`, then the table HOSPITALS: the rest is how hospitals are drawn and files are read.
Everything here is ours. Images are float32, each normalised to mean 0 and variance 1 over all its
pixels and channels together (a colour cast stays, a scanner's gain goes); masks are uint8 class indices.
"""

import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

STRUCTURES = {"prostate": {"prostate": (1,)}, "fundus": {"disc": (1, 2), "cup": (2,)}}
CHANNELS = {"prostate": 1, "fundus": 3}


class Gathered:
    """Images (N, C, H, W) float32 that look like a tensor but are put together only when asked for."""

    def split(self, size: int) -> Iterator[Tensor]:
        return (self[start:start + size] for start in range(0, len(self), size))


class Stored(Gathered):
    """Images (or masks) that lie in a temporary file: however many there are, only those asked for are in memory.

    shape: of one, (C, H, W) or (H, W).
    """

    def __init__(self, shape: tuple[int, ...], device: str, folder: Path | None = None, dtype: type = np.float32):
        self.shape, self.device, self.dtype, self.count = shape, device, np.dtype(dtype), 0
        self.file = tempfile.TemporaryFile(dir=folder)

    def append(self, images: np.ndarray) -> None:
        """Add (n, *shape)."""
        self.file.write(np.ascontiguousarray(images, dtype=self.dtype))
        self.count += len(images)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, chosen) -> Tensor:
        numbers = torch.arange(self.count, device=self.device)[chosen]
        size = self.dtype.itemsize * int(np.prod(self.shape))  # bytes of an image
        self.file.flush()
        rows = [os.pread(self.file.fileno(), size, size * number) for number in numbers.flatten().tolist()]
        images = np.frombuffer(bytearray().join(rows), dtype=self.dtype).reshape(*numbers.shape, *self.shape)
        return _in_order(torch.from_numpy(images).to(self.device))

    def to(self, device: str, **_) -> "Stored":
        """Where images go when they are asked for."""
        self.device = device
        return self


def _in_order(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as convolutions like them: channels last; masks as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


class Picked(Gathered):
    """Some of many images or masks: those of `index` (N,); or images (N, 3, H, W) float32, each a slice of a volume
    between its neighbours, `index` (N, 3).

    slices: what is picked from, a tensor (S, H, W) float16 or uint8, or `Stored`; there is only one of it.
    """

    def __init__(self, slices: "Tensor | Stored", index: Tensor):
        self.slices, self.index, self.device = slices, index, slices.device

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen) -> Tensor:
        found = self.slices[self.index[chosen]]
        return _in_order(found.float() if found.is_floating_point() else found)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not torch.cat:
            return NotImplemented
        if len({id(picked.slices) for picked in args[0]}) == 1:
            return cls(args[0][0].slices, torch.cat([picked.index for picked in args[0]]))
        starts = np.cumsum([0, *(len(picked.slices) for picked in args[0])])
        return cls(torch.cat([picked.slices for picked in args[0]]),
                   torch.cat([picked.index + int(start) for picked, start in zip(args[0], starts)]))

    def to(self, device, **_) -> "Picked":
        return Picked(self.slices.to(device), self.index.to(device))


@dataclass
class Split:
    """images: (N, C, H, W) float32; masks: (N, H, W) uint8; tensors or `Picked`; cases: N identifiers."""

    images: Tensor | Picked
    masks: Tensor | Picked
    cases: list[str]

    def part(self, chosen: np.ndarray) -> "Split":
        """The images of these numbers."""
        images, masks = (Picked(of.slices, of.index[chosen]) if isinstance(of, Picked) else of[chosen]
                         for of in (self.images, self.masks))
        return Split(images, masks, [self.cases[i] for i in chosen])

    def shown(self, number: int) -> Tensor:
        """One image as pictures show it: of a stack the labelled slice."""
        stack = isinstance(self.images, Picked) and self.images.index.dim() == 2
        return self.images[number][1:2] if stack else self.images[number]


@dataclass
class Site:
    """One hospital: all its images in the order of their cases, and the numbers of those that train, validate, test.

    spacing: size of a pixel (row, column) or, where a case is a volume, of a voxel (slice, row, column): for all,
    or by case; in mm, or in pixels where mm are not known. shapes: of the files as read.
    """

    name: str
    everything: Split
    parts: list[np.ndarray]
    spacing: tuple[float, ...] | dict[str, tuple[float, ...]] = (1.0, 1.0)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    train = cached_property(lambda site: site.everything.part(site.parts[0]))
    validation = cached_property(lambda site: site.everything.part(site.parts[1]))
    test = cached_property(lambda site: site.everything.part(site.parts[2]))


@dataclass
class DataSet:
    """Sites with what they share: channels of the images, classes of each structure, unit of the spacing, what was
    read ("simulated", "images", "fundus" photographs or "volumes"), the grey values of the masks, if given, and for
    folders the digest of what was read (`fingerprint`)."""

    sites: list[Site]
    channels: int
    structures: dict[str, tuple[int, ...]]
    unit: str
    kind: str
    mask_values: list[int] | None = None
    content: str | None = None

    @property
    def classes(self) -> int:
        return 1 + max(max(classes) for classes in self.structures.values())


def make_site(name: str, images: list[np.ndarray], masks: list[np.ndarray], cases: list[str],
              parts: list[np.ndarray], spacing: tuple[float, ...] = (1.0, 1.0), shapes: list | None = None) -> Site:
    """A Site of images (C, H, W) and masks (H, W); parts: numbers of those that train, validate and test."""
    everything = Split(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks).astype(np.uint8)), cases)
    return Site(name, everything, parts, spacing, shapes or [])


def split_indices(count: int) -> list[np.ndarray]:
    """The numbers 0 … count-1 cut into train, validation and test: 60, 15 and 25 per cent, none empty."""
    test = max(1, round(0.25 * count))
    validation = max(1, round(0.15 * count))
    return np.split(np.arange(count), [count - test - validation, count - test])


def normalise(image: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1 over the whole image, float32; a constant image becomes zero."""
    image = image.astype(np.float64)  # the squares of large values overflow float32
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


def simulate_sites(task: str, seed: int, size: int = 96, images_per_site: int = 60, sites: int = 6,
                   folder: Path | None = None) -> DataSet:
    """Simulated hospitals; the same arguments give the same bytes, whatever other hospitals exist.

    task: "prostate" (1 channel; prostate = 1) or "fundus" (RGB; rim = 1, cup = 2).
    size: height and width in pixels; the field of view stays the same.
    folder: where images and masks lie in temporary files, to be read when asked for; None: in memory.
    """
    draw = {"prostate": _prostate, "fundus": _fundus}[task]
    on_disk = folder and (Stored((CHANNELS[task], size, size), "cpu", folder), Stored((size, size), "cpu", folder, np.uint8))
    result = []
    for name, hospital in hospital_table(task, sites).items():
        rng = _generator(seed, task, name)
        images, masks = zip(*(draw(hospital, rng, size) for _ in range(images_per_site)))
        spacing = (FIELD_OF_VIEW / size,) * 2 if task == "prostate" else (1.0, 1.0)
        cases = [f"{name}-{number:03d}" for number in range(images_per_site)]
        result.append(make_site(name, [normalise(image) for image in images], masks, cases,
                                split_indices(images_per_site), spacing))
        if folder:
            everything, count = result[-1].everything, len(on_disk[0])
            index = torch.arange(count, count + images_per_site)
            for stored, values in zip(on_disk, (everything.images, everything.masks)):
                stored.append(values.numpy())
            result[-1].everything = Split(*(Picked(stored, index) for stored in on_disk), cases)
    return DataSet(result, CHANNELS[task], STRUCTURES[task], "mm" if task == "prostate" else "px", "simulated")


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


# ---------------------------------------------------------------- folders of real images
MOST_CLASSES = 32  # a photograph among the masks would make 256
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
PARTS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
FUNDUS_VALUES = [255, 128, 0]  # background, rim, cup
RENAMED = {"ISBI": "RUNMC", "ISBI_1.5": "BMC"}  # older names of two prostate sites
LAYOUTS = ("known layouts: <site>/{images,masks}/<same stem>.png, <site>/{train,val,test}/{images,masks}/ (either name "
           "in the singular too), <site>/{train,test}/ROIs/{image,mask}/ for fundus photographs, <site>/CaseNN.nii.gz "
           "with CaseNN_segmentation.nii.gz")


def load_folder(root: str | Path, size: int = 96, mask_values: list[int] | None = None, seed: int = 0,
                skip_empty: bool = False) -> DataSet:
    """Real images or volumes, in one of LAYOUTS.

    Images: PNG, JPEG or TIFF, grey or RGB, any size; grey everywhere gives one channel, else all become RGB.
    Masks: one channel of class indices 0 … K-1, or of the grey values `mask_values`, one a class; those of fundus
    ROIs are 255 background, 128 rim, 0 cup, and values between go to the nearest.
    Volumes: 3-D NIfTI, clipped at the 0.5 and 99.5 percentile; every slice with its neighbours is one image of three
    channels; labels above 0 are prostate. skip_empty leaves slices without prostate out of training.
    All are resized to size × size, images by an antialiasing bilinear filter, masks by the nearest pixel; distances
    count resized pixels, for volumes mm. A site is split by a shuffle of (seed, site), volumes as wholes.
    Raises ValueError, FileNotFoundError or ImportError, naming the file and a way out.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found: dict[str, dict[str, list]] = {}
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    for folder in folders:
        if not folder.name.isprintable():
            raise ValueError(f"{root}: the name of the site {folder.name!r} cannot be printed; rename it")
        name, pairs = RENAMED.get(folder.name, folder.name), _pairs(folder)
        if pairs and name in found:
            raise ValueError(f"{root}: two folders hold the site {name}, one by its older name; remove one")
        if pairs:
            found[name] = pairs
    if not found:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
        raise FileNotFoundError(f"{root}: no sites found, only {', '.join(entries[:8]) or 'nothing'}; {LAYOUTS}")
    files = {name: [pair for part in parts.values() for pair in part] for name, parts in found.items()}
    kinds = {"volumes" if is_volume(image) else "fundus" if image.parent.parent.name == "ROIs" else "images"
             for pairs in files.values() for image, _ in pairs}
    if len(kinds) > 1:
        raise ValueError(f"{root}: different layouts in one folder; {LAYOUTS}")
    kind, parts = kinds.pop(), {name: _split(parts, seed, name) for name, parts in found.items()}
    if kind == "volumes":
        sites = [_volume_site(name, files[name], parts[name], size, skip_empty) for name in files]
        loaded = DataSet(sites, 3, STRUCTURES["prostate"], "mm", kind)
    else:
        values = FUNDUS_VALUES if kind == "fundus" and not mask_values else mask_values
        loaded = _image_sites(root, files, parts, size, values, kind)
    lists = [file for folder in folders for file in _lists(folder).values()]
    loaded.content = fingerprint(root, [*lists, *(file for pairs in files.values() for pair in pairs for file in pair)])
    return loaded


def fingerprint(root: Path, files: list[Path]) -> str:
    """A digest of the files' names below `root`, sizes and content."""
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{str(file.relative_to(root))!a} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def stem(path: Path) -> str:
    """The name without its ending, .nii.gz being one."""
    return path.stem.removesuffix(".nii") if is_volume(path) else path.stem


def pairs_of(images: Path, masks: Path | None = None, strict: bool = True) -> list[tuple[Path, Path | None]]:
    """The images and volumes of a folder with their masks: those of the same stem in the folder `masks`, or of the stem
    with _segmentation, also in the same folder. Without `masks`: no masks, and none is taken for an image. A mask or an
    image that is missing is an error where `strict`."""
    found: list[dict[str, Path]] = []
    for folder in (images, masks or images):
        files: dict[str, Path] = {}
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        for file in sorted(folder.iterdir()):
            if file.name[0] != "." and (is_volume(file) or file.suffix.lower() in IMAGE_TYPES):
                if files.setdefault(stem(file).lower(), file) != file:
                    raise ValueError(f"{files[stem(file).lower()]} and {file.name} differ only in their endings")
        found.append(files)
    own, theirs = found
    drawn = {name.removesuffix("_segmentation"): file for name, file in theirs.items() if name.endswith("_segmentation")}
    if masks is None or masks == images:
        own = {name: file for name, file in own.items() if not name.endswith("_segmentation")}
    if masks is None:
        return [(file, None) for file in own.values()]
    alone = [drawn[name] for name in drawn if name not in own]
    if strict and masks == images and alone:
        raise FileNotFoundError(f"{alone[0]} is a segmentation without its volume")
    drawn = {**(theirs if masks != images else {}), **drawn}
    missing = [file for name, file in own.items() if name not in drawn]
    if strict and missing:
        name = f"{stem(missing[0])}_segmentation.nii.gz" if is_volume(missing[0]) else f"{stem(missing[0])}.png"
        raise FileNotFoundError(f"{missing[0]} has no mask {masks / name} "
                                f"({len(missing)} of {len(own)} images without; names must match)")
    return [(file, drawn.get(name)) for name, file in own.items()]


def _pairs(site: Path) -> dict[str, list[tuple[Path, Path]]]:
    """(image, mask) files of a site by part: "all", or "train" and "test" and perhaps "val"; {} if there are none."""
    if any(is_volume(file) for file in site.iterdir()):
        return _listed(site, pairs_of(site, site))
    result = {}
    for part, names in {"all": ("",), **PARTS}.items():
        for place in (site / name / roi for name in names for roi in ("", "ROIs")):
            images, masks = (next((place / name for name in names if (place / name).is_dir()), None)
                             for names in (("images", "image"), ("masks", "mask")))
            if not images and not masks:
                continue
            if not images or not masks:
                raise FileNotFoundError(f"site '{site.name}': no folder {place / ('masks' if images else 'images')}")
            if part in result:
                raise ValueError(f"site '{site.name}': two folders hold images for {part}, one is {place}; keep one")
            result[part] = pairs_of(images, masks)
            if not result[part]:
                raise ValueError(f"site '{site.name}': no images in {images}")
    return result


def _lists(site: Path) -> dict[str, Path]:
    return {part: site / f"{part}.txt" for part in PARTS if (site / f"{part}.txt").is_file()}


def _listed(site: Path, pairs: list[tuple[Path, Path]]) -> dict[str, list[tuple[Path, Path]]]:
    """Pairs by the lists train.txt, val.txt and test.txt, if there are any: one case a line; others are left out."""
    lists = _lists(site)
    if not lists:
        return {"all": pairs}
    by_name, result = {stem(image).lower(): (image, mask) for image, mask in pairs}, {}
    for part, file in lists.items():
        names = [stem(Path(line)).lower() for line in file.read_text().split()]
        wrong = [name for name in names if name not in by_name]
        if wrong:
            raise ValueError(f"{file}: no case {wrong[0]} in {site}, or it is in two lists")
        if names:
            result[part] = [by_name.pop(name) for name in names]
    return result


def _split(parts: dict[str, list], seed: int, name: str) -> list[np.ndarray]:
    """Numbers of the files that train, validate and test, counted over all parts."""
    rng, starts = _generator(seed, "folder", name), np.cumsum([0, *map(len, parts.values())])
    numbers = {part: np.arange(start, start + len(pairs)) for start, (part, pairs) in zip(starts, parts.items())}
    if "all" in parts:
        if len(parts) > 1:
            raise ValueError(f"site '{name}': images lie in the folder itself and in {', '.join(list(parts)[1:])}; "
                             f"keep one of the two")
        if len(numbers["all"]) < 4:
            raise ValueError(f"site '{name}': {len(numbers['all'])} images, at least 4 are needed")
        order = rng.permutation(numbers["all"])
        return [order[part] for part in split_indices(len(order))]
    for part in ("train", "test"):
        if not len(numbers.get(part, ())):
            raise FileNotFoundError(f"site '{name}': no images for {part}, only for {', '.join(parts)}")
    if "val" not in parts:  # 15 of the 75 per cent that do not test
        if len(numbers["train"]) < 2:
            raise ValueError(f"site '{name}': 1 image to train with and none to validate; at least 2 are needed")
        order = rng.permutation(numbers["train"])
        numbers["val"], numbers["train"] = np.split(order, [max(1, round(0.2 * len(order)))])
    return [numbers[part] for part in PARTS]


def _image_sites(root: Path, files: dict[str, list], parts: dict[str, list], size: int,
                 mask_values: list[int] | None, kind: str) -> DataSet:
    images, masks, values, shapes = {}, {}, {}, {}  # by file; only the resized ones stay in memory
    for name, pairs in files.items():
        for file, mask_file in pairs:
            image, mask = read_image(file), read_mask(mask_file, mask_values, nearest=kind == "fundus")
            if image.shape[:2] != mask.shape:
                raise ValueError(f"site '{name}': image {file} is {by(image.shape[:2])} but its mask is {by(mask.shape)}")
            values[mask_file] = np.unique(mask).tolist()
            images[file], shapes[file] = resize(image.transpose(2, 0, 1), size), image.shape[:2]
            masks[file] = resize(mask[None], size, Image.Resampling.NEAREST)[0]
    every_value = sorted(set().union(*values.values()))
    classes = len(mask_values or every_value)
    for mask_file, own in values.items():
        if own[-1] >= classes:
            raise ValueError(f"mask {mask_file}: class index {own[-1]} is out of range; all masks together hold "
                             f"{classes} values, so indices 0 … {classes - 1} were expected; if they are grey "
                             f"values, say --mask-values {' '.join(map(str, every_value))}")
    if classes > MOST_CLASSES:
        raise ValueError(f"{root}: the masks hold {classes} different values, more than {MOST_CLASSES} classes; if the "
                         f"files are masks, say which grey values count, as --mask-values 0 255")
    if len(every_value) < 2:
        raise ValueError(f"{root}: every mask pixel is {every_value[0]}; at least two classes are needed")
    channels = max(len(image) for image in images.values())
    sites = []
    for name, pairs in files.items():
        own = [file for file, _ in pairs]
        sites.append(make_site(name, [as_input(images[file], channels) for file in own], [masks[file] for file in own],
                               ["/".join(file.relative_to(root).parts[1:]) for file in own], parts[name],
                               shapes=[shapes[file] for file in own]))
    structures = STRUCTURES["fundus"] if kind == "fundus" else {f"class {c}": (c,) for c in range(1, classes)}
    return DataSet(sites, channels, structures, "px", kind, mask_values)


def _volume_site(name: str, pairs: list, parts: list[np.ndarray], size: int, skip_empty: bool) -> Site:
    slices, masks, index, cases, spacing, shapes, of_case = [], [], [], [], {}, [], []
    for file, mask_file in pairs:
        volume, voxel = read_volume(file)
        mask, mask_voxel = read_volume(mask_file)
        if volume.shape != mask.shape:
            raise ValueError(f"site '{name}': volume {file} is {by(volume.shape)} but its mask is {by(mask.shape)}")
        if not np.allclose(voxel, mask_voxel, rtol=0.02):
            raise ValueError(f"site '{name}': voxels of {file} are {by(np.round(voxel, 3))} mm but those of its mask "
                             f"{by(np.round(mask_voxel, 3))} mm")
        start = sum(map(len, slices))
        slices.append(normalise_volume(volume, size))
        masks.append(resize((mask > 0).astype(np.uint8), size, Image.Resampling.NEAREST))
        index.append(start + neighbours(len(volume)))
        of_case.append(np.arange(start, start + len(volume)))
        cases += [stem(file)] * len(volume)
        spacing[stem(file)] = (voxel[0], voxel[1] * volume.shape[1] / size, voxel[2] * volume.shape[2] / size)
        shapes.append(volume.shape)
    masks = np.concatenate(masks)  # one after the other, so that the lists go
    slices = np.concatenate(slices)
    everything = Split(Picked(torch.from_numpy(slices), torch.from_numpy(np.concatenate(index))),
                       Picked(torch.from_numpy(masks), torch.arange(len(masks))), cases)
    chosen = [np.concatenate([of_case[case] for case in part]) for part in parts]
    if skip_empty:
        chosen[0] = chosen[0][(everything.masks[chosen[0]] > 0).flatten(1).any(dim=1).numpy()]
        if not len(chosen[0]):
            raise ValueError(f"site '{name}': no slice to train with holds prostate; leave out --skip-empty")
    return Site(name, everything, chosen, spacing, shapes)


# ---------------------------------------------------------------- single files
MOST_VOXELS = 2**28  # of a volume: 1 GiB as float32


def by(shape) -> str:
    return "×".join(map(str, shape))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 1 or 3) float32, turned as its EXIF says."""
    image = _open(path)
    if image.mode == "LA":
        image = image.convert("L")
    grey = image.mode in ("1", "L") or image.mode[0] in "IF"
    with decoding(path):
        pixels = np.array(image if grey else image.convert("RGB"), dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("it holds values that are not finite")
    return pixels.reshape(*pixels.shape[:2], -1)


def read_mask(path: Path, mask_values: list[int] | None = None, nearest: bool = False) -> np.ndarray:
    """(H, W) int32 class indices: the values themselves, or the place of each in `mask_values`. A palette gives its
    indices. nearest: values between go to the nearest. Colours are taken where they are greys."""
    image = _open(path)
    mask = np.asarray(image)
    if mask.ndim == 3 and image.mode in ("RGB", "RGBA", "LA"):
        colours = mask[:, :, :len(image.mode.rstrip("A"))]
        mask = colours[:, :, 0] if (colours == colours[:, :, :1]).all() else mask
    if mask.ndim != 2:
        raise ValueError(f"mask {path}: one channel of class indices is expected, found mode {image.mode}")
    with np.errstate(invalid="ignore"):
        whole = mask.astype(np.int32)
    if (whole != mask).any() or whole.min() < 0:
        raise ValueError(f"mask {path}: class indices must be whole numbers from 0")
    mask = whole
    if mask_values is None:
        return mask
    values, place = np.unique(mask, return_inverse=True)
    unknown = np.setdiff1d(values, mask_values)
    if len(unknown) and not nearest:
        raise ValueError(f"mask {path}: grey value {unknown[0]} is not among --mask-values "
                         f"{' '.join(map(str, mask_values))}")
    classes = np.abs(values[:, None] - np.array(mask_values)).argmin(axis=1)
    return classes[place].reshape(mask.shape).astype(np.int32)


def read_volume(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """A NIfTI volume as float32 (slice, row, column), from feet to head, front to back and the patient's right to
    left, however the file stores it; and the size of its voxels in mm, in that order."""
    try:
        import nibabel
    except ImportError:
        raise ImportError(f"{path}: NIfTI files need nibabel; pip install nibabel") from None
    # A header that has to be repaired is an error, since its axes might be others; our message says so.
    nibabel.imageglobals.logger.setLevel(100)
    with decoding(path), nibabel.imageglobals.ErrorLevel(30):
        file = nibabel.load(path)
        if len(file.shape) != 3 or not 0 < np.prod(file.shape, dtype=float) <= MOST_VOXELS:
            raise ValueError(f"a volume of three dimensions and at most {MOST_VOXELS} voxels is expected, "
                             f"found {by(file.shape)}")
        values = np.asarray(file.dataobj, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        own, size = nibabel.io_orientation(file.affine), nibabel.affines.voxel_sizes(file.affine)
        if np.isnan(own).any() or not (np.isfinite(size) & (size > 0)).all():
            raise ValueError("its affine matrix has no direction or size for some axis")
    to_ours = nibabel.orientations.ornt_transform(own, nibabel.orientations.axcodes2ornt("SPL"))
    return (np.ascontiguousarray(nibabel.orientations.apply_orientation(values, to_ours)),
            tuple(float(size[to_ours[:, 0] == axis][0]) for axis in range(3)))


def write_volume(path: Path, mask: np.ndarray, like: Path) -> None:
    """A mask (slice, row, column) as `read_volume` orders it, into a NIfTI file with the axes and affine of `like`,
    a volume that was read before."""
    import nibabel
    file = nibabel.load(like)  # the header alone
    to_own = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("SPL"),
                                                 nibabel.io_orientation(file.affine))
    header = file.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the grey window of the volume would hide a mask
    nibabel.save(type(file)(nibabel.orientations.apply_orientation(mask.astype(np.uint8), to_own), file.affine, header), path)


def read_pixels(path: Path) -> np.ndarray:
    """A volume of n slices, (n, H, W, 1), or one image, (1, H, W, 1 or 3)."""
    return read_volume(path)[0][..., None] if is_volume(path) else read_image(path)[None]


def read_truth(path: Path, mask_values: list[int] | None, kind: str, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """The mask of a file of this shape (n, H, W), as its classes. Raises ValueError where it is another one."""
    mask = (read_volume(path)[0] > 0).astype(np.int32) if is_volume(path) else read_mask(path, mask_values, kind == "fundus")[None]
    if mask.shape != shape or mask.max() >= classes:
        raise ValueError(f"mask {path}: {by(mask.shape)} with classes up to {mask.max()}, expected {by(shape)} "
                         f"up to {classes - 1}; mind --mask-values")
    return mask


def network_input(path: Path, pixels: np.ndarray, size: int, channels: int, kind: str) -> np.ndarray:
    """What a network trained on images of this kind sees of a file: (n, channels, size, size) float32."""
    if is_volume(path) != (kind == "volumes") and (channels > 1 or kind == "volumes"):
        raise ValueError(f"{path}: the run was trained on {'volumes' if kind == 'volumes' else 'colour images'}")
    if is_volume(path):
        slices = normalise_volume(pixels[..., 0], size)
        return (slices[neighbours(len(slices))] if channels == 3 else slices[:, None]).astype(np.float32)
    image = pixels[0]
    if channels == 1 and (image != image[:, :, :1]).any():
        raise ValueError(f"{path}: holds colours, the run was trained on grey images")
    image = image[:, :, :1] if channels == 1 else image
    return as_input(resize(image.transpose(2, 0, 1), size), channels)[None]


@contextmanager
def decoding(path: Path):
    """Whatever a decoder makes of a file that is damaged, foreign or too large becomes a ValueError that names it."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
            yield
    except Exception as error:
        text = " ".join(str(error).replace(str(path), "it").split())
        raise ValueError(f"{path}: not a readable {'NIfTI file' if is_volume(path) else 'image'} "
                         f"({text or type(error).__name__}); replace or remove it") from None


def _open(path: Path) -> Image.Image:
    with decoding(path):
        image = Image.open(path)
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{image.n_frames} pages, one image is expected")
        return ImageOps.exif_transpose(image)


def resize(planes: np.ndarray, size: int, filter: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """(C, H, W) → (C, size, size) by pillow; its bilinear filter averages where it shrinks."""
    return np.stack([np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((size, size), filter))
                     for plane in planes])


def as_input(planes: np.ndarray, channels: int) -> np.ndarray:
    """Grey or RGB planes as a network of `channels` channels wants them, normalised."""
    return normalise(np.repeat(planes, channels // len(planes), axis=0))


def normalise_volume(volume: np.ndarray, size: int) -> np.ndarray:
    """(D, H, W) → (D, size, size) float16, clipped at the 0.5 and 99.5 percentile, mean 0, variance 1."""
    return normalise(resize(np.clip(volume, *np.percentile(volume, [0.5, 99.5])), size)).astype(np.float16)


def neighbours(count: int) -> np.ndarray:
    """For each of the slices of a volume the one before, itself and the one after: (count, 3); clamped at the ends."""
    return np.clip(np.arange(count)[:, None] + [-1, 0, 1], 0, count - 1)
