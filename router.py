"""Outside the federation: one routed network made of many, tuned at test time without labels (M4 to M8).

Imports torch only and knows nothing of the other files: copy it into a project that has M trained
networks of one architecture (the personalised ones and, last, the global one) and unlabelled images.

    routed = build_routed(models, RoutingSettings())
    probabilities = adapt(routed, images, generator=torch.Generator().manual_seed(0))

The numbers M4 … M8 are those of README.md.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class RoutingSettings:
    """How the routed network is built and adapted. The defaults are ours; AUTHORS is the published code."""

    activation: str = "softmax"  # of the router: "softmax" (sums to one) or "sigmoid" (does not)
    per_sample: bool = True  # False: a router sees no image, so that all images are routed alike
    start: str = "matched"  # "random", "uniform" average, or by the match of the experts' statistics with the
    # images' (`match_statistics`): "matched" average or the "best" expert alone
    match_floor: float = 0.05  # "matched": smaller differences of divergence are not worth telling apart
    global_share: float | None = 0.5  # "matched": part of the last, global expert where all match alike; None: 1 / M
    mix_batchnorm: bool = True  # BatchNorm mixed like the kernels; False: the last (global) expert's
    statistics: str = "site"  # of BatchNorm: "running", of the "batch", or of the "site", measured on its images
    share: float = 1.0  # "batch": of the batch's statistics against the running ones
    tolerance: float = 0.02  # "site": divergence from the global model at which half of its statistics is taken
    entropy: float = 0.0  # λ_ent, weight of M8
    consistency: float = 1.0  # λ_con, weight of M6
    shape: float = 0.02  # λ_shape, weight of M7
    noise: float = 0.5  # standard deviation of ε in M6
    radius: float = 10 / 384  # d of M7 as a share of the image's shorter side
    lr: float = 2e-4  # of Adam
    passes: int = 3  # over the images, offline
    batch_size: int = 5
    dropout: float = 0.2  # inside the routers, while adapting
    leash: float | None = 0.01  # relative change of a class's area that adaptation may bring; None: any

    def __post_init__(self) -> None:
        for own in fields(self):
            if not isinstance(getattr(self, own.name), own.type if own.type in (bool, str) else own.type | int):
                raise ValueError(f"RoutingSettings: {own.name} must be of type {own.type}, not {getattr(self, own.name)!r}")
        for name, allowed in (("activation", ("softmax", "sigmoid")), ("start", ("random", "uniform", "matched", "best")),
                              ("statistics", ("running", "batch", "site"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"RoutingSettings: {name} must be one of {', '.join(allowed)}, "
                                 f"not {getattr(self, name)!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"RoutingSettings: share must lie in [0, 1], not {self.share}")
        for name, least in (("match_floor", 0), ("tolerance", 0), ("entropy", 0), ("consistency", 0), ("shape", 0),
                            ("noise", 0), ("radius", 0), ("lr", 0), ("passes", 0), ("batch_size", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"RoutingSettings: {name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1 or not 0 <= (self.global_share or 0) <= 1 or not 0 <= (self.leash or 0):
            raise ValueError("RoutingSettings: dropout must lie in [0, 1), global_share in [0, 1], leash not below 0")


# The published code's choices in the terms above. Its entropy is summed over a batch of 5 and weighted by 10,
# which is 25 times M8's mean; its shape term, the 2-norm of 10⁻⁶ · M7, has about the gradient of 0.004 times
# M7's mean at 384 × 384.
AUTHORS = RoutingSettings(activation="sigmoid", start="random", mix_batchnorm=False, statistics="batch",
                          entropy=25.0, consistency=0.1, shape=0.004, lr=1e-3, passes=10, leash=None)


def wide(x: Tensor) -> Tensor:
    """At least float32, for sums over many values: within torch.autocast x may be bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sharp(x: Tensor) -> torch.autocast:
    """Within this context nothing is rounded to bfloat16: for what is small and decides about much."""
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------- the routed network (M4, M5)
@dataclass
class Trace:
    """What one forward pass leaves for later layers and for reports: routing weights (N, M). `fixed`, a tensor (M,),
    replaces what the routers would say. one_by_one: the samples of a batch are convolved one after the other."""

    fixed: Tensor | None = None
    one_by_one: bool = False
    latest: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)


