"""Outside the federation: M networks as one, mixed by small routers, tuned at test time, no labels.

Imports torch only and knows nothing of the other files: copy it into a project that has M trained
networks of one architecture (personalised ones first, the global one last) and unlabelled images.

    routed = build_routed(models)
    fit_to_site(routed, models, images)  # ours; leave it out for the published start
    probabilities = adapt(routed, images, generator=torch.Generator().manual_seed(0))

Part 1 is the method (M4 to M8 of README.md), by the published code where the paper leaves it open.
Part 2 is ours: where routing starts, whose BatchNorm statistics it uses, and a leash against
collapse. With PUBLISHED and without `fit_to_site` no line of part 2 runs.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutingSettings:
    """The defaults are ours; PUBLISHED is the published code. The loss terms are means over pixels:
    no weight depends on batch or image size."""

    softmax: bool = True  # routing weights sum to one; False: a sigmoid each, which do not
    per_sample: bool = True  # False: routers see no image, so that all images are routed alike
    dropout: float = 0.2  # inside the routers, while adapting
    mix_batchnorm: bool = True  # BatchNorm mixed like the kernels; False: the last expert's
    batch_statistics: bool = False  # in BatchNorm; False: running ones, and a share of the site's
    consistency: float = 1.0  # λ_con
    shape: float = 0.02  # λ_shape
    entropy: float = 0.0  # λ_ent
    noise: float = 0.5  # standard deviation of ε
    radius: float = 10 / 384  # d as a share of the image's shorter side
    lr: float = 2e-4  # of Adam
    passes: int = 3  # over the images, offline
    batch_size: int = 5
    leash: float | None = 0.01  # how far a class's area may move (part 2); None: anywhere


# The published entropy is summed over a batch of 5 and weighted by 10: 25 times M8's mean. The
# shape term, 10⁻⁶ times the 2-norm of M7's map, has about the gradient of 0.004 M7 at 384².
PUBLISHED = RoutingSettings(softmax=False, mix_batchnorm=False, batch_statistics=True,
                          consistency=0.1, shape=0.004, entropy=25.0, lr=1e-3, passes=10,
                          leash=None)


# ================================================================ part 1: the method
# ---------------------------------------------------------------- the routed network (M4, M5)
class Router(nn.Module):
    """r(x) = act(FC2(Dropout(FC1(GlobalAvgPool(x))))): a weight for each expert and sample (M4)."""

    def __init__(self, in_channels: int, experts: int, settings: RoutingSettings, generator):
        super().__init__()
        self.settings, self.generator = settings, None  # generator: of dropout, in training mode
        self.fc1 = nn.utils.skip_init(nn.Linear, in_channels, 2 * in_channels)
        self.fc2 = nn.utils.skip_init(nn.Linear, 2 * in_channels, experts)
        for layer in (self.fc1, self.fc2):  # torch's own distribution, drawn from our generator
            for values in layer.parameters():
                bound = layer.in_features**-0.5
                nn.init.uniform_(values, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) → routing weights (N, M)."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would be too coarse here
            # Sum, then divide: dividing the few sums spares backward a pass over all features.
            pooled = x.sum(dim=(2, 3), dtype=self.fc1.weight.dtype) / (x.shape[2] * x.shape[3])
            hidden = self.fc1(pooled) * self.settings.per_sample  # (N, 2C)
            if self.training:
                draw = torch.rand(hidden.shape, generator=self.generator, device=x.device)
                kept = draw >= self.settings.dropout
                hidden = hidden * kept / (1 - self.settings.dropout)
            scores = self.fc2(hidden)  # (N, M)
            return scores.softmax(dim=1) if self.settings.softmax else scores.sigmoid()


class RoutedConv2d(nn.Module):
    """y = conv(x; Σ_m r_m(x) W_m, Σ_m r_m(x) b_m) of M frozen convolutions (M5)."""

    def __init__(self, experts: list, name: str, routing: list, settings, generator):
        super().__init__()
        conv = experts[-1]
        # Channels last: (M, C_out, kh, kw, C_in); transposed: (M, C_in, kh, kw, C_out).
        kernels = torch.stack([expert.weight.detach().movedim(1, -1) for expert in experts])
        biases = None if conv.bias is None else torch.stack([e.bias.detach() for e in experts])
        self.register_buffer("weight", kernels)
        self.register_buffer("bias", biases)  # (M, C_out)
        self.router = Router(conv.in_channels, len(experts), settings, generator)
        self.name, self.routing, self.groups, self.one_by_one = name, routing, conv.groups, False
        self.options = {"stride": conv.stride, "dilation": conv.dilation, "padding": conv.padding}
        self.convolve, self.frame, self.mode = F.conv2d, None, conv.padding_mode
        if isinstance(conv, nn.ConvTranspose2d):
            self.convolve = F.conv_transpose2d
            self.options["output_padding"] = conv.output_padding
        elif conv.padding_mode != "zeros":  # F.conv2d knows no others: the frame is laid on before
            self.frame, self.options["padding"] = conv._reversed_padding_repeated_twice, 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, H', W')."""
        r = self.router(x)  # (N, M)
        self.routing.append((self.name, r))
        x = F.pad(x, self.frame, mode=self.mode) if self.frame else x
        # All samples' kernels by one matrix product: (N, C_out, C_in, kh, kw), or transposed.
        kernels = (r @ self.weight.flatten(1)).view(-1, *self.weight.shape[1:]).movedim(-1, 2)
        biases = [None] * len(x) if self.bias is None else r @ self.bias  # (N, C_out)
        if self.one_by_one:
            return torch.cat([self.convolve(*sample, groups=self.groups, **self.options)
                              for sample in zip(x.split(1), kernels, biases)])
        # Each sample has kernels of its own: the batch becomes the groups of one convolution.
        bias = None if self.bias is None else biases.flatten()
        y = self.convolve(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1).contiguous(), bias,
                          groups=len(x) * self.groups, **self.options)
        return y.view(len(x), -1, *y.shape[2:])


