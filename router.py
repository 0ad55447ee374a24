"""Outside the federation: M networks as one, mixed by small routers, tuned at test time, no labels.

Imports torch (2.6 or later) only and knows nothing of the other files: copy it into a project that
has M trained networks of one architecture (personalised ones first, the global one last) and
unlabelled images.

    routed = build_routed(models)
    fit_to_site(routed, models, images)  # ours; for the published start call check_routed instead
    probabilities = adapt(routed, images, generator=torch.Generator().manual_seed(0))

Part 1 is the method (M4 to M8 of README.md), by the published code where the paper leaves it open:
the settings, the routed layers, the objective, adaptation, the routed network. Part 2 is ours:
where routing starts, whose BatchNorm statistics it uses, and a leash against collapse. With
PUBLISHED and without `fit_to_site` no line of part 2 runs. Part 3 is what is refused, and why.

Convolutions and linear layers have a router each; the norms between them have none. A norm takes
the weights of the latest layer with a router, which it finds in the `Pass` that all layers of a
network share while images go through it.

Shapes: N images, M experts (the given networks), C channels or classes; "…" are the spatial axes,
(H, W) in 2-D and (D, H, W) in 3-D.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized


# ================================================================ part 1: the method
# ---------------------------------------------------------------- settings
@dataclass(frozen=True)
class RoutingSettings:
    """The defaults are ours; PUBLISHED is the published code. The loss terms are means over pixels:
    no weight depends on batch or image size."""

    softmax: bool = True  # routing weights sum to one; False: a sigmoid each, which do not
    per_sample: bool = True  # False: routers see no image, so that all images are routed alike
    dropout: float = 0.2  # inside the routers, while adapting
    mix_batchnorm: bool = True  # BatchNorm mixed like the kernels; False: the last expert's
    batch_statistics: bool = False  # BatchNorm's; False: running ones, and a share of the site's
    consistency: float = 1.0  # λ_con
    shape: float = 0.02  # λ_shape
    entropy: float = 0.0  # λ_ent
    noise: float = 0.5  # standard deviation of ε
    radius: float = 10 / 384  # d as a share of the shortest side
    lr: float = 2e-4  # of Adam
    passes: int = 3  # over the images, offline
    batch_size: int = 5
    # A step that changes a class's area by more than this share is half undone (part 2).
    leash: float | None = 0.01


# The published code sums the entropy over its batch of B = 5 images and weighs it by 10 / 2, two
# constants that cannot be derived: 10 · 5 / 2 = 25 times M8's mean. Its shape term is 10⁻⁶ ‖v‖₂;
# v is M7's map of N pixels. Where v is about 1 on a share f of them, and 0 elsewhere, it has the
# gradient of 10⁻⁶ √(N / f) times v's mean: about 0.004 for N = 5 · 384² and f = 0.05.
PUBLISHED = RoutingSettings(softmax=False, mix_batchnorm=False, batch_statistics=True,
                            consistency=0.1, shape=0.004, entropy=25.0,
                            lr=1e-3, passes=10, leash=None)


# ---------------------------------------------------------------- the routed layers (M4, M5)
@dataclass
class Pass:
    """What the layers of a routed network share while N images go through it."""

    settings: RoutingSettings
    dropout: Generator | None  # draws the dropout in the routers; None: no dropout
    counting: bool  # whether BatchNorm counts its inputs as images of the site (part 2)
    images: int  # N
    all_on_last: Tensor  # routing weights (N, M): 1 for the last expert, 0 for the others
    weights: Tensor  # (N, M), of the latest layer with a router; before the first: all_on_last
    routing: dict[str, Tensor]  # the weights (N, M) of each layer with a router so far


class Router(nn.Module):
    """r(x) = softmax(FC2(Dropout(FC1(GlobalAvgPool(x))))): a weight for each expert and image (M4).
    `channel_axis` is where the features have their C channels."""

    def __init__(self, channels: int, channel_axis: int, experts: int, generator):
        super().__init__()
        self.channel_axis = channel_axis
        self.fc1 = draw_linear(channels, 2 * channels, generator)
        self.fc2 = draw_linear(2 * channels, experts, generator)

    def forward(self, x: Tensor, settings: RoutingSettings, dropout) -> Tensor:
        """Features (N, C, …) or (N, …, C) → routing weights (N, M), each in [0, 1].
        dropout: the generator that draws it; None: no dropout."""
        channels = self.fc1.in_features
        features = x.movedim(self.channel_axis, 1).reshape(len(x), channels, -1)
        # Sum, then divide: dividing the few sums spares backward a pass over all features.
        total = features.sum(dim=2, dtype=self.fc1.weight.dtype)  # (N, C)
        hidden = self.fc1(total / features.shape[2])  # (N, 2C)
        if not settings.per_sample:
            hidden = torch.zeros_like(hidden)  # then FC2's bias alone decides, for all images alike
        if dropout is not None and settings.dropout > 0:
            draws = torch.rand(
                hidden.shape, generator=dropout, device=x.device, dtype=hidden.dtype)
            kept = draws >= settings.dropout
            hidden = hidden * kept / (1 - settings.dropout)
        scores = self.fc2(hidden)  # (N, M)
        if settings.softmax:
            return scores.softmax(dim=1)
        return scores.sigmoid()


def draw_linear(inputs: int, outputs: int, generator) -> nn.Linear:
    """A linear layer of torch's own distribution, drawn from this generator (None: torch's own)."""
    # Without skip_init it would draw from torch's own generator first.
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)
    bound = inputs**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


class Routed(nn.Module):
    """One layer of M frozen experts: each image's parameters are Σ_m r_m(x) θ_m (M5).

    Of a convolution with padding 1 that is a loop over images and experts, which a test compares
    with this class:

        outputs = []
        for image in x:  # (C, H, W)
            r = router(image[None], settings, dropout=None)[0]  # (M,)
            weight, bias = 0, 0
            for m, expert in enumerate(experts):
                weight = weight + r[m] * expert.weight
                bias = bias + r[m] * expert.bias
            outputs.append(F.conv2d(image, weight, bias, padding=1))
        y = torch.stack(outputs)  # (N, C_out, H, W)

    Convolutions and linear layers have a router. Other layers (norms, PReLU, a scale) take the
    weights of the latest layer with a router, scaled so that they sum to one; what adaptation adds
    to their parameters is in `delta_weight`, `delta_bias`, …
    The experts' values are stacked in buffers (M, …) of the same names: `weight`, `bias`, …"""

    def __init__(self, experts: list, name: str, generator):
        super().__init__()
        last, M = experts[-1], len(experts)
        self.name = name
        self.current = None  # the Pass that is under way
        self.router = None
        if isinstance(last, _ConvNd):
            self.router = Router(last.in_channels, 1, M, generator)
        elif isinstance(last, nn.Linear):
            self.router = Router(last.in_features, -1, M, generator)
        # The layer itself, which computes: emptied, since `mix` gives it each image's values, and
        # in a tuple, in which torch does not look for parameters.
        empty = evaluation_copy(last).to("meta")
        self.template = (empty,)
        self.mixed = list(own_values(last))  # the names of what is mixed
        for entry in self.mixed:
            stack = [own_values(expert)[entry] for expert in experts]
            self.register_buffer(entry, torch.stack(stack))  # (M, …)
            learnt = isinstance(getattr(last, entry), nn.Parameter)
            if self.router is None and learnt:
                delta = nn.Parameter(torch.zeros_like(stack[-1]))
                self.register_parameter(f"delta_{entry}", delta)
        # Networks read attributes of their layers, such as `in_channels` or `stride`.
        for attribute, value in vars(empty).items():
            if not attribute.startswith("_") and not hasattr(self, attribute):
                setattr(self, attribute, value)

    def routing_weights(self, x: Tensor) -> Tensor:
        """The weights (N, M) by which this layer is mixed."""
        current = self.current
        if self.router is None:
            return current.weights / current.weights.sum(dim=1, keepdim=True)
        current.weights = self.router(x, current.settings, current.dropout)
        current.routing[self.name] = current.weights.detach()
        return current.weights

    def mix(self, weights: Tensor) -> dict[str, Tensor]:
        """Routing weights (N, M) → each image's parameters, by name, each (N, …)."""
        parameters = {}
        for entry in self.mixed:
            stack = getattr(self, entry)  # (M, …)
            weights = weights.to(stack.dtype)
            parameters[entry] = torch.tensordot(weights, stack, dims=1)
            delta = self._parameters.get(f"delta_{entry}")
            if delta is not None:
                parameters[entry] = parameters[entry] + delta
        return parameters

    def forward(self, x: Tensor | None = None, *args, **kwargs) -> Tensor:
        """As the layer's own forward, but each of the N images has parameters of its own."""
        check_call(self, x, [*args, *kwargs.values()])
        device_type = x.device.type
        with torch.autocast(device_type, enabled=False):  # bfloat16 would be too coarse here
            parameters = self.mix(self.routing_weights(x))
        if torch.is_autocast_enabled(device_type):
            # Autocast does not reach into vmap, so its rule is applied here: convolutions and
            # linear layers in low precision, norms in float32.
            dtype = torch.float32
            if self.router is not None:
                dtype = torch.get_autocast_dtype(device_type)
            x = x.to(dtype)
            for entry in self.mixed:
                parameters[entry] = parameters[entry].to(dtype)

        def compute(own: dict[str, Tensor], image: Tensor) -> Tensor:
            """The layer with these parameters, of a batch of one."""
            output = functional_call(self.template[0], own, (image, *args), kwargs)
            check_output(self, output)
            return output

        # vmap makes one grouped convolution of all images' kernels.
        outputs = torch.vmap(compute)(parameters, x.unsqueeze(1))
        return outputs.squeeze(1)  # (N, …)


