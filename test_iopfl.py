"""The method first, a test for each equation; then the eight files, one after the other.

M1 to M9 are those of README.md. Each of the first nine tests states its equation and compares the
code with plain loops in float64. All others compare with slow, obvious versions, with values worked
out by hand, and with what must not change. Run them with `python -m pytest -q`.
"""

import argparse
import copy
import csv
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
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
from examples.testing import (  # noqa: F401 (fixtures are used by their names)
    ROOT, TOY, call_train, cases_of, close, copy_of_run, find_row, near, noise, randomise, rows_of,
    same, same_bytes, same_run, save_image, seeded, toy_run)
from models import UNet


# ---------------------------------------------------------------- the method (M1 to M9)
def toy_clients(count: int, dtype: torch.dtype = torch.float64) -> dict:
    """Clients of 3, 5, 7 … images 8 × 8."""
    clients = {}
    for k in range(count):
        number = 3 + 2 * k
        images = noise(number, 1, 8, 8, seed=k, dtype=dtype) + 0.3 * k
        masks = (images[:, 0] > 0.5).long()
        clients[f"client{k}"] = SimpleNamespace(images=images, masks=masks)
    return clients


def tiny(dtype: torch.dtype = torch.float64) -> nn.Module:
    return UNet(1, 2, 2, 1, seeded()).to(dtype)


def variants(network: nn.Module, count: int = 3) -> list[nn.Module]:
    """Copies of a network with values of their own."""
    return [randomise(copy.deepcopy(network), seed).double() for seed in range(count)]


def small_models(dimensions: int = 2) -> list[nn.Module]:
    """Three networks of three classes, 2-D or 3-D."""
    conv = nn.Conv3d if dimensions == 3 else nn.Conv2d
    norm = nn.BatchNorm3d if dimensions == 3 else nn.BatchNorm2d
    first = conv(1, 4, 3, padding=1)
    return variants(nn.Sequential(first, norm(4), conv(4, 3, 1)))


def build(models: list | None = None, **settings) -> router.RoutedNetwork:
    return router.build_routed(models or experts(), router.RoutingSettings(**settings), seeded())


def test_M1_federated_averaging():
    """g = Σ_k (n_k / n) w_k with n = Σ_k n_k, of weights, biases and BatchNorm's statistics."""
    clients = toy_clients(3)
    n = sum(len(client.images) for client in clients.values())
    found, = iopfl.federate(tiny(), clients, rounds=1)
    for entry, g in found.global_state.items():
        expected = 0
        for name, w_k in found.local.items():
            n_k = len(clients[name].images)
            expected = expected + n_k / n * w_k[entry]
        if g.is_floating_point():
            assert close(g, expected, 1e-12)


