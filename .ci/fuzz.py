"""Damages what the programs read, at random but seeded: python .ci/fuzz.py [COUNT] [--seed S].

Each case is a training, a look, a --resume or an adaptation on a damaged folder of images, or one
with options at random. It must end within a minute with exit status 0, 1 or 2, with one line for an
error, nothing half-written, no input changed, nothing written beside --out. What was written is
computed again (`check_…`).

The files that are used are read a second time by `plain_image` and `plain_volume`, which share no
code with the programs and none with pillow. They must be in the table of examples/folders.py, and
their values must be those that the networks are given. In the cases of `store_otherwise` only an
image, its mask or two masks are stored in another way: if they are in the table and show what they
did before, they must be used.

It needs imagecodecs and tifffile, which nothing else in the project does.

Case N is the first one of seed N. The exit status is 1 if one fails. Not for Windows, which has no
alarm.
"""

import argparse
import gzip
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import iopfl  # noqa: E402
import train  # noqa: E402
from examples import adapt_folder, folders, own_images, testing  # noqa: E402
from models import UNet  # noqa: E402

try:
    import imagecodecs
    import tifffile
except ImportError as error:
    sys.exit(f"fuzz.py: {error}; pip install imagecodecs tifffile")


# The folders of a site's images and of its masks, and the options of a training, by kind.
KINDS = {
    "plain": ("images", "masks", []),
    "greys": ("images", "masks", ["--mask-values", "0", "255"]),
    "fundus": ("train/ROIs/image", "train/ROIs/mask", []),
}
if find_spec("nibabel"):
    import nibabel
    KINDS["volumes"] = ("", "", [])

SMALL = "--threads 1 --device cpu --size 16 --width 2 --depth 1 --lr 0.01".split()
ROUTING = ["--methods", "iopfl", "routing-ours"]
TOY = [*SMALL, "--rounds", "1", "--methods", "iopfl", "global"]
SIMULATED = [*TOY, "--images-per-site", "4"]
TWO_ROUNDS = [*SMALL, *ROUTING, "--rounds", "2", "--seeds", "0", "1"]

# Options that go together, for a training, a run that goes on, and an adaptation.
MORE = [
    [], ROUTING, ["--hold-out", "none", "--methods", "iopfl", "fedavg"], ["--hold-out", "all"],
    ["--precision", "bf16", *ROUTING], ["--mask-values", "0", "1"], ["--participation", "0.5"],
    ["--list"]]
PATIENTS = [  # the second makes one patient of 03 and 04; those behind the third are unsound
    r"(\d+)", "(0[012]|0)", r"0(\d?)", "(0)", r"x(\d)", "(", r"\d+", r"(\d*)$x?", "(?:0)(1)?"]
RESUMED = [
    *[[]] * 6, ["--rounds", "3"], ["--methods", "ensemble", "fedbn"], ["--seeds", "2"],
    ["--rounds", "1"], ["--size", "24"]]
ADAPTED = [[], [], [], ["--online"]]
# Options and their values, at random.
OPTIONS = """size width depth lr alpha rounds seeds participation batch-size images-per-site methods
    mask-values hold-out precision task device threads published root resume list patients
    no""".split()
WORDS = ["0", "1", "2", "-1", "0.5", "nan", "inf", "x", "all", "none", "a", "\n", "fundus", ""]
# What takes the place of names, endings and pixels.
NAMES = [
    "a b", "new\nline", "-x", "x_segmentation", "x_SEGMENTATION", ".z", "x" * 200, "\udcff", "%s",
    "A", "07", "é", "x" * 217, "é" * 109, "x" * 246]
PAIR_NAMES = ["é", "Å_ü", "한", "x" * 200, "x" * 212, "é" * 70, "x" * 230]
ADDED_NAMES = ["notes.txt", "train.txt", "Thumbs.db", "z.png", "1.bmp", "val", "masks"]
SITES = ["All", "ISBI", "x\ny", ".z", "\udcff", "test"]
INSTEAD = [  # of a file: a folder, a pipe, a link to itself, one to nothing; nothing
    Path.mkdir, os.mkfifo, lambda file: file.symlink_to(file.name),
    lambda file: file.symlink_to("/no"), str]
ADDED = [Path.mkdir, Path.touch, Path.touch, lambda link: link.symlink_to("..")]
ENDINGS = [".png", ".PNG", ".bmp", ".gif", ".tif", ".TIFF", ".jpg"]
CORNERS = {"I;16": [300, 65535], "I": [70000, -3], "F": [np.nan, np.inf, 1e38, 0.5]}
MODES = [
    *["L"] * 6, *["P"] * 4, *["1", "RGB", "RGBA", "LA"] * 2, "few greys", "few colours", "PA",
    "CMYK", "YCbCr", "LAB", "HSV", *CORNERS]
COLOURS = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]
THREE_COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
COMPRESSIONS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg",
                "group3", "group4"]