class RoutedBatchNorm(Routed):
    """BatchNorm of M experts, mixed by the weights of the routed layer before it.
    Published code: the last expert's affine, statistics of the batch. Ours: affine and running
    statistics are mixed, and part of the statistics is the site's own (part 2): `site_mean` and
    `site_variance` (C,) of n = `site_images` images have the share
    `site_share` · n / (n + `site_prior`), which is 0 before the first image."""

    def __init__(self, experts: list, name: str, generator):
        super().__init__(experts, name, generator)
        channels = experts[-1].num_features
        self.register_buffer("site_mean", torch.zeros(channels))
        self.register_buffer("site_variance", torch.zeros(channels))
        self.register_buffer("site_images", torch.tensor(0.0))
        self.register_buffer("site_share", torch.tensor(0.0))
        self.register_buffer("site_prior", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) → the same shape."""
        check_call(self, x)
        with torch.autocast(x.device.type, enabled=False):
            weights = self.routing_weights(x)
            if not self.current.settings.mix_batchnorm:
                weights = self.current.all_on_last
            own = self.mix(weights)  # each (N, C)
            mean, variance = self.statistics(x, own)
            precision = (variance + self.eps).rsqrt()
            scale = own.get("weight", 1) * precision
            shift = own.get("bias", 0) - mean * scale
        y = x * over_positions(scale, x) + over_positions(shift, x)
        layer = self.template[0]
        if type(layer).forward is _BatchNorm.forward:
            return y
        # A subclass may go on, such as timm's BatchNormAct2d with an activation: its own forward
        # does that, with statistics and affine that change nothing.
        neutral = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1 - self.eps}
        values = {}
        for entry in self.mixed:
            values[entry] = y.new_full(self.site_mean.shape, neutral[entry])
        return functional_call(layer, values, (y,))

    def statistics(self, x: Tensor, own: dict) -> tuple:
        """Mean and variance, (C,) or (N, C), by which features (N, C, …) are normalised."""
        current = self.current
        of_batch = current.settings.batch_statistics or "running_mean" not in self.mixed
        if of_batch or current.counting:
            mean, variance = channel_statistics(x.to(self.site_mean.dtype))
        if current.counting:
            self.count(mean, variance, len(x))
        if of_batch:
            return mean, variance
        n = self.site_images
        share = self.site_share * n / (n + self.site_prior).clamp_min(1)
        mean = torch.lerp(own["running_mean"], self.site_mean, share)
        variance = torch.lerp(own["running_var"], self.site_variance, share)
        return mean, variance

    @torch.no_grad()
    def count(self, mean: Tensor, variance: Tensor, images: int) -> None:
        """Merge the statistics (C,) of some images into the site's; as E[x²] - E[x]² the variance
        would lose digits."""
        self.site_images += images
        part = images / self.site_images
        difference = mean - self.site_mean
        self.site_variance.lerp_(variance, part)
        self.site_variance += part * (1 - part) * difference.square()
        self.site_mean += part * difference


def over_positions(values: Tensor, x: Tensor) -> Tensor:
    """Values (C,) or (N, C), in the dtype and with the number of axes of features x (N, C, …)."""
    ones = [1] * (x.ndim - 2)
    return values.to(x.dtype).reshape(*values.shape, *ones)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of each channel of features (N, C, …)."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, dim=axes, correction=0)
    return mean, variance


# ---------------------------------------------------------------- the objective (M6 to M8)
def draw_views(images: Tensor, generator: Generator) -> Tensor:
    """A view of each image as a number (N,): 0 … 7, or 0 … 3 where images are not square."""
    square = images.shape[-1] == images.shape[-2]
    count = 8 if square else 4
    return torch.randint(count, images.shape[:1], generator=generator, device=images.device)


def view(images: Tensor, views: Tensor, inverse: bool = False) -> Tensor:
    """T of M6, or T⁻¹, on (N, C, …): by the bits of its number (N,) an image is transposed
    (4), flipped up-down (2) and left-right (1): together the eight flips and 90° rotations of the
    last two axes."""
    bits = (1, 2, 4) if inverse else (4, 2, 1)
    for bit in bits:
        chosen = views & bit > 0  # (N,)
        if not chosen.any():
            continue
        if bit == 4:
            changed = images.transpose(-1, -2)
        elif bit == 2:
            changed = images.flip(-2)
        else:
            changed = images.flip(-1)
        shape = (-1,) + (1,) * (images.ndim - 1)
        images = torch.where(chosen.view(shape), changed, images)
    return images


def in_another_view(routed: RoutedNetwork, images: Tensor, generator: Generator,
                    dropout: Generator | None = None) -> Tensor:
    """T⁻¹[p(T(x + ε))] (N, C, …) of images (N, C_in, …), T and ε drawn (M6)."""
    views = draw_views(images, generator)
    noise = torch.randn(
        images.shape, generator=generator, device=images.device, dtype=images.dtype)
    noisy = images + routed.settings.noise * noise
    probabilities = routed.probabilities(view(noisy, views), dropout)
    return view(probabilities, views, inverse=True)


def consistency_loss(probabilities: Tensor, of_view: Tensor) -> Tensor:
    """mean (p(x) - T⁻¹[p(T(x + ε))])², a scalar in [0, 1] (M6). Both: (N, C, …)."""
    return (probabilities - of_view).square().mean()


def shape_constraint(probabilities: Tensor, radius: int) -> Tensor:
    """The local range of the foreground probability, in the mean: it penalises long contours (M7).
    probabilities: (N, C, …) in [0, 1], class 0 the background.
    radius: half width d of the window, 2d + 1 wide along each axis, in pixels.
    Returns a scalar in [0, 1]: 0 for a constant map. Paper: idea; published code: window."""
    foreground = 1 - probabilities[:, :1]  # (N, 1, …)
    max_pool = F.max_pool3d if foreground.ndim == 5 else F.max_pool2d
    width = 2 * radius + 1
    highest = max_pool(foreground, width, stride=1, padding=radius)
    lowest = -max_pool(-foreground, width, stride=1, padding=radius)
    return (highest - lowest).mean()


def entropy_loss(probabilities: Tensor) -> Tensor:
    """Mean over pixels of -Σ_c p_c log p_c / log C, a scalar in [0, 1] (M8). Published code."""
    positive = probabilities.clamp_min(1e-12)  # for finite gradients at 0
    entropy = -torch.xlogy(probabilities, positive).sum(dim=1)  # (N, …)
    return entropy.mean() / math.log(probabilities.shape[1])


def objective(routed: RoutedNetwork, images: Tensor,
              generator: Generator) -> tuple[Tensor, Tensor]:
    """λ_con L_con + λ_shape L_shape + λ_ent L_ent of images (N, C_in, …), a scalar, and their
    probabilities (N, C, …) without gradient. The routers' dropout is on."""
    settings = routed.settings
    probabilities = routed.probabilities(images, dropout=generator)
    loss = probabilities.new_zeros(())
    if settings.consistency:
        of_view = in_another_view(routed, images, generator, dropout=generator)
        loss = loss + settings.consistency * consistency_loss(probabilities, of_view)
    if settings.shape:
        radius = round(settings.radius * min(probabilities.shape[2:]))
        loss = loss + settings.shape * shape_constraint(probabilities, max(radius, 1))
    if settings.entropy:
        loss = loss + settings.entropy * entropy_loss(probabilities)
    return loss, probabilities.detach()


