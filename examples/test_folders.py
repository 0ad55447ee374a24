"""Tests of examples/folders.py."""

import copy
import dataclasses
import gzip
import importlib.util
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import iopfl
from examples import folders
from examples.testing import *


# ---------------------------------------------------------------- data: folders of images
def test_folder_channels(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 4, grey=True)
    loaded = folders.load_folder(tmp_path, 32)
    assert (loaded.channels, loaded.classes) == (1, 2)
    assert loaded.kind == "images" and loaded.unit == "px"
    assert loaded.sites[0].everything.images.shape == (4, 1, 32, 32)
    assert loaded.sites[0].shapes == [(32, 32)] * 4
    assert set(loaded.sites[0].spacing.values()) == {(1.0, 1.0)}
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    save_image(tmp_path / "b" / "images" / "02.png", colour)
    loaded = folders.load_folder(tmp_path, 32)
    a, b = [site.everything for site in loaded.sites]
    assert loaded.channels == 3 and not a.stacks
    assert a.images.shape == b.images.shape == (4, 3, 32, 32)
    assert torch.equal(a.images[:, 0], a.images[:, 2])
    wanted = standardised(colour).transpose(2, 0, 1)
    assert np.allclose(b.images[b.cases.index("images/02.png")].numpy(), wanted, atol=1e-4)


def test_images_shrink_by_averaging_and_masks_by_choosing():
    stripes = np.zeros((1, 64, 64), np.float32)
    stripes[..., ::2] = 200
    inner = folders.resize(stripes, 8)[0, 1:-1, 1:-1]
    assert np.abs(inner - 100).max() < 2
    labels = np.random.default_rng(0).integers(0, 3, (2, 12, 8)).astype(np.int32)
    chosen = folders.resize(labels, 4, Image.NEAREST)
    assert np.array_equal(chosen, labels[:, 1::3, 1::2])


@pytest.mark.parametrize("values", [[0, 128, 255], [255, 0, 128]])
def test_mask_values_map_to_their_position(tmp_path, values):
    folder = write_site(tmp_path, "a", 5, values=(0, 128, 255))
    loaded = folders.load_folder(tmp_path, 32, values)
    split = loaded.sites[0].everything
    assert loaded.classes == 3 and loaded.mask_values == values
    assert loaded.structures == {"class 1": (1,), "class 2": (2,)}
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(np.array(values)[mask.numpy()], stored)


def test_masks_shrink_to_the_nearest_class(tmp_path):
    folder = write_site(tmp_path, "a", 4, values=(0, 1, 2))
    loaded, _ = warned(tmp_path)
    split = loaded.sites[0].everything
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(mask.numpy(), stored[1::2, 1::2])


def test_given_and_drawn_splits(tmp_path):
    counts = {"train": 3, "Valid": 1, "test": 2}
    write_split_site(tmp_path, "a", **counts)
    write_site(tmp_path, "b", 12)
    write_site(tmp_path, "c", 12)
    first = folders.load_folder(tmp_path, 32, seed=0).sites
    again = folders.load_folder(tmp_path, 32, seed=0).sites
    other = folders.load_folder(tmp_path, 32, seed=1).sites
    for split, (part, count) in zip(splits_of(first[0]), counts.items()):
        assert split.cases == [f"{part}/images/{number:02d}.png" for number in range(count)]
    for site, repeated in zip(first, again):
        assert same_bytes(site, repeated)
    b, c = first[1], first[2]
    assert cases_of(b) == [7, 2, 3]
    everything = b.everything
    assert everything.cases != c.everything.cases
    assert everything.cases != other[1].everything.cases
    assert sorted(everything.cases) == [f"images/{number:02d}.png" for number in range(12)]
    for case, image, mask in zip(everything.cases, everything.images, everything.masks):
        pixels = np.asarray(Image.open(tmp_path / "b" / case)).transpose(2, 0, 1)
        assert np.allclose(image.numpy(), standardised(pixels), atol=1e-4)
        stored = Image.open(tmp_path / "b" / case.replace("images", "masks"))
        assert np.array_equal(mask.numpy(), np.asarray(stored))


def test_a_fifth_of_train_validates(tmp_path):
    write_split_site(tmp_path, "a", train=10, test=2)
    first, lines = warned(tmp_path)
    site, = first.sites
    assert cases_of(site) == [8, 2, 2] and not lines
    assert all(case.startswith("train/") for case in site.validation.cases)
    assert site.test.cases == ["test/images/00.png", "test/images/01.png"]
    assert len(set(site.everything.cases)) == 12
    other, _ = warned(tmp_path, None, 1)
    assert other.sites[0].train.cases != site.train.cases


# ---------------------------------------------------------------- data: folders that cannot be used
IMAGE, MASK = "a/images/01.png", "a/masks/01.png"


@pytest.fixture
def two_sites(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 5)
    return tmp_path


def float_pixels(value):
    pixels = np.zeros((32, 32), np.float32)
    pixels[3, 4] = value
    return pixels


SPOT = np.eye(32, dtype=np.uint8)
RED = SPOT[:, :, None] * np.array([1, 0, 1], np.uint8)
PHOTOGRAPH = np.arange(1024, dtype=np.int64).reshape(32, 32).astype(np.uint8)


