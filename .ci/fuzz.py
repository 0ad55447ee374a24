"""Damages what the commands read, at random but seeded: python .ci/fuzz.py [COUNT] [--seed S].

Each case is a training, a look (--list), a --resume or an examples.adapt_folder on a damaged folder
or run. It must end within a minute with exit status 0, 1 or 2, with one line for an error, nothing
half-written, no input changed, nothing written beside --out. What was written is read back and
computed again (`check_…`). Case N is the first one of seed N. The exit status is 1 if one fails.
"""

import argparse
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import iopfl  # noqa: E402
import train  # noqa: E402
from examples import adapt_folder  # noqa: E402
from models import UNet  # noqa: E402

# Of each kind: folder of a site's images, that of its masks, their endings; options of a training.
KINDS = {
    "plain": ("images", "masks", ".png", ".png", []),
    "greys": ("Images", "Masks", ".bmp", ".gif", ["--mask-values", "0", "255"]),
    "fundus": ("train/ROIs/image", "train/ROIs/mask", ".png", ".png", []),
}
with suppress(ImportError):
    import nibabel
    KINDS["volumes"] = ("", "", ".nii.gz", "_segmentation.nii.gz", [])

SMALL = "--threads 1 --device cpu --size 16 --width 2 --depth 1 --lr 0.01".split()
ROUTING = ["--methods", "iopfl", "routing-ours"]
TOY = [*SMALL, "--rounds", "1", "--methods", "iopfl", "global"]
TWO = [*SMALL, *ROUTING, "--rounds", "2", "--seeds", "0", "1"]
SIMULATED = [*TOY, "--images-per-site", "4"]

# What takes the place of a file; names, pixels, modes, endings.
INSTEAD = ["folder", "loop", "dangling", "pipe", "nothing"]
NAMES = ["a b", "new\nline", "-x", "x_segmentation", ".z", "x" * 200, "\udcff", "%s", "A", "07"]
SITES = ["All", "ISBI", "x\ny", ".z", "\udcff", "test"]
CORNERS = {"I;16": [300, 65535], "I": [70000, -3], "F": [np.nan, np.inf, 1e38, 0.5]}
MODES = ["1", "L", "L", "P", "few greys", "few colours", "RGB", "RGBA", "LA", "CMYK", *CORNERS]
COLOURS = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]
TURNS = {  # of an image, by its orientation in EXIF
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
ENDINGS = [".png", ".PNG", ".bmp", ".gif", ".tif", ".TIFF", ".jpg"]

# Options and their values, at random; and some that go together.
OPTIONS = [
    "size", "width", "depth", "lr", "alpha", "rounds", "seeds", "participation", "batch-size",
    "images-per-site", "methods", "no", "mask-values", "hold-out", "precision", "task", "device",
    "published", "root", "resume", "masks", "online", "list"]
WORDS = ["0", "1", "2", "-1", "0.5", "nan", "inf", "x", "all", "none", "a", "\n", "fundus"]
MORE = [
    [], ROUTING, ["--hold-out", "none", "--methods", "iopfl", "fedavg"], ["--hold-out", "all"],
    ["--precision", "bf16", *ROUTING], ["--mask-values", "0", "1"], ["--participation", "0.5"],
    ["--list"]]
RESUMED = [
    [], [], ["--rounds", "3"], ["--methods", "ensemble", "fedbn"], ["--seeds", "2"],
    ["--rounds", "1"], ["--root", "moved"], ["--root", "other"], ["--size", "24"]]
COUNTED = r"left out: (\d+) files or empty folders"
ADAPTED = [[], ["--online"], ["--masks"], ["--masks"], ["--probabilities"], ["--mask-values"]]


# ---------------------------------------------------------------- what is damaged
def paint(files: tuple[Path, Path], kind: str, rng: np.random.Generator) -> None:
    """An image, 16 to 24 pixels, with a disc on noise, for fundus with a cup; and its mask."""
    height, width = rng.integers(16, 25, size=2)
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - rng.uniform(6, 10), x - rng.uniform(6, 10))
    mask = (distance < 6).astype(int)
    if kind == "fundus":
        mask += distance < 3
    image = rng.normal(80, 15, (*mask.shape, 3)) + 50 * mask[..., None] * (1, 0.8, 0.5)
    if kind != "fundus":
        image = image[..., 0]
    greys = {"greys": [0, 255], "fundus": [255, 128, 0]}.get(kind, [0, 1])
    for file, pixels in zip(files, (image, np.array(greys)[mask])):
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = pixels.clip(0, 255).astype(np.uint8)
        if kind == "volumes":
            nibabel.save(nibabel.Nifti1Image(np.stack([pixels] * 2, axis=2), np.eye(4)), file)
        else:
            Image.fromarray(pixels).save(file)