MODES_OF = {"jpeg": ["L", "RGB", "CMYK"], "group3": ["1"], "group4": ["1"]}
PACKED = [None, None, "lzw", "zlib", "deflate", "packbits", "zstd", "jpeg"]  # by tifffile
FORMATS = {  # of pillow, and how they are saved
    "PNG": [{}, {}, {"bits": 2}, {"bits": 4}],
    "TIFF": [{"compression": name} for name in COMPRESSIONS],
    "BMP": [{}],
    "JPEG": [{}, {"progressive": True}, {"keep_rgb": True}],
    "MPO": [{}],
}
NOT_READ = ["GIF", "WEBP", "JPEG2000", "PPM", "TGA", "ICO", "DIB", "PCX", "SGI"]
PAGES = ["PNG", "TIFF", "GIF", "WEBP"]  # the formats that hold several pictures
PIXEL_TYPES = ["?", *["u1"] * 6, "i1", "u2", "u2", "i2", "u4", "f4", "f8"]
VOXEL_TYPES = ["u1", "i2", "u2", "i4", "i8", "u8", "f4", "f8", "c8", "RGB"]
PNG_KINDS = {  # the bits that a sample may have
    0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 8, 16], 6: [8, 8, 16]}
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
TURNS = {  # of an image, by its orientation in EXIF
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
TURNED = [None, 1, 1, *range(2, 10)]  # orientations that are written; 9 is none
COUNTED = r"left out: (\d+) files or empty folders"
TOLD = ("left out: ", "not scored: ", "no mask has the name", "show one patient", "lose a class",
        "no site has masks", "less than a tenth of the border",
        "class 0 is to be the background")  # lines that are no errors


# ---------------------------------------------------------------- what is damaged
def make_sound(sound: Path) -> None:
    """Of each kind a folder, a run and an adapted one; a whole run and a half."""
    for site in "abc":
        testing.write_site(sound / "plain", site, 5, size=(20, 24), grey=True)
        testing.write_site(sound / "greys", site, 5, size=(20, 24), values=(0, 255))
        for number, part in enumerate(["train", "train", "train", "train", "test"]):
            write_fundus(sound / "fundus" / site / part / "ROIs", number)
    if "volumes" in KINDS:
        testing.write_volumes(sound / "volumes", dict.fromkeys("abc", 5))
    for kind, (images, _, options) in KINDS.items():
        run, adapted = sound / f"{kind}-run", sound / f"{kind}-adapted"
        run_program(own_images.main, [sound / kind, *TOY, *options, "--out", run])
        run_program(adapt_folder.main, [run, sound / kind / "c" / images, "--out", adapted])
        assert (adapted / "adapted.json").exists(), f"undamaged images of kind {kind} are refused"
    run_program(own_images.main, [sound / "plain", *TWO_ROUNDS, "--out", sound / "whole"])
    shutil.copytree(sound / "whole", sound / "half")  # as if killed after the first round
    (sound / "half/results.json").unlink()
    (sound / "half/seed0-c-plain/rows.json").unlink()
    after_a_round = sound / "plain-run/seed0-c-plain/last.pt"
    shutil.copy(after_a_round, sound / "half/seed0-c-plain/last.pt")


def write_fundus(folder: Path, number: int) -> None:
    """A photograph of 20 × 24 pixels, noise, and a mask of background, rim and cup."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:20, :24]
    distance = np.hypot(y - rng.uniform(8, 12), x - rng.uniform(8, 16))
    mask = np.where(distance < 3, 0, np.where(distance < 6, 128, 255))
    image = rng.integers(0, 256, (20, 24, 3))
    testing.save_image(folder / f"image/{number:02d}.png", image.astype(np.uint8))
    testing.save_image(folder / f"mask/{number:02d}.png", mask.astype(np.uint8))


# ---------------------------------------------------------------- the damage
def damage(file: Path, other: Path, rng: random.Random) -> None:
    """Cut or changed, another file's content, replaced by what is no file, renamed, repainted."""
    old = file.read_bytes()
    way = rng.choice(["bytes", "another's", "no file", "renamed", *["repainted"] * 4])
    if way == "repainted" and folders.is_volume(file):
        repaint_volume(file, rng)
    elif way == "repainted" and file.suffix in ENDINGS:
        repaint(file, rng, rng.choice(TURNED), rng.choice([*[None] * 8, (1, 1), (40, 17)]))
    elif way == "renamed":
        file.rename(file.with_name(rng.choice(NAMES) + file.suffix.upper()))
    elif way == "no file":
        file.unlink()
        rng.choice(INSTEAD)(file)
    elif way == "another's":
        file.write_bytes(other.read_bytes())
    else:
        changed = bytearray(old)
        end = min(len(old), rng.choice([64, len(old)]))  # often of the header
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(end)] = rng.choice([0, 255, rng.randrange(256)])
        cut = old[:rng.randrange(len(old))]
        file.write_bytes(rng.choice([changed, changed, cut, b"", rng.randbytes(99)]))


def repaint(file: Path, rng: random.Random, turn: int | None, size: tuple | None = None) -> None:
    """Stored in another way, of pillow's, tifffile's or by hand, under any ending."""
    image = Image.open(io.BytesIO(file.read_bytes()))
    image = image.convert("RGB" if image.mode == "RGB" else "L").resize(size or image.size)
    if rng.random() < 0.2:
        grey = image.convert("L")
        image = Image.merge("RGB", [grey, grey.rotate(180), grey])
    content = None
    while not content:
        write = rng.choice([by_pillow, by_pillow, by_tifffile, png_by_hand, bmp_by_hand])
        content = write(image, turn, rng)
    file.unlink()
    file.with_suffix(rng.choice([file.suffix, *ENDINGS])).write_bytes(content)


def exif_of(turn: int, rng: random.Random) -> bytes:
    """EXIF that holds an orientation alone."""
    order = rng.choice("<>")
    fields = struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 274, 3, 1, turn, 0, 0)
    return {"<": b"II", ">": b"MM"}[order] + fields


def any_palette(rng: random.Random) -> np.ndarray:
    """The colours of 256 indices, of which masks use 0 and 1, 0 and 255, or 0, 128 and 255."""
    numbers = np.arange(256)
    way = rng.choice(["ramp", "reversed", "black and white", "coloured", "coloured", "one"])
    if way == "reversed":
        numbers = numbers[::-1]
    if way == "black and white":
        numbers = 255 * (numbers % 2)
    palette = np.stack([numbers] * 3, axis=1)
    if way == "coloured":
        palette[[1, 128, 255]] = rng.sample(THREE_COLOURS, 3)
    if way == "one":
        palette[:] = 7
    return palette.astype(np.uint8)


def in_mode(image: Image.Image, mode: str, rng: random.Random) -> Image.Image:
    """An image in another mode of pillow's, which keeps the values of masks where it can."""
    grey = image.convert("L")
    if mode.startswith("few"):
        painted = grey.quantize(rng.choice([2, 3, 4]))
        if mode == "few colours":
            painted.putpalette(COLOURS)
    elif mode in ("P", "PA"):
        painted = Image.fromarray(np.asarray(grey))
        painted.putpalette(any_palette(rng).tobytes())
        painted = painted.convert(mode)
    elif mode == "1":
        least = rng.choice([1, 1, 128])
        painted = grey.point(lambda value: 255 * (value >= least)).convert(mode)
    elif mode == "LAB":
        painted = Image.merge(mode, [grey] * 3)
    else:
        painted = (grey if mode in CORNERS else image).convert(mode)
    if mode in CORNERS and rng.random() < 0.5:
        painted.putpixel((0, 0), rng.choice(CORNERS[mode]))
    if rng.random() < 0.4:  # transparent in places, or a value that may not occur
        if mode in ("LA", "PA", "RGBA"):
            alpha = Image.new("L", image.size, 255)
            alpha.putpixel((1, 0), rng.randrange(256))
            painted.putalpha(alpha)
        elif mode in ("1", "L", "P"):
            painted.info["transparency"] = rng.randrange(3)
    return painted


def by_pillow(image: Image.Image, turn: int | None, rng: random.Random) -> bytes | None:
    """A file of any mode and format of pillow's; None where these do not go together."""
    format = rng.choice([*FORMATS, *FORMATS, rng.choice(NOT_READ)])
    options = dict(rng.choice(FORMATS.get(format, [{}])))
    if turn in TURNS or turn and format != "TIFF":
        options["exif"] = b"Exif\0\0" + exif_of(turn, rng)
    modes = MODES_OF.get(options.get("compression"), MODES)
    painted = in_mode(image, rng.choice(modes), rng)
    if format == "MPO" or format in PAGES and rng.random() < 0.1:
        options |= {"save_all": True, "append_images": [painted.transpose(Image.ROTATE_180)]}
    stream = io.BytesIO()
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        painted.save(stream, format, **options)
        return stream.getvalue()