@pytest.mark.parametrize("pixels, mask_values, parts", [
    (SPOT[:20, :24], None, ["(1, 20, 24)", "(1, 32, 32)", "resample"]),
    (255 * SPOT, None, ["255", "0, 1 …", "--mask-values 0 255"]),
    (7 * SPOT, [0, 1], ["0 7 are not all among --mask-values [0, 1]", "a further class"]),
    (PHOTOGRAPH, [0, 1], ["not all among", "threshold it and save it as PNG with one value"]),
    (RED, None, ["one channel"]),
    (float_pixels(0.5), None, ["whole numbers"]),
    (float_pixels(-1), None, ["from 0"]),
    (float_pixels(math.nan), None, ["not finite"]),
    (PHOTOGRAPH, None, ["256 values", "save it as PNG with one value a class"]),
    (SPOT + 255 * SPOT[::-1], None, ["it holds 0 1 255", "no pixel is ignored"]),
    (15 * SPOT + 255 * SPOT[::-1], None, ["it holds 0 15 255", "no pixel is ignored"]),
    (3 * SPOT, None, ["[0, 1, 3]", "0, 1 …", "--mask-values"]),
])
def test_masks_that_cannot_be_used(two_sites, pixels, mask_values, parts):
    file = two_sites / MASK
    file.unlink()
    if pixels.dtype == np.float32:
        file = file.with_suffix(".tif")
    save_image(file, pixels)
    name = file.relative_to(two_sites).as_posix()
    loading_fails(two_sites, [name, *parts], mask_values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite(two_sites, value):
    (two_sites / IMAGE).unlink()
    save_image(two_sites / "a/images/01.tif", float_pixels(value))
    loading_fails(two_sites, ["a/images/01.tif", "not finite"])


def cut_short(file):
    file.write_bytes(file.read_bytes()[:200])


def text_instead(file):
    file.write_text("text")


def nothing_instead(file):
    file.write_bytes(b"")


def folder_instead(file):
    file.unlink()
    file.mkdir()


def loop_of_links(file):
    file.unlink()
    file.symlink_to(file.name)


def pipe_instead(file):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    file.unlink()
    os.mkfifo(file)


def many_pixels(file):
    Image.new("1", (10_000, 10_000)).save(file)


def huge_header(file):
    """A sound PNG header of 100,000 × 100,000 pixels; a checksum belongs to it."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    checksum = zlib.crc32(content[12:29])
    content[29:33] = struct.pack(">I", checksum)
    file.write_bytes(content)


@pytest.mark.parametrize("name", [IMAGE, MASK])
@pytest.mark.parametrize("spoil, part", [
    (cut_short, "not a readable image"),
    (text_instead, "not a readable image"),
    (nothing_instead, "not a readable image"),
    (folder_instead, "not a file"),
    (loop_of_links, "not a readable image"),
    (pipe_instead, "not a file"),
    (many_pixels, "decompression bomb"),
    (huge_header, "decompression bomb"),
])
def test_files_that_cannot_be_read(two_sites, name, spoil, part):
    spoil(two_sites / name)
    loading_fails(two_sites, [name, part, "replace or remove it"])


def unlink_all(root, pattern):
    files = list(root.glob(pattern))
    assert files
    for file in files:
        file.unlink()


def without_a_mask(root):
    (root / MASK).unlink()


def image_that_is_called_a_mask(root):
    shutil.copy(root / IMAGE, root / "a/images/scan_segmentation.png")


def without_masks(root):
    shutil.rmtree(root / "a/masks")


def without_images(root):
    unlink_all(root, "a/*/*")


def too_few_images(root):
    unlink_all(root, "a/*/0[234].png")


def unprintable_name(root):
    (root / "a").rename(root / "a\nb")


def called_global(root):
    (root / "a").rename(root / "global")


def called_all(root):
    (root / "a").rename(root / "All")


def called_none(root):
    (root / "a").rename(root / "none")


def two_endings(root):
    shutil.copy(root / IMAGE, root / "a/images/01.jpg")


def two_endings_of_a_mask(root):
    shutil.copy(root / MASK, root / "a/masks/01.gif")


def two_splits(root):
    write_site(root / "a", "train", 3)


def two_folders_of_images(root):
    shutil.copytree(root / "a/images", root / "a/image")


def background_alone(root):
    for file in root.glob("*/masks/*"):
        save_image(file, np.zeros((32, 32), np.uint8))


def another_layout(root):
    folder = root / "c/train/ROIs"
    shutil.copytree(root / "a/images", folder / "image")
    shutil.copytree(root / "a/masks", folder / "mask")


@pytest.mark.parametrize("spoil, parts", [
    (without_a_mask, [IMAGE, "no mask", "add it"]),
    (without_masks, ["a/images/00.png", "no mask"]),
    (image_that_is_called_a_mask, ["scan_segmentation.png has no mask", "add it"]),
    (without_images, ["'a'", "0 in all", "3 or more"]),
    (too_few_images, ["'a'", "2 in all", "3 or more"]),
    (unprintable_name, ["'a\\nb'", "rename it"]),
    (called_global, ["'global'", "rename it"]),
    (called_all, ["'All'", "rename it"]),
    (called_none, ["'none'", "rename it"]),
    (two_endings, ["01.jpg", "01.png", "mean the same; keep one"]),
    (two_endings_of_a_mask, ["a/masks", "01.gif", "mean the same; keep one"]),
    (two_splits, ["'a'", "5 in all", "3 in train"]),
    (two_folders_of_images, ["a/image", "images", "keep one"]),
    (background_alone, ["masks/", "[0]", "--mask-values"]),
    (another_layout, ["different layouts", "known layouts"]),
])
def test_folders_that_cannot_be_used(two_sites, spoil, parts):
    spoil(two_sites)
    loading_fails(two_sites, parts)


def test_a_grey_value_given_twice(two_sites):
    loading_fails(two_sites, ["--mask-values", "each value once"], [0, 1, 1])


def test_no_sites(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file.*nowhere"):
        folders.load_folder(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no sites.*known layouts"):
        folders.load_folder(tmp_path)


@pytest.mark.parametrize("counts, part", [
    ({"train": 1, "test": 1}, "1 in train, 1 in test"),
    ({"train": 5}, "5 in train"),
    ({"test": 5}, "5 in test"),
    ({"train": 5, "val": 2}, "5 in train, 2 in val"),
])
def test_splits_that_lack_images(tmp_path, counts, part):
    write_split_site(tmp_path, "a", **counts)
    loading_fails(tmp_path, ["site 'a'", part, "2 or more in train without"])


def test_a_folder_of_val_without_images(tmp_path):
    write_split_site(tmp_path, "a", train=5, val=2, test=2)
    unlink_all(tmp_path, "a/val/*/*")
    loading_fails(tmp_path, ["site 'a'", "0 in val"])


# ---------------------------------------------------------------- data: what is left out
def images_without_masks_of_theirs(root):
    unlink_all(root, "a/images/0[45].png")


def unknown_type(root):
    (root / "a/images/notes.xml").write_text("x")


def empty_site(root):
    (root / "empty").mkdir()


def empty_folders_in_a_site(root):
    (root / "empty/pictures").mkdir(parents=True)


def site_of_hidden_files(root):
    (root / "empty").mkdir()
    (root / "empty/.DS_Store").touch()


def site_in_no_known_layout(root):
    shutil.copytree(root / "a/images", root / "strange/pictures")


def empty_folder_in_a_site(root):
    (root / "a/holdout").mkdir()


def file_beside_the_sites(root):
    (root / "9.png").touch()


def file_in_a_part(root):
    (root / "c/train/9.png").touch()


def list_beside_a_split(root):
    (root / "c/train.txt").write_text("00")


def mask_beside_its_image(root):
    shutil.copy(root / "a/masks/00.png", root / "a/images/00_segmentation.png")


@pytest.mark.parametrize("add, count, example", [
    (images_without_masks_of_theirs, 2, "a/masks/04.png"),
    (unknown_type, 1, "a/images/notes.xml"),
    (empty_site, 1, "/empty"),
    (empty_folders_in_a_site, 1, "/empty/pictures"),
    (site_of_hidden_files, 1, "/empty"),
    (site_in_no_known_layout, 6, "strange/pictures/00.png"),
    (empty_folder_in_a_site, 1, "a/holdout"),
    (file_beside_the_sites, 1, "9.png"),
    (file_in_a_part, 1, "c/train/9.png"),
    (list_beside_a_split, 1, "c/train.txt"),
    (mask_beside_its_image, 1, "a/images/00_segmentation.png"),
])
def test_what_is_left_out_is_told(tmp_path, add, count, example):
    write_site(tmp_path, "a", 6)
    write_split_site(tmp_path, "c", train=2, val=2, test=2)
    before, lines = warned(tmp_path)
    assert lines == []
    add(tmp_path)
    after, lines = warned(tmp_path)
    line, = lines
    assert line.startswith(f"left out: {count} files or empty folders")
    assert line.replace(os.sep, "/").endswith(f"{example}")
    assert [site.name for site in after.sites] == ["a", "c"]
    assert same_bytes(before.sites[1], after.sites[1])


def test_all_that_is_left_out_is_one_line(tmp_path):
    write_site(tmp_path, "a", 6)
    images_without_masks_of_theirs(tmp_path)
    unknown_type(tmp_path)
    empty_site(tmp_path)
    file_beside_the_sites(tmp_path)
    _, lines = warned(tmp_path)
    line, = lines
    assert "left out: 5 files" in line


def test_hidden_files_are_neither_read_nor_told(tmp_path):
    folder = write_site(tmp_path, "a", 4)
    before, _ = warned(tmp_path)
    write_site(tmp_path, ".b", 4)
    (tmp_path / ".cache").touch()
    shutil.copy(folder / "images/00.png", folder / "images/._00.png")
    (folder / ".git").mkdir()
    (folder / ".git/config").touch()
    after, lines = warned(tmp_path)
    assert not lines and len(after.sites) == 1
    assert same_bytes(before.sites[0], after.sites[0])


# ---------------------------------------------------------------- data: kinds of image files
def test_capitals_and_other_types(tmp_path):
    a = write_site(tmp_path, "a", 4, grey=True)
    pixels = Image.open(a / "images" / "00.png").copy()
    truth = Image.open(a / "masks" / "00.png").copy()
    for name in ("x.bmp", "y.gif", "A.png", "a.png"):
        pixels.save(a / "images" / name)
        truth.save(a / "masks" / name)
    (a / "images").rename(a / "Images")
    (a / "masks").rename(a / "MASKS")
    loaded, lines = warned(tmp_path)
    split = loaded.sites[0].everything
    assert not lines and len(split.cases) == len([*(a / "Images").iterdir()])
    small = np.asarray(truth.resize((16, 16), Image.NEAREST))
    for case in ("x.bmp", "y.gif", "a.png"):
        mask = split.masks[split.cases.index(f"Images/{case}")]
        assert np.array_equal(mask.numpy(), small)


def fundus_mask():
    mask = np.full((20, 24), 255, np.uint8)
    mask[4:16, 4:20] = 128
    mask[8:12, 8:14] = 0
    mask[4, 4:8] = (191, 192, 64, 63)
    return mask


def test_fundus_domains(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 3)):
        rois = tmp_path / "Domain1" / part / "ROIs"
        for number in range(count):
            image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            save_image(rois / "image" / f"{number}.png", image)
            save_image(rois / "mask" / f"{number}.png", fundus_mask())
    loaded, lines = warned(tmp_path)
    assert not lines and loaded.kind == "fundus" and loaded.unit == "px"
    assert (loaded.classes, loaded.channels) == (3, 3)
    assert loaded.structures == {"disc": (1, 2), "cup": (2,)}
    site, = loaded.sites
    assert cases_of(site) == [8, 2, 3]
    assert all(case.startswith("test/") for case in site.test.cases)
    assert site.train.masks[0, 0, 0] == 0 and site.train.masks[0, 8, 7] == 2
    truth = rois / "mask" / "0.png"
    read = folders.read_mask(truth, (1, 20, 24), "fundus", [255, 128, 0], classes=3)[0]
    assert read[4, 4:8].tolist() == [1, 0, 1, 2]
    assert (read[0, 0], read[5, 5], read[9, 9]) == (0, 1, 2)
    with pytest.raises(ValueError, match="each value once"):
        folders.load_folder(tmp_path, 16, [255, 255, 0])
    for values in ([0, 255], [255, 128, 0, 1]):
        with pytest.raises(ValueError, match="three for fundus ROIs"):
            folders.load_folder(tmp_path, 16, values)
    for file in tmp_path.glob("*/*/ROIs/mask/*"):
        save_image(file, 255 - fundus_mask())
    given = folders.load_folder(tmp_path, 16, [0, 127, 255])
    assert given.mask_values == [0, 127, 255]
    assert torch.equal(given.sites[0].train.masks, site.train.masks)
    with pytest.raises(ValueError, match="it holds 0 127 255; expected are background"):
        folders.load_folder(tmp_path, 16)


def read_one(path):
    """The pixels of a single image, (H, W, C)."""
    pixels, affine = folders.read_file(path)
    assert pixels.dtype == np.float32 and len(pixels) == 1
    assert np.array_equal(affine, np.eye(4))
    return pixels[0]


def test_kinds_of_image_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((4, 3)).resize((24, 20))

    palette = smooth.quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_one(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))

    save_image(tmp_path / "alpha.png", np.dstack([pixels, pixels[:, :, 0]]))
    assert np.array_equal(read_one(tmp_path / "alpha.png"), pixels)

    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    difference = read_one(tmp_path / "cmyk.jpg") - np.asarray(smooth)
    assert np.abs(difference).mean() <= 8

    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    save_image(tmp_path / "deep.png", deep)
    assert np.array_equal(read_one(tmp_path / "deep.png"), deep[:, :, None])

    Image.new("LA", (4, 6), (100, 7)).save(tmp_path / "la.png")
    assert np.array_equal(read_one(tmp_path / "la.png"), np.full((6, 4, 1), 100))

    bits = pixels[:, :, 0] > 99
    save_image(tmp_path / "bits.png", bits)
    assert np.array_equal(read_one(tmp_path / "bits.png")[:, :, 0] > 0, bits)


def upright(pixels):
    return pixels


def mirrored(pixels):
    return pixels[:, ::-1]


def upside_down(pixels):
    return pixels[::-1, ::-1]


def clockwise(pixels):
    return np.rot90(pixels, -1)


def anticlockwise(pixels):
    return np.rot90(pixels, 1)


@pytest.mark.parametrize("orientation, turn", [
    (1, upright),
    (2, mirrored),
    (3, upside_down),
    (6, clockwise),
    (8, anticlockwise),
])
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, turn):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_one(tmp_path / "turned.png"), turn(pixels))


def test_kinds_of_mask_files(tmp_path):
    indices = np.random.default_rng(1).integers(0, 3, (20, 24), dtype=np.uint8)
    coloured = Image.fromarray(indices)
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "palette.png")
    save_image(tmp_path / "grey.png", np.repeat(indices[:, :, None], 3, axis=2))
    save_image(tmp_path / "grey.gif", indices * 90)
    for name, factor in (("palette.png", 1), ("grey.png", 1), ("grey.gif", 90)):
        read = folders.read_mask(tmp_path / name, (1, 20, 24), classes=256)
        assert np.array_equal(read[0], indices.astype(int) * factor)


def test_files_of_several_pages(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="pages.tif: 2 pages, one image .*; save one alone"):
        folders.read_file(tmp_path / "pages.tif")


# ---------------------------------------------------------------- data: what was misread
def disc(size, radius):
    """A mask (size, size) with 1 in a disc in its middle, else 0; uint8."""
    places = np.arange(size) - (size - 1) / 2
    distance = np.hypot(places, places[:, None])
    return (distance < radius).astype(np.uint8)


def test_grey_palettes_are_read_as_greys(tmp_path):
    mask = disc(64, 9)
    file = tmp_path / "m.png"
    Image.fromarray(255 * mask).quantize(2).save(file)
    stored = Image.open(file)
    assert stored.mode == "P" and stored.getpalette()[:6] == [255, 255, 255, 0, 0, 0]
    assert np.array_equal(folders.read_mask(file, (1, 64, 64), values=[0, 255])[0], mask)
    assert np.array_equal(read_one(file)[:, :, 0], 255 * mask)  # as an image, one channel
    black, red = [0, 0, 0], [200, 0, 0]
    for palette in (black + red, black + black):  # which shows no greys of its own: indices
        stored.putpalette(palette)
        stored.save(file)
        assert np.array_equal(folders.read_mask(file, (1, 64, 64))[0], 1 - mask)


@pytest.mark.parametrize("background, rim, cup", [
    (0, 1, 2),  # numbered
    (0, 255, 255),  # the disc alone, white
    (255, 0, 0),  # the disc alone, black
    (255, 155, 55),
    (0, 128, 255),  # inside out
])
def test_fundus_masks_of_other_values_are_refused(tmp_path, background, rim, cup):
    classes = disc(64, 20) + disc(64, 9)
    greys = np.array([background, rim, cup], np.uint8)
    file = tmp_path / "m.png"
    save_image(file, greys[classes])
    some = " ".join(str(grey) for grey in sorted({background, rim, cup}))
    with pytest.raises(ValueError, match=f"m.png: it holds {some}; expected are background, rim"):
        folders.read_mask(file, (1, 64, 64), "fundus", [255, 128, 0], classes=3)


@pytest.mark.parametrize("disc_radius, cup_radius", [(8, 6), (100, 95), (40, 0), (0, 0)])
def test_fundus_masks_of_any_size_are_read(tmp_path, disc_radius, cup_radius):
    classes = disc(256, disc_radius) + disc(256, cup_radius)
    greys = np.array([255, 128, 0], np.uint8)
    save_image(tmp_path / "m.png", greys[classes])
    read = folders.read_mask(tmp_path / "m.png", (1, 256, 256), "fundus", [255, 128, 0], classes=3)
    assert np.array_equal(read[0], classes)


def test_smoothed_fundus_masks_are_read(tmp_path):
    classes = disc(256, 80) + disc(256, 40)
    values = np.array([255, 128, 0], np.uint8)[classes]
    small = Image.fromarray(values).resize((64, 64), Image.BILINEAR)
    small.save(tmp_path / "m.png")
    assert len(np.unique(np.asarray(small))) > 20
    read = folders.read_mask(tmp_path / "m.png", (1, 64, 64), "fundus", [255, 128, 0], classes=3)[0]
    assert (read != classes[2::4, 2::4]).mean() < 0.03


def test_a_flipped_bit_in_a_gzip_file_is_seen(tmp_path):
    """Of each flipped bit: the file is refused, or gives the same voxels (a name in the header)."""
    rng = np.random.default_rng(0)
    file = tmp_path / "v.nii.gz"
    write_nifti(file, rng.integers(0, 900, (24, 20, 5)).astype(np.int16), affine("LPS"))
    before, _ = folders.read_file(file)
    content = file.read_bytes()
    refused = 0
    for _ in range(60):
        place, bit = rng.integers(len(content)), rng.integers(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        file.write_bytes(changed)
        try:
            after, _ = folders.read_file(file)
        except ValueError as error:
            assert "v.nii.gz: not a readable NIfTI file" in str(error)
            refused += 1
        else:
            assert np.array_equal(before, after), (place, bit)
    assert refused > 50


def test_a_scale_in_the_header_is_no_fraction(tmp_path):
    """Labels that nibabel has stored as scaled integers come back a little off."""
    nibabel = pytest.importorskip("nibabel")
    labels = np.arange(120).reshape(6, 5, 4) % 7 / 1
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels, affine("LPS"), header), tmp_path / "m.nii")
    stored = nibabel.load(tmp_path / "m.nii").get_fdata()
    assert 0 < np.abs(stored - labels).max() < 0.015
    read = folders.read_mask(tmp_path / "m.nii", (4, 5, 6), "images", classes=7)
    shown, _ = folders.read_file(tmp_path / "m.nii")
    assert np.array_equal(read, shown[..., 0].round())


@pytest.mark.parametrize("kind", ["volumes", "images"])
def test_volumes_of_fractions_are_no_masks(tmp_path, kind):
    values = np.full((6, 5, 4), 1e-4, np.float32)
    values[2:4, 1:3] = 0.98
    write_nifti(tmp_path / "m.nii", values, affine("LPS"))
    with pytest.raises(ValueError, match="m.nii: whole numbers from 0 .* nearest neighbour"):
        folders.read_mask(tmp_path / "m.nii", (4, 5, 6), kind, classes=2)


def flipped(pixels):
    return pixels[::-1]


def transposed(pixels):
    return pixels.T


def transversed(pixels):
    return pixels.T[::-1, ::-1]


@pytest.mark.parametrize("orientation, turn", [
    (1, upright),
    (2, mirrored),
    (3, upside_down),
    (4, flipped),
    (5, transposed),
    (6, clockwise),
    (7, transversed),
    (8, anticlockwise),
])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_are_turned_as_they_say(tmp_path, orientation, turn, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24)).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "m.tif", tiffinfo={274: orientation})
    turned = turn(pixels)
    assert np.array_equal(read_one(tmp_path / "m.tif")[:, :, 0], turned)
    read = folders.read_mask(tmp_path / "m.tif", (1, *turned.shape), classes=256)
    assert np.array_equal(read[0], turned)


@pytest.mark.parametrize("dtype, readable", [
    (np.uint8, True),
    (np.uint16, False),
    (np.float32, False),
])
def test_tiffs_in_which_zero_is_white(tmp_path, dtype, readable):
    file = tmp_path / "m.tif"
    save_image(file, disc(16, 5).astype(dtype))
    before = struct.pack("<HHIHH", 262, 3, 1, 1, 0)  # the tag: black is zero
    content = file.read_bytes()
    assert content.count(before) == 1
    file.write_bytes(content.replace(before, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    if readable:
        assert np.array_equal(read_one(file)[:, :, 0], 255 - disc(16, 5))
    else:
        with pytest.raises(ValueError, match="m.tif: .*0 is white is not read; invert it"):
            folders.read_file(file)


def test_masks_in_the_alpha_channel_are_refused(tmp_path):
    alpha = 255 * disc(16, 5)
    black = np.zeros_like(alpha)
    layers = {"LA": [black, alpha], "RGBA": [black, black, black, alpha]}
    for mode, channels in layers.items():
        save_image(tmp_path / f"{mode}.png", np.dstack(channels))
        with pytest.raises(ValueError, match=f"{mode}.png: .*alpha channel; save the mask"):
            folders.read_mask(tmp_path / f"{mode}.png", (1, 16, 16))
    grey = disc(16, 5)
    save_image(tmp_path / "opaque.png", np.dstack([grey, grey, grey, 255 - black]))
    assert np.array_equal(folders.read_mask(tmp_path / "opaque.png", (1, 16, 16))[0], grey)


def write_deep_rgb(file, values):
    """A PNG of 16 bits a colour, which pillow cannot write."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width = values.shape
    rows = np.repeat(values[:, :, None], 3, axis=2).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_masks_of_16_bits_a_colour_are_refused(tmp_path):
    write_deep_rgb(tmp_path / "m.png", disc(16, 5))
    with pytest.raises(ValueError, match="m.png: .*16 bits a channel.*save the mask"):
        folders.read_mask(tmp_path / "m.png", (1, 16, 16))
    write_deep_rgb(tmp_path / "i.png", 257 * np.arange(256).reshape(16, 16))
    assert np.array_equal(read_one(tmp_path / "i.png")[:, :, 1].ravel(), np.arange(256))


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("micron", 1000), ("meter", 0.001)])
def test_voxels_are_measured_in_the_headers_unit(tmp_path, unit, factor):
    nibabel = pytest.importorskip("nibabel")
    spacing = [factor * length for length in (0.5, 0.6, 3.0)]
    volume = nibabel.Nifti1Image(np.ones((6, 5, 4)), affine("LPS", spacing))
    volume.header.set_xyzt_units(unit)
    nibabel.save(volume, tmp_path / "v.nii")
    _, found = folders.read_file(tmp_path / "v.nii")
    assert data.voxel_size(found) == pytest.approx((3.0, 0.6, 0.5), rel=1e-5)