def make_sound(sound: Path) -> None:
    """Of each kind a folder, a run and an adapted one; a simulated run; a whole run and a half."""
    rng = np.random.default_rng(0)
    for kind, (images, masks, ending, mask_ending, options) in KINDS.items():
        for site in "abc":
            for number in range(5):
                file = f"{site}/{images}/{number}{ending}"
                mask_file = f"{site}/{masks}/{number}{mask_ending}"
                if number > 3:
                    file = file.replace("/train/", "/test/")
                    mask_file = mask_file.replace("/train/", "/test/")
                paint((sound / kind / file, sound / kind / mask_file), kind, rng)
        run = sound / f"{kind}-run"
        sure(train.main, [*TOY, "--root", sound / kind, *options, "--out", run])
        folder = sound / kind / "c" / images
        sure(adapt_folder.main, [run, folder, "--out", f"{run}-adapted"])
    sure(train.main, [*SIMULATED, "--out", sound / "simulated-run"])
    sure(train.main, [*TWO, "--root", sound / "plain", "--out", sound / "whole"])
    shutil.copytree(sound / "whole", sound / "half")  # as if killed after the first round
    (sound / "half/results.json").unlink()
    (sound / "half/seed0-c-plain/rows.json").unlink()
    after_a_round = sound / "plain-run/seed0-c-plain/last.pt"
    shutil.copy(after_a_round, sound / "half/seed0-c-plain/last.pt")


def sure(program, argv: list) -> None:
    status, errors = run_program(program, argv)
    if status:
        raise RuntimeError(f"the undamaged {argv} ends with {status}: {errors}")


# ---------------------------------------------------------------- the damage
def other_bytes(old: bytes, rng: random.Random) -> bytes:
    """Some bytes, often of the header, are others; or the file is cut, empty or noise."""
    cut = old[:rng.randrange(len(old) + 1)]
    changed = bytearray(old)
    end = min(len(old), rng.choice([64, len(old)]))
    for _ in range(rng.choice([1, 3, 30]) if old else 0):
        changed[rng.randrange(end)] = rng.choice([0, 255, rng.randrange(256)])
    return rng.choice([bytes(changed), bytes(changed), cut, b"", rng.randbytes(99)])


def replace(file: Path, rng: random.Random) -> None:
    file.unlink()
    instead = rng.choice(INSTEAD)
    if instead == "folder" or instead == "pipe" and not hasattr(os, "mkfifo"):
        file.mkdir()
    elif instead == "pipe":
        os.mkfifo(file)
    elif instead == "loop":
        file.symlink_to(file.name)
    elif instead == "dangling":
        file.symlink_to("/no")


def repaint(file: Path, rng: random.Random) -> None:
    """Another mode, palette, size, pixel, direction or format."""
    mode = rng.choice(MODES)
    image = Image.open(io.BytesIO(file.read_bytes()))
    if mode.startswith("few"):
        image = image.convert("L").quantize(rng.choice([2, 3, 4]))
        if mode == "few colours":
            image.putpalette(COLOURS)
    else:
        image = image.convert("L" if mode in CORNERS else mode).convert(mode)
    image = image.resize(rng.choice([image.size, image.size, (1, 1), (40, 17)]))
    image.putpixel((0, 0), rng.choice(CORNERS.get(mode, [image.getpixel((0, 0))])))
    exif = Image.Exif()
    exif[274] = rng.choice([1, 1, *range(2, 10)])  # turned; 9 is none
    file.unlink()
    image.save(file.with_suffix(rng.choice([file.suffix, *ENDINGS])), exif=exif)


