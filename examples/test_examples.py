"""Tests of the programs in examples/."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import iopfl
import router
import train
from examples import ablations, adapt_folder, folders, own_images
from examples.testing import (  # noqa: F401 (fixtures are used by their names)
    ROOT, TOY, TOY_FOLDER, affine, call, call_train, close, copy_of_run, find_row, noise, rows_of,
    same, same_run, save_image, seeded, toy_run, write_nifti, write_site, write_volumes)
from models import UNet


def call_own_images(*words) -> int:
    return call(own_images.main, *words)


def adapt_to(*words) -> int:
    return call(adapt_folder.main, *words)


def the_line(capsys) -> str:
    """What stands on stderr, which must be one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory) -> tuple[Path, Path]:
    """Three sites with images of 20 × 24 and a run on them, with c outside."""
    root = tmp_path_factory.mktemp("folder")
    for name in "abc":
        write_site(root / "sites", name, 5, size=(20, 24), grey=True)
    assert call_own_images(root / "sites", *TOY_FOLDER, "--out", root / "run") == 0
    return root / "sites", root / "run"


@pytest.fixture
def copy_of_folder_run(folder_run, tmp_path) -> tuple[Path, Path]:
    """Both once more, to be changed; the images have moved."""
    sites, run = folder_run
    shutil.copytree(sites, tmp_path / "moved")
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "moved", tmp_path / "run"


# ---------------------------------------------------------------- own_images: wrong use
@pytest.mark.parametrize("words, part", [
    ([], "name the folder of the images, DIR"),
    (["nowhere"], "nowhere: no such folder"),
    ([""], "one of the words is empty"),
    (["DIR", "--hold-out", ""], "one of the words is empty"),
    (["DIR", "--task", "prostate"], "unrecognized arguments: --task prostate"),
    (["DIR", "--images-per-site", "60"], "unrecognized arguments: --images-per-site 60"),
    (["DIR", "--mask-values", "white"], "invalid int value: 'white'"),
    (["DIR", "--patients", "p\\d"], "--patients p\\d: not a regular expression with a group"),
    (["DIR", "--patients", "(p"], "--patients (p: not a regular expression with a group"),
    (["DIR", "--patients", ""], "one of the words is empty"),
    (["DIR", "--rounds", "0"], "--rounds must be at least 1"),
    (["DIR", "--size", "16"], "a is the only hospital; use --hold-out none"),
    (["DIR", "--size", "16", "--hold-out", "none", "--methods", "bn"], "bn needs a hospital"),
])
def test_wrong_use_of_own_images(tmp_path, capsys, words, part):
    """Without the refusal of an empty word, "$FOLDER" would mean what stands in its place."""
    write_site(tmp_path / "DIR", "a", 4)
    words = [tmp_path / "DIR" if word == "DIR" else word for word in words]
    assert call_own_images("--out", tmp_path / "out", *words) == 2
    assert part in the_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ["--root", "DIR"], ["--root=DIR"], ["--list"], ["--mask-values", "0", "255"]])
def test_train_names_the_program_for_own_images(tmp_path, capsys, words):
    assert call_train("--out", tmp_path / "out", *words) == 2
    assert "python -m examples.own_images" in the_line(capsys)
    assert not (tmp_path / "out").exists()


def test_out_must_be_new_or_empty_and_not_among_the_images(tmp_path, capsys):
    write_site(tmp_path / "images", "a", 4)
    (tmp_path / "notes.txt").write_text("mine")
    for out, part in ((tmp_path, "not empty"), (tmp_path / "notes.txt", "not empty"),
                      (tmp_path / "images" / "b", "lies among the images")):
        assert call_own_images(tmp_path / "images", "--out", out) == 2
        assert part in the_line(capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "notes.txt"]


def test_bad_images_end_in_one_line(tmp_path, capsys):
    folder = write_site(tmp_path / "images", "a", 4)
    (folder / "images" / "00.png").write_bytes(b"no image")
    assert call_own_images(tmp_path / "images", "--out", tmp_path / "out") == 1
    assert "00.png: not a readable file" in the_line(capsys)


def test_volumes_without_nibabel_end_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(4):
        for ending in (".nii.gz", "_segmentation.nii.gz"):
            (tmp_path / "images" / "a" / f"Case{number}{ending}").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert call_own_images(tmp_path / "images", "--out", tmp_path / "out") == 1
    assert "pip install nibabel" in the_line(capsys)


# ---------------------------------------------------------------- own_images: a look, and training
@pytest.mark.parametrize("closed", [False, True])
def test_a_look_at_images(tmp_path, capsys, monkeypatch, closed):
    """Also without a stdout."""
    write_site(tmp_path / "images", "a", 5)
    if closed:
        monkeypatch.setattr(sys, "stdout", None)
    words = [tmp_path / "images", "--list", "--size", "16", "--out", tmp_path / "look"]
    assert call_own_images(*words) == 0
    picture, = (tmp_path / "look").iterdir()
    assert picture.name == "images-hospitals.png"
    drawn = np.asarray(Image.open(picture))
    assert (drawn == train.GREEN).all(axis=2).any()  # the outlines of masks
    text = capsys.readouterr().out
    if not closed:
        assert "1 hospitals, images, 3 channels" in text
        assert "a: 5 images; cases: 3 train, 1 validation, 1 test" in text
        assert "sizes as read    32 × 32\n" in text
        assert re.search(r"masks resized and brought back: Dice \d+.\d %, least \d+.\d %", text)


