"""Damages what train.py reads, at random but seeded: python .ci/fuzz.py [COUNT] [--seed S].

Each case must end within a minute with exit status 0, 1 or 2, one line for an error, nothing
half-written, no input changed. What was written is read back and computed again (`check_…`).
Case N is the first one of seed N; where one fails, the exit status is 1.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from train import UNet, data, iopfl  # noqa: E402

# Of each kind: folder of a site's images, that of its masks, their names; options of a training.
KINDS = {"plain": ("images", "masks", ".png", ".png", []),
         "greys": ("Images", "Masks", ".bmp", ".gif", ["--mask-values", "0", "255"]),
         "fundus": ("train/ROIs/image", "train/ROIs/mask", ".png", ".png", [])}
with suppress(ImportError):
    import nibabel
    KINDS["volumes"] = ("", "", ".nii", "_segmentation.nii", [])
ONE = ["--threads", "1", "--device", "cpu"]
TOY = [*ONE, *"--size 16 --width 2 --depth 1 --rounds 1 --lr 0.01 --methods iopfl routing".split()]
TWO = [*TOY, "--rounds", "2", "--seeds", "0", "1"]
# What takes the place of a file; names, pixels, modes, endings; options and their values.
INSTEAD = [Path.mkdir, lambda file: file.symlink_to(file.name), lambda file: file.symlink_to("/no"),
           getattr(os, "mkfifo", Path.mkdir), lambda file: None]
NAMES = ["a b", "new\nline", "-x", "x_segmentation", ".z", "x" * 200, "\udcff", "%s", "A", "07"]
SITES = ["All", "ISBI", "x\ny", ".z", "\udcff"]
CORNERS = {"I;16": [300, 65535], "I": [70000, -3], "F": [np.nan, np.inf, 1e38, 0.5]}
MODES = ["1", "L", "L", "P", "RGB", "RGBA", "LA", "CMYK", *CORNERS]
ENDINGS = [".png", ".PNG", ".bmp", ".gif", ".tif", ".TIFF", ".jpg"]
OPTIONS = ["size", "depth", "lr", "alpha", "seeds", "participation", "batch-size", "methods", "no",
           "mask-values", "hold-out", "precision", "adapt", "masks", "online", "resume", "list"]
WORDS = ["0", "1", "2", "-1", "0.5", "nan", "inf", "x", "all", "none", "a", "\n", "fundus"]
MORE = [[], ["--hold-out", "none"], ["--hold-out", "all"], ["--precision", "bf16"],
        ["--mask-values", "0", "1"], ["--skip-empty"], ["--participation", "0.5"]]


def paint(files: list[Path], kind: str, rng: np.random.Generator) -> None:
    """An image, a disc on noise, for fundus with a cup, 16 to 24 pixels; and its mask."""
    y, x = np.mgrid[:rng.integers(16, 25), :rng.integers(16, 25)]
    distance = np.hypot(y - rng.uniform(6, 10), x - rng.uniform(6, 10))
    mask = (distance < 6).astype(int) + (distance < 3) * (kind == "fundus")
    image = rng.normal(80, 15, (*mask.shape, 3)) + 50 * mask[..., None] * (1, 0.8, 0.5)
    mask = np.array({"greys": [0, 255], "fundus": [255, 128, 0]}.get(kind, [0, 1]))[mask]
    for file, pixels in zip(files, (image if kind == "fundus" else image[..., 0], mask)):
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = pixels.clip(0, 255).astype(np.uint8)
        if kind == "volumes":
            nibabel.save(nibabel.Nifti1Image(np.stack([pixels] * 2, axis=2), np.eye(4)), file)
        else:
            Image.fromarray(pixels).save(file)


def make_sound(sound: Path) -> None:
    """Of each kind a folder, a run and an adapted one; half a run."""
    rng = np.random.default_rng(0)
    for kind, (images, masks, ending, mask_ending, more) in KINDS.items():
        for site, n in ((sound / kind / site, n) for site in "abc" for n in range(5)):
            files = site / images / f"{n}{ending}", site / masks / f"{n}{mask_ending}"
            if n > 3:
                files = [Path(str(file).replace("/train/", "/test/")) for file in files]
            paint(files, kind, rng)
        run, site = sound / f"{kind}-run", sound / kind / "c"
        run_train([*TOY, "--root", sound / kind, *more, "--out", run])
        run_train([*ONE, "--adapt", run, "--images", site / images, "--out", f"{run}-adapted"])
    run_train([*TWO, "--root", sound / "plain", "--out", sound / "half"])
    (sound / "half/results.json").unlink()  # as if killed after the first round
    (sound / "half/seed0-c-iopfl/rows.json").unlink()
    shutil.copy(sound / "plain-run/seed0-c-iopfl/last.pt", sound / "half/seed0-c-iopfl/last.pt")


def other_bytes(old: bytes, rng: random.Random) -> bytes:
    """Some, often of the header, are others; or cut, empty, noise."""
    content, most = bytearray(old), min(len(old), rng.choice([64, len(old)]))
    for _ in range(rng.choice([1, 3, 30]) if old else 0):
        content[rng.randrange(most)] = rng.choice([0, 255, rng.randrange(256)])
    cut = old[:rng.randrange(len(old) + 1)]
    return rng.choice([bytes(content), bytes(content), cut, b"", rng.randbytes(99)])


def damage(folder: Path, rng: random.Random) -> None:
    """A file, of a run a model or report: cut, flipped, another's, renamed, repainted."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    files = [f for f in files if f.suffix in (".pt", ".json")] or files
    file, other = rng.choice(files), rng.choice(files)
    way, content = rng.randrange(7 if file.suffix in ENDINGS else 4), file.read_bytes()
    if way < 2:
        file.write_bytes(rng.choice([other.read_bytes(), *[other_bytes(content, rng)] * 3]))
    elif way == 2:
        file.unlink()
        rng.choice(INSTEAD)(file)
    elif way == 3:
        file.rename(file.with_name(rng.choice(NAMES) + file.suffix.upper()))
    else:
        mode, exif, image = rng.choice(MODES), Image.Exif(), Image.open(io.BytesIO(content))
        image = image.convert("L" if mode in CORNERS else mode).convert(mode)
        image = image.resize(rng.choice([image.size, image.size, (1, 1), (40, 17)]))
        image.putpixel((0, 0), rng.choice(CORNERS.get(mode, [image.getpixel((0, 0))])))
        exif[274] = rng.choice([1, 1, 3, 6, 9])  # turned
        file.unlink()
        image.save(file.with_suffix(rng.choice([file.suffix, *ENDINGS])), exif=exif)


