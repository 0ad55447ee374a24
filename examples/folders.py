"""Folders of images and NIfTI volumes, read for training and adapting; masks, written back.

`load_folder` makes a `data.DataSet` of folders, one a hospital; `read_file`, `read_mask` and
`network_input` read single files; `mask_volume` writes a mask. Volumes need nibabel, which is
imported where it is used.
"""

import gzip
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from PIL import Image, ImageOps
from torch import Tensor

import data
import iopfl
from data import DISC_AND_CUP, PROSTATE


# ---------------------------------------------------------------- folders of real images
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
VOLUME_TYPES = (".nii", ".nii.gz")
CONVERTERS = {  # of formats that are not read
    ".mha": "SimpleITK",
    ".mhd": "SimpleITK",
    ".nrrd": "SimpleITK",
    ".dcm": "dcm2niix",
    ".npy": "numpy and nibabel",
    ".npz": "numpy and nibabel",
    ".h5": "h5py and nibabel",
    ".hdf5": "h5py and nibabel",
    ".pgm": "pillow",
    ".ppm": "pillow",
    ".webp": "pillow",
}
PARTS = {  # the folders of a site that is split, and other names of theirs
    "train": ["train"],
    "val": ["val", "valid", "validation"],
    "test": ["test"],
}
FUNDUS_VALUES = [255, 128, 0]  # background, rim, cup
MOST_CLASSES = 32
SMOOTHED = "threshold it and save it as PNG with one value a class (was it a JPEG?)"
RESERVED = ("global", "all", "none")  # words of the command line and the tables
LAYOUTS = ("known layouts: <site>/{images,masks}/<same stem>.png, "
           "<site>/{train,val,test}/{images,masks}/, "
           "<site>/{train,test}/ROIs/{image,mask}/ for fundus photographs, "
           "<site>/CaseNN.nii.gz with CaseNN_segmentation.nii.gz")


@dataclass
class FolderSite(data.Site):
    """A hospital whose images are files.

    shapes: of each file as read. resized_dice: of each mask file that holds something the Dice
    between the mask and itself after shrinking to the training size and enlarging again.
    """
    shapes: list[tuple]
    resized_dice: list[float]


@dataclass
class FolderDataSet(data.DataSet):
    """Hospitals whose images are files; `kind` is "images", "fundus" or "volumes".

    mask_values: the grey value of each class in the mask files; None: they hold classes.
    """
    mask_values: list[int] | None


def load_folder(root: str | Path, size: int = 96, mask_values: list[int] | None = None,
                seed: int = 0) -> FolderDataSet:
    """Real images or volumes in one of LAYOUTS, one folder a site.

    Images and masks become size × size, masks by the nearest pixel. Images have 1 channel if all
    are grey, else 3. Masks hold classes or the grey values `mask_values`, one a class; those of
    fundus photographs the nearest of FUNDUS_VALUES, or of three others. Of a volume each slice is
    an image with its neighbours as channels, and labels above 0 are prostate.
    A site that is not split is shuffled by (seed, site) and cut 60 : 15 : 25.
    Warns of what is left out and of what looks wrong. Raises ValueError, which names a file or
    site and a way out, for what cannot be used; ImportError for volumes without nibabel.
    """
    root = Path(root)
    kind, found = find_sites(root)
    values = grey_values(kind, mask_values)
    sites, every_split, every_case = [], [], []
    for name, parts in found.items():
        splits, cases_of_site = [], []
        for pairs in three_splits(name, parts, seed):
            cases = [load_case(root / name, pair, kind, values, size) for pair in pairs]
            splits.append(data.joined([case.split for case in cases]))
            cases_of_site += cases
        spacing = {case.split.cases[0]: case.spacing for case in cases_of_site}
        shapes = [case.shape for case in cases_of_site]
        resized_dice = [case.dice for case in cases_of_site if case.dice is not None]
        sites.append(FolderSite(name, *splits, spacing, shapes, resized_dice))
        every_split += splits
        every_case += cases_of_site
    channels = max(case.channels for case in every_case)
    for split in every_split:  # so far grey images have three equal channels
        split.images = split.images[:, :channels].contiguous()
    structures = structures_in(kind, every_case, values)
    report_left_out(root, {file for case in every_case for file in case.files})
    warn_of_lost_classes(every_case, size)
    unit = "mm" if kind == "volumes" else "px"
    return FolderDataSet(root.name, sites, channels, structures, unit, kind, values)


