"""Damages what train.py reads, at random but seeded, and checks how each case ends.

    python .ci/fuzz.py [COUNT] [--seed S]    exit status 1 where a case fails
    python .ci/fuzz.py --seed S --only N     one case again, its files kept

Each must end within a minute with exit status 0, 1 or 2, without a traceback, with one line for an
error, nothing half-written, no input changed. What it wrote is read back, computed again (`check…`).
"""

import argparse
import contextlib
import csv
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
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
def paint(image_file: Path, mask_file: Path, kind: str, rng: np.random.Generator) -> None:
    """A bright disc, for fundus with a brighter cup, on noise, 16 to 24 pixels; and its mask."""
    height, width = rng.integers(16, 25, 2)
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height * rng.uniform(0.4, 0.6), x - width * rng.uniform(0.4, 0.6))
    mask = (distance < 6).astype(np.uint8) + (distance < 3) * np.uint8(kind == "fundus")
    image = rng.normal(80, 15, (height, width, 3)) + 50 * mask[..., None] * (1, 0.8, 0.5)
    image = np.clip(image if kind == "fundus" else image[..., 0], 0, 255).astype(np.uint8)
    mask = np.array({"greys": [0, 255], "fundus": [255, 128, 0]}.get(kind, [0, 1]), np.uint8)[mask]
    for file, pixels in ((image_file, image), (mask_file, mask)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "volumes":
            nibabel.save(nibabel.Nifti1Image(np.stack([pixels] * 2, axis=2), np.eye(4)), file)
        else:
            Image.fromarray(pixels).save(file)


def make_sound(sound: Path, seed: int) -> None:
    """Of each kind a folder of images, new images, a run, an adapted run; a whole run, half of it."""
    rng = np.random.default_rng(seed)
    where = {"fundus": ("{part}/ROIs/image/{n}.png", "{part}/ROIs/mask/{n}.png"),
             "volumes": ("{n}.nii.gz", "{n}_segmentation.nii.gz")}
    for kind, more in KINDS.items():
        for site, n in ((site, n) for site in "abc" for n in range(5)):
            names = where.get(kind, ("images/{n}.png", "masks/{n}.png"))
            names = [name.format(n=n, part="train" if n < 4 else "test") for name in names]
            paint(*(sound / kind / site / name for name in names), kind, rng)
            for name, folder in zip(names, ("images", "masks")):
                new = sound / f"{kind}-new" / folder / Path(name).name
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(sound / kind / site / name, new)  # those of c in the end
        made = sound / f"{kind}-run"
        must([*TOY, "--root", sound / kind, *more, "--out", made])
        must([*ONE, "--adapt", made, "--images", sound / f"{kind}-new/images",
              "--out", sound / f"{kind}-adapted"])
    must([*TWO, "--root", sound / "plain", "--out", sound / "whole"])
    half = shutil.copytree(sound / "whole", sound / "half")  # as if killed after a first round
    shutil.copy(sound / "plain-run/seed0-c-iopfl/last.pt", half / "seed0-c-iopfl/last.pt")
    (half / "results.json").unlink()
    (half / "seed0-c-iopfl/rows.json").unlink()


# ---------------------------------------------------------------- damage to files
BYTES = [lambda old, rng: b"", lambda old, rng: old[:rng.randrange(len(old) + 1)],
         lambda old, rng: rng.randbytes(rng.randrange(2000)), lambda old, rng: flipped(old, rng, 64),
         lambda old, rng: flipped(old, rng, 10**6)]
INSTEAD = [Path.mkdir, lambda file: file.symlink_to(file.name), lambda file: file.symlink_to("/no"),
           getattr(os, "mkfifo", Path.mkdir), lambda file: None]  # in place of a file
NAMES = ["a b", "ä", "new\nline", "-x", "x_segmentation", ".z", "x" * 200, "\udcff", "%s", "A", "07"]
CORNERS = {"I;16": [300, 65535], "I": [70000, -3], "F": [math.nan, math.inf, 1e38, 0.5]}  # pixels
MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", *CORNERS]
ENDINGS = [".png", ".PNG", ".bmp", ".gif", ".tif", ".TIFF", ".jpg"]
VALUES = [None, "", "x", -1, 0, 1, 2.5, 10**20, 1e308, math.nan, True, [], {}, ["x"], {"a": 1}]


def flipped(old: bytes, rng: random.Random, most: int) -> bytes:
    content = bytearray(old or b"x")
    for _ in range(rng.choice([1, 3, 30])):
        content[rng.randrange(min(most, len(content)))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(content)


def any_file(folder: Path, rng: random.Random, pattern: str = "*") -> Path:
    return rng.choice(sorted(p for p in folder.rglob(pattern) if p.is_file() and not p.is_symlink()))


def damage(file: Path, rng: random.Random) -> None:
    """An image or mask: other bytes, name or header, mode, size and ending, or no file at all."""
    way = rng.randrange(8)
    if way < 2:
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
    elif way == 2:
        file.unlink()
        rng.choice(INSTEAD)(file)
    elif way == 3:
        file.rename(file.with_name(rng.choice(NAMES) + "".join(file.suffixes).upper()))
    elif data.is_volume(file):
        file.write_bytes(gzip.compress(flipped(gzip.decompress(file.read_bytes()), rng, 348)))
    else:
        image, mode = Image.open(file), rng.choice(MODES)
        image = image.convert("L" if mode in CORNERS else mode).convert(mode)
        if rng.random() < 0.3:
            image = image.resize((rng.choice([1, 17, 40]), rng.choice([1, 2, 40])))
        if mode in CORNERS:
            image.putpixel((0, 0), rng.choice(CORNERS[mode]))
        new, exif = file.with_suffix(rng.choice([file.suffix, *ENDINGS])), Image.Exif()
        exif[274] = rng.choice([1, 1, 3, 6, 9])  # turned
        file.unlink()
        image.save(new, exif=exif)


def damage_run(run: Path, rng: random.Random) -> str:
    """A file of a run: its name in the run."""
    file, way = any_file(run, rng, rng.choice(["*.pt", "*.json"])), rng.randrange(5)
    if way == 0:
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
    elif way == 1:
        shutil.copy(any_file(run, rng), file.with_name("copy")).replace(file)
    elif file.suffix == ".json":
        content = json.loads(file.read_text())
        change(content, rng)
        file.write_text(json.dumps(content))
    else:
        content = torch.load(file, weights_only=True)
        change(content, rng)
        torch.save(content, file)
    return str(file.relative_to(run))


def change(content: dict | list, rng: random.Random) -> None:
    """An entry, somewhere inside, becomes something else or goes."""
    key = rng.choice([*content] if isinstance(content, dict) else range(len(content)))
    value = content[key]
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        change(value, rng)
    elif rng.random() < 0.2:
        del content[key]
    elif torch.is_tensor(value):
        content[key] = rng.choice([value * math.nan, value[None], value.double(), value.to_sparse()])
    else:
        content[key] = rng.choice(VALUES)


def lay_out(site: Path, rng: random.Random) -> None:
    """Parts, lists of cases, other names, something more or less."""
    way, folders = rng.randrange(5), [site, *sorted(p for p in site.rglob("*") if p.is_dir())]
    folder, parts = rng.choice(folders), {"train": "01", rng.choice(["val", "Valid"]): "23", "TEST": "4"}
    if way == 0 and (site / "images").exists():
        for part, name in ((part, name) for part in parts for name in ("images", "masks")):
            for file in (site / name / f"{number}.png" for number in parts[part]):
                (site / part / name).mkdir(parents=True, exist_ok=True)
                file.rename(site / part / name / file.name)
    elif way <= 1:
        for part, names in parts.items():
            lines = "".join(f"{n}{rng.choice(['', '', '.png'])}\n" for n in names)
            (site / f"{part.lower()}.txt").write_text(rng.choice([lines] * 9 + ["", "zz"]))
    elif way == 2:
        name = rng.choice(["All", "ISBI", "x\ny", ".z", "\udcff", *[folder.name.upper()] * 5])
        folder.rename(folder.with_name(name))
    elif way == 3:
        name = rng.choice(["notes.txt", "z.png", "z.nii.gz", "1.bmp", "val", "masks", "d"])
        rng.choice([Path.mkdir, Path.touch, lambda path: path.symlink_to("..")])(folder / name)
    else:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- cases: each a command line
def training(rng: random.Random, sound: Path, place: Path) -> list:
    kind = rng.choice([*KINDS])
    root = shutil.copytree(sound / kind, place / "root")
    for site in rng.choice([[], "a", "abc"]):
        with contextlib.suppress(OSError):  # damaged so that no more is possible
            lay_out(root / site, rng)
    spoil(root, rng)
    more = [[], [], ["--hold-out", "none"], ["--hold-out", "all"], ["--precision", "bf16"],
            ["--mask-values", "0", "1"], ["--skip-empty"], ["--participation", "0.5"]]
    argv = [*TOY, *KINDS[kind], *rng.choice(more)]
    return ["--root", root, *rng.choice([argv] * 9 + [["--list", "--size", "16", *KINDS[kind]]])]


def adapting(rng: random.Random, sound: Path, place: Path) -> list:
    kind = rng.choice([*KINDS])
    run = sound / f"{rng.choice([kind, kind, *KINDS])}-{rng.choice(['run', 'run', 'adapted'])}"
    new = shutil.copytree(sound / f"{kind}-new", place / "new")
    if rng.random() < 0.4:
        run = shutil.copytree(run, place / "run")
        damage_run(run, rng)
    else:
        spoil(new, rng)
    more = [[], ["--online"], ["--masks", new / "masks"], ["--masks", new / "masks"]]
    return [*ONE, "--adapt", run, "--images", new / "images", *rng.choice(more)]


def resuming(rng: random.Random, sound: Path, place: Path) -> list:
    out = shutil.copytree(sound / rng.choice(["half", "half", "whole"]), place / "work/out")
    (out / "notes.txt").touch()
    if rng.random() < 0.8:
        (place / "spoiled").write_text(damage_run(out, rng))
    return [*TWO, "--root", sound / "plain", *rng.choice([["--resume"]] * 4 + [["--overwrite"], []])]


def options(rng: random.Random, sound: Path, place: Path) -> list:
    words = [*TOY, *rng.choice([[], ["--root", sound / "plain"], ["--task", "fundus"]]),
             "--images-per-site", "4", "--sites", "2"][:rng.choice([99, 99, -4])]
    values = ["", "0", "1", "2", "3", "-1", "0.5", "nan", "inf", "x", "all", "none", "a", "\n", "9 9"]
    names = ["size", "depth", "lr", "alpha", "seeds", "participation", "batch-size", "methods", "root",
             "mask-values", "hold-out", "precision", "threads", "adapt", "masks", "local-epochs", "no"]
    names += ["online", "resume", "overwrite", "skip-empty", "list", "authors", "width", "images"]
    for _ in range(rng.choice([1, 2])):
        words += [f"--{rng.choice(names)}", *rng.choice([*values, *[""] * 9]).split(" ")]
    return [word for word in words if word != ""] + ["--rounds", "1"] * ("--authors" in words)


def spoil(folder: Path, rng: random.Random) -> None:
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        with contextlib.suppress(Exception):  # damaged so that no more is possible
            damage(any_file(folder, rng), rng)


# ---------------------------------------------------------------- what a case must have done
def dice(one: np.ndarray, two: np.ndarray, classes) -> float:
    a, b = np.isin(one, classes), np.isin(two, classes)
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


def check_training(argv: list[str], out: Path, errors: str, spoiled: str) -> None:
    """Each hospital's model, run again on its test images, has the Dice reported."""
    args, rows = train.parse_arguments(argv), json.loads((out / "results.json").read_text())["rows"]
    for row in rows if not spoiled else []:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert all(map(math.isfinite, numbers)) and 0 <= row["dice"] <= 1, row
    for folder in out.glob("seed*-iopfl") if "iopfl" in args.methods else []:
        if spoiled.startswith(folder.name):
            continue
        own = json.loads((folder / "rows.json").read_text())["rows"]
        assert all(row in rows for row in own), folder
        dataset = train.load_dataset(args, own[0]["seed"])
        count = sum(len(set(site.everything.cases)) for site in dataset.sites)
        files = [p for p in Path(args.root or out / "none").rglob("*") if p.is_file()]
        files = [p for p in files if "/." not in str(p) and p.suffix != ".txt"]
        assert errors or not files or len(files) == 2 * count, f"{len(files)} files, {count} images"
        inside = {s.name: s for s in dataset.sites if s.name != own[0]["hold_out"]}
        models = torch.load(folder / "last.pt", weights_only=True)["own"]
        assert models.keys() == inside.keys() or args.participation < 1, [*models]
        scores = {(r["site"], r["structure"]): r["dice"] for r in own
                  if r["phase"] == "inside" and r["method"] == "iopfl"}
        for name in models:
            test, network = inside[name].test.to("cpu"), UNet(dataset.channels, dataset.classes, args.width, args.depth)
            network = network.to(memory_format=torch.channels_last)
            network.load_state_dict(models[name])
            with torch.autocast("cpu", torch.bfloat16, args.precision == "bf16"):
                found, truth = iopfl.predict(network, test.images).numpy(), test.masks.numpy()
            for structure, classes in dataset.structures.items():
                places = [np.array(test.cases) == case for case in dict.fromkeys(test.cases)]
                mean = np.mean([dice(found[p], truth[p], classes) for p in places])
                assert abs(mean - scores[name, structure]) < 1e-9, (name, structure, mean, scores)


def pixels_of(file: Path) -> np.ndarray:
    """As stored, but upright; of colours the first channel."""
    if data.is_volume(file):
        return nibabel.as_closest_canonical(nibabel.load(file)).get_fdata()
    image = ImageOps.exif_transpose(Image.open(file))
    pixels = np.asarray(image.convert("L") if file.suffix.lower() == ".gif" else image)
    return pixels if pixels.ndim == 2 else pixels[:, :, 0]


def check_adapting(argv: list[str], out: Path, errors: str, spoiled: str) -> None:
    """Masks have the sizes of their images, few classes, the Dice reported; and come again."""
    args, known = train.parse_arguments(argv), json.loads((out / "adapted.json").read_text())
    run, images = Path(args.adapt), Path(args.images)
    with open(out / "images.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    files = {os.fsencode(p.name).decode(errors="replace"): p for p in images.iterdir() if p.is_file()}
    assert len(rows) == len(list((out / "masks").iterdir())), [*rows]
    for last in [*run.glob("last.pt"), *run.glob("seed*-iopfl/last.pt")]:
        hospitals = torch.load(last, weights_only=True)["own"]
        assert len(known["experts"]) == len(known["chosen"]) == len(hospitals) + 1, known["experts"]
    assert errors or len(rows) == len(files), f"{[*rows]}, {[*files]}"
    for name, row in rows.items():
        source = files[name]
        mask = pixels_of(out / "masks" / train.mask_name(source))
        assert mask.shape == pixels_of(source).shape and mask.max() < known["classes"], name
        assert abs((mask > 0).mean() - float(row["foreground"])) < 1e-9, name
        dices = [k.split()[1:-1] for k in row if k.startswith("Dice") and k.endswith("after") and row[k]]
        for structure in map(" ".join, dices):
            drawn = [p for p in Path(args.masks).iterdir()
                     if data.stem(p) in (data.stem(source), data.stem(source) + "_segmentation")]
            truth, values = pixels_of(drawn[-1]), args.mask_values or known["mask_values"]
            if values:
                truth = np.abs(truth[..., None] - np.array(values)).argmin(axis=-1)
            truth = truth > 0 if data.is_volume(source) else truth
            mean = dice(mask, truth, known["structures"][structure])
            assert abs(mean - float(row[f"Dice {structure} after"])) < 1e-9, (name, mean, row)
    again = out.with_name("again")
    if not args.online and again != out:
        status, _ = run_train([*ONE, "--adapt", str(out), "--images", args.images, "--out", str(again)])
        for mask in (out / "masks").iterdir():
            assert mask.read_bytes() == (again / "masks" / mask.name).read_bytes(), f"again: {mask}"


# ---------------------------------------------------------------- running
class Hang(BaseException):
    """More than a minute; no `except Exception` holds it up."""


def ring(*_) -> None:
    raise Hang("more than a minute")


def run_train(argv: list[str]) -> tuple[int, str]:
    """Exit status and stderr of `train.main`."""
    errors = io.StringIO()
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, ring)
        signal.alarm(60)
    try:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            with contextlib.redirect_stderr(errors):
                return train.main(argv), errors.getvalue()
    except SystemExit as end:  # --help
        return end.code, errors.getvalue()
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def must(argv: list) -> None:
    status, errors = run_train([str(word) for word in argv])
    assert status == 0 and not errors, (argv, errors)


def contents(*folders: Path) -> dict[Path, bytes | str | None]:
    """Everything in some folders."""
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file()
            else None for folder in folders for path in folder.rglob("*")}


def case(seed: int, number: int, sound: Path, place: Path) -> tuple[str, int]:
    """Kind and exit status of a case; raises where it does not end as it should."""
    rng, out = random.Random(f"{seed} {number}"), place / "work/out"
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    make = rng.choice([training, training, training, adapting, adapting, adapting, resuming, options])
    argv = [str(word) for word in make(rng, sound, place)] + ["--out", str(out)]
    before, written = contents(place, sound), contents(place / "work")
    status, errors = run_train(argv)
    what, after = f"{argv}: {status}, {errors!r}", contents(place, sound)
    lines = errors.splitlines()
    faults = [line for line in lines if not line.startswith(("train.py: left out", "train.py: not scored", "train.py: --masks"))]
    proof = out / ("adapted.json" if "--adapt" in argv else "results.json")
    new = proof.exists() and after[proof] != before.get(proof)
    try:
        assert status in (0, 1, 2) and "Traceback" not in errors and "IOPFL_TRACEBACK" not in errors
        assert all(line.startswith("train.py: ") and line.isprintable() for line in lines)
        assert len(faults) == (status != 0 and not new), "lines on stderr"
        assert status == 0 or lines, "no line on stderr"
        inputs = [path for path in before if place / "work" not in path.parents]
        assert all(after.get(path, 0) == before[path] for path in inputs), "an input changed"
        assert status != 2 or after == before, "written in spite of wrong use"
        assert not [path for path in after if path.name.endswith(".partial")], "half-written"
        assert "notes.txt" not in {p.name for p in written} or (out / "notes.txt").exists(), "foreign"
        for path in after:
            if path.suffix == ".png" and place / "work" in path.parents:
                Image.open(path).load()
        if new:
            spoiled = place / "spoiled"
            spoiled = spoiled.read_text() if spoiled.exists() and "--resume" in argv else ""
            (check_adapting if "--adapt" in argv else check_training)(argv, out, errors, spoiled)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n  {what}") from error
    return make.__name__, status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N")
    args = parser.parse_args()
    warnings.simplefilter("always")
    folder, begin = Path(tempfile.mkdtemp()), time.perf_counter()
    found, faults = {}, 0
    make_sound(folder / "sound", args.seed)
    for number in range(args.count) if args.only is None else [args.only]:
        try:
            kind = case(args.seed, number, folder / "sound", folder / "case")
            found[kind] = found.get(kind, 0) + 1
        except (Exception, Hang) as error:
            faults += 1
            print(f"--seed {args.seed} --only {number}: {error}", flush=True)
    print(f"{faults} faults in {time.perf_counter() - begin:.0f} s; cases by exit status:")
    for kind, status in sorted(found):
        print(f"  {kind:10} {status}  {found[kind, status]}")
    if args.only is None:
        shutil.rmtree(folder)
    else:
        print(folder)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
