"""Inside the federation: local training, aggregation, own models of the clients, and evaluation (M1, M2, M9).

Imports torch and numpy only; a client is any object with `images`, `masks` and `cases`.
The numbers M1 … M9 are those of README.md.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

State = dict[str, Tensor]


# ---------------------------------------------------------------- training one client
def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice, averaged over all classes, the background among them; sums run over the batch.

    logits: (N, C, H, W); target: (N, H, W) class indices of any integer type. Returns a scalar in [0, 1].
    Source: published code.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # within torch.autocast they are bfloat16
    probabilities = logits.softmax(dim=1)
    truth = nn.functional.one_hot(target.long(), logits.shape[1]).permute(0, 3, 1, 2)
    overlap = (probabilities * truth).sum(dim=(0, 2, 3))
    size = probabilities.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def train_local(model: nn.Module, images: Tensor, masks: Tensor, *, epochs: int = 1, batch_size: int = 5,
                lr: float = 1e-3, proximal: float = 0.0, anchor: State | None = None,
                generator: torch.Generator) -> float:
    """Train `model` in place on one client's images (M1) and return the mean Dice loss of the last epoch.

    images: (N, C, H, W); masks: (N, H, W) class indices. generator (CPU) draws the order of the images.
    proximal: μ of the term μ/2 · ‖w - anchor‖² over the parameters; anchor: by default the weights at the call.
    The optimiser is new at each call: its moments belong to the weights that went away.
    Source: published code (Adam with amsgrad, no weight decay, no augmentation).
    """
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)
    anchor = snapshot(model) if anchor is None and proximal else anchor
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        # Batches of nearly equal size: a last batch of one image would upset BatchNorm.
        batches = order.tensor_split(-(-len(images) // batch_size))
        losses = []
        for batch in batches:
            loss = soft_dice_loss(model(images[batch]), masks[batch])
            losses.append(loss.detach())
            if proximal:
                loss = loss + proximal / 2 * sum((value - anchor[name]).square().sum()
                                                 for name, value in model.named_parameters())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return torch.stack(losses).mean().item()


# ---------------------------------------------------------------- federation
def snapshot(model: nn.Module) -> State:
    """A copy of the model's whole state; `state_dict()` alone only refers to the live tensors."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def check_finite(state: State, client: str) -> None:
    """Raises ValueError, naming client and entry, where a value is not finite."""
    for entry, value in state.items():
        # The sum shows it at the cost of reading once; a sum of finite values may overflow, so look again.
        if not math.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise ValueError(f"client {client}, entry '{entry}': not every value is finite")


def aggregate(states: Iterable[State], weights: Sequence[float], names: Sequence[str] | None = None) -> State:
    """The weighted mean of client states: g = Σ_k w_k · state_k / Σ w (M1).

    states: one a client, read one after the other, so that a generator keeps only one in memory.
    weights: one a client, not negative, usually its number of training images. names: of the clients, for errors.
    Floating entries are averaged, BatchNorm's running statistics too: without them FedAvg becomes a
    kind of FedBN. Integer entries (`num_batches_tracked`) take the maximum.
    Raises ValueError, naming client and entry, where keys, shapes or types differ or a value is not finite.
    """
    total = float(sum(weights))
    if min(weights, default=0) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"aggregate: weights must be finite, not negative and not all zero, got {list(weights)}")
    names = names or [str(number) for number in range(len(weights))]
    result: State = {}
    count = 0
    for client, state in enumerate(states):
        if client >= len(weights):
            raise ValueError(f"aggregate: more states than the {len(weights)} weights")
        if client and state.keys() != result.keys():
            entry = sorted(state.keys() ^ result.keys())[0]
            raise ValueError(f"client {names[client]} and client {names[0]} differ in entry '{entry}': only one has it")
        check_finite(state, names[client])
        for entry, value in state.items():
            mean = result.get(entry)
            if mean is not None and (value.shape, value.dtype) != (mean.shape, mean.dtype):
                raise ValueError(f"client {names[client]}, entry '{entry}': {tuple(value.shape)} {value.dtype}, "
                                 f"but client {names[0]} has {tuple(mean.shape)} {mean.dtype}")
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