def damage(folder: Path, rng: random.Random) -> None:
    """One file: cut, changed, another's, replaced, renamed, repainted; of a run a model or report.

    A report is never changed by single bytes: it could stay a report, with other numbers.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix in (".pt", ".json")] or files
    file, other = rng.choice(files), rng.choice(files)
    old = file.read_bytes()
    way = rng.choice(["bytes", "bytes", "replaced", "renamed", "repainted", "repainted"])
    if way == "repainted" and file.suffix in ENDINGS:
        repaint(file, rng)
    elif way == "replaced":
        replace(file, rng)
    elif way == "renamed":
        file.rename(file.with_name(rng.choice(NAMES) + file.suffix.upper()))
    elif rng.random() < 0.25:
        file.write_bytes(other.read_bytes())
    elif file.suffix == ".json":
        file.write_bytes(rng.choice([old[:rng.randrange(len(old))], b"", b"{}", b"[1]", b"\xff"]))
    else:
        file.write_bytes(other_bytes(old, rng))


def lay_out(site: Path, rng: random.Random) -> None:
    """Parts, in which files may have the same names; other names, something more or less."""
    way = rng.choice(["parts", "renamed", "more", "less"])
    folder = rng.choice([site, *sorted(site.rglob("*[a-zI]"))])
    if way == "parts":
        different = rng.choice([2, 5])  # names
        for number, part in enumerate(["train", "train", "Valid", "Valid", "TEST"]):
            for name in ("images", "masks"):
                place = site / part / name
                place.mkdir(parents=True, exist_ok=True)
                moved = place / f"{number % different}.png"
                (site / name / f"{number}.png").rename(moved)
    elif way == "renamed":
        folder.rename(folder.with_name(rng.choice([*SITES, *[folder.name.upper()] * 5])))
    elif way == "more":
        names = ["notes.txt", "train.txt", "Thumbs.db", "z.png", "1.bmp", "val", "masks"]
        more = folder / rng.choice(names)
        kind = rng.choice(["folder", "file", "file", "link"])
        if kind == "folder":
            more.mkdir()
        elif kind == "file":
            more.touch()
        else:
            more.symlink_to("..")
    else:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- a case
class Case:
    """A command line, its material and where it writes."""

    def __init__(self, rng: random.Random, sound: Path, place: Path):
        self.program = train.main
        self.sound = sound
        self.work = place / "work"  # where the command runs
        self.out = self.work / "out"
        self.spoiled = False  # whether more than the layout was damaged
        kind = rng.choice([*KINDS])
        self.root = shutil.copytree(sound / kind, place / "root")
        what = rng.choice(["train", "adapt"] * 3 + ["resume", "resume", "options"])
        target = self.root / "c"
        if what == "adapt":
            target = self.adapting(rng, kind, place)
        elif what == "resume":
            target = self.resuming(rng)
        elif what == "options":
            self.with_options(rng)
        else:
            self.argv = [*TOY, "--root", self.root, *KINDS[kind][-1], *rng.choice(MORE)]
        if what != "resume":
            self.choose_out(rng)
        with suppress(OSError, ValueError, LookupError):  # no more damage is possible
            if what == "train":
                for site in rng.choice(["", "", "a", "abc"]):
                    lay_out(self.root / site, rng)
            for _ in range(rng.choice([0, 0, 1, 3])):
                self.spoiled = True
                damage(target, rng)
        self.argv = [str(word) for word in self.argv]

    def adapting(self, rng: random.Random, kind: str, place: Path) -> Path:
        """Returns the folder to be damaged: the images or the run."""
        self.program = adapt_folder.main
        images, masks = (self.root / "c" / folder for folder in KINDS[kind][:2])
        run_of = rng.choice([kind, kind, kind, "simulated", *KINDS])
        run = place / "run"
        adapted = "-adapted" if run_of != "simulated" and rng.random() < 0.4 else ""
        shutil.copytree(self.sound / f"{run_of}-run{adapted}", run)
        federations = sorted(run.glob("seed*-plain"))
        self.argv = [rng.choice([run, run, *federations]), images]
        options = rng.choice(ADAPTED)
        if run_of == "simulated" and rng.random() < 0.7:
            self.argv[1:] = ["--simulated"]
        elif "--masks" in options:
            self.argv += ["--masks", masks]
        elif "--mask-values" in options:
            values = rng.choice([["0", "255"], ["0", "1"], ["1"], ["255", "128", "0"]])
            self.argv += ["--masks", masks, "--mask-values", *values]
        else:
            self.argv += options
        return rng.choice([run, self.root / "c"])

    def resuming(self, rng: random.Random) -> Path:
        shutil.copytree(self.sound / "half", self.out)
        options = rng.choice(RESUMED)
        if "--root" in options:
            name = "plain" if options[1] == "moved" else "greys"
            options = ["--root", self.sound / name]
        self.argv = ["--resume", self.out, *options]
        return self.out

    def with_options(self, rng: random.Random) -> None:
        self.argv = rng.choice([[*TOY, "--root", self.root], SIMULATED])
        for _ in range(rng.choice([1, 1, 2])):
            word = rng.choice([[], [rng.choice(WORDS)]])
            self.argv = [*self.argv, f"--{rng.choice(OPTIONS)}", *word]

    def choose_out(self, rng: random.Random) -> None:
        choice = rng.choice(["new"] * 12 + ["none", "full", "file", "inside", "below a file"])
        if choice == "full":
            self.out.mkdir()
            (self.out / "x").touch()
        elif choice == "file":
            self.out.touch()
        elif choice == "inside":
            self.out = self.root / "c/out"
        elif choice == "below a file":
            (self.work / "file").touch()
            self.out = self.work / "file/out"
        elif choice == "none" and self.program == train.main:
            self.out = self.work / "runs"
            return
        self.argv = [*self.argv, "--out", self.out]


def run_program(program, argv: list) -> tuple[int, str]:
    """Exit status and stderr of a main; whatever else it raises is raised, after a minute too."""
    errors = io.StringIO()
    alarm = getattr(signal, "alarm", lambda seconds: None)
    alarm(60)
    status = 0
    try:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO())), redirect_stderr(errors):
            program([str(word) for word in argv])
    except SystemExit as end:
        status = end.code or 0
    finally:
        alarm(0)
    return status, errors.getvalue()


def is_told(line: str) -> bool:
    """Whether a line on stderr tells of something without being the error of a command."""
    told = ("left out: ", "not scored: ", "no mask has the name", "show one patient",
            "lose a class", "no site has masks")
    return any(words in line for words in told)


def contents(*folders: Path) -> dict:
    """The bytes of each file below some folders; None for what is no file."""
    inside = {}
    for folder in folders:
        for path in folder.rglob("*"):
            inside[path] = path.read_bytes() if path.is_file() else None
    return inside


def run_case(rng: random.Random, sound: Path, place: Path) -> int:
    """The exit status of a case; raises AssertionError where it does not end as it should."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    case = Case(rng, sound, place)
    os.chdir(case.work)
    status, errors = -1, ""
    try:
        before = contents(sound, place)
        status, errors = run_program(case.program, case.argv)
        check_ending(case, before, contents(sound, place), status, errors)
    except BaseException as error:
        lines = traceback.format_exception(error)
        where = "" if isinstance(error, AssertionError) else "".join(lines[-3:])
        command = f"{case.program.__module__} {case.argv}"
        raise AssertionError(f"{error!r}\n  {command}: {status}, {errors!r}\n{where}") from error
    return status


