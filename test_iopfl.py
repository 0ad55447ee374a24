"""Tests against slow, obvious versions, hand-computed values and invariants; python -m pytest."""

import copy
import dataclasses
import gzip
import importlib.util
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import data
import iopfl
import router
import train
from examples import ablations, adapt_folder
from models import UNet

torch.set_num_threads(1)  # at these sizes no slower than two
ROOT = Path(__file__).parent


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
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


# ---------------------------------------------------------------- models
def test_unet_layers_and_padding():
    model = UNet(1, 2, width=4, depth=2)
    randomise(model, 0)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == 11
    assert kinds.count(nn.ConvTranspose2d) == 2
    assert kinds.count(nn.BatchNorm2d) == 10
    x = noise(1, 1, 6, 7)
    padded = F.pad(x, (0, 1, 0, 2), mode="replicate")  # 8 × 8
    cropped = model(padded)[..., :6, :7]
    assert torch.allclose(model(x), cropped)


def test_unet_weights_come_from_the_generator_alone():
    start = UNet(1, 2, 2, 1, seeded())
    torch.manual_seed(2)
    again = UNet(1, 2, 2, 1, seeded())
    other = UNet(1, 2, 2, 1, seeded(5))
    assert same(start.state_dict(), again.state_dict())
    assert not same(start.state_dict(), other.state_dict())


def test_unet_refuses():
    model = UNet(1, 2, 2, 1)
    for wrong in (torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match="images .N, 1, H, W., got .*8, 8.$"):
            model(wrong)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        UNet(1, 2, 4, 0)


# ---------------------------------------------------------------- aggregate (M1) by hand
def small_state(weights: list[float], steps: int) -> iopfl.State:
    return {"a": torch.tensor(weights), "n": torch.tensor(steps)}


def test_aggregate_by_hand():
    first = small_state([1.0, 2.0], 3)
    second = small_state([5.0, 6.0], 7)
    before = copy.deepcopy([first, second])
    expected = small_state([4.0, 5.0], 7)
    found = iopfl.aggregate([first, second], [1, 3])
    assert same(found, expected)
    found = iopfl.aggregate([second, first], [3, 1])
    assert same(found, expected)
    assert same(first, before[0]) and same(second, before[1])  # they stay as they were


@pytest.mark.parametrize("entry, value, error", [
    ("b", torch.zeros(2), ValueError),
    ("a", torch.zeros(2).double(), ValueError),
    ("c", torch.zeros(1), ValueError),
    ("a", torch.tensor([0, math.nan]), FloatingPointError),
    ("b", torch.tensor([-math.inf]), FloatingPointError),
])
def test_aggregate_names_the_entry_that_is_wrong(entry, value, error):
    good = {"a": torch.zeros(2)}
    good["b"] = torch.zeros(1)
    bad = good | {entry: value}
    with pytest.raises(error, match=f"1.*'{entry}'"):
        iopfl.aggregate([good, bad], [1, 1])


WRONG_WEIGHTS = [
    [1],
    [1, 1, 1],
    [0, 0],
    [-1, 2],
    [1, math.nan],
    [1, math.inf],
]


@pytest.mark.parametrize("weights", WRONG_WEIGHTS)
def test_aggregate_refuses_weights(weights):
    states = [{"a": torch.zeros(1)}] * 2
    with pytest.raises(ValueError, match="aggregate: 2 states with the weights"):
        iopfl.aggregate(states, weights)


def test_aggregate_of_nothing():
    with pytest.raises(ValueError, match="aggregate: 0 states"):
        iopfl.aggregate([], [])


def test_aggregate_sums_half_precision_in_float32():
    """In bfloat16 1 + 1/256 is 1, so that sums would come to rest."""
    values = [1.0, 1.0] + [3.0] * 510
    halves = torch.tensor(values).bfloat16()
    states = [{"a": value} for value in halves]
    weights = [510, 510] + [1] * 510
    result = iopfl.aggregate(states, weights)["a"]
    assert result.dtype == torch.bfloat16
    expected = (1020 + 3 * 510) / 1530  # 5/3
    assert result == torch.tensor(expected).bfloat16()


# ---------------------------------------------------------------- update_personal (M2) by hand
def test_update_personal_by_hand():
    local = small_state([1.0], 4)
    before = small_state([3.0], 9)
    expected = small_state([0.25 * 3 + 0.75 * 1], 4)
    found = iopfl.update_personal(before, local, 0.25)
    assert same(found, expected)
    first = iopfl.update_personal(None, local, 0.25)
    assert same(first, local)
    for entry in local:
        assert first[entry].data_ptr() != local[entry].data_ptr()


@pytest.mark.parametrize("alpha", [1.5, -0.1, math.nan])
def test_update_personal_refuses_alpha(alpha):
    state = {"a": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        iopfl.update_personal(state, state, alpha)


def test_states_keep_no_graph():
    state = {"a": torch.ones(1, requires_grad=True)}
    mean = iopfl.aggregate([state, state], [1, 1])
    personal = iopfl.update_personal(state, state, 0.5)
    assert not mean["a"].requires_grad and not personal["a"].requires_grad


# ---------------------------------------------------------------- local training
def slow_soft_dice_loss(logits, masks):
    probabilities = logits.softmax(dim=1)
    classes = logits.shape[1]
    loss = 1.0
    for c in range(classes):
        p = probabilities[:, c]
        t = (masks == c).double()
        overlap = 2 * (p * t).sum() + 1e-5
        dice = overlap / (p.sum() + t.sum() + 1e-5)
        loss = loss - dice / classes
    return loss


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 3, 5, 6)])
def test_soft_dice_loss_equals_a_loop(shape):
    masks = torch.randint(3, shape, generator=seeded())
    logits = noise(3, *shape, dtype=torch.float64).movedim(0, 1)
    expected = slow_soft_dice_loss(logits, masks)
    found = iopfl.soft_dice_loss(logits, masks)
    assert close(found, expected, 1e-12)
    with pytest.raises(ValueError, match="without an axis of channels"):
        iopfl.soft_dice_loss(logits, masks[:, None])


def test_soft_dice_loss_is_float32_at_least():
    logits = torch.ones(1, 2, 3, 3).bfloat16()
    masks = torch.zeros(1, 3, 3)
    loss = iopfl.soft_dice_loss(logits, masks)
    assert loss.dtype == torch.float32


def test_train_local_refuses():
    model = UNet(1, 2, 2, 1)
    images = torch.zeros(2, 1, 8, 8)
    masks = images[:, 0]
    options = {"generator": seeded()}
    with pytest.raises(ValueError, match="0 images and 1 epochs"):
        iopfl.train_local(model, images[:0], masks[:0], **options)
    with pytest.raises(ValueError, match="2 images and 0 epochs"):
        iopfl.train_local(model, images, masks, epochs=0, **options)
    with pytest.raises(ValueError, match="class 2, but the model's classes are 0 to 1"):
        iopfl.train_local(model, images, masks + 2, **options)


def test_train_local_takes_volumes():
    model = nn.Conv3d(1, 2, 3, padding=1)
    images = noise(3, 1, 4, 5, 6)
    masks = (images[:, 0] > 0).byte()
    options = {"lr": 0.1, "generator": seeded()}
    first = iopfl.train_local(model, images, masks, **options)
    later = iopfl.train_local(model, images, masks, epochs=20, **options)
    assert later < first - 0.1


def train_slowly(state, client, draw, mu, anchor):
    """One epoch of local training from a state, written out; draw: (seed, round, client)."""
    model = UNet(1, 2, 2, 1).double().train()
    model.load_state_dict(state)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
    generator = iopfl.seeded(*draw)
    order = torch.randperm(len(client.images), generator=generator).numpy()
    batches = math.ceil(len(order) / 3)
    for batch in np.array_split(order, batches):
        logits = model(client.images[batch])
        loss = slow_soft_dice_loss(logits, client.masks[batch])
        for name, weight in model.named_parameters():
            distance = (weight - anchor[name]) ** 2
            loss = loss + mu / 2 * distance.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return copy.deepcopy(model.state_dict())


# ---------------------------------------------------------------- the federation (M1 to M3)
def toy_clients(count: int, dtype: torch.dtype = torch.float32) -> dict:
    clients = {}
    for k in range(count):
        number = 3 + 2 * k
        images = noise(number, 1, 8, 8, seed=k, dtype=dtype) + 0.3 * k
        masks = (images[:, 0] > 0.5).long()
        clients[f"client{k}"] = SimpleNamespace(images=images, masks=masks)
    return clients


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    return UNet(1, 2, 2, 1, seeded()).to(dtype)


STAYING = {  # of the tiny U-Net, by hand: the second and fifth layer of each block are BatchNorm
    "none": re.compile("(?!)"),
    "batchnorm": re.compile(r"(encoder|decoder)\.\d\.(1|4)\..*"),
    "head": re.compile(r"head\..*"),
    "all": re.compile(".*"),
}
PROXIMAL = iopfl.Training(proximal=0.7)  # more than anybody takes, so that it shows
WAYS = train.TRAINING | {"fedprox": PROXIMAL, "ditto": train.WITH_DITTO}
del WAYS["centralised"]  # trains like the plain one


def slow_round(g, kept, second, clients, present, training, draw):
    """A round of any way of training, written out: the same five things as in `iopfl.Round`."""
    stays = STAYING[training.stays]
    local, kept, second = {}, dict(kept), dict(second)
    total = sum(len(clients[name].images) for name in present)
    for name in present:
        client, draw_here = clients[name], (*draw, name)
        begin = dict(g)
        for entry in begin:
            if stays.fullmatch(entry):
                begin[entry] = kept[name][entry]
        local[name] = train_slowly(begin, client, draw_here, training.proximal, begin)
        if training.ditto is not None:
            own = second[name]
            second[name] = train_slowly(own, client, draw_here, training.ditto, g)
        kept[name] = local[name]
    mean = dict.fromkeys(g, 0)
    for name in present:
        weight = len(clients[name].images) / total
        for entry in g:
            mean[entry] = mean[entry] + weight * local[name][entry]
    return mean, local, kept, second