def by_tifffile(image: Image.Image, turn: int | None, rng: random.Random) -> bytes | None:
    """A TIFF of any type, byte order and layout; None where these do not go together."""
    count = rng.choice([*[1] * 6, 2, 3, 3, 4])
    pixels = np.asarray(image.convert("RGB"))[..., [0, 1, 2, 2][:count]]
    if count in (2, 4):
        pixels[..., -1] = 255
        pixels[0, 0, -1] = rng.choice([255, 3])
    pixels = pixels.astype(rng.choice(PIXEL_TYPES))
    options = {
        "compression": rng.choice(PACKED),
        "predictor": rng.random() < 0.3,
        "tile": rng.choice([None, None, None, (16, 16)]),
        "rowsperstrip": rng.choice([None, 3]),
        "photometric": "rgb" if count > 2 else "minisblack",
    }
    if count in (2, 4):
        options["extrasamples"] = [rng.choice(["unassalpha", "assocalpha", "unspecified"])]
    if count == 1:
        pixels = pixels[..., 0]
        options["photometric"] = rng.choice(["minisblack", "minisblack", "miniswhite", "palette"])
        if pixels.dtype == "u1" and pixels.max() < 4 and rng.random() < 0.2:
            options["bitspersample"] = rng.choice([1, 2, 4])
    if options["photometric"] == "palette":
        options["colormap"] = 257 * any_palette(rng).T.astype("u2")
    if options["photometric"] == "miniswhite" and pixels.dtype in ("?", "u1"):
        pixels = ~pixels
    if count > 1:
        options["planarconfig"] = rng.choice(["contig", "contig", "separate"])
        if options["planarconfig"] == "separate":
            pixels = np.moveaxis(pixels, 2, 0)
    if turn in TURNS:  # of other numbers libtiff tells on stderr
        options["extratags"] = [(274, "H", 1, turn, True)]
    stream = io.BytesIO()
    big = rng.random() < 0.1
    with suppress(ValueError, LookupError, TypeError, RuntimeError):
        with tifffile.TiffWriter(stream, byteorder=rng.choice("<>"), bigtiff=big) as tiff:
            for _ in range(rng.choice([*[1] * 9, 2])):
                tiff.write(pixels, metadata=None, **options)
        return stream.getvalue()