def may_write(case: Case, path: Path) -> bool:
    if "--list" in case.argv and path.name.endswith("-hospitals.png"):
        return path.parent in (case.out, case.work / "runs")
    return case.out in (path, *path.parents) or path in case.out.parents


def check_ending(case: Case, before: dict, after: dict, status: int, errors: str) -> None:
    adapting = case.program == adapt_folder.main
    if case.out == case.work / "runs":  # no --out was given; it is runs/<name>
        case.out = next((path for path in after if path.parent == case.out), case.out)
    proof = case.out / ("adapted.json" if adapting else "results.json")
    new = proof in after and after[proof] != before.get(proof)
    told = [line for line in errors.splitlines() if is_told(line)]
    lines = len(errors.splitlines()) - len(told)
    assert status in (0, 1, 2), "exit status"
    assert status == 0 or lines == (not new), "lines on stderr"
    assert status != 0 or lines == 0, "an error, but exit status 0"
    for path in before:
        if status == 2 or case.out not in path.parents:
            assert after.get(path, 0) == before[path], f"changed: {path}"
    for path in after.keys() - before.keys():
        assert status != 2, f"written in spite of wrong use: {path}"
        assert may_write(case, path), f"written beside --out: {path}"
        assert path.suffix != ".partial", f"half-written: {path}"
    resumed = "--resume" in case.argv
    if not new or resumed and case.spoiled:
        return
    with redirect_stderr(io.StringIO()):
        if adapting:
            check_adapting(case, told)
        else:
            check_training(case, told)


