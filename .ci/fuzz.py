"""Damages what train.py reads, at random but seeded: python .ci/fuzz.py [COUNT] [--seed S].

Each case must end within a minute with exit status 0, 1 or 2, without a traceback, with one line
for an error, nothing half-written, no input changed. What was written is read back and computed
again (`check_…`). Exit status 1 where a case fails; --only N repeats one and keeps its files.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import iopfl  # noqa: E402
import train  # noqa: E402
from models import UNet  # noqa: E402

KINDS = {"plain": [], "greys": ["--mask-values", "0", "255"], "fundus": []}
with contextlib.suppress(ImportError):
    import nibabel
    KINDS["volumes"] = []
ONE = ["--threads", "1", "--device", "cpu"]
TOY = [*ONE, *"--size 16 --width 2 --depth 1 --rounds 1 --lr 0.01 --methods iopfl routing".split()]
TWO = [*TOY, "--rounds", "2", "--seeds", "0", "1"]


# ---------------------------------------------------------------- sound material
def paint(files: list[Path], kind: str, rng: np.random.Generator) -> None:
    """An image, a disc on noise, for fundus with a cup, 16 to 24 pixels; and its mask."""
    y, x = np.mgrid[:rng.integers(16, 25), :rng.integers(16, 25)]
    distance = np.hypot(y - rng.uniform(6, 10), x - rng.uniform(6, 10))
    mask = (distance < 6).astype(np.uint8) + (distance < 3) * np.uint8(kind == "fundus")
    image = rng.normal(80, 15, (*mask.shape, 3)) + 50 * mask[..., None] * (1, 0.8, 0.5)
    image = (image if kind == "fundus" else image[..., 0]).clip(0, 255).astype(np.uint8)
    values = {"greys": [0, 255], "fundus": [255, 128, 0]}.get(kind, [0, 1])
    for file, pixels in zip(files, (image, np.array(values, np.uint8)[mask])):
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "volumes":
            nibabel.save(nibabel.Nifti1Image(np.stack([pixels] * 2, axis=2), np.eye(4)), file)
        else:
            Image.fromarray(pixels).save(file)


def make_sound(sound: Path, seed: int) -> None:
    """Of each kind a folder, new images, a run and an adapted one; a whole run and half of it."""
    rng = np.random.default_rng(seed)
    places = {"fundus": "{site}/{part}/ROIs/{what}/{n}.png", "volumes": "{site}/{n}{ending}.nii"}
    for kind, more in KINDS.items():
        run, new = sound / f"{kind}-run", sound / f"{kind}-new"
        for site, n in ((site, n) for site in [*"abc", None] for n in range(5)):
            part, files = "train" if n < 4 else "test", []
            for what, ending in (("image", ""), ("mask", "_segmentation")):
                place = places.get(kind, "{site}/{what}s/{n}.png")
                name = place.format(site=site, part=part, what=what, n=n, ending=ending)
                files.append(sound / kind / name if site else new / f"{what}s" / Path(name).name)
            paint(files, kind, rng)
        must([*TOY, "--root", sound / kind, *more, "--out", run])
        must(["--adapt", run, "--images", new / "images", *ONE, "--out", sound / f"{kind}-adapted"])
    must([*TWO, "--root", sound / "plain", "--out", sound / "whole"])
    half = shutil.copytree(sound / "whole", sound / "half")  # as if killed after a round
    shutil.copy(sound / "plain-run/seed0-c-iopfl/last.pt", half / "seed0-c-iopfl/last.pt")
    (half / "results.json").unlink()
    (half / "seed0-c-iopfl/rows.json").unlink()


# ---------------------------------------------------------------- damage
BYTES = [lambda old, rng: old[:rng.randrange(len(old) + 1)], lambda old, rng: b"",
         lambda old, rng: rng.randbytes(99), lambda old, rng: flipped(old, rng, 64),
         lambda old, rng: flipped(old, rng, len(old))]
INSTEAD = [Path.mkdir, lambda file: file.symlink_to(file.name), lambda file: file.symlink_to("/no"),
           getattr(os, "mkfifo", Path.mkdir), lambda file: None]  # of a file
NAMES = ["a b", "new\nline", "-x", "x_segmentation", ".z", "x" * 200, "\udcff", "%s", "A", "07"]
CORNERS = {"I;16": [300, 65535], "I": [70000, -3], "F": [np.nan, np.inf, 1e38, 0.5]}  # pixels
MODES = ["1", "L", "L", "P", "RGB", "RGBA", "LA", "CMYK", *CORNERS]
ENDINGS = [".png", ".PNG", ".bmp", ".gif", ".tif", ".TIFF", ".jpg"]


def flipped(old: bytes, rng: random.Random, most: int) -> bytes:
    content = bytearray(old or b"x")
    for _ in range(rng.choice([1, 3, 30])):
        content[rng.randrange(max(1, min(most, len(old))))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(content)


def any_file(folder: Path, rng: random.Random, ending: str = "") -> Path:
    return rng.choice(sorted(f for f in folder.rglob(f"*{ending}") if f.is_file()))


def damage(folder: Path, rng: random.Random) -> None:
    """A file: other bytes, name, header, mode, size, ending, or something else in its place."""
    file, way = any_file(folder, rng), rng.randrange(8)
    if way < 2:
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
    elif way == 2:
        file.unlink()
        rng.choice(INSTEAD)(file)
    elif way == 3:
        file.rename(file.with_name(rng.choice(NAMES) + "".join(file.suffixes).upper()))
    elif data.is_volume(file):
        file.write_bytes(flipped(file.read_bytes(), rng, 348))
    else:
        mode, exif = rng.choice(MODES), Image.Exif()
        image = Image.open(file).convert("L" if mode in CORNERS else mode).convert(mode)
        image = image.resize(rng.choice([image.size, image.size, (1, 1), (40, 17)]))
        image.putpixel((0, 0), rng.choice(CORNERS.get(mode, [image.getpixel((0, 0))])))
        exif[274] = rng.choice([1, 1, 3, 6, 9])  # turned
        file.unlink()
        image.save(file.with_suffix(rng.choice([file.suffix, *ENDINGS])), exif=exif)


def damage_run(run: Path, rng: random.Random) -> str:
    """A model or report of a run: cut, flipped or another's; its name."""
    file, other = any_file(run, rng, rng.choice([".pt", ".json"])), any_file(run, rng)
    file.write_bytes(rng.choice([*BYTES, lambda old, rng: other.read_bytes()])(file.read_bytes(), rng))
    return str(file.relative_to(run))