def png_by_hand(image: Image.Image, turn: int | None, rng: random.Random) -> bytes:
    """A PNG of any kind of pixels, many of which pillow does not write."""
    kind = rng.choice([0, *PNG_KINDS])
    depth = rng.choice(PNG_KINDS[kind])
    pixels = np.asarray(image.convert("RGB")).astype(int)
    pixels = pixels[..., [0, 1, 2, 2][:PNG_SAMPLES[kind]]] % 2**depth
    if kind in (4, 6):
        pixels[..., -1] = 2**depth - 1
        pixels[0, 0, -1] = rng.choice([2**depth - 1, 3])
    head = struct.pack(">IIBBBBB", *image.size, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", head)]
    if kind == 3:
        chunks.append((b"PLTE", any_palette(rng)[:2**depth].tobytes()))
    if kind in (0, 2) and rng.random() < 0.3:  # the value that is transparent
        value = rng.choice([0, 1, 3, 2**depth - 1])
        chunks.append((b"tRNS", struct.pack(">H", value) * PNG_SAMPLES[kind]))
    if kind == 3 and rng.random() < 0.3:  # the alpha of the first indices
        count = rng.choice([1, 2])
        alpha = rng.choices([0, 100, 255, 255, 255], k=count)
        chunks.append((b"tRNS", bytes(alpha)))
    rows = packed(pixels.reshape(len(pixels), -1), depth)
    rows = np.pad(rows, [(0, 0), (1, 0)])  # each row with filter 0, which is none
    chunks.append((b"IDAT", zlib.compress(rows.tobytes())))
    if turn is not None:
        chunks.insert(rng.choice([1, len(chunks)]), (b"eXIf", exif_of(turn, rng)))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    return content


def packed(numbers: np.ndarray, depth: int) -> np.ndarray:
    """Numbers (H, n) of `depth` bits, the first one in the highest bits, as rows of bytes."""
    places = np.arange(depth)[::-1]
    bits = numbers[..., None] >> places & 1
    bits = bits.reshape(len(numbers), -1)
    return np.packbits(bits.astype(np.uint8), axis=1)


def bmp_by_hand(image: Image.Image, turn: int | None, rng: random.Random) -> bytes:
    """A BMP with any number of bits and colours, upwards or downwards; it holds no orientation."""
    bits = rng.choice([1, 4, 8, 8, 16, 24, 32])
    listed = rng.choice([0, 2, 2**bits]) if bits <= 8 else 0  # the colours, 0 meaning all
    colours = any_palette(rng)[:listed or 2**bits] if bits <= 8 else np.zeros((0, 3), np.uint8)
    if bits > 8:
        pixels = np.asarray(image.convert("RGB"))[..., [2, 1, 0, 0]]
        rows = pixels[..., :bits // 8].reshape(image.height, -1)
    else:
        pixels = np.asarray(image.convert("L")).astype(int) % len(colours)
        rows = packed(pixels, bits)
    filled = -rows.shape[1] % 4
    rows = np.pad(rows, [(0, 0), (0, filled)])
    downwards = rng.random() < 0.3
    height = -image.height if downwards else image.height
    table = np.pad(colours[:, ::-1], [(0, 0), (0, 1)]).tobytes()
    start = 54 + len(table)
    head = struct.pack("<2sIII", b"BM", start + rows.size, 0, start)
    head += struct.pack("<IiiHHIIiiII", 40, image.width, height, 1, bits, 0, 0, 0, 0, listed, 0)
    return head + table + (rows if downwards else rows[::-1]).tobytes()


def repaint_volume(file: Path, rng: random.Random, partner: Path | None = None) -> None:
    """Another type, version or number of frames; or another affine, then of its partner too."""
    kind = rng.choice([nibabel.Nifti1Image, nibabel.Nifti1Image, nibabel.Nifti2Image])
    turn = rotation(rng)
    for path in filter(None, [file, partner]):
        try:
            volume = nibabel.load(path)
            voxels = np.asarray(volume.dataobj)
        except Exception as error:  # of any kind
            raise ValueError("a volume that was damaged before") from error
        number = rng.choice(VOXEL_TYPES)
        if number == "RGB":
            voxels = np.repeat(voxels[..., None].astype("u1"), 3, axis=-1)
            voxels = voxels.view([(colour, "u1") for colour in "RGB"])[..., 0]
        else:
            voxels = voxels.astype(number)
        frames = rng.choice([*[0] * 8, 1, 1, 2])
        if frames:
            voxels = np.stack([voxels] * frames, axis=-1)
        changed = kind(voxels, turn @ volume.affine, dtype=voxels.dtype)
        changed.header.set_xyzt_units(rng.choice(["mm"] * 9 + ["micron"]))
        codes = rng.choice([(1, 1), (1, 0), (0, 1), (1, 2)])
        changed.set_sform(changed.affine, codes[0])
        changed.set_qform(turn @ volume.affine, codes[1])
        if codes == (1, 2):  # another affine, which does not count beside the first
            changed.set_qform(np.diag([2, 3, 4, 1]), 2)
        content = changed.to_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.compress(content, mtime=0)
        path.write_bytes(content)


def rotation(rng: random.Random) -> np.ndarray:
    """None mostly; or about one axis, close to where two directions are equally near."""
    turn = np.eye(4)
    if rng.random() < 0.4:
        angle = np.radians(rng.choice([45, 135, 30]) + rng.choice([0, 1e-6, -1e-6]))
        one, other = rng.sample(range(3), 2)
        turn[[one, other], [one, other]] = np.cos(angle)
        turn[one, other] = -np.sin(angle)
        turn[other, one] = np.sin(angle)
    return turn


def frame(folder: Path, rng: random.Random) -> None:
    """The masks get a border of one of their classes, as those have that are inside out."""
    share = rng.choice([0.8, 0.95, 1])
    for file in sorted(folder.rglob("mask*/*.png")):
        pixels = np.array(Image.open(file))
        for edge in (*pixels[::len(pixels) - 1], *pixels.T[::len(pixels.T) - 1]):
            edge[:round(share * len(edge))] = pixels.max()
        testing.save_image(file, pixels)
    for file in sorted(folder.rglob("*_[sS]egmentation.nii.gz")):
        volume = nibabel.load(file)
        labels = np.asarray(volume.dataobj).copy()
        labels[[0, -1]] = 1
        labels[:, [0, -1]] = 1
        nibabel.save(nibabel.Nifti1Image(labels, volume.affine), file)


def rename_pair(image: Path, mask: Path, rng: random.Random) -> tuple[Path, Path]:
    """An image and its mask are called alike, maybe composed in another way, maybe at length."""
    name = rng.choice(PAIR_NAMES)
    renamed = []
    for file in (image, mask):
        ending = file.name.removeprefix(folders.stem(image))  # that of a mask may be longer
        composed = unicodedata.normalize(rng.choice(["NFC", "NFD"]), name)
        renamed.append(file.rename(file.with_name(composed + ending)))
    return tuple(renamed)


def lay_out(site: Path, rng: random.Random) -> None:
    """Parts, in which files may have the same names; other names, something more or less."""
    way = rng.choice(["parts", "renamed", "more", "less", "framed"])
    folder = rng.choice([site, *sorted(site.rglob("*[a-zI]"))])
    if way == "parts":
        different = rng.choice([2, 5])  # names
        for number, part in enumerate(["train", "train", "Valid", "Valid", "TEST"]):
            for name in ("images", "masks"):
                place = site / part / name
                place.mkdir(parents=True, exist_ok=True)
                moved = place / f"{number % different}.png"
                (site / name / f"{number:02d}.png").rename(moved)
    elif way == "renamed":
        folder.rename(folder.with_name(rng.choice([*SITES, *[folder.name.upper()] * 5])))
    elif way == "framed":
        frame(site, rng)
    elif way == "more":
        rng.choice(ADDED)(folder / rng.choice(ADDED_NAMES))
    else:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- a case
@dataclass
class Case:
    """A command line, its material and where it writes."""
    kind: str
    sound: Path  # what is never damaged
    place: Path  # where the images are, in root, and the program runs, in work
    out: Path
    program: Callable = own_images.main
    argv: list = field(default_factory=list)
    mask_values: list[int] | None = None  # of an adaptation
    stored: bool = False  # whether nothing but the storage of one image or mask is changed
    in_one_go: bool = False  # whether a run that goes on must equal the whole one
    other_version: bool = False

    @property
    def images(self) -> Path:
        return self.place / "root/c" / KINDS[self.kind][0]

    @property
    def masks(self) -> Path:
        return self.place / "root/c" / KINDS[self.kind][1]


def make_case(rng: random.Random, sound: Path, place: Path) -> Case:
    work, root = place / "work", place / "root"
    (work / "full/folder").mkdir(parents=True)
    (work / "file").touch()
    outs = [work / "full", work / "file", work / "file/out", root / "c/out"]
    make = rng.choice([
        *[train_on] * 3, *[adapt_to] * 3, *[store_otherwise] * 5, go_on, choose_options])
    kind = "plain" if make is go_on else rng.choice([*KINDS])
    case = Case(kind, sound, place, rng.choice([*outs, *[work / "out"] * 24]))
    shutil.copytree(sound / kind, root)
    make(case, rng)
    with suppress(OSError, ValueError, LookupError):  # no more damage is possible
        if make in (train_on, adapt_to) and rng.random() < 0.1:
            rename_pair(*rng.choice(pairs_of(case)), rng)
        for _ in range(0 if case.stored else rng.choice([0, 0, 1, 3])):
            files = sorted(file for file in (root / "c").rglob("*") if file.is_file())
            damage(rng.choice(files), rng.choice(files), rng)
    case.argv = [str(word) for word in case.argv]
    return case


def train_on(case: Case, rng: random.Random) -> None:
    root = case.place / "root"
    for site in rng.choice(["", "", "a", "abc"]):
        with suppress(OSError):
            lay_out(root / site, rng)
    more = rng.choice([*MORE, *[["--patients", rng.choice(PATIENTS)]] * 2])
    options = [*TOY, *KINDS[case.kind][-1], *more]
    case.argv = [root, *options, "--out", case.out]


def adapt_to(case: Case, rng: random.Random) -> None:
    """The images of c, by a run, by one of its federations, or by what was adapted before."""
    run = case.place / "run"
    run_of = rng.choice([case.kind, case.kind, case.kind, *KINDS])
    shutil.copytree(case.sound / f"{run_of}-{rng.choice(['run', 'adapted'])}", run)
    case.program = adapt_folder.main
    case.argv = [rng.choice([run, run, *run.glob("seed*-plain")]), case.images, "--out", case.out]
    case.argv += rng.choice(ADAPTED)
    if rng.random() < 0.5:
        case.argv += ["--masks", case.masks]
        case.mask_values = rng.choice([None, None, [0, 255], [0, 1], [1], [255, 128, 0]])
    if case.mask_values:
        case.argv += ["--mask-values", *case.mask_values]
    if rng.random() < 0.1:
        frame(case.place / "root/c", rng)
    change_version(case, run, rng)


def store_otherwise(case: Case, rng: random.Random) -> None:
    """A sound training or adaptation, but for how an image, its mask, or two masks are stored."""
    case.stored = True
    case.out = case.place / "work/out"
    if rng.random() < 0.6:
        case.argv = [case.place / "root", *TOY, *KINDS[case.kind][-1], "--out", case.out]
    else:
        case.program = adapt_folder.main
        run = shutil.copytree(case.sound / f"{case.kind}-run", case.place / "run")
        case.argv = [run, case.images, "--masks", case.masks, "--out", case.out]
    (image, mask), (_, other) = rng.sample(pairs_of(case), 2)
    if rng.random() < 0.2:
        image, mask = rename_pair(image, mask, rng)
    changed = rng.choice([[image], [mask], *[[image, mask]] * 2, [mask, other]])
    if case.kind == "volumes":
        partners = {image: mask, mask: image}
        repaint_volume(changed[0], rng, rng.choice([None, partners[changed[0]]]))
    else:
        turn = rng.choice([None, 1, 3, rng.choice(TURNED)])
        for file in changed:
            repaint(file, rng, turn)


def pairs_of(case: Case) -> list[tuple[Path, Path]]:
    """The images or volumes of c with their masks, as far as they have one."""
    pairs = []
    for image in sorted(images_in(case.images)):
        masks = masks_of(image, case.masks)
        if masks and not is_mask(image):
            pairs.append((image, masks[0]))
    return pairs


def go_on(case: Case, rng: random.Random) -> None:
    """A run that was interrupted, with its images where they were, moved, or with others."""
    case.out = shutil.copytree(case.sound / "half", case.place / "work/out")
    options = rng.choice(RESUMED)
    case.in_one_go = not options
    moved = case.place / "root"
    where = rng.choice([[], [moved], [moved], [moved], [case.sound / "greys"]])
    case.argv = [*where, "--resume", case.out, *options]
    if rng.random() < 0.3:  # another image in the moved folder, which must be refused
        first, second, *_ = sorted(case.images.iterdir())
        first.write_bytes(second.read_bytes())
    change_version(case, case.out, rng)


def change_version(case: Case, run: Path, rng: random.Random) -> None:
    """Sometimes the run, or what was adapted, is of another version."""
    if rng.random() < 0.1:
        case.other_version = True
        for file in run.glob("*.json"):
            other = file.read_text().replace(f'"version": {train.VERSION}', '"version": 1')
            file.write_text(other)


def choose_options(case: Case, rng: random.Random) -> None:
    own = [case.place / "root", *TOY]
    case.program, argv = rng.choice([(own_images.main, own), (train.main, SIMULATED)])
    case.argv = [*argv, "--out", case.out]
    for _ in range(rng.choice([1, 1, 2])):
        case.argv += [f"--{rng.choice(OPTIONS)}", *rng.choice([[], [rng.choice(WORDS)]])]


def run_program(program, argv: list) -> tuple[int, str]:
    """Exit status and stderr of a main; whatever else it raises is raised, after a minute too."""
    errors = io.StringIO()
    status = 0
    signal.alarm(60)
    try:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO())), redirect_stderr(errors):
            program([str(word) for word in argv])
    except SystemExit as end:
        status = end.code or 0
    finally:
        signal.alarm(0)
    return status, errors.getvalue()