# ---------------------------------------------------------------- what was written
def number_left_out(told: list[str]) -> int:
    """How many files and empty folders the lines on stderr count as left out."""
    return sum(int(number) for number in re.findall(COUNTED, "\n".join(told)))


def files_below(*folders: Path) -> set[Path]:
    """The files, links and empty folders that are not hidden."""
    files = set()
    for folder in folders:
        for path in folder.rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            inside = path.iterdir() if path.is_dir() else []
            if not hidden and all(other.name.startswith(".") for other in inside):
                files.add(path)
    return files


def has_known_ending(file: Path) -> bool:
    return file.name.lower().endswith(data.IMAGE_TYPES + data.VOLUME_TYPES)


def check_training(case: Case, told: list[str]) -> None:
    """Files are used or counted; each hospital has a model, which gives the Dice reported."""
    results = json.loads((case.out / "results.json").read_text())
    settings = argparse.Namespace(**results["config"]["settings"])
    rows = results["rows"]
    for row in rows:
        assert 0 <= row["dice"] <= 1, row
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all(), row
    folders = sorted(case.out.glob("seed*-plain"))
    assert folders, "no federation"
    for folder in folders:
        own = json.loads((folder / "rows.json").read_text())
        assert own["rounds"] == settings.rounds
        dataset = train.load_dataset(settings, own["seed"])
        if settings.root and "--resume" not in case.argv:
            used = 2 * sum(len({*site.everything.cases}) for site in dataset.sites)
            count = len(files_below(Path(settings.root)))
            assert count == used + number_left_out(told), f"{count} files, {used} used, {told}"
            for site in dataset.sites:
                check_masks(Path(settings.root) / site.name, site.everything, dataset)
        saved = torch.load(folder / "last.pt", weights_only=True)
        inside = [site for site in dataset.sites if site.name != own["hold_out"]]
        assert saved["last"]["number"] == settings.rounds
        assert settings.participation < 1 or len(saved["personal"]) == len(inside)
        if "iopfl" in own["methods"]:
            for site in inside:
                state = saved["personal"].get(site.name, saved["last"]["global_state"])
                check_rows(settings, dataset, site, state, own["rows"])
        assert all(row in rows for row in own["rows"]), "results.json lacks rows"
    if "--resume" in case.argv and "--rounds" not in case.argv:
        check_resumed(case.out, case.sound / "whole")


