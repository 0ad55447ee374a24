"""IOP-FL from start to finish: federated rounds, personalised models inside, routing outside, a report.

    python train.py                               simulated prostate MRI, the last hospital held out
    python train.py --task fundus                 simulated fundus photographs
    python train.py --root DIR --hold-out SITE    folders of real images
    python train.py --root DIR --list             a look at them first
    python train.py --hold-out none --methods all    every hospital inside: IOP-FL against other methods
    python train.py --hold-out all --methods all     each hospital outside in turn, likewise
    python train.py --adapt RUN --images DIR --out OUT    masks for images without labels, from a trained run
    torchrun --nproc-per-node 4 train.py          the same federation, its clients shared among four processes

After every round all that the next one needs is on disk: a run that was interrupted, however, goes on when the same
command is given again with --resume. Exit status: 0 all went well, 1 a fault of files, data or machine, 2 wrong use.
With the environment variable IOPFL_TRACEBACK=1 an error shows its traceback.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports below take a second; then `main` says more

import argparse
import copy
import csv
import ctypes
import fcntl
import hashlib
import io
import itertools
import json
import math
import resource
import shlex
import shutil
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import iopfl
import router
from iopfl import METHODS, Method
from models import UNet
from router import AUTHORS, RoutingSettings


# ---------------------------------------------------------------- methods and ablations
@dataclass(frozen=True)
class Outside:
    """A method for the hospital outside: its experts, "global", "personal", "all" (both) or "each" (all, every
    one alone, their probabilities averaged), how they are mixed and adapted, whether online, and whether scored
    after each pass."""

    experts: str = "all"
    settings: RoutingSettings = field(default_factory=RoutingSettings)
    online: bool = False
    curve: bool = False


AS_TRAINED = RoutingSettings(start="uniform", statistics="running", passes=0)  # no step, running statistics
ROUTING = RoutingSettings()
OUTSIDE = {
    "global": Outside("global", AS_TRAINED),
    "best-inside": Outside("personal", replace(AS_TRAINED, start="best")),
    "ensemble": Outside("each", AS_TRAINED),
    "average": Outside("all", AS_TRAINED),
    "matched": Outside("all", replace(AS_TRAINED, start="matched", match_floor=0.0, global_share=None)),
    "bn": Outside("global", replace(AS_TRAINED, statistics="site", tolerance=0.0)),
    # With one expert there is nothing to route: what moves is BatchNorm's affine (Wang et al. 2021).
    "tent": Outside("global", replace(AS_TRAINED, statistics="batch", entropy=1.0, consistency=0.0, shape=0.0, lr=1e-3,
                                      passes=1, leash=None)),
    "routing": Outside(),
    "routing-authors": Outside(settings=AUTHORS),
    "oracle": None,  # trained on labels of the hospital outside
}
CEILINGS = {"centralised", "oracle"}  # know what no method may know
INSIDE_ABLATIONS = {f"alpha={alpha}": Method(own="local", alpha=alpha) for alpha in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)}
INSIDE_ABLATIONS["global-alpha=0.7"] = Method(alpha=0.7)  # a control: the global model, accumulated in the same way
OUTSIDE_ABLATIONS = {name: Outside(settings=replace(ROUTING, **changes)) for name, changes in {
    "no-steps": {"passes": 0},
    "no-shape": {"shape": 0.0},  # consistency alone, since entropy is off
    "no-consistency": {"consistency": 0.0},  # shape alone
    "with-entropy": {"entropy": 0.1},
    "entropy-alone": {"entropy": 0.1, "consistency": 0.0, "shape": 0.0},
    "running": {"statistics": "running"},
    "batch": {"statistics": "batch"},
    "interpolated": {"statistics": "batch", "share": 0.25},
    "sigmoid": {"activation": "sigmoid"},
    "random-start": {"start": "random"},
    "uniform-start": {"start": "uniform"},
    "equal-start": {"global_share": None},  # matched, the global model as any other
    "site-routing": {"per_sample": False},
}.items()} | {
    "global-only": Outside("global"),
    "personal-only": Outside("personal", replace(ROUTING, global_share=None)),
    "online": Outside(online=True),
    "passes-20": Outside(settings=replace(ROUTING, passes=20), curve=True),
    "passes-20-free": Outside(settings=replace(ROUTING, passes=20, leash=None), curve=True),  # no leash
}
MOST_SHOWN = 12  # hospitals in pictures, tables and lines
KNOWN = [*METHODS, *INSIDE_ABLATIONS, *OUTSIDE, *OUTSIDE_ABLATIONS]
MOST = {"size": 4096, "width": 1024, "depth": 10, "lr": 1000}  # beyond it is a slip of the hand, and no memory would do


class WrongUse(ValueError):
    """What was asked for cannot be done, whatever is in the files: exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise WrongUse(f"{message}; --help shows all options")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="What adaptation does at test time: router.RoutingSettings.")
    defaults = {"task": "prostate", "size": 96, "sites": 6, "images_per_site": 60, "seeds": [0], "rounds": 30,
                "local_epochs": 1, "batch_size": 5, "lr": 1e-3, "alpha": METHODS["iopfl"].alpha, "width": 16, "depth": 3,
                "methods": ["fedavg", "iopfl", "global", "average", "routing"], "device": "auto", "participation": 1.0,
                "evaluate_every": 5, "precision": "fp32"}

    def add(group, name, text, **options) -> None:
        default = defaults.get(name[2:].replace("-", "_"))
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text = f"{text} (default {shown})"
            if "choices" not in options and "nargs" not in options:
                options["type"] = type(default)
        group.add_argument(name, help=text, default=default, **options)

    group = parser.add_argument_group("images")
    add(group, "--task", "which simulated hospitals", choices=("prostate", "fundus"))
    add(group, "--root", "folders of real images instead, one a site: DIR/<site>/images and DIR/<site>/masks, "
        "fundus ROIs or NIfTI volumes; layouts in README.md", metavar="DIR")
    add(group, "--mask-values", "grey values of the classes in real masks, background first, such as 0 128 255",
        type=int, nargs="+", metavar="V")
    add(group, "--size", "height and width of an image, in pixels")
    add(group, "--sites", "number of simulated hospitals")
    add(group, "--images-per-site", "images of a simulated hospital: 60 per cent train, 15 validate, 25 test")
    group.add_argument("--skip-empty", action="store_true", help="leave slices without prostate out of training")
    group.add_argument("--list", action="store_true", help="show what the images are and end: a table and a picture")
    group = parser.add_argument_group("a hospital outside, without labels")
    add(group, "--adapt", "a trained run, one of its folders seed…-SITE, or what --adapt wrote before, to be used as "
        "it is", metavar="RUN")
    add(group, "--images", "folder of its images: PNG, JPEG, TIFF or NIfTI", metavar="DIR")
    add(group, "--masks", "masks of the same names, if there are any, only to report Dice", metavar="DIR")
    group.add_argument("--online", action="store_true", help="one step a batch as the images come, not several passes")
    group = parser.add_argument_group("protocol")
    add(group, "--hold-out", "hospital outside the federation, all (each in turn) or none (default the last)",
        metavar="SITE")
    add(group, "--seeds", "one federation for each seed", type=int, nargs="+", metavar="N")
    add(group, "--methods", f"all, ablations, or some of {', '.join(KNOWN)}; all and ablations mean those inside "
        "where every hospital is inside, else those outside", nargs="+", metavar="M")
    group = parser.add_argument_group("federation")
    add(group, "--rounds", "federated rounds")
    add(group, "--participation", "share of the hospitals inside that take part in a round, drawn anew each time; below "
        "1 own models, and simulated images, lie on disk")
    add(group, "--evaluate-every", "rounds between two looks at the validation images")
    add(group, "--local-epochs", "epochs of local training a round")
    add(group, "--batch-size", "images a step")
    add(group, "--lr", "learning rate of Adam")
    add(group, "--alpha", "share of its past that a personalised model keeps each round (M2)")
    add(group, "--width", "channels of the U-Net's top level")
    add(group, "--depth", "levels of the U-Net below the top")
    group.add_argument("--authors", action="store_true",
                       help="settings of the published code: 100 rounds, alpha 0.1, router.AUTHORS outside; "
                            "options given beside it win")
    group = parser.add_argument_group("machine and output")
    add(group, "--device", "where to compute", choices=("auto", "cpu", "cuda"))
    add(group, "--precision", "bf16: convolutions in bfloat16, and the mixing of their kernels; weights and sums in "
        "float32", choices=("fp32", "bf16"))
    group.add_argument("--jobs", type=int, metavar="N", help="federations trained side by side, each in a process of "
                       "its own (default one a thread of the CPU; 1 on a GPU)")
    group.add_argument("--threads", type=int, metavar="N", help="threads of each process on the CPU; results repeat bit "
                       "for bit with the same number (default an even share)")
    add(group, "--out", "folder for models, pictures and results.json (default runs/<task>; runs/adapted for "
        "--adapt)", metavar="DIR")
    group.add_argument("--resume", action="store_true", help="go on with the unfinished run of the same settings, after "
                       "its last whole round; begin it where there is none")
    group.add_argument("--overwrite", action="store_true", help="replace the run that lies in --out, or an unfinished "
                       "one")
    parser.set_defaults(content=None)  # of --root, once it was read
    args = parser.parse_args(argv)
    if args.authors:
        parser.set_defaults(rounds=100, local_epochs=1, batch_size=5, lr=1e-3, alpha=0.1)
        args = parser.parse_args(argv)
    for name in ("size", "sites", "rounds", "local_epochs", "batch_size", "lr", "width", "depth", "evaluate_every"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
        if getattr(args, name) > MOST.get(name, float("inf")):
            parser.error(f"--{name} must be at most {MOST[name]}, not {getattr(args, name)}")
    if args.width * 2**args.depth > 2**13:
        parser.error(f"--width {args.width} and --depth {args.depth} make {args.width * 2**args.depth} channels at the "
                     f"lowest level; at most {2**13} are allowed")
    unknown = set(args.methods) - {"all", "ablations", *KNOWN}
    if unknown:
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown; there are all, ablations, {', '.join(KNOWN)}")
    for name in ("jobs", "threads"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= 1024:
            parser.error(f"--{name} must lie in 1 … 1024, not {getattr(args, name)}")
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha must lie in [0, 1], not {args.alpha}")
    if not 0 < args.participation <= 1:
        parser.error(f"--participation must lie in (0, 1], not {args.participation}")
    if not 0 <= min(args.seeds) <= max(args.seeds) < 2**32 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds must be different numbers from 0 to 2^32 - 1")
    if args.images_per_site < 4:
        parser.error(f"--images-per-site must be at least 4, not {args.images_per_site}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; use --device cpu")
    if args.mask_values and not 1 < len(set(args.mask_values)) == len(args.mask_values) <= 256:
        parser.error("--mask-values must be 2 to 256 different numbers, one a class")
    if args.mask_values and not args.root and not args.masks:
        parser.error("--mask-values goes with --root or --masks")
    if bool(args.adapt) != bool(args.images):
        parser.error("--adapt RUN and --images DIR go together")
    if (args.masks or args.online) and not args.adapt:
        parser.error("--masks and --online go with --adapt")
    if args.adapt and (args.root or args.list):
        parser.error("--adapt takes its images from --images; leave out --root and --list")
    if args.out == "":
        parser.error("--out must not be empty")
    if args.resume and (args.adapt or args.list):
        parser.error("--resume goes with training")
    for name in ("root", "images", "masks", "adapt"):
        path = getattr(args, name)
        if path is not None and not (path and Path(path).is_dir()):
            parser.error(f"--{name} {path}: no such folder")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def load_sites(args: argparse.Namespace, seed: int) -> data.DataSet:
    """The hospitals, on the chosen device. Where few take part in a round, simulated images stay on disk."""
    if args.root:
        loaded = data.load_folder(args.root, args.size, args.mask_values, seed, args.skip_empty)
        if args.content not in (None, loaded.content):
            raise ValueError(f"{args.root} has changed since the run began")
        args.content = loaded.content
    else:
        folder = tempfile.gettempdir() if args.participation < 1 else None
        loaded = data.simulate_sites(args.task, seed, args.size, args.images_per_site, args.sites, folder)
    for site in loaded.sites:
        everything = site.everything
        everything.images = everything.images.to(args.device, memory_format=torch.channels_last)
        everything.masks = everything.masks.to(args.device)
    return loaded


def hold_outs(choice: str | None, names: list[str]) -> list[str | None]:
    """The hospitals to hold out in turn; None stands for a federation of all."""
    if choice == "none":
        return [None]
    chosen = names if choice == "all" else [names[-1] if choice is None else choice]
    if chosen[0] not in names:
        raise WrongUse(f"--hold-out {choice}: no such site; there are {', '.join(names)}, or all, or none")
    if len(names) < 2:
        raise WrongUse(f"a federation and a hospital outside need two sites, there is {names[0]} alone; "
                       f"use --hold-out none")
    return chosen


def check_batches(args: argparse.Namespace, sites: list[data.Site]) -> None:
    """BatchNorm has nothing to measure where a batch holds one image and the lowest level one pixel."""
    for site in sites:
        count = len(site.train.images)
        if args.size <= 2**args.depth and count // -(-count // args.batch_size) == 1:
            raise WrongUse(f"site {site.name}: {count} images to train with make a batch of one, and --size {args.size} "
                           f"with --depth {args.depth} leaves one pixel at the lowest level, where BatchNorm has nothing "
                           f"to measure; use a smaller --depth or another --batch-size")


def chosen_methods(args: argparse.Namespace, hold_out: str | None) -> tuple[dict[str, Method], dict[str, Outside]]:
    """The methods inside and outside that --methods means. Routing needs the personalised models, so IOP-FL and
    FedAvg are always among those inside when there is an outside."""
    inside, outside = METHODS | INSIDE_ABLATIONS, OUTSIDE | OUTSIDE_ABLATIONS
    inside["iopfl"] = replace(METHODS["iopfl"], alpha=args.alpha)
    if args.authors:
        outside["routing"] = OUTSIDE["routing-authors"]
    groups = {"all": METHODS if hold_out is None else OUTSIDE,
              "ablations": ["fedavg", "iopfl", *INSIDE_ABLATIONS] if hold_out is None else
              ["global", "routing", *OUTSIDE_ABLATIONS]}
    names = set().union(*(groups.get(name, [name]) for name in args.methods))
    if hold_out is not None:
        names |= {"fedavg", "iopfl"}
    return ({name: method for name, method in inside.items() if name in names},
            {name: method for name, method in outside.items() if name in names and hold_out is not None})


# ---------------------------------------------------------------- one federation and its outside hospital
@dataclass(frozen=True)
class Task:
    """A federation, with the methods inside that share it, and what follows for the hospital outside."""

    seed: int
    hold_out: str | None
    inside: dict[str, Method]
    outside: dict[str, Outside | None]
    folder: Path

    @property
    def result(self) -> Path:
        """Where its result is kept, so that a run that goes on only reads it."""
        return self.folder / f"{next(iter(self.inside))}.json"

    @property
    def rounds(self) -> Path:
        """Folder of all that the next round needs, until there is a result."""
        return self.folder / f"{next(iter(self.inside))}.rounds"

    def __str__(self) -> str:
        return f"seed {self.seed}, outside: {self.hold_out or 'none'}, {' '.join([*self.inside, *self.outside])}"


def plan(seeds: list[int], hold_outs: list[str | None], inside: dict[str, Method], outside: dict[str, Outside | None],
         folder: Path) -> list[Task]:
    """All tasks: one for each seed, hospital held out and way of training the shared model."""
    groups: dict[tuple, dict[str, Method]] = {}
    for name, method in inside.items():
        groups.setdefault(method.shared_training, {})[name] = method
    return [Task(seed, hold_out, group, outside if "iopfl" in group else {},
                 folder / f"seed{seed}-{hold_out or 'all-inside'}")
            for seed in seeds for hold_out in hold_outs for group in groups.values()]


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Within this context convolutions take the precision asked for. Its cache is off: it would hold on to the weights
    of the first step."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False)


def write(path: Path, content: bytes) -> None:
    """All of the content is on the disk under this name, or, whatever happens, what was there before."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the name is on the disk when the folder is
    os.fsync(folder)
    os.close(folder)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def save(path: Path, state: dict) -> str:
    """A state on the CPU, readable by `torch.load(path, weights_only=True)`; returns the file's digest."""
    buffer = io.BytesIO()
    torch.save({name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}, buffer)
    write(path, buffer.getvalue())
    return digest_of(buffer.getvalue())


def load(path: Path, device: str = "cpu", like: iopfl.State | None = None, digest: str | None = None) -> dict:
    """What `save` wrote; with `like` a state of these entries, shapes and types, all finite. Nothing in the file is
    executed."""
    content = path.read_bytes()
    try:
        if digest and digest_of(content) != digest:
            raise ValueError
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch does not look at the checksums
            raise ValueError
        state = dict(torch.load(io.BytesIO(content), map_location=device, weights_only=True))
    except Exception as error:  # of many kinds: what is wrong may be the archive, its index or a tensor
        raise ValueError(f"{path}: damaged, or not written by this script ({type(error).__name__})") from None
    for entry in {**like, **state} if like else ():
        found, expected = ((tuple(of[entry].shape), of[entry].dtype, of[entry].layout) if isinstance(of.get(entry), Tensor)
                           else "nothing" for of in (state, like))
        if found != expected:
            raise ValueError(f"{path}: of another model or version: entry '{entry}' is {found}, expected {expected}")
    if like:
        iopfl.check_finite(state, str(path))
    return state


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not written by this script ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not written by this script")
    return found


def seal(value: dict) -> bytes:
    """JSON that holds the value and its digest."""
    return json.dumps({"digest": digest_of(json.dumps(value).encode()), "value": value}).encode()


def unseal(path: Path) -> dict:
    found = read_json(path)
    if digest_of(json.dumps(found.get("value")).encode()) != found.get("digest"):
        raise ValueError(f"{path}: damaged, or not written by this script; --overwrite begins anew")
    return found["value"]


class Shelf(UserDict):
    """The `memory` of a federation in a folder: each client's part in a file of its own, and state.json, written last,
    which says with their digests those that belong together. spare: what is not in use is on disk alone."""

    def __init__(self, folder: Path, device: str, names: list[str], spare: bool):
        super().__init__()
        self.folder, self.device, self.spare = folder, device, spare
        self.places, self.round, self.read, self.fresh = {name: n for n, name in enumerate(names)}, 1, {}, {}

    def __setitem__(self, name: str, kept: dict[str, dict]) -> None:
        file = f"{self.round}-{self.places[name]}.pt"
        self.data[name] = self.fresh[name] = [file, save(self.folder / file, kept)]
        self.read[name] = None if self.spare else kept

    def __getitem__(self, name: str) -> dict[str, dict]:
        kept = self.read.get(name)
        if kept is None:
            file, digest = self.data[name]
            kept = load(self.folder / file, self.device, digest=digest)
            self.read[name] = None if self.spare else kept
        return kept

    def open(self) -> tuple[int, iopfl.State] | None:
        """Number and global state of the last whole round, if there is one; what came after it is removed. All
        processes must call it."""
        first_alone(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        path, after, files = self.folder / "state.json", None, set()
        if path.is_file():
            state = unseal(path)
            number, (file, digest), self.data = state["round"], state["global"], state["clients"]
            after, self.round = (number, load(self.folder / file, self.device, digest=digest)), number + 1
            files = {file, *(own for own, _ in self.data.values())}
        of_all(None)  # all have read
        first_alone(lambda: [other.unlink() for other in self.folder.iterdir() if other.name not in {path.name, *files}])
        return after

    def keep(self, last: iopfl.Round) -> None:
        """The round is whole: from now on a run goes on after it. All processes must call it."""
        self.data.update({name: file for part in of_all(self.fresh) for name, file in part.items()})
        self.fresh, self.round = {}, last.number + 1
        if iopfl.processes()[0] == 0:
            file = f"{last.number}.pt"
            state = {"round": last.number, "global": [file, save(self.folder / file, last.global_state)], "clients": self.data}
            write(self.folder / "state.json", seal(state))
            needed = {file, *(own for own, _ in self.data.values())}
            for other in self.folder.glob("*.pt"):  # others may have begun the next round
                if int(other.stem.split("-")[0]) <= last.number and other.name not in needed:
                    other.unlink()


def of_all(value) -> list:
    """`value` of each process, in their order. All must call it."""
    number, count = iopfl.processes()
    values = [value] * count
    if count > 1:
        dist.all_gather_object(values, value)
    return values


def first_alone(function: Callable):
    """What the first process gets from the function, for all. Where it fails, the others end without a word."""
    value = problem = None
    if iopfl.processes()[0] == 0:
        try:
            value = function()
        except Exception as error:
            problem = error
    value, failed = of_all((value, problem is not None))[0]
    if problem:
        raise problem
    if failed:
        os._exit(1)
    return value


def run(args: argparse.Namespace, task: Task, loaded: data.DataSet | None = None) -> dict | None:
    """Rows of results.json, mean routing weights and seconds of a task; models and pictures go to its folder. Of
    several processes the first alone writes and returns it.

    loaded: what `load_sites` gives for its seed.
    """
    first = iopfl.processes()[0] == 0
    if not first_alone(task.result.exists):
        with autocast(args):
            result = federate_and_adapt(args, task, loaded or load_sites(args, task.seed))
        if first:
            write(task.result, seal(result))
    if first:
        shutil.rmtree(task.rounds, ignore_errors=True)
        result = unseal(task.result)
        for file, digest in result["files"].items():
            if digest_of((task.folder.parent / file).read_bytes()) != digest:
                raise ValueError(f"{task.folder.parent / file}: damaged; --overwrite begins anew")
        return result


def federate_and_adapt(args: argparse.Namespace, task: Task, loaded: data.DataSet) -> dict:
    torch.backends.cudnn.deterministic = True  # here, since it holds for one process
    begin = time.perf_counter()
    structures = loaded.structures
    inside = [site for site in loaded.sites if site.name != task.hold_out]
    first = iopfl.processes()[0] == 0
    model = UNet(loaded.channels, loaded.classes, args.width, args.depth, torch.Generator().manual_seed(task.seed))
    model = model.to(args.device, memory_format=torch.channels_last)
    names, found, files = [site.name for site in inside], [], {}  # files: the models with their digests
    shelf = Shelf(task.rounds, args.device, ["pooled", *names], spare=args.participation < 1)
    after = shelf.open()
    done = after[0] if after else 0

    def report(phase: str, method: str, site: data.Site, split: data.Split, prediction: Tensor, **more) -> None:
        distances = phase in ("inside", "outside")
        for row in iopfl.evaluate(prediction, split.masks[:], split.cases, structures, site.spacing, distances):
            found.append({"phase": phase, "method": method, "seed": task.seed, "hold_out": task.hold_out,
                          "site": site.name, **row, **more})

    def keep_model(file: str, state: iopfl.State) -> None:
        files[f"{task.folder.name}/{file}"] = save(task.folder / file, state)

    def own_model(last: iopfl.Round, method: str, site: data.Site) -> torch.nn.Module:
        return iopfl.with_state(model, last.own(method, site.name))

    if args.jobs == 1:
        print(f"\n{task}. Validation Dice in %, {' / '.join(task.inside)}:")
    for last in iopfl.federate(model, {site.name: site.train for site in inside}, args.rounds, task.inside,
                               seed=task.seed, epochs=args.local_epochs, batch_size=args.batch_size, lr=args.lr,
                               participation=args.participation, memory=shelf, after=after):
        if last.number > done:
            shelf.keep(last)
        if args.jobs == 1:
            line = f"round {last.number:3d}/{args.rounds}"
            if last.number == done:
                line += "  read from the disk"
            elif last.number % args.evaluate_every == 0 or last.number == args.rounds:
                scores = {site.name: [score(own_model(last, method, site), site, structures) for method in task.inside]
                          for site in inside[:MOST_SHOWN] if site.name in last.trained_here}
                scores = {name: dice for part in of_all(scores) for name, dice in part.items()}
                line += "".join(f"  {name} " + "/".join(f"{100 * value:.1f}" for value in scores[name])
                                for name in names[:MOST_SHOWN])
            else:
                losses = [loss for part in of_all(last.losses) for loss in part.values()]
                line += f"  mean training loss {np.mean(losses):.3f}"
            left = (time.perf_counter() - begin) * (args.rounds - last.number) / max(1, last.number - done)
            print(line + f"  {left:4.0f} s left" * (last.number > done), flush=True)
    for method in task.inside:
        for site in (site for site in inside if site.name in last.trained_here):
            trained_model = own_model(last, method, site)
            for phase, split in (("inside", site.test), ("validation", site.validation)):
                report(phase, method, site, split, iopfl.predict(trained_model, split.images))
            if method == "iopfl":
                keep_model(f"personal-{site.name}.pt", trained_model.state_dict())
    found[:] = sorted((row for part in of_all(found) for row in part), key=lambda row: (
        [*task.inside].index(row["method"]), names.index(row["site"])))
    files = {file: digest for part in of_all(files) for file, digest in part.items()}
    if not first:
        return {}
    if "iopfl" in task.inside:
        keep_model("global.pt", last.global_state)
    trained = time.perf_counter()
    routing = None
    if task.outside:
        site = next(site for site in loaded.sites if site.name == task.hold_out)
        sources = {**{name: f"personal-{name}.pt" for name in names}, "global": "global.pt"}
        experts = {name: iopfl.with_state(model, load(task.folder / file)) for name, file in sources.items()}
        routing = run_outside(args, task, site, experts, structures, report, keep_model)
    return {"rows": found, "routing": routing, "files": files,
            "seconds": {"inside": trained - begin, "outside": time.perf_counter() - trained}}


def run_outside(args: argparse.Namespace, task: Task, site: data.Site, experts: dict[str, torch.nn.Module],
                structures: dict, report: Callable, keep_model: Callable) -> dict | None:
    """All methods outside on all images of the site; returns the mean routing weights of "routing"."""
    split = site.everything  # no label of it was used: every image is a test image
    *personal, global_model = experts.values()
    mixtures = {"global": [[global_model]], "personal": [personal], "all": [[*personal, global_model]],
                "each": [[expert] for expert in experts.values()]}
    predictions, routing = {}, None
    for name, method in task.outside.items():
        def after_pass(number: int) -> None:
            if method.curve:
                prediction = router.predict(routed, split.images).argmax(dim=1)
                area = (prediction > 0).float().mean().item()  # share of the image
                report("curve", name, site, split, prediction, **{"pass": number, "area": area})

        if method is None:
            predictions[name] = oracle(args, global_model, split, task.seed)
        else:
            probabilities = []
            for models in mixtures[method.experts]:
                routed = router.build_routed(models, method.settings, torch.Generator().manual_seed(task.seed))
                generator = torch.Generator(args.device).manual_seed(task.seed)
                probabilities.append(router.adapt(routed, split.images, generator=generator, online=method.online,
                                                  after_pass=after_pass))
            predictions[name] = torch.stack(probabilities).mean(dim=0).argmax(dim=1)
        report("outside", name, site, split, predictions[name])
        if name == "routing":
            keep_model("adapted.pt", routed.state_dict())
            layers, weights = router.mean_routing(routed, split.images)
            routing = {"outside": site.name, "experts": list(experts), "weights": weights.tolist()}
            draw_heat_map(routing["weights"], layers, list(experts), task.folder / "routing.png")
    if {"global", "routing"} <= predictions.keys():
        draw_outside(split, predictions, structures, task.folder / "outside.png")
    return routing


def oracle(args: argparse.Namespace, global_model: torch.nn.Module, split: data.Split, seed: int) -> Tensor:
    """The ceiling: each half of the cases is predicted by the global model trained for ten epochs on the labels
    of the other half."""
    cases = list(dict.fromkeys(split.cases))
    generator = torch.Generator().manual_seed(seed)
    chosen = {cases[i] for i in torch.randperm(len(cases), generator=generator)[:len(cases) // 2]}
    first = torch.tensor([case in chosen for case in split.cases], device=split.masks.device)
    prediction = torch.empty_like(split.masks[:], dtype=torch.long)
    for half in (first, ~first):
        model = copy.deepcopy(global_model)
        iopfl.train_local(model, split.images[~half], split.masks[~half], epochs=10, batch_size=args.batch_size,
                          lr=args.lr, generator=generator)
        prediction[half] = iopfl.predict(model, split.images[half])
    return prediction


def score(model: torch.nn.Module, site: data.Site, structures: dict) -> float:
    """Mean Dice over the structures on the validation images."""
    split = site.validation
    return float(np.mean([row["dice"] for row in iopfl.evaluate(iopfl.predict(model, split.images), split.masks[:],
                                                                split.cases, structures, site.spacing, distances=False)]))


# ---------------------------------------------------------------- tables
def table(rows: list[dict], phase: str, unit: str) -> str:
    """Dice in % by site, mean ± sample standard deviation over seeds; best method of a column, ceilings aside, with *."""
    rows = [row for row in rows if row["phase"] == phase]
    methods, structures, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "structure", "seed"))
    sites = sorted({row["site"] for row in rows})

    def per_seed(key: str, method: str, chosen_structures: list, chosen_sites: list) -> np.ndarray:
        """Mean over structures and sites, one number a seed."""
        return np.array([np.mean([row[key] for row in rows if row["seed"] == seed and row["method"] == method
                                  and row["structure"] in chosen_structures and row["site"] in chosen_sites
                                  and row[key] is not None] or [np.nan]) for seed in seeds])

    columns = [("dice", [site], site) for site in sites if len(sites) <= MOST_SHOWN]
    if len(sites) > 1:
        columns.append(("dice", sites, "mean"))
    columns += [("hd95", sites, f"HD95 {unit}"), ("assd", sites, f"ASSD {unit}")]
    groups = [(structure, [structure]) for structure in structures]
    if len(structures) > 1:
        groups.append(("mean", structures))
    width = 2 + max(11 if len(seeds) > 1 else 7, *(len(title) for *_, title in columns))
    lines = [f"{'':33}" + "".join(f"{title:>{width}}" for *_, title in columns)]
    for label, group in groups:
        texts = {method: f"{label:10.10} {method + ' (ceiling)' * (method in CEILINGS):22}" for method in methods}
        for key, chosen, _ in columns:
            values = {method: per_seed(key, method, group, chosen) for method in methods}
            means = [values[method].mean() for method in methods if method not in CEILINGS]
            best, scale, digits = (max(means), 100, 1) if key == "dice" else (min(means), 1, 2)
            for method in methods:
                mean = values[method].mean()
                spread = f"±{scale * values[method].std(ddof=1):.{digits}f}" if len(seeds) > 1 else ""
                star = "*" if mean == best and method not in CEILINGS else " "
                texts[method] += f"{scale * mean:.{digits}f}{spread}{star}".rjust(width)
        lines += texts.values()
    valid, masks = (sum(row[key] for row in rows) for key in ("distance_cases", "cases"))
    lines.append(f"HD95 and ASSD count {valid} of {masks} masks" + "; in the others both are empty" * (valid < masks))
    return "\n".join(lines)


def tables(rows: list[dict], unit: str) -> str:
    """The whole report as text."""
    parts = []
    for phase, images, reference in (("inside", "test images", "iopfl"), ("outside", "all images of the hospital held out", "routing")):
        methods = {row["method"] for row in rows if row["phase"] == phase}
        if methods:
            parts.append(f"{phase.capitalize()}, {images}, Dice in %\n{table(rows, phase, unit)}")
        if reference in methods and len(methods) > 1:
            parts.append(compare(rows, phase, reference))
    validation: dict[str, list] = {}
    for row in rows:
        if row["phase"] == "validation":
            validation.setdefault(row["method"], []).append(100 * row["dice"])
    if validation:
        parts.append("Inside, validation images, mean Dice in %: "
                     + ", ".join(f"{method} {np.mean(values):.1f}" for method, values in validation.items()))
    dice, areas = curves(rows, "dice"), curves(rows, "area")
    for method in dice:
        lines = [f"{method} after pass 0, 1, 2 …"]
        for title, values in (("Dice in %", dice[method]), ("foreground predicted, % of the image", areas[method])):
            lines.append(f"  {title}: " + " ".join(f"{value:.1f}" for value in values))
        parts.append("\n".join(lines))
    return "\n" + "\n\n".join(parts)


def compare(rows: list[dict], phase: str, reference: str) -> str:
    """The reference against each other method over all pairs (hospital, seed): mean, least and greatest difference
    in points of Dice, wins, ties (less than 0.1 points apart), losses, and p of the exact two-sided sign test."""
    dice: dict[str, dict] = {}
    for row in rows:
        if row["phase"] == phase:
            dice.setdefault(row["method"], {}).setdefault((row["site"], row["seed"]), []).append(100 * row["dice"])
    own = dice.pop(reference)
    lines = [f"{reference + ' against':22}{'mean':>8}{'least':>8}{'most':>8}{'wins':>7}{'ties':>6}{'losses':>8}{'p':>10}"]
    for method, values in dice.items():
        gains = np.array([np.mean(own[pair]) - np.mean(values[pair]) for pair in own])
        wins, losses = int((gains >= 0.1).sum()), int((gains <= -0.1).sum())
        lines.append(f"{method:22}{gains.mean():+8.2f}{gains.min():+8.2f}{gains.max():+8.2f}{wins:7}"
                     f"{len(gains) - wins - losses:6}{losses:8}{sign_test(wins, losses):10.2g}")
    return "\n".join(lines)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least as uneven if wins and losses were equally likely; ties left out."""
    count = wins + losses
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(max(wins, losses), count + 1)) / 2**count)


def curves(rows: list[dict], key: str) -> dict[str, list[float]]:
    """Mean of "dice" or "area" in % over everything after pass 0, 1, 2 …, by method."""
    result: dict[str, dict] = {}
    for row in rows:
        if row["phase"] == "curve":
            result.setdefault(row["method"], {}).setdefault(row["pass"], []).append(100 * row[key])
    return {method: [float(np.mean(values)) for values in passes.values()] for method, passes in result.items()}


# ---------------------------------------------------------------- pictures
GREEN, ORANGE, BLUE = (60, 220, 60), (255, 150, 0), (60, 150, 255)
PALETTE = [(0, 0, 0), BLUE, ORANGE, GREEN, (220, 60, 200), (240, 230, 60)]  # of masks, by class


def picture(image: Tensor, contours: list[tuple[Tensor, tuple]] = (), size: tuple[int, int] = (160, 160)) -> Image.Image:
    """An image (C, H, W) as RGB of a size (width, height), with the outlines of every class of some masks (H, W), the
    last on top."""
    values = image.cpu().numpy()
    low, high = np.quantile(values, [0.005, 0.995])
    values = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    values = np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)
    canvas = Image.fromarray((255 * values).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.array(canvas)
    for mask, colour in contours:
        large = mask.cpu().numpy().astype(np.uint8)
        for level in range(1, int(large.max()) + 1):
            # A smoothed enlargement, cut at one half, has a clean outline.
            region = Image.fromarray(255 * (large >= level).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
            region = np.asarray(region) > 127
            padded = np.pad(region, 1, mode="edge")
            inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            pixels[region & ~inner] = colour
    return Image.fromarray(pixels)


def draw_grid(cells: list[list[Image.Image]], labels: list[str], titles: list[str], path: Path) -> None:
    """Rows of pictures with a label at the left of each and titles above the columns."""
    side, left, top = cells[0][0].width, 110, 24
    sheet = Image.new("RGB", (left + len(cells[0]) * (side + 4), top + len(cells) * (side + 4)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((left + column * (side + 4) + 2, 4), title, "black", font)
    for row, label in enumerate(labels):
        draw.text((6, top + row * (side + 4) + side // 2 - 8), label, "black", font)
        for column, cell in enumerate(cells[row]):
            sheet.paste(cell, (left + column * (side + 4), top + row * (side + 4)))
    sheet.save(path)


def draw_hospitals(sites: list[data.Site], path: Path) -> None:
    """Gallery: training images of each hospital, the last two with their masks."""
    count, cells = min(6, min(len(site.train.images) for site in sites)), []
    for site in sites:
        # Of volumes such slices as hold something, spread over the patients.
        shown = (site.train.masks[:] > 0).flatten(1).any(dim=1).nonzero()[:, 0]
        shown = shown if len(shown) >= count else torch.arange(len(site.train.images))
        shown = shown[torch.linspace(0, len(shown) - 1, count).round().long()].tolist()
        cells.append([picture(site.train.shown(i), [(site.train.masks[i], GREEN)] if n >= count - 2 else [])
                      for n, i in enumerate(shown)])
    titles = [""] * (count - 2) + ["drawn by its annotator"] if count > 2 else []
    draw_grid(cells, [site.name for site in sites], titles, path)


def draw_outside(split: data.Split, predictions: dict[str, Tensor], structures: dict, path: Path) -> None:
    """Six images outside, from the greatest loss to the greatest gain by routing: truth, global, routed contours."""
    dice = np.array([[np.mean([iopfl.dice(np.isin(p, classes), np.isin(m, classes)) for classes in structures.values()])
                      for p, m in zip(predictions[method].cpu().numpy(), split.masks[:].cpu().numpy())]
                     for method in ("global", "routing")])
    gains = dice[1] - dice[0]
    order = np.argsort(gains, kind="stable")[np.linspace(0, len(gains) - 1, min(6, len(gains))).astype(int)]
    cells, labels = [], []
    for i in order:
        truth = (split.masks[i], GREEN)
        cells.append([picture(split.shown(i)), picture(split.shown(i), [truth]),
                      picture(split.shown(i), [truth, (predictions["global"][i], ORANGE)]),
                      picture(split.shown(i), [truth, (predictions["routing"][i], BLUE)])])
        labels.append(f"Dice {100 * dice[0, i]:.0f} to {100 * dice[1, i]:.0f}")
    draw_grid(cells, labels, ["image", "truth (green)", "global (orange)", "routed (blue)"], path)


def draw_heat_map(values: list[list[float | None]], rows: list[str], columns: list[str], path: Path) -> None:
    """Numbers on a scale from white to blue, the largest one; None stays grey."""
    width, height, left, top = 74, 20, 150, 26
    largest = max(value for row in values for value in row if value is not None)
    sheet = Image.new("RGB", (left + width * len(columns), top + height * len(rows) + 6), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(columns):
        draw.text((left + column * width + 4, 6), title[:11], "black", font)
    for row, (label, line) in enumerate(zip(rows, values)):
        draw.text((6, top + row * height + 3), label[:22], "black", font)
        for column, value in enumerate(line):
            share = 0 if value is None else value / max(largest, 1e-6)
            box = (left + column * width, top + row * height, left + (column + 1) * width - 2, top + (row + 1) * height - 2)
            draw.rectangle(box, fill=(int(255 - 200 * share), int(255 - 130 * share), 255) if value is not None else "lightgrey")
            if value is not None:
                draw.text((box[0] + 22, box[1] + 2), f"{value:.2f}", "black", font)
    sheet.save(path)


def draw_routing(routings: list[dict], path: Path) -> None:
    """What routing chose: for each hospital outside the mean weight of each expert over layers, images and seeds."""
    outside = list(dict.fromkeys(routing["outside"] for routing in routings))
    experts = sorted({name for routing in routings for name in routing["experts"]} - {"global"}) + ["global"]
    values = []
    for site in outside:
        means = [dict(zip(r["experts"], np.mean(r["weights"], axis=0).tolist())) for r in routings if r["outside"] == site]
        values.append([float(np.mean([mean[e] for mean in means])) if e in means[0] else None for e in experts])
    draw_heat_map(values, [f"outside: {site}" for site in outside], experts, path)


def draw_curves(curves: dict[str, list[float]], path: Path, first: str, last: str) -> None:
    """One line each, from the first to the last label of the horizontal axis."""
    left, top, width, height = 50, 16, 420, 220
    values = [value for curve in curves.values() for value in curve]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-6)
    sheet = Image.new("RGB", (left + width + 20, top + height + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def point(number: float, value: float, steps: int) -> tuple[float, float]:
        return left + width * number / max(steps, 1), top + height * (high - value) / (high - low)

    for value in np.linspace(low, high, 5):
        y = point(0, value, 1)[1]
        draw.line([(left, y), (left + width, y)], "lightgrey")
        draw.text((6, y - 8), f"{value:.1f}", "black", font)
    # The legend goes where the curves do not begin.
    legend = top if max(curve[0] for curve in curves.values()) < (low + high) / 2 else top + height - 20 * len(curves)
    for number, (name, curve) in enumerate(curves.items()):
        colour = (BLUE, ORANGE, GREEN)[number % 3]
        draw.line([point(n, value, len(curve) - 1) for n, value in enumerate(curve)], colour, 3)
        draw.text((left + 10, legend + 20 * number), name, colour, font)
    draw.text((left, top + height + 8), first, "black", font)
    draw.text((left + width - 20, top + height + 8), last, "black", font)
    sheet.save(path)


# ---------------------------------------------------------------- a look at the images
def origin(loaded: data.DataSet) -> str:
    kinds = {"simulated": "simulated images", "fundus": "fundus photographs with disc and cup", "volumes": "prostate volumes"}
    return f"{len(loaded.sites)} sites, {kinds.get(loaded.kind, loaded.kind)}"


def show(args: argparse.Namespace, out: Path) -> int:
    """What is there: sites, cases, sizes, spacings, shares of the classes, and a gallery."""
    loaded = load_sites(args, args.seeds[0])
    print(f"{origin(loaded)}; {loaded.channels} channels, classes 0 to {loaded.classes - 1}")
    element = "resized voxel, mm" if loaded.unit == "mm" else "resized pixel"
    print(f"{'':19}{'cases':>19}\n{'site':19}{'train':>7}{'val':>6}{'test':>6}{'images':>8}  {'size as read':26}{element:26}"
          + "".join(f"{f'class {c}, %':>12}" for c in range(loaded.classes)))

    def span(values: list) -> str:
        texts = ["×".join(f"{number:.4g}" for number in value) for value in sorted(set(values))]
        return " … ".join(texts[:1] + texts[1:][-1:])

    for site in loaded.sites:
        split = site.everything
        counts = [len(set(part.cases)) for part in (site.train, site.validation, site.test)]
        masks = split.masks[:]
        shares = torch.bincount(masks.flatten(), minlength=loaded.classes) / masks.numel()
        shapes, spacings = site.shapes or [masks.shape[1:]], site.spacing
        print(f"{site.name:19.18}" + "".join(f"{count:>{w}}" for count, w in zip(counts, (7, 6, 6))) + f"{len(split.cases):8}  "
              + f"{span(shapes):26}{span(list(spacings.values()) if isinstance(spacings, dict) else [spacings]):26}"
              + "".join(f"{100 * share:12.2f}" for share in shares.tolist()))
    picture_file = out.with_name(out.name + "-hospitals.png")
    picture_file.parent.mkdir(parents=True, exist_ok=True)
    draw_hospitals(loaded.sites, picture_file)
    print(f"Six images of each, two with their masks: {picture_file}")
    return 0


# ---------------------------------------------------------------- a hospital outside with unlabelled images alone
def open_run(path: Path, device: str) -> tuple[router.RoutedNetwork, dict]:
    """The routed network of a trained run, or one that was adapted before, and what is known of it."""
    file = path / "adapted.json"
    adapted = file.is_file()
    if not adapted:
        folds = [path] if (path / "global.pt").is_file() else sorted(file.parent for file in path.glob("*/global.pt"))
        folds = [fold for fold in folds if fold.name.startswith("seed")]
        if len(folds) != 1:
            raise WrongUse(f"{path}: expected one trained federation, found {len(folds)}"
                           + "".join(f"; --adapt {fold}" for fold in folds[:6]))
        path = folds[0]
        file = path.parent / "results.json"
    found, digests = read_json(file), {}
    try:
        if not adapted:
            config = found["config"]
            routing = (config["outside"].get("routing") or asdict(Outside()))["settings"]
            digests = dict(found.get("files", {}))
            found = {**{key: config[key] for key in ("size", "width", "depth")}, **found["data"], "routing": routing,
                     "seed": int(path.name[4:].split("-")[0]),
                     "experts": [*sorted(file.stem.removeprefix("personal-") for file in path.glob("personal-*.pt")), "global"]}
        settings = RoutingSettings(**found["routing"])
        known = {"adapted": adapted, **{key: found[key] for key in (
            "size", "width", "depth", "channels", "classes", "seed", "kind", "mask_values", "structures")},
            "routing": asdict(settings), "experts": [str(name) for name in found["experts"]],
            "online": bool(found.get("online"))}
        for key, most in {**MOST, "channels": 3, "classes": 256, "seed": 2**32}.items():
            if key in known and not (type(known[key]) is int and (key != "seed") <= known[key] <= most):
                raise ValueError(f"{key} is {known[key]}")
        for value in [known["mask_values"] or [], *known["structures"].values()]:
            if not all(type(number) is int for number in value):
                raise ValueError(f"{value} should be whole numbers")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: damaged, or of an older version of this script ({type(error).__name__}: {error}); "
                         f"train again") from None
    model = UNet(known["channels"], known["classes"], known["width"], known["depth"])
    model = model.to(device, memory_format=torch.channels_last)
    if adapted:
        models = [model] * len(known["experts"])  # adapted.pt holds their weights
    else:
        files = [*(f"personal-{name}.pt" for name in known["experts"][:-1]), "global.pt"]
        models = [iopfl.with_state(model, load(path / file, like=model.state_dict(), digest=digests.get(f"{path.name}/{file}")))
                  for file in files]
    routed = router.build_routed(models, settings, torch.Generator().manual_seed(known["seed"]))
    if adapted:
        routed.load_state_dict(load(path / "adapted.pt", like=routed.state_dict()))
    return routed, known


def progress(items: Sequence, label: str) -> Iterator:
    """The items, with their count and the time left on a terminal."""
    begin = time.perf_counter()
    for number, item in enumerate(items):
        yield item
        if sys.stderr.isatty():
            left = (time.perf_counter() - begin) / (number + 1) * (len(items) - number - 1)
            end = "\n" if number + 1 == len(items) else ""
            print(f"\r{label} {number + 1}/{len(items)}, {left:.0f} s left    ", end=end, file=sys.stderr, flush=True)


def adapt(args: argparse.Namespace, out: Path) -> int:
    """Masks, overlays and a report for a folder of unlabelled images; 1 if some could not be read."""
    routed, known = open_run(Path(args.adapt).resolve(), args.device)
    if known["adapted"] and args.online:
        raise WrongUse(f"{args.adapt} was adapted before and is used as it is; leave out --online")
    pairs = data.pairs_of(Path(args.images), Path(args.masks) if args.masks else None, strict=False)
    if not pairs:
        raise WrongUse(f"{args.images}: no image; PNG, JPEG, TIFF and NIfTI are known")
    settings = {"adapt": str(Path(args.adapt).resolve()), "images": str(Path(args.images).resolve())}
    with working_in(out, settings, args.overwrite, proof="adapted.json"):
        return adapt_in(unfinished(out), args, out, routed, known, pairs)


def adapt_in(folder: Path, args: argparse.Namespace, out: Path, routed: router.RoutedNetwork, known: dict,
             pairs: list[tuple[Path, Path | None]]) -> int:
    values = args.mask_values or known["mask_values"]
    torch.backends.cudnn.deterministic = True
    stored, sources = data.Stored((known["channels"], known["size"], known["size"]), args.device, folder), []
    for file, mask_file in progress(pairs, "reading"):
        try:
            pixels = data.read_pixels(file)
            inputs = data.network_input(file, pixels, known["size"], known["channels"], known["kind"])
        except (ValueError, OSError) as error:
            problem = error
            complain(f"left out: {error}")
            continue
        try:
            if mask_file:  # now, not after an hour
                data.read_truth(mask_file, values, known["kind"], pixels.shape[:3], known["classes"])
        except (ValueError, OSError) as error:
            complain(f"not scored: {error}")
            mask_file = None
        stored.append(inputs)
        sources.append((file, mask_file, len(inputs)))
    if not sources:
        shutil.rmtree(folder)
        raise ValueError(f"{args.images}: none of the {len(pairs)} files can be used; the last: {problem}")
    for name in ("masks", "overlays"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()

    generator = torch.Generator(args.device).manual_seed(known["seed"])
    begin, passes = time.perf_counter(), progress(range(known["routing"]["passes"]), "adapting, pass")
    if known["adapted"]:
        batches = (router.predict(routed, batch) for batch in stored.split(routed.settings.batch_size))
    else:
        batches = router.adapt_batches(routed, stored, generator=generator, online=args.online,
                                       after_pass=lambda number: next(passes, None))
    images = outside_images(routed, stored, batches, bool(args.masks))
    images = itertools.chain([next(images)], images)  # the first comes after all passes
    rows = []
    for file, mask_file, count in progress(sources, "predicting"):
        rows.append(write_masks(file, mask_file, [next(images) for _ in range(count)], values, known, folder))
    layers, weights = router.mean_routing(routed, stored)
    draw_heat_map(weights.tolist(), layers, known["experts"], folder / "routing.png")
    save(folder / "adapted.pt", routed.state_dict())
    chosen = dict(zip(known["experts"], weights.mean(dim=0).tolist()))
    known |= {"adapted": True, "online": args.online or known["online"], "files": len(sources), "chosen": chosen}
    write(folder / "adapted.json", json.dumps(known, indent=1).encode())
    with open(folder / "images.csv", "w", newline="", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, max(rows, key=len))  # without a mask a row has no Dice
        writer.writeheader()
        writer.writerows(rows)
    close_folder(folder, out)
    print("What routing chose, mean over layers and images: " + ", ".join(f"{n} {w:.2f}" for n, w in chosen.items()))
    for key in list(max(rows, key=len))[1:]:
        found = [row[key] for row in rows if key in row]
        print(f"{key}: mean {np.mean(found):.3f}, least {min(found):.3f}" + f", {len(found)} files" * (len(found) < len(rows)))
    print(f"{len(sources)} of {len(pairs)} files in {time.perf_counter() - begin:.0f} s. Masks, overlays, images.csv: {out}")
    return int(len(sources) < len(pairs))


def outside_images(routed: router.RoutedNetwork, stored: data.Stored, batches: Iterator[Tensor],
                   before: bool) -> Iterator[tuple[Tensor, np.ndarray, Tensor | None]]:
    """For each image its probabilities (C, H, W), overlap and size of the foreground in it and in a noisy, turned view,
    and with `before` the global model's probabilities."""
    generator = torch.Generator(stored.device).manual_seed(0)
    last = torch.nn.functional.one_hot(torch.tensor(routed.experts - 1), routed.experts)
    for images, probabilities in zip(stored.split(routed.settings.batch_size), batches):
        views = router.draw_views(images, generator)
        noise = routed.settings.noise * torch.randn(images.shape, generator=generator, device=images.device)
        of_view = router.view(router.predict(routed, router.view(images + noise, views)), views, inverse=True)
        p, q = 1 - probabilities[:, 0], 1 - of_view[:, 0]  # foreground
        agreement = torch.stack([(2 * p * q).sum(dim=(1, 2)), (p * p + q * q).sum(dim=(1, 2))], dim=1)  # (N, 2)
        source = [None] * len(images)
        if before:
            with router.fixed_routing(routed, last):
                source = router.predict(routed, images)
        yield from zip(probabilities, agreement.cpu().numpy(), source)


def write_masks(file: Path, mask_file: Path | None, images: list[tuple], mask_values: list[int] | None, known: dict,
                folder: Path) -> dict:
    """Mask and overlay of one file at its own size; returns its line of images.csv, with Dice if there is a mask."""
    volume, name, pixels = data.is_volume(file), data.stem(file), data.read_pixels(file)
    shape = pixels.shape[1:3]

    def own_size(probabilities: list[Tensor]) -> np.ndarray:
        """Classes (n, H, W)."""
        return np.stack([torch.nn.functional.interpolate(p[None], shape, mode="bilinear").argmax(dim=1)[0].cpu().numpy()
                         for p in probabilities]).astype(np.uint8)

    mask = own_size([probabilities for probabilities, *_ in images])
    overlap, size = np.sum([agreement for _, agreement, _ in images], axis=0)
    row = {"file": file.name, "foreground": float((mask > 0).mean()), "confidence": float(overlap / max(size, 1e-6))}
    if mask_file:
        truth = data.read_truth(mask_file, mask_values, known["kind"], mask.shape, known["classes"])
        for when, prediction in (("before", own_size([source for *_, source in images])), ("after", mask)):
            for structure, classes in known["structures"].items():
                row[f"Dice {structure} {when}"] = iopfl.dice(np.isin(prediction, classes), np.isin(truth, classes))
    if volume:
        data.write_volume(folder / "masks" / f"{name}.nii.gz", mask, file)
        area = (mask > 0).sum(axis=(1, 2))
        chosen = np.flatnonzero(area) if area.any() else np.arange(len(mask))
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(6, len(chosen))).round().astype(int)]
        cells = [picture(torch.from_numpy(pixels[i, :, :, 0][None]), [(torch.from_numpy(mask[i]), BLUE)]) for i in chosen]
        draw_grid([cells], [name[:14]], [f"slice {i}" for i in chosen], folder / "overlays" / f"{name}.png")
    else:
        image = Image.fromarray(mask[0])
        image.putpalette([value for colour in PALETTE for value in colour])
        image.save(folder / "masks" / f"{name}.png")
        scale = min(1, 640 / max(shape))
        size = (max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale)))
        picture(torch.from_numpy(pixels[0].transpose(2, 0, 1)), [(torch.from_numpy(mask[0]), BLUE)], size).save(
            folder / "overlays" / f"{name}.png")
    return row