# ---------------------------------------------------------------- adaptation
@torch.inference_mode(False)
def adapt(routed: RoutedNetwork, images: Tensor, *, generator: Generator) -> Tensor:
    """Tune routers and affines on unlabelled images, in place; return probabilities (N, C, …).
    `passes` over all images in random order, then all are predicted.
    images: (N, C_in, …) of one site, on the network's device, as must be the generator, which
    draws order, noise, views and dropout. The experts never change. Grey MRI or colour, 2-D or
    3-D: whatever the networks were trained on, scaled as then.
    A second call goes on from the weights of the first, with a new Adam; `reset` goes back.
    Raises ValueError, before anything changes, where there is no image or one is not finite."""
    images = checked(images)
    settings = routed.settings
    optimiser = torch.optim.Adam(routed.parameters(), lr=settings.lr)
    start = routed.snapshot()
    for _ in range(settings.passes):
        order = torch.randperm(len(images), generator=generator, device=images.device)
        for numbers in in_batches(order, settings.batch_size):
            step(routed, images[numbers], optimiser, generator, start)
    return predict(routed, images)


@torch.inference_mode(False)
def adapt_online(routed: RoutedNetwork, batches: Iterable[Tensor], *,
                 generator: Generator) -> Iterator[Tensor]:
    """As `adapt`, of images that arrive batch by batch: one step on each batch (N, C_in, …), then
    its probabilities (N, C, …). Adam goes on as long as the stream lasts.

        for probabilities in adapt_online(routed, batches, generator=generator): …

    Tell `fit_to_site` too that it is online: else the first images count twice.
    Raises ValueError at a batch without images or with values that are not finite; what came
    before has been adapted to."""
    optimiser = torch.optim.Adam(routed.parameters(), lr=routed.settings.lr)
    start = routed.snapshot()
    for batch in batches:
        batch = checked(batch)
        if any(norm.site_share > 0 for norm in routed.parts(RoutedBatchNorm)):
            measure_site(routed, batch)  # part 2
        step(routed, batch, optimiser, generator, start)
        yield predict(routed, batch)


