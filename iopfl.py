"""Inside the federation: local training, aggregation, personalised models, and evaluation (M1, M2, M9).

Imports torch and numpy only; a client is any object with `images`, `masks` and `cases`.
The numbers M1 … M9 are those of README.md.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]


# ---------------------------------------------------------------- training one client
def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice, averaged over all classes, the background among them; sums run over the batch.

    logits: (N, C, H, W); target: (N, H, W) class indices. Returns a scalar in [0, 1].
    Source: published code.
    """
    probabilities = logits.softmax(dim=1)
    truth = nn.functional.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2)
    overlap = (probabilities * truth).sum(dim=(0, 2, 3))
    size = probabilities.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def train_local(model: nn.Module, images: Tensor, masks: Tensor, *, epochs: int = 1, batch_size: int = 5,
                lr: float = 1e-3, generator: torch.Generator) -> float:
    """Train `model` in place on one client's images (M1) and return the mean loss of the last epoch.

    images: (N, C, H, W); masks: (N, H, W) class indices. generator (CPU) draws the order of the images.
    The optimiser is new at each call: its moments belong to the weights that went away.
    Source: published code (Adam with amsgrad, no weight decay, no augmentation).
    """
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        # Batches of nearly equal size: a last batch of one image would upset BatchNorm.
        batches = order.tensor_split(-(-len(images) // batch_size))
        losses = []
        for batch in batches:
            loss = soft_dice_loss(model(images[batch]), masks[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


# ---------------------------------------------------------------- federation
def snapshot(model: nn.Module) -> State:
    """A copy of the model's whole state; `state_dict()` alone only refers to the live tensors."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def aggregate(states: Iterable[State], weights: Sequence[float]) -> State:
    """The weighted mean of client states: g = Σ_k w_k · state_k / Σ w (M1).

    states: one a client, read one after the other, so that a generator keeps only one in memory.
    weights: one a client, not negative, usually its number of training images.
    Floating entries are averaged, BatchNorm's running statistics too: without them FedAvg becomes a
    kind of FedBN. Integer entries (`num_batches_tracked`) take the maximum.
    Raises ValueError, naming client and entry, where keys, shapes or types differ or a value is not finite.
    """
    total = float(sum(weights))
    if min(weights, default=0) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"aggregate: weights must be finite, not negative and not all zero, got {list(weights)}")
    result: State = {}
    count = 0
    for client, state in enumerate(states):
        if client >= len(weights):
            raise ValueError(f"aggregate: more states than the {len(weights)} weights")
        if client and state.keys() != result.keys():
            entry = sorted(state.keys() ^ result.keys())[0]
            raise ValueError(f"aggregate: client {client} and client 0 differ in entry '{entry}': only one has it")
        for entry, value in state.items():
            mean = result.get(entry)
            if mean is not None and (value.shape, value.dtype) != (mean.shape, mean.dtype):
                raise ValueError(f"aggregate: client {client}, entry '{entry}': {tuple(value.shape)} {value.dtype}, "
                                 f"but client 0 has {tuple(mean.shape)} {mean.dtype}")
            if not torch.isfinite(value).all():
                raise ValueError(f"aggregate: client {client}, entry '{entry}': not every value is finite")
            if not value.is_floating_point():
                result[entry] = value.clone() if mean is None else torch.maximum(mean, value)
            elif mean is None:
                result[entry] = value * (weights[client] / total)
            else:
                mean.add_(value, alpha=weights[client] / total)
        count += 1
    if count != len(weights):
        raise ValueError(f"aggregate: {count} states but {len(weights)} weights")
    return result


def update_personal(personal: State | None, local: State, alpha: float) -> State:
    """p^t = α · p^{t-1} + (1-α) · w^t; the first one is the local model itself (M2).

    personal: the client's personalised state so far, None before the first round. alpha: in [0, 1].
    Returns new tensors. Integer entries come from `local`. Source: paper (idea), published code (formula).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"update_personal: alpha must lie in [0, 1], got {alpha}")
    if personal is None:
        return {entry: value.clone() for entry, value in local.items()}
    return {entry: torch.lerp(value, personal[entry], alpha) if value.is_floating_point() else value.clone()
            for entry, value in local.items()}


@dataclass
class Round:
    """What is known after a round: the global state g^t, and p_k^t and the training loss by client name."""

    number: int
    global_state: State
    personal: dict[str, State]
    losses: dict[str, float]


def federate(model: nn.Module, clients: dict, rounds: int, *, alpha: float = 0.5, seed: int = 0,
             epochs: int = 1, batch_size: int = 5, lr: float = 1e-3) -> Iterator[Round]:
    """Federated averaging with inside personalisation (M1, M2); yields a `Round` after each round.

    model: its weights are the start g^0; afterwards it holds some client's weights, so use the states.
    clients: name → training data with `images` (N, C, H, W) and `masks` (N, H, W) on the model's device.
    Each client's order of images comes from a generator of (seed, its position), so the same arguments
    on the same machine give the same states. No state yielded is changed later.
    """
    generators = [torch.Generator().manual_seed(1000 * seed + position) for position in range(len(clients))]
    global_state, personal = snapshot(model), {}
    sizes = [len(client.images) for client in clients.values()]
    for number in range(1, rounds + 1):
        losses = {}

        def local_states(start: State = global_state, losses: dict = losses) -> Iterator[State]:
            for (name, client), generator in zip(clients.items(), generators):
                model.load_state_dict(start)
                losses[name] = train_local(model, client.images, client.masks, epochs=epochs,
                                           batch_size=batch_size, lr=lr, generator=generator)  # w_k^t
                local = snapshot(model)
                personal[name] = update_personal(personal.get(name), local, alpha)  # p_k^t
                yield local

        global_state = aggregate(local_states(), sizes)  # g^t
        yield Round(number, global_state, dict(personal), losses)


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of `model` with the weights of `state`, in evaluation mode."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class indices (N, H, W) of images (N, C, H, W), by `model` in evaluation mode."""
    model.eval()
    return torch.cat([model(batch).argmax(dim=1) for batch in images.split(batch_size)])


# ---------------------------------------------------------------- evaluation (M9)
def dice(prediction: np.ndarray, target: np.ndarray) -> float:
    """2·|A ∩ B| / (|A| + |B|) of two boolean masks of any shape, in [0, 1]; both empty: 1."""
    prediction, target = _masks(prediction, target)
    size = prediction.sum() + target.sum()
    return 2 * float((prediction & target).sum()) / float(size) if size else 1.0


def surface_distances(prediction: np.ndarray, target: np.ndarray,
                      spacing: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Exact distances from each surface element of one mask to the nearest of the other, both ways.

    prediction, target: boolean (H, W) or (D, H, W), neither empty; spacing: one number an axis, default 1.
    The surface is made of mask elements with a 4- (6-) neighbour outside; beyond the border is outside.
    """
    prediction, target = _masks(prediction, target)
    scale = torch.tensor(_spacing(prediction, spacing), dtype=torch.float64)
    a, b = (torch.from_numpy(np.argwhere(_surface(mask))).double() * scale for mask in (prediction, target))

    def nearest(points: Tensor, others: Tensor) -> np.ndarray:
        # In chunks of at most 10^7 pairs; differences, not the faster matrix product, which rounds.
        chunks = points.split(max(1, 10_000_000 // len(others)))
        mode = "donot_use_mm_for_euclid_dist"
        return torch.cat([torch.cdist(c, others, compute_mode=mode).amin(dim=1) for c in chunks]).numpy()

    return nearest(a, b), nearest(b, a)


def hd95(prediction: np.ndarray, target: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """The larger of the two directed 95th percentiles of the surface distances, in units of `spacing`.

    Shapes as for `surface_distances`. Both masks empty: nan. One empty: the diagonal of the image.
    """
    return _distance(prediction, target, spacing, lambda a, b: max(np.percentile(a, 95), np.percentile(b, 95)))


def assd(prediction: np.ndarray, target: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """Average symmetric surface distance: the mean over both directions' distances pooled.

    Units, shapes and empty masks as for `hd95`.
    """
    return _distance(prediction, target, spacing, lambda a, b: np.concatenate([a, b]).mean())


def _distance(prediction, target, spacing, summary) -> float:
    prediction, target = _masks(prediction, target)
    spacing = _spacing(prediction, spacing)
    if not prediction.any() and not target.any():
        return float("nan")
    if not prediction.any() or not target.any():
        return float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
    return float(summary(*surface_distances(prediction, target, spacing)))


def _masks(prediction, target) -> tuple[np.ndarray, np.ndarray]:
    prediction, target = np.asarray(prediction, dtype=bool), np.asarray(target, dtype=bool)
    if prediction.shape != target.shape:
        raise ValueError(f"masks of different shapes: prediction {prediction.shape}, target {target.shape}")
    return prediction, target


def _spacing(mask: np.ndarray, spacing: Sequence[float] | None) -> tuple[float, ...]:
    spacing = (1.0,) * mask.ndim if spacing is None else tuple(spacing)
    if mask.ndim not in (2, 3) or len(spacing) != mask.ndim or min(spacing) <= 0:
        raise ValueError(f"expected a 2-D or 3-D mask and one positive spacing an axis, "
                         f"got shape {mask.shape} and spacing {spacing}")
    return spacing


def _surface(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner = tuple(slice(1, -1) for _ in mask.shape)
    neighbours = [np.roll(padded, step, axis)[inner] for axis in range(mask.ndim) for step in (-1, 1)]
    return mask & ~np.logical_and.reduce(neighbours)


def evaluate(prediction: Tensor, masks: Tensor, cases: Sequence[str], structures: dict[str, tuple[int, ...]],
             spacing: Sequence[float], distances: bool = True) -> list[dict]:
    """Dice, HD95 and ASSD of each structure, per case, then averaged over the cases (M9).

    prediction, masks: (N, H, W) class indices; cases: N identifiers. With a spacing of three numbers the
    images of one identifier are the slices of one volume, else each image is a case.
    structures: name → its classes. Returns a dict a structure: structure, dice, hd95, assd, cases and
    distance_cases, the number of cases with at least one mask not empty; without any, or with `distances`
    off, the distances are None.
    """
    groups: dict = {}
    for index, case in enumerate(cases):
        groups.setdefault(case if len(spacing) == 3 else index, []).append(index)
    prediction, masks = prediction.cpu().numpy(), masks.cpu().numpy()
    if len(spacing) == 2:
        groups = {case: indices[0] for case, indices in groups.items()}
    rows = []
    for name, classes in structures.items():
        pairs = [(np.isin(prediction[g], classes), np.isin(masks[g], classes)) for g in groups.values()]
        values = [[hd95(p, t, spacing), assd(p, t, spacing)] for p, t in pairs if distances and (p.any() or t.any())]
        valid = np.array(values)
        mean = valid.mean(axis=0).tolist() if len(valid) else (None, None)
        rows.append({"structure": name, "dice": float(np.mean([dice(p, t) for p, t in pairs])),
                     "hd95": mean[0], "assd": mean[1], "cases": len(pairs), "distance_cases": len(valid)})
    return rows
