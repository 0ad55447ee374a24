"""Tests against slow, obvious versions, hand-computed values and invariants; python -m pytest."""

import copy
import dataclasses
import gzip
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import prune

import data
import iopfl
import router
import train
from models import UNet

torch.set_num_threads(1)  # at these sizes no slower than two
ALL_METHODS = iopfl.METHODS | {"global-alpha": iopfl.Method(alpha=0.7)}
OURS, AUTHORS = {"entropy": 0.1, "passes": 2}, vars(router.AUTHORS) | {"passes": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_clients(count: int, dtype: torch.dtype = torch.float32) -> dict:
    clients = {}
    for k in range(count):
        x = torch.randn(3 + 2 * k, 1, 8, 8, generator=seeded(k), dtype=dtype) + 0.3 * k
        clients[f"client{k}"] = SimpleNamespace(images=x, masks=(x[:, 0] > 0.5).long())
    return clients


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    return UNet(1, 2, 2, 1, seeded()).to(dtype)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    generator = seeded(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3)
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return model.eval()


def experts(count: int = 3) -> list[nn.Module]:
    return [randomise(UNet(1, 2, width=4, depth=2), k).double() for k in range(count)]


def build(models: list | None = None, **settings) -> router.RoutedNetwork:
    return router.build_routed(models or experts(), router.RoutingSettings(**settings), seeded())


def images(count: int = 4, size: int = 12, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=seeded(seed), dtype=torch.float64)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[e], two[e]) for e in one)


def close(one: torch.Tensor, two: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(one.double(), two.double(), rtol=0, atol=tolerance)


def near(one: dict, two: dict) -> bool:
    floats = [e for e in one if one[e].is_floating_point()]
    return one.keys() == two.keys() and all(close(one[e], two[e]) for e in floats)


def same_round(one: iopfl.Round, two: iopfl.Round) -> bool:
    return (one.number == two.number and one.losses == two.losses and list(one.own) == list(two.own)
            and same(one.global_state, two.global_state)
            and all(same(one.own[name], two.own[name]) for name in one.own))


# ---- models
def test_unet():
    model = randomise(UNet(1, 2, width=4, depth=2), 0)
    kinds = [type(module) for module in model.modules()]
    assert list(map(kinds.count, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d))) == [11, 2, 10]
    x = torch.randn(1, 1, 6, 7)  # padded to 8 × 8 by its edges
    assert torch.allclose(model(x), model(F.pad(x, (0, 1, 0, 2), mode="replicate"))[..., :6, :7])
    for shape in (2, 3, 8, 8), (1, 8, 8):
        with pytest.raises(ValueError, match="images .N, 1, H, W., got .*8, 8.$"):
            tiny()(torch.zeros(shape))
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        UNet(1, 2, 4, 0)
    start = tiny().state_dict()  # from the generator alone
    torch.manual_seed(2)
    assert same(start, tiny().state_dict())
    assert not same(start, UNet(1, 2, 2, 1, seeded(5)).state_dict())


