"""Folders of images and NIfTI volumes, read for training and adapting.

`load_folder` makes a `data.DataSet` of folders, one a hospital; `read_file`, `read_mask` and
`network_input` read single files. Volumes need nibabel, which is imported where it is used.

This is what is read, by the content of a file and not by its name. All else is refused.

images   formats: PNG, JPEG, BMP; TIFF of one page, stored raw or by LZW, deflate or PackBits,
         little-endian where a sample has 16 bits
         pixels: grey of 1, 8 or 16 bits, unsigned; RGB of 8 bits; an alpha channel if it is opaque
         everywhere; a palette, as its colours
masks    formats: PNG, BMP, TIFF as above
         pixels: as above, if all channels are equal; a palette, as greys if it shows greys alone,
         else as indices, if all masks show the same colour for the same index
volumes  formats: NIfTI-1 and NIfTI-2, .nii and .nii.gz
         voxels: real numbers in three dimensions, or in four with one frame
"""

import gzip
import os
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageOps

import data


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
SEGMENTATION = re.compile("_segmentation$", re.IGNORECASE)  # of the name of a mask
SMOOTHED = "threshold it and save it as PNG with one value a class (was it a JPEG?)"
RESERVED = ("global", "all", "none")  # words of the command line and the tables
LONGEST_NAME = 220  # bytes: what is written beside a file has a longer name, at most of 255
LAYOUTS = ("known layouts: <site>/{images,masks}/<same stem>.png, "
           "<site>/{train,val,test}/{images,masks}/, "
           "<site>/{train,test}/ROIs/{image,mask}/ for fundus photographs, "
           "<site>/CaseNN.nii.gz with CaseNN_segmentation.nii.gz")


@dataclass
class FolderDataSet(data.DataSet):
    """Hospitals whose images are files; `kind` is "images", "fundus" or "volumes".

    mask_values: the grey value of each class in the mask files; None: they hold classes.
    """
    mask_values: list[int] | None


def load_folder(root: str | Path, size: int = 96, mask_values: list[int] | None = None,
                seed: int = 0, patient_of: Callable = str) -> FolderDataSet:
    """Real images or volumes in one of LAYOUTS, one folder a site.

    Images and masks become size × size, masks by the nearest pixel. Images have 1 channel if all
    are grey, else 3. Masks hold classes or the grey values `mask_values`, one a class; those of
    fundus photographs the nearest of FUNDUS_VALUES, or of three others. Of a volume each slice is
    an image with its neighbours as channels, and labels above 0 are prostate.
    A site that is not split is shuffled by (seed, site) and cut 60 : 15 : 25. `patient_of` gives
    the patient of an image's path: all images of one patient are in one part. By default each image
    is a patient of its own.
    Warns of what is left out and of what looks wrong. Raises ValueError, which names a file or
    site and a way out, for what cannot be used; ImportError for volumes without nibabel.
    """
    root = Path(root)
    kind, found = find_sites(root)
    values = grey_values(kind, mask_values)
    sites, every_split, every_case = [], [], []
    for name, parts in found.items():
        splits, cases_of_site = [], []
        for pairs in three_splits(name, parts, seed, patient_of):
            cases = [load_case(root / name, pair, kind, values, size) for pair in pairs]
            splits.append(data.joined([case.split for case in cases]))
            cases_of_site += cases
        spacing = {case.split.cases[0]: case.spacing for case in cases_of_site}
        sites.append(data.Site(name, *splits, spacing))
        check_background(name, cases_of_site, kind, values)
        every_split += splits
        every_case += cases_of_site
    channels = max(case.channels for case in every_case)
    for split in every_split:  # so far grey images have three equal channels
        split.images = split.images[:, :channels].contiguous()
    colours = {}
    for case in every_case:
        check_palette(case.files[1], colours)
    structures = structures_in(kind, every_case, values)
    report_left_out(root, {file for case in every_case for file in case.files})
    warn_of_lost_classes(every_case, size)
    return FolderDataSet(root.name, sites, channels, structures,
                         "mm" if kind == "volumes" else "px", kind, values)


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


