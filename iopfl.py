"""Inside the federation: training, aggregation, personalised models, evaluation (M1, M2, M3, M9).

Imports torch and numpy only. The numbers M1 … M9 are those of README.md."""

import copy
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

State = dict[str, Tensor]


# ---------------------------------------------------------------- one client (M1)
def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice, averaged over all classes, the background among them; sums run over the batch.
    logits: (N, C, H, W); target: (N, H, W) class indices. A scalar in [0, 1]. Published code."""
    # In float32 at least: bfloat16 is too coarse for sums over many pixels.
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    truth = nn.functional.one_hot(target.long(), logits.shape[1]).permute(0, 3, 1, 2)
    overlap = (probabilities * truth).sum(dim=(0, 2, 3))  # (C,)
    size = probabilities.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def train_local(model: nn.Module, images: Tensor, masks: Tensor, *, epochs: int = 1,
                batch_size: int = 5, lr: float = 1e-3, proximal: float = 0.0,
                anchor: State | None = None, generator: torch.Generator) -> float:
    """Train `model` in place on one client's images (M1); return the last epoch's mean Dice loss.

    images: (N, C, H, W) and masks: (N, H, W) class indices, on the model's device.
    proximal: μ of the term μ/2 · ‖w - anchor‖²; anchor: by default the weights at the call.
    generator (CPU) draws the order of the images.
    Published code: Adam with amsgrad, new each round, no weight decay, no augmentation."""
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)
    dtype = next(model.parameters()).dtype
    anchor = (anchor or snapshot(model)) if proximal else {}
    pulled_to = [anchor[name].to(w.device) for name, w in model.named_parameters() if proximal]
    for _ in range(epochs):
        losses = []
        order = torch.randperm(len(images), generator=generator).to(images.device)
        # Batches of nearly equal size: a last batch of one image would upset BatchNorm.
        for batch in order.tensor_split(-(-len(images) // batch_size)):
            loss = soft_dice_loss(model(images[batch].to(dtype)), masks[batch])
            losses.append(loss.detach())
            for w, before in zip(model.parameters(), pulled_to):  # none without a pull
                loss = loss + proximal / 2 * (w - before).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return torch.stack(losses).mean().item()


def snapshot(model: nn.Module) -> State:
    """A copy of the model's state, on the CPU; `state_dict()` alone refers to the live tensors."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of `model` with the weights of `state`, in evaluation mode."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model.eval()


def check_finite(state: State, whose: str) -> None:
    """Raises ValueError, naming the entry, where a value of a state is not finite."""
    for entry, value in state.items():
        if not (value.sum().isfinite() or value.isfinite().all()):  # a sum is cheap, may overflow
            raise ValueError(f"{whose}: '{entry}' is not finite; a lower learning rate may help")