def grey_values(kind, given):
    """The grey value of each class in masks of this kind; None: they hold classes."""
    if not given:
        return FUNDUS_VALUES if kind == "fundus" else None
    if len(set(given)) < len(given):
        raise ValueError("--mask-values: list each value once")
    if kind == "volumes":
        raise ValueError("--mask-values: none for volumes, whose labels above 0 are prostate")
    if kind == "fundus" and len(given) != 3:
        raise ValueError("--mask-values: three for fundus ROIs, of background, rim and cup")
    return given


def structures_in(kind, cases, values):
    """The structures of a data set, from the classes in the masks of all its cases."""
    if kind == "volumes":
        return PROSTATE
    holders = {number: case.files[1] for case in cases for number in case.classes}
    classes = sorted(holders)
    count = len(values or classes)
    if len(classes) < 2 or classes[-1] >= count:
        raise ValueError(f"{holders[classes[-1]]}: all masks together hold {classes}; expected are "
                         "0, 1 … without a gap, or else list all grey values: --mask-values")
    if kind == "fundus":
        return DISC_AND_CUP
    warn_of_two_numberings(cases, len(classes))
    return {f"class {number}": (number,) for number in range(1, count)}


def warn_of_two_numberings(cases, count):
    """Warn if each site lacks one of the classes: they may number the same structures otherwise."""
    by_site = defaultdict(set)
    for case in cases:
        by_site[case.site].update(case.classes)
    if max(map(len, by_site.values())) == count:
        return
    held = [f"{site} {sorted(classes)}" for site, classes in by_site.items()]
    warnings.warn(f"no site has masks of all {count} classes ({'; '.join(held)}): if the same "
                  "structure has another grey value elsewhere, save all masks alike", stacklevel=3)


def warn_of_lost_classes(cases, size):
    """Warn of masks in which a class is gone after resizing: an empty prediction scores well."""
    lost = [case.files[1] for case in cases if case.loses_a_class]
    if lost:
        warnings.warn(f"{len(lost)} of {len(cases)} masks lose a class when they become {size} × "
                      f"{size}, such as {lost[0]}; choose a larger --size", stacklevel=3)


def find_sites(root):
    """The kind of the data set, and what `find_pairs` says of each site."""
    kinds, sites = set(), {}
    for folder in filter(Path.is_dir, visible(root)):
        name, parts = folder.name, find_pairs(folder)
        if not parts:
            continue  # in no known layout: left out
        if name.lower() in RESERVED or not name.isprintable():
            raise ValueError(f"{root}: a site cannot be called {name!r}; rename it")
        sites[name] = parts
        for image, mask in sum(parts.values(), []):
            if mask is None:
                raise ValueError(f"{image} has no mask of its name; add it or remove the image; "
                                 f"{LAYOUTS}{to_convert(root.rglob('*'))}")
            kinds.add(kind_of(image))
    if len(kinds) != 1:
        problem = "different layouts" if kinds else "no sites found"
        raise ValueError(f"{root}: {problem}; {LAYOUTS}{to_convert(root.rglob('*'))}")
    return kinds.pop(), sites


def kind_of(image):
    """The kind of data set that an image or volume belongs to, by its place and name."""
    if is_volume(image):
        return "volumes"
    rois = image.parent.parent.name.lower() == "rois"
    return "fundus" if rois else "images"


def find_pairs(site):
    """The files of a site's "train", "val" and "test", or of "all" if it is not split.

    {} for a folder in no known layout.
    """
    if any(is_volume(path) for path in visible(site)):
        return {"all": pair_up(site, site)}
    places = {"all": site}
    for part, names in PARTS.items():
        places[part] = subfolder(site, names)
    parts = {}
    for part, place in places.items():
        place = subfolder(place, ["rois"]) or place
        images = subfolder(place, ["image", "images"])
        if images:
            masks = subfolder(place, ["mask", "masks"]) or subfolder(place, ["label", "labels"])
            parts[part] = pair_up(images, masks)
    return parts


