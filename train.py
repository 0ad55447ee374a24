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
import ctypes
import json
import math
import os
import platform
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

import data
import iopfl
import router
from iopfl import METHODS, Method, gather, my_share, with_state
from models import UNet
from router import AUTHORS, RoutingSettings


# ---------------------------------------------------------------- the story
def train(args, out: Path) -> int:
    """Every federation that was asked for, then the report; what is finished is not done again."""
    results, dataset_of = [], lru_cache(maxsize=1)(partial(load_dataset, args))
    dataset = dataset_of(args.seeds[0])
    hospitals = hold_outs(args.hold_out, [site.name for site in dataset.sites])
    inside, outside = chosen_methods(args, hospitals[0])
    open_run(args, out, dataset, hospitals, inside, outside)
    for seed, hold_out, name in product(args.seeds, hospitals, inside):
        print(f"\nseed {seed}, outside: {hold_out or 'none'}, {name}")
        folder = out / folder_name(seed, hold_out, name)
        if (folder / "rows.json").exists():
            results.append(load(folder / "rows.json", dict, "rows", "routing", "seconds"))
        else:
            results.append(federation(args, dataset_of(seed), seed, hold_out, name, inside[name],
                                      outside, folder))
    report(args, out, dataset.unit, results)
    return 0


def federation(args, dataset: data.DataSet, seed: int, hold_out: str | None, name: str,
               method: Method, outside: dict, folder: Path) -> dict:
    """One federation of all hospitals but one (M1, M2), then the one outside (M4 to M8).
    Returns rows of results.json and what routing chose; `folder` holds them and the models."""
    begin = tick = time.perf_counter()
    file, device = folder / "last.pt", args.device
    inside = [site for site in dataset.sites if site.name != hold_out]
    clients = {site.name: site.train.to(device) for site in inside}
    if name == "centralised":  # what no federation may do: one client has all images
        clients = {"all": data.joined([site.train for site in inside]).to(device)}
    model = UNet(dataset.channels, dataset.classes, args.width, args.depth, seeded(seed))
    model = model.to(device, memory_format=torch.channels_last)
    last = load(file, iopfl.Round) if file.exists() else None  # of a run that was interrupted

    # Inside. A round: local training, the average, and each hospital's own model.
    for last in iopfl.federate(model, clients, args.rounds, method, seed=seed, lr=args.lr,
                               epochs=args.local_epochs, batch_size=args.batch_size,
                               participation=args.participation, after=last):
        save(file, vars(last))
        left, tick = (time.perf_counter() - tick) * (args.rounds - last.number), time.perf_counter()
        losses = "  ".join(f"{c} {loss:.3f}" for c, loss in [*last.losses.items()][:MOST_SHOWN])
        print(f"round {last.number:3d}/{args.rounds}  Dice loss  {losses}  {left:4.0f} s left")
    rows, chosen = score_inside(dataset, inside, model, last.own, last.global_state, name), {}
    middle = time.perf_counter()

    # Outside. The personalised models and, last, the global one, all frozen, are what is routed.
    if hold_out is not None and name == "iopfl":
        states = last.own | {"global": last.global_state}
        models = {expert: with_state(model, state) for expert, state in states.items()}
        site = next(site for site in dataset.sites if site.name == hold_out)
        more, chosen = hospital_outside(dataset, site, models, outside, seed, device, folder)
        rows += more
    result = {"rows": [{**row, "seed": seed, "hold_out": hold_out} for row in rows],
              "routing": chosen,
              "seconds": {"inside": middle - begin, "outside": time.perf_counter() - middle}}
    save(folder / "rows.json", result)
    return result


def hospital_outside(dataset, site: data.Site, models: dict[str, nn.Module], methods: dict,
                     seed: int, device: str, folder: Path) -> tuple[list, dict]:
    """What each method makes of the hospital held out, all of whose images are test images.
    Returns rows and what routing chose; `folder` gets the adapted model and pictures."""
    served, split = {}, site.everything.to(device)
    for name in my_share(methods):
        probabilities, network = methods[name]([*models.values()], split, seed)
        prediction = probabilities.argmax(dim=1).cpu()
        rows = score(dataset, site, split, prediction, "outside", name)
        served[name] = {"rows": rows, "prediction": prediction}
        if name == "routing":
            served[name]["weights"] = mean_routing(network, split.images)
            served[name]["state"] = iopfl.snapshot(network)
    served, chosen = gather(served), {}
    if "routing" in served:
        routed = served["routing"]
        save(folder / "adapted.pt", routed["state"])
        draw_heat_map(routed["weights"], [*models], folder / "routing.png")
        chosen = {"outside": site.name, "experts": [*models], "weights": routed["weights"]}
        if "global" in served:
            draw_outside(site.everything, dataset.structures, served["global"]["prediction"],
                         routed["prediction"], folder / "outside.png")
    return sum((served[name]["rows"] for name in methods), []), chosen


def routing(models: list[nn.Module], split: data.Split, seed: int, *, settings=RoutingSettings(),
            experts=slice(None), fit: dict | None = {}, rule=None, online=False, **changes):
    """The models as one routed network (M4, M5), adapted to images without labels (M6 to M8).
    settings and changes of them; experts: which models are routed; fit: options of
    `router.fit_to_site`, None: without it, as published; rule: for the share of the site's
    statistics, where all models are to tell it. Returns probabilities (N, C, H, W), network."""
    images, settings = split.images.float(), replace(settings, **changes)
    routed = router.build_routed(models[experts], settings, seeded(seed))
    if fit is not None:
        seen = images[:settings.batch_size] if online else images
        if rule:
            fit = {"share": rule(models, router.divergence(models[-1], seen)), **fit}
        router.fit_to_site(routed, models[experts], seen, online=online, **fit)
    generator = seeded(seed, images.device)
    return router.adapt(routed, images, generator=generator, online=online), routed


