"""Wide residual network, a classifier: Zagoruyko & Komodakis 2016 (1605.07146), as Chrabaszcz et al. 2017 (1707.08819).

Source   `WRNs_imagenet.py` of PatrykChrabaszcz/Imagenet32_Scripts: pre-activation blocks of two 3x3 convolutions; two
         stacks at 16x16, three at 32x32 and four at 64x64, of widths 16 k, 32 k, 64 k and 128 k; a projection of the
         stack's raw input where the width or size changes; only convolutions without a norm behind them, and no
         projection, have a bias; normal weights of variance 2 / fan-in.
Departs  running statistics are torch's (momentum 0.1, unbiased variance), those of the program Lasagne's (0.1, biased).
Use      `methods/classification.py`, the paper's training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.noise import dropout
from imagewright.types import Encoding


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig(NetworkConfig):
    """WRN-(2 blocks stacks + 4)-widen: blocks = 4 makes WRN-28 at 32x32 and WRN-36 at 64x64."""

    img_resolution: int
    in_channels: int = 3
    num_classes: int = 1000
    blocks: int = 4
    """Residual blocks in each stack."""
    widen: int = 2
    """k, the factor of all widths but the first layer's."""
    dropout: float = 0.0
    """Between the convolutions of a block."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "num_classes", "blocks", "widen"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(self.img_resolution >= 8, "img_resolution", self.img_resolution, "at least 8")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")

    @property
    def stacks(self) -> int:
        """Two, one more from 32x32 on and one more from 64x64 on."""
        return 2 + (self.img_resolution >= 32) + (self.img_resolution >= 64)


class WideResNet(Network):
    """[N, C, H, H] -> a token for each cell of the last map, their mean [N, 16 k 2^(stacks - 1)], logits."""

    config_class: ClassVar[type[NetworkConfig]] = WideResNetConfig

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.first = _conv(config.in_channels, 16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        width = 16
        for stack in range(config.stacks):
            for block in range(config.blocks):
                outer = 16 * config.widen * 2**stack
                stride = 2 if stack > 0 and block == 0 else 1
                blocks.append(_Block(width, outer, stride, first=not blocks, project=block == 0, drop=config.dropout))
                width = outer
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, config.num_classes)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Encoding:
        x = torch.relu(self.norm(self.first(images)))
        x = torch.relu(self.last(self.blocks(x)))
        pooled = x.mean((2, 3))
        return Encoding(pooled, x.flatten(2).mT, (x.shape[2], x.shape[3]), self.head(pooled))


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, *, first: bool, project: bool, drop: float) -> None:
        super().__init__()
        self.before = nn.Identity() if first else nn.Sequential(nn.BatchNorm2d(inner), nn.ReLU())
        self.one = _conv(inner, outer, stride, bias=False)
        self.norm = nn.BatchNorm2d(outer)
        self.drop = drop
        self.two = _conv(outer, outer, bias=True)
        self.skip = _conv(inner, outer, stride, kernel=1, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm(self.one(self.before(x))))
        out: Tensor = self.two(dropout(inner, self.drop, self.training)) + self.skip(x)
        return out


def _conv(inner: int, outer: int, stride: int = 1, *, kernel: int = 3, bias: bool) -> nn.Conv2d:
    layer = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=bias)
    nn.init.normal_(layer.weight, std=(2 / (inner * kernel**2)) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
