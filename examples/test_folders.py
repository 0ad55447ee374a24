"""Tests of examples/folders.py: what is read, what is told of, what is refused."""

import gzip
import math
import os
import re
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from examples import adapt_folder, folders, own_images
from examples.testing import (
    affine,
    cases_of,
    noise,
    same_bytes,
    save_image,
    splits_of,
    write_nifti,
    write_site,
    write_volumes,
)

IMAGE, MASK = "a/images/01.png", "a/masks/01.png"
VOLUME, DRAWN = "UCL/Case01.nii.gz", "UCL/Case01_segmentation.nii.gz"
FUNDUS = [255, 128, 0]  # background, rim, cup


# ---------------------------------------------------------------- files and folders to be read
def random_pixels(*shape):
    """Grey values or colours, uint8."""
    values = 128 + 40 * noise(*shape)
    return values.clamp(0, 255).byte().numpy()


def standardised(pixels):
    pixels = pixels.astype(np.float64)
    return (pixels - pixels.mean()) / pixels.std()


def disc(size, radius):
    """A mask (size, size) with 1 in a disc in its middle, else 0; uint8."""
    places = np.arange(size) - (size - 1) / 2
    distance = np.hypot(places, places[:, None])
    return (distance < radius).astype(np.uint8)


def write_split_site(root, name, **counts):
    for part, count in counts.items():
        write_site(root / name, part, count)


def warned(root, *settings):
    """What is loaded at 16 × 16, and the lines of warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = folders.load_folder(root, 16, *settings)
    lines = [str(warning.message) for warning in caught]
    return loaded, [line.replace(os.sep, "/") for line in lines]


def loading_fails(root, text, mask_values=None):
    """Loading ends in one line, in which the regular expression `text` is found."""
    with pytest.raises(ValueError) as caught:
        folders.load_folder(root, 32, mask_values)
    message = str(caught.value).replace(os.sep, "/")
    assert re.search(text, message) and "\n" not in message, message


def looked_at(root, dataset, size):
    """The shapes of a data set's files, and what resizing costs the masks."""
    _, sites = folders.find_sites(root)
    pairs = [pair for parts in sites.values() for pair in sum(parts.values(), [])]
    return own_images.look_at_files(pairs, dataset, size)


def read_one(path):
    """The pixels of a single image, (H, W, C)."""
    pixels, matrix = folders.read_file(path)
    assert pixels.dtype == np.float32 and len(pixels) == 1
    assert np.array_equal(matrix, np.eye(4))
    return pixels[0]


def read_grey(path):
    """The pixels of a single grey image, (H, W)."""
    pixels = read_one(path)
    assert pixels.shape[-1] == 1
    return pixels[:, :, 0]


def mask_in(file, shape, kind="images", values=None, classes=256):
    """The mask (H, W) of a single image of this shape (H, W)."""
    return folders.read_mask(file, (1, *shape), kind, values, classes=classes)[0]


# Changes of a folder, with which the tables of what is left out and what is refused are written.
def remove(root, pattern):
    found = list(root.glob(pattern))
    assert found
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def copy(root, old, new):
    if (root / old).is_dir():
        shutil.copytree(root / old, root / new)
    else:
        shutil.copy(root / old, root / new)


def rename(root, old, new):
    (root / old).rename(root / new)


def make_folder(root, name):
    (root / name).mkdir(parents=True)