def check_background(site, cases, kind, values):
    """Raise ValueError if hardly a border pixel of a site's masks is of the value for background.

    Of masks of classes this is a warning alone, so that who means it has a way out.
    """
    border = np.sum([case.border for case in cases], axis=0)
    share = border[0] / border.sum()
    if share >= 0.1:
        return
    text = (f"site '{site}': {100 * share:.0f} % of the border pixels of its masks are background, "
            "they may be inside out;")
    if values:
        ordered = background_first(values, values[border.argmax()])
        raise ValueError(f"{text} --mask-values {in_words(ordered)}; or else save them as classes "
                         "0, 1 …")
    if kind == "volumes":
        raise ValueError(f"{text} save 0 outside of the organ")
    warnings.warn(f"{text} class 0 is to be the background", stacklevel=3)


def check_palette(file, seen):
    """Raise ValueError if a colour has another index in a mask than in those before, or reverse.

    seen: of the masks before, what index and colour stand for each other; it is added to.
    """
    for index, colour in look_at(file)[1].items():
        for one, other in [(index, colour), (colour, index)]:
            known, where = seen.setdefault(one, (other, file))
            if known != other:
                raise ValueError(f"mask {file}: {one} is {other} in its palette, but {known} in "
                                 f"that of {where}; save all masks as grey images of classes")


def structures_in(kind, cases, values):
    """The structures of a data set, from the classes in the masks of all its cases."""
    holders = {number: case.files[1] for case in cases for number in case.classes}
    classes = sorted(holders)
    count = len(values or classes)
    if len(classes) < 2 or classes[-1] >= count:
        raise ValueError(f"{holders[classes[-1]]}: all masks together hold {classes}; expected are "
                         "0, 1 … without a gap, or else list all grey values: --mask-values")
    if kind == "volumes":
        return data.PROSTATE
    if kind == "fundus":
        return data.DISC_AND_CUP
    warn_of_two_numberings(cases, len(classes))
    return {f"class {number}": (number,) for number in range(1, count)}


def warn_of_two_numberings(cases, count):
    """Warn if each site lacks one of the classes: they may number the same structures otherwise."""
    by_site = defaultdict(set)
    for case in cases:
        by_site[case.site].update(case.classes)
    if max(map(len, by_site.values())) < count:
        held = "; ".join(f"{site} {sorted(classes)}" for site, classes in by_site.items())
        warnings.warn(f"no site has masks of all {count} classes ({held}): if the same structure "
                      "has another grey value elsewhere, save all masks alike", stacklevel=3)


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
        if name.lower() in RESERVED or not name.isprintable() or is_long(name):
            raise ValueError(f"{root}: a site cannot be called {name!r}; rename it, in at most "
                             f"{LONGEST_NAME} bytes")
        sites[name] = parts
        for image, mask in sum(parts.values(), []):
            if mask is None:
                raise ValueError(f"{image} has no mask of its name; add it or remove the image; "
                                 f"{LAYOUTS}{to_convert(root.rglob('*'))}")
            kinds.add(kind_of(image))
    if len(kinds) != 1:
        raise ValueError(f"{root}: {'different layouts' if kinds else 'no sites found'}; {LAYOUTS}"
                         f"{to_convert(root.rglob('*'))}")
    return kinds.pop(), sites