def check_masks(folder: Path, split: data.Split, dataset: data.DataSet) -> None:
    """The masks of a site are those that its files show, each read here in a plain way."""
    masks = {}
    for case, mask in zip(split.cases, split.masks):
        masks.setdefault(case, []).append(mask.numpy())
    for case, small in masks.items():
        image = folder / case
        name = data.stem(image)
        place = image.parent
        if not data.is_volume(image):
            place = next(other for other in place.parent.iterdir() if other.name.lower()[0] == "m")
        found = [file for file in place.iterdir() if has_known_ending(file) and file != image
                 and data.stem(file) in (name, f"{name}_segmentation")]
        assert len(found) == 1, (case, found)
        size = small[0].shape[::-1]
        for plane, given in zip(plain_mask(found[0], dataset), small, strict=True):
            resized = Image.fromarray(plane).resize(size, Image.NEAREST)
            assert np.array_equal(np.asarray(resized), given), f"misread: {found[0]}"


def plain_mask(file: Path, dataset: data.DataSet) -> np.ndarray:
    """The classes (n, H, W), uint8, in a mask file, read without the project's code."""
    content = file.read_bytes()
    if data.is_volume(file):
        content = gzip.decompress(content) if file.suffix.lower() == ".gz" else content
        volume = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(content))
        labels = volume.get_fdata()[::-1, ::-1] > 0  # to the left and to the back
        return labels.transpose(2, 1, 0).astype(np.uint8)
    image = Image.open(io.BytesIO(content))
    indices = np.asarray(image)
    shown = np.asarray(image.convert("RGB"))
    palette = np.reshape(image.getpalette() or [0, 0, 0], (-1, 3))
    coloured = (palette != palette[:, :1]).any()
    if image.mode == "P" and (coloured or len(np.unique(indices)) > len(np.unique(shown))):
        greys = indices
    elif image.mode in ("RGB", "RGBA", "P", "PA", "LA", "CMYK"):
        greys = shown[..., 0]
    else:
        greys = indices
    greys = TURNS.get(image.getexif().get(274), np.asarray)(greys).astype(float)
    if dataset.mask_values is None:
        return greys.astype(np.uint8)[None]
    distance = [np.abs(greys - value) for value in dataset.mask_values]
    return np.argmin(distance, axis=0).astype(np.uint8)[None]


def check_resumed(resumed: Path, whole: Path) -> None:
    """The rows and, to the bit, the models of the run in one go."""
    rows = json.loads((resumed / "results.json").read_text())["rows"]
    for row in json.loads((whole / "results.json").read_text())["rows"]:
        assert row in rows, f"not as in one go: {row}"
    for file in whole.glob("seed*-plain/last.pt"):
        in_one_go = torch.load(file, weights_only=True)
        gone_on = torch.load(resumed / file.relative_to(whole), weights_only=True)
        states = [[*saved["personal"].values(), saved["last"]["global_state"]]
                  for saved in (in_one_go, gone_on)]
        for first, second in zip(*states, strict=True):
            for entry, value in first.items():
                assert torch.equal(value, second[entry]), f"not as in one go: {entry}"


def check_rows(settings, dataset, site: data.Site, state: dict, rows: list[dict]) -> None:
    """A personalised model gives the Dice that is reported."""
    model = UNet(dataset.channels, dataset.classes, settings.width, settings.depth)
    model.to(memory_format=torch.channels_last).load_state_dict(state)
    split = site.test.to("cpu")
    with torch.autocast("cpu", torch.bfloat16, settings.precision == "bf16"):
        prediction = iopfl.predict(model, split.images)
    scores = iopfl.evaluate(
        prediction, split.masks, split.cases, dataset.structures, site.spacing, distances=False)
    same = {"phase": "inside", "method": "iopfl", "site": site.name}
    reported = [row["dice"] for row in rows if same.items() <= row.items()]
    assert reported == [row["dice"] for row in scores], (same, reported, scores)


