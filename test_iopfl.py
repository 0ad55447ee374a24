"""The tests: `pytest`, without network, GPU or data. Slow, obvious versions of the method stand here as oracles.

    python test_iopfl.py [--quick]    the benchmark: how long our versions take beside the obvious ones
    python test_iopfl.py --fuzz N     N damaged inputs: each must end in success or in one line
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import fcntl
import gzip
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import iopfl
import router
import train
from models import UNet

HERE = Path(__file__).parent
torch.set_num_threads(1)  # at these sizes no slower than two


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_clients(count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> dict:
    """Clients with unequal numbers of random images; the mask is where the image is bright."""
    clients = {}
    for k in range(count):
        images = torch.randn(3 + 2 * k, 1, size, size, generator=seeded(k), dtype=dtype) + 0.3 * k
        clients[f"client{k}"] = SimpleNamespace(images=images, masks=(images[:, 0] > 0.5).long())
    return clients


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random weights and BatchNorm statistics, the variances positive."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3)
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return model.eval()


def experts(count: int = 3, **options) -> list[nn.Module]:
    return [randomise(UNet(1, 2, width=4, depth=2, **options), k).double() for k in range(count)]


def images(count: int = 4, size: int = 12, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=seeded(seed), dtype=torch.float64)


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (5, 3)])
def test_unet_takes_any_size(size):
    model = UNet(3, 4, width=4, depth=3)
    assert model(torch.randn(2, 3, *size)).shape == (2, 4, *size)


def test_unet_layers_and_padding():
    model = randomise(UNet(1, 2, width=4, depth=2), 0)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == 2 * 5 + 1 and kinds.count(nn.ConvTranspose2d) == 2
    assert all(m.bias is None for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "head")
    x = torch.randn(1, 1, 6, 7)  # padded to 8 × 8 by its edges
    assert torch.allclose(model(x), model(F.pad(x, (0, 1, 0, 2), mode="replicate"))[..., :6, :7])


def test_unet_errors():
    with pytest.raises(ValueError, match=r"expected images \(N, 1, H, W\), got \(2, 3, 8, 8\)"):
        UNet(1, 2, 4, 2)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got \(1, 8, 8\)"):
        UNet(1, 2, 4, 2)(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        UNet(1, 2, 4, 0)


def test_unet_weights_come_from_the_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = UNet(1, 2, 4, 2, seeded(5))
    torch.manual_seed(2)
    b = UNet(1, 2, 4, 2, seeded(5))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert before.shape == torch.get_rng_state().shape


# ---------------------------------------------------------------- federation (M1 to M3)
def test_soft_dice_by_hand():
    logits = torch.tensor([[[[0.0, 100.0]], [[0.0, -100.0]]]])  # p = (½, ½) and (1, 0)
    target = torch.tensor([[[1, 0]]])
    # class 0: overlap 1, size 1.5 + 1; class 1: overlap .5, size .5 + 1
    expected = 1 - (2 / 2.5 + 1 / 1.5) / 2
    assert iopfl.soft_dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-5)


def test_aggregate_by_hand():
    states = [{"weight": torch.tensor([1.0, 2.0]), "running_mean": torch.tensor([10.0]), "steps": torch.tensor(3)},
              {"weight": torch.tensor([5.0, 6.0]), "running_mean": torch.tensor([30.0]), "steps": torch.tensor(7)}]
    result = iopfl.aggregate(iter(states), [1, 3])
    assert torch.equal(result["weight"], torch.tensor([4.0, 5.0]))
    assert torch.equal(result["running_mean"], torch.tensor([25.0]))  # BatchNorm statistics are averaged
    assert result["steps"].item() == 7 and result["steps"].dtype == torch.int64
    assert torch.equal(states[0]["weight"], torch.tensor([1.0, 2.0]))  # the states stay as they were


@pytest.mark.parametrize("second, message", [
    ({"a": torch.zeros(2)}, "client 1 and client 0 differ in entry 'b'"),
    ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"client 1, entry 'a': \(3,\) torch.float32, but client 0 has \(2,\)"),
    ({"a": torch.zeros(2).double(), "b": torch.zeros(1)}, "client 1, entry 'a'.*float64"),
    ({"a": torch.zeros(2), "b": torch.tensor([float("nan")])}, "client 1, entry 'b': not every value is finite"),
])
def test_aggregate_refuses(second, message):
    with pytest.raises(ValueError, match=message):
        iopfl.aggregate([{"a": torch.zeros(2), "b": torch.zeros(1)}, second], [1, 1])


@pytest.mark.parametrize("weights, message", [([1], "more states than the 1 weights"), ([1, 1, 1], "2 states but 3"),
                                              ([0, 0], "not all zero"), ([-1, 2], "not negative"), ([], "not all zero")])
def test_aggregate_refuses_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        iopfl.aggregate([{"a": torch.zeros(2)}] * 2, weights)


def test_update_personal():
    local, personal = {"a": torch.tensor([1.0]), "n": torch.tensor(4)}, {"a": torch.tensor([3.0]), "n": torch.tensor(9)}
    result = iopfl.update_personal(personal, local, 0.25)
    assert result["a"].item() == pytest.approx(0.25 * 3 + 0.75 * 1) and result["n"].item() == 4
    first = iopfl.update_personal(None, local, 0.25)
    assert first["a"].item() == 1 and first["a"].data_ptr() != local["a"].data_ptr()
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.5"):
        iopfl.update_personal(personal, local, 1.5)


def test_personal_model_is_the_sum_of_global_and_local_updates():
    """M3 on real training in float64, for every floating entry, against w_k^t trained here once more."""
    alpha, rounds, clients = 0.3, 4, toy_clients(2, dtype=torch.float64)
    model = UNet(1, 2, width=2, depth=1, generator=seeded()).double()
    start = iopfl.snapshot(model)
    history = list(iopfl.federate(model, clients, rounds, {"own": iopfl.Method(own="local", alpha=alpha)}, seed=3, lr=1e-2))
    globals_ = [start, *(r.global_state for r in history)]
    for position, (name, client) in enumerate(clients.items()):
        generator, local_updates = seeded(1000 * 3 + position), []
        for t in range(1, rounds + 1):
            model.load_state_dict(globals_[t - 1])
            iopfl.train_local(model, client.images, client.masks, lr=1e-2, generator=generator)
            local = iopfl.snapshot(model)
            local_updates.append({e: local[e] - globals_[t - 1][e] for e in local})
        for entry, value in history[-1].own("own", name).items():
            if not value.is_floating_point():
                continue
            expected = start[entry].clone()
            for s in range(1, rounds):
                expected += (1 - alpha ** (rounds - s)) * (globals_[s][entry] - globals_[s - 1][entry])
            for t in range(1, rounds + 1):
                share = alpha ** (rounds - 1) if t == 1 else (1 - alpha) * alpha ** (rounds - t)
                expected += share * local_updates[t - 1][entry]
            assert torch.allclose(value, expected, rtol=0, atol=1e-12), entry


def test_accumulated_global_model():
    """The control: the same recursion on the global models, alike for every client."""
    model, clients = UNet(1, 2, 2, 1, seeded()), toy_clients(2)
    methods = {"fedavg": iopfl.Method(), "slow": iopfl.Method(alpha=0.6)}
    history = list(iopfl.federate(model, clients, 3, methods))
    slow = history[0].global_state
    for last in history[1:]:
        slow = iopfl.update_personal(slow, last.global_state, 0.6)
    for name in clients:
        assert all(torch.allclose(last.own("slow", name)[e], slow[e]) for e in slow)
        assert all(torch.equal(last.own("fedavg", name)[e], last.global_state[e]) for e in slow)


def test_a_federation_of_one_is_local_training():
    clients = toy_clients(1)
    model = UNet(1, 2, 2, 1, seeded())
    twin, generator = copy.deepcopy(model), seeded(0)
    last = list(iopfl.federate(model, clients, 2, {"own": iopfl.Method(own="local")}, batch_size=2))[-1]
    for _ in range(2):
        iopfl.train_local(twin, clients["client0"].images, clients["client0"].masks, batch_size=2, generator=generator)
    for entry, value in twin.state_dict().items():
        assert torch.equal(last.global_state[entry], value) and torch.equal(last.own("own", "client0")[entry], value)


def test_no_two_states_share_memory_and_none_changes_later():
    model = UNet(1, 2, 2, 1, seeded())
    kept, copies, clients = [], [], toy_clients(3)
    for state in iopfl.federate(model, clients, 3):
        kept += [state.global_state, *(state.own("iopfl", name) for name in clients)]
        copies += [copy.deepcopy(s) for s in kept[-4:]]
    pointers = [v.data_ptr() for s in [*kept, model.state_dict()] for v in s.values()]
    assert len(set(pointers)) == len(pointers)
    assert all(torch.equal(k[e], c[e]) for k, c in zip(kept, copies) for e in k)
    assert not torch.equal(kept[0]["head.weight"], kept[-1]["head.weight"])


def by_hand(start, clients, rounds, stays=(), proximal=0.0, own_proximal=None, lr=1e-2):
    """Every method inside once more, slowly and without `iopfl`: client → own state, by method of `stays` and so on."""
    def train(state, client, order, mu, anchor):
        model = UNet(1, 2, 2, 1).double().train()
        model.load_state_dict(state)
        optimiser = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)
        indices = torch.randperm(len(client.images), generator=order)
        for batch in np.array_split(indices.numpy(), math.ceil(len(indices) / 5)):
            target = F.one_hot(client.masks[batch], 2).movedim(-1, 1)
            probabilities = model(client.images[batch]).softmax(1)
            loss = 1.0
            for c in range(2):
                p, t = probabilities[:, c], target[:, c]
                loss = loss - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5) / 2
            for name, value in model.named_parameters():
                loss = loss + mu / 2 * ((value - anchor[name]) ** 2).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return copy.deepcopy(model.state_dict())

    shared, kept, own = start, {name: start for name in clients}, {name: start for name in clients}
    orders = {name: seeded(k) for k, name in enumerate(clients)}
    own_orders = {name: seeded(k) for k, name in enumerate(clients)}
    total = sum(len(client.images) for client in clients.values())
    for _ in range(rounds):
        for name, client in clients.items():
            mixed = {e: kept[name][e] if e in stays else shared[e] for e in start}
            kept[name] = train(mixed, client, orders[name], proximal, mixed)
            if own_proximal is not None:
                own[name] = train(own[name], client, own_orders[name], own_proximal, shared)
        shared = {e: sum(len(c.images) / total * kept[n][e] for n, c in clients.items()) for e in start}
    if own_proximal is None:
        own = {name: {e: kept[name][e] if e in stays else shared[e] for e in start} for name in clients}
    return own


BATCHNORMS = [f"{block}.{i}.{entry}" for block in ("encoder.0", "encoder.1", "decoder.0") for i in (1, 4)
              for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize("method, options", [
    (iopfl.METHODS["fedavg"], {}), (iopfl.Method(proximal=0.7), {"proximal": 0.7}),
    (iopfl.METHODS["fedbn"], {"stays": BATCHNORMS}), (iopfl.METHODS["fedper"], {"stays": ["head.weight", "head.bias"]}),
    (iopfl.METHODS["local"], {"stays": UNet(1, 2, 2, 1).state_dict()}),
    (iopfl.Method(own="apart", own_proximal=0.5), {"own_proximal": 0.5})],
    ids=["fedavg", "fedprox", "fedbn", "fedper", "local", "ditto"])
def test_methods_inside_by_hand(method, options):
    clients = toy_clients(3, dtype=torch.float64)
    model = UNet(1, 2, 2, 1, seeded()).double()
    expected = by_hand(iopfl.snapshot(model), clients, 3, **options)
    *_, last = iopfl.federate(model, clients, 3, {"it": method}, lr=1e-2)
    assert list(last.memory) == list(clients)
    for name in clients:
        own = last.own("it", name)
        for entry, value in own.items():
            if value.is_floating_point():
                assert torch.allclose(value, expected[name][entry], rtol=0, atol=1e-10), (name, entry)
    distinct = {last.own("it", name)["decoder.0.0.weight"].sum().item() for name in clients}
    assert len(distinct) == (3 if method.own_proximal or method.stays == "all" else 1)


def test_pooled_training_is_one_client_with_all_images():
    clients, model = toy_clients(3), UNet(1, 2, 2, 1, seeded())
    pooled = SimpleNamespace(images=torch.cat([c.images for c in clients.values()]),
                             masks=torch.cat([c.masks for c in clients.values()]))
    twin = copy.deepcopy(model)
    *_, last = iopfl.federate(model, clients, 2, {"it": iopfl.METHODS["centralised"]})
    *_, alone = iopfl.federate(twin, {"one": pooled}, 2, {"it": iopfl.METHODS["fedavg"]})
    for own in (last.own("it", name) for name in clients):
        assert all(torch.equal(own[entry], alone.global_state[entry]) for entry in own)


def test_methods_ride_on_one_federation_without_touching_it():
    riding = {"fedavg": iopfl.METHODS["fedavg"], "iopfl": iopfl.METHODS["iopfl"], "ditto": iopfl.METHODS["ditto"]}
    *_, alone = iopfl.federate(UNet(1, 2, 2, 1, seeded()), toy_clients(2), 2, {"fedavg": iopfl.METHODS["fedavg"]})
    *_, together = iopfl.federate(UNet(1, 2, 2, 1, seeded()), toy_clients(2), 2, riding)
    assert all(torch.equal(alone.global_state[e], together.global_state[e]) for e in alone.global_state)
    assert list(together.losses) == ["client0", "client1"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_participation(tmp_path, on_disk):
    """Present clients alone train, their weights sum to one, absent ones' own models stay as they are."""
    clients = toy_clients(5, dtype=torch.float64)
    model = UNet(1, 2, 2, 1, seeded()).double()
    g, personal, orders, seen = iopfl.snapshot(model), {}, {name: seeded(k) for k, name in enumerate(clients)}, set()
    entries = [entry for entry, value in g.items() if value.is_floating_point()]
    memory = train.Shelf(tmp_path, "cpu", [*clients], spare=True) if on_disk else {}
    for last in iopfl.federate(UNet(1, 2, 2, 1, seeded()).double(), clients, 6, participation=0.4, memory=memory):
        if on_disk:
            memory.keep(last)
            assert len(list(tmp_path.iterdir())) == 2 + len(memory) and not any(memory.read.values())
        present = [*last.losses]
        assert len(present) == 2 and present == [name for name in clients if name in present]
        sizes, total = [len(clients[name].images) for name in present], {}
        for name, size in zip(present, sizes):
            model.load_state_dict(g)
            iopfl.train_local(model, clients[name].images, clients[name].masks, generator=orders[name])
            local = iopfl.snapshot(model)
            personal[name] = iopfl.update_personal(personal.get(name), local, 0.7)
            for entry, value in local.items():
                total[entry] = total.get(entry, 0) + value * size / sum(sizes)
        g = {entry: value.to(g[entry].dtype) for entry, value in total.items()}
        seen.add(tuple(present))
        assert {*last.memory} == {*personal}
        for name in clients:
            state = personal.get(name, last.global_state)
            assert all(torch.allclose(state[e], last.own("iopfl", name)[e], atol=1e-9) for e in entries)
        assert all(torch.allclose(g[e], last.global_state[e], atol=1e-9) for e in entries)
    assert len(seen) > 2 and set().union(*seen) == {*clients}  # drawn anew each time
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="participation must lie in"):
            next(iopfl.federate(model, clients, 1, participation=share))


@pytest.mark.parametrize("methods", [["fedavg", "iopfl", "ditto", "global-alpha=0.7"], ["fedbn"], ["local"], ["centralised"]])
def test_a_federation_goes_on_after_any_round(methods):
    """From number, global state and memory alone, bit for bit; what was yielded before does not change."""
    methods = {name: (iopfl.METHODS | train.INSIDE_ABLATIONS)[name] for name in methods}
    clients, share = toy_clients(3), 0.6 if "fedavg" in methods else 1
    whole = list(iopfl.federate(UNet(1, 2, 2, 1, seeded()), clients, 4, methods, participation=share))
    for done in (1, 3, 4):
        before = copy.deepcopy(whole[done - 1])
        first, *more = iopfl.federate(UNet(1, 2, 2, 1, seeded()), clients, 4, methods, participation=share,
                                      memory=dict(before.memory), after=(done, before.global_state))
        assert first.number == done and [last.number for last in more] == list(range(done + 1, 5))
        assert all(last.losses == again.losses for last, again in zip(whole[done:], more))
        last = [first, *more][-1]
        for name in clients:
            for method in methods:
                one, two = (of.own(method, name) for of in (last, whole[-1]))
                assert one.keys() == two.keys() and all(torch.equal(one[entry], two[entry]) for entry in one)
        assert all(torch.equal(last.global_state[entry], value) for entry, value in whole[-1].global_state.items())
        if done < 4:
            assert first.number == before.number and all(
                torch.equal(value, before.global_state[entry]) for entry, value in first.global_state.items())


def test_the_order_of_the_clients_changes_rounding_alone():
    clients = toy_clients(4, dtype=torch.float64)
    for share in (1.0, 0.5):
        one, two = ([*iopfl.federate(UNet(1, 2, 2, 1, seeded()).double(), {name: clients[name] for name in names}, 3,
                                     participation=share)][-1] for names in (clients, reversed(clients)))
        assert one.losses.keys() == two.losses.keys() and [*two.losses] == [*reversed(one.losses)]
        for name in clients:
            a, b = one.own("iopfl", name), two.own("iopfl", name)
            assert all(torch.allclose(a[entry].double(), b[entry].double(), rtol=0, atol=1e-9) for entry in a)


def test_the_weights_of_those_present_sum_to_one(monkeypatch):
    """Where a client is missing for whatever reason: with equal models the mean is that model."""
    monkeypatch.setattr(iopfl, "draw_clients", lambda names, *_: [name for name in names if name != "client1"])
    monkeypatch.setattr(iopfl, "train_local", lambda *_, **__: 0.0)
    model = UNet(1, 2, 2, 1, seeded()).double()
    start = iopfl.snapshot(model)
    *_, last = iopfl.federate(model, toy_clients(3, dtype=torch.float64), 2)
    assert [*last.losses] == ["client0", "client2"] and [*last.memory] == ["client0", "client2"]
    assert all(torch.allclose(last.global_state[entry], value, rtol=1e-14) for entry, value in start.items())


@pytest.mark.parametrize("method", ["fedavg", "local", "fedbn", "ditto", "centralised"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_whose_model_is_not_finite_is_named_and_never_averaged(method, value):
    """Also where its layers stay, or its own model alone is bad; the round before stays as it is."""
    clients, rounds, calls = toy_clients(3), [], []

    def spoil(model, images, *positional, train_local=iopfl.train_local, **options):
        loss = train_local(model, images, *positional, **options)
        calls.append(len(images))
        own = method != "ditto" or options.get("anchor") is not None
        if len(rounds) == 1 and len(images) in (5, 15) and own:
            with torch.no_grad():
                model.encoder[0][1].weight[1] = value  # of BatchNorm
        return loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
        patch.setattr(iopfl, "train_local", spoil)
        for last in iopfl.federate(UNet(1, 2, 2, 1, seeded()), clients, 3, {"it": iopfl.METHODS[method]}):
            rounds.append(last)
    name = "pooled" if method == "centralised" else "client1"
    assert str(caught.value) == f"client {name} in round 2, entry 'encoder.0.1.weight': not every value is finite"
    assert len(rounds) == 1 and all(v.isfinite().all() for name in clients for v in rounds[0].own("it", name).values())


def test_share_out_balances_the_work():
    work = {"a": 3, "b": 9, "c": 4, "d": 5, "e": 3}
    owner = iopfl.share_out(work, 2)
    assert owner == {"b": 0, "d": 1, "c": 1, "a": 0, "e": 1}  # 12 and 12
    assert set(iopfl.share_out(work, 9).values()) == {0, 1, 2, 3, 4} and set(iopfl.share_out(work, 1).values()) == {0}


def federate_kinds(folder) -> None:
    """All ways of sharing, in both precisions; each process saves what it knows."""
    for dtype in (torch.float64, torch.float32):
        for group in (("fedavg", "iopfl", "ditto"), ("fedbn",), ("local",), ("centralised",)):
            *_, last = iopfl.federate(UNet(1, 2, 2, 1, seeded()).to(dtype), toy_clients(3, dtype=dtype), 2,
                                      {name: iopfl.METHODS[name] for name in group})
            own = {(method, name): last.own(method, name) for method in group for name in last.trained_here}
            torch.save([last.global_state, own], f"{folder}/{dtype}-{group[0]}-{iopfl.processes()[0]}.pt")


def torchrun(count: int, *argv) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                           *map(str, argv)], capture_output=True, text=True, timeout=120)