def lay_out(site: Path, rng: random.Random) -> None:
    """Parts, lists of cases, other names, something more or less."""
    way, folder = rng.randrange(5), rng.choice([site, *sorted(site.rglob("*[a-zI]"))])
    for n, part in enumerate(["train", "train", "Valid", "Valid", "TEST"]):
        if way == 0:
            with open(site / f"{part.lower()}.txt", "a") as file:
                file.write(rng.choice([f"{n}\n"] * 9 + [f"{n}.png\n", "", "zz"]))
        for name in ("images", "masks") if way == 1 else ():
            (site / part / name).mkdir(parents=True, exist_ok=True)
            (site / name / f"{n}.png").rename(site / part / name / f"{n}.png")
    if way == 2:
        folder.rename(folder.with_name(rng.choice([*SITES, *[folder.name.upper()] * 5])))
    elif way == 3:
        more = folder / rng.choice(["notes.txt", "z.png", "1.bmp", "val", "masks"])
        rng.choice([Path.mkdir, Path.touch, lambda path: path.symlink_to("..")])(more)
    elif way == 4:
        shutil.rmtree(folder)


def command(rng: random.Random, sound: Path, place: Path) -> list[str]:
    """The command line of a case, whose material lies in `place`."""
    kind, what = rng.choice([*KINDS]), rng.randrange(8)
    images, masks, *_, options = KINDS[kind]
    root = shutil.copytree(sound / kind, place / "root")
    argv = ["--root", root, *TOY, *options, *rng.choice(MORE)]
    if what in (3, 4, 5):
        run = f"{rng.choice([kind, *KINDS])}-run{rng.choice(['', '-adapted'])}"
        shutil.copytree(sound / run, place / "run")
        argv = [*ONE, "--adapt", place / "run", "--images", root / "c" / images]
        argv += rng.choice([[], ["--online"], ["--masks", root / "c" / masks]])
    if what == 6:
        shutil.copytree(sound / "half", place / "work/out")
        argv = [*TWO, "--root", sound / "plain", rng.choice(["--resume"] * 3 + ["--overwrite"])]
    if what == 7:
        argv = [*TOY, "--root", root] if rng.random() < 0.5 else [*TOY, "--sites", "2"]
        argv += [f"--{rng.choice(OPTIONS)}", *rng.choice([[], [rng.choice(WORDS)]])]
    with suppress(OSError, ValueError, LookupError):  # no more damage is possible
        for site in rng.choice(["", "", "a", "abc"]) if what < 3 else "":
            lay_out(root / site, rng)
        for _ in range(rng.choice([0, 0, 1, 3])):
            damage({3: place / "run", 6: place / "work/out"}.get(what, root / "c"), rng)
            (place / "spoiled").touch()
    return [*map(str, argv), "--out", str(place / "work/out")]