def write(root, name, content=b"x"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def draw(root, pattern, pixels):
    """Draw the same in all files of this pattern, at least one."""
    found = list(root.glob(pattern))
    assert found
    for file in found:
        save_image(file, pixels)


# ---------------------------------------------------------------- splits and layouts
def test_what_is_known_of_folders(tmp_path):
    folder = write_site(tmp_path / "two words", "a", 3, size=(20, 24), values=(0, 255))
    draw(folder, "masks/00.png", np.zeros((20, 24), np.uint8))
    loaded = folders.load_folder(tmp_path / "two words", mask_values=[0, 255])
    assert isinstance(loaded, folders.FolderDataSet)
    assert (loaded.name, loaded.kind, loaded.unit) == ("two words", "images", "px")
    assert loaded.mask_values == [0, 255] and loaded.structures == {"class 1": (1,)}
    site, = loaded.sites
    assert site.name == "a" and set(site.spacing.values()) == {(1.0, 1.0)}
    shapes, scores = looked_at(tmp_path / "two words", loaded, 96)
    assert shapes == [(20, 24)] * 3
    assert len(scores) == 2 and min(scores) > 0.7  # one mask is empty
    split = site.everything
    assert split.images.shape == (3, 3, 96, 96) and split.images.dtype == torch.float32
    assert split.masks.shape == (3, 96, 96) and split.masks.dtype == torch.uint8


def test_grey_images_have_one_channel(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 4, grey=True)
    loaded = folders.load_folder(tmp_path, 32)
    assert (loaded.channels, loaded.classes, loaded.mask_values) == (1, 2, None)
    assert loaded.sites[0].everything.images.shape == (4, 1, 32, 32)
    assert len(loaded.fingerprint()) == 8  # which takes whole memory alone
    colour = random_pixels(32, 32, 3)
    save_image(tmp_path / "b/images/02.png", colour)
    loaded = folders.load_folder(tmp_path, 32)
    a, b = [site.everything for site in loaded.sites]
    assert loaded.channels == 3 and not a.stacks
    assert a.images.shape == b.images.shape == (4, 3, 32, 32)
    assert torch.equal(a.images[:, 0], a.images[:, 2])
    found = b.images[b.cases.index("images/02.png")]
    assert np.allclose(found.numpy(), standardised(colour).transpose(2, 0, 1), atol=1e-4)


def test_sites_without_splits_are_shuffled_and_cut(tmp_path):
    for site in ("b", "c"):
        write_site(tmp_path, site, 12)
    for seed in (0, 1):
        for site in folders.load_folder(tmp_path, 32, seed=seed).sites:
            names = [f"images/{number:02d}.png" for number in range(12)]
            data.random_for(seed, "folder", site.name).shuffle(names)
            assert site.everything.cases == names
            assert cases_of(site) == [7, 2, 3]


def test_images_keep_their_masks(tmp_path):
    folder = write_site(tmp_path, "a", 12)
    site, = folders.load_folder(tmp_path, 32).sites
    again, = folders.load_folder(tmp_path, 32, None, 0).sites
    assert same_bytes(site, again)
    split = site.everything
    for case, image, mask in zip(split.cases, split.images, split.masks):
        pixels = np.asarray(Image.open(folder / case)).transpose(2, 0, 1)
        assert np.allclose(image.numpy(), standardised(pixels), atol=1e-4)
        stored = Image.open(folder / case.replace("images", "masks"))
        assert np.array_equal(mask.numpy(), np.asarray(stored))


@pytest.mark.parametrize("validation", ["val", "Valid", "validation"])
def test_given_splits_are_kept(tmp_path, validation):
    counts = {"train": 3, validation: 1, "test": 2}
    write_split_site(tmp_path, "a", **counts)
    loaded, lines = warned(tmp_path)
    assert not lines
    for split, (part, count) in zip(splits_of(loaded.sites[0]), counts.items()):
        assert split.cases == [f"{part}/images/{number:02d}.png" for number in range(count)]


@pytest.mark.parametrize("seed, train, expected", [(0, 10, 2), (1, 12, 2), (0, 8, 2), (0, 2, 1)])
def test_a_fifth_of_train_validates(tmp_path, seed, train, expected):
    write_split_site(tmp_path, "a", train=train, test=2)
    loaded, lines = warned(tmp_path, None, seed)
    site, = loaded.sites
    names = [f"train/images/{number:02d}.png" for number in range(train)]
    data.random_for(seed, "folder", "a").shuffle(names)
    assert site.validation.cases == names[:expected] and not lines
    assert site.train.cases == names[expected:]
    assert site.test.cases == ["test/images/00.png", "test/images/01.png"]


@pytest.mark.parametrize("counts, emptied, text", [
    ({"train": 1, "test": 1}, None, "1 in train, 1 in test; .*2 or more in train without val"),
    ({"train": 5}, None, "5 in train; "),
    ({"test": 5}, None, "5 in test; "),
    ({"train": 5, "val": 2}, None, "5 in train, 2 in val; "),
    ({"train": 5, "val": 2, "test": 2}, "a/val/*/*", "5 in train, 0 in val, 2 in test; "),
])
def test_splits_that_lack_images(tmp_path, counts, emptied, text):
    write_split_site(tmp_path, "a", **counts)
    if emptied:
        remove(tmp_path, emptied)
    loading_fails(tmp_path, f"site 'a': {text}")


@pytest.mark.parametrize("old, new", [
    ("images", "Image"),
    ("masks", "mask"),
    ("masks", "label"),
    ("masks", "Labels"),
])
def test_other_names_of_folders(tmp_path, old, new):
    folder = write_site(tmp_path, "a", 4)
    expected, _ = warned(tmp_path)
    rename(folder, old, new)
    loaded, lines = warned(tmp_path)
    assert not lines and loaded.kind == "images"
    for split, before in zip(splits_of(loaded.sites[0]), splits_of(expected.sites[0])):
        assert torch.equal(split.images, before.images)
        assert torch.equal(split.masks, before.masks)


def test_capitals_and_other_types(tmp_path):
    a = write_site(tmp_path, "a", 4, grey=True)
    pixels = Image.open(a / "images/00.png").copy()
    truth = Image.open(a / "masks/00.png").copy()
    for name in ("A.png", "a.png", "B.PNG", "x.bmp", "t.tif", "u.tiff"):
        pixels.save(a / "images" / name)
        truth.save(a / "masks" / name)
    for name in ("j.jpg", "k.jpeg"):
        pixels.save(a / "images" / name)
        truth.save(a / "masks" / f"{name[0]}.png")  # the ending may be another one
    rename(a, "images", "Images")
    rename(a, "masks", "MASKS")
    loaded, lines = warned(tmp_path)
    split = loaded.sites[0].everything
    assert not lines and len(split.cases) == len([*(a / "Images").iterdir()])
    small = np.asarray(truth.resize((16, 16), Image.NEAREST))
    for case, mask in zip(split.cases, split.masks):
        if Path(case).stem.isalpha():
            assert np.array_equal(mask.numpy(), small)


PATIENTS = [f"patient{number // 3:02d}_slice{number % 3}" for number in range(6)]


@pytest.mark.parametrize("place, names, warns", [
    ("a", PATIENTS, True),
    ("a/train", PATIENTS, True),
    ("a", [name.upper() for name in PATIENTS], True),
    ("a", ["7-1", "7-2", "8-1", "8-2", "9-1", "9-2"], True),
    ("a", ["7.1", "7.2", "8.1", "8.2", "9.1", "9.2"], True),
    ("a", ["7 1", "7 2", "8 1", "8 2", "9 1", "9 2"], True),
    ("a", ["7-1", "8-1", "9-1", "10-1", "11-1", "12-1"], False),
    ("a", ["left_1", "left_2", "left_3", "right_1", "right_2", "right_3"], False),
    ("a", [f"image_{number:03d}" for number in range(6)], False),
    ("a", [f"ISIC2018_{number}" for number in range(6)], False),  # of a data set, not of a patient
    ("a", [f"{number}_h" for number in range(6)], False),
    ("a", ["1_h", "1_v", "2_h", "2_v", "3_h", "3_v"], False),
    ("a", [f"scan{number:02d}" for number in range(7, 13)], False),
])
def test_patients_that_a_shuffle_may_part_are_told(tmp_path, place, names, warns):
    write_site(tmp_path, place, 6)
    if place == "a/train":
        write_site(tmp_path, "a/test", 1)
    for folder in ("images", "masks"):
        for number, name in enumerate(names):
            rename(tmp_path / place / folder, f"{number:02d}.png", f"{name}.png")
    _, lines = warned(tmp_path)
    assert len(lines) == warns
    if warns:
        assert f"site 'a': if {names[0]}.png and {names[1]}.png show one patient" in lines[0]
        assert "folders train, val and test" in lines[0]


def test_other_layouts_are_told_what_is_expected(tmp_path):
    nnunet, prostate158 = tmp_path / "nnUNet", tmp_path / "prostate158"
    names = ["imagesTr/p_0000", "labelsTr/p"]
    for name in names:
        write_nifti(nnunet / f"{name}.nii.gz", np.ones((6, 5, 4)), affine("LPS"))
    for name in ("t2", "t2_anatomy_reader1"):
        write_nifti(prostate158 / f"020/{name}.nii.gz", np.ones((6, 5, 4)), affine("LPS"))
    for root in (nnunet, prostate158):
        loading_fails(root, "has no mask of its name.*CaseNN_segmentation.nii.gz")


def test_no_sites(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file.*nowhere"):
        folders.load_folder(tmp_path / "nowhere")
    make_folder(tmp_path, "other")
    loading_fails(tmp_path, "no sites found; known layouts")


@pytest.mark.parametrize("name, tool", [
    ("x.mha", "SimpleITK"),
    ("x.mhd", "SimpleITK"),
    ("x.NRRD", "SimpleITK"),
    ("x.dcm", "dcm2niix"),
    ("x.npy", "numpy and nibabel"),
    ("x.npz", "numpy and nibabel"),
    ("x.h5", "h5py and nibabel"),
    ("x.hdf5", "h5py and nibabel"),
    ("x.pgm", "pillow"),
    ("x.ppm", "pillow"),
    ("x.webp", "pillow"),
])
def test_formats_that_are_not_read_are_named(tmp_path, name, tool):
    write(tmp_path / "a", name)
    ending = Path(name).suffix.lower()
    advice = f"{ending} is not read: convert it to NIfTI or PNG by {tool}$"
    loading_fails(tmp_path, f"no sites found; known layouts: .*{advice}")
    write_site(tmp_path, "b", 4)
    _, lines = warned(tmp_path)
    line, = lines
    assert re.search(f"left out: 1 files .*{advice}", line)
    for file in (tmp_path / "b/masks").iterdir():
        file.rename(file.with_suffix(ending))
    loading_fails(tmp_path, f"00.png has no mask .*{advice}")


# ---------------------------------------------------------------- what is left out
@pytest.mark.parametrize("change, words, count, example", [
    (remove, ["a/images/0[45].png"], 2, "a/masks/04.png"),
    (write, ["a/images/notes.xml"], 1, "a/images/notes.xml"),
    (write, ["a/labels/boxes.txt"], 1, "a/labels/boxes.txt"),  # beside masks
    (write, ["9.png"], 1, "/9.png"),
    (write, ["c/train/9.png"], 1, "c/train/9.png"),
    (write, ["c/train.txt"], 1, "c/train.txt"),
    (write, ["a/test"], 1, "/a/test"),
    (write, ["empty/.DS_Store"], 1, "/empty"),
    (make_folder, ["empty"], 1, "/empty"),
    (make_folder, ["empty/pictures"], 1, "/empty/pictures"),
    (make_folder, ["a/holdout"], 1, "a/holdout"),
    (copy, ["a/images", "strange/pictures"], 6, "strange/pictures/00.png"),
    (copy, ["a/images", "a/images.old"], 6, "a/images.old/00.png"),
    (copy, ["a/masks/00.png", "a/images/00_segmentation.png"], 1, "images/00_segmentation.png"),
])
def test_what_is_left_out_is_told(tmp_path, change, words, count, example):
    write_site(tmp_path, "a", 6)
    write_split_site(tmp_path, "c", train=2, val=2, test=2)
    before, lines = warned(tmp_path)
    assert not lines
    change(tmp_path, *words)
    after, lines = warned(tmp_path)
    line, = lines
    assert line.startswith(f"left out: {count} files or empty folders")
    assert line.endswith(example)
    assert [site.name for site in after.sites] == ["a", "c"]
    assert same_bytes(before.sites[1], after.sites[1])


def test_all_that_is_left_out_is_one_line(tmp_path):
    root = tmp_path / ".cache"  # a hidden place hides nothing
    write_site(root, "a", 6)
    remove(root, "a/images/0[45].png")
    for name in ("a/images/notes.xml", "9.png", "b/.hidden"):
        write(root, name)
    _, lines = warned(root)
    line, = lines
    assert "left out: 5 files" in line


def test_hidden_files_are_neither_read_nor_told(tmp_path):
    folder = write_site(tmp_path, "a", 4)
    before, _ = warned(tmp_path)
    write_site(tmp_path, ".b", 4)
    for name in (".cache", "a/.git/config", "a/images/._00.png"):
        write(tmp_path, name)
    copy(folder, "images/00.png", "images/.00.png")
    after, lines = warned(tmp_path)
    assert not lines and len(after.sites) == 1
    assert same_bytes(before.sites[0], after.sites[0])


# ---------------------------------------------------------------- masks and their values
@pytest.mark.parametrize("values, mask_values", [
    ([0, 1, 2], None),
    ([0, 128, 255], [0, 128, 255]),
    ([255, 0, 128], [255, 0, 128]),
])
def test_masks_hold_classes_or_the_values_of_classes(tmp_path, values, mask_values):
    folder = write_site(tmp_path, "a", 5, values=values)
    loaded, lines = warned(tmp_path, mask_values)
    assert loaded.classes == 3 and loaded.mask_values == mask_values and not lines
    assert loaded.structures == {"class 1": (1,), "class 2": (2,)}
    split = loaded.sites[0].everything
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(np.array(values)[mask.numpy()], stored[1::2, 1::2])


def test_images_shrink_by_averaging_and_masks_by_choosing():
    stripes = np.zeros((1, 64, 64), np.float32)
    stripes[..., ::2] = 200
    inner = folders.resize(stripes, 8)[0, 1:-1, 1:-1]
    assert np.abs(inner - 100).max() < 2
    stairs = np.zeros((1, 64, 64), np.float32)
    stairs[..., 8:] = 1
    edge = folders.resize(stairs, 8)[0, 4]  # by a triangle, an eighth of it in each neighbour
    assert edge == pytest.approx([1 / 7, 7 / 8, 1, 1, 1, 1, 1, 1], abs=1e-4)
    labels = random_pixels(2, 12, 8).astype(np.int32) % 3
    chosen = folders.resize(labels, 4, Image.NEAREST)
    assert np.array_equal(chosen, labels[:, 1::3, 1::2])


def test_kinds_of_mask_files(tmp_path):
    indices = random_pixels(20, 24) % 3
    coloured = Image.fromarray(indices)
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "palette.png")
    save_image(tmp_path / "rgb.png", np.repeat(indices[:, :, None], 3, axis=2))
    for name in ("palette.png", "rgb.png"):
        assert np.array_equal(mask_in(tmp_path / name, (20, 24)), indices)


def test_grey_palettes_are_read_as_greys(tmp_path):
    mask = disc(64, 9)
    file = tmp_path / "m.png"
    Image.fromarray(255 * mask).quantize(2).save(file)
    stored = Image.open(file)
    assert stored.mode == "P" and stored.getpalette()[:6] == [255, 255, 255, 0, 0, 0]
    assert np.array_equal(mask_in(file, (64, 64), values=[0, 255]), mask)
    assert np.array_equal(read_grey(file), 255 * mask)  # as an image, one channel
    black, red, white = [0, 0, 0], [200, 0, 0], [255, 255, 255]
    stored.putpalette(white + black + black)  # the last one is not used
    stored.save(file)
    assert np.array_equal(mask_in(file, (64, 64), values=[0, 255]), mask)
    for palette in (black + red, black + black, black + white + red):
        stored.putpalette(palette)  # which shows no greys of its own: indices
        stored.save(file)
        assert np.array_equal(mask_in(file, (64, 64)), 1 - mask)


def test_files_with_an_alpha_channel(tmp_path):
    """It may be there, if it is opaque."""
    grey, opaque = disc(16, 5), np.full((16, 16), 255, np.uint8)
    hole = opaque.copy()
    hole[3, 4] = 254
    for channels in ([grey], [grey, grey, grey]):
        save_image(tmp_path / "m.png", np.dstack([*channels, opaque]))
        assert np.array_equal(mask_in(tmp_path / "m.png", (16, 16)), grey)
        assert np.array_equal(read_one(tmp_path / "m.png"), np.dstack(channels))
        save_image(tmp_path / "m.png", np.dstack([*channels, hole]))
        for as_mask in (False, True):
            with pytest.raises(ValueError, match="m.png: it is transparent in places; save it"):
                folders.read_file(tmp_path / "m.png", as_mask)


def test_masks_must_fit_their_network(tmp_path):
    file = tmp_path / "m.png"
    for classes in (2, folders.MOST_CLASSES):
        save_image(file, (classes - 1) * disc(32, 5))
        assert folders.read_mask(file, (1, 32, 32), classes=classes).max() == classes - 1
        save_image(file, classes * disc(32, 5))
        text = f"m.png: 2 values up to {classes}; expected are 0, 1 … {classes - 1}; "
        with pytest.raises(ValueError, match=text):
            folders.read_mask(file, (1, 32, 32), classes=classes)
    with pytest.raises(ValueError, match="m.png: .* expected are 0, 1 … 31; "):
        folders.read_mask(file, (1, 32, 32))
    with pytest.raises(ValueError, match=r"m.png: its size \(1, 32, 32\) .*\(1, 9, 9\)"):
        folders.read_mask(file, (1, 9, 9))


def test_sites_that_number_the_classes_otherwise(tmp_path):
    write_site(tmp_path, "a", 4, values=(0, 1))
    write_site(tmp_path, "b", 4, values=(0, 255))
    loading_fails(tmp_path, "b/masks/.*2 values up to 255.*--mask-values (0 255|255 0)$")
    loading_fails(tmp_path, "a/masks/.*not all among.*save the masks of all sites alike", [0, 255])
    loaded, lines = warned(tmp_path, [0, 1, 255])
    assert loaded.classes == 3
    assert "no site has masks of all 3 classes (a [0, 1]; b [0, 2])" in lines[0]
    loaded, _ = warned(tmp_path, [0, 1, 255, 9])  # which no mask holds
    assert list(loaded.structures) == ["class 1", "class 2", "class 3"]
    write_site(tmp_path, "c", 4, values=(0, 1, 255))
    for values in ([0, 1, 255], [0, 1, 255, 9]):
        assert not warned(tmp_path, values)[1]


def test_labels_that_vanish_by_resizing_are_told(tmp_path):
    """Of 32 × 32 pixels every second one is chosen, from the second one on."""
    folder = write_site(tmp_path, "a", 4)
    corner = np.zeros((32, 32), np.uint8)
    draw(folder, "masks/*", corner)
    corner[1, 1] = 1
    draw(folder, "masks/01.png", corner)
    corner[:] = np.roll(corner, -1, axis=0)
    draw(folder, "masks/00.png", corner)
    loaded, lines = warned(tmp_path)
    line, = lines
    assert line.startswith("1 of 4 masks lose a class when they become 16 × 16, such as")
    assert line.endswith("a/masks/00.png; choose a larger --size")
    _, scores = looked_at(tmp_path, loaded, 16)
    assert sorted(scores) == [0, 2 / 5]  # one pixel comes back as four


def test_what_a_size_costs_by_hand():
    one, two, three = {"one": (1,)}, {"two": (2,)}, {"three": (3,)}
    cost = own_images.dice_with_itself
    mask = np.zeros((1, 8, 8), np.int32)
    assert cost(mask, mask[:, ::2, ::2], one | two) is None
    mask[0, :, 4:] = 2
    assert cost(mask, mask[:, ::2, ::2], two) == 1  # its edges lie between the pixels
    mask[0, 0, 0] = 1
    assert cost(mask, mask, one | two) == 1
    small = mask[:, 1::2, 1::2]  # in which class 1 is lost, and class 2 is whole
    assert cost(mask, small, one | two) == 0.5
    assert cost(mask, small, {"both": (1, 2)}) == pytest.approx(2 * 32 / (33 + 32))
    wide = np.repeat(mask, 2, axis=2)
    assert cost(wide, small, two) == 1
    # A class that is not drawn is not counted, such as the cup of some fundus photographs.
    assert cost(mask, small, one | three) == 0


def test_masks_without_background_are_scored_too(tmp_path):
    """By what a size costs: the mean over classes 1 and 2, or of class 1 alone."""
    folder = write_site(tmp_path, "a", 3)
    draw(folder, "masks/00.png", 1 + np.eye(32, dtype=np.uint8))
    draw(folder, "masks/01.png", np.ones((32, 32), np.uint8))
    loaded, _ = warned(tmp_path)
    _, scores = looked_at(tmp_path, loaded, 16)
    assert len(scores) == 3 and np.isfinite(scores).all() and 1.0 in scores


# ---------------------------------------------------------------- masks of fundus photographs
def fundus_mask():
    mask = np.full((20, 24), 255, np.uint8)
    mask[4:16, 4:20] = 128
    mask[8:12, 8:14] = 0
    mask[4, 4:8] = (191, 192, 64, 63)
    return mask


def test_fundus_domains(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for number in range(count):
            place = tmp_path / f"Domain1/{part}/ROIs"
            save_image(place / f"image/{number}.png", random_pixels(20, 24, 3))
            save_image(place / f"mask/{number}.png", fundus_mask())
    loaded, lines = warned(tmp_path)
    assert not lines and loaded.kind == "fundus" and loaded.unit == "px"
    assert (loaded.classes, loaded.channels) == (3, 3)
    assert loaded.structures == {"disc": (1, 2), "cup": (2,)}
    assert loaded.mask_values == FUNDUS
    site, = loaded.sites
    assert cases_of(site) == [8, 2, 3]
    assert all(case.startswith("test/") for case in site.test.cases)
    small = site.train.masks[:1]
    assert small[0, 0, 0] == 0 and small[0, 8, 7] == 2
    mask = folders.read_mask(place / "mask/0.png", (1, 20, 24), "fundus", FUNDUS)
    expected = own_images.dice_with_itself(mask, small.numpy(), loaded.structures)
    assert looked_at(tmp_path, loaded, 16) == ([(20, 24)] * 13, [expected] * 13)
    for text, values in (("each value once", [255, 255, 0]),
                         ("three for fundus ROIs", [0, 255]),
                         ("three for fundus ROIs", [255, 128, 0, 1])):
        loading_fails(tmp_path, text, values)
    draw(tmp_path, "*/*/ROIs/mask/*", 255 - fundus_mask())
    given, _ = warned(tmp_path, [0, 127, 255])
    assert given.mask_values == [0, 127, 255]
    assert torch.equal(given.sites[0].train.masks, site.train.masks)
    loading_fails(tmp_path, "it holds 0 127 255; expected are background.*--mask-values 0 127 255$")
    draw(tmp_path, "*/*/ROIs/mask/*", np.full((20, 24), 255, np.uint8))
    loading_fails(tmp_path, r"all masks together hold \[0\]; expected are 0, 1 …")


def test_fundus_masks_hold_the_nearest_values(tmp_path):
    save_image(tmp_path / "m.png", fundus_mask())
    read = mask_in(tmp_path / "m.png", (20, 24), "fundus", FUNDUS)
    assert read[4, 4:8].tolist() == [1, 0, 1, 2]
    assert (read[0, 0], read[5, 5], read[9, 9]) == (0, 1, 2)


def rings(disc_radius, cup_radius):
    return disc(256, disc_radius) + disc(256, cup_radius)


@pytest.mark.parametrize("greys, classes, fits", [
    ((0, 1, 2), rings(80, 36), False),  # numbered
    ((0, 255, 255), rings(80, 36), False),  # the disc alone, white
    ((255, 0, 0), rings(80, 36), False),  # the disc alone, black
    ((0, 128, 255), rings(80, 36), False),  # inside out
    ((255, 155, 0), rings(80, 36), False),
    ((255, 155, 55), rings(80, 36), False),
    ((255, 128, 55), rings(80, 24), False),  # a cup of 3 % of the pixels
    ((255, 140, 0), rings(80, 36), True),
    (FUNDUS, rings(8, 6), True),
    (FUNDUS, rings(100, 95), True),  # a thin rim
    (FUNDUS, rings(40, 0), True),
    (FUNDUS, rings(0, 0), True),
    (FUNDUS, rings(155, 36), False),  # 31 % of the border are background
    (FUNDUS, rings(140, 36), True),  # 55 %, and in the following two
    (FUNDUS, rings(120, 36)[:, 50:-50], True),
    (FUNDUS, rings(120, 36)[50:-50], True),
])
def test_which_fundus_masks_are_read(tmp_path, greys, classes, fits):
    file = tmp_path / "m.png"
    save_image(file, np.array(greys, np.uint8)[classes])
    if fits:
        read = mask_in(file, classes.shape, "fundus", FUNDUS)
        assert np.array_equal(read, classes)
    else:
        held = " ".join(str(grey) for grey in sorted({*greys}))
        with pytest.raises(ValueError, match=f"m.png: it holds {held}; expected are background"):
            mask_in(file, classes.shape, "fundus", FUNDUS)


def test_smoothed_fundus_masks_are_read(tmp_path):
    classes = disc(256, 80) + disc(256, 40)
    values = np.array(FUNDUS, np.uint8)[classes]
    small = Image.fromarray(values).resize((64, 64), Image.BILINEAR)
    small.save(tmp_path / "m.png")
    assert len(np.unique(np.asarray(small))) > 20
    read = mask_in(tmp_path / "m.png", (64, 64), "fundus", FUNDUS)
    assert (read != classes[2::4, 2::4]).mean() < 0.03


# ---------------------------------------------------------------- kinds of image files
def test_kinds_of_image_files(tmp_path):
    pixels = random_pixels(20, 24, 3)
    palette = Image.fromarray(pixels).resize((4, 3)).resize((24, 20)).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_one(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))

    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    save_image(tmp_path / "deep.png", deep)
    assert np.array_equal(read_grey(tmp_path / "deep.png"), deep)

    bits = pixels[:, :, 0] > 99
    save_image(tmp_path / "bits.png", bits)
    assert np.array_equal(read_grey(tmp_path / "bits.png"), bits)


def test_what_a_decoder_warns_of_is_not_shown(tmp_path):
    palette = Image.fromarray(random_pixels(20, 24, 3)).quantize(4)
    palette.save(tmp_path / "p.png", transparency=b"\xff" * 4)  # of which pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_one(tmp_path / "p.png")
        assert folders.look_at(tmp_path / "p.png")[0] == 1


# ---------------------------------------------------------------- the list of what is read
def is_refused(file, found, as_mask=False):
    """Reading ends in one line that says what was found and what to do."""
    with pytest.raises(ValueError) as caught:
        folders.read_file(file, as_mask)
    kind = "a mask" if as_mask else "an image"
    assert str(caught.value) == (f"{file}: {found} is not read as {kind}; save the original as "
                                 "PNG, grey of 8 or 16 bits or RGB of 8")


def write_png(file, values, colour_type, bits):
    """A PNG of any depth, of which pillow writes but a few. values: (H, W, samples)."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, _ = values.shape
    rows = values.reshape(height, -1)
    if bits == 16:
        rows = rows.astype(">u2")
    else:
        single = np.unpackbits(rows[:, :, None].astype(np.uint8), axis=2)[:, :, -bits:]
        rows = np.packbits(single.reshape(height, -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header)
    if colour_type == 3:
        content += chunk(b"PLTE", bytes(range(3 * 2**bits)))
    content += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("colour_type, samples, bits, stored", [
    (0, 1, 1, None),
    (0, 1, 2, "L;2"),
    (0, 1, 4, "L;4"),
    (0, 1, 8, None),
    (0, 1, 16, None),
    (2, 3, 8, None),
    (2, 3, 16, "RGB;16B"),
    (3, 1, 1, None),
    (3, 1, 2, None),
    (3, 1, 4, None),
    (4, 2, 16, "LA;16B"),
    (6, 4, 16, "RGBA;16B"),
])
def test_kinds_of_png(tmp_path, colour_type, samples, bits, stored):
    file = tmp_path / "i.png"
    largest = 2**bits - 1
    values = (random_pixels(20, 24, samples).astype(int) * 997) & largest
    if samples in (2, 4):
        values[..., -1] = largest
    write_png(file, values, colour_type, bits)
    if stored:
        is_refused(file, f"PNG {stored}")
    elif colour_type == 3:
        assert np.array_equal(mask_in(file, (20, 24)), values[..., 0])
        assert np.array_equal(read_one(file), 3 * values + [0, 1, 2])  # the colours of its palette
    else:
        assert np.array_equal(read_one(file), values)


DEFLATE, OLD_DEFLATE, PACKBITS, ZSTD = 8, 32946, 32773, 50000  # numbers of TIFF's compressions
BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PREDICTOR = 258, 259, 262, 277, 317
UNKNOWN, NUMBERS = 338, 339  # what a further sample is; signed, unsigned or float
UNKNOWN_SAMPLE = "2 x 8-bit L, photometric 1, raw"


def write_tiff(file, pixels, order="<", other=None):
    """A TIFF of one strip. pixels: (H, W) or (H, W, 3). other: tags by their numbers."""
    height, width = pixels.shape[:2]
    samples = (other or {}).get(SAMPLES, pixels[0, 0].size)
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = {256: width, 257: height, BITS: 8 * pixels.itemsize, COMPRESSION: 1,
            PHOTOMETRIC: 2 if samples == 3 else 1, 273: 8, SAMPLES: samples, 278: height,
            NUMBERS: "uif".index(pixels.dtype.kind) + 1}
    tags |= other or {}
    if tags[COMPRESSION] in (DEFLATE, OLD_DEFLATE):
        content = zlib.compress(content)
    tags[279] = len(content)
    content += bytes(len(content) % 2)
    entries, further = b"", b""
    place = 8 + len(content) + 2 + 12 * len(tags) + 4  # of values that do not fit an entry
    for tag in sorted(tags):
        if samples == 3 and tag in (BITS, NUMBERS):
            entries += struct.pack(f"{order}HHII", tag, 3, 3, place + len(further))
            further += struct.pack(f"{order}HHH", *[tags[tag]] * 3)
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, tags[tag])
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(content))
    count = struct.pack(f"{order}H", len(tags))
    file.write_bytes(start + content + count + entries + bytes(4) + further)


@pytest.mark.parametrize("order, compression", [
    ("<", 1),
    (">", 1),
    ("<", DEFLATE),
    (">", DEFLATE),
])
@pytest.mark.parametrize("dtype", "u1 u2 u4 i1 i2 i4 f2 f4 f8".split())
def test_samples_of_tiff(tmp_path, dtype, order, compression):
    """Unsigned ones of 8 bits are read, and of 16 if their low byte comes first."""
    file = tmp_path / "t.tif"
    pixels = (random_pixels(20, 24) // 2).astype(dtype)
    write_tiff(file, pixels, order, {COMPRESSION: compression})
    if dtype == "u1" or dtype == "u2" and order == "<":
        assert np.array_equal(read_grey(file), pixels)
        assert np.array_equal(mask_in(file, (20, 24)), pixels)
    else:
        with pytest.raises(ValueError, match="t.tif: (TIFF .* is not read as an image|not a)"):
            folders.read_file(file)


@pytest.mark.parametrize("shape, dtype, other, found", [
    ((20, 24, 3), "u1", {}, None),
    ((20, 24, 3), "u2", {}, "3 x 16-bit RGB, photometric 2, raw"),
    ((20, 24), "u1", {PREDICTOR: 2}, "1 x 8-bit L, photometric 1, raw, predicted"),
    ((20, 24), "u1", {COMPRESSION: PACKBITS, PREDICTOR: 2},
     "1 x 8-bit L, photometric 1, packbits, predicted"),
    ((20, 24), "u1", {COMPRESSION: 7}, "1 x 8-bit L, photometric 1, jpeg"),
    ((20, 24), "u1", {COMPRESSION: ZSTD}, "1 x 8-bit L, photometric 1, zstd"),
    ((20, 24), "u1", {SAMPLES: 2, UNKNOWN: 0}, UNKNOWN_SAMPLE),  # the first would be read
    ((20, 24, 3), "u1", {PHOTOMETRIC: 6, COMPRESSION: DEFLATE},
     "3 x 8-bit RGB, photometric 6, tiff_adobe_deflate"),
    ((20, 24), "u1", {PHOTOMETRIC: 0}, None),
    ((20, 24), "u1", {COMPRESSION: OLD_DEFLATE}, None),
    ((20, 24), "u2", {PHOTOMETRIC: 0}, "1 x 16-bit I;16, photometric 0, raw"),
])
def test_ways_of_storing_in_tiff(tmp_path, shape, dtype, other, found):
    file = tmp_path / "t.tif"
    pixels = random_pixels(*shape).astype(dtype)
    write_tiff(file, pixels, "<", other)
    if found == UNKNOWN_SAMPLE:  # pillow itself refuses it in earlier versions
        with pytest.raises(ValueError, match=f"t.tif: (TIFF of {found} is not read|not a read)"):
            folders.read_file(file)
    elif found:
        is_refused(file, f"TIFF of {found}")
    else:
        expected = 255 - pixels if other.get(PHOTOMETRIC) == 0 else pixels  # 0 is white
        assert np.array_equal(read_one(file), expected.reshape(20, 24, -1))


def test_bits_in_which_zero_is_white(tmp_path):
    bits = disc(16, 5) > 0
    save_image(tmp_path / "m.tif", bits)
    entry = "<HHIHH"
    black_is_zero = struct.pack(entry, PHOTOMETRIC, 3, 1, 1, 0)
    content = (tmp_path / "m.tif").read_bytes()
    assert content.count(black_is_zero) == 1
    white_is_zero = struct.pack(entry, PHOTOMETRIC, 3, 1, 0, 0)
    (tmp_path / "m.tif").write_bytes(content.replace(black_is_zero, white_is_zero))
    assert np.array_equal(read_grey(tmp_path / "m.tif"), 1 - bits)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate",
                                         "packbits", "jpeg", "group4"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
def test_compressions_of_tiff(tmp_path, dtype, compression):
    file = tmp_path / "m.tif"
    pixels = random_pixels(20, 24).astype(dtype)
    try:
        Image.fromarray(pixels).save(file, compression=compression)
    except (OSError, RuntimeError):
        pytest.skip("pillow does not write this")
    if compression in ("jpeg", "group4"):
        with pytest.raises(ValueError, match=f"m.tif: TIFF .* {compression} is not read as"):
            folders.read_file(file)
    else:
        assert np.array_equal(read_grey(file), pixels)
        assert np.array_equal(mask_in(file, (20, 24), classes=2**16), pixels)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("stored, found, as_image", [
    ("JPEG", "JPEG L", True),
    ("MPO", "MPO L", True),
    ("GIF", "GIF", False),
    ("WEBP", "WEBP", False),
    ("JPEG2000", "JPEG2000", False),
    ("PPM", "PPM", False),
    ("TGA", "TGA", False),
])
def test_formats_go_by_content_not_by_name(tmp_path, ending, stored, found, as_image):
    """A lossy file is no mask, whatever it is called; some are no image either."""
    file = tmp_path / f"m{ending}"
    mask = Image.fromarray(255 * disc(32, 9))
    further = {"save_all": True, "append_images": [mask.rotate(90)]} if stored == "MPO" else {}
    try:
        mask.save(file, stored, **further)
    except OSError:
        pytest.skip("pillow does not write this here")
    is_refused(file, found, as_mask=True)
    if as_image:  # of two pictures the first
        assert np.abs(read_grey(file) - np.asarray(mask)).max() < 60
    else:
        is_refused(file, found)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_colours_are_red_green_and_blue(tmp_path, mode):
    image = Image.fromarray(random_pixels(20, 24, 3)).convert(mode)
    image.save(tmp_path / "i.tif")
    text = f"i.tif: TIFF of . x 8-bit ({mode}, |RGB, photometric 6, ).* is not read"
    with pytest.raises(ValueError, match=text):
        folders.read_file(tmp_path / "i.tif")
    if mode == "CMYK":
        image.save(tmp_path / "i.jpg")
        is_refused(tmp_path / "i.jpg", "JPEG CMYK;I")


def write_bmp(file, values, bits, palette=()):
    """values: (H, W) indices of grey values in a palette, or (H, W, 2 to 4) bytes."""
    rows = values.reshape(len(values), -1)
    if palette:
        single = np.unpackbits(rows[:, :, None].astype(np.uint8), axis=2)[:, :, -bits:]
        rows = np.packbits(single.reshape(len(rows), -1), axis=1)
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 4)])[::-1]  # from below
    colours = b"".join(bytes([grey, grey, grey, 0]) for grey in palette)
    start = 54 + len(colours)
    height, width = values.shape[:2]
    sizes = struct.pack("<IHHI", start + rows.size, 0, 0, start)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, len(palette), 0)
    file.write_bytes(b"BM" + sizes + header + colours + rows.astype(np.uint8).tobytes())


@pytest.mark.parametrize("bits, found", [
    (16, "BGR;15 16-bit"),  # a colour has five of them
    (24, None),
    (32, None),
])
def test_colours_of_bmp(tmp_path, bits, found):
    pixels = random_pixels(20, 24, bits // 8)
    write_bmp(tmp_path / "i.bmp", pixels, bits)
    if found:
        is_refused(tmp_path / "i.bmp", f"BMP {found}")
    else:  # blue comes first
        assert np.array_equal(read_one(tmp_path / "i.bmp"), pixels[:, :, 2::-1])


@pytest.mark.parametrize("bits, palette, found", [
    (1, [0, 255], None),
    (1, [255, 0], None),
    (4, [0, 255], "1 4-bit"),  # which pillow takes for 1 bit, in these and the next ones
    (8, [0, 255], "1 8-bit"),
    (4, range(16), "L 4-bit"),
    (4, [7, 9, 11], None),
    (8, range(256), None),
    (8, [7, 9, 11], None),
])
@pytest.mark.parametrize("width", [4, 24])
def test_palettes_of_bmp(tmp_path, bits, palette, found, width):
    file = tmp_path / "m.bmp"
    indices = random_pixels(20, width).astype(int) % len(palette)
    write_bmp(file, indices, bits, palette)
    if found:
        is_refused(file, f"BMP {found}", as_mask=True)
    else:
        greys = np.array(palette)[indices]
        values = [0, 1] if list(palette) == [0, 255] else None  # bits are read as 0 and 1
        expected = indices if values else greys
        assert np.array_equal(mask_in(file, (20, width), values=values), expected)


# ---------------------------------------------------------------- palettes
BLACK, RED_GREEN, WHITE = [0, 0, 0], [200, 0, 0, 0, 200, 0], [255, 255, 255]


def write_palette(file, indices, palette):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(indices)
    image.putpalette(palette)
    image.save(file)


def with_palettes(root, indices, *palettes):
    """A site whose masks have these palettes in turn."""
    folder = write_site(root, "a", 6)
    for number, file in enumerate(sorted((folder / "masks").iterdir())):
        write_palette(file, indices, palettes[number % len(palettes)])


def test_masks_with_the_same_palette(tmp_path):
    indices = disc(32, 12) + disc(32, 6)
    with_palettes(tmp_path, indices, BLACK + RED_GREEN, BLACK + RED_GREEN + WHITE)
    draw(tmp_path, "a/masks/03.png", indices)  # a grey mask has no palette to differ
    loaded, lines = warned(tmp_path)
    assert not lines
    assert np.array_equal(loaded.sites[0].train.masks[0], indices[1::2, 1::2])


def test_masks_whose_palettes_are_of_each_file(tmp_path):
    """As after `quantize`: black is 1 in one file, 2 in another."""
    indices = disc(32, 12) + disc(32, 6)
    text = r"a/masks/.*: . is \(.*\) in its palette, but \(.*\) in that of .*a/masks/.*grey images"
    with_palettes(tmp_path, indices, RED_GREEN + BLACK, BLACK + RED_GREEN)
    loading_fails(tmp_path, text)
    text = r"a/masks/.*: \(0, 0, 0\) is . in its palette, but . in that of .*a/masks/0.*grey images"
    with_palettes(tmp_path, indices, BLACK + RED_GREEN, BLACK + RED_GREEN)
    write_palette(tmp_path / "a/masks/01.png", 3 + 0 * indices, BLACK + RED_GREEN + BLACK)
    loading_fails(tmp_path, text)
    # One colour alone is grey, and yet it must be what it is elsewhere.
    with_palettes(tmp_path, indices, RED_GREEN + BLACK)
    write_palette(tmp_path / "a/masks/01.png", 0 * indices, BLACK)
    loading_fails(tmp_path, "a/masks/")


def test_an_index_needs_a_colour_of_its_own(tmp_path):
    indices = disc(32, 12) + disc(32, 6)
    with_palettes(tmp_path, indices, BLACK + RED_GREEN[:3] + BLACK)
    loading_fails(tmp_path, r"\(0, 0, 0\) is 2 in its palette, but 0")


def test_greys_of_palettes_may_have_any_order(tmp_path):
    indices = disc(32, 12)
    with_palettes(tmp_path, indices, BLACK + WHITE)
    for name in ("01", "02"):
        write_palette(tmp_path / f"a/masks/{name}.png", 1 - indices, WHITE + BLACK)
    loaded, lines = warned(tmp_path, [0, 255])
    assert not lines
    for mask in loaded.sites[0].everything.masks:
        assert np.array_equal(mask, indices[1::2, 1::2])


# ---------------------------------------------------------------- masks inside out
def fill(root, name, *values):
    """A site of six masks, with the first value outside, then a disc, then one within it."""
    folder = write_site(root, name, 6, size=(64, 64))
    classes = disc(64, 29) + (disc(64, 9) if len(values) > 2 else 0)  # most is not outside
    draw(folder, "masks/*", np.array(values, np.uint8)[classes])
    return classes[2::4, 2::4]


@pytest.mark.parametrize("values, advice", [
    ((255, 0), "255 0"),
    ((0, 255), "0 255"),
    ((255, 128, 0), "255 128 0"),
    ((128, 255, 0), "128 255 0"),
])
def test_what_lies_outside_is_advised_first(tmp_path, values, advice):
    """Following the advice trains on the organ; another order is refused, with the advice."""
    classes = fill(tmp_path, "a", *values)
    loading_fails(tmp_path, f"values up to 255; .*background first: --mask-values {advice}$")
    given = [int(word) for word in advice.split()]
    if len(values) == 2:
        loaded, _ = warned(tmp_path, given)
        assert np.array_equal(loaded.sites[0].train.masks[0], classes)
    loading_fails(tmp_path, "site 'a': 0 % of the border pixels of its masks are background.*"
                  f"--mask-values {advice}; or else save them as classes 0, 1 …$", given[::-1])


def test_masks_that_fill_the_border_may_be_meant(tmp_path):
    """One site is inside out, which the other does not hide; as classes they are taken."""
    fill(tmp_path, "b", 0, 255)
    fill(tmp_path, "c", 255, 0)
    loading_fails(tmp_path, "site 'c': .*--mask-values 255 0", [0, 255])
    classes = fill(tmp_path, "b", 1, 0)
    fill(tmp_path, "c", 1, 0)
    loaded, lines = warned(tmp_path)
    assert np.array_equal(loaded.sites[0].train.masks[0], 1 - classes)
    assert [line.split(";")[0] for line in lines] == [
        f"site '{name}': 0 % of the border pixels of its masks are background, they may be inside "
        "out" for name in "bc"]


@pytest.mark.parametrize("share, fits", [(0.08, False), (0.12, True)])
def test_a_tenth_of_the_border_is_background(tmp_path, share, fits):
    folder = write_site(tmp_path, "a", 4, size=(32, 32))
    mask = np.full((32, 32), 255, np.uint8)
    mask[:round(128 * share) + 1, 0] = 0  # a corner belongs to two edges
    draw(folder, "masks/*", mask)
    if fits:
        warned(tmp_path, [0, 255])
    else:
        loading_fails(tmp_path, "of the border pixels of its masks are background", [0, 255])


def test_volumes_inside_out(tmp_path):
    write_volumes(tmp_path, {"UCL": 4})
    for number in range(4):
        mask = np.ones((24, 20, 5), np.uint8)
        mask[8:16, 6:12] = 0
        drawn, = (tmp_path / "UCL").glob(f"Case{number:02d}_*")
        write_nifti(drawn, mask, affine("LPS"))
    loading_fails(tmp_path, "site 'UCL': 0 % of the border .*; save 0 outside of the organ$")


# ---------------------------------------------------------------- patients
def whose(file):
    return own_images.patient_of(file, r"^(p\d+)")


def with_patients(root, site, patients, images):
    folder = write_site(root, site, patients * images)
    for number in range(patients * images):
        name = f"p{number // images}_{number % images}.png"
        for place in ("images", "masks"):
            rename(folder / place, f"{number:02d}.png", name)


@pytest.mark.parametrize("images, counts", [(1, [7, 2, 3]), (3, [21, 6, 9])])
def test_images_of_a_patient_stay_together(tmp_path, images, counts):
    with_patients(tmp_path, "a", 12, images)
    for seed in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing to warn of
            site, = folders.load_folder(tmp_path, 16, None, seed, whose).sites
        assert cases_of(site) == counts
        order = [f"p{number}" for number in (0, 10, 11, *range(1, 10))]  # as file names go
        data.random_for(seed, "folder", "a").shuffle(order)
        found = [whose(Path(case)) for case in site.everything.cases]
        assert list(dict.fromkeys(found)) == order


def test_a_fifth_of_the_patients_validates(tmp_path):
    with_patients(tmp_path, "a/train", 5, 2)
    with_patients(tmp_path, "a/test", 1, 2)
    for file in (tmp_path / "a/test").rglob("p*.png"):
        file.rename(file.with_name(file.name.replace("p0", "p9")))
    site, = folders.load_folder(tmp_path, 16, patient_of=whose).sites
    assert cases_of(site) == [8, 2, 2]
    assert not {whose(Path(case)) for case in site.train.cases} & {
        whose(Path(case)) for case in site.validation.cases}


def test_patients_in_two_folders_are_refused(tmp_path):
    with_patients(tmp_path, "a/train", 3, 2)
    with_patients(tmp_path, "a/test", 1, 2)
    with pytest.raises(ValueError, match="site 'a': patient p0 is in train and in test; move the"):
        folders.load_folder(tmp_path, 16, patient_of=whose)


def test_too_few_patients(tmp_path):
    with_patients(tmp_path, "a", 2, 4)
    with pytest.raises(ValueError, match="2 in all; of images, or of patients if they are told, 3"):
        folders.load_folder(tmp_path, 16, patient_of=whose)


@pytest.mark.parametrize("pattern", [r"(q\d)", r"(q)?p", "()p"])
def test_patients_that_are_not_in_the_name(pattern):
    with pytest.raises(ValueError, match="p1_1.png: --patients .* finds no patient in its name"):
        own_images.patient_of(Path("p1_1.png"), pattern)


# ---------------------------------------------------------------- orientation of images
ORIENTATIONS = [  # by EXIF's numbers: whether rows become columns, then the steps down and right
    (1, False, 1, 1),
    (2, False, 1, -1),
    (3, False, -1, -1),
    (4, False, -1, 1),
    (5, True, 1, 1),
    (6, True, 1, -1),
    (7, True, -1, -1),
    (8, True, -1, 1),
]


@pytest.mark.parametrize("orientation, transposed, down, right", ORIENTATIONS)
@pytest.mark.parametrize("name, dtype", [
    ("m.png", np.uint8),
    ("m.jpg", np.uint8),
    ("m.tif", np.uint8),
    ("m.tif", np.uint16),
])
def test_images_are_turned_as_they_say(tmp_path, orientation, transposed, down, right, name, dtype):
    pattern = np.array([[1, 0, 0], [1, 1, 0]])
    pixels = np.kron(255 * pattern, np.ones((8, 8)))  # JPEG keeps such blocks
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels.astype(dtype)).save(tmp_path / name, exif=exif, quality=100)
    turned = pixels.T if transposed else pixels
    turned = turned[::down, ::right]
    assert np.array_equal(read_grey(tmp_path / name), turned)
    if name != "m.jpg":
        assert np.array_equal(mask_in(tmp_path / name, turned.shape, classes=256), turned)


def turn(file, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.open(file).copy()
    image.save(file, exif=exif)


@pytest.mark.parametrize("image, mask, fits", [
    (3, 1, False),  # of the same size, but upside down
    (6, 1, False),
    (1, 3, False),
    (3, 4, False),
    (6, 6, True),
    (1, 1, True),
    (9, 0, True),  # which are no turns
])
def test_an_image_and_its_mask_are_turned_alike(two_sites, image, mask, fits):
    before, _ = warned(two_sites)
    turn(two_sites / IMAGE, image)
    turn(two_sites / MASK, mask)
    if fits:
        after, _ = warned(two_sites)
        assert (image == 6) != same_bytes(before.sites[0], after.sites[0])
    else:
        loading_fails(two_sites, f"mask .*{MASK}: EXIF turns it otherwise .*save both upright")


# ---------------------------------------------------------------- volumes
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
    assert looked_at(tmp_path, loaded, 16)[0] == [(5, 20, 24)] * 12
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
    """They are cases of their own; names like those of slices are no reason to warn."""
    for part, spacing in (("train", 1.0), ("test", 2.0)):
        for number, name in enumerate(["p1_1", "p1_2", "p2_1"]):
            values = noise(6, 6, 2, seed=number).numpy()
            matrix = affine("LPS", (spacing, 1, 1))
            place = tmp_path / "UCL" / part
            write_nifti(place / f"images/{name}.nii.gz", values, matrix)
            write_nifti(place / f"masks/{name}.nii.gz", (values > 0) * 1.0, matrix)
    loaded, lines = warned(tmp_path)
    site, = loaded.sites
    assert not lines and [len(set(split.cases)) for split in splits_of(site)] == [2, 1, 3]
    assert len(site.spacing) == 6
    assert site.spacing["test/images/p1_1.nii.gz"][2] == pytest.approx(2 * 6 / 16)
    assert site.spacing["train/images/p1_1.nii.gz"][2] == pytest.approx(6 / 16)


def test_volumes_of_one_slice(tmp_path):
    write_volumes(tmp_path, {"UCL": 6}, shape=(24, 20, 1))
    loading_fails(tmp_path, r"all masks together hold \[0\]")
    write_nifti(tmp_path / DRAWN, np.eye(24, 20, dtype=np.uint8)[..., None], affine("LPS"))
    loaded, lines = warned(tmp_path)
    assert not lines
    stack = loaded.sites[0].train.images[0]
    assert torch.equal(stack[0], stack[1]) and torch.equal(stack[1], stack[2])
    remove(tmp_path, "UCL/Case02.nii.gz")
    write(tmp_path, "UCL/notes.txt")
    _, lines = warned(tmp_path)
    line, = lines
    assert "left out: 2 files" in line and "Case02_Segmentation.nii.gz" in line
    loading_fails(tmp_path, "--mask-values: none for volumes", [0, 1])


def test_volumes_without_nibabel(tmp_path, monkeypatch):
    write_volumes(tmp_path, {"UCL": 3})
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match="Case.*pip install nibabel"):
        folders.load_folder(tmp_path, 16)


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
    body = noise(4, 5, 6, dtype=torch.float32).numpy()  # towards S, P, L
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
    assert folders.voxel_size(found) == pytest.approx((3.0, 0.6, 0.5), abs=1e-5)
    (tmp_path / "m.nii.gz").write_bytes(adapt_folder.mask_volume(body > 0.5, file))
    written = nibabel.load(tmp_path / "m.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), stored > 0.5)
    assert np.allclose(written.affine, matrix, atol=1e-5)
    assert written.get_data_dtype() == np.uint8
    mask = folders.read_mask(tmp_path / "m.nii.gz", (4, 5, 6), "volumes", None, found)
    assert np.array_equal(mask, body > 0.5)


@pytest.mark.parametrize("degrees", [45, 135, 225, 315])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "SPL", "PSR"])
def test_masks_lie_where_their_header_says(tmp_path, codes, degrees):
    """Between two axes the rounding of a quaternion and of a matrix may choose another one."""
    nibabel = pytest.importorskip("nibabel")
    matrix = affine(codes, (0.5, 0.6, 3.0), math.radians(degrees))
    values = noise(6, 5, 4, dtype=torch.float32).numpy()
    image = nibabel.Nifti1Image(values, matrix)
    image.set_qform(None, 0)
    mask = nibabel.Nifti1Image((values > 0).astype(np.uint8), matrix)
    mask.set_sform(None, 0)
    mask.set_qform(matrix, 1)
    nibabel.save(image, tmp_path / "v.nii")
    nibabel.save(mask, tmp_path / "m.nii")
    voxels, own = folders.read_file(tmp_path / "v.nii")
    shape = voxels.shape[:3]
    read = folders.read_mask(tmp_path / "m.nii", shape, "volumes", None, own)
    assert np.array_equal(read, voxels[..., 0] > 0)


def test_a_quaternion_that_is_none(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = nibabel.Nifti1Image(ONES, affine("LPS"))
    volume.header["qform_code"], volume.header["quatern_b"] = 1, 1
    volume.header["quatern_c"] = 0.001  # longer than 1 by a rounding
    content = volume.header.binaryblock + bytes(4) + ONES.tobytes()
    (tmp_path / "v.nii").write_bytes(content)
    with pytest.raises(ValueError, match="v.nii: not a readable file .w2 should be positive"):
        folders.read_file(tmp_path / "v.nii")


def test_volumes_of_one_frame(tmp_path):
    values = noise(6, 5, 4, dtype=torch.float32).numpy()
    for name, stored in (("3.nii", values), ("4.nii", values[..., None])):
        write_nifti(tmp_path / name, stored, affine("RAS"))
    three, matrix = folders.read_file(tmp_path / "3.nii")
    four, same_matrix = folders.read_file(tmp_path / "4.nii")
    assert np.array_equal(three, four) and np.array_equal(matrix, same_matrix)
    mask = three[..., 0] > 0
    (tmp_path / "m.nii.gz").write_bytes(adapt_folder.mask_volume(mask, tmp_path / "4.nii"))
    read = folders.read_mask(tmp_path / "m.nii.gz", (4, 5, 6), "volumes", None, matrix)
    assert np.array_equal(read, mask)


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("micron", 1000), ("meter", 0.001)])
def test_voxels_are_measured_in_the_headers_unit(tmp_path, unit, factor):
    nibabel = pytest.importorskip("nibabel")
    matrix = affine("LPS")
    write_nifti(tmp_path / "m.nii", np.ones((6, 5, 4), np.uint8), matrix)
    matrix[:3] *= factor
    volume = nibabel.Nifti1Image(np.ones((6, 5, 4)), matrix)
    volume.header.set_xyzt_units(unit, "sec")
    nibabel.save(volume, tmp_path / "v.nii")
    values, found = folders.read_file(tmp_path / "v.nii")
    assert values.dtype == np.float32
    assert folders.voxel_size(found) == pytest.approx((3.0, 0.6, 0.5), rel=1e-5)
    assert folders.read_mask(tmp_path / "m.nii", (4, 5, 6), "volumes", None, found).all()


@pytest.mark.parametrize("columns, rows, slices, stretch, fits", [
    (4.7, 0, 0, 1, False),
    (0.6, 0, 0, 1, False),
    (0, -0.6, 0, 1, False),
    (0, 0, 0.6, 1, False),
    (0.4, -0.4, 0.4, 1, True),
    (0, 0, 0, 1.03, False),  # at the end of 24 columns
    (0, 0, 0, 1.01, True),
])
def test_masks_lie_within_half_a_voxel(tmp_path, columns, rows, slices, stretch, fits):
    matrix = affine("LPS", (0.6, 0.7, 3))
    moved = matrix.copy()
    moved[:3, 3] += matrix[:3, :3] @ (columns, rows, slices)
    moved[:3, 0] *= stretch
    write_nifti(tmp_path / "v.nii", np.ones((24, 20, 5)), matrix)
    write_nifti(tmp_path / "m.nii", np.ones((24, 20, 5)), moved)
    _, own = folders.read_file(tmp_path / "v.nii")
    if fits:
        assert folders.read_mask(tmp_path / "m.nii", (5, 20, 24), "volumes", None, own).all()
    else:
        with pytest.raises(ValueError, match="m.nii: its affine is not its volume's; resample it"):
            folders.read_mask(tmp_path / "m.nii", (5, 20, 24), "volumes", None, own)


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


def test_volumes_of_grey_values(tmp_path):
    """Of masks with more classes in NIfTI the grey values are used, if they are no classes."""
    labels = np.array([0, 128, 255])[np.arange(120).reshape(6, 5, 4) % 3]
    file = tmp_path / "m.nii"
    for stored in (labels, labels // 127):
        write_nifti(file, stored.astype(np.uint8), affine("LPS"))
        read = folders.read_mask(file, (4, 5, 6), "images", [0, 128, 255], classes=3)
        voxels, _ = folders.read_file(file)
        assert np.array_equal(np.unique(stored)[read], voxels[..., 0])
    text = "m.nii: 3 values up to 255; .* --mask-values "
    write_nifti(file, labels.astype(np.uint8), affine("LPS"))
    with pytest.raises(ValueError, match=text):
        folders.read_mask(file, (4, 5, 6), "images", classes=3)


def test_a_scale_in_the_header_is_no_fraction(tmp_path):
    """Labels that nibabel has stored as scaled integers come back a little off."""
    nibabel = pytest.importorskip("nibabel")
    labels = np.arange(120).reshape(6, 5, 4) % 7 / 1
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels, affine("LPS"), header), tmp_path / "m.nii")
    stored = nibabel.load(tmp_path / "m.nii").get_fdata()
    assert 0 < np.abs(stored - labels).max() < 0.015
    read = folders.read_mask(tmp_path / "m.nii", (4, 5, 6), classes=7)
    shown, _ = folders.read_file(tmp_path / "m.nii")
    assert np.array_equal(read, shown[..., 0].round())


# ---------------------------------------------------------------- single files
@pytest.mark.parametrize("name, expected, volume", [
    ("x.png", "x", False),
    ("x.1.tiff", "x.1", False),
    ("x.1.nii", "x.1", True),
    ("x.1.NII.GZ", "x.1", True),
    ("x.tar.gz", "x.tar", False),
])
def test_names_of_files(name, expected, volume):
    path = Path("folder.nii") / name
    assert folders.stem(path) == expected and folders.is_volume(path) == volume


@pytest.mark.parametrize("error, text", [
    (MemoryError(), "MemoryError"),
    (OSError("one\n  two"), "one two"),
])
def test_what_a_decoder_raises_becomes_one_line(tmp_path, monkeypatch, error, text):
    def fail(path, as_mask):
        raise error

    monkeypatch.setattr(folders, "read_image", fail)
    with pytest.raises(ValueError, match=rf"x.png: not a readable file \({text}\); replace or"):
        folders.read_file(tmp_path / "x.png")


def test_images_are_paired_with_masks_or_none(tmp_path):
    def paired(masks):
        """The names of the images, and of the masks."""
        names = []
        for image, mask in folders.pair_up(tmp_path / "a/images", masks):
            names.append((image.name, mask and mask.name))
        return dict(names)

    folder = write_site(tmp_path, "a", 3)
    images, masks = folder / "images", folder / "masks"
    rename(masks, "01.png", "spare.PNG")
    rename(masks, "02.png", "02_Segmentation.png")
    for name in ("notes.txt", ".hidden.png"):
        write(images, name)
    in_masks = {"00.png": "00.png", "01.png": None, "02.png": "02_Segmentation.png"}
    unlabelled = dict.fromkeys(in_masks)
    assert paired(masks) == in_masks
    assert paired(None) == unlabelled

    copy(folder, "masks/00.png", "images/01_segmentation.png")
    assert paired(images) == unlabelled | {"01.png": "01_segmentation.png"}
    assert paired(None) == unlabelled
    assert paired(masks) == in_masks

    rename(images, "01_segmentation.png", "x_segmentation.png")  # a mask, whatever lies beside it
    rename(masks, "spare.PNG", "x_segmentation.PNG")
    assert paired(masks) == in_masks
    assert paired(images) == paired(None) == unlabelled

    rename(images, "x_segmentation.png", "x_segmentation_2.png")  # an image anywhere
    assert paired(None) == unlabelled | {"x_segmentation_2.png": None}


def test_names_are_compared_composed(tmp_path):
    """An accent may be a letter of its own, as some systems write it."""
    folder = write_site(tmp_path, "a", 4)
    composed, apart = "\u00e9", "e\u0301"
    rename(folder / "images", "01.png", f"{composed}.png")
    rename(folder / "masks", "01.png", f"{apart}.png")
    rename(folder / "images", "02.png", f"{apart}2.png")
    rename(folder / "masks", "02.png", f"{composed}2_segmentation.png")
    loaded, lines = warned(tmp_path)
    assert not lines and len(loaded.sites[0].everything.masks) == 4
    copy(folder, f"images/{composed}.png", f"images/{apart}.png")
    if len([*(folder / "images").iterdir()]) == 5:  # not where a file system composes them itself
        loading_fails(tmp_path, "mean the same; keep one")


def test_what_a_network_sees_of_an_image():
    pixels = noise(1, 8, 8, 3).float().numpy()
    seen = folders.network_input(Path("x.png"), pixels, 8, 3, "images")
    assert seen.dtype == np.float32
    assert np.allclose(seen[0], standardised(pixels[0]).transpose(2, 0, 1), atol=1e-5)
    grey = pixels[..., 1:2]
    seen = folders.network_input(Path("x.png"), np.repeat(grey, 3, axis=3), 8, 1, "images")
    assert np.allclose(seen[0, 0], standardised(grey[0, ..., 0]), atol=1e-5)
    in_colour = folders.network_input(Path("x.png"), grey, 8, 3, "images")
    assert np.array_equal(in_colour, np.repeat(seen, 3, axis=1))


def test_what_a_network_sees_of_a_volume():
    volume = noise(4, 8, 8, 1).float().numpy()
    stacks = folders.network_input(Path("x.nii"), volume, 8, 3, "volumes")
    for kind in ("volumes", "images"):
        single = folders.network_input(Path("x.NII.GZ"), volume, 8, 1, kind)
        assert single.shape == (4, 1, 8, 8) and stacks.shape == (4, 3, 8, 8)
    padded = single[[0, 0, 1, 2, 3, 3], 0]  # the outer slices are their own neighbours
    for number in range(4):
        assert np.array_equal(stacks[number], padded[number:number + 3])


def test_bright_and_dark_voxels_are_clipped():
    values = 100 + 10 * noise(5, 20, 24, 1).float().numpy()
    spiked = values.copy()
    spiked[2, 4, 3] = 1e6
    spiked[1, 4, 3] = -1e6
    plain = folders.network_input(Path("x.nii"), values, 24, 3, "volumes")[:, 1]
    clipped = folders.network_input(Path("x.nii"), spiked, 24, 3, "volumes")[:, 1]
    assert np.abs(plain - clipped).mean() < 0.01
    low, high = np.percentile(values, [0.5, 99.5])
    wanted = folders.resize(np.clip(values[..., 0], low, high), 24)
    assert np.allclose(plain, standardised(wanted), atol=0.01)


@pytest.mark.parametrize("name, channels, kind", [
    ("x.png", 1, "images"),
    ("x.png", 1, "simulated"),
    ("x.png", 3, "volumes"),
    ("x.nii", 3, "fundus"),
])
def test_what_a_network_refuses(name, channels, kind):
    pixels = noise(1, 8, 8, 3).float().numpy()
    with pytest.raises(ValueError, match=f"{name}: it has 3 channels, the run was .* {kind} "):
        folders.network_input(Path(name), pixels, 8, channels, kind)


def test_masks_at_the_size_of_the_file_by_hand():
    first = torch.tensor([0.0, 0.8])  # of class 1, in two pixels side by side
    classes = torch.stack([1 - first, first])
    probabilities = torch.stack([classes, classes.flip(1)])[:, :, None]
    masks, maps = adapt_folder.at_own_size(probabilities, (2, 4))
    assert masks.dtype == np.uint8 and maps.dtype == np.float16
    assert masks.tolist() == [[[0, 0, 1, 1]] * 2, [[1, 1, 0, 0]] * 2]
    expected = np.tile([0, 0.2, 0.6, 0.8], (2, 1))
    assert np.allclose(maps[0], [1 - expected, expected], atol=1e-3)
    assert np.allclose(maps[1], maps[0, ..., ::-1])


@pytest.mark.parametrize("version", ["Nifti1Image", "Nifti2Image"])
def test_written_masks_are_like_their_volume(tmp_path, version):
    nibabel = pytest.importorskip("nibabel")
    kind = getattr(nibabel, version)
    image = kind(np.ones((4, 4, 2), np.int16), affine("LPS"))
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_min"], image.header["cal_max"] = 100, 800
    nibabel.save(image, tmp_path / "v.nii")
    content = adapt_folder.mask_volume(np.ones((2, 4, 4)), tmp_path / "v.nii")
    assert content[4:8] == bytes(4)  # no time: the same mask gives the same bytes
    (tmp_path / "m.nii.gz").write_bytes(content)
    written = nibabel.load(tmp_path / "m.nii.gz")
    assert type(written) is kind and (written.dataobj.get_unscaled() == 1).all()
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert written.header["cal_min"] == written.header["cal_max"] == 0  # the grey window


# ---------------------------------------------------------------- what is refused: folders
@pytest.fixture
def two_sites(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 5)
    return tmp_path


@pytest.mark.parametrize("change, words, text", [
    (remove, [MASK], "a/images/01.png has no mask of its name; add it"),
    (remove, ["a/masks"], "a/images/00.png has no mask"),
    (remove, ["a/*/*"], "site 'a': 0 in all; of images, or of patients.*, 3 or more"),
    (remove, ["a/*/0[234].png"], "site 'a': 2 in all; of images, .*, 3 or more"),
    (write_site, ["a/train", 3], "site 'a': 5 in all, 3 in train; "),
    (rename, ["a", "a" * 221], "a site cannot be called .*; rename it, in at most 220 bytes"),
    (copy, [IMAGE, f"a/images/{'é' * 109}.png"], "é.png: its name is longer than 220 bytes"),
    (rename, ["a", "a\nb"], r"a site cannot be called 'a\\nb'; rename it"),
    (rename, ["a", "global"], "a site cannot be called 'global'; rename it"),
    (rename, ["a", "All"], "a site cannot be called 'All'; rename it"),
    (rename, ["a", "none"], "a site cannot be called 'none'; rename it"),
    (copy, [IMAGE, "a/images/01.jpg"], "01.png and 01.jpg mean the same; keep one"),
    (copy, [MASK, "a/masks/01.gif"], "a/masks/01.png and 01.gif mean the same; keep one"),
    (copy, [MASK, "a/masks/01_segmentation.png"], "01_segmentation.png and 01.png mean the same"),
    (copy, ["a/images", "a/image"], "a/images? and images? mean the same; keep one"),
    (draw, ["*/masks/*", np.zeros((32, 32), np.uint8)], r"masks/.*hold \[0\];.*--mask-values"),
    (write_site, ["c/train/ROIs", 3], "different layouts; known layouts"),
])
def test_folders_that_cannot_be_used(two_sites, change, words, text):
    change(two_sites, *words)
    loading_fails(two_sites, text)


def test_a_grey_value_given_twice(two_sites):
    loading_fails(two_sites, "--mask-values: list each value once", [0, 1, 1])


# ---------------------------------------------------------------- what is refused: volumes
def write_volume(root, name, values, matrix=affine("LPS")):
    write_nifti(root / name, values, matrix)


def cut_short(root, name):
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[:200])


def change_header(root, name, place, *values):
    """Write bytes from this place on."""
    content = bytearray(gzip.decompress((root / name).read_bytes()))
    content[place:place + len(values)] = bytes(values)
    (root / name).write_bytes(gzip.compress(content))


def without_direction(root, name):
    import nibabel
    header = nibabel.Nifti1Header()
    header.set_data_shape((24, 20, 5))
    header["sform_code"] = 1
    header["srow_x"][0] = header["srow_y"][1] = 1
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 5)), None, header), root / name)


ONES = np.ones((24, 20, 5), np.uint8)


@pytest.mark.parametrize("change, words, text", [
    (remove, [DRAWN], "Case01.nii.gz has no mask.*add it"),
    (copy, [VOLUME, "UCL/Case01.nii"], "Case01.nii.* mean the same; keep one"),
    (write_site, ["photographs", 4], "different layouts; known layouts"),
    (cut_short, [VOLUME], f"{VOLUME}: not a readable file"),
    (write, [VOLUME, b"text"], f"{VOLUME}: not a readable file"),
    (write_volume, [VOLUME, ONES * math.nan], f"{VOLUME}: it holds values that are not finite"),
    (write_volume, [VOLUME, np.ones((24, 20, 5, 2))], r"three dimensions.*\(24, 20, 5, 2\)"),
    (write_volume, [VOLUME, np.ones((24, 20, 1, 1, 3))], r"three dim.*\(24, 20, 1, 1, 3\)"),
    (write_volume, [VOLUME, np.ones((24, 20))], r"Case01.nii.gz: .*convert it|not a readable"),
    (write_volume, [VOLUME, ONES * np.complex64(1j)], f"{VOLUME}: real numbers.*found complex64"),
    (write_volume, [VOLUME, ONES.astype([(c, "u1") for c in "RGB"])], f"{VOLUME}: real numbers"),
    (write_volume, [DRAWN, ONES[..., :4]], rf"{DRAWN}: .*\(4, 20, 24\).*\(5, 20, 24\)"),
    (write_volume, [DRAWN, ONES, affine("LPS", (1, 1, 3))], f"{DRAWN}: its affine.*resample"),
    (write_volume, [DRAWN, ONES, affine("LPS", tilt=0.4)], f"{DRAWN}: its affine.*resample"),
    (without_direction, [VOLUME], f"{VOLUME}: .*three dimensions, each with a direction"),
    (change_header, [VOLUME, 70, 77], f"{VOLUME}: not a readable file"),  # its type
    (change_header, [VOLUME, 254, 99], f"{VOLUME}: .*sform_code"),  # which could be repaired
    (change_header, [VOLUME, 42, 0], r"voxels are expected, found int16 in \(0, 20, 5\)"),
])
def test_volumes_that_cannot_be_used(tmp_path, caplog, change, words, text):
    write_volumes(tmp_path, {"BMC": 4, "UCL": 4})
    change(tmp_path, *words)
    loading_fails(tmp_path, text)
    assert not caplog.records  # nibabel is silent


@pytest.mark.parametrize("shape, text", [
    ((1024, 512, 512), "not a readable file"),  # a sound number, but they are not there
    ((1024, 512, 513), r"at most 268435456 voxels are expected, found uint8 in \(1024, 512, 513\)"),
    ((1626, 1626, 1625), "at most 268435456 voxels"),  # a little above 2**32
    ((32512, 32512, 32512), "at most 268435456 voxels"),
])
def test_volumes_of_too_many_voxels(tmp_path, shape, text):
    write_nifti(tmp_path / "v.nii", ONES, affine("LPS"))
    content = bytearray((tmp_path / "v.nii").read_bytes())
    content[42:48] = struct.pack("<HHH", *shape)
    (tmp_path / "v.nii").write_bytes(content)
    with pytest.raises(ValueError, match=f"v.nii: .*{text}"):
        folders.read_file(tmp_path / "v.nii")


def test_harmless_faults_of_a_header_are_not_refused(tmp_path):
    write_volumes(tmp_path, {"UCL": 4})
    before, _ = warned(tmp_path)
    change_header(tmp_path, VOLUME, 76, 0, 0, 0, 0)  # the sign of an axis, which is 1 or -1
    after, lines = warned(tmp_path)
    assert not lines and same_bytes(before.sites[0], after.sites[0])


def test_a_flipped_bit_in_a_gzip_file_is_seen(tmp_path):
    """Of each flipped bit: the file is refused, or gives the same voxels (a name in the header)."""
    rng = np.random.default_rng(0)
    file = tmp_path / "v.NII.GZ"
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
            assert "v.NII.GZ: not a readable file" in str(error)
            refused += 1
        else:
            assert np.array_equal(before, after), (place, bit)
    assert refused > 50


# ---------------------------------------------------------------- what is refused: files
def folder_instead(root, name):
    (root / name).unlink()
    (root / name).mkdir()


def link_instead(root, name, target):
    (root / name).unlink()
    (root / name).symlink_to(target)


def pipe_instead(root, name):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    (root / name).unlink()
    os.mkfifo(root / name)


def many_pixels(root, name):
    Image.new("1", (10_000, 10_000)).save(root / name)


def huge_header(root, name):
    """A sound PNG header of 100,000 × 100,000 pixels; a checksum belongs to it."""
    content = bytearray((root / name).read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    checksum = zlib.crc32(content[12:29])
    content[29:33] = struct.pack(">I", checksum)
    (root / name).write_bytes(content)


@pytest.mark.parametrize("name", [IMAGE, MASK])
@pytest.mark.parametrize("change, words, text", [
    (cut_short, [], ""),
    (write, [b"text"], ""),
    (write, [b""], ""),
    (folder_instead, [], "not a file"),
    (pipe_instead, [], "not a file"),
    (link_instead, ["01.png"], "symbolic links"),  # to itself
    (link_instead, ["nowhere"], "No such file"),
    (many_pixels, [], "decompression bomb"),
    (huge_header, [], "decompression bomb"),
])
def test_files_that_cannot_be_read(two_sites, name, change, words, text):
    change(two_sites, name, *words)
    loading_fails(two_sites, f"{name}: not a readable file .*{text}.*; replace or remove it")


SPOT = np.eye(32, dtype=np.uint8)
OTHER = SPOT[::-1]
RED = SPOT[:, :, None] * np.array([1, 0, 1], np.uint8)
GREYS = np.arange(1024).reshape(32, 32).astype(np.uint8)


@pytest.mark.parametrize("pixels, mask_values, text", [
    (SPOT[:20, :24], None, r"its size \(1, 20, 24\) .*\(1, 32, 32\); resample it"),
    (np.ones((16, 64), np.uint8), None, r"its size \(1, 16, 64\) .*\(1, 32, 32\); resample it"),
    (RED, None, "one channel is expected"),
    (np.dstack([RED, 255 + 0 * SPOT]), None, "one channel is expected"),
    (255 * SPOT, None, "2 values up to 255; .* 0, 1 … 31; or list .*--mask-values 0 255$"),
    (128 * SPOT + 255 * OTHER, None, "--mask-values 0 128 255$"),
    (SPOT + 100 * OTHER, None, "--mask-values 0 1 100$"),
    (GREYS // 20 * 20, None, "--mask-values 0 20 40 "),
    (GREYS, None, "256 values up to 255; .*save it as PNG with one value a class"),
    (SPOT + 255 * OTHER, None, "it holds 0 1 255: if 255 means 'ignore'"),
    (15 * SPOT + 255 * OTHER, None, "it holds 0 15 255: if 255 means 'ignore'"),
    (3 * SPOT, None, r"hold \[0, 1, 3\]; expected are 0, 1 … .*--mask-values"),
    (7 * SPOT, [0, 1], r"0 7 are not all among --mask-values \[0, 1\]; .*list what is a further"),
    (90 * SPOT + 200 * OTHER, [0, 1], "0 90 200 are not all among .*list what is a further class"),
    (GREYS, [0, 1], " 30 31 are not all among .*threshold it and save it as PNG with one value"),
])
def test_masks_that_cannot_be_used(two_sites, pixels, mask_values, text):
    draw(two_sites, MASK, pixels)
    loading_fails(two_sites, f"{MASK}: .*{text}", mask_values)


@pytest.mark.parametrize("name", ["pages.tif", "pages.png"])
def test_files_of_several_pages(tmp_path, name):
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=f"{name}: [A-Z]* of 2 pages is not read as an image"):
        folders.read_file(tmp_path / name)


@pytest.mark.parametrize("shift, factor", [(1e-4, 0.98), (0.02, 1), (-1, 1)])
def test_volumes_of_fractions_are_no_masks(tmp_path, shift, factor):
    values = np.zeros((6, 5, 4), np.float32)
    values[2:4, 1:3] = factor
    write_nifti(tmp_path / "m.nii", values + np.float32(shift), affine("LPS"))
    for kind in ("volumes", "images"):
        with pytest.raises(ValueError, match="m.nii: whole numbers from 0 .* nearest neighbour"):
            folders.read_mask(tmp_path / "m.nii", (4, 5, 6), kind, classes=2)