def test_M2_personalised_models():
    """p^1 = w^1 and p^t = α p^{t-1} + (1 - α) w^t."""
    alpha = 0.7
    p, personal = None, None
    for t in range(1, 5):
        w = noise(3, 4, seed=t)
        if t == 1:
            p = w
        else:
            p = alpha * p + (1 - alpha) * w
        personal = iopfl.update_personal(personal, {"weight": w}, alpha)
        assert close(personal["weight"], p, 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_M3_global_and_local_updates_are_accumulated(alpha):
    """p^T = g^0 + Σ_{s<T} (1 - α^{T-s}) D^s + Σ_{t≤T} c_t d^t with D^s = g^s - g^{s-1},
    d^t = w^t - g^{t-1}, c_1 = α^{T-1} and c_t = (1 - α) α^{T-t}, on real training."""
    clients, T = toy_clients(3), 4
    g, local, personal = [iopfl.snapshot(tiny())], [None], {}
    for found in iopfl.federate(tiny(), clients, T, seed=1, lr=1e-2, batch_size=3):
        g.append(found.global_state)
        local.append(found.local)
        for name, w in found.local.items():
            personal[name] = iopfl.update_personal(personal.get(name), w, alpha)
    for name in clients:
        for entry, start in g[0].items():
            expected = start
            for s in range(1, T):
                D = g[s][entry] - g[s - 1][entry]
                expected = expected + (1 - alpha ** (T - s)) * D
            for t in range(1, T + 1):
                c = alpha ** (T - 1) if t == 1 else (1 - alpha) * alpha ** (T - t)
                d = local[t][name][entry] - g[t - 1][entry]
                expected = expected + c * d
            if start.is_floating_point():
                assert close(personal[name][entry], expected, 1e-12)


def test_M4_router():
    """r(x) = softmax(FC2(FC1(mean of x over pixels))): a weight for each expert and image."""
    channels, experts = 2, 3
    layer = router.Router(channels, 1, experts, seeded()).double()
    x = noise(4, channels, 5, 6)
    r = layer(x, router.RoutingSettings(), dropout=None)
    for n in range(4):
        mean = [x[n, c].sum() / 30 for c in range(channels)]
        hidden = []
        for h in range(2 * channels):
            terms = [layer.fc1.weight[h, c] * mean[c] for c in range(channels)]
            hidden.append(sum(terms) + layer.fc1.bias[h])
        powers = []
        for m in range(experts):
            terms = [layer.fc2.weight[m, h] * hidden[h] for h in range(2 * channels)]
            powers.append((sum(terms) + layer.fc2.bias[m]).exp())
        for m in range(experts):
            assert close(r[n, m], powers[m] / sum(powers), 1e-12)


def test_M5_routed_convolution():
    """y = conv(x; Σ_m r_m(x) W_m, Σ_m r_m(x) b_m), by the loop in the docstring of `Routed`."""
    experts = variants(nn.Conv2d(2, 3, 3, padding=1))
    routed = build([nn.Sequential(expert) for expert in experts])
    x = noise(4, 2, 5, 6)
    loop, = [part for part in router.Routed.__doc__.split("\n\n") if "for m, expert" in part]
    names = {"x": x, "experts": experts, "torch": torch, "F": F}
    names |= {"router": routed.network[0].router, "settings": routed.settings}
    exec(textwrap.dedent(loop), names)
    assert close(routed(x), names["y"], 1e-12)


def test_M6_consistency():
    """L_con = mean (p(x) - T⁻¹[p(T(x + ε))])², T a flip or rotation, ε ~ N(0, 0.5²)."""
    routed = build(small_models())
    x = noise(8, 1, 6, 6)
    generator = seeded(5)
    views = router.draw_views(x, generator)
    epsilon = 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    squares = []
    for n in range(8):
        flips = [axis for bit, axis in ((2, -2), (1, -1)) if views[n] & bit]
        turned = x[n] + epsilon[n]
        if views[n] & 4:
            turned = turned.transpose(-1, -2)
        of_view = routed(turned.flip(flips)[None]).softmax(dim=1)[0].flip(flips)
        if views[n] & 4:
            of_view = of_view.transpose(-1, -2)
        p = routed(x[n:n + 1]).softmax(dim=1)[0]
        squares.append((p - of_view) ** 2)
    found = router.consistency_loss(
        routed.probabilities(x), router.in_another_view(routed, x, seeded(5)))
    assert close(found, torch.stack(squares).mean(), 1e-12)


@pytest.mark.parametrize("shape", [(9, 7), (5, 6, 8)])
@pytest.mark.parametrize("radius", [1, 2])
def test_M7_shape_constraint(shape, radius):
    """L_shape = mean over pixels of the largest minus the smallest foreground probability in the
    window of 2d + 1 pixels around it."""
    probabilities = noise(2, 3, *shape).softmax(dim=1)
    ranges = []
    for background in probabilities[:, 0].numpy():
        for place in np.ndindex(shape):
            window = tuple(slice(max(i - radius, 0), i + radius + 1) for i in place)
            ranges.append(np.ptp(1 - background[window]))
    found = router.shape_constraint(probabilities, radius)
    assert close(found, torch.tensor(np.mean(ranges)), 1e-12)
    assert router.shape_constraint(torch.full_like(probabilities, 0.5), radius) == 0


def test_M8_entropy():
    """L_ent = mean over pixels of -Σ_c p_c log p_c / log C."""
    probabilities = noise(2, 3, 4, 5).softmax(dim=1)
    entropies = []
    for image in probabilities.flatten(2).tolist():
        for p in zip(*image):  # the three classes of a pixel
            entropies.append(-sum(p_c * math.log(p_c) for p_c in p) / math.log(3))
    found = router.entropy_loss(probabilities)
    assert close(found, torch.tensor(np.mean(entropies)), 1e-12)


@pytest.mark.parametrize("shape, spacing", [((40, 40), (0.6, 1.1)), ((12, 40, 40), (3, 0.6, 1.1))])
@pytest.mark.parametrize("seed", range(2))
def test_M9_metrics(shape, spacing, seed):
    """Dice = 2 |A ∩ B| / (|A| + |B|); HD95: the larger of the two directed 95th percentiles of the
    distances between the surfaces; ASSD: the mean of both directions' distances."""
    rng = np.random.default_rng(seed)
    A, B = random_mask(rng, shape, 0), random_mask(rng, shape, 1)
    of_A, of_B = slow_surface(A, spacing), slow_surface(B, spacing)
    distances = np.linalg.norm(of_A[:, None] - of_B[None], axis=2)
    to_B, to_A = distances.min(axis=1), distances.min(axis=0)
    hd95 = max(np.percentile(to_B, 95), np.percentile(to_A, 95))
    assd = (to_A.sum() + to_B.sum()) / (len(to_A) + len(to_B))
    assert iopfl.dice(A, B) == pytest.approx(2 * (A & B).sum() / (A.sum() + B.sum()), abs=1e-12)
    assert iopfl.hd95_and_assd(A, B, spacing) == pytest.approx((hd95, assd), abs=1e-10)


def random_mask(rng, shape, number):
    """A blob with holes, and specks far off."""
    mask = np.zeros(shape, dtype=bool)
    axes = len(shape)
    low = rng.integers(0, 28, axes) % (8, 30, 30)[-axes:]
    mask[tuple(slice(v, v + 9) for v in low)] = True
    mask &= rng.random(shape) < 0.8
    for far in ((11, 39 * number, 39), (0, 39, 0)):
        mask[far[-axes:]] = True
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


# ---------------------------------------------------------------- models.py
def test_unet_layers_and_padding():
    model = UNet(1, 2, width=4, depth=2)
    randomise(model, 0).double()
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


# ---------------------------------------------------------------- iopfl.py: M1, M2 by hand
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


@pytest.mark.parametrize("states, weights", [
    (2, [1]),
    (2, [1, 1, 1]),
    (2, [0, 0]),
    (2, [-1, 2]),
    (2, [1, math.nan]),
    (2, [1, math.inf]),
    (0, []),
])
def test_aggregate_refuses_weights(states, weights):
    with pytest.raises(ValueError, match=f"aggregate: {states} states with the weights"):
        iopfl.aggregate([{"a": torch.zeros(1)}] * states, weights)


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


def test_update_personal_by_hand():
    local = small_state([1.0], 4)
    before = small_state([3.0], 9)
    expected = small_state([0.25 * 3 + 0.75 * 1], 4)
    found = iopfl.update_personal(before, local, 0.25)
    assert same(found, expected)


def test_the_first_personalised_model_is_the_local_one():
    """To the bit, where α w + (1 - α) w might round; and it is a copy."""
    local = {"a": noise(1000, dtype=torch.float32)}
    first = iopfl.update_personal(None, local, 0.7)
    assert same(first, local)
    assert first["a"].data_ptr() != local["a"].data_ptr()


@pytest.mark.parametrize("alpha, personal, message", [
    (1.5, {"a": torch.zeros(1)}, "alpha must lie in .0, 1., not 1.5"),
    (-0.1, None, "alpha must lie in .0, 1."),
    (math.nan, None, "alpha must lie in .0, 1."),
    (0.7, {"b": torch.zeros(1)}, "the personal and the local state differ in 'b': .*, missing"),
    (0.7, {"a": torch.zeros(2)}, "the personal .* differ in 'a': .2,. torch.float32, .1,. torch"),
    (0.7, {"a": torch.zeros(1).double()}, "the personal .* differ in 'a'"),
])
def test_update_personal_refuses(alpha, personal, message):
    with pytest.raises(ValueError, match=f"update_personal: {message}"):
        iopfl.update_personal(personal, {"a": torch.zeros(1)}, alpha)


def test_states_keep_no_graph():
    state = {"a": torch.ones(1, requires_grad=True)}
    mean = iopfl.aggregate([state, state], [1, 1])
    personal = iopfl.update_personal(state, state, 0.5)
    assert not mean["a"].requires_grad and not personal["a"].requires_grad


# ---------------------------------------------------------------- iopfl.py: local training (M1)
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
    logits = noise(3, *shape).movedim(0, 1)
    expected = slow_soft_dice_loss(logits, masks)
    found = iopfl.soft_dice_loss(logits, masks)
    assert close(found, expected, 1e-12)
    for wrong in masks[:, None], masks.double():
        with pytest.raises(ValueError, match="of an integer type are expected, without an axis"):
            iopfl.soft_dice_loss(logits, wrong)


def test_soft_dice_loss_is_float32_at_least():
    logits = torch.ones(1, 2, 3, 3).bfloat16()
    masks = torch.zeros(1, 3, 3).byte()
    loss = iopfl.soft_dice_loss(logits, masks)
    assert loss.dtype == torch.float32


def test_train_local_refuses():
    model = UNet(1, 2, 2, 1)
    images = torch.zeros(2, 1, 8, 8)
    masks = images[:, 0].long()
    options = {"generator": seeded()}
    with pytest.raises(ValueError, match="0 images and 1 epochs"):
        iopfl.train_local(model, images[:0], masks[:0], **options)
    with pytest.raises(ValueError, match="2 images and 0 epochs"):
        iopfl.train_local(model, images, masks, epochs=0, **options)
    with pytest.raises(ValueError, match="class 2, but the model's classes are 0 to 1"):
        iopfl.train_local(model, images, masks + 2, **options)
    with pytest.raises(ValueError, match="the masks hold class -1"):
        iopfl.train_local(model, images, masks - 1, **options)
    before = iopfl.snapshot(model)
    with pytest.raises(ValueError, match="masks of torch.float32; give class indices"):
        iopfl.train_local(model, images, masks / 255, **options)  # all of it would be background
    assert same(model.state_dict(), before)


class Returning(nn.Module):
    """A network that returns something made of its logits and of smaller ones."""

    def __init__(self, form, channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.small = nn.Conv2d(1, channels, 3, stride=2)
        self.form = form

    def forward(self, x):
        return self.form(self.conv(x), self.small(x))


@pytest.mark.parametrize("form", [lambda logits, small: (logits, small),
                                  lambda logits, small: {"out": logits}])
def test_networks_that_return_no_tensor_are_refused(form):
    model = Returning(form)
    images = torch.zeros(2, 1, 8, 8)
    for call in (lambda: iopfl.predict(model, images),
                 lambda: iopfl.train_local(model, images, images[:, 0].long(),
                                           generator=seeded())):
        with pytest.raises(ValueError, match="the model returns a (tuple|dict); wrap it") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_train_local_takes_volumes():
    model = nn.Conv3d(1, 2, 3, padding=1)
    images = noise(3, 1, 4, 5, 6, dtype=torch.float32)
    masks = (images[:, 0] > 0).byte()
    options = {"lr": 0.1, "generator": seeded()}
    first = iopfl.train_local(model, images, masks, **options)
    later = iopfl.train_local(model, images, masks, epochs=20, **options)
    assert later < first - 0.1


def train_slowly(state, client, generator, mu=0, anchor=None, *, lr=1e-3, batch_size=5, epochs=1):
    """Local training from a state, written out: the new state, and the mean of the last epoch's
    losses without the penalty."""
    model = UNet(1, 2, 2, 1).double().train()
    model.load_state_dict(state)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)
    for _ in range(epochs):
        losses = []
        order = torch.randperm(len(client.images), generator=generator).numpy()
        for batch in np.array_split(order, math.ceil(len(order) / batch_size)):
            logits = model(client.images[batch])
            loss = slow_soft_dice_loss(logits, client.masks[batch])
            losses.append(loss.item())
            for name, weight in model.named_parameters():
                if mu:
                    distance = (weight - anchor[name]) ** 2
                    loss = loss + mu / 2 * distance.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return copy.deepcopy(model.state_dict()), np.mean(losses)


@pytest.mark.parametrize("options", [{}, {"lr": 1e-2, "batch_size": 4, "epochs": 3}])
@pytest.mark.parametrize("mu", [0, 0.7])
def test_train_local_by_hand(options, mu):
    """With the defaults too; the mode that the model was in makes no difference."""
    client = toy_clients(4)["client3"]  # nine images
    model = tiny().eval()
    start = iopfl.snapshot(model)
    found = iopfl.train_local(
        model, client.images, client.masks, generator=seeded(3), proximal=mu, **options)
    state, loss = train_slowly(start, client, seeded(3), mu, start, **options)
    assert near(model.state_dict(), state) and found == pytest.approx(loss, abs=1e-10)


def test_images_take_the_dtype_of_the_model():
    client = toy_clients(1, torch.float32)["client0"]
    model = tiny()
    assert iopfl.train_local(model, client.images, client.masks, generator=seeded()) > 0
    assert iopfl.predict(model, client.images).shape == (3, 8, 8)


def test_with_state_makes_a_copy_that_predicts():
    model = tiny().train()
    before = iopfl.snapshot(model)
    state = {entry: value + 1 for entry, value in before.items()}
    found = iopfl.with_state(model, state)
    assert same(found.state_dict(), state) and not found.training
    assert same(model.state_dict(), before) and model.training


def test_predictions_keep_no_graph():
    """Else every layer's activations would stay in memory."""
    model = tiny(torch.float32)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    images = noise(3, 1, 8, 8, dtype=torch.float32)
    iopfl.predict(model, images)
    train.probabilities_of(model, images)
    router.divergence(model, images)
    assert seen == [False] * 3
    routed = build(small_models())
    assert not router.predict(routed, noise(3, 1, 8, 8)).requires_grad


# ---------------------------------------------------------------- iopfl.py: federations (M1)
PERSONAL = {  # of the tiny U-Net, by hand: the second and fifth layer of each block are BatchNorm
    "none": re.compile("(?!)"),
    "batchnorm": re.compile(r"(encoder|decoder)\.\d\.(1|4)\..*"),
    "head": re.compile(r"head\..*"),
    "all": re.compile(".*"),
}
PROXIMAL = iopfl.Training(proximal=0.7)  # more than anybody takes, so that it shows
TRAINING = train.TRAINING | {"fedprox": PROXIMAL, "ditto": train.WITH_DITTO}
del TRAINING["centralised"]  # trains like the plain one


def slow_round(g, kept, ditto, clients, present, training, draw, options):
    """A round of any kind of training, written out."""
    personal = PERSONAL[training.personal_layers]
    local, kept, ditto, losses = {}, dict(kept), dict(ditto), {}
    total = sum(len(clients[name].images) for name in present)
    for name in present:
        client = clients[name]
        begin = dict(g)
        for entry in begin:
            if personal.fullmatch(entry):
                begin[entry] = kept[name][entry]
        local[name], losses[name] = train_slowly(
            begin, client, iopfl.seeded(*draw, name), training.proximal, begin, **options)
        if training.ditto is not None:
            ditto[name], _ = train_slowly(
                ditto[name], client, iopfl.seeded(*draw, name), training.ditto, g, **options)
        kept[name] = local[name]
    mean = dict.fromkeys(g, 0)
    for name in present:
        weight = len(clients[name].images) / total
        for entry in g:
            mean[entry] = mean[entry] + weight * local[name][entry]
    return mean, local, kept, ditto, losses


@pytest.mark.parametrize("participation, drawn, options", [
    (1.0, 4, {"lr": 1e-2, "batch_size": 3, "epochs": 2}),
    (0.5, 2, {}),
    (0.4, 2, {}),
    (0.01, 1, {"lr": 1e-2}),
])
@pytest.mark.parametrize("name", TRAINING)
def test_federations_by_hand(name, participation, drawn, options):
    """Each round's models and losses; who takes part."""
    clients = toy_clients(4)
    model, training = tiny(), TRAINING[name]
    g = iopfl.snapshot(model)
    kept = dict.fromkeys(clients, g)
    ditto = dict.fromkeys(clients, g)
    presents = set()
    rounds = iopfl.federate(
        model, clients, 3, training, participation=participation, seed=2, **options)
    for number, found in enumerate(rounds, start=1):
        present = list(found.local)
        presents.add(tuple(present))
        assert found.number == number and len(present) == drawn
        assert present == [client for client in clients if client in present]  # in their order
        g, local, kept, ditto, losses = slow_round(
            g, kept, ditto, clients, present, training, (2, number), options)
        assert near(found.global_state, g)
        for client in present:
            assert near(found.local[client], local[client])
            assert found.losses[client] == pytest.approx(losses[client], abs=1e-10)
        for client in found.ditto_models:
            assert near(found.ditto_models[client], ditto[client])
        for client in found.personal_layers:
            expected = dict(g)
            for entry in g:
                if PERSONAL[training.personal_layers].fullmatch(entry):
                    expected[entry] = kept[client][entry]
            assert near(found.model_of(client), expected)
    assert number == 3 and bool(found.ditto_models) == (name == "ditto")
    assert (len(presents) > 1) == (participation < 1)


def test_a_client_may_train_in_a_way_of_its_own():
    """`Training.train` is called as `train_local` is, for Ditto's models too."""
    calls = []

    def half_of_them(model, images, masks, **options):
        calls.append(options["proximal"])
        half = len(images) // 2
        return iopfl.train_local(model, images[:half], masks[:half], **options)

    clients = toy_clients(2)
    training = iopfl.Training(proximal=0.2, ditto=0.5, train=half_of_them)
    found, = iopfl.federate(tiny(), clients, 1, training)
    assert calls == [0.2, 0.5] * 2
    for name, client in clients.items():
        half = len(client.images) // 2
        model = tiny()
        generator = iopfl.seeded(0, 1, name)
        loss = iopfl.train_local(model, client.images[:half], client.masks[:half],
                                 generator=generator, proximal=0.2)
        assert same(found.local[name], model.state_dict()) and found.losses[name] == loss


def same_round(one: iopfl.Round, two: iopfl.Round) -> bool:
    if one.number != two.number or one.losses != two.losses:
        return False
    for states in ("local", "personal_layers", "ditto_models"):
        first, other = getattr(one, states), getattr(two, states)
        if list(first) != list(other):
            return False
        for name in first:
            if not same(first[name], other[name]):
                return False
    return same(one.global_state, two.global_state)


@pytest.mark.parametrize("name", ["plain", "fedbn", "local", "ditto"])
def test_a_federation_goes_on_after_any_round(name, tmp_path):
    """To the same bits, from the disk too, and no round changes later."""
    options = {"training": TRAINING[name], "seed": 2, "participation": 0.5}
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
    for found in iopfl.federate(model, toy_clients(3), 2, TRAINING["ditto"]):
        states.append(found.global_state)
        states += found.local.values()
        states += found.ditto_models.values()
    pointers = []
    for state in states:
        pointers += [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)


def test_personal_layers_are_found_by_their_kind():
    """Whatever the layers are called: BatchNorm without affine too, the last layer as the head."""
    norm = nn.BatchNorm2d(2, affine=False)
    first, last = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
    model = nn.Sequential(first, norm, nn.ReLU(), last, nn.ReLU())
    statistics = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert iopfl.personal_entries(model, "batchnorm") == statistics
    assert iopfl.personal_entries(model, "head") == ["3.weight", "3.bias"]
    in_3d = nn.Sequential(nn.BatchNorm3d(2, affine=False), first)
    assert iopfl.personal_entries(in_3d, "batchnorm")[0] == "0.running_mean"
    with pytest.raises(ValueError, match="the model has no BatchNorm"):
        iopfl.personal_entries(model[3:], "batchnorm")
    with pytest.raises(ValueError, match="personal_layers='bn' is not"):
        iopfl.personal_entries(model, "bn")


def test_rounds_and_clients_have_generators_of_their_own():
    """No two of them draw alike, whatever seed, round and the length of the names."""
    triples = [(0, 1, "a"), (1, 0, "a"), (1, 1, "a"), (0, 1, "b"), (0, 2, "a"), (2, 0, "a")]
    draws = {tuple(torch.randperm(20, generator=iopfl.seeded(*triple)).tolist())
             for triple in triples}
    assert len(draws) == len(triples)


def test_clients_may_be_numbers():
    clients = toy_clients(2)
    by_number = {0: clients["client0"], 1: clients["client1"]}
    found, = iopfl.federate(tiny(), by_number, 1)
    assert list(found.local) == [0, 1]


@pytest.mark.parametrize("name", ["plain", "local", "ditto"])
def test_divergence_is_named(name):
    """In round 2 a client's image, its personal layers, or Ditto's model is not finite."""
    clients = toy_clients(3)
    rounds = iopfl.federate(tiny(), clients, 3, TRAINING[name])
    first = next(rounds)
    entry = "encoder.0.1.weight"
    if name == "plain":
        clients["client1"].images[1] = math.nan
    elif name == "local":
        first.personal_layers["client1"][entry][1] = math.inf
    else:
        first.ditto_models["client1"][entry][1] = math.inf
    with pytest.raises(FloatingPointError, match="client1 in round 2: '.*' is not finite"):
        next(rounds)


def test_settings_cannot_be_changed_by_accident():
    for settings in (router.PUBLISHED, train.WITH_DITTO):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.lr = 1


def test_training_is_federated_averaging_by_default():
    """The loops of `slow_round` read these settings, so that they cannot show it."""
    assert iopfl.Training() == iopfl.Training("none", 0.0, None, iopfl.train_local)


# ---------------------------------------------------------------- iopfl.py: evaluation (M9)
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


def test_the_nearest_may_lie_little_nearer_than_those_looked_at_first():
    points = torch.tensor([[0.0, 0.0]])
    others = torch.tensor([[10.0, 0.0], [0.0, -9.9]])  # the first bounds the search
    assert iopfl.nearest(points, others).tolist() == pytest.approx([9.9])


def test_of_large_surfaces_few_distances_are_computed(monkeypatch):
    offsets = np.indices((60, 60, 60)) - 30.0
    ball = (offsets**2).sum(axis=0) < 26**2
    moved = np.roll(ball, 3, axis=1)
    moved[1, 1, 1] = True
    sizes = [len(iopfl.surface_points(mask, (1, 1, 1))) for mask in (ball, moved)]
    computed = []
    real = torch.cdist

    def counted(one, two, **options):
        computed.append(len(one) * len(two))
        return real(one, two, **options)

    monkeypatch.setattr(torch, "cdist", counted)
    hd95, _ = iopfl.hd95_and_assd(ball, moved, (1, 1, 1))
    assert 2 < hd95 <= 3
    pairs = 2 * sizes[0] * sizes[1]  # in both directions
    assert sum(computed) < 0.7 * pairs


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
    swapped, _ = iopfl.evaluate(*masks_by_hand()[::-1], "abc", STRUCTURES, spacing)
    assert swapped == disc
    spacing["b"] = (3, 4)
    disc, _ = iopfl.evaluate(*masks_by_hand(), "abc", STRUCTURES, spacing)
    assert disc["hd95"] == pytest.approx(20 / 2)


def test_evaluate_takes_the_slices_of_a_volume_together():
    spacing = dict.fromkeys("vw", (3, 1, 1))
    disc, _ = iopfl.evaluate(*masks_by_hand(), "vvw", STRUCTURES, spacing)
    assert disc["cases"] == 2 and disc["distance_cases"] == 1
    assert disc["dice"] == pytest.approx((8 / 9 + 1) / 2)
    assert disc["assd"] == pytest.approx(3 / 9)
    one_slice, _ = iopfl.evaluate(*masks_by_hand(), "vww", STRUCTURES, spacing)
    assert one_slice["dice"] == pytest.approx((1 + 0) / 2)  # w: the pixel is missing


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
    for wrong in (prediction, "ab"), (prediction[:, :2], "abc"):
        with pytest.raises(ValueError, match="evaluate: .* and . cases"):
            iopfl.evaluate(wrong[0], target, wrong[1], STRUCTURES, spacing)
    with pytest.raises(ValueError, match="masks of .2, 4, 4."):  # slices with a pixel's size
        iopfl.evaluate(prediction, target, "aab", STRUCTURES, spacing)


class CountedName(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        CountedName.compared += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_cases_are_not_compared_with_each_other():
    masks = torch.zeros(500, 2, 2)
    cases = [CountedName(number) for number in range(500)]
    spacing = dict.fromkeys(cases, (1, 1))
    row, _ = iopfl.evaluate(masks, masks, cases, STRUCTURES, spacing)
    assert row["cases"] == 500 and CountedName.compared < 10 * 500


def test_predict():
    images = noise(5, 1, 12, 12, dtype=torch.float32)
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


# ---------------------------------------------------------------- router.py: routed layers (M4, M5)
ENTROPY_TOO = {"entropy": 0.1, "passes": 1}  # all three terms of the objective
PUBLISHED = vars(router.PUBLISHED) | {"passes": 1}


def experts(count: int = 3) -> list[nn.Module]:
    return variants(UNet(1, 2, 4, 2), count)


def adapted(routed, x, seed: int = 0, online: bool = False) -> torch.Tensor:
    if not online:
        return router.adapt(routed, x, generator=seeded(seed))
    batches = router.in_batches(x, routed.settings.batch_size)
    return torch.cat(list(router.adapt_online(routed, batches, generator=seeded(seed))))


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
    x = noise(3, *LAYERS[name][1], seed=1)
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
        y, weights = image.unsqueeze(0), None
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
    probe = noise(*ours.shape, seed=2)
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


LIBRARY = ["UNet 2", "UNet 3", "BasicUNet 2", "DynUNet 3", "SegResNet 2", "SegResNet 3",
           "PlainConvUNet 2", "PlainConvUNet 3"]  # and their dimensions
NETWORKS = ["ours", "foreign", "foreign, not affine", "foreign, untracked", *LIBRARY]


def models_and_images(name: str) -> tuple[list[nn.Module], torch.Tensor]:
    """Three models of a layer or network of this name, and what they take."""
    if name in LAYERS:
        return layer_models(name), layer_inputs(name).detach()
    if name == "ours":
        return experts(), noise(4, 1, 12, 12)
    if name.startswith("foreign"):
        network = Foreign(affine="not affine" not in name, tracked="untracked" not in name)
        return variants(network), noise(6, 2, 12, 16)
    library, dimensions = name.split()
    dimensions = int(dimensions)
    if library == "PlainConvUNet":
        network = nnunet_network(dimensions)
    else:
        network = monai_network(library, dimensions)
    size = 32 if library == "BasicUNet" else 8
    return variants(network), noise(2, 1, *[size] * dimensions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*LAYERS, *NETWORKS])
def test_one_hot_and_uniform_routing(name):
    """Routed by one weight alone it is that expert, by equal weights the average."""
    models, x = models_and_images(name)
    routed = build(models)
    with torch.no_grad():
        for model, weights in zip(models, torch.eye(len(models))):
            router.set_start(routed, weights)
            assert close(routed(x), router.logits_of(model(x), x.ndim))
        router.set_start(routed, equal_weights(len(models)))
        assert close(routed(x), router.logits_of(average(models)(x), x.ndim))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_adapted(name):
    models, x = models_and_images(name)
    models = [model.train() for model in models]  # their dropout is off all the same
    before = copy.deepcopy([model.state_dict() for model in models])
    routed = build(models, passes=1)
    router.fit_to_site(routed, models, x)
    start = copy.deepcopy(routed.state_dict())
    probabilities = adapted(routed, x)
    assert probabilities.shape[2:] == x.shape[2:]
    assert close(probabilities.sum(1), torch.ones(()))
    assert torch.equal(router.predict(routed, x), probabilities)  # all dropout is off
    assert len(moved_entries(start, routed.state_dict())) > len(routed.parts(router.Router))
    for model, state in zip(models, before):
        assert same(model.state_dict(), state)


def test_routing_is_kept_once_for_each_layer():
    """Of however many calls and names; a forward may read attributes of its layers."""
    models, x = models_and_images("foreign")
    routed = build(models)
    routed(x)
    assert list(routed.routing) == ["stem", "twice", "branches.up"]
    calls = []
    hook = routed.network.twice.router.register_forward_hook(
        lambda layer, inputs, weights: calls.append(weights))
    routed(x)
    hook.remove()
    assert len(calls) == 2 and not torch.equal(*calls)
    assert torch.equal(routed.routing["twice"], calls[1])
    assert not routed.routing["twice"].requires_grad  # it would keep the graph
    assert len(routed.parts(router.Router)) == 3


def test_before_the_first_router_the_last_expert_decides():
    models = variants(nn.Sequential(Scale(1), nn.Conv2d(1, 2, 1)))
    x = noise(4, 1, 5, 5)
    routed = build(models)
    router.set_start(routed, torch.tensor([1.0, 0.0, 0.0]))
    assert close(routed(x), models[0][1](models[2][0](x)))


def test_what_is_learnt_is_added_to_the_mixed_parameters():
    models = layer_models("BatchNorm2d")
    x = layer_inputs("BatchNorm2d").detach()
    routed = build(models)
    before = routed(x)
    routed.network[1].delta_bias.data += 0.3
    assert close(routed(x), before + 0.3)
    for model in models:
        model[1].weight.data += 0.5
    routed.network[1].delta_weight.data += 0.5
    assert close(routed(x), build(models)(x) + 0.3)


class NamedScale(Scale):
    """A layer of somebody's own with an attribute that routed layers have too."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.name = "scale of the features"


class Sized(nn.Module):
    """A network that calls a layer with more than a tensor."""

    def __init__(self, by_name: bool):
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 2, 3, stride=2, padding=1)
        self.scale = NamedScale(2)
        self.by_name = by_name

    def forward(self, x):
        size = [2 * length for length in x.shape[2:]]
        if self.by_name:
            return self.scale(self.up(x, output_size=size))
        return self.scale(self.up(x, size))


@pytest.mark.parametrize("by_name", [False, True])
def test_layers_may_be_called_with_more_than_a_tensor(by_name):
    models, x = variants(Sized(by_name)), noise(4, 1, 5, 6)
    routed = build(models)
    assert routed(x).shape == (4, 2, 10, 12)
    router.set_start(routed, torch.eye(3)[1])
    assert close(routed(x), models[1](x))
    assert routed.network.scale.name == "scale"


def test_autocast_follows_torchs_rule_layer_by_layer():
    """Convolutions in bfloat16, GroupNorm in float32, BatchNorm in what it is given."""
    layers = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    models = [model.float() for model in variants(nn.Sequential(*layers, nn.Conv2d(4, 2, 1)))]
    routed = build(models)
    dtypes = []
    for layer in routed.network:
        layer.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        routed(noise(2, 1, 8, 8).float())
    low, full = torch.bfloat16, torch.float32
    assert dtypes == [low, full, low, low, low]


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_batchnorm_is_mixed_by_normalised_weights(mixed, batch, per_sample):
    models = variants(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), 4)
    x = noise(3, 2, 5, 5)
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


# ---------------------------------------------------------------- router.py: objective (M6 to M8)
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


def test_entropy_where_a_class_is_certain():
    """No loss, and finite gradients."""
    certain = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    certain.requires_grad_()
    loss = router.entropy_loss(certain)
    loss.backward()
    assert loss == 0
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(24, 40), (4, 24, 24)])
def test_objective_by_hand(shape):
    """The weighted sum of the terms, of the view by the same draws; d is a share of the shortest
    side, and one pixel at least."""
    models = small_models(len(shape))
    lambdas = {"entropy": 0.3, "consistency": 0.7, "shape": 0.2}
    routed = build(models, **lambdas, radius=0.1, noise=0.4, dropout=0.0)
    x = noise(4, 1, *shape)
    generator = seeded(5)
    views = router.draw_views(x, generator)
    noisy = x + 0.4 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    p = routed(x).softmax(dim=1)
    of_view = routed(router.view(noisy, views)).softmax(dim=1)
    back = router.view(of_view, views, inverse=True)
    entropy = -(p * p.log()).sum(1).mean() / math.log(3)
    squares = (p - back) ** 2
    radius = 2 if len(shape) == 2 else 1
    expected = 0.3 * entropy + 0.7 * squares.mean()
    expected = expected + 0.2 * router.shape_constraint(p, radius)
    loss, probabilities = router.objective(routed, x, seeded(5))
    assert torch.allclose(loss, expected, rtol=1e-12)
    found = torch.autograd.grad(loss, list(routed.parameters()))
    wanted = torch.autograd.grad(expected, list(routed.parameters()))
    for one, two in zip(found, wanted):
        assert close(one, two, 1e-12) and one.abs().max() > 0
    assert torch.equal(probabilities, p)
    assert not probabilities.requires_grad
    again = router.in_another_view(routed, x, seeded(5))
    assert close(again, back, 1e-12)


# ---------------------------------------------------------------- router.py: adaptation
def moved_entries(before: dict, after: dict) -> set[str]:
    return {entry for entry in after if not torch.equal(after[entry], before[entry])}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("settings", [ENTROPY_TOO, PUBLISHED])
def test_adapt_moves_routers_and_affine_and_nothing_else(settings, fitted, online):
    models = [model.train() for model in experts()]  # their mode makes no difference
    x = noise(11, 1, 16, 16, seed=9)
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


def test_what_is_no_image_is_refused():
    """Before anything has changed."""
    routed = build()
    start = copy.deepcopy(routed.state_dict())
    x = noise(7, 1, 12, 12, seed=9)
    infinite = x.clone()
    infinite[6, 0, 3, 3] = math.inf
    for refused in infinite, x * math.nan, x[:0]:
        for use in (
            lambda: router.adapt(routed, refused, generator=seeded()),
            lambda: list(router.adapt_online(routed, [refused], generator=seeded())),
            lambda: router.predict(routed, refused),
            lambda: router.fit_to_site(routed, experts(), refused),
            lambda: router.check_routed(routed, experts(), refused),
        ):
            with pytest.raises(ValueError, match="no images, or values that are not finite"):
                use()
    assert same(routed.state_dict(), start)


def test_offline_adaptation_by_hand():
    """So many passes over all images in random order, by one Adam of the settings' rate."""
    models, x = small_models(), noise(7, 1, 12, 12)
    routed, by_hand = build(models, lr=3e-3, passes=2), build(models, lr=3e-3, passes=2)
    found = adapted(routed, x)
    optimiser = torch.optim.Adam(by_hand.parameters(), lr=3e-3)
    start, generator = by_hand.snapshot(), seeded()
    for _ in range(2):
        order = torch.randperm(7, generator=generator)
        for numbers in order[:4], order[4:]:
            router.step(by_hand, x[numbers], optimiser, generator, start)
    assert same(routed.state_dict(), by_hand.state_dict())
    assert torch.equal(found, router.predict(by_hand, x))
    assert not found.requires_grad and not router.predict(routed, x).requires_grad


def test_online_predicts_each_batch_after_its_own_step():
    """One Adam and one start for the whole stream, and nothing is done before it is asked for."""
    models, x = small_models(), noise(8, 1, 12, 12)
    routed, by_hand = build(models, lr=1e-2), build(models, lr=1e-2)
    for network in routed, by_hand:
        router.fit_to_site(network, models, x[:2], online=True)
    optimiser = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    start, generator = by_hand.snapshot(), seeded()
    stream = router.adapt_online(routed, iter(x.split(2)), generator=seeded())
    norm = routed.parts(router.RoutedBatchNorm)[0]
    for number, batch in enumerate(x.split(2)):
        assert norm.site_images == 2 * number
        found = next(stream)
        router.measure_site(by_hand, batch)
        router.step(by_hand, batch, optimiser, generator, start)
        assert torch.equal(found, router.predict(by_hand, batch))
    assert list(stream) == []


def test_volumes_are_adapted_and_predicted():
    models = small_models(3)
    x = noise(3, 1, 4, 6, 6)
    routed = build(models, passes=1)
    router.fit_to_site(routed, models, x)
    start = copy.deepcopy(routed.state_dict())
    probabilities = adapted(routed, x)
    assert probabilities.shape == (3, 3, 4, 6, 6)
    assert moved_entries(start, routed.state_dict())


def step(routed, x, seed: int = 0) -> None:
    """The first step of an adaptation."""
    optimiser = torch.optim.Adam(routed.parameters(), lr=routed.settings.lr)
    router.step(routed, x, optimiser, seeded(seed), routed.snapshot())


def test_the_first_step_is_as_long_as_the_learning_rate():
    """As Adam's is, for each parameter that has a gradient."""
    routed = build(small_models(), lr=3e-3, leash=None)
    start = routed.snapshot()
    step(routed, noise(4, 1, 12, 12, seed=9))
    changes = []
    for name, value in routed.named_parameters():
        changes.append((value - start[name]).abs().max().item())
    assert max(changes) == pytest.approx(3e-3, rel=1e-3)


def test_dropout_keeps_the_mean():
    one = router.Router(3, 1, 2, seeded()).double()
    settings = router.RoutingSettings(softmax=False, dropout=0.2)
    x = noise(1, 3, 2, 2)
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
    step(routed, noise(4, 1, 12, 12, seed=9))
    # The images and another view of them; then, by the leash, the images at the start.
    assert calls == [True] * 2 * layers + [False] * layers
    calls.clear()
    router.predict(routed, noise(4, 1, 12, 12, seed=9))
    routed.train()(noise(4, 1, 12, 12, seed=9))
    assert calls == [False] * 2 * layers


def test_the_leash_is_given_the_probabilities_before_the_step_and_the_start(monkeypatch):
    given, results, starts = [], [], []
    real = router.objective

    def objective(*arguments):
        loss, probabilities = real(*arguments)
        results.append(probabilities)
        return loss, probabilities

    def pull_back(routed, batch, probabilities, start):
        given.append(probabilities)
        starts.append(start)

    monkeypatch.setattr(router, "objective", objective)
    monkeypatch.setattr(router, "pull_back", pull_back)
    routed = build(passes=1)
    as_built = routed.snapshot()
    adapted(routed, noise(6, 1, 12, 12, seed=9))
    assert len(given) == 2
    for one, two in zip(given, results):
        assert torch.equal(one, two)
    assert all(same(start, as_built) for start in starts)


def test_settings_of_the_published_code_and_ours():
    """As they are told in the README."""
    shared = {"per_sample": True, "dropout": 0.2, "noise": 0.5, "radius": 10 / 384, "batch_size": 5}
    ours = {
        "softmax": True, "mix_batchnorm": True, "batch_statistics": False,
        "consistency": 1.0, "shape": 0.02, "entropy": 0.0, "lr": 2e-4, "passes": 3, "leash": 0.01,
    }
    published = {
        "softmax": False, "mix_batchnorm": False, "batch_statistics": True,
        "consistency": 0.1, "shape": 0.004, "entropy": 25.0, "lr": 1e-3, "passes": 10,
        "leash": None,
    }
    assert vars(router.RoutingSettings()) == shared | ours
    assert vars(router.PUBLISHED) == shared | published


def test_the_published_shape_term_as_a_weight_of_the_mean():
    """The gradient of 10⁻⁶ ‖v‖₂ is that of 10⁻⁶ √(N / f) mean(v).

    v is M7's map of N pixels, here of discs 100 pixels wide, and f the share of it that is 1.
    """
    rows, columns = torch.meshgrid(torch.arange(384), torch.arange(384), indexing="ij")
    organ = ((rows - 192) ** 2 + (columns - 192) ** 2 < 50**2).double().expand(5, 1, -1, -1)
    foreground = organ.clone().requires_grad_(True)
    v = F.max_pool2d(foreground, 21, 1, 10) + F.max_pool2d(-foreground, 21, 1, 10)
    of_norm, = torch.autograd.grad(1e-6 * v.norm(), foreground, retain_graph=True)
    of_mean, = torch.autograd.grad(v.mean(), foreground)
    share = v.mean().item()  # f, since v is 0 or 1
    weight = 1e-6 * (v.numel() / share) ** 0.5
    assert close(of_norm, weight * of_mean, 1e-12)
    assert 0.05 < share < 0.06
    assert weight == pytest.approx(router.PUBLISHED.shape, rel=0.1)


def test_routers_are_drawn_as_torch_draws_linear_layers():
    """Uniformly up to 1 / √inputs."""
    random = torch.get_rng_state()
    layer = router.draw_linear(400, 30, seeded())
    assert torch.equal(random, torch.get_rng_state())
    for values in layer.weight, layer.bias:
        assert 1 / 40 < values.abs().max() <= 1 / 20
    assert layer.weight.abs().mean().item() == pytest.approx(1 / 40, rel=0.02)


def test_routers_that_see_no_image_follow_the_bias_alone():
    layer = router.Router(3, 1, 2, seeded()).double()
    settings = router.RoutingSettings(per_sample=False)
    weights = layer(noise(4, 3, 5, 5), settings, None)
    assert torch.equal(weights, layer.fc2.bias.softmax(dim=0).expand(4, -1))


PART_2 = ["fit_to_site", "start_weights", "divergence", "gaussian_divergence", "running_norms",
          "site_share", "some_of_all", "measure_site", "pull_back", "set_start"]


@pytest.mark.parametrize("online", [False, True])
def test_the_published_method_runs_no_line_of_ours(monkeypatch, online):
    for name in PART_2:
        monkeypatch.setattr(router, name, None)
    monkeypatch.setattr(router.RoutedBatchNorm, "count", None)
    adapted(build(**PUBLISHED), noise(6, 1, 12, 12, seed=9), online=online)
    with pytest.raises(TypeError):  # ours, with the leash, does
        adapted(build(), noise(6, 1, 12, 12, seed=9), online=online)


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
    adapted(build(**PUBLISHED), noise(6, 1, 12, 12, seed=9), online=online)
    assert set(seen) == {3}


@pytest.mark.parametrize("online", [False, True])
def test_adapt_works_in_inference_mode(online):
    models = small_models()
    results = []
    for mode in torch.no_grad, torch.inference_mode:
        with mode():
            x = noise(6, 1, 12, 12, seed=9) + 0.0
            routed = build(models)
            router.fit_to_site(routed, models, x, online=online)
            results.append(adapted(routed, x, online=online))
    assert torch.equal(*results)
    routed.reset()
    adapted(routed, noise(6, 1, 12, 12, seed=9))  # and afterwards without it


def test_training_mode_changes_nothing():
    """One's own loop: no statistics are counted, and gradients reach what adapts."""
    models = foreigners()  # with dropout of their own
    x = noise(6, 2, 12, 12)
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


def test_autocast_in_bfloat16_and_not_in_float16():
    models = [model.float() for model in small_models()]
    x = noise(5, 1, 12, 12, seed=9).float()
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


def test_values_that_are_not_finite_are_told():
    model = tiny(torch.float32)
    model.decoder[0][4].weight.data[:] = 1e5
    model.decoder[0][4].bias.data[:] = 1e5
    model.head.weight.data[:] = 1e37
    with pytest.raises(FloatingPointError, match="not every probability is finite"):
        router.predict(router.build_routed([model]), noise(4, 1, 12, 12, seed=9).float())


def test_the_default_dtype_makes_no_difference():
    """float32 models stay in float32 where torch's default is float64."""
    models = [model.float() for model in experts()]
    x = noise(6, 1, 12, 12, seed=9).float()
    results = []
    for dtype in torch.float32, torch.float64:
        torch.set_default_dtype(dtype)
        try:
            routed = build(models, passes=1)
            router.fit_to_site(routed, models, x)
            results.append(adapted(routed, x))
        finally:
            torch.set_default_dtype(torch.float32)
    assert results[1].dtype == torch.float32
    assert close(*results, 1e-6)


# ---------------------------------------------------------------- router.py: state
def fitted(models: list, x: torch.Tensor, **settings) -> router.RoutedNetwork:
    routed = build(models, lr=1e-2, **settings)
    router.fit_to_site(routed, models, x)
    return routed


def copied_by_file(routed):
    file = io.BytesIO()
    torch.save(routed, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded_anew(routed):
    """Another network, with other routers, that was given this one's state, in another module."""
    other = router.build_routed(small_models(), routed.settings)
    adapted(other, noise(6, 1, 12, 12, seed=1))
    outer = nn.ModuleDict({"routed": other})
    outer.load_state_dict({f"routed.{name}": value for name, value in routed.state_dict().items()})
    return other


def moved(routed):
    return routed.float().double()


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("change", [copy.deepcopy, copied_by_file, loaded_anew, moved])
def test_adapting_depends_on_the_state_alone(change, online):
    """However a network came to its state, adapting it once more gives the same bits: no Adam and
    no start is left from before."""
    models, x = small_models(), noise(6, 1, 12, 12, seed=9)
    routed = fitted(models, x)
    adapted(routed, x, online=online)
    moved(routed)  # rounds to float32
    expected = copy.deepcopy(routed)
    routed = change(routed)
    assert torch.equal(adapted(routed, x, 1, online), adapted(expected, x, 1, online))
    assert same(routed.state_dict(), expected.state_dict())
    with torch.inference_mode():
        assert torch.equal(router.predict(routed, x), router.predict(expected, x))


@pytest.mark.parametrize("begin", ["built", "fitted", "loaded"])
def test_reset_returns_to_what_was_built_fitted_or_loaded(begin):
    models, x = small_models(), noise(6, 1, 12, 12, seed=9)
    routed = build(models, lr=1e-2)
    if begin != "built":
        router.fit_to_site(routed, models, x)
    if begin == "loaded":
        adapted(routed, x)
        routed = loaded_anew(routed)
    start = copy.deepcopy(routed.state_dict())
    first = adapted(routed, x)
    adapted(routed, x)
    routed.reset()
    assert same(routed.state_dict(), start)
    assert torch.equal(adapted(routed, x), first)


@pytest.mark.parametrize("start", ["matched", "random"])
def test_fitting_again_begins_as_built(start):
    models, x = small_models(), noise(6, 1, 12, 12, seed=9)
    once, twice = build(models, lr=1e-2), build(models, lr=1e-2)
    router.fit_to_site(twice, models, noise(7, 1, 12, 12, seed=3), start=start)
    adapted(twice, x)
    for routed in once, twice:
        router.fit_to_site(routed, models, x, start=start)
    assert same(once.state_dict(), twice.state_dict())
    assert torch.equal(adapted(once, x), adapted(twice, x))
    for routed in once, twice:
        routed.reset()
    assert same(once.state_dict(), twice.state_dict())


def test_the_leash_holds_to_what_adaptation_began_with():
    """To what was loaded or adapted before: nothing has changed, so nothing is pulled back."""
    models, x = small_models(), noise(6, 1, 12, 12, seed=9)
    routed, free = fitted(models, x), fitted(models, x, leash=None)
    adapted(routed, x)
    free.load_state_dict(routed.state_dict())
    for network in routed, free:
        step(network, x, 1)
    assert same(routed.state_dict(), free.state_dict())


# ---------------------------------------------------------------- router.py: ours
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
    ([D + 1000 for D in FAR], {}, [1, E2, 1, 3 * E2]),
    (FAR, {"global_prior": None}, [1, E2, 1, E2]),
    (FAR, {"global_prior": 0.0}, [1, E2, 1, 0]),
    (NEAR, {"global_prior": 0.3}, [0.7, 0.3 * math.exp(0.4)]),
    ([0.7], {}, [1]),
    ([3.0, 1.0], {"start": "uniform"}, [1, 1]),
    ([0.0, 0.0, 0.0], {}, [1, 1, 2]),]


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("D, options, weights", STARTS)
def test_start_by_hand(monkeypatch, D, options, weights, softmax):
    models = experts(len(D))
    values = iter(D)

    def divergence(model, x):
        assert len(x) == 5  # all images
        return torch.tensor(next(values))

    monkeypatch.setattr(router, "divergence", divergence)
    routed = build(models, softmax=softmax)
    router.fit_to_site(routed, models, noise(5, 1, 12, 12, seed=9), share=0.0, **options)
    routed(noise(5, 1, 12, 12, seed=9))
    expected = torch.tensor(weights) / sum(weights)
    assert len(routed.routing) == 13
    for chosen in routed.routing.values():
        assert close(chosen, expected.double().expand(5, -1), 4e-6)
    assert all(value.isfinite().all() for value in routed.parameters())


def test_random_start_is_as_built():
    models = experts()
    routed, untouched = build(models), build(models)
    router.fit_to_site(routed, models, noise(4, 1, 12, 12, seed=9), start="random", share=0.0)
    assert same(routed.state_dict(), untouched.state_dict() | site_entries(routed))


def site_entries(routed: router.RoutedNetwork) -> dict:
    state = routed.state_dict()
    return {name: value for name, value in state.items() if ".site_" in name}


def test_statistics_of_no_image_are_never_used():
    models = small_models()
    x = noise(6, 1, 12, 12, seed=9)
    for share in None, 0.7, 1.0:
        routed = build(models, passes=0)
        router.fit_to_site(routed, models, x, share=share, online=True)
        reference = build(models)
        router.fit_to_site(reference, models, x, share=0.0)
        expected = router.predict(reference, x)
        assert torch.equal(router.predict(routed, x), expected)
        assert torch.equal(adapted(routed, x), expected)


def test_networks_without_batchnorm_start_at_the_prior():
    norm = nn.GroupNorm(2, 4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.PReLU(), nn.Conv2d(4, 2, 1))
    models = variants(network)
    routed = build(models)
    router.fit_to_site(routed, models, noise(4, 1, 12, 12, seed=9))
    routed(noise(4, 1, 12, 12, seed=9))
    prior = torch.tensor([0.25, 0.25, 0.5])
    for weights in routed.routing.values():
        assert close(weights, prior.expand(4, -1), 1e-6)
    assert router.divergence(models[0], noise(4, 1, 12, 12, seed=9)) == 0
    adapted(routed, noise(4, 1, 12, 12, seed=9))


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(5, 5), (3, 3, 4)])
def test_divergence_by_hand(shape, shift):
    """The mean over channels and layers; a layer used twice counts over all its uses."""
    kind = nn.BatchNorm3d if len(shape) == 3 else nn.BatchNorm2d
    x = noise(42, 2, *shape).float() * 3 + shift
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


