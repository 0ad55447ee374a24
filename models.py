"""A small U-Net for 2-D segmentation. Imports torch only; can be copied on its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Twice 3×3 convolution, BatchNorm, ReLU; the convolutions need no bias, BatchNorm has one."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with BatchNorm: `depth` times halved, width · 2^level channels at each level.

    in_channels: channels of an image (1 for MRI, 3 for RGB); num_classes: with the background.
    width: channels of the top level; depth: number of 2×2 max-pools, at least 1.
    generator: draws the initial weights; None takes torch's global one.
    Raises ValueError for sizes below one. Source: ours; the published code has a U-Net alike.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 32, depth: int = 4,
                 generator: torch.Generator | None = None):
        super().__init__()
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "width": width,
                 "depth": depth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"UNet: {name} must be at least 1, not {value}")
        self.in_channels, self.depth = in_channels, depth
        channels = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            conv_block(i, o) for i, o in zip([in_channels, *channels], channels))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in channels[:-1])
        self.decoder = nn.ModuleList(conv_block(2 * c, c) for c in channels[:-1])
        self.head = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, H, W) of images (N, in_channels, H, W); any H and W.

        Raises ValueError for another rank or number of channels.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"UNet: expected images (N, {self.in_channels}, H, W), "
                             f"got {tuple(x.shape)}")
        height, width = x.shape[2:]
        step = 2**self.depth
        # Edge pixels repeated, not zeros: a black frame would enter BatchNorm's batch statistics.
        x = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
        skips = []
        for block in self.encoder[:-1]:
            skips.append(block(x))  # (N, width·2^l, H/2^l, W/2^l)
            x = F.max_pool2d(skips[-1], 2)
        x = self.encoder[-1](x)
        for skip, upsample, block in reversed(list(zip(skips, self.upsample, self.decoder))):
            x = block(torch.cat([skip, upsample(x)], dim=1))
        return self.head(x)[..., :height, :width]