def check_adapting(case: Case, told: list[str]) -> None:
    """Masks have their images' sizes, known classes, the Dice reported, and come again."""
    out = case.out
    args = argparse.Namespace(images=out / "images", masks=out / "truth", online=False)
    if "--simulated" not in case.argv:
        probe = [*case.argv]
        probe[probe.index("--out") + 1] = str(case.work / "unused")
        args = adapt_folder.parse_arguments(probe)
    images, masks = Path(args.images), Path(args.masks or args.images)
    about = json.loads((out / "adapted.json").read_text())
    facts, experts = about["config"]["data"], about["experts"]
    assert experts[-1] == "global" and list(about["chosen"]) == experts, experts
    for weights in about["weights"].values():
        assert len(weights) == len(experts), weights
    rows = {row["file"]: row for row in about["rows"]}

    sources, drawn = {}, {}
    names = {data.stem(file) for file in images.iterdir() if has_known_ending(file)}
    for file in files_below(images, masks):
        name = data.stem(file)
        case_name = re.sub("_segmentation$", "", name, flags=re.I)
        drawn_beside = case_name != name and (images == masks or case_name in names)
        if file.parent == images and not drawn_beside:
            sources[file.name] = file
        elif file.parent == masks and has_known_ending(file):
            drawn[name if name in names and images != masks else case_name] = file
    assert len(rows) == len([*(out / "masks").iterdir()]), "masks"
    alone = [line for line in told if "left out: " in line and not re.search(COUNTED, line)]
    used = len(rows) + len(alone)
    if args.masks:
        for file in sources.values():
            if has_known_ending(file):
                used += data.stem(file) in drawn
    count = len(files_below(images, masks))
    assert count == used + number_left_out(told), f"{count} files, {used} used, {told}"

    again = out.with_name("again")
    status, errors = run_program(adapt_folder.main, [out, images, "--out", again])
    assert (again / "adapted.json").exists(), f"cannot be used again: {status}, {errors}"
    for name, row in rows.items():
        source = sources[name]
        stem = data.stem(source)
        file = f"masks/{stem}" + (".nii.gz" if data.is_volume(source) else ".png")
        shape = data.read_file(source)[0].shape[:3]
        mask = data.read_mask(out / file, shape, classes=facts["classes"])  # or it is refused
        assert abs((mask > 0).mean() - row["foreground"]) < 1e-9, row
        if not args.online:
            assert (again / file).read_bytes() == (out / file).read_bytes(), row
        maps = out / "probabilities" / f"{stem}.npy"
        assert maps.exists() == ("--probabilities" in case.argv), maps
        if maps.exists():
            probabilities = np.load(maps).astype(float)
            assert probabilities.shape == (shape[0], facts["classes"], *shape[1:]), maps
            assert np.abs(probabilities.sum(axis=1) - 1).max() < 0.01, maps
            assert (probabilities.argmax(axis=1) == mask).mean() > 0.98, maps
        for structure, its_classes in facts["structures"].items():
            if f"Dice {structure}" in row:
                truth = data.read_mask(
                    drawn[stem], shape, facts["kind"], facts["mask_values"], None, facts["classes"])
                score = iopfl.dice(np.isin(mask, its_classes), np.isin(truth, its_classes))
                assert abs(score - row[f"Dice {structure}"]) < 1e-9, (row, score)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("always")
    signal.signal(getattr(signal, "SIGALRM", signal.SIGINT), signal.default_int_handler)
    ends = []
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder).resolve() / "sound"
        make_sound(sound)
        for seed in range(args.seed, args.seed + args.count):
            try:
                rng = random.Random(f"case {seed}")
                ends.append(run_case(rng, sound, Path(folder).resolve() / "case"))
            except AssertionError as error:
                ends.append(-1)
                print(f"fuzz.py 1 --seed {seed}: {error}", flush=True)
        os.chdir(home)
    print("faults and cases by exit status:", [ends.count(status) for status in (-1, 0, 1, 2)])
    return int(-1 in ends)


if __name__ == "__main__":
    sys.exit(main())