def in_batches(values: Tensor, size: int) -> tuple[Tensor, ...]:
    """Batches of nearly equal size: a single image at the end would be normalised by itself where
    BatchNorm uses the batch's statistics."""
    return values.tensor_split(math.ceil(len(values) / size))


@torch.enable_grad()
def step(routed: RoutedNetwork, images: Tensor, optimiser: torch.optim.Optimizer,
         generator: Generator, start: dict[str, Tensor]) -> None:
    """One step of the optimiser on the objective of a batch (N, C_in, …).
    start: the `snapshot` that adaptation began with, which the leash holds to."""
    loss, probabilities = objective(routed, images, generator)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if routed.settings.leash is not None:
        pull_back(routed, images, probabilities, start)  # part 2


@torch.no_grad()
def predict(routed: RoutedNetwork, images: Tensor) -> Tensor:
    """Probabilities (N, C, …) of images (N, C_in, …), dropout off.
    Raises ValueError where there is no image or one is not finite, FloatingPointError where a
    probability is not."""
    batches = in_batches(checked(images), routed.settings.batch_size)
    probabilities = torch.cat([routed.probabilities(batch) for batch in batches])
    if not probabilities.isfinite().all():
        raise FloatingPointError("predict: not every probability is finite; has training diverged?")
    return probabilities