# ---------------------------------------------------------------- methods for a hospital outside
# Each takes the models (the global one last), the hospital's images as a split and a seed; it
# returns probabilities (N, C, H, W), or their sum over models, and the routed network or None.
@torch.no_grad()
def plain(models: list[nn.Module], split: data.Split):
    """The sum of what the models say as they were trained."""
    batches = split.images.split(32)
    return sum(torch.cat([model(batch.float()).float().softmax(dim=1) for batch in batches])
               for model in models), None


def oracle(models, split, seed):
    """The ceiling: each half of the cases is predicted by the global model trained for ten epochs
    on the labels of the other half."""
    cases, generator = list(dict.fromkeys(split.cases)), seeded(seed)
    chosen = torch.randperm(len(cases), generator=generator)[:len(cases) // 2].tolist()
    half = [cases.index(case) in chosen for case in split.cases]
    half, (found, _) = torch.tensor(half, device=split.images.device), plain(models[-1:], split)
    for here, other in ((half, ~half), (~half, half)):
        model, images = copy.deepcopy(models[-1]), split.images[other]
        iopfl.train_local(model, images, split.masks[other], epochs=10, generator=generator)
        found[here], _ = plain([model.eval()], data.Split(split.images[here], None, None))
    return found, None


GLOBAL, PERSONAL = slice(-1, None), slice(None, -1)
OUTSIDE = {
    "global": lambda models, split, seed: plain(models[-1:], split),
    # The personalised model whose BatchNorm statistics fit the images best.
    "best-inside": lambda models, split, seed: plain(
        [min(models[:-1], key=lambda m: router.divergence(m, split.images.float()).item())], split),
    "ensemble": lambda models, split, seed: plain(models, split),  # the mean of all probabilities
    # The mean of all weights.
    "average": lambda models, split, seed: plain([with_state(models[0], iopfl.aggregate(
        [iopfl.snapshot(model) for model in models], [1] * len(models)))], split),
    "matched": partial(routing, passes=0, fit={"share": 0.0}),
    "bn": partial(routing, passes=0, experts=GLOBAL, fit={"share": 1.0}),
    # One expert: nothing to route, what moves is BatchNorm's affine (Wang et al. 2021).
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
    "tolerance=0.02": partial(routing, rule=lambda _, D: float(1 / (1 + (0.02 / D) ** 4))),
    "random-start": partial(routing, fit={"start": "random"}),
    "uniform-start": partial(routing, fit={"start": "uniform"}),
    "equal-start": partial(routing, fit={"global_prior": None}),  # the global model as any other
    "global-only": partial(routing, experts=GLOBAL, rule=router.site_share),
    "personal-only": partial(routing, experts=PERSONAL, rule=router.site_share,
                             fit={"global_prior": None}),
    "online": partial(routing, online=True),
    **{f"passes={n}": partial(routing, passes=n) for n in (1, 10, 20)},
    **{f"passes={n}-no-leash": partial(routing, passes=n, leash=None) for n in (1, 3, 10, 20)},
}
INSIDE = {**METHODS, "centralised": Method()}
INSIDE_ABLATIONS = {f"alpha={a}": replace(METHODS["iopfl"], alpha=a)
                    for a in (0.0, 0.1, 0.3, 0.5, 0.9)}
INSIDE_ABLATIONS["global-alpha=0.7"] = Method(alpha=0.7)  # a control: the global model accumulated
CEILINGS = {"centralised", "oracle"}  # know what no method may know
KNOWN = [*INSIDE, *INSIDE_ABLATIONS, *OUTSIDE, *OUTSIDE_ABLATIONS]
MOST_SHOWN = 12  # hospitals in pictures, tables and lines
TORCHRUN = dist.is_available() and dist.is_torchelastic_launched()
FIRST = not TORCHRUN or os.environ["RANK"] == "0"  # of several processes, the one that writes
# Without autocast's cache, which would hold on to the weights of the first step.
autocast = partial(torch.autocast, dtype=torch.bfloat16, cache_enabled=False)


class WrongUse(ValueError):
    """What was asked for cannot be done, whatever is in the files: exit status 2."""


def hold_outs(choice: str | None, names: list[str]) -> list[str | None]:
    """The hospitals to hold out in turn; None stands for a federation of all."""
    if choice == "none":
        return [None]
    chosen = names if choice == "all" else [names[-1] if choice is None else choice]
    if chosen[0] not in names or len(names) < 2:
        raise WrongUse(f"--hold-out {choice or chosen[0]}: there are {', '.join(names)}; at least "
                       "two are needed, one of them, or all, to hold out; with none all are inside")
    return chosen


def chosen_methods(args, hold_out: str | None) -> tuple[dict[str, Method], dict]:
    """The methods inside and outside that --methods means; FedAvg comes with IOP-FL's federation,
    which routing cannot do without."""
    groups = {"all": OUTSIDE, "ablations": ["global", "routing", *OUTSIDE_ABLATIONS]}
    if hold_out is None:
        groups = {"all": INSIDE, "ablations": ["iopfl", *INSIDE_ABLATIONS]}
    names = {name for chosen in args.methods for name in groups.get(chosen, [chosen])}
    names |= {"iopfl"} if hold_out is not None else set()
    names -= {"fedavg"} if "iopfl" in names else set()
    inside = INSIDE | INSIDE_ABLATIONS | {"iopfl": replace(METHODS["iopfl"], alpha=args.alpha)}
    outside = OUTSIDE | OUTSIDE_ABLATIONS
    if args.authors:
        outside["routing"] = OUTSIDE["routing-authors"]
    inside = {name: method for name, method in inside.items() if name in names}
    outside = {name: run for name, run in outside.items() if name in names}
    asked = args.methods != OPTIONS["methods"][2]
    if hold_out is None and (not inside or outside and asked):
        raise WrongUse(f"--methods {' '.join(args.methods)}: not all are for hospitals inside")
    return inside, outside if hold_out else {}


# ---------------------------------------------------------------- what the story needs
def seeded(seed: int, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def load_dataset(args, seed: int) -> data.DataSet:
    if args.root:
        return data.load_folder(args.root, args.size, args.mask_values, seed, args.skip_empty)
    return data.simulate_sites(args.task, seed, args.size, args.images_per_site, args.sites)


def folder_name(seed: int, hold_out: str | None, name: str) -> str:
    return f"seed{seed}-{hold_out or 'all-inside'}-{name}"


def score(dataset, site, split, prediction, phase: str, method: str) -> list[dict]:
    """Rows of results.json for a prediction (N, H, W) of a split, one a structure."""
    found = iopfl.evaluate(prediction, split.masks, split.cases, dataset.structures, site.spacing,
                           distances=phase != "validation")
    return [{"phase": phase, "method": method, "site": site.name, **row} for row in found]


def score_inside(dataset, sites, model, own: dict, global_state: dict, method: str) -> list[dict]:
    """Each hospital's own model on its images that did not train; beside IOP-FL the global one."""
    scored, device = {site.name: [] for site in my_share(sites)}, next(model.parameters()).device
    names = ["fedavg", method] if method == "iopfl" else [method]
    for site, name in product(my_share(sites), names):
        state = own.get(site.name, global_state) if name == method else global_state
        for phase, split in (("inside", site.test), ("validation", site.validation)):
            prediction = iopfl.predict(with_state(model, state), split.images.to(device))
            scored[site.name] += score(dataset, site, split, prediction, phase, name)
    scored = gather(scored)
    return sum((scored[site.name] for site in sites), [])


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
def complain(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"train.py: {' '.join(line.split())}", file=sys.stderr)


def save(path: Path, content: dict) -> None:
    """All of it is on the disk under this name, or, whatever happens, what was there before."""
    if not FIRST:
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


def load(path: Path, kind: type = dict, *keys: str):
    """What `save` wrote, with these keys; nothing in the file is executed."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: not a file")
    try:
        if path.suffix == ".pt":
            return kind(**torch.load(path, map_location="cpu", weights_only=True))
        found = json.loads(path.read_bytes())
        return {key: found[key] for key in (*keys, *found)}
    except OSError:
        raise
    except Exception as error:  # of many kinds: the archive, its index or a tensor may be wrong
        way = "remove the folder" if path.name == "config.json" else "--overwrite begins anew"
        raise ValueError(f"{path}: damaged, or not written by this script "
                         f"({type(error).__name__}); {way}") from None


def open_run(args, out: Path, dataset, hospitals, inside: dict, outside: dict) -> None:
    """Write config.json: all that decides about the results, so that the default written out, or
    another spelling of a path, is not another setting."""
    for count in (len(site.train.images) for site in dataset.sites):
        if args.size <= 2**args.depth and count // -(-count // args.batch_size) == 1:
            raise WrongUse("BatchNorm has nothing to measure in a batch of one image whose lowest "
                           "level is one pixel; use a smaller --depth or another --batch-size")
    config = {name: value for name, value in vars(args).items() if "*" in OPTIONS[name][0]}
    config["root"] = args.root and str(Path(args.root).resolve())
    config |= {name: value for name, value in vars(dataset).items() if name != "sites"}
    config |= {"classes": dataset.classes, "content": dataset.fingerprint(), "hold_out": hospitals,
               "inside": {name: vars(method) for name, method in inside.items()},
               "outside": [*outside], "torch": torch.__version__, "numpy": np.__version__}
    folders = [folder_name(*key) for key in product(args.seeds, hospitals, inside)]
    files = ("last.pt", "rows.json", "adapted.pt", "routing.png", "outside.png")
    config["files"] = ["results.json", "hospitals.png", "routing.png",
                       *map("/".join, product(folders, files))]
    if FIRST:
        open_folder(args, out, config)
    gather({})  # no process goes on before the folder is as it should be
    draw_hospitals(dataset.sites[:MOST_SHOWN], out / "hospitals.png")
    print(f"{len(dataset.sites)} sites, {dataset.kind}; {len(folders)} federations")


def open_folder(args, out: Path, config: dict) -> None:
    """Make `out` a new run of these settings, or one that goes on. config["files"]: what a run
    writes beside config.json; the first of them is written last."""
    config = json.loads(json.dumps({"program": "IOP-FL train.py", **config}))
    for name in FOLDERS:
        path = getattr(args, name)
        if path and Path(path).resolve().is_relative_to(out):
            raise WrongUse(f"--{name} {path} lies inside --out {out}; say another --out")
    file, finished = out / "config.json", (out / config["files"][0]).exists()
    before = load(file) if file.is_file() else {}
    # A run that was killed at its very beginning has left no more than config.json.partial.
    used = out.is_file() or out.is_dir() and any(p.suffix != ".partial" for p in out.iterdir())
    if used and before.get("program") != config["program"]:
        raise WrongUse(f"{out} holds other things than a run; say another --out")
    if before and args.resume:
        for name in before | config:
            if before.get(name) != config.get(name):
                raise WrongUse(f"{out} holds a run with another setting, {name} {before.get(name)} "
                               f"instead of {config.get(name)}; say another --out or --overwrite")
        return
    if before and not args.overwrite:
        way = "--overwrite" if finished or args.adapt else "--resume, --overwrite"
        raise WrongUse(f"{out} holds a run; say {way} or another --out")
    for path in (out / name for name in before.get("files", [])):
        for old in (path, path.with_name(path.name + ".partial")):
            if old.parent.resolve().is_relative_to(out):  # the list might be damaged
                old.unlink(missing_ok=True)
                with suppress(OSError):  # it holds foreign files, or is gone
                    path.parent.rmdir()
    save(file, config)


# ---------------------------------------------------------------- tables
def report(args, out: Path, unit: str, results: list[dict]) -> None:
    """What routing chose, over all federations, as a picture; tables; results.json, the last."""
    rows, chosen = [], {}
    for result in results:
        rows += result["rows"]
        if found := result["routing"]:
            means = np.mean([*found["weights"].values()], axis=0)  # over the layers
            label = f"{found['outside']}, seed {rows[-1]['seed']}"
            chosen[label] = dict(zip(found["experts"], means.tolist()))
    models = sorted({*chain(*chosen.values())}, key=lambda name: (name == "global", name))
    draw_heat_map({label: [means.get(name, np.nan) for name in models]
                   for label, means in chosen.items()}, models, out / "routing.png")
    seconds = {p: round(sum(r["seconds"][p] for r in results), 1) for p in ("inside", "outside")}
    machine = {"python": sys.version.split()[0], "torch": torch.__version__, "device": args.device,
               "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
               "threads": torch.get_num_threads(), "peak_memory_mib": None}
    with suppress(ImportError):  # Windows does not say
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        machine["peak_memory_mib"] = round(peak / (1024**2 if sys.platform == "darwin" else 1024))
    save(out / "results.json", {"config": load(out / "config.json"), "machine": machine,
                                "seconds": seconds, "rows": rows})
    print(f"{tables(rows, unit)}\n\n{sum(seconds.values()):.0f} s, peak memory "
          f"{machine['peak_memory_mib']} MiB. Models, pictures and results.json: {out}")


def tables(rows: list[dict], unit: str) -> str:
    """The whole report as text."""
    parts = []
    for phase, title, reference in (("inside", "test images", "iopfl"),
                                    ("outside", "all images of the hospital held out", "routing")):
        chosen = [row for row in rows if row["phase"] == phase]
        methods = {row["method"] for row in chosen}
        if chosen:
            parts.append(f"{phase.capitalize()}, {title}, Dice in %\n{table(chosen, unit)}")
        if len(methods) > 1 and reference in methods:
            parts.append(compare(chosen, reference))
    validation = grouped([row for row in rows if row["phase"] == "validation"], "dice", "method")
    means = ", ".join(f"{m} {100 * np.mean(values):.1f}" for (m,), values in validation.items())
    parts.append(f"Inside, validation images, mean Dice in %: {means}")
    return "\n" + "\n\n".join(parts)


def grouped(rows: list[dict], key: str, *names: str) -> dict[tuple, list[float]]:
    """The values of `key`, by what the rows hold under `names`; None is left out."""
    result: dict[tuple, list] = {}
    for row in (row for row in rows if row[key] is not None):
        result.setdefault(tuple(row[name] for name in names), []).append(row[key])
    return result


def table(rows: list[dict], unit: str) -> str:
    """Dice in % by hospital, mean ± sample standard deviation over seeds; * marks the best of a
    column, ceilings left out."""
    methods, structures, seeds, sites = (list(dict.fromkeys(row[key] for row in rows))
                                         for key in ("method", "structure", "seed", "site"))
    columns = [("dice", [site], site) for site in sorted(sites) if 1 < len(sites) <= MOST_SHOWN]
    columns += [("dice", sites, "mean" if len(sites) > 1 else sites[0]),
                ("hd95", sites, f"HD95 {unit}"), ("assd", sites, f"ASSD {unit}")]
    width = 2 + max(11 if len(seeds) > 1 else 7, *(len(title) for *_, title in columns))
    lines = [" " * 33 + "".join(f"{title:>{width}}" for *_, title in columns)]
    for group in [[s] for s in structures] + [structures] * (len(structures) > 1):
        label = group[0] if len(group) == 1 else "mean"
        texts = {m: f"{label:10.10} {m + ' (ceiling)' * (m in CEILINGS):22}" for m in methods}
        for key, chosen, _ in columns:
            own = [row for row in rows if row["structure"] in group and row["site"] in chosen]
            by_seed = grouped(own, key, "method", "seed")
            values = {m: [np.mean(by_seed.get((m, seed), np.nan)) for seed in seeds]
                      for m in methods}
            means = [np.mean(v) for m, v in values.items() if m not in CEILINGS]
            means = [mean for mean in means if not np.isnan(mean)]
            best = (max if key == "dice" else min)(means, default=None)
            scale, digits = (100, 1) if key == "dice" else (1, 2)
            for m, v in values.items():
                spread = f"±{scale * np.std(v, ddof=1):.{digits}f}" if len(seeds) > 1 else ""
                star = "*" if np.mean(v) == best and m not in CEILINGS else " "
                texts[m] += f"{scale * np.mean(v):.{digits}f}{spread}{star}".rjust(width)
        lines += texts.values()
    valid, masks = (sum(row[key] for row in rows) for key in ("distance_cases", "cases"))
    empty = "; in the others both are empty" * (valid < masks)
    return "\n".join([*lines, f"HD95 and ASSD count {valid} of {masks} masks{empty}"])


def compare(rows: list[dict], reference: str) -> str:
    """The reference against each other method over all pairs (hospital, seed): mean, least and most
    difference in points of Dice, wins, ties (below 0.1 points), losses, p of the sign test."""
    dice = grouped(rows, "dice", "method", "site", "seed")
    lines = [f"{reference + ' against':22}    mean   least    most   wins  ties  losses         p"]
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != reference):
        gains = 100 * np.array([np.mean(values) - np.mean(dice[(method, *pair)])
                                for (owner, *pair), values in dice.items() if owner == reference])
        wins, losses = int((gains >= 0.1).sum()), int((gains <= -0.1).sum())
        spans = "".join(f"{gain:+8.2f}" for gain in (gains.mean(), gains.min(), gains.max()))
        lines.append(f"{method:22}{spans}{wins:7}{len(gains) - wins - losses:6}{losses:8}"
                     f"{sign_test(wins, losses):10.2g}")
    return "\n".join(lines)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided: how likely a split at least as uneven is by chance; ties left out."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2**n)


# ---------------------------------------------------------------- pictures
GREEN, ORANGE, BLUE = (60, 220, 60), (255, 150, 0), (60, 150, 255)
# Red, green, blue of 256 classes in turn: all different, the background black.
PALETTE = (np.outer(np.arange(256), (37, 101, 173)) % 256).flatten().tolist()


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """So many of the values, from the first to the last."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)]


def picture(image, contours: list[tuple] = (), size=(160, 160)) -> Image.Image:
    """An image (C, H, W) as RGB of a size (width, height), with the outlines of every class of some
    masks (H, W), each with its colour, the last on top."""
    values = np.asarray(image, dtype=np.float32)
    low, high = np.quantile(values, [0.005, 0.995])
    values = 255 * np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    values = np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0).astype(np.uint8)
    pixels = np.array(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC))
    for mask, colour in contours:
        for level in range(1, int(mask.max()) + 1):
            # A smoothed enlargement, cut at one half, has a clean outline.
            region = Image.fromarray(255 * np.asarray(mask >= level, dtype=np.uint8))
            region = region.resize(size, Image.Resampling.BICUBIC).point([0] * 128 + [255] * 128)
            inner = region.filter(ImageFilter.MinFilter(3))
            pixels[np.asarray(region) > np.asarray(inner)] = colour
    return Image.fromarray(pixels)