# ---- federation (M1 to M3)
def test_aggregate_and_update_personal_by_hand():
    states = [{"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)},
              {"weight": torch.tensor([5.0, 6.0]), "steps": torch.tensor(7)}]
    before = copy.deepcopy(states)
    for order in (1, -1):
        result = iopfl.aggregate(states[::order], [1, 3][::order])
        assert same(result, {"weight": torch.tensor([4.0, 5.0]), "steps": torch.tensor(7)})
    assert all(map(same, states, before))  # they stay as they were
    good = {"a": torch.zeros(2), "b": torch.zeros(1)}
    for changes, entry in (({"b": torch.zeros(2)}, "b"), ({"a": torch.zeros(2).double()}, "a"),
                           ({"c": torch.zeros(1)}, "c"), ({"a": torch.tensor([0, math.nan])}, "a"),
                           ({"b": torch.tensor([-math.inf])}, "b")):
        with pytest.raises(ValueError, match=f"(?s)1.*'{entry}'"):
            iopfl.aggregate([good, good | changes], [1, 1])
    for weights in ([1], [1, 1, 1], [0, 0], [-1, 2], [1, math.nan], [1, math.inf], []):
        count = 2 if weights else 0
        with pytest.raises(ValueError, match=f"aggregate: {count} states with the weights"):
            iopfl.aggregate([good] * count, weights)
    # In bfloat16 1 + 1/256 is 1, so that sums would come to rest.
    states = [{"a": torch.tensor([v]).bfloat16()} for v in [1.0, 1.0] + [3.0] * 510]
    result = iopfl.aggregate(states, [510, 510] + [1] * 510)["a"]
    assert result.dtype == torch.bfloat16
    assert result == torch.tensor((1020 + 3 * 510) / 1530).bfloat16()  # 5/3
    loss = iopfl.soft_dice_loss(torch.ones(1, 2, 3, 3).bfloat16(), torch.zeros(1, 3, 3))
    assert loss.dtype == torch.float32
    local, before = ({"a": torch.tensor([v]), "n": torch.tensor(n)} for v, n in ((1., 4), (3., 9)))
    expected = {"a": torch.tensor([0.25 * 3 + 0.75 * 1]), "n": torch.tensor(4)}
    assert same(iopfl.update_personal(before, local, 0.25), expected)
    assert same(iopfl.update_personal(None, local, 0.25), local)
    for alpha in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            iopfl.update_personal(before, local, alpha)


def train_slowly(state, client, draw, mu, anchor):
    model = UNet(1, 2, 2, 1).double().train()
    model.load_state_dict(state)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
    indices = torch.randperm(len(client.images), generator=iopfl.seeded(*draw)).numpy()
    for batch in np.array_split(indices, math.ceil(len(indices) / 3)):
        probabilities, loss = model(client.images[batch]).softmax(1), 1.0
        for c in range(2):
            p, t = probabilities[:, c], (client.masks[batch] == c).double()
            loss = loss - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5) / 2
        for name, value in model.named_parameters():
            loss = loss + mu / 2 * ((value - anchor[name]) ** 2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return copy.deepcopy(model.state_dict())


def slow_federation(start, clients, presents, method, seed):
    """All methods inside once more, by loops: g^t, own models and w^t after each round."""
    stays = {"none": set(), "all": set(start),
             "batchnorm": {e for e in start if e.split(".")[2:3] in (["1"], ["4"])},
             "head": {"head.weight", "head.bias"}}[method.stays]
    g, kept, own, history = start, dict.fromkeys(clients, start), {}, []
    for number, present in enumerate(presents, 1):
        w, second, total = {}, {}, sum(len(clients[name].images) for name in present)
        for name in present:
            client, draw = clients[name], (seed, number, name)
            begin = {e: kept[name][e] if e in stays else g[e] for e in start}
            w[name] = train_slowly(begin, client, draw, method.proximal, begin)
            if method.own == "second":
                p = own.get(name, start)
                second[name] = train_slowly(p, client, draw, method.own_proximal, g)
        kept = kept | w
        g = {e: sum(len(clients[n].images) / total * w[n][e] for n in present) for e in start}
        for name in present:
            shared = {e: w[name][e] if e in stays else g[e] for e in start}
            new = {"local": w[name], "second": second.get(name), "shared": shared}[method.own]
            p, alpha = own.get(name, new), method.alpha
            own[name] = {e: alpha * p[e] + (1 - alpha) * new[e] if new[e].is_floating_point()
                         else new[e] for e in start}
        history.append((g, dict(own), w))
    return history


@pytest.mark.parametrize("name, share", [*product(ALL_METHODS, [1.0]), ("iopfl", 0.5),
                                         ("ditto", 0.5), ("fedbn", 0.5), ("global-alpha", 0.01)])
def test_methods_inside_by_hand(name, share, tmp_path):
    """Each round, who takes part, M3; going on after any of them; and no `Round` changes later."""
    clients, method, model = toy_clients(4, torch.float64), ALL_METHODS[name], tiny(torch.float64)
    if name == "fedprox":
        method = dataclasses.replace(method, proximal=0.7)  # so that it shows
    start, T, alpha, fast, copies = iopfl.snapshot(model), 3, method.alpha, [], []
    options = dict(method=method, seed=2, lr=1e-2, batch_size=3, participation=share)
    for last in iopfl.federate(model, clients, T, **options):
        fast.append(last)
        copies.append(copy.deepcopy(last))
    presents = [list(last.losses) for last in fast]
    slow = slow_federation(start, clients, presents, method, 2)
    assert [last.number for last in fast] == [1, 2, 3]
    for last, present, (g, own, _) in zip(fast, presents, slow):
        assert present == [name for name in clients if name in present]
        assert len(present) == {1.0: 4, 0.5: 2, 0.01: 1}[share]
        assert near(last.global_state, g) and last.own.keys() == own.keys()
        assert all(near(last.own[client], own[client]) for client in own)
    states = {id(s): s for r in fast for s in (r.global_state, *r.own.values())}
    pointers = [v.data_ptr() for s in (*states.values(), model.state_dict()) for v in s.values()]
    assert len(set(pointers)) == len(pointers)  # no two states share memory
    for after in fast:
        torch.save(vars(after), tmp_path / "last.pt")
        read = iopfl.Round(**torch.load(tmp_path / "last.pt", weights_only=True))
        more = list(iopfl.federate(tiny(torch.float64), clients, T, after=read, **options))
        assert len(more) == T - after.number and all(map(same_round, more, fast[after.number:]))
    more = iopfl.federate(tiny(torch.float64), clients, T, after=fast[1], **options)
    assert same_round(*more, fast[2])
    assert all(map(same_round, fast, copies))
    if share < 1:
        assert len(set(map(tuple, presents))) > 1
        return
    g = [start, *(g for g, *_ in slow)]
    for client in clients if method.own == "local" else ():  # M3: global and local updates summed
        for e, expected in start.items():
            for s in range(1, T):
                expected = expected + (1 - alpha ** (T - s)) * (g[s][e] - g[s - 1][e])
            for t in range(1, T + 1):
                c = alpha ** (T - 1) if t == 1 else (1 - alpha) * alpha ** (T - t)
                expected = expected + c * (slow[t - 1][2][client][e] - g[t - 1][e])
            assert not start[e].is_floating_point() or close(last.own[client][e], expected)


def work(folder: Path, rank: int = 0, count: int = 1) -> None:
    torch.set_num_threads(1)
    if count > 1:
        store = torch.distributed.FileStore(str(folder / "store"), count)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    results = []
    for name, share in (("iopfl", 1.0), ("ditto", 0.5), ("fedbn", 0.5), ("local", 1.0)):
        method = iopfl.METHODS[name]
        *_, last = iopfl.federate(tiny(), toy_clients(4), 2, method, participation=share)
        results.append(vars(last))
    torch.save(results, folder / f"{count}-{rank}.pt")


def test_processes_share_a_federation(tmp_path):
    """The rounds of three processes are those of one, bit for bit, in each of them."""
    work(tmp_path)
    forks = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if forks else "spawn")  # a fork imports nothing
    processes = [context.Process(target=work, args=(tmp_path, rank, 3), daemon=True)
                 for rank in range(3)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(120)
        assert process.exitcode == 0
        alone, found = (torch.load(tmp_path / file) for file in ("1-0.pt", f"3-{rank}.pt"))
        for one, two in zip(alone, found, strict=True):
            assert same_round(iopfl.Round(**one), iopfl.Round(**two))


def test_what_stays_is_found_by_type_and_what_cannot_be_is_refused():
    """Whatever the layers are called: BatchNorm without affine too, the last layer as the head."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.ReLU(),
                          nn.Conv2d(2, 2, 1), nn.ReLU())
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert iopfl.staying_entries(model, "batchnorm") == statistics
    assert iopfl.staying_entries(model, "head") == {"3.weight", "3.bias"}
    with pytest.raises(ValueError, match="own must be 'shared' and alpha 0"):
        next(iopfl.federate(tiny(), toy_clients(2), 1, iopfl.Method(stays="head", own="local")))
    for name, value in (("fedavg", math.nan), ("local", math.inf), ("fedbn", math.nan),
                        ("ditto", math.inf)):  # the own model alone is bad but for fedavg
        clients = toy_clients(3)
        rounds = iopfl.federate(tiny(), clients, 3, iopfl.METHODS[name])
        own = next(rounds).own["client1"]
        (clients["client1"].images if name == "fedavg" else own["encoder.0.1.weight"])[1] = value
        with pytest.raises(ValueError, match="client client1 in round 2: '.*' is not finite"):
            next(rounds)
    for settings in (router.AUTHORS, iopfl.METHODS["iopfl"]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.lr = 1


# ---- evaluation (M9)
def box(shape, *ranges):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


A, B = box((16, 16), (4, 10), (4, 10)), box((16, 16), (5, 13), (4, 10))


@pytest.mark.parametrize("prediction, target, spacing, expected", [
    (A, B, (1, 1), (0.71429, 3, 0.90909)), (A, B, (2, 0.5), (0.71429, 6, 1.5)),
    (box((16, 16), (2, 3), (2, 3)), A, (1, 1), (0, 9.25354, 6.50910)),
    (box((16, 16), (0, 6), (0, 6)), A, (1, 1), (0.11111, 5.03284, 3.09237)),
    (box((6, 16, 16), (1, 5), (4, 10), (4, 10)), box((6, 16, 16), (2, 6), (5, 13), (4, 10)),
     (3, 1, 1), (0.53571, 3.60555, 1.63686)),
    (~A & A, A, (3, 4), (0, 80, 80)),  # one empty: the diagonal of 48 × 64
    (~A & A, ~A & A, (1, 1), (1, math.nan, math.nan)), (A, A, (1, 1), (1, 0, 0))])
def test_metrics(prediction, target, spacing, expected):
    for one, two in ((prediction, target), (target, prediction)):
        found = iopfl.dice(one, two), *iopfl.hd95_and_assd(one, two, spacing)
        assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)
    for wrong in ((one[:4], two, spacing), (one, two, (1, *spacing))):
        with pytest.raises(ValueError, match="masks of"):
            iopfl.hd95_and_assd(*wrong)


@pytest.mark.parametrize("case", range(5))
def test_distances_against_brute_force(case):
    """Random blobs and specks, far outliers among them, in volumes and an image."""
    rng, axes = np.random.default_rng(case), 2 if case == 4 else 3
    masks, surfaces, shape, spacing = [], [], (12, 40, 40)[:axes], (3.0, 0.6, 1.1)[:axes]
    steps = np.concatenate([np.eye(axes), -np.eye(axes)]).astype(int)
    for n in range(2):
        mask = np.zeros(shape, bool)
        low = rng.integers(0, 6 if case % 2 else 28, axes) % (8, 40, 40)[:axes]
        mask[tuple(slice(v, v + 9) for v in low)] = True
        mask &= rng.random(mask.shape) < 0.8
        mask[(11, 39 * n, 39)[:axes]] = mask[(0, 39, 0)[:axes]] = True  # outliers
        masks.append(mask)
        padded = np.pad(mask, 1)
        surfaces.append(np.array([(p - 1) * spacing for p in np.argwhere(padded)
                                  if not all(padded[tuple(p + step)] for step in steps)]))
    distances = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=2)
    to_b, to_a = distances.min(axis=1), distances.min(axis=0)
    expected = (max(np.percentile(to_b, 95), np.percentile(to_a, 95)),
                np.concatenate([to_b, to_a]).mean())
    assert iopfl.hd95_and_assd(*masks, spacing) == pytest.approx(expected, abs=1e-10)


def test_large_surfaces_evaluate_and_predict():
    a = ((np.indices((110, 110, 110)) - 55.0) ** 2).sum(axis=0) < 48 ** 2
    b = np.roll(a, 5, axis=1)
    b[5, 5, 5] = True
    assert len(iopfl.surface_points(a, (1, 1, 1))) > 23000
    start = time.process_time()
    hd95, _ = iopfl.hd95_and_assd(a, b, (1, 1, 1))
    assert time.process_time() - start < 4 and 4 < hd95 <= 5
    target = torch.zeros(3, 4, 4, dtype=torch.long)
    target[0, :2, :2], target[0, 0, 0], target[1, 0, 0] = 1, 2, 1
    prediction = target.clone()
    prediction[1] = 0

    def rows(found=prediction, cases="abc", spacing=(1, 1), truth=target, **options):
        structures = {"disc": {1, 2}, "cup": (2,)}
        return iopfl.evaluate(found, truth, list(cases), structures, spacing, **options)

    disc, cup = rows()
    assert (disc["structure"], disc["cases"], disc["distance_cases"]) == ("disc", 3, 2)
    assert disc["dice"] == pytest.approx((1 + 0 + 1) / 3)
    assert disc["hd95"] == disc["assd"] == pytest.approx((0 + 32**0.5) / 2)
    assert cup["dice"] == 1 and cup["distance_cases"] == 1
    disc, _ = rows(spacing={"a": (1, 1), "b": (3, 4), "c": (1, 1)})
    assert disc["hd95"] == pytest.approx(20 / 2)
    disc, _ = rows(cases="vvw", spacing=(3, 1, 1))
    assert disc["cases"] == 2 and disc["dice"] == pytest.approx((8 / 9 + 1) / 2)
    assert disc["distance_cases"] == 1 and disc["assd"] == pytest.approx(3 / 9)
    empty, _ = rows(target * 0, truth=target * 0)
    assert empty["hd95"] is None and empty["dice"] == 1
    off, _ = rows(distances=False)
    assert off["assd"] is None and off["dice"] == pytest.approx(2 / 3)
    model, x = tiny().train(), images(5).float()
    assert torch.equal(iopfl.predict(model, x, 2), model.eval()(x).argmax(dim=1))
    for scale in (math.nan, math.inf):
        model.head.bias.data[0] = scale
        with pytest.raises(ValueError, match="not finite"):
            iopfl.predict(model, x)
    with pytest.raises(ValueError, match="one channel"):
        iopfl.predict(UNet(1, 1, 2, 1), x)


# ---- routed layers (M4, M5)
CONVOLUTIONS = [
    (nn.Conv2d, (4, 6, 3), dict(padding=1, bias=False)),
    (nn.Conv2d, (4, 6, (3, 2)), dict(stride=(2, 3), padding=(1, 2), dilation=2)),
    (nn.Conv2d, (4, 4, 3), dict(padding="same", groups=4, padding_mode="reflect")),
    (nn.Conv2d, (4, 2, 3), dict(padding=(2, 1), padding_mode="circular")),
    (nn.Conv2d, (4, 2, 4), dict(padding="same", bias=False)),
    (nn.ConvTranspose2d, (4, 6, 2), dict(stride=2)),
    (nn.ConvTranspose2d, (4, 6, 3), dict(stride=(3, 2), padding=1, output_padding=(2, 1), groups=2,
                                         dilation=2, bias=False))]


@pytest.mark.parametrize("softmax, size", [(True, (7, 9)), (False, (7, 9)), (True, (130, 127))])
@pytest.mark.parametrize("kind, sizes, options", CONVOLUTIONS)
def test_routed_convolution_equals_a_loop(monkeypatch, kind, sizes, options, softmax, size):
    """Values, and gradients of input and router, against torch's own layer sample by sample."""
    torch.manual_seed(0)
    name, calls = "conv2d" if kind is nn.Conv2d else "conv_transpose2d", []
    real = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *a, **k: calls.append(1) or real(*a, **k))
    convs = [kind(*sizes, **options).double() for _ in range(3)]
    routed = build(convs, softmax=softmax)  # a layer alone is a network too
    one = routed.parts(router.Router)[0]
    x = torch.randn(5, 4, *size, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    fast, slow = routed(x), []
    assert len(calls) == (5 if size[0] > 100 else 1)  # a CPU convolves large images one by one
    for sample in x:
        scores = one.fc2(one.fc1(sample.mean(dim=(1, 2))))
        r = scores.softmax(0) if softmax else torch.sigmoid(scores)
        mixed = {name: sum(w * c.get_parameter(name).detach() for w, c in zip(r, convs))
                 for name, _ in convs[0].named_parameters()}
        slow.append(torch.func.functional_call(convs[0], mixed, (sample[None],)))
    slow = torch.cat(slow)
    assert close(fast, slow, 1e-12)
    probe = torch.randn(fast.shape, generator=seeded(2), dtype=torch.float64)
    wanted = [x, *one.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), wanted) for y in (fast, slow))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11) and a.abs().max() > 0