def test_what_a_look_prints_by_hand(tmp_path, capsys, monkeypatch):
    """A quarter of all pixels is class 1; two sizes; without --out the picture lies in runs."""
    monkeypatch.chdir(tmp_path)
    for number, size in enumerate([(16, 16), (24, 32), (16, 16)]):
        folder = write_site(tmp_path / "own", f"a/{'train val test'.split()[number]}", 1, size)
        mask = np.zeros(size, dtype=np.uint8)
        mask[:size[0] // 2, :size[1] // 2] = 255
        Image.fromarray(mask).save(folder / "masks" / "00.png")
    assert call_own_images("own", "--list", "--size", "16", "--mask-values", "0", "255") == 0
    text = capsys.readouterr().out
    assert "sizes as read    16 × 16 to 24 × 32" in text
    assert "classes          75.00, 25.00 % of all pixels" in text
    assert "brought back: Dice 100.0 %, least 100.0 %" in text
    assert (tmp_path / "runs" / "own-hospitals.png").exists()


def test_each_seed_splits_the_images_anew(tmp_path, monkeypatch):
    """What stands on the command line arrives at `load_folder`."""
    calls = []
    load_folder = folders.load_folder

    def noted(*arguments):
        calls.append(arguments)
        return load_folder(*arguments)

    monkeypatch.setattr(folders, "load_folder", noted)
    for name in "ab":
        write_site(tmp_path / "sites", name, 4, values=(0, 255))
    words = ["--mask-values", "0", "255", "--seeds", "0", "3", "--methods", "iopfl"]
    assert call_own_images(tmp_path / "sites", *TOY_FOLDER, *words, "--out", tmp_path / "run") == 0
    root = str((tmp_path / "sites").resolve())
    assert calls == [(root, 16, [0, 255], 0, str), (root, 16, [0, 255], 3, str)]
    assert {row["seed"] for row in rows_of(tmp_path / "run")} == {0, 3}


def test_patients_of_a_run(tmp_path, capsys):
    """The option arrives, is kept, and is used when the run goes on; a look counts patients."""
    sites = tmp_path / "sites"
    for name in "ab":
        write_site(sites, name, 12)
        for folder in (sites / name / "images", sites / name / "masks"):
            for number in range(12):
                new = f"p{number // 3}_{number % 3}.png"
                (folder / f"{number:02d}.png").rename(folder / new)
    words = ["--patients", r"^(p\d)_", *TOY_FOLDER]
    assert call_own_images(sites, *words, "--list", "--out", tmp_path / "look") == 0
    text = capsys.readouterr().out
    assert "a: 12 images; cases: 6 train, 3 validation, 3 test" in text
    assert "patients         2 train, 1 validation, 1 test" in text
    run = tmp_path / "run"
    assert call_own_images(sites, *words, "--out", run) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["patients"] == r"^(p\d)_"
    assert find_row(run, "inside", "iopfl", "a")["cases"] == 3  # images of one patient
    assert call_own_images("--resume", run, "--rounds", 2) == 0
    capsys.readouterr()
    assert call_own_images(sites, "--patients", "(q)", "--out", tmp_path / "none") == 1
    assert "p0_0.png: --patients (q) finds no patient in its name" in the_line(capsys)


# ---------------------------------------------------------------- own_images: going on
def test_images_may_move_but_not_change(tmp_path, capsys):
    for name in "abc":
        write_site(tmp_path / "images", name, 5)
    run = tmp_path / "run"
    words = [tmp_path / "images", "--methods", "iopfl", "--out", run]
    assert call_own_images(*TOY_FOLDER, *words) == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    assert call_own_images("--resume", run) == 2
    assert "no such folder" in capsys.readouterr().err
    assert call_own_images(tmp_path / "moved", "--resume", run) == 0
    shutil.copy(tmp_path / "moved/a/images/00.png", tmp_path / "moved/a/images/01.png")
    assert call_own_images("--resume", run) == 1
    assert "not those the run began with" in capsys.readouterr().err


def test_a_run_on_own_images_goes_on(tmp_path, capsys, monkeypatch):
    """Interrupted after its first round, then on to more rounds and moved images: to the same bits
    as in one go."""
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    sites, parts, whole = tmp_path / "sites", tmp_path / "parts", tmp_path / "whole"
    for name in "abc":
        write_site(sites, name, 5)
    words = [*TOY_FOLDER, "--hold-out", "b", "--methods", "iopfl", "routing-ours"]
    assert call_own_images(sites, *words, "--rounds", "3", "--out", whole) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_round", interrupt)
        assert call_own_images(sites, *words, "--rounds", "2", "--out", parts) == 130
    assert f"--resume {parts} goes on" in the_line(capsys)
    sites.rename(tmp_path / "moved")
    assert call_own_images(tmp_path / "moved", "--resume", parts, "--rounds", "3") == 0
    assert same_run(parts, whole)


def test_resume_names_the_program_of_the_run(toy_run, folder_run, capsys):
    _, own = folder_run
    before = [(run / "config.json").read_bytes() for run in (toy_run, own)]
    assert call_train("--resume", own) == 2
    assert f"python -m examples.own_images --resume {own}" in the_line(capsys)
    for words in (["--resume", toy_run], [own, "--resume", toy_run]):
        assert call_own_images(*words) == 2
        assert f"python train.py --resume {toy_run}" in the_line(capsys)
    assert before == [(run / "config.json").read_bytes() for run in (toy_run, own)]


@pytest.mark.parametrize("words, part", [
    (["--mask-values", "0", "1"], "not --mask-values"),
    (["--list"], "not --list"),
    (["--size", "16"], "not --size"),
    (["--rounds", "0"], "1 rounds are done already"),
])
def test_resume_of_own_images_refuses(copy_of_folder_run, capsys, words, part):
    _, run = copy_of_folder_run
    before = (run / "config.json").read_bytes()
    assert call_own_images("--resume", run, *words) == 2
    assert part in the_line(capsys)
    assert (run / "config.json").read_bytes() == before


def write_parts(root):
    for name in "abc":
        for part, count in (("train", 3), ("val", 2), ("test", 2)):
            write_site(root, f"{name}/{part}", count, grey=True)


def write_small_volumes(root):
    write_volumes(root, {"a": 3, "b": 3, "c": 3})


def move(root, source, target):
    for kind in ("images", "masks"):
        (root / "a" / source / kind / "01.png").rename(root / "a" / target / kind / "09.png")


def move_to_validation(root):
    move(root, "train", "val")


def move_to_test(root):
    move(root, "val", "test")


def move_to_training(root):
    move(root, "test", "train")


def rename_a_hospital(root):
    (root / "a").rename(root / "alpha")


def enlarge_voxels(root):
    nibabel = pytest.importorskip("nibabel")
    for file in root.rglob("*.nii.gz"):
        values = np.asarray(nibabel.load(file).dataobj)
        write_nifti(file, values, affine("LPS", spacing=(1.0, 1.2, 6.0)))


@pytest.mark.parametrize("write, change", [
    (write_parts, move_to_validation),
    (write_parts, move_to_test),
    (write_parts, move_to_training),
    (write_parts, rename_a_hospital),
    (write_small_volumes, enlarge_voxels),
])
def test_what_a_run_cannot_go_on_with(tmp_path, capsys, write, change):
    """The pixels are the same: what has changed is who trains, tests, or how long a voxel is."""
    root, run = tmp_path / "sites", tmp_path / "run"
    write(root)
    assert call_own_images(root, *TOY_FOLDER, "--methods", "iopfl", "--out", run) == 0
    change(root)
    before = (run / "config.json").read_bytes()
    assert call_own_images("--resume", run, "--methods", "fedavg") == 1
    assert "start a new run" in the_line(capsys)
    assert (run / "config.json").read_bytes() == before


# ---------------------------------------------------------------- every program: how it ends
PROGRAMS = {  # the main, the module of the `run` that it calls, and words that it accepts
    "own_images": (own_images.main, train, ["IMAGES"]),
    "adapt_folder": (adapt_folder.main, adapt_folder, ["RUN", "IMAGES", "--out", "OUT"]),
    "ablations": (ablations.main, ablations, ["RUN"]),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("error, status, part", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (FloatingPointError("the loss is NaN"), 1, "the loss is NaN"),
    (PermissionError(13, "Permission denied", "a/secret"), 1, "a/secret: Permission denied"),
])
def test_errors_end_in_one_line(tmp_path, capsys, monkeypatch, program, error, status, part):
    def fail(*arguments):
        raise error

    main, module, words = PROGRAMS[program]
    for name in ("IMAGES", "RUN"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run", fail)
    assert call(main, *words) == status
    assert part in the_line(capsys)


@pytest.mark.parametrize("program", ["own_images", "ablations"])
def test_a_reader_that_ends_early_is_no_error(folder_run, tmp_path, program):
    """As under `head`: nothing on stderr."""
    sites, run = folder_run
    words = {
        "own_images": [sites, "--list", "--size", "16", "--out", tmp_path],
        "ablations": [run, "--variants", "no steps"],
    }
    command = [sys.executable, "-m", f"examples.{program}", *map(str, words[program])]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr as stream:
        assert stream.read() == ""
    assert process.wait(timeout=300) == 141


def set_version(file, version):
    """In a config.json, or in an adapted.json, which holds that of the run."""
    content = json.loads(file.read_text())
    config = content.get("config", content)
    del config["version"]
    if version is not None:
        config["version"] = version
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("version", [None, train.VERSION - 1, train.VERSION + 1])
def test_runs_of_another_version_are_refused(copy_of_run, copy_of_folder_run, capsys, version):
    sites, own = copy_of_folder_run
    for run in (copy_of_run, own):
        set_version(run / "config.json", version)
    out = copy_of_run / "out"
    for main, words in (
        (train.main, ["--resume", copy_of_run]),
        (own_images.main, ["--resume", own]),
        (own_images.main, [sites, "--resume", own]),
        (adapt_folder.main, [copy_of_run, "--simulated", "--out", out]),
        (adapt_folder.main, [own / "seed0-c-plain", sites / "c/images", "--out", out]),
        (ablations.main, [copy_of_run]),
        (ablations.main, [own]),
    ):
        assert call(main, *words) == 1
        assert "the run is of another version" in the_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("version", [None, train.VERSION + 1])
def test_what_another_version_adapted_is_refused(folder_run, tmp_path, capsys, version):
    sites, run = folder_run
    images, adapted, again = sites / "c" / "images", tmp_path / "adapted", tmp_path / "again"
    assert adapt_to(run, images, "--out", adapted) == 0
    set_version(adapted / "adapted.json", version)
    assert adapt_to(adapted, images, "--out", again) == 1
    assert "of another version" in the_line(capsys)
    assert not again.exists()


# ---------------------------------------------------------------- adapt_folder
@pytest.mark.parametrize("threads", [0, -1, train.MOST_THREADS + 1])
def test_adapt_folder_refuses_numbers_of_threads(folder_run, tmp_path, capsys, threads):
    sites, run = folder_run
    words = [sites / "c" / "images", "--threads", threads, "--out", tmp_path / "out"]
    assert adapt_to(run, *words) == 2
    assert f"--threads must lie between 1 and {train.MOST_THREADS}" in the_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, threads", [(["--threads", "2"], 2), ([], 5)])
def test_adapt_folder_has_threads_of_its_own(folder_run, tmp_path, monkeypatch, words, threads):
    """The run had one; without the option it is torch's number, here 5."""
    sites, run = folder_run
    counts = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    images = sites / "c" / "images"
    assert adapt_to(run, images, *words, "--out", tmp_path / "out") == 0
    assert counts == [threads]


def adapted_rows(out: Path) -> list[dict]:
    return json.loads((out / "adapted.json").read_text())["rows"]


def give_random_models(run: Path) -> list[UNet]:
    """To a run of a and b, with c outside; no mask is empty or full, nor like another's."""
    models = [UNet(1, 2, 2, 1, seeded(number)).eval() for number in range(2, 5)]
    states = [model.state_dict() for model in models]
    file = run / "seed0-c-plain" / "last.pt"
    saved = torch.load(file, weights_only=True)
    saved["personal"] = dict(zip("ab", states))
    saved["last"]["global_state"] = states[2]
    torch.save(saved, file)
    return models


def test_adapting_to_a_folder(folder_run, tmp_path, capsys):
    """Masks at the files' own sizes with the Dice that is reported; a broken file is left out."""
    sites, run = folder_run
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    shutil.copytree(sites / "c", theirs)
    (theirs / "images" / "broken.png").write_bytes(b"no image")
    (theirs / "images" / "notes.txt").write_text("mine")
    words = [theirs / "images", "--masks", theirs / "masks", "--probabilities", "--out", out]
    assert adapt_to(run, *words) == 1
    error = capsys.readouterr().err
    assert "left out: " in error and "broken.png" in error and "notes.txt" in error
    rows = adapted_rows(out)
    assert [row["file"] for row in rows] == [f"0{number}.png" for number in range(5)]
    for row in rows:
        mask = np.array(Image.open(out / "masks" / row["file"]))
        truth = np.array(Image.open(theirs / "masks" / row["file"]))
        assert mask.shape == (20, 24)
        assert row["foreground"] == pytest.approx((mask > 0).mean())
        assert row["Dice class 1"] == pytest.approx(iopfl.dice(mask > 0, truth > 0))
        assert 0 <= row["agreement"] <= 1
        stem = row["file"].removesuffix(".png")
        maps = np.load(out / "probabilities" / f"{stem}.npy")
        assert maps.shape == (1, 2, 20, 24)
        assert maps.sum(axis=1) == pytest.approx(1, abs=1e-2)
        assert (maps[0].argmax(axis=0) == mask).mean() > 0.98  # float16 makes ties
        assert (out / "overlays" / row["file"]).exists()


def test_overlays_show_the_global_model_too(copy_of_folder_run, tmp_path, monkeypatch):
    sites, run = copy_of_folder_run
    model = give_random_models(run)[2]
    shown = []
    monkeypatch.setattr(adapt_folder, "draw_overlay",
                        lambda pixels, outlines, file: shown.append(outlines))
    images = sites / "c" / "images"
    assert adapt_to(run, images, "--out", tmp_path / "out") == 0
    assert len(shown) == 5
    for file, outlines in zip(sorted(images.iterdir()), shown):
        (mask, orange), (_, blue) = outlines
        assert (orange, blue) == (train.ORANGE, train.BLUE)
        pixels, _ = folders.read_file(file)
        seen = folders.network_input(file, pixels, 16, 1, "images")
        logits = model(torch.from_numpy(seen))
        expected, _ = adapt_folder.at_own_size(logits.detach().softmax(dim=1), (20, 24))
        assert (mask == expected).mean() > 0.99  # another batch rounds otherwise


def test_images_behind_the_options_and_masks_in_their_folder(folder_run, tmp_path, monkeypatch):
    """IMAGES may be the last word, and --masks the same folder in another spelling."""
    sites, run = folder_run
    together = tmp_path / "together"
    shutil.copytree(sites / "c" / "images", together)
    for file in (sites / "c" / "masks").iterdir():
        shutil.copy(file, together / f"{file.stem}_segmentation.png")
    monkeypatch.chdir(tmp_path)
    assert adapt_to(run, "--out", "out", "--masks", together, "together") == 0
    rows = adapted_rows(tmp_path / "out")
    assert len(rows) == 5 and all("Dice class 1" in row for row in rows)


def test_masks_of_other_grey_values_than_the_runs(folder_run, tmp_path):
    """With --mask-values they are scored as the same masks of classes."""
    sites, run = folder_run
    images, masks, greys = sites / "c" / "images", sites / "c" / "masks", tmp_path / "greys"
    for file in masks.iterdir():
        save_image(greys / file.name, 255 * np.asarray(Image.open(file)))
    assert adapt_to(run, images, "--masks", masks, "--out", tmp_path / "one") == 0
    words = ["--masks", greys, "--mask-values", "0", "255"]
    assert adapt_to(run, images, *words, "--out", tmp_path / "two") == 0
    assert adapted_rows(tmp_path / "one") == adapted_rows(tmp_path / "two")
    assert "Dice class 1" in adapted_rows(tmp_path / "two")[0]


def test_masks_inside_out_are_told_of(folder_run, tmp_path, capsys):
    sites, run = folder_run
    images, masks = sites / "c" / "images", tmp_path / "masks"
    mask = np.full((20, 24), 255, np.uint8)
    mask[5:15, 6:18] = 0
    for file in images.iterdir():
        save_image(masks / file.name, mask)
    told = "less than a tenth of the border of the masks is background"
    for order, expected in ((["0", "255"], True), (["255", "0"], False)):
        words = ["--masks", masks, "--mask-values", *order, "--out", tmp_path / order[0]]
        assert adapt_to(run, images, *words) == 0
        assert (told in capsys.readouterr().err) == expected


def test_masks_of_other_palettes_are_not_scored(folder_run, tmp_path, capsys):
    """The same colour must have the same index in all masks."""
    sites, run = folder_run
    images, masks = sites / "c" / "images", tmp_path / "masks"
    masks.mkdir()
    for number, file in enumerate(sorted(images.iterdir())):
        mask = Image.fromarray(np.eye(20, 24, dtype=np.uint8))
        mask.putpalette([0, 0, 0, 200, 0, 0] if number else [0, 0, 0, 0, 200, 0])
        mask.save(masks / file.name)
    assert adapt_to(run, images, "--masks", masks, "--out", tmp_path / "out") == 0
    scored = ["Dice class 1" in row for row in adapted_rows(tmp_path / "out")]
    assert scored == [True, False, False, False, False]
    assert "not scored: mask " in capsys.readouterr().err


def test_turned_images_are_not_scored_by_upright_masks(folder_run, tmp_path, capsys):
    sites, run = folder_run
    images = tmp_path / "images"
    shutil.copytree(sites / "c" / "images", images)
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.open(images / "00.png").copy().save(images / "00.png", exif=exif)
    words = [images, "--masks", sites / "c" / "masks", "--out", tmp_path / "out"]
    assert adapt_to(run, *words) == 0
    scored = ["Dice class 1" in row for row in adapted_rows(tmp_path / "out")]
    assert scored == [False, True, True, True, True]
    assert "00.png: EXIF turns it otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("length, fits", [(220, True), (221, False), (250, False)])
def test_names_that_would_become_too_long(folder_run, tmp_path, capsys, length, fits):
    """They are refused before anything is adapted."""
    sites, run = folder_run
    images = tmp_path / "images"
    images.mkdir()
    name = "x" * (length - 4) + ".png"
    shutil.copy(sites / "c" / "images" / "00.png", images / name)
    status = adapt_to(run, images, "--probabilities", "--out", tmp_path / "out")
    if fits:
        assert status == 0 and (tmp_path / "out" / "masks" / name).exists()
    else:
        assert status == 1 and "its name is longer than 220 bytes" in the_line(capsys)
        assert not (tmp_path / "out").exists()


def test_masks_that_need_nibabel_are_not_scored(folder_run, tmp_path, monkeypatch, capsys):
    sites, run = folder_run
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "00.nii.gz").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    words = [sites / "c" / "images", "--masks", tmp_path / "masks", "--out", tmp_path / "out"]
    assert adapt_to(run, *words) == 0
    assert "not scored: " in capsys.readouterr().err
    assert len(adapted_rows(tmp_path / "out")) == 5


def test_agreement_by_hand():
    """Masks of three classes in one row: Dice of disc and cup against two models."""
    structures = {"disc": [1, 2], "cup": [2]}
    mask, other = np.array([[[0, 1, 1, 2]]]), np.array([[[1, 1, 0, 0]]])
    assert adapt_folder.agreement(mask, [mask], structures) == 1
    expected = (1 + 1 + 2 * 1 / (3 + 2) + 0) / 4  # the other one has no cup
    assert adapt_folder.agreement(mask, [mask, other], structures) == pytest.approx(expected)
    without = np.array([[[0, 1, 1, 0]]])  # both have no cup
    expected = (2 * 1 / (2 + 2) + 1) / 2
    assert adapt_folder.agreement(without, [other], structures) == pytest.approx(expected)
    empty = 0 * mask
    assert adapt_folder.agreement(empty, [empty, empty], structures) == 1
    volume, of_model = np.array([[[1, 1, 0]], [[1, 1, 0]]]), np.array([[[1, 1, 0]], [[1, 0, 0]]])
    found = adapt_folder.agreement(volume, [of_model], {"organ": [1]})  # one mask of two slices
    assert found == pytest.approx(2 * 3 / (4 + 3))


def test_sign_of_quality_by_hand(capsys):
    """Ten files: the ranks of agreement and Dice, equal ones sharing theirs."""
    agreements = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    scores = [0.2, 0.5, 0.1, 0.4, 0.6, 0.7, 0.9, 0.8, 0.95, 0.95]
    rows = [{"file": "x", "agreement": a, "Dice one": s, "Dice two": s}
            for a, s in zip(agreements, scores)]
    for number in 1, 4:  # the same mean
        rows[number]["Dice one"] -= 0.25
        rows[number]["Dice two"] += 0.25
    found = adapt_folder.sign_of_quality([*rows, {"file": "y", "agreement": 0.0}])
    first = [1, 2, 3, 4, 5, 6, 7, 8, 9.5, 9.5]
    second = [2, 4, 1, 3, 5, 6, 8, 7, 9.5, 9.5]
    assert found["rank_correlation"] == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert found["worst_fifth"] == 0.5  # of files 1 and 3 the first is among files 1 and 2
    assert "rank correlation +0.93; of the worst fifth 50 %" in capsys.readouterr().out
    assert adapt_folder.sign_of_quality(rows[:6])["worst_fifth"] == 0.5  # two files of six
    assert adapt_folder.sign_of_quality(rows[:5])["worst_fifth"] == 0  # one of five
    assert adapt_folder.sign_of_quality(rows[:4]) == {}
    for same_in_all in ({"agreement": 0.5}, {"Dice one": 0.5, "Dice two": 0.5}):
        assert adapt_folder.sign_of_quality([row | same_in_all for row in rows]) == {}
    assert adapt_folder.sign_of_quality([{"file": "y", "agreement": 0.1}]) == {}


def test_files_of_low_agreement_come_first(folder_run, tmp_path, capsys):
    sites, run = folder_run
    out = tmp_path / "out"
    assert adapt_to(run, sites / "c" / "images", "--out", out) == 0
    text = capsys.readouterr().out
    rows = sorted(adapted_rows(out), key=lambda row: row["agreement"])
    places = [text.index(f"{row['file']}: foreground") for row in rows]
    assert places == sorted(places)
    assert f"the lowest fifth by agreement: {rows[0]['file']}\n" in text
    assert "routing weights: a " in text and "over layers ±" in text
    # An earlier call's network comes without the models.
    assert adapt_to(out, sites / "c" / "images", "--out", tmp_path / "again") == 0
    assert "agreement" not in adapted_rows(tmp_path / "again")[0]
    assert "lowest fifth" not in capsys.readouterr().out


@pytest.mark.parametrize("words, seen_at_first", [([], 6), (["--online"], 3)])
def test_agreement_with_each_model_of_a_run(copy_of_folder_run, tmp_path, capsys, words,
                                            seen_at_first):
    """Six images of the network's own size; what is printed, kept, and given to `fit_to_site`."""
    _, run = copy_of_folder_run
    models = give_random_models(run)
    file = run / "seed0-c-plain" / "rows.json"
    result = json.loads(file.read_text())
    result["distances_inside"] = {"a": 1.5, "b": 2.0}  # about as far as these images lie
    file.write_text(json.dumps(result))
    theirs, out = write_site(tmp_path, "theirs", 6, size=(16, 16), grey=True), tmp_path / "out"
    more = ["--masks", theirs / "masks", *words, "--out", out]
    assert adapt_to(run, theirs / "images", *more) == 0
    images = []
    for file in sorted((theirs / "images").iterdir()):
        seen = folders.network_input(file, folders.read_file(file)[0], 16, 1, "images")
        images.append(torch.from_numpy(seen))
    images = torch.cat(images)
    content = json.loads((out / "adapted.json").read_text())
    alone = [model(images).argmax(dim=1).numpy() for model in models]
    for number, row in enumerate(content["rows"]):
        mask = np.array(Image.open(out / "masks" / row["file"]))
        dice = [iopfl.dice(mask > 0, masks[number] > 0) for masks in alone]
        assert row["agreement"] == pytest.approx(np.mean(dice), abs=0.005)  # rounded otherwise
    first, second, *_ = sorted(content["rows"], key=lambda row: row["agreement"])
    told = f"the lowest fifth by agreement: {first['file']}, {second['file']}\n"
    assert told in capsys.readouterr().out
    assert content["sign"] == adapt_folder.sign_of_quality(content["rows"]) != {}

    assert content["distances_inside"] == [1.5, 2.0]
    ratio = 1.75 / router.divergence(models[2], images[:seen_at_first]).item()
    adapted = torch.load(out / "adapted.pt", weights_only=True)
    shares = [value.item() for name, value in adapted.items() if name.endswith("site_share")]
    assert shares == pytest.approx([1 / (1 + ratio**4)] * len(shares), rel=1e-4)

    weights = np.array(list(content["weights"].values()))  # (layers, M)
    assert list(content["chosen"]) == ["a", "b", "global"]
    assert list(content["chosen"].values()) == pytest.approx(weights.mean(axis=0))
    spread = content["routing_spread"]
    assert spread["over_layers"] == pytest.approx(weights.std(axis=0).mean(), abs=1e-6)
    assert spread["over_images"] > 0


def test_outlines_of_both_masks_in_an_overlay(tmp_path):
    by_global = np.zeros((3, 20, 20), dtype=np.uint8)
    mask = by_global.copy()
    by_global[1, 4:8, 4:8] = 1
    mask[2, 10:16, 10:16] = 1
    pixels = np.zeros((3, 20, 20, 1), dtype=np.float32)
    file = tmp_path / "overlay.png"
    outlines = [(by_global, train.ORANGE), (mask, train.BLUE)]
    adapt_folder.draw_overlay(pixels, outlines, file)
    drawn = np.asarray(Image.open(file))
    width = 480 + 4
    assert drawn.shape[1] == 2 * width  # the first slice is empty in both
    orange = (drawn == train.ORANGE).all(axis=2)
    blue = (drawn == train.BLUE).all(axis=2)
    assert orange[:, :width].any() and not orange[:, width:].any()
    assert blue[:, width:].any() and not blue[:, :width].any()


def test_a_federation_without_its_models_is_told(copy_of_run, tmp_path, capsys):
    (copy_of_run / "seed0-Rowan-plain" / "last.pt").unlink()
    assert adapt_to(copy_of_run, "--simulated", "--out", tmp_path / "out") == 1
    assert "last.pt is missing" in the_line(capsys)


def test_what_was_adapted_is_applied_again(folder_run, tmp_path, capsys):
    sites, run = folder_run
    images, first, again = sites / "c" / "images", tmp_path / "first", tmp_path / "again"
    assert adapt_to(run, images, "--out", first) == 0
    assert adapt_to(first, images, "--out", again) == 0
    for file in (first / "masks").iterdir():
        assert file.read_bytes() == (again / "masks" / file.name).read_bytes()
    for out, has_global in ((first, True), (again, False)):
        pictures = [np.asarray(Image.open(file)) for file in (out / "overlays").iterdir()]
        orange = [(picture == train.ORANGE).all(axis=2).any() for picture in pictures]
        assert any(orange) == has_global
    assert adapt_to(first, images, "--online", "--out", tmp_path / "x") == 2
    assert "leave out --online" in capsys.readouterr().err


def test_adapting_repeats_the_phase_outside(folder_run, tmp_path):
    """The same probabilities, order and seed: Dice of resized masks is that of the run."""
    sites, run = folder_run
    site = folders.load_folder(sites, 16).sites[-1]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for case in site.everything.cases:  # in the order in which the run saw them
        number = len(list(pictures.iterdir()))
        shutil.copy(sites / "c" / case, pictures / f"{number}.png")
    assert adapt_to(run, pictures, "--out", tmp_path / "out") == 0
    one = torch.load(run / "seed0-c-plain" / "routing-ours.pt", weights_only=True)
    two = torch.load(tmp_path / "out" / "adapted.pt", weights_only=True)
    assert same(one, two)


def test_simulated_images_are_adapted_to(toy_run, tmp_path):
    for words in ([], ["--online"]):
        out = tmp_path / f"out{len(words)}"
        assert adapt_to(toy_run, "--simulated", *words, "--out", out) == 0
        rows = adapted_rows(out)
        assert len(rows) == 8 and all("Dice prostate" in row for row in rows)
    truth = np.array(Image.open(out / "truth" / "Rowan-000.png"))
    drawn = data.simulate_sites("prostate", 1000, 16, 8).sites[-1].train
    assert np.array_equal(truth, drawn.masks[0].numpy())  # new images, not those of the run


@pytest.mark.parametrize("words, part", [
    (["RUN"], "name a folder of images"),
    (["RUN", "IMAGES", "--simulated"], "name a folder of images"),
    (["RUN", "--simulated"], "no simulated hospital"),
    (["RUN", "nowhere"], "nowhere: no such folder"),
    (["RUN", "IMAGES", "--mask-values", "0", "1"], "goes with --masks"),
    (["RUN", "--simulated", "--masks", "IMAGES"], "draws its own masks"),
    (["RUN", "IMAGES", "--masks", "IMAGES", "--mask-values", "0", "1", "2"], "2 classes"),
    (["IMAGES", "IMAGES"], "no finished federation"),
])
def test_wrong_use_of_adapt_folder(folder_run, tmp_path, capsys, words, part):
    sites, run = folder_run
    places = {"RUN": run, "IMAGES": sites / "c" / "images"}
    words = [places.get(word, word) for word in words]
    assert adapt_to(*words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_adapting_to_volumes(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    write_volumes(tmp_path / "sites", {"A": 4, "B": 4, "C": 4})
    words = [*TOY_FOLDER, "--methods", "iopfl"]
    assert call_own_images(tmp_path / "sites", *words, "--out", tmp_path / "run") == 0
    theirs, out = tmp_path / "sites" / "C", tmp_path / "out"
    assert adapt_to(tmp_path / "run", theirs, "--masks", theirs, "--out", out) == 0
    for row in adapted_rows(out):
        written = nibabel.load(out / "masks" / row["file"])
        case = row["file"].removesuffix(".nii.gz")
        truth = nibabel.load(next(theirs.glob(f"{case}_*.nii.gz")))
        assert written.shape == truth.shape and np.allclose(written.affine, truth.affine)
        mask, drawn = np.asarray(written.dataobj) > 0, np.asarray(truth.dataobj) > 0
        assert row["Dice prostate"] == pytest.approx(iopfl.dice(mask, drawn))


def test_no_half_mask_is_left_on_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_volumes(tmp_path, {"A": 1})
    monkeypatch.setattr(os, "fsync", full)
    volume = tmp_path / "A/Case00.nii.gz"
    with pytest.raises(SystemExit):
        adapt_folder.write_mask(volume, np.ones((5, 20, 24), np.uint8), tmp_path / "out")
    assert "Case00.nii.gz: cannot be written (No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out/masks").iterdir())


def variants_in(text: str) -> dict[str, list[str]]:
    """The cells of the table of ablations, by variant."""
    return {line[:26].strip(): line[26:].split() for line in text.split("\n")}


def test_ablations_of_routing(toy_run, capsys):
    names = ["routing-ours", "share 1/4", "random start", "global only", "personal only",
             "no factor, no steps", "by image", "by layer", "by both", "routers on labels"]
    assert call(ablations.main, toy_run, "--variants", *names) == 0
    found = variants_in(capsys.readouterr().out)
    for name in names:
        assert len(found[name]) == 8
    for name, method in (("routing-ours", "routing-ours"), ("global model", "global")):
        row = find_row(toy_run, "outside", method, "Rowan")
        assert float(found[name][0]) == pytest.approx(100 * row["dice"], abs=0.006)
    assert found["routing-ours"][1:] == ["+0.00", "+0.00", "+0.00", "0", "1", "0", "1"]
    for words in (["--variants", "x"], ["--images", "0"]):
        assert call(ablations.main, toy_run, *words) == 2


def test_divergence_of_each_image_and_layer():
    """The mean over layers of all images together is `router.divergence`."""
    model = UNet(1, 2, width=2, depth=1, generator=seeded(0)).eval()
    for norm in router.running_norms(model):
        norm.running_mean.normal_(generator=seeded(1))
    images = noise(5, 1, 16, 16).float()
    together = ablations.divergence_of_each(model, images, pooled=True)
    each = ablations.divergence_of_each(model, images, pooled=False)
    names = ["encoder.0.0", "encoder.0.3", "encoder.1.0", "encoder.1.3", "decoder.0.0",
             "decoder.0.3", ablations.MEAN]
    assert list(together) == list(each) == names
    expected = router.divergence(model, images).item()
    assert together[ablations.MEAN].item() == pytest.approx(expected, rel=1e-5)
    for number in range(5):
        expected = router.divergence(model, images[number:number + 1]).item()
        assert each[ablations.MEAN][number].item() == pytest.approx(expected, rel=1e-5)


def test_a_start_by_image_or_layer_reaches_the_routers(monkeypatch):
    models = [UNet(1, 2, width=2, depth=1, generator=seeded(n)).eval() for n in range(3)]
    for number, model in enumerate(models):
        for norm in router.running_norms(model):
            norm.running_mean.normal_(generator=seeded(number))
    images = noise(4, 1, 16, 16).float()
    routed = router.build_routed(models)
    router.fit_to_site(routed, models, images)
    seen = []
    predict = router.predict

    def noted(routed, image):
        predicted = predict(routed, image)
        seen.append({name: weights[0].clone() for name, weights in routed.routing.items()})
        return predicted

    monkeypatch.setattr(router, "predict", noted)
    for by in ("image", "layer", "both"):
        seen.clear()
        ablations.routed_by(routed, models, images, by)
        first, second = seen[:2]
        assert torch.allclose(first["head"], second["head"]) == (by == "layer")
        assert torch.allclose(first["head"], first["encoder.0.0"]) == (by == "image")
        D = torch.stack([router.divergence(model, images[:1]) for model in models])
        if by != "layer":
            assert torch.allclose(first["head"], router.start_weights(D), atol=1e-4)


def test_routers_on_labels_learn():
    """And nothing else does; the labels of a half are not used for it."""
    models = [UNet(1, 2, width=2, depth=1, generator=seeded(n)).eval() for n in range(2)]
    images = noise(6, 1, 16, 16).float()
    split = data.Split(images, (images[:, 0] > 0).long(), list("abcdef"))
    routed = router.build_routed(models, generator=seeded(5))
    before = routed.snapshot()
    found = ablations.routers_on_labels(routed, split, 0)
    for name, value in routed.snapshot().items():
        assert torch.equal(value, before[name]) != (".router." in name), name
    half = train.half_of_cases(split, train.new_generator(0))
    split.masks[half] = 1 - split.masks[half]
    routed = router.build_routed(models, generator=seeded(5))
    again = ablations.routers_on_labels(routed, split, 0)
    assert torch.equal(again[half], found[half]) and not torch.equal(again[~half], found[~half])


def test_routers_on_labels_by_hand():
    """Each half of the cases by routers from the start and ten epochs on the other half."""
    models = [UNet(1, 2, width=2, depth=1, generator=seeded(n)).eval() for n in range(2)]
    images = noise(6, 1, 16, 16).float()
    split = data.Split(images, (images[:, 0] > 0).long(), list("aabbcd"))

    def fitted() -> router.RoutedNetwork:
        routed = router.build_routed(models, generator=seeded(5))
        router.fit_to_site(routed, models, images)
        return routed

    found = ablations.routers_on_labels(fitted(), split, 1)
    generator, expected = seeded(1), torch.zeros_like(found)
    half = train.half_of_cases(split, generator)
    for tested in half, ~half:
        routed = fitted()
        for name, value in routed.named_parameters():
            value.requires_grad_(".router." in name)
        iopfl.train_local(routed, images[~tested], split.masks[~tested], epochs=10,
                          generator=generator)
        expected[tested] = router.predict(routed, images[tested])
    assert close(found, expected, 1e-6)


def test_routers_learn_on_labels_of_all_images_alone(toy_run, capsys):
    """Of some images at a time a half may be empty: left out, or refused where it was named."""
    assert call(ablations.main, toy_run, "--images", 7) == 0  # of 8, so that one is alone
    found = variants_in(capsys.readouterr().out)
    assert "routers on labels" not in found and "no steps" in found
    words = ["--images", 4, "--variants", "routers on labels"]
    assert call(ablations.main, toy_run, *words) == 2
    assert "need cases to learn from" in capsys.readouterr().err


def test_ablations_adapt_to_some_images_at_a_time(toy_run, capsys, monkeypatch):
    """Which images and models each network sees, and whose statistics it takes, by the factor of
    the share."""
    counts, shares, used = [], [], []
    fit_to_site = router.fit_to_site

    def noted(routed, models, images, **options):
        fit_to_site(routed, models, images, **options)
        norm = routed.parts(router.RoutedBatchNorm)[0]
        counts.append(len(images))
        shares.append((norm.site_share * len(images) / (len(images) + norm.site_prior)).item())
        used.append(models)

    monkeypatch.setattr(router, "fit_to_site", noted)
    names = ["no steps", "no factor, no steps", "personal only", "share 1/4"]
    assert call(ablations.main, toy_run, "--images", 3, "--variants", *names) == 0
    assert counts == [3, 3, 2] * 4
    by_variant = np.reshape(shares, (4, 3)).T  # of each part
    for count, (with_factor, without, personal, quarter) in zip(counts, by_variant):
        assert with_factor == pytest.approx(without * count / (count + 16))
        assert personal == pytest.approx(with_factor)  # as all models give it
        assert quarter == pytest.approx(0.25 * count / (count + 16))
    assert used[6] == used[0][:-1] and len(used[0]) == 6  # without the last, the global one
    found = variants_in(capsys.readouterr().out)
    assert found["no steps"][1] == "+0.00"  # the first that was named is compared with


def test_ablations_of_alpha(tmp_path, capsys):
    words = ["--hold-out", "none", "--methods", "iopfl", "fedavg-ft", "--out", tmp_path]
    words += ["--task", "fundus", "--lr", "0.01", "--local-epochs", "3"]  # so that Dice is not 0
    assert call_train(*TOY, *words) == 0
    assert call(ablations.main, tmp_path) == 0
    found = variants_in(capsys.readouterr().out)
    for variant, method in (("α 0.7", "iopfl"), ("α 0.0", "fedavg-ft")):
        rows = [row for row in rows_of(tmp_path) if row["phase"] == "inside"]
        dice = [row["dice"] for row in rows if row["method"] == method]
        assert float(found[variant][0]) == pytest.approx(100 * np.mean(dice), abs=0.006) != 0
    assert ablations.GLOBAL_CONTROL in found
    progress = train.load_progress(tmp_path / "seed0-all-inside-plain" / "last.pt")
    for plain, state in (("global model", train.shared), ("α 0.7", train.personalised)):
        dice = dice_recounted(tmp_path, progress, state)
        dice_found = found["own statistics, " + plain.removesuffix(" model")][0]
        assert float(dice_found) == pytest.approx(dice, abs=0.006)
        assert dice_found != found[plain][0]


def dice_recounted(run, progress, state_of) -> float:
    """In %, of each hospital's model, if each norm takes over mean and variance of what it gets
    when all training images pass."""
    def take_over(norm, inputs):
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)

    settings = argparse.Namespace(**train.load_config(run)["settings"])
    dataset = train.simulated(settings, seed=0)
    dice = []
    for site in dataset.sites:
        model = train.new_model(settings, dataset, seed=0).eval()
        model.load_state_dict(state_of(progress, site.name))
        hooks = [norm.register_forward_pre_hook(take_over) for norm in router.running_norms(model)]
        with torch.no_grad():
            model(site.train.images)
        for hook in hooks:
            hook.remove()
        prediction = iopfl.predict(model, site.test.images)
        rows = train.score(dataset, site, site.test, prediction, "inside", "own")
        dice += [row["dice"] for row in rows]
    return 100 * np.mean(dice)