def run_case(rng: random.Random, sound: Path, place: Path) -> int:
    """The exit status of a case; raises AssertionError where it does not end as it should."""
    shutil.rmtree(place, ignore_errors=True)
    torch.set_num_threads(1)  # whatever the case before has set
    case = make_case(rng, sound, place)
    os.chdir(place / "work")
    status, errors = -1, ""
    try:
        before = contents(sound, place)
        status, errors = run_program(case.program, case.argv)
        check_ending(case, before, contents(sound, place), status, errors)
        return status
    except BaseException as error:
        where = "".join(traceback.format_exception(error)[-3:])
        command = f"{case.program.__module__} {case.argv}"
        raise AssertionError(f"{command}: {status}, {errors!r}\n{where}") from error


def contents(*places: Path) -> dict:
    """The bytes of each file below some folders; None for what is no file."""
    inside = {}
    for place in places:
        for path in place.rglob("*"):
            inside[path] = path.read_bytes() if path.is_file() else None
    return inside


def check_ending(case: Case, before: dict, after: dict, status: int, errors: str) -> None:
    reports = [case.out / name for name in ("results.json", "adapted.json")]
    new = any(after.get(report) != before.get(report) for report in reports)
    told = [line for line in errors.splitlines() if any(words in line for words in TOLD)]
    lines = len(errors.splitlines()) - len(told)
    assert status in (0, 1, 2), "exit status"
    assert status == 0 or lines == (not new), "lines on stderr"
    assert status != 0 or lines == 0, "an error, but exit status 0"
    assert status != 0 or not case.other_version, "files of another version are used"
    for path in before:
        if status == 2 or case.out not in path.parents:
            assert after.get(path, 0) == before[path], f"changed: {path}"
    for path in after.keys() - before.keys():
        assert status != 2, f"written in spite of wrong use: {path}"
        assert case.out in (path, *path.parents), f"written beside --out: {path}"
        assert path.suffix != ".partial", f"half-written: {path}"
    if case.stored and shows_the_same(case):
        unused = [line for line in told if "not scored" in line]
        assert status == 0 and not unused, "what is in the table and fits is not used"
    if new:
        check = check_adapting if case.program == adapt_folder.main else check_training
        with redirect_stderr(io.StringIO()):
            check(case, told)


# ---------------------------------------------------------------- what training has written
def check_training(case: Case, told: list[str]) -> None:
    """Files are used or counted; each hospital has a model, which gives the Dice reported."""
    results = json.loads((case.out / "results.json").read_text())
    settings = argparse.Namespace(**results["config"]["settings"])
    for row in results["rows"]:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all() and 0 <= row["dice"] <= 1, row
    federations = sorted(case.out.glob("seed*-plain"))
    assert federations, "no federation"
    for federation in federations:
        own = json.loads((federation / "rows.json").read_text())
        dataset = own_images.images_of_run(settings, own["seed"])
        if case.program == own_images.main and "--resume" not in case.argv:
            check_files(Path(settings.root), dataset, told)
            check_patients(settings.patients, dataset)
        saved = torch.load(federation / "last.pt", weights_only=True)
        inside = [site for site in dataset.sites if site.name != own["hold_out"]]
        assert own["rounds"] == saved["last"]["number"] == settings.rounds
        assert settings.participation < 1 or len(saved["personal"]) == len(inside)
        if "iopfl" in own["methods"]:
            for site in inside:
                state = saved["personal"].get(site.name, saved["last"]["global_state"])
                check_rows(settings, dataset, site, state, own["rows"])
        assert all(row in results["rows"] for row in own["rows"]), "results.json lacks rows"
    if case.in_one_go:
        assert testing.same_run(case.out, case.sound / "whole"), "not as in one go"


def check_rows(settings, dataset, site, state: dict, rows: list[dict]) -> None:
    """A personalised model gives the Dice that is reported."""
    model = UNet(dataset.channels, dataset.classes, settings.width, settings.depth)
    model.to(memory_format=torch.channels_last).load_state_dict(state)
    split = site.test.to("cpu")
    with torch.autocast("cpu", torch.bfloat16, settings.precision == "bf16"):
        prediction = iopfl.predict(model, split.images)
    scores = iopfl.evaluate(
        prediction, split.masks, split.cases, dataset.structures, site.spacing, distances=False)
    labels = {"phase": "inside", "method": "iopfl", "site": site.name}
    reported = [row["dice"] for row in rows if labels.items() <= row.items()]
    assert reported == [row["dice"] for row in scores], (labels, reported, scores)


# ---------------------------------------------------------------- files, read in a plain way
def check_files(root: Path, dataset: folders.FolderDataSet, told: list[str]) -> None:
    """Each file of a folder is used or counted, and the masks are those that the files show."""
    used = 2 * sum(len({*site.everything.cases}) for site in dataset.sites)
    left_out = sum(int(number) for number in re.findall(COUNTED, "\n".join(told)))
    count = len(visible_files(root))
    assert count == used + left_out, f"{count} files, {used} used, {told}"
    colours, channels = {}, set()
    for site in dataset.sites:
        split = site.everything
        read, on_border = {}, []
        for case, *given in zip(split.cases, split.images, split.masks):
            read.setdefault(case, []).append(given)
        for case, given in read.items():
            image = root / site.name / case
            place = image.parent
            if not folders.is_volume(image):
                place, = (other for other in place.parent.iterdir() if other.name[0] in "mM")
            file, = masks_of(image, place)
            check_names(image, file)
            seen, tolerance = plain_input(image, dataset.channels, split.masks.shape[-1])
            planes = plain_mask(file, image, dataset.kind, dataset.mask_values)
            for expected, plane, (pixels, mask) in zip(seen, planes, given, strict=True):
                difference = np.abs(expected - pixels.numpy()).max()
                assert difference <= tolerance, f"misread by {difference}: {image}"
                resized = Image.fromarray(plane).resize(mask.shape[::-1], Image.NEAREST)
                assert np.array_equal(np.asarray(resized), mask.numpy()), f"misread: {file}"
            channels.add(channels_of(image))
            on_border += outside(planes)
            check_colours(file, colours)
        if dataset.mask_values or dataset.kind == "volumes":
            assert np.mean(on_border) >= 0.1, f"inside out: {site.name}"
    assert dataset.channels == max(channels), f"{dataset.channels} channels, but {channels}"