@pytest.mark.parametrize("columns, rows, slices, fits", [
    (4.7, 0, 0, False),
    (0.6, 0, 0, False),
    (0, -0.6, 0, False),
    (0, 0, 0.6, False),
    (0.4, -0.4, 0.4, True),
])
def test_masks_lie_within_half_a_voxel_of_their_volume(tmp_path, columns, rows, slices, fits):
    matrix = affine("LPS", (0.6, 0.7, 3))
    moved = matrix.copy()
    moved[:3, 3] += matrix[:3, :3] @ (columns, rows, slices)
    write_nifti(tmp_path / "v.nii", np.ones((24, 20, 5)), matrix)
    write_nifti(tmp_path / "m.nii", np.ones((24, 20, 5)), moved)
    _, own = folders.read_file(tmp_path / "v.nii")
    if fits:
        assert folders.read_mask(tmp_path / "m.nii", (5, 20, 24), "volumes", None, own).all()
    else:
        with pytest.raises(ValueError, match="m.nii: its affine is not its volume's; resample it"):
            folders.read_mask(tmp_path / "m.nii", (5, 20, 24), "volumes", None, own)


def test_labels_that_vanish_by_resizing_are_told(tmp_path):
    """Lesions of 2 pixels radius, 512 to 96: those between the chosen pixels are lost."""
    rng = np.random.default_rng(0)
    for number in range(24):
        y, x = rng.integers(20, 490, 2)
        mask = np.zeros((512, 512), np.uint8)
        mask[y - 2:y + 3, x - 2:x + 3] = disc(5, 2.2)
        image = rng.integers(0, 9, (512, 512)).astype(np.uint8)
        save_image(tmp_path / f"a/images/{number}.png", image)
        save_image(tmp_path / f"a/masks/{number}.png", mask)
    with pytest.warns(UserWarning) as caught:
        loaded = folders.load_folder(tmp_path, 96)
    lost = sum(not mask.any() for mask in loaded.sites[0].everything.masks)
    assert 8 < lost < 16
    line, = [str(warning.message) for warning in caught]
    assert line.startswith(f"{lost} of 24 masks lose a class when they become 96 × 96")
    assert "a/masks/" in line.replace(os.sep, "/") and "larger --size" in line
    scores = loaded.sites[0].resized_dice
    assert scores.count(0) == lost and max(scores) < 0.9


