"""Restart sampling (Xu et al. 2023, arXiv 2306.14878, algorithm 1 and appendix B).

Order      Heun's, on the main grid and within every restart interval.
NFE        2 N - 1 for the main pass, and K * 2 (N_restart - 1) for each interval.
Ingredients  deterministic main pass; t_min snapped to the nearest level of the main grid; one jump up, from t_min to
           t_max, with variance t_max^2 - t_min^2 and fresh noise; Heun back down on the rho grid from t_max to the
           snapped level, with the correction on the last step too; small churn within restarts only (gamma 0.05 for
           levels in [0.01, 1], as in the published runs; 0 turns it off); S_noise scales jumps and churn.
Departs    from Newbeeer/diffusion_restart_sampling, benchmarks/generate_restart.py: no PFGM++ kernel, no restarts of
           DPM-Solver-3 and none in discrete time for latent models (the library has no such models); no churn in the
           main pass. The restart grid is float64 (theirs float32: end points differ by 4e-7), rounded to the levels
           that the model knows, and never starts at the first level, where theirs would be ignored, or at 0. Two
           intervals that snap to one level are refused (theirs keeps the last). restart_gamma, S_min, S_max and S_noise
           have the values of the published runs (theirs default to 0.05, 0, 0 and 0).
Precision  state and grid in float64; the network in its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from imagewright.paths.schedules import karras_sigmas
from imagewright.precision import wide
from imagewright.samplers.edm import churned, heun_step
from imagewright.samplers.grid import OnGrid
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep, UserError


class Interval(NamedTuple):
    """One entry of the restart list."""

    num_steps: int
    """N_restart: points of the interval's grid, both ends counted, at least 2."""
    repeats: int
    """K: how often the interval is run again."""
    t_min: float
    t_max: float


@dataclass(frozen=True, kw_only=True)
class Restart(OnGrid):
    """Heun, and at chosen levels a jump back up to t_max and down again, K times: noise contracts the error so far.

    intervals: entries (N_restart, K, t_min, t_max). The published configurations are in `PRESETS`. `restart_gamma`
    applies to each step, not divided by their number.
    """

    intervals: tuple[Interval, ...] = (Interval(3, 2, 0.06, 0.30),)
    restart_gamma: float = 0.05
    S_min: float = 0.01
    S_max: float = 1.0
    """restart_gamma applies to levels in [S_min, S_max]."""
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "intervals", tuple(_interval(entry) for entry in self.intervals))
        if not (0 <= self.restart_gamma < math.inf and 0 <= self.S_noise < math.inf):
            raise UserError(
                f"sampler.restart_gamma is {self.restart_gamma} and S_noise is {self.S_noise}; "
                "both must be >= 0 and finite"
            )

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return 2 * self.num_steps - 1 + sum(i.repeats * 2 * (i.num_steps - 1) for i in self.intervals)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As `types.Sampler`; returns float64.

        Raises UserError when there are restarts but no noise source, and for an interval that leaves the noise range
        or starts at the same level as another.
        """
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        restarts = self._snapped(sigmas)
        if restarts and noise is None:
            raise UserError("sampler Restart is stochastic; it needs a noise source")
        x = wide(latents) * sigmas[0]
        for sigma, sigma_next in pairwise(sigmas):
            x, denoised = heun_step(denoiser, x, sigma, sigma_next, cond)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
            if sigma_next in restarts and noise is not None:
                interval = restarts[sigma_next]
                for _ in range(interval.repeats):
                    x, denoised = self._again(denoiser, x, interval, cond, noise)
                if interval.repeats and on_step is not None:
                    on_step(x, denoised, sigma_next)
        return x

    def _snapped(self, sigmas: Sequence[float]) -> dict[float, Interval]:
        """The intervals by the level of the main grid at which they start."""
        restarts: dict[float, Interval] = {}
        # Not the first level: a restart follows the step that arrives at its level. Not the final zero either.
        reached = sigmas[1:-1] or sigmas[:-1]
        for interval in self.intervals:
            if not sigmas[-2] <= interval.t_min < interval.t_max <= sigmas[0]:
                raise UserError(
                    f"sampler.intervals has {list(interval)}; t_min and t_max must lie in the noise range of this "
                    f"model and grid, {sigmas[-2]:g} to {sigmas[0]:g}"
                )
            level = min(reached, key=lambda s: abs(s - interval.t_min))
            if level in restarts:
                raise UserError(
                    f"sampler.intervals {list(restarts[level])} and {list(interval)} both start at level {level:.4g} "
                    f"of the {len(sigmas) - 1}-step grid; use more steps or intervals further apart"
                )
            if level >= interval.t_max:
                raise UserError(
                    f"sampler.intervals has {list(interval)}; its t_min falls on level {level:.4g} of the "
                    f"{len(sigmas) - 1}-step grid, which is not below its t_max; use more steps"
                )
            restarts[level] = interval._replace(t_min=level)
        return restarts

    def _again(
        self, denoiser: Denoiser, x: Tensor, interval: Interval, cond: Condition, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Jump from t_min to t_max and follow the flow back."""
        grid = denoiser.round_sigma(karras_sigmas(interval.num_steps, interval.t_min, interval.t_max, self.rho))
        levels: list[float] = [*grid.double().tolist()[:-1], interval.t_min]
        x = x + math.sqrt(levels[0] ** 2 - interval.t_min**2) * self.S_noise * noise.normal(x)
        denoised = x
        for sigma, sigma_next in pairwise(levels):
            if self.restart_gamma > 0:
                inside = self.S_min <= sigma <= self.S_max
                gamma = self.restart_gamma if inside else 0.0
                x, sigma = churned(denoiser, x, sigma, gamma, self.S_noise, noise)
            x, denoised = heun_step(denoiser, x, sigma, sigma_next, cond)
        return x, denoised