def test_divergence_counts_eps_and_is_exact_in_bfloat16():
    norm = nn.BatchNorm2d(1, eps=0.5)
    norm.running_var.fill_(2.0)
    x = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    found = router.divergence(nn.Sequential(norm), x)
    assert found.item() == pytest.approx(kl(1, 1 + 0.5, 0, 2 + 0.5))
    narrow = nn.BatchNorm2d(1, eps=0.0)
    narrow.running_var.fill_(1e-4)
    x = torch.tensor([1.0, 1 + 1 / 128]).view(1, 1, 1, 2)  # whose mean bfloat16 does not have
    exact = router.divergence(nn.Sequential(narrow), x)
    assert close(router.divergence(nn.Sequential(narrow), x.bfloat16()), exact, 1e-6)


def test_divergence_leaves_the_model_as_it_was():
    model = norm_alone().train()
    before = iopfl.snapshot(model)
    router.divergence(model, noise(4, 3, 5, 5).float())
    assert same(model.state_dict(), before) and model.training
    router.build_routed([model])  # which would refuse hooks


def gaussians(*layers) -> nn.Module:
    """BatchNorms of these running means and variances."""
    norms = []
    for mean, variance in layers:
        norm = nn.BatchNorm2d(1, eps=0.0)
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(variance)
        norms.append(norm)
    return nn.Sequential(*norms)