def test_what_a_size_costs_by_hand():
    structures = [[1], [2]]
    mask = np.zeros((1, 8, 8), np.int32)
    assert folders.dice_with_itself(mask, mask[:, ::2, ::2], structures) is None
    mask[0, :, 4:] = 2
    assert folders.dice_with_itself(mask, mask[:, ::2, ::2], [[2]]) == 1  # edges between the pixels
    mask[0, 0, 0] = 1
    assert folders.dice_with_itself(mask, mask, structures) == 1
    small = mask[:, 1::2, 1::2]  # in which class 1 is lost, and class 2 is whole
    assert folders.dice_with_itself(mask, small, structures) == 0.5
    assert folders.dice_with_itself(mask, small, [[1, 2]]) == pytest.approx(2 * 32 / (33 + 32))


def rename_all(folder, names):
    for old, new in zip(sorted(folder.iterdir()), names, strict=True):
        old.rename(folder / f"{new}.png")


PATIENTS = [f"patient{number // 3:02d}_slice{number % 3}" for number in range(6)]


@pytest.mark.parametrize("names, warns", [
    (PATIENTS, True),
    (["7-1", "7-2", "8-1", "8-2", "9-1", "9-2"], True),
    ([f"image_{number:03d}" for number in range(6)], False),
    ([f"ISIC2018_{number}" for number in range(6)], False),  # of one data set, not of one patient
    ([f"{number}_h" for number in range(6)], False),
    ([f"scan{number}" for number in range(6)], False),
])
def test_patients_that_a_shuffle_may_part_are_told(tmp_path, names, warns):
    folder = write_site(tmp_path, "a", 6)
    rename_all(folder / "images", names)
    rename_all(folder / "masks", names)
    _, lines = warned(tmp_path)
    assert len(lines) == warns
    if warns:
        assert f"site 'a': if {names[0]}.png and {names[1]}.png show one patient" in lines[0]
        assert "folders train, val and test" in lines[0]