# ---------------------------------------------------------------- methods and their one loop
@dataclass(frozen=True)
class Method:
    """A federated method as its answers to a few questions; METHODS holds the usual ones.

    stays: the layers that never leave a client: "none", "batchnorm", "head" (the last layer) or "all".
    proximal: μ of the term μ/2 · ‖w - g‖² in the training of the model that is shared.
    own: what the client's own model accumulates with this alpha (M2; 0: it is that model itself): "shared", the
    shared model with the layers that stayed; "local", the client's local models. Or "apart": it is trained beside
    the shared one, from where it was, by as many steps, with the term λ/2 · ‖v - g‖², λ being own_proximal.
    pooled: the images of all clients lie in one place.
    """

    stays: str = "none"
    proximal: float = 0.0
    own: str = "shared"
    alpha: float = 0.0
    own_proximal: float = 0.0
    pooled: bool = False

    @property
    def shared_training(self) -> tuple:
        """What decides how the shared model comes about; methods that agree here need one federation only."""
        return self.stays, self.proximal, self.pooled


METHODS = {
    "local": Method(stays="all"),
    "fedavg": Method(),  # McMahan et al. 2017
    "fedprox": Method(proximal=0.001),  # Li et al. 2020
    "fedbn": Method(stays="batchnorm"),  # Li et al. 2021
    "fedper": Method(stays="head"),  # Arivazhagan et al. 2019
    "ditto": Method(own="apart", own_proximal=0.1),  # Li et al. 2021
    "fedavg-ft": Method(own="local"),  # the last local model: one epoch from the global model of the round before
    "iopfl": Method(own="local", alpha=0.7),
    "centralised": Method(pooled=True),  # the ceiling: what no federation may do
}


def staying_entries(model: nn.Module, stays: str) -> set[str]:
    """Names of the state's entries that `Method.stays` means, found by module type and order, not by name."""
    layers = [(name, module) for name, module in model.named_modules()
              if [*module.parameters(recurse=False), *module.buffers(recurse=False)]]
    chosen = {"none": [], "head": layers[-1:], "all": layers,
              "batchnorm": [pair for pair in layers if isinstance(pair[1], nn.modules.batchnorm._BatchNorm)]}
    if stays not in chosen:
        raise ValueError(f"Method: stays must be one of {', '.join(chosen)}, not {stays!r}")
    return {f"{name}.{entry}".lstrip(".") for name, module in chosen[stays] for entry in module.state_dict()}


@dataclass
class Round:
    """What is known after a round; the next one starts from nothing else.

    global_state: g^t, without the entries that stay with the clients. losses: mean training loss of the shared model
    by client. memory: for each client that was ever present what it keeps until its next round: "own" models by
    method, the entries that "stayed", and the generators' states for the "orders" of its images. start: the staying
    entries before any round. trained_here: the clients of this process, which alone knows their memory and losses.
    """

    number: int
    global_state: State
    losses: dict[str, float]
    memory: Mapping[str, dict[str, dict]]
    start: State
    trained_here: list[str]

    def own(self, method: str, client: str) -> State:
        """The client's own model, whole, for IOP-FL p_k^t. One that was never present has the global model; where
        layers stay with the clients, those that it started from."""
        kept = self.memory.get(client, {"own": {}, "stayed": self.start})
        return kept["own"].get(method) or {**self.global_state, **kept["stayed"]}


