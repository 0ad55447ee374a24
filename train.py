"""IOP-FL from start to finish: federated rounds, personalised models, a hospital outside, a report.

    python train.py                               simulated prostate MRI, the last hospital outside
    python train.py --task fundus                 simulated fundus photographs
    python train.py --hold-out none --methods all-inside    every hospital inside, all methods
    python train.py --hold-out all --methods all-outside    each hospital outside in turn
    python train.py --resume runs/prostate        go on with a run that was interrupted
    python train.py --resume runs/prostate --rounds 60 --methods tent    go on with a finished one

Folders of real images are trained on by `python -m examples.own_images DIR`, with the same options.
Exit status: 0 all went well, 1 a file cannot be used or training diverged, 2 wrong use, 130 Ctrl-C,
141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import io
import itertools
import json
import os
import platform
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

import data
import iopfl
import router
from models import UNet


# ---------------------------------------------------------------- the story
def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        run(parse_arguments(argv), simulated)


def run(args: argparse.Namespace, load_images: Callable) -> None:
    """Train every federation that was asked for, then report.

    load_images: the source of the images, from (args, seed) to a `data.DataSet`.
    """
    prepare_torch(args)
    dataset = load_images(args, args.seeds[0])
    hold_outs = hospitals_to_hold_out(args.hold_out, dataset)
    folder = open_run(args, dataset)
    results = []
    with autocast(args.device, args.precision), resumable(folder):
        for seed in args.seeds:
            if seed != args.seeds[0]:
                dataset = load_images(args, seed)
            for hold_out in hold_outs:
                for training in trainings_of(args.methods):
                    name = f"seed{seed}-{hold_out or 'all-inside'}-{training}"
                    federation = Federation(
                        args, dataset, seed, hold_out, training, folder / name)
                    results.append(run_federation(federation))
        report(args, dataset.unit, results, folder)


@dataclass
class Federation:
    """All hospitals but one, and how they train together."""

    args: argparse.Namespace
    dataset: data.DataSet
    seed: int
    hold_out: str | None  # the hospital outside; None: all are inside
    training: str  # a key of TRAINING
    folder: Path  # gets the models, rows.json and pictures

    @property
    def inside(self) -> list[data.Site]:
        return [site for site in self.dataset.sites if site.name != self.hold_out]


def run_federation(federation: Federation) -> dict:
    """The hospitals inside (M1, M2), then the one outside (M4 to M8).

    Returns the content of rows.json; methods that stand there already are left out.
    """
    args, folder = federation.args, federation.folder
    result = load_result(folder / "rows.json", args.rounds)
    wanted = methods_of(federation.training, args.methods)
    methods = [name for name in wanted if name not in result["methods"]]
    if not methods:
        return result
    print(f"\nseed {federation.seed}, outside: {federation.hold_out or 'none'}, "
          f"training: {federation.training}")
    begin = time.perf_counter()
    model = new_model(args, federation.dataset, federation.seed)

    # Inside. A round: local training, the average, and each hospital's personalised model.
    progress = load_progress(folder / "last.pt")
    tick = time.perf_counter()
    for current in rounds_of(federation, model, after=progress.last):
        progress.last = current
        for name, local in current.local.items():
            personal = progress.personal.get(name)  # None in the hospital's first round
            progress.personal[name] = iopfl.update_personal(personal, local, args.alpha)  # M2
            progress.fine_tuned[name] = local  # the same with α = 0
        progress.history.append(scores_of_round(federation, model, progress))
        save_progress(folder / "last.pt", progress)
        print_round(current, args.rounds, seconds=time.perf_counter() - tick)
        tick = time.perf_counter()
    draw_curves(progress.history, labels_of(federation.dataset), folder / "curves.png")
    tell_absent(federation, progress)
    rows = []
    for method in methods:
        if method in INSIDE:
            rows += score_inside(federation, model, progress, method, "inside")
            rows += score_inside(federation, model, progress, method, "validation")

    # Outside. What is routed: the personalised models and, as the last one, the global model.
    if federation.training == "plain":
        models = routed_models(model, progress)
        result["distances_inside"] = distances_inside(federation, models["global"])
        if federation.hold_out:
            rows += hospital_outside(federation, models, methods, result)
    about = {"seed": federation.seed, "hold_out": federation.hold_out}
    result |= about
    result["rows"] += [row | about for row in rows]
    result["methods"] += methods
    result["history"] = progress.history
    result["seconds"] += time.perf_counter() - begin
    save(folder / "rows.json", result)
    return result


def rounds_of(federation: Federation, model: nn.Module,
              after: iopfl.Round | None = None) -> Iterator[iopfl.Round]:
    """The rounds of a federation, beginning after the round `after` (M1)."""
    args = federation.args
    clients = {site.name: site.train for site in federation.inside}
    if federation.training == "centralised":  # what no federation may do: one client has all images
        clients = {"all": data.joined(list(clients.values()))}
    for name, split in clients.items():
        clients[name] = split.to(args.device)
    training = TRAINING[federation.training]
    if federation.training == "plain" and "ditto" in args.methods:
        training = WITH_DITTO
    return iopfl.federate(
        model, clients, args.rounds, training,
        epochs=args.local_epochs, batch_size=args.batch_size, lr=args.lr,
        participation=args.participation, seed=federation.seed, after=after)


def routed_models(model: nn.Module, progress: Progress) -> dict[str, nn.Module]:
    """The personalised models by hospital and, as the last one, the global model."""
    models = {}
    for name, state in progress.personal.items():
        models[name] = iopfl.with_state(model, state)
    models["global"] = iopfl.with_state(model, progress.last.global_state)
    return models


def distances_inside(federation: Federation, global_model: nn.Module) -> dict[str, float]:
    """How far each hospital's training images lie from the global model: one number leaves each."""
    distances = {}
    for site in federation.inside:
        images = site.train.to(federation.args.device).images.float()
        distances[site.name] = router.divergence(global_model, images).item()
    return distances


