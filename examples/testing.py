"""What the three test files share: random tensors, comparisons, folders of images, short runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train

torch.set_num_threads(1)  # at these sizes no slower than two
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- tensors and states
def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw weights and running statistics; the variances are at least one half."""
    generator = seeded(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        value.copy_(drawn)
    return model.eval()


def same(one: dict, two: dict) -> bool:
    """Whether two states are equal to the bit."""
    if one.keys() != two.keys():
        return False
    equal = [torch.equal(one[entry], two[entry]) for entry in one]
    return all(equal)


def close(one, two, tolerance: float = 1e-10) -> bool:
    one, two = one.double(), two.double()
    return torch.allclose(one, two, rtol=0, atol=tolerance)


def near(one: dict, two: dict) -> bool:
    """Whether the floating entries of two states agree to 1e-10."""
    if one.keys() != two.keys():
        return False
    floats = [entry for entry in one if one[entry].is_floating_point()]
    return all(close(one[entry], two[entry]) for entry in floats)


# ---------------------------------------------------------------- folders of images
def save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_site(root, name, count, size=(32, 32), grey=False, values=(0, 1)):
    """`count` random PNGs with masks of `values` below root/name; the seed comes from the name."""
    folder = Path(root) / name
    rng = np.random.default_rng(list(str(name).encode()))
    shape = size if grey else (*size, 3)
    for number in range(count):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        mask = rng.choice(values, size)
        save_image(folder / "images" / f"{number:02d}.png", image)
        save_image(folder / "masks" / f"{number:02d}.png", mask.astype(np.uint8))
    return folder


DIRECTIONS = {
    "R": (1, 0, 0),
    "L": (-1, 0, 0),
    "A": (0, 1, 0),
    "P": (0, -1, 0),
    "S": (0, 0, 1),
    "I": (0, 0, -1),
}


def affine(codes, spacing=(0.5, 0.6, 3.0), tilt=0.0):
    """Axes towards the letters of `codes`, voxels of `spacing` mm, turned by `tilt` about x."""
    cos = math.cos(tilt)
    sin = math.sin(tilt)
    turn = np.eye(3)
    turn[1] = 0, cos, -sin
    turn[2] = 0, sin, cos
    axes = np.array([DIRECTIONS[code] for code in codes]).T
    result = np.eye(4)
    result[:3, :3] = turn @ axes * spacing
    result[:3, 3] = 5, -7, 11
    return result


def write_nifti(path, values, matrix):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, matrix), path)


def write_volumes(root, sites, shape=(24, 20, 5), seed=0):
    """Volumes (x, y, z) whose bright ball is the prostate, label 2 in its upper half; the outer
    slices are empty. Shape (384, 384, 20) and 116 cases: the public prostate set in size."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, length) for length in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    for name, count in sites.items():
        for number in range(count):
            centre = rng.uniform(-0.2, 0.2)
            squared = (x - centre) ** 2 + (y - 0.1) ** 2 + 0.4 * (z - 0.2) ** 2
            distance = np.sqrt(squared)  # off the middle, so that a flipped axis shows
            inside = (distance < 0.55) & (np.abs(z) < 0.95)
            mask = inside * (1 + (y > 0))
            image = 300 * inside + rng.normal(400, 40, shape)
            case = root / name / f"Case{number:02d}.nii.gz"
            write_nifti(case, image.astype(np.int16), affine("LPS"))
            ending = "_segmentation" if number % 2 else "_Segmentation"
            drawn = case.with_name(f"Case{number:02d}{ending}.nii.gz")
            write_nifti(drawn, mask.astype(np.uint8), affine("LPS"))


def splits_of(site):
    return site.train, site.validation, site.test


def cases_of(site):
    """How many images, or slices, train, validate and test."""
    return [len(split.cases) for split in splits_of(site)]


def same_bytes(a, b):
    """Whether two sites hold the same images, masks and cases, split by split."""
    equal = [a.name == b.name, a.spacing == b.spacing]
    for s, t in zip(splits_of(a), splits_of(b)):
        equal.append(torch.equal(s.images, t.images))
        equal.append(torch.equal(s.masks, t.masks))
        equal.append(s.cases == t.cases)
    return all(equal)


# ---------------------------------------------------------------- runs
TOY = ["--rounds", "2", "--images-per-site", "8", "--size", "16", "--width", "2", "--depth", "1"]
TOY += ["--threads", "1"]
TOY_FOLDER = ["--rounds", "1", "--size", "16", "--width", "2", "--depth", "1", "--threads", "1"]


def call(main, *words) -> int:
    """The exit status of train.main or the main of an example, called in this process."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code or 0
    return 0


def call_train(*words) -> int:
    return call(train.main, *words)


def rows_of(run: Path) -> list[dict]:
    return json.loads((run / "results.json").read_text())["rows"]


def find_row(run: Path, phase: str, method: str, site: str) -> dict:
    wanted = (phase, method, site)
    found = []
    for row in rows_of(run):
        if (row["phase"], row["method"], row["site"]) == wanted:
            found.append(row)
    assert len(found) == 1
    return found[0]


def tensors_in(value, name="") -> dict[str, torch.Tensor]:
    """All tensors in what torch.load returns, by their places in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    tensors = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            tensors |= tensors_in(inner, f"{name}/{key}")
    return tensors


def saved_tensors(file: Path) -> dict[str, torch.Tensor]:
    return tensors_in(torch.load(file, weights_only=True))


def same_run(one: Path, two: Path) -> bool:
    """Equal rows, and the bits of all models equal."""
    files = [file.relative_to(one) for file in one.glob("*/*.pt")]
    others = [file.relative_to(two) for file in two.glob("*/*.pt")]
    if not files or set(files) != set(others):
        return False
    for file in files:
        if not same(saved_tensors(one / file), saved_tensors(two / file)):
            return False
    return rows_of(one) == rows_of(two)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    """A finished run with all methods, Rowan outside."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert call_train(*TOY, "--methods", "all-inside", "all-outside", "--out", out) == 0
    return out


@pytest.fixture
def copy_of_run(toy_run, tmp_path) -> Path:
    """That run once more, to be spoilt or gone on with."""
    shutil.copytree(toy_run, tmp_path / "copy")
    return tmp_path / "copy"