@pytest.mark.parametrize("participation, drawn", [(1.0, 4), (0.5, 2), (0.01, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_federations_by_hand(way, participation, drawn):
    """Each round's global, local, kept and second models; who takes part."""
    clients = toy_clients(4, torch.float64)
    model, training = tiny(torch.float64), WAYS[way]
    g = iopfl.snapshot(model)
    kept = dict.fromkeys(clients, g)
    second = dict.fromkeys(clients, g)
    presents = set()
    options = {"seed": 2, "lr": 1e-2, "batch_size": 3}
    rounds = iopfl.federate(
        model, clients, 3, training, participation=participation, **options)
    for number, found in enumerate(rounds, start=1):
        present = list(found.local)
        presents.add(tuple(present))
        assert found.number == number and len(present) == drawn
        assert present == [name for name in clients if name in present]  # in their order
        g, local, kept, second = slow_round(
            g, kept, second, clients, present, training, (2, number))
        assert near(found.global_state, g)
        for name in present:
            assert near(found.local[name], local[name])
        for name in found.second:
            assert near(found.second[name], second[name])
        for name in found.kept:
            expected = dict(g)
            for entry in g:
                if STAYING[training.stays].fullmatch(entry):
                    expected[entry] = kept[name][entry]
            assert near(found.model_of(name), expected)
    assert number == 3 and bool(found.second) == (way == "ditto")
    assert (len(presents) > 1) == (participation < 1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_personalised_models_accumulate_global_and_local_updates(alpha):
    """M3 on real training, in float64."""
    clients, T = toy_clients(3, torch.float64), 4
    model = tiny(torch.float64)
    options = {"seed": 1, "lr": 1e-2, "batch_size": 3}
    g = [iopfl.snapshot(model)]
    local, personal = [None], {}
    for found in iopfl.federate(model, clients, T, **options):
        g.append(found.global_state)
        local.append(found.local)
        for name, state in found.local.items():
            personal[name] = iopfl.update_personal(personal.get(name), state, alpha)
    for name in clients:
        for entry, start in g[0].items():
            if not start.is_floating_point():
                continue
            expected = start
            for s in range(1, T):
                global_update = g[s][entry] - g[s - 1][entry]
                expected = expected + (1 - alpha ** (T - s)) * global_update
            for t in range(1, T + 1):
                c = (1 - alpha) * alpha ** (T - t)
                if t == 1:
                    c = alpha ** (T - 1)
                local_update = local[t][name][entry] - g[t - 1][entry]
                expected = expected + c * local_update
            assert close(personal[name][entry], expected)


def same_round(one: iopfl.Round, two: iopfl.Round) -> bool:
    if one.number != two.number or one.losses != two.losses:
        return False
    for states in ("local", "kept", "second"):
        first, other = getattr(one, states), getattr(two, states)
        if list(first) != list(other):
            return False
        for name in first:
            if not same(first[name], other[name]):
                return False
    return same(one.global_state, two.global_state)


@pytest.mark.parametrize("way", ["plain", "fedbn", "local", "ditto"])
def test_a_federation_goes_on_after_any_round(way, tmp_path):
    """To the same bits, from the disk too, and no round changes later."""
    options = {"training": WAYS[way], "seed": 2, "participation": 0.5}
    clients, rounds, copies = toy_clients(4), [], []
    for found in iopfl.federate(tiny(), clients, 3, **options):
        rounds.append(found)
        copies.append(copy.deepcopy(found))
    for found, as_it_was in zip(rounds, copies):
        assert same_round(found, as_it_was)
    for after in rounds:
        torch.save(vars(after), tmp_path / "round.pt")
        read = iopfl.Round(**torch.load(tmp_path / "round.pt", weights_only=True))
        more = iopfl.federate(tiny(), clients, 3, after=read, **options)
        more = list(more)
        assert len(more) == 3 - after.number
        for found, expected in zip(more, rounds[after.number:]):
            assert same_round(found, expected)


def test_no_two_models_share_memory():
    model = tiny()
    states = [model.state_dict()]
    for found in iopfl.federate(model, toy_clients(3), 2, WAYS["ditto"]):
        states.append(found.global_state)
        states += found.local.values()
        states += found.second.values()
    pointers = []
    for state in states:
        pointers += [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)


def test_what_stays_is_found_by_the_layers():
    """Whatever the layers are called: BatchNorm without affine too, the last layer as the head."""
    norm = nn.BatchNorm2d(2, affine=False)
    first, last = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
    model = nn.Sequential(first, norm, nn.ReLU(), last, nn.ReLU())
    statistics = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert iopfl.staying_entries(model, "batchnorm") == statistics
    assert iopfl.staying_entries(model, "head") == ["3.weight", "3.bias"]
    with pytest.raises(ValueError, match="no BatchNorm, so nothing would stay"):
        iopfl.staying_entries(model[3:], "batchnorm")
    with pytest.raises(ValueError, match="stays='bn' is not"):
        iopfl.staying_entries(model, "bn")


def test_clients_may_be_numbers():
    clients = toy_clients(2)
    by_number = {0: clients["client0"], 1: clients["client1"]}
    found, = iopfl.federate(tiny(), by_number, 1)
    assert list(found.local) == [0, 1]


@pytest.mark.parametrize("way", ["plain", "local", "ditto"])
def test_divergence_is_named(way):
    """In round 2 a client's image, what it keeps, or its second model is not finite."""
    clients = toy_clients(3)
    rounds = iopfl.federate(tiny(), clients, 3, WAYS[way])
    first = next(rounds)
    entry = "encoder.0.1.weight"
    if way == "plain":
        clients["client1"].images[1] = math.nan
    elif way == "local":
        first.kept["client1"][entry][1] = math.inf
    else:
        first.second["client1"][entry][1] = math.inf
    with pytest.raises(FloatingPointError, match="client1 in round 2: '.*' is not finite"):
        next(rounds)


def test_settings_cannot_be_changed_by_accident():
    for settings in (router.PUBLISHED, train.WITH_DITTO):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.lr = 1


# ---------------------------------------------------------------- evaluation (M9)
def box(shape, *ranges):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


IMAGE, VOLUME = (16, 16), (6, 16, 16)
MIDDLE, LOWER = (4, 10), (5, 13)
A = box(IMAGE, MIDDLE, MIDDLE)
B = box(IMAGE, LOWER, MIDDLE)
PIXEL = box(IMAGE, (2, 3), (2, 3))
CORNER = box(IMAGE, (0, 6), (0, 6))
A_3D = box(VOLUME, (1, 5), MIDDLE, MIDDLE)
B_3D = box(VOLUME, (2, 6), LOWER, MIDDLE)
EMPTY = np.zeros(IMAGE, dtype=bool)


@pytest.mark.parametrize("prediction, target, spacing, expected", [
    (A, B, (1, 1), (0.71429, 3, 0.90909)),
    (A, B, (2, 0.5), (0.71429, 6, 1.5)),
    (PIXEL, A, (1, 1), (0, 9.25354, 6.50910)),
    (CORNER, A, (1, 1), (0.11111, 5.03284, 3.09237)),
    (A_3D, B_3D, (3, 1, 1), (0.53571, 3.60555, 1.63686)),
    (EMPTY, A, (3, 4), (0, 80, 80)),  # the diagonal of 48 × 64
    (EMPTY, EMPTY, (1, 1), (1, math.nan, math.nan)),
    (A, A, (1, 1), (1, 0, 0)),
])
def test_metrics_by_hand(prediction, target, spacing, expected):
    for one, two in ((prediction, target), (target, prediction)):
        found = iopfl.dice(one, two), *iopfl.hd95_and_assd(one, two, spacing)
        assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_metrics_refuse_other_shapes():
    with pytest.raises(ValueError, match="masks of"):
        iopfl.hd95_and_assd(A, A[:4], (1, 1))
    with pytest.raises(ValueError, match="masks of"):
        iopfl.hd95_and_assd(A, A, (1, 1, 1))


def random_mask(rng, shape, number):
    """A blob with holes, and specks far off."""
    mask = np.zeros(shape, dtype=bool)
    axes = len(shape)
    low = rng.integers(0, 28, axes) % (8, 30, 30)[:axes]
    mask[tuple(slice(v, v + 9) for v in low)] = True
    mask &= rng.random(shape) < 0.8
    for far in ((11, 39 * number, 39), (0, 39, 0)):
        mask[far[:axes]] = True
    return mask


def slow_surface(mask, spacing):
    """The places of all elements of a mask with a neighbour outside it, (points, axes)."""
    axes = mask.ndim
    forward = np.eye(axes, dtype=int)
    steps = np.concatenate([forward, -forward])
    padded = np.pad(mask, 1)
    points = []
    for place in np.argwhere(padded):
        neighbours = [padded[tuple(place + step)] for step in steps]
        if not all(neighbours):
            points.append((place - 1) * spacing)
    return np.array(points)


@pytest.mark.parametrize("seed", range(5))
def test_distances_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    shape, spacing = (12, 40, 40), (3.0, 0.6, 1.1)
    if seed == 4:
        shape, spacing = shape[:2], spacing[:2]
    masks = [random_mask(rng, shape, number) for number in range(2)]
    one, two = [slow_surface(mask, spacing) for mask in masks]
    distances = np.linalg.norm(one[:, None] - two[None], axis=2)
    to_two = distances.min(axis=1)
    to_one = distances.min(axis=0)
    hd95 = max(np.percentile(to_two, 95), np.percentile(to_one, 95))
    assd = np.concatenate([to_two, to_one]).mean()
    found = iopfl.hd95_and_assd(*masks, spacing)
    assert found == pytest.approx((hd95, assd), abs=1e-10)


def test_the_nearest_may_lie_little_nearer_than_those_looked_at_first():
    points = torch.tensor([[0.0, 0.0]])
    others = torch.tensor([[10.0, 0.0], [0.0, -9.9]])  # the first bounds the search
    assert iopfl.nearest(points, others).tolist() == pytest.approx([9.9])


def test_distances_of_large_surfaces_are_fast():
    offsets = np.indices((110, 110, 110)) - 55.0
    ball = (offsets**2).sum(axis=0) < 48**2
    moved = np.roll(ball, 5, axis=1)
    moved[5, 5, 5] = True
    assert len(iopfl.surface_points(ball, (1, 1, 1))) > 23000
    start = time.process_time()
    hd95, _ = iopfl.hd95_and_assd(ball, moved, (1, 1, 1))
    assert time.process_time() - start < 4
    assert 4 < hd95 <= 5


STRUCTURES = {"disc": (1, 2), "cup": (2,)}


def masks_by_hand():
    """Three masks 4 × 4 with a disc, a pixel and nothing, and a prediction without the pixel."""
    target = torch.zeros(3, 4, 4, dtype=torch.long)
    target[0, :2, :2] = 1
    target[0, 0, 0] = 2
    target[1, 0, 0] = 1
    prediction = target.clone()
    prediction[1] = 0
    return prediction, target


def test_evaluate_by_hand():
    spacing = dict.fromkeys("abc", (1, 1))
    disc, cup = iopfl.evaluate(*masks_by_hand(), "abc", STRUCTURES, spacing)
    assert disc["structure"] == "disc"
    assert disc["cases"] == 3 and disc["distance_cases"] == 2
    assert disc["dice"] == pytest.approx((1 + 0 + 1) / 3)
    assert disc["hd95"] == disc["assd"] == pytest.approx((0 + 32**0.5) / 2)
    assert cup["dice"] == 1 and cup["distance_cases"] == 1
    spacing["b"] = (3, 4)
    disc, _ = iopfl.evaluate(*masks_by_hand(), "abc", STRUCTURES, spacing)
    assert disc["hd95"] == pytest.approx(20 / 2)


def test_evaluate_takes_the_slices_of_a_volume_together():
    spacing = dict.fromkeys("vw", (3, 1, 1))
    disc, _ = iopfl.evaluate(*masks_by_hand(), "vvw", STRUCTURES, spacing)
    assert disc["cases"] == 2 and disc["distance_cases"] == 1
    assert disc["dice"] == pytest.approx((8 / 9 + 1) / 2)
    assert disc["assd"] == pytest.approx(3 / 9)


def test_evaluate_without_distances():
    prediction, target = masks_by_hand()
    spacing = dict.fromkeys("abc", (1, 1))
    about = ("abc", STRUCTURES, spacing)
    empty = target * 0
    disc, _ = iopfl.evaluate(empty, empty, *about)
    assert disc["hd95"] is None and disc["dice"] == 1
    disc, _ = iopfl.evaluate(prediction, target, *about, distances=False)
    assert disc["assd"] is None
    assert disc["dice"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="and 2 cases"):
        iopfl.evaluate(prediction, target, "ab", STRUCTURES, spacing)


def test_predict():
    images = noise(5, 1, 12, 12)
    model = randomise(UNet(1, 2, width=4, depth=1), 10)
    expected = model(images).argmax(dim=1)
    in_training = model.train()(images).argmax(dim=1)
    assert not torch.equal(in_training, expected)
    randomise(model, 10)  # the pass in training mode has moved its statistics
    found = iopfl.predict(model.train(), images, batch_size=2)
    assert torch.equal(found, expected)
    for value in (math.nan, math.inf):
        model.head.bias.data[0] = value
        with pytest.raises(FloatingPointError, match="not finite"):
            iopfl.predict(model, images)
    with pytest.raises(ValueError, match="one output channel"):
        iopfl.predict(UNet(1, 1, 2, 1), images)


OURS = {"entropy": 0.1, "passes": 1}
PUBLISHED = vars(router.PUBLISHED) | {"passes": 1}


def experts(count: int = 3) -> list[nn.Module]:
    return [randomise(UNet(1, 2, 4, 2), seed).double() for seed in range(count)]


def build(models: list | None = None, **settings) -> router.RoutedNetwork:
    return router.build_routed(models or experts(), router.RoutingSettings(**settings), seeded())


def images(count: int = 4, size: int = 12, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=seeded(seed), dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def variants(network: nn.Module, count: int = 3) -> list[nn.Module]:
    """Copies of a network with values of their own."""
    return [randomise(copy.deepcopy(network), seed).double() for seed in range(count)]


def adapted(routed, x, seed: int = 0, online: bool = False) -> torch.Tensor:
    return router.adapt(routed, x, generator=seeded(seed), online=online)


# ---------------------------------------------------------------- routed layers (M4, M5)
class Scale(nn.Module):
    """A layer of somebody's own, with a parameter for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.gamma * x


class StandardisedConv(nn.Conv2d):
    """A subclass that computes with a changed kernel."""

    def forward(self, x):
        kernel = self.weight - self.weight.mean()
        return self._conv_forward(x, kernel, self.bias)


class NormWithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.activation = nn.SiLU()

    def forward(self, x):
        return self.activation(super().forward(x))


def make_layers() -> dict[str, tuple]:
    """By name: one or two layers, the first of which has a router; the shape of an image."""
    flat, line, tokens = (5,), (4, 9), (7, 5)
    odd, large, volume = (4, 7, 9), (4, 130, 127), (4, 3, 4, 5)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    conv3d = nn.Conv3d(4, 6, 3, padding=1)
    linear = nn.Linear(5, 6)
    strided = nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2), dilation=2)
    reflecting = nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect")
    circular = nn.Conv2d(4, 2, 3, padding=(2, 1), padding_mode="circular")
    even = nn.Conv2d(4, 2, 4, padding="same", bias=False)
    up = nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=(2, 1), groups=2)
    up1d = nn.ConvTranspose1d(4, 5, 2, stride=2)
    up3d = nn.ConvTranspose3d(4, 6, 2, stride=2)
    plain_norm = nn.BatchNorm2d(6, affine=False)
    running = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    instance3d = nn.InstanceNorm3d(6, affine=True)
    return {
        "Conv1d": ([nn.Conv1d(4, 5, 3)], line),
        "Conv2d": ([conv], odd),
        "Conv2d, large": ([conv], large),
        "Conv2d, strided": ([strided], odd),
        "Conv2d, reflecting": ([reflecting], odd),
        "Conv2d, circular": ([circular], odd),
        "Conv2d, even": ([even], odd),
        "Conv2d, subclass": ([StandardisedConv(4, 2, 3)], odd),
        "Conv3d": ([conv3d], volume),
        "ConvTranspose1d": ([up1d], line),
        "ConvTranspose2d": ([up], odd),
        "ConvTranspose2d, large": ([up], large),
        "ConvTranspose3d": ([up3d], volume),
        "Linear": ([linear], flat),
        "Linear, tokens": ([linear], tokens),
        "Linear, channels last": ([linear], (3, 4, 5)),
        "BatchNorm1d": ([linear, nn.BatchNorm1d(6)], flat),
        "BatchNorm2d": ([conv, nn.BatchNorm2d(6, 1e-3)], odd),
        "BatchNorm2d, not affine": ([conv, plain_norm], odd),
        "BatchNorm2d, subclass": ([conv, NormWithActivation(6)], odd),
        "BatchNorm3d": ([conv3d, nn.BatchNorm3d(6)], volume),
        "SyncBatchNorm": ([conv, nn.SyncBatchNorm(6)], odd),
        "InstanceNorm2d": ([conv, nn.InstanceNorm2d(6, affine=True)], odd),
        "InstanceNorm2d, running": ([conv, running], odd),
        "InstanceNorm3d": ([conv3d, instance3d], volume),
        "GroupNorm": ([conv, nn.GroupNorm(3, 6)], odd),
        "LayerNorm": ([linear, nn.LayerNorm(6)], tokens),
        "PReLU": ([conv, nn.PReLU()], odd),
        "PReLU, by channel": ([conv3d, nn.PReLU(6)], volume),
        "own": ([conv, Scale(6)], odd),
    }


LAYERS = make_layers()


def layer_models(name: str) -> list[nn.Module]:
    network = nn.Sequential(*LAYERS[name][0])
    return variants(network)


def layer_inputs(name: str) -> torch.Tensor:
    x = drawn(3, *LAYERS[name][1], seed=1)
    return x.requires_grad_()


def weighted_values(layers: list[nn.Module], weights: torch.Tensor) -> dict:
    """Σ_m w_m θ_m of the layers' parameters and running statistics."""
    values = {}
    for name, value in layers[0].state_dict().items():
        if value.is_floating_point():
            stack = torch.stack([layer.state_dict()[name] for layer in layers])
            values[name] = torch.tensordot(weights.to(stack), stack, dims=1)
    return values


def normalised_first(y, norm, values: dict) -> torch.Tensor:
    """torch's own layers do not know gradients of running statistics: y normalised by these by
    hand, while in `values` they become such that change nothing."""
    shape = [1, -1] + [1] * (y.ndim - 2)
    mean = values["running_mean"].view(shape)
    variance = values["running_var"].view(shape)
    values["running_mean"] = torch.zeros(y.shape[1], dtype=y.dtype)
    values["running_var"] = torch.ones(y.shape[1], dtype=y.dtype) - norm.eps
    return (y - mean) / (variance + norm.eps).sqrt()


def slow(routed, models, x) -> torch.Tensor:
    """As `routed`, of layers in a row, by torch's own layers, image by image."""
    outputs = []
    for image in x.unbind():
        y = image.unsqueeze(0)
        for number, part in enumerate(routed.network):
            layers = [model[number] for model in models]
            if part.router is None:
                weights = weights / weights.sum()
            else:
                axes = list(range(1, y.ndim))
                axes.remove(part.router.channel_axis % y.ndim)
                pooled = y.mean(dim=axes) if axes else y
                hidden = part.router.fc1(pooled)
                scores = part.router.fc2(hidden).squeeze(0)
                weights = scores.softmax(0) if routed.settings.softmax else scores.sigmoid()
            values = weighted_values(layers, weights)
            if "running_mean" in values:
                y = normalised_first(y, layers[0], values)
            y = torch.func.functional_call(layers[0], values, (y,))
        outputs.append(y)
    return torch.cat(outputs)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_routed_layer_equals_a_loop(name, softmax):
    """Values, and gradients of input and routers, against torch's own layers, image by image."""
    models = layer_models(name)
    x = layer_inputs(name)
    routed = build(models, softmax=softmax)
    ours = routed(x)
    expected = slow(routed, models, x)
    assert close(ours, expected, 1e-11)
    probe = drawn(*ours.shape, seed=2)
    first, *_ = routed.parts(router.Router)
    wanted = [x, *first.parameters()]
    found = torch.autograd.grad((ours * probe).sum(), wanted)
    reference = torch.autograd.grad((expected * probe).sum(), wanted)
    for one, two in zip(found, reference):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-10)
        assert one.abs().max() > 0


class Foreign(nn.Module):
    """Not ours: residual, strided, grouped, dilated; a convolution and a norm are used twice, a
    block has two names, attributes of layers are read, and it has one module of no value."""

    def __init__(self, affine=True, tracked=True):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(6)
        self.other = nn.BatchNorm2d(6, 1e-3, 0.1, affine, tracked)
        self.twice = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, bias=False)
        self.register_module("nothing", None)
        up = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1)
        self.branches = nn.ModuleDict({"up": up})
        self.act = nn.Sequential(nn.InstanceNorm2d(6), nn.GELU())  # without parameters
        self.again = self.norm
        self.blocks = nn.ModuleList([self.stem, self.twice])
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.twice(self.act(self.norm(x)))
        x = x + self.twice(self.act(self.other(x)))
        assert self.twice.in_channels == 6
        return self.branches["up"](self.drop(self.again(x)))


def foreigners(*norm) -> list[nn.Module]:
    return variants(Foreign(*norm))


def equal_weights(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float64) / count


def average(models: list[nn.Module]) -> nn.Module:
    weights = equal_weights(len(models))
    network = copy.deepcopy(models[0])
    network.load_state_dict(weighted_values(models, weights), strict=False)
    return network


def check_one_hot_and_uniform(models: list[nn.Module], x: torch.Tensor) -> None:
    """Routed by one weight alone it is that expert, by equal weights the average."""
    routed = build(models)
    count = len(models)
    with torch.no_grad():
        for model, weights in zip(models, torch.eye(count)):
            router.set_start(routed, weights)
            assert close(routed(x), router.logits_of(model(x)))
        router.set_start(routed, equal_weights(count))
        expected = average(models)(x)
        assert close(routed(x), router.logits_of(expected))


@pytest.mark.parametrize("name", LAYERS)
def test_one_hot_and_uniform_routing_of_each_kind_of_layer(name):
    check_one_hot_and_uniform(layer_models(name), layer_inputs(name).detach())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_a_foreign_network_is_routed_and_adapted(affine, tracked):
    models = foreigners(affine, tracked)
    before = copy.deepcopy([model.state_dict() for model in models])
    x = drawn(6, 2, 12, 16)
    check_one_hot_and_uniform(models, x)
    routed = build(models, passes=1)
    assert len(routed.parts(router.Router)) == 3
    router.fit_to_site(routed, models, x)
    probabilities = adapted(routed, x)
    assert probabilities.shape == (6, 3, 12, 16)
    assert close(probabilities.sum(1), torch.ones(()))
    assert torch.equal(router.predict(routed, x), probabilities)  # all dropout is off
    for model, state in zip(models, before):
        assert same(model.state_dict(), state)
    # What routing chose, once for each layer, of however many calls.
    assert list(routed.routing) == ["stem", "twice", "branches.up"]


def test_our_network_is_routed():
    check_one_hot_and_uniform(experts(), images())


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_batchnorm_is_mixed_by_normalised_weights(mixed, batch, per_sample):
    models = variants(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), 4)
    x = drawn(3, 2, 5, 5)
    routed = build(models, softmax=False, mix_batchnorm=mixed, batch_statistics=batch,
                   per_sample=per_sample)
    with torch.no_grad():
        y = routed(x)
    weights = routed.routing["0"]
    assert torch.equal(weights, weights[:1].expand(3, -1)) != per_sample
    assert (weights.sum(1) - 1).abs().min() > 0.1
    convolved = []
    for image, own in zip(x, weights):
        conv = weighted_values([model[0] for model in models], own)
        convolved.append(F.conv2d(image, conv["weight"], conv["bias"]))
    convolved = torch.stack(convolved)
    for number in range(3):
        shares = torch.eye(4)[3]
        if mixed:
            shares = weights[number] / weights[number].sum()
        norm = weighted_values([model[1] for model in models], shares)
        mean = norm["running_mean"]
        variance = norm["running_var"]
        if batch:
            mean = convolved.mean((0, 2, 3))
            variance = convolved.var((0, 2, 3), correction=0)
        scale = norm["weight"] / (variance + 1e-5).sqrt()
        expected = (convolved[number] - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        assert close(y[number], expected + norm["bias"].view(-1, 1, 1))


# ---------------------------------------------------------------- what networks return
class Returning(nn.Module):
    """A network that returns its logits in some form."""

    def __init__(self, form, channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.small = nn.Conv2d(1, channels, 3, stride=2)
        self.form = form

    def forward(self, x):
        return self.form(self.conv(x), self.small(x))


def only(logits, small):
    return logits


def as_list(logits, small):
    return [logits, small]


def as_nested_tuple(logits, small):
    return ((logits,), small)


def as_dict_of_out(logits, small):
    return OrderedDict(aux=small, out=logits)


def as_dict_of_logits(logits, small):
    return {"hidden_states": small, "logits": logits}


def as_other_dict(logits, small):
    return {"main": logits, "aux": small}


def of_softmax(logits, small):
    return logits.softmax(dim=1)


def of_sigmoid(logits, small):
    return logits.sigmoid()


@pytest.mark.parametrize("form", [as_list, as_nested_tuple, as_dict_of_out, as_dict_of_logits,
                                  as_other_dict])
def test_the_main_output_is_used(form):
    models = variants(Returning(form), 2)
    plain = copy.deepcopy(models)
    for model in plain:
        model.form = only
    results = []
    for given in models, plain:
        routed = build(given)
        router.fit_to_site(routed, given, images())
        results.append(adapted(routed, images()))
    assert torch.equal(*results)
    assert results[0].shape == (4, 3, 12, 12)


def test_one_output_channel_is_a_sigmoid():
    models = variants(Returning(only, channels=1), 2)
    x = images()
    routed = build(models, passes=1)
    router.set_start(routed, torch.tensor([0.0, 1.0]))
    foreground = models[1](x).sigmoid()
    expected = torch.cat([1 - foreground, foreground], dim=1)
    assert close(router.predict(routed, x), expected)
    router.fit_to_site(routed, models, x)
    assert adapted(routed, x).shape == (4, 2, 12, 12)


@pytest.mark.parametrize("form, channels", [(of_softmax, 3), (of_sigmoid, 1)])
@pytest.mark.parametrize("settings", [{}, PUBLISHED])
def test_networks_that_return_probabilities_are_refused(form, channels, settings):
    models = variants(Returning(form, channels), 2)
    routed = build(models, **settings)
    with pytest.raises(ValueError, match="probabilities; leave out its last softmax or sigmoid"):
        adapted(routed, images())
    assert routed.parts(router.Routed)[0].current is None  # no pass is left under way


# ---------------------------------------------------------------- objective (M6 to M8)
def test_views_are_the_eight_flips_and_rotations():
    square = torch.arange(2 * 3 * 3.0).view(1, 2, 3, 3)
    seen = set()
    for number in range(8):
        turned = router.view(square, torch.tensor([number]))
        back = router.view(turned, torch.tensor([number]), inverse=True)
        assert torch.equal(back, square)
        seen.add(tuple(turned.flatten().tolist()))
    expected = set()
    for flipped in square, square.flip(3):
        for quarter in range(4):
            turned = torch.rot90(flipped, quarter, (2, 3))
            expected.add(tuple(turned.flatten().tolist()))
    assert seen == expected
    assert len(seen) == 8


def test_views_of_volumes_turn_each_slice():
    volumes = torch.randn(8, 1, 5, 4, 4, generator=seeded())
    views = torch.arange(8)
    turned = router.view(volumes, views)
    slices = zip(turned.unbind(2), volumes.unbind(2))
    for found, image in slices:
        assert torch.equal(found, router.view(image, views))
    assert torch.equal(router.view(turned, views, inverse=True), volumes)


VIEWS = {(4, 4): 8, (2, 5): 4, (4, 3, 3): 8, (3, 3, 4): 4}


@pytest.mark.parametrize("shape, count", VIEWS.items())
def test_as_many_views_are_drawn_as_fit(shape, count):
    views = router.draw_views(torch.zeros(99, 1, *shape), seeded())
    assert views.unique().tolist() == list(range(count))


@pytest.mark.parametrize("shape", [(24, 30), (5, 6, 8)])
@pytest.mark.parametrize("radius", [1, 2])
def test_shape_constraint_by_brute_force(shape, radius):
    logits = drawn(2, 3, *shape)
    probabilities = logits.softmax(dim=1)
    ranges = []
    for case in 1 - probabilities[:, 0].numpy():
        for place in np.ndindex(shape):
            window = case
            for axis, center in enumerate(place):
                low = max(center - radius, 0)
                window = window.take(range(low, min(center + radius + 1, shape[axis])), axis)
            ranges.append(np.ptp(window))
    found = router.shape_constraint(probabilities, radius).item()
    assert found == pytest.approx(np.mean(ranges), rel=1e-12)
    constant = torch.full_like(probabilities, 0.5)
    assert router.shape_constraint(constant, radius) == 0


def test_entropy_by_hand():
    values = [0.2, 0.3, 0.5]
    expected = -sum(p * math.log(p, 3) for p in values)
    for dtype, tolerance in (torch.float64, 1e-15), (torch.float32, 1e-6):
        p = torch.tensor(values, dtype=dtype).view(1, 3, 1, 1)
        found = router.entropy_loss(p).item()
        assert abs(found - expected) < tolerance
    certain = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    certain.requires_grad_()
    loss = router.entropy_loss(certain)
    loss.backward()
    assert loss == 0
    assert certain.grad.isfinite().all()


def small_models(dimensions: int = 2) -> list[nn.Module]:
    """Networks of three classes, 2-D or 3-D."""
    conv = nn.Conv3d if dimensions == 3 else nn.Conv2d
    norm = nn.BatchNorm3d if dimensions == 3 else nn.BatchNorm2d
    first = conv(1, 4, 3, padding=1)
    return variants(nn.Sequential(first, norm(4), conv(4, 3, 1)))


@pytest.mark.parametrize("shape", [(24, 40), (4, 24, 24)])
def test_objective_by_hand(shape):
    """The weighted sum of the terms, of the view by the same draws; d is a share of the shortest
    side, and one pixel at least."""
    models = small_models(len(shape))
    lambdas = {"entropy": 0.3, "consistency": 0.7, "shape": 0.2}
    routed = build(models, **lambdas, radius=0.1, noise=0.4, dropout=0.0)
    x = drawn(4, 1, *shape)
    generator = seeded(5)
    views = router.draw_views(x, generator)
    noisy = x + 0.4 * torch.randn(x.shape, generator=generator)
    p = routed(x).softmax(dim=1)
    of_view = routed(router.view(noisy, views)).softmax(dim=1)
    back = router.view(of_view, views, inverse=True)
    entropy = -(p * p.log()).sum(1).mean() / math.log(3)
    squares = (p - back) ** 2
    radius = 2 if len(shape) == 2 else 1
    expected = 0.3 * entropy + 0.7 * squares.mean()
    expected = expected + 0.2 * router.shape_constraint(p, radius)
    loss, probabilities = router.objective(routed, x, seeded(5))
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.equal(probabilities, p)
    assert not probabilities.requires_grad
    again = router.in_another_view(routed, x, seeded(5))
    assert close(again, back, 1e-6)


# ---------------------------------------------------------------- adaptation
def moved_entries(before: dict, after: dict) -> set[str]:
    return {entry for entry in after if not torch.equal(after[entry], before[entry])}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("settings", [OURS, PUBLISHED])
def test_adapt_moves_routers_and_affine_and_nothing_else(settings, fitted, online):
    models = [model.train() for model in experts()]  # their mode makes no difference
    x = images(11, 16)
    x[5:] = 50 * x[5:] - 200  # a changing stream
    before = copy.deepcopy([model.state_dict() for model in models])
    routed = build(models, **settings)
    if fitted:
        router.fit_to_site(routed, models, x, online=online)
    start = copy.deepcopy(routed.state_dict())
    random = torch.get_rng_state()
    with torch.no_grad():  # as callers do
        probabilities = adapted(routed, x, online=online)
    assert probabilities.shape == (11, 2, 16, 16)
    assert probabilities.isfinite().all()
    moved = moved_entries(start, routed.state_dict())
    adaptable = {name for name, _ in routed.named_parameters()}
    assert len(adaptable) == 4 * 13 + 2 * 10
    assert moved >= adaptable
    statistics = moved - adaptable
    assert all(".site_" in name for name in statistics)
    assert bool(statistics) == (online and fitted)
    for model, state in zip(models, before):
        assert same(model.state_dict(), state)
        assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())  # all randomness came from the generator
    if not online:
        assert torch.equal(probabilities, router.predict(routed, x))
    routed.reset()
    assert same(routed.state_dict(), start)
    again = adapted(routed, x, online=online)
    assert torch.equal(again, probabilities)


@pytest.mark.parametrize("online", [False, True])
def test_adapt_refuses_what_is_no_image(online):
    routed = build()
    start = copy.deepcopy(routed.state_dict())
    x = images(7)
    infinite = x.clone()
    infinite[6, 0, 3, 3] = math.inf
    for refused in infinite, x * math.nan, x[:0]:
        with pytest.raises(ValueError, match="no images, or values that are not finite"):
            adapted(routed, refused, online=online)
        with pytest.raises(ValueError, match="no images, or values that are not finite"):
            router.predict(routed, refused)
    assert same(routed.state_dict(), start)


def test_compiled_models_are_taken_out_of_their_wrapping():
    models = small_models()
    compiled = [torch.compile(model) for model in models]
    routed = build(compiled)
    router.fit_to_site(routed, compiled, images())
    plain = build(models)
    router.fit_to_site(plain, models, images())
    assert same(routed.state_dict(), plain.state_dict())


def test_online_predicts_each_batch_after_its_own_step_and_goes_on():
    """Statistics, optimiser and generator go on where they were."""
    x = images(8)
    results = []
    for parts in [x], x.split(4):
        models = small_models()
        routed = build(models, batch_size=2, lr=1e-2)
        router.fit_to_site(routed, models, x[:2], online=True)
        generator = seeded()
        predictions = []
        for part in parts:
            prediction = router.adapt(routed, part, generator=generator, online=True)
            predictions.append(prediction)
        results.append(torch.cat(predictions))
        for norm in routed.parts(router.RoutedBatchNorm):
            assert norm.site_images == 8
        last = router.predict(routed, x[6:])
        assert torch.equal(prediction[-2:], last)
    assert torch.equal(*results)


def test_volumes_are_adapted_and_predicted():
    models = small_models(3)
    x = drawn(3, 1, 4, 6, 6)
    routed = build(models, passes=1)
    router.fit_to_site(routed, models, x)
    start = copy.deepcopy(routed.state_dict())
    probabilities = adapted(routed, x)
    assert probabilities.shape == (3, 3, 4, 6, 6)
    assert moved_entries(start, routed.state_dict())


def test_the_first_step_is_as_long_as_the_learning_rate():
    """As Adam's is, for each parameter that has a gradient."""
    routed = build(small_models(), lr=3e-3, leash=None)
    router.step(routed, images(), seeded())
    changes = []
    for name, value in routed.named_parameters():
        change = (value - routed.start[name]).abs()
        changes.append(change.max().item())
    assert max(changes) == pytest.approx(3e-3, rel=1e-3)


def test_dropout_keeps_the_mean():
    one = router.Router(3, 1, 2, seeded()).double()
    settings = router.RoutingSettings(softmax=False, dropout=0.5)
    x = drawn(1, 3, 2, 2)
    many = x.expand(20000, -1, -1, -1)
    scores = one(many, settings, seeded(1)).logit()
    expected = one(x, settings, None)[0].logit()
    assert close(scores.mean(dim=0), expected, 0.01)
    assert scores.std(dim=0).min() > 0.05


def test_dropout_is_on_in_steps_alone(monkeypatch):
    calls = []
    real = router.Router.forward

    def spy(self, x, settings, dropout):
        calls.append(dropout is not None)
        return real(self, x, settings, dropout)

    monkeypatch.setattr(router.Router, "forward", spy)
    routed = build()
    layers = len(routed.parts(router.Router))
    router.step(routed, images(), seeded())
    # The images and another view of them; then, by the leash, the images at the start.
    assert calls == [True] * 2 * layers + [False] * layers
    calls.clear()
    router.predict(routed, images())
    routed.train()(images())
    assert calls == [False] * 2 * layers


def test_the_leash_is_given_the_probabilities_before_the_step(monkeypatch):
    given = []
    results = []
    real = router.objective

    def objective(*arguments):
        loss, probabilities = real(*arguments)
        results.append(probabilities)
        return loss, probabilities

    def pull_back(routed, batch, probabilities):
        given.append(probabilities)

    monkeypatch.setattr(router, "objective", objective)
    monkeypatch.setattr(router, "pull_back", pull_back)
    adapted(build(passes=1), images(6))
    assert len(given) == 2
    for one, two in zip(given, results):
        assert torch.equal(one, two)


def names_of_part_2() -> list[str]:
    source = Path(router.__file__).read_text()
    ours = source.partition("part 2: ours\n")[2]
    names = []
    for line in ours.split("\n"):
        if line.startswith("def "):
            names.append(line.split("(")[0].removeprefix("def "))
    return names


@pytest.mark.parametrize("online", [False, True])
def test_the_published_method_runs_no_line_of_ours(monkeypatch, online):
    names = names_of_part_2()
    assert {"fit_to_site", "measure_site", "pull_back", "site_share", "divergence"} <= set(names)
    for name in names:
        monkeypatch.setattr(router, name, None)
    monkeypatch.setattr(router.RoutedBatchNorm, "count", None)
    adapted(build(**PUBLISHED), images(6), online=online)
    with pytest.raises(TypeError):  # ours, with the leash, does
        adapted(build(), images(6), online=online)


# ---------------------------------------------------------------- faults that were: state
def test_what_is_loaded_is_the_start():
    models = small_models()
    x = images(6)
    first = build(models, lr=1e-2)
    router.fit_to_site(first, models, x)
    adapted(first, x)
    saved = copy.deepcopy(first.state_dict())
    loaded = router.build_routed(models, first.settings)  # other routers, from torch's generator
    loaded.load_state_dict(saved)
    expected = router.predict(first, x)
    assert torch.equal(router.predict(loaded, x), expected)
    loaded.reset()
    assert torch.equal(router.predict(loaded, x), expected)
    # The leash compares with what was loaded: nothing has changed, so nothing is pulled back.
    router.step(loaded, x, seeded(1))
    free = build(models, lr=1e-2, leash=None)
    free.load_state_dict(saved)
    router.step(free, x, seeded(1))
    assert same(loaded.state_dict(), free.state_dict())


def test_a_state_inside_another_module_is_the_start_too():
    outer = nn.ModuleDict({"routed": build()})
    state = copy.deepcopy(outer.state_dict())
    for name, value in state.items():
        if name.endswith("fc2.bias"):
            value += 1
    outer.load_state_dict(state)
    outer["routed"].reset()
    assert same(outer.state_dict(), state)


def test_statistics_of_no_image_are_never_used():
    models = small_models()
    x = images(6)
    for share in None, 0.7, 1.0:
        routed = build(models, passes=0)
        router.fit_to_site(routed, models, x, share=share, online=True)
        reference = build(models)
        router.fit_to_site(reference, models, x, share=0.0)
        expected = router.predict(reference, x)
        assert torch.equal(router.predict(routed, x), expected)
        assert torch.equal(adapted(routed, x), expected)


def test_other_models_or_another_order_are_refused():
    models = experts()
    x = images(6)
    routed = build(models)
    state = copy.deepcopy(routed.state_dict())
    a, b, c = models
    other = experts(4)[3]
    for wrong in [b, a, c], [c, b, a], [a, b, other]:
        with pytest.raises(ValueError, match="model . is not itself when it is routed: give the"):
            router.fit_to_site(routed, wrong, x)
    with pytest.raises(ValueError, match="2 models are given, but 3 are routed"):
        router.fit_to_site(routed, [a, b], x)
    assert same(routed.state_dict(), state)
    router.fit_to_site(routed, models, x)


def test_models_are_told_apart_by_images_that_hold_something():
    """Networks without biases give zeros of black images, whichever model it is."""
    first = nn.Conv2d(1, 4, 3, bias=False)
    models = variants(nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)))
    x = images(6)
    x[:4] = 0
    with pytest.raises(ValueError, match="is not itself"):
        router.fit_to_site(build(models), models[::-1], x)