class RoutedBatchNorm2d(nn.Module):
    """BatchNorm of M experts, mixed by the weights of the routed convolution before it: `routing`,
    which all layers of a network share, holds the weights of the pass so far.
    `delta_weight` and `delta_bias` (C,) are what adaptation adds to the affine. In training mode it
    counts its inputs into the site's statistics, of which it uses `site_share` (part 2).
    Published code: the last expert's affine, statistics of the batch. The rest: ours."""

    def __init__(self, experts: list[nn.BatchNorm2d], routing: list, settings: RoutingSettings):
        super().__init__()
        norm, zero = experts[-1], torch.zeros(experts[-1].num_features)
        self.eps, self.routing, self.mixed = norm.eps, routing, settings.mix_batchnorm
        self.batch_statistics = settings.batch_statistics or norm.running_mean is None
        for name in ("weight", "bias", "running_mean", "running_var"):  # (M, C)
            missing = zero + (name in ("weight", "running_var"))
            values = [getattr(expert, name) for expert in experts]
            values = [missing if value is None else value.detach() for value in values]
            self.register_buffer(name, torch.stack(values))
        self.register_buffer("last", torch.eye(len(experts))[-1:])  # (1, M): the last one alone
        for name in ("delta_weight", "delta_bias", "site_mean", "site_variance"):  # (C,)
            moves = norm.affine and name.startswith("delta")
            self.register_parameter(name, nn.Parameter(zero.clone(), requires_grad=moves))
        self.site_images = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.site_share = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            r = self.routing[-1][1] if self.mixed and self.routing else self.last
            r = r / r.sum(dim=1, keepdim=True)  # (N or 1, M)
            if self.batch_statistics or self.training:
                values = x.to(self.weight.dtype)
                mean, variance = values.mean(dim=(0, 2, 3)), values.var(dim=(0, 2, 3), correction=0)
            if self.training:  # merged without squares of means, which would cancel
                self.site_images += len(x)
                part, off = len(x) / self.site_images, mean - self.site_mean
                self.site_variance.lerp_(variance, part).add_(part * (1 - part) * off.square())
                self.site_mean += part * off
            if not self.batch_statistics:
                mean = torch.lerp(r @ self.running_mean, self.site_mean, self.site_share)
                variance = torch.lerp(r @ self.running_var, self.site_variance, self.site_share)
            scale = (r @ self.weight + self.delta_weight) * (variance + self.eps).rsqrt()
            shift = r @ self.bias + self.delta_bias - mean * scale  # (N or 1, C)
        return x * scale.to(x.dtype)[:, :, None, None] + shift.to(x.dtype)[:, :, None, None]


