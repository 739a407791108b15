"""Distributions of the noise level during training: small frozen dataclasses with `sample` and `log_prob`.

sigma is always the noise's standard deviation in data units (x = x0 + sigma * eps). Those that papers state
over the time of the straight path, x_t = (1 - t) x0 + t eps with t: 0 clean, 1 noise, convert by sigma = t /
(1 - t). Arithmetic is float64 inside: 1 - t loses its digits in float32 where the noise is strong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.paths.schedules import VPSchedule
from imagewright.precision import wide
from imagewright.types import Noise, UserError


class NoiseLevels(ABC):
    """A distribution of noise levels on (0, inf)."""

    @abstractmethod
    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        """Draw sigma [N], dtype and device of `like` [N]; one draw from `noise` per image."""

    @abstractmethod
    def log_prob(self, sigma: Tensor) -> Tensor:
        """log p(sigma), natural, with respect to d sigma; sigma > 0, any shape; -inf outside the support."""

    def density(self, sigma: Tensor) -> Tensor:
        """p(sigma), per unit of sigma; 0 outside the support."""
        return self.log_prob(sigma).exp()


@dataclass(frozen=True, kw_only=True)
class LogNormal(NoiseLevels):
    """ln(sigma) ~ N(mean, std^2). Karras et al. 2022 (EDM), table 1: mean -1.2, std 1.2."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _require_finite(self, mean=self.mean)
        _require_positive(self, std=self.std)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        return (self.mean + self.std * wide(noise.normal(like))).exp().to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        z = (sigma.log() - self.mean) / self.std
        return -0.5 * z**2 - sigma.log() - math.log(self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True, kw_only=True)