def processes() -> tuple[int, int]:
    """The number of this process and how many there are, as torch.distributed knows them; else 0 and 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def share_out(work: dict[str, int], count: int) -> dict[str, int]:
    """The process, of `count`, for each name: the most work first, each to who has the least so far."""
    loads, owner = [0] * count, {}
    for name in sorted(work, key=work.get, reverse=True):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += work[name]
    return owner


def exchange(own: Iterable[tuple[str, State]], owner: dict[str, int], like: State) -> Iterator[State]:
    """The states of the clients in the order of `owner`, which says whose process has it; own: those of this one.

    Each is sent to all, not their weighted sums added by an all-reduce: so the mean is taken in the same order, bit
    for bit, by any number of processes, and all of them find the same client's update wrong.
    """
    rank, count = processes()
    if count == 1:
        yield from (state for _, state in own)
        return
    trained = dict(own)
    for name, source in owner.items():
        state = trained.pop(name) if source == rank else {entry: torch.empty_like(value) for entry, value in like.items()}
        for value in state.values():
            dist.broadcast(value, source)
        yield state


def draw_clients(names: Sequence[str], participation: float, generator: torch.Generator) -> list[str]:
    """The clients that take part in a round, in the order of `names`: this share of them, at least one."""
    if participation == 1:
        return [*names]
    count = max(1, round(participation * len(names)))
    chosen = [sorted(names)[place] for place in torch.randperm(len(names), generator=generator)[:count].tolist()]
    return [name for name in names if name in chosen]


def federate(model: nn.Module, clients: dict, rounds: int, methods: dict[str, Method] | None = None, *,
             seed: int = 0, epochs: int = 1, batch_size: int = 5, lr: float = 1e-3, participation: float = 1.0,
             memory: MutableMapping[str, dict] | None = None, after: tuple[int, State] | None = None) -> Iterator[Round]:
    """Federated averaging (M1) with the own models of one or more methods; yields a `Round` after each round.

    model: its weights are the start g^0; afterwards it holds some client's weights, so use the states.
    clients: name → training data with `images` (N, C, H, W) and `masks` (N, H, W) on the model's device.
    methods: name → Method, by default FedAvg and IOP-FL; they ride on one federation without touching it, so
    they must agree in `shared_training`, else ValueError.
    participation: share of the clients, drawn anew each round, at least one; the others' own models stay as they are.
    memory: where `Round.memory` is kept, such as a mapping that keeps it on disk; then a `Round` knows the latest one.
    after: number and global_state of an earlier round to go on from, with its memory; it is yielded first.
    Where torch.distributed is initialised, each process trains its share of the clients and keeps their own models.
    Each client's order of images comes from a generator of (seed, its place in the alphabet), so the same arguments
    on the same machine give the same states, and the order of the clients changes nothing but rounding.
    No state yielded is changed later. Raises ValueError where a client's model is no longer finite, naming client
    and round; the round before is then the last good one.
    """
    methods = methods or {name: METHODS[name] for name in ("fedavg", "iopfl")}
    shared, *others = methods.values()
    if any(other.shared_training != shared.shared_training for other in others):
        raise ValueError(f"federate: {', '.join(methods)} do not share one training; run them apart")
    if not 0 < participation <= 1:
        raise ValueError(f"federate: participation must lie in (0, 1], got {participation}")
    training = clients
    if shared.pooled:
        training = {"pooled": SimpleNamespace(images=torch.cat([client.images for client in clients.values()]),
                                              masks=torch.cat([client.masks for client in clients.values()]))}
    initial, stays = snapshot(model), staying_entries(model, shared.stays)
    start = {entry: value for entry, value in initial.items() if entry in stays}
    done, global_state = after or (0, {entry: value for entry, value in initial.items() if entry not in stays})
    memory = {} if memory is None else memory
    draws, order = torch.Generator().manual_seed(seed), torch.Generator()
    sizes = {name: len(client.images) for name, client in training.items()}
    rank, count = processes()
    trainer = {"pooled": 0} | share_out({name: len(client.images) for name, client in clients.items()}, count)
    trained_here = [name for name in clients if trainer[name] == rank]

    def kept_by(name: str) -> dict[str, dict]:
        """A copy of what the client keeps, since rounds yielded before hold the same."""
        kept = memory.get(name, {"own": {}, "stayed": start, "orders": {}})
        return {part: dict(values) for part, values in kept.items()}

    if done:
        yield Round(done, global_state, {}, copy.copy(memory), start, trained_here)
    for number in range(1, rounds + 1):
        names = draw_clients([*training], participation, draws)
        if number <= done:
            continue
        losses = {}

        def train(state: State, name: str, kept: dict[str, dict], model_of: str, **options) -> tuple[State, float]:
            model.load_state_dict(state)
            if model_of in kept["orders"]:
                order.set_state(kept["orders"][model_of].cpu())
            else:
                order.manual_seed(1000 * seed + sorted(training).index(name))
            loss = train_local(model, training[name].images, training[name].masks, epochs=epochs, lr=lr,
                               batch_size=batch_size, generator=order, **options)
            kept["orders"][model_of] = order.get_state()
            return snapshot(model), loss

        def local_states(g: State = global_state, losses: dict = losses) -> Iterator[tuple[str, State]]:
            for name in names:
                if trainer[name] != rank:
                    continue
                kept = kept_by(name)
                local, losses[name] = train({**g, **kept["stayed"]}, name, kept, "all", proximal=shared.proximal)  # w_k^t
                kept["stayed"] = {entry: local[entry] for entry in start}
                check_finite(kept["stayed"], f"{name} in round {number}")  # `aggregate` looks at the other entries
                for label, method in methods.items():
                    before = kept["own"].get(label)
                    if method.own == "local":
                        kept["own"][label] = update_personal(before, local, method.alpha)  # p_k^t
                    elif method.own == "apart":
                        kept["own"][label], _ = train(before or initial, name, kept, label,
                                                      proximal=method.own_proximal, anchor=g)
                        check_finite(kept["own"][label], f"{name} in round {number}")
                memory[name] = kept
                yield name, {entry: local[entry] for entry in g}

        states = exchange(local_states(), {name: trainer[name] for name in names}, global_state)
        global_state = aggregate(states, [sizes[name] for name in names],
                                 [f"{name} in round {number}" for name in names])  # g^t
        for label, method in methods.items():
            if method.own == "shared" and method.alpha:
                for name in (name for name in trained_here if name in names or shared.pooled):
                    kept = kept_by(name)
                    whole = {**global_state, **kept["stayed"]}
                    kept["own"][label] = update_personal(kept["own"].get(label), whole, method.alpha)
                    memory[name] = kept
        yield Round(number, global_state, losses, copy.copy(memory), start, trained_here)


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of `model` with the weights of `state`, in evaluation mode."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class indices (N, H, W) of images (N, C, H, W), by `model` in evaluation mode. Raises ValueError where a logit
    is not finite."""
    model.eval()
    classes = []
    for batch in images.split(batch_size):
        logits = model(batch)
        if not logits.isfinite().all():
            raise ValueError("predict: not every logit is finite; training may have diverged")
        classes.append(logits.argmax(dim=1))
    return torch.cat(classes)


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
             spacing: Sequence[float] | dict[str, Sequence[float]], distances: bool = True) -> list[dict]:
    """Dice, HD95 and ASSD of each structure, per case, then averaged over the cases (M9).

    prediction, masks: (N, H, W) class indices; cases: N identifiers; spacing: for all, or by identifier. With three
    numbers the images of one identifier are the slices of one volume, else each image is a case.
    structures: name → its classes. Returns a dict a structure: structure, dice, hd95, assd, cases and
    distance_cases, the number of cases with at least one mask not empty; without any, or with `distances`
    off, the distances are None.
    """
    spacings = spacing if isinstance(spacing, dict) else dict.fromkeys(cases, spacing)
    groups: dict = {}
    for index, case in enumerate(cases):
        if len(spacings[case]) == 3:
            groups.setdefault(case, ([], spacings[case]))[0].append(index)
        else:
            groups[index] = index, spacings[case]
    prediction, masks = prediction.cpu().numpy(), masks.cpu().numpy()
    rows = []
    for name, classes in structures.items():
        pairs = [(np.isin(prediction[g], classes), np.isin(masks[g], classes), s) for g, s in groups.values()]
        values = [[hd95(p, t, s), assd(p, t, s)] for p, t, s in pairs if distances and (p.any() or t.any())]
        valid = np.array(values)
        mean = valid.mean(axis=0).tolist() if len(valid) else (None, None)
        rows.append({"structure": name, "dice": float(np.mean([dice(p, t) for p, t, _ in pairs])),
                     "hd95": mean[0], "assd": mean[1], "cases": len(pairs), "distance_cases": len(valid)})
    return rows
