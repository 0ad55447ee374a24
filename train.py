"""IOP-FL from start to finish: federated rounds, personalised models, routing outside, a report.

    python train.py                               simulated prostate MRI, the last hospital held out
    python train.py --task fundus                 simulated fundus photographs
    python train.py --root DIR --list             a look at folders of real images
    python train.py --root DIR --hold-out SITE    then train
    python train.py --hold-out none --methods all    every hospital inside, against other methods
    python train.py --hold-out all --methods all     each hospital outside in turn, likewise
    python train.py --adapt RUN --images DIR      masks for images without labels, by a trained run
    torchrun --nproc-per-node 4 train.py          the same, the work shared by four processes

A run that was interrupted goes on after its last whole round when the same command is given again
with --resume. Exit status: 0 all went well, 1 a fault of files, data or machine, 2 wrong use; the
environment variable IOPFL_TRACEBACK=1 shows where an error arose.
"""

import argparse
import copy
import csv
import ctypes
import json
import math
import os
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import iopfl
import router
from iopfl import METHODS, Method, gather, my_share, with_state
from models import UNet
from router import AUTHORS, RoutingSettings


# ---------------------------------------------------------------- the story
def train(args: argparse.Namespace, out: Path) -> int:
    """Every federation that was asked for, then the report; what is finished is not done again."""
    begin, dataset = time.perf_counter(), load_dataset(args, args.seeds[0])
    chosen = hold_outs(args.hold_out, [site.name for site in dataset.sites])
    inside, outside = chosen_methods(args, chosen[0])
    federations = [(seed, hold_out, name) for seed in args.seeds for hold_out in chosen
                   for name in inside]
    folders = [out / f"seed{seed}-{hold_out or 'all-inside'}-{name}"
               for seed, hold_out, name in federations]
    for count in (len(site.train.images) for site in dataset.sites):
        if args.size <= 2**args.depth and count // -(-count // args.batch_size) == 1:
            raise WrongUse("BatchNorm has nothing to measure in a batch of one image whose lowest level "
                           "is one pixel; use a smaller --depth or another --batch-size")
    if not open_run_folder(args, out, dataset, chosen, inside, outside, folders):
        return 0
    say(f"{describe(dataset)}; {len(federations)} federations")
    found, loaded = [], args.seeds[0]
    for (seed, hold_out, name), folder in zip(federations, folders):
        if seed != loaded:
            dataset, loaded = load_dataset(args, seed), seed
        say(f"\nseed {seed}, outside: {hold_out or 'none'}, {name}")
        found.append(federation(args, dataset, seed, hold_out, name, inside[name], outside, folder))
    if first():
        report(args, out, dataset, found, time.perf_counter() - begin)
    return 0


def federation(args, dataset: data.DataSet, seed: int, hold_out: str | None, name: str,
               method: Method, outside: dict, folder: Path) -> dict:
    """One federation of all hospitals but one (M1, M2), then routing for that one (M4 to M8).

    Returns rows of results.json and mean routing weights; `folder` holds them and the models."""
    if (folder / "rows.json").exists():
        return load(folder / "rows.json")
    begin, device = time.perf_counter(), args.device
    inside = [site for site in dataset.sites if site.name != hold_out]
    clients = {site.name: site.train.to(device) for site in inside}
    if name == "centralised":  # what no federation may do: one client has all images
        clients = {"all": data.joined([site.train for site in inside]).to(device)}
    model = UNet(dataset.channels, dataset.classes, args.width, args.depth, seeded(seed))
    model = model.to(device, memory_format=torch.channels_last)
    score = partial(score_rows, dataset, seed, hold_out)
    last = load_round(folder / "last.pt")  # None at the beginning

    # Inside. A round: local training, the average, and each hospital's own model.
    rounds = iopfl.federate(model, clients, args.rounds, method, seed=seed, lr=args.lr, after=last,
                            epochs=args.local_epochs, batch_size=args.batch_size,
                            participation=args.participation)
    done = last.number if last else 0
    for last in rounds:
        save(folder / "last.pt", vars(last))
        left = (time.perf_counter() - begin) / (last.number - done) * (args.rounds - last.number)
        losses = "  ".join(f"{c} {loss:.3f}" for c, loss in [*last.losses.items()][:MOST_SHOWN])
        say(f"round {last.number:3d}/{args.rounds}  Dice loss  {losses}  {left:4.0f} s left")

    scored = {}
    for site in my_share(inside):
        own = last.own.get(site.name, last.global_state)
        states = {"fedavg": last.global_state, name: own} if name == "iopfl" else {name: own}
        rows = scored[site.name] = []
        for label, state in states.items():
            trained = with_state(model, state)
            for phase, split in (("inside", site.test), ("validation", site.validation)):
                rows += score(site, split, iopfl.predict(trained, split.images.to(device)), phase, label)
    scored = gather(scored)
    result = {"rows": [row for site in inside for row in scored[site.name]]}
    inside_seconds = time.perf_counter() - begin

    # Outside. The personalised models and, last, the global one, all frozen, span the routing space.
    if hold_out is not None and name == "iopfl":
        experts = [site.name for site in inside if site.name in last.own]
        states = [last.own[expert] for expert in experts] + [last.global_state]
        models = [with_state(model, state) for state in states]
        site = next(site for site in dataset.sites if site.name == hold_out)
        split = site.everything.to(device)  # no label of it was used: every image is a test image
        served = {}
        for label in my_share(outside):
            passes, routed = outside[label](models, split, seed)
            rows = score(site, split, passes[-1], "outside", label)
            for number, prediction in enumerate(passes if len(passes) > 1 else []):
                area = {"pass": number, "area": (prediction > 0).float().mean().item()}
                rows += score(site, split, prediction, "curve", label, **area)
            served[label] = {"rows": rows, "prediction": passes[-1].cpu()}
            if label == "routing":
                served[label]["weights"] = mean_routing(routed, split.images)
                served[label]["state"] = {n: v.cpu() for n, v in routed.state_dict().items()}
        served = gather(served)
        result["rows"] += [row for label in outside for row in served[label]["rows"]]
        if "routing" in served and first():
            save(folder / "adapted.pt", served["routing"]["state"])
            result["routing"] = {"outside": hold_out, "experts": [*experts, "global"],
                                 "weights": served["routing"]["weights"]}
            draw_heat_map(result["routing"]["weights"], [*experts, "global"], folder / "routing.png")
            if "global" in served:
                before, after = (served[label]["prediction"] for label in ("global", "routing"))
                draw_outside(site.everything, dataset.structures, before, after, folder / "outside.png")
    result["seconds"] = {"inside": inside_seconds,
                         "outside": time.perf_counter() - begin - inside_seconds}
    save(folder / "rows.json", result)
    return result


