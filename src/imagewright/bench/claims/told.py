"""A small network of points that is told where to go and how strongly to guide, beside noise level and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.plane import PointNetwork
from imagewright.models.preconditioning import EDMPrecond, NoiseLabel
from imagewright.types import UNCONDITIONAL, Condition


class ToldPoint(PointNetwork):
    """`PointNetwork` with inputs that a student adds; what they say counts for nothing until it is trained."""

    def __init__(
        self, width: int, depth: int, classes: int = 0, frequencies: int = 8, *, told: tuple[str, ...] = ()
    ) -> None:
        super().__init__(width, depth, classes, frequencies)
        self.told = nn.ModuleDict({name: nn.Linear(2 * frequencies, width, bias=False) for name in told})
        for layer in self.told.values():
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]  # of a linear layer

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `PointNetwork.bottleneck`."""
        rows = x.new_zeros(len(x), self.classes)
        if self.classes and cond.label is not None:
            known = cond.label >= 0
            rows[known, cond.label[known]] = 1.0
        hidden = self.layers[0](torch.cat([x.flatten(1), self._waves(noise_label), rows], 1))
        for name, layer in self.told.items():
            hidden = hidden + layer(self._waves(getattr(cond, name).to(x.dtype)))
        features: Tensor = self.layers[1:-1](hidden)
        return features[:, :, None, None]

    def _also(self, name: str) -> ToldPoint:
        changed = ToldPoint(*self.settings, told=(*self.told, name))
        changed.load_state_dict(self.state_dict(), strict=False)
        return changed.to(next(self.parameters()))

    def told_destination(self) -> Any:
        """As `networks.UNet.told_destination`."""
        return self._also("destination")

    def told_weight(self) -> Any:
        """As `networks.UNet.told_weight`."""
        return self._also("weight")


def told_denoiser(
    width: int, depth: int, seed: int, sigma_data: float, noise_label: NoiseLabel = "log", classes: int = 0
) -> EDMPrecond:
    """An untrained denoiser; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EDMPrecond(ToldPoint(width, depth, classes), sigma_data=sigma_data, noise_label=noise_label)