def draw_grid(cells: list[list], labels: list[str], titles: list[str], path: Path) -> None:
    """Rows of pictures with a label at the left of each and titles above the columns."""
    width, height = cells[0][0].width + 4, cells[0][0].height + 4
    left, top = 150 * any(labels), 24 * any(titles)
    size = left + max(map(len, cells)) * width, top + len(cells) * height
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((left + column * width + 2, 4), title, "black", font)
    for row, (label, pictures) in enumerate(zip(labels, cells)):
        y = top + row * height
        ImageDraw.Draw(sheet).text((6, y + height // 2 - 10), label, "black", font)
        for column, cell in enumerate(pictures):
            sheet.paste(cell, (left + column * width, y))
    if FIRST:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    titles = [""] * (count - 2) + ["drawn by its annotator"]
    draw_grid(cells, [site.name for site in sites], titles, path)


def draw_outside(split: data.Split, structures: dict, before: Tensor, after: Tensor,
                 path: Path) -> None:
    """Six images from the greatest loss to the greatest gain by routing: truth, global, routed."""
    scores, cells = [], []
    for truth, *predictions in zip(split.masks, before, after):
        scores.append([np.mean([*dices(p, truth, structures).values()]) for p in predictions])
    order = spread(np.argsort(np.array(scores) @ [-1, 1], kind="stable"), 6)
    for i in order:
        truth, image = (split.masks[i], GREEN), split.shown(i)
        outlines = ([], [truth], [truth, (before[i], ORANGE)], [truth, (after[i], BLUE)])
        cells.append([picture(image, outline) for outline in outlines])
    labels = [f"Dice {100 * scores[i][0]:.0f} to {100 * scores[i][1]:.0f}" for i in order]
    draw_grid(cells, labels, ["image", "truth (green)", "global (orange)", "routed (blue)"], path)


def dices(prediction, truth, structures: dict) -> dict[str, float]:
    """Dice of each structure of two masks of one shape."""
    return {name: iopfl.dice(np.isin(prediction, classes), np.isin(truth, classes))
            for name, classes in structures.items()}


def draw_heat_map(rows: dict[str, list], columns: list[str], path: Path) -> None:
    """Numbers by row from white, the least, to blue, the largest; nan is grey. No rows: nothing."""
    numbers = [value for values in rows.values() for value in values if not math.isnan(value)]
    cells = []
    for values in rows.values():
        cells.append([Image.new("RGB", (72, 18), "lightgrey") for _ in values])
        for cell, value in zip(cells[-1], values):
            if not math.isnan(value):
                share = (value - min(numbers)) / max(max(numbers) - min(numbers), 1e-6)
                cell.paste((int(255 - 200 * share), int(255 - 130 * share), 255), (0, 0, 72, 18))
                ImageDraw.Draw(cell).text((22, 3), f"{value:.2f}", "black")
    if cells:
        draw_grid(cells, [label[:22] for label in rows], [title[:11] for title in columns], path)


# ---------------------------------------------------------------- a look at the images
def show(args, out: Path) -> int:
    """What is there: sites, cases, sizes, spacings, shares of the classes, and a gallery."""
    dataset = load_dataset(args, args.seeds[0])
    drawn = ", labels above 0 being prostate" if dataset.kind == "volumes" else ""
    print(f"{len(dataset.sites)} sites, {dataset.kind}{drawn}; {dataset.channels} channels, "
          f"classes 0 to {dataset.classes - 1}")
    element = "resized voxel, mm" if dataset.unit == "mm" else "resized pixel"
    shares = "".join(f"{f'class {c}, %':>12}" for c in range(dataset.classes))
    print(f"{'':19}{'cases':>19}")
    print(f"{'site':19}  train   val  test  images  {'size as read':26}{element:26}{shares}")
    for site in dataset.sites:
        split = site.everything
        train, val, test = (len({*s.cases}) for s in (site.train, site.validation, site.test))
        line = f"{site.name:19.18}{train:7}{val:6}{test:6}{len(split.cases):8}  "
        for sizes in (site.shapes or [split.masks.shape[1:]], site.spacing.values()):
            least, most = ("×".join(f"{n:.4g}" for n in size) for size in (min(sizes), max(sizes)))
            line += f"{least if least == most else f'{least} … {most}':26}"
        shares = torch.bincount(split.masks.flatten(), minlength=dataset.classes)
        print(line + "".join(f"{100 * n / split.masks.numel():12.2f}" for n in shares.tolist()))
    path = out.with_name(out.name + "-hospitals.png")
    draw_hospitals(dataset.sites, path)
    print(f"Images of each, the last two with their masks: {path}")
    if args.save_images:  # of the last site, which a training holds out
        folder = Path(args.save_images)
        for number, mask in enumerate(split.masks.numpy()):
            name = f"{split.cases[number]}.png"
            planes = split.shown(number).numpy().transpose(1, 2, 0)
            planes = np.interp(planes, (planes.min(), planes.max()), (0, 255)).astype(np.uint8)
            for kind, pixels in (("images", planes.squeeze()), ("masks", mask)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / kind / name)
        print(f"Images and masks of {site.name}: {folder}")
    return 0


# ---------------------------------------------------------------- unlabelled images (--adapt)
def open_trained(path: Path, device: str) -> tuple[dict, list, router.RoutedNetwork | None]:
    """What is known of a run, and its models; of what --adapt wrote the routed network instead."""
    runs = [folder for folder in (path, *sorted(path.glob("seed*")))
            if folder.name.endswith("-iopfl") and (folder / "rows.json").exists()]
    again = (path / "adapted.json").exists()
    if not again and len(runs) != 1:
        raise WrongUse(f"{path}: expected one finished federation of iopfl, found {len(runs)}"
                       + "".join(f"; --adapt {folder}" for folder in runs[:6]))
    keys = ("channels", "classes", "width", "depth", "size", "kind", "structures", "mask_values",
            "precision", "authors", *["experts"] * again)
    known = load(path / "adapted.json" if again else runs[0].parent / "config.json", dict, *keys)
    model = UNet(known["channels"], known["classes"], known["width"], known["depth"])
    model = model.to(device, memory_format=torch.channels_last)
    if again:
        settings = AUTHORS if known["authors"] else RoutingSettings()
        routed = router.build_routed([model] * len(known["experts"]), settings)
        routed.load_state_dict(load(path / "adapted.pt"))
        routed.keep_start()
        return known, [], routed
    last = load(runs[0] / "last.pt", iopfl.Round)
    seed = load(runs[0] / "rows.json", dict, "rows")["rows"][0]["seed"]
    known |= {"experts": [*last.own, "global"], "seed": seed}
    models = [with_state(model, state) for state in (*last.own.values(), last.global_state)]
    return known, models, None


def adapt_to_folder(args, out: Path) -> int:
    """Masks, overlays and a report for a folder of unlabelled images; 1 if some were left out."""
    begin, folder = time.perf_counter(), Path(args.images).resolve()
    known, models, routed = open_trained(Path(args.adapt).resolve(), args.device)
    if args.online and routed:
        raise WrongUse(f"{args.adapt} was adapted before and is used as it is; leave out --online")
    values = args.mask_values
    if values and (known["kind"] == "volumes" or len(values) != known["classes"]):
        raise WrongUse(f"--mask-values: one for each of the run's {known['classes']} classes; none "
                       "for volumes, whose labels above 0 are prostate")
    known["mask_values"] = values or known["mask_values"]
    pairs = data.pairs_of(folder, args.masks and Path(args.masks).resolve(), strict=False)
    if not pairs:
        raise WrongUse(f"{folder}: no image; PNG, JPEG, TIFF, BMP, GIF and NIfTI are known")
    if args.masks and not any(mask for _, mask in pairs):
        complain(f"--masks {args.masks}: no mask has the name of an image")
    files = ["adapted.json", "adapted.pt", "routing.png"]
    files += chain.from_iterable(written(file) for file, _ in pairs)
    open_folder(args, out, {"adapt": str(Path(args.adapt).resolve()), "images": str(folder),
                            "files": files})
    inputs = {}
    for pair in pairs:
        try:
            inputs[pair] = torch.from_numpy(data.network_input(
                pair[0], data.read_file(pair[0])[0], known["size"], known["channels"],
                known["kind"]))
        except (ValueError, OSError) as error:
            complain(f"left out: {error}")
    if not inputs:
        raise ValueError(f"{folder}: none of the {len(pairs)} files can be used")

    images = torch.cat([*inputs.values()]).to(args.device, memory_format=torch.channels_last)
    with autocast(args.device, enabled=known["precision"] == "bf16"):
        if routed:
            probabilities = router.predict(routed, images)
        else:
            method = OUTSIDE["routing-authors" if known["authors"] else "routing"]
            probabilities, routed = method(models, data.Split(images, None, None), known["seed"],
                                           online=args.online)
        overlaps, weights = agreements(routed, images, probabilities), mean_routing(routed, images)
    rows, sizes = [], [len(own) for own in inputs.values()]
    for pair, *found in zip(inputs, probabilities.split(sizes), overlaps.split(sizes)):
        try:
            rows.append(write_masks(*pair, *found, known, out))
        except (ValueError, OSError) as error:  # it was there a moment ago
            complain(f"left out: {error}")

    draw_heat_map(weights, known["experts"], out / "routing.png")
    chosen = dict(zip(known["experts"], np.mean([*weights.values()], axis=0).tolist()))
    save(out / "adapted.pt", iopfl.snapshot(routed))
    save(out / "adapted.json", known | {"chosen": chosen, "rows": rows})
    shares = ", ".join(f"{name} {weight:.2f}" for name, weight in chosen.items())
    print(f"What routing chose, mean over layers and images: {shares}")
    for key in [*dict.fromkeys(chain(*rows))][1:]:  # without a mask no Dice
        values = [row[key] for row in rows if key in row]
        print(f"{key}: mean {np.mean(values):.3f}, least {min(values):.3f}, {len(values)} files")
    print(f"{len(rows)} of {len(pairs)} files in {time.perf_counter() - begin:.0f} s: {out}")
    return int(len(rows) < len(pairs))


@torch.no_grad()
def agreements(routed: router.RoutedNetwork, images: Tensor, probabilities: Tensor) -> Tensor:
    """For each image overlap and size (N, 2) of the foreground in it and a noisy, turned view."""
    generator, size, found = seeded(0, images.device), routed.settings.batch_size, []
    for batch, p in zip(images.split(size), probabilities.split(size)):
        p, q = 1 - p[:, 0], 1 - router.in_another_view(routed, batch, generator)[:, 0]
        found.append(torch.stack([2 * p * q, p * p + q * q], dim=1).sum(dim=(2, 3)))
    return torch.cat(found)


def written(file: Path) -> tuple[str, str]:
    """Where --adapt writes the mask and the overlay of an image or a volume."""
    name, ending = data.stem(file), "nii.gz" if data.is_volume(file) else "png"
    return f"masks/{name}.{ending}", f"overlays/{name}.png"


def write_masks(file: Path, mask_file: Path | None, probabilities: Tensor, overlaps: Tensor,
                known: dict, out: Path) -> dict:
    """Mask and overlay of a file at its own size; its row of adapted.json, Dice if it has a mask.
    probabilities (n, C, h, w), n: the slices of a volume or 1; overlaps (n, 2) of `agreements`."""
    pixels, affine = data.read_file(file)
    large = [nn.functional.interpolate(p[None], pixels.shape[1:3], mode="bilinear").argmax(dim=1)
             for p in probabilities]  # one by one: at their own size all need much memory
    mask = torch.cat(large).byte().cpu().numpy()  # (n, H, W)
    overlap, size = overlaps.sum(dim=0).tolist()
    row = {"file": file.name, "confidence": overlap / max(size, 1e-6),
           "foreground": float((mask > 0).mean())}
    try:
        if mask_file:
            truth = data.read_truth(mask_file, known["mask_values"], known["kind"], mask.shape,
                                    known["classes"], affine)
            scores = dices(mask, truth, known["structures"])
            row |= {f"Dice {structure}": value for structure, value in scores.items()}
    except (ValueError, OSError) as error:
        complain(f"not scored: {error}")
    target, overlay = (out / name for name in written(file))
    for path in (target, overlay):
        path.parent.mkdir(exist_ok=True)
    if data.is_volume(file):
        data.write_volume(target, mask, file)
    else:
        image = Image.fromarray(mask[0])
        image.putpalette(PALETTE)
        image.save(target)
    filled, scale = np.flatnonzero(mask.any(axis=(1, 2))), min(1, 480 / max(mask.shape[1:]))
    shown = spread(filled if len(filled) else np.arange(len(mask)), 6)
    size = tuple(max(1, round(side * scale)) for side in mask.shape[:0:-1])
    cells = [picture(pixels[i].transpose(2, 0, 1), [(mask[i], BLUE)], size) for i in shown]
    titles = [f"slice {i}" for i in shown] if data.is_volume(file) else [""]
    draw_grid([cells], [""], titles, overlay)
    return row


# ---------------------------------------------------------------- the command line
# name: where it works ("t" training, "l" --list, "a" --adapt; "*": training, and it decides about
# the results, so that --resume compares it), type, default, help, and the words, or the least and
# the most, that are allowed.
OPTIONS = {
    "task": ("*l", str, "prostate", "which simulated hospitals", "prostate", "fundus"),
    "root": ("*l", str, None, "folders of real images instead, one a site; layouts in README.md"),
    "mask_values": ("*la", [int], None, "grey values of the classes in masks, background first"),
    "size": ("*l", int, 96, "height and width of an image, in pixels", 1, 4096),
    "sites": ("*l", int, 6, "number of simulated hospitals", 1, 10**6),
    "images_per_site": ("*l", int, 60, "simulated: 60 per cent train, 15 validate", 4, 10**6),
    "save_images": ("l", str, None, "folder for the last hospital's images and masks, as PNG"),
    "skip_empty": ("*l", bool, False, "slices without prostate do not train"),
    "list": ("l", bool, False, "show what the images are and end"),
    "adapt": ("a", str, None, "a trained run, a folder seed… of it, or what --adapt wrote"),
    "images": ("a", str, None, "with --adapt: folder of PNG, JPEG, TIFF, BMP, GIF or NIfTI files"),
    "masks": ("a", str, None, "with --adapt: folder of masks of the same names, to report Dice"),
    "online": ("a", bool, False, "with --adapt: one step a batch, as images come"),
    "hold_out": ("*", str, None, "hospital outside: a name, all (in turn) or none; else the last"),
    "seeds": ("*l", [int], [0], "one federation for each"),
    "methods": ("t", [str], ["fedavg", "iopfl", "global", "average", "routing"],
                f"all, ablations or some of {', '.join(KNOWN)}; all and ablations are those inside "
                "with --hold-out none, else those outside"),
    "rounds": ("*", int, 30, "federated rounds", 1, 10**6),
    "participation": ("*", float, 1.0, "share of the hospitals in a round, drawn anew", 1e-12, 1),
    "local_epochs": ("*", int, 1, "epochs of local training a round", 1, 10**6),
    "batch_size": ("*", int, 5, "images a step of training", 1, 10**6),
    "lr": ("*", float, 1e-3, "learning rate of Adam", 1e-12, 1000),
    "alpha": ("*", float, METHODS["iopfl"].alpha, "what a personalised model keeps (M2)", 0, 1),
    "width": ("*", int, 16, "channels of the U-Net's top level", 1, 1024),
    "depth": ("*", int, 3, "levels of the U-Net below the top", 1, 10),
    "authors": ("*", bool, False, "as published: 100 rounds, alpha 0.1 (if not given), AUTHORS"),
    "device": ("*la", str, "auto", "where to compute", "auto", "cpu", "cuda"),
    "precision": ("*", str, "fp32", "bf16: convolutions in bfloat16", "fp32", "bf16"),
    "threads": ("*la", int, None, "on the CPU, a process; the same number: the same bits", 1, 1024),
    "out": ("tla", str, None, "folder for models, pictures, results.json (default runs/<name>)"),
    "resume": ("t", bool, False, "go on with the unfinished run of these settings"),
    "overwrite": ("ta", bool, False, "remove the run that lies in --out first"),
}
FOLDERS = ("root", "images", "masks", "adapt")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise WrongUse(f"{message}; --help shows all options")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, (_, kind, default, text, *allowed) in OPTIONS.items():
        options = {"type": kind, "choices": allowed if kind is str and allowed else None}
        if isinstance(kind, list):
            options = {"type": kind[0], "nargs": "+"}
        elif kind is bool:
            options = {"action": "store_true"}
        options["help"] = text + f" (default {default})" * bool(default)
        parser.add_argument("--" + name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    defaults = {name: default for name, (_, _, default, *_) in OPTIONS.items()}
    published = {"rounds": 100, "alpha": 0.1} if given.get("authors") else {}
    args = argparse.Namespace(**defaults | published | given)
    check(args, given)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def check(args: argparse.Namespace, given: dict) -> None:
    """WrongUse where an option does nothing, is out of range, or does not go with another."""
    mode = "--adapt" if "adapt" in given else "--list" if "list" in given else "training"
    idle = {"mask_values", "skip_empty"}
    if args.root:
        idle = {"task", "sites", "images_per_site", "save_images"}
    for name, value in given.items():
        (modes, kind, _, _, *allowed), flag = OPTIONS[name], "--" + name.replace("_", "-")
        if mode.strip("-")[0] not in modes.replace("*", "t") or mode != "--adapt" and name in idle:
            raise WrongUse(f"{flag} would do nothing here ({mode}); leave it out")
        if kind in (int, float) and not allowed[0] <= value <= allowed[1]:
            raise WrongUse(f"{flag} {value}: not in {allowed[0]} … {allowed[1]}")
        if name in FOLDERS and not (value and Path(value).is_dir()):
            raise WrongUse(f"{flag} {value}: no such folder")
    unknown, values = {*args.methods} - {"all", "ablations", *KNOWN}, args.mask_values or [0, 1]
    repeated = len({*args.seeds}) < len(args.seeds)
    for wrong, message in (
            (args.width * 2**args.depth > 2**13, f"--width, --depth: more than {2**13} channels"),
            (unknown, f"--methods: {', '.join(sorted(unknown))} unknown; --help names them all"),
            (not 0 <= min(args.seeds) <= max(args.seeds) < 2**32 or repeated,
             "--seeds must be different numbers from 0 to 2^32 - 1"),
            (not 1 < len({*values}) == len(values) <= 256,
             "--mask-values must be 2 to 256 different numbers, one a class"),
            (args.resume and args.overwrite, "--resume or --overwrite, not both"),
            ((args.adapt is None) != (args.images is None), "--adapt and --images go together"),
            (args.adapt and args.mask_values and not args.masks, "--mask-values goes with --masks"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU"),
            (args.save_images and Path(args.save_images).exists(), "--save-images: it exists"),
            (args.out == "", "--out must not be empty")):
        if wrong:
            raise WrongUse(message)


def join_processes(args) -> None:
    """Where torchrun started this script several times: one group, each with its own GPU."""
    if not TORCHRUN:
        return
    if args.adapt or args.list:
        raise WrongUse("torchrun shares federations among processes; leave out --adapt and --list")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    beside = int(os.environ["LOCAL_WORLD_SIZE"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.threads = args.threads or max(1, cores // beside)  # torchrun leaves one
    dist.init_process_group("gloo", timeout=timedelta(days=1))  # one that dies is noticed at once
    if not FIRST:
        warnings.simplefilter("ignore")
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def keep_memory() -> None:
    """glibc returns large blocks to the system, and each page of the next one is a fault: keeping
    them saves a tenth of training, and a third of adapting to large images."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no blocks apart
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is returned


def main(argv: list[str] | None = None) -> int:
    warnings.showwarning = lambda message, *_: complain(str(message))
    with suppress(AttributeError):  # not every stream can
        # Names of files need not be text.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        join_processes(args)
        torch.set_num_threads(args.threads or torch.get_num_threads())
        torch.backends.cudnn.deterministic = True
        args.threads = torch.get_num_threads()
        keep_memory()
        name = "adapted" if args.adapt else Path(args.root or args.task).resolve().name
        out = Path(args.out or f"runs/{name}").resolve()
        if args.adapt:
            return adapt_to_folder(args, out)
        with autocast(args.device, enabled=args.precision == "bf16"):
            return show(args, out) if args.list else train(args, out)
    except KeyboardInterrupt:
        complain("interrupted; a training goes on when the same command is given with --resume")
        return 130
    except Exception as error:
        if os.environ.get("IOPFL_TRACEBACK"):
            raise
        if not isinstance(error, (ValueError, OSError, ImportError)):
            error = f"{type(error).__name__}: {error} (IOPFL_TRACEBACK=1 shows where)"
        # Of several processes the first one tells what is wrong with the command.
        if FIRST or not (isinstance(error, WrongUse) or "closed by peer" in str(error)):
            complain(str(error))
        return 2 if isinstance(error, WrongUse) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if TORCHRUN:  # threads of gloo may crash in an orderly end
        os._exit(status)
    sys.exit(status)