@pytest.mark.parametrize("inside, D, share", [
    ([2.0], 2.0, 1 / 2),
    ([2.0], 4.0, 16 / 17),
    ([2.0], 1.0, 1 / 17),
    ([9.0, 1.0, 2.0], 2.0, 1 / 2),  # the median
    ([1.0, 3.0, 9.0, 0.0], 2.0, 1 / 2),  # of four the mean of those in the middle
    ([0.0, 0.0], 0.5, 1.0),
    ([2.0], 0.0, 0.0),
    ([2.0], 1e9, 1.0),
    ([2.0], 1e-9, 0.0),
    ([2.0], 1e-99, 0.0),
    (None, 0.3, 1 / 4),
    (None, 0.0, 0.0),
])
def test_site_share_by_hand(inside, D, share):
    if inside is not None:
        inside = torch.tensor(inside, dtype=torch.float64)
    assert router.site_share(D, inside) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("inside", [
    [], [-0.1], [math.nan], [0.1, math.inf], 0.3, [[0.1, 0.2]]])
def test_divergences_inside_that_cannot_be(inside):
    models = experts()
    with pytest.raises(ValueError, match="inside: one finite divergence, 0 or more, of each"):
        router.fit_to_site(build(models), models, noise(4, 1, 12, 12), inside=inside)