def check_names(image: Path, mask: Path) -> None:
    """Neither has a name that is refused, and both are turned alike."""
    for file in (image, mask):
        assert len(os.fsencode(file.name)) <= 220, f"too long a name: {file}"
    assert not is_mask(image), f"a mask used as an image: {image}"
    if not folders.is_volume(image):
        assert plain_image(image).turn == plain_image(mask).turn, f"turned otherwise: {mask}"


def check_patients(pattern: str | None, dataset: folders.FolderDataSet) -> None:
    """All images of a patient are in one part of a site."""
    for site in dataset.sites if pattern else []:
        part_of = {}
        for part in (site.train, site.validation, site.test):
            for case in part.cases:
                patient = re.search(pattern, folders.stem(Path(case)))[1]
                assert patient, f"no patient: {case}"
                assert part_of.setdefault(patient, part) is part, f"in two parts: {patient}"


def visible_files(folder: Path) -> list[Path]:
    """The files, links and empty folders that are not hidden."""
    files = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        inside = path.iterdir() if path.is_dir() else []
        if not hidden and all(other.name.startswith(".") for other in inside):
            files.append(path)
    return files


def images_in(folder: Path) -> list[Path]:
    """What has the ending of an image or a volume."""
    endings = folders.IMAGE_TYPES + folders.VOLUME_TYPES
    inside = [path for path in visible_files(folder) if path.parent == folder]
    return [path for path in inside if path.name.lower().endswith(endings)]


def is_mask(file: Path) -> bool:
    return folders.stem(file).lower().endswith("_segmentation")


def masks_of(image: Path, place: Path) -> list[Path]:
    """The files in a folder whose name says that they are an image's mask."""
    found = []
    for file in images_in(place):
        name = re.sub("_segmentation$", "", folders.stem(file), flags=re.I)
        same = unicodedata.normalize("NFC", name) == composed_stem(image)
        if same and (is_mask(file) or place != image.parent):
            found.append(file)
    return found


def composed_stem(file: Path) -> str:
    return unicodedata.normalize("NFC", folders.stem(file))


def shows_the_same(case: Case) -> bool:
    """Whether each image and mask of c is in the table and shows what it did before."""
    adapted = case.program == adapt_folder.main
    one_channel = adapted and case.kind in ("plain", "greys")
    kind = case.kind if case.kind in ("fundus", "volumes") else "images"
    values = {"greys": [0, 255], "fundus": folders.FUNDUS_VALUES}.get(case.kind)
    sound = case.sound / case.kind / "c" / KINDS[case.kind][1]
    before = [plain_mask(*files, kind, values) for files in sound_pairs(case, sound)]
    pairs, colours = pairs_of(case), {}
    unchanged = 0
    try:
        for image, mask in pairs:
            check_names(image, mask)
            check_colours(mask, colours)
            if one_channel and has_colours(image):
                return False
            plain = [plain_image(file) for file in (image, mask) if not folders.is_volume(file)]
            if not all(read.sure for read in plain):
                return False
            turn = plain[0].turn if plain else 1
            classes = plain_mask(mask, image, kind, values)
            if classes.shape != plain_shape(image):
                return False
            as_before = [turned(planes, turn) for planes in before]
            unchanged += any(np.array_equal(classes, planes) for planes in as_before)
    except (NotListed, AssertionError):
        return False
    return unchanged == len(pairs) == len(before)


def sound_pairs(case: Case, sound: Path) -> list[tuple[Path, Path]]:
    """The masks of c with their images, as they were before the damage."""
    images = case.sound / case.kind / "c" / KINDS[case.kind][0]
    pairs = [(masks_of(image, sound), image) for image in sorted(images_in(images))]
    return [(masks[0], image) for masks, image in pairs if masks]


# ---------------------------------------------------------------- files, read without pillow
class NotListed(ValueError):
    """A file is not in the table of examples/folders.py; the text says what it is."""


def listed(fact: bool, found: str) -> None:
    if not fact:
        raise NotListed(found)


@dataclass
class Plain:
    """An image file as it is stored, without alpha."""
    pixels: np.ndarray  # (H, W, C): grey, RGB, or the indices of a palette
    palette: np.ndarray | None = None  # (n, 3)
    turn: int = 1  # by EXIF, 1 to 8
    photo: bool = False  # a JPEG: decoders may differ in a few grey levels, masks are refused
    sure: bool = True  # False: pillow cannot read it, which the table need not tell


def plain_image(file: Path) -> Plain:
    """Raises NotListed for what is not in the table."""
    content = file.read_bytes()
    for start, read in READERS.items():
        if content.startswith(start):
            return read(content)
    raise NotListed("neither PNG, BMP, JPEG nor TIFF")


