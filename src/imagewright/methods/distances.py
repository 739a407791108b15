"""Distances between two batches of images that consistency-like losses minimise; each returns one number per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.metrics.perceptual import normalised_distance
from imagewright.types import UserError

Kind = Literal["l1", "l2", "norm", "pseudo_huber", "pseudo_huber_each", "perceptual"]
Features = Callable[[Tensor], Sequence[Tensor]]
"""Images [N, C, H, W] in [-1, 1] to feature maps [N, C_i, H_i, W_i], differentiable: the slot for LPIPS."""


@runtime_checkable
class Compares(Protocol):
    """Features with a distance of their own."""

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: [N, C, H, W] in [-1, 1]. Returns [N], >= 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance d(a, b) >= 0, zero where a = b. Raises UserError for another kind, or huber_c <= 0.

    l1, l2:       mean absolute, mean squared difference.
    norm:         |a - b| over the whole image: the root of the summed squares (Geng et al. 2024, 2406.14548).
    pseudo_huber: sqrt(|a - b|^2 + c^2) - c over the whole image, c = huber_c * sqrt(C H W); huber_c = 0.00054 is that
                  of Song & Dhariwal 2023 (2310.14189), section 3.3.
    pseudo_huber_each: the same of every number by itself, with the same c, summed (the program of 2502.18197).
    perceptual:   squared difference of channel-normalised feature maps, as LPIPS without learned weights (Zhang et al.
                  2018, 1801.03924, eq. 1); needs `features`, which the trainer never updates. Features that know how
                  to compare (`compare(a, b) -> [N]`, as LPIPS itself) do so themselves.
    """

    kind: Kind = "l2"
    huber_c: float = 0.00054

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"distance.kind is {self.kind!r}; allowed: {', '.join(get_args(Kind))}")
        require_positive("distance.huber_c", self.huber_c)

    def __call__(self, a: Tensor, b: Tensor, features: Features | None = None) -> Tensor:
        """a, b: [N, C, H, W]. Returns [N], float32 or wider."""
        if self.kind == "perceptual":
            if features is None:
                raise ValueError("the perceptual distance needs feature maps to compare")
            if isinstance(features, Compares):
                return features.compare(a, b)
            return normalised_distance(features(a), features(b))
        difference = (a - b).flatten(1)
        if self.kind == "l1":
            return difference.abs().mean(1)
        if self.kind == "l2":
            return difference.square().mean(1)
        if self.kind == "norm":
            norm: Tensor = torch.linalg.vector_norm(difference, dim=1)
            return norm
        c = self.huber_c * difference.shape[1] ** 0.5
        if self.kind == "pseudo_huber_each":
            each: Tensor = ((difference.square() + c**2).sqrt() - c).sum(1)
            return each
        huber: Tensor = (difference.square().sum(1) + c**2).sqrt() - c
        return huber