@pytest.mark.parametrize("inside", [
    [0.5, 0.1, 0.2], torch.tensor([0.2, 0.2]), (0.2,), [0.0, 0.2, 9.0]])
def test_the_share_comes_from_the_divergences_inside(inside):
    """By D of the images and the median 0.2 of them, times n / (n + 16)."""
    models = experts()
    x = noise(6, 1, 12, 12, seed=9)
    D = router.divergence(models[-1], x).item()
    routed = build(models)
    router.fit_to_site(routed, models, x, inside=inside)
    for norm in routed.parts(router.RoutedBatchNorm):
        assert norm.site_share.item() == pytest.approx(1 / (1 + (0.2 / D) ** 4), rel=1e-5)
        assert norm.site_prior == 16 and norm.site_images == 6
    router.fit_to_site(routed, models, x, inside=inside, online=True)
    assert norm.site_share.item() == pytest.approx(1 / (1 + (0.2 / D) ** 4), rel=1e-5)
    assert norm.site_prior == 16 and norm.site_images == 0
    router.fit_to_site(routed, models, x, inside=inside, share=0.3)
    assert norm.site_share.item() == pytest.approx(0.3) and norm.site_prior == 0
    router.fit_to_site(routed, models, x)
    assert norm.site_share.item() == 0.25 and norm.site_prior == 16


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
    x = noise(6, 3, 5, 5).float() * scale + shift
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
    def site_share(D, inside):
        return 0.8

    monkeypatch.setattr(router, "site_share", site_share)
    model = norm_alone().double()
    x = noise(count, 3, 5, 5)
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
    x = noise(6, 3, 5, 5).float() + shift
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
    x = noise(6, 1, 12, 12, seed=9)
    routed = build(models)
    router.fit_to_site(routed, models, x, online=True)
    norm = routed.parts(router.RoutedBatchNorm)[0]
    assert norm.site_share == 0.25
    assert norm.site_images == 0
    adapted(routed, x, online=True)
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
    (1.0, 1.012, 1.012): True,  # of areas below one half
    (1.0, 1.001, 1.0): False,
    (1.05, 1.0, 1.0): False,
}


@pytest.mark.parametrize("change, back", LEASHES.items())
def test_leash_pulls_half_of_the_way_back(change, back):
    """When the area of a class, the background left out, has changed by more than the leash."""
    models = variants(UNet(1, 3, 2, 1))
    x = noise(2, 1, 8, 8, seed=9)
    routed = build(models)
    router.fit_to_site(routed, models, x)
    at_start = router.predict(routed, x)
    start = copy.deepcopy(routed.state_dict())
    snapshot = routed.snapshot()
    names = [name for name, _ in routed.named_parameters()]
    for name in names:
        routed.get_parameter(name).data += 0.1
    factors = torch.tensor(change).view(3, 1, 1)
    router.pull_back(routed, x, at_start * factors, snapshot)
    for name, value in routed.state_dict().items():
        moved = 0
        if name in names:
            moved = 0.05 if back else 0.1
        assert close(value, start[name] + moved, 1e-12), name


def test_a_leash_of_zero_halves_each_step():
    moved = []
    for leash in None, 0.0:
        routed = build(small_models(), leash=leash)
        start = routed.snapshot()
        step(routed, noise(4, 1, 12, 12, seed=9))
        moved.append({name: value - start[name] for name, value in routed.named_parameters()})
    for name, free in moved[0].items():
        assert close(moved[1][name], free / 2, 1e-12)


def test_the_leash_keeps_what_a_block_of_two_names_learnt():
    """`functional_call` of a network in which a block has two names leaves the values it was
    given: the leash must not use it."""
    models = foreigners()
    x = noise(4, 2, 12, 12)
    results = []
    for leash in None, 100.0:
        routed = build(models, leash=leash)
        router.fit_to_site(routed, models, x)
        start = copy.deepcopy(routed.state_dict())
        step(routed, x)
        results.append(routed.state_dict())
    assert same(*results)
    names = {name for name, _ in routed.named_parameters()}
    moved = moved_entries(start, routed.state_dict())
    assert len(moved & names) >= 10


# ---------------------------------------------------------------- router.py: what is refused
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


def called_name(conv):
    scale = Scale(2)
    scale.register_parameter("name", nn.Parameter(torch.ones(1)))
    return scale


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
    (lambda conv: nn.LSTM(4, 4), "'0': LSTM is recurrent; no layer that returns several tensors"),
    (called_name, "'0': Scale has a parameter called as an attribute of routed layers"),
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
    for other in wider, one[:1], copy.deepcopy(one).double():
        with pytest.raises(ValueError, match="the models differ in '[01]'"):
            router.build_routed([one, other])
    with pytest.raises(ValueError, match="differ in '': .*gamma .4, 1, 1. torch.float32"):
        router.build_routed([Scale(3), Scale(4)])


@pytest.mark.parametrize("number", [0, 1])
def test_each_model_is_looked_at(number):
    models = variants(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)), 2)
    infinite(models[number][0])
    with pytest.raises(ValueError, match="'0': Conv2d holds values that are not finite"):
        router.build_routed(models)


def test_models_of_other_activations_are_refused():
    models = [nn.Sequential(nn.Conv2d(1, 2, 1), kind()) for kind in (nn.SiLU, nn.Tanh)]
    with pytest.raises(ValueError, match="the models differ in '1'"):
        router.build_routed(models)


def test_layers_without_parameters_of_their_own_are_refused_too():
    without_bias = parametrizations.weight_norm(nn.Conv2d(1, 2, 1, bias=False))
    dictionary = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(1))})
    for layer, message in (without_bias, "is computed"), (dictionary, "computes nothing"):
        with pytest.raises(ValueError, match=f"'0': .* {message}"):
            router.build_routed([nn.Sequential(layer)])


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


class Prior(nn.Module):
    """A layer without input: a map that is learnt."""

    def __init__(self):
        super().__init__()
        self.map = nn.Parameter(torch.zeros(2, 12, 12))

    def forward(self):
        return self.map


class WithPrior(Fused):
    def __init__(self):
        super().__init__()
        self.fusion = Prior()

    def forward(self, x):
        return self.conv(x) + self.fusion()


@dataclasses.dataclass
class Output:
    features: torch.Tensor


class ReturnsOutput(Scale):
    def forward(self, x):
        return Output(super().forward(x))


class WithOutput(Fused):
    def __init__(self):
        super().__init__()
        self.fusion = ReturnsOutput(2)

    def forward(self, x):
        return self.fusion(self.conv(x)).features


@pytest.mark.parametrize("kind, message", [
    (Windows, "'mlp' whose batch has 16 entries for 4 images; choose a network without windows"),
    (Fused, "'fusion' which is not given one tensor alone, as its first argument; move its"),
    (FusedByName, "'fusion' which is not given one tensor alone"),
    (WithPrior, "'fusion' which is not given one tensor alone"),
    (WithOutput, "'fusion', which returns a Output; move its parameters into a layer"),
])
def test_a_pass_refuses_layers_that_are_not_from_tensor_to_tensor(kind, message):
    models = variants(kind(), 2)
    with pytest.raises(ValueError, match=f"cannot route {message}") as caught:
        router.predict(build(models), noise(4, 1, 12, 12, seed=9))
    assert "\n" not in str(caught.value)


