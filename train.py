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
    check_batches(args, dataset.sites)
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
        return read_json(folder / "rows.json")
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
                draw_outside(site.everything, dataset.structures, served, folder / "outside.png")
    result["seconds"] = {"inside": inside_seconds,
                         "outside": time.perf_counter() - begin - inside_seconds}
    save(folder / "rows.json", result)
    return result


def score_rows(dataset, seed: int, hold_out, site, split, prediction, phase, method, **more) -> list:
    """Rows of results.json for a prediction (N, H, W) of a split, one a structure."""
    found = iopfl.evaluate(prediction, split.masks, split.cases, dataset.structures, site.spacing,
                           distances=phase in ("inside", "outside"))
    labels = {"phase": phase, "method": method, "seed": seed, "hold_out": hold_out}
    return [{**labels, "site": site.name, **row, **more} for row in found]


# ---------------------------------------------------------------- methods for a hospital outside
# Each takes the models (the global one last), the hospital's images and a seed, and returns its
# predictions (N, H, W), a list with the last one at its end, and the routed network, if there is one.
def plain(model: torch.nn.Module, images: Tensor) -> tuple[list[Tensor], None]:
    return [iopfl.predict(model, images)], None


def global_alone(models, split, seed):
    return plain(models[-1], split.images)


def best_inside(models, split, seed):
    """The personalised model whose BatchNorm statistics fit the images best."""
    fits = [router.divergence(model, split.images).item() for model in models[:-1]]
    return plain(models[int(np.argmin(fits))], split.images)


def average(models, split, seed):
    """The mean of all weights."""
    states = [iopfl.snapshot(model) for model in models]
    return plain(with_state(models[0], iopfl.aggregate(states, [1] * len(states))), split.images)


@torch.no_grad()
def ensemble(models, split, seed):
    """The mean of all probabilities."""
    total = sum(torch.cat([model(batch.float()).float().softmax(dim=1)
                           for batch in split.images.split(32)]) for model in models)
    return [total.argmax(dim=1)], None


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


def routing(models, split, seed, *, settings=RoutingSettings(), experts=slice(None), online=False,
            fit: dict | None = {}, curve: int = 0):
    """Routing among `experts` of the models; fit: options of `router.fit_to_site`, None: without it;
    curve: so many times the passes of the settings, with a prediction after each."""
    images, chosen = split.images.float(), models[experts]
    routed = router.build_routed(chosen, settings, seeded(seed))
    if fit is not None:
        seen = images[:settings.batch_size] if online else images
        share = router.site_share(models, router.divergence(models[-1], seen))
        router.fit_to_site(routed, chosen, seen, online=online, **{"share": share, **fit})
    passes = [router.predict(routed, images).argmax(dim=1)] if curve else []
    generator = seeded(seed, images.device)
    for _ in range(curve or 1):
        probabilities = router.adapt(routed, images, generator=generator, online=online)
        passes.append(probabilities.argmax(dim=1))
    return passes, routed


def variant(**changes) -> partial:
    """Routing with other settings."""
    return partial(routing, settings=replace(RoutingSettings(), **changes))


STILL = RoutingSettings(passes=0)
GLOBAL, PERSONAL = slice(-1, None), slice(None, -1)
# With one expert there is nothing to route: what moves is BatchNorm's affine (Wang et al. 2021).
TENT = RoutingSettings(batch_statistics=True, entropy=1.0, consistency=0.0, shape=0.0, lr=1e-3,
                       passes=1, leash=None)