def test_nearly_equal_models_in_another_order_are_refused():
    first = experts(1)[0]
    second = copy.deepcopy(first)
    second.head.bias.data[0] += 0.003
    logits = first(images())
    difference = second(images()) - logits
    assert difference.abs().max() < 0.01 * logits.abs().max()
    models = [first, second]
    routed = build(models)
    router.fit_to_site(routed, models, images())
    with pytest.raises(ValueError, match="is not itself"):
        router.fit_to_site(routed, models[::-1], images())
    twins = [first, first]
    router.fit_to_site(build(twins), twins, images())  # here order does not matter


@pytest.mark.parametrize("settings", [OURS, PUBLISHED])
def test_the_check_leaves_everything_as_it_was(settings):
    models = experts()
    x = images(6)
    routed = build(models, **settings)
    router.fit_to_site(routed, models, x, share=0.4)
    adapted(routed, x)
    state = copy.deepcopy(routed.state_dict())
    router.check_routed(routed, models, x[:2])
    assert same(routed.state_dict(), state)
    assert routed.settings == router.RoutingSettings(**settings)
    with pytest.raises(ValueError, match="is not itself"):
        router.check_routed(routed, models[::-1], x[:2])
    assert same(routed.state_dict(), state)


@pytest.mark.parametrize("online", [False, True])
def test_adapt_works_in_inference_mode(online):
    models = small_models()
    results = []
    for mode in torch.no_grad, torch.inference_mode:
        with mode():
            x = images(6) + 0.0
            routed = build(models)
            router.fit_to_site(routed, models, x, online=online)
            results.append(adapted(routed, x, online=online))
    assert torch.equal(*results)
    routed.reset()
    adapted(routed, images(6))  # and afterwards without it


def test_fitting_again_begins_as_built():
    models = small_models()
    x = images(6)
    for start in "matched", "random":
        once = build(models, lr=1e-2)
        twice = build(models, lr=1e-2)
        router.fit_to_site(twice, models, images(7, seed=3), start=start)
        adapted(twice, x)
        for routed in once, twice:
            router.fit_to_site(routed, models, x, start=start)
        assert same(once.state_dict(), twice.state_dict())
        assert same(once.start, twice.start)
        assert torch.equal(adapted(once, x), adapted(twice, x))  # the optimiser too began anew


def test_training_mode_changes_nothing():
    """One's own loop: no statistics are counted, and gradients reach what adapts."""
    models = foreigners()  # with dropout of their own
    x = drawn(6, 2, 12, 12)
    routed = build(models)
    router.fit_to_site(routed, models, x)
    expected = routed(x)
    before = copy.deepcopy(routed.state_dict())
    routed.train()
    loss = routed(x).square().mean()
    loss.backward()
    assert torch.equal(routed(x), expected)
    assert same(routed.state_dict(), before)
    assert all(value.grad is not None for value in routed.parameters())
    torch.optim.SGD(routed.parameters(), 0.1).step()
    moved = moved_entries(before, routed.state_dict())
    names = dict(routed.named_parameters(remove_duplicate=False))
    assert moved <= names.keys()


def test_memory_is_bounded():
    counts = {(192, 192): 64, (96, 96): 64, (384, 384): 16, (1024, 1024): 8, (2, 192, 192): 32}
    for shape, count in counts.items():
        x = torch.zeros(1).expand(100, 1, *shape)
        assert len(router.some_of_all(x)) == count
    few = torch.zeros(5, 1, 1024, 1024)
    assert len(router.some_of_all(few)) == 5
    x = torch.arange(70.0).view(-1, 1, 1, 1)
    numbers = router.some_of_all(x).flatten()
    assert numbers[0] == 0 and numbers[-1] == 69  # of all patients
    assert numbers.diff().max() <= 2


def test_batches_are_of_nearly_equal_size():
    def sizes(count, size):
        batches = router.in_batches(torch.zeros(count), size)
        return [len(batch) for batch in batches]

    assert sizes(11, 5) == [4, 4, 3]
    assert sizes(6, 5) == [3, 3]
    assert sizes(10, 5) == [5, 5]
    assert sizes(1, 5) == [1]


@pytest.mark.parametrize("online", [False, True])
def test_no_image_meets_its_own_statistics_alone(monkeypatch, online):
    seen = []
    real = router.RoutedNetwork.forward

    def spy(self, batch, *arguments, **options):
        seen.append(len(batch))
        return real(self, batch, *arguments, **options)

    monkeypatch.setattr(router.RoutedNetwork, "forward", spy)
    adapted(build(**PUBLISHED), images(6), online=online)
    assert set(seen) == {3}


def test_copies_and_files_after_adapting():
    models = small_models()
    x = images(6)
    routed = build(models)
    router.fit_to_site(routed, models, x)
    adapted(routed, x)
    file = io.BytesIO()
    torch.save(routed, file)
    file.seek(0)
    copies = [copy.deepcopy(routed), torch.load(file, weights_only=False)]
    expected = adapted(routed, x, 1)
    for other in copies:
        assert torch.equal(adapted(other, x, 1), expected)
        other.reset()
        assert same(other.state_dict(), router_reset(routed).state_dict())
    with torch.inference_mode():
        expected = router.predict(routed, x)
        assert torch.equal(router.predict(copies[0], x), expected)


def router_reset(routed: router.RoutedNetwork) -> router.RoutedNetwork:
    routed.reset()
    return routed


def test_adams_moments_move_along():
    models = [model.float() for model in experts()]
    routed = build(models)
    x = images(4)
    adapted(routed, x.float())
    routed.double()
    for group in routed.optimiser.param_groups:
        for parameter in group["params"]:
            state = routed.optimiser.state[parameter]
            assert state["exp_avg"].dtype == parameter.dtype == torch.float64
    assert adapted(routed, x).dtype == torch.float64


# ---------------------------------------------------------------- ours: start, statistics, leash
def kl(mean, variance, own_mean, own_variance):
    """KL divergence of two Gaussians, from the textbook."""
    ratio = math.log(own_variance / variance) / 2
    second_moment = variance + (mean - own_mean) ** 2
    return ratio - 0.5 + second_moment / (2 * own_variance)


E2 = math.e**2
FAR = [3.0, 1.0, 3.0, 1.0]  # their standard deviation is 1
NEAR = [0.02, 0.0]  # theirs is taken for 0.05
STARTS = [
    (FAR, {}, [1, E2, 1, 3 * E2]),
    (FAR, {"global_prior": None}, [1, E2, 1, E2]),
    (NEAR, {"global_prior": 0.3}, [0.7, 0.3 * math.exp(0.4)]),
    ([0.7], {}, [1]),
    ([3.0, 1.0], {"start": "uniform"}, [1, 1]),
    ([0.0, 0.0, 0.0], {}, [1, 1, 2]),
]


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("D, options, weights", STARTS)
def test_start_by_hand(monkeypatch, D, options, weights, softmax):
    models = experts(len(D))
    values = iter(D)

    def divergence(model, x):
        return torch.tensor(next(values))

    monkeypatch.setattr(router, "divergence", divergence)
    routed = build(models, softmax=softmax)
    router.fit_to_site(routed, models, images(5), share=0.0, **options)
    routed(images(5))
    expected = torch.tensor(weights) / sum(weights)
    assert len(routed.routing) == 13
    for chosen in routed.routing.values():
        assert close(chosen, expected.double().expand(5, -1), 2e-6)
    assert all(value.isfinite().all() for value in routed.parameters())


def test_random_start_is_as_built():
    models = experts()
    routed, untouched = build(models), build(models)
    router.fit_to_site(routed, models, images(), start="random", share=0.0)
    assert same(routed.state_dict(), untouched.state_dict() | site_entries(routed))


def site_entries(routed: router.RoutedNetwork) -> dict:
    state = routed.state_dict()
    return {name: value for name, value in state.items() if ".site_" in name}


@pytest.mark.parametrize("options, message", [
    ({"start": "Matched"}, "start is 'Matched', but may be matched, uniform or random"),
    ({"share": 1.2}, "share is 1.2, but may be 0 to 1"),
    ({"share": -0.1}, "share is -0.1, but may be 0 to 1"),
])
def test_fit_to_site_refuses_wrong_options(options, message):
    routed = build()
    state = copy.deepcopy(routed.state_dict())
    with pytest.raises(ValueError, match=message):
        router.fit_to_site(routed, experts(), images(), **options)
    with pytest.raises(ValueError, match="no images"):
        router.fit_to_site(routed, experts(), images(0))
    assert same(routed.state_dict(), state)


def test_networks_without_batchnorm_start_at_the_prior():
    norm = nn.GroupNorm(2, 4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.PReLU(), nn.Conv2d(4, 2, 1))
    models = variants(network)
    routed = build(models)
    router.fit_to_site(routed, models, images())
    routed(images())
    prior = torch.tensor([0.25, 0.25, 0.5])
    for weights in routed.routing.values():
        assert close(weights, prior.expand(4, -1), 1e-6)
    assert router.divergence(models[0], images()) == 0
    adapted(routed, images())


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(5, 5), (3, 3, 4)])
def test_divergence_by_hand(shape, shift):
    """The mean over channels and layers; a layer used twice counts over all its uses."""
    kind = nn.BatchNorm3d if len(shape) == 3 else nn.BatchNorm2d
    x = drawn(40, 2, *shape).float() * 3 + shift
    a = randomise(kind(2), 3)
    b = randomise(kind(2), 4)
    a.running_mean += shift
    between = a(x)
    seen = {a: torch.cat([x, b(between)]).double(), b: between.double()}
    expected = []
    for norm, values in seen.items():
        for channel in range(2):
            of_channel = values[:, channel]
            variance, mean = torch.var_mean(of_channel, correction=0)
            own_mean = norm.running_mean[channel]
            own_variance = norm.running_var[channel]
            expected.append(kl(mean.item(), variance.item(), own_mean.item(), own_variance.item()))
    network = nn.Sequential(a, b, a)
    found = router.divergence(network, x).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-3)


def gaussians(*layers) -> nn.Module:
    """BatchNorms of these running means and variances."""
    norms = []
    for mean, variance in layers:
        norm = nn.BatchNorm2d(1, eps=0.0)
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(variance)
        norms.append(norm)
    return nn.Sequential(*norms)


def test_site_share_by_hand():
    first = (0.5, 2.0), (1.0, 1.0)
    second = (0.0, 0.5), (-1.0, 3.0)
    last = (0.2, 1.0), (0.0, 2.0)
    models = [gaussians(*first), gaussians(*second), gaussians(*last)]
    distances = []
    for other in first, second:
        for layer in range(2):
            distances.append(kl(*other[layer], *last[layer]))
    u = np.mean(distances)
    shares = {7: 1 / 2, 14: 16 / 17, 3.5: 1 / 17, 0: 0.0, 1e4: 1.0}  # by D / u
    for factor, expected in shares.items():
        D = torch.tensor(factor * u)
        found = router.site_share(models, D.float())
        assert found == pytest.approx(expected, abs=1e-5)
    untracked = [nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))] * 2
    D = torch.tensor(1.0)
    assert router.site_share(models[:1], D) == 0
    assert router.site_share(untracked, D) == 0


def normalised(x: torch.Tensor, norm: nn.Module, of_site: torch.Tensor, share: float):
    """By running statistics and, with a share, those of images `of_site`."""
    norm = copy.deepcopy(norm).double()
    variance, mean = torch.var_mean(of_site, (0, 2, 3), correction=0)
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance, share)
    return norm(x)


def norm_alone() -> nn.Module:
    return randomise(nn.Sequential(nn.BatchNorm2d(3)), 0)


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_given_share_is_exact(share, shift):
    """However many images were counted; no image depends on its neighbours."""
    model = norm_alone()
    scale = torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1)
    x = drawn(6, 3, 5, 5).float() * scale + shift
    tolerance = 0.02 if shift else 1e-5
    for count in 1, 6:
        routed = router.build_routed([model])
        router.fit_to_site(routed, [model], x[:count], share=share)
        exact = x.double()
        expected = normalised(exact, model[0], exact[:count], share)
        found = routed(x)
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=tolerance)
        assert torch.equal(routed(x[:1]), found[:1])


@pytest.mark.parametrize("count", [1, 6, 48])
def test_the_rules_share_grows_with_the_images_measured(monkeypatch, count):
    def site_share(models, D):
        return 0.8

    monkeypatch.setattr(router, "site_share", site_share)
    model = norm_alone().double()
    x = drawn(count, 3, 5, 5)
    share = 0.8 * count / (count + 16)
    expected = normalised(x, model[0], x, share)
    offline = router.build_routed([model])
    router.fit_to_site(offline, [model], x)
    assert close(offline(x), expected, 1e-6)
    online = router.build_routed([model])
    router.fit_to_site(online, [model], x[:1], online=True)
    for batch in x.split(5):
        router.measure_site(online, batch)
    assert close(online(x), expected, 1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 1, 3, 1)])
def test_statistics_are_counted_over_batches_as_over_all_images(sizes, shift):
    model = norm_alone()
    x = drawn(6, 3, 5, 5).float() + shift
    routed = router.build_routed([model])
    router.fit_to_site(routed, [model], x, online=True)
    for part in x.split(sizes):
        router.measure_site(routed, part)
    norm = routed.parts(router.RoutedBatchNorm)[0]
    assert norm.site_images == 6
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert close(norm.site_mean, mean, 0.02 if shift else 1e-5)
    assert torch.allclose(norm.site_variance.double(), variance, rtol=1e-3)


def test_online_images_are_counted_once_each():
    models = experts()
    x = images(6)
    routed = build(models)
    router.fit_to_site(routed, models, x, online=True)
    norm = routed.parts(router.RoutedBatchNorm)[0]
    share = router.site_share(models, router.divergence(models[-1], x))
    assert norm.site_share.item() == pytest.approx(share)
    assert 0 < share < 1
    assert norm.site_images == 0
    router.adapt(routed, x, generator=seeded(), online=True)
    assert norm.site_images == 6
    router.fit_to_site(routed, models, x)
    assert norm.site_images == 6
    adapted(routed, x)
    assert norm.site_images == 6


LEASHES = {  # by the factors of the three classes' areas, the background's first
    (1.0, 0.95, 1.0): True,
    (1.0, 1.05, 1.0): True,
    (1.0, 1.0, 1.05): True,
    (1.0, 1.0, 0.95): True,
    (1.0, 1.001, 1.0): False,
    (1.05, 1.0, 1.0): False,
}


@pytest.mark.parametrize("change, back", LEASHES.items())
def test_leash_pulls_half_of_the_way_back(change, back):
    """When the area of a class, the background left out, has changed by more than the leash."""
    models = variants(UNet(1, 3, 2, 1))
    x = images(2, 8)
    routed = build(models)
    router.fit_to_site(routed, models, x)
    at_start = router.predict(routed, x)
    start = copy.deepcopy(routed.state_dict())
    names = [name for name, _ in routed.named_parameters()]
    for name in names:
        routed.get_parameter(name).data += 0.1
    factors = torch.tensor(change).view(3, 1, 1)
    router.pull_back(routed, x, at_start * factors)
    for name, value in routed.state_dict().items():
        moved = 0
        if name in names:
            moved = 0.05 if back else 0.1
        assert close(value, start[name] + moved, 1e-12), name


def test_the_leash_keeps_what_a_block_of_two_names_learnt():
    """`functional_call` of a network in which a block has two names leaves the values it was
    given: the leash must not use it."""
    models = foreigners()
    x = drawn(4, 2, 12, 12)
    results = []
    for leash in None, 100.0:
        routed = build(models, leash=leash)
        router.fit_to_site(routed, models, x)
        start = copy.deepcopy(routed.state_dict())
        router.step(routed, x, seeded())
        results.append(routed.state_dict())
    assert same(*results)
    names = {name for name, _ in routed.named_parameters()}
    moved = moved_entries(start, routed.state_dict())
    assert len(moved & names) >= 10


# ---------------------------------------------------------------- what cannot be routed
def pruned(conv):
    return prune.random_unstructured(conv, "weight", 0.5)


def hooked(conv):
    conv.register_forward_hook(print)
    return conv


def hooked_before(conv):
    conv.register_forward_pre_hook(print)
    return conv


def patched(conv):
    conv.forward = abs
    return conv


def infinite(conv):
    conv.bias.data[:] = math.inf
    return conv


def half(conv):
    return conv.half()


def bfloat16(conv):
    return conv.bfloat16()


def lazy(conv):
    return nn.LazyConv2d(2, 3)