def test_processes_share_a_federation(tmp_path):
    """The states of two, three and more processes than clients are those of one, bit for bit; each own model is in one
    process alone."""
    (tmp_path / "1").mkdir()
    federate_kinds(tmp_path / "1")
    files = sorted((tmp_path / "1").iterdir())
    assert len(files) == 8
    (tmp_path / "workers.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import torch, torch._dynamo, test_iopfl


def start(rank, count, folder):
    child = os.fork()
    if child:
        return child
    try:
        torch.distributed.init_process_group("gloo", f"file://{{folder}}/store", rank=rank, world_size=count)
        test_iopfl.federate_kinds(folder)
        torch.distributed.barrier()
        os._exit(0)
    finally:
        os._exit(1)


for count in (2, 3, 4):
    os.mkdir(str(count))
    children = [start(rank, count, os.path.abspath(str(count))) for rank in range(count)]
    assert not any(os.waitpid(child, 0)[1] for child in children), count
""")
    done = subprocess.run([sys.executable, "workers.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for count in (2, 3, 4):
        for file in files:
            global_state, own = torch.load(file, weights_only=True)
            parts = [torch.load(tmp_path / str(count) / f"{file.stem[:-1]}{rank}.pt", weights_only=True) for rank in range(count)]
            assert sorted(key for _, part in parts for key in part) == sorted(own)
            for part_global, part in parts:
                assert all(torch.equal(part_global[entry], global_state[entry]) for entry in global_state)
                for key, state in part.items():
                    assert all(torch.equal(state[entry], own[key][entry]) for entry in own[key])


def test_what_stays_is_found_by_type():
    """Whatever the layers are called: BatchNorm without affine too, and the last layer as the head."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert iopfl.staying_entries(model, "none") == set()
    assert iopfl.staying_entries(model, "batchnorm") == statistics
    assert iopfl.staying_entries(model, "head") == {"3.weight", "3.bias"}
    assert iopfl.staying_entries(model, "all") == set(model.state_dict())
    with pytest.raises(ValueError, match="stays must be one of none, head, all, batchnorm, not 'bn'"):
        iopfl.staying_entries(model, "bn")
    with pytest.raises(ValueError, match="fedavg, fedbn do not share one training"):
        next(iopfl.federate(model, {}, 1, {name: iopfl.METHODS[name] for name in ("fedavg", "fedbn")}))


# ---------------------------------------------------------------- evaluation (M9)
def box(shape, *ranges):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


A, B = box((16, 16), (4, 10), (4, 10)), box((16, 16), (5, 13), (4, 10))


@pytest.mark.parametrize("prediction, target, spacing, expected", [
    (A, B, (1, 1), (0.71429, 3, 0.90909)),
    (A, B, (2, 0.5), (0.71429, 6, 1.5)),
    (box((16, 16), (2, 3), (2, 3)), A, (1, 1), (0, 9.25354, 6.50910)),
    (box((16, 16), (0, 6), (0, 6)), A, (1, 1), (0.11111, 5.03284, 3.09237)),
    (box((6, 16, 16), (1, 5), (4, 10), (4, 10)), box((6, 16, 16), (2, 6), (5, 13), (4, 10)), (3, 1, 1),
     (0.53571, 3.60555, 1.63686)),
    (~A & A, A, (3, 4), (0, 80, 80)),  # one empty: the diagonal of 48 × 64
    (A, A, (1, 1), (1, 0, 0)),
])
def test_metrics(prediction, target, spacing, expected):
    got = iopfl.dice(prediction, target), *(f(prediction, target, spacing) for f in (iopfl.hd95, iopfl.assd))
    assert got == pytest.approx(expected, abs=1e-5)
    assert (iopfl.hd95(target, prediction, spacing), iopfl.assd(target, prediction, spacing)) == pytest.approx(got[1:])


def test_metrics_of_empty_masks_and_wrong_shapes():
    empty = np.zeros((4, 4), bool)
    assert iopfl.dice(empty, empty) == 1 and np.isnan(iopfl.hd95(empty, empty)) and np.isnan(iopfl.assd(empty, empty))
    with pytest.raises(ValueError, match=r"prediction \(4, 4\), target \(16, 16\)"):
        iopfl.dice(empty, A)
    with pytest.raises(ValueError, match="one positive spacing an axis"):
        iopfl.hd95(A, B, (1, 1, 1))


def test_surface_distances_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 11)) < share for share in (0.3, 0.6)]
    spacing = (1.5, 0.7)

    def surface(mask):
        padded = np.pad(mask, 1)
        return [(r, c) for r in range(9) for c in range(11) if mask[r, c] and not (
            padded[r, c + 1] and padded[r + 2, c + 1] and padded[r + 1, c] and padded[r + 1, c + 2])]

    a, b = map(surface, masks)
    slow = [min(np.hypot(1.5 * (p[0] - q[0]), 0.7 * (p[1] - q[1])) for q in b) for p in a]
    assert iopfl.surface_distances(*masks, spacing)[0] == pytest.approx(slow, abs=1e-12)


def test_evaluate_by_structure_case_and_volume():
    target = torch.zeros(3, 4, 4, dtype=torch.long)
    target[0, :2, :2], target[0, 0, 0], target[1, 0, 0] = 1, 2, 1
    prediction = target.clone()
    prediction[1] = 0
    structures = {"disc": (1, 2), "cup": (2,)}
    disc, cup = iopfl.evaluate(prediction, target, ["a", "b", "c"], structures, (1, 1))
    assert disc["dice"] == pytest.approx((1 + 0 + 1) / 3) and (disc["cases"], disc["distance_cases"]) == (3, 2)
    assert disc["hd95"] == pytest.approx((0 + 32**0.5) / 2)
    assert cup["dice"] == 1 and cup["distance_cases"] == 1
    disc, _ = iopfl.evaluate(prediction, target, ["v", "v", "w"], structures, (3, 1, 1))  # two volumes
    assert disc["cases"] == 2 and disc["dice"] == pytest.approx((8 / 9 + 1) / 2)
    assert iopfl.evaluate(target * 0, target * 0, ["a", "b", "c"], structures, (1, 1))[0]["hd95"] is None


# ---------------------------------------------------------------- routed layers (M4, M5)
CONVOLUTIONS = [
    (nn.Conv2d, dict(in_channels=4, out_channels=6, kernel_size=3, padding=1, bias=False)),
    (nn.Conv2d, dict(in_channels=4, out_channels=6, kernel_size=(3, 2), stride=(2, 3), padding=(1, 2), dilation=2)),
    (nn.Conv2d, dict(in_channels=4, out_channels=6, kernel_size=3, padding=1, groups=2)),
    (nn.Conv2d, dict(in_channels=4, out_channels=4, kernel_size=3, padding="same", groups=4, padding_mode="reflect")),
    (nn.Conv2d, dict(in_channels=4, out_channels=2, kernel_size=3, padding=(2, 1), padding_mode="circular")),
    (nn.Conv2d, dict(in_channels=4, out_channels=2, kernel_size=4, padding="same", bias=False)),
    (nn.ConvTranspose2d, dict(in_channels=4, out_channels=6, kernel_size=2, stride=2)),
    (nn.ConvTranspose2d, dict(in_channels=4, out_channels=6, kernel_size=3, stride=(3, 2), padding=1,
                              output_padding=(2, 1), groups=2, bias=False)),
    (nn.ConvTranspose2d, dict(in_channels=4, out_channels=6, kernel_size=3, dilation=2, padding=2)),
]