def hospital_outside(federation: Federation, models: dict, methods: list, result: dict) -> list:
    """What each method makes of the hospital held out; all its images are test images.

    models: as `routed_models` returns them. Returns rows; `result`, the content of rows.json, gets
    what routing chose. The federation's folder gets the networks that were routed, and pictures.
    """
    dataset, folder = federation.dataset, federation.folder
    site = next(site for site in dataset.sites if site.name == federation.hold_out)
    everything = site.everything
    split = everything.to(federation.args.device)
    networks = list(models.values())
    by_global = probabilities_of(models["global"], split.images).argmax(dim=1).cpu()
    inside = list(result["distances_inside"].values())
    labels = labels_of(dataset)
    rows = []
    for method in methods:
        if method not in OUTSIDE:
            continue
        # The oracle alone reads split.masks.
        outcome = OUTSIDE[method](networks, split, federation.seed, inside)
        prediction = outcome.probabilities.argmax(dim=1).cpu()  # (N, H, W)
        rows += score(dataset, site, split, prediction, "outside", method)
        if outcome.routed is not None and outcome.routed.experts > 1:
            routing = routing_of(outcome.routed, split.images)
            result["routing"][method] = mean_routing(routing)
            result["routing_spread"][method] = routing_spread(routing)
            columns = [labels.get(name, name) for name in models]
            print(f"{method}, {routing_in_words(routing, columns)}")
            save(folder / f"{method}.pt", iopfl.snapshot(outcome.routed))
            draw_heat_map(mean_routing(routing), columns, folder / f"{method}-weights.png")
            draw_outside(everything, by_global, prediction, folder / f"{method}-masks.png")
    return rows


# ---------------------------------------------------------------- methods inside
@dataclass
class Progress:
    """What a federation has made so far; last.pt keeps it, so that an interrupted run goes on."""

    last: iopfl.Round | None = None
    personal: dict[str, iopfl.State] = field(default_factory=dict)  # p_k^t (M2)
    fine_tuned: dict[str, iopfl.State] = field(default_factory=dict)  # the last w_k^t of each
    history: list[dict] = field(default_factory=list)  # see `scores_of_round`


# Each takes a federation's progress and the name of a hospital, and returns the state that serves
# it: the shared one as long as the hospital has none of its own.
def shared(progress: Progress, site: str) -> iopfl.State:
    return progress.last.model_of(site)


def personalised(progress: Progress, site: str) -> iopfl.State:
    return progress.personal.get(site, shared(progress, site))


def fine_tuned(progress: Progress, site: str) -> iopfl.State:
    return progress.fine_tuned.get(site, shared(progress, site))


def ditto_model(progress: Progress, site: str) -> iopfl.State:
    return progress.last.ditto_models.get(site, shared(progress, site))


# How the clients train in each kind of federation.
TRAINING = {
    "plain": iopfl.Training(),
    "fedprox": iopfl.Training(proximal=0.001),  # Li et al. 2020
    "fedbn": iopfl.Training(personal_layers="batchnorm"),  # Li et al. 2021
    "fedper": iopfl.Training(personal_layers="head"),  # Arivazhagan et al. 2019
    "local": iopfl.Training(personal_layers="all"),
    "centralised": iopfl.Training(),
}
WITH_DITTO = iopfl.Training(ditto=0.1)  # the plain federation, with Ditto's models beside it


class Inside(NamedTuple):
    """A method inside. Several may be scored from one federation: `fedavg`, `fedavg-ft`, `iopfl`
    and `ditto` all come from the plain one."""

    training: str  # the key of TRAINING whose federation is scored
    state: Callable = shared  # which of its states serves a hospital


INSIDE = {
    "local": Inside("local"),
    "fedavg": Inside("plain"),  # McMahan et al. 2017
    "fedprox": Inside("fedprox"),
    "fedbn": Inside("fedbn"),
    "fedper": Inside("fedper"),
    "ditto": Inside("plain", ditto_model),  # Li et al. 2021
    "fedavg-ft": Inside("plain", fine_tuned),  # the last local model
    "iopfl": Inside("plain", personalised),
    "centralised": Inside("centralised"),
}


def trainings_of(methods: list[str]) -> list[str]:
    """The keys of TRAINING that these methods need; each is trained once."""
    return [training for training in TRAINING if methods_of(training, methods)]


def methods_of(training: str, methods: list[str]) -> list[str]:
    """The requested methods that are scored from the federation of this key of TRAINING. Methods
    outside take the models of the plain one."""
    found = []
    for method in methods:
        needed = INSIDE[method].training if method in INSIDE else "plain"
        if needed == training:
            found.append(method)
    return found


# ---------------------------------------------------------------- methods for a hospital outside
class Outcome(NamedTuple):
    probabilities: Tensor  # (N, C, H, W)
    routed: router.RoutedNetwork | None = None


# Each takes the models (the global one last), the hospital's images as a `data.Split`, a seed, and
# how far the hospitals inside lie from the global model, a list. `float()`, since slices of volumes
# are kept in float16.
def global_model(models, split, *_):
    return Outcome(probabilities_of(models[-1], split.images))


def ensemble(models, split, *_):
    """The mean of all models' probabilities."""
    total = sum(probabilities_of(model, split.images) for model in models)
    return Outcome(total / len(models))


def average(models, split, *_):
    """One model with the mean of all models' weights."""
    states = [iopfl.snapshot(model) for model in models]
    mean = iopfl.aggregate(states, weights=[1] * len(states))
    model = iopfl.with_state(models[0], mean)
    return Outcome(probabilities_of(model, split.images))


def best_inside(models, split, *_):
    """The personalised model whose BatchNorm statistics fit the images best."""
    images = split.images.float()
    distances = [router.divergence(model, images) for model in models[:-1]]
    best = torch.stack(distances).argmin()
    return Outcome(probabilities_of(models[best], images))