class Beside(nn.Module):
    """As ConvNeXt's block: a parameter beside a child module."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gamma * self.conv(x)


def attention(conv):
    return nn.MultiheadAttention(4, 2)


def listed(conv):
    return nn.ParameterList([conv.weight])


def indexed(conv):
    conv.register_buffer("order", torch.tensor([1, 0]))
    return conv


REFUSED = [
    (half, "'0': Conv2d is in half precision; convert the models by .float()"),
    (bfloat16, "'0': Conv2d is in half precision"),
    (infinite, "'0': Conv2d holds values that are not finite; its training"),
    (hooked, "'0': Conv2d has hooks.* remove them first"),
    (hooked_before, "'0': Conv2d has hooks"),
    (pruned, "'0': Conv2d has hooks.* pruning; remove"),
    (patched, "'0': Conv2d has a forward of its own; compile or patch only the whole"),
    (torch.compile, "'0': OptimizedModule has a forward of its own"),
    (nn.utils.weight_norm, "'0': .* weight_norm, spectral_norm"),
    (nn.utils.spectral_norm, "'0': .* weight_norm, spectral_norm"),
    (parametrizations.weight_norm, "'0': .* weight_norm or spectral_norm; remove_parametriz"),
    (parametrizations.spectral_norm, "'0': .* weight_norm or spectral_norm"),
    (lazy, "'0': LazyConv2d is lazy; pass an image through the network first"),
    (Beside, "'0': Beside holds parameters beside child modules; move them into a child"),
    (attention, "'0': MultiheadAttention holds parameters beside child modules"),
    (listed, "'0': ParameterList computes nothing; move its parameters into the layer"),
    (indexed, "'0': Conv2d holds integers or complex numbers beside its parameters; compute"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change, message", REFUSED)
def test_build_routed_refuses_and_says_what_to_do(change, message):
    models = variants(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)), 2)
    for model in models:
        model[0] = change(model[0])
    with pytest.raises(ValueError, match=message) as caught:
        router.build_routed(models)
    assert "\n" not in str(caught.value)


def test_build_routed_refuses_models_that_differ():
    one = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1))
    wider = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1))
    for other in wider, one[:1]:
        with pytest.raises(ValueError, match="the models differ in '[01]'"):
            router.build_routed([one, other])


class Windows(nn.Module):
    """As Swin: windows of an image are entries of the batch."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(1, 2)

    def forward(self, x):
        windows = x.reshape(4 * len(x), -1, 1)
        tokens = self.mlp(windows)
        return tokens.reshape(len(x), 2, *x.shape[2:])


class Fusion(nn.Module):
    """A layer that is given two tensors."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, y):
        return torch.lerp(x, y, self.share)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.fusion = Fusion()

    def forward(self, x):
        return self.fusion(self.conv(x), x)


class FusedByName(Fused):
    def forward(self, x):
        return self.fusion(self.conv(x), y=x)


@pytest.mark.parametrize("kind, message", [
    (Windows, "cannot route 'mlp': its batch has 16 entries for 4 images; choose a network"),
    (Fused, "cannot route 'fusion': it is given more than one tensor; move its parameters"),
    (FusedByName, "cannot route 'fusion': it is given more than one tensor; move its parameters"),
])
def test_a_pass_refuses_layers_that_are_not_given_images(kind, message):
    models = variants(kind(), 2)
    with pytest.raises(ValueError, match=message):
        router.predict(build(models), images())


class Checkpointed(nn.Sequential):
    """Whose layers are computed once more in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_layers_outside_a_pass_are_refused():
    routed = build(variants(Checkpointed(nn.Conv2d(1, 2, 1)), 2))
    message = "cannot route '0' outside a pass: call the routed network.*checkpointing off"
    with pytest.raises(ValueError, match=message):
        router.step(routed, images(), seeded())
    with pytest.raises(ValueError, match=message):
        routed.network(images())


class Hidden(nn.Sequential):
    """A module in a plain list, or an attribute that differs, which no look at modules shows."""

    def forward(self, x):
        x = super().forward(x)
        return self.hidden[0](x) * self.scale


def with_hidden(hidden: nn.Module, scale: float, seed: int) -> nn.Module:
    model = Hidden(nn.Conv2d(1, 2, 1)).double()
    model.hidden = [randomise(copy.deepcopy(hidden), seed).double()]
    model.scale = scale
    return model


def test_fit_to_site_refuses_what_only_a_pass_can_show():
    conv = nn.Conv2d(2, 2, 1)
    hidden_parts = [with_hidden(conv, 1, seed=0), with_hidden(conv, 1, seed=1)]
    nothing = nn.Identity()
    other_attributes = [with_hidden(nothing, 1, seed=0), with_hidden(nothing, 2, seed=0)]
    norm_first = variants(nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1)), 2)
    for models in hidden_parts, other_attributes, norm_first:
        with pytest.raises(ValueError, match="model 0 is not itself when it is routed"):
            router.fit_to_site(build(models), models, images())


def test_values_that_are_not_finite_are_told():
    model = tiny()
    model.decoder[0][4].weight.data[:] = 1e5
    model.decoder[0][4].bias.data[:] = 1e5
    model.head.weight.data[:] = 1e37
    with pytest.raises(FloatingPointError, match="not every probability is finite"):
        router.predict(router.build_routed([model]), images().float())


def test_autocast_in_bfloat16_and_not_in_float16():
    models = [model.float() for model in small_models()]
    x = images(5).float()
    results = []
    for enabled in False, True:
        routed = build(models)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            router.fit_to_site(routed, models, x)
            results.append(adapted(routed, x))
    assert results[1].dtype == torch.float32
    difference = results[0] - results[1]
    assert 0 < difference.abs().max() < 0.05
    routed = build(models)
    routed(x)
    exact = routed.routing["0"]
    with torch.autocast("cpu", torch.bfloat16):
        routed(x)
    assert torch.equal(routed.routing["0"], exact)  # routers and mixing are never in low precision
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        router.predict(routed, x)