def plain_png(content: bytes) -> Plain:
    chunks = {}
    start = 8
    while start + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        body = content[start + 8:start + 8 + length]
        before = chunks.get(name, b"") if name == b"IDAT" else b""
        chunks[name] = before + body
        start += 12 + length
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    listed(b"acTL" not in chunks, "PNG of several pictures")
    read = depth == 8 or kind == 3 or kind == 0 and depth in (1, 16)
    listed(read, f"PNG of kind {kind} and {depth} bits")
    assert not interlaced, "an interlaced PNG, which nothing here writes"
    count = PNG_SAMPLES[kind]
    data = zlib.decompressobj().decompress(chunks[b"IDAT"])
    length = (width * count * depth + 7) // 8
    rows = unfiltered(data, height, length, max(1, count * depth // 8))
    pixels = unpacked(rows, depth)[:, :width * count].reshape(height, width, count)
    clear = chunks.get(b"tRNS", b"")
    transparent = False
    if kind in (4, 6):
        transparent = (pixels[..., -1] < 255).any()
        pixels = pixels[..., :-1]
    elif kind == 3:
        alpha = np.full(256, 255)
        alpha[:len(clear)] = list(clear)
        transparent = (alpha[pixels] < 255).any()
    elif clear:
        value = np.frombuffer(clear[:2 * count], ">u2").astype(int) % 2**depth
        transparent = (pixels == value).all(axis=-1).any()
    listed(not transparent, "PNG that is transparent in places")
    palette = None
    if kind == 3:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    return Plain(pixels, palette, turn_in(chunks.get(b"eXIf", b"")))


def unfiltered(data: bytes, height: int, length: int, step: int) -> np.ndarray:
    """The rows of a PNG, (height, length) bytes; `step` bytes lie between neighbours."""
    rows = np.frombuffer(data, np.uint8, height * (length + 1)).reshape(height, -1)
    above = [0] * (length + step)  # behind zeros, which are left of the first pixel
    result = []
    for way, *row in rows.tolist():
        new = [0] * step
        for place, value in enumerate(row):
            a, b, c = new[place], above[place + step], above[place]
            predicted = [0, a, b, (a + b) // 2, nearest_of(a, b, c)][way]
            new.append((value + predicted) % 256)
        result.append(new[step:])
        above = new
    return np.array(result, np.uint8)


def nearest_of(a: int, b: int, c: int) -> int:
    """Paeth's predictor: the one of left, above and left above that is closest to a + b - c."""
    return min([a, b, c], key=lambda value: abs(a + b - c - value))


def unpacked(rows: np.ndarray, depth: int) -> np.ndarray:
    """The numbers of 1 to 16 bits in rows of bytes."""
    if depth == 16:
        return rows.view(">u2").astype(int)
    bits = np.unpackbits(rows, axis=1).reshape(len(rows), -1, depth)
    return bits @ (1 << np.arange(depth)[::-1])


def plain_bmp(content: bytes) -> Plain:
    start, size = struct.unpack_from("<II", content, 10)
    listed(size >= 40, "BMP of OS/2")
    width, height, _, bits, packing = struct.unpack_from("<iiHHI", content, 18)
    count, = struct.unpack_from("<I", content, 46)
    listed(packing == 0 and bits in (1, 4, 8, 24, 32), f"BMP of {bits} bits, packed by {packing}")
    length = (width * bits + 31) // 32 * 4
    rows = np.frombuffer(content, np.uint8, abs(height) * length, start).reshape(-1, length)
    rows = rows[::-1] if height > 0 else rows
    if bits > 8:
        step = bits // 8  # the fourth byte is of no use
        pixels = rows[:, :width * step].reshape(len(rows), width, step)
        return Plain(pixels[..., 2::-1])
    palette = np.frombuffer(content, np.uint8, 4 * (count or 2**bits), 14 + size)
    palette = palette.reshape(-1, 4)[:, 2::-1]
    pixels = unpacked(rows, bits)[:, :width, None]
    if bits == 1 and palette.tolist() == [[0, 0, 0], [255, 255, 255]]:
        return Plain(pixels)  # grey of one bit
    numbers = [0, 255] if len(palette) == 2 else range(len(palette))
    taken_for_grey = (palette.T == numbers).all()
    return Plain(pixels, palette, sure=bits == 8 and len(palette) > 2 or not taken_for_grey)


def plain_jpeg(content: bytes) -> Plain:
    turn, samples = 1, 0
    start = 2
    while samples == 0:
        _, mark, length = struct.unpack_from(">BBH", content, start)
        body = content[start + 4:start + 2 + length]
        if mark == 0xE1 and body.startswith(b"Exif\0\0"):
            turn = turn_in(body[6:])
        if 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC):
            samples = body[5]
        start += 2 + length
    listed(samples in (1, 3), f"JPEG of {samples} channels")
    pixels = imagecodecs.jpeg_decode(content)
    return Plain(pixels.reshape(*pixels.shape[:2], -1), turn=turn, photo=True)


def plain_tiff(content: bytes) -> Plain:
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        page = tiff.pages[0]
        kind, bits = int(page.photometric), page.bitspersample
        count, alpha = page.samplesperpixel, [int(extra) for extra in page.extrasamples]
        predicted, way = page.predictor > 1, int(page.compression)
        turn = page.tags[274].value if 274 in page.tags else 1
        found = f"TIFF {kind} {count}x{bits} {alpha} {way} {page.predictor} {page.sampleformat}"
        listed(len(tiff.pages) == 1, "TIFF of several pages")
        listed(page.sampleformat == 1, found)
        listed(way in (5, 8, 32946) or way in (1, 32773) and not predicted, found)
        greys = count == 1 and (kind < 2 and bits in (1, 8) or kind == 1 and bits == 16)
        with_alpha = bits == 8 and (kind, count, alpha) in [
            (1, 2, [2]), (2, 4, [1]), (2, 4, [2])]
        sure = not (alpha and page.planarconfig == 2 or tiff.is_bigtiff and tiff.byteorder == ">")
        in_colours = kind == 2 and count == 3 and bits == 8
        indices = kind == 3 and count == 1 and bits in (1, 2, 4, 8)
        listed(greys or with_alpha or in_colours or indices, found)
        listed(bits < 16 or tiff.byteorder == "<", "TIFF of 16 bits, big-endian")
        pixels = page.asarray()
        colours = page.colormap
    if count > 1 and page.planarconfig == 2:
        pixels = np.moveaxis(pixels, 0, 2)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, count).astype(int)
    if kind == 0:
        pixels = 2**bits - 1 - pixels
    if alpha:
        listed((pixels[..., -1] == 255).all(), "TIFF that is transparent in places")
        pixels = pixels[..., :-1]
    palette = colours.T >> 8 if indices else None
    return Plain(pixels, palette, turn if turn in TURNS else 1, sure=sure)


READERS = {  # by the first bytes of a file
    b"\x89PNG\r\n\x1a\n": plain_png,
    b"BM": plain_bmp,
    b"\xff\xd8\xff": plain_jpeg,
    b"II": plain_tiff,
    b"MM": plain_tiff,
}


def turn_in(exif: bytes) -> int:
    """The orientation in EXIF, 1 to 8; 1 where there is none, or another number."""
    turn = 1
    if exif[:2] in (b"II", b"MM"):
        order = "<" if exif[:2] == b"II" else ">"
        start, = struct.unpack_from(f"{order}I", exif, 4)
        count, = struct.unpack_from(f"{order}H", exif, start)
        for number in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * number)
            turn = value if tag == 274 else turn
    return turn if turn in TURNS else 1


def turned(planes: np.ndarray, turn: int) -> np.ndarray:
    """Planes (n, H, W) as they are shown."""
    return np.stack([TURNS.get(turn, np.asarray)(plane) for plane in planes])


# ---------------------------------------------------------------- what is read of them
def channels_of(file: Path) -> int:
    """Of a training: 1 for a grey image, else 3."""
    if folders.is_volume(file):
        return 3
    plain = plain_image(file)
    if plain.palette is None:
        return plain.pixels.shape[2]
    return 1 if is_grey(plain) else 3


def has_colours(file: Path) -> bool:
    """Whether the channels of an image differ somewhere."""
    if folders.is_volume(file):
        return False
    shown = colours_of(plain_image(file))
    return bool((shown != shown[..., :1]).any())


def colours_of(plain: Plain) -> np.ndarray:
    """The grey or RGB pixels of an image, not yet turned."""
    return plain.pixels if plain.palette is None else plain.palette[plain.pixels[..., 0]]


def is_grey(plain: Plain) -> bool:
    """Whether a palette has greys alone, and those that are used differ."""
    used = plain.palette[np.unique(plain.pixels)]
    equal = (plain.palette == plain.palette[:, :1]).all()
    return bool(equal) and len(np.unique(used[:, 0])) == len(used)


def plain_shape(file: Path) -> tuple:
    """(n, H, W) of an image or volume as it is shown."""
    if folders.is_volume(file):
        return plain_slices(file).shape
    plain = plain_image(file)
    return turned(plain.pixels.transpose(2, 0, 1)[:1], plain.turn).shape


def plain_input(file: Path, channels: int, size: int) -> tuple[np.ndarray, float]:
    """What a network is given, (n, channels, size, size), and how far decoders may differ."""
    if folders.is_volume(file):
        slices = plain_slices(file).astype(np.float32)
        low, high = np.percentile(slices, [0.5, 99.5])
        planes, _ = normalised(np.clip(slices, low, high), size)
        padded = np.concatenate([planes[:1], planes, planes[-1:]])
        stacks = np.stack([padded[:-2], padded[1:-1], padded[2:]], axis=1)
        return stacks, 2e-3 * max(1, np.abs(stacks).max())  # they are kept as float16
    plain = plain_image(file)
    pixels = colours_of(plain).transpose(2, 0, 1).astype(np.float32)
    planes, deviation = normalised(turned(pixels, plain.turn), size)
    planes = planes[:channels] if len(planes) > 1 else np.repeat(planes, channels, axis=0)
    levels = 4 / max(deviation, 1e-6)
    return planes[None], 2 * levels if plain.photo else 1e-5