def test_ablations_refuse(folder_run, capsys):
    sites, _ = folder_run
    assert call(ablations.main, sites) == 1
    assert "config.json: there is no such file" in capsys.readouterr().err


def test_ablations_of_other_images_are_refused(tmp_path, capsys):
    for name in "abc":
        write_site(tmp_path / "sites", name, 5)
    run = tmp_path / "run"
    assert call_own_images(tmp_path / "sites", *TOY_FOLDER, "--out", run) == 0
    assert call(ablations.main, run, "--variants", "no steps") == 0
    shutil.copy(tmp_path / "sites/c/masks/00.png", tmp_path / "sites/c/masks/01.png")
    assert call(ablations.main, run, "--variants", "no steps") == 1
    assert "not those the run began with; start a new run" in capsys.readouterr().err


def test_ablations_of_two_kinds_or_none(toy_run, tmp_path, capsys):
    """Runs of both kinds, and words about routing for a run without it, are refused at once."""
    inside = tmp_path / "inside"
    assert call_train(*TOY, "--hold-out", "none", "--methods", "iopfl", "--out", inside) == 0
    capsys.readouterr()
    assert call(ablations.main, toy_run, inside) == 2
    assert "different kinds" in capsys.readouterr().err
    for words in (["--images", "1"], ["--variants", "no steps"]):
        assert call(ablations.main, inside, *words) == 2
        output = capsys.readouterr()
        assert "a hospital outside" in output.err and not output.out