def test_patients_in_train_may_be_parted_too(tmp_path):
    write_split_site(tmp_path, "a", train=6, test=1)
    for folder in ("images", "masks"):
        rename_all(tmp_path / "a/train" / folder, PATIENTS)
    _, lines = warned(tmp_path)
    assert len(lines) == 1 and "show one patient" in lines[0]


def test_sites_that_number_the_classes_otherwise(tmp_path):
    write_site(tmp_path, "a", 4, values=(0, 1))
    write_site(tmp_path, "b", 4, values=(0, 255))
    loading_fails(tmp_path, ["b/masks/", "2 values up to 255", "--mask-values 0 255"])
    loading_fails(tmp_path, ["a/masks/", "not all among", "all sites", "same value"], [0, 255])
    loaded, lines = warned(tmp_path, [0, 1, 255])
    assert loaded.classes == 3
    assert "no site has masks of all 3 classes (a [0, 1]; b [0, 2])" in lines[0]
    write_site(tmp_path, "c", 4, values=(0, 1, 255))
    assert not warned(tmp_path, [0, 1, 255])[1]


def test_jpeg_masks_are_refused_where_they_are_not_clean(tmp_path):
    mask = disc(64, 20)
    for name, top in (("greys", 255), ("classes", 1)):
        file = tmp_path / f"{name}.jpg"
        Image.fromarray(top * mask).save(file, quality=95)
        with pytest.raises(ValueError, match=f"{name}.jpg: JPEG has changed the .*as PNG"):
            folders.read_mask(file, (1, 64, 64), values=[0, 255] if top > 1 else None)
    blocks = np.kron(disc(8, 3), np.ones((8, 8), np.uint8))
    Image.fromarray(255 * blocks).save(tmp_path / "clean.jpg", quality=100)
    read = folders.read_mask(tmp_path / "clean.jpg", (1, 64, 64), values=[0, 255])
    assert np.array_equal(read[0], blocks)