# ---------------------------------------------------------------- networks of libraries
def monai_network(name: str, dimensions: int) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="pip install monai")
    sizes = {"spatial_dims": dimensions, "in_channels": 1, "out_channels": 2}
    if name == "UNet":  # InstanceNorm, PReLU
        return nets.UNet(**sizes, channels=(4, 8), strides=(2,), num_res_units=1)
    if name == "BasicUNet":  # affine InstanceNorm
        return nets.BasicUNet(**sizes, features=(4, 4, 4, 4, 4, 4))
    if name == "SegResNet":  # GroupNorm before the convolutions
        return nets.SegResNet(**sizes, init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
    return nets.DynUNet(**sizes, kernel_size=[3] * 3, strides=[1, 2, 2],
                        upsample_kernel_size=[2, 2], filters=[4, 4, 8])


def nnunet_network(dimensions: int) -> nn.Module:
    reason = "pip install --no-deps dynamic-network-architectures; pip install einops"
    module = "dynamic_network_architectures.architectures.unet"
    unet = pytest.importorskip(module, reason=reason)
    conv = nn.Conv3d if dimensions == 3 else nn.Conv2d
    norm = nn.InstanceNorm3d if dimensions == 3 else nn.InstanceNorm2d
    return unet.PlainConvUNet(
        input_channels=1, num_classes=2, n_stages=2, features_per_stage=(4, 8),
        conv_op=conv, kernel_sizes=3, strides=(1, 2), conv_bias=True,
        n_conv_per_stage=1, n_conv_per_stage_decoder=1,
        norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU)


LIBRARY = [
    ("UNet", 2), ("UNet", 3),
    ("BasicUNet", 2), ("DynUNet", 3),
    ("SegResNet", 2), ("SegResNet", 3),
    ("PlainConvUNet", 2), ("PlainConvUNet", 3),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, dimensions", LIBRARY)
def test_networks_of_libraries_are_routed(name, dimensions):
    if name == "PlainConvUNet":
        network = nnunet_network(dimensions)
    else:
        network = monai_network(name, dimensions)
    models = variants(network)
    size = 32 if name == "BasicUNet" else 8
    shape = (2, 1) + (size,) * dimensions
    x = drawn(*shape)
    check_one_hot_and_uniform(models, x)
    routed = build(models, passes=1)
    router.fit_to_site(routed, models, x)
    start = copy.deepcopy(routed.state_dict())
    probabilities = adapted(routed, x)
    assert probabilities.shape == (2, 2, *shape[2:])
    moved = moved_entries(start, routed.state_dict())
    assert len(moved) > len(routed.parts(router.Router))


# ---------------------------------------------------------------- the benchmark
def load_benchmark():
    path = Path(__file__).parent / ".ci" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


@pytest.mark.parametrize("size", [(12, 12), (20, 17)])
def test_the_benchmarks_obvious_step_is_ours(size):
    """The loop over samples and passes has the objective of `router.step`, and its gradients."""
    benchmark = load_benchmark()
    models = variants(UNet(1, 3, 4, 1))
    x = drawn(4, 1, *size)
    settings = {"entropy": 0.1, "leash": None, "dropout": 0.0}
    ours = build(models, **settings)
    loss, _ = router.objective(ours, x, seeded(2))
    loss.backward()
    obvious = build(models, **settings)
    benchmark.loop_over_images(obvious, models)
    slow_loss = benchmark.obvious_step(obvious, x, seeded(2))
    assert torch.allclose(slow_loss, loss, rtol=1e-12, atol=0)
    gradients = dict(obvious.named_parameters())
    for name, value in ours.named_parameters():
        gradient = gradients[name].grad
        assert torch.allclose(gradient, value.grad, rtol=1e-9, atol=1e-13), name


# ---------------------------------------------------------------- data
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


def write_split_site(root, name, **counts):
    for part, count in counts.items():
        write_site(root / name, part, count)


def splits_of(site):
    return site.train, site.validation, site.test


def cases_of(site):
    """How many images, or slices, train, validate and test."""
    return [len(split.cases) for split in splits_of(site)]


def same_bytes(a, b):
    """Whether two sites hold the same images, masks and cases, split by split."""
    same = a.name == b.name and a.spacing == b.spacing
    for s, t in zip(splits_of(a), splits_of(b)):
        same = same and torch.equal(s.images, t.images)
        same = same and torch.equal(s.masks, t.masks)
        same = same and s.cases == t.cases
    return same


def warned(root, *settings):
    """What is loaded at 16 × 16, and the lines of warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = data.load_folder(root, 16, *settings)
    return loaded, [str(warning.message) for warning in caught]


def loading_fails(root, parts, mask_values=None):
    """Loading ends in one line that holds all the parts."""
    with pytest.raises(ValueError) as caught:
        data.load_folder(root, 32, mask_values)
    message = str(caught.value)
    for part in parts:
        assert part in message.replace(os.sep, "/"), message
    assert "\n" not in message


def standardised(pixels):
    pixels = pixels.astype(np.float64)
    return (pixels - pixels.mean()) / pixels.std()


# ---------------------------------------------------------------- data: splits
def random_split(count, stacks=False):
    images = torch.randn(count, 3, 8, 8)
    if stacks:
        images = images.half()
    masks = torch.ones(count, 8, 8, dtype=torch.uint8)
    cases = [f"case{number}" for number in range(count)]
    return data.Split(images, masks, cases, stacks)


def test_split_moves_only_what_it_must():
    split = random_split(2)
    moved = split.to("cpu")
    assert moved.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.images, split.images)
    assert moved.masks.data_ptr() == split.masks.data_ptr()
    again = moved.to("cpu")
    assert again.images.data_ptr() == moved.images.data_ptr()
    assert again.cases == split.cases


@pytest.mark.parametrize("stacks", [False, True])
def test_stacks_stay_stacks(stacks):
    first, second = random_split(2, stacks), random_split(3, stacks)
    both = data.joined([first, second])
    assert both.stacks == both.to("cpu").stacks == stacks
    assert both.cases == first.cases + second.cases
    assert torch.equal(both.images[2:], second.images)
    assert both.images.dtype == second.images.dtype
    shown = both.shown(3)
    expected = second.images[1].float()
    if stacks:
        expected = expected[1:2]
    assert torch.equal(shown, expected) and shown.dtype == torch.float32
    with torch.autocast("cpu"):  # which cannot concatenate float16
        assert torch.equal(data.joined([first, second]).images, both.images)


@pytest.mark.parametrize("count", range(3, 40))
def test_cut(count):
    cases = list(range(count))
    train, validation, test = data.cut(cases)
    assert train + validation + test == cases
    assert train and validation and test
    assert abs(len(validation) - 0.15 * count) <= 0.55
    assert abs(len(test) - 0.25 * count) <= 0.5


def test_fingerprint():
    def fingerprint(split):
        nothing = random_split(0)
        site = data.Site("a", nothing, split, nothing, {}, [])
        dataset = data.DataSet([site], 3, {"x": (1,)}, "px", "images")
        return dataset.fingerprint()

    split = random_split(2)
    before = fingerprint(split)
    crc = zlib.crc32(split.images.numpy().tobytes() + split.masks.numpy().tobytes())
    assert before == f"{crc:08x}"
    split.masks[1, 7, 7] = 0
    after = fingerprint(split)
    split.images[0, 0, 0, 0] += 1
    assert len({before, after, fingerprint(split)}) == 3


# ---------------------------------------------------------------- data: simulated hospitals
@pytest.mark.parametrize("task, channels, classes, unit, pixel", [
    ("prostate", 1, [0, 1], "mm", 150 / 32),
    ("fundus", 3, [0, 1, 2], "px", 1),
])
def test_simulated_images_and_masks(task, channels, classes, unit, pixel):
    loaded = data.simulate_sites(task, 0, size=32, images_per_site=8)
    assert [site.name for site in loaded.sites] == list(data.TASKS[task].hospitals)
    assert loaded.channels == channels and loaded.classes == len(classes)
    assert loaded.unit == unit and loaded.kind == "simulated"
    for site in loaded.sites:
        assert cases_of(site) == [5, 1, 2]
        split = site.everything
        assert split.images.shape == (8, channels, 32, 32)
        assert split.masks.shape == (8, 32, 32)
        assert split.images.dtype == torch.float32 and split.masks.dtype == torch.uint8
        assert split.cases == [f"{site.name}-{number:03d}" for number in range(8)]
        assert site.spacing == dict.fromkeys(split.cases, (pixel, pixel))
        assert torch.equal(split.shown(3), split.images[3])
        for image, mask in zip(split.images, split.masks):
            assert image.mean().item() == pytest.approx(0, abs=1e-4)
            assert image.var(unbiased=False).item() == pytest.approx(1, abs=1e-3)
            assert mask.unique().tolist() == classes


def test_simulated_cup_lies_inside_disc():
    for site in data.simulate_sites("fundus", 0, size=96, images_per_site=4).sites:
        for mask in site.everything.masks.numpy():
            disc, cup = mask > 0, mask == 2
            assert 0 < cup.sum() < disc.sum()
            padded = np.pad(cup, 1)
            around = padded[:-2, 1:-1] | padded[2:, 1:-1]
            around |= padded[1:-1, :-2] | padded[1:-1, 2:]
            assert disc[around].mean() > 0.9


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_simulation_depends_on_its_arguments_alone(task):
    def draw(seed, sites=None):
        return data.simulate_sites(task, seed, size=24, images_per_site=4, sites=sites)

    six, again, three, other = draw(3), draw(3), draw(3, 3), draw(4)
    assert len(six.sites) == 6 and len(three.sites) == 3
    for site, repeated, changed in zip(six.sites, again.sites, other.sites):
        assert same_bytes(site, repeated)
        assert not torch.equal(site.train.images, changed.train.images)
    for site, alone in zip(six.sites, three.sites):
        assert same_bytes(site, alone)
    assert len({site.train.images.numpy().tobytes() for site in six.sites}) == 6
    assert six.fingerprint() == again.fingerprint() != other.fingerprint()


# Of each hospital at size 24, seed 0: the CRC-32 of four masks, and of the images the mean of the
# absolute values and of the upper half. The bytes of images differ between machines in the last
# digits, so that a CRC of them would not do; masks are whole numbers.
HOSPITALS_AS_DRAWN = {
    "Alder": (0x9043180b, 0.83012, -0.04506),
    "Birch": (0x440ebbb0, 0.77632, 0.01253),
    "Cedar": (0xb2965445, 0.81699, -0.13419),
    "Hazel": (0xf17c7653, 0.79900, 0.17131),
    "Linden": (0x18c55adc, 0.73789, 0.06633),
    "Rowan": (0x06977ed9, 0.75303, -0.04948),
    "Crane": (0x3eb56ae1, 0.87151, -0.00672),
    "Finch": (0xc5afe236, 0.86854, 0.01034),
    "Heron": (0xc0cd2497, 0.84157, 0.00935),
    "Plover": (0xb3f8f783, 0.84514, 0.02544),
    "Robin": (0xc2ff4626, 0.86722, -0.02620),
    "Swift": (0xa08bf271, 0.82904, 0.06851),
}


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_hospitals_are_drawn_as_ever(task):
    for site in data.simulate_sites(task, 0, size=24, images_per_site=4).sites:
        crc, contrast, upper = HOSPITALS_AS_DRAWN[site.name]
        split = site.everything
        assert zlib.crc32(split.masks.numpy()) == crc
        assert split.images.abs().mean().item() == pytest.approx(contrast, abs=1e-4)
        assert split.images[:, :, :12].mean().item() == pytest.approx(upper, abs=1e-4)


def draw_square(hospital, rng, size):
    """A bright square on noise, and its mask."""
    brightness, = hospital
    mask = np.zeros((size, size), dtype=int)
    mask[4:10, 6:12] = 2
    mask[4:10, 6:8] = 1
    image = rng.normal(size=(3, size, size))
    image += brightness * (mask > 0)
    return image, mask


def add_squares(monkeypatch, draw, width=None, structures=None):
    structures = structures or {"square": (1, 2), "right": (2,)}
    hospitals = {"Ash": (3.0,), "Elm": (9.0,)}
    task = data.Task(3, width, structures, hospitals, draw)
    monkeypatch.setitem(data.TASKS, "squares", task)


@pytest.mark.parametrize("width, unit, pixel", [(None, "px", 1.0), (64.0, "mm", 4.0)])
def test_a_third_task_is_one_entry(monkeypatch, width, unit, pixel):
    add_squares(monkeypatch, draw_square, width)
    loaded = data.simulate_sites("squares", 0, size=16, images_per_site=5)
    assert [site.name for site in loaded.sites] == ["Ash", "Elm"]
    assert (loaded.channels, loaded.classes, loaded.unit) == (3, 3, unit)
    assert loaded.structures == {"square": (1, 2), "right": (2,)}
    contrasts = []
    for site in loaded.sites:
        split = site.everything
        assert split.images.shape == (5, 3, 16, 16)
        assert split.masks[4].unique().tolist() == [0, 1, 2]
        assert (split.masks[:, 4:10, 8:12] == 2).all()
        assert set(site.spacing.values()) == {(pixel, pixel)}
        contrasts.append(split.images[:, :, 4:10, 6:12].mean())
    assert contrasts[0] < contrasts[1]


def too_small(image, mask):
    return image[:, 1:], mask


def grey(image, mask):
    return image[:1], mask


def without_channels(image, mask):
    return image[0], mask


def not_a_number(image, mask):
    image[1, 2, 3] = math.nan
    return image, mask


def infinite(image, mask):
    image[1, 2, 3] = -math.inf
    return image, mask


def constant(image, mask):
    return np.full_like(image, 0.3), mask


def mask_with_a_channel(image, mask):
    return image, mask[None]


def mask_of_another_size(image, mask):
    return image, mask[2:]


def class_three(image, mask):
    return image, mask + (mask == 2)


def negative_class(image, mask):
    return image, mask - 1


def fraction_in_mask(image, mask):
    return image, mask * 0.75


def nan_in_mask(image, mask):
    return image, np.where(mask == 1, math.nan, mask)


@pytest.mark.parametrize("spoil, part", [
    (too_small, "(3, 15, 16)"),
    (grey, "(1, 16, 16)"),
    (without_channels, "not ((3, 16, 16), (16, 16))"),
    (not_a_number, "NaN"),
    (infinite, "infinity"),
    (constant, "constant"),
    (mask_with_a_channel, "(1, 16, 16)"),
    (mask_of_another_size, "(14, 16)"),
    (class_three, "[0 1 3]"),
    (negative_class, "[-1  0  1]"),
    (fraction_in_mask, "1.5"),
    (nan_in_mask, "nan"),
])
def test_wrong_entries_in_the_table_of_tasks(monkeypatch, spoil, part):
    def draw(hospital, rng, size):
        image, mask = draw_square(hospital, rng, size)
        return spoil(image, mask)

    add_squares(monkeypatch, draw)
    with pytest.raises(ValueError) as caught:
        data.simulate_sites("squares", 0, size=16, images_per_site=4)
    assert "task squares: draw returned" in str(caught.value)
    assert part in str(caught.value)


def test_a_task_whose_structures_lack_a_class(monkeypatch):
    add_squares(monkeypatch, draw_square, structures={"left": (1,)})
    with pytest.raises(ValueError, match="task squares: .*0 1 2.*structures"):
        data.simulate_sites("squares", 0, size=16, images_per_site=4)


# ---------------------------------------------------------------- data: folders of images
def test_folder_channels(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 4, grey=True)
    loaded = data.load_folder(tmp_path, 32)
    assert (loaded.channels, loaded.classes) == (1, 2)
    assert loaded.kind == "images" and loaded.unit == "px"
    assert loaded.sites[0].everything.images.shape == (4, 1, 32, 32)
    assert loaded.sites[0].shapes == [(32, 32)] * 4
    assert set(loaded.sites[0].spacing.values()) == {(1.0, 1.0)}
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    save_image(tmp_path / "b" / "images" / "02.png", colour)
    loaded = data.load_folder(tmp_path, 32)
    a, b = [site.everything for site in loaded.sites]
    assert loaded.channels == 3 and not a.stacks
    assert a.images.shape == b.images.shape == (4, 3, 32, 32)
    assert torch.equal(a.images[:, 0], a.images[:, 2])
    wanted = standardised(colour).transpose(2, 0, 1)
    assert np.allclose(b.images[b.cases.index("images/02.png")].numpy(), wanted, atol=1e-4)


def test_images_shrink_by_averaging_and_masks_by_choosing():
    stripes = np.zeros((1, 64, 64), np.float32)
    stripes[..., ::2] = 200
    inner = data.resize(stripes, 8)[0, 1:-1, 1:-1]
    assert np.abs(inner - 100).max() < 2
    labels = np.random.default_rng(0).integers(0, 3, (2, 12, 8)).astype(np.int32)
    chosen = data.resize(labels, 4, Image.NEAREST)
    assert np.array_equal(chosen, labels[:, 1::3, 1::2])


@pytest.mark.parametrize("values", [[0, 128, 255], [255, 0, 128]])
def test_mask_values_map_to_their_position(tmp_path, values):
    folder = write_site(tmp_path, "a", 5, values=(0, 128, 255))
    loaded = data.load_folder(tmp_path, 32, values)
    split = loaded.sites[0].everything
    assert loaded.classes == 3 and loaded.mask_values == values
    assert loaded.structures == {"class 1": (1,), "class 2": (2,)}
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(np.array(values)[mask.numpy()], stored)


def test_masks_shrink_to_the_nearest_class(tmp_path):
    folder = write_site(tmp_path, "a", 4, values=(0, 1, 2))
    loaded, _ = warned(tmp_path)
    split = loaded.sites[0].everything
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(mask.numpy(), stored[1::2, 1::2])


def test_given_and_drawn_splits(tmp_path):
    counts = {"train": 3, "Valid": 1, "test": 2}
    write_split_site(tmp_path, "a", **counts)
    write_site(tmp_path, "b", 12)
    write_site(tmp_path, "c", 12)
    first = data.load_folder(tmp_path, 32, seed=0).sites
    again = data.load_folder(tmp_path, 32, seed=0).sites
    other = data.load_folder(tmp_path, 32, seed=1).sites
    for split, (part, count) in zip(splits_of(first[0]), counts.items()):
        assert split.cases == [f"{part}/images/{number:02d}.png" for number in range(count)]
    for site, repeated in zip(first, again):
        assert same_bytes(site, repeated)
    b, c = first[1], first[2]
    assert cases_of(b) == [7, 2, 3]
    everything = b.everything
    assert everything.cases != c.everything.cases
    assert everything.cases != other[1].everything.cases
    assert sorted(everything.cases) == [f"images/{number:02d}.png" for number in range(12)]
    for case, image, mask in zip(everything.cases, everything.images, everything.masks):
        pixels = np.asarray(Image.open(tmp_path / "b" / case)).transpose(2, 0, 1)
        assert np.allclose(image.numpy(), standardised(pixels), atol=1e-4)
        stored = Image.open(tmp_path / "b" / case.replace("images", "masks"))
        assert np.array_equal(mask.numpy(), np.asarray(stored))


def test_a_fifth_of_train_validates(tmp_path):
    write_split_site(tmp_path, "a", train=10, test=2)
    first, lines = warned(tmp_path)
    site, = first.sites
    assert cases_of(site) == [8, 2, 2] and not lines
    assert all(case.startswith("train/") for case in site.validation.cases)
    assert site.test.cases == ["test/images/00.png", "test/images/01.png"]
    assert len(set(site.everything.cases)) == 12
    other, _ = warned(tmp_path, None, 1)
    assert other.sites[0].train.cases != site.train.cases


# ---------------------------------------------------------------- data: folders that cannot be used
IMAGE, MASK = "a/images/01.png", "a/masks/01.png"


@pytest.fixture
def two_sites(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 5)
    return tmp_path


def float_pixels(value):
    pixels = np.zeros((32, 32), np.float32)
    pixels[3, 4] = value
    return pixels


SPOT = np.eye(32, dtype=np.uint8)
RED = SPOT[:, :, None] * np.array([1, 0, 1], np.uint8)
PHOTOGRAPH = np.arange(1024, dtype=np.int64).reshape(32, 32).astype(np.uint8)


@pytest.mark.parametrize("pixels, mask_values, parts", [
    (SPOT[:20, :24], None, ["(1, 20, 24)", "(1, 32, 32)", "resample"]),
    (255 * SPOT, None, ["255", "0, 1 …", "--mask-values 0 255"]),
    (7 * SPOT, [0, 1], ["0 7 are not all among --mask-values [0, 1]", "a further class"]),
    (PHOTOGRAPH, [0, 1], ["not all among", "threshold it and save it as PNG with one value"]),
    (RED, None, ["one channel"]),
    (float_pixels(0.5), None, ["whole numbers"]),
    (float_pixels(-1), None, ["from 0"]),
    (float_pixels(math.nan), None, ["not finite"]),
    (PHOTOGRAPH, None, ["256 values", "save it as PNG with one value a class"]),
    (SPOT + 255 * SPOT[::-1], None, ["it holds 0 1 255", "no pixel is ignored"]),
    (15 * SPOT + 255 * SPOT[::-1], None, ["it holds 0 15 255", "no pixel is ignored"]),
    (3 * SPOT, None, ["[0, 1, 3]", "0, 1 …", "--mask-values"]),
])
def test_masks_that_cannot_be_used(two_sites, pixels, mask_values, parts):
    file = two_sites / MASK
    file.unlink()
    if pixels.dtype == np.float32:
        file = file.with_suffix(".tif")
    save_image(file, pixels)
    name = file.relative_to(two_sites).as_posix()
    loading_fails(two_sites, [name, *parts], mask_values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite(two_sites, value):
    (two_sites / IMAGE).unlink()
    save_image(two_sites / "a/images/01.tif", float_pixels(value))
    loading_fails(two_sites, ["a/images/01.tif", "not finite"])


def cut_short(file):
    file.write_bytes(file.read_bytes()[:200])


def text_instead(file):
    file.write_text("text")


def nothing_instead(file):
    file.write_bytes(b"")


def folder_instead(file):
    file.unlink()
    file.mkdir()


def loop_of_links(file):
    file.unlink()
    file.symlink_to(file.name)


def pipe_instead(file):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    file.unlink()
    os.mkfifo(file)


def many_pixels(file):
    Image.new("1", (10_000, 10_000)).save(file)


def huge_header(file):
    """A sound PNG header of 100,000 × 100,000 pixels; a checksum belongs to it."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    checksum = zlib.crc32(content[12:29])
    content[29:33] = struct.pack(">I", checksum)
    file.write_bytes(content)


@pytest.mark.parametrize("name", [IMAGE, MASK])
@pytest.mark.parametrize("spoil, part", [
    (cut_short, "not a readable image"),
    (text_instead, "not a readable image"),
    (nothing_instead, "not a readable image"),
    (folder_instead, "not a file"),
    (loop_of_links, "not a readable image"),
    (pipe_instead, "not a file"),
    (many_pixels, "decompression bomb"),
    (huge_header, "decompression bomb"),
])
def test_files_that_cannot_be_read(two_sites, name, spoil, part):
    spoil(two_sites / name)
    loading_fails(two_sites, [name, part, "replace or remove it"])


def unlink_all(root, pattern):
    files = list(root.glob(pattern))
    assert files
    for file in files:
        file.unlink()


def without_a_mask(root):
    (root / MASK).unlink()


def image_that_is_called_a_mask(root):
    shutil.copy(root / IMAGE, root / "a/images/scan_segmentation.png")


def without_masks(root):
    shutil.rmtree(root / "a/masks")


def without_images(root):
    unlink_all(root, "a/*/*")


def too_few_images(root):
    unlink_all(root, "a/*/0[234].png")


def unprintable_name(root):
    (root / "a").rename(root / "a\nb")


def called_global(root):
    (root / "a").rename(root / "global")


def called_all(root):
    (root / "a").rename(root / "All")


def called_none(root):
    (root / "a").rename(root / "none")


def two_endings(root):
    shutil.copy(root / IMAGE, root / "a/images/01.jpg")


def two_endings_of_a_mask(root):
    shutil.copy(root / MASK, root / "a/masks/01.gif")


def two_splits(root):
    write_site(root / "a", "train", 3)


def two_folders_of_images(root):
    shutil.copytree(root / "a/images", root / "a/image")


def background_alone(root):
    for file in root.glob("*/masks/*"):
        save_image(file, np.zeros((32, 32), np.uint8))


def another_layout(root):
    folder = root / "c/train/ROIs"
    shutil.copytree(root / "a/images", folder / "image")
    shutil.copytree(root / "a/masks", folder / "mask")


@pytest.mark.parametrize("spoil, parts", [
    (without_a_mask, [IMAGE, "no mask", "add it"]),
    (without_masks, ["a/images/00.png", "no mask"]),
    (image_that_is_called_a_mask, ["scan_segmentation.png has no mask", "add it"]),
    (without_images, ["'a'", "0 in all", "3 or more"]),
    (too_few_images, ["'a'", "2 in all", "3 or more"]),
    (unprintable_name, ["'a\\nb'", "rename it"]),
    (called_global, ["'global'", "rename it"]),
    (called_all, ["'All'", "rename it"]),
    (called_none, ["'none'", "rename it"]),
    (two_endings, ["01.jpg", "01.png", "mean the same; keep one"]),
    (two_endings_of_a_mask, ["a/masks", "01.gif", "mean the same; keep one"]),
    (two_splits, ["'a'", "5 in all", "3 in train"]),
    (two_folders_of_images, ["a/image", "images", "keep one"]),
    (background_alone, ["masks/", "[0]", "--mask-values"]),
    (another_layout, ["different layouts", "known layouts"]),
])
def test_folders_that_cannot_be_used(two_sites, spoil, parts):
    spoil(two_sites)
    loading_fails(two_sites, parts)


def test_a_grey_value_given_twice(two_sites):
    loading_fails(two_sites, ["--mask-values", "each value once"], [0, 1, 1])


def test_no_sites(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file.*nowhere"):
        data.load_folder(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no sites.*known layouts"):
        data.load_folder(tmp_path)


@pytest.mark.parametrize("counts, part", [
    ({"train": 1, "test": 1}, "1 in train, 1 in test"),
    ({"train": 5}, "5 in train"),
    ({"test": 5}, "5 in test"),
    ({"train": 5, "val": 2}, "5 in train, 2 in val"),
])
def test_splits_that_lack_images(tmp_path, counts, part):
    write_split_site(tmp_path, "a", **counts)
    loading_fails(tmp_path, ["site 'a'", part, "2 or more in train without"])


def test_a_folder_of_val_without_images(tmp_path):
    write_split_site(tmp_path, "a", train=5, val=2, test=2)
    unlink_all(tmp_path, "a/val/*/*")
    loading_fails(tmp_path, ["site 'a'", "0 in val"])


# ---------------------------------------------------------------- data: what is left out
def images_without_masks_of_theirs(root):
    unlink_all(root, "a/images/0[45].png")


def unknown_type(root):
    (root / "a/images/notes.xml").write_text("x")


def empty_site(root):
    (root / "empty").mkdir()


def empty_folders_in_a_site(root):
    (root / "empty/pictures").mkdir(parents=True)


def site_of_hidden_files(root):
    (root / "empty").mkdir()
    (root / "empty/.DS_Store").touch()


def site_in_no_known_layout(root):
    shutil.copytree(root / "a/images", root / "strange/pictures")


def empty_folder_in_a_site(root):
    (root / "a/holdout").mkdir()


def file_beside_the_sites(root):
    (root / "9.png").touch()


def file_in_a_part(root):
    (root / "c/train/9.png").touch()


def list_beside_a_split(root):
    (root / "c/train.txt").write_text("00")


def mask_beside_its_image(root):
    shutil.copy(root / "a/masks/00.png", root / "a/images/00_segmentation.png")


@pytest.mark.parametrize("add, count, example", [
    (images_without_masks_of_theirs, 2, "a/masks/04.png"),
    (unknown_type, 1, "a/images/notes.xml"),
    (empty_site, 1, "/empty"),
    (empty_folders_in_a_site, 1, "/empty/pictures"),
    (site_of_hidden_files, 1, "/empty"),
    (site_in_no_known_layout, 6, "strange/pictures/00.png"),
    (empty_folder_in_a_site, 1, "a/holdout"),
    (file_beside_the_sites, 1, "9.png"),
    (file_in_a_part, 1, "c/train/9.png"),
    (list_beside_a_split, 1, "c/train.txt"),
    (mask_beside_its_image, 1, "a/images/00_segmentation.png"),
])
def test_what_is_left_out_is_told(tmp_path, add, count, example):
    write_site(tmp_path, "a", 6)
    write_split_site(tmp_path, "c", train=2, val=2, test=2)
    before, lines = warned(tmp_path)
    assert lines == []
    add(tmp_path)
    after, lines = warned(tmp_path)
    line, = lines
    assert line.startswith(f"left out: {count} files or empty folders")
    assert line.replace(os.sep, "/").endswith(f"{example}")
    assert [site.name for site in after.sites] == ["a", "c"]
    assert same_bytes(before.sites[1], after.sites[1])


def test_all_that_is_left_out_is_one_line(tmp_path):
    write_site(tmp_path, "a", 6)
    images_without_masks_of_theirs(tmp_path)
    unknown_type(tmp_path)
    empty_site(tmp_path)
    file_beside_the_sites(tmp_path)
    _, lines = warned(tmp_path)
    line, = lines
    assert "left out: 5 files" in line


def test_hidden_files_are_neither_read_nor_told(tmp_path):
    folder = write_site(tmp_path, "a", 4)
    before, _ = warned(tmp_path)
    write_site(tmp_path, ".b", 4)
    (tmp_path / ".cache").touch()
    shutil.copy(folder / "images/00.png", folder / "images/._00.png")
    (folder / ".git").mkdir()
    (folder / ".git/config").touch()
    after, lines = warned(tmp_path)
    assert not lines and len(after.sites) == 1
    assert same_bytes(before.sites[0], after.sites[0])


# ---------------------------------------------------------------- data: kinds of image files
def test_capitals_and_other_types(tmp_path):
    a = write_site(tmp_path, "a", 4, grey=True)
    pixels = Image.open(a / "images" / "00.png").copy()
    truth = Image.open(a / "masks" / "00.png").copy()
    for name in ("x.bmp", "y.gif", "A.png", "a.png"):
        pixels.save(a / "images" / name)
        truth.save(a / "masks" / name)
    (a / "images").rename(a / "Images")
    (a / "masks").rename(a / "MASKS")
    loaded, lines = warned(tmp_path)
    split = loaded.sites[0].everything
    assert not lines and len(split.cases) == len([*(a / "Images").iterdir()])
    small = np.asarray(truth.resize((16, 16), Image.NEAREST))
    for case in ("x.bmp", "y.gif", "a.png"):
        mask = split.masks[split.cases.index(f"Images/{case}")]
        assert np.array_equal(mask.numpy(), small)


def fundus_mask():
    mask = np.full((20, 24), 255, np.uint8)
    mask[4:16, 4:20] = 128
    mask[8:12, 8:14] = 0
    mask[4, 4:8] = (191, 192, 64, 63)
    return mask


def test_fundus_domains(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 3)):
        rois = tmp_path / "Domain1" / part / "ROIs"
        for number in range(count):
            image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            save_image(rois / "image" / f"{number}.png", image)
            save_image(rois / "mask" / f"{number}.png", fundus_mask())
    loaded, lines = warned(tmp_path)
    assert not lines and loaded.kind == "fundus" and loaded.unit == "px"
    assert (loaded.classes, loaded.channels) == (3, 3)
    assert loaded.structures == {"disc": (1, 2), "cup": (2,)}
    site, = loaded.sites
    assert cases_of(site) == [8, 2, 3]
    assert all(case.startswith("test/") for case in site.test.cases)
    assert site.train.masks[0, 0, 0] == 0 and site.train.masks[0, 8, 7] == 2
    truth = rois / "mask" / "0.png"
    read = data.read_mask(truth, (1, 20, 24), "fundus", [255, 128, 0], classes=3)[0]
    assert read[4, 4:8].tolist() == [1, 0, 1, 2]
    assert (read[0, 0], read[5, 5], read[9, 9]) == (0, 1, 2)
    with pytest.raises(ValueError, match="each value once"):
        data.load_folder(tmp_path, 16, [255, 255, 0])
    for values in ([0, 255], [255, 128, 0, 1]):
        with pytest.raises(ValueError, match="three for fundus ROIs"):
            data.load_folder(tmp_path, 16, values)
    for file in tmp_path.glob("*/*/ROIs/mask/*"):
        save_image(file, 255 - fundus_mask())
    given = data.load_folder(tmp_path, 16, [0, 127, 255])
    assert given.mask_values == [0, 127, 255]
    assert torch.equal(given.sites[0].train.masks, site.train.masks)
    with pytest.raises(ValueError, match="it holds 0 127 255; expected are background"):
        data.load_folder(tmp_path, 16)


def read_one(path):
    """The pixels of a single image, (H, W, C)."""
    pixels, affine = data.read_file(path)
    assert pixels.dtype == np.float32 and len(pixels) == 1
    assert np.array_equal(affine, np.eye(4))
    return pixels[0]


def test_kinds_of_image_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((4, 3)).resize((24, 20))

    palette = smooth.quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_one(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))

    save_image(tmp_path / "alpha.png", np.dstack([pixels, pixels[:, :, 0]]))
    assert np.array_equal(read_one(tmp_path / "alpha.png"), pixels)

    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    difference = read_one(tmp_path / "cmyk.jpg") - np.asarray(smooth)
    assert np.abs(difference).mean() <= 8

    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    save_image(tmp_path / "deep.png", deep)
    assert np.array_equal(read_one(tmp_path / "deep.png"), deep[:, :, None])

    Image.new("LA", (4, 6), (100, 7)).save(tmp_path / "la.png")
    assert np.array_equal(read_one(tmp_path / "la.png"), np.full((6, 4, 1), 100))

    bits = pixels[:, :, 0] > 99
    save_image(tmp_path / "bits.png", bits)
    assert np.array_equal(read_one(tmp_path / "bits.png")[:, :, 0] > 0, bits)


def upright(pixels):
    return pixels


def mirrored(pixels):
    return pixels[:, ::-1]


def upside_down(pixels):
    return pixels[::-1, ::-1]


def clockwise(pixels):
    return np.rot90(pixels, -1)


def anticlockwise(pixels):
    return np.rot90(pixels, 1)


@pytest.mark.parametrize("orientation, turn", [
    (1, upright),
    (2, mirrored),
    (3, upside_down),
    (6, clockwise),
    (8, anticlockwise),
])
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, turn):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_one(tmp_path / "turned.png"), turn(pixels))


def test_kinds_of_mask_files(tmp_path):
    indices = np.random.default_rng(1).integers(0, 3, (20, 24), dtype=np.uint8)
    coloured = Image.fromarray(indices)
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "palette.png")
    save_image(tmp_path / "grey.png", np.repeat(indices[:, :, None], 3, axis=2))
    save_image(tmp_path / "grey.gif", indices * 90)
    for name, factor in (("palette.png", 1), ("grey.png", 1), ("grey.gif", 90)):
        read = data.read_mask(tmp_path / name, (1, 20, 24), classes=256)
        assert np.array_equal(read[0], indices.astype(int) * factor)


def test_files_of_several_pages(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="pages.tif: 2 pages, one image .*; save one alone"):
        data.read_file(tmp_path / "pages.tif")


# ---------------------------------------------------------------- data: what was misread
def disc(size, radius):
    """A mask (size, size) with 1 in a disc in its middle, else 0; uint8."""
    places = np.arange(size) - (size - 1) / 2
    distance = np.hypot(places, places[:, None])
    return (distance < radius).astype(np.uint8)


def test_grey_palettes_are_read_as_greys(tmp_path):
    mask = disc(64, 9)
    file = tmp_path / "m.png"
    Image.fromarray(255 * mask).quantize(2).save(file)
    stored = Image.open(file)
    assert stored.mode == "P" and stored.getpalette()[:6] == [255, 255, 255, 0, 0, 0]
    assert np.array_equal(data.read_mask(file, (1, 64, 64), values=[0, 255])[0], mask)
    assert np.array_equal(read_one(file)[:, :, 0], 255 * mask)  # as an image, one channel
    black, red = [0, 0, 0], [200, 0, 0]
    for palette in (black + red, black + black):  # which shows no greys of its own: indices
        stored.putpalette(palette)
        stored.save(file)
        assert np.array_equal(data.read_mask(file, (1, 64, 64))[0], 1 - mask)


@pytest.mark.parametrize("background, rim, cup", [
    (0, 1, 2),  # numbered
    (0, 255, 255),  # the disc alone, white
    (255, 0, 0),  # the disc alone, black
    (255, 155, 55),
    (0, 128, 255),  # inside out
])
def test_fundus_masks_of_other_values_are_refused(tmp_path, background, rim, cup):
    classes = disc(64, 20) + disc(64, 9)
    greys = np.array([background, rim, cup], np.uint8)
    file = tmp_path / "m.png"
    save_image(file, greys[classes])
    some = " ".join(str(grey) for grey in sorted({background, rim, cup}))
    with pytest.raises(ValueError, match=f"m.png: it holds {some}; expected are background, rim"):
        data.read_mask(file, (1, 64, 64), "fundus", [255, 128, 0], classes=3)


@pytest.mark.parametrize("disc_radius, cup_radius", [(8, 6), (100, 95), (40, 0), (0, 0)])
def test_fundus_masks_of_any_size_are_read(tmp_path, disc_radius, cup_radius):
    classes = disc(256, disc_radius) + disc(256, cup_radius)
    greys = np.array([255, 128, 0], np.uint8)
    save_image(tmp_path / "m.png", greys[classes])
    read = data.read_mask(tmp_path / "m.png", (1, 256, 256), "fundus", [255, 128, 0], classes=3)
    assert np.array_equal(read[0], classes)


def test_smoothed_fundus_masks_are_read(tmp_path):
    classes = disc(256, 80) + disc(256, 40)
    values = np.array([255, 128, 0], np.uint8)[classes]
    small = Image.fromarray(values).resize((64, 64), Image.BILINEAR)
    small.save(tmp_path / "m.png")
    assert len(np.unique(np.asarray(small))) > 20
    read = data.read_mask(tmp_path / "m.png", (1, 64, 64), "fundus", [255, 128, 0], classes=3)[0]
    assert (read != classes[2::4, 2::4]).mean() < 0.03


def test_a_flipped_bit_in_a_gzip_file_is_seen(tmp_path):
    """Of each flipped bit: the file is refused, or gives the same voxels (a name in the header)."""
    rng = np.random.default_rng(0)
    file = tmp_path / "v.nii.gz"
    write_nifti(file, rng.integers(0, 900, (24, 20, 5)).astype(np.int16), affine("LPS"))
    before, _ = data.read_file(file)
    content = file.read_bytes()
    refused = 0
    for _ in range(60):
        place, bit = rng.integers(len(content)), rng.integers(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        file.write_bytes(changed)
        try:
            after, _ = data.read_file(file)
        except ValueError as error:
            assert "v.nii.gz: not a readable NIfTI file" in str(error)
            refused += 1
        else:
            assert np.array_equal(before, after), (place, bit)
    assert refused > 50


def test_a_scale_in_the_header_is_no_fraction(tmp_path):
    """Labels that nibabel has stored as scaled integers come back a little off."""
    nibabel = pytest.importorskip("nibabel")
    labels = np.arange(120).reshape(6, 5, 4) % 7 / 1
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels, affine("LPS"), header), tmp_path / "m.nii")
    stored = nibabel.load(tmp_path / "m.nii").get_fdata()
    assert 0 < np.abs(stored - labels).max() < 0.015
    read = data.read_mask(tmp_path / "m.nii", (4, 5, 6), "images", classes=7)
    shown, _ = data.read_file(tmp_path / "m.nii")
    assert np.array_equal(read, shown[..., 0].round())