# ---------------------------------------------------------------- the routed network
class RoutedNetwork(nn.Module):
    """M frozen networks as one, mixed layer by layer and image by image; made by `build_routed`.
    The experts are buffers. Its parameters are what adaptation moves: the routers, and what is
    added to the layers without a router. `train` changes nothing.
    `routing`: the weights (N, M) of the last pass by the names of the layers with a router; of a
    layer that is called twice, those of its last call. Source: the published code, but for
    `snapshot`, `restore` and `reset` (ours)."""

    def __init__(self, network: nn.Module, experts: int, settings: RoutingSettings):
        super().__init__()
        self.network = network
        self.experts = experts  # M
        self.settings = settings
        self.routing = {}
        self.built = self.snapshot()  # where `fit_to_site` begins
        self.keep_start()
        self.register_load_state_dict_post_hook(RoutedNetwork.keep_start)
        self.eval()

    def forward(self, images: Tensor, dropout: Generator | None = None,
                counting: bool = False) -> Tensor:
        """Images (N, C_in, …) → logits (N, C, …), C at least 2.
        dropout: draws the dropout in the routers; None: no dropout.
        counting: whether BatchNorm counts the images into the site's statistics (part 2)."""
        device_type = images.device.type
        check_precision(device_type)
        all_on_last = torch.zeros(len(images), self.experts, device=images.device)
        all_on_last[:, -1] = 1
        current = Pass(self.settings, dropout, counting, len(images), all_on_last,
                       weights=all_on_last, routing={})
        layers = self.parts(Routed)
        for layer in layers:
            layer.current = current
        try:
            logits = logits_of(self.network(images), images.ndim)
        finally:
            for layer in layers:
                layer.current = None  # it would keep the graph of the whole pass
        self.routing = current.routing
        return logits

    def probabilities(self, images: Tensor, dropout: Generator | None = None) -> Tensor:
        """Images (N, C_in, …) → probabilities (N, C, …), in float32 at least."""
        logits = self(images, dropout)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype).softmax(dim=1)

    def train(self, mode: bool = True) -> nn.Module:
        """Stays in evaluation mode: dropout and counting are asked for by name, pass by pass."""
        return super().train(False)

    def parts(self, kind: type) -> list:
        """All its modules of a class, such as RoutedBatchNorm, each once."""
        return [module for module in self.modules() if isinstance(module, kind)]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy, by name, of all that may change: the parameters and the site's statistics."""
        parameters = dict(self.named_parameters())
        copies = {}
        for name, value in self.state_dict().items():
            if name in parameters or ".site_" in name:
                copies[name] = value.clone()
        return copies

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Take back the values of a `snapshot`, bit for bit."""
        state = self.state_dict()  # shares memory with the network
        for name, value in snapshot.items():
            state[name].copy_(value)

    def keep_start(self, *_) -> None:
        """Let `reset` return to what it is now. Building, fitting and loading call this."""
        self.start = self.snapshot()

    def reset(self) -> None:
        """Back to the start, bit for bit: as it was built, fitted or loaded, whichever was last."""
        self.restore(self.start)


@torch.inference_mode(False)
def build_routed(models: list[nn.Module], settings: RoutingSettings = RoutingSettings(),
                 generator: Generator | None = None) -> RoutedNetwork:
    """Turn M trained networks of one architecture into one; the models stay as they are.
    models: personalised ones first, the global one last; on one device, in float32 or float64.
    Each layer may be of any kind that holds all its parameters itself and is given one tensor with
    one entry for each image: convolutions and Linear have a router, norms, PReLU and the like
    follow. generator (CPU) draws the routers; None: torch's own.
    Raises ValueError, naming the layer, where models differ or one cannot be routed; what only a
    pass can show is refused by `check_routed`, which `fit_to_site` calls."""
    models = [getattr(model, "_orig_mod", model) for model in models]  # of torch.compile
    modules = [dict(model.named_modules()) for model in models]
    names = dict.fromkeys(name for by_name in modules for name in by_name)  # each once, in order
    example = next(models[-1].parameters())
    routed_layers = {}
    for name in names:
        experts = [by_name.get(name) for by_name in modules]
        check_alike(name, experts)
        if needs_routing(experts[-1]):
            for layer in experts:
                refuse_unroutable(name, layer)
            kind = RoutedBatchNorm if is_batchnorm(experts[-1]) else Routed
            routed = kind(experts, name, generator)
            routed_layers[id(experts[-1])] = routed.to(example)  # its device and precision
    # deepcopy's second argument says, by id, what has been copied already: thus it puts the routed
    # layers in place of the last model's own, wherever the network refers to them.
    network = copy.deepcopy(models[-1], routed_layers | kept_activations(models[-1]))
    return RoutedNetwork(network, len(models), settings)


def logits_of(output, axes: int) -> Tensor:
    """The logits (N, C, …), C at least 2, in what a network returns for images of so many axes.
    One channel z becomes two, 0 and z, whose softmax is the sigmoid of z."""
    return two_channels(main_output(output, axes))


def two_channels(logits: Tensor) -> Tensor:
    """Logits (N, C, …), to which those of a background are added, 0, where C is 1."""
    if logits.shape[1] == 1:
        return torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits


def main_output(output, axes: int) -> Tensor:
    """The network's output at full size: the tensor itself; of a dict, as HuggingFace's outputs
    are, the entry "logits" or "out"; else the first of the tensors with as many axes as the images
    have. There may be several, as of deep supervision, if they have the same channels."""
    if isinstance(output, dict):
        output = output.get("logits", output.get("out", output))
    maps = [tensor for tensor in tensors_in(output) if tensor.ndim == axes]
    check_maps(output, maps)
    return maps[0]


def tensors_in(output) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples, in their order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in tensors_in(part)]


def own_values(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a layer itself, not of its children; no integers."""
    tensors = dict(layer.named_parameters(recurse=False))
    tensors |= dict(layer.named_buffers(recurse=False))
    values = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            values[name] = value.detach()
    return values


def needs_routing(layer: nn.Module) -> bool:
    """Whether a layer has parameters besides those of its children, is BatchNorm, or computes
    otherwise than its class does."""
    parameters = list(layer.parameters(recurse=False))
    is_changed = is_parametrized(layer) or "forward" in vars(layer)
    return bool(parameters) or is_batchnorm(layer) or is_changed