@pytest.mark.parametrize("name, tool", [
    ("x.mha", "SimpleITK"),
    ("x.NRRD", "SimpleITK"),
    ("x.dcm", "dcm2niix"),
    ("x.npy", "nibabel"),
    ("x.h5", "h5py"),
    ("x.ppm", "pillow"),
])
def test_formats_that_are_not_read_are_named(tmp_path, name, tool):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(b"x")
    advice = f"{Path(name).suffix.lower()} is not read: convert it to NIfTI or PNG by .*{tool}"
    with pytest.raises(ValueError, match=f"no sites found; known layouts: .*{advice}"):
        folders.load_folder(tmp_path)
    write_site(tmp_path, "b", 4)
    _, lines = warned(tmp_path)
    line, = lines
    assert re.search(f"left out: 1 files .*{advice}", line)


def test_other_layouts_are_told_what_is_expected(tmp_path):
    nnunet, prostate158 = tmp_path / "nnUNet", tmp_path / "prostate158"
    for folder, names in (("imagesTr", ["p_0000"]), ("labelsTr", ["p"])):
        for name in names:
            write_nifti(nnunet / folder / f"{name}.nii.gz", np.ones((6, 5, 4)), affine("LPS"))
    for name in ("t2", "t2_anatomy_reader1"):
        write_nifti(prostate158 / f"020/{name}.nii.gz", np.ones((6, 5, 4)), affine("LPS"))
    for root in (nnunet, prostate158):
        loading_fails(root, ["has no mask of its name", "CaseNN_segmentation.nii.gz"])


def test_masks_of_another_format_are_named(two_sites):
    for file in (two_sites / "a/masks").iterdir():
        file.rename(file.with_suffix(".npy"))
    loading_fails(two_sites, ["00.png has no mask", ".npy is not read: convert it"])


def test_labels_beside_masks_are_left_out(two_sites):
    (two_sites / "a/labels").mkdir()
    (two_sites / "a/labels/boxes.txt").touch()
    _, lines = warned(two_sites)
    assert len(lines) == 1 and "left out: 1 files" in lines[0]


@pytest.mark.parametrize("name", ["label", "Labels"])
def test_masks_may_lie_in_a_folder_of_labels(tmp_path, name):
    folder = write_site(tmp_path, "a", 4)
    expected, _ = warned(tmp_path)
    (folder / "masks").rename(folder / name)
    loaded, lines = warned(tmp_path)
    assert not lines and same_bytes(loaded.sites[0], expected.sites[0])


# ---------------------------------------------------------------- data: single files
def test_images_are_paired_with_masks_or_none(tmp_path):
    a = write_site(tmp_path, "a", 3)
    (a / "masks" / "01.png").unlink()
    (a / "masks" / "02.png").rename(a / "masks" / "02_Segmentation.png")
    (a / "images" / "notes.txt").touch()
    (a / "images" / ".hidden.png").touch()
    pairs = folders.pair_up(a / "images", a / "masks")
    images = [image.name for image, _ in pairs]
    masks = [mask and mask.name for _, mask in pairs]
    assert images == ["00.png", "01.png", "02.png"]
    assert masks == ["00.png", None, "02_Segmentation.png"]
    unlabelled = folders.pair_up(a / "images", None)
    assert [image.name for image, _ in unlabelled] == images
    assert [mask for _, mask in unlabelled] == [None] * 3
    shutil.copy(a / "masks" / "00.png", a / "images" / "01_segmentation.png")
    one_folder = folders.pair_up(a / "images", a / "images")
    masks = [mask and mask.name for _, mask in one_folder]
    assert masks == [None, "01_segmentation.png", None]
    assert folders.pair_up(a / "images", None) == unlabelled
    (a / "images" / "01_segmentation.png").rename(a / "images" / "x_segmentation.png")
    apart = folders.pair_up(a / "images", a / "masks")  # where masks lie elsewhere, an image
    assert [image.name for image, _ in apart] == [*images, "x_segmentation.png"]
    assert folders.pair_up(a / "images", None) == unlabelled


def test_masks_must_fit_their_network(tmp_path):
    mask = write_site(tmp_path, "a", 1) / "masks" / "00.png"
    assert folders.read_mask(mask, (1, 32, 32), classes=2).shape == (1, 32, 32)
    with pytest.raises(ValueError, match=r"00.png.*\(1, 32, 32\).*\(1, 9, 9\)"):
        folders.read_mask(mask, (1, 9, 9))
    save_image(mask, 2 * SPOT)
    with pytest.raises(ValueError, match="00.png: 2 values up to 2; expected are 0, 1 … 1"):
        folders.read_mask(mask, (1, 32, 32), classes=2)


