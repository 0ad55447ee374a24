"""Inside the federation: local training, averaging, personalised models, metrics (M1, M2, M3, M9).

Imports torch and numpy only, so that it can be copied into another project. The numbers M1 … M9
are those of README.md. What is refused stands at the end, behind the equations.
"""

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]  # what `model.state_dict()` returns


# ---------------------------------------------------------------- one client (M1)
def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """One minus the soft Dice, averaged over all classes, the background among them.

    logits: (N, C, H, W), or (N, C, D, H, W) of volumes. target: (N, H, W) or (N, D, H, W) class
    indices. As in the published code the sums run over the whole batch. Returns a scalar in [0, 1].
    Raises ValueError where the shapes do not fit.
    """
    check_target(logits, target)
    # bfloat16 is too coarse for sums over many pixels; float64 may stay.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits.to(dtype).softmax(dim=1)
    truth = nn.functional.one_hot(target.long(), num_classes=logits.shape[1])
    truth = truth.movedim(-1, 1)  # (N, C, H, W)
    all_but_classes = (0, *range(2, logits.ndim))
    overlap = (probabilities * truth).sum(dim=all_but_classes)  # (C,)
    size = probabilities.sum(dim=all_but_classes) + truth.sum(dim=all_but_classes)  # (C,)
    soft_dice = (2 * overlap + smooth) / (size + smooth)  # (C,)
    return 1 - soft_dice.mean()


def train_local(
    model: nn.Module,
    images: Tensor,
    masks: Tensor,
    *,
    generator: torch.Generator,
    epochs: int = 1,
    batch_size: int = 5,
    lr: float = 1e-3,
    proximal: float = 0.0,
    anchor: State | None = None,
) -> float:
    """Train `model` in place on one client's images (M1).

    Returns the mean soft Dice loss of the last epoch's batches, without the penalty.

    images: (N, C, H, W), or (N, C, D, H, W) of volumes. masks: (N, H, W) or (N, D, H, W) class
    indices, of an integer type. Both lie on the model's device.
    generator: on the CPU; it draws the order of the images.
    proximal: the factor μ of the penalty μ/2 · ‖w - anchor‖². The anchor is by default the
    model as it is at the call, which is FedProx.
    As in the published code Adam (amsgrad, no weight decay) begins anew at each call, and images
    are not augmented.
    Raises ValueError without images or epochs, for masks that are not whole numbers or hold a class
    that the model does not have, and for a model that does not return one tensor of logits.
    """
    check_training(images, masks, epochs)
    highest_class = int(masks.max())
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)
    dtype = next(model.parameters()).dtype
    if proximal:
        if anchor is None:
            anchor = snapshot(model)
        anchor_weights = []
        for name, weight in model.named_parameters():
            anchor_weights.append(anchor[name].to(weight.device))
    # Batches of nearly equal size: a last batch of one image would upset BatchNorm.
    number_of_batches = math.ceil(len(images) / batch_size)
    for _ in range(epochs):
        losses = []
        order = torch.randperm(len(images), generator=generator)
        for batch in order.to(images.device).tensor_split(number_of_batches):
            logits = model(images[batch].to(dtype))
            check_classes(logits, highest_class)
            loss = soft_dice_loss(logits, masks[batch])
            losses.append(loss.detach())
            if proximal:
                for weight, fixed in zip(model.parameters(), anchor_weights):
                    loss = loss + proximal / 2 * (weight - fixed).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return torch.stack(losses).mean().item()