OUTSIDE = {
    "global": global_alone,
    "best-inside": best_inside,
    "ensemble": ensemble,
    "average": average,
    "matched": partial(routing, settings=STILL, fit={"share": 0.0}),
    "bn": partial(routing, settings=STILL, experts=GLOBAL, fit={"share": 1.0}),
    "tent": partial(routing, settings=TENT, experts=GLOBAL, fit=None),
    "routing": routing,
    "routing-authors": partial(routing, settings=AUTHORS, fit=None),
    "oracle": oracle,
}
OUTSIDE_ABLATIONS = {
    "no-steps": variant(passes=0),
    "no-shape": variant(shape=0.0),  # consistency alone, since entropy is off
    "no-consistency": variant(consistency=0.0),  # shape alone
    "with-entropy": variant(entropy=0.1),
    "entropy-alone": variant(entropy=0.1, consistency=0.0, shape=0.0),
    "sigmoid": variant(softmax=False),
    "site-routing": variant(per_sample=False),
    "batch": variant(batch_statistics=True),
    **{f"share={share}": partial(routing, fit={"share": share}) for share in (0.0, 0.25, 0.5, 1.0)},
    "random-start": partial(routing, fit={"start": "random"}),
    "uniform-start": partial(routing, fit={"start": "uniform"}),
    "equal-start": partial(routing, fit={"global_prior": None}),  # the global model as any other
    "global-only": partial(routing, experts=GLOBAL),
    "personal-only": partial(routing, experts=PERSONAL, fit={"global_prior": None}),
    "online": partial(routing, online=True),
    "no-leash": variant(leash=None),
    "passes-20": partial(variant(passes=1), curve=20),
    "passes-20-free": partial(variant(passes=1, leash=None), curve=20),
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
    names |= {"iopfl"} if hold_out is not None else set()
    inside = {n: method for n, method in {**INSIDE, **INSIDE_ABLATIONS}.items() if n in names}
    if "iopfl" in inside:
        inside["iopfl"] = replace(METHODS["iopfl"], alpha=args.alpha)
        inside.pop("fedavg", None)
    every = {**OUTSIDE, **OUTSIDE_ABLATIONS}
    every["routing"] = routing_of(args.authors)
    outside = {n: every[n] for n in every if n in names and hold_out is not None}
    if not inside:
        raise WrongUse(f"--methods {' '.join(args.methods)}: none is for hospitals inside")
    return inside, outside


def routing_of(authors: bool):
    return OUTSIDE["routing-authors"] if authors else routing


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


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not written by this script ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not written by this script")
    return found


def load(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # executes nothing
    except OSError:
        raise
    except Exception as error:  # of many kinds: the archive, its index or a tensor may be wrong
        raise ValueError(f"{path}: damaged, or not written by this script ({type(error).__name__})") from None


def load_round(path: Path) -> iopfl.Round | None:
    """The last whole round of a federation that was interrupted."""
    if not path.exists():
        return None
    try:
        return iopfl.Round(**load(path))
    except TypeError:
        raise ValueError(f"{path}: not written by this script; --overwrite begins anew") from None


def open_run_folder(args, out: Path, dataset, chosen, inside, outside, folders) -> bool:
    """config.json: all that decides about the results, as it is now, so that the default written out
    or another spelling of a path is not another setting."""
    left_out = ("out", "overwrite", "resume", "methods", "list", "adapt", "images", "masks", "online")
    config = {name: value for name, value in vars(args).items() if name not in left_out}
    config |= {"root": args.root and str(Path(args.root).resolve()), "hold_out": chosen,
               "inside": {n: vars(m) for n, m in inside.items()}, "outside": [*outside],
               "channels": dataset.channels, "classes": dataset.classes, "kind": dataset.kind,
               "structures": dataset.structures, "mask_values": dataset.mask_values,
               "content": dataset.fingerprint(), "torch": torch.__version__, "numpy": np.__version__}
    files = ["results.json", "hospitals.png", "routing.png", "curves.png"]
    names = ("last.pt", "rows.json", "adapted.pt", "routing.png", "outside.png")
    files += [f"{folder.name}/{name}" for folder in folders for name in names]
    mine = {}
    if first():
        mine["new"] = open_folder(out, {**config, "files": files}, "results.json", args)
        draw_hospitals(dataset.sites[:MOST_SHOWN], out / "hospitals.png")
    return gather(mine)["new"]  # no process goes on before the folder is as it should be


def open_folder(out: Path, config: dict, proof: str, args) -> bool:
    """Make `out` a new run of these settings, or one that goes on; False: it is finished already.

    proof: the file that is written last. config["files"]: what a run may write beside config.json."""
    config = json.loads(json.dumps({"program": "IOP-FL train.py", **config}))
    for name in ("root", "images", "masks", "adapt"):
        if getattr(args, name) and Path(getattr(args, name)).resolve().is_relative_to(out):
            raise WrongUse(f"--{name} {getattr(args, name)} lies inside --out {out}; say another --out")
    file = out / "config.json"
    before = read_json(file) if file.is_file() else {}
    if not before and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WrongUse(f"{out} holds other things than a run; say another --out")
    if before and before.get("program") != config["program"]:
        raise WrongUse(f"{file} was not written by this script; say another --out")
    if before and args.resume:
        for name in {**before, **config}:
            if before.get(name) != config.get(name):
                raise WrongUse(f"{out} holds a run with another setting, {name} {before.get(name)} "
                               f"instead of {config.get(name)}; say another --out or --overwrite")
        if (out / proof).exists():
            say(f"{out} is finished")
        return not (out / proof).exists()
    if before and not args.overwrite:
        way = "say --overwrite" if (out / proof).exists() or args.adapt else "say --resume, --overwrite"
        raise WrongUse(f"{out} holds a run; {way} or another --out")
    for name in [proof, *before.get("files", []), "config.json"] if before else []:
        path = out / name
        for old in (path, path.with_name(path.name + ".partial")):
            if not {"..", "/"} & set(Path(name).parts) and old.is_file():
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
    config = read_json(out / "config.json")
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
        shown = (site.train.masks > 0).flatten(1).any(dim=1).nonzero()[:, 0]
        shown = shown if len(shown) >= count else torch.arange(len(site.train.images))
        shown = shown[torch.linspace(0, len(shown) - 1, count).round().long()].tolist()
        outlines = [[]] * (count - 2) + [[(site.train.masks[i], GREEN)] for i in shown[count - 2:]]
        cells.append([picture(site.train.shown(i), o) for i, o in zip(shown, outlines)])
    titles = [""] * (count - 2) + ["drawn by its annotator"]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(cells, [site.name for site in sites], titles if count > 2 else [], path)


def draw_outside(split: data.Split, structures: dict, served: dict, path: Path) -> None:
    """Six images from the greatest loss to the greatest gain by routing: truth, global, routed."""
    before, after = (served[method]["prediction"] for method in ("global", "routing"))
    masks, dice = split.masks.numpy(), []
    for prediction in (before.numpy(), after.numpy()):
        dice.append([np.mean([iopfl.dice(np.isin(p, classes), np.isin(m, classes))
                              for classes in structures.values()]) for p, m in zip(prediction, masks)])
    dice = np.array(dice)
    order = np.argsort(dice[1] - dice[0], kind="stable")
    order = order[np.linspace(0, len(order) - 1, min(6, len(order))).astype(int)]
    cells = []
    for i in order:
        truth, image = (split.masks[i], GREEN), split.shown(i)
        cells.append([picture(image), picture(image, [truth]),
                      picture(image, [truth, (before[i], ORANGE)]),
                      picture(image, [truth, (after[i], BLUE)])])
    labels = [f"Dice {100 * dice[0, i]:.0f} to {100 * dice[1, i]:.0f}" for i in order]
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
def open_run(path: Path, device: str) -> tuple[dict, list, router.RoutedNetwork | None]:
    """What is known of a trained run, and its models; of what --adapt wrote, the routed network."""
    adapted = (path / "adapted.json").is_file()
    if not adapted:
        folds = [path] if (path / "rows.json").is_file() else sorted(
            file.parent for file in path.glob("seed*-iopfl/rows.json"))
        if len(folds) != 1:
            names = "".join(f"; --adapt {fold}" for fold in folds[:6])
            raise WrongUse(f"{path}: expected one finished federation of iopfl, found {len(folds)}{names}")
        path = folds[0]
    file = path / "adapted.json" if adapted else path.parent / "config.json"
    try:
        known = read_json(file)
        model = UNet(known["channels"], known["classes"], known["width"], known["depth"])
        model = model.to(device, memory_format=torch.channels_last)
        options = routing_of(known["authors"])
        options = options.keywords if options is not routing else {}
        settings = options.get("settings", RoutingSettings())
        if adapted:
            routed = router.build_routed([model] * len(known["experts"]), settings)
            routed.load_state_dict(load(path / "adapted.pt"))
            return known, [], routed
        last = load_round(path / "last.pt")
        known |= {"experts": [*last.own, "global"], "seed": int(path.name[4:].split("-")[0])}
        models = [with_state(model, state) for state in (*last.own.values(), last.global_state)]
        return known | {"fit": options.get("fit", {})}, models, router.build_routed(
            models, settings, seeded(known["seed"]))
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged, or of another version of this script "
                         f"({type(error).__name__}); train again") from None


def adapt_to_folder(args, out: Path) -> int:
    """Masks, overlays and a report for a folder of unlabelled images; 1 if some were left out."""
    known, models, routed = open_run(Path(args.adapt), args.device)
    if args.online and not models:
        raise WrongUse(f"{args.adapt} was adapted before and is used as it is; leave out --online")
    masks = Path(args.masks) if args.masks else None
    pairs = data.pairs_of(Path(args.images), masks, strict=False)
    if not pairs:
        raise WrongUse(f"{args.images}: no image; PNG, JPEG, TIFF, BMP, GIF and NIfTI are known")
    if masks and not any(mask for _, mask in pairs):
        complain(f"--masks {masks}: no mask has the name of an image")
    values, begin = args.mask_values or known["mask_values"], time.perf_counter()
    written = [f"overlays/{data.stem(file)}.png" for file, _ in pairs]
    written += [f"masks/{mask_name(file)}" for file, _ in pairs]
    written += ["adapted.json", "adapted.pt", "images.csv", "routing.png"]
    given = {"adapt": str(Path(args.adapt).resolve()), "images": str(Path(args.images).resolve())}
    open_folder(out, {**given, "files": written}, "adapted.json", args)

    inputs, sources = [], []
    for file, mask_file in pairs:
        try:
            pixels = data.read_pixels(file)
            planes = data.network_input(file, pixels, known["size"], known["channels"], known["kind"])
        except (ValueError, OSError) as error:
            complain(f"left out: {error}")
            continue
        try:
            if mask_file:  # now, not after an hour
                data.read_truth(mask_file, values, known["kind"], pixels.shape[:3], known["classes"])
        except (ValueError, OSError) as error:
            complain(f"not scored: {error}")
            mask_file = None
        inputs.append(torch.from_numpy(planes))
        sources.append((file, mask_file, len(planes)))
    if not inputs:
        raise ValueError(f"{args.images}: none of the {len(pairs)} files can be used")
    images = torch.cat(inputs).to(args.device, memory_format=torch.channels_last)

    generator = seeded(known["seed"], args.device)
    if models:
        if known["fit"] is not None:
            seen = images[:routed.settings.batch_size] if args.online else images
            router.fit_to_site(routed, models, seen, online=args.online, **known["fit"])
        probabilities = router.adapt(routed, images, generator=generator, online=args.online)
    else:
        probabilities = router.predict(routed, images)
    results = {"after": probabilities}
    if models and masks:
        batches = images.split(routed.settings.batch_size)
        with torch.no_grad():
            results["before"] = torch.cat([models[-1](b).float().softmax(dim=1) for b in batches])
    agreement, rows, start = agreements(routed, images, probabilities), [], 0
    for name in ("masks", "overlays"):
        (out / name).mkdir(exist_ok=True)
    for file, mask_file, count in sources:
        here = slice(start, start + count)
        start += count
        try:
            own = {when: p[here] for when, p in results.items()}
            overlap, size = agreement[here].sum(axis=0)
            rows.append(write_masks(file, mask_file, own, values, known, out)
                        | {"confidence": float(overlap / max(size, 1e-6))})
        except (ValueError, OSError) as error:  # it was there a moment ago
            complain(f"left out: {error}")
    if not rows:
        raise ValueError(f"{args.images}: none of the {len(pairs)} files can be used")

    weights = mean_routing(routed, images)
    draw_heat_map(weights, known["experts"], out / "routing.png")
    chosen = dict(zip(known["experts"], np.mean([*weights.values()], axis=0).tolist()))
    save(out / "adapted.pt", {name: value.cpu() for name, value in routed.state_dict().items()})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "images.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)  # without a mask a row has no Dice
        writer.writeheader()
        writer.writerows(rows)
    kept = ("size", "width", "depth", "channels", "classes", "kind", "mask_values", "structures",
            "seed", "experts", "authors", "precision")
    save(out / "adapted.json", {key: known[key] for key in kept} | {"files": len(rows), "chosen": chosen})
    say("What routing chose, mean over layers and images: "
        + ", ".join(f"{name} {weight:.2f}" for name, weight in chosen.items()))
    for key in columns[1:]:
        found = [row[key] for row in rows if key in row]
        scored = f", {len(found)} files" * (len(found) < len(rows))
        say(f"{key}: mean {np.mean(found):.3f}, least {min(found):.3f}{scored}")
    say(f"{len(rows)} of {len(pairs)} files in {time.perf_counter() - begin:.0f} s. "
        f"Masks, overlays, images.csv: {out}")
    return int(len(rows) < len(pairs))


@torch.no_grad()
def agreements(routed: router.RoutedNetwork, images: Tensor, probabilities: Tensor) -> np.ndarray:
    """For each image overlap and size (N, 2) of the foreground in it and in a noisy, turned view."""
    generator, found = seeded(0, images.device), []
    size = routed.settings.batch_size
    for batch, p in zip(images.split(size), probabilities.split(size)):
        views = router.draw_views(batch, generator)
        noise = torch.randn(batch.shape, generator=generator, device=batch.device)
        seen = router.view(batch + routed.settings.noise * noise, views)
        p, q = 1 - p[:, 0], 1 - router.view(router.predict(routed, seen), views, inverse=True)[:, 0]
        found.append(torch.stack([(2 * p * q).sum(dim=(1, 2)), (p * p + q * q).sum(dim=(1, 2))], dim=1))
    return torch.cat(found).cpu().numpy()


def mask_name(file: Path) -> str:
    return data.stem(file) + (".nii.gz" if data.is_volume(file) else ".png")


def write_masks(file: Path, mask_file: Path | None, probabilities: dict, values, known: dict,
                out: Path) -> dict:
    """Mask and overlay of a file at its own size; its line of images.csv, with Dice if it has a mask."""
    pixels, name, masks = data.read_pixels(file), data.stem(file), {}
    for when, stack in probabilities.items():  # (n, C, h, w)
        large = [torch.nn.functional.interpolate(p[None], pixels.shape[1:3], mode="bilinear")
                 .argmax(dim=1)[0].byte().cpu().numpy() for p in stack]
        masks[when] = np.stack(large)  # (n, H, W)
    mask = masks["after"]
    row = {"file": file.name, "foreground": float((mask > 0).mean())}
    if mask_file:
        truth = data.read_truth(mask_file, values, known["kind"], mask.shape, known["classes"])
        for when, structure in ((w, s) for w in masks for s in known["structures"]):
            classes = known["structures"][structure]
            row[f"Dice {structure} {when}"] = iopfl.dice(np.isin(masks[when], classes),
                                                         np.isin(truth, classes))
    if data.is_volume(file):
        data.write_volume(out / "masks" / mask_name(file), mask, file)
        filled = np.flatnonzero(mask.any(axis=(1, 2)))
        shown = filled if len(filled) else np.arange(len(mask))
        shown = shown[np.linspace(0, len(shown) - 1, min(6, len(shown))).round().astype(int)]
        cells = [picture(torch.from_numpy(pixels[i, :, :, 0][None]), [(torch.from_numpy(mask[i]), BLUE)])
                 for i in shown]
        titles = [f"slice {i}" for i in shown]
        draw_grid([cells], [name[:14]], titles, out / "overlays" / f"{name}.png")
    else:
        image = Image.fromarray(mask[0])
        image.putpalette(palette())
        image.save(out / "masks" / mask_name(file))
        height, width = mask.shape[1:]
        scale = min(1, 640 / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        overlay = picture(torch.from_numpy(pixels[0].transpose(2, 0, 1)),
                          [(torch.from_numpy(mask[0]), BLUE)], size)
        overlay.save(out / "overlays" / f"{name}.png")
    return row


# ---------------------------------------------------------------- the command line
DEFAULTS = {"task": "prostate", "root": None, "mask_values": None, "size": 96, "sites": 6,
            "images_per_site": 60, "skip_empty": False, "list": False, "adapt": None, "images": None,
            "masks": None, "online": False, "hold_out": None, "seeds": [0],
            "methods": ["fedavg", "iopfl", "global", "average", "routing"], "rounds": 30,
            "participation": 1.0, "local_epochs": 1, "batch_size": 5, "lr": 1e-3,
            "alpha": METHODS["iopfl"].alpha, "width": 16, "depth": 3, "authors": False,
            "device": "auto", "precision": "fp32", "threads": None, "out": None, "resume": False,
            "overwrite": False}
EVERYWHERE = {"device", "threads", "out"}
READING = {"task", "root", "mask_values", "size", "sites", "images_per_site", "skip_empty", "seeds"}
WITH_ADAPT = EVERYWHERE | {"adapt", "images", "masks", "online", "mask_values", "overwrite"}
SIMULATED, OF_FOLDERS = {"task", "sites", "images_per_site"}, {"mask_values", "skip_empty"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise WrongUse(f"{message}; --help shows all options")


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    epilog="What adaptation does at test time: router.RoutingSettings.")
    add = parser.add_argument
    add("--task", choices=("prostate", "fundus"), help="which simulated hospitals (prostate)")
    add("--root", metavar="DIR", help="real images instead, a folder a site; layouts in README.md")
    add("--mask-values", type=int, nargs="+", metavar="V",
        help="grey values of the classes in real masks, background first, such as 0 128 255")
    add("--size", type=int, metavar="N", help="height and width of an image, in pixels (96)")
    add("--sites", type=int, metavar="N", help="number of simulated hospitals (6)")
    add("--images-per-site", type=int, metavar="N",
        help="of a simulated hospital: 60 per cent train, 15 validate, 25 test (60)")
    add("--skip-empty", action="store_true", help="slices without prostate do not train")
    add("--list", action="store_true", help="show what the images are and end")
    add("--adapt", metavar="RUN", help="a trained run, a folder seed… of it, or what --adapt wrote")
    add("--images", metavar="DIR", help="with --adapt: PNG, JPEG, TIFF, BMP, GIF or NIfTI files")
    add("--masks", metavar="DIR", help="with --adapt: masks of the same names, to report Dice")
    add("--online", action="store_true", help="with --adapt: one step a batch, as images come")
    add("--hold-out", metavar="SITE", help="hospital outside: a name, all or none (the last)")
    add("--seeds", type=int, nargs="+", metavar="N", help="one federation for each (0)")
    add("--methods", nargs="+", metavar="M", help="all, ablations, or some of "
        f"{', '.join(KNOWN)}; all and ablations are those inside with --hold-out none, else outside "
        f"({' '.join(DEFAULTS['methods'])})")
    add("--rounds", type=int, metavar="N", help="federated rounds (30)")
    add("--participation", type=float, metavar="SHARE",
        help="share of the hospitals that take part in a round, drawn for each (1)")
    add("--local-epochs", type=int, metavar="N", help="epochs of local training a round (1)")
    add("--batch-size", type=int, metavar="N", help="images a step of training (5)")
    add("--lr", type=float, help="learning rate of Adam (0.001)")
    add("--alpha", type=float, help="share of its past that a personalised model keeps, M2 (0.7)")
    add("--width", type=int, metavar="N", help="channels of the U-Net's top level (16)")
    add("--depth", type=int, metavar="N", help="levels of the U-Net below the top (3)")
    add("--authors", action="store_true", help="settings of the published code: 100 rounds, alpha "
        "0.1, router.AUTHORS; options given beside it win")
    add("--device", choices=("auto", "cpu", "cuda"), help="where to compute (auto)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: convolutions in bfloat16 (fp32)")
    add("--threads", type=int, metavar="N", help="on the CPU, a process; the same number gives the "
        "same bits")
    add("--out", metavar="DIR", help="for models, pictures, results.json (runs/<name>)")
    add("--resume", action="store_true", help="go on with the unfinished run of these settings")
    add("--overwrite", action="store_true", help="remove the run that lies in --out first")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    given = vars(parser().parse_args(argv))
    published = {"rounds": 100, "alpha": 0.1} if given.get("authors") else {}
    args = argparse.Namespace(**{**DEFAULTS, **published, **given})
    adapting = args.adapt is not None
    idle = set(given) - WITH_ADAPT if adapting else set(given) & {"images", "masks", "online"}
    if args.list:
        idle |= set(given) - READING - EVERYWHERE - {"list"}
    if not adapting:
        idle |= set(given) & (OF_FOLDERS if args.root is None else SIMULATED)
    if idle:
        mode = "--adapt" if adapting else "--list" if args.list else "these options"
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(idle))
        raise WrongUse(f"{names} would do nothing with {mode}; leave it out")
    most = {"size": 4096, "width": 1024, "depth": 10, "lr": 1000, "threads": 1024, "alpha": 1,
            "participation": 1}
    for name in ("size", "sites", "rounds", "local_epochs", "batch_size", "lr", "width", "depth",
                 "images_per_site", "threads", "alpha", "participation"):
        value, least = getattr(args, name), {"images_per_site": 4, "alpha": -1e-9}.get(name, 1e-12)
        if value is not None and not least <= value <= most.get(name, 10**9):
            raise WrongUse(f"--{name.replace('_', '-')} {value}: it must lie in "
                           f"{max(0, round(least))} … {most.get(name, 10**9)}")
    if args.width * 2**args.depth > 2**13:
        raise WrongUse(f"--width {args.width} --depth {args.depth}: more than {2**13} channels")
    unknown = set(args.methods) - {"all", "ablations", *KNOWN}
    if unknown:
        raise WrongUse(f"--methods: {', '.join(sorted(unknown))} unknown; --help names them all")
    if not 0 <= min(args.seeds) <= max(args.seeds) < 2**32 or len({*args.seeds}) < len(args.seeds):
        raise WrongUse("--seeds must be different numbers from 0 to 2^32 - 1")
    if args.mask_values and not 1 < len({*args.mask_values}) == len(args.mask_values) <= 256:
        raise WrongUse("--mask-values must be 2 to 256 different numbers, one a class")
    if adapting != (args.images is not None):
        raise WrongUse("--adapt RUN and --images DIR go together")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise WrongUse("--device cuda: torch finds no GPU; use --device cpu")
    for name in ("root", "images", "masks", "adapt"):
        path = getattr(args, name)
        if path is not None and not (path and Path(path).is_dir()):
            raise WrongUse(f"--{name} {path}: no such folder")
    if args.out == "":
        raise WrongUse("--out must not be empty")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def load_dataset(args, seed: int) -> data.DataSet:
    if args.root:
        return data.load_folder(args.root, args.size, args.mask_values, seed, args.skip_empty)
    return data.simulate_sites(args.task, seed, args.size, args.images_per_site, args.sites)


def hold_outs(choice: str | None, names: list[str]) -> list[str | None]:
    """The hospitals to hold out in turn; None stands for a federation of all."""
    if choice == "none":
        return [None]
    chosen = names if choice == "all" else [names[-1] if choice is None else choice]
    if chosen[0] not in names:
        raise WrongUse(f"--hold-out {choice}: there are {', '.join(names)}, or all, or none")
    if len(names) < 2:
        raise WrongUse(f"there is one site, {names[0]}, and none beside it; use --hold-out none")
    return chosen


def check_batches(args, sites: list[data.Site]) -> None:
    """BatchNorm has nothing to measure where a batch holds one image and the lowest level a pixel."""
    for site in sites:
        count = len(site.train.images)
        if args.size <= 2**args.depth and count // -(-count // args.batch_size) == 1:
            raise WrongUse(f"site {site.name}: a batch of one image, of one pixel at the lowest level; "
                           f"use a smaller --depth or another --batch-size")


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
    # torchrun leaves each process one thread.
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // beside)
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # a process that dies is noticed at once
    if dist.get_rank():
        warnings.simplefilter("ignore")  # the first process reports


def keep_memory() -> None:
    """glibc returns large blocks to the system, and each page of the next one is a fault: keeping them
    saves a tenth of training and a third of adapting to large images."""
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
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        join_processes(args)
        keep_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        args.threads = torch.get_num_threads()
        name = "adapted" if args.adapt else Path(args.root).resolve().name if args.root else args.task
        out = Path(args.out or f"runs/{name}").resolve()
        if args.adapt:
            file = next((p for p in (Path(args.adapt) / "adapted.json", Path(args.adapt) / "config.json",
                                     Path(args.adapt).resolve().parent / "config.json") if p.is_file()), None)
            args.precision = read_json(file).get("precision", "fp32") if file else "fp32"
        torch.backends.cudnn.deterministic = True
        # Without autocast's cache, which would hold on to the weights of the first step.
        with torch.autocast(args.device, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
            run = adapt_to_folder if args.adapt else show if args.list else train
            return run(args, out)
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
    if dist.is_available() and dist.is_initialized():  # threads of gloo may crash in an orderly end
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
