"""Exact conversions between a path's own (x_t, t) and (x, sigma), and between what networks predict.

Times, paths and the two meanings of sigma are declared in `gaussian`. Predictions are expectations given x_t:

    x0        the image
    eps       the standard normal noise in x_t = alpha x0 + sigma eps
    v         alpha eps - sigma x0: a rotation of (x0, eps), no derivative. Salimans and Ho 2022, appendix D
    velocity  dx_t/dt = alpha' x0 + sigma' eps, t growing towards noise: what flow matching learns
    score     grad_x log p_t(x_t) = -eps / sigma, in the path's own scale

On Linear velocity is eps - x0. On TrigFlow velocity is sigma_data cos(t) eps - sin(t) x0, which is v only for
sigma_data = 1. Any conversion is linear in the prediction and differentiable in everything.

End points. At pure noise (alpha = 0) x0, v and velocity convert to one another and to the rest, while eps
says nothing about x0. At t = 0 eps, v and velocity (where sigma' is finite) do, while x0 says nothing about
eps. What cannot be known there comes out as inf or nan, never as a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from imagewright.paths.gaussian import GaussianPath, per_image
from imagewright.precision import wide
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, UserError

Prediction = Literal["x0", "eps", "v", "velocity", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

PathNetwork = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t [N, ...], t [N], cond) -> a prediction of x_t's shape, in the path's own coordinates."""

NEAR_INFINITY = 1e6
"""The noise level at which a denoiser without an upper end is asked about pure noise."""


# --- points -------------------------------------------------------------------------------------------------


def to_sigma(x_t: Tensor, t: Tensor, path: GaussianPath) -> tuple[Tensor, Tensor]:
    """(x, sigma) of a point: x = x_t / alpha [N, ...], sigma = nsr(t) [N]. Both infinite at pure noise."""
    return x_t / per_image(path.alpha(t), x_t), path.nsr(t)


def from_sigma(x: Tensor, sigma: Tensor, path: GaussianPath) -> tuple[Tensor, Tensor]:
    """(x_t, t) on `path` of the point x [N, ...] at noise level sigma [N], finite."""
    t = path.time_of(sigma)
    return per_image(path.alpha(t), x) * x, t


