"""Averages of weights over training: exponential with a half-life in images, and EDM2's power-function profile.

Sources   half-life and ramp-up: Karras et al. 2022 (2206.00364), appendix F; power function: Karras et al. 2024
          (2312.02696), section 3.1, eqs. 120-127.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.training.config import EmaConfig


class Profile(Protocol):
    """How much of the old average survives a step."""

    name: str

    def decay(self, images: int, batch: int) -> float:
        """Weight of the old average in the update made at `images` images (after a step of `batch` images)."""
        ...


class HalfLife:
    """Exponential average whose memory halves every `images` images, or every `rampup_ratio` of those seen so far."""

    def __init__(self, halflife_images: float, rampup_ratio: float | None) -> None:
        self.name = "halflife"
        self.halflife_images = halflife_images
        self.rampup_ratio = rampup_ratio

    def decay(self, images: int, batch: int) -> float:
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, images * self.rampup_ratio)
        return float(0.5 ** (batch / halflife)) if halflife > 0 else 0.0


class Power:
    """Average with profile t^gamma over training time; `std` is the profile's width relative to that time."""

    def __init__(self, std: float) -> None:
        self.name = f"power{std:g}"
        self.gamma = gamma_of_std(std)

    def decay(self, images: int, batch: int) -> float:
        return float((1 - batch / images) ** (self.gamma + 1))


@lru_cache
def gamma_of_std(std: float) -> float:
    """Exponent of the power-function profile of relative width `std` in (0, 0.29): EDM2's eq. 126.

    The width is sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))); gamma is the real root of that cubic.
    """
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(roots.real.max())


class Ema:
    """One average of one network: float32 copies of its parameters and persistent buffers, by state-dict name.

    source: the network, or tensors by such names in whose memory its values are found, as of one that is sharded.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], profile: Profile) -> None:
        self.profile = profile
        tensors = source.state_dict() if isinstance(source, nn.Module) else source
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in tensors.items()}
        self._source, self._following = source, Following(self.state, tensors)

    def update(self, source: nn.Module | Mapping[str, Tensor], images: int, batch: int) -> None:
        """Move towards the network's present weights; buffers that are not floating point are copied."""
        if source is not self._source:
            tensors = source.state_dict() if isinstance(source, nn.Module) else source
            self._source, self._following = source, Following(self.state, tensors)
        self._following.move(1 - self.profile.decay(images, batch))


class Following:
    """Tensors that follow others of the same name, in whose memory the present values are found at every move."""

    def __init__(self, state: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
        floats = [name for name, value in state.items() if value.is_floating_point()]
        self._floats = [state[name] for name in floats], [source[name] for name in floats]
        self._others = [(state[name], source[name]) for name in state if name not in set(floats)]

    @torch.no_grad()
    def move(self, share: float) -> None:
        """By a share of the way; what is no float is copied."""
        torch._foreach_lerp_(*self._floats, share)
        for mine, theirs in self._others:
            mine.copy_(theirs)


def averages(source: nn.Module | Mapping[str, Tensor], config: EmaConfig) -> list[Ema]:
    """The averages that a configuration asks for; the first is the one that samples and is exported."""
    profiles: list[Profile] = [HalfLife(config.halflife_images, config.rampup_ratio)]
    profiles += [Power(std) for std in config.power_std]
    return [Ema(source, p) for p in profiles]
