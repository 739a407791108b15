"""What the consistency methods share: parts, the loss of two neighbours on a trajectory, the teacher's step, checks.

Nothing here belongs to one paper; `methods.consistency` says where it comes from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.methods.distances import Distance, Features
from imagewright.models.consistency import ConsistencyModel
from imagewright.noise import StepNoise
from imagewright.types import Average, Condition, Denoiser, Event, Follow, Frozen, Parts, Trained, Update, UserError


def heun_step(denoiser: Denoiser, x: Tensor, t: Tensor, t_next: Tensor, cond: Condition) -> Tensor:
    """One second-order step of the probability-flow ODE dx/dt = (x - D(x; t)) / t; t, t_next: [N], > 0; two calls."""
    slope = (x - denoiser(x, t, cond)) / column(t)
    step = column(t_next - t)
    euler = x + step * slope
    return x + step * (slope + (euler - denoiser(euler, t_next, cond)) / column(t_next)) / 2


def finite_tangent(g: Tensor, sigma: Tensor) -> Tensor:
    """A tangent [N, C, H, W] as it is. Raises UserError, with the noise level [N], when it is not finite.

    On a GPU, whose host would have to wait, such an image's tangent becomes NaN instead, and the trainer stops the run.
    """
    fine = torch.isfinite(g.detach()).flatten(1).all(1)
    if g.device.type != "cpu":
        return torch.where(column(fine), g, math.nan)
    if not bool(fine.all()):
        bad = sigma[~fine].tolist()
        raise UserError(
            f"the tangent is not finite at {len(bad)} of {len(g)} images, the first at sigma {bad[0]:.3g}; "
            "lower the learning rate"
        )
    return g


def shortened(g: Tensor, c: float) -> Tensor:
    """A tangent [N, C, H, W] of about unit length: g / (|g| + c), the norm over the image."""
    return g / (column(g.flatten(1).norm(dim=1)) + c)


def consistency_parts(
    student: ConsistencyModel, features: Features | None, distance: Distance, **more: Frozen
) -> Parts:
    """Student, its target, and what else there is. Raises UserError for a perceptual distance without features."""
    if distance.kind == "perceptual":
        if not isinstance(features, nn.Module):
            raise UserError("method.distance.kind is 'perceptual'; it needs a feature network (give `features`)")
        more["features"] = Frozen(module=features)
    target = copy.deepcopy(student).requires_grad_(False)
    return Parts(student=Trained(module=student), target=Average(module=target, of="student"), **more)


class Neighbours(NamedTuple):
    """Noise levels [N] of the two ends of a pair, and the weight of its loss, [N] or None for 1; upper > lower >= 0."""

    upper: Tensor
    lower: Tensor
    weight: Tensor | None


def match(
    parts: Any,
    upper: tuple[Tensor, Tensor],
    lower: tuple[Tensor, Tensor],
    cond: Condition,
    noise: StepNoise,
    distance: Distance,
    target_decay: float,
    weight: Tensor | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Iterator[Event]:
    """weight * d(f(x_t, t), stopgrad f-(x_t', t')); then the target follows. upper, lower: (x, sigma); weight: [N].

    At a lower level of 0 the image itself is aimed at. beside: further terms of the loss by name, [N] each.
    """
    with noise.same_dropout(), torch.no_grad():
        x, sigma = lower
        # Networks are told a logarithm: they are asked a little above 0, and not heard there.
        answer = parts.target.start(x, sigma.clamp(min=torch.finfo(sigma.dtype).tiny), cond)
        aim = torch.where(column(sigma > 0), answer, x)
    loss = distance(parts.student.start(*upper, cond), aim, getattr(parts, "features", None))
    loss = loss if weight is None else weight * loss
    terms = dict(beside or {})
    told = {"consistency": loss, **terms} if terms else {}
    yield Update("student", sum(terms.values(), loss), parts=told, at=upper[1])
    yield Follow("target", "student", target_decay)


def check_grid(name: str, points: int, rho: float) -> None:
    """Raise UserError unless the grid has two points or more and rho is positive."""
    if points < 2:
        raise UserError(f"method.{name} is {points}; the noise grid needs at least 2 points")
    require_positive("method.rho", rho)


def check_range(sigma_min: float, sigma_max: float, whose: str) -> None:
    """Raise UserError unless 0 < sigma_min < sigma_max; whose: what to put before the names."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"{whose}sigma_min is {sigma_min} and sigma_max is {sigma_max}; "
            "they must satisfy 0 < sigma_min < sigma_max, both finite"
        )


def column(per_image: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1]."""
    return per_image[:, None, None, None]