def visible(folder):
    """What a folder holds, sorted, except what is hidden; [] for None."""
    inside = folder.iterdir() if folder else []
    return sorted(path for path in inside if path.name[0] != ".")


def subfolder(folder, names):
    """The folder within another that has one of these names, in capitals or not, or None.

    Raises ValueError if there are several.
    """
    same = [path for path in visible(folder) if path.name.lower() in names and path.is_dir()]
    if len(same) > 1:
        raise ValueError(f"{same[0]} and {same[1].name} mean the same; keep one")
    return same[0] if same else None


def pair_up(images: Path, masks: Path | None) -> list[tuple]:
    """(image or volume, mask or None): each one in a folder with the mask of its name.

    The names of masks may end in _segmentation; in the folder of the images they must, and there
    x_segmentation beside x is a mask in any case. Without `masks` all are None.
    Raises ValueError if two files are the same image, or masks of the same.
    """
    files = files_by_stem(images)
    drawn = files_by_stem(masks) if masks else {}
    together = masks in (images, None)
    for name in list(files):
        if name != case_of(name) and (together or case_of(name) in files):
            del files[name]
    mask_of = {}
    for name, file in drawn.items():
        if together and name in files:
            continue  # an image
        case = name if name in files else case_of(name)
        check_alone(file, mask_of.get(case))
        mask_of[case] = file
    return [(file, mask_of.get(case)) for case, file in files.items()]


def files_by_stem(folder):
    """The images and volumes of a folder by their names without the ending."""
    files = {}
    for file in visible(folder):
        if file.name.lower().endswith(IMAGE_TYPES + VOLUME_TYPES):
            check_alone(file, files.get(stem(file)))
            files[stem(file)] = file
    return files


def check_alone(file, other):
    if other:
        raise ValueError(f"{file} and {other.name} mean the same; keep one")


def case_of(name):
    """The name of the image that a mask of this name belongs to."""
    return re.sub("_segmentation$", "", name, flags=re.I)


def report_left_out(root: Path, read: set[Path]) -> None:
    """One warning about all that is neither hidden nor read below a folder.

    Of an empty folder the folder itself counts, else the files that it holds.
    """
    left = []
    for path in sorted(root.rglob("*")):
        hidden = "/." in f"/{path.relative_to(root).as_posix()}"
        holds_something = path.is_dir() and visible(path)
        if not (hidden or holds_something or path in read):
            left.append(path)
    if left:
        warnings.warn(f"left out: {len(left)} files or empty folders that are no image or mask of "
                      f"a site, such as {left[0]}{to_convert(left)}", stacklevel=2)


def to_convert(files) -> str:
    """How to convert the files of formats that are not read, to be added to a message."""
    endings = {file.suffix.lower() for file in files}
    advice = [f"; {ending} is not read: convert it to NIfTI or PNG by {tool}"
              for ending, tool in CONVERTERS.items() if ending in endings]
    return "".join(advice)


def three_splits(site, parts, seed):
    """The files to train, validate and test with, as their folders say or else by a shuffle.

    Without "val" a fifth of "train" validates. Raises ValueError if one would be empty.
    """
    rng = data.random_for(seed, "folder", site)
    if "all" in parts:
        warn_of_split_patients(site, parts["all"])
        rng.shuffle(parts["all"])
        splits = data.cut(parts["all"])
    else:
        splits = [parts.get(part, []) for part in PARTS]
        if "val" not in parts:
            train = splits[0]
            warn_of_split_patients(site, train)
            rng.shuffle(train)
            count = max(1, round(0.2 * len(train)))  # 15 of the 75 per cent that do not test
            splits[:2] = train[count:], train[:count]
    if not all(splits) or "all" in parts and len(parts) > 1:
        counts = ", ".join(f"{len(pairs)} in {part}" for part, pairs in parts.items())
        raise ValueError(f"site '{site}': images: {counts}; either 3 or more lie in the site's own "
                         "folder, or 1 or more in each of train, val and test; 2 or more in train "
                         "without val")
    return splits