class Foreign(nn.Module):
    """Not ours: residual, strided, grouped, dilated, one convolution and one norm used twice."""
    def __init__(self, affine, tracked):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6, 1e-3, 0.1, affine, tracked)
        self.twice = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, bias=False)
        self.register_module("nothing", None)
        up = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1)
        self.branches = nn.ModuleDict({"up": up})
        self.act = nn.Sequential(nn.InstanceNorm2d(6), nn.GELU())  # without parameters
        self.again, self.drop = self.norm, nn.Dropout(0.5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.twice(self.act(self.norm(x)))
        x = x + self.twice(self.act(self.other(x)))
        return self.branches["up"](self.drop(self.again(x)))


@pytest.mark.parametrize("norm", [None, *product((True, False), repeat=2)])
def test_one_hot_routing_is_that_expert_and_uniform_routing_the_average(norm):
    models = experts() if norm is None else [randomise(Foreign(*norm), k).double()
                                             for k in range(3)]
    before, routed = copy.deepcopy([m.state_dict() for m in models]), build(models, passes=1)
    x = torch.randn(6, 1 if norm is None else 2, 12, 16, generator=seeded()).double()
    for model, weights in zip(models, torch.eye(3)):
        router.route_alike(routed, weights)
        assert close(routed(x), model(x))
    state = {e: sum(m.state_dict()[e] for m in models) / 3 for e in before[0]}
    average = iopfl.with_state(models[0], state)
    router.route_alike(routed, torch.full((3,), 1 / 3).double())
    assert close(routed(x), average(x))
    convs = [m for m in models[0].modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(routed.parts(router.Router)) == len(convs)
    router.fit_to_site(routed, models, x)  # a foreign network is adapted too
    p = router.adapt(routed, x, generator=seeded())
    assert p.shape == (6, 2 if norm is None else 3, 12, 16) and close(p.sum(1), torch.ones(()))
    assert all(same(m.state_dict(), b) for m, b in zip(models, before))
    assert torch.equal(router.predict(routed, x), p)  # all dropout is off


def test_batchnorm_is_mixed_by_normalised_weights():
    models = [nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double() for _ in range(4)]
    models = [randomise(model, seed) for seed, model in enumerate(models)]
    x = torch.randn(3, 2, 5, 5, generator=seeded(), dtype=torch.float64)
    for mixed, batch, by_image in (1, 0, True), (0, 0, True), (1, 1, True), (0, 1, False):
        routed = build(models, softmax=False, mix_batchnorm=bool(mixed),
                       batch_statistics=bool(batch), per_sample=by_image)
        y, (_, weights) = routed(x), routed.routing[0]
        assert torch.equal(weights, weights[:1].expand(3, -1)) != by_image
        assert (weights.sum(1) - 1).abs().min() > 0.1 and not weights.requires_grad
        z = torch.cat([sum(w * m[0](one[None]) for w, m in zip(r, models))
                       for r, one in zip(weights, x)])
        shares = weights / weights.sum(1, keepdim=True) if mixed else torch.eye(4)[[3, 3, 3]]
        mean, variance, scale, shift = (
            torch.stack([sum(s * getattr(m[1], name) for s, m in zip(share, models))
                         for share in shares])[:, :, None, None]
            for name in ("running_mean", "running_var", "weight", "bias"))
        if batch:
            mean = z.mean((0, 2, 3), keepdim=True)
            variance = z.var((0, 2, 3), correction=0, keepdim=True)
        assert close(y, (z - mean) / (variance + 1e-5).sqrt() * scale + shift)


# ---- objective (M6 to M8)
def test_views_and_objective_by_hand():
    """Eight views; the weighted sum of the terms, by loops; d is a share of the shorter side."""
    x, seen = torch.arange(2 * 3 * 3.0).view(1, 2, 3, 3), set()
    for number in range(8):
        turned = router.view(x, torch.tensor([number]))
        assert torch.equal(router.view(turned, torch.tensor([number]), inverse=True), x)
        seen.add(tuple(turned.flatten().tolist()))
    assert seen == {tuple(torch.rot90(y, k, (2, 3)).flatten().tolist())
                    for y in (x, x.flip(3)) for k in range(4)} and len(seen) == 8
    assert router.draw_views(torch.zeros(99, 1, 4, 4), seeded()).unique().tolist() == [*range(8)]
    assert router.draw_views(torch.zeros(99, 1, 2, 5), seeded()).unique().tolist() == [*range(4)]
    models = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
              for _ in range(3)]
    models = [randomise(model, k).double() for k, model in enumerate(models)]
    routed = build(models, entropy=0.3, consistency=0.7, shape=0.2, radius=0.1, noise=0.4)
    x, shape, d = torch.randn(9, 1, 24, 40, generator=seeded()).double(), [], 2
    generator = seeded(5)
    views = router.draw_views(x, generator)
    noisy = x + 0.4 * torch.randn(x.shape, generator=generator)
    p, q = routed(x).softmax(dim=1), routed(router.view(noisy, views)).softmax(dim=1)
    back, foreground = router.view(q, views, inverse=True), 1 - p[:, 0].detach().numpy()
    for r, c in np.ndindex(24, 40):
        window = foreground[:, max(r - d, 0):r + d + 1, max(c - d, 0):c + d + 1]
        shape.append(np.ptp(window, axis=(1, 2)).mean())
    expected = (0.3 * -(p * p.log() / math.log(3)).sum(1).mean() + 0.7 * ((p - back)**2).mean()
                + 0.2 * np.mean(shape))
    loss, probabilities = router.objective(routed, x, seeded(5))
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.equal(probabilities, p) and not probabilities.requires_grad
    certain = torch.eye(3)[[1]].view(1, 3, 1, 1).requires_grad_()
    router.entropy_loss(certain).backward()
    assert router.entropy_loss(certain) == 0 and certain.grad.isfinite().all()


# ---- adaptation
@pytest.mark.parametrize("settings, fitted, online",
                         [*product((OURS, AUTHORS), (False, True), (False, True))])
def test_adapt_moves_routers_and_batchnorm_affine_and_nothing_else(settings, fitted, online):
    models, x = experts(), images(11, 16)  # the last batch is one image
    x[5:] = 50 * x[5:] - 200  # a changing stream
    before, given = copy.deepcopy([m.state_dict() for m in models]), [m.train() for m in models]
    if online:  # it makes no difference whether models are compiled or in training mode
        given = [torch.compile(model) for model in models]
    names, routed = [[*dict(m.named_modules())] for m in given], build(given, **settings)
    if fitted:
        router.fit_to_site(routed, given, x, online=online)
        share = router.site_share(models, router.divergence(models[-1], x))
        for norm in routed.parts(router.RoutedBatchNorm2d):
            assert norm.site_share.item() == pytest.approx(share) and 0 < share <= 1
            assert norm.site_images == (0 if online else 11)
    start, random = copy.deepcopy(routed.state_dict()), torch.get_rng_state()
    for refused in (x / (torch.arange(11) != 7).view(-1, 1, 1, 1), x * math.nan, x[:0]):
        with pytest.raises(ValueError, match="no images, or values that are not finite"):
            router.adapt(routed, refused, generator=seeded(), online=online)
    assert same(routed.state_dict(), start)
    with torch.no_grad():  # as callers do
        probabilities = router.adapt(routed, x, generator=seeded(), online=online)
    assert probabilities.shape == (11, 2, 16, 16) and probabilities.isfinite().all()
    after = routed.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    moved = {e for e in after if not torch.equal(after[e], start[e])}
    adaptable = {name for name, value in routed.named_parameters() if value.requires_grad}
    assert moved >= adaptable and len(adaptable) == 4 * 13 + 2 * 10
    assert all(".site_" in e for e in moved - adaptable)
    assert bool(moved - adaptable) == (online and fitted)
    assert all(same(m.state_dict(), b) for m, b in zip(models, before))
    assert names == [[*dict(m.named_modules())] for m in given]
    assert all(module.training for model in models for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())  # all randomness came from the generator
    assert online or torch.equal(probabilities, router.predict(routed, x))
    routed.reset()
    assert same(routed.state_dict(), start)
    again = router.adapt(routed, x, generator=seeded(), online=online)
    assert torch.equal(again, probabilities)


def test_online_predicts_each_batch_after_its_own_step_and_goes_on():
    """Statistics, optimiser and generator go on where they were."""
    x, results, generator = images(8), [], seeded()
    for parts, drawn in (([x], seeded()), ([x[:4], x[4:]], generator)):
        models = experts()
        routed = build(models, batch_size=2, lr=1e-2)
        router.fit_to_site(routed, models, x[:2], online=True)
        found = [router.adapt(routed, part, generator=drawn, online=True) for part in parts]
        results.append(torch.cat(found))
        assert all(norm.site_images == 8 for norm in routed.parts(router.RoutedBatchNorm2d))
        assert torch.equal(results[-1][6:], router.predict(routed, x[6:]))
    assert torch.equal(*results)


def test_dropout_keeps_the_mean_and_is_on_while_adapting(monkeypatch):
    one = router.Router(3, 2, router.RoutingSettings(softmax=False, dropout=0.5), seeded()).double()
    x = torch.randn(1, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    one.train().generator = seeded(1)
    drawn = one(x.expand(20000, -1, -1, -1)).logit()
    assert close(drawn.mean(dim=0), one.eval()(x)[0].logit(), 0.01)
    assert drawn.std(dim=0).min() > 0.05
    seen = {"objective": [], "pull_back": []}
    for name, calls in seen.items():
        def spy(routed, *more, calls=calls, real=getattr(router, name)):
            result = real(routed, *more)
            calls.append((routed.parts(router.Router)[0].training, more[0], (result or more)[1]))
            return result
        monkeypatch.setattr(router, name, spy)
    router.adapt(build(), images(6), generator=seeded())
    assert len(seen["objective"]) == len(seen["pull_back"]) == 6
    for (on, *given), (off, *leashed) in zip(*seen.values()):
        assert on and not off  # the leash compares with the start without dropout
        assert all(map(torch.equal, given, leashed))


def test_the_published_method_runs_no_line_of_ours(monkeypatch):
    source = Path(router.__file__).read_text()
    ours = [line.split("(")[0][4:] for line in source.partition("part 2: ours\n")[2].split("\n")
            if line.startswith("def ")]
    assert {"fit_to_site", "measure_site", "pull_back", "site_share", "divergence"} <= {*ours}
    for name in ours:
        monkeypatch.setattr(router, name, None)
    for online in (False, True):
        router.adapt(build(**AUTHORS), images(6), generator=seeded(), online=online)
    with pytest.raises(TypeError):  # ours, with the leash, does
        router.adapt(build(), images(6), generator=seeded())


# ---- ours: the start, the site's statistics, the leash
def kl(mean, variance, own_mean, own_variance):  # of two Gaussians, from the textbook
    return (math.log((own_variance / variance) ** 0.5) - 0.5
            + (variance + (mean - own_mean) ** 2) / (2 * own_variance))


@pytest.mark.parametrize("D, options, weights", [
    ([3.0, 1.0, 3.0, 1.0], {}, [1, math.e**2, 1, 3 * math.e**2]),  # one standard deviation is 1
    ([3.0, 1.0, 3.0, 1.0], {"global_prior": None}, [1, math.e**2, 1, math.e**2]),
    ([0.02, 0.0], {"global_prior": 0.3}, [0.7, 0.3 * math.exp(0.4)]),  # floor: 0.05
    ([0.7], {}, [1]), ([3.0, 1.0], {"start": "uniform"}, [1, 1]),
    ([3.0, 1.0], {"start": "random"}, None)])
def test_start_by_hand(monkeypatch, D, options, weights):
    models, x, values = experts(len(D)), images(5), iter(D)
    routed, untouched = build(models), build(models)
    monkeypatch.setattr(router, "divergence", lambda *_: torch.tensor(next(values)))
    router.fit_to_site(routed, models, x, share=0.0, **options)
    routed(x), untouched(x)
    assert len(routed.routing) == 13
    for (_, r), (_, as_built) in zip(routed.routing, untouched.routing):
        expected = torch.tensor(weights) / sum(weights) if weights else as_built
        assert close(r, expected.double().expand(5, -1), 2e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_divergence_and_site_share_by_hand(shift):
    """The mean over channels and layers; a layer used twice counts over all its uses."""
    x, expected = torch.randn(40, 2, 5, 5, generator=seeded()) * 3 + shift, []
    a, b = (randomise(nn.BatchNorm2d(2), seed) for seed in (3, 4))
    a.running_mean += shift
    for norm, seen in (a, torch.cat([x, b(a(x))]).double()), (b, a(x).double()):
        values = (seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0),
                  norm.running_mean, norm.running_var)
        expected += [kl(*(v[c].item() for v in values)) for c in range(2)]
    found = router.divergence(nn.Sequential(a, b, a), x).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-3)
    assert router.divergence(nn.Conv2d(2, 1, 1), x).item() == 0
    models = [nn.Sequential(nn.BatchNorm2d(1, eps=0.0), nn.BatchNorm2d(1, eps=0.0))
              for _ in range(3)]
    given = [[(0.5, 2.0), (1.0, 1.0)], [(0.0, 0.5), (-1.0, 3.0)], [(0.2, 1.0), (0.0, 2.0)]]
    for model, layers in zip(models, given):
        for norm, (mean, variance) in zip(model, layers):
            norm.running_mean.fill_(mean), norm.running_var.fill_(variance)
    u = np.mean([kl(*given[k][layer], *given[2][layer]) for k in range(2) for layer in range(2)])
    for factor, expected in ((7, 0.5), (14, 16 / 17), (3.5, 1 / 17), (0, 0.0), (1e4, 1.0)):
        found = router.site_share(models, torch.tensor(factor * u).float())
        assert found == pytest.approx(expected, abs=1e-5)
    plain, D = [nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))] * 2, torch.tensor(1.0)
    assert router.site_share(models[:1], D) == router.site_share(plain, D) == 0