class Checkpointed(nn.Sequential):
    """Whose layers are computed once more in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_layers_outside_a_pass_are_refused():
    routed = build(variants(Checkpointed(nn.Conv2d(1, 2, 1)), 2))
    message = "cannot route '0' outside a pass: call the routed network.*checkpointing off"
    with pytest.raises(ValueError, match=message):
        step(routed, noise(4, 1, 12, 12, seed=9))
    with pytest.raises(ValueError, match=message):
        routed.network(noise(4, 1, 12, 12, seed=9))


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
            router.fit_to_site(build(models), models, noise(4, 1, 12, 12, seed=9))


def test_other_models_or_another_order_are_refused():
    models = experts()
    x = noise(6, 1, 12, 12, seed=9)
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
    x = noise(6, 1, 12, 12, seed=9)
    x[:4] = 0
    with pytest.raises(ValueError, match="is not itself"):
        router.fit_to_site(build(models), models[::-1], x)


def test_nearly_equal_models_in_another_order_are_refused():
    first = experts(1)[0]
    second = copy.deepcopy(first)
    second.head.bias.data[0] += 0.003
    logits = first(noise(4, 1, 12, 12, seed=9))
    difference = second(noise(4, 1, 12, 12, seed=9)) - logits
    assert difference.abs().max() < 0.01 * logits.abs().max()
    models = [first, second]
    routed = build(models)
    router.fit_to_site(routed, models, noise(4, 1, 12, 12, seed=9))
    with pytest.raises(ValueError, match="is not itself"):
        router.fit_to_site(routed, models[::-1], noise(4, 1, 12, 12, seed=9))
    twins = [first, first]
    # Of twins the order does not matter.
    router.fit_to_site(build(twins), twins, noise(4, 1, 12, 12, seed=9))


@pytest.mark.parametrize("settings", [ENTROPY_TOO, PUBLISHED])
def test_the_check_leaves_everything_as_it_was(settings):
    models = experts()
    x = noise(6, 1, 12, 12, seed=9)
    routed = build(models, **settings)
    router.fit_to_site(routed, models, x, share=0.4)
    adapted(routed, x)
    state, routing = copy.deepcopy(routed.state_dict()), routed.routing
    router.check_routed(routed, models, x[:2])
    assert same(routed.state_dict(), state) and routed.routing is routing
    assert routed.settings == router.RoutingSettings(**settings)
    with pytest.raises(ValueError, match="is not itself"):
        router.check_routed(routed, models[::-1], x[:2])
    assert same(routed.state_dict(), state)


@pytest.mark.parametrize("options, message", [
    ({"start": "Matched"}, "start is 'Matched', but may be matched, uniform or random"),
    ({"share": 1.2}, "share is 1.2, but may be 0 to 1"),
    ({"share": -0.1}, "share is -0.1, but may be 0 to 1"),
])
def test_fit_to_site_refuses_wrong_options(options, message):
    routed = build()
    state = copy.deepcopy(routed.state_dict())
    with pytest.raises(ValueError, match=message):
        router.fit_to_site(routed, experts(), noise(4, 1, 12, 12, seed=9), **options)
    with pytest.raises(ValueError, match="no images"):
        router.fit_to_site(routed, experts(), noise(0, 1, 12, 12, seed=9))
    assert same(routed.state_dict(), state)


def test_compiled_models_are_taken_out_of_their_wrapping():
    models = small_models()
    compiled = [torch.compile(model) for model in models]
    routed = build(compiled)
    router.fit_to_site(routed, compiled, noise(4, 1, 12, 12, seed=9))
    plain = build(models)
    router.fit_to_site(plain, models, noise(4, 1, 12, 12, seed=9))
    assert same(routed.state_dict(), plain.state_dict())


class Keeping(nn.Module):
    """A network whose forward leaves activations in attributes; so does one of its layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.scale = KeepingScale(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        self.features = torch.relu(self.conv(x))
        self.all = [self.features, {"scaled": 1 * self.scale(self.features)}]
        return self.head(self.all[1]["scaled"])


class KeepingScale(Scale):
    def forward(self, x):
        self.output = super().forward(x)
        return self.output


def test_networks_that_keep_activations_are_copied_without():
    """torch cannot copy tensors with a graph."""
    models, x = variants(Keeping()), noise(4, 1, 12, 12, seed=9)
    for model in models:
        model(x)
    with pytest.raises(RuntimeError):
        copy.deepcopy(models[0])
    routed = build(models, passes=1)
    router.fit_to_site(routed, models, x)
    assert adapted(routed, x).shape == (4, 2, 12, 12)
    assert all(model.features.grad_fn is not None for model in models)  # theirs are still there


# ---------------------------------------------------------------- router.py: what networks return
def only(logits, small):
    return logits


def scores(logits):
    """What a classifier beside the segmentation returns, (N, 5)."""
    return logits.mean(dim=(2, 3))[:, [0, 0, 0, 0, 0]]


FORMS = {
    "list": lambda logits, small: [logits, small],  # deep supervision
    "nested tuple": lambda logits, small: ((logits,), small),
    "dict of out": lambda logits, small: OrderedDict(aux=small[:, :1], out=logits),
    "dict of logits": lambda logits, small: {"hidden": [small[:, :1]], "logits": logits},
    "dict of other names": lambda logits, small: {"main": logits, "aux": small},
    "scores first": lambda logits, small: (scores(logits), logits),
    "scores in a dict": lambda logits, small: {"scores": scores(logits), "map": logits},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_main_output_is_used(form):
    models = variants(Returning(FORMS[form]), 2)
    plain = copy.deepcopy(models)
    for model in plain:
        model.form = only
    results = []
    for given in models, plain:
        routed = build(given)
        router.fit_to_site(routed, given, noise(4, 1, 12, 12, seed=9))
        results.append(adapted(routed, noise(4, 1, 12, 12, seed=9)))
    assert torch.equal(*results)
    assert results[0].shape == (4, 3, 12, 12)


@pytest.mark.parametrize("form, found", [
    (lambda logits, small: (logits, logits[:, :1]), r"a tuple of tensors \[\(4, 3, .*4, 1, 12, 12"),
    (lambda logits, small: {"logits": scores(logits)}, r"a Tensor of tensors \[\(4, 5\)\]"),
    (lambda logits, small: [], r"a list of tensors \[\]"),
    (lambda logits, small: Output(logits), r"a Output of tensors \[\]"),
])
def test_other_outputs_are_refused(form, found):
    routed = build(variants(Returning(form), 2))
    with pytest.raises(ValueError, match=f"the network returns {found}.*; wrap it in a module"):
        routed(noise(4, 1, 12, 12, seed=9))
    assert routed.parts(router.Routed)[0].current is None  # no pass is left under way


@pytest.mark.parametrize("settings", [{}, PUBLISHED])
def test_a_softmax_is_refused(settings):
    models = variants(Returning(lambda logits, small: logits.softmax(dim=1)), 2)
    with pytest.raises(ValueError, match="probabilities; leave out its last softmax or sigmoid"):
        adapted(build(models, **settings), noise(4, 1, 12, 12, seed=9))


@pytest.mark.parametrize("form, channels", [
    (lambda logits, small: logits.clamp(0.1, 0.9), 3),  # do not sum to one
    (lambda logits, small: logits - logits.mean(dim=1, keepdim=True) + 1 / 3, 3),  # some below 0
    (lambda logits, small: 5 * logits.relu(), 1),  # some above 1
])
def test_logits_that_are_a_little_like_probabilities_are_taken(form, channels):
    models = variants(Returning(form, channels), 1)
    router.check_routed(build(models), models, noise(4, 1, 12, 12, seed=9))


def test_a_sigmoid_is_refused_by_comparison_with_the_models():
    models = variants(Returning(lambda logits, small: logits.sigmoid(), channels=1), 2)
    for check in router.fit_to_site, router.check_routed:
        with pytest.raises(ValueError, match="leave out its last softmax or sigmoid"):
            check(build(models), models, noise(4, 1, 12, 12, seed=9))


def test_logits_of_one_channel_may_lie_between_0_and_1():
    """As long as not all values of all models on several images do."""
    models = variants(Returning(lambda logits, small: logits.clamp(0.1, 0.9), channels=1), 3)
    models[1].form = only
    routed = build(models)
    with pytest.raises(ValueError, match="is not itself"):  # the forms differ, but that is later
        router.fit_to_site(routed, models, noise(4, 1, 12, 12, seed=9))
    models = variants(Returning(only, channels=1))
    for model in models[1:]:
        model.conv.weight.data *= 0.01
        model.conv.bias.data[:] = 0.5
    routed = build(models)
    router.set_start(routed, torch.tensor([0.0, 0.0, 1.0]))
    assert (routed(noise(4, 1, 12, 12, seed=9))[:, 1] - 0.5).abs().max() < 0.5
    router.fit_to_site(routed, models, noise(4, 1, 12, 12, seed=9))
    assert adapted(routed, noise(4, 1, 12, 12, seed=9)).shape == (4, 2, 12, 12)


def test_one_output_channel_is_a_sigmoid():
    models = variants(Returning(only, channels=1), 2)
    routed = build(models, passes=1)
    router.set_start(routed, torch.tensor([0.0, 1.0]))
    foreground = models[1](noise(4, 1, 12, 12, seed=9)).sigmoid()
    expected = torch.cat([1 - foreground, foreground], dim=1)
    assert close(router.predict(routed, noise(4, 1, 12, 12, seed=9)), expected)
    router.fit_to_site(routed, models, noise(4, 1, 12, 12, seed=9))
    assert adapted(routed, noise(4, 1, 12, 12, seed=9)).shape == (4, 2, 12, 12)


# ---------------------------------------------------------------- data.py
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


def test_normalise():
    large = np.array([[0, 1e30], [2e30, 1e30]], dtype=np.float32)  # squares overflow float32
    assert data.normalise(large) == pytest.approx(data.normalise(large / 1e30), abs=1e-6)
    assert not data.normalise(np.full((3, 3), 7.0)).any()


def test_classes_are_counted_by_the_highest():
    dataset = data.DataSet("mine", [], 1, {"all": (1, 2, 3), "inner": (3,)}, "px", "images")
    assert dataset.classes == 4


def renamed(dataset):
    dataset.sites[0].name = "b"


def other_case(dataset):
    dataset.sites[0].train.cases[0] = "case9"
    dataset.sites[0].spacing["case9"] = (1.0, 1.0)


def other_pixel_size(dataset):
    dataset.sites[0].spacing["case1"] = (1.0, 2.0)


def other_structure(dataset):
    dataset.structures["y"] = (1,)


def other_split(dataset):
    """The image that tested validates now: pixels and cases come in the same order."""
    site = dataset.sites[0]
    joined = data.joined([site.validation, site.test])
    site.validation = joined
    site.test = data.Split(joined.images[:0], joined.masks[:0], [])


def other_pixel(dataset):
    dataset.sites[0].test.images[0, 0, 0, 0] += 1


def other_mask(dataset):
    dataset.sites[0].validation.masks[0, 7, 7] = 0


@pytest.mark.parametrize("change", [renamed, other_case, other_pixel_size, other_structure,
                                    other_split, other_pixel, other_mask])
def test_a_fingerprint_tells_data_sets_apart(change):
    splits = [random_split(2), random_split(1), random_split(1)]
    for number, split in enumerate(splits):
        split.cases = [f"case{number}{place}" for place in range(len(split.cases))]
    cases = [case for split in splits for case in split.cases] + ["case1"]
    site = data.Site("a", *splits, dict.fromkeys(cases, (1.0, 1.0)))
    splits[0].cases[1] = "case1"
    dataset = data.DataSet("mine", [site], 3, {"x": (1,)}, "px", "images")
    before = dataset.fingerprint()
    assert copy.deepcopy(dataset).fingerprint() == before
    change(dataset)
    assert dataset.fingerprint() != before


@pytest.mark.parametrize("task, channels, classes, unit, pixel", [
    ("prostate", 1, [0, 1], "mm", 150 / 32),
    ("fundus", 3, [0, 1, 2], "px", 1),
])
def test_simulated_images_and_masks(task, channels, classes, unit, pixel):
    loaded = data.simulate_sites(task, 0, size=32, images_per_site=8)
    assert [site.name for site in loaded.sites] == list(data.TASKS[task].hospitals)
    assert loaded.channels == channels and loaded.classes == len(classes)
    assert loaded.unit == unit and loaded.kind == "simulated" and loaded.name == task
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


def with_value(array, value):
    array[1, 2, 3] = value
    return array


@pytest.mark.parametrize("spoil, part", [  # from (image, mask) to what is returned instead
    (lambda image, mask: (image[:, 1:], mask), "(3, 15, 16)"),
    (lambda image, mask: (image[:1], mask), "(1, 16, 16)"),
    (lambda image, mask: (image[0], mask), "not ((3, 16, 16), (16, 16))"),
    (lambda image, mask: (with_value(image, math.nan), mask), "NaN"),
    (lambda image, mask: (with_value(image, -math.inf), mask), "infinity"),
    (lambda image, mask: (np.full_like(image, 0.3), mask), "constant"),
    (lambda image, mask: (image, mask[None]), "(1, 16, 16)"),
    (lambda image, mask: (image, mask[2:]), "(14, 16)"),
    (lambda image, mask: (image, mask + (mask == 2)), "[0 1 3]"),
    (lambda image, mask: (image, mask - 1), "[-1  0  1]"),
    (lambda image, mask: (image, mask * 0.75), "1.5"),
    (lambda image, mask: (image, np.where(mask == 1, math.nan, mask)), "nan"),
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


@pytest.mark.parametrize("structures", [{"left": (1,)}, {"right": (2,)}])
def test_a_task_whose_structures_lack_a_class(monkeypatch, structures):
    add_squares(monkeypatch, draw_square, structures=structures)
    with pytest.raises(ValueError, match="task squares: .*0 1 2.*structures"):
        data.simulate_sites("squares", 0, size=16, images_per_site=4)


# ---------------------------------------------------------------- train.py, end to end
def methods_in(run: Path, phase: str) -> set[str]:
    return {row["method"] for row in rows_of(run) if row["phase"] == phase}


def test_a_run_reports_every_method(toy_run):
    assert methods_in(toy_run, "outside") == set(train.OUTSIDE)
    assert methods_in(toy_run, "inside") == set(train.INSIDE)
    assert methods_in(toy_run, "validation") == set(train.INSIDE)
    sites = {row["site"] for row in rows_of(toy_run) if row["phase"] == "inside"}
    assert sites == {"Alder", "Birch", "Cedar", "Hazel", "Linden"}
    trained = {folder.name for folder in toy_run.glob("seed*")}
    assert trained == {f"seed0-Rowan-{key}" for key in train.TRAINING}  # none is trained twice


def dice_of_predictions(predictions, masks) -> float:
    scores = []
    for prediction, mask in zip(predictions.numpy(), masks.numpy()):
        scores.append(iopfl.dice(prediction > 0, mask > 0))
    return float(np.mean(scores))


def test_models_and_rows_inside_are_those_of_the_method(toy_run):
    """M1 and M2 once more with the settings of the run, and the Dice of what they give."""
    saved = torch.load(toy_run / "seed0-Rowan-plain" / "last.pt", weights_only=True)
    sites = data.simulate_sites("prostate", 0, 16, 8).sites[:5]
    clients = {site.name: site.train.to("cpu") for site in sites}
    model = UNet(1, 2, 2, 1, seeded()).to(memory_format=torch.channels_last)
    personal = {}
    for last in iopfl.federate(model, clients, 2, train.WITH_DITTO):
        for name, local in last.local.items():
            personal[name] = iopfl.update_personal(personal.get(name), local, 0.7)
    for site in sites:
        states = {  # what is saved, and what it should be
            "iopfl": (saved["personal"][site.name], personal[site.name]),
            "fedavg-ft": (saved["fine_tuned"][site.name], last.local[site.name]),
            "fedavg": (saved["last"]["global_state"], last.global_state),
            "ditto": (saved["last"]["ditto_models"][site.name], last.ditto_models[site.name]),
        }
        for method, (found, expected) in states.items():
            assert same(found, expected), method
            model.load_state_dict(expected)
            dice = dice_of_predictions(iopfl.predict(model, site.test.images), site.test.masks)
            row = find_row(toy_run, "inside", method, site.name)
            assert row["dice"] == pytest.approx(dice, abs=1e-12), method


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
    result = json.loads((folder / "rows.json").read_text())
    spread = train.routing_spread(train.routing_of(routed, split.images))
    assert result["routing_spread"][method] == pytest.approx(spread, abs=1e-6)
    weights = result["routing"][method]
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
    for key in ("plain", "fedbn"):
        folder = tmp_path / f"seed0-all-inside-{key}"
        saved[key] = torch.load(folder / "last.pt", weights_only=True)["last"]
    assert 1 <= len(saved["fedbn"]["personal_layers"]) < 6
    for site in data.simulate_sites("prostate", 0, 16, 8).sites:
        own = saved["fedbn"]["personal_layers"].get(site.name, {})
        states = {
            "fedavg": saved["plain"]["global_state"],
            "fedbn": saved["fedbn"]["global_state"] | own,
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


def models_and_split() -> tuple[list[nn.Module], data.Split]:
    """Three small networks, of which the last fits the images best, and six slices of four
    volumes, in float16."""
    models = [randomise(UNet(1, 2, 2, 1), seed) for seed in range(3)]
    images = noise(6, 1, 12, 12, dtype=torch.float32).half()
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
    models[2].train()(images.float())
    models[2].eval()
    masks = (images[:, 0] > 0.5).byte()
    return models, data.Split(images, masks, ["a", "a", "b", "c", "c", "d"])


def outside(method: str, models: list, split: data.Split, seed: int = 0,
            inside: list | None = None) -> torch.Tensor:
    return train.OUTSIDE[method](models, split, seed, inside).probabilities


def test_methods_outside_that_adapt_nothing():
    models, split = models_and_split()
    images = split.images.float()
    first, second, last = [model(images).softmax(dim=1) for model in models]
    assert close(outside("global", models, split), last, 1e-6)
    assert close(outside("ensemble", models, split), (first + second + last) / 3, 1e-6)
    assert close(outside("average", models, split), average(models)(images).softmax(dim=1), 1e-5)
    D = [router.divergence(model, images) for model in models]
    assert D[2] < min(D[:2])  # the best, but the global one
    best = first if D[0] < D[1] else second
    assert close(outside("best-inside", models, split), best, 1e-6)
    normalised_by_batch = models[2].train()(images).softmax(dim=1)
    assert close(outside("bn", models, split), normalised_by_batch, 1e-4)


def test_tent_by_hand():
    """Adam moves BatchNorm's affine to less entropy, once over the images, batch by batch."""
    models, split = models_and_split()
    found = outside("tent", models, split, 3)
    images, model = split.images.float(), models[2].train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    affine = [value for norm in norms for value in norm.parameters()]
    optimiser = torch.optim.Adam(affine, lr=1e-3)
    for batch in images[torch.randperm(6, generator=seeded(3))].split(3):
        p = model(batch).softmax(dim=1)
        entropy = -(p * p.log()).sum(dim=1).mean() / math.log(2)
        optimiser.zero_grad()
        entropy.backward()
        optimiser.step()
    expected = torch.cat([model(batch).softmax(dim=1) for batch in images.split(3)])
    assert close(found, expected, 1e-5)


@pytest.mark.parametrize("method", ["routing-ours", "routing-published"])
def test_routing_outside_by_hand(method):
    models, split = models_and_split()
    images, ours = split.images.float(), method == "routing-ours"
    settings = router.RoutingSettings() if ours else router.PUBLISHED
    routed = router.build_routed(models, settings, seeded(3))
    if ours:
        router.fit_to_site(routed, models, images, inside=[0.1, 0.3])
    found = outside(method, models, split, 3, [0.1, 0.3])
    assert torch.equal(found, adapted(routed, images, 3))


def test_how_much_routing_varies_by_hand():
    """Two layers, three images, three models, which vary by different amounts."""
    routing = {"a": torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.3, 0.3], [0.6, 0.3, 0.1]]),
               "b": torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3], [0.5, 0.1, 0.4]])}
    spread = train.routing_spread(routing)
    two, one = np.std([0.2, 0.4, 0.6]), np.std([0.1, 0.2, 0.3])
    assert spread["over_images"] == pytest.approx((two + 0 + two + 0 + one + one) / 6)
    means = [0.4, 0.5], [0.3, 0.2], [0.3, 0.3]  # of each model in a and b
    assert spread["over_layers"] == pytest.approx(np.mean([np.std(pair) for pair in means]))
    text = train.routing_in_words(routing, ["Alder", "Birch", "global"])
    assert text == ("routing weights: Alder 0.45, Birch 0.25, global 0.30; over images ±0.08, "
                    "over layers ±0.03")
    assert train.mean_routing(routing)["a"] == pytest.approx([0.4, 0.3, 0.3])