def kind_of(image):
    """The kind of data set that an image or volume belongs to, by its place and name."""
    if is_volume(image):
        return "volumes"
    return "fundus" if image.parent.parent.name.lower() == "rois" else "images"


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

    A file whose name ends in _segmentation is a mask, wherever it lies. In the folder of the images
    the names of all masks end so. Without `masks` all are None.
    Raises ValueError if two files are the same image, or masks of the same.
    """
    mask_of = {}
    if masks:
        for name, file in files_by_stem(masks).items():
            if masks != images or SEGMENTATION.search(name):
                case = SEGMENTATION.sub("", name)
                check_alone(file, mask_of.get(case))
                mask_of[case] = file
    return [(file, mask_of.get(name)) for name, file in files_by_stem(images).items()
            if not SEGMENTATION.search(name)]


def files_by_stem(folder):
    """The images and volumes of a folder by their names without the ending, composed (NFC)."""
    files = {}
    for file in visible(folder):
        if file.name.lower().endswith(IMAGE_TYPES + VOLUME_TYPES):
            if is_long(file.name):
                raise ValueError(f"{file}: its name is longer than {LONGEST_NAME} bytes; rename it")
            name = unicodedata.normalize("NFC", stem(file))
            check_alone(file, files.get(name))
            files[name] = file
    return files


def is_long(name):
    return len(os.fsencode(name)) > LONGEST_NAME


def check_alone(file, other):
    if other:
        raise ValueError(f"{file} and {other.name} mean the same; keep one")


def report_left_out(root: Path, read: set[Path]) -> None:
    """One warning about all that is neither hidden nor read below a folder.

    A folder counts once if it is empty; otherwise each of its files counts.
    """
    left = []
    for path in sorted(root.rglob("*")):
        hidden = "/." in f"/{path.relative_to(root).as_posix()}"
        holds_something = path.is_dir() and visible(path)
        if not (hidden or holds_something or path in read):
            left.append(path)
    if left:
        warnings.warn(f"left out: {len(left)} files or empty folders that are no image of a site "
                      f"and no mask of an image, such as {left[0]}{to_convert(left)}", stacklevel=2)


def to_convert(files) -> str:
    """How to convert the files of formats that are not read, to be added to a message."""
    endings = {file.suffix.lower() for file in files}
    return "".join(f"; {ending} is not read: convert it to NIfTI or PNG by {tool}"
                   for ending, tool in CONVERTERS.items() if ending in endings)


def three_splits(site, parts, seed, patient_of):
    """The files to train, validate and test with, as their folders say or else by a shuffle.

    Without "val" a fifth of "train" validates. What is shuffled and counted are patients, if they
    are known. Raises ValueError if a split would be empty, or a patient is in two folders.
    """
    rng = data.random_for(seed, "folder", site)
    groups, part_of = {}, {}
    if patient_of is str and "val" not in parts:
        warn_of_split_patients(site, parts.get("all") or parts.get("train", []))
    for part, pairs in parts.items():
        patients = by_patient(pairs, patient_of)
        groups[part] = [*patients.values()]
        for patient in patients:
            if part_of.setdefault(patient, part) != part:
                raise ValueError(f"site '{site}': patient {patient} is in {part_of[patient]} and "
                                 f"in {part}; move the files")
    splits = [groups.get(part, []) for part in PARTS]
    if "all" in parts:
        rng.shuffle(groups["all"])
        splits = data.cut(groups["all"])
    elif "val" not in parts:
        train = splits[0]
        rng.shuffle(train)
        count = max(1, round(0.2 * len(train)))  # 15 of the 75 per cent that do not test
        splits[:2] = train[count:], train[:count]
    if not all(splits) or "all" in parts and len(parts) > 1:
        counts = ", ".join(f"{len(found)} in {part}" for part, found in groups.items())
        raise ValueError(f"site '{site}': {counts}; of images, or of patients if they are told, 3 "
                         "or more are needed in the site's own folder, or 1 or more in each of "
                         "train, val and test; 2 or more in train without val")
    return [sum(split, []) for split in splits]


def by_patient(pairs, patient_of):
    """The pairs (image, mask) of each patient."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[patient_of(pair[0])].append(pair)
    return groups


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
        warnings.warn(f"site '{site}': if {first} and {second} show one patient, who may be in two "
                      "parts now, say so by --patients or split by folders train, val and test",
                      stacklevel=2)


@dataclass
class Case:
    """An image or volume with its mask, resized, and what is to be known of its files."""
    files: tuple  # the image or volume and its mask
    site: str
    split: data.Split
    spacing: tuple  # after resizing
    channels: int  # that are needed: 1 for a grey image
    classes: list[int]  # in the mask, before resizing
    loses_a_class: bool  # by resizing
    border: ndarray  # number of border pixels of each class, (MOST_CLASSES,)


def load_case(site, pair, kind, values, size):
    """Read and check an image or volume and its mask; a grey image gets three equal channels."""
    file, mask_file = pair
    pixels, affine = read_file(file)
    mask = read_mask(mask_file, pixels.shape[:3], kind, values, affine, image=file)
    small = resize(mask, size, Image.NEAREST)
    classes = np.unique(mask).tolist()
    loses_a_class = len(np.unique(small)) < len(classes)
    border = np.bincount(border_of(mask), minlength=MOST_CLASSES)

    images = torch.from_numpy(network_input(file, pixels, size, 3, kind))
    names = [file.relative_to(site).as_posix()] * len(images)
    split = data.Split(images, torch.from_numpy(small).byte(), names)
    spacing, channels = (1.0, 1.0), pixels.shape[-1]
    if kind == "volumes":
        split.images, split.stacks = images.half(), True
        shrunk = np.divide(mask.shape, small.shape)
        spacing = tuple((voxel_size(affine) * shrunk).tolist())
        channels = 3
    return Case(pair, site.name, split, spacing, channels, classes, loses_a_class, border)