@pytest.mark.parametrize("share, shift", [*product((0.0, 0.3, 1.0), (0.0, 1e4))])
def test_site_statistics_by_hand(share, shift):
    """Counted over batches as over all images; no image depends on its neighbours."""
    model = randomise(nn.Sequential(nn.BatchNorm2d(3)), 0)
    scale = torch.tensor([1.0, 3.0, 0.2])[:, None, None]
    x, norm = torch.randn(6, 3, 5, 5, generator=seeded()) * scale + shift, model[0]
    mean, variance = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    routed = router.build_routed([model])
    for sizes in ((6,), (2, 4), (1, 1, 3, 1)):
        router.fit_to_site(routed, [model], x[:1], share=share, online=True)
        for part in x.split(sizes):
            router.measure_site(routed, part)
        part = routed.parts(router.RoutedBatchNorm2d)[0]
        assert part.site_images == 6 and close(part.site_mean, mean, 0.02 if shift else 1e-5)
        assert torch.allclose(part.site_variance.double(), variance, rtol=1e-3)
    router.fit_to_site(routed, [model], torch.arange(70.).view(-1, 1, 1, 1) * torch.ones(3, 2, 2))
    spread = torch.linspace(0, 69, 64).round().mean()  # 64 images of all patients
    assert part.site_images == 64 and close(part.site_mean, spread.expand(3), 1e-4)
    router.fit_to_site(routed, [model], x, share=share)
    mean = (1 - share) * norm.running_mean + share * mean
    variance = (1 - share) * norm.running_var + share * variance
    expected = F.batch_norm(x.double(), mean, variance, norm.weight.double(), norm.bias.double())
    assert torch.allclose(routed(x).double(), expected, rtol=1e-3, atol=0.02 if shift else 1e-5)
    assert torch.equal(routed(x[:1]), routed(x)[:1])


@pytest.mark.parametrize("change, back", [
    ((0.95, 1), 1), ((1.05, 1), 1), ((1, 1.05), 1), ((1, 0.95), 1), ((1.001, 1), 0)])
def test_leash_pulls_half_of_the_way_back(change, back):
    """When the area of either class has changed by more than the leash, in either direction."""
    models, x = [randomise(UNet(1, 3, 2, 1), k).double() for k in range(3)], images(2, 8)
    routed = build(models)
    router.fit_to_site(routed, models, x)
    at_start, start = router.predict(routed, x), copy.deepcopy(routed.state_dict())
    moves = {name for name, value in routed.named_parameters() if value.requires_grad}
    for name in moves:
        routed.get_parameter(name).data += 0.1
    router.pull_back(routed, x, at_start * torch.tensor([1, *change])[:, None, None])
    for name, value in routed.state_dict().items():
        moved = (0.05 if back else 0.1) if name in moves else 0
        assert close(value, start[name] + moved, 1e-12), name


# ---- what cannot be routed, and precision
COMPUTED = [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
            lambda conv: prune.random_unstructured(conv, "weight", 0.5)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change, message", [
    (lambda conv, sizes=[3, 5]: nn.Conv2d(1, 2, sizes.pop()), "differ in '0'"),
    (lambda conv: nn.Linear(3, 3), "cannot route '0', Linear"),
    (lambda conv: nn.GroupNorm(1, 2), "cannot route '0', GroupNorm"),
    (lambda conv: nn.PReLU(), "cannot route '0', PReLU"),
    (lambda conv: conv.half(), "'0'.*half precision"),
    (lambda conv: conv.bfloat16(), "'0'.*half precision"),
    (lambda conv: setattr(conv.bias, "data", conv.bias.data / 0), "'0'.*finite"),
    (lambda conv: conv.register_forward_hook(print) and None, "'0'.*hooks"),
    (lambda conv: conv.register_forward_pre_hook(print) and None, "'0'.*hooks"),
    (lambda conv: setattr(conv, "forward", abs), "'0'.*forward of their own"),
    (torch.compile, "'0.*compiled"), *((make, "'0'") for make in COMPUTED),
    *((lambda conv, make=make: (make(conv), conv(torch.randn(1, 1, 8, 8)))[0], "'0'")
      for make in COMPUTED)])
def test_build_routed_refuses(change, message):
    models = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)) for _ in range(2)]
    for model in models:
        made = change(model[0])
        model[0] = model[0] if made is None else made
    with pytest.raises(ValueError, match=message):
        router.build_routed(models)
    models[1][0] = nn.Conv2d(1, 2, 3)
    with pytest.raises(ValueError, match="differ in"):
        router.build_routed([models[1], models[1][:1]])


class Hidden(nn.Sequential):
    """A module in a plain list, or an attribute that differs, which no look at modules shows."""
    def forward(self, x):
        return self.hidden[0](super().forward(x)) * self.scale


def test_fit_to_site_refuses_what_only_a_pass_can_show():
    for hidden, scales in ((nn.Conv2d(2, 2, 1), (1, 1)), (nn.Identity(), (1, 2))):
        models = [Hidden(nn.Conv2d(1, 2, 1)) for _ in scales]
        for k, model in enumerate(models):
            model.hidden, model.scale = [randomise(copy.deepcopy(hidden), k)], scales[k]
        with pytest.raises(ValueError, match="model 0 .* when it is routed"):
            router.fit_to_site(router.build_routed(models), models, images().float())
    with pytest.raises(ValueError, match="'Matched' is not matched"):
        router.fit_to_site(build(), experts(), images(2), start="Matched")


def test_one_output_channel_overflow_and_autocast():
    x = images().float()
    with pytest.raises(ValueError, match="one output channel"):
        router.adapt(router.build_routed([UNet(1, 1, 2, 1)] * 2), x, generator=seeded())
    model = tiny()
    model.decoder[0][4].weight.data[:] = model.decoder[0][4].bias.data[:] = 1e5
    model.head.weight.data[:] = 1e37
    with pytest.raises(ValueError, match="not every probability is finite"):
        router.predict(router.build_routed([model]), x)
    models, x, results = [model.float() for model in experts()], images(5).float(), []
    for enabled in (False, True):
        routed = build(models)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            router.fit_to_site(routed, models, x)
            results.append(router.adapt(routed, x, generator=seeded()))
    assert results[1].dtype == torch.float32 and 0 < (results[0] - results[1]).abs().max() < 0.05
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        router.predict(routed, x)