def bn(models, split, seed, *_):
    """The global model with the BatchNorm statistics of the hospital's images. With one expert
    nothing is routed, and without passes nothing is tuned."""
    images = split.images.float()
    settings = router.RoutingSettings(passes=0)
    routed = router.build_routed(models[-1:], settings, new_generator(seed))
    router.fit_to_site(routed, models[-1:], images, share=1.0)
    return adapted(routed, images, seed)


def tent(models, split, seed, *_):
    """Wang et al. 2021. Again nothing is routed: what moves is BatchNorm's affine."""
    settings = router.RoutingSettings(
        batch_statistics=True, entropy=1.0, consistency=0.0, shape=0.0,
        lr=1e-3, passes=1, leash=None)
    routed = router.build_routed(models[-1:], settings, new_generator(seed))
    return adapted(routed, split.images.float(), seed)


def routing_published(models, split, seed, *_):
    """Routing with the settings of the published code, from a random start (M4 to M8)."""
    routed = router.build_routed(models, router.PUBLISHED, new_generator(seed))
    return adapted(routed, split.images.float(), seed)


def routing_ours(models, split, seed, inside):
    """Routing that starts where the models fit the images, then a few small steps on a leash."""
    images = split.images.float()
    routed = router.build_routed(models, router.RoutingSettings(), new_generator(seed))
    router.fit_to_site(routed, models, images, inside=inside)
    return adapted(routed, images, seed)


def oracle(models, split, seed, *_):
    """The ceiling: the global model, trained for ten more epochs on the labels of one half of the
    cases, predicts the other half; and the other way round."""
    generator = new_generator(seed)
    half = half_of_cases(split, generator)
    probabilities = probabilities_of(models[-1], split.images)
    for tested in (half, ~half):
        model = copy.deepcopy(models[-1])
        images, masks = split.images[~tested], split.masks[~tested]
        iopfl.train_local(model, images, masks, epochs=10, generator=generator)
        probabilities[tested] = probabilities_of(model.eval(), split.images[tested])
    return Outcome(probabilities)