def lay_out(site: Path, rng: random.Random) -> None:
    """Parts, lists of cases, other names, something more or less."""
    way, folder = rng.randrange(5), rng.choice([site, *sorted(site.rglob("*[a-zI]"))])
    for n, part in enumerate(["train", "train", "Valid", "Valid", "TEST"]):
        if way == 0:
            with open(site / f"{part.lower()[:5]}.txt", "a") as file:
                file.write(rng.choice([f"{n}\n"] * 9 + [f"{n}.png\n", "", "zz"]))
        for name in ("images", "masks") if way == 1 else ():
            (site / part / name).mkdir(parents=True, exist_ok=True)
            (site / name / f"{n}.png").rename(site / part / name / f"{n}.png")
    if way == 2:
        names = ["All", "ISBI", "x\ny", ".z", "\udcff", *[folder.name.upper()] * 5]
        folder.rename(folder.with_name(rng.choice(names)))
    if way == 3:
        makers = [Path.mkdir, Path.touch, lambda path: path.symlink_to("..")]
        rng.choice(makers)(folder / rng.choice(["notes.txt", "z.png", "1.bmp", "val", "masks"]))
    if way == 4:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- cases: command lines
def training(rng: random.Random, sound: Path, place: Path) -> list:
    kind = rng.choice([*KINDS])
    root = shutil.copytree(sound / kind, place / "root")
    for harm, sites in ([lay_out, rng.choice(["", "a", "abc"])], [damage, rng.choice(["", "a", "bb"])]):
        for site in sites:
            with contextlib.suppress(Exception):  # damaged so that no more is possible
                harm(root / site, rng)
    more = [[], ["--hold-out", "none"], ["--hold-out", "all"], ["--precision", "bf16"],
            ["--mask-values", "0", "1"], ["--skip-empty"], ["--participation", "0.5"]]
    return ["--root", root, *TOY, *KINDS[kind], *rng.choice(more)]


def adapting(rng: random.Random, sound: Path, place: Path) -> list:
    kind, run = rng.choice([*KINDS]), place / "run"
    shutil.copytree(sound / f"{rng.choice([kind, *KINDS])}-{rng.choice(['run', 'adapted'])}", run)
    new = shutil.copytree(sound / f"{kind}-new", place / "new")
    for harm in rng.choice([[], [damage], [damage], [damage] * 3, [damage_run]]):
        with contextlib.suppress(Exception):
            harm(run if harm is damage_run else new, rng)
    more = [[], ["--online"], ["--masks", new / "masks"], ["--masks", new / "masks"]]
    return [*ONE, "--adapt", run, "--images", new / "images", *rng.choice(more)]