def warn_of_split_patients(site, pairs):
    """Warn of images such as patient00_slice0 and patient00_slice1, which a shuffle may part."""
    groups = defaultdict(list)
    for image, _ in pairs:
        numbered = re.fullmatch(r"(.*\d.*)[-_. ][a-z]*\d+", stem(image), flags=re.I)
        if numbered and not is_volume(image):
            groups[numbered[1]].append(image.name)
    several = [names for names in groups.values() if len(names) > 1]
    if len(groups) > 1 and several:
        first, second = several[0][:2]
        warnings.warn(f"site '{site}': if {first} and {second} show one patient, give the split by "
                      "folders train, val and test, or patients may be in two parts", stacklevel=2)


@dataclass
class Case:
    """An image or volume with its mask, resized, and what is to be known of its files."""
    files: tuple  # the image or volume and its mask
    site: str
    split: data.Split
    spacing: tuple  # after resizing
    shape: tuple  # before
    channels: int  # that are needed: 1 for a grey image
    classes: list[int]  # in the mask, before resizing
    loses_a_class: bool  # by resizing
    dice: float | None  # see `FolderSite.resized_dice`


def load_case(site, pair, kind, values, size):
    """Read and check an image or volume and its mask; a grey image gets three equal channels."""
    file, mask_file = pair
    pixels, affine = read_file(file)
    mask = read_mask(mask_file, pixels.shape[:3], kind, values, affine)
    small = resize(mask, size, Image.NEAREST)
    classes = np.unique(mask).tolist()
    loses_a_class = len(np.unique(small)) < len(classes)
    structures = [[number] for number in classes if number > 0]
    if kind == "fundus":
        structures = DISC_AND_CUP.values()
    dice = dice_with_itself(mask, small, structures)

    images = torch.from_numpy(network_input(file, pixels, size, 3, kind))
    names = [file.relative_to(site).as_posix()] * len(images)
    split = data.Split(images, torch.from_numpy(small).byte(), names)
    spacing, shape, channels = (1.0, 1.0), mask.shape[1:], pixels.shape[-1]
    if kind == "volumes":
        split.images, split.stacks = images.half(), True
        shrunk = np.divide(mask.shape, small.shape)
        spacing = tuple((voxel_size(affine) * shrunk).tolist())
        shape, channels = mask.shape, 3
    return Case(pair, site.name, split, spacing, shape, channels, classes, loses_a_class, dice)


def dice_with_itself(mask, small, structures):
    """Dice of a mask (n, H, W) with itself resized (n, h, w) and brought back.

    Mean over the structures in it; None if it holds background alone.
    """
    if not mask.any():
        return None
    one_hot = F.one_hot(torch.from_numpy(small).long()).permute(0, 3, 1, 2).float()
    back, _ = at_own_size(one_hot, mask.shape[1:])
    scores = []
    for classes in structures:
        drawn = np.isin(mask, classes)
        if drawn.any():
            scores.append(iopfl.dice(drawn, np.isin(back, classes)))
    return float(np.mean(scores))


def at_own_size(probabilities: Tensor, size: tuple) -> tuple[ndarray, ndarray]:
    """Probabilities (n, C, h, w) at the size (H, W) of the file.

    Returns the mask (n, H, W), uint8, and the probabilities (n, C, H, W), float16.
    """
    masks, maps = [], []
    for plane in probabilities.split(1):  # all at once need much memory
        large = F.interpolate(plane, size, mode="bilinear").cpu()  # (1, C, H, W)
        masks.append(large.argmax(dim=1).byte().numpy())
        maps.append(large.half().numpy())
    return np.concatenate(masks), np.concatenate(maps)


# ---------------------------------------------------------------- single files
MOST_VOXELS = 2**28  # of a volume: 1 GiB as float32
MILLIMETRES = {1: 1000.0, 3: 0.001}  # by NIfTI's codes of the metre and the micrometre


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUME_TYPES)


