"""IOP-FL from start to finish: federated rounds, personalised models inside, routing outside, a report.

    python train.py                               simulated prostate MRI, the last hospital held out
    python train.py --task fundus                 simulated fundus photographs
    python train.py --root DIR --hold-out SITE    a folder of real images
"""

import argparse
import json
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import iopfl
import router
from models import UNet


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="What adaptation does at test time: router.RoutingSettings.")
    defaults = {"task": "prostate", "size": 96, "sites": 6, "images_per_site": 60, "seeds": [0], "rounds": 30,
                "local_epochs": 1, "batch_size": 5, "lr": 1e-3, "alpha": 0.5, "width": 16, "depth": 3,
                "device": "auto"}

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
    add(group, "--root", "folder of real images instead: DIR/<site>/images and DIR/<site>/masks", metavar="DIR")
    add(group, "--mask-values", "grey values of the classes in real masks, background first, such as 0 128 255",
        type=int, nargs="+", metavar="V")
    add(group, "--size", "height and width of an image, in pixels")
    add(group, "--sites", "number of simulated hospitals")
    add(group, "--images-per-site", "images of a simulated hospital: 60 per cent train, 15 validate, 25 test")
    group = parser.add_argument_group("protocol")
    add(group, "--hold-out", "hospital outside the federation, all (each in turn) or none (default the last)",
        metavar="SITE")
    add(group, "--seeds", "one federation for each seed", type=int, nargs="+", metavar="N")
    group = parser.add_argument_group("federation")
    add(group, "--rounds", "federated rounds")
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
    add(group, "--out", "folder for models, pictures and results.json (default runs/<task>)", metavar="DIR")
    group.add_argument("--overwrite", action="store_true", help="replace the run that lies in --out")
    args = parser.parse_args(argv)
    if args.authors:
        parser.set_defaults(rounds=100, local_epochs=1, batch_size=5, lr=1e-3, alpha=0.1)
        args = parser.parse_args(argv)
    for name in ("size", "sites", "rounds", "local_epochs", "batch_size", "lr", "width", "depth"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha must lie in [0, 1], not {args.alpha}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds must be different numbers, 0 or more")
    if args.images_per_site < 4:
        parser.error(f"--images-per-site must be at least 4, not {args.images_per_site}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; use --device cpu")
    if args.mask_values and len(set(args.mask_values)) < len(args.mask_values):
        parser.error("--mask-values must be different numbers, one a class")
    if args.mask_values and not args.root:
        parser.error("--mask-values goes with --root")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def load_sites(args: argparse.Namespace, seed: int) -> tuple[list[data.Site], int, int, dict]:
    """Sites on the chosen device, number of channels, number of classes, and structures by name."""
    if args.root:
        sites, channels, classes = data.load_folder(args.root, args.size, args.mask_values, seed)
        structures = {f"class {c}": (c,) for c in range(1, classes)}
    else:
        sites = data.simulate_sites(args.task, seed, args.size, args.images_per_site, args.sites)
        structures, channels = data.STRUCTURES[args.task], data.CHANNELS[args.task]
        classes = 1 + max(max(classes) for classes in structures.values())
    for site in sites:
        for split in (site.train, site.validation, site.test):
            split.images = split.images.to(args.device, memory_format=torch.channels_last)
            split.masks = split.masks.to(args.device)
    return sites, channels, classes, structures


def hold_outs(choice: str | None, names: list[str]) -> list[str | None]:
    """The hospitals to hold out in turn; None stands for a federation of all."""
    if choice == "none":
        return [None]
    chosen = names if choice == "all" else [choice or names[-1]]
    if chosen[0] not in names:
        raise ValueError(f"--hold-out {choice}: no such site; there are {', '.join(names)}, or all, or none")
    if len(names) < 2:
        raise ValueError(f"a federation and a hospital outside need two sites, there is {names[0]} alone; "
                         f"use --hold-out none")
    return chosen


def routing_settings(args: argparse.Namespace) -> router.RoutingSettings:
    return router.AUTHORS if args.authors else router.RoutingSettings()


# ---------------------------------------------------------------- one federation and its outside hospital
def run(args: argparse.Namespace, seed: int, hold_out: str | None, loaded: tuple, folder: Path,
        seconds: dict) -> list[dict]:
    """Train, personalise, adapt on what `load_sites` gave; save models and pictures in `folder`; return the rows
    of results.json."""
    sites, channels, classes, structures = loaded
    inside = [site for site in sites if site.name != hold_out]
    model = UNet(channels, classes, args.width, args.depth, torch.Generator().manual_seed(seed))
    model = model.to(args.device, memory_format=torch.channels_last)
    folder.mkdir(parents=True)
    print(f"\nseed {seed}, {len(inside)} hospitals inside, outside: {hold_out or 'none'}. "
          f"Validation Dice in %, global / personalised:")

    start = time.perf_counter()
    for state in iopfl.federate(model, {site.name: site.train for site in inside}, args.rounds, alpha=args.alpha,
                                seed=seed, epochs=args.local_epochs, batch_size=args.batch_size, lr=args.lr):
        scores = []
        for site in inside:
            pair = [score(iopfl.with_state(model, s), site.validation, structures)
                    for s in (state.global_state, state.personal[site.name])]
            scores.append(f"{site.name} {100 * pair[0]:.1f}/{100 * pair[1]:.1f}")
        left = (time.perf_counter() - start) * (args.rounds / state.number - 1)
        print(f"round {state.number:3d}/{args.rounds}  {'  '.join(scores)}  {left:4.0f} s left", flush=True)
    seconds["federation"] += time.perf_counter() - start

    start = time.perf_counter()
    rows = []

    def report(phase: str, method: str, site: data.Site, split: data.Split, prediction: Tensor) -> None:
        for row in iopfl.evaluate(prediction, split.masks, split.cases, structures, site.spacing):
            rows.append({"phase": phase, "method": method, "seed": seed, "hold_out": hold_out,
                         "site": site.name, **row})

    global_model = iopfl.with_state(model, state.global_state)
    personal = [iopfl.with_state(model, state.personal[site.name]) for site in inside]
    save(folder / "global.pt", state.global_state)
    for site, own in zip(inside, personal):
        save(folder / f"personal-{site.name}.pt", own.state_dict())
        report("inside", "fedavg", site, site.test, iopfl.predict(global_model, site.test.images))
        report("inside", "iopfl", site, site.test, iopfl.predict(own, site.test.images))
    seconds["evaluation"] += time.perf_counter() - start

    if hold_out:
        start = time.perf_counter()
        site = next(site for site in sites if site.name == hold_out)
        split = site.everything()  # no label of it was used: every image is a test image
        experts = [*personal, global_model]
        average = iopfl.with_state(model, iopfl.aggregate((m.state_dict() for m in experts), [1] * len(experts)))
        routed = router.build_routed(experts, routing_settings(args), torch.Generator().manual_seed(seed))
        generator = torch.Generator(args.device).manual_seed(seed)
        predictions = {"global": iopfl.predict(global_model, split.images),
                       "average": iopfl.predict(average, split.images),
                       "routing": router.adapt(routed, split.images, generator=generator).argmax(dim=1)}
        for method, prediction in predictions.items():
            report("outside", method, site, split, prediction)
        save(folder / "adapted.pt", routed.state_dict())
        seconds["outside"] += time.perf_counter() - start
        start = time.perf_counter()
        draw_outside(split, predictions, folder / "outside.png")
        draw_routing(*router.mean_routing(routed, split.images), [*(s.name for s in inside), "global"],
                     folder / "routing.png")
        seconds["pictures"] += time.perf_counter() - start
    return rows


def score(model: torch.nn.Module, split: data.Split, structures: dict) -> float:
    """Mean Dice over the structures."""
    prediction = iopfl.predict(model, split.images)
    return float(np.mean([row["dice"] for row in iopfl.evaluate(
        prediction, split.masks, split.cases, structures, (1, 1), distances=False)]))


def save(path: Path, state: dict) -> None:
    """A state on the CPU, readable by `torch.load(path, weights_only=True)`."""
    torch.save({name: value.cpu() for name, value in state.items()}, path)


# ---------------------------------------------------------------- tables
def table(rows: list[dict], phase: str, unit: str) -> str:
    """Dice in % by site, mean ± standard deviation over seeds; best method of a column marked with *."""
    rows = [row for row in rows if row["phase"] == phase]
    sites, methods, structures, seeds = (list(dict.fromkeys(row[key] for row in rows))
                                         for key in ("site", "method", "structure", "seed"))

    def per_seed(key: str, method: str, chosen_structures: list, chosen_sites: list) -> np.ndarray:
        """Mean over structures and sites, one number a seed."""
        return np.array([np.mean([row[key] for row in rows if row["seed"] == seed and row["method"] == method
                                  and row["structure"] in chosen_structures and row["site"] in chosen_sites
                                  and row[key] is not None] or [np.nan]) for seed in seeds])

    columns = [("dice", [site], site) for site in sites]
    if len(sites) > 1:
        columns.append(("dice", sites, "mean"))
    columns += [("hd95", sites, f"HD95 {unit}"), ("assd", sites, f"ASSD {unit}")]
    groups = [(structure, [structure]) for structure in structures]
    if len(structures) > 1:
        groups.append(("mean", structures))
    width = 2 + max(11 if len(seeds) > 1 else 7, *(len(title) for *_, title in columns))
    lines = [f"{'':22}" + "".join(f"{title:>{width}}" for *_, title in columns)]
    for label, group in groups:
        values = {m: [per_seed(key, m, group, chosen) for key, chosen, _ in columns] for m in methods}
        for method in methods:
            cells = []
            for number, (key, *_) in enumerate(columns):
                means = [values[m][number].mean() for m in methods]
                mean, std = values[method][number].mean(), values[method][number].std()
                best = max(means) if key == "dice" else min(means)
                scale, digits = (100, 1) if key == "dice" else (1, 2)
                spread = f"±{scale * std:.{digits}f}" if len(seeds) > 1 else ""
                cells.append(f"{scale * mean:.{digits}f}{spread}{'*' if mean == best else ' '}".rjust(width))
            lines.append(f"{label:11.11}{method:11}" + "".join(cells))
    missing = sum(row["cases"] - row["distance_cases"] for row in rows)
    if missing:
        lines.append(f"HD95 and ASSD leave out {missing} of {sum(row['cases'] for row in rows)} cases: no mask at all")
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures
GREEN, ORANGE, BLUE = (60, 220, 60), (255, 150, 0), (60, 150, 255)


def picture(image: Tensor, contours: list[tuple[Tensor, tuple]] = (), side: int = 160) -> Image.Image:
    """An image (C, H, W) as RGB, with the outlines of every class of some masks (H, W), the last on top."""
    values = image.cpu().numpy()
    low, high = np.quantile(values, [0.005, 0.995])
    values = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    values = np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)
    canvas = Image.fromarray((255 * values).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.array(canvas)
    for mask, colour in contours:
        large = mask.cpu().numpy().astype(np.uint8)
        for level in range(1, int(large.max()) + 1):
            # A smoothed enlargement, cut at one half, has a clean outline.
            region = Image.fromarray(255 * (large >= level).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
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
    count = min(6, min(len(site.train.images) for site in sites))
    cells = [[picture(site.train.images[i], [(site.train.masks[i], GREEN)] if i >= count - 2 else [])
              for i in range(count)] for site in sites]
    titles = [""] * (count - 2) + ["drawn by its annotator"] if count > 2 else []
    draw_grid(cells, [site.name for site in sites], titles, path)


def draw_outside(split: data.Split, predictions: dict[str, Tensor], path: Path) -> None:
    """Cases outside from the worst to the best routed one: truth, global and routed contours."""
    scores = [iopfl.dice((p > 0).cpu().numpy(), (m > 0).cpu().numpy())
              for p, m in zip(predictions["routing"], split.masks)]
    order = np.argsort(scores, kind="stable")[np.linspace(0, len(scores) - 1, min(6, len(scores))).astype(int)]
    cells, labels = [], []
    for i in order:
        truth = (split.masks[i], GREEN)
        cells.append([picture(split.images[i]), picture(split.images[i], [truth]),
                      picture(split.images[i], [truth, (predictions["global"][i], ORANGE)]),
                      picture(split.images[i], [truth, (predictions["routing"][i], BLUE)])])
        labels.append(f"Dice {100 * scores[i]:.1f}")
    draw_grid(cells, labels, ["image", "truth (green)", "global (orange)", "routed (blue)"], path)


def draw_routing(layers: list[str], weights: Tensor, experts: list[str], path: Path) -> None:
    """Heat map of mean routing weights (layers, experts), scaled to the largest one."""
    width, height, left, top = 74, 20, 150, 26
    sheet = Image.new("RGB", (left + width * len(experts), top + height * len(layers) + 6), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, expert in enumerate(experts):
        draw.text((left + column * width + 4, 6), expert[:11], "black", font)
    for row, (layer, values) in enumerate(zip(layers, weights.cpu().tolist())):
        draw.text((6, top + row * height + 3), layer.removeprefix("network.")[:22], "black", font)
        for column, value in enumerate(values):
            share = value / max(float(weights.max()), 1e-6)
            box = (left + column * width, top + row * height, left + (column + 1) * width - 2, top + (row + 1) * height - 2)
            draw.rectangle(box, fill=(int(255 - 200 * share), int(255 - 130 * share), 255))
            draw.text((box[0] + 22, box[1] + 2), f"{value:.2f}", "black", font)
    sheet.save(path)


# ---------------------------------------------------------------- the whole
def main(argv: list[str] | None = None) -> int:
    begin = time.perf_counter()
    args = parse_arguments(argv)
    out = Path(args.out or f"runs/{Path(args.root).resolve().name if args.root else args.task}").resolve()
    unfinished = out.with_name(out.name + ".unfinished")  # takes the place of `out` when all is done
    seconds = {"data": 0.0, "federation": 0.0, "evaluation": 0.0, "outside": 0.0, "pictures": 0.0}
    try:
        if out.exists() and not (args.overwrite and (out / "results.json").is_file()):
            way_out = "say --overwrite or another --out" if (out / "results.json").is_file() else (
                "it holds no run of this script; say another --out")
            raise ValueError(f"{out} exists; {way_out}")
        loaded = load_sites(args, args.seeds[0])
        chosen = hold_outs(args.hold_out, [site.name for site in loaded[0]])
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    seconds["data"] = time.perf_counter() - begin
    torch.backends.cudnn.deterministic = True
    try:
        draw_hospitals(loaded[0], unfinished / "hospitals.png")
        rows = []
        for seed in args.seeds:
            if seed != args.seeds[0]:
                start = time.perf_counter()
                loaded = load_sites(args, seed)
                seconds["data"] += time.perf_counter() - start
            for hold_out in chosen:
                rows += run(args, seed, hold_out, loaded, unfinished / f"seed{seed}-{hold_out or 'all-inside'}", seconds)
        seconds["total"] = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
        environment = {"python": sys.version.split()[0], "torch": torch.__version__, "device": args.device,
                       "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
                       "threads": torch.get_num_threads(), "peak_memory_mib": round(peak)}
        (unfinished / "results.json").write_text(json.dumps(
            {"config": {**vars(args), "routing": asdict(routing_settings(args))}, "environment": environment,
             "seconds": {name: round(value, 1) for name, value in seconds.items()}, "rows": rows}, indent=1))
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unit = "px" if args.root or args.task == "fundus" else "mm"
    print(f"\nInside, test images, Dice in %\n{table(rows, 'inside', unit)}")
    if chosen != [None]:
        print(f"\nOutside, all images of the hospital held out, Dice in %\n{table(rows, 'outside', unit)}")
    print(f"\n{seconds['total']:.0f} s, peak memory {peak:.0f} MiB. Models, pictures and results.json: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