def test_routing_of_each_image():
    """By batches, the weights of the last pass of each."""
    models, split = models_and_split()
    routed = router.build_routed(models, generator=seeded(3))
    images = split.images.float()
    found = train.routing_of(routed, images)
    routed(images)
    assert list(found) == list(routed.routing)
    for layer, weights in routed.routing.items():
        assert close(found[layer], weights, 1e-6) and found[layer].shape == (len(images), 3)


def test_distances_inside_are_kept(tmp_path, capsys):
    """Those of each hospital's training images, and what `routing-ours` is given."""
    assert call_train(*TOY, "--methods", "iopfl", "routing-ours", "--out", tmp_path) == 0
    assert "routing-ours, routing weights: " in capsys.readouterr().out
    folder, = tmp_path.glob("seed*")
    result = json.loads((folder / "rows.json").read_text())
    assert list(result["routing_spread"]) == list(result["routing"]) == ["routing-ours"]
    args = argparse.Namespace(**json.loads((tmp_path / "config.json").read_text())["settings"])
    dataset = train.simulated(args, 0)
    model = train.new_model(args, dataset, 0)
    saved = torch.load(folder / "last.pt", weights_only=True)
    model.load_state_dict(saved["last"]["global_state"])
    names = [site.name for site in dataset.sites if site.name != result["hold_out"]]
    assert list(result["distances_inside"]) == names
    for site in dataset.sites:
        if site.name in names:
            expected = router.divergence(model, site.train.images).item()
            assert result["distances_inside"][site.name] == pytest.approx(expected, rel=1e-4)
    routed = torch.load(folder / "routing-ours.pt", weights_only=True)
    held_out, = [site for site in dataset.sites if site.name not in names]
    D = router.divergence(model, held_out.everything.images).item()
    share = 1 / (1 + (np.median(list(result["distances_inside"].values())) / D) ** 4)
    shares = {value.item() for name, value in routed.items() if name.endswith("site_share")}
    assert len(shares) == 1 and shares.pop() == pytest.approx(share, rel=1e-3)


def test_distances_are_kept_without_a_hospital_outside(tmp_path):
    words = ["--hold-out", "none", "--methods", "iopfl", "--out", tmp_path]
    assert call_train(*TOY, *words) == 0
    file, = tmp_path.glob("seed*/rows.json")
    names = [site.name for site in data.simulate_sites("prostate", 0, 16, 8).sites]
    assert list(json.loads(file.read_text())["distances_inside"]) == names


def test_oracle_by_hand():
    """Half of the volumes is predicted by what ten epochs on the other half make of the global
    model."""
    models, split = models_and_split()
    before = iopfl.snapshot(models[2])
    found = outside("oracle", models, split, 3)
    assert same(models[2].state_dict(), before)
    generator = seeded(3)
    order = torch.randperm(4, generator=generator).tolist()
    first_half = {"abcd"[number] for number in order[:2]}
    expected = torch.zeros_like(found)
    for tested in True, False:
        chosen = torch.tensor([(case in first_half) == tested for case in split.cases])
        model = copy.deepcopy(models[2])
        iopfl.train_local(model, split.images[~chosen], split.masks[~chosen], epochs=10,
                          generator=generator)
        expected[chosen] = model.eval()(split.images[chosen].float()).softmax(dim=1)
    assert close(found, expected, 1e-6)


def test_an_outside_method_may_have_any_name(tmp_path, monkeypatch):
    """What is routed is told by the network that a method returns, not by its name."""
    monkeypatch.setitem(train.OUTSIDE, "routing-x", train.global_model)
    monkeypatch.setitem(train.OUTSIDE, "mixed", train.routing_ours)
    assert call_train(*TOY, "--methods", "routing-x", "mixed", "--out", tmp_path) == 0
    folder = tmp_path / "seed0-Rowan-plain"
    assert [file.name for file in folder.glob("*-weights.png")] == ["mixed-weights.png"]
    assert list(json.loads((folder / "rows.json").read_text())["routing"]) == ["mixed"]


# ---------------------------------------------------------------- train.py: going on
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
    (["--lr", "0.1"], "--rounds, --seeds, --methods, --device may be given, not --lr"),
    (["--published"], "may be given, not --published"),
    (["--size", "32", "--rounds", "3", "--lr", "1"], "not --lr, --size"),
    (["--size", "96"], "not --size"),  # the default
    (["--rounds", "1"], "2 rounds are done already"),
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


def interrupt_after(monkeypatch, rounds: int) -> None:
    """Ctrl-C, once so many rounds of a federation are done."""
    real = train.print_round

    def print_round(last, *arguments, **options):
        real(last, *arguments, **options)
        if last.number == rounds:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "print_round", print_round)