# ---------------------------------------------------------------- the method: M1 and M2
def aggregate(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean of client states: g = Σ_k w_k · state_k / Σ w (M1).

    weights: one a client, usually its number of training images. Floating entries are averaged,
    half precision in float32; BatchNorm's statistics too: without them FedAvg becomes FedBN.
    Integers (`num_batches_tracked`) take the maximum.
    Raises ValueError, naming the entry, where states differ in kind or a value is not finite."""
    total = float(sum(weights))
    if len(states) != len(weights) or min(weights, default=0) < 0 or not 0 < total < np.inf:
        raise ValueError(f"aggregate: {len(states)} states with the weights {list(weights)}")
    kinds = [{(entry, v.shape, v.dtype) for entry, v in state.items()} for state in states]
    for client, (state, kind) in enumerate(zip(states, kinds)):
        for entry, *_ in kind ^ kinds[0]:
            raise ValueError(f"aggregate: clients 0 and {client} differ in '{entry}'")
        check_finite(state, f"aggregate: client {client}")
    result: State = {}
    for entry, first in states[0].items():
        if first.is_floating_point():
            mean = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
            for weight, state in zip(weights, states):
                mean.add_(state[entry], alpha=weight / total)
            result[entry] = mean.to(first.dtype)
        else:
            result[entry] = torch.stack([state[entry] for state in states]).amax(dim=0)
    return result


def update_personal(personal: State | None, local: State, alpha: float) -> State:
    """p^t = α · p^{t-1} + (1-α) · w^t; the first one is the local model itself (M2).

    Unrolled this is what the paper says, global and local updates accumulated (M3, tested): with
    D^s = g^s - g^{s-1} and d^t = w^t - g^{t-1},
    p^T = g^0 + Σ_{s<T} (1-α^{T-s})D^s + Σ_{t≤T} c_t d^t, c_1 = α^{T-1}, c_t = (1-α)α^{T-t}.
    alpha: in [0, 1]; ours 0.7, published code 0.1. New tensors; integers come from `local`."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"update_personal: alpha must lie in [0, 1], not {alpha}")
    before = local if personal is None else personal
    return {entry: torch.lerp(value, before[entry], alpha) if value.is_floating_point()
            else value.clone() for entry, value in local.items()}


# ---------------------------------------------------------------- methods and their one loop
@dataclass(frozen=True)
class Method:
    """A federated method as its answers to three questions; METHODS holds the usual ones.
    stays: which layers never leave a client? "none", "batchnorm", "head" (the last one) or "all".
    proximal: how strong is the pull towards the global model in local training (μ)?
    own: what is a client's own model? M2 with `alpha` over its "local" models (alpha 0: the last
    one), or over the "shared" one, which is the global model with the layers that stayed; or a
    "second" model, trained beside the shared one and pulled towards it by `own_proximal`."""

    stays: str = "none"
    proximal: float = 0.0
    own: str = "shared"
    alpha: float = 0.0
    own_proximal: float = 0.0


METHODS = {
    "local": Method(stays="all"),
    "fedavg": Method(),  # McMahan et al. 2017
    "fedprox": Method(proximal=0.001),  # Li et al. 2020
    "fedbn": Method(stays="batchnorm"),  # Li et al. 2021
    "fedper": Method(stays="head"),  # Arivazhagan et al. 2019
    "ditto": Method(own="second", own_proximal=0.1),  # Li et al. 2021
    "fedavg-ft": Method(own="local"),  # the last local model alone
    "iopfl": Method(own="local", alpha=0.7),  # published code: alpha 0.1
}


def staying_entries(model: nn.Module, stays: str) -> set[str]:
    """The entries of the state that `Method.stays` means, by module type and order, not by name."""
    layers = [(name, module) for name, module in model.named_modules()
              if [*module.parameters(recurse=False), *module.buffers(recurse=False)]]
    norms = [pair for pair in layers if isinstance(pair[1], nn.modules.batchnorm._BatchNorm)]
    chosen = {"none": [], "batchnorm": norms, "head": layers[-1:], "all": layers}
    return {f"{name}.{entry}".lstrip(".") for name, module in chosen[stays]
            for entry in module.state_dict()}


@dataclass
class Round:
    """All that the next round starts from: g^t and each client's own model (p_k^t), whole states on
    the CPU; a client that never took part has none. losses: of training, by client."""

    number: int
    global_state: State
    own: dict[str, State]
    losses: dict[str, float]


def federate(model: nn.Module, clients: dict, rounds: int, method: Method = METHODS["iopfl"], *,
             seed: int = 0, epochs: int = 1, batch_size: int = 5, lr: float = 1e-3,
             participation: float = 1.0, after: Round | None = None) -> Iterator[Round]:
    """Federated averaging (M1) with an own model for each client (M2); yields each `Round`.
    model: its weights are the start g^0, also when going on; afterwards they are some client's.
    clients: name → object with `images` (N, C, H, W) and `masks` (N, H, W) on the model's device.
    participation: share of the clients, drawn for each round; who is absent keeps its own model.
    after: an earlier round to go on from, to the same bits: what is drawn comes from (seed, round,
    client) alone. Under torchrun each process trains its share of the clients.
    Raises ValueError, naming client and round, where a model is not finite any more."""
    if method.stays != "none" and (method.own, method.alpha) != ("shared", 0):
        raise ValueError("federate: with layers that stay, own must be 'shared' and alpha 0")
    start, stays = snapshot(model), staying_entries(model, method.stays)
    last = after or Round(0, start, {}, {})

    def train_client(name: str, number: int, state: State, **pull) -> tuple[State, float]:
        model.load_state_dict(state)
        loss = train_local(model, clients[name].images, clients[name].masks, epochs=epochs, lr=lr,
                           batch_size=batch_size, generator=seeded(seed, number, name), **pull)
        check_finite(model.state_dict(), f"client {name} in round {number}")
        return snapshot(model), loss

    for number in range(last.number + 1, rounds + 1):
        order = torch.randperm(len(clients), generator=seeded(seed, number, "all"))
        drawn = order[:max(1, round(participation * len(clients)))].tolist()
        present = [name for n, name in enumerate(clients) if n in drawn]
        local, second, losses = {}, {}, {}  # local: w_k^t
        for name in my_share(present):
            own = last.own.get(name, start)
            begin = last.global_state | {entry: own[entry] for entry in stays}
            local[name], losses[name] = train_client(name, number, begin, proximal=method.proximal)
            if method.own == "second":
                second[name], _ = train_client(name, number, own, proximal=method.own_proximal,
                                               anchor=last.global_state)
        local, second, losses = gather(local), gather(second), gather(losses)
        sizes = [len(clients[name].images) for name in present]
        global_state = aggregate([local[name] for name in present], sizes)  # g^t (M1)
        own = dict(last.own)
        for name in present:
            shared = global_state | {entry: local[name][entry] for entry in stays}
            candidates = {"local": local.get(name), "shared": shared, "second": second.get(name)}
            own[name] = update_personal(own.get(name), candidates[method.own], method.alpha)  # M2
        last = Round(number, global_state, own, {name: losses[name] for name in present})
        yield last


def seeded(seed: int, number: int, client: str) -> torch.Generator:
    """Draws the order of a client's images in a round, or, for "all", who takes part in it."""
    mixed = np.random.SeedSequence([seed, number, zlib.crc32(client.encode())])
    return torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))


