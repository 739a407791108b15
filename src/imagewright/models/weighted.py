"""Students that are told the strength of guidance: one call does what took their teachers two.

The strength is that of `guidance`: 1 is none, and papers whose w = 0 is none have ours less 1. Such a model says the
range in which it was trained (`weights`) and what it takes where a condition says nothing (`weight`); both stand in its
file. `at_weight` is the same model at another strength.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import EDMPrecond, NoiseLabel, student_network
from imagewright.types import Condition, UserError

T = TypeVar("T", bound=nn.Module)


@runtime_checkable
class WeightTeachable(Protocol):
    """A network that can be told the strength of guidance; see `networks.UNet.told_weight`."""

    def told_weight(self) -> nn.Module: ...


def told_weight(network: nn.Module) -> nn.Module:
    """A copy that is told the strength, and does not mind it yet. Raises UserError for a network that cannot be."""
    if not isinstance(network, WeightTeachable):
        raise UserError(
            f"the teacher's network is {an(type(network).__name__)}, which cannot be told the strength of guidance; "
            "it needs a method told_weight()"
        )
    return network.told_weight()


class Weighted:
    """What a preconditioned model that is told the strength of guidance has beside its answers; stands before its base.

    weights: (least, most) of training; None for a model that is told none. weight: its own; default the least.
    """

    weights: tuple[float, float] | None
    weight: float | None

    def set_weights(self, weights: Sequence[float] | None, weight: float | None) -> None:
        """Raises UserError for a range that is none, and for a strength outside of it."""
        self.weights, self.weight = None, None
        if weights is None:
            if weight is not None:
                raise UserError(f"weight is {weight}; the model is told no strength of guidance")
            return
        if len(weights) != 2 or not all(math.isfinite(w) for w in weights) or not weights[0] <= weights[1]:
            raise UserError(f"weights is {list(weights)}; it must be two finite numbers, the lower first")
        self.weights = (float(weights[0]), float(weights[1]))
        self.weight = self.checked_weight(self.weights[0] if weight is None else weight)

    def checked_weight(self, weight: float) -> float:
        """A strength of the trained range. Raises UserError for another, or for a model that is told none."""
        if self.weights is None:
            raise UserError("this model is told no strength of guidance; --weight has no effect on it alone")
        low, high = self.weights
        if not low <= weight <= high:
            raise UserError(f"weight is {weight:g}; this model was trained for {low:g} to {high:g}")
        return float(weight)

    def told(self, cond: Condition, like: Tensor) -> Condition:
        """The condition with the strength in it, [N] as the images `like`; as it is for a model that is told none."""
        if self.weights is None:
            return cond
        if cond.weight is None:
            own = torch.full_like(like[:, 0, 0, 0], cast(float, self.weight), dtype=torch.float32)
            return replace(cond, weight=own)
        given = cond.weight
        if given.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            low, high = self.weights
            outside = given[(given < low - 1e-6) | (given > high + 1e-6) | given.isnan()]
            if len(outside):
                self.checked_weight(float(outside[0]))
        return cond

    def through(
        self, network: Callable[[Tensor, Tensor, Condition], Tensor], x: Tensor, sigma: Tensor, cond: Condition
    ) -> Tensor:
        """As `Preconditioned.through`."""
        answer: Tensor = super().through(network, x, sigma, self.told(cond, x))  # type: ignore[misc]  # of the base
        return answer


class GuidedDenoiser(Weighted, EDMPrecond):
    """A denoiser of guided images in one call."""

    settings = (*EDMPrecond.settings, "weights", "weight")

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
        weights: Sequence[float] = (1.0, 5.0),
        weight: float | None = None,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, noise_label)
        self.set_weights(weights, weight)

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, weights: tuple[float, float]) -> Self:
        """A model that answers as the denoiser does, whatever the strength, until it is trained."""
        network, d = told_weight(student_network(denoiser)).requires_grad_(True), denoiser
        return cls(network, d.sigma_min, d.sigma_max, d.sigma_data, d.noise_label, weights).train()


def takes_weight(model: object) -> bool:
    """Whether a model is told the strength of guidance."""
    return getattr(model, "weights", None) is not None


def at_weight(model: T, weight: float) -> T:
    """The same model, on the same weights, that takes this strength where a condition says none.

    Raises UserError for a strength outside of its training, and for a model that is told none.
    """
    if not isinstance(model, Weighted):
        raise UserError(
            f"this model, {an(type(model).__name__)}, is told no strength of guidance; weight has no effect"
        )
    changed: Any = copy.copy(model)
    changed.weight = model.checked_weight(weight)
    return cast(T, changed)