# ---- data
def write_site(root, name, count, size=32, grey=False, values=(0, 1)):
    """`count` random PNGs with masks of `values` below root/name; the seed comes from the name."""
    rng = np.random.default_rng(list(str(name).encode()))
    for folder in ("images", "masks"):
        (Path(root) / name / folder).mkdir(parents=True)
    for number in range(count):
        shape = (size, size) if grey else (size, size, 3)
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        mask = rng.choice(values, (size, size)).astype(np.uint8)
        Image.fromarray(image).save(Path(root) / name / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(Path(root) / name / "masks" / f"{number:02d}.png")
    return Path(root) / name


def splits_of(site):
    return site.train, site.validation, site.test


def same_bytes(a, b):
    """Whether two sites hold the same images, masks and cases, split by split."""
    same = a.name == b.name and a.spacing == b.spacing
    for s, t in zip(splits_of(a), splits_of(b)):
        same = same and torch.equal(s.images, t.images) and torch.equal(s.masks, t.masks)
        same = same and s.cases == t.cases
    return same


@pytest.mark.parametrize("task, channels, classes", [("prostate", 1, [0, 1]),
                                                     ("fundus", 3, [0, 1, 2])])
def test_simulated_images_and_masks(task, channels, classes):
    loaded = data.simulate_sites(task, 0, size=32, images_per_site=8)
    assert [site.name for site in loaded.sites] == list(data.HOSPITALS[task])
    assert loaded.channels == channels and loaded.classes == len(classes)
    assert loaded.unit == {"prostate": "mm", "fundus": "px"}[task] and loaded.kind == "simulated"
    mm = 150 / 32 if task == "prostate" else 1
    for site in loaded.sites:
        assert [len(split.cases) for split in splits_of(site)] == [5, 1, 2]
        split = site.everything
        assert split.images.shape == (8, channels, 32, 32) and split.images.dtype == torch.float32
        assert split.masks.shape == (8, 32, 32) and split.masks.dtype == torch.uint8
        assert split.cases == [f"{site.name}-{number:03d}" for number in range(8)]
        assert site.spacing == dict.fromkeys(split.cases, (mm, mm))
        assert torch.equal(split.shown(3), split.images[3])
        assert split.to("cpu").images.is_contiguous(memory_format=torch.channels_last)
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
            around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
            assert disc[around].mean() > 0.9


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_simulation_depends_on_its_arguments_alone(task):
    def draw(seed, sites):
        return data.simulate_sites(task, seed, size=24, images_per_site=4, sites=sites)

    six, again, eight, three, other = draw(3, 6), draw(3, 6), draw(3, 8), draw(3, 3), draw(4, 6)
    for site, repeated, extended, changed in zip(six.sites, again.sites, eight.sites, other.sites):
        assert same_bytes(site, repeated) and same_bytes(site, extended)
        assert not torch.equal(site.train.images, changed.train.images)
    assert len(eight.sites) == 8 and len(three.sites) == 3
    assert len({site.train.images.numpy().tobytes() for site in eight.sites}) == 8
    assert six.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_extra_hospitals_lie_in_the_range_of_the_six(task):
    six, nine = data.hospital_table(task), data.hospital_table(task, 9)
    assert list(nine)[:6] == list(six) and all(nine[name] == six[name] for name in six)
    extra = np.array([nine[name] for name in nine if name not in six])
    known = np.array(list(six.values()))
    assert len(np.unique(extra, axis=0)) == 3
    assert (extra >= known.min(axis=0)).all() and (extra <= known.max(axis=0)).all()


# ---- data: folders of images
def test_folder_channels(tmp_path):
    for name in ("a", "b"):
        write_site(tmp_path, name, 4, grey=True)
    loaded = data.load_folder(tmp_path, 32)
    assert (loaded.channels, loaded.classes) == (1, 2) and loaded.kind == "images"
    assert loaded.sites[0].everything.images.shape == (4, 1, 32, 32)
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "b" / "images" / "02.png")
    loaded = data.load_folder(tmp_path, 32)
    a, b = [site.everything for site in loaded.sites]
    assert loaded.channels == 3 and a.images.shape == b.images.shape == (4, 3, 32, 32)
    assert torch.equal(a.images[:, 0], a.images[:, 2])
    wanted = ((colour - colour.mean()) / colour.std()).transpose(2, 0, 1)
    assert np.allclose(b.images[b.cases.index("images/02.png")].numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("values", [[0, 128, 255], [255, 0, 128]])
def test_mask_values_map_to_their_position(tmp_path, values):
    folder = write_site(tmp_path, "a", 5, values=(0, 128, 255))
    loaded = data.load_folder(tmp_path, 32, values)
    split = loaded.sites[0].everything
    assert loaded.classes == 3 and loaded.mask_values == values
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(np.array(values)[mask.numpy()], stored)


def test_given_and_drawn_splits(tmp_path):
    counts = {"train": 3, "Valid": 1, "test": 2}
    for part, count in counts.items():
        write_site(tmp_path / "a", part, count)
    write_site(tmp_path, "b", 12)
    write_site(tmp_path, "c", 12)
    first, again, other = [data.load_folder(tmp_path, 32, seed=seed).sites for seed in (0, 0, 1)]
    for split, (part, count) in zip(splits_of(first[0]), counts.items()):
        assert split.cases == [f"{part}/images/{number:02d}.png" for number in range(count)]
    cases = [[split.cases for split in splits_of(site)] for site in (*first, other[1])]
    assert [len(part) for part in cases[1]] == [7, 2, 3] and cases[1] != cases[3]
    assert cases[1] != cases[2] and all(map(same_bytes, first, again))
    everything = first[1].everything
    assert everything.cases == sum(cases[1], [])
    assert sorted(everything.cases) == [f"images/{number:02d}.png" for number in range(12)]
    for case, image, mask in zip(everything.cases, everything.images, everything.masks):
        pixels = np.asarray(Image.open(tmp_path / "b" / case), dtype=np.float64).transpose(2, 0, 1)
        assert np.allclose(image.numpy(), (pixels - pixels.mean()) / pixels.std(), atol=1e-4)
        stored = Image.open(tmp_path / "b" / case.replace("images", "masks"))
        assert np.array_equal(mask.numpy(), np.asarray(stored))


def _mask(root, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(root / "a" / "masks" / "01.png")


def _unlink(root, pattern):
    for file in root.glob(pattern):
        file.unlink()


def _cut(file):
    file.write_bytes(file.read_bytes()[:200])


def _constant(root):
    for file in root.glob("*/masks/*"):
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(file)


def _instead(file, make):
    file.unlink()
    make(file)


def _huge_header(file):
    """A sound PNG header of 100,000 × 100,000 pixels; a checksum belongs to it."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


def _floats(file, value):
    """An image or mask of floating point values in the place of a PNG."""
    values = np.zeros((32, 32), np.float32)
    values[3, 4] = value
    Image.fromarray(values).save(file.with_suffix(".tif"))
    file.unlink()


IMAGE, MASK = "a/images/01.png", "a/masks/01.png"
BAD_FOLDERS = {  # what is spoilt in two sound sites, the mask values, parts of the message
    "missing mask": (lambda r: (r / MASK).unlink(), None, [IMAGE, "a/masks", "1 of 5 images"]),
    "missing masks folder": (lambda r: shutil.rmtree(r / "a/masks"), None, ["a/masks"]),
    "no images": (lambda r: _unlink(r, "a/*/*"), None, ["'a'", "at least 3"]),
    "sizes differ": (lambda r: _mask(r, np.eye(20, 24)), None, [MASK, "32×32", "20×24"]),
    "class out of range": (lambda r: _mask(r, 255 * np.eye(32)), None,
                           [MASK, "255", "0, 1 …", "--mask-values 0 1 255"]),
    "unknown grey value": (lambda r: _mask(r, 7 * np.eye(32)), [0, 1],
                           [MASK, "7 is not among --mask-values [0, 1]"]),
    "a grey value twice": (lambda r: None, [0, 1, 1], ["each once", "--mask-values"]),
    "corrupt image": (lambda r: _cut(r / IMAGE), None, [IMAGE, "not a readable image"]),
    "text": (lambda r: (r / IMAGE).write_text("text"), None, [IMAGE, "not a readable image"]),
    "corrupt mask": (lambda r: _cut(r / MASK), None, [MASK, "not a readable image"]),
    "RGB mask": (lambda r: _mask(r, np.eye(32)[:, :, None] * [1, 0, 1]), None,
                 [MASK, "one channel"]),
    "too few images": (lambda r: _unlink(r, "a/*/0[234].png"), None, ["'a'", "at least 3"]),
    "constant masks": (_constant, None, ["1 values up to 0", "expected 2"]),
    "a folder": (lambda r: _instead(r / IMAGE, Path.mkdir), None, [IMAGE, "not a file"]),
    "a loop of links": (lambda r: _instead(r / IMAGE, lambda f: f.symlink_to(f.name)), None,
                        [IMAGE, "not a readable image"]),
    "bomb": (lambda r: Image.new("1", (10_000, 10_000)).save(r / IMAGE), None,
             [IMAGE, "decompression bomb"]),
    "larger bomb": (lambda r: _huge_header(r / IMAGE), None, [IMAGE, "decompression bomb"]),
    "NaN": (lambda r: _floats(r / IMAGE, math.nan), None, ["a/images/01.tif", "not finite"]),
    "a fraction": (lambda r: _floats(r / MASK, 0.5), None, ["a/masks/01.tif", "whole numbers"]),
    "NaN in a mask": (lambda r: _floats(r / MASK, math.nan), None, ["01.tif", "not finite"]),
    "a negative class": (lambda r: _floats(r / MASK, -1), None, ["a/masks/01.tif", "from 0"]),
    "a photograph for a mask": (lambda r: _mask(r, np.arange(1024).reshape(32, 32) % 256), None,
                                ["256 values", "--mask-values"]),
    "unprintable": (lambda r: (r / "a").rename(r / "a\nb"), None, ["'a\\nb'", "rename it"]),
    "two endings": (lambda r: shutil.copy(r / IMAGE, r / "a/images/01.jpg"), None,
                    ["01.jpg", "differ only in their endings"]),
    "a list without its case": (lambda r: (r / "a/train.txt").write_text("77\n"), None,
                                ["train.txt", "no case 77"]),
    "an empty list": (lambda r: (r / "a/val.txt").write_text("\n"), None, ["'a'", "0 in val"]),
    "two splits": (lambda r: write_site(r / "a", "train", 3), None, ["5 in all", "none elsewhere"]),
    "two names": (lambda r: shutil.copytree(r / "a/images", r / "a/image"), None,
                  ["/a", "keep one"]),
    **{name: (lambda r, name=name: (r / "a").rename(r / name), None, [repr(name), "rename it"])
       for name in ("global", "all", "none", "pooled")},
}
if hasattr(os, "mkfifo"):
    BAD_FOLDERS["a pipe"] = (lambda r: _instead(r / IMAGE, os.mkfifo), None, [IMAGE, "not a file"])


@pytest.mark.parametrize("spoil, mask_values, parts", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(tmp_path, spoil, mask_values, parts):
    for name in ("a", "b"):
        write_site(tmp_path, name, 5)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.load_folder(tmp_path, 32, mask_values)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_no_sites(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file.*nowhere"):
        data.load_folder(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.warns(match="left out"), pytest.raises(ValueError, match="no sites.*known layouts"):
        data.load_folder(tmp_path)


def test_given_split_errors(tmp_path):
    for part in ("train", "test"):
        write_site(tmp_path / "a", part, 1)
    with pytest.raises(ValueError, match="site 'a': images: .* 2 in train"):
        data.load_folder(tmp_path, 32)
    shutil.rmtree(tmp_path / "a" / "test")
    with pytest.raises(ValueError, match="1 in test"):
        data.load_folder(tmp_path, 32)


def warned(root, **settings):
    """What is loaded, and the lines of warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = data.load_folder(root, 16, **settings)
    return loaded, [str(warning.message) for warning in caught]


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
    small = np.asarray(truth.resize((16, 16), Image.Resampling.NEAREST))
    for case in ("x.bmp", "y.gif", "a.png"):
        assert np.array_equal(split.masks[split.cases.index(f"Images/{case}")].numpy(), small)


def test_case_lists_beside_images(tmp_path):
    a = write_site(tmp_path, "a", 6)
    (a / "train.txt").write_text("03\n00.png\n")
    (a / "val.txt").write_text("01\n\n")
    (a / "test.txt").write_text("05\n")
    loaded, lines = warned(tmp_path)
    cases = [[Path(case).stem for case in part.cases] for part in splits_of(loaded.sites[0])]
    assert cases == [["03", "00"], ["01"], ["05"]]
    assert len(lines) == 1 and "left out: 2 cases that are in no list, such as" in lines[0]


LEFT_OUT = {
    "masks without images": (lambda r: _unlink(r, "a/images/0[45].png"), "2 masks without"),
    "unknown types": (lambda r: (r / "a/images/notes.xml").write_text("x"), "notes.xml"),
    "nothing": (lambda r: (r / "empty").mkdir(), "empty"),
    "beside": (lambda r: (r / "a/holdout").mkdir(), "a/holdout"),
    "in the root": (lambda r: (r / "9.png").touch(), "9.png"),
    "in a part": (lambda r: (r / "c/train/9.png").touch(), "c/train/9.png"),
    "lists beside a split": (lambda r: (r / "c/train.txt").write_text("00"), "c/train.txt"),
}


@pytest.mark.parametrize("add, part", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_told(tmp_path, add, part):
    write_site(tmp_path, "a", 6)
    for name in ("train", "val", "test"):
        write_site(tmp_path / "c", name, 2)
    assert warned(tmp_path)[1] == []
    add(tmp_path)
    line, = warned(tmp_path)[1]
    assert line.startswith("left out: ") and part in line.replace(os.sep, "/")


def test_fundus_domains(tmp_path):
    rng = np.random.default_rng(0)
    mask = np.full((20, 24), 255, np.uint8)
    mask[4:16, 4:20], mask[8:12, 8:14], mask[4, 4:8] = 128, 0, (191, 192, 64, 63)
    for part, count in (("train", 10), ("test", 3)):
        base = tmp_path / "Domain1" / part / "ROIs"
        (base / "image").mkdir(parents=True)
        (base / "mask").mkdir()
        for number in range(count):
            image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(image).save(base / "image" / f"{number}.png")
            Image.fromarray(mask).save(base / "mask" / f"{number}.png")
    loaded, lines = warned(tmp_path)
    assert not lines and loaded.kind == "fundus" and loaded.classes == 3
    assert loaded.structures == data.STRUCTURES["fundus"] and loaded.channels == 3
    site, = loaded.sites
    assert [len(part.cases) for part in splits_of(site)] == [8, 2, 3]
    assert all(case.startswith("test/") for case in site.test.cases)
    truth = base / "mask" / "0.png"
    read = data.read_truth(truth, [255, 128, 0], "fundus", (1, 20, 24), 3)[0]
    assert read[4, 4:8].tolist() == [1, 0, 1, 2]
    assert (read[0, 0], read[5, 5], read[9, 9]) == (0, 1, 2)
    for values in ([0, 255], [255, 128, 0, 1], [255, 255, 0]):
        with pytest.raises(ValueError, match="three for fundus ROIs"):
            data.load_folder(tmp_path, 16, values)
    assert data.load_folder(tmp_path, 16, [0, 128, 255]).mask_values == [0, 128, 255]


def test_kinds_of_image_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((4, 3)).resize((24, 20))
    palette = smooth.quantize(16)
    palette.save(tmp_path / "p.png")
    Image.fromarray(np.dstack([pixels, pixels[:, :, 0]])).save(tmp_path / "alpha.png")
    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("LA", (4, 6), (100, 7)).save(tmp_path / "la.png")
    for name, wanted, slack in (
            ("p.png", np.asarray(palette.convert("RGB")), 0), ("alpha.png", pixels, 0),
            ("cmyk.jpg", np.asarray(smooth), 8), ("turned.png", np.rot90(pixels, -1), 0),
            ("deep.png", deep[:, :, None], 0), ("la.png", np.full((6, 4, 1), 100), 0)):
        found = data.read_file(tmp_path / name)[0][0]
        assert found.shape == wanted.shape and np.abs(found - wanted).mean() <= slack
    indices = np.random.default_rng(1).integers(0, 3, (20, 24), dtype=np.uint8)
    coloured = Image.fromarray(indices)
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "mask.png")
    Image.fromarray(np.repeat(indices[:, :, None], 3, axis=2)).save(tmp_path / "grey.png")
    Image.fromarray(indices * 90).save(tmp_path / "grey.gif")
    for name, factor in (("mask.png", 1), ("grey.png", 1), ("grey.gif", 90)):
        read = data.read_truth(tmp_path / name, None, "images", (1, 20, 24), 256)[0]
        assert np.array_equal(read, indices.astype(int) * factor)
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="pages.tif: not a readable image .2 pages"):
        data.read_file(tmp_path / "pages.tif")


def test_single_files(tmp_path):
    a = write_site(tmp_path, "a", 3)
    (a / "masks" / "01.png").unlink()
    pairs = data.pairs_of(a / "images", a / "masks", strict=False)
    assert [mask and mask.name for _, mask in pairs] == ["00.png", None, "02.png"]
    assert [mask for _, mask in data.pairs_of(a / "images")] == [None] * 3
    with pytest.raises(FileNotFoundError, match="1 of 3 images without"):
        data.pairs_of(a / "images", a / "masks")
    assert data.read_truth(pairs[0][1], None, "images", (1, 32, 32), 2).shape == (1, 32, 32)
    with pytest.raises(ValueError, match="32×32, classes up to 1; expected 9×9, up to 1"):
        data.read_truth(pairs[0][1], None, "images", (1, 9, 9), 2)
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    grey = pixels[0, :, :, 1]
    seen = data.network_input(Path("x.png"), np.repeat(pixels[..., 1:2], 3, axis=3), 8, 1, "images")
    assert np.allclose(seen[0, 0], (grey - grey.mean()) / grey.std(), atol=1e-5)
    volume = np.random.default_rng(1).random((4, 8, 8, 1)).astype(np.float32)
    single = data.network_input(Path("x.NII.GZ"), volume, 8, 1, "images")
    stacks = data.network_input(Path("x.nii"), volume, 8, 3, "volumes")
    assert single.shape == (4, 1, 8, 8) and stacks.shape == (4, 3, 8, 8)
    assert np.array_equal(stacks[:, 1], single[:, 0]) and np.array_equal(stacks[2, 0], single[1, 0])
    large = np.array([[0, 1e30], [2e30, 1e30]], dtype=np.float32)  # squares overflow float32
    assert data.normalise(large) == pytest.approx(data.normalise(large / 1e30), abs=1e-6)
    with pytest.raises(ValueError, match="x.png: the run was trained on grey"):
        data.network_input(Path("x.png"), pixels, 8, 1, "images")
    for path, values, kind in (("x.nii", volume, "fundus"), ("x.png", pixels, "volumes")):
        with pytest.raises(ValueError, match=f"{path}: the run was trained on"):
            data.network_input(Path(path), values, 8, 3, kind)


# ---- data: volumes
def affine(codes, spacing=(0.5, 0.6, 3.0), tilt=0.0):
    """Axes towards the letters of `codes`, voxels of `spacing` mm, turned by `tilt` about x."""
    columns = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1),
               "I": (0, 0, -1)}
    cos, sin = math.cos(tilt), math.sin(tilt)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    result = np.eye(4)
    result[:3, :3] = turn @ np.array([columns[code] for code in codes]).T * spacing
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
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    for name, count in sites.items():
        for number in range(count):
            distance = np.sqrt((x - rng.uniform(-0.2, 0.2)) ** 2 + y**2 + 0.4 * z**2)
            mask = (distance < 0.55) * (1 + (y > 0)) * (np.abs(z) < 0.95)
            image = 300 * (mask > 0) + rng.normal(400, 40, shape)
            case, ending = f"Case{number:02d}", "_segmentation" if number % 2 else "_Segmentation"
            write_nifti(root / name / f"{case}.nii.gz", image.astype(np.int16), affine("LPS"))
            drawn = root / name / f"{case}{ending}.nii.gz"
            write_nifti(drawn, mask.astype(np.uint8), affine("LPS"))


