"""A small classifier of pictures, whose features ours are compared in (`metrics/train_features.py` trains it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.types import Encoding


@dataclass(frozen=True, kw_only=True)
class ConvClassifierConfig(NetworkConfig):
    """A stack of stages: each halves the resolution (but the first) and applies two 3x3 convolutions."""

    img_resolution: int
    in_channels: int
    widths: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        for name in ("img_resolution", "in_channels", "num_classes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(len(self.widths) >= 1 and min(self.widths) >= 1, "widths", self.widths, "positive integers")


class ConvClassifier(Network):
    """Convolutions (the last map's cells are the tokens), their mean (the features), a linear layer (the logits)."""

    config_class: ClassVar[type[NetworkConfig]] = ConvClassifierConfig

    def __init__(self, config: ConvClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.in_channels
        for stage, width in enumerate(config.widths):
            if stage:
                layers.append(nn.AvgPool2d(2))
            for inner in (before, width):
                layers += [
                    nn.Conv2d(inner, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.SiLU(),
                ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(config.widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> Encoding:
        """x: [N, C, R, R] in [-1, 1]."""
        last = self.body(x)
        pooled = last.mean(dim=(2, 3))
        return Encoding(pooled, last.flatten(2).mT, (last.shape[2], last.shape[3]), self.head(pooled))