class RoutedNetwork(nn.Module):
    """M frozen networks as one, mixed layer by layer and image by image; made by `build_routed`.
    The experts are buffers. Its parameters are what changes: the routers, what is added to
    BatchNorm's affine, and, without gradient, the site's statistics.
    `routing`: name and weights (N, M) of each routed layer in the last pass."""

    def __init__(self, network: nn.Module, routing: list, settings: RoutingSettings):
        super().__init__()
        self.network, self.routing, self.settings = network, routing, settings
        self.keep_start()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C_in, H, W) → what the networks return, usually logits (N, C, H, W)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise ValueError("routing overflows in float16; use bfloat16 autocast or float32")
        self.routing.clear()
        for conv in self.parts(RoutedConv2d):  # a CPU reads large images faster one by one
            conv.one_by_one = kind == "cpu" and x.shape[-1] * x.shape[-2] >= 2**14
        y = self.network(x)
        self.routing[:] = [(name, r.detach()) for name, r in self.routing]
        return y

    def probabilities(self, x: Tensor) -> Tensor:
        """Images (N, C_in, H, W) → probabilities (N, C, H, W)."""
        logits = self(x)
        if logits.shape[1] < 2:
            raise ValueError("one output channel, whose softmax is 1 everywhere; two are needed")
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)

    def parts(self, kind: type) -> list:
        return [module for module in self.modules() if isinstance(module, kind)]

    def keep_start(self) -> None:
        """What it is now is the start, of the leash and of `reset`: call after load_state_dict."""
        self.start = {name: value.detach().clone() for name, value in self.named_parameters()}
        self.optimiser = torch.optim.Adam(self.parameters(), lr=self.settings.lr)

    def reset(self) -> None:
        """Back to the start, bit for bit."""
        self.load_state_dict(self.start, strict=False)
        self.keep_start()


def build_routed(models: list[nn.Module], settings: RoutingSettings = RoutingSettings(),
                 generator: torch.Generator | None = None) -> RoutedNetwork:
    """Turn M trained networks of one architecture into one; the models stay as they are.
    models: personalised ones first, the global one last; made of Conv2d, ConvTranspose2d and
    BatchNorm2d among modules without parameters. generator (CPU) draws the routers' weights.
    Raises ValueError, naming the layer, where models differ or one cannot be routed; what only a
    pass can show is refused by `fit_to_site`."""
    models = [getattr(model, "_orig_mod", model) for model in models]  # of torch.compile
    modules = [dict(model.named_modules()) for model in models]
    example, routing, made = next(models[-1].parameters(), torch.empty(0)), [], {}
    for name in dict.fromkeys(name for own in modules for name in own):
        experts = [own.get(name) for own in modules]
        kinds = {f"{type(e).__name__}({e.extra_repr() if e is not None else ''})" for e in experts}
        if len(kinds) > 1:
            raise ValueError(f"build_routed: the models differ in '{name}': {sorted(kinds)}")
        last, values = experts[-1], [v for e in experts for v in e.state_dict().values()]
        owned = [*last.parameters(recurse=False), *last.buffers(recurse=False)]
        if not owned and type(last) is not nn.BatchNorm2d and not hasattr(last, "_orig_mod"):
            continue
        changed = last._forward_pre_hooks or last._forward_hooks or "forward" in vars(last)
        if (type(last) not in (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d) or changed
                or not all(v.dtype.itemsize > 2 and v.isfinite().all() for v in values)):
            raise ValueError(f"build_routed: cannot route '{name}', {kinds.pop()}: only Conv2d, "
                             f"ConvTranspose2d, BatchNorm2d, without hooks or a forward of their "
                             f"own, not compiled, finite, not in half precision")
        routed = (RoutedBatchNorm2d(experts, routing, settings) if type(last) is nn.BatchNorm2d
                  else RoutedConv2d(experts, name, routing, settings, generator))
        made[id(last)] = routed.to(example)
    # deepcopy's memo puts the routed layers, by id, in place of the last model's own.
    return RoutedNetwork(copy.deepcopy(models[-1], made), routing, settings).eval()