@pytest.mark.parametrize("kind", ["volumes", "images"])
def test_volumes_of_fractions_are_no_masks(tmp_path, kind):
    values = np.full((6, 5, 4), 1e-4, np.float32)
    values[2:4, 1:3] = 0.98
    write_nifti(tmp_path / "m.nii", values, affine("LPS"))
    with pytest.raises(ValueError, match="m.nii: whole numbers from 0 .* nearest neighbour"):
        data.read_mask(tmp_path / "m.nii", (4, 5, 6), kind, classes=2)


def flipped(pixels):
    return pixels[::-1]


def transposed(pixels):
    return pixels.T


def transversed(pixels):
    return pixels.T[::-1, ::-1]


@pytest.mark.parametrize("orientation, turn", [
    (1, upright),
    (2, mirrored),
    (3, upside_down),
    (4, flipped),
    (5, transposed),
    (6, clockwise),
    (7, transversed),
    (8, anticlockwise),
])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_are_turned_as_they_say(tmp_path, orientation, turn, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24)).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "m.tif", tiffinfo={274: orientation})
    turned = turn(pixels)
    assert np.array_equal(read_one(tmp_path / "m.tif")[:, :, 0], turned)
    read = data.read_mask(tmp_path / "m.tif", (1, *turned.shape), classes=256)
    assert np.array_equal(read[0], turned)