# ---------------------------------------------------------------- single files
LISTED = re.compile(  # the images of the table above, as `described` puts them
    "PNG (1|L|LA|I;16B|RGB|RGBA|P|P;[124])"
    "|BMP (1 1|L 8|P 8|P;1 1|P;4 4|BGR 24|BGRX 32|BGRA 32)-bit"
    "|(JPEG|MPO) (L|RGB)"  # MPO: a photograph with more pictures behind it
    "|TIFF of (1 x 1-bit 1, photometric [01]"  # 0: 0 is white
    "|1 x 8-bit L, photometric [01]|2 x 8-bit LA, photometric 1|1 x [1248]-bit P, photometric 3"
    "|3 x 8-bit RGB, photometric 2|4 x 8-bit RGBA, photometric 2"
    "|1 x 16-bit I;16, photometric 1)"  # big-endian ones are I;16B
    ", (raw|packbits|(tiff_lzw|tiff_deflate|tiff_adobe_deflate)(, predicted)?)")
MOST_VOXELS = 2**28  # of a volume: 1 GiB as float32
MILLIMETRES = {1: 1000.0, 3: 0.001}  # by NIfTI's codes of the metre and the micrometre


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUME_TYPES)


def stem(path: Path) -> str:
    """The name without its ending, .nii.gz being one."""
    return re.sub(r"(\.nii\.gz|\.[^.]+)$", "", path.name, flags=re.I)


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
        raise ValueError(f"{path}: not a readable file ({text}); replace or remove it") from None
    return pixels, affine


def read_image(path, as_mask):
    """The pixels of an image, (1, H, W, 1 or 3) float32, turned as its EXIF says, without alpha.

    as_mask: of a palette the indices, since masks are often stored so, unless it shows each as a
    grey of its own. Raises Unusable for what is not in the table above.
    """
    with open(path, "rb") as stream, Image.open(stream) as file:  # not by name: turned TIFFs fail
        found = described(file)
        if not LISTED.fullmatch(found) or as_mask and file.format in ("JPEG", "MPO"):
            raise Unusable(f"{found} is not read as {'a mask' if as_mask else 'an image'}; save "
                           "the original as PNG, grey of 8 or 16 bits or RGB of 8")
        if file.has_transparency_data and file.convert("RGBA").getextrema()[3][0] < 255:
            raise Unusable("it is transparent in places; save it without an alpha channel")
        image = ImageOps.exif_transpose(file).convert(mode_to_read(file, as_mask))
        pixels = np.array(image, dtype=np.float32)
    return pixels.reshape(1, image.height, image.width, -1)


def described(file):
    """The format of an open image and, of those that are read, how its pixels are stored."""
    pages = getattr(file, "n_frames", 1)
    if pages > 1 and file.format != "MPO":
        return f"{file.format} of {pages} pages"
    if file.format in ("PNG", "BMP", "JPEG", "MPO"):
        stored, bits = file.tile[0][3], ""  # of JPEG and BMP the mode and more
        if file.format == "BMP":
            file.fp.seek(28)
            bits = f" {file.fp.read(1)[0]}-bit"  # pillow may take 8 for 1
        return f"{file.format} {stored if isinstance(stored, str) else stored[0]}{bits}"
    if file.format != "TIFF":
        return file.format
    tags = file.tag_v2  # by their numbers in TIFF
    samples, bits, photometric = tags.get(277, 1), max(tags.get(258, (1,))), tags.get(262, 0)
    numbers = " signed or float" if set(tags.get(339, (1,))) != {1} else ""
    predicted = ", predicted" if tags.get(317, 1) > 1 else ""
    return (f"TIFF of {samples} x {bits}-bit {file.mode}{numbers}, photometric {photometric}, "
            f"{file.info['compression']}{predicted}")