def resuming(rng: random.Random, sound: Path, place: Path) -> list:
    out = shutil.copytree(sound / rng.choice(["half", "half", "whole"]), place / "work/out")
    (place / "spoiled").write_text(damage_run(out, rng) if rng.random() < 0.8 else "")
    return [*TWO, "--root", sound / "plain", rng.choice(["--resume"] * 3 + ["--overwrite"])]


def options(rng: random.Random, sound: Path, place: Path) -> list:
    names = [n.replace("_", "-") for n in train.DEFAULTS if n not in ("out", "images_per_site")]
    values = ["0", "1", "2", "-1", "0.5", "nan", "inf", "x", "all", "none", "a", "\n", "fundus"]
    simulated = ["--images-per-site", "4", "--sites", "2"]
    words = [*TOY, *rng.choice([["--root", sound / "plain"], simulated])]
    for _ in range(rng.choice([1, 2])):
        words += [f"--{rng.choice([*names, 'no'])}", *rng.choice([[], [rng.choice(values)]])]
    return words + ["--rounds", "1"] * ("--authors" in words)


# ---------------------------------------------------------------- what was written, read back
def dice(one: np.ndarray, two: np.ndarray, classes: list) -> float:
    a, b = np.isin(one, classes), np.isin(two, classes)
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


def pixels_of(file: Path) -> np.ndarray:
    """As stored, but upright; of colours the first channel."""
    if data.is_volume(file):
        return nibabel.as_closest_canonical(nibabel.load(file)).get_fdata()
    image = ImageOps.exif_transpose(Image.open(file))
    pixels = np.asarray(image.convert("L") if file.suffix.lower() == ".gif" else image)
    return pixels if pixels.ndim == 2 else pixels[:, :, 0]