def snapshot(model: nn.Module) -> State:
    """A copy of the model's state on the CPU; `state_dict()` alone changes with the model."""
    state = {}
    for entry, value in model.state_dict().items():
        state[entry] = value.detach().to("cpu", copy=True)
    return state


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of `model` with the weights of `state`, in evaluation mode."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------- the method (M1, M2)
@torch.no_grad()
def aggregate(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted mean of the clients' states, g = Σ_k (n_k / n) w_k with n = Σ_k n_k (M1).

    states: the w_k. weights: the n_k, usually numbers of training images. BatchNorm's running
    statistics are averaged too; kept by the clients they would make it a kind of FedBN. Half
    precision is summed in float32. Integers (`num_batches_tracked`) take the maximum. Returns new
    tensors.
    Raises ValueError where there is not one weight a state, one is negative, or their sum is not
    positive and finite, and where a state's entries are not those of the first;
    FloatingPointError where a value is not finite.
    """
    check_states(states, weights)
    total = float(sum(weights))
    mean: State = {}
    for entry, first in states[0].items():
        values = [state[entry] for state in states]
        if not first.is_floating_point():
            mean[entry] = torch.stack(values).amax(dim=0)
            continue
        dtype = torch.promote_types(first.dtype, torch.float32)
        average = torch.zeros_like(first, dtype=dtype)
        for value, weight in zip(values, weights):
            average.add_(value, alpha=weight / total)
        mean[entry] = average.to(first.dtype)
    check_mean(mean, states)
    return mean


@torch.no_grad()
def update_personal(personal: State | None, local: State, alpha: float) -> State:
    """The personalised model p^t = α · p^{t-1} + (1-α) · w^t; the first is the local one (M2).

    personal: p^{t-1}, or None in a client's first round. local: w^t. alpha: in [0, 1]; ours is 0.7,
    the published code's 0.1. Integers come from `local`. Returns new tensors.
    Raises ValueError for another alpha, and where the entries of the two states differ.

    Unrolled this is what the paper describes, global and local updates accumulated (M3, tested):
    with D^s = g^s - g^{s-1} and d^t = w^t - g^{t-1},
    p^T = g^0 + Σ_{s<T} (1-α^{T-s}) D^s + Σ_{t≤T} c_t d^t,
    where c_1 = α^{T-1} and c_t = (1-α) α^{T-t}.
    """
    check_accumulation(personal, local, alpha)
    updated: State = {}
    for entry, value in local.items():
        if personal is None or not value.is_floating_point():
            updated[entry] = value.clone()
        else:
            updated[entry] = alpha * personal[entry] + (1 - alpha) * value  # M2
    return updated


# ---------------------------------------------------------------- the loop over rounds (M1)
@dataclass(frozen=True)
class Training:
    """How the clients of a federation train; the defaults are federated averaging.

    personal_layers: layers that a client takes from its own last model in each round, not from the
    global one: "none", "batchnorm" (FedBN), "head", which is the last layer (FedPer), or "all",
    where nothing is shared.
    proximal: the pull μ of local training towards the global model (FedProx).
    ditto: None, or Ditto's λ: each client trains a second model beside the shared one, pulled
    towards the global one by λ, and never sends it. The shared models are the same without it.
    train: what a client does in a round, a function that is called as `train_local` is.
    """

    personal_layers: str = "none"
    proximal: float = 0.0
    ditto: float | None = None
    train: Callable[..., float] = train_local


@dataclass
class Round:
    """What a round has made; the next one starts from it. All states lie on the CPU."""

    number: int
    global_state: State  # g^t
    local: dict[str, State]  # w_k^t of the clients that took part in this round
    personal_layers: dict[str, State]  # of each client that has ever taken part
    ditto_models: dict[str, State]  # likewise; none without Ditto
    losses: dict[str, float]  # of local training in this round

    def model_of(self, client: str) -> State:
        """The current global model with the client's personal layers, if it has any."""
        return self.global_state | self.personal_layers.get(client, {})


def federate(
    model: nn.Module,
    clients: dict,
    rounds: int,
    training: Training = Training(),
    *,
    seed: int = 0,
    epochs: int = 1,
    batch_size: int = 5,
    lr: float = 1e-3,
    participation: float = 1.0,
    after: Round | None = None,
) -> Iterator[Round]:
    """Federated averaging (M1): yields each `Round`, from which the caller personalises (M2).

    model: its weights are the start g^0, also when going on, since a client that joins later takes
    the layers it keeps, and Ditto's model, from it. Afterwards they are those of the last client.
    clients: name → object with `images` and `masks` as `train_local` takes them.
    participation: the share of the clients, in (0, 1], that is drawn for each round.
    after: an earlier round to go on from. The result is the same to the bit, because all that is
    random in a round comes from (seed, round, client) alone.
    Raises FloatingPointError, naming client and round, where a model is not finite any more.
    """
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    start = snapshot(model)
    own_entries = personal_entries(model, training.personal_layers)
    own_at_start = {entry: start[entry] for entry in own_entries}
    last = after or Round(0, start, local={}, personal_layers={}, ditto_models={}, losses={})
    for number in range(last.number + 1, rounds + 1):
        local, losses, sizes = {}, {}, []
        personal_layers = dict(last.personal_layers)
        ditto_models = dict(last.ditto_models)
        for name in draw_clients(list(clients), participation, seed, number):
            images, masks = clients[name].images, clients[name].masks
            model.load_state_dict(last.global_state | personal_layers.get(name, own_at_start))
            losses[name] = training.train(
                model, images, masks, generator=seeded(seed, number, name),
                proximal=training.proximal, **options)
            local[name] = snapshot(model)  # w_k^t
            check_finite(local[name], f"client {name} in round {number}")
            personal_layers[name] = {entry: local[name][entry] for entry in own_entries}
            sizes.append(len(images))
            if training.ditto is not None:
                model.load_state_dict(ditto_models.get(name, start))
                training.train(
                    model, images, masks, generator=seeded(seed, number, name),
                    proximal=training.ditto, anchor=last.global_state, **options)
                ditto_models[name] = snapshot(model)
                check_finite(ditto_models[name], f"Ditto's model of {name} in round {number}")
        global_state = aggregate(list(local.values()), sizes)  # g^t (M1)
        last = Round(number, global_state, local, personal_layers, ditto_models, losses)
        yield last


def personal_entries(model: nn.Module, personal_layers: str) -> list[str]:
    """The entries of the state that `Training.personal_layers` names: BatchNorm is found by its
    type, the head as the layer whose entries come last."""
    entries = list(model.state_dict())  # such as "head.weight"
    if personal_layers == "none":
        return []
    if personal_layers == "all":
        return entries
    if personal_layers == "head":
        layers = [entries[-1].rpartition(".")[0]]
    elif personal_layers == "batchnorm":
        layers = []
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                layers.append(name)
        if not layers:
            raise ValueError("personal_layers='batchnorm': the model has no BatchNorm")
    else:
        raise ValueError(
            f"personal_layers='{personal_layers}' is not none, batchnorm, head or all")
    return [entry for entry in entries if entry.rpartition(".")[0] in layers]


def draw_clients(names: list, participation: float, seed: int, number: int) -> list:
    """The clients that take part in a round, at least one, in the order of `names`."""
    count = max(1, round(participation * len(names)))
    order = torch.randperm(len(names), generator=seeded(seed, number, "all"))
    drawn = order[:count].sort().values
    return [names[i] for i in drawn]


def seeded(seed: int, number: int, client) -> torch.Generator:
    """A generator for these three alone: of the order of a client's images in a round.

    client: the name, or whatever the clients are told apart by, such as a number; "all" is the
    generator that draws who takes part in the round.
    """
    name_as_number = zlib.crc32(str(client).encode())
    mixed = np.random.SeedSequence([seed, number, name_as_number]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


# ---------------------------------------------------------------- evaluation (M9)
@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class indices (N, H, W) of images (N, C, H, W), by `model` in evaluation mode.

    Raises ValueError if it does not return logits of two channels at least, FloatingPointError for
    logits that are not finite.
    """
    model.eval()
    dtype = next(model.parameters()).dtype
    classes = []
    for batch in images.split(batch_size):
        logits = model(batch.to(dtype))
        check_prediction(logits)
        classes.append(logits.argmax(dim=1))
    return torch.cat(classes)


def dice(prediction: np.ndarray, target: np.ndarray) -> float:
    """2·|A ∩ B| / (|A| + |B|) of two boolean masks of one shape, in [0, 1]; both empty: 1."""
    size = int(prediction.sum()) + int(target.sum())
    if size == 0:
        return 1.0
    return 2 * int((prediction & target).sum()) / size


def hd95_and_assd(
    prediction: np.ndarray, target: np.ndarray, spacing: Sequence[float]
) -> tuple[float, float]:
    """HD95 and ASSD of two boolean masks, (H, W) or (D, H, W), in units of `spacing`.

    HD95: the larger of the two directed 95th percentiles of the distances between the surfaces.
    ASSD: the mean of both directions' distances pooled. spacing: one positive number an axis.
    Both masks empty: nan. One of them empty: the diagonal of the field of view.
    """
    check_masks(prediction, target, spacing)
    if not prediction.any() and not target.any():
        return math.nan, math.nan
    if not prediction.any() or not target.any():
        sides = np.multiply(target.shape, spacing)
        diagonal = float(np.linalg.norm(sides))
        return diagonal, diagonal
    predicted_surface = surface_points(prediction, spacing)
    true_surface = surface_points(target, spacing)
    to_truth = nearest(predicted_surface, true_surface)
    to_prediction = nearest(true_surface, predicted_surface)
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
    assd = np.concatenate([to_truth, to_prediction]).mean()
    return float(hd95), float(assd)


def surface_points(mask: np.ndarray, spacing: Sequence[float]) -> Tensor:
    """(points, axes): the elements with a 4- (6-) neighbour outside the mask or the array."""
    padded = np.pad(mask, 1)
    interior = padded.copy()
    for axis in range(mask.ndim):
        interior &= np.roll(padded, 1, axis)
        interior &= np.roll(padded, -1, axis)
    points = np.argwhere(padded & ~interior) - 1  # without the padding
    return torch.from_numpy(points * np.asarray(spacing, dtype=float))


def nearest(points: Tensor, others: Tensor) -> np.ndarray:
    """The exact distance from each point to the nearest of the others."""
    exact = "donot_use_mm_for_euclid_dist"  # the faster matrix product rounds
    distances = []
    for chunk in points.split(128):
        # Each point has one of every 32nd of the others within `reach`, so its nearest lies in the
        # chunk's bounding box widened by `reach`: of two large surfaces few points do.
        to_few = torch.cdist(chunk, others[::32], compute_mode=exact)
        reach = 1.000001 * to_few.amin(dim=1).max()  # a little more, against rounding
        above = others >= chunk.amin(dim=0) - reach
        below = others <= chunk.amax(dim=0) + reach
        close = others[(above & below).all(dim=1)]
        to_close = torch.cdist(chunk, close, compute_mode=exact)
        distances.append(to_close.amin(dim=1))
    return torch.cat(distances).numpy()


def evaluate(
    prediction: Tensor,
    masks: Tensor,
    cases: Sequence[str],
    structures: dict[str, tuple[int, ...]],
    spacing: dict[str, tuple[float, ...]],
    distances: bool = True,
) -> list[dict]:
    """Dice, HD95 and ASSD of each structure, per case, then averaged over the cases (M9).

    prediction, masks: (N, H, W) class indices. cases: N names, the same for all slices of a volume.
    structures: name → its classes. spacing: case → (row, column) or (slice, row, column).
    Returns a row for each structure. Distances count only cases where prediction or truth is not
    empty; they are None where there is no such case, or with distances=False.
    """
    check_cases(prediction, masks, cases)
    prediction = prediction.cpu().numpy()
    masks = masks.cpu().numpy()
    slices_of: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        slices_of.setdefault(case, []).append(number)
    rows = []
    for structure, classes in structures.items():
        scores, lengths = [], []  # of each case; lengths: pairs of HD95 and ASSD
        for case, slices in slices_of.items():
            predicted = np.isin(prediction[slices], list(classes))
            true = np.isin(masks[slices], list(classes))
            if len(slices) == 1 and len(spacing[case]) == 2:  # an image, not a volume
                predicted, true = predicted[0], true[0]
            scores.append(dice(predicted, true))
            if distances and (predicted.any() or true.any()):
                lengths.append(hd95_and_assd(predicted, true, spacing[case]))
        hd95, assd = None, None
        if lengths:
            hd95, assd = np.mean(lengths, axis=0).tolist()
        row = {
            "structure": structure,
            "dice": float(np.mean(scores)),
            "hd95": hd95,
            "assd": assd,
            "cases": len(scores),
            "distance_cases": len(lengths),
        }
        rows.append(row)
    return rows


# ---------------------------------------------------------------- what is refused
def check_target(logits: Tensor, target: Tensor) -> None:
    images, _, *sides = logits.shape
    if target.shape != (images, *sides) or target.is_floating_point():
        raise ValueError(
            f"soft_dice_loss: a target {tuple(target.shape)}, {target.dtype}, for logits "
            f"{tuple(logits.shape)}; class indices {(images, *sides)} of an integer type are "
            "expected, without an axis of channels")


def check_training(images: Tensor, masks: Tensor, epochs: int) -> None:
    if len(images) == 0 or epochs < 1:
        raise ValueError(f"train_local: {len(images)} images and {epochs} epochs; both must be > 0")
    if masks.is_floating_point():  # of masks in 0 … 1 the rest would become background
        raise ValueError(f"train_local: masks of {masks.dtype}; give class indices 0, 1 … of an "
                         "integer type, such as masks.long()")
    if masks.min() < 0:
        raise ValueError(f"train_local: the masks hold class {int(masks.min())}, not 0, 1 …")


def check_classes(logits: Tensor, highest_class: int) -> None:
    check_is_tensor(logits)
    if highest_class >= logits.shape[1]:
        raise ValueError(f"train_local: the masks hold class {highest_class}, but the model's "
                         f"classes are 0 to {logits.shape[1] - 1}")


def check_prediction(logits: Tensor) -> None:
    check_is_tensor(logits)
    if logits.shape[1] < 2:
        raise ValueError("predict: one output channel, of which every pixel's class would be 0")
    if not logits.isfinite().all():
        raise FloatingPointError("predict: logits are not finite; training may have diverged")


def check_is_tensor(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns a {type(logits).__name__}; wrap it in a module that "
                         "returns its logits (N, C, H, W) alone")


def check_states(states: Sequence[State], weights: Sequence[float]) -> None:
    total = float(sum(weights))
    if len(states) != len(weights) or min(weights, default=0) < 0 or not 0 < total < math.inf:
        raise ValueError(f"aggregate: {len(states)} states with the weights {list(weights)}")
    for client, state in enumerate(states):
        check_alike(states[0], state, f"aggregate: clients 0 and {client}")


def check_mean(mean: State, states: Sequence[State]) -> None:
    """The mean alone is tested; where it is not finite, the client that made it so is named."""
    if not all(value.isfinite().all() for value in mean.values()):
        for client, state in enumerate(states):
            check_finite(state, f"aggregate: client {client}")


def check_accumulation(personal: State | None, local: State, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"update_personal: alpha must lie in [0, 1], not {alpha}")
    if personal is not None:
        check_alike(personal, local, "update_personal: the personal and the local state")


def check_alike(first: State, second: State, whose: str) -> None:
    """Raise ValueError, naming the entry, where two states differ in names, shapes or types."""
    for entry in first | second:
        found = []
        for state in (first, second):
            value = state.get(entry)
            found.append("missing" if value is None else f"{tuple(value.shape)} {value.dtype}")
        if found[0] != found[1]:
            raise ValueError(f"{whose} differ in '{entry}': {', '.join(found)}")


def check_finite(state: State, whose: str) -> None:
    """Raise FloatingPointError, naming the entry, where a value of the state is not finite."""
    for entry, value in state.items():
        if not value.isfinite().all():
            raise FloatingPointError(
                f"{whose}: '{entry}' is not finite; a lower learning rate may help")


def check_masks(prediction: np.ndarray, target: np.ndarray, spacing: Sequence[float]) -> None:
    if prediction.shape != target.shape or len(spacing) != target.ndim:
        raise ValueError(f"masks of {prediction.shape} and {target.shape}, spacing {spacing}")


def check_cases(prediction: Tensor, masks: Tensor, cases: Sequence[str]) -> None:
    if prediction.shape != masks.shape or len(masks) != len(cases):
        raise ValueError(f"evaluate: {tuple(prediction.shape)}, {tuple(masks.shape)} and "
                         f"{len(cases)} cases")