def looped_convolution(gate: router.Router, convs: list[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A routed convolution by torch's own layers, sample by sample, without dropout; and the routing weights."""
    outputs, routing = [], []
    for sample in x:
        scores = gate.fc2(gate.fc1(sample.mean(dim=(1, 2))))
        weights = scores.softmax(0) if gate.activation == "softmax" else torch.sigmoid(scores)
        parameters = {name: sum(w * getattr(c, name).detach() for w, c in zip(weights, convs))
                      for name, _ in convs[0].named_parameters()}
        outputs.append(torch.func.functional_call(convs[0], parameters, (sample[None],)))
        routing.append(weights)
    return torch.cat(outputs), torch.stack(routing)


@pytest.mark.parametrize("activation, size", [("softmax", (7, 9)), ("sigmoid", (7, 9)), ("softmax", (130, 127))])
@pytest.mark.parametrize("kind, options", CONVOLUTIONS)
def test_routed_convolution_equals_a_loop_over_samples(kind, options, activation, size):
    """Values, and gradients of input and router, against torch's own layer applied sample by sample."""
    torch.manual_seed(0)
    convs = [kind(**options).double() for _ in range(3)]
    settings = router.RoutingSettings(activation=activation, start="random")
    routed = router.build_routed(convs, settings, seeded())
    layer = routed.network
    x = torch.randn(5, 4, *size, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    fast = routed(x)
    assert layer.trace.one_by_one == (size[0] > 100)
    slow, _ = looped_convolution(layer.router, convs, x)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-12)

    probe = torch.randn(fast.shape, generator=seeded(2), dtype=torch.float64)
    wanted = [x, *layer.router.parameters()]
    for a, b in zip(torch.autograd.grad((fast * probe).sum(), wanted), torch.autograd.grad((slow * probe).sum(), wanted)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11) and a.abs().max() > 0


class Foreign(nn.Module):
    """A network that is not ours: residual, pre-activated, strided, one convolution used twice, own dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, stride=2, padding=1, padding_mode="replicate")
        self.norm = nn.BatchNorm2d(6)
        self.plain_norm = nn.BatchNorm2d(6, affine=False, eps=1e-3)
        self.twice = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, bias=False)
        self.register_module("nothing", None)
        self.branches = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1)})
        self.act, self.drop = nn.GELU(), nn.Dropout(0.5)

    def forward(self, x):
        x = self.stem(x)
        assert self.nothing is None  # as `downsample` in many residual networks
        x = x + self.twice(self.act(self.norm(x)))
        x = x + self.twice(self.act(self.plain_norm(x)))
        return self.branches["up"](self.drop(x))


def foreign_experts(count=3):
    return [randomise(Foreign(), k).double() for k in range(count)]


@pytest.mark.parametrize("make, channels", [(experts, 1), (foreign_experts, 2)])
def test_one_hot_routing_is_that_expert_and_uniform_routing_the_average(make, channels):
    models = make()
    routed = router.build_routed(models, router.RoutingSettings(statistics="running", start="uniform"))
    x = torch.randn(3, channels, 12, 16, generator=seeded(), dtype=torch.float64)
    for model, weights in zip(models, torch.eye(3)):
        with router.fixed_routing(routed, weights):
            assert torch.allclose(routed(x), model(x), rtol=0, atol=1e-10)
    average = iopfl.with_state(models[0], iopfl.aggregate([m.state_dict() for m in models], [1, 1, 1]))
    assert torch.allclose(routed(x), average(x), rtol=0, atol=1e-10)
    assert len(routed.routers()) == sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in models[0].modules())


def test_foreign_network_is_adapted():
    models = foreign_experts()
    before = [copy.deepcopy(m.state_dict()) for m in models]
    routed = router.build_routed(models, router.RoutingSettings(passes=1, lr=1e-2), seeded())
    x = torch.randn(6, 2, 12, 12, generator=seeded(), dtype=torch.float64)
    probabilities = router.adapt(routed, x, generator=seeded())
    assert probabilities.shape == (6, 3, 12, 12) and torch.allclose(probabilities.sum(1), torch.ones(()).double())
    assert all(torch.equal(m.state_dict()[e], b[e]) for m, b in zip(models, before) for e in b)
    assert torch.equal(router.predict(routed, x), router.predict(routed, x))  # all dropout is off


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_batchnorm_statistics_running_interpolated_and_batch(share):
    norms = [randomise(nn.Sequential(nn.BatchNorm2d(3)), k) for k in range(2)]
    x = torch.randn(4, 3, 5, 5, generator=seeded()) * 2 + 1
    last = norms[-1][0]
    for mix in (True, False):  # no convolution before it: the last expert's, mixed or not
        routed = router.build_routed(norms, router.RoutingSettings(statistics="batch", share=share,
                                                                    mix_batchnorm=mix))
        mean = (1 - share) * last.running_mean + share * x.mean((0, 2, 3))
        var = (1 - share) * last.running_var + share * x.var((0, 2, 3), correction=0)
        assert torch.allclose(routed(x), F.batch_norm(x, mean, var, last.weight, last.bias), atol=1e-5)


def test_sigmoid_starts_near_half_the_experts_and_uniform_start_sums_to_one():
    x = images()
    for settings, total in ((router.AUTHORS, 1.5), (router.RoutingSettings(activation="sigmoid", start="uniform"), 1.0),
                            (router.RoutingSettings(start="uniform"), 1.0)):
        _, weights = router.mean_routing(router.build_routed(experts(), settings, seeded()), x)
        assert weights.shape == (2 * 5 + 2 + 1, 3)
        assert torch.allclose(weights.sum(1), torch.tensor(total).double(), atol=0.5 if total == 1.5 else 1e-6)


@pytest.mark.parametrize("settings", [router.RoutingSettings(start="random"), router.AUTHORS])
def test_permuting_a_batch_permutes_the_output(settings):
    routed = router.build_routed(experts(), settings, seeded())
    x, order = images(5), torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(routed(x)[order], routed(x[order]), rtol=0, atol=1e-10)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(1, 2, 1), nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("models, message", [
    ([], "at least one model"),
    ([nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2))] * 2, r"'1': cannot route GroupNorm"),
    ([nn.Sequential(nn.Linear(3, 3))] * 2, r"'0': cannot route Linear"),
    ([Scaled()] * 2, "cannot route Scaled"),
    ([nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Sequential(nn.Conv2d(1, 2, 5))], r"'0': model 0 has Conv2d.*\(3, 3\)"),
    ([nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())], "model 0 has Sequential"),
])
def test_build_routed_refuses(models, message):
    with pytest.raises(ValueError, match=message):
        router.build_routed(models)


@pytest.mark.parametrize("options, message", [({"activation": "relu"}, "activation must be one of softmax, sigmoid"),
                                              ({"start": "zero"}, "start must be one of"),
                                              ({"statistics": "mine"}, "statistics must be one of running, batch, site"),
                                              ({"share": 2}, r"share must lie in \[0, 1\]")])
def test_settings_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        router.RoutingSettings(**options)


def test_batchnorm_is_mixed_by_normalised_weights():
    """Sigmoid weights do not sum to one; statistics and affine of BatchNorm are averages all the same."""
    models = [randomise(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), seed).double().eval() for seed in range(4)]
    settings = router.RoutingSettings(activation="sigmoid", start="random", statistics="running")
    routed = router.build_routed(models, settings, seeded())
    x = torch.randn(3, 2, 5, 5, generator=seeded(), dtype=torch.float64)
    y = routed(x)
    for n, weights in enumerate(routed.trace.layers["0"]):
        kernel, bias = (sum(w * getattr(m[0], name) for w, m in zip(weights, models)) for name in ("weight", "bias"))
        mean, var, gain, shift = (sum(w / weights.sum() * getattr(m[1], name) for w, m in zip(weights, models))
                                  for name in ("running_mean", "running_var", "weight", "bias"))
        expected = F.batch_norm(F.conv2d(x[n:n + 1], kernel, bias), mean, var, gain, shift)
        assert torch.allclose(y[n:n + 1], expected, atol=1e-10) and abs(weights.sum() - 1) > 0.1


# ---------------------------------------------------------------- objective (M6 to M8)
def test_the_eight_views_differ_and_are_undone():
    x = torch.arange(2 * 3 * 3.0).view(1, 2, 3, 3)
    seen = set()
    for number in range(8):
        views = torch.tensor([number])
        turned = router.view(x, views)
        assert torch.equal(router.view(turned, views, inverse=True), x)
        seen.add(tuple(turned.flatten().tolist()))
    rotations = {tuple(torch.rot90(y, k, (2, 3)).flatten().tolist()) for y in (x, x.flip(3)) for k in range(4)}
    assert seen == rotations and len(seen) == 8
    wide = torch.randn(50, 1, 2, 5)
    views = router.draw_views(wide, seeded())
    assert views.max() == 3 and torch.equal(router.view(router.view(wide, views), views, inverse=True), wide)
    assert router.draw_views(torch.zeros(99, 1, 4, 4), seeded()).unique().tolist() == list(range(8))


def test_consistency_of_equivariant_and_other_maps():
    p, views = torch.rand(8, 2, 6, 6, generator=seeded()), torch.arange(8)
    assert router.consistency_loss(p, router.view(p, views), views) == 0
    assert router.consistency_loss(p, router.view(1 - p, views), views) == pytest.approx(((2 * p - 1) ** 2).mean().item())


@pytest.mark.parametrize("radius", [1, 2])
def test_shape_constraint_prices_contour_length(radius):
    p = torch.zeros(1, 2, 12, 12)
    assert router.shape_constraint(p + 0.3, radius) == 0
    p[:, 1, :, 6:] = 0.8  # a straight edge: 2·radius columns see both sides
    p[:, 0] = 1 - p[:, 1]
    assert router.shape_constraint(p, radius).item() == pytest.approx(0.8 * 2 * radius / 12)
    slow = [float(np.ptp((1 - p[0, 0].numpy())[max(r - radius, 0):r + radius + 1, max(c - radius, 0):c + radius + 1]))
            for r in range(12) for c in range(12)]
    assert router.shape_constraint(p, radius).item() == pytest.approx(np.mean(slow))


def test_entropy_of_known_maps():
    uniform, certain = torch.full((2, 3, 4, 4), 1 / 3), torch.zeros(2, 3, 4, 4)
    certain[:, 1] = 1
    assert router.entropy_loss(uniform).item() == pytest.approx(1) and router.entropy_loss(certain).item() == 0
    mixed = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert router.entropy_loss(mixed).item() == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))
    certain.requires_grad_()
    router.entropy_loss(certain).backward()
    assert torch.isfinite(certain.grad).all()


# ---------------------------------------------------------------- adaptation
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("settings", [router.RoutingSettings(passes=2, entropy=0.1), router.AUTHORS])
def test_adapt_moves_routers_and_batchnorm_affine_and_nothing_else(settings, online):
    models = experts()
    before = [copy.deepcopy(m.state_dict()) for m in models]
    routed = router.build_routed(models, settings, seeded())
    start = copy.deepcopy(routed.state_dict())
    x, global_rng = images(6, 16), torch.get_rng_state()
    probabilities = router.adapt(routed, x, generator=seeded(), online=online)
    assert probabilities.shape == (6, 2, 16, 16)
    after = routed.state_dict()
    adaptable = {name for name, _ in routed.named_parameters()}
    moved = {name for name in after if not torch.equal(after[name], start[name]) and ".site_" not in name}
    assert moved == adaptable and len(adaptable) == 4 * 13 + 2 * 10
    assert any(name.startswith("network.encoder.2") and "router" in name for name in moved)  # the deepest level
    assert {id(p) for p in routed.adaptable_parameters()} == {id(p) for p in routed.parameters()}
    assert all(torch.equal(m.state_dict()[e], b[e]) for m, b in zip(models, before) for e in b)
    assert torch.equal(global_rng, torch.get_rng_state())  # all randomness came from the generator

    if not online:
        assert torch.equal(probabilities, router.predict(routed, x))
    routed.reset()
    assert all(torch.equal(routed.state_dict()[name], start[name]) for name in start)
    again = router.adapt(routed, x, generator=seeded(), online=online)
    assert torch.equal(again, probabilities)


def test_online_predicts_each_batch_after_its_own_step_only():
    settings = router.RoutingSettings(batch_size=2, start="uniform", lr=1e-2)
    x = images(6)
    whole = router.adapt(router.build_routed(experts(), settings, seeded()), x, generator=seeded(), online=True)
    first = router.adapt(router.build_routed(experts(), settings, seeded()), x[:2], generator=seeded(), online=True)
    assert torch.allclose(whole[:2], first, rtol=0, atol=1e-12)


def test_adaptation_lowers_its_loss():
    routed = router.build_routed(experts(), router.RoutingSettings(lr=1e-2, passes=20, dropout=0.0, leash=None), seeded())
    x = images(6)

    def mean_loss():
        return np.mean([router.adaptation_loss(routed, x, seeded(s))[0].item() for s in range(10)])

    before = mean_loss()
    router.adapt(routed, x, generator=seeded())
    assert mean_loss() < 0.9 * before


def test_matching_finds_the_expert_whose_statistics_fit():
    models = experts()
    x = images(8, 16)
    twin = copy.deepcopy(models[1]).train()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    for _ in range(12):  # deeper statistics settle once those before them have
        for t, m in zip(twin.modules(), models[1].modules()):
            if isinstance(t, nn.BatchNorm2d):
                m.running_mean.copy_(t.running_mean), m.running_var.copy_(t.running_var)
        with torch.no_grad():
            twin(x)
    routed = router.build_routed(models)
    divergence = router.match_statistics(routed, x)
    assert divergence.argmin() == 1 and divergence[1] < 1e-3 and divergence.min() >= 0
    weights = router.matched_weights(divergence)
    assert weights.sum().item() == pytest.approx(1) and weights.argmax() == 1
    assert torch.allclose(router.matched_weights(torch.ones(4)), torch.full((4,), 0.25))
    assert torch.allclose(router.matched_weights(torch.ones(4), 0.05, 0.5), torch.tensor([1, 1, 1, 3]) / 6)
    a, b = np.exp(-1.0), np.exp(1.0)  # one standard deviation above and below the mean
    expected = torch.tensor([a, b, a, 3 * b], dtype=torch.float32) / (2 * a + 4 * b)
    assert torch.allclose(router.matched_weights(torch.tensor([3.0, 1.0, 3.0, 1.0]), 0.05, 0.5), expected)
    a = np.exp(-0.02 / 0.05)  # differences far below the floor hardly count
    expected = torch.tensor([a, 1.0], dtype=torch.float32) / (1 + a)
    assert torch.allclose(router.matched_weights(torch.tensor([0.02, 0.0]), 0.05), expected)
    assert router.matched_weights(torch.tensor([0.3]), 0.05, 0.5) == 1
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        router.match_statistics(router.build_routed([nn.Conv2d(1, 2, 1).double()]), x)


def test_divergence_by_hand():
    """One BatchNorm after the identity: KL of two Gaussians, per channel, from the textbook."""
    model = nn.Sequential(nn.BatchNorm2d(1))
    model[0].running_mean.fill_(1.0), model[0].running_var.fill_(4.0)
    x = torch.randn(7, 1, 5, 5, generator=seeded()) * 3
    mean, var = x.mean().item(), x.var(correction=0).item()
    expected = np.log(2 / var**0.5) + (var + (mean - 1) ** 2) / 8 - 0.5
    routed = router.build_routed([model.eval()], router.RoutingSettings(start="uniform"))
    assert router.match_statistics(routed, x).item() == pytest.approx(expected, abs=1e-4)


def test_site_statistics_by_hand():
    """One BatchNorm: share = 1 / (1 + (tolerance / KL)⁴); counted over batches as over all images."""
    model = randomise(nn.Sequential(nn.BatchNorm2d(3)), 0).double()
    norm = model[0]
    x = torch.randn(6, 3, 5, 5, generator=seeded(), dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2])[:, None, None]
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    ratio = (var + norm.eps) / (norm.running_var + norm.eps)
    divergence = (((mean - norm.running_mean) ** 2 / (norm.running_var + norm.eps) + ratio - 1 - ratio.log()) / 2).mean()
    for tolerance in (0.0, 0.7 * divergence.item(), 1e6):
        share = 1 / (1 + (tolerance / divergence) ** 4)
        expected = F.batch_norm(x, (1 - share) * norm.running_mean + share * mean,
                                (1 - share) * norm.running_var + share * var, norm.weight, norm.bias)
        settings = router.RoutingSettings(tolerance=tolerance, start="uniform", passes=0, batch_size=4)
        routed = router.build_routed([model], settings)
        assert torch.allclose(routed(x), model(x), atol=1e-10)  # not measured yet: as trained
        assert torch.allclose(router.adapt(routed, x, generator=seeded()), expected.softmax(1), atol=1e-7)
        assert torch.allclose(routed(x), expected, atol=1e-6)
        assert torch.equal(routed(x[:1]), routed(x)[:1])  # no image depends on its neighbours
        for buffer in (routed.network[0].site_mean, routed.network[0].site_square, routed.network[0].site_images):
            buffer.zero_()
        router.measure_site(routed, x[:2])
        router.measure_site(routed, x[2:])
        assert torch.allclose(routed(x), expected, atol=1e-6)


def test_leash_bounds_the_change_of_area():
    """With the shape term alone at a large step size the mask shrinks without a leash, and not with one."""
    def area(leash):
        options = {"consistency": 0.0, "shape": 1.0, "lr": 5e-2, "passes": 15, "dropout": 0.0, "statistics": "running"}
        routed = router.build_routed(experts(), router.RoutingSettings(leash=leash, **options), seeded())
        x, areas = images(6), []
        router.adapt(routed, x, generator=seeded(),
                     after_pass=lambda number: areas.append(router.predict(routed, x)[:, 1].mean().item()))
        assert len(areas) == 16
        return np.array(areas) / areas[0]

    assert np.abs(area(None) - 1).max() > 0.15
    assert np.abs(area(0.02) - 1).max() < 0.05


def test_adaptation_loss_by_hand():
    """The weighted sum of the three terms, with noise and views drawn in their order; d is a share of the short side."""
    settings = router.RoutingSettings(entropy=0.3, consistency=0.7, shape=0.2, radius=0.1, noise=0.4, dropout=0.0)
    models = [randomise(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), k).double()
              for k in range(3)]
    routed = router.build_routed(models, settings, seeded())
    x = torch.randn(4, 1, 24, 40, generator=seeded(), dtype=torch.float64)
    generator = seeded(5)
    views = router.draw_views(x, generator)
    noisy = x + 0.4 * torch.randn(x.shape, generator=generator)
    p, q = routed(x).softmax(dim=1), routed(router.view(noisy, views)).softmax(dim=1)
    expected = (0.3 * router.entropy_loss(p) + 0.7 * router.consistency_loss(p, q, views)
                + 0.2 * router.shape_constraint(p, 2))
    loss, probabilities = router.adaptation_loss(routed, x, seeded(5))
    assert torch.allclose(loss, expected, rtol=1e-6) and torch.equal(probabilities, p) and not probabilities.requires_grad


def test_dropout_keeps_the_mean_and_is_on_while_adapting(monkeypatch):
    settings = router.RoutingSettings(activation="sigmoid", dropout=0.5)
    one = router.Router(3, 2, settings, seeded()).double()
    x = torch.randn(1, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    one.train().generator = seeded(1)
    drawn = one(x.expand(20000, -1, -1, -1)).logit()
    assert torch.allclose(drawn.mean(dim=0), one.eval()(x)[0].logit(), atol=0.01) and drawn.std() > 0.1
    training, loss = [], router.adaptation_loss
    monkeypatch.setattr(router, "adaptation_loss", lambda routed, *more: (
        training.extend(r.training for r in routed.routers()), loss(routed, *more))[1])
    routed = router.build_routed(experts(), None, seeded())
    router.adapt(routed, images(6), generator=seeded())
    assert training and all(training) and not any(r.training for r in routed.routers())


def test_preparation_sets_start_and_share_of_statistics():
    x = images(70)
    for global_share in (0.5, None):
        settings = router.RoutingSettings(passes=0, tolerance=0.3, global_share=global_share)
        routed = router.build_routed(experts(), settings)
        divergence = router.match_statistics(routed, x)
        for other in ({"statistics": "batch"}, {"mix_batchnorm": False}):
            again = router.build_routed(experts(), dataclasses.replace(settings, **other))
            assert torch.equal(router.match_statistics(again, x), divergence)  # each expert as it was trained
        router.adapt(routed, x, generator=seeded())
        weights = router.matched_weights(divergence, settings.match_floor, global_share)
        assert all(torch.allclose(w, weights.to(w), atol=1e-5) for w in routed.trace.layers.values())
        apart = divergence.mean() if global_share is None else divergence[-1]
        share = 1 / (1 + (0.3 / apart) ** 4)
        for norm in routed.norms():
            assert norm.site_share.item() == pytest.approx(share.item(), rel=1e-5) and norm.site_images == 64
        for norm in routed.norms():
            norm.delta_weight.data += 0.3
        with router.fixed_routing(routed, torch.tensor([0.0, 1.0, 0.0])):  # also after the site was measured
            assert torch.allclose(routed(x), experts()[1](x), atol=1e-5)
    # The first layer's inputs do not depend on any statistics: the mean over 64 images spread over the 70.
    kernel = sum(w * m.encoder[0][0].weight for w, m in zip(weights.double(), experts()))
    spread = x[torch.linspace(0, 69, 64).round().long()]
    mean = F.conv2d(spread, kernel, padding=1).mean(dim=(0, 2, 3))
    assert torch.allclose(routed.norms()[0].site_mean, mean, atol=1e-5)


def test_online_in_two_calls_is_online_in_one():
    """Statistics, optimiser and generator go on where they were."""
    x, settings = images(8), router.RoutingSettings(batch_size=2, lr=1e-2)
    one, two = (router.build_routed(experts(), settings, seeded()) for _ in range(2))
    generator = seeded()
    whole = router.adapt(one, x, generator=seeded(), online=True)
    parts = [router.adapt(two, part, generator=generator, online=True) for part in (x[:4], x[4:])]
    assert torch.equal(whole, torch.cat(parts)) and all(norm.site_images == 8 for norm in one.norms())


@pytest.mark.parametrize("change, back", [((0.95, 1), True), ((1.05, 1), True), ((1, 1.05), True), ((1, 0.95), True),
                                          ((1.001, 1), False)])
def test_leash_pulls_half_of_the_way_back(monkeypatch, change, back):
    """When the area of either class has changed by more than the leash, in either direction."""
    models = [randomise(UNet(1, 3, 2, 1), seed).double().eval() for seed in range(3)]
    x = images(2, 8)
    ends = []
    for leash in (0.01, None):
        routed = router.build_routed(models, router.RoutingSettings(dropout=0.0, leash=leash, lr=1e-3), seeded())
        router.prepare(routed, x)
        for value in routed.parameters():
            value.data += 0.1
        at_start = torch.func.functional_call(routed, routed.start, (x,)).softmax(dim=1).detach()
        found = at_start * torch.tensor([1, *change])[:, None, None]
        monkeypatch.setattr(router, "adaptation_loss", lambda routed, images, generator: (
            sum(value.sum() for value in routed.parameters()), found))
        router.step(routed, x, seeded())
        ends.append({name: value.detach().clone() for name, value in routed.named_parameters()})
    for name, free in ends[1].items():
        start = routed.start[name]
        assert torch.allclose(free, start + 0.1 - 1e-3, atol=1e-6)
        assert torch.allclose(ends[0][name], start + 0.5 * (free - start) if back else free, atol=1e-12)


def test_outputs_that_overflow_are_no_masks():
    model = UNet(1, 2, 2, 1, seeded())
    model.head.bias.data[0] = 3e38
    x = torch.ones(2, 1, 8, 8)
    model.head.weight.data[:] = 1e37
    model.decoder[0][4].weight.data[:] = 1e5  # the last BatchNorm: each value is finite, what they give is not
    model.decoder[0][4].bias.data[:] = 1e5
    with pytest.raises(ValueError, match="not every logit is finite"):
        iopfl.predict(model, x)
    with pytest.raises(ValueError, match="not every probability is finite"):
        router.predict(router.build_routed([model.eval()]), x)


def unchanged(routed, state) -> bool:
    return all(torch.equal(value, state[entry]) for entry, value in routed.state_dict().items())


@pytest.mark.parametrize("online", [False, True])
def test_a_step_that_is_not_finite_is_left_out(monkeypatch, online):
    """In value or gradient: nothing moves, neither the optimiser, and a warning says so."""
    x, losses, routed = images(8), [], router.build_routed(experts(), None, seeded())

    def spoilt(*positional, adaptation_loss=router.adaptation_loss):
        loss, probabilities = adaptation_loss(*positional)
        losses.append(copy.deepcopy(routed.state_dict()))
        bad = {1: loss * math.nan, 3: loss + 0 * (loss - loss.detach()).sqrt()}  # 3: only its gradient
        return bad.get(len(losses), loss), probabilities

    monkeypatch.setattr(router, "adaptation_loss", spoilt)
    options = {"generator": seeded(), "online": online}
    with pytest.warns(UserWarning, match="the step is left out"):
        probabilities = torch.cat([router.adapt(routed, x, **options), *(router.adapt(routed, x, **options) for _ in range(online))])
    assert probabilities.isfinite().all() and len(losses) == (4 if online else 6)
    moved = [any(not torch.equal(value, after[name]) for name, value in before.items() if "router" in name)
             for before, after in zip(losses, losses[1:])]
    assert moved[:4] == [False, True, False, True][:len(moved)]


def test_images_that_are_not_finite_change_nothing():
    routed = router.build_routed(experts(), None, seeded())
    router.adapt(routed, images(4), generator=seeded())
    before = copy.deepcopy(routed.state_dict())
    for value in (math.nan, math.inf):
        x = images(9)
        x[7, 0, 3, 3] = value
        for online in (False, True):
            with pytest.raises(ValueError, match="image 7 holds values that are not finite"):
                router.adapt(routed, x, generator=seeded(), online=online)
            assert unchanged(routed, before)
    with pytest.raises(ValueError, match="no images"):
        router.adapt(routed, images(9)[:0], generator=seeded())
    models = experts()
    models[1].head.bias.data[0] = math.inf
    with pytest.raises(ValueError, match="model 1, 'head.bias': not every value is finite"):
        router.build_routed(models)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("settings", [router.RoutingSettings(entropy=0.1), router.AUTHORS])
def test_adapting_to_one_image_to_nothing_but_background_and_to_a_changing_stream(settings, online):
    """Finite throughout; and whatever happened, `reset` brings the start back bit for bit."""
    background = experts()
    for model in background:
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([60.0, -60.0]))
    constant = torch.full((3, 1, 12, 12), 2.0, dtype=torch.float64)
    stream = torch.cat([images(6), 50 * images(5, seed=3) - 200, 0 * images(2)])
    for models, x in ((experts(), images(1)), (background, images(5)), (experts(), constant), (experts(), stream)):
        routed = router.build_routed(models, settings, seeded())
        before = copy.deepcopy(routed.state_dict())
        probabilities = router.adapt(routed, x, generator=seeded(), online=online)
        assert probabilities.shape == (len(x), 2, 12, 12) and probabilities.isfinite().all()
        assert all(value.isfinite().all() for value in routed.state_dict().values())
        assert models is not background or (probabilities.argmax(dim=1) == 0).all()
        assert not unchanged(routed, before)
        routed.reset()
        assert unchanged(routed, before)
        assert torch.equal(router.adapt(routed, x, generator=seeded(), online=online), probabilities)


def test_starts_best_and_site_routing():
    x = images(5)
    routed = router.build_routed(experts(), router.RoutingSettings(start="best", statistics="running", passes=0))
    best = router.match_statistics(routed, x).argmin()
    expected = experts()[best](x).softmax(dim=1)
    assert torch.allclose(router.adapt(routed, x, generator=seeded()), expected, atol=1e-3)
    settings = router.RoutingSettings(start="random", per_sample=False)
    routed = router.build_routed(experts(), settings, seeded())
    routed(x)
    for weights in routed.trace.layers.values():
        assert torch.equal(weights, weights[:1].expand(5, -1))
    routed = router.build_routed(experts(), dataclasses.replace(settings, per_sample=True), seeded())
    routed(x)
    assert not any(torch.equal(weights, weights[:1].expand(5, -1)) for weights in routed.trace.layers.values())


# ---------------------------------------------------------------- data: simulated hospitals and folders
def write_site(root, name, count, size=32, grey=False, values=(0, 1)):
    """`count` random PNGs with masks of `values` below root/name; the generator's seed comes from the name."""
    rng = np.random.default_rng(list(str(name).encode()))
    for folder in ("images", "masks"):
        (Path(root) / name / folder).mkdir(parents=True)
    for number in range(count):
        image = rng.integers(0, 256, (size, size) if grey else (size, size, 3), dtype=np.uint8)
        mask = rng.choice(values, (size, size)).astype(np.uint8)
        Image.fromarray(image).save(Path(root) / name / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(Path(root) / name / "masks" / f"{number:02d}.png")
    return Path(root) / name


def splits_of(site):
    return site.train, site.validation, site.test


def same_bytes(a, b):
    """Whether two sites hold the same images, masks and cases, split by split."""
    return a.name == b.name and a.spacing == b.spacing and all(
        torch.equal(s.images, t.images) and torch.equal(s.masks, t.masks) and s.cases == t.cases
        for s, t in zip(splits_of(a), splits_of(b)))


@pytest.mark.parametrize("task, channels, classes", [("prostate", 1, [0, 1]), ("fundus", 3, [0, 1, 2])])
def test_simulated_images_and_masks(task, channels, classes):
    loaded = data.simulate_sites(task, 0, size=32, images_per_site=8)
    sites = loaded.sites
    assert [site.name for site in sites] == list(data.HOSPITALS[task]) and loaded.channels == channels
    assert loaded.classes == len(classes) and loaded.unit == {"prostate": "mm", "fundus": "px"}[task]
    for site in sites:
        assert [len(split.cases) for split in splits_of(site)] == [5, 1, 2]
        split = site.everything
        assert split.images.shape == (8, channels, 32, 32) and split.images.dtype == torch.float32
        assert split.masks.shape == (8, 32, 32) and split.masks.dtype == torch.uint8
        assert split.cases == [f"{site.name}-{number:03d}" for number in range(8)]
        for image, mask in zip(split.images, split.masks):
            assert image.mean().item() == pytest.approx(0, abs=1e-4)
            assert image.var(unbiased=False).item() == pytest.approx(1, abs=1e-3)
            assert mask.unique().tolist() == classes
        mm = 150 / 32 if task == "prostate" else 1
        assert site.spacing == (mm, mm)


def test_simulated_cup_lies_inside_disc():
    """The drawn cup never touches the background, and the disc has more pixels than the cup."""
    structures = data.STRUCTURES["fundus"]
    for site in data.simulate_sites("fundus", 0, size=96, images_per_site=6).sites:
        for mask in site.everything.masks.numpy():
            disc, cup = (np.isin(mask, structures[name]) for name in ("disc", "cup"))
            assert disc[cup].all() and 0 < cup.sum() < disc.sum()
            padded = np.pad(cup, 1)  # every pixel next to the cup, as well, lies in the disc
            around = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
            assert disc[around].mean() > 0.9


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_simulation_depends_on_its_arguments_alone(task):
    def draw(seed, sites):
        return data.simulate_sites(task, seed, size=24, images_per_site=4, sites=sites).sites

    six, again, eight, three, other = draw(3, 6), draw(3, 6), draw(3, 8), draw(3, 3), draw(4, 6)
    for site, repeated, extended, changed in zip(six, again, eight, other):
        assert same_bytes(site, repeated) and same_bytes(site, extended)
        assert not torch.equal(site.train.images, changed.train.images)
    assert len(eight) == 8 and len(three) == 3
    assert all(same_bytes(a, b) for a, b in zip(three, six))
    assert len({site.train.images.numpy().tobytes() for site in eight}) == 8


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_extra_hospitals_lie_in_the_range_of_the_six(task):
    six, nine = data.hospital_table(task), data.hospital_table(task, 9)
    assert list(nine)[:6] == list(six) and all(nine[name] == six[name] for name in six)
    extra = [nine[name] for name in nine if name not in six]
    assert len(extra) == 3 and len({dataclasses.astuple(hospital) for hospital in extra}) == 3
    for field in dataclasses.fields(extra[0]):
        known = [getattr(hospital, field.name) for hospital in six.values()]
        for hospital in extra:
            assert min(known) <= getattr(hospital, field.name) <= max(known), field.name


# ---------------------------------------------------------------- a folder of real images
def test_folder_channels(tmp_path):
    """Grey everywhere gives one channel; one RGB image among them gives three, grey ones repeated."""
    for name in ("a", "b"):
        write_site(tmp_path, name, 4, grey=True)
    loaded = data.load_folder(tmp_path, 32)
    sites, channels, classes = loaded.sites, loaded.channels, loaded.classes
    assert (channels, classes) == (1, 2) and [site.name for site in sites] == ["a", "b"]
    assert sites[0].everything.images.shape == (4, 1, 32, 32)
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "b" / "images" / "02.png")
    loaded = data.load_folder(tmp_path, 32)
    sites, channels, classes = loaded.sites, loaded.channels, loaded.classes
    images = [site.everything.images for site in sites]
    assert channels == 3 and all(i.shape == (4, 3, 32, 32) and i.dtype == torch.float32 for i in images)
    assert torch.equal(images[0][:, 0], images[0][:, 2])
    wanted = ((colour - colour.mean()) / colour.std()).transpose(2, 0, 1)
    assert np.allclose(images[1][2].numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("values", [[0, 128, 255], [255, 0, 128], [128, 255, 0]])
def test_mask_values_map_to_their_position(tmp_path, values):
    folder = write_site(tmp_path, "a", 5, values=(0, 128, 255))
    loaded = data.load_folder(tmp_path, 32, values)
    sites, classes = loaded.sites, loaded.classes
    split = sites[0].everything
    assert classes == 3 and split.masks.dtype == torch.uint8
    for case, mask in zip(split.cases, split.masks):
        stored = np.asarray(Image.open(folder / "masks" / Path(case).name))
        assert np.array_equal(np.array(values)[mask.numpy()], stored)


@pytest.mark.parametrize("size", [16, 20, 45])
def test_resizing_keeps_class_indices(tmp_path, size):
    """Masks of classes 0 and 2 (class 1 in one corner alone) get no value between when resized."""
    folder = write_site(tmp_path, "a", 4, values=(0, 2))
    mask = np.zeros((32, 32), np.uint8)
    mask[:16, :16] = 1
    Image.fromarray(mask).save(folder / "masks" / "00.png")
    loaded = data.load_folder(tmp_path, size)
    sites, classes = loaded.sites, loaded.classes
    masks = sites[0].everything.masks
    assert classes == 3 and masks.shape == (4, size, size)
    assert masks[0].unique().tolist() == [0, 1]
    assert all(m.unique().tolist() == [0, 2] for m in masks[1:])
    if size == 16:
        assert masks[0].sum() == 64 and masks[0][:8, :8].all()


def test_16_bit_grey_is_not_clipped(tmp_path):
    """Two images that differ only in values above 255 load as different; all values count."""
    folder = write_site(tmp_path, "a", 4, grey=True)
    low = np.random.default_rng(1).integers(256, 60000, (32, 32)).astype(np.uint16)
    high = low.copy()
    high[:16] = 65535
    for number, pixels in enumerate((low, high)):
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
        assert np.array_equal(np.asarray(Image.open(folder / "images" / f"{number:02d}.png")), pixels)
    loaded = data.load_folder(tmp_path, 32)
    sites, channels = loaded.sites, loaded.channels
    images = sites[0].everything.images.numpy()
    assert channels == 1 and not np.allclose(images[0], images[1])
    for image, pixels in zip(images, (low, high)):
        assert np.allclose(image[0], (pixels - pixels.mean()) / pixels.std(), atol=1e-3)


def test_given_split_is_kept(tmp_path):
    counts = {"train": 3, "val": 1, "test": 2}
    for split, count in counts.items():
        write_site(tmp_path / "a", split, count)
    write_site(tmp_path, "b", 8)
    a, b = data.load_folder(tmp_path, 32).sites
    for split, (folder, count) in zip(splits_of(a), counts.items()):
        assert split.cases == [f"{folder}/images/{number:02d}.png" for number in range(count)]
        for case, mask in zip(split.cases, split.masks):
            stored = Image.open(tmp_path / "a" / case.replace("images", "masks"))
            assert np.array_equal(mask.numpy(), np.asarray(stored))
    assert [len(split.cases) for split in splits_of(b)] == [5, 1, 2]


def test_large_values_do_not_overflow():
    """Their squares do not fit into float32."""
    image = np.array([[0, 1e30], [2e30, 1e30]], dtype=np.float32)
    assert data.normalise(image) == pytest.approx(data.normalise(image / 1e30), abs=1e-6)
    assert data.normalise(np.full((3, 3), 7, np.float32)).tolist() == [[0] * 3] * 3


def test_drawn_split(tmp_path):
    """The same seed gives the same split, another seed another; the parts are disjoint and hold every case."""
    write_site(tmp_path, "a", 12)
    write_site(tmp_path, "b", 12)
    first, again, other = (data.load_folder(tmp_path, 32, seed=seed).sites for seed in (0, 0, 1))
    for site, repeated, changed in zip(first, again, other):
        assert same_bytes(site, repeated)
        assert [split.cases for split in splits_of(site)] != [split.cases for split in splits_of(changed)]
        cases = [case for split in splits_of(site) for case in split.cases]
        assert len(cases) == len(set(cases)) == 12
        assert sorted(cases) == [f"images/{number:02d}.png" for number in range(12)]
    assert [split.cases for split in splits_of(first[0])] != [split.cases for split in splits_of(first[1])]


def test_everything_is_sorted_and_matches(tmp_path):
    folder = write_site(tmp_path, "a", 9, grey=True)
    split = data.load_folder(tmp_path, 32, seed=5).sites[0].everything
    assert split.cases == [f"images/{number:02d}.png" for number in range(9)]
    assert len(split.images) == len(split.masks) == 9
    for case, image, mask in zip(split.cases, split.images, split.masks):
        pixels = np.asarray(Image.open(folder / case), dtype=np.float64)
        assert np.allclose(image[0].numpy(), (pixels - pixels.mean()) / pixels.std(), atol=1e-4)
        assert np.array_equal(mask.numpy(), np.asarray(Image.open(folder / "masks" / Path(case).name)))


def _mask(root, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(root / "a" / "masks" / "01.png")


def _no_folder(root):
    for file in (root / "a" / "masks").iterdir():
        file.unlink()
    (root / "a" / "masks").rmdir()


def _too_few(root):
    for number in (2, 3, 4):
        (root / "a" / "images" / f"0{number}.png").unlink()


def _cut(file):
    file.write_bytes(file.read_bytes()[:200])


def _constant(root):
    for site in ("a", "b"):
        for file in (root / site / "masks").iterdir():
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(file)


def _instead(file, make) -> None:
    file.unlink()
    make(file)


def _bomb(file, pixels=10_000) -> None:
    Image.new("1", (pixels, pixels)).save(file)


def _huge_header(file) -> None:
    """A sound PNG header of 100,000 × 100,000 pixels; a checksum belongs to it."""
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


def _floats(file, value) -> None:
    """An image or mask of floating point values in the place of a PNG."""
    values = np.zeros((32, 32), np.float32)
    values[3, 4] = value
    Image.fromarray(values).save(file.with_suffix(".tif"))
    file.unlink()


SITE_ERRORS = {  # what is spoilt in a root of two sound sites, the mask values given, parts of the message
    "missing mask": (lambda r: (r / "a/masks/01.png").unlink(), None,
                     ["{r}/a/images/01.png", "{r}/a/masks/01.png", "1 of 5 images"]),
    "missing masks folder": (_no_folder, None, ["'a'", "{r}/a/masks"]),
    "sizes differ": (lambda r: _mask(r, np.eye(20, 24)), None, ["'a'", "{r}/a/images/01.png", "32×32", "20×24"]),
    "class index out of range": (lambda r: _mask(r, 255 * np.eye(32)), None,
                                 ["{r}/a/masks/01.png", "255", "0 … 2", "--mask-values 0 1 255"]),
    "unknown grey value": (lambda r: _mask(r, 7 * np.eye(32)), [0, 1],
                           ["{r}/a/masks/01.png", "grey value 7", "--mask-values 0 1"]),
    "corrupt image": (lambda r: _cut(r / "a/images/01.png"), None, ["{r}/a/images/01.png", "not a readable image"]),
    "no image at all": (lambda r: (r / "a/images/01.png").write_text("text"), None,
                        ["{r}/a/images/01.png", "not a readable image"]),
    "corrupt mask": (lambda r: _cut(r / "a/masks/01.png"), None, ["{r}/a/masks/01.png", "not a readable image"]),
    "RGB mask": (lambda r: _mask(r, np.eye(32)[:, :, None] * [1, 0, 1]), None, ["{r}/a/masks/01.png", "one channel", "RGB"]),
    "too few images": (_too_few, None, ["'a'", "2 images", "at least 4"]),
    "constant masks": (_constant, None, ["{r}", "every mask pixel is 0", "two classes"]),
    "empty file": (lambda r: (r / "a/images/01.png").write_bytes(b""), None, ["{r}/a/images/01.png", "not a readable image"]),
    "a pipe": (lambda r: _instead(r / "a/images/01.png", os.mkfifo), None, ["{r}/a/images/01.png", "not a file"]),
    "a folder": (lambda r: _instead(r / "a/images/01.png", Path.mkdir), None, ["{r}/a/images/01.png", "not a file"]),
    "a loop of links": (lambda r: _instead(r / "a/images/01.png", lambda f: f.symlink_to(f.name)), None,
                        ["{r}/a/images/01.png", "not a readable image"]),
    "a loop of links for a mask": (lambda r: _instead(r / "a/masks/01.png", lambda f: f.symlink_to(f.name)), None,
                                   ["{r}/a/masks/01.png", "not a readable image"]),
    "bomb": (lambda r: _bomb(r / "a/images/01.png"), None, ["{r}/a/images/01.png", "decompression bomb"]),
    "larger bomb": (lambda r: _huge_header(r / "a/images/01.png"), None, ["{r}/a/images/01.png", "decompression bomb"]),
    "NaN": (lambda r: _floats(r / "a/images/01.png", math.nan), None, ["{r}/a/images/01.tif", "not finite"]),
    "infinity": (lambda r: _floats(r / "a/images/01.png", math.inf), None, ["{r}/a/images/01.tif", "not finite"]),
    "a fraction in a mask": (lambda r: _floats(r / "a/masks/01.png", 0.5), None, ["{r}/a/masks/01.tif", "whole numbers"]),
    "NaN in a mask": (lambda r: _floats(r / "a/masks/01.png", math.nan), None, ["{r}/a/masks/01.tif", "whole numbers"]),
    "a negative class": (lambda r: _floats(r / "a/masks/01.png", -1), None, ["{r}/a/masks/01.tif", "from 0"]),
    "a photograph for a mask": (lambda r: _mask(r, np.arange(1024).reshape(32, 32) % 256), None,
                                ["{r}", "256 different values", "--mask-values"]),
    "a name that cannot be printed": (lambda r: (r / "a").rename(r / "a\nb"), None, ["{r}", "'a\\nb'", "rename it"]),
}


@pytest.mark.parametrize("spoil, mask_values, parts", SITE_ERRORS.values(), ids=SITE_ERRORS)
def test_folder_errors_name_the_trouble(tmp_path, spoil, mask_values, parts):
    root = tmp_path / "root"
    for name in ("a", "b"):
        write_site(root, name, 5)
    data.load_folder(root, 32, mask_values)  # sound before
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.load_folder(root, 32, mask_values)
    for part in parts:
        assert part.format(r=root) in str(caught.value)


def test_folder_errors_without_sites(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder") as caught:
        data.load_folder(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="no sites found, only other/; known layouts") as caught:
        data.load_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "<site>/{images,masks}" in str(caught.value)


def test_grey_masks_without_mask_values_suggest_them(tmp_path):
    write_site(tmp_path, "a", 4, values=(0, 255))
    with pytest.raises(ValueError, match="class index 255 is out of range.*--mask-values 0 255"):
        data.load_folder(tmp_path, 32)
    loaded = data.load_folder(tmp_path, 32, [0, 255])
    sites, classes = loaded.sites, loaded.classes
    assert classes == 2 and sites[0].train.masks.unique().tolist() == [0, 1]


def test_given_split_errors(tmp_path):
    for split in ("train", "val", "test"):
        write_site(tmp_path / "a", split, 1)
    (tmp_path / "a" / "val" / "images" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"site 'a': no images in .*val/images"):
        data.load_folder(tmp_path, 32)
    (tmp_path / "a" / "val" / "images").rmdir()
    with pytest.raises(FileNotFoundError, match=r"site 'a': no folder .*val/images"):
        data.load_folder(tmp_path, 32)
    shutil.rmtree(tmp_path / "a" / "val")
    with pytest.raises(ValueError, match="site 'a': 1 image to train with and none to validate"):
        data.load_folder(tmp_path, 32)
    shutil.rmtree(tmp_path / "a" / "test")
    with pytest.raises(FileNotFoundError, match="site 'a': no images for test, only for train"):
        data.load_folder(tmp_path, 32)
    (tmp_path / "a" / "train").rename(tmp_path / "b")
    write_site(tmp_path / "b", "train", 3)
    with pytest.raises(ValueError, match="site 'b': images lie in the folder itself and in train"):
        data.load_folder(tmp_path, 32)


# ---------------------------------------------------------------- data sets as they are downloaded
def affine(codes: str, spacing=(0.5, 0.6, 3.0), tilt: float = 0.0) -> np.ndarray:
    """An affine whose axes run towards the letters of `codes`, with voxels of `spacing` mm, turned by `tilt` about x."""
    columns = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    turn = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    result = np.eye(4)
    result[:3, :3] = turn @ np.array([columns[code] for code in codes]).T * spacing
    result[:3, 3] = 5, -7, 11
    return result


def write_nifti(path, values, matrix) -> None:
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, matrix), path)


def write_volumes(root, sites: dict[str, int], shape=(24, 20, 5), seed=0) -> None:
    """Volumes (x, y, z) whose bright ball is the prostate, with label 2 in its upper half; the outer slices are empty.
    At the shape (384, 384, 20) and 116 cases this is the public prostate set in size."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    for name, count in sites.items():
        for number in range(count):
            distance = np.sqrt((x - rng.uniform(-0.2, 0.2)) ** 2 + y**2 + 0.4 * z**2)
            mask = (distance < 0.55) * (1 + (y > 0)) * (np.abs(z) < 0.95)
            image = 300 * (mask > 0) + rng.normal(400, 40, shape)
            write_nifti(root / name / f"Case{number:02d}.nii.gz", image.astype(np.int16), affine("LPS"))
            ending = "_segmentation" if number % 2 else "_Segmentation"
            write_nifti(root / name / f"Case{number:02d}{ending}.nii.gz", mask.astype(np.uint8), affine("LPS"))


def test_volumes_load_as_stacks(tmp_path):
    write_volumes(tmp_path, {"ISBI": 4, "UCL": 8})
    loaded = data.load_folder(tmp_path, 16)
    assert [site.name for site in loaded.sites] == ["RUNMC", "UCL"] and loaded.unit == "mm"
    assert loaded.channels == 3 and loaded.structures == {"prostate": (1,)}
    site = loaded.sites[1]
    split, slices = site.everything, site.everything.images.slices
    assert slices.shape == (40, 16, 16) and slices.dtype == torch.float16 and split.masks[:].dtype == torch.uint8
    for case in range(8):
        volume = slices[5 * case:5 * case + 5].float()
        assert volume.mean().item() == pytest.approx(0, abs=2e-3) and volume.std().item() == pytest.approx(1, abs=2e-2)
        for number in range(5):  # the centre is the labelled slice; neighbours stay within the volume
            stack = split.images[5 * case + number]
            for plane, other in zip(stack, (max(number - 1, 0), number, min(number + 1, 4))):
                assert torch.equal(plane, volume[other])
            assert torch.equal(split.shown(5 * case + number)[0], volume[number])
            mask = split.masks[5 * case + number] > 0
            assert mask.any() == (0 < number < 4)
            if mask.any():  # the prostate is the bright part
                assert volume[number][mask].mean() > volume[number][~mask].mean() + 1
        # (z, y, x) spacing, after 20 rows and 24 columns have become 16
        assert site.spacing[f"Case{case:02d}"] == pytest.approx((3.0, 0.6 * 20 / 16, 0.5 * 24 / 16))
    cases = [set(part.cases) for part in splits_of(site)]
    assert [len(c) for c in cases] == [5, 1, 2] and set.union(*cases) == {f"Case{n:02d}" for n in range(8)}
    for part, numbers in zip(splits_of(site), site.parts):
        assert len(part.cases) == len(part.images) == len(part.masks) == 5 * len(set(part.cases))
        assert torch.equal(part.masks[:], split.masks[numbers]) and part.cases == [split.cases[n] for n in numbers]
        assert part.images.slices is slices  # kept once
        batch = part.images[torch.tensor([1, 3])]
        assert batch.shape == (2, 3, 16, 16) and batch.dtype == torch.float32
        whole = torch.cat(list(part.images.split(3)))
        assert torch.equal(whole[[1, 3]], batch) and len(whole) == len(part.images)
    joined = torch.cat([site.train.images for site in loaded.sites])
    assert torch.equal(joined[:], torch.cat([site.train.images[:] for site in loaded.sites]))
    trimmed = data.load_folder(tmp_path, 16, skip_empty=True).sites[1]
    assert [len(part.masks) for part in splits_of(trimmed)] == [15, 5, 10]
    assert trimmed.train.masks[:].flatten(1).any(dim=1).all()


def test_metrics_of_volumes_are_per_case_in_mm(tmp_path):
    """Two cases with voxels of different size, against the metrics of each as a volume."""
    spacing = {"a": (3.0, 1.0, 0.5), "b": (2.0, 0.7, 0.7)}
    rng = np.random.default_rng(0)
    truth, found = (torch.from_numpy(rng.random((7, 8, 9)) > 0.6) for _ in range(2))
    cases = ["a"] * 4 + ["b"] * 3
    row, = iopfl.evaluate(found.byte(), truth.byte(), cases, {"x": (1,)}, spacing)
    parts = [(found[:4].numpy(), truth[:4].numpy(), spacing["a"]), (found[4:].numpy(), truth[4:].numpy(), spacing["b"])]
    assert row["cases"] == 2
    assert row["dice"] == pytest.approx(np.mean([iopfl.dice(p, t) for p, t, _ in parts]))
    assert row["hd95"] == pytest.approx(np.mean([iopfl.hd95(p, t, s) for p, t, s in parts]))
    assert row["assd"] == pytest.approx(np.mean([iopfl.assd(p, t, s) for p, t, s in parts]))


@pytest.mark.parametrize("codes, tilt", [("LPS", 0.0), ("RAS", 0.0), ("LAI", 0.0), ("SPL", 0.0), ("PSR", 0.0),
                                         ("RAI", 0.3), ("LPS", -0.4)])
def test_orientation_comes_from_the_header(tmp_path, codes, tilt):
    """One body stored along different axes is read as the same volume, and a mask goes back to where it was."""
    nibabel = pytest.importorskip("nibabel")
    body = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)  # slice, row, column: towards S, P, L
    steps = {"S": 3.0, "P": 0.6, "L": 0.5}
    same_axis = {"S": "S", "I": "S", "P": "P", "A": "P", "L": "L", "R": "L"}
    stored = body.transpose(["SPL".index(same_axis[code]) for code in codes])
    stored = stored[tuple(slice(None, None, -1) if code in "IAR" else slice(None) for code in codes)]
    matrix = affine(codes, [steps[same_axis[code]] for code in codes], tilt)
    write_nifti(tmp_path / "v.nii.gz", np.ascontiguousarray(stored), matrix)
    values, spacing = data.read_volume(tmp_path / "v.nii.gz")
    assert np.array_equal(values, body) and spacing == pytest.approx((3.0, 0.6, 0.5), abs=1e-5)
    data.write_volume(tmp_path / "m.nii.gz", body > 0.5, tmp_path / "v.nii.gz")
    written = nibabel.load(tmp_path / "m.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), stored > 0.5)
    assert np.allclose(written.affine, matrix, atol=1e-5) and written.get_data_dtype() == np.uint8


def _shorter(file):
    file.write_bytes(file.read_bytes()[:-200])


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


VOLUME_ERRORS = {
    "segmentation without volume": (lambda r: (r / "UCL/Case01.nii.gz").unlink(), ["UCL/Case01_segmentation.nii.gz", "without its volume"]),
    "volume without segmentation": (lambda r: (r / "UCL/Case01_segmentation.nii.gz").unlink(), ["Case01.nii.gz has no mask", "UCL/Case01_segmentation.nii.gz"]),
    "shapes differ": (lambda r: write_nifti(r / "UCL/Case01_segmentation.nii.gz", np.ones((24, 20, 4), np.uint8), affine("LPS")),
                      ["UCL", "Case01.nii.gz is 5×20×24", "4×20×24"]),
    "four dimensions": (lambda r: write_nifti(r / "UCL/Case01.nii.gz", np.ones((24, 20, 5, 2), np.int16), affine("LPS")),
                        ["Case01.nii.gz", "three dimensions", "24×20×5×2"]),
    "cut short": (lambda r: _shorter(r / "UCL/Case01.nii.gz"), ["Case01.nii.gz", "not a readable NIfTI file"]),
    "no NIfTI": (lambda r: (r / "UCL/Case01.nii.gz").write_text("text"), ["Case01.nii.gz", "not a readable NIfTI file"]),
    "case in two lists": (lambda r: [(r / f"UCL/{p}.txt").write_text("Case00\nCase01\nCase02\nCase03") for p in ("train", "test")],
                          ["test.txt", "case00", "two lists"]),
    "two endings": (lambda r: shutil.copy(r / "UCL/Case01.nii.gz", r / "UCL/Case01.nii"), ["Case01.nii", "differ only in their endings"]),
    "voxels differ": (lambda r: write_nifti(r / "UCL/Case01_segmentation.nii.gz", np.ones((24, 20, 5), np.uint8), affine("LPS", (1, 1, 3))),
                      ["UCL", "3.0×0.6×0.5 mm", "3.0×1.0×1.0 mm"]),
    "not finite": (lambda r: write_nifti(r / "UCL/Case01.nii.gz", np.full((24, 20, 5), np.nan, np.float32), affine("LPS")),
                   ["Case01.nii.gz", "not finite"]),
    "header broken": (lambda r: _break_header(r / "UCL/Case01.nii.gz", 70, 77), ["Case01.nii.gz", "not a readable NIfTI file"]),
    "header to be repaired": (lambda r: _break_header(r / "UCL/Case01.nii.gz", 254, 99), ["Case01.nii.gz", "sform_code"]),
    "unknown case": (lambda r: (r / "UCL/train.txt").write_text("Case00\nCase77\n"), ["train.txt", "no case case77"]),
    "one folder twice": (lambda r: shutil.copytree(r / "BMC", r / "ISBI_1.5"), ["two folders", "BMC"]),
    "mixed": (lambda r: write_site(r, "photographs", 4), ["different layouts", "known layouts"]),
    "no direction": (lambda r: _no_direction(r / "UCL/Case01.nii.gz"), ["Case01.nii.gz", "no direction"]),
}


@pytest.mark.parametrize("spoil, parts", VOLUME_ERRORS.values(), ids=VOLUME_ERRORS)
def test_volume_errors_name_the_trouble(tmp_path, spoil, parts):
    write_volumes(tmp_path, {"BMC": 4, "UCL": 4})
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.load_folder(tmp_path, 16)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_one_bright_voxel_is_clipped(tmp_path):
    pytest.importorskip("nibabel")
    values = np.random.default_rng(0).normal(100, 10, (24, 20, 5)).astype(np.float32)
    spike = values.copy()
    spike[3, 4, 2] = 1e6
    volumes = []
    for name, voxels in (("a", values), ("b", spike)):
        write_nifti(tmp_path / f"{name}.nii.gz", voxels, affine("LPS"))
        volumes.append(data.normalise_volume(data.read_volume(tmp_path / f"{name}.nii.gz")[0], 24).astype(np.float64))
    assert np.abs(volumes[0] - volumes[1]).mean() < 0.01
    low, high = np.percentile(values, [0.5, 99.5])
    wanted = np.clip(values.transpose(2, 1, 0)[:, :, :], low, high)
    wanted = data.resize(wanted, 24)
    assert np.allclose(volumes[0], (wanted - wanted.mean()) / wanted.std(), atol=0.01)


def test_no_slice_to_train_with(tmp_path):
    write_volumes(tmp_path, {"A": 4})
    for file in (tmp_path / "A").glob("*egmentation*"):
        write_nifti(file, np.zeros((24, 20, 5), np.uint8), affine("LPS"))
    with pytest.raises(ValueError, match="site 'A': no slice to train with holds prostate; leave out --skip-empty"):
        data.load_folder(tmp_path, 16, skip_empty=True)


def test_volumes_without_nibabel(tmp_path, monkeypatch, capsys):
    write_volumes(tmp_path, {"BMC": 4})
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert train.main(["--root", str(tmp_path), "--list", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "pip install nibabel" in error and error.count("\n") == 1


def test_case_lists_give_the_split(tmp_path):
    write_volumes(tmp_path, {"UCL": 6})
    for part, cases in {"train": "Case03\nCase00.nii.gz\n", "val": "Case01\n\n", "test": "case02\nCase05\n"}.items():
        (tmp_path / "UCL" / f"{part}.txt").write_text(cases)
    site, = data.load_folder(tmp_path, 16).sites
    cases = [list(dict.fromkeys(part.cases)) for part in splits_of(site)]
    assert cases == [["Case03", "Case00"], ["Case01"], ["Case02", "Case05"]]


@pytest.mark.parametrize("slices", [1, 2])
def test_volumes_of_few_slices(tmp_path, slices):
    write_volumes(tmp_path, {"A": 4, "B": 4}, shape=(24, 20, slices))
    loaded = data.load_folder(tmp_path, 16)
    stack = loaded.sites[0].everything.images[0]
    assert stack.shape == (3, 16, 16) and torch.equal(stack[0], stack[1])
    assert torch.equal(stack[1], stack[2]) == (slices == 1)


def test_fundus_domains(tmp_path):
    """Disc and cup from grey values, those between to the nearest; validation is drawn from train."""
    rng = np.random.default_rng(0)
    for domain in ("Domain1", "Domain2"):
        for part, count in (("train", 10), ("test", 3)):
            base = tmp_path / domain / part / "ROIs"
            (base / "image").mkdir(parents=True)
            (base / "mask").mkdir()
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(base / "image" / f"{number}.png")
                mask = np.full((20, 24), 255, np.uint8)
                mask[4:16, 4:20], mask[8:12, 8:14] = 128, 0
                mask[4, 4:8] = 191, 192, 64, 63
                Image.fromarray(mask).save(base / "mask" / f"{number}.png")
    loaded = data.load_folder(tmp_path, 24)
    assert [site.name for site in loaded.sites] == ["Domain1", "Domain2"] and loaded.kind == "fundus"
    assert loaded.structures == data.STRUCTURES["fundus"] and loaded.channels == 3 and loaded.classes == 3
    site = loaded.sites[0]
    assert [len(part.cases) for part in splits_of(site)] == [8, 2, 3]
    assert all(case.startswith("test/") == (part is site.test) for part in splits_of(site) for case in part.cases)
    mask = data.read_mask(tmp_path / "Domain1/train/ROIs/mask/0.png", [255, 128, 0], nearest=True)
    assert mask[4, 4:8].tolist() == [1, 0, 1, 2]
    assert mask[0, 0] == 0 and mask[5, 5] == 1 and mask[9, 9] == 2


def test_slices_in_singular_and_plural(tmp_path):
    for part, names in (("train", ("image", "mask")), ("validation", ("images", "mask")), ("test", ("image", "masks"))):
        write_site(tmp_path / "a", part, 3)
        for old, new in zip(("images", "masks"), names):
            (tmp_path / "a" / part / old).rename(tmp_path / "a" / part / new)
    site, = data.load_folder(tmp_path, 32).sites
    assert [len(part.cases) for part in splits_of(site)] == [3, 3, 3]
    assert [part.cases[0].split("/")[0] for part in splits_of(site)] == ["train", "validation", "test"]


def test_kinds_of_image_files(tmp_path):
    """Palette, alpha, CMYK, EXIF rotation and 16 bits give the pixels that a viewer shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((4, 3)).resize((24, 20))
    palette = smooth.quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(data.read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    Image.fromarray(np.dstack([pixels, np.full((20, 24), 7, np.uint8)])).save(tmp_path / "alpha.png")
    assert np.array_equal(data.read_image(tmp_path / "alpha.png"), pixels)
    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(data.read_image(tmp_path / "cmyk.jpg") - np.asarray(smooth)).mean() < 8
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(data.read_image(tmp_path / "deep.png")[:, :, 0], deep)
    indices = np.random.default_rng(1).integers(0, 3, (20, 24), dtype=np.uint8)
    coloured = Image.fromarray(indices)
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    coloured.save(tmp_path / "mask.png")
    assert np.array_equal(data.read_mask(tmp_path / "mask.png"), indices)
    Image.fromarray(np.repeat(indices[:, :, None], 3, axis=2)).save(tmp_path / "grey.png")
    assert np.array_equal(data.read_mask(tmp_path / "grey.png"), indices)


def test_several_pages_and_values_that_are_not_finite(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="pages.tif: not a readable image .2 pages"):
        data.read_image(tmp_path / "pages.tif")
    Image.fromarray(np.array([[1.0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="nan.tif: .*holds values that are not finite"):
        data.read_image(tmp_path / "nan.tif")
    Image.fromarray(np.full((6, 4, 2), (100, 7), np.uint8), "LA").save(tmp_path / "la.png")
    assert np.array_equal(data.read_image(tmp_path / "la.png"), np.full((6, 4, 1), 100))


def test_what_a_network_sees_of_a_file(tmp_path):
    """Grey stored as RGB and single slices for a network of one channel; other mixtures are refused."""
    pixels = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    grey = pixels[0, :, :, 1]
    seen = data.network_input(Path("x.png"), np.repeat(pixels[:, :, :, 1:2], 3, axis=3), 8, 1, "images")
    assert seen.shape == (1, 1, 8, 8) and np.allclose(seen[0, 0], (grey - grey.mean()) / grey.std(), atol=1e-5)
    volume = np.random.default_rng(1).random((4, 8, 8, 1)).astype(np.float32)
    single = data.network_input(Path("x.nii.gz"), volume, 8, 1, "images")
    stacks = data.network_input(Path("x.nii"), volume, 8, 3, "volumes")
    assert single.shape == (4, 1, 8, 8) and stacks.shape == (4, 3, 8, 8)
    assert np.array_equal(stacks[:, 1], single[:, 0]) and np.array_equal(stacks[2, 0], single[1, 0])
    with pytest.raises(ValueError, match="x.png: holds colours"):
        data.network_input(Path("x.png"), pixels, 8, 1, "images")
    for path, values, channels, kind in ((Path("x.nii"), volume, 3, "fundus"), (Path("x.png"), pixels, 3, "volumes")):
        with pytest.raises(ValueError, match=f"{path}: the run was trained on"):
            data.network_input(path, values, 8, channels, kind)


def test_images_on_disk_read_as_a_tensor():
    images = torch.randn(11, 2, 4, 5)
    stored = data.Stored((2, 4, 5), "cpu")
    for part in images.split([1, 4, 6]):
        stored.append(part.numpy())
    assert len(stored) == 11
    for chosen in (torch.tensor([3, 0, 10]), torch.tensor([4]), slice(2, 7), slice(0, 99), torch.arange(11)):
        assert torch.equal(stored[chosen], images[chosen])
    assert all(torch.equal(a, b) for a, b in zip(stored.split(3), images.split(3)))


def test_simulated_hospitals_on_disk(tmp_path):
    """The same images, masks, parts and pictures as in memory; of all of them two files are open, none has a name."""
    for task in data.HOSPITALS:
        memory, disk = (data.simulate_sites(task, 3, 16, 8, 3, folder=folder).sites for folder in (None, tmp_path))
        for a, b in zip(memory, disk):
            for s, t in zip((a.everything, *splits_of(a)), (b.everything, *splits_of(b))):
                assert torch.equal(s.images, t.images[:]) and torch.equal(s.masks, t.masks[:]) and s.cases == t.cases
                assert t.masks[:].dtype == torch.uint8 and torch.equal(s.shown(0), t.shown(0))
                chosen = torch.arange(len(s.cases)) % 2 == 0
                assert torch.equal(s.images[chosen], t.images[chosen]) and torch.equal(s.masks[0], t.masks[0])
        assert len({id(site.everything.images.slices) for site in disk}) == 1
        for kind in ("images", "masks"):
            whole = torch.cat([getattr(site.train, kind) for site in disk])
            assert torch.equal(whole[:], torch.cat([getattr(site.train, kind) for site in memory]))
    assert not [*tmp_path.iterdir()]


def test_list_shows_the_images(tmp_path, capsys):
    write_volumes(tmp_path / "root", {"BMC": 4, "UCL": 4})
    assert train.main(["--root", str(tmp_path / "root"), "--list", "--size", "24", "--out", str(tmp_path / "look")]) == 0
    text = capsys.readouterr().out
    bmc = next(line for line in text.splitlines() if line.startswith("BMC"))
    assert bmc.split()[1:5] == ["2", "1", "1", "20"] and "5×20×24" in bmc and "3×0.5×0.5" in bmc
    shares = [float(share) for share in bmc.split()[-2:]]
    assert sum(shares) == pytest.approx(100, abs=0.02) and 3 < shares[1] < 40
    assert sorted(f.name for f in tmp_path.iterdir()) == ["look-hospitals.png", "root"]


# ---------------------------------------------------------------- the script: wrong input
TINY = ["--size", "16", "--width", "2", "--depth", "1", "--sites", "3", "--images-per-site", "6", "--rounds", "1",
        "--device", "cpu"]


def tree(folder):
    """Every file and folder below `folder`, with the bytes of each file."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in sorted(folder.rglob("*"))}


def refused(capsys, parent, argv, *parts, status=2):
    """`train.main` ends with this status after one line on stderr that holds `parts`, and leaves `parent` as it was."""
    before = tree(parent)
    assert train.main(argv) == status
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and error.endswith("\n")
    assert all(part in error for part in parts), error
    assert tree(parent) == before


def test_wrong_input_leaves_nothing(tmp_path, capsys):
    parent = tmp_path / "runs"
    parent.mkdir()
    out = ["--out", str(parent / "x")]
    refused(capsys, parent, [*TINY, *out, "--hold-out", "Nowhere"], "--hold-out Nowhere", "Alder, Birch, Cedar")
    refused(capsys, parent, [*TINY, *out, "--sites", "1"], "two sites", "Alder", "--hold-out none")
    refused(capsys, parent, [*out, "--root", str(tmp_path / "none")], str(tmp_path / "none"), "no such folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, parent, [*out, "--root", str(empty)], str(empty), "no sites found", status=1)
    write_site(tmp_path / "grey", "a", 4, values=(0, 255))
    refused(capsys, parent, [*out, "--root", str(tmp_path / "grey"), "--size", "16"], "a/masks/", "--mask-values 0 255",
            status=1)


@pytest.mark.parametrize("argv, part", [
    (["--rounds", "0"], "--rounds must be positive"), (["--size", "-3"], "--size must be positive"),
    (["--lr", "0"], "--lr must be positive"), (["--participation", "0"], "--participation must lie in"),
    (["--out", ""], "--out must not be empty"), (["--root", ""], "--root : no such folder"), (["--hold-out", ""], "no such site"),
    (["--size", "5000"], "--size must be at most 4096"), (["--width", "512", "--depth", "5"], "16384 channels"),
    (["--jobs", "0"], "--jobs must lie in"), (["--threads", "9999"], "--threads must lie in"), (["--seeds", "-1"], "--seeds must be"),
    (["--adapt", "."], "go together"), (["--resume", "--list"], "--resume goes with training"),
    (["--evaluate-every", "0"], "--evaluate-every must be positive"), (["--precision", "fp16"], "fp16"),
    (["--alpha", "1.5"], "--alpha must lie in"),
    (["--seeds", "1", "1"], "--seeds must be different"), (["--images-per-site", "3"], "at least 4"),
    (["--mask-values", "0", "255"], "goes with --root"), (["--task", "liver"], "liver"), (["--size", "x"], "--size")])
def test_wrong_arguments(tmp_path, capsys, argv, part):
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "x"), *argv], part)


def test_existing_folders_and_overwrite(tmp_path, capsys):
    """A run is replaced with --overwrite alone, a folder that is no run never."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, name in ((run, "results.json"), (other, "letter.txt")):
        folder.mkdir()
        (folder / name).write_text("keep")
    refused(capsys, tmp_path, [*TINY, "--out", str(run)], str(run), "exists", "--overwrite")
    refused(capsys, tmp_path, [*TINY, "--out", str(other)], str(other), "exists", "another --out")
    refused(capsys, tmp_path, [*TINY, "--out", str(other), "--overwrite"], str(other), "exists", "another --out")
    refused(capsys, tmp_path, [*TINY, "--out", str(run), "--overwrite", "--hold-out", "Nowhere"], "Nowhere")
    assert train.main([*TINY, "--out", str(run), "--overwrite", "--hold-out", "none"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert {row["phase"] for row in results["rows"]} == {"inside", "validation"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "run"]


def same_files(one, two):
    """Every model below the folders, and the rows of the results, bit for bit."""
    names = sorted(str(file.relative_to(one)) for file in one.rglob("*.pt"))
    assert names == sorted(str(file.relative_to(two)) for file in two.rglob("*.pt"))
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (one, two)]
    return rows[0] == rows[1] and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_run_stopped_in_the_middle_keeps_the_old_one_and_goes_on(tmp_path, monkeypatch, capsys):
    """What was finished is not done again, the rows are those of a run never stopped; other settings are refused."""
    run = tmp_path / "run"
    argv = [*TINY, "--rounds", "3", "--lr", "1e-2", "--hold-out", "all", "--out"]
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    run.mkdir()
    (run / "results.json").write_text("keep")
    calls, adapt, federate = [], router.adapt, iopfl.federate

    def fail(*positional, **options):
        calls.append(positional)
        if len(calls) == 5:
            raise RuntimeError("stopped")
        return adapt(*positional, **options)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train.router, "adapt", fail)
        assert train.main([*argv, str(run), "--overwrite"]) == 1
        assert capsys.readouterr().err == "train.py: RuntimeError: stopped (IOPFL_TRACEBACK=1 shows where)\n"
        calls.clear()
        patch.setenv("IOPFL_TRACEBACK", "1")
        with pytest.raises(RuntimeError, match="stopped"):
            train.main([*argv, str(run), "--overwrite"])
    assert tree(run) == {"results.json": b"keep"}
    for option in ([], ["--resume"]):
        refused(capsys, tmp_path, [*argv, str(run), *option], "run exists", "--overwrite --resume")
    shutil.rmtree(run)
    refused(capsys, tmp_path, [*argv, str(run)], "unfinished", "--resume", "--overwrite")
    for name, other, text in (("--lr", "0.1", "lr 0.01 instead of 0.1"), ("--methods", "iopfl", "methods"),
                              ("--threads", "2", "threads 1 instead of 2; say --threads 1"), ("--alpha", "0.5", "alpha 0.7")):
        refused(capsys, tmp_path, [*argv, str(run), "--resume", name, other], "another setting", text)
    lock = os.open(tmp_path / "run.unfinished", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        for option in ("--resume", "--overwrite"):
            refused(capsys, tmp_path, [*argv, str(run), option], "another process is at work")
    finally:
        os.close(lock)

    federations = []
    with monkeypatch.context() as patch:
        patch.setattr(train.iopfl, "federate", lambda *a, **o: federations.append(o["after"]) or federate(*a, **o))
        assert train.main([*argv, str(run), "--resume", "--evaluate-every", "1"]) == 0
    # One of three had finished; of the second the rounds were on the disk.
    assert [after and after[0] for after in federations] == [3, None]
    assert same_files(run, tmp_path / "whole") and sorted(f.name for f in tmp_path.iterdir()) == ["run", "whole"]
    assert not list(run.rglob("*.rounds"))
    assert train.main([*argv, str(run), "--resume"]) == 0 and "is finished" in capsys.readouterr().out
    refused(capsys, tmp_path, [*argv, str(run), "--resume", "--lr", "0.1"], "run exists")


KILLED = """
import fnmatch, os, random, signal, sys
sys.path.insert(0, {here!r})
import torch, torch._dynamo, train  # _dynamo: an optimiser imports it, once for all children here
torch.set_num_threads(1)
moments, argv, write = random.Random(0), sys.argv[1:], train.write
HALVED = [("settings.json", 1), ("state.json", 2), ("*-*.pt", 5), ("state.json", 3), ("state.json", 1)]


def start(pattern, count, calls=0):
    # A process of its own that ends itself in the middle of the count-th file of such a name, or at some call of a function.
    child = os.fork()
    if child:
        return child
    sys.stdout, fsync, seen = open("log", "a"), os.fsync, []

    def dying_write(path, content):
        def dying_fsync(file):
            os.truncate(file, len(content) // 2)
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        if fnmatch.fnmatch(path.name, pattern):
            seen.append(path)
        os.fsync = dying_fsync if len(seen) == count else fsync
        write(path, content)

    def count_down(*_):
        nonlocal calls
        calls -= 1
        if not calls:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    if calls:
        sys.setprofile(count_down)
    train.write = dying_write
    status = train.main(argv)
    sys.stdout.flush()
    os._exit(status)


for attempt in range(10):
    if attempt % 2 == 0:
        child = start(*HALVED[attempt // 2])
    else:
        child = start("", 1, moments.randrange(20_000, 400_000))
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", os.path.exists("run"))
print(os.waitstatus_to_exitcode(os.waitpid(start("", 1), 0)[1]))
"""


@pytest.mark.parametrize("more", [
    ["--participation", "0.5"],
    ["--hold-out", "none", "--methods", "iopfl", "ditto", "fedbn", "global-alpha=0.7", "--jobs", "1"]])
def test_killed_at_ten_moments_a_run_ends_as_if_never_interrupted(tmp_path, more):
    """A real process, killed in the middle of writing a file or at any other moment; nothing finished is half there."""
    argv = [*TINY, "--rounds", "20", "--evaluate-every", "100", "--threads", "1", *more]
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    (tmp_path / "killed.py").write_text(KILLED.format(here=str(HERE)))
    done = subprocess.run([sys.executable, "killed.py", *argv, "--resume", "--out", "run"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    *lines, last = done.stdout.split("\n")[:-1]
    assert last == "0" and done.stderr == "", done.stderr
    assert len(lines) == 10 and lines.count("9 False") >= 7 and {*lines} <= {"9 False", "ended True"}, lines
    assert same_files(tmp_path / "run", tmp_path / "whole")
    assert "read from the disk" in (tmp_path / "log").read_text()


def test_beginning_anew_may_be_interrupted_too(tmp_path, monkeypatch, own_signals):
    """While the old state is being removed: nothing of it is taken for the new run."""
    argv = [*TINY, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(router, "adapt", lambda *_, **__: 1 / 0)
        assert train.main([*argv, "--rounds", "3"]) == train.main([*argv, "--rounds", "2", "--overwrite"]) == 1

    def interrupted(folder, rmtree=shutil.rmtree, **_):
        (folder / "fedavg.rounds" / "2.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        assert train.main([*argv, "--rounds", "2", "--overwrite"]) == 130
    assert train.main([*argv, "--rounds", "2", "--overwrite", "--resume"]) == 0
    assert train.main([*TINY, "--rounds", "2", "--out", str(tmp_path / "whole")]) == 0
    assert same_files(tmp_path / "run", tmp_path / "whole")


def test_helpers_end_with_their_main_process(tmp_path):
    """Else one could write into a run that goes on."""
    (tmp_path / "pool.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import train
if __name__ == "__main__":
    print(ProcessPoolExecutor(1, get_context("spawn"), train.set_up, (1, True)).submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    # Its output ends when the last process that could write to it has ended.
    done = subprocess.run([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and int(done.stdout)


@pytest.fixture
def own_signals():
    """Afterwards Ctrl-C does what it did; `train.main` ignores it while it ends."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, monkeypatch, capsys, own_signals):
    argv = [*TINY, "--rounds", "3", "--out", str(tmp_path / "a run")]
    calls, train_local = [], iopfl.train_local

    def interrupted(*positional, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_local(*positional, **options)

    with monkeypatch.context() as patch:
        patch.setattr(iopfl, "train_local", interrupted)
        assert train.main(argv) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: interrupted; go on with: python ")
    command = shlex.split(line.split("go on with: ")[1])
    assert command[2:] == [*argv, "--resume"]
    calls.clear()
    monkeypatch.setattr(iopfl, "train_local", lambda *p, **o: calls.append(1) or train_local(*p, **o))
    assert train.main(command[2:]) == 0 and len(calls) == 4  # of two hospitals, rounds 2 and 3
    assert train.main([*argv[:-1], str(tmp_path / "whole")]) == 0
    assert same_files(tmp_path / "a run", tmp_path / "whole")


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_the_same_number_of_threads_gives_the_same_bytes(tmp_path, threads):
    argv = [*TINY, "--size", "32", "--width", "8", "--rounds", "2", "--threads", threads, "--out"]
    try:
        assert [train.main([*argv, str(tmp_path / name)]) for name in "ab"] == [0, 0]
        assert torch.get_num_threads() == int(threads)
    finally:
        torch.set_num_threads(1)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "a" / "results.json").read_text())["environment"]["threads"] == int(threads)


def test_changed_images_are_another_experiment(tmp_path, monkeypatch, capsys):
    """Content, name or number of the files; what is not read does not count."""
    for name in "abc":
        write_site(tmp_path / "root", name, 5, grey=True)
    argv = [*TINY, "--root", str(tmp_path / "root"), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(router, "adapt", lambda *_, **__: 1 / 0)
        assert train.main(argv) == 1
    capsys.readouterr()
    image, mask = (next((tmp_path / "root" / "a" / kind).glob("*00*")) for kind in ("images", "masks"))
    before = image.read_bytes()
    pixels = np.array(Image.open(image))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    refused(capsys, tmp_path, [*argv, "--resume"], "another setting", "content")
    image.write_bytes(before)
    for file in (image, mask):
        file.rename(file.with_stem("zz"))
    refused(capsys, tmp_path, [*argv, "--resume"], "another setting", "content")
    for file in (image, mask):
        file.with_stem("zz").rename(file)
    (tmp_path / "root" / "notes.txt").write_text("not read")
    assert train.main([*argv, "--resume"]) == 0


def test_processes_side_by_side_give_the_same_rows(tmp_path):
    argv = [*TINY, "--seeds", "0", "1", "--hold-out", "none", "--methods", "all"]
    for jobs in ("1", "2"):
        assert train.main([*argv, "--jobs", jobs, "--out", str(tmp_path / jobs)]) == 0
    one, two = (json.loads((tmp_path / jobs / "results.json").read_text())["rows"] for jobs in ("1", "2"))
    assert one == two and {row["method"] for row in one} == set(iopfl.METHODS)


def tent_by_hand(model, x):
    """One pass of entropy minimisation on BatchNorm's affine, statistics of the batch, batches of 5."""
    norms = [module for module in model.train().modules() if isinstance(module, nn.BatchNorm2d)]
    optimiser = torch.optim.Adam([p for norm in norms for p in (norm.weight, norm.bias)], lr=1e-3)
    for numbers in torch.randperm(len(x), generator=seeded()).split(5):
        p = model(x[numbers]).softmax(dim=1)
        loss = -(p * p.log()).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return torch.cat([model(batch).softmax(dim=1) for batch in x.split(5)])


def test_every_method_outside_runs(tmp_path, monkeypatch):
    """All alternatives and ablations, some of them against what they stand for, computed by hand."""
    argv = [*TINY, "--rounds", "3", "--size", "24", "--width", "4", "--lr", "1e-2", "--methods", "all", "ablations"]
    mixed, found, build, adapt = [], [], router.build_routed, router.adapt
    with monkeypatch.context() as patch:
        patch.setattr(router, "build_routed", lambda models, *more: mixed.append(len(models)) or build(models, *more))
        patch.setattr(router, "adapt", lambda *more, **options: found.append(adapt(*more, **options)) or found[-1])
        assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert train.OUTSIDE["bn"].settings.tolerance == 0  # all of the statistics, always
    # global, best-inside, ensemble (one by one), average, matched, bn, tent, routing, routing-authors
    assert mixed[:11] == [1, 2, 1, 1, 1, 3, 3, 1, 1, 3, 3]
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    outside = [row for row in rows if row["phase"] == "outside"]
    assert [row["method"] for row in outside] == [*train.OUTSIDE, *train.OUTSIDE_ABLATIONS]
    curve = [(row["method"], row["pass"]) for row in rows if row["phase"] == "curve"]
    assert curve == [(m, n) for m, o in train.OUTSIDE_ABLATIONS.items() if o.curve for n in range(21)]
    for key in ("dice", "area"):
        values = [100 * row[key] for row in rows if row["phase"] == "curve" and row["method"] == "passes-20"]
        assert train.curves(rows, key)["passes-20"] == pytest.approx(values)
    last = [row["dice"] for row in outside if row["method"] == "passes-20"]
    assert last == [row["dice"] for row in rows if row.get("pass") == 20 and row["method"] == "passes-20"]
    folder = tmp_path / "run" / "seed0-Cedar"
    site = data.simulate_sites("prostate", 0, 24, 6, 3).sites[2].everything
    models = [iopfl.with_state(UNet(1, 2, 4, 1), torch.load(folder / f"{name}.pt", weights_only=True))
              for name in ("personal-Alder", "personal-Birch", "global")]
    average = iopfl.with_state(models[0], iopfl.aggregate([m.state_dict() for m in models], [1, 1, 1]))
    with torch.no_grad():
        ensemble = torch.stack([model(site.images).softmax(dim=1) for model in models])
        # All statistics from one batch of all images is what training mode uses; TENT moves the affine only.
        by_batch = copy.deepcopy(models[2]).train()(site.images).softmax(dim=1)
    online = router.adapt(router.build_routed(models, None, seeded()), site.images, generator=seeded(), online=True)
    for place, wanted in ((0, ensemble[2]), (5, average(site.images).softmax(dim=1).detach()), (7, by_batch),
                          (8, tent_by_hand(copy.deepcopy(models[2]), site.images)),
                          (11 + list(train.OUTSIDE_ABLATIONS).index("online"), online)):
        assert torch.allclose(found[place], wanted, atol=1e-5), place
    assert torch.allclose(torch.stack(found[2:5]), ensemble, atol=1e-5)
    dice = [np.mean([iopfl.dice(p, t) for p, t in zip(scores.argmax(dim=1) == 1, site.masks == 1)])
            for scores in (found[0], sum(found[2:5]), found[8])]
    assert [row["dice"] for row in outside if row["method"] in ("global", "ensemble", "tent")] == pytest.approx(dice)


def test_oracle_never_predicts_an_image_it_was_trained_on(monkeypatch):
    """Slices of one case stay together."""
    split = data.Split(torch.arange(12.0)[:, None, None, None].expand(12, 1, 8, 8), torch.zeros(12, 8, 8).long(),
                       [f"case{i // 3}" for i in range(12)])
    split.masks += torch.arange(12)[:, None, None]
    trained = []

    def train_local(model, images, masks, **options):
        assert torch.equal(images[:, 0].long(), masks) and options["epochs"] == 10
        trained.append(images[:, 0, 0, 0])

    monkeypatch.setattr(iopfl, "train_local", train_local)
    predicted = []
    monkeypatch.setattr(iopfl, "predict", lambda model, images: predicted.append(images[:, 0, 0, 0]) or images[:, 0].long())
    prediction = train.oracle(SimpleNamespace(batch_size=5, lr=1e-3), UNet(1, 2, 2, 1), split, 0)
    assert torch.equal(prediction, split.images[:, 0].long())
    for seen, own in zip(trained, predicted):
        assert {int(i) // 3 for i in seen} & {int(i) // 3 for i in own} == set() and len(seen) == len(own) == 6


def test_comparison_by_hand():
    rows = [{"phase": "outside", "method": m, "site": s, "seed": seed, "dice": d / 100} for m, s, seed, d in (
        ("routing", "a", 0, 80), ("routing", "b", 0, 70), ("routing", "a", 1, 90), ("routing", "b", 1, 60.05),
        ("global", "a", 0, 75), ("global", "b", 0, 72), ("global", "a", 1, 85), ("global", "b", 1, 60))]
    # A second structure: a pair's Dice is the mean over both.
    rows += [{**row, "dice": row["dice"] + (0.02 if row["method"] == "routing" else 0)} for row in rows]
    for row in rows[:8]:
        row["dice"] -= 0.02 if row["method"] == "routing" else 0
    line = train.compare(rows, "outside", "routing").splitlines()[1]
    assert line.split() == ["global", "+2.01", "-2.00", "+5.00", "2", "1", "1", "1"]
    for wins, losses, p in ((5, 0, 2 / 32), (0, 5, 2 / 32), (3, 3, 1.0), (0, 0, 1.0), (8, 2, 2 * (45 + 10 + 1) / 1024)):
        assert train.sign_test(wins, losses) == pytest.approx(p)

def test_table_by_hand():
    """Two seeds, two structures, a ceiling that is never marked; smaller distances are better."""
    rows = [{"phase": "outside", "method": m, "site": site, "seed": seed, "structure": structure, "cases": 3,
             "distance_cases": 3 - (m == "bn"), "dice": (d + 4 * seed + (2 if structure == "cup" else 0)) / 100,
             "hd95": h + seed, "assd": None if m == "bn" and seed == 1 else 1.0}
            for m, d, h in (("global", 70, 5.0), ("bn", 74, 4.0), ("oracle", 90, 1.0))
            for site, more in (("a", 0), ("b", 6)) for d in (d + more,) for seed in (0, 1) for structure in ("disc", "cup")]
    lines = train.table(rows, "outside", "mm").splitlines()
    assert lines[0].split() == ["a", "b", "mean", "HD95", "mm", "ASSD", "mm"]
    assert [line.split() for line in lines[1:4]] == [
        ["disc", "global", "72.0±2.8", "78.0±2.8", "75.0±2.8", "5.50±0.71", "1.00±0.00*"],
        ["disc", "bn", "76.0±2.8*", "82.0±2.8*", "79.0±2.8*", "4.50±0.71*", "nan±nan"],
        ["disc", "oracle", "(ceiling)", "92.0±2.8", "98.0±2.8", "95.0±2.8", "1.50±0.71", "1.00±0.00"]]
    assert lines[8].split()[:5] == ["mean", "bn", "77.0±2.8*", "83.0±2.8*", "80.0±2.8*"]
    assert lines[-1] == "HD95 and ASSD count 64 of 72 masks; in the others both are empty"


def test_authors_settings(tmp_path):
    args = train.parse_arguments(["--authors", "--lr", "5e-3"])
    assert (args.rounds, args.alpha, args.lr) == (100, 0.1, 5e-3)
    inside, outside = train.chosen_methods(args, "Rowan")
    assert inside["iopfl"].alpha == 0.1 and outside["routing"].settings == router.AUTHORS


def test_an_unfinished_run_of_other_settings_is_replaced_only_when_told(tmp_path, capsys):
    folder = tmp_path / "run.unfinished"
    folder.mkdir()
    (folder / "old.txt").write_text("of something else")
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "run")], str(folder), "in the way")
    (folder / "settings.json").write_text(json.dumps({"seeds": [7]}))
    (folder / "old.txt").write_text("of another run")
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "run")], str(folder), "--resume", "--overwrite")
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "run"), "--resume"], "another setting", "seeds [7]")
    assert train.main([*TINY, "--out", str(tmp_path / "run"), "--overwrite"]) == 0
    assert not (tmp_path / "run" / "old.txt").exists()
    refused(capsys, tmp_path, [*TINY, "--hold-out", "none", "--methods", "routing", "--out", str(tmp_path / "y")],
            "--methods routing", "inside")


def test_lines_of_rounds_and_participation(tmp_path, capsys):
    """Dice every few rounds and at the end, else the loss; hospitals that were never there use the global model."""
    argv = [*TINY, "--rounds", "5", "--evaluate-every", "2", "--sites", "14", "--hold-out", "none"]
    assert train.main([*argv, "--participation", "0.1", "--out", str(tmp_path / "few")]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("round")]
    assert ["loss" in line for line in lines] == [True, False, True, False, False]
    assert lines[1].count("/") == 1 + train.MOST_SHOWN and "Alder" not in printed.split("test images")[1]
    folder = tmp_path / "few" / "seed0-all-inside"
    states = {file.name: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}
    assert len(states) == 15
    same = [name for name, state in states.items() if all(torch.equal(state[e], v) for e, v in states["global.pt"].items())]
    assert 9 + 1 <= len(same) < 15  # at most five were ever present


def test_torchrun_gives_the_same_run_and_survives_a_lost_process(tmp_path):
    """A process that dies ends the others with one line each; with --resume one process, or any number, goes on."""
    argv = [*TINY, "--sites", "4", "--rounds", "3", "--threads", "1", "--out"]
    assert train.main([*argv, str(tmp_path / "one"), "--jobs", "1"]) == 0
    (tmp_path / "dying.py").write_text(f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(HERE)!r})
import iopfl
calls, train_local = [], iopfl.train_local
def dying(*positional, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_local(*positional, **options)
iopfl.train_local = dying
runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")
""")
    begin = time.monotonic()
    done = torchrun(3, tmp_path / "dying.py", *argv, tmp_path / "shared")
    assert done.returncode and time.monotonic() - begin < 60
    assert done.stderr.count("--resume goes on after the last whole round") == 2 and "SIGKILL" in done.stderr
    assert not (tmp_path / "shared").exists()
    assert train.main([*argv, str(tmp_path / "shared"), "--resume"]) == 0
    assert same_files(tmp_path / "one", tmp_path / "shared")


def test_what_torchrun_does_not_do(tmp_path, monkeypatch, capsys):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    refused(capsys, tmp_path, [*TINY, "--out", str(tmp_path / "x"), "--jobs", "2"], "torchrun shares one federation")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(capsys, tmp_path, [*TINY, "--device", "cuda", "--out", str(tmp_path / "x")], "--nproc-per-node 2", "this machine has 1")


def test_bfloat16_trains_and_adapts_nearly_like_float32(tmp_path):
    """Weights of an earlier step must not be used again, and sums must be in float32."""
    client = toy_clients(1, size=16)["client0"]
    states, losses = {}, {}
    for precision in ("fp32", "bf16"):
        model = UNet(1, 2, 4, 2, seeded())
        with train.autocast(SimpleNamespace(device="cpu", precision=precision)):
            losses[precision] = [iopfl.train_local(model, client.images, client.masks, lr=1e-2, generator=seeded())
                                 for _ in range(20)]
            models = [randomise(UNet(1, 2, 4, 2), k) for k in range(2)]
            routed = router.build_routed(models, router.RoutingSettings(start="uniform", passes=2))
            images = torch.randn(6, 1, 16, 16, generator=seeded(3))
            probabilities = router.adapt(routed, images, generator=seeded())
            states[precision] = routed
        assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())
        assert probabilities.dtype == torch.float32 and routed.trace.layers["head"].dtype == torch.float32
    assert losses["fp32"] != losses["bf16"] and np.allclose(losses["fp32"], losses["bf16"], atol=0.05)
    assert losses["bf16"][-1] < 0.6 * losses["bf16"][0]
    for a, b in zip(states["fp32"].norms(), states["bf16"].norms()):
        assert torch.allclose(a.site_mean, b.site_mean, atol=0.1) and not torch.equal(a.site_mean, b.site_mean)
    for precision in ("fp32", "bf16"):
        assert train.main([*TINY, "--precision", precision, "--out", str(tmp_path / precision)]) == 0
    one, two = (torch.load(tmp_path / p / "seed0-Cedar" / "global.pt", weights_only=True) for p in ("fp32", "bf16"))
    assert any(not torch.equal(one[entry], two[entry]) for entry in one)


def odd_sites(root) -> None:
    """Hospitals without the structure, with nothing else, with constant images, of one image to train with."""
    for name in ("empty", "full", "constant", "few", "usual"):
        folder = write_site(root, name, 4, size=32, grey=True)
        for file in (folder / "masks").iterdir():
            value = {"empty": 0, "full": 1}.get(name)
            if value is not None:
                Image.new("L", (32, 32), value).save(file)
        if name == "constant":
            for file in (folder / "images").iterdir():
                Image.new("L", (20, 27), 7).save(file)
                Image.new("L", (20, 27), 1).save(folder / "masks" / file.name)
    for kind in ("images", "masks"):  # train 0, val 1, test 2; the fourth goes
        for number, part in enumerate(("train", "val", "test")):
            (root / "few" / part / kind).mkdir(parents=True)
            (root / "few" / kind / f"0{number}.png").rename(root / "few" / part / kind / "x.png")
        shutil.rmtree(root / "few" / kind)


def test_degenerate_hospitals(tmp_path, capsys):
    odd_sites(tmp_path / "root")
    argv = [*TINY, "--root", str(tmp_path / "root"), "--lr", "1e-2", "--out"]
    assert train.main([*argv, str(tmp_path / "out"), "--hold-out", "all", "--rounds", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and re.findall(r"HD95 and ASSD count \d+ of (\d+) masks", captured.out) == ["40", "57"]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["site"] for row in rows if row["phase"] == "outside"} == {"empty", "full", "constant", "few", "usual"}
    for row in rows:
        assert 0 <= row["dice"] <= 1
        if row["phase"] != "validation":
            assert (row["hd95"] is None) == (row["assd"] is None) == (row["distance_cases"] == 0)
        if row["site"] == "empty" and row["phase"] == "outside":  # per case: nothing found, 1, or something, 0
            assert row["dice"] == pytest.approx(1 - row["distance_cases"] / row["cases"])
            assert row["hd95"] in (None, pytest.approx(16 * 2**0.5))
    for file in (tmp_path / "out").rglob("*.pt"):
        assert all(value.isfinite().all() for value in torch.load(file, weights_only=True).values())
    # Two hospitals, one of them inside.
    assert train.main([*argv, str(tmp_path / "two"), "--root", str(tmp_path / "two sites")]) == 2
    for name in ("full", "usual"):
        shutil.copytree(tmp_path / "root" / name, tmp_path / "two sites" / name)
    assert train.main([*argv, str(tmp_path / "two"), "--root", str(tmp_path / "two sites")]) == 0
    capsys.readouterr()
    refused(capsys, tmp_path, [*argv, str(tmp_path / "x"), "--depth", "4"], "site few", "1 images", "--depth")
    refused(capsys, tmp_path, [*argv, str(tmp_path / "x"), "--depth", "4", "--batch-size", "1"], "batch of one")


def test_volume_of_too_many_voxels_is_not_read(tmp_path, monkeypatch):
    write_volumes(tmp_path, {"BMC": 4})
    monkeypatch.setattr(data, "MOST_VOXELS", 24 * 20 * 5 - 1)
    with pytest.raises(ValueError, match="Case00.nii.gz: .* at most 2399 voxels is expected, found 24×20×5"):
        data.load_folder(tmp_path, 16)


class Evil:
    """Executed by a loader that trusts its file."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def _entry(file, change) -> None:
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def _results(run, change) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))


def _flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


RUN_ERRORS = {  # what is spoilt in a run, parts of the message
    "cut": (lambda r, g: _cut(g), ["global.pt", "damaged"]),
    "empty": (lambda r, g: g.write_bytes(b""), ["global.pt", "damaged"]),
    "text": (lambda r, g: g.write_text("weights"), ["global.pt", "damaged"]),
    "code": (lambda r, g: torch.save(Evil(), g), ["global.pt", "damaged"]),
    "bit flipped": (lambda r, g: _flip(g), ["global.pt"]),
    "another object": (lambda r, g: torch.save([1], g), ["global.pt", "damaged"]),
    "another weight": (lambda r, g: _entry(g, lambda s: s["head.bias"].add_(1)), ["global.pt", "damaged"]),
    "missing entry": (lambda r, g: _entry(g, lambda s: s.pop("head.bias")), ["global.pt", "'head.bias' is nothing"]),
    "more": (lambda r, g: _entry(g, lambda s: s.update(x=torch.ones(1))), ["expected nothing", "'x'"]),
    "shape": (lambda r, g: _entry(g, lambda s: s.update({"head.bias": torch.ones(3)})), ["global.pt", "((3,)", "'head.bias'"]),
    "type": (lambda r, g: _entry(g, lambda s: s.update({"head.bias": torch.ones(2).long()})), ["int64", "'head.bias'"]),
    "NaN": (lambda r, g: _entry(g, lambda s: s["head.bias"].fill_(math.nan)), ["global.pt", "not every value is finite", "'head.bias'"]),
    "no model": (lambda r, g: [f.unlink() for f in r.rglob("*.pt")], ["found 0"]),
    "results cut": (lambda r, g: _cut(r / "results.json"), ["results.json", "damaged"]),
    "results of another kind": (lambda r, g: (r / "results.json").write_text("[1]"), ["results.json", "not written"]),
    "older results": (lambda r, g: _results(r, lambda f: f.pop("data")), ["results.json", "older version", "train again"]),
    "width": (lambda r, g: _results(r, lambda f: f["config"].update(width=5)), ["'encoder.0.0.weight'"]),
    "huge width": (lambda r, g: _results(r, lambda f: f["config"].update(width=10**9)), ["width is 1000000000"]),
    "text for a number": (lambda r, g: _results(r, lambda f: f["config"].update(depth="1")), ["results.json", "depth is 1"]),
    "settings": (lambda r, g: _results(r, lambda f: f["config"]["outside"]["routing"]["settings"].update(lr="x")), ["lr"]),
    "strange settings": (lambda r, g: _results(r, lambda f: f["config"]["outside"]["routing"]["settings"].update(x=1)), ["'x'"]),
}


@pytest.mark.parametrize("spoil, parts", RUN_ERRORS.values(), ids=RUN_ERRORS)
def test_damaged_runs_are_refused(folder_run, tmp_path, monkeypatch, capsys, spoil, parts):
    root, run = folder_run
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    if "'" in parts[-1]:  # an entry is named where the files' digests are not known, as in older runs
        _results(tmp_path / "run", lambda found: found.pop("files"))
    spoil(tmp_path / "run", tmp_path / "run" / "seed0-c" / "global.pt")
    refused(capsys, tmp_path, ["--adapt", "run", "--images", str(root / "c" / "images"), "--out", "x"], *parts,
            status=2 if parts == ["found 0"] else 1)


def test_no_byte_of_a_model_changes_unnoticed(tmp_path, monkeypatch):
    """It is refused, or was one that means nothing, whether or not the file's digest is known; nothing is executed."""
    monkeypatch.chdir(tmp_path)
    state, file, refusals = UNet(1, 2, 2, 1, seeded()).state_dict(), tmp_path / "model.pt", 0
    digest = train.save(file, state)
    whole = file.read_bytes()
    for place in range(0, len(whole), 211):
        content = bytearray(whole)
        content[place] ^= 16
        file.write_bytes(content)
        try:
            loaded = train.load(file, like=state)
            assert all(torch.equal(loaded[entry], value) for entry, value in state.items()), place
        except ValueError as error:
            assert str(file) in str(error)
            refusals += 1
        with pytest.raises(ValueError, match="damaged"):
            train.load(file, digest=digest)
    assert refusals > 10
    torch.save({"x": Evil()}, file)
    with pytest.raises(ValueError, match="damaged"):
        train.load(file)
    assert not (tmp_path / "executed").exists()


def test_damaged_states_of_unfinished_runs_are_refused(tmp_path, monkeypatch, capsys):
    argv = [*TINY, "--rounds", "2", "--out", str(tmp_path / "run"), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(router, "adapt", lambda *_, **__: 1 / 0)
        assert train.main(argv) == 1
    capsys.readouterr()
    folder = tmp_path / "run.unfinished" / "seed0-Cedar" / "fedavg.rounds"
    state = folder / "state.json"
    assert sorted(file.name for file in folder.iterdir()) == ["2-1.pt", "2-2.pt", "2.pt", "state.json"]  # Alder, Birch, global

    for file, spoil, part in (
            (state, _cut, "damaged"), (state, lambda f: f.write_text("{}"), "damaged"),
            (state, lambda f: f.write_text(f.read_text().replace('"round": 2', '"round": 1')), "damaged"),
            (folder / "2-1.pt", _cut, "damaged"), (folder / "2-2.pt", lambda f: torch.save(Evil(), f), "damaged"),
            (folder / "2.pt", lambda f: _entry(f, lambda s: s["head.bias"].add_(1)), "damaged")):
        before = file.read_bytes()
        spoil(file)
        with monkeypatch.context() as patch:
            patch.setattr(train, "draw_hospitals", lambda *_: None)  # it comes first, and is only a picture
            refused(capsys, tmp_path, argv, str(file), part, status=1)
        file.write_bytes(before)
    assert train.main(argv) == 0


def test_a_full_or_read_only_disk(tmp_path):
    """The run ends with a line; when there is room again it goes on. Nothing is written elsewhere."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disks.py").write_text(f"""
import contextlib, os, shutil, subprocess, sys
sys.path.insert(0, {str(HERE)!r})
import train


def mount(*options):
    subprocess.run(["mount", *options], check=True)
    return True


def start(name, *more):
    with open("../" + name, "w") as file, contextlib.redirect_stdout(open("../log", "w")), contextlib.redirect_stderr(file):
        print(train.main([*sys.argv[1:], "--out", "run", *more]), file=file)
        print(*os.listdir(), file=file)


try:
    mount("-t", "tmpfs", "-o", "size=150k", "none", "disk")
except subprocess.CalledProcessError:
    sys.exit(77)
os.chdir("disk")
start("full")
mount("-o", "remount,ro", ".")
start("readonly", "--resume")
mount("-o", "remount,rw,size=50m", ".")
start("again", "--resume")
shutil.copytree("run", "../run")
""")
    argv = [*TINY, "--rounds", "3", "--threads", "1"]
    done = subprocess.run(["unshare", "-rm", sys.executable, "disks.py", *argv], cwd=tmp_path, capture_output=True,
                          text=True, timeout=100) if shutil.which("unshare") else SimpleNamespace(returncode=77)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("the system allows no small disk")
    assert done.returncode == 0, done.stderr
    for name, text in (("full", "No space left on device"), ("readonly", "Read-only file system")):
        line, status, left = (tmp_path / name).read_text().splitlines()
        assert line.startswith("train.py: ") and text in line and (status, left) == ("1", "run.unfinished")
    assert (tmp_path / "again").read_text().split() == ["0", "run"]
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert same_files(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- a hospital with unlabelled images alone
@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """Root of three sites of unequal photographs, and a run that held the last one out."""
    root, out = (tmp_path_factory.mktemp("adapt") / name for name in ("root", "run"))
    for name in ("a", "b", "c"):
        write_site(root, name, 7, size=26, values=(0, 255))
        for file in sorted((root / name / "images").iterdir())[:2]:  # some of another size
            for path in (file, root / name / "masks" / file.name):
                Image.open(path).resize((33, 21), Image.Resampling.NEAREST).save(path)
    assert train.main([*TINY, "--root", str(root), "--mask-values", "0", "255", "--rounds", "3", "--lr", "1e-2",
                       "--width", "4", "--out", str(out)]) == 0
    return root, out


def read_input(file):
    return data.network_input(file, data.read_pixels(file), 16, 3, "images")


def adapted(run, images, out, *more) -> int:
    return train.main(["--adapt", str(run), "--images", str(images), "--out", str(out), "--device", "cpu", *more])


def test_adapting_a_run_repeats_its_outside_phase(folder_run, tmp_path, capsys):
    """The same adapted network, so the same masks; used again as it is, it gives them once more."""
    root, run = folder_run
    images = root / "c" / "images"
    assert adapted(run, images, tmp_path / "one") == 0
    states = [torch.load(file, weights_only=True) for file in (run / "seed0-c" / "adapted.pt", tmp_path / "one" / "adapted.pt")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert adapted(run / "seed0-c", images, tmp_path / "fold") == 0
    assert adapted(tmp_path / "one", images, tmp_path / "again") == 0
    routed, known = train.open_run(tmp_path / "one", "cpu")
    for number in range(7):
        file = f"{number:02d}.png"
        with Image.open(images / file) as image, Image.open(tmp_path / "one" / "masks" / file) as mask:
            assert mask.size == image.size
            x = torch.from_numpy(read_input(images / file))
            wanted = F.interpolate(router.predict(routed, x), image.size[::-1], mode="bilinear").argmax(dim=1)[0]
            assert np.array_equal(np.asarray(mask), wanted)
        for other in ("fold", "again"):
            assert (tmp_path / other / "masks" / file).read_bytes() == (tmp_path / "one" / "masks" / file).read_bytes()
        with Image.open(tmp_path / "one" / "overlays" / file) as overlay, Image.open(images / file) as image:
            assert overlay.mode == "RGB" and overlay.size == image.size
    with open(tmp_path / "one" / "images.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{n:02d}.png" for n in range(7)]
    for row in rows:
        mask = np.asarray(Image.open(tmp_path / "one" / "masks" / row["file"]))
        assert float(row["foreground"]) == pytest.approx((mask > 0).mean()) and 0 <= float(row["confidence"]) <= 1
    # The confidence: overlap of the foreground with that of a noisy, turned view.
    x = torch.cat([torch.from_numpy(read_input(images / f"{n:02d}.png")) for n in range(5)])
    generator = seeded(0)
    views = router.draw_views(x, generator)
    noise = 0.5 * torch.randn(x.shape, generator=generator)
    of_view = router.view(router.predict(routed, router.view(x + noise, views)), views, inverse=True)
    for p, q, row in zip(1 - router.predict(routed, x)[:, 0], 1 - of_view[:, 0], rows):
        assert float(row["confidence"]) == pytest.approx((2 * (p * q).sum() / (p**2 + q**2).sum()).item(), abs=1e-5)
    chosen = json.loads((tmp_path / "one" / "adapted.json").read_text())["chosen"]
    assert list(chosen) == ["a", "b", "global"] and sum(chosen.values()) == pytest.approx(1)
    assert Image.open(tmp_path / "one" / "routing.png").size[0] > 100
    assert "What routing chose" in capsys.readouterr().out


def test_progress_on_a_terminal(folder_run, tmp_path, monkeypatch, capsys):
    root, run = folder_run
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert adapted(run, root / "c/images", tmp_path / "x") == 0
    shown = [part.strip() for part in re.split("[\r\n]", capsys.readouterr().err) if part.strip()]
    assert [part.split(",")[0] for part in shown if part.startswith("reading")] == [f"reading {n}/7" for n in range(1, 8)]
    assert [part for part in shown if part.startswith("adapting")][-1] == "adapting, pass 3/3, 0 s left"
    assert shown[-1] == "predicting 7/7, 0 s left"


def test_adapting_with_masks_reports_dice(folder_run, tmp_path, capsys):
    """By the grey values that the run was trained with; images whose masks are missing or of another size are not scored."""
    root, run = folder_run
    shutil.copytree(root / "c", tmp_path / "c")
    Image.new("L", (5, 5)).save(tmp_path / "c/masks/06.png")
    (tmp_path / "c/masks/05.png").unlink()
    assert adapted(run, tmp_path / "c/images", tmp_path / "x", "--masks", str(tmp_path / "c/masks")) == 0
    captured = capsys.readouterr()
    assert "not scored: mask" in captured.err and "06.png: 1×5×5 with classes up to 0, expected 1×26×26 up to 1" in captured.err
    assert re.search(r"Dice class 1 after: mean .*, 5 files", captured.out)
    assert adapted(run, tmp_path / "c/images", tmp_path / "blind") == 0  # masks change nothing but the score
    for file in (tmp_path / "blind/masks").iterdir():
        assert file.read_bytes() == (tmp_path / "x/masks" / file.name).read_bytes()
    with open(tmp_path / "x" / "images.csv") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 7
    assert [name for name, row in rows.items() if not row["Dice class 1 after"]] == ["05.png", "06.png"]
    rows = {name: row for name, row in rows.items() if row["Dice class 1 after"]}
    model = iopfl.with_state(UNet(3, 2, 4, 1), torch.load(run / "seed0-c" / "global.pt", weights_only=True))
    for name, row in rows.items():
        truth = np.asarray(Image.open(root / "c/masks" / name)) > 0
        after = np.asarray(Image.open(tmp_path / "x" / "masks" / name)) > 0
        assert float(row["Dice class 1 after"]) == pytest.approx(iopfl.dice(after, truth))
        with torch.no_grad():
            p = model(torch.from_numpy(read_input(root / "c/images" / name))).softmax(dim=1)
        before = F.interpolate(p, truth.shape, mode="bilinear").argmax(dim=1)[0].numpy() > 0
        assert float(row["Dice class 1 before"]) == pytest.approx(iopfl.dice(before, truth), abs=0.002)


def test_adapting_skips_broken_images_and_overwrites_only_when_told(folder_run, tmp_path, capsys):
    root, run = folder_run
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(root / "c/images", images)
    _cut(images / "03.png")
    (images / "notes.txt").write_text("no image")
    assert adapted(run, images, out, "--masks", str(root / "c/masks")) == 1
    captured = capsys.readouterr()
    assert "left out" in captured.err and "03.png" in captured.err and "6 of 7 files" in captured.out
    assert sorted(f.stem for f in (out / "masks").iterdir()) == ["00", "01", "02", "04", "05", "06"]
    before = tree(tmp_path)
    assert adapted(run, images, out) == 2 and "--overwrite" in capsys.readouterr().err and tree(tmp_path) == before
    (images / "03.png").unlink()
    assert adapted(run, images, out, "--overwrite") == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("keep")
    assert adapted(run, images, other, "--overwrite") == 2 and (other / "letter.txt").read_text() == "keep"
    capsys.readouterr()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_text("no image")
    (tmp_path / "y.unfinished").mkdir()
    (tmp_path / "y.unfinished" / "letter.txt").write_text("keep")
    assert adapted(run, images, tmp_path / "y") == 2 and "in the way" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "y.unfinished")
    assert adapted(out, images, tmp_path / "y", "--online") == 2 and "leave out --online" in capsys.readouterr().err
    for run_folder, folder, part in ((tmp_path / "nowhere", images, "no such folder"), (run, tmp_path / "nowhere", "no such folder"),
                                     (tmp_path, images, "found 0"), (run, other, "no image"), (run, broken, "none of the 1 files")):
        assert adapted(run_folder, folder, tmp_path / "y") == (1 if folder is broken else 2)
        error = capsys.readouterr().err.splitlines()
        assert part in error[-1] and len(error) == 1 + (folder is broken) and not list(tmp_path.glob("y*"))


def test_adapting_online_takes_one_step_a_batch(folder_run, tmp_path, monkeypatch):
    root, run = folder_run
    steps, step = [], router.step
    monkeypatch.setattr(router, "step", lambda routed, images, generator: (
        steps.append(len(images)), step(routed, images, generator)))
    assert adapted(run, root / "c/images", tmp_path / "x", "--online") == 0
    assert steps == [5, 2]
    monkeypatch.undo()
    names = [f"personal-{name}" for name in "ab"] + ["global"]
    models = [iopfl.with_state(UNet(3, 2, 4, 1), torch.load(run / "seed0-c" / f"{name}.pt", weights_only=True)) for name in names]
    x = torch.from_numpy(np.concatenate([read_input(file) for file in sorted((root / "c/images").iterdir())]))
    p = router.adapt(router.build_routed(models, None, seeded()), x, generator=seeded(), online=True)
    for n, file in enumerate(sorted((root / "c/images").iterdir())):
        mask = np.asarray(Image.open(tmp_path / "x" / "masks" / file.name))
        wanted = F.interpolate(p[n:n + 1], mask.shape, mode="bilinear").argmax(dim=1)[0].numpy()
        assert (mask != wanted).mean() < 0.01


def test_adapting_to_volumes(tmp_path):
    """NIfTI in, NIfTI out: the file's own axes, affine and shape, whatever its orientation."""
    nibabel = pytest.importorskip("nibabel")
    write_volumes(tmp_path / "root", {"A": 4, "B": 4, "C": 4})
    assert train.main([*TINY, "--root", str(tmp_path / "root"), "--rounds", "2", "--skip-empty", "--out", str(tmp_path / "run")]) == 0
    images = tmp_path / "images"  # volumes and segmentations side by side, as in the data set
    for case, codes in (("p", "LPS"), ("q", "SRA")):
        body, _ = data.read_volume(tmp_path / "root/C/Case01.nii.gz")
        truth, _ = data.read_volume(tmp_path / "root/C/Case01_segmentation.nii.gz")
        for folder, values, name in ((images, body, f"{case}.nii"), (images, truth, f"{case}_segmentation.nii.gz")):
            spl = nibabel.Nifti1Image(values, affine("SPL", (3.0, 0.6, 0.5)))
            order = nibabel.orientations.ornt_transform(nibabel.io_orientation(spl.affine), nibabel.orientations.axcodes2ornt(codes))
            turned = spl.as_reoriented(order)
            folder.mkdir(exist_ok=True)
            if folder is images and case == "q" and name.endswith(".nii"):  # stored as shorts with a slope
                turned = nibabel.Nifti1Image(turned.get_fdata(), turned.affine)
                turned.set_data_dtype(np.int16)
                turned.header["cal_max"] = 900
            nibabel.save(turned, folder / name)
    assert adapted(tmp_path / "run", images, tmp_path / "out", "--masks", str(images)) == 0
    assert sorted(f.name for f in (tmp_path / "out/masks").iterdir()) == ["p.nii.gz", "q.nii.gz"]
    assert adapted(tmp_path / "run", images, tmp_path / "blind") == 0  # segmentations are no images
    assert (tmp_path / "blind/images.csv").read_text().count("\n") == 3
    found = []
    for case in "pq":
        mask, image = nibabel.load(tmp_path / f"out/masks/{case}.nii.gz"), nibabel.load(images / f"{case}.nii")
        assert mask.shape == image.shape and np.allclose(mask.affine, image.affine) and mask.header["cal_max"] == 0
        found.append(data.read_volume(tmp_path / f"out/masks/{case}.nii.gz")[0])
    assert np.array_equal(*found)
    with open(tmp_path / "out" / "images.csv") as file:
        p, q = csv.DictReader(file)
    # The confidence of a volume pools its slices; the first five are one batch.
    routed, _ = train.open_run(tmp_path / "out", "cpu")
    x = torch.from_numpy(data.network_input(images / "p.nii", data.read_pixels(images / "p.nii"), 16, 3, "volumes"))
    generator = seeded(0)
    views = router.draw_views(x, generator)
    noise = 0.5 * torch.randn(x.shape, generator=generator)
    of_view = router.view(router.predict(routed, router.view(x + noise, views)), views, inverse=True)
    a, b = 1 - router.predict(routed, x)[:, 0], 1 - of_view[:, 0]
    assert float(p["confidence"]) == pytest.approx((2 * (a * b).sum() / (a**2 + b**2).sum()).item(), abs=1e-5)
    assert float(p["Dice prostate after"]) == float(q["Dice prostate after"]) == pytest.approx(iopfl.dice(found[0] > 0, truth > 0))


# ---------------------------------------------------------------- the script: from start to finish
TOY = {"prostate": ["--size", "48", "--images-per-site", "32", "--depth", "3", "--rounds", "12", "--lr", "5e-3"],
       "fundus": ["--size", "32", "--images-per-site", "20", "--depth", "2", "--rounds", "20", "--lr", "5e-3"]}
ROW_KEYS = {"phase", "method", "seed", "hold_out", "site", "structure", "dice", "hd95", "assd", "cases"}


@pytest.fixture(scope="module", params=["prostate", "fundus"])
def toy_run(request, tmp_path_factory):
    """Task, folder and results.json of a run with two hospitals inside and one outside."""
    out = tmp_path_factory.mktemp(request.param) / "runs" / "toy"
    argv = ["--task", request.param, *TOY[request.param], "--width", "8", "--sites", "3", "--local-epochs", "2",
            "--device", "cpu", "--out", str(out)]
    assert train.main(argv) == 0
    return request.param, out, json.loads((out / "results.json").read_text())


def test_run_reports(toy_run):
    task, _, results = toy_run
    assert set(results) == {"config", "data", "environment", "files", "seconds", "rows"}
    assert results["config"]["task"] == task
    assert results["config"]["outside"]["routing"]["settings"]["activation"] == "softmax"
    assert list(results["config"]["inside"]) == ["fedavg", "iopfl"]
    assert {"inside", "outside", "total"} <= set(results["seconds"])
    assert results["environment"]["device"] == "cpu" and results["environment"]["peak_memory_mib"] > 0
    names, rows = list(data.HOSPITALS[task])[:3], results["rows"]
    count = results["config"]["images_per_site"]
    structures = data.STRUCTURES[task]
    wanted = [(phase, m, site, s) for phase in ("inside", "validation") for m in ("fedavg", "iopfl")
              for site in names[:2] for s in structures]
    wanted += [("outside", m, names[2], s) for m in ("global", "average", "routing") for s in structures]
    assert sorted((row["phase"], row["method"], row["site"], row["structure"]) for row in rows) == sorted(wanted)
    for row in rows:
        assert ROW_KEYS <= set(row) and (row["seed"], row["hold_out"]) == (0, names[2])
        assert 0 <= row["dice"] <= 1 and (row["phase"] == "validation" or row["hd95"] >= 0 and row["assd"] >= 0)
        assert row["cases"] == round(count * {"inside": 0.25, "validation": 0.15, "outside": 1}[row["phase"]])


def test_run_leaves_models_and_pictures(toy_run):
    task, out, results = toy_run
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    names = list(data.HOSPITALS[task])[:3]
    folder = out / f"seed0-{names[2]}"
    for picture in (out / "hospitals.png", out / "routing.png", folder / "outside.png", folder / "routing.png"):
        with Image.open(picture) as image:
            image.load()
            assert image.mode == "RGB" and min(image.size) > 50
    models = {f.name for f in folder.glob("*.pt")}
    assert models == {"global.pt", "adapted.pt", *(f"personal-{name}.pt" for name in names[:2])}
    for name in models:
        state = torch.load(folder / name, weights_only=True)
        assert all(torch.isfinite(value).all() and value.device.type == "cpu" for value in state.values())
    # The saved global model gives the Dice of the report.
    config = results["config"]
    site = data.simulate_sites(task, 0, config["size"], config["images_per_site"], 3).sites[0]
    structures = data.STRUCTURES[task]
    model = train.UNet(data.CHANNELS[task], 1 + len(structures), config["width"], config["depth"])
    model.load_state_dict(torch.load(folder / "global.pt", weights_only=True))
    prediction = iopfl.predict(model, site.test.images)
    rows = iopfl.evaluate(prediction, site.test.masks, site.test.cases, structures, site.spacing)
    reported = [row["dice"] for row in results["rows"]
                if (row["phase"], row["method"], row["site"]) == ("inside", "fedavg", site.name)]
    assert [row["dice"] for row in rows] == pytest.approx(reported, abs=0.02)


def best_constant(sites, classes):
    """The best mean Dice on the sites' test images of one mask for all: mean training masks, thresholded."""
    mean = torch.cat([torch.from_numpy(np.isin(site.train.masks, classes)) for site in sites]).float().mean(dim=0)
    masks = [mean.numpy() >= level for level in np.linspace(0, 0.95, 20)]
    return max(np.mean([np.mean([iopfl.dice(mask, np.isin(truth, classes)) for truth in site.test.masks])
                        for site in sites]) for mask in masks)


def test_trained_model_beats_every_constant_mask(toy_run):
    """Mean Dice of FedAvg on the test images inside, each structure, against the best constant mask."""
    task, _, results = toy_run
    config = results["config"]
    sites = data.simulate_sites(task, 0, config["size"], config["images_per_site"], 3).sites[:2]
    for structure, classes in data.STRUCTURES[task].items():
        trained = np.mean([row["dice"] for row in results["rows"]
                           if (row["method"], row["structure"]) == ("fedavg", structure)])
        constant = best_constant(sites, classes)
        print(f"{task} {structure}: trained {trained:.3f}, best constant mask {constant:.3f}")
        assert trained > constant + 0.02


@pytest.mark.parametrize("task", ["prostate", "fundus"])
def test_same_seed_gives_the_same_rows(tmp_path, task):
    def rows(name, seed):
        argv = [*TINY, "--task", task, "--seeds", str(seed), "--out", str(tmp_path / name), "--size", "24",
                "--width", "8", "--images-per-site", "12", "--rounds", "4", "--lr", "1e-2"]
        assert train.main(argv) == 0
        return json.loads((tmp_path / name / "results.json").read_text())["rows"]

    first = rows("first", 0)
    assert len({row["dice"] for row in first}) > 5  # not the same empty prediction everywhere
    assert rows("again", 0) == first
    assert [row["dice"] for row in rows("other", 1)] != [row["dice"] for row in first]


def test_folder_run(tmp_path):
    """Real images: grey values as classes, structures named by class, --hold-out all, two seeds."""
    for name in ("a", "b", "c"):
        write_site(tmp_path / "root", name, 5, values=(0, 100, 255))
    argv = [*TINY, "--root", str(tmp_path / "root"), "--mask-values", "0", "100", "255", "--hold-out", "all",
            "--seeds", "0", "1", "--out", str(tmp_path / "out")]
    assert train.main(argv) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["structure"] for row in rows} == {"class 1", "class 2"}
    assert {(row["seed"], row["hold_out"]) for row in rows} == {(s, h) for s in (0, 1) for h in "abc"}
    assert all(row["site"] == row["hold_out"] for row in rows if row["phase"] == "outside")
    assert all(row["site"] != row["hold_out"] for row in rows if row["phase"] == "inside")


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_flower_gives_the_same_models(tmp_path):
    """The file of the README, run by Flower's simulation in processes of its own."""
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    (block,) = [block for block in readme_blocks() if "flwr" in block]
    (tmp_path / "federation.py").write_text(block)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "federation.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    sites = data.simulate_sites("prostate", 0, size=32, images_per_site=12, sites=3).sites
    *_, last = iopfl.federate(UNet(1, 2, 8, 2, seeded()), {site.name: site.train for site in sites}, 2)
    expected = {"global": last.global_state, **{f"personal-{k}": state for k, state in enumerate(last.own("iopfl", name) for name in last.memory)}}
    for name, state in expected.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == state.keys()
        assert all(torch.allclose(found[entry], value, atol=1e-4) for entry, value in state.items()), name


def test_readme_snippets_run(tmp_path, monkeypatch):
    """The Python blocks of the README run as they stand, in order."""
    blocks = [block for block in readme_blocks() if "flwr" not in block]
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_benchmark_runs(tmp_path, monkeypatch, capsys):
    """At the smallest size: what it prints is there, no time is judged."""
    monkeypatch.setattr(Benchmark, "alone", lambda self, function, *positional: function(*positional))
    small = Benchmark("cpu", quick=True)
    small.repeats, small.counts, small.width, small.depth, small.size, small.batch = 1, (2, 4), 2, 1, 8, 2
    small.run(str(tmp_path / "growth.png"))
    printed = capsys.readouterr().out
    for part in ("sum ", "obvious ", "ours, bf16", "\n4 ", "ratio", "GB/s", "16, 3, 64 × 64"):
        assert part in printed
    with Image.open(tmp_path / "growth.png") as picture:
        assert min(picture.size) > 100


def test_the_obvious_step_of_the_benchmark_is_ours():
    """Without noise, dropout and views the parameters after a step agree."""
    bench = Benchmark("cpu", quick=True)
    bench.width, bench.depth, bench.size, bench.batch = 2, 1, 8, 2
    calm = {"noise": 0.0, "dropout": 0.0, "leash": None, "lr": 0.1}
    ours, obvious = bench.routed(6, **calm), bench.routed(6, **calm)
    bench.our_step(ours)()
    bench.obvious_step(obvious)()
    for (name, a), b in zip(ours.named_parameters(), obvious.parameters()):
        assert torch.allclose(a, b, atol=1e-4), name
    assert any(not torch.equal(a, ours._built[name]) for name, a in ours.named_parameters())


# ---------------------------------------------------------------- benchmark
class Benchmark:
    """Median milliseconds of our versions beside obvious ones, in one table for each question.

    Numbers of one line, and of the lines that a ratio is taken of, are measured in turn, round by round.
    """

    def __init__(self, device: str, quick: bool):
        self.device, self.repeats, self.counts = device, 3 if quick else 7, (2, 4, 8, 16, 32)
        self.width, self.depth, self.size, self.batch = (16, 3, 64, 5) if quick else (32, 4, 192, 8)
        self.per_client = 40 if quick else 10

    def milliseconds(self, *functions: Callable[[], object]) -> list[float]:
        """The median of each; one round warms up."""
        times: list[list[float]] = [[] for _ in functions]
        for _ in range(self.repeats + 1):
            for function, taken in zip(functions, times):
                begin = time.perf_counter()
                function()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                taken.append(1000 * (time.perf_counter() - begin))
        return [statistics.median(taken[1:]) for taken in times]

    def network(self, seed: int) -> nn.Module:
        return UNet(1, 2, self.width, self.depth, seeded(seed)).to(self.device, memory_format=torch.channels_last).eval()

    def images(self, count: int) -> torch.Tensor:
        x = torch.randn(count, 1, self.size, self.size, generator=seeded())
        return x.to(self.device, memory_format=torch.channels_last)

    def autocast(self, precision: str) -> torch.autocast:
        return train.autocast(SimpleNamespace(device=self.device, precision=precision))

    def run(self, picture: str | None) -> None:
        for part in (self.layers, self.step, self.experts, self.rounds, self.aggregation, self.training):
            print(f"\n{part.__doc__.splitlines()[0].format(**vars(self))}")
            part(*[picture] if part == self.experts else [])

    def layers(self) -> None:
        """Routed convolutions, values and gradients: {batch} images of {size} × {size}, width {width}, 6 experts"""
        shapes: dict = {}
        plain = self.network(0)
        for module in plain.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_pre_hook(lambda m, inputs: shapes.update({m: inputs[0].shape}))
        plain(self.images(self.batch))
        totals = np.zeros(4)
        print(f"{'input':22}{'layer':26}{'loop':>8}{'ours':>8}{'plain':>8}{'plain c.l.':>11}{'loop/ours':>11}{'ours/plain':>11}{'ours/c.l.':>10}")
        for conv, shape in shapes.items():
            conv._forward_pre_hooks.clear()
            routed = router.build_routed([conv] * 6)
            routed.trace.one_by_one = self.device == "cpu" and self.size >= 128  # by the size of the images, not of x
            ours = routed.network  # the layer itself
            layout = torch.channels_last if routed.trace.one_by_one else torch.contiguous_format  # as in the network
            contiguous = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
            x = torch.randn(shape, generator=seeded()).to(self.device)

            def both_ways(layer: Callable, layout: torch.memory_format = torch.contiguous_format) -> Callable:
                own = x.contiguous(memory_format=layout).clone().requires_grad_()

                def call() -> None:
                    y = layer(own)
                    y.backward(torch.ones_like(y))
                return call

            loop = both_ways(lambda z: looped_convolution(ours.router, [conv] * 6, z)[0])
            took = self.milliseconds(loop, both_ways(ours, layout), both_ways(contiguous), both_ways(conv, torch.channels_last))
            totals += took
            up = "up " if isinstance(conv, nn.ConvTranspose2d) else ""
            kind = f"{up}{conv.in_channels} to {conv.out_channels}, {data.by(conv.kernel_size)}"
            self.layer_line(data.by(shape), kind, took)
        self.layer_line("sum", "", totals)

    @staticmethod
    def layer_line(shape: str, kind: str, took) -> None:
        loop, ours, plain, last = took
        print(f"{shape:22}{kind:26}{loop:8.1f}{ours:8.1f}{plain:8.1f}{last:11.1f}{loop / ours:11.2f}{ours / plain:11.2f}{ours / last:10.2f}")

    def routed(self, experts: int, **changes) -> router.RoutedNetwork:
        """Ready for a step; two networks serve as all experts, so that originals take no memory."""
        settings = router.RoutingSettings(entropy=0.1, **changes)
        routed = router.build_routed([self.network(k) for k in range(2)] * (experts // 2), settings, seeded())
        routed.start = routed.parameters_now()
        routed.optimiser = torch.optim.Adam(routed.adaptable_parameters(), lr=settings.lr)
        return routed

    def our_step(self, routed, precision: str = "fp32") -> Callable:
        images, generator = self.images(self.batch), torch.Generator(self.device).manual_seed(0)

        def call() -> None:
            with self.autocast(precision):
                router.step(routed, images, generator)
        return call

    def plain_step(self, precision: str = "fp32") -> Callable:
        """The same objective on one network, all of whose weights move."""
        network = self.network(0)
        network.settings = router.RoutingSettings(entropy=0.1)
        network.probabilities = lambda x: router.wide(network(x)).softmax(dim=1)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-6)
        images, generator = self.images(self.batch), torch.Generator(self.device).manual_seed(0)

        def call() -> None:
            with self.autocast(precision):
                loss, _ = router.adaptation_loss(network, images, generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return call

    def obvious_step(self, routed: router.RoutedNetwork) -> Callable:
        """Layers as loops over the samples; a pass each for entropy, view and shape, and one to predict."""
        named = [dict(self.network(k).named_modules()) for k in range(2)] * 3
        for layer in routed.modules():
            if isinstance(layer, router.RoutedConv2d):
                def looped(x, layer=layer):
                    y, layer.trace.latest = looped_convolution(layer.router, [modules[layer.name] for modules in named], x)
                    return y
                layer.forward = looped
        images, generator = self.images(self.batch), torch.Generator(self.device).manual_seed(0)
        settings = routed.settings

        def call() -> None:
            clean = routed(images).softmax(dim=1)
            views = router.draw_views(images, generator)
            noise = settings.noise * torch.randn(images.shape, generator=generator, device=self.device)
            of_view = routed(router.view(images + noise, views)).softmax(dim=1)
            again = routed(images).softmax(dim=1)
            loss = (settings.entropy * router.entropy_loss(clean) + router.consistency_loss(again, of_view, views)
                    + settings.shape * router.shape_constraint(again, max(1, round(settings.radius * self.size))))
            routed.optimiser.zero_grad()
            loss.backward()
            routed.optimiser.step()
            with torch.no_grad():
                routed(images).softmax(dim=1)
        return call

    def step(self) -> None:
        """A step of adaptation (M6 to M8): {batch} images of {size} × {size}, width {width}, depth {depth}, 6 experts"""
        rows = {"obvious": self.obvious_step(self.routed(6)), "ours": self.our_step(self.routed(6, leash=None)),
                "ours, with the leash": self.our_step(self.routed(6)),
                "ours, bf16": self.our_step(self.routed(6, leash=None), "bf16"), "one plain U-Net": self.plain_step(),
                "one plain U-Net, bf16": self.plain_step("bf16")}
        took = dict(zip(rows, self.milliseconds(*rows.values())))
        print(f"{'':24}{'ms':>9}{'obvious / it':>14}{'it / plain':>12}")
        for name, value in took.items():
            plain = took["one plain U-Net" + ", bf16" * ("bf16" in name)]
            print(f"{name:24}{value:9.1f}{took['obvious'] / value:14.2f}{value / plain:12.2f}")

    def experts(self, picture: str | None) -> None:
        """A step of adaptation by the number of experts, without the leash"""
        steps = [self.our_step(self.routed(count, leash=None)) for count in self.counts]
        took = self.milliseconds(*steps)
        memory = [self.alone(self.memory_of_a_step, count) for count in self.counts]
        print(f"{'experts':10}{'ms':>9}{'/ 2 experts':>13}{'ensemble / 2':>14}{'experts, MiB':>14}{'peak, MiB':>11}")
        for count, ours, (weights, peak) in zip(self.counts, took, memory):
            print(f"{count:<10}{ours:9.1f}{ours / took[0]:13.2f}{count / 2:14.0f}{weights:14.0f}{peak:11.0f}")
        if picture:
            train.draw_curves({"routing: step time / step time with 2 experts": [ours / took[0] for ours in took],
                               "ensemble of as many networks": [count / 2 for count in self.counts]},
                              Path(picture), f"experts: {self.counts[0]}", str(self.counts[-1]))

    def memory_of_a_step(self, experts: int) -> tuple[float, float]:
        """MiB of the experts' weights, and the most at any time."""
        train.set_up()
        routed = self.routed(experts, leash=None)
        self.our_step(routed)()
        return sum(b.numel() * b.element_size() for b in routed.buffers()) / 2**20, self.peak_mib()

    def peak_mib(self) -> float:
        """Most memory so far: of the process, or of the GPU since the last call."""
        if self.device == "cpu":
            status = Path("/proc/self/status")  # getrusage counts in what was before exec
            return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else train.peak_memory()
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak

    def rounds(self) -> None:
        """A federated round of 6 clients with {per_client} images each, against their training alone"""
        network = self.network(0)
        clients = {}
        for k in range(6):
            x = self.images(self.per_client)
            clients[f"client{k}"] = SimpleNamespace(images=x, masks=(x[:, 0] > 0.5).to(torch.uint8))

        def bare() -> None:
            for client in clients.values():
                iopfl.train_local(network, client.images, client.masks, generator=seeded())

        training, whole = self.milliseconds(bare, lambda: list(iopfl.federate(network, clients, 1)))
        print(f"training {training:.0f} ms, round {whole:.0f} ms, ratio {whole / training:.3f}")

    def aggregation(self) -> None:
        """The mean of 100 clients"""
        states = [iopfl.snapshot(self.network(k)) for k in range(4)]
        size = sum(value.numel() * value.element_size() for value in states[0].values())
        total = {entry: value.clone() for entry, value in states[0].items()}

        def add_all() -> None:
            for k in range(100):
                for entry, value in states[k % 4].items():
                    total[entry].add_(value)

        ours, sums = self.milliseconds(lambda: iopfl.aggregate((states[k % 4] for k in range(100)), [1] * 100), add_all)
        print(f"{ours:.0f} ms of a model of {size / 2**20:.0f} MiB; 100 sums in place {sums:.0f} ms "
              f"({300 * size / sums / 1e6:.1f} GB/s), ratio {ours / sums:.2f}; peak memory "
              f"+{self.alone(self.memory_of_aggregation) * 2**20 / size:.1f} models")

    def memory_of_aggregation(self) -> float:
        """MiB by which the mean of 100 clients raises the peak; each client's state is new."""
        start = iopfl.snapshot(self.network(0))
        before = self.peak_mib()
        iopfl.aggregate(({entry: value.clone() for entry, value in start.items()} for _ in range(100)), [1] * 100)
        return self.peak_mib() - before

    def alone(self, function: Callable, *positional):
        """What the function returns in a process of its own, whose peak of memory is its own."""
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *positional).result()

    def training(self) -> None:
        """A training step of the plain U-Net, 5 images: fp32 against bf16"""
        print(f"{'width, depth, size':22}{'fp32':>9}{'bf16':>9}{'ratio':>8}")
        for width, depth, size in [(16, 3, 64), (16, 3, 96), (32, 4, 192)][:None if self.width == 32 else 2]:
            other = copy.copy(self)
            other.width, other.depth, other.size = width, depth, size
            x = other.images(5)
            network, masks = other.network(0), (x[:, 0] > 0.5).to(torch.uint8)

            def one(precision: str) -> None:
                with self.autocast(precision):
                    iopfl.train_local(network, x, masks, generator=seeded())

            full, half = self.milliseconds(lambda: one("fp32"), lambda: one("bf16"))
            print(f"{f'{width}, {depth}, {size} × {size}':22}{full:9.1f}{half:9.1f}{full / half:8.2f}")


# ---------------------------------------------------------------- fuzzing
class Hang(BaseException):
    """A case took too long; no `except Exception` holds it up."""


class Fuzz:
    """Damages what `train.py` reads, at random but seeded, and watches how it ends.

    Each case must end in success or in one clear line, within a minute, with nothing half-written and nothing changed
    but --out. `folder` takes sound material and the folder of the case under way.
    """

    tiny = [*TINY, "--threads", "1", "--size", "8", "--lr", "1e-2", "--evaluate-every", "9"]

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.seed, self.sound = folder, seed, folder / "sound"
        self.kinds = [self.image, self.mask, self.layout, self.model, self.results, self.state, self.arguments, self.new_images]
        for name in "ab":
            write_site(self.sound / "root", name, 4, size=12, grey=True)
        root = ["--root", str(self.sound / "root")]
        assert self.run([*self.tiny, *root, "--out", str(self.sound / "run")])[0] == 0
        self.two = [*self.tiny, *root, "--rounds", "2", "--seeds", "0", "1", "--jobs", "1"]
        with pytest.MonkeyPatch.context() as patch:  # interrupted after the second federation

            def interrupted(args, task, *more, run_outside=train.run_outside):
                if task.seed:
                    raise KeyboardInterrupt
                return run_outside(args, task, *more)

            patch.setattr(train, "run_outside", interrupted)
            assert self.run([*self.two, "--out", str(self.sound / "half")])[0] == 130
        try:
            import nibabel  # noqa: F401
        except ImportError:
            return
        write_volumes(self.sound / "volumes", {"BMC": 4, "UCL": 4}, shape=(9, 8, 3))
        self.kinds.append(self.volume)

    @staticmethod
    def run(argv: list[str], seconds: int = 60) -> tuple[int | None, str]:
        """Exit status and stderr of `train.main`."""
        def ring(*_) -> None:
            raise Hang(f"more than {seconds} s")

        before, errors = signal.signal(signal.SIGALRM, ring), io.StringIO()
        signal.alarm(seconds)
        try:
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(errors):
                return train.main(argv), errors.getvalue()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def case(self, number: int) -> tuple[str, int, str]:
        """Kind, exit status and complaint of a case; AssertionError where it does not end as it should."""
        self.rng = random.Random(f"{self.seed} {number}")
        kind, self.place = self.rng.choice(self.kinds), self.folder / "case"
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        argv = [str(word) for word in kind()]
        out = self.place / "out"
        if "--out" not in argv:
            argv += ["--out", str(out)]
        before = self.elsewhere()
        status, errors = self.run(argv)
        what = f"case {number} ({kind.__name__}, {argv}): {status}, {errors!r}"
        assert status in (0, 1, 2) and "IOPFL_TRACEBACK" not in errors and "Traceback" not in errors, what
        lines = errors.split("\n")[:-1]
        assert all(line.startswith("train.py: ") and line.isprintable() for line in lines), what
        last = [line for line in lines if not line.startswith(("train.py: left out", "train.py: not scored"))]
        adapting = "--adapt" in argv
        assert len(last) == (status != 0) or status == 1 and adapting and not last and out.exists(), what
        assert self.elsewhere() == before, what
        assert not list(self.place.rglob("*.partial")), what
        if status == 2 or status and not (adapting and not last):
            assert not out.exists(), what
        elif out.exists():
            self.complete(out, adapting, what)
        return kind.__name__, status, last[-1] if last else ""

    def elsewhere(self) -> dict:
        """Everything outside --out."""
        return {name: os.readlink(self.place / name) if (self.place / name).is_symlink() else
                (self.place / name).read_bytes() if (self.place / name).is_file() else None
                for name in (str(path.relative_to(self.place)) for path in self.place.rglob("*")) if not name.startswith("out")}

    def complete(self, out: Path, adapting: bool, what: str) -> None:
        """The report is whole, models are finite, masks have the size of their images."""
        found = json.loads((out / ("adapted.json" if adapting else "results.json")).read_text())
        assert adapting or found["rows"] and all(0 <= row["dice"] <= 1 for row in found["rows"]), what
        for file in out.rglob("*.pt"):
            assert all(value.isfinite().all() for value in torch.load(file, weights_only=True).values()), what
        if adapting:
            with open(out / "images.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == found["files"] == len(list((out / "masks").iterdir())), what
            for row in rows:
                assert 0 <= float(row["foreground"]) <= 1 and 0 <= float(row["confidence"]) <= 1.001, what
            for mask in (out / "masks").glob("*.png"):
                image = next(path for path in (self.place / "images").iterdir() if path.stem == mask.stem)
                assert Image.open(mask).size == data.read_image(image).shape[1::-1], what

    # What is damaged; each returns the command line.
    def copied(self, name: str, to: str | None = None) -> Path:
        shutil.copytree(self.sound / name, self.place / (to or name))
        return self.place / (to or name)

    def any_file(self, folder: Path, pattern: str = "*") -> Path:
        return self.rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))

    def bytes(self, file: Path) -> None:
        content, rng = bytearray(file.read_bytes() or b"x"), self.rng
        place = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content = content[:place]
            case 1:
                for _ in range(rng.choice([1, 3, 30])):
                    content[rng.randrange(len(content))] = rng.randrange(256)
            case 2:
                content[place:place + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
            case 3:
                content = bytearray(rng.randbytes(rng.randrange(2000)))
            case 4:
                content += content[:place]
            case 5:
                for _ in range(3):  # in the header, if there is one
                    content[rng.randrange(min(64, len(content)))] = rng.choice([0, 255, rng.randrange(256)])
        file.write_bytes(content)

    def pixels(self, file: Path) -> None:
        """Another mode, size, format or orientation, values that are not finite."""
        rng = self.rng
        mode = rng.choice(["1", "L", "P", "RGB", "RGBA", "LA", "I", "F", "CMYK", "YCbCr", "I;16"])
        image = Image.new("I", (rng.choice([1, 2, 12, 31]), rng.choice([1, 12, 12, 40])))
        image.putdata([rng.choice([0, 1, 255, -3, 70000]) for _ in range(image.width * image.height)])
        if mode == "F":
            image = image.convert("F")
            image.putpixel((0, 0), rng.choice([math.nan, math.inf, 1e38, -1e38, 0.5]))
        elif mode != "I":
            image = image.convert("L" if mode != "I;16" else "I;16")
            image = image if mode == "I;16" else image.convert(mode)
        kind, options = rng.choice(["png", "tif", "jpg", "jpeg", "TIFF"]), {}
        if rng.random() < 0.2:
            exif = Image.Exif()
            exif[274] = rng.randrange(10)
            options["exif"] = exif
        if rng.random() < 0.1 and kind == "tif":
            options |= {"save_all": True, "append_images": [image]}
        file.unlink()
        try:
            image.save(file.with_suffix("." + kind), **options)
        except (OSError, ValueError, KeyError):  # a format that does not know the mode
            image.convert("L").save(file.with_suffix(".png"))

    def spoil(self, folder: Path, times: int) -> None:
        for _ in range(times):
            if any(path.is_file() for path in folder.rglob("*")):
                self.spoil_one(self.any_file(folder))

    def spoil_one(self, file: Path) -> None:
        match self.rng.randrange(8):
            case 0 | 1 | 2:
                self.bytes(file)
            case 3 | 4 | 5:
                self.pixels(file)
            case 6:
                file.unlink()
                self.rng.choice([lambda: file.mkdir(), lambda: os.mkfifo(file), lambda: file.symlink_to(file.name),
                                 lambda: file.symlink_to("/nowhere"), lambda: file.write_bytes(b"")])()
            case 7:
                name = self.rng.choice(["a b", "\N{GREEK SMALL LETTER ALPHA}", "new\nline", "-x", "x_segmentation", "." + file.stem,
                                        "01", "x" * 200, "\udcff", "%s", "'\"", "A" + file.stem])
                file.rename(file.with_name(name + file.suffix))

    def options(self) -> list[str]:
        return self.rng.choice([[], [], ["--mask-values", "0", "1"], ["--mask-values", "0", "1", "255"],
                                ["--hold-out", "none"], ["--hold-out", "a"]])

    def image(self) -> list:
        root = self.copied("root")
        self.spoil(root / self.rng.choice("ab") / "images", self.rng.choice([1, 1, 4]))
        return [*self.tiny, "--root", root, *self.options()]

    def mask(self) -> list:
        root = self.copied("root")
        self.spoil(root / self.rng.choice("ab") / "masks", 1)
        return [*self.tiny, "--root", root, *self.options()]

    def layout(self) -> list:
        root = self.copied("root")
        for _ in range(self.rng.choice([1, 2, 3])):
            if not root.exists():
                break
            folder = self.rng.choice([root, *sorted(path for path in root.rglob("*") if path.is_dir())])
            match self.rng.randrange(7):
                case 0:
                    other = folder.with_name(self.rng.choice(
                        ["image", "mask", "train", "test", "val", "ROIs", "ISBI", "x\ny", "c", ".hidden", "a b", "\udcff"]))
                    if not other.exists():
                        folder.rename(other)
                case 1:
                    shutil.rmtree(folder, ignore_errors=True)
                case 2:
                    (folder / self.rng.choice(["train", "images", "masks", "test", "ROIs", "val", "c"])).mkdir(exist_ok=True)
                case 3:
                    self.rng.choice([lambda p: p.symlink_to(p.name), lambda p: p.symlink_to(".."), os.mkfifo])(
                        folder / f"more{self.rng.random()}")
                case 4:
                    (folder / self.rng.choice(["train.txt", "test.txt", "notes.txt", "z.png", "z.nii.gz"])).write_bytes(
                        self.rng.choice([b"", b"00 01", b"zz", b"\xff\xfe"]))
                case 5:
                    for part, names in (("train", ("00", "01")), ("test", ("02", "03"))):
                        for kind in ("images", "masks"):
                            for file in (folder / kind / f"{name}.png" for name in names):
                                if file.exists():
                                    (folder / part / kind).mkdir(parents=True, exist_ok=True)
                                    file.rename(folder / part / kind / file.name)
                case 6:
                    if any(path.is_file() for path in folder.rglob("*")):
                        file = self.any_file(folder)
                        shutil.copy(file, file.with_suffix(self.rng.choice([".jpg", ".tif", ".PNG"])))
        return [*self.tiny, "--root", root, *self.options()]

    def volume(self) -> list:
        root = self.copied("volumes")
        file = self.any_file(root)
        content = bytearray(gzip.decompress(file.read_bytes()))
        if self.rng.random() < 0.7:
            for _ in range(self.rng.choice([1, 2, 8])):  # the header: sizes, types, scales, axes
                content[self.rng.randrange(348)] = self.rng.choice([0, 1, 255, 127, self.rng.randrange(256)])
            file.write_bytes(gzip.compress(bytes(content)))
        else:
            self.bytes(file)
        return [*self.tiny, "--root", root, *self.options()]

    def model(self) -> list:
        run = self.copied("run")
        file = self.any_file(run, "*.pt")
        self.entries(file) if self.rng.random() < 0.5 else self.bytes(file)
        return self.adaptation(run)

    def entries(self, file: Path) -> None:
        """One entry of a saved dictionary becomes something else."""
        state, rng = torch.load(file, weights_only=True), self.rng
        name = rng.choice(sorted(state))
        value = state.pop(name)
        tensor = value if isinstance(value, torch.Tensor) else torch.ones(3)
        other = rng.choice([None, tensor.double(), tensor.flatten()[:1], tensor * math.nan, 7, "x", [], {}, -1, {"x": tensor},
                            tensor[None], tensor.to(torch.complex64), tensor.to_sparse()])
        if other is not None:
            state[rng.choice([name, name, "x", 3])] = other
        torch.save(state, file)

    def adaptation(self, run: Path) -> list:
        images = self.place / "images"
        if not images.exists():
            shutil.copytree(self.sound / "root" / "b" / "images", images)
        return ["--adapt", run, "--images", images, "--device", "cpu", "--threads", "1",
                *self.rng.choice([[], ["--online"], ["--masks", self.sound / "root" / "b" / "masks"]])]

    def json_value(self, file: Path) -> None:
        """Somewhere in a JSON file a value becomes another one, or goes."""
        found, rng = json.loads(file.read_text()), self.rng
        at = found
        while True:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.2:
                break
            at = at[key]
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice([None, "", "x", -1, 0, 1, 2.5, 10**20, 1e308, math.nan, math.inf, True, [], {}, [1], {"a": 1}, ["x"]])
        file.write_text(json.dumps(found))

    def results(self) -> list:
        run = self.copied("run")
        file = run / "results.json"
        if self.rng.random() < 0.3:  # of a run that was adapted
            assert self.run([str(word) for word in self.adaptation(run)] + ["--out", str(self.place / "again")])[0] == 0
            run, file = self.place / "again", self.place / "again" / "adapted.json"
        self.json_value(file) if self.rng.random() < 0.8 else self.bytes(file)
        return self.adaptation(run)

    def state(self) -> list:
        self.copied("half.unfinished", "out.unfinished")
        file = self.any_file(self.place / "out.unfinished", self.rng.choice(["*.pt", "state.json", "*.json"]))
        if file.suffix == ".json" and self.rng.random() < 0.7:
            self.json_value(file)
        elif file.suffix == ".pt" and self.rng.random() < 0.5:
            self.entries(file)
        else:
            self.bytes(file)
        return [*self.two, self.rng.choice(["--resume", "--resume", "--overwrite"])]

    def new_images(self) -> list:
        images = self.place / "images"
        shutil.copytree(self.sound / "root" / "b" / "images", images)
        self.spoil(images, self.rng.choice([1, 2, 4]))
        return self.adaptation(self.sound / "run")

    def arguments(self) -> list:
        rng, values = self.rng, ["", "0", "1", "2", "3", "-1", "0.5", "nan", "inf", "-inf", "x", "1e-3", "all", "none", "a", "\n", "é"]
        words = [*self.tiny, *rng.choice([[], ["--root", self.sound / "root"]])]
        names = ["--task", "--size", "--sites", "--images-per-site", "--seeds", "--rounds", "--participation", "--local-epochs",
                 "--batch-size", "--lr", "--alpha", "--width", "--depth", "--methods", "--hold-out", "--mask-values", "--precision",
                 "--jobs", "--threads", "--evaluate-every", "--device", "--root", "--adapt", "--images", "--masks", "--unknown"]
        flags = ["--online", "--resume", "--overwrite", "--authors", "--skip-empty", "--list"]
        for _ in range(rng.choice([1, 2, 3])):
            if rng.random() < 0.2:
                words.append(rng.choice(flags))
                continue
            name = rng.choice(names)
            more = {"--task": ["fundus", "prostate"], "--methods": [*train.KNOWN], "--precision": ["bf16"], "--device": ["cuda", "auto"],
                    "--size": ["9", "99999"], "--width": ["99999"], "--depth": ["5", "40"], "--threads": ["99999"],
                    "--seeds": ["4294967295", "4294967296", "1 1"], "--lr": ["1e30", "1e-30"]}.get(name, [])
            words += [name, *rng.choice([*values, *more, *more]).split(" ")]
        if "--authors" in words:
            words += ["--rounds", "1"]
        return [word for word in words if word != "--list" or "--out" not in words]


def fuzz(count: int, seed: int, folder: Path) -> int:
    """Runs the cases and prints what came of them; the number of faults."""
    fuzzer, found, faults = Fuzz(folder, seed), {}, 0
    for number in range(count):
        try:
            kind, status, _ = fuzzer.case(number)
            found[kind, status] = found.get((kind, status), 0) + 1
        except (Exception, Hang) as error:
            faults += 1
            print(f"case {number}, {type(error).__name__}: {error}", flush=True)
    print(f"{count} cases, seed {seed}: {faults} faults. By what was damaged, with exit status 0, 1, 2:")
    for kind in sorted({kind for kind, _ in found}):
        print(f"  {kind:12}" + "".join(f"{found.get((kind, status), 0):7}" for status in (0, 1, 2)))
    return faults


def test_fuzz(tmp_path, capsys, own_signals):
    assert fuzz(40, 1, tmp_path) == 0, capsys.readouterr().out


def benchmark(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time our versions against slow, obvious ones; or --fuzz.")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--default-memory", action="store_true", help="leave glibc's handling of memory as it is")
    parser.add_argument("--picture", metavar="FILE", help="draw the growth with the number of experts")
    parser.add_argument("--fuzz", type=int, metavar="N", help="instead damage files and arguments N times and see what happens")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --fuzz")
    args = parser.parse_args(argv)
    if args.fuzz:
        with tempfile.TemporaryDirectory() as folder:
            return int(fuzz(args.fuzz, args.seed, Path(folder)) > 0)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if not args.default_memory:
        train.set_up()
    for device in ["cpu", "cuda"][:1 + torch.cuda.is_available()]:
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"\n{where}, torch {torch.__version__}; medians in milliseconds, c.l. = channels last")
        Benchmark(device, args.quick).run(args.picture if device == "cpu" else None)
    return 0


if __name__ == "__main__":
    sys.exit(benchmark())