def load_dataset(args, seed: int) -> data.DataSet:
    if args.root:
        return data.load_folder(args.root, args.size, args.mask_values, seed, args.skip_empty)
    return data.simulate_sites(args.task, seed, args.size, args.images_per_site, args.sites)


def score_rows(dataset, seed: int, hold_out, site, split, prediction, phase, method, **more) -> list:
    """Rows of results.json for a prediction (N, H, W) of a split, one a structure."""
    found = iopfl.evaluate(prediction, split.masks, split.cases, dataset.structures, site.spacing,
                           distances=phase in ("inside", "outside"))
    labels = {"phase": phase, "method": method, "seed": seed, "hold_out": hold_out}
    return [{**labels, "site": site.name, **row, **more} for row in found]


# ---------------------------------------------------------------- methods for a hospital outside
# Each takes the models (the global one last), the hospital's images as a split and a seed; it returns
# predictions (N, H, W), the last one counts, and the routed network or None.
@torch.no_grad()
def plain_probabilities(model: torch.nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch.float()).float().softmax(dim=1) for batch in images.split(32)])


def one_model(models, split, seed, chosen=-1):
    return [iopfl.predict(models[chosen], split.images)], None


def best_inside(models, split, seed):
    """The personalised model whose BatchNorm statistics fit the images best."""
    fits = [router.divergence(model, split.images.float()).item() for model in models[:-1]]
    return one_model(models, split, seed, int(np.argmin(fits)))


def average(models, split, seed):
    """The mean of all weights."""
    mean = iopfl.aggregate([iopfl.snapshot(model) for model in models], [1] * len(models))
    return one_model([with_state(models[0], mean)], split, seed)


def ensemble(models, split, seed):
    """The mean of all probabilities."""
    return [sum(plain_probabilities(model, split.images) for model in models).argmax(dim=1)], None