# ---------------------------------------------------------------- the whole
def unfinished(out: Path) -> Path:
    """The folder to work in until all is done."""
    return out.with_name(out.name + ".unfinished")


@contextmanager
def working_in(out: Path, settings: dict, overwrite: bool, resume: bool = False, proof: str = "results.json"):
    """Within this context `unfinished(out)` belongs to this process; it is new, or as an interrupted run of the same
    settings left it. False is yielded where all is done. proof: the file that tells a finished run, which alone may be
    replaced."""
    settings = json.loads(json.dumps(settings))
    is_run, folder = (out / proof).is_file(), unfinished(out)
    file = folder / "settings.json"
    if resume and not file.is_file() and is_run and (out / file.name).is_file() and read_json(out / file.name) == settings:
        shutil.rmtree(out / "replaced", ignore_errors=True)
        yield False
        return
    if out.exists() and not (overwrite and is_run):
        raise WrongUse(f"{out} exists" + (f" beside {folder}; say --overwrite --resume to go on with that and to replace "
                                          f"this, or another --out" if is_run and file.is_file() else
                                          "; say --overwrite or another --out" if is_run else
                                          f"; it holds no {proof} and is not replaced; say another --out"))
    if folder.exists() and not file.is_file() and any(not other.name.startswith(file.name) for other in folder.iterdir()):
        raise WrongUse(f"{folder} is in the way and no unfinished run of this script; say another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WrongUse(f"{folder}: another process is at work there") from None
        before = read_json(file) if file.is_file() and (resume or not overwrite) else {}
        if resume and before:
            for name in {**before, **settings}:
                if before.get(name) != settings.get(name):
                    way = f"say --threads {before.get(name)}, or" if name == "threads" else "say"
                    raise WrongUse(f"{folder} holds an unfinished run with another setting, {name} {before.get(name)} "
                                   f"instead of {settings.get(name)}; {way} another --out, or begin anew with --overwrite "
                                   f"and without --resume")
        else:
            if not overwrite and "seeds" in before:  # an adaptation begins anew
                raise WrongUse(f"{folder} holds an unfinished run; say --resume to go on with it, --overwrite to begin anew")
            write(file, b"{}")  # tells that the folder is ours, and what it holds of no use
            for other in folder.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
                elif other != file:
                    other.unlink()
            write(file, json.dumps(settings).encode())
        yield True
    finally:
        os.close(lock)


def close_folder(folder: Path, out: Path) -> None:
    """All is done: the folder takes the place of what lay in `out`, by two renamings."""
    replaced = folder / "replaced"
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    shutil.rmtree(out / replaced.name, ignore_errors=True)


def run_all(args: argparse.Namespace, tasks: list[Task], loaded: data.DataSet) -> Iterator[tuple[Task, dict]]:
    """The tasks with their results, as they come, from `args.jobs` processes; loaded: the sites of the first seed."""
    if args.jobs == 1:
        seed = args.seeds[0]
        for task in tasks:
            if task.seed != seed:
                seed, loaded = task.seed, load_sites(args, task.seed)
            yield task, run(args, task, loaded)
        return
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), set_up, (args.threads, True)) as pool:
        futures = {pool.submit(run, args, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for child in active_children():  # what they have done is on the disk
                child.terminate()
            raise


def set_up(threads: int | None = None, helper: bool = False) -> None:
    """What is best for a whole process; helper: it works for another one, which alone has something to say."""
    if threads:
        torch.set_num_threads(threads)
    warnings.formatwarning = lambda message, *_: f"train.py: {message}\n"
    if helper:
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        # When the other one is killed, a run that goes on must not meet this one.
        threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    # glibc returns large blocks to the system when they are freed, and each page of the next one is a fault and is
    # cleared again: keeping them saves a tenth of training and a third of adapting to large images (README.md).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks apart
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is returned


def peak_memory() -> float:
    """The most memory that this process, or one that it started, has had so far, in MiB."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (1024 if sys.platform != "darwin" else 1024**2)


def join_processes(args: argparse.Namespace) -> None:
    """Where torchrun started this script several times: one group of them, each with a GPU of its own if any."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if args.adapt or args.list or (args.jobs or 1) > 1:
        raise WrongUse("torchrun shares one federation among processes; leave out --adapt, --list and --jobs")
    beside, number = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if args.device == "cuda" and beside > torch.cuda.device_count():
        raise WrongUse(f"--nproc-per-node {beside}: each process takes a GPU, and this machine has {torch.cuda.device_count()}")
    args.jobs = 1
    # torchrun leaves each process one thread.
    args.threads = args.threads or max(torch.get_num_threads(), (os.cpu_count() or 1) // beside)
    signal.signal(signal.SIGTERM, lambda *_: (complain("told to end; --resume goes on after the last whole round"),
                                              os._exit(1)))
    if args.device == "cuda":
        torch.cuda.set_device(number)
    # All wait while the first serves a hospital outside, however long; a process that dies is noticed at once.
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo", timeout=timedelta(days=7))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # the first process reports


def complain(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    print("train.py: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip()), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    set_up()
    args = None
    try:
        args = parse_arguments(argv)
        name = "adapted" if args.adapt else Path(args.root).resolve().name if args.root else args.task
        out = Path(args.out or f"runs/{name}").resolve()
        if not out.name:
            raise WrongUse(f"--out {out} cannot be replaced")
        join_processes(args)
        if args.adapt:
            with autocast(args):
                return adapt(args, out)
        status = show(args, out) if args.list else train(args, out)
        of_all(status)  # no process leaves while others still talk to it
        return status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if args is None or args.adapt or args.list:
            complain("interrupted")
        elif iopfl.processes()[1] > 1:
            complain("interrupted; the same command goes on with --resume")
        else:
            complain("interrupted; go on with: " + shlex.join(["python", sys.argv[0], *argv, *["--resume"][:not args.resume]]))
        return 130
    except Exception as error:
        if os.environ.get("IOPFL_TRACEBACK"):
            raise
        lost = isinstance(error, dist.DistError) or type(error) is RuntimeError and "gloo" in str(error)
        if iopfl.processes()[1] > 1 and lost:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now; one message is enough
            error = f"process {dist.get_rank()} ends, since another one has; --resume goes on after the last whole round"
        elif not isinstance(error, (ValueError, OSError, ImportError)):
            error = f"{type(error).__name__}: {error} (IOPFL_TRACEBACK=1 shows where)"
        complain(str(error))
        return 2 if isinstance(error, WrongUse) else 1


def train(args: argparse.Namespace, out: Path) -> int:
    """Federations, hospitals outside, report."""
    begin = time.perf_counter()
    loaded = load_sites(args, args.seeds[0])
    chosen = hold_outs(args.hold_out, [site.name for site in loaded.sites])
    inside, outside = chosen_methods(args, chosen[0])
    if not inside:
        raise WrongUse(f"--methods {' '.join(args.methods)}: none of them is for hospitals inside")
    check_batches(args, loaded.sites)
    folder = unfinished(out)
    tasks = plan(args.seeds, chosen, inside, outside, folder)
    threads = torch.get_num_threads()
    args.jobs = args.jobs or (1 if args.device == "cuda" else min(len(tasks), max(1, threads // (args.threads or 1))))
    args.threads = args.threads or max(1, threads // args.jobs)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out", "overwrite", "resume", "jobs", "evaluate_every")}
    settings["inside"], settings["outside"] = ({name: asdict(method) if method else None for name, method in
                                                methods.items()} for methods in (inside, outside))
    settings |= {"torch": torch.__version__, "numpy": np.__version__}
    with ExitStack() as stack:
        if first_alone(lambda: stack.enter_context(working_in(out, settings, args.overwrite, args.resume))):
            return train_in(folder, args, out, settings, tasks, loaded, begin)
    print(f"{out} is finished")
    return 0


def train_in(folder: Path, args: argparse.Namespace, out: Path, settings: dict, tasks: list[Task],
             loaded: data.DataSet, begin: float) -> int:
    first = iopfl.processes()[0] == 0
    print(origin(loaded))
    if first:
        draw_hospitals(loaded.sites[:MOST_SHOWN], folder / "hospitals.png")
    results, kept = {}, sum(task.result.exists() for task in tasks)
    for task, result in run_all(args, tasks, loaded):
        results[str(task)] = result
        if len(tasks) > 1:
            left = (time.perf_counter() - begin) * (len(tasks) - len(results)) / max(1, len(results) - kept)
            print(f"{task}: done, {len(results)} of {len(tasks)}, {left / 60:.0f} min left", flush=True)
    if not first:
        return 0
    results = [results[str(task)] for task in tasks]
    places = [(task.seed, task.hold_out) for task in tasks]
    rows = sorted((row for result in results for row in result["rows"]),
                  key=lambda row: (places.index((row["seed"], row["hold_out"])), KNOWN.index(row["method"])))
    seconds = {phase: sum(result["seconds"][phase] for result in results) for phase in ("inside", "outside")}
    seconds["total"] = time.perf_counter() - begin
    environment = {"python": sys.version.split()[0], "torch": torch.__version__, "device": args.device,
                   "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
                   "threads": torch.get_num_threads(), "jobs": args.jobs, "processes": iopfl.processes()[1],
                   "peak_memory_mib": round(peak_memory())}
    report = {"config": settings,
              "data": {"channels": loaded.channels, "classes": loaded.classes, "structures": loaded.structures,
                       "kind": loaded.kind, "mask_values": loaded.mask_values},
              "files": {file: digest for result in results for file, digest in result["files"].items()},
              "environment": environment, "seconds": {name: round(value, 1) for name, value in seconds.items()}, "rows": rows}
    routings = [result["routing"] for result in results if result["routing"]]
    if routings:
        draw_routing(routings, folder / "routing.png")
    dice_by_pass = curves(rows, "dice")
    if dice_by_pass:
        draw_curves(dice_by_pass, folder / "curves.png", "passes: 0", str(max(map(len, dice_by_pass.values())) - 1))
    write(folder / "results.json", json.dumps(report, indent=1).encode())
    close_folder(folder, out)
    print(tables(rows, loaded.unit))
    print(f"\n{seconds['total']:.0f} s, peak memory {environment['peak_memory_mib']} MiB a process. "
          f"Models, pictures and results.json: {out}")
    return 0


if __name__ == "__main__":
    status = main()
    if iopfl.processes()[1] > 1:  # in an orderly end threads of gloo have crashed now and then
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