class Router(nn.Module):
    """r(x) = act(FC2(Dropout(FC1(GlobalAvgPool(x))))): one weight an expert, per sample (M4).

    In training mode `generator` draws the dropout; in evaluation mode there is none.
    Source: published code; softmax and the starts other than random: ours.
    """

    def __init__(self, in_channels: int, experts: int, settings: RoutingSettings,
                 generator: torch.Generator | None):
        super().__init__()
        self.fc1 = nn.Linear(in_channels, 2 * in_channels)
        self.fc2 = nn.Linear(2 * in_channels, experts)
        for layer in (self.fc1, self.fc2):  # torch's own distribution, drawn from our generator
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        self.activation, self.dropout, self.per_sample = settings.activation, settings.dropout, settings.per_sample
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) → routing weights (N, M)."""
        with sharp(x):
            # The sum divided by H·W is the mean; its gradient needs no division, or change of type, of the size of x.
            pooled = wide(x.sum(dim=(2, 3))) / (x.shape[2] * x.shape[3])
            hidden = self.fc1(pooled)  # (N, 2C)
            if not self.per_sample:
                hidden = torch.zeros_like(hidden)
            if self.training and self.dropout:
                kept = torch.rand(hidden.shape, generator=self.generator, device=hidden.device) >= self.dropout
                hidden = hidden * kept / (1 - self.dropout)
            scores = self.fc2(hidden)  # (N, M)
            return scores.softmax(dim=1) if self.activation == "softmax" else scores.sigmoid()

    @torch.no_grad()
    def start_at(self, weights: Tensor) -> None:
        """Give every input the routing weights (M,), which sum to one, until training moves on."""
        weights = weights.clamp(1e-6, 1 - 1e-6)
        self.fc2.weight.zero_()
        self.fc2.bias.copy_(weights.log() if self.activation == "softmax" else weights.logit())


class RoutedConv2d(nn.Module):
    """y = conv(x; Σ_m r_m(x) W_m, Σ_m r_m(x) b_m) of M frozen convolutions, transposed or not (M5)."""

    def __init__(self, experts: list, name: str, trace: Trace, settings: RoutingSettings,
                 generator: torch.Generator | None):
        super().__init__()
        conv = experts[-1]
        # Channels last: (M, C_out, kh, kw, C_in / groups); transposed: (M, C_in, kh, kw, C_out / groups).
        self.register_buffer("weight", torch.stack([e.weight.detach().movedim(1, -1) for e in experts]))
        self.register_buffer("bias", None if conv.bias is None else torch.stack([e.bias.detach() for e in experts]))
        self.router = Router(conv.in_channels, len(experts), settings, generator).to(conv.weight)
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        self.stride, self.dilation, self.groups, self.padding = conv.stride, conv.dilation, conv.groups, conv.padding
        self.output_padding, self.padding_mode, self.frame = conv.output_padding, conv.padding_mode, None
        if self.padding_mode != "zeros":  # F.conv2d pads with zeros only: other frames are laid on before it
            self.frame, self.padding = conv._reversed_padding_repeated_twice, (0, 0)
        self.name, self.trace = name, trace

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, H', W')."""
        fixed = self.trace.fixed
        routing = self.router(x) if fixed is None else fixed.expand(len(x), -1)  # (N, M)
        self.trace.latest = routing
        self.trace.layers[self.name] = routing.detach()
        if self.frame:
            x = F.pad(x, self.frame, mode=self.padding_mode)
        # All samples' kernels by one matrix product: (N, C_out, C_in / g, kh, kw), or transposed.
        kernels = (routing @ self.weight.flatten(1)).view(-1, *self.weight.shape[1:]).movedim(-1, 2)
        biases = [None] * len(x) if self.bias is None else routing @ self.bias  # (N, C_out)
        if self.trace.one_by_one:
            return torch.cat([self.convolve(*one, self.groups) for one in zip(x.split(1), kernels, biases)])
        # The batch becomes groups of one convolution.
        y = self.convolve(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1).contiguous(),
                          None if self.bias is None else biases.flatten(), len(x) * self.groups)
        return y.view(len(x), -1, *y.shape[2:])  # (N, C_out, H', W')

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(x, kernel, bias, self.stride, self.padding, self.output_padding, groups, self.dilation)
        return F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation, groups)


