"""train.py on folders of real images: look first, then train.

    python -m examples.own_images DIR --list                what the images are
    python -m examples.own_images DIR --hold-out SITE       train; SITE is the hospital outside
    python -m examples.own_images --resume RUN              go on with a run
    python -m examples.own_images DIR --resume RUN          the same, of images that were moved

DIR holds one folder a hospital (docs/usage.md). All options of train.py are here too, but for those
of simulated images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import data
import train
from examples import folders


def main(argv: list[str] | None = None) -> None:
    with train.errors_in_one_line():
        args = parse_arguments(argv)
        if args.list:
            look_at_images(args)
        else:
            train.run(args, read_images)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = train.Parser(__doc__)
    images = parser.add_argument_group("images")
    add = images.add_argument
    add("root", metavar="DIR", nargs="?", help="the folder that holds one folder a hospital")
    add("--mask-values", type=int, nargs="+", help="grey values of the classes in their masks")
    add("--list", action="store_true", help="show what the images are and end")
    args = train.parse_training(parser, argv, images, may_change=("root",))
    if args.root is None:
        parser.error("name the folder of the images, DIR")
    args.root = str(Path(args.root).expanduser().resolve())
    if not Path(args.root).is_dir():
        parser.error(f"DIR {args.root}: no such folder")
    if args.out and not args.resume:
        train.check_out(Path(args.out), args.root, parser)
    return args


def read_images(args: argparse.Namespace, seed: int) -> data.DataSet:
    """The source of the images: the folder DIR, split by this seed where it is not split."""
    try:
        return folders.load_folder(args.root, args.size, args.mask_values, seed)
    except (ValueError, OSError, ImportError) as error:  # they name the file and a way out
        train.stop(str(error), 1)


def images_of_run(settings: argparse.Namespace, seed: int) -> data.DataSet:
    """The images of any run, simulated or not, from its settings."""
    if hasattr(settings, "root"):
        return read_images(settings, seed)
    return train.simulated(settings, seed)


# ---------------------------------------------------------------- a look at the images
def look_at_images(args: argparse.Namespace) -> None:
    """Print what each hospital has, and draw some of its images."""
    dataset = read_images(args, args.seeds[0])
    print(f"{len(dataset.sites)} hospitals, {dataset.kind}, {dataset.channels} channels")
    for site in dataset.sites:
        parts = {"train": site.train, "validation": site.validation, "test": site.test}
        counts = [f"{len(set(part.cases))} {name}" for name, part in parts.items()]
        masks = site.everything.masks
        pixels = torch.bincount(masks.flatten(), minlength=dataset.classes)
        percent = 100 * pixels / masks.numel()
        shares = [f"{share:.2f}" for share in percent.tolist()]
        print(f"{site.name}: {len(masks)} images; cases: {', '.join(counts)}")
        print(f"    sizes as read    {extent(site.shapes)}")
        print(f"    resized pixels   {extent(site.spacing.values())} {dataset.unit}")
        print(f"    classes          {', '.join(shares)} % of all pixels")
        if site.resized_dice:
            mean, least = 100 * np.mean(site.resized_dice), 100 * min(site.resized_dice)
            print(f"    masks resized and brought back: Dice {mean:.1f} %, least {least:.1f} %")
    file = Path(args.out or "runs") / f"{dataset.name}-hospitals.png"
    labels = train.labels_of(dataset)
    train.draw_hospitals(dataset.sites[:train.MOST_SHOWN], labels, file)
    print(f"Some images of each hospital, the last two with their masks: {file}")


def extent(sizes) -> str:
    """The least and the most of some sizes, as text."""
    texts = []
    for size in sorted({min(sizes), max(sizes)}):
        texts.append(" × ".join(f"{length:.4g}" for length in size))
    return " to ".join(texts)


if __name__ == "__main__":
    main()
