"""train.py on folders of real images: look first, then train.

    python -m examples.own_images DIR --list                what the images are
    python -m examples.own_images DIR --hold-out SITE       train; SITE is the hospital outside
    python -m examples.own_images --resume RUN              go on with a run
    python -m examples.own_images DIR --resume RUN          the same, of images that were moved

DIR holds one folder a hospital (docs/usage.md). All options of train.py are here too, but for those
of simulated images.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import iopfl
import train
from examples import adapt_folder, folders


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
    add("--patients", metavar="REGEX", help="its first group, found in the name of a file, is the "
        "patient, whose images come into one part")
    add("--list", action="store_true", help="show what the images are and end")
    args = train.parse_training(parser, argv, images, may_change=("root",))
    if args.patients is not None and not has_a_group(args.patients):
        parser.error(f"--patients {args.patients}: not a regular expression with a group, such as "
                     r"'(\d+)_'")
    if args.root is None:
        parser.error("name the folder of the images, DIR")
    args.root = str(Path(args.root).expanduser().resolve())
    if not Path(args.root).is_dir():
        parser.error(f"DIR {args.root}: no such folder")
    if args.out and not args.resume:
        train.check_out(Path(args.out), args.root, parser)
    return args


def has_a_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups > 0
    except re.error:
        return False


def patient_of(file: Path, pattern: str) -> str:
    """Whose image it is, by its name without the ending. Raises ValueError if that is not told."""
    found = re.search(pattern, folders.stem(file))
    if not (found and found[1]):
        raise ValueError(f"{file}: --patients {pattern} finds no patient in its name; correct it")
    return found[1]


def read_images(args: argparse.Namespace, seed: int) -> data.DataSet:
    """The source of the images: the folder DIR, split by this seed where it is not split."""
    try:
        whose = partial(patient_of, pattern=args.patients) if args.patients else str
        return folders.load_folder(args.root, args.size, args.mask_values, seed, whose)
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
    _, files = folders.find_sites(Path(args.root))
    print(f"{len(dataset.sites)} hospitals, {dataset.kind}, {dataset.channels} channels")
    for site in dataset.sites:
        parts = {"train": site.train, "validation": site.validation, "test": site.test}
        counts = [f"{len(set(part.cases))} {name}" for name, part in parts.items()]
        shapes, scores = look_at_files(sum(files[site.name].values(), []), dataset, args.size)
        masks = site.everything.masks
        pixels = torch.bincount(masks.flatten(), minlength=dataset.classes)
        percent = 100 * pixels / masks.numel()
        shares = [f"{share:.2f}" for share in percent.tolist()]
        print(f"{site.name}: {len(masks)} images; cases: {', '.join(counts)}")
        if args.patients:
            people = [{patient_of(Path(case), args.patients) for case in part.cases}
                      for part in parts.values()]
            counts = [f"{len(found)} {name}" for found, name in zip(people, parts)]
            print(f"    patients         {', '.join(counts)}")
        print(f"    sizes as read    {extent(shapes)}")
        print(f"    resized pixels   {extent(site.spacing.values())} {dataset.unit}")
        print(f"    classes          {', '.join(shares)} % of all pixels")
        if scores:
            mean, least = 100 * np.mean(scores), 100 * min(scores)
            print(f"    masks resized and brought back: Dice {mean:.1f} %, least {least:.1f} %")
    file = Path(args.out or "runs") / f"{dataset.name}-hospitals.png"
    labels = train.labels_of(dataset)
    train.draw_hospitals(dataset.sites[:train.MOST_SHOWN], labels, file)
    print(f"Some images of each hospital, the last two with their masks: {file}")


def look_at_files(pairs: list, dataset: folders.FolderDataSet, size: int) -> tuple:
    """The shapes of some images, and of each mask that holds something its Dice with itself after
    shrinking to the training size and enlarging again."""
    shapes, scores = [], []
    for file, mask_file in pairs:
        pixels, affine = folders.read_file(file)
        shape = pixels.shape[:3]
        mask = folders.read_mask(mask_file, shape, dataset.kind, dataset.mask_values, affine)
        shapes.append(shape if dataset.kind == "volumes" else shape[1:])
        small = folders.resize(mask, size, Image.NEAREST)
        score = dice_with_itself(mask, small, dataset.structures)
        if score is not None:
            scores.append(score)
    return shapes, scores


def dice_with_itself(mask, small, structures):
    """Dice between a mask (n, H, W) and itself after shrinking to `small` (n, h, w) and enlarging
    again.

    Mean over the structures in it; None if it holds background alone.
    """
    if not mask.any():
        return None
    one_hot = F.one_hot(torch.from_numpy(small).long()).permute(0, 3, 1, 2).float()
    back, _ = adapt_folder.at_own_size(one_hot, mask.shape[1:])
    scores = []
    for classes in structures.values():
        drawn = np.isin(mask, classes)
        if drawn.any():
            scores.append(iopfl.dice(drawn, np.isin(back, classes)))
    return float(np.mean(scores))


def extent(sizes) -> str:
    """The least and the most of some sizes, as text."""
    texts = []
    for size in sorted({min(sizes), max(sizes)}):
        texts.append(" × ".join(f"{length:.4g}" for length in size))
    return " to ".join(texts)


if __name__ == "__main__":
    main()