def normalised(planes: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Resized with mean 0 and variance 1 over all planes, and their deviation before that."""
    resized = [Image.fromarray(plane).resize((size, size), Image.BILINEAR) for plane in planes]
    resized = np.stack([np.asarray(image, np.float64) for image in resized])
    deviation = resized.std()
    return (resized - resized.mean()) / max(deviation, 1e-6), deviation


def plain_values(file: Path) -> np.ndarray:
    """The greys or indices (H, W) of a mask that is an image, not yet turned."""
    plain = plain_image(file)
    listed(not plain.photo, "a JPEG as a mask")
    if plain.palette is not None and is_grey(plain):
        return plain.palette[plain.pixels[..., 0], 0]
    listed((plain.pixels == plain.pixels[..., :1]).all(), "a mask with channels that differ")
    return plain.pixels[..., 0]


def check_colours(file: Path, seen: dict) -> None:
    """In all palettes an index has the same colour, and a colour the same index."""
    plain = None if folders.is_volume(file) else plain_image(file)
    if plain and plain.palette is not None:
        colours = colours_of(plain).reshape(-1, 3).tolist()
        values = plain_values(file).ravel().tolist()
        for value, colour in set(zip(values, map(tuple, colours))):
            assert seen.setdefault(value, colour) == colour, f"{value} has two colours: {file}"
            assert seen.setdefault(colour, value) == value, f"{colour} has two values: {file}"


def plain_mask(file: Path, image: Path, kind: str, values: list[int] | None) -> np.ndarray:
    """The classes (n, H, W), uint8, in the mask of an image or volume."""
    if folders.is_volume(file):
        return (plain_slices(image, file) > 0).astype(np.uint8)
    greys = turned(plain_values(file)[None], plain_image(file).turn).astype(float)
    if values is None:
        return greys.astype(np.uint8)
    distance = np.abs([greys - value for value in values])
    listed(kind == "fundus" or not distance.min(axis=0).any(), "a mask with other values")
    return distance.argmin(axis=0).astype(np.uint8)


def outside(classes: np.ndarray) -> list[bool]:
    """Of each border pixel of a mask (n, H, W), and twice of corners, whether it is background."""
    ends = [0, -1]
    edges = [classes[:, ends], classes[..., ends]]
    border = np.concatenate(edges, axis=None)
    return (border == 0).tolist()


def plain_volume(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z) and affine in mm. Raises NotListed for what is not in the table."""
    content = file.read_bytes()
    content = gzip.decompress(content) if file.suffix.lower() == ".gz" else content
    second = 540 in struct.unpack("<i", content[:4]) + struct.unpack(">i", content[:4])
    read = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes
    volume = read(content)
    listed(volume.get_data_dtype().kind in "iuf", "a volume of other than real numbers")
    listed(volume.shape[3:] in ((), (1,)), "a volume of several frames")
    affine = volume.affine.copy()
    affine[:3] *= {1: 1000, 3: 0.001}.get(int(volume.header["xyzt_units"]) % 8, 1)
    return volume.get_fdata().reshape(volume.shape[:3]), affine


def plain_slices(file: Path, mask: Path | None = None) -> np.ndarray:
    """A volume from feet to head, front to back, right to left; or its mask at the same places."""
    voxels, affine = plain_volume(file)
    to_right = nibabel.io_orientation(affine)  # … to the front and up, nibabel's order
    places = [nibabel.apply_orientation(grid, to_right) for grid in np.indices(voxels.shape)]
    places = np.stack(places)[:, ::-1, ::-1].transpose(0, 3, 2, 1)
    if mask:
        voxels, own = plain_volume(mask)
        moved = np.linalg.inv(own) @ affine
        flat = moved[:3, :3] @ places.reshape(3, -1) + moved[:3, 3:]
        flat = flat.round().astype(int)
        outside_of_it = (flat < 0).any() or (flat.T >= voxels.shape).any()
        listed(not outside_of_it, "a mask that does not lie on its volume")
        places = flat.reshape(places.shape)
    return voxels[tuple(places)]


# ---------------------------------------------------------------- what adapting has written
def check_adapting(case: Case, told: list[str]) -> None:
    """Each image has a mask of its size or is told of; its classes are known, its Dice is that
    reported, and it comes again."""
    about = json.loads((case.out / "adapted.json").read_text())
    facts, experts, rows = about["config"]["data"], about["experts"], about["rows"]
    assert experts[-1] == "global" and list(about["chosen"]) == experts, experts
    assert len(rows) == len([*(case.out / "masks").iterdir()]), "masks"
    names = [row["file"] for row in rows]
    for file in images_in(case.images):
        is_told = any(" ".join(str(file).split()) in line for line in told)
        assert is_told or file.name in names or is_mask(file), f"forgotten: {file}"
    again = case.out.with_name("again")
    if not case.stored:
        status, errors = run_program(adapt_folder.main, [case.out, case.images, "--out", again])
        assert (again / "adapted.json").exists(), f"cannot be used again: {status}, {errors}"
    colours, on_border = {}, []
    values = case.mask_values or facts["mask_values"]
    for row in rows:
        source = case.images / row["file"]
        assert facts["channels"] > 1 or not has_colours(source), f"colours: {source}"
        name = folders.stem(source)
        written = f"masks/{name}" + (".nii.gz" if folders.is_volume(source) else ".png")
        shape = plain_shape(source)
        mask = folders.read_mask(case.out / written, shape, classes=facts["classes"])
        assert abs((mask > 0).mean() - row["foreground"]) < 1e-9, row
        if again.exists() and "--online" not in case.argv:
            assert (again / written).read_bytes() == (case.out / written).read_bytes(), row
        for structure, classes in facts["structures"].items():
            if f"Dice {structure}" in row:
                file, = masks_of(source, case.masks)
                truth = plain_mask(file, source, facts["kind"], values)
                score = iopfl.dice(np.isin(mask, classes), np.isin(truth, classes))
                assert abs(score - row[f"Dice {structure}"]) < 1e-9, (row, score)
                check_names(source, file)
                check_colours(file, colours)
                on_border.append(np.mean(outside(truth)))
    warned = any("less than a tenth" in line for line in told)
    assert warned == bool(values and on_border and np.mean(on_border) < 0.1), "inside out"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("always")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    ends = []
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        make_sound(place / "sound")
        for seed in range(args.seed, args.seed + args.count):
            try:
                rng = random.Random(f"case {seed}")
                ends.append(run_case(rng, place / "sound", place / "case"))
            except AssertionError as error:
                ends.append(-1)
                print(f"fuzz.py 1 --seed {seed}: {error}", flush=True)
        os.chdir(home)
    print("faults and cases by exit status:", [ends.count(status) for status in (-1, 0, 1, 2)])
    return int(-1 in ends)


if __name__ == "__main__":
    sys.exit(main())