def test_ablations_count_a_run_once(toy_run, capsys):
    assert call(ablations.main, toy_run, toy_run, "--variants", "no steps") == 0
    assert variants_in(capsys.readouterr().out)["no steps"][4:7] == ["0", "1", "0"]


def test_a_federation_on_its_way_to_more_rounds_is_not_used(copy_of_run, tmp_path, capsys):
    file = copy_of_run / "config.json"
    config = json.loads(file.read_text())
    config["settings"]["rounds"] = 4  # as --resume --rounds 4 leaves it when it is interrupted
    file.write_text(json.dumps(config))
    assert adapt_to(copy_of_run, "--simulated", "--out", tmp_path / "out") == 1
    assert "interrupted after round 2" in capsys.readouterr().err
    assert call(ablations.main, copy_of_run, "--variants", "no steps") == 1
    assert "interrupted after round 2" in capsys.readouterr().err


def test_an_interrupted_run_of_own_images_names_its_program(copy_of_folder_run, tmp_path, capsys):
    sites, run = copy_of_folder_run
    config = json.loads((run / "config.json").read_text())
    config["settings"]["rounds"] = 4
    (run / "config.json").write_text(json.dumps(config))
    assert adapt_to(run, sites / "c" / "images", "--out", tmp_path / "out") == 1
    assert f"python -m examples.own_images --resume {run}" in the_line(capsys)