def check_training(args: argparse.Namespace, out: Path, errors: str) -> None:
    """Files are used or named; each hospital inside has a model, which gives the Dice reported."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all() and all(0 <= row["dice"] <= 1 for row in rows), "rows"
    for folder in out.glob("seed*-iopfl"):
        own = json.loads((folder / "rows.json").read_text())["rows"]
        dataset = train.load_dataset(args, own[0]["seed"])
        files = [str(f) for f in Path(args.root or out / "-").rglob("*.*") if f.is_file()]
        files = [file for file in files if not file.endswith(".txt") and "/." not in file]
        count = 2 * sum(len({*site.everything.cases}) for site in dataset.sites)
        assert errors or not args.root or len(files) == count, f"{len(files)} files, {count} used"
        models = torch.load(folder / "last.pt", weights_only=True)["own"]
        inside = {site.name: site for site in dataset.sites if site.name != own[0]["hold_out"]}
        assert {*models} == {*inside} or args.participation < 1, [*models]
        for name, state in models.items():
            site, model = inside[name], UNet(dataset.channels, dataset.classes, 2, args.depth)
            model.to(memory_format=torch.channels_last).load_state_dict(state)
            with torch.autocast("cpu", torch.bfloat16, args.precision == "bf16"):
                found = iopfl.predict(model, site.test.to("cpu").images)
            scores = iopfl.evaluate(found, site.test.masks, site.test.cases, dataset.structures,
                                    site.spacing, distances=False)
            same = {"phase": "inside", "method": "iopfl", "site": name}
            told = [r["dice"] for r in own if same.items() <= r.items() and r in rows]
            assert told == [row["dice"] for row in scores], (same, told, scores)


def check_adapting(args: argparse.Namespace, out: Path, errors: str) -> None:
    """Masks have their images' sizes, known classes, the Dice reported, and come again."""
    known, again = json.loads((out / "adapted.json").read_text()), out.with_name("again")
    rows = {row["file"]: row for row in known["rows"]}
    for last in Path(args.adapt).glob("seed*-iopfl/last.pt"):
        count = len(torch.load(last, weights_only=True)["own"]) + 1
        assert count == len(known["experts"]) == len(known["chosen"]), known["experts"]
    sources = [f for f in Path(args.images).iterdir() if "_segmentation" not in f.name.lower()]
    seen = [f for f in sources if f.name[0] != "."]
    assert len(rows) == len([*(out / "masks").iterdir()]) and (errors or len(rows) == len(seen))
    run_train([*ONE, "--adapt", out, "--images", args.images, "--out", again])
    drawn = {data.stem(f).replace("_segmentation", ""): f
             for f in Path(args.masks or out).iterdir() if f not in sources}
    for source in (f for f in sources if f.name in rows):
        row, name = rows[source.name], data.stem(source)
        file = f"masks/{name}" + (".nii.gz" if data.is_volume(source) else ".png")
        shape, most = data.read_file(source)[0].shape[:3], known["classes"]
        mask = data.read_truth(out / file, None, "images", shape, most)  # refuses another shape
        assert abs((mask > 0).mean() - row["foreground"]) < 1e-9, row
        assert args.online or (again / file).read_bytes() == (out / file).read_bytes(), row
        for structure in (s for s in known["structures"] if f"Dice {s}" in row):
            values, classes = known["mask_values"], known["structures"][structure]
            truth = data.read_truth(drawn[name], values, known["kind"], shape, most)
            score = iopfl.dice(np.isin(mask, classes), np.isin(truth, classes))
            assert abs(score - row[f"Dice {structure}"]) < 1e-9, (row, score)