def _interval(entry: Sequence[float]) -> Interval:
    """An entry of the list, checked. Raises UserError."""
    if len(entry) != 4 or entry[0] != int(entry[0]) or entry[1] != int(entry[1]):
        raise UserError(f"sampler.intervals has {entry!r}; an entry is [N_restart, K, t_min, t_max]")
    interval = Interval(int(entry[0]), int(entry[1]), float(entry[2]), float(entry[3]))
    if interval.num_steps < 2 or interval.repeats < 0 or not 0 < interval.t_min < interval.t_max < math.inf:
        raise UserError(
            f"sampler.intervals has {list(interval)}; N_restart must be at least 2, K at least 0, 0 < t_min < t_max"
        )
    return interval


def _preset(num_steps: int, *intervals: tuple[int, int, float, float], S_noise: float = 1.0) -> Restart:
    return Restart(num_steps=num_steps, intervals=tuple(Interval(*i) for i in intervals), S_noise=S_noise)


_HIGH, _MID, _LOW3, _LOW2, _LOW = (19.35, 40.79), (1.09, 1.92), (0.59, 1.09), (0.30, 0.59), (0.06, 0.30)
_CIFAR10 = _preset(18, (3, 2, *_LOW))


def _imagenet(num_steps: int, *intervals: tuple[int, int, float, float]) -> Restart:
    return _preset(num_steps, *intervals, S_noise=1.003)


PRESETS: dict[str, Restart] = {
    "cifar10-vp-43": _CIFAR10,
    "cifar10-vp-55": _preset(18, (3, 5, *_LOW)),
    "cifar10-vp-75": _preset(18, (3, 10, *_LOW)),
    "cifar10-vp-115": _preset(18, (3, 20, *_LOW)),
    "cifar10-vp-519": _preset(20, (9, 30, 0.06, 0.20)),
    "cifar10-edm-43": replace(_CIFAR10, intervals=(Interval(3, 2, 0.14, 0.30),)),
    "imagenet64-39": _imagenet(14, (3, 1, *_HIGH), (3, 1, *_MID), (3, 1, *_LOW)),
    "imagenet64-67": _imagenet(18, (5, 1, *_HIGH), (5, 1, *_MID), (5, 1, *_LOW3), (5, 1, *_LOW)),
    "imagenet64-99": _imagenet(18, (3, 1, *_HIGH), (4, 1, *_MID), (4, 4, *_LOW3), (4, 1, *_LOW2), (4, 4, *_LOW)),
    "imagenet64-165": _imagenet(18, (3, 1, *_HIGH), (4, 1, *_MID), (4, 5, *_LOW3), (4, 5, *_LOW2), (4, 10, *_LOW)),
    "imagenet64-203": _imagenet(36, (4, 1, *_HIGH), (4, 1, *_MID), (4, 5, *_LOW3), (4, 5, *_LOW2), (6, 6, *_LOW)),
    "imagenet64-385": _imagenet(36, (3, 1, *_HIGH), (6, 1, *_MID), (6, 5, *_LOW3), (6, 5, *_LOW2), (6, 20, *_LOW)),
    "imagenet64-535": _imagenet(36, (6, 1, *_HIGH), (6, 1, *_MID), (7, 6, *_LOW3), (7, 6, *_LOW2), (7, 25, *_LOW)),
    "imagenet64-623": _imagenet(36, (10, 3, *_HIGH), (10, 3, *_MID), (7, 6, *_LOW3), (7, 6, *_LOW2), (7, 25, *_LOW)),
}
"""The published configurations by data set and NFE (appendix, tables of configurations)."""