def oracle(models, split, seed):
    """The ceiling: each half of the cases is predicted by the global model trained for ten epochs on
    the labels of the other half."""
    cases, generator = list(dict.fromkeys(split.cases)), seeded(seed)
    chosen = {cases[i] for i in torch.randperm(len(cases), generator=generator)[:len(cases) // 2]}
    half = torch.tensor([case in chosen for case in split.cases], device=split.masks.device)
    prediction = torch.zeros_like(split.masks, dtype=torch.long)
    for here in (half, ~half):
        model = copy.deepcopy(models[-1])
        iopfl.train_local(model, split.images[~here], split.masks[~here], epochs=10, generator=generator)
        prediction[here] = iopfl.predict(model, split.images[here])
    return [prediction], None


def routing(models, split, seed, *, experts=slice(None), fit: dict | None = {}, online=False,
            curve: int = 0, settings=RoutingSettings(), **changes):
    """Routing among `experts` of the models; fit: options of `router.fit_to_site`, None: without it;
    curve: so many times the passes of the settings, with a prediction after each."""
    images, settings = split.images.float(), replace(settings, **changes)
    routed = router.build_routed(models[experts], settings, seeded(seed))
    if fit is not None:
        seen = images[:settings.batch_size] if online else images
        share = router.site_share(models, router.divergence(models[-1], seen))
        router.fit_to_site(routed, models[experts], seen, online=online, **{"share": share, **fit})
    passes = [router.predict(routed, images).argmax(dim=1)] if curve else []
    generator = seeded(seed, images.device)
    for _ in range(curve or 1):
        passes.append(router.adapt(routed, images, generator=generator, online=online).argmax(dim=1))
    return passes, routed


GLOBAL, PERSONAL = slice(-1, None), slice(None, -1)
OUTSIDE = {
    "global": one_model,
    "best-inside": best_inside,
    "ensemble": ensemble,
    "average": average,
    "matched": partial(routing, passes=0, fit={"share": 0.0}),
    "bn": partial(routing, passes=0, experts=GLOBAL, fit={"share": 1.0}),
    # With one expert there is nothing to route: what moves is BatchNorm's affine (Wang et al. 2021).
    "tent": partial(routing, experts=GLOBAL, fit=None, batch_statistics=True, entropy=1.0,
                    consistency=0.0, shape=0.0, lr=1e-3, passes=1, leash=None),
    "routing": routing,
    "routing-authors": partial(routing, settings=AUTHORS, fit=None),
    "oracle": oracle,
}
OUTSIDE_ABLATIONS = {
    "no-steps": partial(routing, passes=0),
    "no-shape": partial(routing, shape=0.0),  # consistency alone, since entropy is off
    "no-consistency": partial(routing, consistency=0.0),  # shape alone
    "with-entropy": partial(routing, entropy=0.1),
    "entropy-alone": partial(routing, entropy=0.1, consistency=0.0, shape=0.0),
    "sigmoid": partial(routing, softmax=False),
    "site-routing": partial(routing, per_sample=False),
    "batch": partial(routing, batch_statistics=True),
    **{f"share={share}": partial(routing, fit={"share": share}) for share in (0.0, 0.25, 0.5, 1.0)},
    "random-start": partial(routing, fit={"start": "random"}),
    "uniform-start": partial(routing, fit={"start": "uniform"}),
    "equal-start": partial(routing, fit={"global_prior": None}),  # the global model as any other
    "global-only": partial(routing, experts=GLOBAL),
    "personal-only": partial(routing, experts=PERSONAL, fit={"global_prior": None}),
    "online": partial(routing, online=True),
    "no-leash": partial(routing, leash=None),
    "passes-20": partial(routing, passes=1, curve=20),
    "passes-20-free": partial(routing, passes=1, curve=20, leash=None),
}
INSIDE = {**METHODS, "centralised": Method()}
INSIDE_ABLATIONS = {f"alpha={a}": Method(own="local", alpha=a) for a in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)}
INSIDE_ABLATIONS["global-alpha=0.7"] = Method(alpha=0.7)  # a control: the global model accumulated
CEILINGS = {"centralised", "oracle"}  # know what no method may know
KNOWN = [*INSIDE, *INSIDE_ABLATIONS, *OUTSIDE, *OUTSIDE_ABLATIONS]
MOST_SHOWN = 12  # hospitals in pictures, tables and lines


def chosen_methods(args, hold_out: str | None) -> tuple[dict[str, Method], dict]:
    """The methods inside and outside that --methods means; FedAvg comes with IOP-FL's federation,
    which routing cannot do without."""
    groups = {"all": INSIDE, "ablations": ["iopfl", *INSIDE_ABLATIONS]}
    if hold_out is not None:
        groups = {"all": OUTSIDE, "ablations": ["global", "routing", *OUTSIDE_ABLATIONS]}
    names = {n for chosen in args.methods for n in groups.get(chosen, [chosen])}
    inside, outside = INSIDE | INSIDE_ABLATIONS, OUTSIDE | OUTSIDE_ABLATIONS
    inside["iopfl"] = replace(METHODS["iopfl"], alpha=args.alpha)
    if args.authors:
        outside["routing"] = OUTSIDE["routing-authors"]
    names |= {"iopfl"} if hold_out is not None else set()
    names -= {"fedavg"} if "iopfl" in names else set()
    inside = {name: method for name, method in inside.items() if name in names}
    outside = {name: method for name, method in outside.items() if name in names and hold_out}
    if not inside:
        raise WrongUse(f"--methods {' '.join(args.methods)}: none is for hospitals inside")
    return inside, outside


def hold_outs(choice: str | None, names: list[str]) -> list[str | None]:
    """The hospitals to hold out in turn; None stands for a federation of all."""
    if choice == "none":
        return [None]
    chosen = names if choice == "all" else [names[-1] if choice is None else choice]
    if chosen[0] not in names or len(names) < 2:
        raise WrongUse(f"--hold-out {choice}: there are {', '.join(names)}; at least two are needed, "
                       f"one of them, or all, to hold out; with none all are inside")
    return chosen


@torch.no_grad()
def mean_routing(routed: router.RoutedNetwork, images: Tensor) -> dict[str, list[float]]:
    """The routing weights (M,) of each layer, mean over the images (N, C, H, W)."""
    sums: dict[str, Tensor] = {}
    for batch in images.split(routed.settings.batch_size):
        routed(batch.float())
        for name, weights in routed.routing:
            sums[name] = sums.get(name, 0) + weights.sum(dim=0)
    return {name: (total / len(images)).tolist() for name, total in sums.items()}


# ---------------------------------------------------------------- saving and resuming
class WrongUse(ValueError):
    """What was asked for cannot be done, whatever is in the files: exit status 2."""


def first() -> bool:
    """Whether this process is the one that reports and writes."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def say(text: str) -> None:
    if first():
        print(text, flush=True)


def complain(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"train.py: {' '.join(line.split())}", file=sys.stderr)


def seeded(seed: int, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def save(path: Path, content: dict) -> None:
    """All of it is on the disk under this name, or, whatever happens, what was there before."""
    if not first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(path.name + ".partial")
    with open(partial_file, "wb") as file:
        if path.suffix == ".pt":
            torch.save(content, file)
        else:
            file.write(json.dumps(content, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    partial_file.replace(path)


def load(path: Path) -> dict:
    """What `save` wrote; nothing in the file is executed."""
    try:
        if path.suffix == ".pt":
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        return dict(json.loads(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:  # of many kinds: the archive, its index or a tensor may be wrong
        raise ValueError(f"{path}: damaged, or not written by this script ({type(error).__name__}); "
                         f"--overwrite begins anew") from None


def load_round(path: Path) -> iopfl.Round | None:
    """The last whole round of a federation that was interrupted."""
    found = load(path) if path.exists() else None
    if found is not None and set(found) != {"number", "global_state", "own", "losses"}:
        raise ValueError(f"{path}: not written by this script; --overwrite begins anew")
    return found and iopfl.Round(**found)


def open_run_folder(args, out: Path, dataset, chosen, inside, outside, folders) -> bool:
    """config.json: all that decides about the results, as it is now, so that the default written out
    or another spelling of a path is not another setting. False: the run is finished already."""
    left_out = ("out", "overwrite", "resume", "methods", "list", "adapt", "images", "masks", "online")
    config = {name: value for name, value in vars(args).items() if name not in left_out}
    config |= {"root": args.root and str(Path(args.root).resolve()), "hold_out": chosen,
               "inside": {n: vars(m) for n, m in inside.items()}, "outside": [*outside],
               "channels": dataset.channels, "classes": dataset.classes, "kind": dataset.kind,
               "structures": dataset.structures, "mask_values": dataset.mask_values,
               "content": dataset.fingerprint(), "torch": torch.__version__, "numpy": np.__version__}
    names = ("last.pt", "rows.json", "adapted.pt", "routing.png", "outside.png")
    config["files"] = ["results.json", "hospitals.png", "routing.png", "curves.png"]
    config["files"] += [f"{folder.name}/{name}" for folder in folders for name in names]
    mine = {}
    if first():
        mine["new"] = open_folder(out, config, "results.json", args)
        draw_hospitals(dataset.sites[:MOST_SHOWN], out / "hospitals.png")
    return gather(mine)["new"]  # no process goes on before the folder is as it should be


def open_folder(out: Path, config: dict, proof: str, args) -> bool:
    """Make `out` a new run of these settings, or one that goes on; False: it is finished already.
    proof: the file that is written last. config["files"]: what a run may write beside config.json."""
    config = json.loads(json.dumps({"program": "IOP-FL train.py", **config}))
    for name in ("root", "images", "masks", "adapt"):
        if getattr(args, name) and Path(getattr(args, name)).resolve().is_relative_to(out):
            raise WrongUse(f"--{name} {getattr(args, name)} lies inside --out {out}; say another --out")
    file, finished = out / "config.json", (out / proof).exists()
    before = load(file) if file.is_file() else {}
    foreign = before.get("program") != config["program"] if before else out.is_file() or (
        out.exists() and any(out.iterdir()))
    if foreign:
        raise WrongUse(f"{out} holds other things than a run; say another --out")
    if before and args.resume:
        for name in {**before, **config}:
            if before.get(name) != config.get(name):
                raise WrongUse(f"{out} holds a run with another setting, {name} {before.get(name)} "
                               f"instead of {config.get(name)}; say another --out or --overwrite")
        say(f"{out} is finished" if finished else f"{out} goes on")
        return not finished
    if before and not args.overwrite:
        way = "--overwrite" if finished or args.adapt else "--resume, --overwrite"
        raise WrongUse(f"{out} holds a run; say {way} or another --out")
    for name in [*before.get("files", []), "config.json"] if before else []:
        path = out / name
        for old in (path, path.with_name(path.name + ".partial")):
            if ".." not in path.parts and old.is_relative_to(out) and old.is_file():
                old.unlink()
        if path.parent != out and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    save(file, config)
    return True


# ---------------------------------------------------------------- tables
def report(args, out: Path, dataset, found: list[dict], seconds: float) -> None:
    """results.json, written last, pictures over all federations, and the tables."""
    rows = [row for result in found for row in result["rows"]]
    spent = {phase: round(sum(result["seconds"][phase] for result in found), 1)
             for phase in ("inside", "outside")} | {"total": round(seconds, 1)}
    machine = {"python": sys.version.split()[0], "torch": torch.__version__, "device": args.device,
               "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
               "threads": torch.get_num_threads(), "peak_memory_mib": peak_memory()}
    routings = [result["routing"] for result in found if "routing" in result]
    if routings:
        draw_routing(routings, out / "routing.png")
    if curves(rows, "dice"):
        draw_curves(curves(rows, "dice"), out / "curves.png")
    config = load(out / "config.json")
    save(out / "results.json", {"config": config, "machine": machine, "seconds": spent, "rows": rows})
    say(tables(rows, dataset.unit))
    memory = f", peak memory {machine['peak_memory_mib']} MiB" if machine["peak_memory_mib"] else ""
    say(f"\n{seconds:.0f} s{memory}. Models, pictures and results.json: {out}")


def tables(rows: list[dict], unit: str) -> str:
    """The whole report as text."""
    parts = []
    for phase, title, reference in (("inside", "test images", "iopfl"),
                                    ("outside", "all images of the hospital held out", "routing")):
        methods = {row["method"] for row in rows if row["phase"] == phase}
        if methods:
            parts.append(f"{phase.capitalize()}, {title}, Dice in %\n{table(rows, phase, unit)}")
        if reference in methods and len(methods) > 1:
            parts.append(compare(rows, phase, reference))
    validation: dict[str, list] = {}
    for row in (row for row in rows if row["phase"] == "validation"):
        validation.setdefault(row["method"], []).append(100 * row["dice"])
    means = ", ".join(f"{method} {np.mean(values):.1f}" for method, values in validation.items())
    parts.append(f"Inside, validation images, mean Dice in %: {means}")
    for key, title in (("dice", "Dice in %"), ("area", "foreground predicted, % of the image")):
        for method, curve in curves(rows, key).items():
            line = " ".join(f"{value:.1f}" for value in curve)
            parts.append(f"{method}, {title} after pass 0, 1, 2 …: {line}")
    return "\n" + "\n\n".join(parts)


def table(rows: list[dict], phase: str, unit: str) -> str:
    """Dice in % by hospital, mean ± sample standard deviation over seeds; the best of a column, but
    for ceilings, with *."""
    rows = [row for row in rows if row["phase"] == phase]
    methods, structures, seeds = (list(dict.fromkeys(row[key] for row in rows))
                                  for key in ("method", "structure", "seed"))
    sites = sorted({row["site"] for row in rows})
    columns = [("dice", [site], site) for site in sites if len(sites) <= MOST_SHOWN]
    columns += [("dice", sites, "mean")] if len(sites) > 1 else []
    columns += [("hd95", sites, f"HD95 {unit}"), ("assd", sites, f"ASSD {unit}")]
    groups = [[structure] for structure in structures] + [structures] * (len(structures) > 1)
    width = 2 + max(11 if len(seeds) > 1 else 7, *(len(title) for *_, title in columns))
    lines = [" " * 33 + "".join(f"{title:>{width}}" for *_, title in columns)]
    for group in groups:
        label = group[0] if len(group) == 1 else "mean"
        texts = {m: f"{label:10.10} {m + ' (ceiling)' * (m in CEILINGS):22}" for m in methods}
        for key, chosen, _ in columns:
            values = {m: by_seed(rows, key, seeds, m, group, chosen) for m in methods}
            means = [v.mean() for m, v in values.items() if m not in CEILINGS]
            best = (max if key == "dice" else min)(means, default=None)
            scale, digits = (100, 1) if key == "dice" else (1, 2)
            for m, v in values.items():
                spread = f"±{scale * v.std(ddof=1):.{digits}f}" if len(seeds) > 1 else ""
                star = "*" if v.mean() == best and m not in CEILINGS else " "
                texts[m] += f"{scale * v.mean():.{digits}f}{spread}{star}".rjust(width)
        lines += texts.values()
    valid, masks = (sum(row[key] for row in rows) for key in ("distance_cases", "cases"))
    empty = "; in the others both are empty" * (valid < masks)
    return "\n".join([*lines, f"HD95 and ASSD count {valid} of {masks} masks{empty}"])


def by_seed(rows, key: str, seeds, method: str, structures, sites) -> np.ndarray:
    """The mean over structures and hospitals, one number a seed."""
    rows = [row for row in rows if row["method"] == method and row["structure"] in structures
            and row["site"] in sites and row[key] is not None]
    return np.array([np.mean([row[key] for row in rows if row["seed"] == seed] or [np.nan])
                     for seed in seeds])


def compare(rows: list[dict], phase: str, reference: str) -> str:
    """The reference against each other method over all pairs (hospital, seed): mean, least and most
    difference in points of Dice, wins, ties (below 0.1 points), losses, p of the sign test."""
    dice: dict[str, dict] = {}
    for row in (row for row in rows if row["phase"] == phase):
        pairs = dice.setdefault(row["method"], {})
        pairs.setdefault((row["site"], row["seed"]), []).append(100 * row["dice"])
    own = dice.pop(reference)
    lines = [f"{reference + ' against':22}    mean   least    most   wins  ties  losses         p"]
    for method, values in dice.items():
        gains = np.array([np.mean(own[pair]) - np.mean(values[pair]) for pair in own])
        wins, losses = int((gains >= 0.1).sum()), int((gains <= -0.1).sum())
        lines.append(f"{method:22}{gains.mean():+8.2f}{gains.min():+8.2f}{gains.max():+8.2f}{wins:7}"
                     f"{len(gains) - wins - losses:6}{losses:8}{sign_test(wins, losses):10.2g}")
    return "\n".join(lines)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided: how likely a split at least as uneven is by chance; ties left out."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2**n)


def curves(rows: list[dict], key: str) -> dict[str, list[float]]:
    """Mean of "dice" or "area" in % after pass 0, 1, 2 …, by method."""
    result: dict[str, dict] = {}
    for row in (row for row in rows if row["phase"] == "curve"):
        result.setdefault(row["method"], {}).setdefault(row["pass"], []).append(100 * row[key])
    return {m: [float(np.mean(v)) for v in passes.values()] for m, passes in result.items()}


# ---------------------------------------------------------------- pictures
GREEN, ORANGE, BLUE = (60, 220, 60), (255, 150, 0), (60, 150, 255)


def palette() -> list[int]:
    """Colours of 256 classes, all different: red, green, blue of each in turn."""
    colours = [(0, 0, 0), BLUE, ORANGE, GREEN, (220, 60, 200), (240, 230, 60)]
    colours += [(37 * c % 256, 101 * c % 256, 255 - c) for c in range(len(colours), 256)]
    return [value for colour in colours for value in colour]


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """So many of the values, from the first to the last."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)]


def picture(image: Tensor, contours: list[tuple[Tensor, tuple]] = (), size=(160, 160)) -> Image.Image:
    """An image (C, H, W) as RGB of a size (width, height), with the outlines of every class of some
    masks (H, W), the last on top."""
    values = image.float().cpu().numpy()
    low, high = np.quantile(values, [0.005, 0.995])
    values = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    values = np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)
    canvas = Image.fromarray((255 * values).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.array(canvas)
    for mask, colour in contours:
        mask = mask.cpu().numpy().astype(np.uint8)
        for level in range(1, int(mask.max()) + 1):
            # A smoothed enlargement, cut at one half, has a clean outline.
            region = Image.fromarray(255 * (mask >= level).astype(np.uint8))
            region = np.asarray(region.resize(size, Image.Resampling.BICUBIC)) > 127
            padded = np.pad(region, 1, mode="edge")
            inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            pixels[region & ~inner] = colour
    return Image.fromarray(pixels)


def draw_grid(cells: list[list[Image.Image]], labels: list[str], titles: list[str], path: Path) -> None:
    """Rows of pictures with a label at the left of each and titles above the columns."""
    side, left, top = cells[0][0].width + 4, 110, 24
    sheet = Image.new("RGB", (left + len(cells[0]) * side, top + len(cells) * side), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((left + column * side + 2, 4), title, "black", font)
    for row, label in enumerate(labels):
        draw.text((6, top + row * side + side // 2 - 10), label, "black", font)
        for column, cell in enumerate(cells[row]):
            sheet.paste(cell, (left + column * side, top + row * side))
    sheet.save(path)


def draw_hospitals(sites: list[data.Site], path: Path) -> None:
    """Training images of each hospital, the last two with their masks."""
    count, cells = min(6, min(len(site.train.images) for site in sites)), []
    for site in sites:
        # Of volumes such slices as hold something, spread over the patients.
        shown = (site.train.masks > 0).flatten(1).any(dim=1).nonzero()[:, 0].numpy()
        shown = spread(shown if len(shown) >= count else np.arange(len(site.train.images)), count)
        outlines = [[]] * (count - 2) + [[(site.train.masks[i], GREEN)] for i in shown[-2:]]
        cells.append([picture(site.train.shown(i), o) for i, o in zip(shown, outlines)])
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = [""] * (count - 2) + ["drawn by its annotator"] if count > 2 else []
    draw_grid(cells, [site.name for site in sites], titles, path)


def draw_outside(split: data.Split, structures: dict, before: Tensor, after: Tensor, path: Path) -> None:
    """Six images from the greatest loss to the greatest gain by routing: truth, global, routed."""
    masks, dice = split.masks.numpy(), []
    for p, q, m in zip(before.numpy(), after.numpy(), masks):
        pairs = [[np.isin(x, classes) for x in (p, q, m)] for classes in structures.values()]
        dice.append([np.mean([iopfl.dice(x[0], x[2]) for x in pairs]),
                     np.mean([iopfl.dice(x[1], x[2]) for x in pairs])])
    gains = np.array(dice) @ [-1, 1]
    cells, order = [], spread(np.argsort(gains, kind="stable"), 6)
    for i in order:
        truth, image = (split.masks[i], GREEN), split.shown(i)
        outlines = ([], [truth], [truth, (before[i], ORANGE)], [truth, (after[i], BLUE)])
        cells.append([picture(image, outline) for outline in outlines])
    labels = [f"Dice {100 * dice[i][0]:.0f} to {100 * dice[i][1]:.0f}" for i in order]
    draw_grid(cells, labels, ["image", "truth (green)", "global (orange)", "routed (blue)"], path)


def draw_heat_map(rows: dict[str, list], columns: list[str], path: Path) -> None:
    """Numbers by row on a scale from white to blue, the largest one; nan stays grey."""
    width, height, left, top = 74, 20, 150, 26
    largest = max(np.nanmax(values) for values in rows.values())
    sheet = Image.new("RGB", (left + width * len(columns), top + height * len(rows) + 6), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(columns):
        draw.text((left + column * width + 4, 6), title[:11], "black", font)
    for row, (label, values) in enumerate(rows.items()):
        y = top + row * height
        draw.text((6, y + 3), label[:22], "black", font)
        for column, value in enumerate(values):
            x, share = left + column * width, 0 if math.isnan(value) else value / max(largest, 1e-6)
            blue = (int(255 - 200 * share), int(255 - 130 * share), 255)
            draw.rectangle((x, y, x + width - 2, y + height - 2),
                           fill="lightgrey" if math.isnan(value) else blue)
            if not math.isnan(value):
                draw.text((x + 22, y + 2), f"{value:.2f}", "black", font)
    sheet.save(path)


def draw_routing(routings: list[dict], path: Path) -> None:
    """For each hospital outside the mean weight of each model over layers, images and seeds."""
    models = sorted({name for r in routings for name in r["experts"]} - {"global"}) + ["global"]
    means: dict[str, list] = {}
    for r in routings:
        mean = dict(zip(r["experts"], np.mean([*r["weights"].values()], axis=0)))
        means.setdefault(f"outside: {r['outside']}", []).append([mean.get(m, np.nan) for m in models])
    draw_heat_map({label: np.mean(v, axis=0).tolist() for label, v in means.items()}, models, path)


def draw_curves(lines: dict[str, list[float]], path: Path) -> None:
    """Mean Dice by number of passes, a line for each method."""
    left, top, width, height = 50, 16, 420, 220
    values = [value for line in lines.values() for value in line]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-6)
    sheet = Image.new("RGB", (left + width + 20, top + height + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for value in np.linspace(low, high, 5):
        y = top + height * (high - value) / (high - low)
        draw.line([(left, y), (left + width, y)], "lightgrey")
        draw.text((6, y - 8), f"{value:.1f}", "black", font)
    for number, (name, line) in enumerate(lines.items()):
        colour = (BLUE, ORANGE, GREEN)[number % 3]
        draw.line([(left + width * n / max(1, len(line) - 1), top + height * (high - v) / (high - low))
                   for n, v in enumerate(line)], colour, 3)
        draw.text((left + 10, top + height - 20 * (number + 1)), name, colour, font)
    draw.text((left, top + height + 8), "passes: 0", "black", font)
    draw.text((left + width - 20, top + height + 8), str(len(line) - 1), "black", font)
    sheet.save(path)


# ---------------------------------------------------------------- a look at the images
def describe(dataset: data.DataSet) -> str:
    kinds = {"simulated": "simulated images", "fundus": "fundus photographs with disc and cup",
             "volumes": "prostate volumes, labels above 0 being prostate"}
    return f"{len(dataset.sites)} sites, {kinds.get(dataset.kind, dataset.kind)}"


def show(args, out: Path) -> int:
    """What is there: sites, cases, sizes, spacings, shares of the classes, and a gallery."""
    dataset = load_dataset(args, args.seeds[0])
    say(f"{describe(dataset)}; {dataset.channels} channels, classes 0 to {dataset.classes - 1}")
    element = "resized voxel, mm" if dataset.unit == "mm" else "resized pixel"
    shares = "".join(f"{f'class {c}, %':>12}" for c in range(dataset.classes))
    say(f"{'':19}{'cases':>19}\n{'site':19}  train   val  test  images  {'size as read':26}{element:26}{shares}")
    for site in dataset.sites:
        split = site.everything
        counts = [len(set(part.cases)) for part in (site.train, site.validation, site.test)]
        shares = torch.bincount(split.masks.flatten(), minlength=dataset.classes) / split.masks.numel()
        texts = []
        for sizes in (site.shapes or [split.masks.shape[1:]], site.spacing.values()):
            spans = ["×".join(f"{number:.4g}" for number in size) for size in sorted(set(sizes))]
            texts.append(" … ".join(spans[:1] + spans[1:][-1:]))
        say(f"{site.name:19.18}" + "".join(f"{count:>{w}}" for count, w in zip(counts, (7, 6, 6)))
            + f"{len(split.cases):8}  {texts[0]:26}{texts[1]:26}"
            + "".join(f"{100 * share:12.2f}" for share in shares.tolist()))
    path = out.with_name(out.name + "-hospitals.png")
    draw_hospitals(dataset.sites, path)
    say(f"Six images of each, two with their masks: {path}")
    return 0


# ---------------------------------------------------------------- unlabelled images (--adapt)
def run_file(path: Path) -> Path:
    """adapted.json of what --adapt wrote, or rows.json of a trained run's one federation of iopfl."""
    if (path / "adapted.json").is_file():
        return path / "adapted.json"
    found = [*path.glob("rows.json"), *sorted(path.glob("seed*-iopfl/rows.json"))]
    if len(found) != 1:
        raise WrongUse(f"{path}: expected one finished federation of iopfl, found {len(found)}"
                       + "".join(f"; --adapt {file.parent}" for file in found[:6]))
    return found[0]


def precision_of(path: Path) -> str:
    file = run_file(path)
    settings = file if file.stem == "adapted" else file.parent.parent / "config.json"
    return load(settings).get("precision")


def open_run(path: Path, device: str) -> tuple[dict, list, router.RoutedNetwork]:
    """What is known of a run, its models, and them as one; of what --adapt wrote, no models."""
    file = run_file(path)
    folder, adapted = file.parent, file.stem == "adapted"
    try:
        known = load(file if adapted else folder.parent / "config.json")
        model = UNet(known["channels"], known["classes"], known["width"], known["depth"])
        model = model.to(device, memory_format=torch.channels_last)
        settings = AUTHORS if known["authors"] else RoutingSettings()
        if adapted:
            routed = router.build_routed([model] * len(known["experts"]), settings)
            routed.load_state_dict(load(folder / "adapted.pt"))
            return known, [], routed
        last = load_round(folder / "last.pt")
        known |= {"experts": [*last.own, "global"], "seed": int(folder.name[4:].split("-")[0])}
        models = [with_state(model, state) for state in (*last.own.values(), last.global_state)]
        return known, models, router.build_routed(models, settings, seeded(known["seed"]))
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged, or of another version of this script "
                         f"({type(error).__name__}); train again") from None


def adapt_to_folder(args, out: Path) -> int:
    """Masks, overlays and a report for a folder of unlabelled images; 1 if some were left out."""
    begin, folder = time.perf_counter(), Path(args.images)
    known, models, routed = open_run(Path(args.adapt), args.device)
    if args.online and not models:
        raise WrongUse(f"{args.adapt} was adapted before and is used as it is; leave out --online")
    pairs = data.pairs_of(folder, Path(args.masks) if args.masks else None, strict=False)
    if not pairs:
        raise WrongUse(f"{folder}: no image; PNG, JPEG, TIFF, BMP, GIF and NIfTI are known")
    if args.masks and not any(mask for _, mask in pairs):
        complain(f"--masks {args.masks}: no mask has the name of an image")
    files = [name for file, _ in pairs for name in (f"overlays/{data.stem(file)}.png", mask_name(file))]
    files += ["adapted.json", "adapted.pt", "images.csv", "routing.png"]
    config = {"adapt": str(Path(args.adapt).resolve()), "images": str(folder.resolve()), "files": files}
    open_folder(out, config, "adapted.json", args)
    known["mask_values"] = args.mask_values or known["mask_values"]

    inputs, sources = [], []
    for file, mask_file in pairs:
        try:
            pixels = data.read_pixels(file)
            planes = data.network_input(file, pixels, known["size"], known["channels"], known["kind"])
            inputs.append(torch.from_numpy(planes))
        except (ValueError, OSError) as error:
            complain(f"left out: {error}")
            continue
        try:
            truth_of(mask_file, known, pixels.shape[:3])  # now, not after an hour
        except (ValueError, OSError) as error:
            complain(f"not scored: {error}")
            mask_file = None
        sources.append((file, mask_file))
    if not inputs:
        raise ValueError(f"{folder}: none of the {len(pairs)} files can be used")
    images = torch.cat(inputs).to(args.device, memory_format=torch.channels_last)

    if models and not known["authors"]:
        seen = images[:routed.settings.batch_size] if args.online else images
        router.fit_to_site(routed, models, seen, online=args.online)
    generator = seeded(known["seed"], args.device)
    results = {"after": router.adapt(routed, images, generator=generator, online=args.online)
               if models else router.predict(routed, images)}
    if models and args.masks:
        results["before"] = plain_probabilities(models[-1], images)
    agreement, rows, counts = agreements(routed, images, results["after"]), [], [*map(len, inputs)]
    parts = [dict(zip(results, own)) for own in zip(*(p.split(counts) for p in results.values()))]
    for (file, mask_file), part, own in zip(sources, parts, agreement.split(counts)):
        try:
            overlap, size = own.sum(dim=0).tolist()
            rows.append({"file": file.name, "confidence": overlap / max(size, 1e-6),
                         **write_masks(file, mask_file, part, known, out)})
        except (ValueError, OSError) as error:  # it was there a moment ago
            complain(f"left out: {error}")

    weights = mean_routing(routed, images)
    draw_heat_map(weights, known["experts"], out / "routing.png")
    chosen = dict(zip(known["experts"], np.mean([*weights.values()], axis=0).tolist()))
    save(out / "adapted.pt", {name: value.cpu() for name, value in routed.state_dict().items()})
    columns = list(dict.fromkeys(key for row in rows for key in row))  # without a mask no Dice
    with open(out / "images.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    kept = ("size", "width", "depth", "channels", "classes", "kind", "mask_values", "structures",
            "seed", "experts", "authors", "precision")
    save(out / "adapted.json", {key: known[key] for key in kept} | {"files": len(rows), "chosen": chosen})
    shares = ", ".join(f"{name} {weight:.2f}" for name, weight in chosen.items())
    say(f"What routing chose, mean over layers and images: {shares}")
    for key in columns[1:]:
        found = [row[key] for row in rows if key in row]
        say(f"{key}: mean {np.mean(found):.3f}, least {min(found):.3f}, {len(found)} files")
    say(f"{len(rows)} of {len(pairs)} files in {time.perf_counter() - begin:.0f} s: {out}")
    return int(len(rows) < len(pairs))


@torch.no_grad()
def agreements(routed: router.RoutedNetwork, images: Tensor, probabilities: Tensor) -> Tensor:
    """For each image overlap and size (N, 2) of the foreground in it and in a noisy, turned view."""
    generator, size, found = seeded(0, images.device), routed.settings.batch_size, []
    for batch, p in zip(images.split(size), probabilities.split(size)):
        views = router.draw_views(batch, generator)
        noise = torch.randn(batch.shape, generator=generator, device=batch.device)
        seen = router.predict(routed, router.view(batch + routed.settings.noise * noise, views))
        p, q = 1 - p[:, 0], 1 - router.view(seen, views, inverse=True)[:, 0]
        found.append(torch.stack([2 * p * q, p * p + q * q], dim=1).sum(dim=(2, 3)))
    return torch.cat(found)


def mask_name(file: Path) -> str:
    return f"masks/{data.stem(file)}" + (".nii.gz" if data.is_volume(file) else ".png")


def truth_of(mask_file: Path | None, known: dict, shape: tuple) -> np.ndarray | None:
    return mask_file and data.read_truth(mask_file, known["mask_values"], known["kind"], shape,
                                         known["classes"])


def write_masks(file: Path, mask_file: Path | None, results: dict, known: dict, out: Path) -> dict:
    """Mask and overlay of a file at its own size; its line of images.csv, Dice if it has a mask.
    results: "after", and perhaps "before", probabilities (n, C, h, w)."""
    pixels, masks = data.read_pixels(file), {}
    for when, stack in results.items():
        large = [torch.nn.functional.interpolate(p[None], pixels.shape[1:3], mode="bilinear") for p in stack]
        masks[when] = np.stack([p.argmax(dim=1)[0].byte().cpu().numpy() for p in large])  # (n, H, W)
    mask, truth = masks["after"], truth_of(mask_file, known, pixels.shape[:3])
    row = {"foreground": float((mask > 0).mean())}
    for when, structure in [(w, s) for w in masks for s in known["structures"]] if mask_file else []:
        of = [np.isin(m, known["structures"][structure]) for m in (masks[when], truth)]
        row[f"Dice {structure} {when}"] = iopfl.dice(*of)
    overlay = out / "overlays" / f"{data.stem(file)}.png"
    for folder in ("masks", "overlays"):
        (out / folder).mkdir(exist_ok=True)
    if data.is_volume(file):
        data.write_volume(out / mask_name(file), mask, file)
        filled = np.flatnonzero(mask.any(axis=(1, 2)))
        shown = spread(filled if len(filled) else np.arange(len(mask)), 6)
        cells = [picture(torch.from_numpy(pixels[i, :, :, 0][None]), [(torch.from_numpy(mask[i]), BLUE)])
                 for i in shown]
        draw_grid([cells], [overlay.stem[:14]], [f"slice {i}" for i in shown], overlay)
    else:
        image = Image.fromarray(mask[0])
        image.putpalette(palette())
        image.save(out / mask_name(file))
        scale = min(1, 640 / max(mask.shape[1:]))
        size = tuple(max(1, round(side * scale)) for side in mask.shape[:0:-1])
        drawn = [(torch.from_numpy(mask[0]), BLUE)]
        picture(torch.from_numpy(pixels[0].transpose(2, 0, 1)), drawn, size).save(overlay)
    return row


# ---------------------------------------------------------------- the command line
METHODS_BY_DEFAULT = ["fedavg", "iopfl", "global", "average", "routing"]
# name: default (its type is the option's; None: a text), help
OPTIONS = {
    "task": ("prostate", "which simulated hospitals: prostate or fundus"),
    "root": (None, "folders of real images instead, one a site; layouts in README.md"),
    "mask_values": ([int], "grey values of the classes in real masks, background first"),
    "size": (96, "height and width of an image, in pixels"),
    "sites": (6, "number of simulated hospitals"),
    "images_per_site": (60, "simulated: 60 per cent train, 15 validate, 25 test"),
    "skip_empty": (False, "slices without prostate do not train"),
    "list": (False, "show what the images are and end"),
    "adapt": (None, "a trained run, a folder seed… of it, or what --adapt wrote"),
    "images": (None, "with --adapt: folder of PNG, JPEG, TIFF, BMP, GIF or NIfTI files"),
    "masks": (None, "with --adapt: folder of masks of the same names, to report Dice"),
    "online": (False, "with --adapt: one step a batch, as images come"),
    "hold_out": (None, "hospital outside: a name, all (in turn) or none (default the last)"),
    "seeds": ([0], "one federation for each"),
    "methods": (METHODS_BY_DEFAULT, f"all, ablations or some of {', '.join(KNOWN)}; all and ablations "
                "are those inside with --hold-out none, else those outside"),
    "rounds": (30, "federated rounds"),
    "participation": (1.0, "share of the hospitals that take part in a round, drawn for each"),
    "local_epochs": (1, "epochs of local training a round"),
    "batch_size": (5, "images a step of training"),
    "lr": (1e-3, "learning rate of Adam"),
    "alpha": (METHODS["iopfl"].alpha, "share of its past that a personalised model keeps (M2)"),
    "width": (16, "channels of the U-Net's top level"),
    "depth": (3, "levels of the U-Net below the top"),
    "authors": (False, "settings of the published code: 100 rounds, alpha 0.1, router.AUTHORS; "
                "options given beside it win"),
    "device": ("auto", "where to compute: auto, cpu or cuda"),
    "precision": ("fp32", "fp32, or bf16: convolutions in bfloat16"),
    "threads": ([int], "on the CPU, a process; the same number gives the same bits"),
    "out": (None, "folder for models, pictures, results.json (default runs/<name>)"),
    "resume": (False, "go on with the unfinished run of these settings"),
    "overwrite": (False, "remove the run that lies in --out first"),
}
CHOICES = {"task": ("prostate", "fundus"), "device": ("auto", "cpu", "cuda"),
           "precision": ("fp32", "bf16")}
# Least and most; beyond is a slip of the hand.
RANGES = {"size": (1, 4096), "sites": (1, 10**6), "images_per_site": (4, 10**6), "rounds": (1, 10**6),
          "local_epochs": (1, 10**6), "batch_size": (1, 10**6), "width": (1, 1024), "depth": (1, 10),
          "lr": (1e-12, 1000), "alpha": (0, 1), "participation": (1e-12, 1), "threads": (1, 1024)}
ADAPTING = {"adapt", "images", "masks", "online", "mask_values", "device", "threads", "out", "overwrite"}
READING = {"list", "task", "root", "mask_values", "size", "sites", "images_per_site", "skip_empty",
           "seeds", "device", "threads", "out"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise WrongUse(f"{message}; --help shows all options")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, (default, text) in OPTIONS.items():
        options = {"choices": CHOICES.get(name), "type": type(default), "metavar": name[0].upper()}
        if default is None:
            options["type"] = str
        elif default is False:
            options = {"action": "store_true"}
        elif isinstance(default, list):
            kind = default[0] if default == [int] else type(default[0])
            options |= {"type": kind, "nargs": None if name == "threads" else "+"}
        shown = "" if default in (None, False, [int]) else f" (default {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text + shown, **options)
    given = vars(parser.parse_args(argv))
    defaults = {name: None if default == [int] else default for name, (default, _) in OPTIONS.items()}
    published = {"rounds": 100, "alpha": 0.1} if given.get("authors") else {}
    args = argparse.Namespace(**defaults | published | given)

    mode = "--adapt" if "adapt" in given else "--list" if "list" in given else "training"
    of_mode = {"--adapt": ADAPTING, "--list": READING}.get(mode, {*OPTIONS} - {"images", "masks", "online"})
    idle = set(given) - of_mode
    if mode != "--adapt":
        idle |= set(given) & ({"task", "sites", "images_per_site"} if "root" in given
                              else {"mask_values", "skip_empty"})
    if idle:
        name = sorted(idle)[0].replace("_", "-")
        raise WrongUse(f"--{name} would do nothing here ({mode}); leave it out")
    for name, (least, most) in RANGES.items():
        if getattr(args, name) is not None and not least <= getattr(args, name) <= most:
            raise WrongUse(f"--{name.replace('_', '-')} {getattr(args, name)}: not in {least} … {most}")
    unknown = set(args.methods) - {"all", "ablations", *KNOWN}
    for wrong, message in (
            (args.width * 2**args.depth > 2**13, f"--width, --depth: more than {2**13} channels"),
            (unknown, f"--methods: {', '.join(sorted(unknown))} unknown; --help names them all"),
            (not 0 <= min(args.seeds) <= max(args.seeds) < 2**32 or len({*args.seeds}) < len(args.seeds),
             "--seeds must be different numbers from 0 to 2^32 - 1"),
            (args.mask_values and not 1 < len({*args.mask_values}) == len(args.mask_values) <= 256,
             "--mask-values must be 2 to 256 different numbers, one a class"),
            ((args.adapt is None) != (args.images is None), "--adapt and --images go together"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: there is no GPU"),
            (args.out == "", "--out must not be empty")):
        if wrong:
            raise WrongUse(message)
    for name in ("root", "images", "masks", "adapt"):
        path = getattr(args, name)
        if path is not None and not (path and Path(path).is_dir()):
            raise WrongUse(f"--{name} {path}: no such folder")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def join_processes(args) -> None:
    """Where torchrun started this script several times: one group of them, each with its own GPU."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if args.adapt or args.list:
        raise WrongUse("torchrun shares federations among processes; leave out --adapt and --list")
    beside, number = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if args.device == "cuda":
        if beside > torch.cuda.device_count():
            raise WrongUse(f"{beside} processes, but this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(number)
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // beside)  # torchrun leaves one
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # one that dies is noticed at once
    if dist.get_rank():
        warnings.simplefilter("ignore")  # the first process reports


def keep_memory() -> None:
    """glibc returns large blocks to the system, and each page of the next one is a fault: keeping
    them saves a tenth of training and a third of adapting to large images."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another system
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks apart
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is returned


def peak_memory() -> int | None:
    """The most memory that this process has had so far, in MiB, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024**2))


def main(argv: list[str] | None = None) -> int:
    warnings.showwarning = lambda message, *_: complain(str(message))
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        join_processes(args)
        keep_memory()
        torch.set_num_threads(args.threads or torch.get_num_threads())
        torch.backends.cudnn.deterministic = True
        args.threads = torch.get_num_threads()
        name = "adapted" if args.adapt else Path(args.root).resolve().name if args.root else args.task
        out = Path(args.out or f"runs/{name}").resolve()
        args.precision = precision_of(Path(args.adapt)) if args.adapt else args.precision
        # Without autocast's cache, which would hold on to the weights of the first step.
        with torch.autocast(args.device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
            return (adapt_to_folder if args.adapt else show if args.list else train)(args, out)
    except KeyboardInterrupt:
        complain("interrupted; a training goes on when the same command is given with --resume")
        return 130
    except Exception as error:
        if os.environ.get("IOPFL_TRACEBACK"):
            raise
        if not isinstance(error, (ValueError, OSError, ImportError)):
            error = f"{type(error).__name__}: {error} (IOPFL_TRACEBACK=1 shows where)"
        if first() or not isinstance(error, WrongUse):
            complain(str(error))
        return 2 if isinstance(error, WrongUse) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if dist.is_available() and dist.is_initialized():  # threads of gloo may crash in an orderly end
        os._exit(status)
    sys.exit(status)