# ---------------------------------------------------------------- several processes (torchrun)
def my_share(names: Iterable) -> list:
    """Of the clients, or methods, those whose work is this process's; all without torchrun."""
    several = dist.is_available() and dist.is_initialized()
    return [*names][dist.get_rank()::dist.get_world_size()] if several else [*names]


def gather(mine: dict) -> dict:
    """The dictionaries of all processes as one. All must call it; tensors lie on the CPU."""
    parts = [mine]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


# ---------------------------------------------------------------- evaluation (M9)
@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class indices (N, H, W) of images (N, C, H, W), by `model` in evaluation mode.
    Raises ValueError where it has one output channel, or training has diverged."""
    classes, dtype = [], next(model.parameters()).dtype
    for batch in images.split(batch_size):
        logits = model.eval()(batch.to(dtype))
        if logits.shape[1] < 2 or not logits.isfinite().all():
            raise ValueError("predict: logits are not finite, or of one channel alone")
        classes.append(logits.argmax(dim=1))
    return torch.cat(classes)


def dice(prediction: np.ndarray, target: np.ndarray) -> float:
    """2·|A ∩ B| / (|A| + |B|) of two boolean masks of one shape, in [0, 1]; both empty: 1."""
    size = int(prediction.sum()) + int(target.sum())
    return 2 * int((prediction & target).sum()) / size if size else 1.0


def hd95_and_assd(prediction: np.ndarray, target: np.ndarray,
                  spacing: Sequence[float]) -> tuple[float, float]:
    """HD95, the larger of the two directed 95th percentiles of the distances between the surfaces,
    and ASSD, the mean of both directions' distances pooled; in units of `spacing`.
    Boolean masks (H, W) or (D, H, W) of one shape; spacing: one positive number an axis.
    Both masks empty: nan. One empty: the diagonal of the field of view."""
    if prediction.shape != target.shape or len(spacing) != target.ndim:
        raise ValueError(f"masks of {prediction.shape} and {target.shape}, spacing {spacing}")
    if not prediction.any() or not target.any():
        diagonal = float(np.linalg.norm(np.multiply(target.shape, spacing)))
        return (diagonal, diagonal) if prediction.any() or target.any() else (np.nan, np.nan)
    a, b = surface_points(prediction, spacing), surface_points(target, spacing)
    to_b, to_a = nearest(a, b), nearest(b, a)
    hd95 = max(np.percentile(to_b, 95), np.percentile(to_a, 95))
    return float(hd95), float(np.concatenate([to_b, to_a]).mean())


def surface_points(mask: np.ndarray, spacing: Sequence[float]) -> Tensor:
    """(points, axes): elements with a 4- (6-) neighbour outside the mask, or beyond the border."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(mask.ndim):
        inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    surface = (padded & ~inside)[(slice(1, -1),) * mask.ndim]
    return torch.from_numpy(np.argwhere(surface) * np.asarray(spacing, dtype=float))