def test_volumes_load_as_stacks(tmp_path):
    write_volumes(tmp_path, {"ISBI": 4, "UCL": 8})
    for file in (tmp_path / "UCL").glob("Case03*"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    loaded, lines = warned(tmp_path)
    assert [site.name for site in loaded.sites] == ["RUNMC", "UCL"] and loaded.unit == "mm"
    assert loaded.channels == 3 and loaded.structures == {"prostate": (1,)} and not lines
    site = loaded.sites[1]
    split = site.everything
    assert split.images.shape == (40, 3, 16, 16) and split.images.dtype == torch.float16
    assert split.masks.dtype == torch.uint8 and split.masks.max() == 1
    assert sorted(set(split.cases)) == [f"Case{number:02d}" for number in range(8)]
    for start in range(0, 40, 5):
        volume = split.images[start:start + 5, 1].float()
        assert len(set(split.cases[start:start + 5])) == 1
        assert volume.mean().item() == pytest.approx(0, abs=2e-3)
        assert volume.std().item() == pytest.approx(1, abs=2e-2)
        for number in range(5):  # neighbours stay within the volume
            stack = split.images[start + number].float()
            assert torch.equal(stack, volume[[max(number - 1, 0), number, min(number + 1, 4)]])
            assert torch.equal(split.shown(start + number), volume[number:number + 1])
            mask = split.masks[start + number] > 0
            assert mask.any() == (0 < number < 4)
            if mask.any():  # the prostate is the bright part
                assert volume[number][mask].mean() > volume[number][~mask].mean() + 1
    for spacing in site.spacing.values():  # 20 rows and 24 columns have become 16
        assert spacing == pytest.approx((3.0, 0.6 * 20 / 16, 0.5 * 24 / 16), abs=1e-6)
    assert [len(set(part.cases)) for part in splits_of(site)] == [5, 1, 2]
    trimmed = data.load_folder(tmp_path, 16, skip_empty=True).sites[1]
    assert [len(part.masks) for part in splits_of(trimmed)] == [15, 5, 10]
    assert trimmed.train.masks.flatten(1).any(dim=1).all() and len(trimmed.train.cases) == 15


@pytest.mark.parametrize("codes, tilt", [("LPS", 0), ("RAS", 0), ("LAI", 0), ("SPL", 0), ("PSR", 0),
                                         ("RAI", 0.3), ("LPS", -0.4)])
def test_orientation_comes_from_the_header(tmp_path, codes, tilt):
    nibabel = pytest.importorskip("nibabel")
    body = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)  # towards S, P, L
    steps = {"S": 3.0, "P": 0.6, "L": 0.5}
    axes = codes.translate(str.maketrans("IAR", "SPL"))
    stored = body.transpose(["SPL".index(axis) for axis in axes])
    stored = stored[tuple(slice(None, None, -1 if code in "IAR" else 1) for code in codes)]
    matrix = affine(codes, [steps[axis] for axis in axes], tilt)
    write_nifti(tmp_path / "v.NII.GZ", np.ascontiguousarray(stored), matrix)
    values, found = data.read_file(tmp_path / "v.NII.GZ")
    assert np.array_equal(values[..., 0], body)
    assert np.linalg.norm(found[:3, :3], axis=0) == pytest.approx((3.0, 0.6, 0.5), abs=1e-5)
    data.write_volume(tmp_path / "m.nii.gz", body > 0.5, tmp_path / "v.NII.GZ")
    written = nibabel.load(tmp_path / "m.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), stored > 0.5)
    assert np.allclose(written.affine, matrix, atol=1e-5) and written.get_data_dtype() == np.uint8
    assert data.stem(tmp_path / "v.NII.GZ") == "v" and data.is_volume(tmp_path / "v.NII.GZ")


def _break_header(file, place, value):
    raw = bytearray(gzip.decompress(file.read_bytes()))
    raw[place] = value
    file.write_bytes(gzip.compress(bytes(raw)))


def _no_direction(file):
    import nibabel
    header = nibabel.Nifti1Header()
    header.set_data_shape((24, 20, 5))
    header["sform_code"], header["srow_x"][0], header["srow_y"][1] = 1, 1, 1
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 5)), None, header), file)