def mode_to_read(file, as_mask):
    """Pillow's mode that keeps what an image holds: grey, coloured, or of a palette."""
    if file.mode != "P":
        return file.mode.rstrip("A")
    palette = np.reshape(file.getpalette(), (-1, 3))
    used = palette[np.unique(file)]
    grey = (palette == palette[:, :1]).all()
    if grey and len(np.unique(used, axis=0)) == len(used):
        return "L"
    return "P" if as_mask else "RGB"


def look_at(path):
    """How EXIF turns an image, 1 (not at all) to 8, and what the values of a palette look like.

    The latter are colours by the value that is read of a mask; {} where there is no palette.
    """
    if is_volume(path):
        return 1, {}
    with open(path, "rb") as stream, Image.open(stream) as file:
        turn = file.getexif().get(274)
        turn = turn if turn in range(2, 9) else 1
        if file.mode != "P":
            return turn, {}
        palette = np.reshape(file.getpalette(), (-1, 3)).tolist()
        grey = mode_to_read(file, as_mask=True) == "L"
        used = np.unique(file).tolist()
    return turn, {palette[index][0] if grey else index: tuple(palette[index]) for index in used}


def read_volume(path):
    """The voxels of a NIfTI file, (slice, row, column, 1) float32, and their affine (4, 4) in mm.

    Its header says which axes these are: feet to head, front to back, the patient's right to left.
    """
    import nibabel
    nibabel.imageglobals.logger.setLevel(100)  # silent: what matters is raised
    with nibabel.imageglobals.ErrorLevel(30):  # a header to be repaired might have other axes
        file = nibabel.load(path)
    shape, numbers = file.shape, file.get_data_dtype()
    one_volume = shape[3:] in ((), (1,))
    undirected = np.isnan(nibabel.io_orientation(file.affine)).any()
    fits = 0 < np.prod(shape, dtype=float) <= MOST_VOXELS
    if not (one_volume and fits) or undirected or numbers.kind not in "iuf":
        raise Unusable("real numbers in three dimensions, each with a direction in the affine, and "
                       f"at most {MOST_VOXELS} voxels are expected, found {numbers} in {shape}; "
                       "convert it")
    file.get_qform()  # raises what it would while a mask is written
    file = file.as_reoriented(to_our_axes(file.affine))
    voxels = np.ascontiguousarray(file.dataobj, dtype=np.float32)
    if path.suffix.lower() == ".gz":
        read_to_the_end(path)
    affine = file.affine.copy()
    affine[:3] *= MILLIMETRES.get(int(file.header["xyzt_units"]) % 8, 1.0)
    return voxels.reshape(*file.shape[:3], 1), affine


def read_to_the_end(path):
    """Raise an error if the checksum of a gzip file is not that of its content.

    It stands at the end, and nibabel stops before.
    """
    with gzip.open(path) as stream:
        while stream.read(2**24):
            pass


def to_our_axes(affine):
    """For nibabel: the change from the axes of an affine to (slice, row, column)."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
    return ornt_transform(io_orientation(affine), axcodes2ornt("SPL"))


def voxel_size(affine):
    """The length of a voxel along each axis, (3,)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def read_mask(path: Path, shape: tuple, kind: str = "images", values: list[int] | None = None,
              affine: ndarray | None = None, classes: int = MOST_CLASSES,
              image: Path | None = None) -> ndarray:
    """The classes, (n, H, W) integers, in the mask of an image or volume of this shape and affine.

    kind: of the data set. values: the grey value of each class; None: the file holds classes.
    image: the file that the mask belongs to; both must be turned alike by EXIF then.
    Of a volume the labels above 0 are class 1 in a data set of volumes, or of two classes.
    Raises ValueError where the mask does not fit its image, or holds other classes.
    """
    pixels, own_affine = read_file(path, as_mask=True)
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"mask {path}: one channel is expected; save it as a grey image")
    if image and look_at(image)[0] != look_at(path)[0]:
        raise ValueError(f"mask {path}: EXIF turns it otherwise than {image}; save both upright")
    if is_volume(path) and affine is not None:
        pixels, own_affine = in_axes_of(affine, pixels, own_affine)
    mask = pixels[..., 0]
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
    if is_volume(path):
        if kind == "volumes" or classes == 2:
            labels = labels > 0
        if labels.max() < classes:
            values = None  # they are classes, as in the masks that adapt_folder writes
    return classes_of(path, labels, kind, values, classes)


