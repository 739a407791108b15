"""A small discriminator on what a denoiser's encoder makes, in its middle or at every resolution: logits per image.

Source   Yin et al. 2024 (DMD2, arXiv 2405.14867), section 4.3, as published for ImageNet-64, where the middle is
         768 x 8 x 8: conv 4x4 of stride 2, then one over the 4 x 4 places that are left, each with group norm and SiLU,
         then a linear layer. Several such heads: Xu et al. 2025 (f-distill, 2502.15681), as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from imagewright.networks.layers import group_norm
from imagewright.types import UNCONDITIONAL, Condition

LAST_SIDE = 4
"""Side to which maps are brought before the convolution over all of them."""


@runtime_checkable
class HasBottleneck(Protocol):
    """A network that can be asked for its middle alone; `networks.UNet` is one."""

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, C, H, W]; noise_label: [N]. Returns [N, C', H', W']."""
        ...


class BottleneckHead(nn.Module):
    """Maps [N, channels, side, side] -> logits [N]: positive where an image looks real.

    Convolutions that halve, at least one and down to 4 x 4, and one over all places that are left: maps of 8 x 8 get
    the published head, 4 x 4 and 2 x 2 a smaller one, and those of a single place two linear layers.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        halvings = 0
        while side > LAST_SIDE or (side > 1 and not halvings):
            layers += _stage(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            side, halvings = side // 2, halvings + 1
        if not halvings:
            layers += _stage(nn.Conv2d(channels, channels, 1))
        layers += _stage(nn.Conv2d(channels, channels, side))
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """maps: [N, channels, side, side]. Returns [N], float32 or wider."""
        logits: Tensor = self.layers(maps).flatten()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class BottleneckHeads(nn.Module):
    """A head of its own for each of some maps. shapes: (channels, side) of each."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(BottleneckHead(channels, side) for channels, side in shapes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: [N, channels, side, side] each. Returns [N, heads]."""
        return torch.stack([head(each) for head, each in zip(self.heads, maps, strict=True)], 1)


def _stage(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, group_norm(convolution.out_channels, eps=1e-5), nn.SiLU()]