def _segmentation(root, shape=(24, 20, 5), matrix=affine("LPS")):
    write_nifti(root / DRAWN, np.ones(shape, np.uint8), matrix)


VOLUME, DRAWN = "UCL/Case01.nii.gz", "UCL/Case01_segmentation.nii.gz"
BAD_VOLUMES = {
    "no mask": (lambda r: (r / DRAWN).unlink(), ["Case01.nii.gz has no mask", "1 of 4"]),
    "shapes differ": (lambda r: _segmentation(r, (24, 20, 4)), [DRAWN, "5×20×24", "4×20×24"]),
    "four axes": (lambda r: write_nifti(r / VOLUME, np.ones((24, 20, 5, 2)), affine("LPS")),
                  [VOLUME, "three dimensions", "24×20×5×2"]),
    "cut short": (lambda r: _cut(r / VOLUME), [VOLUME, "not a readable NIfTI file"]),
    "no NIfTI": (lambda r: (r / VOLUME).write_text("text"), [VOLUME, "not a readable NIfTI file"]),
    "two lists": (lambda r: [(r / f"UCL/{part}.txt").write_text("Case00\nCase01\nCase02")
                             for part in ("train", "test")], ["train.txt", "Case00", "two lists"]),
    "two endings": (lambda r: shutil.copy(r / VOLUME, r / "UCL/Case01.nii"), ["in their endings"]),
    "voxels differ": (lambda r: _segmentation(r, matrix=affine("LPS", (1, 1, 3))),
                      [DRAWN, "affine"]),
    "mask elsewhere": (lambda r: _segmentation(r, matrix=affine("LPS", tilt=0.4)), ["affine"]),
    "not finite": (lambda r: write_nifti(r / VOLUME, np.full((24, 20, 5), np.nan), affine("LPS")),
                   [VOLUME, "not finite"]),
    "header broken": (lambda r: _break_header(r / VOLUME, 70, 77), [VOLUME, "not a readable"]),
    "header repaired": (lambda r: _break_header(r / VOLUME, 254, 99), [VOLUME, "sform_code"]),
    "one folder twice": (lambda r: shutil.copytree(r / "BMC", r / "ISBI_1.5"), ["'BMC'", "taken"]),
    "mixed": (lambda r: write_site(r, "photographs", 4), ["different layouts", "known layouts"]),
    "no direction": (lambda r: _no_direction(r / VOLUME), [VOLUME, "direction"]),
    "nothing drawn": (lambda r: [write_nifti(file, np.zeros((24, 20, 5), np.uint8), affine("LPS"))
                                 for file in r.glob("UCL/*egm*")], ["'UCL'", "--skip-empty"]),
}


@pytest.mark.parametrize("spoil, parts", BAD_VOLUMES.values(), ids=BAD_VOLUMES)
def test_bad_volumes(tmp_path, spoil, parts):
    write_volumes(tmp_path, {"BMC": 4, "UCL": 4})
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.load_folder(tmp_path, 16, skip_empty=True)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_volumes_settings(tmp_path, monkeypatch):
    write_volumes(tmp_path, {"UCL": 6}, shape=(24, 20, 1))
    lists = {"train": "Case03\nCase00.nii.gz", "val": "Case01\n\n", "test": "Case05"}
    for part, cases in lists.items():
        (tmp_path / "UCL" / f"{part}.txt").write_text(cases)
    loaded, lines = warned(tmp_path)
    parts = [part.cases for part in splits_of(loaded.sites[0])]
    assert parts == [["Case03", "Case00"], ["Case01"], ["Case05"]]
    assert len(lines) == 1 and "2 cases that are in no list" in lines[0]
    (tmp_path / "UCL" / "Case02.nii.gz").unlink()
    assert any("1 masks without an image" in line for line in warned(tmp_path)[1])
    stack = loaded.sites[0].train.images[0]
    assert torch.equal(stack[0], stack[1]) and torch.equal(stack[1], stack[2])
    with pytest.raises(ValueError, match="none for volumes"):
        data.load_folder(tmp_path, 16, [0, 1])
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match="pip install nibabel"):
        data.load_folder(tmp_path, 16)


def test_one_bright_voxel_is_clipped():
    values = np.random.default_rng(0).normal(100, 10, (5, 20, 24)).astype(np.float32)
    spike = values.copy()
    spike[2, 4, 3] = 1e6
    plain, clipped = [data.network_input(Path("x.nii"), v[..., None], 24, 3, "volumes")[:, 1]
                      for v in (values, spike)]
    assert np.abs(plain - clipped).mean() < 0.01
    wanted = data.resize(np.clip(values, *np.percentile(values, [0.5, 99.5])), 24)
    assert np.allclose(plain, (wanted - wanted.mean()) / wanted.std(), atol=0.01)


@pytest.mark.parametrize("size", [(12, 12), (130, 127)])  # a CPU convolves the large one by one
def test_the_benchmarks_obvious_step_is_ours(size):
    """The loop over samples and passes has the objective of `router.step`, and its gradients."""
    path = Path(__file__).parent / ".ci" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    models = [UNet(1, 3, 4, 1, torch.Generator().manual_seed(k)).double() for k in range(3)]
    for k, model in enumerate(models):  # experts whose running statistics differ
        for norm in router.running_norms(model):
            norm.running_mean += 0.01 * k
            norm.running_var *= 0.1 + 0.1 * k
        model.eval()
    images = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(0)).double()
    settings = router.RoutingSettings(entropy=0.1, leash=None)

    ours = router.build_routed(models, settings, torch.Generator().manual_seed(1))
    loss, _ = router.objective(ours, images, torch.Generator().manual_seed(2))
    loss.backward()
    obvious = router.build_routed(models, settings, torch.Generator().manual_seed(1))
    for layer in obvious.parts(router.RoutedConv2d):
        layer.forward = partial(benchmark.looped, layer, models)
    slow = benchmark.obvious_step(obvious, images, torch.Generator().manual_seed(2))
    assert torch.allclose(slow, loss, rtol=1e-12, atol=0)
    gradients = dict(obvious.named_parameters())
    for name, value in ours.named_parameters():
        if value.requires_grad:
            assert torch.allclose(gradients[name].grad, value.grad, rtol=1e-9, atol=1e-13), name


# ---- train.py, end to end
TOY = ["--rounds", "2", "--images-per-site", "8", "--size", "16", "--width", "2", "--depth", "1",
       "--sites", "3", "--threads", "1"]
ROOT = Path(__file__).parent


def script(*argv, launcher=()) -> subprocess.CompletedProcess:
    """train.py in a process of its own."""
    return subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), *map(str, argv)],
                          capture_output=True, text=True, timeout=120)