def in_axes_of(affine, voxels, own_affine):
    """Voxels (a, b, c, 1) and their affine, with the axes in the order of another affine.

    Those of `read_volume` may differ where an axis lies between two: its rounding decides.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
    turn = io_orientation(np.linalg.inv(affine) @ own_affine)
    return apply_orientation(voxels, turn), own_affine @ inv_ornt_aff(turn, voxels.shape[:3])


def classes_of(path, mask, kind, values, classes):
    """The classes for the grey values of a mask, as `read_mask` returns them."""
    greys, counts = np.unique(mask, return_counts=True)
    if values:
        distance = np.abs(greys[:, None] - values)
        nearest = distance.argmin(axis=1)  # the class of each grey value
        if kind != "fundus" and distance.min(axis=1).any():
            advice = SMOOTHED if looks_smoothed(greys) else "or list what is a further class"
            raise ValueError(f"mask {path}: its values {in_words(greys)} are not all among "
                             f"--mask-values {values}; save the masks of all sites alike; "
                             f"{advice}")
        found = nearest[np.searchsorted(greys, mask)]
        if kind == "fundus":
            common = greys[counts > 0.01 * mask.size]  # smoothed edges are few pixels of each value
            check_fundus(path, found, common, values, advice_for(mask, common))
        mask = found
    if mask.max() >= classes:
        raise ValueError(f"mask {path}: {len(greys)} values up to {greys[-1]:.0f}; expected are "
                         f"0, 1 … {classes - 1}; {advice_for(mask, greys)}")
    return mask.astype(np.int32)


def border_of(mask):
    """The values on the border of each plane of a mask (n, H, W)."""
    edges = [mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]]
    return np.concatenate([edge.ravel() for edge in edges]).astype(np.int64)


def background_first(values, outside):
    """Grey values in the order of their distance from the one outside, which comes first."""
    return sorted(values, key=lambda value: abs(value - outside))


def advice_for(mask, greys):
    """What to do about the grey values of a mask, if they are no classes."""
    if len(greys) > 2 and greys[-1] == 255 and greys[-2] < MOST_CLASSES:
        return (f"it holds {in_words(greys)}: if 255 means 'ignore', that is not supported, give "
                "these pixels a class")
    if looks_smoothed(greys):
        return SMOOTHED
    ordered = background_first(greys, mode(border_of(mask).tolist()))
    return f"or list the grey values, background first: --mask-values {in_words(ordered)}"


def looks_smoothed(greys):
    return len(greys) > 8 and np.diff(greys).min() < 8


def in_words(greys):
    return " ".join(f"{grey:.0f}" for grey in greys[:MOST_CLASSES])


def check_fundus(path, mask, greys, values, advice):
    """Raise ValueError for a mask that is not background around a rim around a cup.

    mask: its classes, (1, H, W); background alone will do, and a rim without a cup.
    greys: its common values. advice: what to do about them.
    """
    distance = np.abs(greys[:, None] - values).min(axis=1)
    far = distance > np.diff(sorted(values)).min() / 8
    inside_out = np.mean(border_of(mask) == 0) < 0.5
    without_rim = np.sum(mask == 1) < 0.05 * np.sum(mask == 2)
    if far.any() or inside_out or without_rim:
        raise ValueError(f"mask {path}: it holds {in_words(greys)}; expected are background, rim "
                         f"and cup as {values}; correct it, {advice}")


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
        raise ValueError(f"{path}: it has {pixels.shape[-1]} channels, the run was trained on "
                         f"files of kind {kind} with {channels}; convert or remove it")
    if volume:
        low, high = np.percentile(pixels, [0.5, 99.5])
        slices = np.clip(pixels[..., 0], low, high)
        slices = data.normalise(resize(slices, size))
        numbers = np.arange(len(slices))[:, None]
        if channels == 3:
            numbers = numbers + [-1, 0, 1]
        return slices[np.clip(numbers, 0, len(slices) - 1)]
    planes = resize(pixels[0, ..., :channels].transpose(2, 0, 1), size)
    planes = np.repeat(planes, channels // len(planes), axis=0)
    return data.normalise(planes)[None]


def resize(planes, size, filter=Image.BILINEAR):
    """(C, H, W) → (C, size, size) by pillow; its bilinear filter averages where it shrinks."""
    images = [Image.fromarray(plane).resize((size, size), filter) for plane in planes]
    return np.stack([np.asarray(image) for image in images])