@pytest.mark.parametrize("dtype, readable", [
    (np.uint8, True),
    (np.uint16, False),
    (np.float32, False),
])
def test_tiffs_in_which_zero_is_white(tmp_path, dtype, readable):
    file = tmp_path / "m.tif"
    save_image(file, disc(16, 5).astype(dtype))
    before = struct.pack("<HHIHH", 262, 3, 1, 1, 0)  # the tag: black is zero
    content = file.read_bytes()
    assert content.count(before) == 1
    file.write_bytes(content.replace(before, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    if readable:
        assert np.array_equal(read_one(file)[:, :, 0], 255 - disc(16, 5))
    else:
        with pytest.raises(ValueError, match="m.tif: .*0 is white is not read; invert it"):
            data.read_file(file)


def test_masks_in_the_alpha_channel_are_refused(tmp_path):
    alpha = 255 * disc(16, 5)
    black = np.zeros_like(alpha)
    layers = {"LA": [black, alpha], "RGBA": [black, black, black, alpha]}
    for mode, channels in layers.items():
        save_image(tmp_path / f"{mode}.png", np.dstack(channels))
        with pytest.raises(ValueError, match=f"{mode}.png: .*alpha channel; save the mask"):
            data.read_mask(tmp_path / f"{mode}.png", (1, 16, 16))
    grey = disc(16, 5)
    save_image(tmp_path / "opaque.png", np.dstack([grey, grey, grey, 255 - black]))
    assert np.array_equal(data.read_mask(tmp_path / "opaque.png", (1, 16, 16))[0], grey)


def write_deep_rgb(file, values):
    """A PNG of 16 bits a colour, which pillow cannot write."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width = values.shape
    rows = np.repeat(values[:, :, None], 3, axis=2).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_masks_of_16_bits_a_colour_are_refused(tmp_path):
    write_deep_rgb(tmp_path / "m.png", disc(16, 5))
    with pytest.raises(ValueError, match="m.png: .*16 bits a channel.*save the mask"):
        data.read_mask(tmp_path / "m.png", (1, 16, 16))
    write_deep_rgb(tmp_path / "i.png", 257 * np.arange(256).reshape(16, 16))
    assert np.array_equal(read_one(tmp_path / "i.png")[:, :, 1].ravel(), np.arange(256))


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("micron", 1000), ("meter", 0.001)])
def test_voxels_are_measured_in_the_headers_unit(tmp_path, unit, factor):
    nibabel = pytest.importorskip("nibabel")
    spacing = [factor * length for length in (0.5, 0.6, 3.0)]
    volume = nibabel.Nifti1Image(np.ones((6, 5, 4)), affine("LPS", spacing))
    volume.header.set_xyzt_units(unit)
    nibabel.save(volume, tmp_path / "v.nii")
    _, found = data.read_file(tmp_path / "v.nii")
    assert data.voxel_size(found) == pytest.approx((3.0, 0.6, 0.5), rel=1e-5)


@pytest.mark.parametrize("columns, rows, slices, fits", [
    (4.7, 0, 0, False),
    (0.6, 0, 0, False),
    (0, -0.6, 0, False),
    (0, 0, 0.6, False),
    (0.4, -0.4, 0.4, True),
])
def test_masks_lie_within_half_a_voxel_of_their_volume(tmp_path, columns, rows, slices, fits):
    matrix = affine("LPS", (0.6, 0.7, 3))
    moved = matrix.copy()
    moved[:3, 3] += matrix[:3, :3] @ (columns, rows, slices)
    write_nifti(tmp_path / "v.nii", np.ones((24, 20, 5)), matrix)
    write_nifti(tmp_path / "m.nii", np.ones((24, 20, 5)), moved)
    _, own = data.read_file(tmp_path / "v.nii")
    if fits:
        assert data.read_mask(tmp_path / "m.nii", (5, 20, 24), "volumes", None, own).all()
    else:
        with pytest.raises(ValueError, match="m.nii: its affine is not its volume's; resample it"):
            data.read_mask(tmp_path / "m.nii", (5, 20, 24), "volumes", None, own)


def test_labels_that_vanish_by_resizing_are_told(tmp_path):
    """Lesions of 2 pixels radius, 512 to 96: those between the chosen pixels are lost."""
    rng = np.random.default_rng(0)
    for number in range(24):
        y, x = rng.integers(20, 490, 2)
        mask = np.zeros((512, 512), np.uint8)
        mask[y - 2:y + 3, x - 2:x + 3] = disc(5, 2.2)
        image = rng.integers(0, 9, (512, 512)).astype(np.uint8)
        save_image(tmp_path / f"a/images/{number}.png", image)
        save_image(tmp_path / f"a/masks/{number}.png", mask)
    with pytest.warns(UserWarning) as caught:
        loaded = data.load_folder(tmp_path, 96)
    lost = sum(not mask.any() for mask in loaded.sites[0].everything.masks)
    assert 8 < lost < 16
    line, = [str(warning.message) for warning in caught]
    assert line.startswith(f"{lost} of 24 masks lose a class when they become 96 × 96")
    assert "a/masks/" in line.replace(os.sep, "/") and "larger --size" in line
    scores = loaded.sites[0].resized_dice
    assert scores.count(0) == lost and max(scores) < 0.9


def test_what_a_size_costs_by_hand():
    structures = [[1], [2]]
    mask = np.zeros((1, 8, 8), np.int32)
    assert data.dice_with_itself(mask, mask[:, ::2, ::2], structures) is None
    mask[0, :, 4:] = 2
    assert data.dice_with_itself(mask, mask[:, ::2, ::2], [[2]]) == 1  # edges between the pixels
    mask[0, 0, 0] = 1
    assert data.dice_with_itself(mask, mask, structures) == 1
    small = mask[:, 1::2, 1::2]  # in which class 1 is lost, and class 2 is whole
    assert data.dice_with_itself(mask, small, structures) == 0.5
    assert data.dice_with_itself(mask, small, [[1, 2]]) == pytest.approx(2 * 32 / (33 + 32))


def rename_all(folder, names):
    for old, new in zip(sorted(folder.iterdir()), names, strict=True):
        old.rename(folder / f"{new}.png")


PATIENTS = [f"patient{number // 3:02d}_slice{number % 3}" for number in range(6)]


@pytest.mark.parametrize("names, warns", [
    (PATIENTS, True),
    (["7-1", "7-2", "8-1", "8-2", "9-1", "9-2"], True),
    ([f"image_{number:03d}" for number in range(6)], False),
    ([f"ISIC2018_{number}" for number in range(6)], False),  # of one data set, not of one patient
    ([f"{number}_h" for number in range(6)], False),
    ([f"scan{number}" for number in range(6)], False),
])
def test_patients_that_a_shuffle_may_part_are_told(tmp_path, names, warns):
    folder = write_site(tmp_path, "a", 6)
    rename_all(folder / "images", names)
    rename_all(folder / "masks", names)
    _, lines = warned(tmp_path)
    assert len(lines) == warns
    if warns:
        assert f"site 'a': if {names[0]}.png and {names[1]}.png show one patient" in lines[0]
        assert "folders train, val and test" in lines[0]


def test_patients_in_train_may_be_parted_too(tmp_path):
    write_split_site(tmp_path, "a", train=6, test=1)
    for folder in ("images", "masks"):
        rename_all(tmp_path / "a/train" / folder, PATIENTS)
    _, lines = warned(tmp_path)
    assert len(lines) == 1 and "show one patient" in lines[0]


def test_sites_that_number_the_classes_otherwise(tmp_path):
    write_site(tmp_path, "a", 4, values=(0, 1))
    write_site(tmp_path, "b", 4, values=(0, 255))
    loading_fails(tmp_path, ["b/masks/", "2 values up to 255", "--mask-values 0 255"])
    loading_fails(tmp_path, ["a/masks/", "not all among", "all sites", "same value"], [0, 255])
    loaded, lines = warned(tmp_path, [0, 1, 255])
    assert loaded.classes == 3
    assert "no site has masks of all 3 classes (a [0, 1]; b [0, 2])" in lines[0]
    write_site(tmp_path, "c", 4, values=(0, 1, 255))
    assert not warned(tmp_path, [0, 1, 255])[1]


def test_jpeg_masks_are_refused_where_they_are_not_clean(tmp_path):
    mask = disc(64, 20)
    for name, top in (("greys", 255), ("classes", 1)):
        file = tmp_path / f"{name}.jpg"
        Image.fromarray(top * mask).save(file, quality=95)
        with pytest.raises(ValueError, match=f"{name}.jpg: JPEG has changed the .*as PNG"):
            data.read_mask(file, (1, 64, 64), values=[0, 255] if top > 1 else None)
    blocks = np.kron(disc(8, 3), np.ones((8, 8), np.uint8))
    Image.fromarray(255 * blocks).save(tmp_path / "clean.jpg", quality=100)
    read = data.read_mask(tmp_path / "clean.jpg", (1, 64, 64), values=[0, 255])
    assert np.array_equal(read[0], blocks)


@pytest.mark.parametrize("name, tool", [
    ("x.mha", "SimpleITK"),
    ("x.NRRD", "SimpleITK"),
    ("x.dcm", "dcm2niix"),
    ("x.npy", "nibabel"),
    ("x.h5", "h5py"),
    ("x.ppm", "pillow"),
])
def test_formats_that_are_not_read_are_named(tmp_path, name, tool):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(b"x")
    advice = f"{Path(name).suffix.lower()} is not read: convert it to NIfTI or PNG by .*{tool}"
    with pytest.raises(ValueError, match=f"no sites found; known layouts: .*{advice}"):
        data.load_folder(tmp_path)
    write_site(tmp_path, "b", 4)
    _, lines = warned(tmp_path)
    line, = lines
    assert re.search(f"left out: 1 files .*{advice}", line)


def test_other_layouts_are_told_what_is_expected(tmp_path):
    nnunet, prostate158 = tmp_path / "nnUNet", tmp_path / "prostate158"
    for folder, names in (("imagesTr", ["p_0000"]), ("labelsTr", ["p"])):
        for name in names:
            write_nifti(nnunet / folder / f"{name}.nii.gz", np.ones((6, 5, 4)), affine("LPS"))
    for name in ("t2", "t2_anatomy_reader1"):
        write_nifti(prostate158 / f"020/{name}.nii.gz", np.ones((6, 5, 4)), affine("LPS"))
    for root in (nnunet, prostate158):
        loading_fails(root, ["has no mask of its name", "CaseNN_segmentation.nii.gz"])


def test_masks_of_another_format_are_named(two_sites):
    for file in (two_sites / "a/masks").iterdir():
        file.rename(file.with_suffix(".npy"))
    loading_fails(two_sites, ["00.png has no mask", ".npy is not read: convert it"])


def test_labels_beside_masks_are_left_out(two_sites):
    (two_sites / "a/labels").mkdir()
    (two_sites / "a/labels/boxes.txt").touch()
    _, lines = warned(two_sites)
    assert len(lines) == 1 and "left out: 1 files" in lines[0]


@pytest.mark.parametrize("name", ["label", "Labels"])
def test_masks_may_lie_in_a_folder_of_labels(tmp_path, name):
    folder = write_site(tmp_path, "a", 4)
    expected, _ = warned(tmp_path)
    (folder / "masks").rename(folder / name)
    loaded, lines = warned(tmp_path)
    assert not lines and same_bytes(loaded.sites[0], expected.sites[0])


# ---------------------------------------------------------------- data: single files
def test_images_are_paired_with_masks_or_none(tmp_path):
    a = write_site(tmp_path, "a", 3)
    (a / "masks" / "01.png").unlink()
    (a / "masks" / "02.png").rename(a / "masks" / "02_Segmentation.png")
    (a / "images" / "notes.txt").touch()
    (a / "images" / ".hidden.png").touch()
    pairs = data.pair_up(a / "images", a / "masks")
    images = [image.name for image, _ in pairs]
    masks = [mask and mask.name for _, mask in pairs]
    assert images == ["00.png", "01.png", "02.png"]
    assert masks == ["00.png", None, "02_Segmentation.png"]
    unlabelled = data.pair_up(a / "images", None)
    assert [image.name for image, _ in unlabelled] == images
    assert [mask for _, mask in unlabelled] == [None] * 3
    shutil.copy(a / "masks" / "00.png", a / "images" / "01_segmentation.png")
    one_folder = data.pair_up(a / "images", a / "images")
    masks = [mask and mask.name for _, mask in one_folder]
    assert masks == [None, "01_segmentation.png", None]
    assert data.pair_up(a / "images", None) == unlabelled
    (a / "images" / "01_segmentation.png").rename(a / "images" / "x_segmentation.png")
    apart = data.pair_up(a / "images", a / "masks")  # where masks lie elsewhere, an image
    assert [image.name for image, _ in apart] == [*images, "x_segmentation.png"]
    assert data.pair_up(a / "images", None) == unlabelled


def test_masks_must_fit_their_network(tmp_path):
    mask = write_site(tmp_path, "a", 1) / "masks" / "00.png"
    assert data.read_mask(mask, (1, 32, 32), classes=2).shape == (1, 32, 32)
    with pytest.raises(ValueError, match=r"00.png.*\(1, 32, 32\).*\(1, 9, 9\)"):
        data.read_mask(mask, (1, 9, 9))
    save_image(mask, 2 * SPOT)
    with pytest.raises(ValueError, match="00.png: 2 values up to 2; expected are 0, 1 … 1"):
        data.read_mask(mask, (1, 32, 32), classes=2)


def test_what_a_network_sees_of_an_image():
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    seen = data.network_input(Path("x.png"), pixels, 8, 3, "images")
    assert seen.dtype == np.float32
    assert np.allclose(seen[0], standardised(pixels[0]).transpose(2, 0, 1), atol=1e-5)
    grey = pixels[..., 1:2]
    seen = data.network_input(Path("x.png"), np.repeat(grey, 3, axis=3), 8, 1, "images")
    assert np.allclose(seen[0, 0], standardised(grey[0, ..., 0]), atol=1e-5)
    in_colour = data.network_input(Path("x.png"), grey, 8, 3, "images")
    assert np.array_equal(in_colour, np.repeat(seen, 3, axis=1))


def test_what_a_network_sees_of_a_volume():
    volume = np.random.default_rng(1).random((4, 8, 8, 1)).astype(np.float32)
    single = data.network_input(Path("x.NII.GZ"), volume, 8, 1, "images")
    stacks = data.network_input(Path("x.nii"), volume, 8, 3, "volumes")
    assert single.shape == (4, 1, 8, 8) and stacks.shape == (4, 3, 8, 8)
    padded = single[[0, 0, 1, 2, 3, 3], 0]  # the outer slices are their own neighbours
    for number in range(4):
        assert np.array_equal(stacks[number], padded[number:number + 3])


@pytest.mark.parametrize("name, channels, kind", [
    ("x.png", 1, "images"),
    ("x.png", 1, "simulated"),
    ("x.png", 3, "volumes"),
    ("x.nii", 3, "fundus"),
])
def test_what_a_network_refuses(name, channels, kind):
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=f"{name}: the run was trained on .* {kind} "):
        data.network_input(Path(name), pixels, 8, channels, kind)


def test_normalise():
    large = np.array([[0, 1e30], [2e30, 1e30]], dtype=np.float32)  # squares overflow float32
    assert data.normalise(large) == pytest.approx(data.normalise(large / 1e30), abs=1e-6)
    assert not data.normalise(np.full((3, 3), 7.0)).any()


# ---------------------------------------------------------------- data: volumes
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
    cos, sin = math.cos(tilt), math.sin(tilt)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
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
            distance = np.sqrt((x - rng.uniform(-0.2, 0.2)) ** 2 + y**2 + 0.4 * z**2)
            inside = (distance < 0.55) & (np.abs(z) < 0.95)
            mask = inside * (1 + (y > 0))
            image = 300 * inside + rng.normal(400, 40, shape)
            case = root / name / f"Case{number:02d}.nii.gz"
            write_nifti(case, image.astype(np.int16), affine("LPS"))
            ending = "_segmentation" if number % 2 else "_Segmentation"
            drawn = case.with_name(f"Case{number:02d}{ending}.nii.gz")
            write_nifti(drawn, mask.astype(np.uint8), affine("LPS"))


def test_volumes_load_as_stacks(tmp_path):
    write_volumes(tmp_path, {"ISBI": 4, "UCL": 8})
    for file in (tmp_path / "UCL").glob("Case03*"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    loaded, lines = warned(tmp_path)
    assert [site.name for site in loaded.sites] == ["ISBI", "UCL"] and not lines
    assert (loaded.channels, loaded.unit, loaded.kind) == (3, "mm", "volumes")
    assert loaded.structures == {"prostate": (1,)} and loaded.mask_values is None
    site = loaded.sites[1]
    split = site.everything
    assert split.stacks and site.train.stacks and site.test.stacks
    assert split.images.shape == (40, 3, 16, 16) and split.images.dtype == torch.float16
    assert split.masks.dtype == torch.uint8 and split.masks.max() == 1
    names = sorted({data.stem(Path(case)) for case in split.cases})
    assert names == [f"Case{number:02d}" for number in range(8)]
    assert "Case03.NII.GZ" in split.cases
    for spacing in site.spacing.values():  # 20 rows and 24 columns have become 16
        assert spacing == pytest.approx((3.0, 0.6 * 20 / 16, 0.5 * 24 / 16), abs=1e-6)
    assert site.shapes == [(5, 20, 24)] * 8
    assert [len(set(part.cases)) for part in splits_of(site)] == [5, 1, 2]


def test_slices_lie_between_their_neighbours(tmp_path):
    write_volumes(tmp_path, {"UCL": 4})
    loaded, _ = warned(tmp_path)
    split = loaded.sites[0].everything
    for start in range(0, 20, 5):
        volume = split.images[start:start + 5, 1].float()
        assert len(set(split.cases[start:start + 5])) == 1
        assert volume.mean().item() == pytest.approx(0, abs=2e-3)
        assert volume.std().item() == pytest.approx(1, abs=2e-2)
        padded = volume[[0, 0, 1, 2, 3, 4, 4]]  # neighbours stay within the volume
        for number in range(5):
            stack = split.images[start + number].float()
            assert torch.equal(stack, padded[number:number + 3])
            assert torch.equal(split.shown(start + number), volume[number:number + 1])
            mask = split.masks[start + number] > 0
            assert mask.any() == (0 < number < 4)
            if mask.any():  # the prostate is the bright part
                inside, outside = volume[number][mask], volume[number][~mask]
                assert inside.mean() > outside.mean() + 1


def test_volumes_of_one_name_in_train_and_test(tmp_path):
    write_volumes(tmp_path, {"all": 4})
    for part, spacing in (("train", 1.0), ("test", 2.0)):
        for number in range(3):
            place = tmp_path / "sites" / "UCL" / part
            values = np.random.default_rng(number).normal(size=(6, 6, 2))
            matrix = affine("LPS", (spacing, 1, 1))
            write_nifti(place / "images" / f"{number}.nii.gz", values, matrix)
            write_nifti(place / "masks" / f"{number}.nii.gz", (values > 0) * 1.0, matrix)
    loaded, lines = warned(tmp_path / "sites")
    site, = loaded.sites
    assert not lines and [len(set(split.cases)) for split in splits_of(site)] == [2, 1, 3]
    assert len(site.spacing) == 6
    assert site.spacing["test/images/0.nii.gz"][2] == pytest.approx(2 * 6 / 16)
    assert site.spacing["train/images/0.nii.gz"][2] == pytest.approx(6 / 16)


@pytest.mark.parametrize("codes, tilt", [
    ("LPS", 0),
    ("RAS", 0),
    ("LAI", 0),
    ("SPL", 0),
    ("PSR", 0),
    ("RAI", 0.3),
    ("LPS", -0.4),
])
def test_orientation_comes_from_the_header(tmp_path, codes, tilt):
    nibabel = pytest.importorskip("nibabel")
    body = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)  # towards S, P, L
    axes = codes.translate(str.maketrans("IAR", "SPL"))
    stored = body.transpose(["SPL".index(axis) for axis in axes])
    for number, code in enumerate(codes):
        if code in "IAR":
            stored = np.flip(stored, number)
    steps = {"S": 3.0, "P": 0.6, "L": 0.5}
    matrix = affine(codes, [steps[axis] for axis in axes], tilt)
    file = tmp_path / "v.NII.GZ"
    write_nifti(file, np.ascontiguousarray(stored), matrix)
    values, found = data.read_file(file)
    assert np.array_equal(values[..., 0], body)
    assert np.linalg.norm(found[:3, :3], axis=0) == pytest.approx((3.0, 0.6, 0.5), abs=1e-5)
    (tmp_path / "m.nii.gz").write_bytes(data.mask_volume(body > 0.5, file))
    written = nibabel.load(tmp_path / "m.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), stored > 0.5)
    assert np.allclose(written.affine, matrix, atol=1e-5)
    assert written.get_data_dtype() == np.uint8
    assert data.stem(file) == "v" and data.is_volume(file)
    mask = data.read_mask(tmp_path / "m.nii.gz", (4, 5, 6), "volumes", None, found)
    assert np.array_equal(mask, body > 0.5)


def test_written_masks_have_no_grey_window(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.ones((4, 4, 2), np.int16), affine("LPS"))
    image.header["cal_max"] = 800
    nibabel.save(image, tmp_path / "v.nii")
    content = data.mask_volume(np.ones((2, 4, 4)), tmp_path / "v.nii")
    assert content[4:8] == bytes(4)  # no time: the same mask gives the same bytes
    (tmp_path / "m.nii.gz").write_bytes(content)
    assert nibabel.load(tmp_path / "m.nii.gz").header["cal_max"] == 0


VOLUME, DRAWN = "UCL/Case01.nii.gz", "UCL/Case01_segmentation.nii.gz"


def write_mask(root, shape=(24, 20, 5), matrix=None):
    if matrix is None:
        matrix = affine("LPS")
    write_nifti(root / DRAWN, np.ones(shape, np.uint8), matrix)


def break_header(file, place, value):
    raw = bytearray(gzip.decompress(file.read_bytes()))
    raw[place] = value
    file.write_bytes(gzip.compress(bytes(raw)))


def no_segmentation(root):
    (root / DRAWN).unlink()


def shapes_differ(root):
    write_mask(root, (24, 20, 4))


def four_axes(root):
    write_nifti(root / VOLUME, np.ones((24, 20, 5, 2)), affine("LPS"))


def volume_cut_short(root):
    cut_short(root / VOLUME)


def volume_of_text(root):
    text_instead(root / VOLUME)


def two_endings_of_a_volume(root):
    shutil.copy(root / VOLUME, root / "UCL/Case01.nii")


def voxels_differ(root):
    write_mask(root, matrix=affine("LPS", (1, 1, 3)))


def mask_elsewhere(root):
    write_mask(root, matrix=affine("LPS", tilt=0.4))


def volume_not_finite(root):
    write_nifti(root / VOLUME, np.full((24, 20, 5), np.nan), affine("LPS"))


def unknown_data_type(root):
    break_header(root / VOLUME, 70, 77)


def header_to_be_repaired(root):
    break_header(root / VOLUME, 254, 99)


def no_voxels(root):
    break_header(root / VOLUME, 42, 0)


def more_voxels_than_memory(root):
    for place in (43, 45, 47):
        break_header(root / VOLUME, place, 127)


def without_direction(root):
    import nibabel
    header = nibabel.Nifti1Header()
    header.set_data_shape((24, 20, 5))
    header["sform_code"] = 1
    header["srow_x"][0] = header["srow_y"][1] = 1
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 5)), None, header), root / VOLUME)


def photographs_beside(root):
    write_site(root, "photographs", 4)


@pytest.mark.parametrize("spoil, parts", [
    (no_segmentation, ["Case01.nii.gz has no mask", "add it"]),
    (shapes_differ, [DRAWN, "(4, 20, 24)", "(5, 20, 24)"]),
    (four_axes, [VOLUME, "three dimensions", "(24, 20, 5, 2)"]),
    (volume_cut_short, [VOLUME, "not a readable NIfTI file"]),
    (volume_of_text, [VOLUME, "not a readable NIfTI file"]),
    (two_endings_of_a_volume, ["Case01.nii", "mean the same; keep one"]),
    (voxels_differ, [DRAWN, "affine", "resample"]),
    (mask_elsewhere, [DRAWN, "affine", "resample"]),
    (volume_not_finite, [VOLUME, "not finite"]),
    (unknown_data_type, [VOLUME, "not a readable NIfTI file"]),
    (header_to_be_repaired, [VOLUME, "sform_code"]),
    (no_voxels, [VOLUME, "voxels are expected, found (0, 20, 5)"]),
    (more_voxels_than_memory, [VOLUME, "at most", "voxels"]),
    (without_direction, [VOLUME, "direction"]),
    (photographs_beside, ["different layouts", "known layouts"]),
])
def test_volumes_that_cannot_be_used(tmp_path, spoil, parts):
    write_volumes(tmp_path, {"BMC": 4, "UCL": 4})
    spoil(tmp_path)
    loading_fails(tmp_path, parts)


def test_volumes_of_one_slice(tmp_path):
    write_volumes(tmp_path, {"UCL": 6}, shape=(24, 20, 1))
    loaded, lines = warned(tmp_path)
    assert not lines
    stack = loaded.sites[0].train.images[0]
    assert torch.equal(stack[0], stack[1]) and torch.equal(stack[1], stack[2])
    (tmp_path / "UCL" / "Case02.nii.gz").unlink()
    _, lines = warned(tmp_path)
    line, = lines
    assert "left out: 1 files" in line and "Case02_Segmentation.nii.gz" in line
    with pytest.raises(ValueError, match="none for volumes"):
        data.load_folder(tmp_path, 16, [0, 1])


def test_volumes_without_nibabel(tmp_path, monkeypatch):
    write_volumes(tmp_path, {"UCL": 3})
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match="Case.*pip install nibabel"):
        data.load_folder(tmp_path, 16)


@pytest.mark.parametrize("kind, classes, expected", [
    ("volumes", 2, 1),
    ("volumes", 4, 1),
    ("images", 2, 1),
    ("images", 4, 3),
])
def test_labels_of_volumes(tmp_path, kind, classes, expected):
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[2, 3, 1] = 3
    write_nifti(tmp_path / "m.nii", labels, affine("LPS"))
    mask = data.read_mask(tmp_path / "m.nii", (4, 5, 6), kind, [0, 9], classes=classes)
    assert mask.max() == mask[1, 3, 2] == expected and (mask > 0).sum() == 1


def test_one_bright_voxel_is_clipped():
    values = np.random.default_rng(0).normal(100, 10, (5, 20, 24, 1)).astype(np.float32)
    spike = values.copy()
    spike[2, 4, 3] = 1e6
    plain = data.network_input(Path("x.nii"), values, 24, 3, "volumes")[:, 1]
    clipped = data.network_input(Path("x.nii"), spike, 24, 3, "volumes")[:, 1]
    assert np.abs(plain - clipped).mean() < 0.01
    low, high = np.percentile(values, [0.5, 99.5])
    wanted = data.resize(np.clip(values[..., 0], low, high), 24)
    assert np.allclose(plain, standardised(wanted), atol=0.01)


# ---------------------------------------------------------------- train.py, end to end
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


def methods_in(run: Path, phase: str) -> set[str]:
    return {row["method"] for row in rows_of(run) if row["phase"] == phase}


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


def same_run(one: Path, two: Path) -> bool:
    """Equal rows, and the bits of all models equal."""
    files = sorted(file.relative_to(one) for file in one.glob("*/*.pt"))
    if not files or files != sorted(file.relative_to(two) for file in two.glob("*/*.pt")):
        return False
    for file in files:
        first = tensors_in(torch.load(one / file, weights_only=True))
        second = tensors_in(torch.load(two / file, weights_only=True))
        if not same(first, second):
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


def test_a_run_reports_every_method(toy_run):
    assert methods_in(toy_run, "outside") == set(train.OUTSIDE)
    assert methods_in(toy_run, "inside") == set(train.INSIDE)
    assert methods_in(toy_run, "validation") == set(train.INSIDE)
    sites = {row["site"] for row in rows_of(toy_run) if row["phase"] == "inside"}
    assert sites == {"Alder", "Birch", "Cedar", "Hazel", "Linden"}
    trained = {folder.name for folder in toy_run.glob("seed*")}
    assert trained == {f"seed0-Rowan-{way}" for way in train.TRAINING}  # none is trained twice


def dice_of_predictions(predictions, masks) -> float:
    scores = []
    for prediction, mask in zip(predictions.numpy(), masks.numpy()):
        scores.append(iopfl.dice(prediction > 0, mask > 0))
    return float(np.mean(scores))


@pytest.mark.parametrize("method", ["iopfl", "fedavg-ft", "fedavg", "ditto"])
def test_rows_inside_are_those_of_the_saved_models(toy_run, method):
    saved = torch.load(toy_run / "seed0-Rowan-plain" / "last.pt", weights_only=True)
    dataset = data.simulate_sites("prostate", 0, 16, 8)
    for site in dataset.sites[:5]:
        states = {
            "iopfl": saved["personal"][site.name],
            "fedavg-ft": saved["fine_tuned"][site.name],
            "fedavg": saved["last"]["global_state"],
            "ditto": saved["last"]["second"][site.name],
        }
        model = UNet(1, 2, 2, 1)
        model.load_state_dict(states[method])
        expected = dice_of_predictions(iopfl.predict(model, site.test.images), site.test.masks)
        row = find_row(toy_run, "inside", method, site.name)
        assert row["dice"] == pytest.approx(expected, abs=1e-12)


def test_the_saved_models_are_those_of_the_method(toy_run):
    """M1 and M2 once more, with the settings of the run."""
    saved = torch.load(toy_run / "seed0-Rowan-plain" / "last.pt", weights_only=True)
    dataset = data.simulate_sites("prostate", 0, 16, 8)
    clients = {site.name: site.train.to("cpu") for site in dataset.sites[:5]}
    model = UNet(1, 2, 2, 1, seeded()).to(memory_format=torch.channels_last)
    personal = {}
    for last in iopfl.federate(model, clients, 2, train.WITH_DITTO):
        for name, local in last.local.items():
            personal[name] = iopfl.update_personal(personal.get(name), local, 0.7)
    assert same(saved["last"]["global_state"], last.global_state)
    for name in clients:
        assert same(saved["personal"][name], personal[name])
        assert same(saved["fine_tuned"][name], last.local[name])
        assert same(saved["last"]["second"][name], last.second[name])


def test_what_is_routed_is_each_personalised_model_and_the_global_one(toy_run):
    file = toy_run / "seed0-Rowan-plain" / "last.pt"
    progress = train.load_progress(file)
    models = train.routed_models(UNet(1, 2, 2, 1), progress)
    assert list(models) == ["Alder", "Birch", "Cedar", "Hazel", "Linden", "global"]
    for name, model in models.items():
        expected = progress.last.global_state
        if name != "global":
            expected = progress.personal[name]
        assert same(model.state_dict(), expected) and not model.training


@pytest.mark.parametrize("method", ["routing-ours", "routing-published"])
def test_rows_outside_are_those_of_the_saved_network(toy_run, method):
    folder = toy_run / "seed0-Rowan-plain"
    settings = router.PUBLISHED if method == "routing-published" else router.RoutingSettings()
    routed = router.build_routed([UNet(1, 2, 2, 1)] * 6, settings)
    routed.load_state_dict(torch.load(folder / f"{method}.pt", weights_only=True))
    split = data.simulate_sites("prostate", 0, 16, 8).sites[-1].everything
    prediction = router.predict(routed, split.images).argmax(dim=1)
    expected = dice_of_predictions(prediction, split.masks)
    row = find_row(toy_run, "outside", method, "Rowan")
    assert row["dice"] == pytest.approx(expected, abs=1e-12)
    for picture in (f"{method}-masks.png", f"{method}-weights.png", "curves.png"):
        assert Image.open(folder / picture).size[0] > 100
    weights = json.loads((folder / "rows.json").read_text())["routing"][method]
    routers = routed.parts(router.Router)
    assert len(weights) == len(routers)
    for values in weights.values():
        assert len(values) == 6
        if method == "routing-ours":
            assert sum(values) == pytest.approx(1, abs=1e-5)


def test_history_holds_losses_and_every_fifth_round_validation(tmp_path):
    words = ["--hold-out", "none", "--methods", "fedbn", "--rounds", "5", "--out", tmp_path]
    assert call_train(*TOY, *words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    part, = results["history"]
    assert [entry["round"] for entry in part["rounds"]] == [1, 2, 3, 4, 5]
    for entry in part["rounds"]:
        assert len(entry["losses"]) == 6
        assert ("validation" in entry) == (entry["round"] == 5)
    last = [row["dice"] for row in results["rows"] if row["phase"] == "validation"]
    expected = pytest.approx(np.mean(last), abs=1e-12)
    assert part["rounds"][-1]["validation"] == {"fedbn": expected}
    assert results["machine"]["device"] == "cpu" and results["machine"]["peak_memory_mib"] > 10


def test_absent_hospitals_are_scored_with_the_current_global_model(tmp_path, capsys):
    words = ["--hold-out", "none", "--participation", "0.2", "--methods", "fedavg", "fedbn"]
    assert call_train(*TOY, *words, "--out", tmp_path) == 0
    assert "never took part, scored with the global model: " in capsys.readouterr().out
    saved = {}
    for way in ("plain", "fedbn"):
        folder = tmp_path / f"seed0-all-inside-{way}"
        saved[way] = torch.load(folder / "last.pt", weights_only=True)["last"]
    assert 1 <= len(saved["fedbn"]["kept"]) < 6
    for site in data.simulate_sites("prostate", 0, 16, 8).sites:
        kept = saved["fedbn"]["kept"].get(site.name, {})
        states = {
            "fedavg": saved["plain"]["global_state"],
            "fedbn": saved["fedbn"]["global_state"] | kept,
        }
        for method, state in states.items():
            model = UNet(1, 2, 2, 1)
            model.load_state_dict(state)
            found = dice_of_predictions(iopfl.predict(model, site.test.images), site.test.masks)
            row = find_row(tmp_path, "inside", method, site.name)
            assert row["dice"] == pytest.approx(found, abs=1e-12)


def test_ceilings_alone_print_their_tables(tmp_path, capsys):
    assert call_train(*TOY, "--methods", "oracle", "--out", tmp_path / "a") == 0
    assert "oracle (ceiling)" in capsys.readouterr().out
    words = ["--hold-out", "none", "--methods", "centralised", "--out", tmp_path / "b"]
    assert call_train(*TOY, *words) == 0
    assert "centralised (ceiling)" in capsys.readouterr().out


# ---------------------------------------------------------------- resuming
def test_a_killed_run_goes_on_to_the_same_bits(toy_run, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *TOY]
    command += ["--methods", "all-inside", "all-outside", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "seed0-Rowan-plain" / "last.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "results.json").exists()
    assert call_train(*TOY, "--out", out) == 2  # it holds a run
    assert call_train("--resume", out) == 0
    assert same_run(toy_run, out)
    assert call_train("--resume", out) == 0  # the tables again
    assert same_run(toy_run, out)


def test_a_finished_run_goes_on(tmp_path):
    """With more rounds, seeds and methods: to the same bits as if it had been asked at once."""
    words = ["--hold-out", "Birch", "--methods", "iopfl", "routing-ours"]
    more = ["--rounds", "3", "--seeds", "1", "--methods", "tent", "fedbn"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert call_train(*TOY, *words, "--out", parts) == 0
    assert call_train("--resume", parts, *more) == 0
    words += ["tent", "fedbn"]
    assert call_train(*TOY, *words, "--rounds", "3", "--seeds", "0", "1", "--out", whole) == 0
    assert same_run(parts, whole)


def test_new_methods_outside_are_tried_without_training(copy_of_run, capsys):
    file = copy_of_run / "seed0-Rowan-plain" / "rows.json"
    result = json.loads(file.read_text())
    result["methods"].remove("tent")
    result["rows"] = [row for row in result["rows"] if row["method"] != "tent"]
    file.write_text(json.dumps(result))
    before = (copy_of_run / "seed0-Rowan-plain" / "last.pt").read_bytes()
    expected = find_row(copy_of_run, "outside", "tent", "Rowan")
    assert call_train("--resume", copy_of_run) == 0
    assert "Dice loss" not in capsys.readouterr().out
    assert (copy_of_run / "seed0-Rowan-plain" / "last.pt").read_bytes() == before
    assert find_row(copy_of_run, "outside", "tent", "Rowan") == expected


@pytest.mark.parametrize("words, part", [
    (["--lr", "0.1"], "--root, --device may be given, not --lr"),
    (["--published"], "may be given, not --published"),
    (["--size", "32", "--rounds", "3", "--lr", "1"], "not --lr, --size"),
    (["--size", "96"], "not --size"),  # the default
    (["--rounds", "1"], "the run goes to 2 already"),
    (["--methods", "magic"], "magic is unknown"),
])
def test_resume_refuses(copy_of_run, capsys, words, part):
    before = (copy_of_run / "config.json").read_bytes()
    assert call_train("--resume", copy_of_run, *words) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert (copy_of_run / "config.json").read_bytes() == before


def test_a_run_of_a_gpu_goes_on_without_one(copy_of_run, capsys):
    file = copy_of_run / "config.json"
    config = json.loads(file.read_text())
    config["settings"]["device"] = "cuda"
    file.write_text(json.dumps(config))
    if not torch.cuda.is_available():
        assert call_train("--resume", copy_of_run) == 2
        assert "no GPU was found" in capsys.readouterr().err
    assert call_train("--resume", copy_of_run, "--device", "cpu") == 0
    assert json.loads(file.read_text())["settings"]["device"] == "cpu"


def test_ditto_cannot_come_later(tmp_path, capsys):
    assert call_train(*TOY, "--methods", "iopfl", "--out", tmp_path) == 0
    for word in ("ditto", "all-inside"):
        assert call_train("--resume", tmp_path, "--methods", word) == 2
        assert "models from the first round on" in capsys.readouterr().err


def test_images_may_move_but_not_change(tmp_path, capsys):
    for name in "abc":
        write_site(tmp_path / "images", name, 5)
    run = tmp_path / "run"
    words = ["--root", tmp_path / "images", "--methods", "iopfl", "--out", run]
    assert call_train(*TOY_FOLDER, *words) == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    assert call_train("--resume", run) == 2
    assert "no such folder" in capsys.readouterr().err
    assert call_train("--resume", run, "--root", tmp_path / "moved") == 0
    shutil.copy(tmp_path / "moved/a/images/00.png", tmp_path / "moved/a/images/01.png")
    assert call_train("--resume", run) == 1
    assert "not those the run began with" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "last.pt", "rows.json"])
@pytest.mark.parametrize("spoilt", [b"", b"{}", b"text"])
def test_damaged_files_are_named(copy_of_run, capsys, name, spoilt):
    file = copy_of_run / name
    if name != "config.json":
        file = copy_of_run / "seed0-Rowan-plain" / name
        (file.parent / "rows.json").unlink()  # so that last.pt is needed
    file.write_bytes(spoilt)
    assert call_train("--resume", copy_of_run) == 1
    error = capsys.readouterr().err
    assert str(file) in error and "delete it" in error and error.count("\n") == 1


# ---------------------------------------------------------------- folders, use and errors
def test_without_out_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("prostate", "prostate-2"):
        assert call_train(*TOY, "--methods", "iopfl", "--rounds", "1") == 0
        assert (tmp_path / "runs" / expected / "results.json").exists()


def test_published_settings():
    args = train.parse_arguments(["--published"])
    assert (args.rounds, args.alpha) == (100, 0.1)
    assert "routing-published" in args.methods and "routing-ours" not in args.methods
    args = train.parse_arguments(["--published", "--hold-out", "none", "--alpha", "0.4"])
    assert args.alpha == 0.4 and args.methods == ["fedavg", "iopfl"]
    args = train.parse_arguments([])
    assert (args.rounds, args.alpha) == (30, 0.7)


@pytest.mark.parametrize("words, part", [
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--methods", "magic"], "magic is unknown"),
    (["--hold-out", "Nowhere", "--size", "16"], "Nowhere: choose all, none or one of Alder"),
    (["--seeds", "-1"], "--seeds must lie"),
    (["--alpha", "2"], "--alpha must lie"),
    (["--participation", "0"], "--participation must be"),
    (["--lr", "nan"], "--lr must be"),
    (["--images-per-site", "3"], "--images-per-site must be"),
    (["--root", "nowhere"], "no such folder"),
    (["--mask-values", "0", "1"], "--mask-values goes with --root"),
    (["--width", "1024", "--depth", "10", "--size", "2000"], "more than 8192 channels"),
    (["--size", "8"], "--size must be above 8 pixels"),
    (["--round", "3"], "unrecognized arguments: --round"),
    (["--task", "brain"], "invalid choice: 'brain'"),
    (["--device", "cuda"], "no GPU was found"),
    (["--hold-out", "none", "--methods", "oracle"], "oracle needs a hospital outside"),
])
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, words, part):
    monkeypatch.setattr(torch.cuda, "is_available", bool)  # False
    assert call_train("--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--resume", ""], ["--root", ""], ["--out", ""]])
def test_an_empty_word_is_refused(capsys, words):
    """A variable of the shell that is not set: without this, hospitals would be simulated."""
    assert call_train(*words) == 2
    assert "one of the words is empty" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--task", "prostate"], ["--images-per-site", "60"]])
def test_words_about_simulated_images_beside_a_root(tmp_path, capsys, words):
    assert call_train("--root", tmp_path, *words) == 2
    assert "are of simulated images" in capsys.readouterr().err


def test_a_run_of_a_task_that_is_gone(copy_of_run, capsys):
    file = copy_of_run / "config.json"
    file.write_text(file.read_text().replace('"task": "prostate"', '"task": "square"'))
    assert call_train("--resume", copy_of_run) == 1
    assert "task square is not in data.TASKS" in capsys.readouterr().err


def test_output_to_a_stream_that_cannot_be_set_up(monkeypatch):
    """In a notebook sys.stdout has no `reconfigure`."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert call_train("--size", "0") == 2


def test_out_must_be_new_or_empty_and_not_among_the_images(tmp_path, capsys):
    write_site(tmp_path / "images", "a", 4)
    (tmp_path / "notes.txt").write_text("mine")
    words = ["--root", tmp_path / "images", "--out"]
    for out, part in ((tmp_path, "not empty"), (tmp_path / "notes.txt", "not empty"),
                      (tmp_path / "images" / "b", "lies among the images")):
        assert call_train(*words, out) == 2
        assert part in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "notes.txt"]


def test_bad_images_end_in_one_line(tmp_path, capsys):
    folder = write_site(tmp_path / "images", "a", 4)
    (folder / "images" / "00.png").write_bytes(b"no image")
    assert call_train("--root", tmp_path / "images", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "00.png: not a readable image" in error and error.count("\n") == 1


def test_divergence_ends_in_one_line(tmp_path, capsys):
    assert call_train(*TOY, "--lr", "1e30", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert "a lower learning rate may help" in error and error.count("\n") == 1


def test_ctrl_c_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupt)
    assert call_train("--out", tmp_path) == 130
    error = capsys.readouterr().err
    assert "--resume" in error and error.count("\n") == 1


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (FloatingPointError("x"), 1)])
def test_adapt_folder_ends_in_one_line(toy_run, tmp_path, capsys, monkeypatch, error, status):
    def fail(*args):
        raise error

    monkeypatch.setattr(adapt_folder, "run", fail)
    assert adapt_to(toy_run, "--simulated", "--out", tmp_path) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_other_errors_show_their_traceback(tmp_path, monkeypatch):
    """People edit this code."""
    def wrong(models, split, seed):
        raise KeyError("an error in a new method")

    monkeypatch.setitem(train.OUTSIDE, "global", wrong)
    with pytest.raises(KeyError, match="an error in a new method"):
        train.main([*TOY, "--methods", "global", "--out", str(tmp_path)])