def run_train(argv: list) -> tuple[int, str]:
    """Exit status and stderr of `train.main`; 130 after a minute."""
    errors, alarm = io.StringIO(), getattr(signal, "alarm", lambda seconds: None)
    alarm(60)
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())), redirect_stderr(errors):
        status = train.main([str(word) for word in argv])
    alarm(0)
    return status, errors.getvalue()


def case(rng: random.Random, sound: Path, place: Path) -> int:
    """The exit status of a case; raises AssertionError where it does not end as it should."""
    def contents() -> dict:
        found = [*sound.rglob("*"), *place.rglob("*")]
        return {file: file.read_bytes() if file.is_file() else None for file in found}

    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    argv, out = command(rng, sound, place), place / "work/out"
    before, (status, errors), after = contents(), run_train(argv), contents()
    check = check_adapting if "--adapt" in argv else check_training
    proof = out / ("adapted.json" if "--adapt" in argv else "results.json")
    new = proof in after and after[proof] != before.get(proof)
    lines = [e for e in errors.splitlines() if "left out: " not in e and "not scored: " not in e]
    try:
        assert status in (0, 1, 2) and "Traceback" not in errors and "IOPFL_TRACEBACK" not in errors
        assert status == 0 or len(lines) == (not new), "lines on stderr"
        for file in (f for f in before if place / "work" not in f.parents or status == 2):
            assert after.get(file, 0) == before[file], f"changed: {file}"
        assert status != 2 or len(after) == len(before), "written in spite of wrong use"
        assert not [file for file in after if file.suffix == ".partial"], "half-written"
        if new and not ("--resume" in argv and (place / "spoiled").exists()):
            with redirect_stderr(io.StringIO()):
                check(train.parse_arguments(argv), out, errors)
    except Exception as error:
        raise AssertionError(f"{error!r}\n  {argv}: {status}, {errors!r}") from error
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("always")
    signal.signal(getattr(signal, "SIGALRM", signal.SIGINT), signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        sound, ends = Path(folder) / "sound", []
        make_sound(sound)
        for seed in range(args.seed, args.seed + args.count):
            try:
                ends.append(case(random.Random(f"case {seed}"), sound, Path(folder) / "case"))
            except AssertionError as error:
                ends.append(-1)
                print(f"fuzz.py 1 --seed {seed}: {error}", flush=True)
    print("faults and cases by exit status:", [ends.count(status) for status in (-1, 0, 1, 2)])
    return int(-1 in ends)


if __name__ == "__main__":
    sys.exit(main())
