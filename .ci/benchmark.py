"""Times our versions beside obvious ones: medians in milliseconds, measured in turn."""

import argparse
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import iopfl  # noqa: E402
import router  # noqa: E402
from models import UNet  # noqa: E402
from train import keep_memory  # noqa: E402


def line(name: str, *cells) -> None:
    texts = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
    print(f"{name:30}" + "".join(f"{text:>14}" for text in texts), flush=True)


def looped(layer: router.RoutedConv2d, networks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """A routed convolution by torch's own layers, sample by sample."""
    convs, outputs = [network.get_submodule(layer.name) for network in networks], []
    layer.routing.append((layer.name, layer.router(x)))  # (N, M)
    for sample, weights in zip(x, layer.routing[-1][1]):
        mixed = {}
        for name, _ in convs[0].named_parameters():
            mixed[name] = sum(w * getattr(conv, name).detach() for w, conv in zip(weights, convs))
        outputs.append(torch.func.functional_call(convs[0], mixed, (sample[None],)))
    return torch.cat(outputs)


def obvious_step(routed: router.RoutedNetwork, images: torch.Tensor, generator) -> torch.Tensor:
    """As `router.step`, a pass each for entropy, view and shape, and one to predict; the loss."""
    settings, clean = routed.settings, routed(images).softmax(dim=1)
    views = router.draw_views(images, generator)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    of_view = routed(router.view(images + settings.noise * noise, views)).softmax(dim=1)
    of_view = router.view(of_view, views, inverse=True)
    again = routed(images).softmax(dim=1)
    radius = max(1, round(settings.radius * min(images.shape[-2:])))
    loss = (settings.entropy * router.entropy_loss(clean)
            + settings.consistency * router.consistency_loss(again, of_view)
            + settings.shape * router.shape_constraint(again, radius))
    routed.optimiser.zero_grad()
    loss.backward()
    routed.optimiser.step()
    router.predict(routed, images)
    return loss.detach()


class Benchmark:
    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick
        self.width, self.depth, self.size, self.batch = (16, 3, 64, 5) if quick else (32, 4, 192, 8)

    def milliseconds(self, *functions) -> np.ndarray:  # medians; one round warms up
        times = np.zeros((4 if self.quick else 8, len(functions)))
        for number, column in np.ndindex(times.shape):
            begin = time.perf_counter()
            functions[column]()
            getattr(torch, self.device).synchronize()
            times[number, column] = 1000 * (time.perf_counter() - begin)
        return np.median(times[1:], axis=0)

    def alone(self, function, *positional):  # in a process whose peak of memory is its own
        with get_context("spawn").Pool(1, keep_memory) as pool:
            return pool.apply(function, positional)

    def peak_mib(self) -> float:  # nan where the system does not say
        status = Path("/proc/self/status")
        if self.device == "cuda" or not status.exists():
            return torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else np.nan
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024

    def network(self, layout=torch.channels_last) -> nn.Module:
        return UNet(1, 2, self.width, self.depth).eval().to(self.device, memory_format=layout)

    def images(self, count: int) -> torch.Tensor:
        return torch.randn(count, 1, self.size, self.size, device=self.device)

    def routed(self, experts: int, leash: float | None = None) -> router.RoutedNetwork:
        models = [self.network(), self.network()] * (experts // 2)
        return router.build_routed(models, router.RoutingSettings(entropy=0.1, leash=leash))

    def step(self, routed: router.RoutedNetwork, bf16: bool = False, take=router.step) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16, cache_enabled=False):
            take(routed, self.images(self.batch), torch.Generator(self.device))

    def train(self, network: nn.Module, x: torch.Tensor, bf16: bool = False) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16, cache_enabled=False):
            iopfl.train_local(network, x, (x[:, 0] > 0.5).byte(), generator=torch.Generator())

    def layers(self) -> None:
        line("routed layers", "loop", "ours", "plain", "c.l.", "loop/ours", "ours/plain", "/ c.l.")
        last, plain, routed = self.network(), self.network(torch.contiguous_format), self.routed(6)
        inputs, rows = {}, {}
        for layer in routed.parts(router.RoutedConv2d):
            layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0].detach()}))
        routed(self.images(self.batch))
        for layer, x in inputs.items():
            rows[f"{layer.name}, {x.shape[1]}×{x.shape[2]}²"] = self.layer(layer, plain, last, x)
        rows["sum"] = sum(rows.values())
        for name, took in rows.items():
            line(name, *took, *took[[0, 1, 1]] / took[[1, 2, 3]])

    def layer(self, ours, plain: nn.Module, last: nn.Module, x: torch.Tensor) -> np.ndarray:
        flat = x.clone(memory_format=torch.contiguous_format).requires_grad_()
        ends = x.clone(memory_format=torch.channels_last).requires_grad_()
        return self.milliseconds(
            lambda: looped(ours, [last] * 6, flat).sum().backward(),
            lambda: ours.forward(ends if ours.one_by_one else flat).sum().backward(),
            lambda: plain.get_submodule(ours.name)(flat).sum().backward(),
            lambda: last.get_submodule(ours.name)(ends).sum().backward())

    def adaptation(self) -> None:
        line("a step of adaptation", "ms", "obvious / it", "it / plain")
        obvious, models = self.routed(6), [self.network(), self.network()] * 3
        for layer in obvious.parts(router.RoutedConv2d):
            layer.forward = partial(looped, layer, models)
        plain = router.RoutedNetwork(self.network(), [], obvious.settings)  # all its weights move
        rows = {"obvious": partial(self.step, obvious, take=obvious_step),
                "ours": partial(self.step, self.routed(6)),
                "with the leash": partial(self.step, self.routed(6, leash=0.01)),
                "plain": partial(self.step, plain),
                "ours, bf16": partial(self.step, self.routed(6), True),
                "plain, bf16": partial(self.step, plain, True)}
        took = dict(zip(rows, self.milliseconds(*rows.values())))
        for name, ms in took.items():
            line(name, ms, took["obvious"] / ms, ms / took["plain" + ", bf16" * ("bf16" in name)])

    def growth(self, picture: bool, counts=(2, 4, 8, 16, 32)) -> None:
        line("experts, without the leash", "ms", "/ 2 experts", "experts, MiB", "peak, MiB")
        took = self.milliseconds(*[partial(self.step, self.routed(count)) for count in counts])
        for count, ms in zip(counts, took):
            line(str(count), ms, ms / took[0], *self.alone(self.memory_of_a_step, count))
        if picture:
            sheet, font = Image.new("RGB", (600, 330), "white"), ImageFont.load_default(13)
            draw = ImageDraw.Draw(sheet)
            draw.text((20, 6), "time of a step: routing (blue), an ensemble (red)", "black", font)
            for curve, colour, down in (took, "blue", 4), (counts, "red", -20):
                points = [(40 + 120 * n, 290 - 16 * y / curve[0]) for n, y in enumerate(curve)]
                draw.line(points, colour, 3)
                for (x, y), count, value in zip(points, counts, curve):
                    draw.text((x - 20, y + down), f"{value / curve[0]:.3g}", colour, font)
                    draw.text((x - 20, 308), f"{count} experts", "black", font)
            sheet.save(Path(__file__).resolve().parents[1] / "docs" / "growth.png")

    def memory_of_a_step(self, experts: int) -> tuple[float, float]:
        routed = self.routed(experts)
        self.step(routed)
        return sum(buffer.nbytes for buffer in routed.buffers()) / 2**20, self.peak_mib()

    def rounds(self) -> None:
        network, x = self.network(), self.images(40 if self.quick else 10)
        clients = dict.fromkeys("abcdef", argparse.Namespace(images=x, masks=x[:, 0] > 0.5))
        bare, whole = self.milliseconds(lambda: [self.train(network, x) for _ in clients],
                                        lambda: [*iopfl.federate(network, clients, 1)])
        print(f"6 clients: training {bare:.0f} ms, round {whole:.0f} ms, {whole / bare:.3f} times")

    def mean(self) -> None:
        models = [self.network() for _ in range(4)]  # kept, so that no freed memory is used again
        states, before = [iopfl.snapshot(model) for model in models] * 25, self.peak_mib()
        total = iopfl.aggregate(states, [1] * 100)
        size, peak = sum(v.nbytes for v in total.values()) / 2**20, self.peak_mib() - before
        ours, sums = self.milliseconds(
            lambda: iopfl.aggregate(states, [1] * 100),
            lambda: [total[name].add_(value) for state in states for name, value in state.items()])
        line("mean of 100: MiB, ms, / sums, + peak", size, ours, ours / sums, peak / size)

    def training(self) -> None:  # last, since it changes the sizes
        line("training step, 5 images", "fp32, ms", "bf16, ms", "ratio")
        for size in [(16, 3, 64), (16, 3, 96), (32, 4, 192)][:2 if self.quick else 3]:
            self.width, self.depth, self.size = size
            step = partial(self.train, self.network(), self.images(5))
            full, half = self.milliseconds(step, partial(step, bf16=True))
            line("width {}, depth {}, size {}".format(*size), full, half, full / half)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--picture", action="store_true", help="draw docs/growth.png")
    args = parser.parse_args()
    keep_memory()
    for device in ["cpu", "cuda"][:1 + torch.cuda.is_available()]:
        bench = Benchmark(device, args.quick)
        print(device, torch.__version__, torch.get_num_threads(), "threads;", vars(bench))
        bench.layers()
        bench.adaptation()
        bench.growth(args.picture)
        bench.rounds()
        bench.alone(bench.mean)
        bench.training()