def test_a_closed_stdout_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert call_train("--list", *TOY, "--out", tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.json", "a.pt", "a.png"])
def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, capsys, monkeypatch, name):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    file = tmp_path / name
    file.write_bytes(b"as it was")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit):
        if name == "a.png":
            train.save_image(Image.new("L", (2, 2)), file)
        else:
            train.save(file, {"a": 1})
    assert f"{file}: cannot be written (No space left" in capsys.readouterr().err
    assert file.read_bytes() == b"as it was" and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        train.save(tmp_path / "out" / "a.json", {"a": 1})
    assert "out/a.json: cannot be written" in capsys.readouterr().err.replace(os.sep, "/")
    with pytest.raises(SystemExit):
        train.load(tmp_path)  # a folder, or a pipe, which would be waited for
    assert "there is no such file" in capsys.readouterr().err


def test_a_federation_without_its_models_is_told(copy_of_run, tmp_path, capsys):
    (copy_of_run / "seed0-Rowan-plain" / "last.pt").unlink()
    assert adapt_to(copy_of_run, "--simulated", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "last.pt is missing" in error and error.count("\n") == 1


def test_fp32_means_fp32():
    train.prepare_torch(SimpleNamespace(threads=1))
    assert torch.backends.cudnn.allow_tf32 is False and torch.backends.cudnn.deterministic


# ---------------------------------------------------------------- tables and pictures
def toy_row(method, site, seed, dice, hd95):
    row = {"method": method, "site": site, "seed": seed, "structure": "gland", "dice": dice}
    return row | {"hd95": hd95, "assd": hd95, "cases": 2, "distance_cases": 1}


def test_table_by_hand():
    rows = [
        toy_row("fedavg", "A", 0, 0.50, 4.0), toy_row("fedavg", "A", 1, 0.60, 6.0),
        toy_row("fedavg", "B", 0, 0.70, None), toy_row("fedavg", "B", 1, 0.80, 2.0),
        toy_row("oracle", "A", 0, 0.90, 1.0), toy_row("oracle", "A", 1, 0.90, 1.0),
        toy_row("iopfl", "A", 0, 0.40, 5.0), toy_row("iopfl", "A", 1, 0.40, 5.0),
        toy_row("iopfl", "B", 0, 0.90, 5.0), toy_row("iopfl", "B", 1, 1.00, 5.0),
    ]
    titles, fedavg, oracle, iopfl_line, counts = train.table(rows, "mm").split("\n")
    assert titles.split() == ["A", "B", "mean", "HD95", "mm", "ASSD", "mm"]
    # 55 ± 7.1 at A; 75 ± 7.1 at B; means over hospitals 60 and 70; distances 4 and (6 + 2) / 2
    dice = ["55.0±7.1*", "75.0±7.1", "65.0±7.1"]
    assert fedavg.split()[2:] == dice + ["4.00±0.00*", "4.00±0.00*"]
    assert oracle.split()[2:] == ["(ceiling)", "90.0±0.0", "-", "90.0±0.0", "1.00±0.00",
                                  "1.00±0.00"]
    assert iopfl_line.split()[2:5] == ["40.0±0.0", "95.0±7.1*", "67.5±3.5*"]
    assert counts.startswith("HD95 and ASSD count 10 of 20 pairs of truth and prediction")


def test_the_palette_has_256_colours():
    colours = np.array(train.PALETTE).reshape(256, 3)
    assert len(np.unique(colours, axis=0)) == 256
    assert colours.min() >= 0 and colours.max() < 256 and not colours[0].any()


def test_an_outline_lies_on_the_border_of_its_mask():
    mask = np.zeros((16, 16), dtype=int)
    mask[4:12, 4:12] = 1
    image = torch.zeros(1, 16, 16)
    pixels = np.asarray(train.picture(image, [(mask, train.BLUE)]))  # ten times as large
    blue = (pixels == train.BLUE).all(axis=2)
    rows = np.flatnonzero(blue.any(axis=1))
    assert abs(rows[0] - 40) <= 3 and abs(rows[-1] - 119) <= 3
    assert not blue[60:100, 60:100].any() and blue.sum() > 200


def test_evenly_chosen():
    assert train.evenly_chosen([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert train.evenly_chosen([1, 2], 6) == [1, 2]


def test_a_look_at_images(tmp_path, capsys):
    write_site(tmp_path / "images", "a", 5)
    words = ["--root", tmp_path / "images", "--list", "--size", "16", "--out", tmp_path / "look"]
    assert call_train(*words) == 0
    text = capsys.readouterr().out
    assert "a: 5 images; cases: 3 train, 1 validation, 1 test" in text
    assert "32 × 32" in text
    assert re.search(r"masks resized and brought back: Dice \d+.\d %, least \d+.\d %", text)
    assert (tmp_path / "look" / "images-hospitals.png").exists()


# ---------------------------------------------------------------- examples
def adapt_to(*words) -> int:
    return call(adapt_folder.main, *words)


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory) -> tuple[Path, Path]:
    """Three sites with images of 20 × 24 and a run on them, with c outside."""
    root = tmp_path_factory.mktemp("folder")
    for name in "abc":
        write_site(root / "sites", name, 5, size=(20, 24), grey=True)
    assert call_train("--root", root / "sites", *TOY_FOLDER, "--out", root / "run") == 0
    return root / "sites", root / "run"


def adapted_rows(out: Path) -> list[dict]:
    return json.loads((out / "adapted.json").read_text())["rows"]


def test_adapting_to_a_folder(folder_run, tmp_path, capsys):
    """Masks at the files' own sizes with the Dice that is reported; a broken file is left out."""
    sites, run = folder_run
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    shutil.copytree(sites / "c", theirs)
    (theirs / "images" / "broken.png").write_bytes(b"no image")
    (theirs / "images" / "notes.txt").write_text("mine")
    words = [theirs / "images", "--masks", theirs / "masks", "--probabilities", "--out", out]
    assert adapt_to(run, *words) == 1
    error = capsys.readouterr().err
    assert "left out: " in error and "broken.png" in error and "notes.txt" in error
    rows = adapted_rows(out)
    assert [row["file"] for row in rows] == [f"0{number}.png" for number in range(5)]
    for row in rows:
        mask = np.array(Image.open(out / "masks" / row["file"]))
        truth = np.array(Image.open(theirs / "masks" / row["file"]))
        assert mask.shape == (20, 24)
        assert row["foreground"] == pytest.approx((mask > 0).mean())
        assert row["Dice class 1"] == pytest.approx(iopfl.dice(mask > 0, truth > 0))
        assert 0 <= row["confidence"] <= 1
        stem = row["file"].removesuffix(".png")
        maps = np.load(out / "probabilities" / f"{stem}.npy")
        assert maps.shape == (1, 2, 20, 24)
        assert maps.sum(axis=1) == pytest.approx(1, abs=1e-2)
        assert (maps[0].argmax(axis=0) == mask).mean() > 0.98  # float16 makes ties
        assert (out / "overlays" / row["file"]).exists()


def test_overlays_show_the_global_model_too(folder_run, tmp_path, monkeypatch):
    sites, run = folder_run
    shown = []
    monkeypatch.setattr(adapt_folder, "draw_overlay",
                        lambda pixels, outlines, file: shown.append(outlines))
    images = sites / "c" / "images"
    assert adapt_to(run, images, "--out", tmp_path / "out") == 0
    config = json.loads((run / "config.json").read_text())
    model = adapt_folder.empty_model(config, "cpu")
    last = torch.load(run / "seed0-c-plain" / "last.pt", weights_only=True)["last"]
    model.load_state_dict(last["global_state"])
    assert len(shown) == 5
    for file, outlines in zip(sorted(images.iterdir()), shown):
        (mask, orange), (_, blue) = outlines
        assert (orange, blue) == (train.ORANGE, train.BLUE)
        pixels, _ = data.read_file(file)
        seen = data.network_input(file, pixels, config["settings"]["size"], 1, "images")
        logits = model.eval()(torch.from_numpy(seen))
        expected, _ = data.at_own_size(logits.detach().softmax(dim=1), (20, 24))
        assert (mask == expected).mean() > 0.99  # another batch rounds otherwise


def test_images_behind_the_options_and_masks_in_their_folder(folder_run, tmp_path, monkeypatch):
    """IMAGES may be the last word, and --masks the same folder in another spelling."""
    sites, run = folder_run
    together = tmp_path / "together"
    shutil.copytree(sites / "c" / "images", together)
    for file in (sites / "c" / "masks").iterdir():
        shutil.copy(file, together / f"{file.stem}_segmentation.png")
    monkeypatch.chdir(tmp_path)
    assert adapt_to(run, "--out", "out", "--masks", together, "together") == 0
    rows = adapted_rows(tmp_path / "out")
    assert len(rows) == 5 and all("Dice class 1" in row for row in rows)


def test_masks_that_need_nibabel_are_not_scored(folder_run, tmp_path, monkeypatch, capsys):
    sites, run = folder_run
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "00.nii.gz").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    words = [sites / "c" / "images", "--masks", tmp_path / "masks", "--out", tmp_path / "out"]
    assert adapt_to(run, *words) == 0
    assert "not scored: " in capsys.readouterr().err
    assert len(adapted_rows(tmp_path / "out")) == 5


def test_outlines_of_both_masks_in_an_overlay(tmp_path):
    by_global = np.zeros((3, 20, 20), dtype=np.uint8)
    mask = by_global.copy()
    by_global[1, 4:8, 4:8] = 1
    mask[2, 10:16, 10:16] = 1
    pixels = np.zeros((3, 20, 20, 1), dtype=np.float32)
    file = tmp_path / "overlay.png"
    outlines = [(by_global, train.ORANGE), (mask, train.BLUE)]
    adapt_folder.draw_overlay(pixels, outlines, file)
    drawn = np.asarray(Image.open(file))
    width = 480 + 4
    assert drawn.shape[1] == 2 * width  # the first slice is empty in both
    orange = (drawn == train.ORANGE).all(axis=2)
    blue = (drawn == train.BLUE).all(axis=2)
    assert orange[:, :width].any() and not orange[:, width:].any()
    assert blue[:, width:].any() and not blue[:, :width].any()


def test_what_was_adapted_is_applied_again(folder_run, tmp_path, capsys):
    sites, run = folder_run
    images, first, again = sites / "c" / "images", tmp_path / "first", tmp_path / "again"
    assert adapt_to(run, images, "--out", first) == 0
    assert adapt_to(first, images, "--out", again) == 0
    for file in (first / "masks").iterdir():
        assert file.read_bytes() == (again / "masks" / file.name).read_bytes()
    for out, has_global in ((first, True), (again, False)):
        pictures = [np.asarray(Image.open(file)) for file in (out / "overlays").iterdir()]
        orange = [(picture == train.ORANGE).all(axis=2).any() for picture in pictures]
        assert any(orange) == has_global
    assert adapt_to(first, images, "--online", "--out", tmp_path / "x") == 2
    assert "leave out --online" in capsys.readouterr().err


def test_adapting_repeats_the_phase_outside(folder_run, tmp_path):
    """The same probabilities, order and seed: Dice of resized masks is that of the run."""
    sites, run = folder_run
    site = data.load_folder(sites, 16).sites[-1]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for case in site.everything.cases:  # in the order in which the run saw them
        number = len(list(pictures.iterdir()))
        shutil.copy(sites / "c" / case, pictures / f"{number}.png")
    assert adapt_to(run, pictures, "--out", tmp_path / "out") == 0
    one = torch.load(run / "seed0-c-plain" / "routing-ours.pt", weights_only=True)
    two = torch.load(tmp_path / "out" / "adapted.pt", weights_only=True)
    assert same(one, two)


def test_simulated_images_are_adapted_to(toy_run, tmp_path):
    for words in ([], ["--online"]):
        out = tmp_path / f"out{len(words)}"
        assert adapt_to(toy_run, "--simulated", *words, "--out", out) == 0
        rows = adapted_rows(out)
        assert len(rows) == 8 and all("Dice prostate" in row for row in rows)
    truth = np.array(Image.open(out / "truth" / "Rowan-000.png"))
    drawn = data.simulate_sites("prostate", 1000, 16, 8).sites[-1].train
    assert np.array_equal(truth, drawn.masks[0].numpy())  # new images, not those of the run


@pytest.mark.parametrize("words, part", [
    (["RUN"], "name a folder of images"),
    (["RUN", "IMAGES", "--simulated"], "name a folder of images"),
    (["RUN", "--simulated"], "no simulated hospital"),
    (["RUN", "nowhere"], "nowhere: no such folder"),
    (["RUN", "IMAGES", "--mask-values", "0", "1"], "goes with --masks"),
    (["RUN", "--simulated", "--masks", "IMAGES"], "draws its own masks"),
    (["RUN", "IMAGES", "--masks", "IMAGES", "--mask-values", "0", "1", "2"], "2 classes"),
    (["IMAGES", "IMAGES"], "no finished federation"),
])
def test_wrong_use_of_adapt_folder(folder_run, tmp_path, capsys, words, part):
    sites, run = folder_run
    places = {"RUN": run, "IMAGES": sites / "c" / "images"}
    words = [places.get(word, word) for word in words]
    assert adapt_to(*words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_adapting_to_volumes(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    write_volumes(tmp_path / "sites", {"A": 4, "B": 4, "C": 4})
    assert call_train("--root", tmp_path / "sites", *TOY_FOLDER, "--out", tmp_path / "run") == 0
    theirs, out = tmp_path / "sites" / "C", tmp_path / "out"
    assert adapt_to(tmp_path / "run", theirs, "--masks", theirs, "--out", out) == 0
    for row in adapted_rows(out):
        written = nibabel.load(out / "masks" / row["file"])
        case = row["file"].removesuffix(".nii.gz")
        truth = nibabel.load(next(theirs.glob(f"{case}_*.nii.gz")))
        assert written.shape == truth.shape and np.allclose(written.affine, truth.affine)
        mask, drawn = np.asarray(written.dataobj) > 0, np.asarray(truth.dataobj) > 0
        assert row["Dice prostate"] == pytest.approx(iopfl.dice(mask, drawn))


def test_no_half_mask_is_left_on_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_volumes(tmp_path, {"A": 1})
    monkeypatch.setattr(os, "fsync", full)
    volume = tmp_path / "A/Case00.nii.gz"
    with pytest.raises(SystemExit):
        adapt_folder.write_mask(volume, np.ones((5, 20, 24), np.uint8), tmp_path / "out")
    assert "Case00.nii.gz: cannot be written (No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out/masks").iterdir())


def variants_in(text: str) -> dict[str, list[str]]:
    """The cells of the table of ablations, by variant."""
    return {line[:26].strip(): line[26:].split() for line in text.split("\n")}


def test_ablations_of_routing(toy_run, capsys):
    names = ["routing-ours", "share 1/2", "random start", "global only", "online", "no factor"]
    assert call(ablations.main, toy_run, "--variants", *names) == 0
    found = variants_in(capsys.readouterr().out)
    for name in names:
        assert len(found[name]) == 8
    for name, method in (("routing-ours", "routing-ours"), ("global model", "global")):
        row = find_row(toy_run, "outside", method, "Rowan")
        assert float(found[name][0]) == pytest.approx(100 * row["dice"], abs=0.006)
    assert found["routing-ours"][1:] == ["+0.00", "+0.00", "+0.00", "0", "1", "0", "1"]
    for words in (["--variants", "x"], ["--images", "0"]):
        assert call(ablations.main, toy_run, *words) == 2


def test_ablations_adapt_to_some_images_at_a_time(toy_run, capsys, monkeypatch):
    """Which images each network sees, and whose statistics it takes, by the factor of the share."""
    counts, shares = [], []
    fit_to_site = router.fit_to_site

    def noted(routed, models, images, **options):
        fit_to_site(routed, models, images, **options)
        norm = routed.parts(router.RoutedBatchNorm)[0]
        counts.append(len(images))
        shares.append((norm.site_share * len(images) / (len(images) + norm.site_prior)).item())

    monkeypatch.setattr(router, "fit_to_site", noted)
    names = ["no steps", "no factor, no steps"]
    assert call(ablations.main, toy_run, "--images", 3, "--variants", *names) == 0
    assert counts == [3, 3, 2] * 2
    for count, with_factor, without in zip(counts, shares[:3], shares[3:]):
        assert with_factor == pytest.approx(without * count / (count + 16))
    found = variants_in(capsys.readouterr().out)
    assert found["no steps"][1] == "+0.00"  # the first that was named is compared with


def test_ablations_of_alpha(tmp_path, capsys):
    words = ["--hold-out", "none", "--methods", "iopfl", "fedavg-ft", "--out", tmp_path]
    assert call_train(*TOY, *words) == 0
    assert call(ablations.main, tmp_path) == 0
    found = variants_in(capsys.readouterr().out)
    for variant, method in (("α 0.7", "iopfl"), ("α 0.0", "fedavg-ft")):
        rows = [row for row in rows_of(tmp_path) if row["phase"] == "inside"]
        dice = [row["dice"] for row in rows if row["method"] == method]
        assert float(found[variant][0]) == pytest.approx(100 * np.mean(dice), abs=0.006)
    assert ablations.GLOBAL_CONTROL in found


def test_ablations_refuse(folder_run, capsys):
    sites, _ = folder_run
    assert call(ablations.main, sites) == 1
    assert "config.json: there is no such file" in capsys.readouterr().err


def test_ablations_of_other_images_are_refused(tmp_path, capsys):
    for name in "abc":
        write_site(tmp_path / "sites", name, 5)
    run = tmp_path / "run"
    assert call_train("--root", tmp_path / "sites", *TOY_FOLDER, "--out", run) == 0
    assert call(ablations.main, run, "--variants", "no steps") == 0
    shutil.copy(tmp_path / "sites/c/masks/00.png", tmp_path / "sites/c/masks/01.png")
    assert call(ablations.main, run, "--variants", "no steps") == 1
    assert "the images are not those the run began with" in capsys.readouterr().err


def test_ablations_of_two_kinds_or_none(toy_run, tmp_path, capsys):
    """Runs of both kinds, and words about routing for a run without it, are refused at once."""
    inside = tmp_path / "inside"
    assert call_train(*TOY, "--hold-out", "none", "--methods", "iopfl", "--out", inside) == 0
    capsys.readouterr()
    assert call(ablations.main, toy_run, inside) == 2
    assert "different kinds" in capsys.readouterr().err
    for words in (["--images", "1"], ["--variants", "no steps"]):
        assert call(ablations.main, inside, *words) == 2
        output = capsys.readouterr()
        assert "a hospital outside" in output.err and not output.out


def test_ablations_count_a_run_once(toy_run, capsys):
    assert call(ablations.main, toy_run, toy_run, "--variants", "no steps") == 0
    assert variants_in(capsys.readouterr().out)["no steps"][4:7] == ["0", "1", "0"]


def test_a_federation_on_its_way_to_more_rounds_is_not_used(copy_of_run, tmp_path, capsys):
    file = copy_of_run / "config.json"
    config = json.loads(file.read_text())
    config["settings"]["rounds"] = 4  # as --resume --rounds 4 leaves it when it is interrupted
    file.write_text(json.dumps(config))
    assert adapt_to(copy_of_run, "--simulated", "--out", tmp_path / "out") == 1
    assert "interrupted after round 2" in capsys.readouterr().err
    assert call(ablations.main, copy_of_run, "--variants", "no steps") == 1
    assert "interrupted after round 2" in capsys.readouterr().err


def test_sign_test_by_hand():
    assert ablations.sign_test(5, 0) == pytest.approx(2 / 32)
    assert ablations.sign_test(2, 2) == 1 and ablations.sign_test(0, 0) == 1


# ---------------------------------------------------------------- README
def test_readme_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, table in ((train, "TRAINING"), (train, "INSIDE"), (train, "OUTSIDE"),
                          (data, "TASKS")):  # what a snippet adds goes with the test
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    blocks = []
    for file in ("README.md", "docs/usage.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        blocks += re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    save_image(Path("image.png"), np.arange(2500, dtype=np.uint8).reshape(50, 50))
    words = ["--rounds", "1", "--images-per-site", "4", "--size", "32", "--threads", "1"]
    assert call_train(*words, "--methods", "routing-ours") == 0
    names = {}
    shapes = []
    for block in blocks:
        exec(block, names)
        shapes.append(names["probabilities"].shape)
    assert shapes[0] == (10, 2, 64, 64) and shapes[-1] == (1, 2, 96, 96)
    assert set(names["personal"]) == {"A", "B"}
    assert names["mask"].shape == (1, 96, 96)
    added = {row["method"] for row in rows_of(tmp_path / "runs" / "square")}
    assert added == {"strong", "first"}


def test_flower_gives_the_same_models(tmp_path):
    """Flower's simulation in processes of its own against `federate` and M2 in this one."""
    pytest.importorskip("flwr", reason="pip install 'flwr[simulation]'")
    pytest.importorskip("ray", reason="pip install 'flwr[simulation]'")
    from examples import flower_app
    out = tmp_path / "out"
    command = [sys.executable, "-m", "examples.flower_app", "--out", str(out)]
    environment = os.environ | {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"}
    environment["OMP_NUM_THREADS"] = "1"  # as here: another number gives other bits
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr

    clients = {}
    for number in range(flower_app.HOSPITALS):
        site = flower_app.hospital(number)
        clients[site.name] = site.train.to("cpu")
    model = flower_app.new_model()
    rounds = flower_app.ROUNDS
    personal = {}
    for last in iopfl.federate(model, clients, rounds, seed=flower_app.SEED):
        for name, local in last.local.items():
            before = personal.get(name)
            personal[name] = iopfl.update_personal(before, local, flower_app.ALPHA)
    expected = {"global": last.global_state}
    for name, state in personal.items():
        expected[f"personal-{name}"] = state

    assert {file.stem for file in out.iterdir()} == set(expected)
    for name, state in expected.items():
        found = torch.load(out / f"{name}.pt", weights_only=True)
        assert found.keys() == state.keys()
        for entry, value in state.items():
            assert torch.allclose(found[entry], value, atol=1e-4), f"{entry} of {name}"