def to_bounded(x_t: Tensor, t: Tensor, path: GaussianPath, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Coordinates that are finite everywhere, pure noise included.

    Returns y = x / sqrt(sigma^2 + sigma_data^2) [N, ...], of unit variance for data of std sigma_data, and
    angle = arctan(sigma / sigma_data) [N] in [0, pi/2]. On TrigFlow that is x_t / sigma_data and t.
    """
    noise, signal = path.sigma(t), sigma_data * path.alpha(t)
    return x_t / per_image(torch.hypot(noise, signal), x_t), torch.atan2(noise, signal)


def from_bounded(y: Tensor, angle: Tensor, path: GaussianPath, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(x_t, t) on `path` of bounded coordinates; at angle pi/2 it is the path's pure noise, if it has one."""
    cos = torch.sin(math.pi / 2 - angle)  # exactly zero at the float nearest to pi / 2, where cos is not
    t = path.time_of(sigma_data * torch.sin(angle) / cos)
    return y * per_image(torch.hypot(path.sigma(t), sigma_data * path.alpha(t)), y), t


# --- predictions --------------------------------------------------------------------------------------------


def convert(
    value: Tensor, x_t: Tensor, t: Tensor, path: GaussianPath, source: Prediction, target: Prediction
) -> Tensor:
    """The prediction `target` that says the same as `value`, a prediction `source`.

    value, x_t: [N, ...]; t: [N]. Returns [N, ...]; `value` itself when the two are the same.
    Raises ValueError for a word that is not in `PREDICTIONS`.
    """
    for word in (source, target):
        if word not in PREDICTIONS:
            raise ValueError(f"no prediction {word!r}; there are {', '.join(PREDICTIONS)}")
    if source == target:
        return value
    alpha, sigma = per_image(path.alpha(t), x_t), per_image(path.sigma(t), x_t)
    if target == "x0":
        return _x0(value, x_t, t, path, source)
    if target == "eps":
        return _eps(value, x_t, t, path, source)
    if target == "score":
        return -_eps(value, x_t, t, path, source) / sigma
    x0, eps = _x0(value, x_t, t, path, source), _eps(value, x_t, t, path, source)
    if target == "v":
        return alpha * eps - sigma * x0
    return per_image(path.alpha_prime(t), x_t) * x0 + per_image(path.sigma_prime(t), x_t) * eps


def _x0(value: Tensor, x_t: Tensor, t: Tensor, path: GaussianPath, source: Prediction) -> Tensor:
    alpha, sigma = per_image(path.alpha(t), x_t), per_image(path.sigma(t), x_t)
    if source == "x0":
        return value
    if source == "eps":
        return (x_t - sigma * value) / alpha
    if source == "score":
        return (x_t + sigma**2 * value) / alpha
    if source == "v":
        return (alpha * x_t - sigma * value) / (alpha**2 + sigma**2)
    alpha_prime, sigma_prime = per_image(path.alpha_prime(t), x_t), per_image(path.sigma_prime(t), x_t)
    return (sigma_prime * x_t - sigma * value) / (alpha * sigma_prime - sigma * alpha_prime)


def _eps(value: Tensor, x_t: Tensor, t: Tensor, path: GaussianPath, source: Prediction) -> Tensor:
    alpha, sigma = per_image(path.alpha(t), x_t), per_image(path.sigma(t), x_t)
    if source == "x0":
        return (x_t - alpha * value) / sigma
    if source == "eps":
        return value
    if source == "score":
        return -sigma * value
    if source == "v":
        return (sigma * x_t + alpha * value) / (alpha**2 + sigma**2)
    alpha_prime, sigma_prime = per_image(path.alpha_prime(t), x_t), per_image(path.sigma_prime(t), x_t)
    return (alpha * value - alpha_prime * x_t) / (alpha * sigma_prime - sigma * alpha_prime)


# --- models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathDenoiser:
    """A network in a path's own coordinates as a `Denoiser`: moves the point, asks, converts the answer.

    network: called with x_t in x's dtype and t [N] in the same. prediction: what it returns.
    sigma_min, sigma_max: noise levels for which it was trained, 0 <= sigma_min < sigma_max.
    """

    path: GaussianPath
    network: PathNetwork
    prediction: Prediction
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise UserError(f"no prediction {self.prediction!r}; there are {', '.join(PREDICTIONS)}")
        if not 0 <= self.sigma_min < self.sigma_max:
            raise UserError(
                f"noise levels must satisfy 0 <= sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        # float64 times: near pure noise 1 - t loses its digits in float32.
        x_t, t = from_sigma(x, wide(sigma), self.path)
        x_t = x_t.to(x.dtype)
        value = self.network(x_t, t.to(x.dtype), cond)
        return convert(value, x_t, t, self.path, self.prediction, "x0").to(x.dtype)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


def as_denoiser(
    path: GaussianPath,
    network: PathNetwork,
    prediction: Prediction,
    *,
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
) -> PathDenoiser:
    """The `Denoiser` of a network that makes any of `PREDICTIONS` from a path's own (x_t, t, cond).

    sigma_max defaults to no limit, which is right for a network trained up to pure noise.
    """
    return PathDenoiser(path, network, prediction, sigma_min, sigma_max)


def velocity_of(denoiser: Denoiser, path: GaussianPath, sigma_data: float = 0.5) -> PathNetwork:
    """A denoiser's velocity on a path: (x_t [N, ...], t [N] > 0, cond) -> dx_t/dt [N, ...], dtype of x_t.

    Where the path is noisier than the denoiser knows (pure noise, say), the denoiser is asked at its
    sigma_max, or at `NEAR_INFINITY` if it has none, about the point with the same bounded coordinate y (see
    `to_bounded`): that is how the probability flow of data with standard deviation sigma_data moves.
    """
    limit = min(denoiser.sigma_max, NEAR_INFINITY)

    def velocity(x_t: Tensor, t: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        asked = (sigma / alpha).clamp(max=limit)
        scale = torch.where(
            sigma > limit * alpha,
            torch.sqrt(asked**2 + sigma_data**2) / torch.hypot(sigma, sigma_data * alpha),
            1 / alpha,
        )
        x0 = denoiser((per_image(scale, x_t) * x_t).to(x_t.dtype), asked, cond)
        return convert(x0, x_t, t, path, "x0", "velocity").to(x_t.dtype)

    return velocity