def stem(path: Path) -> str:
    """The name without its ending, .nii.gz being one."""
    gzipped = path.name.lower().endswith(".nii.gz")
    return Path(path.stem).stem if gzipped else path.stem


class Unusable(ValueError):
    """A file that can be decoded, but not be used; its text says what to do."""


def read_file(path: Path, as_mask: bool = False) -> tuple[ndarray, ndarray]:
    """Pixels (n, H, W, C) float32 and affine (4, 4) of an image, n = 1, or a volume of n slices.

    as_mask: see `read_image`.
    Raises ValueError if it cannot be read, or holds NaN or infinity: whatever a decoder raises
    becomes one line that names the file. Raises ImportError for volumes without nibabel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 Mpixels
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ValueError("not a file")
            if is_volume(path):
                pixels, affine = read_volume(path)
            else:
                pixels, affine = read_image(path, as_mask), np.eye(4)
            if not np.isfinite(pixels).all():
                raise Unusable("it holds values that are not finite; correct or remove it")
    except ImportError as error:
        raise ImportError(f"{path}: {error}; pip install nibabel") from None
    except Unusable as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # of many kinds, some without a text, some with several lines
        text = " ".join(str(error).split()) or type(error).__name__
        kind = "NIfTI file" if is_volume(path) else "image"
        raise ValueError(f"{path}: not a readable {kind} ({text}); replace or remove it") from None
    return pixels, affine


def read_image(path, as_mask):
    """The pixels of an image, (1, H, W, 1 or 3) float32, turned as its EXIF says, without alpha.

    as_mask: of a palette the indices, since masks are often stored so, unless it shows each as a
    grey of its own; and Unusable for a file that holds a mask in a way that would lose it.
    """
    with open(path, "rb") as stream, Image.open(stream) as file:  # not by name: turned TIFFs fail
        if getattr(file, "n_frames", 1) > 1:
            raise Unusable(f"{file.n_frames} pages, one image is expected; save one alone")
        mode = mode_to_read(file, as_mask)
        white_is_zero = getattr(file, "tag_v2", {}).get(262) == 0
        if white_is_zero and mode not in ("1", "L"):  # pillow inverts these alone
            raise Unusable("a TIFF of this depth in which 0 is white is not read; invert it")
        if as_mask:
            check_mask_format(file, mode)
        image = ImageOps.exif_transpose(file).convert(mode)
        pixels = np.array(image, dtype=np.float32)
        if as_mask and file.format == "JPEG" and np.diff(np.unique(pixels)).min(initial=255) < 32:
            raise Unusable("JPEG has changed the mask's values; threshold it and save it as PNG")
    return pixels.reshape(1, image.height, image.width, -1)


def mode_to_read(file, as_mask):
    """Pillow's mode that keeps what an image holds: grey, coloured, or of a palette."""
    mode = file.mode.rstrip("A")
    if mode == "P":
        palette = np.reshape(file.getpalette(), (-1, 3))
        used = palette[np.unique(file.getchannel(0))]
        grey = (palette == palette[:, :1]).all()
        if grey and len(np.unique(used, axis=0)) == len(used):
            return "L"
        if as_mask and file.format != "GIF":  # in which programs number the colours as they like
            return "P"
    grey = mode == "L" or mode[0] in "1IF"  # of 8 bits, 1 bit, integers, floats
    return mode if grey else "RGB"


def check_mask_format(file, mode):
    """Raise Unusable for a mask that pillow would read with its values lost."""
    if mode[0] != "I" and ";16" in str(file.tile):
        raise Unusable("16 bits a channel, of which 8 are read; save the mask as a grey image")
    if file.mode in ("LA", "RGBA"):
        *colours, alpha = file.split()
        flat = all(low == high for low, high in map(Image.Image.getextrema, colours))
        if flat and len(set(alpha.getextrema())) > 1:
            raise Unusable("its values lie in the alpha channel; save the mask as a grey image")