def is_batchnorm(layer: nn.Module) -> bool:
    """InstanceNorm that keeps running statistics is one too: once trained, it uses them alike."""
    return isinstance(layer, _BatchNorm) or has_running_statistics(layer)


def has_running_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _NormBase) and layer.running_mean is not None


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, out of the wrapping of `torch.compile`."""
    model = getattr(model, "_orig_mod", model)
    return copy.deepcopy(model, kept_activations(model)).eval()


def kept_activations(model: nn.Module) -> dict[int, None]:
    """For deepcopy, which takes a dictionary from ids to copies: None in place of each activation
    that a forward pass has left in an attribute. torch cannot copy these; a pass makes them anew.
    """
    copies = {}
    for module in model.modules():
        for tensor in tensors_in(vars(module)):
            if tensor.grad_fn is not None:
                copies[id(tensor)] = None
    return copies


# ================================================================ part 2: ours
PRIOR_IMAGES = 16  # of the site, what trained statistics are worth (Schneider et al. 2020)


@torch.inference_mode(False)
@torch.no_grad()
def fit_to_site(routed: RoutedNetwork, models: list, images: Tensor, *,
                inside: Sequence[float] | None = None, start: str = "matched",
                global_prior: float | None = 0.5, share: float | None = None,
                online: bool = False) -> None:
    """Once, before the first step: where routing starts, and whose BatchNorm statistics it uses.
    It begins with `routed` as it was built, whatever was adapted, fitted or loaded before.

    Every image and every layer starts with the same routing weights, and the default's steps are
    too small to tell them apart: what is chosen is one mixture of the models for the site.
    models: those that `routed` was built from, in the same order (see `check_routed`).
    images: (N, C_in, …) of the site; for `online` the first batch, which `adapt_online` counts
    itself.
    inside: of each hospital that trained the models the `divergence` of its own training images
    from the last model, the global one, (K,): by these the site is near or far (`site_share`).
    start: "matched", see `start_weights`; "uniform"; or "random": the routers as they were built.
    share: of the site's statistics in BatchNorm's, in [0, 1], used as it is. By default it is
    `site_share` · n / (n + 16) where n images were counted: one image alone does not decide.
    Without `inside` that is ¼ · n / (n + 16).
    Networks without BatchNorm have no statistics to compare: "matched" is then the prior alone."""
    images = checked(images)
    if inside is not None:
        inside = torch.as_tensor(inside, dtype=torch.float64)
        if inside.ndim != 1 or not len(inside) or not 0 <= inside.min() <= inside.max() < math.inf:
            raise ValueError("inside: one finite divergence, 0 or more, of each hospital is needed")
    if start not in ("matched", "uniform", "random"):
        raise ValueError(f"start is '{start}', but may be matched, uniform or random")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share is {share}, but may be 0 to 1")
    contrast = images.flatten(1).std(dim=1)  # of blank images the models might say the same
    fullest = contrast.topk(min(4, len(images))).indices
    check_routed(routed, models, images[fullest])
    D = torch.stack([divergence(model, images) for model in models])  # (M,)
    routed.restore(routed.built)
    if start != "random":
        weights = torch.full_like(D, 1 / len(D))
        if start == "matched":
            weights = start_weights(D, global_prior)
        set_start(routed, weights.clamp(1e-6, 1 - 1e-6))  # so that gradients reach every expert
    prior_images = 0
    if share is None:
        share = site_share(D[-1].item(), inside)
        prior_images = PRIOR_IMAGES
    for norm in routed.parts(RoutedBatchNorm):
        norm.site_share.fill_(share)
        norm.site_prior.fill_(prior_images)
    if not online:
        measure_site(routed, some_of_all(images))
    routed.keep_start()


def start_weights(D: Tensor, global_prior: float | None = 0.5) -> Tensor:
    """Routing weights (M,) to start from, which sum to one: ∝ prior · exp(-D / spread).
    D: the models' `divergence` (M,), spread their standard deviation.
    global_prior: the last model's prior, in [0, 1], the others share the rest; None: all alike."""
    experts = len(D)
    prior = torch.full_like(D, 1 / experts)
    if global_prior is not None and experts > 1:
        prior[:-1] = (1 - global_prior) / (experts - 1)
        prior[-1] = global_prior
    # Below 0.05 differences of D are not worth telling apart: real sites lie 0.03 to 0.2 away.
    spread = D.std(correction=0).clamp_min(0.05)
    weights = prior * torch.exp((D.min() - D) / spread)
    return weights / weights.sum()


@torch.no_grad()
def divergence(model: nn.Module, images: Tensor) -> Tensor:
    """How far images (N, C_in, …) are from what a network was trained on: a scalar, 0 is near.
    `gaussian_divergence` of the inputs of norms with running statistics, mean over these; 0 where
    there are none."""
    model = evaluation_copy(model)
    sums = {}  # by norm (3, C): of the images, of their means, of their mean squares

    def count(norm: nn.Module, inputs: tuple) -> None:
        x = inputs[0]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = channel_statistics(x)
        mean, variance = mean.double(), variance.double()
        one = torch.ones_like(mean)
        moments = torch.stack([one, mean, variance + mean.square()])
        sums[norm] = sums.get(norm, 0) + len(x) * moments

    for norm in running_norms(model):
        norm.register_forward_pre_hook(count)
    for batch in images.split(8):
        model(batch)
    if not sums:
        return torch.tensor(0.0, device=images.device)
    layers = []
    for norm, (n, means, squares) in sums.items():
        mean = means / n
        variance = squares / n - mean.square()
        layers.append(gaussian_divergence(mean, variance, norm))
    return torch.stack(layers).mean().float()