def test_what_a_network_sees_of_an_image():
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    seen = folders.network_input(Path("x.png"), pixels, 8, 3, "images")
    assert seen.dtype == np.float32
    assert np.allclose(seen[0], standardised(pixels[0]).transpose(2, 0, 1), atol=1e-5)
    grey = pixels[..., 1:2]
    seen = folders.network_input(Path("x.png"), np.repeat(grey, 3, axis=3), 8, 1, "images")
    assert np.allclose(seen[0, 0], standardised(grey[0, ..., 0]), atol=1e-5)
    in_colour = folders.network_input(Path("x.png"), grey, 8, 3, "images")
    assert np.array_equal(in_colour, np.repeat(seen, 3, axis=1))


def test_what_a_network_sees_of_a_volume():
    volume = np.random.default_rng(1).random((4, 8, 8, 1)).astype(np.float32)
    single = folders.network_input(Path("x.NII.GZ"), volume, 8, 1, "images")
    stacks = folders.network_input(Path("x.nii"), volume, 8, 3, "volumes")
    assert single.shape == (4, 1, 8, 8) and stacks.shape == (4, 3, 8, 8)
    padded = single[[0, 0, 1, 2, 3, 3], 0]  # the outer slices are their own neighbours
    for number in range(4):
        assert np.array_equal(stacks[number], padded[number:number + 3])


@pytest.mark.parametrize("name, channels, kind", [
    ("x.png", 1, "images"),
    ("x.png", 1, "simulated"),
    ("x.png", 3, "volumes"),
    ("x.nii", 3, "fundus"),
])
def test_what_a_network_refuses(name, channels, kind):
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=f"{name}: the run was trained on .* {kind} "):
        folders.network_input(Path(name), pixels, 8, channels, kind)


def test_normalise():
    large = np.array([[0, 1e30], [2e30, 1e30]], dtype=np.float32)  # squares overflow float32
    assert data.normalise(large) == pytest.approx(data.normalise(large / 1e30), abs=1e-6)
    assert not data.normalise(np.full((3, 3), 7.0)).any()


# ---------------------------------------------------------------- data: volumes
def test_volumes_load_as_stacks(tmp_path):
    write_volumes(tmp_path, {"ISBI": 4, "UCL": 8})
    for file in (tmp_path / "UCL").glob("Case03*"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    loaded, lines = warned(tmp_path)
    assert [site.name for site in loaded.sites] == ["ISBI", "UCL"] and not lines
    assert (loaded.channels, loaded.unit, loaded.kind) == (3, "mm", "volumes")
    assert loaded.structures == {"prostate": (1,)} and loaded.mask_values is None
    site = loaded.sites[1]
    split = site.everything
    assert split.stacks and site.train.stacks and site.test.stacks
    assert split.images.shape == (40, 3, 16, 16) and split.images.dtype == torch.float16
    assert split.masks.dtype == torch.uint8 and split.masks.max() == 1
    names = sorted({folders.stem(Path(case)) for case in split.cases})
    assert names == [f"Case{number:02d}" for number in range(8)]
    assert "Case03.NII.GZ" in split.cases
    for spacing in site.spacing.values():  # 20 rows and 24 columns have become 16
        assert spacing == pytest.approx((3.0, 0.6 * 20 / 16, 0.5 * 24 / 16), abs=1e-6)
    assert site.shapes == [(5, 20, 24)] * 8
    assert [len(set(part.cases)) for part in splits_of(site)] == [5, 1, 2]


def test_slices_lie_between_their_neighbours(tmp_path):
    write_volumes(tmp_path, {"UCL": 4})
    loaded, _ = warned(tmp_path)
    split = loaded.sites[0].everything
    for start in range(0, 20, 5):
        volume = split.images[start:start + 5, 1].float()
        assert len(set(split.cases[start:start + 5])) == 1
        assert volume.mean().item() == pytest.approx(0, abs=2e-3)
        assert volume.std().item() == pytest.approx(1, abs=2e-2)
        padded = volume[[0, 0, 1, 2, 3, 4, 4]]  # neighbours stay within the volume
        for number in range(5):
            stack = split.images[start + number].float()
            assert torch.equal(stack, padded[number:number + 3])
            assert torch.equal(split.shown(start + number), volume[number:number + 1])
            mask = split.masks[start + number] > 0
            assert mask.any() == (0 < number < 4)
            if mask.any():  # the prostate is the bright part
                inside, outside = volume[number][mask], volume[number][~mask]
                assert inside.mean() > outside.mean() + 1


def test_volumes_of_one_name_in_train_and_test(tmp_path):
    write_volumes(tmp_path, {"all": 4})
    for part, spacing in (("train", 1.0), ("test", 2.0)):
        for number in range(3):
            place = tmp_path / "sites" / "UCL" / part
            values = np.random.default_rng(number).normal(size=(6, 6, 2))
            matrix = affine("LPS", (spacing, 1, 1))
            write_nifti(place / "images" / f"{number}.nii.gz", values, matrix)
            write_nifti(place / "masks" / f"{number}.nii.gz", (values > 0) * 1.0, matrix)
    loaded, lines = warned(tmp_path / "sites")
    site, = loaded.sites
    assert not lines and [len(set(split.cases)) for split in splits_of(site)] == [2, 1, 3]
    assert len(site.spacing) == 6
    assert site.spacing["test/images/0.nii.gz"][2] == pytest.approx(2 * 6 / 16)
    assert site.spacing["train/images/0.nii.gz"][2] == pytest.approx(6 / 16)


@pytest.mark.parametrize("codes, tilt", [
    ("LPS", 0),
    ("RAS", 0),
    ("LAI", 0),
    ("SPL", 0),
    ("PSR", 0),
    ("RAI", 0.3),
    ("LPS", -0.4),
])
def test_orientation_comes_from_the_header(tmp_path, codes, tilt):
    nibabel = pytest.importorskip("nibabel")
    body = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)  # towards S, P, L
    axes = codes.translate(str.maketrans("IAR", "SPL"))
    stored = body.transpose(["SPL".index(axis) for axis in axes])
    for number, code in enumerate(codes):
        if code in "IAR":
            stored = np.flip(stored, number)
    steps = {"S": 3.0, "P": 0.6, "L": 0.5}
    matrix = affine(codes, [steps[axis] for axis in axes], tilt)
    file = tmp_path / "v.NII.GZ"
    write_nifti(file, np.ascontiguousarray(stored), matrix)
    values, found = folders.read_file(file)
    assert np.array_equal(values[..., 0], body)
    assert np.linalg.norm(found[:3, :3], axis=0) == pytest.approx((3.0, 0.6, 0.5), abs=1e-5)
    (tmp_path / "m.nii.gz").write_bytes(folders.mask_volume(body > 0.5, file))
    written = nibabel.load(tmp_path / "m.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), stored > 0.5)
    assert np.allclose(written.affine, matrix, atol=1e-5)
    assert written.get_data_dtype() == np.uint8
    assert folders.stem(file) == "v" and folders.is_volume(file)
    mask = folders.read_mask(tmp_path / "m.nii.gz", (4, 5, 6), "volumes", None, found)
    assert np.array_equal(mask, body > 0.5)


def test_written_masks_have_no_grey_window(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.ones((4, 4, 2), np.int16), affine("LPS"))
    image.header["cal_max"] = 800
    nibabel.save(image, tmp_path / "v.nii")
    content = folders.mask_volume(np.ones((2, 4, 4)), tmp_path / "v.nii")
    assert content[4:8] == bytes(4)  # no time: the same mask gives the same bytes
    (tmp_path / "m.nii.gz").write_bytes(content)
    assert nibabel.load(tmp_path / "m.nii.gz").header["cal_max"] == 0


VOLUME, DRAWN = "UCL/Case01.nii.gz", "UCL/Case01_segmentation.nii.gz"


def write_mask(root, shape=(24, 20, 5), matrix=None):
    if matrix is None:
        matrix = affine("LPS")
    write_nifti(root / DRAWN, np.ones(shape, np.uint8), matrix)


def break_header(file, place, value):
    raw = bytearray(gzip.decompress(file.read_bytes()))
    raw[place] = value
    file.write_bytes(gzip.compress(bytes(raw)))


def no_segmentation(root):
    (root / DRAWN).unlink()


def shapes_differ(root):
    write_mask(root, (24, 20, 4))


def four_axes(root):
    write_nifti(root / VOLUME, np.ones((24, 20, 5, 2)), affine("LPS"))


def volume_cut_short(root):
    cut_short(root / VOLUME)


def volume_of_text(root):
    text_instead(root / VOLUME)


def two_endings_of_a_volume(root):
    shutil.copy(root / VOLUME, root / "UCL/Case01.nii")


def voxels_differ(root):
    write_mask(root, matrix=affine("LPS", (1, 1, 3)))


def mask_elsewhere(root):
    write_mask(root, matrix=affine("LPS", tilt=0.4))


def volume_not_finite(root):
    write_nifti(root / VOLUME, np.full((24, 20, 5), np.nan), affine("LPS"))


def unknown_data_type(root):
    break_header(root / VOLUME, 70, 77)


def header_to_be_repaired(root):
    break_header(root / VOLUME, 254, 99)


def no_voxels(root):
    break_header(root / VOLUME, 42, 0)


def more_voxels_than_memory(root):
    for place in (43, 45, 47):
        break_header(root / VOLUME, place, 127)


def without_direction(root):
    import nibabel
    header = nibabel.Nifti1Header()
    header.set_data_shape((24, 20, 5))
    header["sform_code"] = 1
    header["srow_x"][0] = header["srow_y"][1] = 1
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 5)), None, header), root / VOLUME)