def test_a_mistyped_number_of_rounds_can_be_taken_back(tmp_path, capsys, monkeypatch):
    """A run is finished at any number of rounds that is not below those that are done."""
    words = [*TOY, "--methods", "iopfl", "global"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call_train(*words, "--out", run) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert call_train("--resume", run, "--rounds", "3000") == 130
    assert f"--resume {run} goes on" in capsys.readouterr().err
    assert call_train("--resume", run, "--rounds", "2") == 2
    assert "--rounds: 3 rounds are done already" in capsys.readouterr().err
    assert call_train("--resume", run, "--rounds", "3") == 0
    assert call_train(*words, "--rounds", "3", "--out", whole) == 0
    assert same_run(run, whole)


@pytest.mark.parametrize("version", [None, 1, "2"])
def test_runs_of_other_versions_are_refused(copy_of_run, capsys, version):
    file = copy_of_run / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("version") == train.VERSION
    if version is not None:
        config["version"] = version
    file.write_text(json.dumps(config))
    assert call_train("--resume", copy_of_run) == 1
    error = capsys.readouterr().err
    assert "of another version of train.py; train anew" in error and error.count("\n") == 1


def test_other_images_are_refused(copy_of_run, capsys, monkeypatch):
    """What they are is in `test_a_fingerprint_tells_data_sets_apart`."""
    monkeypatch.setattr(data.DataSet, "fingerprint", lambda self: "00000000")
    before = (copy_of_run / "config.json").read_bytes()
    assert call_train("--resume", copy_of_run) == 1
    error = capsys.readouterr().err
    assert "not those the run began with; start a new run" in error and error.count("\n") == 1
    assert (copy_of_run / "config.json").read_bytes() == before


# ---------------------------------------------------------------- train.py: use and errors
def test_without_out_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("prostate", "prostate-2"):
        assert call_train(*TOY, "--methods", "iopfl", "--rounds", "1") == 0
        assert (tmp_path / "runs" / expected / "results.json").exists()


def claimed_at_once(out, name: str = "x") -> list[Path]:
    """The folders that eight runs get that begin at the same moment."""
    folders = []
    barrier = threading.Barrier(8)

    def claim():
        barrier.wait()
        try:
            folders.append(train.claim_folder(out, name, {"version": train.VERSION}))
        except SystemExit as end:
            assert end.code == 1

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return folders


def test_two_runs_that_begin_at_once_have_two_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = claimed_at_once(None)
    assert {folder.name for folder in folders} == {"x", *[f"x-{n}" for n in range(2, 9)]}
    for folder in folders:
        assert train.load(folder / "config.json", "version")
    (tmp_path / "mine").mkdir()  # an --out that is empty
    assert claimed_at_once("mine") == [Path("mine")]
    assert capsys.readouterr().err.count("another run has begun there") == 7


def test_published_settings():
    args = train.parse_arguments(["--published"])
    assert (args.rounds, args.alpha) == (100, 0.1)
    assert "routing-published" in args.methods and "routing-ours" not in args.methods
    args = train.parse_arguments(["--published", "--hold-out", "none", "--alpha", "0.4"])
    assert args.alpha == 0.4 and args.methods == ["fedavg", "iopfl"]
    args = train.parse_arguments([])
    assert (args.rounds, args.alpha) == (30, 0.7)


def test_minus_zero_is_zero():
    assert str(train.parse_arguments(["--alpha", "-0.0"]).alpha) == "0.0"


@pytest.mark.parametrize("words, part", [
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--methods", "magic"], "magic is unknown"),
    (["--hold-out", "Nowhere", "--size", "16"], "Nowhere: choose all, none or one of Alder"),
    (["--seeds", "-1"], "--seeds must lie"),
    (["--alpha", "2"], "--alpha must lie"),
    (["--participation", "0"], "--participation must be"),
    (["--lr", "nan"], "--lr must be"),
    (["--images-per-site", "3"], "--images-per-site must be"),
    (["--threads", "3000000000"], "--threads must be at most 1024"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["--depth", "1000000000"], "more than 8192 channels"),
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


@pytest.mark.parametrize("words", [["--resume", ""], ["--out", ""]])
def test_an_empty_word_is_refused(capsys, words):
    """A variable of the shell that is not set."""
    assert call_train(*words) == 2
    assert "one of the words is empty" in capsys.readouterr().err


def test_out_must_be_new_or_empty(toy_run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        assert call_train("--out", out) == 2
        assert "not empty; name another folder; --help" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert call_train("--out", toy_run) == 2
    assert f"or go on with the run in it: --resume {toy_run}" in capsys.readouterr().err


def test_a_run_of_a_task_that_is_gone(copy_of_run, capsys):
    file = copy_of_run / "config.json"
    file.write_text(file.read_text().replace('"task": "prostate"', '"task": "square"'))
    assert call_train("--resume", copy_of_run) == 1
    assert "task square is not in data.TASKS" in capsys.readouterr().err


def test_output_to_a_stream_that_cannot_be_set_up(monkeypatch):
    """In a notebook sys.stdout has no `reconfigure`."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert call_train("--size", "0") == 2


def test_divergence_ends_in_one_line(tmp_path, capsys):
    assert call_train(*TOY, "--lr", "1e30", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert "a lower learning rate may help" in error and error.count("\n") == 1


def test_ctrl_c_before_there_is_a_folder(tmp_path, capsys, monkeypatch):
    """Nothing is there to be gone on with."""
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "simulate_sites", interrupt)
    assert call_train("--out", tmp_path / "out") == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")
    assert not (tmp_path / "out").exists()


def test_other_errors_show_their_traceback(tmp_path, monkeypatch):
    """People edit this code."""
    def wrong(*arguments):
        raise KeyError("an error in a new method")

    monkeypatch.setitem(train.OUTSIDE, "global", wrong)
    with pytest.raises(KeyError, match="an error in a new method"):
        train.main([*TOY, "--methods", "global", "--out", str(tmp_path)])


def test_a_closed_stdout_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert call_train(*TOY, "--methods", "fedavg", "--out", tmp_path) == 0
    assert (tmp_path / "results.json").exists()


def test_a_reader_that_ends_is_no_error(tmp_path):
    """As in `python train.py | head -1`."""
    command = [sys.executable, str(ROOT / "train.py"), *TOY, "--methods", "iopfl", "--rounds", "9",
               "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "6 hospitals" in process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 141
    assert error == ""


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


@pytest.mark.parametrize("method", ["mkdir", "read_bytes"])
def test_missing_rights_are_told(copy_of_run, tmp_path, capsys, monkeypatch, method):
    """A new run where no folder may be made, and one to go on with that may not be read."""
    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    words = ["--resume", copy_of_run] if method == "read_bytes" else ["--out", tmp_path / "new"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        assert call_train(*TOY[:2 * (method == "mkdir")], *words) == 1
    error = capsys.readouterr().err
    assert "Permission denied" in error and error.count("\n") == 1
    assert "delete" not in error


def test_fp32_means_fp32():
    train.prepare_torch(SimpleNamespace(threads=1))
    assert torch.backends.cudnn.allow_tf32 is False and torch.backends.cudnn.deterministic


# ---------------------------------------------------------------- train.py: tables and pictures
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


def test_long_names_do_not_shift_the_columns():
    rows = [toy_row("fedavg", site, 0, 0.5, 4.0) for site in ("A", "Massachusetts General")]
    titles, line, _ = train.table(rows, "mm").split("\n")
    assert len(titles) == len(line)
    end = titles.index("Massachusetts General") + len("Massachusetts General")
    assert line[:end].endswith(" 50.0*")


def coloured_pixels(file: Path) -> int:
    """Between the axes of draw_curves, where the grid is grey."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)[20:331, 41:500]
    return (np.ptp(pixels, axis=2) > 10).sum()


def test_curves_show_one_round_and_many_hospitals(tmp_path):
    losses = {f"hospital {number}": 0.4 for number in range(20)}
    history = [{"round": 1, "losses": losses}]
    train.draw_curves(history, {}, tmp_path / "one.png")
    assert coloured_pixels(tmp_path / "one.png") > 5
    history = [{"round": number, "losses": losses} for number in range(1, 7)]
    train.draw_curves(history, {}, tmp_path / "without.png")
    history[4]["validation"] = {"fedavg": 0.9, "iopfl": 0.7}
    train.draw_curves(history, {}, tmp_path / "with.png")
    assert coloured_pixels(tmp_path / "with.png") > coloured_pixels(tmp_path / "without.png") + 20


def test_names_in_other_letters_are_numbered_in_pictures(tmp_path, capsys, monkeypatch):
    """The font of the pictures has Latin letters alone."""
    names = ["Zürich", "北京", "Клиника", "Zurich", "hospital A"]
    hospitals = dict(zip(names, data.PROSTATE_HOSPITALS.values()))
    task = dataclasses.replace(data.TASKS["prostate"], hospitals=hospitals)
    monkeypatch.setitem(data.TASKS, "prostate", task)
    labels = train.labels_of(data.simulate_sites("prostate", 0, 16, 4))
    shown = ["Zurich", "hospital 2", "hospital 3", "hospital 4", "hospital A"]
    assert labels == dict(zip(names, shown))
    words = ["--methods", "routing-ours", "--out", tmp_path]
    assert call_train(*TOY, *words) == 0
    text = capsys.readouterr().out
    told = [line for line in text.split("\n") if line.startswith("in pictures")]
    assert told == ["in pictures 'hospital 2' is 北京", "in pictures 'hospital 3' is Клиника",
                    "in pictures 'hospital 4' is Zurich"]


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


# ---------------------------------------------------------------- README.md and docs/
def blocks_of(file: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_readme_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, table in ((train, "TRAINING"), (train, "INSIDE"), (train, "OUTSIDE"),
                          (data, "TASKS")):  # what a snippet adds goes with the test
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    blocks = blocks_of("README.md") + blocks_of("docs/usage.md")
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
    assert added == {"fedrep", "first"}
    folder = tmp_path / "runs" / "square" / "seed0-C-fedrep"
    saved = torch.load(folder / "last.pt", weights_only=True)["last"]
    assert list(saved["personal_layers"]["A"]) == ["head.weight", "head.bias"]
    check_fedrep(names["head_then_body"])


def test_details_shows_the_routing_weights_that_its_block_prints(capsys):
    block, _ = blocks_of("docs/details.md")
    names = {}
    exec(block, names)
    text = (ROOT / "docs" / "details.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    (\[0.*\])$", text, re.MULTILINE)
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert len(shown) == len(printed) == 2
    for one, two in zip(shown, printed):  # another processor rounds otherwise
        assert json.loads(one) == pytest.approx(json.loads(two), abs=0.02)
    assert sum(json.loads(printed[0])) == pytest.approx(1, abs=0.02)
    # What the block does by hand is what the network does.
    assert names["r"].shape == (1, 4) and names["y"].shape == (1, 4, 32, 32)
    names["routed"](names["x"])
    assert close(names["routed"].routing["encoder.0.0"], names["r"], 1e-6)


def test_details_shows_how_the_csv_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--rounds", "1", "--images-per-site", "4", "--size", "16", "--threads", "1"]
    assert call_train(*words, "--methods", "fedavg", "global", "--width", "2", "--depth", "1") == 0
    _, block = blocks_of("docs/details.md")
    exec(block, {})
    with open("results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [row for row in rows_of(tmp_path / "runs" / "prostate") if row["phase"] != "validation"]
    assert len(lines) == len(rows) > 0
    for line, row in zip(lines, rows):
        assert line["task"] == "prostate" and line["method"] == row["method"]
        assert float(line["dice"]) == pytest.approx(row["dice"], abs=1e-5)
        assert (line["hd95"] == "") == (row["hd95"] is None)
    columns = (ROOT / "docs" / "results.csv").read_text().split("\n")[0].strip()
    assert columns == ",".join(lines[0])


@pytest.mark.parametrize("file", ["README.md", "docs/usage.md", "docs/details.md",
                                  "docs/results.md", "examples/vessels/README.md"])
def test_links_lead_somewhere(file):
    """To files that are there and, behind #, to a heading as GitHub names it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / file).parent / target if target else ROOT / file
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                     for heading in headings]
            assert anchor in names, link


def check_fedrep(head_then_body) -> None:
    """One epoch in which the head alone moves, then one in which the body alone does."""
    client = toy_clients(1)["client0"]
    model, by_hand = tiny(), tiny()
    start = iopfl.snapshot(model)
    loss = head_then_body(model, client.images, client.masks, generator=seeded())
    generator = seeded()
    for frozen in ("encoder", "upsample", "decoder"):
        by_hand.get_submodule(frozen).requires_grad_(False)
    iopfl.train_local(by_hand, client.images, client.masks, generator=generator)
    by_hand.requires_grad_(True)
    by_hand.head.requires_grad_(False)
    expected = iopfl.train_local(by_hand, client.images, client.masks, generator=generator)
    assert loss == expected and same(model.state_dict(), by_hand.state_dict())
    moved = moved_entries(start, iopfl.snapshot(model))
    assert moved == set(start)
    assert all(weight.requires_grad for weight in model.parameters())