def gaussian_divergence(mean: Tensor, variance: Tensor, norm: nn.Module) -> Tensor:
    """KL(these ‖ running statistics of `norm`) of two Gaussians a channel, mean over channels.
    mean, variance: (C,)."""
    trained = norm.running_var + norm.eps
    ratio = (variance + norm.eps) / trained
    distance = (mean - norm.running_mean).square() / trained
    divergences = (distance + ratio - 1 - ratio.log()) / 2  # (C,)
    return divergences.mean()


def running_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if has_running_statistics(module)]


def site_share(D: float, inside: Tensor | None = None) -> float:
    """The share of the site's statistics in BatchNorm's, 1 / (1 + (median_k D_k / D)⁴).
    D: the site's `divergence` from the global model. inside: those of the hospitals inside, D_k,
    (K,). A site as far away as the median of them gets one half. If it differs less than they do,
    the trained statistics are kept, which come from more images. Without `inside` the share is ¼;
    where D is 0, as in networks without running statistics, it is 0."""
    if D <= 0:
        return 0.0
    if inside is None:
        return 0.25
    ratio = inside.quantile(0.5) / D  # a tensor's fourth power may be infinite, a number's not
    return float(1 / (1 + ratio**4))


def some_of_all(images: Tensor) -> Tensor:
    """At most 64 images, evenly chosen, to be measured in one pass, since each layer needs the
    statistics of those before it. No more pixels than 64 of 192² have, but at least 8 images, if
    there are as many."""
    most = 64 * 192**2 // images[0, 0].numel()
    count = min(len(images), max(8, min(64, most)))
    chosen = torch.linspace(0, len(images) - 1, count)
    return images[chosen.round().long()]


@torch.no_grad()
def measure_site(routed: RoutedNetwork, images: Tensor) -> None:
    """Count images (N, C_in, …) into the site's statistics, in one pass."""
    routed(images, counting=True)


@torch.no_grad()
def pull_back(routed: RoutedNetwork, images: Tensor, probabilities: Tensor,
              start: dict[str, Tensor]) -> None:
    """The leash. Every term of the objective is least for an empty mask, and no image says how
    generously its annotator draws: where the area of a class in these probabilities (N, C, …),
    those before the step, is more than `leash` off what the start gives, all that adapts goes half
    way back to the start, a `snapshot`."""
    adapted = {}
    for name, value in routed.named_parameters():
        adapted[name] = value.clone()
        value.copy_(start[name])
    at_start = routed.probabilities(images)
    area = probabilities.transpose(0, 1).flatten(1).mean(dim=1)  # (C,)
    area_at_start = at_start.transpose(0, 1).flatten(1).mean(dim=1)
    moved = (area - area_at_start).abs() > routed.settings.leash * area_at_start
    way = 0.5 if moved[1:].any() else 1.0  # class 0 is the background
    for name, value in routed.named_parameters():
        value.lerp_(adapted[name], way)


@torch.no_grad()
def set_start(routed: RoutedNetwork, weights: Tensor) -> None:
    """Let every layer give every image the routing weights (M,), which sum to one."""
    for router in routed.parts(Router):
        weights = weights.to(router.fc2.bias)
        scores = weights.log() if routed.settings.softmax else weights.logit()
        router.fc2.bias.copy_(scores)
        router.fc2.weight.zero_()


# ================================================================ part 3: what is refused
# ---------------------------------------------------------------- by build_routed
def check_alike(name: str, experts: list) -> None:
    """Raise ValueError where the models' modules of this name differ, or some have none."""
    kinds = set()
    for expert in experts:
        kind = type(expert).__name__
        if expert is not None:
            kind += f"({expert.extra_repr()})"
        if expert is not None and not isinstance(expert, LazyModuleMixin):  # which has no shapes
            for entry, value in own_values(expert).items():
                kind += f", {entry} {tuple(value.shape)} {value.dtype}"
        kinds.add(kind)
    if len(kinds) > 1:
        raise ValueError(f"build_routed: the models differ in '{name}': {sorted(kinds)}")


def refuse_unroutable(name: str, layer: nn.Module) -> None:
    """Raise ValueError, with the layer's name and what to do, where it cannot be routed."""
    parameters = list(layer.parameters(recurse=False))
    tensors = [*parameters, *layer.buffers(recurse=False)]
    reason = None
    if isinstance(layer, LazyModuleMixin):
        reason = "is lazy; pass an image through the network first"
    elif is_parametrized(layer):
        reason = "is computed, as by weight_norm or spectral_norm; remove_parametrizations first"
    elif layer._forward_pre_hooks or layer._forward_hooks:
        reason = "has hooks, as of weight_norm, spectral_norm or pruning; remove them first"
    elif "forward" in vars(layer):
        reason = "has a forward of its own; compile or patch only the whole model"
    elif len(list(layer.parameters())) > len(parameters):
        reason = "holds parameters beside child modules; move them into a child of their own"
    elif own_values(layer).keys() & {"name", "current", "router", "template", "mixed"}:
        reason = "has a parameter called as an attribute of routed layers; give it another name"
    elif isinstance(layer, nn.RNNBase):
        reason = "is recurrent; no layer that returns several tensors is routed"
    elif isinstance(layer, (nn.ParameterList, nn.ParameterDict)):
        reason = "computes nothing; move its parameters into the layer that uses them"
    elif not is_batchnorm(layer) and len(own_values(layer)) < len(tensors):
        reason = "holds integers or complex numbers beside its parameters; compute them in forward"
    elif any(value.dtype.itemsize < 4 for value in own_values(layer).values()):
        reason = "is in half precision; convert the models by .float()"
    elif not all(value.isfinite().all() for value in own_values(layer).values()):
        reason = "holds values that are not finite; its training has diverged"
    if reason is not None:
        class_name = type(layer).__name__
        raise ValueError(f"build_routed: cannot route '{name}': {class_name} {reason}")