def test_sign_test_by_hand():
    assert ablations.sign_test(5, 0) == pytest.approx(2 / 32)
    assert ablations.sign_test(2, 2) == 1 and ablations.sign_test(0, 0) == 1


def test_flower_gives_the_same_models(tmp_path):
    """Flower's simulation in processes of its own against `federate` and M2 in this one."""
    pytest.importorskip("flwr", reason="pip install 'flwr[simulation]'")
    pytest.importorskip("ray", reason="pip install 'flwr[simulation]'")
    from examples import flower_app
    out = tmp_path / "out"
    command = [sys.executable, "-m", "examples.flower_app", "--out", str(out)]
    environment = os.environ | {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"}
    environment["OMP_NUM_THREADS"] = "1"  # as here: another number gives other bits
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr

    clients = {}
    for number in range(flower_app.HOSPITALS):
        site = flower_app.hospital(number)
        clients[site.name] = site.train.to("cpu")
    model = flower_app.new_model()
    rounds = flower_app.ROUNDS
    personal = {}
    for last in iopfl.federate(model, clients, rounds, seed=flower_app.SEED):
        for name, local in last.local.items():
            before = personal.get(name)
            personal[name] = iopfl.update_personal(before, local, flower_app.ALPHA)
    expected = {"global": last.global_state}
    for name, state in personal.items():
        expected[f"personal-{name}"] = state

    assert {file.stem for file in out.iterdir()} == set(expected)
    for name, state in expected.items():
        found = torch.load(out / f"{name}.pt", weights_only=True)
        assert found.keys() == state.keys()
        for entry, value in state.items():
            assert torch.allclose(found[entry], value, atol=1e-4), f"{entry} of {name}"