# ---------------------------------------------------------------- the objective (M6 to M8)
def draw_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """A view of each image as a number (N,): 0 … 7, or 0 … 3 where images are not square."""
    count = 8 if images.shape[-1] == images.shape[-2] else 4
    return torch.randint(count, (len(images),), generator=generator, device=images.device)


def view(images: Tensor, views: Tensor, inverse: bool = False) -> Tensor:
    """T of M6, or T⁻¹, on (N, C, H, W): by the bits of its number an image is transposed (4),
    flipped up-down (2) and left-right (1): together the eight flips and 90° rotations."""
    for bit in (1, 2, 4) if inverse else (4, 2, 1):
        chosen = (views & bit > 0)[:, None, None, None]
        if chosen.any():
            changed = images.transpose(-1, -2) if bit == 4 else images.flip(-bit)
            images = torch.where(chosen, changed, images)
    return images


def in_another_view(routed: RoutedNetwork, images: Tensor, generator: torch.Generator) -> Tensor:
    """T⁻¹[p(T(x + ε))] (N, C, H, W) of images (N, C_in, H, W), T and ε drawn (M6)."""
    views = draw_views(images, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    seen = routed.probabilities(view(images + routed.settings.noise * noise, views))
    return view(seen, views, inverse=True)


def consistency_loss(probabilities: Tensor, of_view: Tensor) -> Tensor:
    """mean (p(x) - T⁻¹[p(T(x + ε))])², a scalar in [0, 1] (M6). Both: (N, C, H, W)."""
    return (probabilities - of_view).square().mean()


def shape_constraint(probabilities: Tensor, radius: int) -> Tensor:
    """Mean local range of the foreground probability: the price of contour length (M7).
    probabilities: (N, C, H, W) in [0, 1], class 0 the background.
    radius: half width d of the (2d+1)² window, in pixels; scale it with the image.
    Returns a scalar in [0, 1]: 0 for a constant map. Paper: idea; published code: window."""
    foreground = 1 - probabilities[:, :1]
    window = {"kernel_size": 2 * radius + 1, "stride": 1, "padding": radius}
    return (F.max_pool2d(foreground, **window) + F.max_pool2d(-foreground, **window)).mean()


def entropy_loss(probabilities: Tensor) -> Tensor:
    """Mean over pixels of -Σ_c p_c log p_c / log C, a scalar in [0, 1] (M8). Published code."""
    entropy = -torch.xlogy(probabilities, probabilities.clamp_min(1e-12)).sum(dim=1)
    return entropy.mean() / torch.tensor(probabilities.shape[1]).log()


def objective(routed: RoutedNetwork, images: Tensor,
              generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """λ_con L_con + λ_shape L_shape + λ_ent L_ent of a batch; its probabilities (N, C, H, W)."""
    settings, probabilities = routed.settings, routed.probabilities(images)
    loss = probabilities.new_zeros(())
    if settings.consistency:
        of_view = in_another_view(routed, images, generator)
        loss = loss + settings.consistency * consistency_loss(probabilities, of_view)
    if settings.shape:
        radius = max(1, round(settings.radius * min(images.shape[-2:])))
        loss = loss + settings.shape * shape_constraint(probabilities, radius)
    if settings.entropy:
        loss = loss + settings.entropy * entropy_loss(probabilities)
    return loss, probabilities.detach()


# ---------------------------------------------------------------- adaptation
def adapt(routed: RoutedNetwork, images: Tensor, *, generator: torch.Generator,
          online: bool = False) -> Tensor:
    """Tune routers and BatchNorm's affine on unlabelled images, in place; return probabilities.
    images: (N, C_in, H, W) of one site, on the network's device, as must be the generator, which
    draws order, noise, views and dropout. Returns (N, C, H, W). The experts never change.
    offline: `passes` over all images in random order, then all are predicted.
    online: one step on each batch as it comes, which is then predicted; call again to go on.
    Raises ValueError, before anything changes, where there is no image or one is not finite."""
    check_images(images)
    size, predictions = routed.settings.batch_size, []
    if not online:
        for _ in range(routed.settings.passes):
            order = torch.randperm(len(images), generator=generator, device=images.device)
            for numbers in order.split(size):
                step(routed, images[numbers], generator)
        return predict(routed, images)
    for batch in images.split(size):
        if any(norm.site_share > 0 for norm in routed.parts(RoutedBatchNorm2d)):
            measure_site(routed, batch)  # part 2
        step(routed, batch, generator)
        predictions.append(predict(routed, batch))
    return torch.cat(predictions)


def check_images(images: Tensor) -> None:
    if not len(images) or not images.isfinite().all():
        raise ValueError("no images, or values that are not finite")


@torch.enable_grad()
def step(routed: RoutedNetwork, images: Tensor, generator: torch.Generator) -> None:
    """One step of Adam on the objective of a batch (N, C_in, H, W)."""
    for router in routed.eval().parts(Router):
        router.train().generator = generator  # dropout on; `predict` turns it off
    loss, probabilities = objective(routed, images, generator)
    routed.optimiser.zero_grad()
    loss.backward()
    routed.optimiser.step()
    if routed.settings.leash is not None:
        pull_back(routed.eval(), images, probabilities)  # part 2


@torch.no_grad()
def predict(routed: RoutedNetwork, images: Tensor) -> Tensor:
    """Probabilities (N, C, H, W) of images (N, C_in, H, W), dropout off, all finite."""
    batches = images.split(routed.settings.batch_size)
    probabilities = torch.cat([routed.eval().probabilities(batch) for batch in batches])
    if not probabilities.isfinite().all():
        raise ValueError("predict: not every probability is finite; training may have diverged")
    return probabilities


# ================================================================ part 2: ours
@torch.no_grad()
def fit_to_site(routed: RoutedNetwork, models: list[nn.Module], images: Tensor, *,
                start: str = "matched", global_prior: float | None = 0.5,
                share: float | None = None, online: bool = False) -> None:
    """Once, before the first step: where routing starts, and whose BatchNorm statistics it uses.
    For another hospital `reset` first. Every image and layer starts alike; steps change that.
    models: those that `routed` was built from. images: (N, C_in, H, W) of the site, for `online`
    the first batch, which `adapt` will count itself.
    start: "matched", every layer at weights ∝ prior · exp(-D / spread), D a model's divergence,
    spread its standard deviation; "uniform"; or "random", as built. global_prior: of the last one,
    None: that of all. share: of the site's statistics, by default `site_share`.
    Raises ValueError where a model, routed alone, does not give what it gives itself."""
    check_images(images)
    if start not in ("matched", "uniform", "random"):
        raise ValueError(f"fit_to_site: start '{start}' is not matched, uniform or random")
    probe = build_routed(models, generator=torch.Generator())
    for number, model in enumerate(models):
        route_alike(probe, torch.eye(len(models))[number])
        with torch.autocast(images.device.type, enabled=False):
            expected, found = plain_copy(model)(images[:2]), probe(images[:2])
        if not (found - expected).abs().max() <= 0.01 * expected.abs().max():
            raise ValueError(f"fit_to_site: model {number} is not itself when it is routed: parts "
                             f"are unregistered, unlike the others', or begin with a BatchNorm")
    D = torch.stack([divergence(model, images) for model in models])  # (M,)
    weights = torch.full_like(D, 1 / len(D))
    if start == "matched":
        if global_prior is not None and len(D) > 1:
            weights[:-1], weights[-1] = (1 - global_prior) / (len(D) - 1), global_prior
        # Below 0.05 differences of D are not worth telling apart: real sites lie 0.03 to 0.2 away.
        weights = weights * torch.exp((D.min() - D) / D.std(correction=0).clamp_min(0.05))
    if start != "random":
        route_alike(routed, (weights / weights.sum()).clamp(1e-6, 1 - 1e-6))
    share = site_share(models, D[-1]) if share is None else share
    for norm in routed.parts(RoutedBatchNorm2d):
        for value in (norm.site_mean, norm.site_variance, norm.site_images):
            value.zero_()
        norm.site_share.fill_(share)
    if not online:  # up to 64 in one pass: each layer needs the statistics before it; all patients
        chosen = torch.linspace(0, len(images) - 1, min(len(images), 64)).round().long()
        measure_site(routed, images[chosen])
    routed.keep_start()


@torch.no_grad()
def route_alike(routed: RoutedNetwork, weights: Tensor) -> None:
    """Let every layer give every image the routing weights (M,), which sum to one."""
    for router in routed.parts(Router):
        w = weights.to(router.fc2.weight)
        router.fc2.bias.copy_(w.log() if router.settings.softmax else w.logit())
        router.fc2.weight.zero_()


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, out of the wrapping of `torch.compile`."""
    return copy.deepcopy(getattr(model, "_orig_mod", model)).eval()


@torch.no_grad()
def divergence(model: nn.Module, images: Tensor) -> Tensor:
    """How far images (N, C_in, H, W) are from what a network was trained on: a scalar, 0 is near.
    `gaussian_divergence` of the inputs of BatchNorms with running statistics, mean over these."""
    model, sums = plain_copy(model), {}

    def count(norm: nn.Module, inputs: tuple) -> None:
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        variance, mean = (v.double() for v in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        part = len(x) * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
        sums[norm] = sums.get(norm, 0) + part  # (3, C)

    for norm in running_norms(model):
        norm.register_forward_pre_hook(count)
    for batch in images.split(32):
        model(batch)
    layers = [gaussian_divergence(mean / n, square / n - (mean / n).square(), norm)
              for norm, (n, mean, square) in sums.items()]
    return torch.stack(layers).mean().float() if layers else images.new_zeros(())


def gaussian_divergence(mean: Tensor, variance: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """KL(these ‖ running statistics of `norm`) of two Gaussians a channel, mean over channels."""
    own = norm.running_var + norm.eps
    ratio = (variance + norm.eps) / own
    return (((mean - norm.running_mean).square() / own + ratio - 1 - ratio.log()) / 2).mean()


def running_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules()
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None]


def site_share(models: list[nn.Module], D: Tensor) -> float:
    """The share of the site's statistics in BatchNorm's, 1 / (1 + (7 u / D)⁴), for every layer.
    D: the site's `divergence` from the last model, the global one; u: that of the other models'
    running statistics, in the mean: how far apart the known hospitals lie. A site no farther off
    keeps what was learnt from more images than it has. 0 where u does not exist: one model alone,
    no running statistics. The constant was set on six real sources and the simulation's seed 41."""
    *others, last = [running_norms(model) for model in models]
    layers = [gaussian_divergence(norm.running_mean, norm.running_var, own)
              for norms in others for norm, own in zip(norms, last)]
    u = torch.stack(layers).mean() if layers else torch.inf
    return float(1 / (1 + (7 * u / D.clamp_min(1e-12)) ** 4))


@torch.no_grad()
def measure_site(routed: RoutedNetwork, images: Tensor) -> None:
    """Count images (N, C_in, H, W) into the site's statistics."""
    for norm in routed.eval().parts(RoutedBatchNorm2d):
        norm.train()
    routed(images)
    routed.eval()


@torch.no_grad()
def pull_back(routed: RoutedNetwork, images: Tensor, probabilities: Tensor) -> None:
    """The leash. Every term of the objective is least for an empty mask, and no image says how
    generously its annotator draws: where the area of a class in these probabilities, those before
    the step, is more than `leash` off what the start gives, all that adapts goes half way back."""
    start = {n: routed.start[n].to(v) for n, v in routed.named_parameters() if v.requires_grad}
    logits = torch.func.functional_call(routed, start, (images,))
    at_start = logits.to(probabilities.dtype).softmax(dim=1)
    area, before = (p[:, 1:].mean(dim=(0, 2, 3)) for p in (probabilities, at_start))  # (C-1,)
    if ((area - before).abs() > routed.settings.leash * before).any():
        for name, value in start.items():
            routed.get_parameter(name).lerp_(value, 0.5)