# ---------------------------------------------------------------- in a pass
def checked(images: Tensor) -> Tensor:
    """The images, copied if inference mode made them, since these know no gradients.
    Raises ValueError where there is no image, or a value of one is not finite."""
    if len(images) == 0 or not images.isfinite().all():
        raise ValueError("no images, or values that are not finite")
    return images.clone() if images.is_inference() else images


def check_precision(device_type: str) -> None:
    """Raise ValueError in float16 autocast."""
    in_autocast = torch.is_autocast_enabled(device_type)
    if in_autocast and torch.get_autocast_dtype(device_type) == torch.float16:
        raise ValueError("routing overflows in float16; use bfloat16 autocast or float32")


def check_call(layer: Routed, x: Tensor | None, others: Iterable = ()) -> None:
    """Raise ValueError unless a layer is called in a pass, with one entry for each image as its
    first argument, and with no other tensor."""
    fault = None
    if layer.current is None:
        fault = ("outside a pass: call the routed network, not its `network`, and switch gradient "
                 "checkpointing off")
    elif not isinstance(x, Tensor) or any(isinstance(other, Tensor) for other in others):
        fault = ("which is not given one tensor alone, as its first argument; move its parameters "
                 "into a layer that is")
    elif len(x) != layer.current.images:
        fault = (f"whose batch has {len(x)} entries for {layer.current.images} images; choose a "
                 "network without windows")
    if fault is not None:
        raise ValueError(f"cannot route '{layer.name}' {fault}")


def check_output(layer: Routed, output) -> None:
    """Raise ValueError unless a layer has returned one tensor."""
    if not isinstance(output, Tensor):
        raise ValueError(f"cannot route '{layer.name}', which returns a {type(output).__name__}; "
                         "move its parameters into a layer that returns one tensor")


def check_maps(output, maps: list[Tensor]) -> None:
    """Raise ValueError unless a network has returned logits, alone or with others alike.
    maps: its outputs with as many axes as the images. Several channels of a sigmoid each are not
    told from logits: they are not supported, and not noticed."""
    channels = {tensor.shape[1] for tensor in maps}
    if len(channels) != 1:
        found = [tuple(tensor.shape) for tensor in tensors_in(output)]
        raise ValueError(f"the network returns a {type(output).__name__} of tensors {found}; wrap "
                         "it in a module that returns its logits (N, C, …) alone")
    if channels != {1} and looks_probable(maps[0]):
        raise ValueError(PROBABILITIES)


def looks_probable(output: Tensor) -> bool:
    """Whether a network's output (N, C, …) may be a softmax's or, of one channel, a sigmoid's."""
    total = output.sum(dim=1)
    sums_to_one = output.shape[1] == 1 or ((total - 1).abs() <= 0.01).all()
    return bool(sums_to_one and output.min() >= 0 and output.max() <= 1.01)


PROBABILITIES = "the network returns probabilities; leave out its last softmax or sigmoid"


# ---------------------------------------------------------------- by comparison with the models
@torch.no_grad()
def check_routed(routed: RoutedNetwork, models: list, images: Tensor) -> None:
    """Raise ValueError unless each model comes back out of `routed`: with all weight on it, the
    logits of images (N, C_in, …) must be its own, and no other model's may be nearer. Refuses also
    networks of one channel if all values of all models lie in 0 … 1, as a sigmoid's do. `routed`
    is afterwards as it was. `fit_to_site` calls this; call it yourself if you leave that out."""
    if len(models) != routed.experts:
        raise ValueError(f"{len(models)} models are given, but {routed.experts} are routed")
    images = checked(images)
    settings, state, routing = routed.settings, routed.snapshot(), routed.routing
    routed.settings = RoutingSettings()  # BatchNorm is mixed, and uses running statistics
    routed.restore(routed.built)
    outputs, own_logits, routed_logits = [], [], []  # of each model, (N, C, …)
    try:
        with torch.autocast(images.device.type, enabled=False):
            for number, model in enumerate(models):
                output = main_output(evaluation_copy(model)(images), images.ndim)
                outputs.append(output)
                own_logits.append(two_channels(output))
                set_start(routed, torch.eye(len(models))[number])
                routed_logits.append(routed(images))
    finally:
        routed.settings = settings
        routed.routing = routing
        routed.restore(state)
    if all(looks_probable(output) for output in outputs):
        raise ValueError(PROBABILITIES)
    for number, logits in enumerate(routed_logits):
        errors = [(logits - other).abs().max() for other in own_logits]
        scale = own_logits[number].abs().max()
        near = errors[number] <= 0.01 * scale
        nearest = errors[number] <= min(errors) + 1e-4 * scale
        if not (near and nearest):  # NaN is neither
            raise ValueError(
                f"model {number} is not itself when it is routed: give the models and the order of "
                "build_routed; no model may begin with a norm or hide parts from torch")