class RoutedBatchNorm2d(nn.Module):
    """BatchNorm of M experts: statistics and affine mixed by the weights of the last routed convolution.

    With `mix_batchnorm` off, those of the last expert. `delta_weight` and `delta_bias` (C,) are what adaptation adds
    to the affine. Statistics: (1-s) · running + s · own; train and eval mode do not matter. Own are those of the
    batch, or those of the site, which `measure_site` counts up, with the s that `prepare` set.
    Source: published code (last expert, batch, s = 1); the rest: ours.
    """

    def __init__(self, experts: list[nn.BatchNorm2d], trace: Trace, settings: RoutingSettings):
        super().__init__()
        norm = experts[-1]
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = [getattr(expert, name) for expert in experts]
            self.register_buffer(name, None if values[-1] is None else torch.stack([v.detach() for v in values]))
        if norm.affine:
            self.delta_weight = nn.Parameter(torch.zeros_like(norm.weight))
            self.delta_bias = nn.Parameter(torch.zeros_like(norm.bias))
        self.affine, self.eps, self.experts, self.trace = norm.affine, norm.eps, len(experts), trace
        self.settings = settings
        if norm.track_running_stats:
            self.register_buffer("site_mean", torch.zeros_like(norm.running_mean))
            self.register_buffer("site_square", torch.zeros_like(norm.running_var))
            self.register_buffer("site_images", torch.zeros((), dtype=torch.long))
            self.register_buffer("site_share", torch.zeros_like(norm.running_var[0]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape."""
        with sharp(x):
            scale, shift = (value.to(x.dtype).expand(len(x), -1)[:, :, None, None] for value in self.scale_and_shift(x))
        return x * scale + shift

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What x is multiplied by and what is then added, each (N or 1, C)."""
        fixed = self.trace.fixed is not None
        if (self.settings.mix_batchnorm or fixed) and self.trace.latest is not None:
            routing = self.trace.latest / self.trace.latest.sum(dim=1, keepdim=True)  # (N, M)
        else:
            last = F.one_hot(torch.tensor([self.experts - 1], device=x.device), self.experts)  # (1, M)
            routing = last.to(torch.promote_types(x.dtype, torch.float32))
        mean = variance = share = 0.0
        if self.running_mean is None or self.settings.statistics == "batch" and not fixed:
            share = 1.0 if self.running_mean is None else self.settings.share
            mean, variance = wide(x).mean(dim=(0, 2, 3)), wide(x).var(dim=(0, 2, 3), correction=0)  # (C,)
        elif self.settings.statistics == "site" and not fixed:
            share = self.site_share
            mean, variance = self.site_mean, (self.site_square - self.site_mean.square()).clamp_min(0)
        if self.running_mean is not None:
            mean = share * mean + (1 - share) * (routing @ self.running_mean)  # (N or 1, C)
            variance = share * variance + (1 - share) * (routing @ self.running_var)
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            # An expert as it was trained knows nothing of adaptation.
            gain, more = (routing @ self.weight, 0.0) if fixed else (routing @ self.weight + self.delta_weight, self.delta_bias)
            scale, shift = scale * gain, shift * gain + routing @ self.bias + more
        return scale, shift


class RoutedNetwork(nn.Module):
    """M frozen networks as one, mixed layer by layer and image by image; made by `build_routed`."""

    def __init__(self, network: nn.Module, trace: Trace, experts: int, settings: RoutingSettings):
        super().__init__()
        self.network, self.trace, self.experts, self.settings = network, trace, experts, settings
        if settings.start != "random":
            self.start_at(torch.full((experts,), 1 / experts))
        self._built = self.parameters_now()
        self.start: dict[str, Tensor] | None = None  # the parameters before the first step
        self.optimiser: torch.optim.Optimizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C_in, H, W) → what the networks return, usually logits (N, C, H, W)."""
        self.trace.latest = None if self.trace.fixed is None else self.trace.fixed[None]
        self.trace.layers.clear()
        # A CPU is kept busy by one large image, and reads it faster alone; small ones, and a GPU, want the whole batch.
        self.trace.one_by_one = x.device.type == "cpu" and x.shape[-1] * x.shape[-2] >= 2**14
        y = self.network(x)
        self.trace.latest = None  # it holds the graph of this pass
        return y

    def probabilities(self, x: Tensor) -> Tensor:
        """Images (N, C_in, H, W) → probabilities (N, C, H, W)."""
        return wide(self(x)).softmax(dim=1)

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def norms(self) -> list[RoutedBatchNorm2d]:
        """Those whose experts keep running statistics."""
        return [m for m in self.modules() if isinstance(m, RoutedBatchNorm2d) and m.running_mean is not None]

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Everything that adaptation may move: the routers and what is added to BatchNorm's affine."""
        # Chosen by module type: names differ between networks, and one left out is not noticed.
        return [parameter for module in self.modules() if isinstance(module, (Router, RoutedBatchNorm2d))
                for parameter in module.parameters()]

    def parameters_now(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def start_at(self, weights: Tensor) -> None:
        """Let every layer route every image by the weights (M,), which sum to one."""
        for router in self.routers():
            router.start_at(weights.to(router.fc2.weight))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the network as built, before any adaptation."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self._built[name])
        for norm in self.norms():
            for buffer in (norm.site_mean, norm.site_square, norm.site_images, norm.site_share):
                buffer.zero_()
        self.start = None


def build_routed(models: list[nn.Module], settings: RoutingSettings | None = None,
                 generator: torch.Generator | None = None) -> RoutedNetwork:
    """Turn M trained networks of one architecture into one routed network; the models stay as they are.

    models: personalised ones first, the global one last; made of Conv2d, ConvTranspose2d and BatchNorm2d
    among modules without parameters. generator draws the routers' initial weights (CPU).
    Raises ValueError where the models differ or hold something that cannot be routed or is not finite, naming it.
    """
    settings = settings or RoutingSettings()
    if not models:
        raise ValueError("build_routed: at least one model is needed")
    for number, model in enumerate(models):
        for name, value in model.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"build_routed: model {number}, '{name}': not every value is finite")
    trace, done = Trace(), {}

    def route(modules: list[nn.Module], name: str) -> nn.Module:
        last = modules[-1]
        if id(last) in done:  # a module used in two places stays one module
            return done[id(last)]
        for number, module in enumerate(modules):
            if (type(module), module.extra_repr(), [n for n, _ in module.named_children()]) != (
                    type(last), last.extra_repr(), [n for n, _ in last.named_children()]):
                raise ValueError(f"build_routed: '{name}': model {number} has {_describe(module)}, "
                                 f"model {len(modules) - 1} has {_describe(last)}")
        # By exact type: a subclass may compute something else.
        if type(last) in (nn.Conv2d, nn.ConvTranspose2d):
            done[id(last)] = RoutedConv2d(modules, name, trace, settings, generator)
        elif type(last) is nn.BatchNorm2d:
            done[id(last)] = RoutedBatchNorm2d(modules, trace, settings)
        elif [*last.parameters(recurse=False), *last.buffers(recurse=False)]:
            raise ValueError(f"build_routed: '{name}': cannot route {_describe(last)}; only Conv2d, ConvTranspose2d "
                             f"and BatchNorm2d may hold parameters or buffers")
        else:
            skeleton = done[id(last)] = copy.copy(last)
            skeleton._modules = {child: route([m._modules[child] for m in modules], f"{name}.{child}".lstrip("."))
                                 if module is not None else None for child, module in last._modules.items()}
        return done[id(last)]

    return RoutedNetwork(route(models, ""), trace, len(models), settings).eval()


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


@contextmanager
def fixed_routing(routed: RoutedNetwork, weights: Tensor):
    """Within this context the network is the mixture by the given weights (M,): for every image and layer,
    BatchNorm with its running statistics included. One-hot weights give an expert as it was trained."""
    routed.trace.fixed = weights.to(next(routed.parameters()))
    try:
        yield
    finally:
        routed.trace.fixed = None


# ---------------------------------------------------------------- the objective (M6 to M8)
def draw_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """A view of each image, as a number (N,): 0 … 7 for square images, else 0 … 3 (no transposition)."""
    count = 8 if images.shape[-1] == images.shape[-2] else 4
    return torch.randint(count, (len(images),), generator=generator, device=images.device)


def view(images: Tensor, views: Tensor, inverse: bool = False) -> Tensor:
    """T of M6, or T⁻¹: by the bits of its number each image (N, C, H, W) is transposed (4), mirrored
    up-down (2) and left-right (1), in this order: together the eight flips and 90° rotations."""
    steps = [(4, lambda x: x.transpose(-1, -2)), (2, lambda x: x.flip(-2)), (1, lambda x: x.flip(-1))]
    if images.shape[-1] != images.shape[-2]:
        steps = steps[1:]
    for bit, step in reversed(steps) if inverse else steps:
        images = torch.where((views & bit > 0)[:, None, None, None], step(images), images)
    return images


def consistency_loss(probabilities: Tensor, of_view: Tensor, views: Tensor) -> Tensor:
    """mean (p(x) - T⁻¹[p(T(x + ε))])², a scalar in [0, 1] (M6). Both arguments: (N, C, H, W)."""
    return (probabilities - view(of_view, views, inverse=True)).square().mean()


def shape_constraint(probabilities: Tensor, radius: int) -> Tensor:
    """Mean local range of the foreground probability: the price of contour length (M7).

    probabilities: (N, C, H, W) in [0, 1], class 0 the background.
    radius: half width d of the (2d+1)² window, in pixels; scale it with the image.
    Returns a scalar in [0, 1]: 0 for a constant map. Paper: idea; published code: window; weight: ours.
    """
    foreground = 1 - probabilities[:, :1]
    highest, negative_lowest = (F.max_pool2d(z, 2 * radius + 1, stride=1, padding=radius)
                                for z in (foreground, -foreground))
    return (highest + negative_lowest).mean()


def entropy_loss(probabilities: Tensor) -> Tensor:
    """Mean over pixels of -Σ_c p_c log p_c / log C, a scalar in [0, 1] (M8). probabilities: (N, C, H, W)."""
    classes = probabilities.shape[1]
    return -torch.xlogy(probabilities, probabilities.clamp_min(1e-12)).sum(dim=1).mean() / torch.tensor(classes).log()


def adaptation_loss(routed: RoutedNetwork, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """L = λ_ent L_ent + λ_con L_con + λ_shape L_shape of a batch (N, C_in, H, W), and its probabilities
    (N, C, H, W); noise and views are drawn."""
    settings = routed.settings
    probabilities = routed.probabilities(images)
    loss = probabilities.new_zeros(())
    if settings.entropy:
        loss = loss + settings.entropy * entropy_loss(probabilities)
    if settings.consistency:
        views = draw_views(images, generator)
        noise = settings.noise * torch.randn(images.shape, generator=generator, device=images.device)
        of_view = routed.probabilities(view(images + noise, views))
        loss = loss + settings.consistency * consistency_loss(probabilities, of_view, views)
    if settings.shape:
        radius = max(1, round(settings.radius * min(images.shape[-2:])))
        loss = loss + settings.shape * shape_constraint(probabilities, radius)
    return loss, probabilities.detach()


# ---------------------------------------------------------------- adaptation
@contextmanager
def watched(routed: RoutedNetwork, watch: Callable[[RoutedBatchNorm2d, Tensor], None]):
    """Within this context `watch` is given every BatchNorm and its inputs (N, C, H, W), before it sees them itself."""
    handles = [norm.register_forward_pre_hook(lambda norm, inputs: watch(norm, inputs[0])) for norm in routed.norms()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_site(routed: RoutedNetwork, images: Tensor) -> None:
    """Let every BatchNorm count the images (N, C_in, H, W) into the site's statistics. All go through in one batch,
    since each layer's inputs depend on the statistics of the layers before."""
    def count(norm: RoutedBatchNorm2d, x: Tensor) -> None:
        x = wide(x)
        norm.site_images += len(x)
        part = (len(x) / norm.site_images).to(x.dtype)
        norm.site_mean.lerp_(x.mean(dim=(0, 2, 3)), part)
        norm.site_square.lerp_(x.square().mean(dim=(0, 2, 3)), part)

    with watched(routed, count):
        routed(images)


@torch.no_grad()
def match_statistics(routed: RoutedNetwork, images: Tensor) -> Tensor:
    """How well each expert's BatchNorm statistics fit the images: divergence (M,), at least 0, small is good.

    Each expert runs alone; at every BatchNorm, the mean and variance of its inputs over all images are
    compared with the running ones by the divergence KL(images ‖ expert) of two Gaussians per channel;
    then averaged over channels and layers. Raises ValueError where no BatchNorm keeps running statistics. Ours.
    """
    norms = routed.norms()
    if not norms:
        raise ValueError("match_statistics: no BatchNorm2d with running statistics; use start='uniform'")
    sums: dict = {}

    def add(norm: RoutedBatchNorm2d, x: Tensor) -> None:
        x = x.double()
        sums[norm] = sums.get(norm, 0) + len(x) * torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])

    divergences = []
    for expert, weights in enumerate(torch.eye(routed.experts)):
        sums.clear()
        with fixed_routing(routed, weights), watched(routed, add):
            for batch in images.split(routed.settings.batch_size):
                routed(batch)
        layers = []
        for norm in norms:
            mean, square = sums[norm] / len(images)
            variance = (square - mean.square()).clamp_min(0) + norm.eps
            own_mean, own_variance = norm.running_mean[expert], norm.running_var[expert] + norm.eps
            layers.append(((variance + (mean - own_mean).square()) / own_variance - 1
                           - (variance / own_variance).log()).mean() / 2)
        divergences.append(torch.stack(layers).mean())
    return torch.stack(divergences).float()


def matched_weights(divergence: Tensor, floor: float = 0.0, global_share: float | None = None) -> Tensor:
    """Routing weights (M,) ∝ prior · exp(-divergence / its standard deviation over the experts), the deviation being
    at least `floor`. The prior gives `global_share` to the last expert and the rest to the others; None: all alike.
    Ours."""
    count = len(divergence)
    prior = torch.full((count,), 1 / count)
    if global_share is not None and count > 1:
        prior = torch.tensor([(1 - global_share) / (count - 1)] * (count - 1) + [global_share])
    spread = divergence.std(correction=0).clamp_min(max(floor, 1e-12))
    weights = prior.to(divergence) * torch.exp((divergence.min() - divergence) / spread)
    return weights / weights.sum()


def prepare(routed: RoutedNetwork, images: Tensor) -> None:
    """Before the first step: where routing starts, and how much of the site's statistics is taken.

    Their share is 1 / (1 + (tolerance / D)⁴), D the divergence from the last, global expert: a site that looks like
    the federation keeps running statistics, learnt from more images than it has. Ours.
    """
    settings = routed.settings
    if settings.start in ("matched", "best") or settings.statistics == "site" and routed.norms():
        divergence = match_statistics(routed, images)
        if settings.start == "best":
            routed.start_at(F.one_hot(divergence.argmin(), routed.experts))
        elif settings.start == "matched":
            routed.start_at(matched_weights(divergence, settings.match_floor, settings.global_share))
        # Where no expert is set apart as the global one, the mean over all stands for it.
        apart = divergence.mean() if settings.global_share is None else divergence[-1]
        for norm in routed.norms():
            norm.site_share.fill_(1 / (1 + (settings.tolerance / apart.clamp_min(1e-12)) ** 4))
    routed.start = routed.parameters_now()
    routed.optimiser = torch.optim.Adam(routed.adaptable_parameters(), lr=settings.lr)


def step(routed: RoutedNetwork, images: Tensor, generator: torch.Generator) -> None:
    """One step on a batch of images (N, C_in, H, W), kept on a leash.

    Every term of the objective is least for an empty mask, and no image says how generously its annotator draws.
    So the areas of the classes are compared with those that the start gives for the same images; where one has
    changed by more than `settings.leash`, all parameters go half of the way back to the start. The areas are those
    before the step, which saves a pass: what this step adds is seen by the next one. Leash: ours.
    Where the objective or its gradient is not finite nothing moves, and a warning says so.
    """
    for r in routed.routers():
        r.train().generator = generator  # dropout on; `predict` turns it off
    loss, probabilities = adaptation_loss(routed, images, generator)
    routed.optimiser.zero_grad()
    loss.backward()
    gradients = [p.grad for p in routed.adaptable_parameters() if p.grad is not None]
    if not (loss.detach() + nn.utils.get_total_norm(gradients)).isfinite():
        warnings.warn("step: the objective or its gradient is not finite; the step is left out")
        return
    routed.optimiser.step()
    if routed.settings.leash is not None:
        with torch.no_grad():
            at_start = wide(torch.func.functional_call(routed, routed.start, (images,))).softmax(dim=1)
            area, start_area = (p[:, 1:].mean(dim=(0, 2, 3)) for p in (probabilities, at_start))  # (C-1,)
            if ((area - start_area).abs() > routed.settings.leash * start_area).any():
                for name, value in routed.named_parameters():
                    value.lerp_(routed.start[name], 0.5)


def adapt(routed: RoutedNetwork, images: Tensor, **options) -> Tensor:
    """Tune routers and BatchNorm affine on unlabelled images, in place; return probabilities (N, C, H, W).

    All that `adapt_batches` yields, at once; the same options.
    """
    return torch.cat(list(adapt_batches(routed, images, **options)))


def adapt_batches(routed: RoutedNetwork, images: Tensor, *, generator: torch.Generator, online: bool = False,
                  after_pass: Callable[[int], None] = lambda number: None) -> Iterator[Tensor]:
    """Tune routers and BatchNorm affine on unlabelled images, in place; yield probabilities batch by batch.

    images: (N, C_in, H, W) of one site, on the network's device, as must be the generator, which draws order,
    noise, views and dropout. What can be measured, indexed and split as a tensor will do, so that images may stay
    on disk. The experts are never changed. Everything else is in `routed.settings`.
    offline: `passes` over all images in random order, then they are predicted; after_pass: called with 0 before the
    first pass and with its number after each.
    Start and statistics come from all images, statistics from at most 64 of them.
    online: in the given order each batch is counted into the site's statistics, used for one step and predicted;
    call again to go on. The start, and how much of the statistics is taken, come from the first batch alone.
    Raises ValueError before anything is changed where there is no image or one is not finite, naming it.
    """
    settings = routed.settings
    if not len(images):
        raise ValueError("adapt: no images")
    for number, batch in enumerate(images.split(settings.batch_size)):
        wrong = (~batch.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(wrong):
            raise ValueError(f"adapt: image {number * settings.batch_size + int(wrong[0])} holds values that are not finite")
    routed.eval()  # dropout of the networks' own stays off throughout
    if routed.start is None:
        prepare(routed, images[:settings.batch_size] if online else images)
        if settings.statistics == "site" and not online:
            # Spread over the site, since neighbours may be slices of one patient.
            measure_site(routed, images[torch.linspace(0, len(images) - 1, min(len(images), 64)).round().long()])
    if not online:
        after_pass(0)
        for number in range(1, settings.passes + 1):
            order = torch.randperm(len(images), generator=generator, device=images.device)
            for numbers in order.split(settings.batch_size):
                step(routed, images[numbers], generator)
            after_pass(number)
    for batch in images.split(settings.batch_size):
        if online:
            if settings.statistics == "site":
                measure_site(routed, batch)
            step(routed, batch, generator)
        yield predict(routed, batch)


@torch.no_grad()
def predict(routed: RoutedNetwork, images: Tensor) -> Tensor:
    """Probabilities (N, C, H, W) of images (N, C_in, H, W), dropout off, in batches of `settings.batch_size`.
    Raises ValueError where one is not finite."""
    routed.eval()
    probabilities = torch.cat([routed.probabilities(batch) for batch in images.split(routed.settings.batch_size)])
    if not probabilities.isfinite().all():
        raise ValueError("predict: not every probability is finite; the experts' training may have diverged")
    return probabilities


@torch.no_grad()
def mean_routing(routed: RoutedNetwork, images: Tensor) -> tuple[list[str], Tensor]:
    """Names of the routed layers and their mean routing weights over the images: (layers, M)."""
    sums: dict[str, Tensor] = {}
    for batch in images.split(routed.settings.batch_size):
        routed(batch)
        for name, weights in routed.trace.layers.items():
            sums[name] = sums.get(name, 0) + weights.sum(dim=0)
    return list(sums), torch.stack(list(sums.values())) / len(images)