def read_volume(path):
    """The voxels of a NIfTI file, (slice, row, column, 1) float32, and their affine (4, 4) in mm.

    Its header says which axes these are: feet to head, front to back, the patient's right to left.
    """
    import nibabel
    nibabel.imageglobals.logger.setLevel(100)  # silent: what matters is raised
    with nibabel.imageglobals.ErrorLevel(30):  # a header to be repaired might have other axes
        file = nibabel.load(path)
    count = np.prod(file.shape, dtype=float)
    undirected = np.isnan(nibabel.io_orientation(file.affine)).any()
    if len(file.shape) != 3 or undirected or not 0 < count <= MOST_VOXELS:
        raise Unusable("three dimensions, each with a direction in the affine, and at most "
                       f"{MOST_VOXELS} voxels are expected, found {file.shape}; convert it")
    to_ours, _ = axis_changes(file.affine)
    file = file.as_reoriented(to_ours)
    voxels = np.ascontiguousarray(file.dataobj, dtype=np.float32)
    if path.suffix.lower() == ".gz":
        read_to_the_end(path)
    affine = file.affine.copy()
    affine[:3] *= MILLIMETRES.get(int(file.header["xyzt_units"]) % 8, 1.0)
    return voxels[..., None], affine


def read_to_the_end(path):
    """Raise an error if the checksum of a gzip file is not that of its content.

    It stands at the end, and nibabel stops before.
    """
    with gzip.open(path) as stream:
        while stream.read(2**24):
            pass


def mask_volume(mask: ndarray, like: Path) -> bytes:
    """A .nii.gz file of a mask in the order of `read_volume`, with axes and affine of `like`."""
    import nibabel
    file = nibabel.load(like)  # the header alone
    _, to_its_own = axis_changes(file.affine)
    mask = nibabel.orientations.apply_orientation(mask.astype(np.uint8), to_its_own)
    header = file.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the grey window of the volume would hide a mask
    volume = type(file)(mask, file.affine, header)
    return gzip.compress(volume.to_bytes(), mtime=0)  # the same mask, the same bytes


def axis_changes(affine):
    """For nibabel: from the axes of an affine to (slice, row, column), and back."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
    own, ours = io_orientation(affine), axcodes2ornt("SPL")
    return ornt_transform(own, ours), ornt_transform(ours, own)


def voxel_size(affine):
    """The length of a voxel along each axis, (3,)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def read_mask(path: Path, shape: tuple, kind: str = "images", values: list[int] | None = None,
              affine: ndarray | None = None, classes: int = MOST_CLASSES) -> ndarray:
    """The classes, (n, H, W) integers, in the mask of an image or volume of this shape and affine.

    kind: of the data set. values: the grey value of each class; None: the file holds classes.
    Of a volume the labels above 0 are class 1 in a data set of volumes, or of two classes.
    Raises ValueError where the mask does not fit its image, or holds other classes.
    """
    pixels, own_affine = read_file(path, as_mask=True)
    mask = pixels[..., 0]
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"mask {path}: one channel is expected; save it as a grey image")
    if mask.shape != shape:
        raise ValueError(f"mask {path}: its size {mask.shape} is not that of its image, {shape}; "
                         "resample it")
    if affine is not None:
        moved = np.linalg.inv(affine) @ own_affine - np.eye(4)  # in voxels, for an index of 1
        farthest = np.abs(moved) @ (*shape, 1)
        if farthest.max() > 0.5:
            raise ValueError(f"mask {path}: its affine is not its volume's; resample it")
    labels = mask.round()
    if labels.min() < 0 or np.abs(mask - labels).max() > 0.015:  # a scale in a header rounds
        raise ValueError(f"mask {path}: whole numbers from 0 are expected; save it as classes, "
                         "resampled by the nearest neighbour")
    mask = labels
    if is_volume(path):
        values = None
        if kind == "volumes" or classes == 2:
            mask = mask > 0
    return classes_of(path, mask, kind, values, classes)