def half_of_cases(split: data.Split, generator: torch.Generator) -> Tensor:
    """Which images belong to one half of the cases, drawn at random: (N,) bool."""
    cases = list(dict.fromkeys(split.cases))
    order = torch.randperm(len(cases), generator=generator)
    first_half = [cases[i] for i in order[:len(cases) // 2]]
    return torch.tensor([case in first_half for case in split.cases])


OUTSIDE = {
    "global": global_model,
    "ensemble": ensemble,
    "average": average,
    "best-inside": best_inside,
    "bn": bn,
    "tent": tent,
    "routing-published": routing_published,
    "routing-ours": routing_ours,
    "oracle": oracle,
}
CEILINGS = ("centralised", "oracle")  # know what no method may know


@torch.no_grad()
def probabilities_of(model: nn.Module, images: Tensor) -> Tensor:
    """Probabilities (N, C, H, W) of images (N, C_in, H, W), by a model in evaluation mode."""
    probabilities = []
    for batch in images.split(32):
        logits = model(batch.float())
        probabilities.append(logits.float().softmax(dim=1))
    return torch.cat(probabilities)


def adapted(routed: router.RoutedNetwork, images: Tensor, seed: int) -> Outcome:
    """Tune a routed network on the images (M6 to M8), then predict them."""
    generator = new_generator(seed, images.device)
    probabilities = router.adapt(routed, images, generator=generator)
    return Outcome(probabilities, routed)


@torch.no_grad()
def routing_of(routed: router.RoutedNetwork, images: Tensor) -> dict[str, Tensor]:
    """The routing weights (N, M) of each layer for images (N, C, H, W)."""
    weights = {}
    for batch in router.in_batches(images, routed.settings.batch_size):
        routed(batch.float())
        for layer, of_batch in routed.routing.items():
            weights.setdefault(layer, []).append(of_batch.cpu())
    return {layer: torch.cat(parts) for layer, parts in weights.items()}


def mean_routing(routing: dict[str, Tensor]) -> dict[str, list[float]]:
    """The routing weights (M,) of each layer, mean over the images."""
    return {layer: weights.mean(dim=0).tolist() for layer, weights in routing.items()}


def routing_spread(routing: dict[str, Tensor]) -> dict[str, float]:
    """How much routing weights vary, as standard deviations.

    over_images: of each layer and model, then their mean. over_layers: of the means over images, of
    each model, then their mean.
    """
    weights = torch.stack(list(routing.values()))  # (layers, N, M)
    over_images = weights.std(dim=1, correction=0).mean()
    over_layers = weights.mean(dim=1).std(dim=0, correction=0).mean()
    return {"over_images": over_images.item(), "over_layers": over_layers.item()}


def routing_in_words(routing: dict[str, Tensor], experts: list[str]) -> str:
    """What routing chose, mean over layers and images, and how much it varies."""
    chosen = torch.stack(list(routing.values())).mean(dim=(0, 1)).tolist()
    shares = [f"{name} {weight:.2f}" for name, weight in zip(experts, chosen)]
    over_images, over_layers = routing_spread(routing).values()
    return (f"routing weights: {', '.join(shares)}; over images ±{over_images:.1g}, "
            f"over layers ±{over_layers:.1g}")


# ---------------------------------------------------------------- what the story needs
def new_generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def new_model(args, dataset: data.DataSet, seed: int) -> UNet:
    generator = new_generator(seed)  # of the initial weights
    model = UNet(dataset.channels, dataset.classes, args.width, args.depth, generator)
    return model.to(args.device, memory_format=torch.channels_last)


def autocast(device: str, precision: str) -> torch.autocast:
    """Around training and adapting: convolutions in bfloat16, if asked for."""
    in_bf16 = precision == "bf16"
    # The cache would hold on to the weights of the first step.
    return torch.autocast(device, torch.bfloat16, enabled=in_bf16, cache_enabled=False)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around a program: each error that a user can bring about ends it in one line on stderr."""
    prepare_output()
    try:
        yield
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except FloatingPointError as error:  # training has diverged
        stop(str(error), 1)
    except BrokenPipeError:  # whoever read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a folder without rights, say
        if error.filename is None:
            raise
        stop(f"{error.filename}: {error.strerror}", 1)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Around the training of a run: Ctrl-C says how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        stop(f"interrupted; --resume {folder} goes on after the last whole round", 130)


def prepare_output() -> None:
    """A warning is one line; output appears at once, also of file names that are no text."""
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # in a notebook it has not
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.showwarning = show_warning


def prepare_torch(args) -> None:
    """The same bits for the same number of threads; and no large block of memory given back."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in a GPU's convolutions too
    keep_memory()


def keep_memory() -> None:
    """Tell glibc to keep what is freed instead of returning it to the system.

    Each page that comes anew from the system is a fault: keeping them saves a tenth of training,
    and a third of adapting to large images. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # large blocks are not mapped apart
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # nothing is returned


def simulated(args: argparse.Namespace, seed: int) -> data.DataSet:
    """The hospitals of --task, the source of train.py's own images."""
    if args.task not in data.TASKS:
        stop(f"task {args.task} is not in data.TASKS; add it before you go on with the run", 1)
    return data.simulate_sites(args.task, seed, args.size, args.images_per_site)


def hospitals_to_hold_out(choice: str | None, dataset: data.DataSet) -> list[str | None]:
    """The hospitals that are outside in turn; [None]: a federation of all."""
    names = [site.name for site in dataset.sites]
    if choice == "none":
        return [None]
    if len(names) < 2:
        stop(f"--hold-out: {names[0]} is the only hospital; use --hold-out none", 2)
    if choice == "all":
        return names
    if choice is None:
        return names[-1:]
    if choice not in names:
        stop(f"--hold-out {choice}: choose all, none or one of {', '.join(names)}", 2)
    return [choice]


def print_round(last: iopfl.Round, rounds: int, seconds: float) -> None:
    """The losses of a round that took so many seconds, and the time that the others will take."""
    losses = [f"{name} {loss:.3f}" for name, loss in last.losses.items()]
    shown = "  ".join(losses[:MOST_SHOWN])
    left = seconds * (rounds - last.number)
    print(f"round {last.number:3}/{rounds}  Dice loss  {shown}  {left:4.0f} s left")


def tell_absent(federation: Federation, progress: Progress) -> None:
    """Name the hospitals that no round has drawn, which --participation can bring about."""
    absent = [site.name for site in federation.inside if site.name not in progress.fine_tuned]
    if absent and federation.training != "centralised":
        print(f"never took part, scored with the global model: {', '.join(absent)}")


def stop(message: str, status: int) -> NoReturn:
    """End with one line on stderr."""
    show_warning(message)
    sys.exit(status)


def show_warning(message, *details) -> None:
    """One line on stderr, without the place in the code that Python would add."""
    text = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


# ---------------------------------------------------------------- scores and tables
MOST_SHOWN = 12  # hospitals in tables, pictures and lines


def score(dataset, site, split, prediction, phase: str, method: str) -> list[dict]:
    """Rows of results.json for a prediction (N, H, W) of a split, one a structure (M9)."""
    rows = iopfl.evaluate(
        prediction, split.masks, split.cases, dataset.structures, site.spacing,
        distances=phase != "validation")
    labels = {"phase": phase, "method": method, "site": site.name}
    return [labels | row for row in rows]


def score_inside(federation: Federation, model, progress, method: str, phase: str) -> list[dict]:
    """Rows of each hospital's model: phase "inside" on its test images, or "validation"."""
    rows = []
    for site in federation.inside:
        split = site.test if phase == "inside" else site.validation
        serving = iopfl.with_state(model, INSIDE[method].state(progress, site.name))
        prediction = iopfl.predict(serving, split.images.to(federation.args.device))
        rows += score(federation.dataset, site, split, prediction, phase, method)
    return rows


def scores_of_round(federation: Federation, model, progress: Progress) -> dict:
    """The losses of the last round and, of every fifth, the mean validation Dice of methods."""
    last = progress.last
    entry = {"round": last.number, "losses": last.losses}
    if last.number % 5 == 0:
        methods = methods_of(federation.training, list(INSIDE))
        if federation.training == "plain":  # of many methods two are enough
            methods = ["fedavg", "iopfl"]
        entry["validation"] = {}
        for method in methods:
            rows = score_inside(federation, model, progress, method, "validation")
            mean = np.mean([row["dice"] for row in rows])
            entry["validation"][method] = float(mean)
    return entry


def report(args, unit: str, results: list[dict], folder: Path) -> None:
    """Print the tables and write results.json, the last file of a run."""
    rows, history, seconds = [], [], 0
    for result in results:
        rows += result["rows"]
        about = {key: result[key] for key in ("seed", "hold_out", "methods")}
        history.append(about | {"rounds": result["history"]})
        seconds += result["seconds"]
    inside = [row for row in rows if row["phase"] == "inside"]
    if inside:
        print("\nInside, test images: Dice in %, * best that is no ceiling")
        print(table(inside, unit))
    outside = [row for row in rows if row["phase"] == "outside"]
    if outside:
        print("\nOutside, all images of the hospital held out: Dice in %")
        print(table(outside, unit))
    peak = peak_memory_mib(args.device)
    memory = "" if peak is None else f", at most {peak} MiB"
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": args.device,
        "threads": args.threads,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "peak_memory_mib": peak,
    }
    content = {"config": load_config(folder), "machine": machine, "seconds": seconds}
    save(folder / "results.json", content | {"history": history, "rows": rows})
    print(f"\n{seconds:.0f} s{memory}. Models, pictures and results.json: {folder}")


def peak_memory_mib(device: str) -> int | None:
    """The most memory so far: the GPU's, or that of the process; None where that is not told."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    if os.name != "posix":
        return None
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return peak // unit


def table(rows: list[dict], unit: str) -> str:
    """A line for each structure and method: Dice by hospital, its mean, and mean distances."""
    with_distance = sum(row["distance_cases"] for row in rows)
    pairs = sum(row["cases"] for row in rows)
    if len(distinct(rows, "structure")) > 1:
        rows = rows + [row | {"structure": "mean"} for row in rows]
    sites = sorted(distinct(rows, "site"))
    columns = []  # title, key of a row, hospitals
    if len(sites) <= MOST_SHOWN:
        columns = [(site, "dice", [site]) for site in sites]
    if len(sites) > 1:
        columns.append(("mean", "dice", sites))
    columns.append((f"HD95 {unit}", "hd95", sites))
    columns.append((f"ASSD {unit}", "assd", sites))
    widths = [max(12, len(title) + 2) for title, _, _ in columns]
    titles = [f"{title:>{width}}" for (title, _, _), width in zip(columns, widths)]
    lines = [" " * 33 + "".join(titles)]
    for structure in distinct(rows, "structure"):
        of_structure = [row for row in rows if row["structure"] == structure]
        cells = [column_cells(of_structure, key, in_column) for _, key, in_column in columns]
        for method in distinct(rows, "method"):
            name = f"{method} (ceiling)" if method in CEILINGS else method
            line = f"{structure:10.10} {name:22}"
            for of_column, width in zip(cells, widths):
                line += f"{of_column.get(method, '-'):>{width}}"
            lines.append(line)
    lines.append(f"HD95 and ASSD count {with_distance} of {pairs} pairs of truth and prediction; "
                 "in the others both are empty")
    return "\n".join(lines)


def column_cells(rows: list[dict], key: str, sites: list[str]) -> dict[str, str]:
    """By method: mean ± sample standard deviation over the seeds, a star at the best."""
    values = {}  # by method, then by seed
    for row in rows:
        if row["site"] in sites and row[key] is not None:
            of_method = values.setdefault(row["method"], {})
            of_method.setdefault(row["seed"], []).append(row[key])
    by_seed = {}  # by method: the mean of each seed
    for method, of_method in values.items():
        by_seed[method] = [np.mean(of_seed) for of_seed in of_method.values()]
    means = {method: np.mean(of_seeds) for method, of_seeds in by_seed.items()}
    rivals = [mean for method, mean in means.items() if method not in CEILINGS]
    if key == "dice":
        best, scale, digits = max(rivals, default=None), 100, 1  # in %
    else:
        best, scale, digits = min(rivals, default=None), 1, 2
    cells = {}
    for method, of_seeds in by_seed.items():
        cell = f"{scale * means[method]:.{digits}f}"
        if len(of_seeds) > 1:
            cell += f"±{scale * np.std(of_seeds, ddof=1):.{digits}f}"
        is_best = means[method] == best and method not in CEILINGS
        cells[method] = cell + ("*" if is_best else " ")
    return cells


def distinct(rows: list[dict], key: str) -> list:
    """The different values of a key, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


# ---------------------------------------------------------------- saving and resuming
VERSION = 4  # of the files in the folder of a run


def open_run(args, dataset: data.DataSet) -> Path:
    """The folder of the run, with config.json; of one that goes on the images must be the same."""
    facts = dict(vars(dataset))
    del facts["sites"]
    facts["classes"] = dataset.classes
    facts["fingerprint"] = dataset.fingerprint()
    settings = dict(vars(args))
    del settings["resume"]
    config = {"version": VERSION, "settings": settings, "data": facts}
    if args.resume:
        folder = Path(args.resume)
        check_images(folder, facts["fingerprint"])
        save(folder / "config.json", config)
    else:
        folder = claim_folder(args.out, dataset.name, config)
    labels = labels_of(dataset)
    draw_hospitals(dataset.sites[:MOST_SHOWN], labels, folder / "hospitals.png")
    device = args.device
    if device == "cuda":
        device = torch.cuda.get_device_name()
    print(f"{len(dataset.sites)} hospitals, {dataset.kind}; on {device}; into {folder}")
    for name, label in labels.items():
        if label.startswith(NUMBERED) and label != name:
            print(f"in pictures '{label}' is {name}")
    return folder


def claim_folder(out: str | None, name: str, config: dict) -> Path:
    """`out`, or the first of runs/<name>, runs/<name>-2, … that nobody has; with config.json.

    Of two runs that begin at once only one can create a folder, or this file in an empty one.
    """
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_folder(name)
    file = folder / "config.json"
    try:
        file.open("x").close()
    except FileExistsError:
        stop(f"{folder}: another run has begun there; name another folder", 1)
    save(file, config)
    return folder


def new_folder(name: str) -> Path:
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def check_images(folder: Path, fingerprint: str) -> None:
    """Stop unless this is the fingerprint of a run's images, read with its first seed."""
    if load_config(folder)["data"]["fingerprint"] != fingerprint:
        stop(f"{folder}: the images, their names, splits or voxel sizes are not those the run "
             "began with; start a new run", 1)


def load_config(folder: Path) -> dict:
    """The content of a run's config.json: "settings" and, of the images, "data"."""
    config = load(folder / "config.json", "settings", "data")
    check_version(config, folder)
    return config


def check_version(config: dict, folder: Path) -> None:
    """Stop if a run's files are not as this version of train.py writes them."""
    if config.get("version") != VERSION:
        stop(f"{folder}: the run is of another version of train.py; train anew", 1)


def rounds_done(folder: Path) -> int:
    """The rounds of the federation of a run that has gone farthest."""
    files = folder.glob("seed*/last.pt")
    return max((load_progress(file).last.number for file in files), default=0)


def load_result(file: Path, rounds: int) -> dict:
    """rows.json of a federation, if it is of so many rounds; else a result that is still empty."""
    if file.exists():
        result = load(file, "seed", "hold_out", "rounds", "methods", "rows", "distances_inside",
                      "routing", "routing_spread", "history", "seconds")
        if result["rounds"] == rounds:
            return result
    return {"rounds": rounds, "methods": [], "rows": [], "distances_inside": {}, "routing": {},
            "routing_spread": {}, "history": [], "seconds": 0}


def load_progress(file: Path) -> Progress:
    """The last whole round of a federation that was interrupted, or the beginning."""
    if not file.exists():
        return Progress()
    saved = load(file, "last", "personal", "fine_tuned", "history")
    saved["last"] = iopfl.Round(**saved["last"])
    return Progress(**saved)


def save_progress(file: Path, progress: Progress) -> None:
    save(file, vars(progress) | {"last": vars(progress.last)})


def save(file: Path, content: dict) -> None:
    """Write a .pt or .json file."""
    buffer = io.BytesIO()
    if file.suffix == ".pt":
        torch.save(content, buffer)
    else:
        buffer.write(json.dumps(content, indent=1).encode())
    write_whole(file, buffer)


def write_whole(file: Path, buffer: io.BytesIO) -> None:
    """Write a file: whatever happens, it is whole, or what it was before."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:  # the disk is full, say
        if partial.is_file():
            partial.unlink()
        stop(f"{file}: cannot be written ({error.strerror})", 1)


def load(file: Path, *keys: str) -> dict:
    """What `save` wrote, with these keys; nothing in the file is executed."""
    try:
        if not file.is_file():  # a pipe would be waited for
            stop(f"{file}: there is no such file; name the folder of a run", 1)
        content = file.read_bytes()
    except OSError as error:
        stop(f"{file}: cannot be read ({error.strerror})", 1)
    try:
        if file.suffix == ".pt":
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        else:
            found = json.loads(content)
        missing = [key for key in keys if key not in found]
    except Exception as error:  # of many kinds: the archive, its index or a tensor may be wrong
        missing = [type(error).__name__]
    if missing:
        stop(f"{file}: damaged or not of train.py ({missing[0]}); delete it to compute it again, "
             "or start a new run", 1)
    return found


# ---------------------------------------------------------------- pictures
GREEN = (60, 220, 60)
ORANGE = (255, 150, 0)
BLUE = (60, 150, 255)
SMOOTH = Image.Resampling.BICUBIC
FONT = ImageFont.load_default(13)
# Red, green and blue of 256 classes in turn: all different, the background black.
PALETTE = (np.outer(np.arange(256), (37, 101, 173)) % 256).flatten().tolist()


NUMBERED = "hospital "


def labels_of(dataset: data.DataSet) -> dict[str, str]:
    """By hospital what pictures call it: its name without accents; or a number, where the name has
    other letters than Latin, which their font does not have, or another hospital is called so."""
    labels = {}
    for number, site in enumerate(dataset.sites, start=1):
        letters = unicodedata.normalize("NFKD", site.name)
        plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
        if not plain.isascii() or plain in labels.values():
            plain = f"{NUMBERED}{number}"
        labels[site.name] = plain
    return labels


def draw_hospitals(sites: list[data.Site], labels: dict[str, str], file: Path) -> None:
    """Six training images of each hospital, the last two with their masks."""
    rows = []
    for site in sites:
        split = site.train
        holds_something = split.masks.flatten(1).any(dim=1)  # (N,)
        numbers = holds_something.nonzero().flatten().tolist()
        if not numbers:
            numbers = list(range(len(split.masks)))
        shown = evenly_chosen(numbers, 6)
        cells = []
        for number in shown:
            truth = (split.masks[number], GREEN)
            outlines = [truth] if number in shown[-2:] else []
            cells.append(picture(split.shown(number), outlines))
        rows.append(cells)
    draw_grid(rows, [labels[site.name] for site in sites], titles=[], file=file)


def draw_outside(split: data.Split, before: Tensor, after: Tensor, file: Path) -> None:
    """Six images from the greatest loss to the greatest gain: truth, global and routed model.

    before, after: masks (N, H, W) by the global and by the routed model. Dice is that of the
    whole foreground.
    """
    gains = []
    for number, mask in enumerate(split.masks):
        score_before = dice_of_foreground(before[number], mask)
        score_after = dice_of_foreground(after[number], mask)
        gains.append((score_after - score_before, number, score_before, score_after))
    rows, labels = [], []
    gains.sort()
    for _, number, score_before, score_after in evenly_chosen(gains, 6):
        image = split.shown(number)
        truth = (split.masks[number], GREEN)
        by_global = (before[number], ORANGE)
        by_routing = (after[number], BLUE)
        row = [
            picture(image),
            picture(image, [truth]),
            picture(image, [truth, by_global]),
            picture(image, [truth, by_routing]),
        ]
        rows.append(row)
        labels.append(f"Dice {100 * score_before:.0f} to {100 * score_after:.0f}")
    titles = ["image", "truth (green)", "global (orange)", "routed (blue)"]
    draw_grid(rows, labels, titles, file)


def dice_of_foreground(prediction: Tensor, truth: Tensor) -> float:
    predicted = (prediction > 0).numpy()
    true = (truth > 0).numpy()
    return iopfl.dice(predicted, true)


def draw_heat_map(weights: dict[str, list], columns: list[str], file: Path) -> None:
    """A row for each layer, a column for each model; from white (0) to blue (the largest)."""
    largest = max(max(row) for row in weights.values())
    rows = []
    for row in weights.values():
        cells = []
        for weight in row:
            red = 255 - int(200 * weight / largest)
            green = 255 - int(130 * weight / largest)
            cell = Image.new("RGB", (72, 18), (red, green, 255))
            draw = ImageDraw.Draw(cell)
            draw.text((22, 3), f"{weight:.2f}", fill="black")
            cells.append(cell)
        rows.append(cells)
    titles = [name[:11] for name in columns]
    draw_grid(rows, list(weights), titles, file)


def draw_curves(history: list[dict], labels: dict[str, str], file: Path) -> None:
    """Over the rounds the mean validation Dice of methods, and the losses of local training of as
    many hospitals as there is room for."""
    dice, losses = {}, {}  # by name: points (round, value in [0, 1])
    for entry in history:
        for method, mean in entry.get("validation", {}).items():
            dice.setdefault(f"Dice {method}", []).append((entry["round"], mean))
        for name, loss in entry["losses"].items():
            label = f"loss {labels.get(name, name)}"
            losses.setdefault(label, []).append((entry["round"], loss))
    left, right, bottom, height = 40, 500, 330, 310
    sheet = Image.new("RGB", (680, 360), "white")
    draw = ImageDraw.Draw(sheet)
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - height * value
        draw.line([(left, y), (right, y)], "lightgrey")
        draw.text((6, y - 8), f"{value:.2f}", "black", FONT)
    rounds = history[-1]["round"]
    draw.text((left, bottom + 8), f"round 0 to {rounds}", "black", FONT)
    for place, (name, points) in enumerate([*dice.items(), *losses.items()][:18]):
        colour = tuple(PALETTE[3 * place + 3:3 * place + 6])
        corners = []
        for number, value in points:
            x = left + (right - left) * number / rounds
            y = bottom - height * value
            corners.append((x, y))
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)  # a line needs two points
        draw.line(corners, colour, width=2)
        draw.text((right + 12, 10 + 18 * place), name[:20], colour, FONT)
    save_image(sheet, file)


def picture(image, outlines=(), size: tuple = (160, 160)) -> Image.Image:
    """An image (C, H, W) as RGB of a size (width, height), with outlines of masks.

    outlines: pairs of a mask (H, W) of class indices and a colour; the last lies on top.
    """
    values = np.asarray(image, dtype=np.float32)
    low, high = np.quantile(values, [0.005, 0.995])
    values = (values - low) / max(high - low, 1e-6)
    values = 255 * values.clip(0, 1)
    if len(values) == 1:  # grey
        values = values.repeat(3, axis=0)
    pixels = values.transpose(1, 2, 0)  # (H, W, 3)
    result = Image.fromarray(pixels.astype(np.uint8))
    result = result.resize(size, SMOOTH)
    for mask, colour in outlines:
        mask = np.asarray(mask)
        for level in range(1, mask.max() + 1):  # the cup lies in the disc
            result.paste(colour, mask=outline(mask >= level, size))
    return result


def outline(mask: np.ndarray, size: tuple) -> Image.Image:
    """The outline of a boolean mask (H, W) as an image of a size (width, height)."""
    large = Image.fromarray(255 * mask.astype(np.uint8))
    large = large.resize(size, SMOOTH)
    # Cut at one half, a smooth enlargement is rounder than the mask's own pixels.
    region = np.asarray(large) > 127
    eroded = Image.fromarray(region).convert("L")
    eroded = eroded.filter(ImageFilter.MinFilter(3))
    interior = np.asarray(eroded) > 0
    return Image.fromarray(region & ~interior)


def draw_grid(rows: list[list], labels: list[str], titles: list[str], file: Path) -> None:
    """Rows of pictures of one size, a label at the left of each, titles above the columns."""
    width = rows[0][0].width + 4
    height = rows[0][0].height + 4
    left = 150 if any(labels) else 0
    top = 24 if titles else 0
    columns = max(len(row) for row in rows)
    total_width = left + columns * width
    total_height = top + len(rows) * height
    sheet = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = left + column * width
        draw.text((x, 4), title, "black", FONT)
    for number, row in enumerate(rows):
        y = top + number * height
        middle = y + height // 2 - 10
        draw.text((6, middle), labels[number][:22], "black", FONT)
        for column, cell in enumerate(row):
            x = left + column * width
            sheet.paste(cell, (x, y))
    save_image(sheet, file)


def save_image(image: Image.Image, file: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, file.suffix[1:])
    write_whole(file, buffer)


def evenly_chosen(values: list, count: int) -> list:
    """`count` of the values, from the first to the last."""
    count = min(count, len(values))
    last = len(values) - 1
    places = np.linspace(0, last, count).round()
    return [values[int(place)] for place in places]


# ---------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=as_written, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses an empty word: "$FOLDER" is one where that variable is not set."""
        words = sys.argv[1:] if args is None else args
        if "" in words:
            self.error("one of the words is empty")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        stop(f"{message}; --help shows all options", 2)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    for word in sys.argv[1:] if argv is None else argv:
        if str(word).split("=")[0] in ("--root", "--mask-values", "--list"):
            parser.error(f"{word}: own images are read by python -m examples.own_images DIR")
    images = parser.add_argument_group("images")
    add = images.add_argument
    add("--task", choices=data.TASKS, default="prostate", help="what is simulated (prostate)")
    add("--images-per-site", type=int, default=60, help="simulated; six of ten train (60)")
    args = parse_training(parser, argv, images)
    if args.images_per_site < 4:
        parser.error("--images-per-site must be at least 4: two train, one validates, one tests")
    return args


def parse_training(parser: Parser, argv: list[str] | None, images,
                   may_change: tuple = ()) -> argparse.Namespace:
    """All options of a training, whatever its images.

    parser: with the options of the source of the images. images: its group for them.
    may_change: those of them that may stand beside --resume.
    """
    add = images.add_argument
    add("--size", type=int, default=96, help="height and width of an image (96)")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--methods", nargs="+", help=f"all-inside, all-outside, {', '.join([*INSIDE, *OUTSIDE])}")
    add("--hold-out", help="the hospital outside: a name, all (in turn) or none; else the last")
    add("--seeds", type=int, nargs="+", help="all is done once for each of them (0)")
    add("--rounds", type=int, help="federated rounds (30)")
    add("--participation", type=float, default=1.0, help="share of the hospitals in a round (1)")
    add("--local-epochs", type=int, default=1, help="epochs of local training in a round (1)")
    add("--batch-size", type=int, default=5, help="images in a step of training (5)")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam (0.001)")
    add("--alpha", type=float, help="what a personalised model keeps of itself, M2 (0.7)")
    add("--width", type=int, default=16, help="channels of the U-Net's top level (16)")
    add("--depth", type=int, default=3, help="levels of the U-Net below the top (3)")
    add("--published", action="store_true", help="100 rounds, alpha 0.1, published routing alone")
    machine = parser.add_argument_group("machine and files")
    add = machine.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a GPU if there is one")
    add("--precision", choices=["fp32", "bf16"], default="fp32",
        help="of convolutions (fp32); a CPU without AVX-512 is slow in bf16")
    add("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    add("--out", help="a new or empty folder (runs/<name>, runs/<name>-2 …)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its settings; "
        f"beside it only {as_options(MAY_CHANGE)}")
    args = parser.parse_args(argv)
    # argparse sets no default where a value is there already, be it None: what is not None after a
    # second pass was given.
    nothing = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = vars(parser.parse_args(argv, nothing))
    given = {name: value for name, value in given.items() if value is not None}
    if args.resume:
        args = settings_of_run(args, given, (*MAY_CHANGE, *may_change), parser)
    fill_in_defaults(args)
    check(args, parser)
    return args


MAY_CHANGE = ("rounds", "seeds", "methods", "device")  # when a run goes on


def settings_of_run(args, given: dict, may_change: tuple, parser: Parser) -> argparse.Namespace:
    """The settings of the run in --resume, with the options that are given beside it."""
    folder = Path(args.resume).expanduser()
    saved = load_config(folder)["settings"]
    own_images = "root" in saved
    if own_images != hasattr(args, "root"):
        images = "files" if own_images else "simulated"
        stop(f"the run's images are {images}: {program_of(saved)} --resume {folder}", 2)
    refused = given.keys() - {"resume", *may_change}
    if refused:
        parser.error(f"beside --resume only {as_options(MAY_CHANGE)} may be given, "
                     f"not {as_options(sorted(refused))}")
    if "rounds" in given:
        done = rounds_done(folder)
        if given["rounds"] < done:
            parser.error(f"--rounds: {done} rounds are done already")
    if "ditto" in named_methods(given.get("methods", [])) and "ditto" not in saved["methods"]:
        parser.error("--methods: ditto has models from the first round on; start a new run")
    for name in ("seeds", "methods"):
        given[name] = saved[name] + given.get(name, [])
    settings = saved | given | {"resume": str(folder)}
    return argparse.Namespace(**settings)


def program_of(settings: dict) -> str:
    """The program that goes on with a run of these settings."""
    return "python -m examples.own_images" if "root" in settings else "python train.py"


def as_options(names) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def fill_in_defaults(args) -> None:
    """Defaults that depend on other options, and what is short for something longer."""
    if args.rounds is None:
        args.rounds = 100 if args.published else 30
    if args.alpha is None:
        args.alpha = 0.1 if args.published else 0.7
    args.alpha += 0.0  # makes 0.0 of -0.0
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.out:
        args.out = str(Path(args.out).expanduser().resolve())
    if args.methods is None:
        args.methods = ["fedavg", "iopfl"]
        if args.hold_out != "none":
            args.methods += ["global", "average", "routing-published"]
            if not args.published:
                args.methods.append("routing-ours")
    args.methods = named_methods(args.methods)
    args.seeds = list(dict.fromkeys(args.seeds or [0]))


def named_methods(words: list[str]) -> list[str]:
    """Each method once, and all of a group in the place of its word."""
    names = []
    for word in words:
        if word == "all-inside":
            names += INSIDE
        elif word == "all-outside":
            names += OUTSIDE
        else:
            names.append(word)
    return list(dict.fromkeys(names))


MOST_THREADS = 1024  # far above what helps, and below what a system cannot start


def check(args, parser: Parser) -> None:
    """One line and exit status 2 where an option makes no sense."""
    for fault in faults(args):
        parser.error(fault)
    if args.out and not args.resume:
        check_out(Path(args.out), None, parser)


def faults(args) -> Iterator[str]:
    """What is wrong with the options; a later fault may follow from an earlier one."""
    for name in ("size", "rounds", "local_epochs", "batch_size", "width", "depth", "threads"):
        if getattr(args, name) < 1:
            yield f"{as_options([name])} must be at least 1"
    if args.depth > 13 or args.width * 2**args.depth > 2**13:
        yield f"--width and --depth: more than {2**13} channels at the lowest level"
    if args.size <= 2**args.depth:
        yield (f"--size must be above {2**args.depth} pixels, which --depth {args.depth} pools "
               "into one")
    if args.threads > MOST_THREADS:
        yield f"--threads must be at most {MOST_THREADS}"
    if not args.lr > 0:
        yield "--lr must be above 0"
    if not 0 < args.participation <= 1:
        yield "--participation must be above 0 and at most 1"
    if not 0 <= args.alpha <= 1:
        yield "--alpha must lie between 0 and 1"
    if min(args.seeds) < 0 or max(args.seeds) >= 2**32:
        yield "--seeds must lie between 0 and 2^32 - 1"
    if args.device == "cuda" and not torch.cuda.is_available():
        yield "--device cuda: no GPU was found"
    for method in args.methods:
        if method not in INSIDE and method not in OUTSIDE:
            yield f"--methods: {method} is unknown"
        if method in OUTSIDE and args.hold_out == "none":
            yield f"--methods: {method} needs a hospital outside"


def check_out(out: Path, images: str | None, parser: Parser) -> None:
    """An --out must be new or empty, and not among the images."""
    if images and out.is_relative_to(images):
        parser.error(f"--out {out} lies among the images")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        is_run = (out / "config.json").exists()
        or_go_on = f", or go on with the run in it: --resume {out}" if is_run else ""
        parser.error(f"--out {out}: not empty; name another folder{or_go_on}")


if __name__ == "__main__":
    main()
