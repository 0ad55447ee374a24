"""Times our versions beside obvious ones: medians in milliseconds, measured in turn."""

import argparse
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import iopfl  # noqa: E402
import router  # noqa: E402
from models import UNet  # noqa: E402
from train import keep_memory  # noqa: E402


def line(name: str, *cells) -> None:
    texts = []
    for cell in cells:
        text = cell if isinstance(cell, str) else f"{cell:.2f}"
        texts.append(f"{text:>14}")
    print(f"{name:30}" + "".join(texts), flush=True)


# ---------------------------------------------------------------- obvious versions
def looped(layer: router.Routed, networks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """A layer with a router by torch's own layers, image by image."""
    experts = [network.get_submodule(layer.name) for network in networks]
    outputs = []
    for image, weights in zip(x, layer.routing_weights(x)):
        mixed = {}
        for name, _ in experts[0].named_parameters():
            values = [getattr(expert, name).detach() for expert in experts]
            mixed[name] = sum(w * value for w, value in zip(weights, values))
        output = torch.func.functional_call(experts[0], mixed, (image.unsqueeze(0),))
        outputs.append(output)
    return torch.cat(outputs)


def with_router(routed: router.RoutedNetwork) -> list[router.Routed]:
    return [layer for layer in routed.parts(router.Routed) if layer.router is not None]


def loop_over_images(routed: router.RoutedNetwork, networks: list[nn.Module]) -> None:
    """From now on the layers with a router are computed by `looped`."""
    for layer in with_router(routed):
        layer.forward = partial(looped, layer, networks)


def obvious_step(routed: router.RoutedNetwork, images: torch.Tensor, optimiser, generator,
                 start: dict) -> None:
    """As `router.step` without dropout; a pass each for entropy, view and shape, and one to
    predict."""
    settings = routed.settings
    clean = routed(images).softmax(dim=1)
    views = router.draw_views(images, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    noisy = images + settings.noise * noise
    of_view = routed(router.view(noisy, views)).softmax(dim=1)
    of_view = router.view(of_view, views, inverse=True)
    again = routed(images).softmax(dim=1)
    radius = max(1, round(settings.radius * min(images.shape[-2:])))
    entropy = router.entropy_loss(clean)
    consistency = router.consistency_loss(again, of_view)
    shape = router.shape_constraint(again, radius)
    loss = settings.entropy * entropy
    loss = loss + settings.consistency * consistency + settings.shape * shape
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    router.predict(routed, images)


# ---------------------------------------------------------------- what is measured
class Benchmark:
    """Sizes, and a method for each table that is printed."""

    def __init__(self, device: str, quick: bool):
        self.device = device
        self.rounds = 3 if quick else 8
        # Other CPUs emulate bf16, which takes more than ten times as long.
        self.bf16 = device == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
        self.quick = quick
        self.width = 16 if quick else 32
        self.depth = 3 if quick else 4
        self.size = 64 if quick else 192
        self.batch = 5 if quick else 8

    def milliseconds(self, *functions) -> np.ndarray:
        """Median times of these, called in turn; the first round warms up."""
        times = np.zeros((self.rounds, len(functions)))
        for row in times:
            for number, function in enumerate(functions):
                begin = time.perf_counter()
                function()
                getattr(torch, self.device).synchronize()
                row[number] = 1000 * (time.perf_counter() - begin)
        return np.median(times[1:], axis=0)

    def alone(self, function, *arguments):
        """In a process whose peak of memory is its own."""
        with get_context("spawn").Pool(1, keep_memory) as pool:
            return pool.apply(function, arguments)

    def peak_mib(self) -> float:
        """NaN where the system does not say."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        if not status.exists():
            return np.nan
        kibibytes = status.read_text().split("VmHWM:")[1].split()[0]
        return int(kibibytes) / 1024

    def network(self, layout=torch.channels_last) -> nn.Module:
        network = UNet(1, 2, self.width, self.depth).eval()
        return network.to(self.device, memory_format=layout)

    def images(self, count: int) -> torch.Tensor:
        return torch.randn(count, 1, self.size, self.size, device=self.device)

    def networks(self, count: int) -> list[nn.Module]:
        return [self.network(), self.network()] * (count // 2)

    def routed(self, experts: int, leash: float | None = None) -> router.RoutedNetwork:
        settings = router.RoutingSettings(entropy=0.1, leash=leash)
        return router.build_routed(self.networks(experts), settings)

    def autocast(self, bf16: bool):
        return torch.autocast(self.device, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def steps(self, routed: router.RoutedNetwork, bf16: bool = False, take=router.step):
        """A function that takes one more step of an adaptation."""
        optimiser = torch.optim.Adam(routed.parameters(), lr=routed.settings.lr)
        start = routed.snapshot()

        def step() -> None:
            with self.autocast(bf16):
                images, generator = self.images(self.batch), torch.Generator(self.device)
                take(routed, images, optimiser, generator, start)

        return step

    def train(self, network: nn.Module, x: torch.Tensor, bf16: bool = False) -> None:
        masks = (x[:, 0] > 0.5).byte()
        with self.autocast(bf16):
            iopfl.train_local(network, x, masks, generator=torch.Generator())

    def layers(self) -> None:
        """Each layer with a router: a loop over images, ours, and one plain convolution."""
        line("routed layers", "loop", "ours", "plain", "c.l.", "loop/ours", "ours/plain", "/ c.l.")
        last = self.network()
        plain = self.network(torch.contiguous_format)
        routed = self.routed(6)
        inputs = {}
        passes = {}

        def remember(layer: router.Routed, arguments: tuple) -> None:
            inputs[layer] = arguments[0].detach()
            passes[layer] = layer.current

        for layer in with_router(routed):
            layer.register_forward_pre_hook(remember)
        routed(self.images(self.batch))
        rows = {}
        for layer, x in inputs.items():
            layer.current = passes[layer]
            rows[f"{layer.name}, {x.shape[1]}×{x.shape[2]}²"] = self.layer(layer, plain, last, x)
        rows["sum"] = sum(rows.values())
        for name, took in rows.items():
            loop, ours, flat, ends = took
            line(name, *took, loop / ours, ours / flat, ours / ends)

    def layer(self, layer: router.Routed, plain: nn.Module, last: nn.Module,
              x: torch.Tensor) -> np.ndarray:
        """Forward and backward: looped, ours, plain, plain with channels last."""
        flat = x.clone(memory_format=torch.contiguous_format).requires_grad_()
        ends = x.clone(memory_format=torch.channels_last).requires_grad_()

        def loop():
            looped(layer, [last] * 6, flat).sum().backward()

        def ours():
            layer.forward(flat).sum().backward()

        def in_order():
            plain.get_submodule(layer.name)(flat).sum().backward()

        def channels_last():
            last.get_submodule(layer.name)(ends).sum().backward()

        return self.milliseconds(loop, ours, in_order, channels_last)

    def adaptation(self) -> None:
        line("a step of adaptation", "ms", "obvious / it", "it / plain")
        models = self.networks(6)
        obvious = self.routed(6)
        loop_over_images(obvious, models)
        # A network without routed layers, all the weights of which move.
        plain = router.RoutedNetwork(self.network(), 6, obvious.settings)
        rows = {
            "obvious": self.steps(obvious, take=obvious_step),
            "ours": self.steps(self.routed(6)),
            "with the leash": self.steps(self.routed(6, leash=0.01)),
            "plain": self.steps(plain),
        }
        if self.bf16:
            rows["ours, bf16"] = self.steps(self.routed(6), bf16=True)
            rows["plain, bf16"] = self.steps(plain, bf16=True)
        took = dict(zip(rows, self.milliseconds(*rows.values())))
        for name, ms in took.items():
            reference = "plain, bf16" if "bf16" in name else "plain"
            line(name, ms, took["obvious"] / ms, ms / took[reference])

    def growth(self) -> None:
        counts = (2, 4, 8, 16, 32)
        line("experts, without the leash", "ms", "/ 2 experts", "experts, MiB", "peak, MiB")
        steps = [self.steps(self.routed(count)) for count in counts]
        took = self.milliseconds(*steps)
        for count, ms in zip(counts, took):
            line(str(count), ms, ms / took[0], *self.alone(self.memory_of_a_step, count))

    def memory_of_a_step(self, experts: int) -> tuple[float, float]:
        """Of the experts' values, and at the peak, in MiB."""
        routed = self.routed(experts)
        self.steps(routed)()
        values = sum(buffer.nbytes for buffer in routed.buffers())
        return values / 2**20, self.peak_mib()

    def rounds_of_federation(self) -> None:
        network = self.network()
        x = self.images(40 if self.quick else 10)
        site = argparse.Namespace(images=x, masks=x[:, 0] > 0.5)
        clients = dict.fromkeys("abcdef", site)

        def training():
            for _ in clients:
                self.train(network, x)

        def one_round():
            list(iopfl.federate(network, clients, 1))

        bare, whole = self.milliseconds(training, one_round)
        print(f"6 clients: training {bare:.0f} ms, round {whole:.0f} ms, {whole / bare:.3f} times")

    def mean(self) -> None:
        """Aggregation of 100 states. For the CPU, where its memory can be told."""
        models = [self.network() for _ in range(4)]  # kept, so that no freed memory is used again
        states = [iopfl.snapshot(model) for model in models] * 25
        before = self.peak_mib()
        total = iopfl.aggregate(states, [1] * 100)
        peak = self.peak_mib() - before
        size = sum(value.nbytes for value in total.values()) / 2**20

        def aggregate():
            iopfl.aggregate(states, [1] * 100)

        def sums():
            for state in states:
                for name, value in state.items():
                    total[name].add_(value)

        ours, bare = self.milliseconds(aggregate, sums)
        line("mean of 100: MiB, ms, / sums, + peak", size, ours, ours / bare, peak / size)

    def training(self) -> None:
        """Last, since it changes the sizes."""
        line("training step, 5 images", "fp32, ms", "bf16, ms", "ratio")
        sizes = [(16, 3, 64), (16, 3, 96), (32, 4, 192)]
        if self.quick:
            sizes.pop()
        for self.width, self.depth, self.size in sizes:
            step = partial(self.train, self.network(), self.images(5))
            name = f"width {self.width}, depth {self.depth}, size {self.size}"
            if self.bf16:
                full, half = self.milliseconds(step, partial(step, bf16=True))
                line(name, full, half, full / half)
            else:
                line(name, *self.milliseconds(step), "emulated", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    args = parser.parse_args()
    keep_memory()
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    for device in devices:
        bench = Benchmark(device, args.quick)
        print(device, torch.__version__, torch.get_num_threads(), "threads;", vars(bench))
        bench.layers()
        bench.adaptation()
        bench.growth()
        bench.rounds_of_federation()
        if device == "cpu":
            bench.alone(bench.mean)
        bench.training()


if __name__ == "__main__":
    main()