def classes_of(path, mask, kind, values, classes):
    """The classes for the grey values of a mask, as `read_mask` returns them."""
    greys, counts = np.unique(mask, return_counts=True)
    if values:
        distance = np.abs(greys[:, None] - values)
        nearest = distance.argmin(axis=1)  # the class of each grey value
        if kind != "fundus" and distance.min(axis=1).any():
            advice = SMOOTHED if looks_smoothed(greys) else "or list what is a further class"
            raise ValueError(f"mask {path}: its values {in_words(greys)} are not all among "
                             f"--mask-values {values}; all sites need the same value for the same "
                             f"class; {advice}")
        mask = nearest[np.searchsorted(greys, mask)]
        if kind == "fundus":
            common = counts > 0.01 * mask.size  # smoothed edges are few pixels of each value
            check_fundus(path, mask, greys[common], values)
    if mask.max() >= classes:
        raise ValueError(f"mask {path}: {len(greys)} values up to {greys[-1]:.0f}; expected are "
                         f"0, 1 … {classes - 1}; {advice_for(greys)}")
    return mask.astype(np.int32)


def advice_for(greys):
    """What to do about the grey values of a mask that are too large for classes."""
    if len(greys) > 2 and greys[-1] == 255 and greys[-2] < MOST_CLASSES:
        return f"it holds {in_words(greys)}: no pixel is ignored, give those of 255 a class"
    if looks_smoothed(greys):
        return SMOOTHED
    return f"or list the grey values: --mask-values {in_words(greys)}"


def looks_smoothed(greys):
    return len(greys) > 8 and np.diff(greys).min() < 8


def in_words(greys):
    return " ".join(f"{grey:.0f}" for grey in greys[:MOST_CLASSES])


def check_fundus(path, mask, greys, values):
    """Raise ValueError for a mask that is not background around a rim around a cup.

    mask: its classes, (1, H, W); background alone will do, and a rim without a cup.
    greys: its common values.
    """
    distance = np.abs(greys[:, None] - values).min(axis=1)
    far = distance > np.diff(sorted(values)).min() / 8
    border = np.concatenate([mask[0, 0], mask[0, -1], mask[0, :, 0], mask[0, :, -1]])
    inside_out = np.mean(border == 0) < 0.5
    without_rim = np.sum(mask == 1) < 0.05 * np.sum(mask == 2)
    if far.any() or inside_out or without_rim:
        raise ValueError(f"mask {path}: it holds {in_words(greys)}; expected are background, rim "
                         f"and cup as {values}; list others by --mask-values, or correct it")


def network_input(path: Path, pixels: ndarray, size: int, channels: int, kind: str) -> ndarray:
    """What a network trained on this kind sees of a file: (n, channels, size, size) float32.

    pixels: (n, H, W, C) as from `read_file`. channels: those of the network. A volume is clipped
    at the 0.5 and 99.5 percentile; with 3 channels each slice lies between its two neighbours.
    Raises ValueError if the network cannot use such a file.
    """
    volume = is_volume(path)
    other_kind = channels == 3 and volume != (kind == "volumes")
    colours = channels == 1 and (pixels != pixels[..., :1]).any()
    if other_kind or colours:
        raise ValueError(f"{path}: the run was trained on files of kind {kind} with {channels} "
                         "channels; convert or remove it")
    if volume:
        low, high = np.percentile(pixels, [0.5, 99.5])
        slices = np.clip(pixels[..., 0], low, high)
        slices = data.normalise(resize(slices, size))
        numbers = np.arange(len(slices))[:, None]
        if channels == 3:
            numbers = numbers + [-1, 0, 1]
        return slices[np.clip(numbers, 0, len(slices) - 1)]
    planes = pixels[0, ..., :channels].transpose(2, 0, 1)
    planes = resize(planes, size)
    planes = np.repeat(planes, channels // len(planes), axis=0)
    return data.normalise(planes)[None]


def resize(planes, size, filter=Image.BILINEAR):
    """(C, H, W) → (C, size, size) by pillow; its bilinear filter averages where it shrinks."""
    resized = []
    for plane in planes:
        image = Image.fromarray(plane).resize((size, size), filter)
        resized.append(np.asarray(image))
    return np.stack(resized)