def nearest(points: Tensor, others: Tensor) -> np.ndarray:
    """The exact distance from each point to the nearest of the others."""
    mode, found = "donot_use_mm_for_euclid_dist", []  # the faster matrix product rounds
    for chunk in points.split(128):  # a few others bound the distance: those beyond need no look
        bound = 1.000001 * torch.cdist(chunk, others[::32], compute_mode=mode).amin(dim=1).max()
        low, high = chunk.amin(dim=0) - bound, chunk.amax(dim=0) + bound
        close = others[((others >= low) & (others <= high)).all(dim=1)]
        found.append(torch.cdist(chunk, close, compute_mode=mode).amin(dim=1))
    return torch.cat(found).numpy()


def evaluate(prediction: Tensor, masks: Tensor, cases: Sequence[str], structures: dict,
             spacing: Sequence[float] | dict, distances: bool = True) -> list[dict]:
    """Dice, HD95 and ASSD of each structure, per case, then averaged over the cases (M9).
    prediction, masks: (N, H, W) class indices; cases: N names, the same for all slices of a volume.
    structures: name → classes. spacing: (row, column) or (slice, row, column), by case or of all.
    A row a structure; distances, None if off, count the cases with a mask that is not empty."""
    spacing = spacing if isinstance(spacing, dict) else dict.fromkeys(cases, spacing)
    prediction, masks, cases = prediction.cpu().numpy(), masks.cpu().numpy(), np.array(cases)
    if prediction.shape != masks.shape or len(masks) != len(cases):
        raise ValueError(f"evaluate: {prediction.shape}, {masks.shape} and {len(cases)} cases")
    rows = []
    for structure, classes in structures.items():
        scores, lengths = [], []
        for case in dict.fromkeys(cases.tolist()):
            chosen = cases == case
            p, t = (np.isin(m[chosen], list(classes)) for m in (prediction, masks))
            if len(spacing[case]) == 2 and len(p) == 1:
                p, t = p[0], t[0]
            scores.append(dice(p, t))
            if distances and (p.any() or t.any()):
                lengths.append(hd95_and_assd(p, t, spacing[case]))
        hd95, assd = np.mean(lengths, axis=0).tolist() if lengths else (None, None)
        rows.append({"structure": structure, "dice": float(np.mean(scores)), "hd95": hd95,
                     "assd": assd, "cases": len(scores), "distance_cases": len(lengths)})
    return rows