def same_run(one: Path, two: Path) -> bool:
    """Equal rows, and the bits of all models equal."""
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (one, two)]
    models = [sorted(run.glob("*/*.pt")) for run in (one, two)]
    assert models[0] and [m.relative_to(one) for m in models[0]] == [
        m.relative_to(two) for m in models[1]]
    pairs = [(tensors(a), tensors(b)) for a, b in zip(*models)]
    return rows[0] == rows[1] and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def tensors(file: Path) -> dict:
    found = torch.load(file, weights_only=True)
    if "own" not in found:
        return found
    own = {f"{c}.{name}": v for c, state in found["own"].items() for name, v in state.items()}
    return found["global_state"] | own


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    assert train.main([*TOY, "--methods", "all", "--out", str(out)]) == 0
    return out


def test_run_reports_every_method(toy_run, capsys):
    found = json.loads((toy_run / "results.json").read_text())
    outside = {row["method"] for row in found["rows"] if row["phase"] == "outside"}
    assert outside == set(train.OUTSIDE)
    inside = {(row["method"], row["site"]) for row in found["rows"] if row["phase"] == "inside"}
    assert inside == {(m, s) for m in ("fedavg", "iopfl") for s in ("Alder", "Birch")}
    text = train.tables(found["rows"], "mm")
    assert "routing against" in text and "oracle (ceiling)" in text


def test_rows_are_those_of_the_saved_models(toy_run):
    dataset = data.simulate_sites("prostate", 0, 16, 8, 3)
    last = torch.load(toy_run / "seed0-Cedar-iopfl" / "last.pt", weights_only=True)
    rows = json.loads((toy_run / "results.json").read_text())["rows"]
    for site in dataset.sites[:2]:
        model = UNet(1, 2, 2, 1)
        model.load_state_dict(last["own"][site.name])
        prediction = iopfl.predict(model, site.test.images).numpy()
        expected = np.mean([iopfl.dice(p > 0, m > 0)
                            for p, m in zip(prediction, site.test.masks.numpy())])
        row, = [r for r in rows if (r["phase"], r["method"], r["site"])
                == ("inside", "iopfl", site.name)]
        assert row["dice"] == pytest.approx(expected, abs=1e-12)


def test_ceilings_alone_print_their_tables(tmp_path, capsys):
    assert train.main([*TOY, "--methods", "oracle", "--out", str(tmp_path / "a")]) == 0
    assert "oracle (ceiling)" in capsys.readouterr().out
    assert train.main([*TOY, "--hold-out", "none", "--methods", "centralised", "--out",
                       str(tmp_path / "b")]) == 0
    assert "centralised (ceiling)" in capsys.readouterr().out


def test_a_killed_run_goes_on_to_the_same_bits(toy_run, tmp_path):
    out = tmp_path / "killed"
    argv = [*TOY, "--methods", "all", "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv],
                               stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "seed0-Cedar-iopfl" / "last.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "results.json").exists()
    assert script(*argv).returncode == 2  # neither --resume nor --overwrite
    other = script(*argv, "--resume", "--lr", "0.1")
    assert other.returncode == 2 and "lr" in other.stderr
    assert script(*argv, "--resume", "--seeds", "0").returncode == 0  # the default, written out
    assert same_run(toy_run, out)
    assert script(*argv, "--resume").returncode == 0 and same_run(toy_run, out)  # tables again


def test_two_processes_give_the_same_bits(toy_run, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = script(*TOY, "--methods", "all", "--out", tmp_path / "two", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert same_run(toy_run, tmp_path / "two")


def test_overwrite_removes_only_what_a_run_writes(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*TOY, "--rounds", "1", "--methods", "global", "--out", str(out)]
    assert train.main(argv) == 0
    (out / "notes.txt").write_text("mine")
    (out / "seed0-Cedar-iopfl" / "notes.txt").write_text("mine")
    assert train.main(argv) == 2 and train.main([*argv, "--overwrite", "--seeds", "1"]) == 0
    assert (out / "notes.txt").exists() and (out / "seed0-Cedar-iopfl" / "notes.txt").exists()
    assert not (out / "seed0-Cedar-iopfl" / "last.pt").exists()
    for name, status in (("config.json.partial", 0), ("a.txt", 2)):  # killed at the very beginning
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        assert train.main([*argv[:-1], str(tmp_path / name), "--overwrite"]) == status


@pytest.mark.parametrize("argv, part", [
    (["--rounds", "0"], "--rounds 0"), (["--methods", "magic"], "magic unknown"),
    (["--hold-out", "Nowhere"], "Nowhere"), (["--seeds", "1", "1"], "--seeds"),
    (["--alpha", "2"], "--alpha"), (["--participation", "0"], "--participation"),
    (["--images", "."], "--images would do nothing"), (["--root", "nowhere"], "no such folder"),
    (["--mask-values", "0", "1"], "would do nothing"), (["--list", "--rounds", "3"], "--rounds"),
    (["--adapt", "."], "go together"), (["--adapt", ".", "--images", ".", "--size", "9"], "--size"),
    (["--adapt", ".", "--images", ".", "--mask-values", "0", "1"], "goes with --masks"),
    (["--width", "1024", "--depth", "10"], "channels"), (["--round", "3"], "--round"),
    (["--size", "2", "--depth", "1", "--batch-size", "1"], "batch of one"),
    (["--out", ""], "--out must"), (["--hold-out", ""], "--hold-out"),
    (["--hold-out", "none", "--methods", "oracle"], "not all are for hospitals inside"),
    (["--resume", "--overwrite"], "not both"), (["--sites", "1"], "--hold-out Alder")])
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path, capsys, argv, part):
    assert train.main(["--out", str(tmp_path / "out"), *argv]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_adapting_a_run_repeats_its_outside_phase(toy_run, tmp_path, capsys):
    root = tmp_path / "sites"
    rng = np.random.default_rng(0)
    for name in ("A", "B", "C"):
        for kind in ("images", "masks"):
            (root / name / kind).mkdir(parents=True)
        for n in range(5):
            image, mask = rng.integers(0, 256, (20, 24)), np.zeros((20, 24))
            mask[5:12, 6:18] = 1
            for kind, pixels in (("images", image), ("masks", mask)):
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / kind / f"{n}.png")
    run, out = tmp_path / "run", tmp_path / "out"
    toy = ["--rounds", "1", "--size", "16", "--width", "2", "--depth", "1", "--threads", "1"]
    assert train.main(["--root", str(root), *toy, "--out", str(run)]) == 0
    (root / "C" / "images" / "broken.png").write_bytes(b"no image")
    argv = ["--images", str(root / "C" / "images"), "--masks", str(root / "C" / "masks")]
    assert train.main(["--adapt", str(run), *argv, "--out", str(out), "--threads", "1"]) == 1
    assert "left out" in capsys.readouterr().err
    rows = json.loads((out / "adapted.json").read_text())["rows"]
    assert len(rows) == 5
    for row in rows:  # Dice of the files is the Dice that was reported
        mask, truth = (np.array(Image.open(folder / row["file"]))
                       for folder in (out / "masks", root / "C" / "masks"))
        assert mask.shape == (20, 24)
        assert row["Dice class 1"] == pytest.approx(iopfl.dice(mask > 0, truth > 0))
    again = tmp_path / "again"
    assert train.main(["--adapt", str(out), *argv[:2], "--out", str(again)]) == 1
    for row in rows:
        written = [folder / "masks" / row["file"] for folder in (again, out)]
        assert written[0].read_bytes() == written[1].read_bytes()


def test_saved_images_are_adapted_to(toy_run, tmp_path):
    theirs = tmp_path / "theirs"
    argv = ["--images-per-site", "8", "--size", "16", "--sites", "3", "--out", str(tmp_path / "l")]
    assert train.main(["--list", *argv, "--save-images", str(theirs)]) == 0
    site = data.simulate_sites("prostate", 0, 16, 8, 3).sites[-1]
    for case, mask in zip(site.everything.cases, site.everything.masks):
        assert np.array_equal(np.array(Image.open(theirs / "masks" / f"{case}.png")), mask)
    argv = ["--images", str(theirs / "images"), "--masks", str(theirs / "masks")]
    assert train.main(["--adapt", str(toy_run), *argv, "--out", str(tmp_path / "out")]) == 0
    served = json.loads((tmp_path / "out" / "adapted.json").read_text())["rows"]
    found = np.mean([row["Dice prostate"] for row in served])
    rows = json.loads((toy_run / "results.json").read_text())["rows"]
    row, = [r for r in rows if (r["phase"], r["method"]) == ("outside", "routing")]
    assert found == pytest.approx(row["dice"], abs=0.02)


def test_palette_has_256_colours_and_sign_test_by_hand():
    colours = np.array(train.PALETTE).reshape(256, 3)
    assert len(np.unique(colours, axis=0)) == 256 and colours.min() >= 0 and colours.max() < 256
    assert train.sign_test(5, 0) == pytest.approx(2 / 32) and train.sign_test(2, 2) == 1
    assert train.sign_test(0, 0) == 1


def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    assert train.main(["--rounds", "1", "--images-per-site", "4", "--size", "32"]) == 0
    names = {}
    exec("\n".join(blocks), names)
    assert names["mask"].shape == (1, 96, 96) and names["probabilities"].shape == (1, 2, 96, 96)


def test_flower_gives_the_same_models(tmp_path):
    """The file of docs/flower.md, run by Flower's simulation in processes of its own."""
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    root = Path(__file__).parent
    text = (root / "docs" / "flower.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "federation.py").write_text(block, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(root), "FLWR_TELEMETRY_ENABLED": "0",
                   "FLWR_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "federation.py"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sites = data.simulate_sites("prostate", 0, size=32, images_per_site=12, sites=3).sites
    model = UNet(1, 2, width=8, depth=2, generator=torch.Generator().manual_seed(0))
    *_, last = iopfl.federate(model, {site.name: site.train for site in sites}, 2,
                              iopfl.Method(own="local", alpha=0.7))
    expected = {"global": last.global_state}
    expected |= {f"personal-{name}": state for name, state in last.own.items()}
    assert {file.stem for file in tmp_path.glob("*.pt")} == set(expected)
    for name, state in expected.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == state.keys()
        assert all(torch.allclose(found[entry], value, atol=1e-4)
                   for entry, value in state.items()), name
