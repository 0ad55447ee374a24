"""Damages what the programs read, at random but seeded: python .ci/fuzz.py [COUNT] [--seed S].

Each case is a training, a look, a --resume or an adaptation on a damaged folder of images, or one
with options at random. It must end within a minute with exit status 0, 1 or 2, with one line for an
error, nothing half-written, no input changed, nothing written beside --out. What was written is
computed again (`check_…`). Case N is the first one of seed N. The exit status is 1 if one fails.
Not for Windows, which has no alarm.
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
RESUMED = [
    *[[]] * 6, ["--rounds", "3"], ["--methods", "ensemble", "fedbn"], ["--seeds", "2"],
    ["--rounds", "1"], ["--size", "24"]]
ADAPTED = [[], [], [], ["--online"]]
# Options and their values, at random.
OPTIONS = """size width depth lr alpha rounds seeds participation batch-size images-per-site methods
    mask-values hold-out precision task device threads published root resume list no""".split()
WORDS = ["0", "1", "2", "-1", "0.5", "nan", "inf", "x", "all", "none", "a", "\n", "fundus", ""]
# What takes the place of names, endings and pixels.
NAMES = ["a b", "new\nline", "-x", "x_segmentation", ".z", "x" * 200, "\udcff", "%s", "A", "07"]
ADDED_NAMES = ["notes.txt", "train.txt", "Thumbs.db", "z.png", "1.bmp", "val", "masks"]
SITES = ["All", "ISBI", "x\ny", ".z", "\udcff", "test"]
INSTEAD = [  # of a file: a folder, a pipe, a link to itself, one to nothing; nothing
    Path.mkdir, os.mkfifo, lambda file: file.symlink_to(file.name),
    lambda file: file.symlink_to("/no"), str]
ADDED = [Path.mkdir, Path.touch, Path.touch, lambda link: link.symlink_to("..")]
ENDINGS = [".png", ".PNG", ".bmp", ".gif", ".tif", ".TIFF", ".jpg"]
CORNERS = {"I;16": [300, 65535], "I": [70000, -3], "F": [np.nan, np.inf, 1e38, 0.5]}
MODES = [
    *["L"] * 8, "1", "P", "few greys", "few colours", "RGB", "RGBA", "LA", "CMYK", *CORNERS]
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
COUNTED = r"left out: (\d+) files or empty folders"
TOLD = ("left out: ", "not scored: ", "no mask has the name", "show one patient", "lose a class",
        "no site has masks")  # lines on stderr that are not the error of a program


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
    if way == "repainted" and file.suffix in ENDINGS:
        repaint(file, rng)
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
    image = image.resize(rng.choice([*[image.size] * 8, (1, 1), (40, 17)]))
    image.putpixel((0, 0), rng.choice(CORNERS.get(mode, [image.getpixel((0, 0))])))
    exif = Image.Exif()
    exif[274] = rng.choice([1, 1, *range(2, 10)])  # turned; 9 is none
    file.unlink()
    image.save(file.with_suffix(rng.choice([file.suffix, *ENDINGS])), exif=exif)


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
                (site / name / f"{number:02d}.png").rename(moved)
    elif way == "renamed":
        folder.rename(folder.with_name(rng.choice([*SITES, *[folder.name.upper()] * 5])))
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
    make = rng.choice([*[train_on] * 3, *[adapt_to] * 3, go_on, choose_options])
    kind = "plain" if make is go_on else rng.choice([*KINDS])
    case = Case(kind, sound, place, rng.choice([*outs, *[work / "out"] * 24]))
    shutil.copytree(sound / kind, root)
    make(case, rng)
    with suppress(OSError, ValueError, LookupError):  # no more damage is possible
        for _ in range(rng.choice([0, 0, 1, 3])):
            files = sorted(file for file in (root / "c").rglob("*") if file.is_file())
            damage(rng.choice(files), rng.choice(files), rng)
    case.argv = [str(word) for word in case.argv]
    return case


def train_on(case: Case, rng: random.Random) -> None:
    root = case.place / "root"
    for site in rng.choice(["", "", "a", "abc"]):
        with suppress(OSError):
            lay_out(root / site, rng)
    options = [*TOY, *KINDS[case.kind][-1], *rng.choice(MORE)]
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
    change_version(case, run, rng)


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
    for site in dataset.sites:
        masks = {}
        for case, mask in zip(site.everything.cases, site.everything.masks):
            masks.setdefault(case, []).append(mask.numpy())
        for case, resized in masks.items():
            image = root / site.name / case
            place = image.parent
            if not folders.is_volume(image):
                place, = (other for other in place.parent.iterdir() if other.name[0] in "mM")
            file, = masks_of(image, place)
            size = resized[0].shape[::-1]
            for plane, given in zip(plain_mask(file, dataset.mask_values), resized, strict=True):
                expected = Image.fromarray(plane).resize(size, Image.NEAREST)
                assert np.array_equal(np.asarray(expected), given), f"misread: {file}"


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


def masks_of(image: Path, place: Path) -> list[Path]:
    """The files in a folder whose name says that they are an image's mask."""
    name = folders.stem(image)
    names = (name, f"{name}_segmentation", f"{name}_Segmentation")
    others = [file for file in images_in(place) if file != image]
    return [file for file in others if folders.stem(file) in names]


def plain_mask(file: Path, values: list[int] | None) -> np.ndarray:
    """The classes (n, H, W), uint8, in a mask file, read without the project's code."""
    content = file.read_bytes()
    if folders.is_volume(file):
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
    if values is None:
        return greys.astype(np.uint8)[None]
    distance = [np.abs(greys - value) for value in values]
    return np.argmin(distance, axis=0).astype(np.uint8)[None]


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
        is_mask = "_segmentation" in file.name.lower()
        is_told = any(" ".join(str(file).split()) in line for line in told)
        assert is_told or file.name in names or is_mask, f"forgotten: {file}"
    again = case.out.with_name("again")
    status, errors = run_program(adapt_folder.main, [case.out, case.images, "--out", again])
    assert (again / "adapted.json").exists(), f"cannot be used again: {status}, {errors}"
    for row in rows:
        source = case.images / row["file"]
        name = folders.stem(source)
        written = f"masks/{name}" + (".nii.gz" if folders.is_volume(source) else ".png")
        shape = folders.read_file(source)[0].shape[:3]
        mask = folders.read_mask(case.out / written, shape, classes=facts["classes"])
        assert abs((mask > 0).mean() - row["foreground"]) < 1e-9, row
        if "--online" not in case.argv:
            assert (again / written).read_bytes() == (case.out / written).read_bytes(), row
        for structure, classes in facts["structures"].items():
            if f"Dice {structure}" in row:
                values = case.mask_values or facts["mask_values"]
                truth = plain_mask(masks_of(source, case.masks)[0], values)
                score = iopfl.dice(np.isin(mask, classes), np.isin(truth, classes))
                assert abs(score - row[f"Dice {structure}"]) < 1e-9, (row, score)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("always")
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