def check_training(args: argparse.Namespace, out: Path, errors: str, spoiled: str) -> None:
    """All files are used or named; each hospital has a model, which gives the Dice reported."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    for row in rows if not spoiled else []:
        assert np.isfinite([v for v in row.values() if isinstance(v, float)]).all(), row
        assert 0 <= row["dice"] <= 1, row
    folders = [f for f in out.glob("seed*-iopfl") if f.name != spoiled.split("/")[0]]
    for folder in folders:
        row = json.loads((folder / "rows.json").read_text())["rows"][0]
        dataset, models = train.load_dataset(args, row["seed"]), train.load(folder / "last.pt")["own"]
        files = [f for f in Path(args.root or folder).rglob("*.*") if f.suffix != ".txt" and f.is_file()]
        count = 2 * sum(len({*site.everything.cases}) for site in dataset.sites)
        assert errors or not args.root or len([f for f in files if "/." not in str(f)]) == count, files
        inside = {site.name: site for site in dataset.sites if site.name != row["hold_out"]}
        assert models.keys() == inside.keys() or args.participation < 1, [*models]
        for name, state in models.items():
            model = UNet(dataset.channels, dataset.classes, args.width, args.depth)
            model.to(memory_format=torch.channels_last).load_state_dict(state)
            test = inside[name].test.to("cpu")
            with torch.autocast("cpu", torch.bfloat16, args.precision == "bf16"):
                found, cases = iopfl.predict(model, test.images).numpy(), np.array(test.cases)
            for structure, classes in dataset.structures.items():
                score = np.mean([dice(found[cases == case], test.masks[cases == case].numpy(), classes)
                                 for case in {*test.cases}])
                own = {"phase": "inside", "method": "iopfl", "site": name, "structure": structure}
                own |= {"seed": row["seed"], "hold_out": row["hold_out"]}
                told = [row["dice"] for row in rows if own.items() <= row.items()]
                assert len(told) == 1 and abs(told[0] - score) < 1e-9, (own, told, score)


def check_adapting(args: argparse.Namespace, out: Path, errors: str, spoiled: str) -> None:
    """Masks have the sizes of their images, known classes, the Dice reported, and come again."""
    known, structures = json.loads((out / "adapted.json").read_text()), {}
    with open(out / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    again = ["--adapt", out, "--images", args.images, *ONE, "--out", out.with_name("again")]
    assert args.online or run_train(again)[0] in (0, 1)
    for last in [*Path(args.adapt).glob("seed*-iopfl/last.pt")]:
        assert len(known["experts"]) == len(known["chosen"]) == len(train.load(last)["own"]) + 1
    assert len(rows) == len([*(out / "masks").iterdir()]) and (errors or len(rows) == 5), rows
    sources = {os.fsencode(f.name).decode(errors="backslashreplace"): f for f in Path(args.images).iterdir()}
    for row in rows:
        source = next(f for name, f in sources.items() if name in (row["file"]))
        name = train.mask_name(source)
        mask, stem = pixels_of(out / "masks" / name), data.stem(source)
        assert mask.shape == pixels_of(source).shape and mask.max() < known["classes"], name
        assert abs((mask > 0).mean() - float(row["foreground"])) < 1e-9, row
        second = out.with_name("again") / "masks" / name
        assert args.online or second.read_bytes() == (out / "masks" / name).read_bytes(), name
        for structure, classes in known["structures"].items():
            if row.get(f"Dice {structure} after"):
                drawn = [f for f in Path(args.masks).iterdir() if data.stem(f) in (stem, f"{stem}_segmentation")]
                truth, values = pixels_of(drawn[-1]), known["mask_values"]
                if data.is_volume(source):
                    truth = truth > 0
                elif values:
                    truth = np.abs(truth[..., None].astype(int) - values).argmin(axis=-1)
                score = dice(mask, truth, classes)
                assert abs(score - float(row[f"Dice {structure} after"])) < 1e-9, (row, score)


# ---------------------------------------------------------------- running
class Hang(BaseException):
    """No `except Exception` holds it up."""


def ring(*_) -> None:
    raise Hang("more than a minute")


def run_train(argv: list) -> tuple[int, str]:
    """Exit status and stderr of `train.main`."""
    errors, alarm = io.StringIO(), getattr(signal, "alarm", lambda seconds: None)
    alarm(60)
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(errors):
        status = train.main([str(word) for word in argv])
    alarm(0)
    return status, errors.getvalue()


def must(argv: list) -> None:
    assert run_train(argv) == (0, ""), argv


def contents(*folders: Path) -> dict:
    """Everything in some folders."""
    found = {file: file.is_file() for folder in folders for file in folder.rglob("*")}
    return {file: file.read_bytes() if whole else None for file, whole in found.items()}


def case(rng: random.Random, sound: Path, place: Path) -> tuple[str, int]:
    """Kind and exit status of a case; raises where it does not end as it should."""
    make, out = rng.choice([training] * 3 + [adapting] * 3 + [resuming, options]), place / "work/out"
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    argv = [*map(str, make(rng, sound, place)), "--out", str(out)]
    before = contents(place, sound)
    status, errors = run_train(argv)
    after, lines = contents(place, sound), errors.splitlines()
    check = check_adapting if "--adapt" in argv else check_training
    proof = out / ("adapted.json" if check is check_adapting else "results.json")
    new = after.get(proof, b"") != before.get(proof, b"") and proof.exists()
    notes = [line for line in lines if line.startswith(("train.py: left out", "train.py: not scored"))]
    inputs = {f: content for f, content in before.items() if place / "work" not in f.parents}
    try:
        assert status in (0, 1, 2) and "Traceback" not in errors and "IOPFL_TRACEBACK" not in errors
        assert status == 0 or len(lines) - len(notes) == (not new), "lines on stderr"
        assert all(after.get(f, 0) == content for f, content in inputs.items()), "an input changed"
        assert status != 2 or after == before, "written in spite of wrong use"
        assert not [f for f in after if f.name.endswith(".partial")], "half-written"
        spoiled = place / "spoiled"
        spoiled = spoiled.read_text() if spoiled.exists() and "--resume" in argv else ""
        with contextlib.redirect_stderr(io.StringIO()):
            new and check(train.parse_arguments(argv), out, errors, spoiled)
    except Exception as error:
        raise AssertionError(f"{error!r} {argv}: {status}, {errors!r}") from error
    return make.__name__, status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N")
    args = parser.parse_args()
    warnings.simplefilter("always")
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, ring)
    folder, found, faults = Path(tempfile.mkdtemp()), {}, 0
    make_sound(folder / "sound", args.seed)
    for number in range(args.count) if args.only is None else [args.only]:
        try:
            kind = case(random.Random(f"{args.seed} {number}"), folder / "sound", folder / "case")
            found[kind] = found.get(kind, 0) + 1
        except (Exception, Hang) as error:
            faults += 1
            print(f"--seed {args.seed} --only {number}: {error}", flush=True)
    print(f"{faults} faults; cases by exit status: {found}")
    if args.only is None:
        shutil.rmtree(folder)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