def photographs_beside(root):
    write_site(root, "photographs", 4)


@pytest.mark.parametrize("spoil, parts", [
    (no_segmentation, ["Case01.nii.gz has no mask", "add it"]),
    (shapes_differ, [DRAWN, "(4, 20, 24)", "(5, 20, 24)"]),
    (four_axes, [VOLUME, "three dimensions", "(24, 20, 5, 2)"]),
    (volume_cut_short, [VOLUME, "not a readable NIfTI file"]),
    (volume_of_text, [VOLUME, "not a readable NIfTI file"]),
    (two_endings_of_a_volume, ["Case01.nii", "mean the same; keep one"]),
    (voxels_differ, [DRAWN, "affine", "resample"]),
    (mask_elsewhere, [DRAWN, "affine", "resample"]),
    (volume_not_finite, [VOLUME, "not finite"]),
    (unknown_data_type, [VOLUME, "not a readable NIfTI file"]),
    (header_to_be_repaired, [VOLUME, "sform_code"]),
    (no_voxels, [VOLUME, "voxels are expected, found (0, 20, 5)"]),
    (more_voxels_than_memory, [VOLUME, "at most", "voxels"]),
    (without_direction, [VOLUME, "direction"]),
    (photographs_beside, ["different layouts", "known layouts"]),
])
def test_volumes_that_cannot_be_used(tmp_path, spoil, parts):
    write_volumes(tmp_path, {"BMC": 4, "UCL": 4})
    spoil(tmp_path)
    loading_fails(tmp_path, parts)


def test_volumes_of_one_slice(tmp_path):
    write_volumes(tmp_path, {"UCL": 6}, shape=(24, 20, 1))
    loaded, lines = warned(tmp_path)
    assert not lines
    stack = loaded.sites[0].train.images[0]
    assert torch.equal(stack[0], stack[1]) and torch.equal(stack[1], stack[2])
    (tmp_path / "UCL" / "Case02.nii.gz").unlink()
    _, lines = warned(tmp_path)
    line, = lines
    assert "left out: 1 files" in line and "Case02_Segmentation.nii.gz" in line
    with pytest.raises(ValueError, match="none for volumes"):
        folders.load_folder(tmp_path, 16, [0, 1])


def test_volumes_without_nibabel(tmp_path, monkeypatch):
    write_volumes(tmp_path, {"UCL": 3})
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match="Case.*pip install nibabel"):
        folders.load_folder(tmp_path, 16)


@pytest.mark.parametrize("kind, classes, expected", [
    ("volumes", 2, 1),
    ("volumes", 4, 1),
    ("images", 2, 1),
    ("images", 4, 3),
])
def test_labels_of_volumes(tmp_path, kind, classes, expected):
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[2, 3, 1] = 3
    write_nifti(tmp_path / "m.nii", labels, affine("LPS"))
    mask = folders.read_mask(tmp_path / "m.nii", (4, 5, 6), kind, [0, 9], classes=classes)
    assert mask.max() == mask[1, 3, 2] == expected and (mask > 0).sum() == 1


def test_one_bright_voxel_is_clipped():
    values = np.random.default_rng(0).normal(100, 10, (5, 20, 24, 1)).astype(np.float32)
    spike = values.copy()
    spike[2, 4, 3] = 1e6
    plain = folders.network_input(Path("x.nii"), values, 24, 3, "volumes")[:, 1]
    clipped = folders.network_input(Path("x.nii"), spike, 24, 3, "volumes")[:, 1]
    assert np.abs(plain - clipped).mean() < 0.01
    low, high = np.percentile(values, [0.5, 99.5])
    wanted = folders.resize(np.clip(values[..., 0], low, high), 24)
    assert np.allclose(plain, standardised(wanted), atol=0.01)