class LogitNormal(NoiseLevels):
    """logit(t) ~ N(mean, std^2) over the straight path's time. Esser et al. 2024 (SD3), eq. 19.

    As sigma = t / (1 - t) is the exponential of logit(t), this is LogNormal under another name.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        self.as_log_normal()

    def as_log_normal(self) -> LogNormal:
        """The same distribution, said over sigma."""
        return LogNormal(mean=self.mean, std=self.std)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        return self.as_log_normal().sample(noise, like)

    def log_prob(self, sigma: Tensor) -> Tensor:
        return self.as_log_normal().log_prob(sigma)


@dataclass(frozen=True, kw_only=True)
class LogUniform(NoiseLevels):
    """ln(sigma) uniform between the logarithms of two noise levels."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        _require_positive(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _require_increasing(self, self.sigma_min, self.sigma_max)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return (self.sigma_min * (wide(noise.uniform(like)) * log_ratio).exp()).to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        inside = -sigma.log() - math.log(math.log(self.sigma_max / self.sigma_min))
        return _within(inside, sigma, self.sigma_min, self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class VPTime(NoiseLevels):
    """The VP schedule's time uniform on [epsilon_t, 1]. Karras et al. 2022, table 1, "VP", after Song et al. 2021.

    sigma is that of `paths.schedules.VPSchedule`. epsilon_t: smallest time of training, in (0, 1).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive(self, beta_d=self.beta_d, beta_min=self.beta_min)
        if not 0 < self.epsilon_t < 1:
            raise UserError(f"VPTime.epsilon_t must lie in (0, 1), got {self.epsilon_t}")

    @property
    def _schedule(self) -> VPSchedule:
        return VPSchedule(beta_d=self.beta_d, beta_min=self.beta_min)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        t = 1 + wide(noise.uniform(like)) * (self.epsilon_t - 1)
        return self._schedule.sigma(t).to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        t = self._schedule.time_of(sigma)
        # dsigma/dt = (beta_min + beta_d t) (sigma + 1 / sigma) / 2
        rate = 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)
        ends = self._schedule.sigma(torch.tensor([self.epsilon_t, 1.0], dtype=torch.float64)).tolist()
        return _within(-rate.log() - math.log(1 - self.epsilon_t), sigma, *ends)


@dataclass(frozen=True, kw_only=True)
class Uniform(NoiseLevels):
    """sigma uniform between two noise levels."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        _require_positive(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _require_increasing(self, self.sigma_min, self.sigma_max)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        return (self.sigma_min + (self.sigma_max - self.sigma_min) * wide(noise.uniform(like))).to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        inside = torch.full_like(sigma, -math.log(self.sigma_max - self.sigma_min))
        return _within(inside, sigma, self.sigma_min, self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class UniformTime(NoiseLevels):
    """The straight path's time uniform on [margin, 1 - margin]. Liu et al. 2023 (rectified flow), eq. 1.

    margin: keeps sigma = t / (1 - t) away from 0 and infinity, in (0, 1/2).
    """

    margin: float = 1e-5

    def __post_init__(self) -> None:
        _require_margin(self, self.margin)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        t = self.margin + (1 - 2 * self.margin) * wide(noise.uniform(like))
        return (t / (1 - t)).to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        inside = -2 * torch.log1p(sigma) - math.log(1 - 2 * self.margin)  # dt/dsigma = 1 / (1 + sigma)^2
        return _within(inside, sigma, self.margin / (1 - self.margin), (1 - self.margin) / self.margin)


@dataclass(frozen=True, kw_only=True)
class UShaped(NoiseLevels):
    """Both ends of the straight path more often: p(t) = a (e^(a t) + e^(a (1 - t))) / (2 (e^a - 1)).

    Lee et al. 2024 (improving the training of rectified flows), section 4.1, in the symmetric form of their
    programs, cosh(a (t - 1/2)) up to scale; its distribution function inverts in closed form, so one uniform
    number is one time. Then t <- margin + (1 - 2 margin) t, which keeps sigma = t / (1 - t) away from 0 and
    infinity.

    sharpness: a, > 0.  margin: in (0, 1/2).
    """

    sharpness: float = 4.0
    margin: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive(self, sharpness=self.sharpness)
        _require_margin(self, self.margin)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        u = wide(noise.uniform(like))
        centred = torch.asinh((2 * u - 1) * math.sinh(self.sharpness / 2)) / self.sharpness  # t - 1/2
        t = 0.5 + (1 - 2 * self.margin) * centred
        return (t / (1 - t)).to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        a, width = self.sharpness, 1 - 2 * self.margin
        centred = 0.5 * (sigma - 1) / (sigma + 1) / width
        normaliser = math.log(a / (2 * math.sinh(a / 2)) / width)
        inside = torch.cosh(a * centred).log() + normaliser - 2 * torch.log1p(sigma)
        return _within(inside, sigma, self.margin / (1 - self.margin), (1 - self.margin) / self.margin)


@dataclass(frozen=True, kw_only=True)
class ExponentialTime(NoiseLevels):
    """More often towards noise: p(t) proportional to base^t, 0 < t < 1. Kim et al. 2024 (Simple ReFlow).

    Then t <- margin + (1 - 2 margin) t, as in `UShaped`.  base: > 0 and not 1; below 1 prefers the clean end.
    """

    base: float = 10.0
    margin: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive(self, base=self.base)
        if self.base == 1:
            raise UserError("ExponentialTime.base must not be 1, which is UniformTime")
        _require_margin(self, self.margin)

    def sample(self, noise: Noise, like: Tensor) -> Tensor:
        inner = torch.log1p((self.base - 1) * wide(noise.uniform(like))) / math.log(self.base)
        t = self.margin + (1 - 2 * self.margin) * inner
        return (t / (1 - t)).to(like.dtype)

    def log_prob(self, sigma: Tensor) -> Tensor:
        rate, width = math.log(self.base), 1 - 2 * self.margin
        inner = (sigma / (1 + sigma) - self.margin) / width
        inside = rate * inner + math.log(rate / (self.base - 1) / width) - 2 * torch.log1p(sigma)
        return _within(inside, sigma, self.margin / (1 - self.margin), (1 - self.margin) / self.margin)


# --- checks -------------------------------------------------------------------------------------------------


def _within(log_prob: Tensor, sigma: Tensor, low: float, high: float) -> Tensor:
    return torch.where((sigma >= low) & (sigma <= high), log_prob, -math.inf)


def _require_finite(owner: NoiseLevels, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{type(owner).__name__}.{name} must be finite, got {value}")


def _require_positive(owner: NoiseLevels, **values: float) -> None:
    for name, value in values.items():
        require_positive(f"{type(owner).__name__}.{name}", value)


def _require_increasing(owner: NoiseLevels, sigma_min: float, sigma_max: float) -> None:
    if sigma_min >= sigma_max:
        raise UserError(f"{type(owner).__name__}.sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")


def _require_margin(owner: NoiseLevels, margin: float) -> None:
    if not 0 < margin < 0.5:
        raise UserError(f"{type(owner).__name__}.margin must lie in (0, 0.5), got {margin}")
