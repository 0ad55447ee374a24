"""Masks for a folder of images without labels, by the models of a finished run of train.py.

    python -m examples.adapt_folder RUN IMAGES --out DIR                adapt to all, then predict
    python -m examples.adapt_folder RUN IMAGES --out DIR --online       one step a batch, in order
    python -m examples.adapt_folder RUN IMAGES --out DIR --masks MASKS  report Dice as well
    python -m examples.adapt_folder RUN --simulated --out DIR           try it without such a folder

RUN is the folder of a run or of one of its federations (seed…-plain), or the DIR of an earlier
call, whose network is then applied as it is. IMAGES holds images or NIfTI volumes of the kind that
RUN was trained on. DIR gets masks/ at the files' own sizes, overlays/ (outlines of the masks in
blue and, where RUN is a run, of the global model's in orange), routing.png (what routing chose, by
layer), adapted.json and adapted.pt. Where RUN is a run the files are ordered by agreement: look at
the first ones first. Exit status 1: an image was left out.
"""

import argparse
import gzip
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import iopfl
import router
import train
from examples import folders
from models import UNet


def main(argv: list[str] | None = None) -> None:
    with train.errors_in_one_line():
        left_out = run(parse_arguments(argv))
    sys.exit(1 if left_out else 0)


def run(args: argparse.Namespace) -> int:
    """Adapt to the images, write their masks, report; the number of files that were left out."""
    out = Path(args.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = open_trained(Path(args.run), device)
    train.prepare_torch(args)
    if args.simulated:
        args.images, args.masks = draw_simulated(trained, out)
    facts = dict(trained.config["data"])
    if args.mask_values:
        check_mask_values(args.mask_values, facts)
        facts["mask_values"] = args.mask_values
    pairs, inputs, left_out = read_images(args.images, args.masks, trained.config)

    images = torch.cat(inputs).to(device, memory_format=torch.channels_last)
    with train.autocast(device, trained.config["settings"]["precision"]):
        routed, probabilities = adapt(trained, images, args.online)
        routing = train.routing_of(routed, images)
        by_global, alone = None, []  # an earlier call's network is at hand as a whole only
        for model in trained.models:
            by_global = train.probabilities_of(model, images)  # of the last one, in the end
            alone.append(by_global.argmax(dim=1).byte().cpu().numpy())
    train.draw_heat_map(train.mean_routing(routing), trained.experts, out / "routing.png")
    train.save(out / "adapted.pt", iopfl.snapshot(routed))

    rows, scorer = [], Scorer(facts)
    start = 0
    for (file, mask_file), seen in zip(pairs, inputs):
        part = slice(start, start + len(seen))  # a volume has an input for each of its slices
        start += len(seen)
        pixels, affine = folders.read_file(file)  # (n, H, W, channels)
        own_size = pixels.shape[1:3]
        mask, maps = at_own_size(probabilities[part], own_size)
        outlines = [(mask, train.BLUE)]
        if by_global is not None:
            unadapted = at_own_size(by_global[part], own_size)[0]
            outlines.insert(0, (unadapted, train.ORANGE))
        write_mask(file, mask, out)
        draw_overlay(pixels, outlines, out / "overlays" / f"{folders.stem(file)}.png")
        if args.probabilities:
            write_probabilities(file, maps, out)
        row = {"file": file.name, "foreground": float((mask > 0).mean())}
        if alone:
            small = probabilities[part].argmax(dim=1).cpu().numpy()
            others = [masks[part] for masks in alone]
            row["agreement"] = agreement(small, others, facts["structures"])
        if mask_file:
            row |= scorer.dice(file, mask_file, affine, mask)
        rows.append(row)
    scorer.warn_if_inside_out()
    report(rows, routing, trained, out)
    print(f"{len(pairs)} files, {left_out} left out. Masks and overlays: {out}")
    return left_out


def report(rows: list[dict], routing: dict, trained: "Trained", out: Path) -> None:
    """Print what was found in each file, and in the mean; write adapted.json."""
    in_order = sorted(rows, key=lambda row: row.get("agreement", 0))  # the order of the files else
    for row in in_order:
        values = [f"{key} {value:.3f}" for key, value in row.items() if key != "file"]
        print(f"{row['file']}: {', '.join(values)}")
    for key in max(rows, key=len):  # of the longest row: some have no Dice
        if key != "file":
            found = [row[key] for row in rows if key in row]
            print(f"mean {key} of {len(found)} files: {np.mean(found):.3f}")
    content = vars(trained) | {"rows": rows}
    del content["models"], content["routed"]
    if trained.models:
        lowest = [row["file"] for row in in_order[:math.ceil(len(rows) / 5)]]
        print(f"Look at these first, the lowest fifth by agreement: {', '.join(lowest)}")
        content["sign"] = sign_of_quality(rows)
    print(train.routing_in_words(routing, trained.experts))
    content["weights"] = train.mean_routing(routing)
    means = np.mean(list(content["weights"].values()), axis=0)  # over the layers
    content["chosen"] = dict(zip(trained.experts, means.tolist()))
    content["routing_spread"] = train.routing_spread(routing)
    train.save(out / "adapted.json", content)


# ---------------------------------------------------------------- the trained models
@dataclass
class Trained:
    """What a run, or an earlier call of this script, offers to new images."""

    config: dict  # of the run: its "settings" and, as "data", what its images were like
    seed: int
    hold_out: str | None
    distances_inside: list[float] = field(default_factory=list)  # see `router.fit_to_site`
    experts: list[str] = field(default_factory=list)  # names of the models, the global one last
    models: list[nn.Module] = field(default_factory=list)  # the models, to be routed; or else
    routed: router.RoutedNetwork | None = None  # the network that was adapted before


def open_trained(run: Path, device: str) -> Trained:
    if (run / "adapted.json").exists():
        return open_adapted(run, device)
    folder = find_federation(run)
    config = train.load_config(folder.parent)
    models = load_models(folder, config, device)
    result = train.load(folder / "rows.json", "seed", "hold_out", "distances_inside")
    inside = list(result["distances_inside"].values())
    trained = Trained(config, result["seed"], result["hold_out"], inside)
    trained.experts = list(models)
    trained.models = list(models.values())
    return trained


def open_adapted(folder: Path, device: str) -> Trained:
    """The network that an earlier call has adapted."""
    about = train.load(folder / "adapted.json", "config", "seed", "hold_out", "experts")
    config, experts = about["config"], about["experts"]
    train.check_version(config, folder)
    model = empty_model(config, device)
    settings = routing_settings(config)
    routed = router.build_routed([model] * len(experts), settings)
    routed.load_state_dict(train.load(folder / "adapted.pt"))
    trained = Trained(config, about["seed"], about["hold_out"])
    trained.experts = experts
    trained.routed = routed
    return trained


def finished_federations(run: Path) -> list[Path]:
    """The federations of a run whose models can be routed; a folder of one is that one."""
    candidates = [run, *sorted(run.glob("seed*"))]
    plain = [folder for folder in candidates if folder.name.endswith("-plain")]
    return [folder for folder in plain if (folder / "rows.json").exists()]


def find_federation(run: Path) -> Path:
    """The only finished federation of a run; several, or none, end in one line."""
    finished = finished_federations(run)
    if not finished:
        train.stop(f"{run}: no finished federation seed…-plain of train.py", 2)
    if len(finished) > 1:
        train.stop(f"{run}: name one of its federations, such as {finished[0]}", 2)
    return finished[0].resolve()


def empty_model(config: dict, device: str) -> UNet:
    facts, settings = config["data"], config["settings"]
    width, depth = settings["width"], settings["depth"]
    model = UNet(facts["channels"], facts["classes"], width, depth)
    return model.to(device, memory_format=torch.channels_last)


def load_models(federation: Path, config: dict, device: str) -> dict:
    """The personalised models of a federation by name and, as the last one, the global model."""
    progress = train.load_progress(federation / "last.pt")
    if progress.last is None:
        train.stop(f"{federation}/last.pt is missing", 1)
    if progress.last.number < config["settings"]["rounds"]:
        program = train.program_of(config["settings"])
        train.stop(f"{federation}: interrupted after round {progress.last.number}; go on by "
                   f"{program} --resume {federation.parent}", 1)
    return train.routed_models(empty_model(config, device), progress)


def routing_settings(config: dict) -> router.RoutingSettings:
    if config["settings"]["published"]:
        return router.PUBLISHED
    return router.RoutingSettings()


# ---------------------------------------------------------------- images in
def draw_simulated(trained: Trained, out: Path) -> tuple[str, str]:
    """New images of the run's own hospital outside as PNG files; their folder, and the masks'."""
    if trained.config["data"]["kind"] != "simulated" or trained.hold_out is None:
        train.stop("--simulated: the run has no simulated hospital outside", 2)
    settings = argparse.Namespace(**trained.config["settings"])
    dataset = train.simulated(settings, trained.seed + 1000)  # other images than the run's
    site = next(site for site in dataset.sites if site.name == trained.hold_out)
    split = site.everything
    for number, case in enumerate(split.cases):
        pixels = split.shown(number).numpy().transpose(1, 2, 0)
        pixels = pixels - pixels.min()
        pixels = 255 * pixels / pixels.max()
        pixels = pixels.round().astype(np.uint8)
        image = Image.fromarray(pixels.squeeze())
        mask = Image.fromarray(split.masks[number].numpy())
        train.save_image(image, out / "images" / f"{case}.png")
        train.save_image(mask, out / "truth" / f"{case}.png")
    return str(out / "images"), str(out / "truth")


def check_mask_values(values: list[int], facts: dict) -> None:
    classes = facts["classes"]
    if facts["kind"] == "volumes":
        train.stop("--mask-values: none for volumes, whose labels above 0 are prostate", 2)
    if not len(values) == len(set(values)) == classes:
        train.stop(f"--mask-values: one for each of the run's {classes} classes", 2)


def read_images(images: str, masks: str | None, config: dict) -> tuple:
    """Pairs (file, mask file or None), what a network sees of each, and how many were left out.

    An input is (n, C, size, size), n being the slices of a volume, or 1.
    """
    facts = config["data"]
    kind, channels, size = facts["kind"], facts["channels"], config["settings"]["size"]
    mask_folder = Path(masks) if masks else None
    try:
        every = folders.pair_up(Path(images), mask_folder)
        used = {path for pair in every for path in pair}
        for folder in {images, masks or images}:
            folders.report_left_out(Path(folder), used)
    except (ValueError, OSError) as error:  # two files of one name, a folder that is locked
        train.stop(str(error), 1)
    pairs, inputs = [], []
    for file, mask_file in every:
        try:
            pixels, _ = folders.read_file(file)
            seen = folders.network_input(file, pixels, size, channels, kind)
        except (ValueError, OSError, ImportError) as error:
            train.show_warning(f"left out: {error}")
            continue
        pairs.append((file, mask_file))
        inputs.append(torch.from_numpy(seen))
    if not pairs:
        conversions = folders.to_convert(Path(images).iterdir())
        train.stop(f"{images}: no image or volume that can be used; subfolders are not searched"
                   f"{conversions}", 1)
    if masks and not any(mask_file for _, mask_file in pairs):
        train.show_warning(f"--masks {masks}: no mask has the name of an image")
    return pairs, inputs, len(every) - len(pairs)


# ---------------------------------------------------------------- adapting
def adapt(trained: Trained, images: Tensor, online: bool) -> tuple:
    """The routed network, tuned on the images (N, C_in, H, W), and probabilities (N, C, H, W)."""
    if trained.routed is not None:
        return trained.routed, router.predict(trained.routed, images)
    settings = routing_settings(trained.config)
    generator = train.new_generator(trained.seed)  # of the routers' weights
    routed = router.build_routed(trained.models, settings, generator)
    if settings is not router.PUBLISHED:
        seen = router.in_batches(images, settings.batch_size)[0] if online else images
        inside = trained.distances_inside
        router.fit_to_site(routed, trained.models, seen, inside=inside, online=online)
    return routed, tuned(routed, images, trained.seed, online)


def tuned(routed, images: Tensor, seed: int, online: bool) -> Tensor:
    """Adapt a routed network, offline or batch by batch; return probabilities (N, C, H, W)."""
    if not online:
        return train.adapted(routed, images, seed).probabilities
    batches = router.in_batches(images, routed.settings.batch_size)
    generator = train.new_generator(seed, images.device)
    stream = router.adapt_online(routed, batches, generator=generator)
    return torch.cat(list(stream))


def agreement(mask: np.ndarray, others: list[np.ndarray], structures: dict) -> float:
    """The Dice between a routed mask and the mask of each model alone, mean over models and
    structures; two empty masks agree.

    mask: classes (n, h, w) of one image, or of all slices of a volume, at the size of training;
    others: the same by each model.
    """
    scores = []
    for other in others:
        for classes in structures.values():
            scores.append(iopfl.dice(np.isin(mask, classes), np.isin(other, classes)))
    return float(np.mean(scores))


def sign_of_quality(rows: list[dict]) -> dict[str, float]:
    """How well agreement orders the files by their Dice, mean over structures, where it is known.

    rank_correlation: Spearman's. worst_fifth: the share of the fifth with the least Dice that is in
    the fifth with the least agreement. {} with fewer than five files, or where all are alike.
    """
    pairs = []
    for row in rows:
        dice = [value for key, value in row.items() if key.startswith("Dice ")]
        if dice:
            pairs.append((row["agreement"], np.mean(dice)))
    agreements, scores = np.reshape(pairs, (-1, 2)).T
    if len(pairs) < 5 or np.ptp(agreements) == 0 or np.ptp(scores) == 0:
        return {}
    correlation = np.corrcoef(ranks(agreements), ranks(scores))[0, 1]
    fifth = math.ceil(len(pairs) / 5)
    lowest, worst = np.argsort(agreements)[:fifth], np.argsort(scores)[:fifth]
    share = len(np.intersect1d(lowest, worst)) / fifth
    print(f"agreement and Dice of {len(pairs)} files: rank correlation {correlation:+.2f}; of the "
          f"worst fifth {100 * share:.0f} % are in the lowest fifth")
    return {"rank_correlation": float(correlation), "worst_fifth": share}


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in their order; equal ones share the mean of their places."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which]


# ---------------------------------------------------------------- masks out
def at_own_size(probabilities: Tensor, size: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, C, h, w) at the size (H, W) of the file.

    Returns the mask (n, H, W), uint8, and the probabilities (n, C, H, W), float16.
    """
    masks, maps = [], []
    for plane in probabilities.split(1):  # all at once need much memory
        large = F.interpolate(plane, size, mode="bilinear").cpu()  # (1, C, H, W)
        masks.append(large.argmax(dim=1).byte().numpy())
        maps.append(large.half().numpy())
    return np.concatenate(masks), np.concatenate(maps)


def write_mask(file: Path, mask: np.ndarray, out: Path) -> None:
    """The mask (n, H, W) of an image or volume, in the folder masks."""
    name = folders.stem(file)
    if folders.is_volume(file):
        volume = io.BytesIO(mask_volume(mask, file))
        train.write_whole(out / "masks" / f"{name}.nii.gz", volume)
    else:
        image = Image.fromarray(mask[0])  # its values are class indices …
        image.putpalette(train.PALETTE)  # … and shown in colours
        train.save_image(image, out / "masks" / f"{name}.png")


def mask_volume(mask: np.ndarray, like: Path) -> bytes:
    """A .nii.gz file of a mask in the order of `read_volume`, with axes and affine of `like`."""
    import nibabel
    file = nibabel.load(like)  # the header alone
    ours = [[0, 1], [1, 1], [2, 1]]  # in our own frame no axis is moved or flipped
    to_its_own = nibabel.orientations.ornt_transform(ours, folders.to_our_axes(file.affine))
    mask = nibabel.orientations.apply_orientation(mask.astype(np.uint8), to_its_own)
    header = file.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the grey window of the volume would hide a mask
    volume = type(file)(mask, file.affine, header)
    return gzip.compress(volume.to_bytes(), mtime=0)  # the same mask, the same bytes


def write_probabilities(file: Path, maps: np.ndarray, out: Path) -> None:
    """Probabilities (n, C, H, W) as probabilities/<name>.npy; of a volume n are its slices from
    feet to head."""
    buffer = io.BytesIO()
    np.save(buffer, maps)
    train.write_whole(out / "probabilities" / f"{folders.stem(file)}.npy", buffer)


class Scorer:
    """Compares masks with mask files, which belong to one data set.

    facts: of the images, the "data" of config.json.
    """

    def __init__(self, facts: dict):
        self.facts = facts
        self.colours = {}  # of palettes so far, see `folders.check_palette`
        self.background = []  # its share of each mask file's border

    def dice(self, file: Path, mask_file: Path, affine, mask: np.ndarray) -> dict:
        """Dice of each structure of the mask (n, H, W) of a file; {} if its mask file is no use."""
        kind, classes = self.facts["kind"], self.facts["classes"]
        values = self.facts.get("mask_values")
        try:
            truth = folders.read_mask(mask_file, mask.shape, kind, values, affine, classes, file)
            folders.check_palette(mask_file, self.colours)
        except (ValueError, OSError, ImportError) as error:
            train.show_warning(f"not scored: {error}")
            return {}
        self.background.append(np.mean(folders.border_of(truth) == 0))
        row = {}
        for structure, its_classes in self.facts["structures"].items():
            predicted = np.isin(mask, its_classes)
            true = np.isin(truth, its_classes)
            row[f"Dice {structure}"] = iopfl.dice(predicted, true)
        return row

    def warn_if_inside_out(self) -> None:
        if self.background and np.mean(self.background) < 0.1:
            train.show_warning("less than a tenth of the border of the masks is background: if "
                               "they are inside out, give the value outside first: --mask-values")


def draw_overlay(pixels: np.ndarray, outlines: list[tuple], file: Path) -> None:
    """The image with the outlines of masks; of a volume six slices in which one holds something.

    outlines: pairs of masks (n, H, W) and a colour; the last lies on top.
    """
    held = np.zeros(len(pixels), dtype=bool)
    for masks, _ in outlines:
        held |= masks.any(axis=(1, 2))
    shown = np.flatnonzero(held)
    if len(shown) == 0:
        shown = np.arange(len(pixels))
    height, width = pixels.shape[1:3]
    scale = 480 / max(height, width)
    shown_width = max(1, round(width * scale))
    shown_height = max(1, round(height * scale))
    cells, titles = [], []
    for number in train.evenly_chosen(shown, 6):
        image = pixels[number].transpose(2, 0, 1)
        of_slice = [(masks[number], colour) for masks, colour in outlines]
        cell = train.picture(image, of_slice, (shown_width, shown_height))
        cells.append(cell)
        titles.append(f"slice {number}")
    if len(pixels) == 1:
        titles = []
    train.draw_grid([cells], labels=[""], titles=titles, file=file)


# ---------------------------------------------------------------- the command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = train.Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN")
    add("images", metavar="IMAGES", nargs="?")
    add("--out", required=True, help="a new or empty folder")
    add("--masks", help="a folder with masks of the same names, to report Dice")
    add("--mask-values", type=int, nargs="+", help="their grey values, if they are not the run's")
    add("--online", action="store_true", help="one step a batch, in order")
    add("--probabilities", action="store_true", help="write them too, as numpy files")
    add("--simulated", action="store_true", help="draw new images of the run's hospital outside")
    add("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    args = parser.parse_intermixed_args(argv)  # IMAGES may stand behind the options
    for name in ("run", "images", "masks", "out"):
        if getattr(args, name):
            path = Path(getattr(args, name)).expanduser()
            setattr(args, name, str(path.resolve()))
    if not 1 <= args.threads <= train.MOST_THREADS:
        parser.error(f"--threads must lie between 1 and {train.MOST_THREADS}")
    if (args.images is None) != args.simulated:
        parser.error("name a folder of images, or else say --simulated")
    if args.simulated and args.masks:
        parser.error("--simulated draws its own masks; leave out --masks")
    if args.mask_values and not args.masks:
        parser.error("--mask-values goes with --masks")
    for folder in (args.run, args.images, args.masks):
        if folder is not None and not Path(folder).is_dir():
            parser.error(f"{folder}: no such folder")
    if args.online and (Path(args.run) / "adapted.json").exists():
        parser.error(f"{args.run} was adapted before and is used as it is; leave out --online")
    train.check_out(Path(args.out), args.images, parser)
    return args


if __name__ == "__main__":
    main()
