"""Time grids by name: which noise levels a sampler visits between sigma_max and sigma_min.

karras    even in sigma^(1/rho) (Karras et al. 2022, eq. 5)
log       even in ln sigma, the step of the half-log-SNR that DPM-Solver counts in
sigma     even in sigma
vp, cosine, linear, trigflow
          even in the time of that path (`paths.gaussian`), from the time of sigma_max to that of sigma_min
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagewright.paths.gaussian import Cosine, GaussianPath, Linear, TrigFlow, VariancePreserving
from imagewright.paths.schedules import VEGrid, karras_sigmas
from imagewright.types import UserError

PATHS: dict[str, GaussianPath] = {
    "vp": VariancePreserving(),
    "cosine": Cosine(),
    "linear": Linear(),
    "trigflow": TrigFlow(),
}
GRIDS = ("karras", "log", "sigma", *PATHS)


def noise_levels(name: str, n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n levels from sigma_max to sigma_min, decreasing, float64 [n], without a final zero; n = 1 is sigma_max.

    name: one of `GRIDS`. 0 < sigma_min <= sigma_max < inf. rho: of "karras". Raises UserError for an empty range.
    """
    if name == "karras":
        return karras_sigmas(n, sigma_min, sigma_max, rho)
    if name == "sigma":
        return karras_sigmas(n, sigma_min, sigma_max, 1.0)
    levels = VEGrid().sigmas(n, sigma_min, sigma_max)
    if name == "log":
        return levels
    path = PATHS[name]
    ends = path.time_of(levels[[0, -1]])
    inner = path.nsr(ends[0] + torch.linspace(0, 1, n, dtype=torch.float64) * (ends[1] - ends[0]))
    # The ends exactly as given, whatever a path's inverse rounds.
    return torch.cat([levels[:1], inner[1:-1], levels[-1:]]) if n > 1 else levels


def check_decreasing(name: str, levels: Sequence[float]) -> None:
    """Raise UserError, calling them `name`, unless noise levels are positive and strictly decreasing; none will do."""
    if not all(level > 0 for level in levels) or list(levels) != sorted(set(levels), reverse=True):
        raise UserError(f"{name} is {tuple(levels)}; the levels must be positive and strictly decreasing")


def check_stops(name: str, levels: Sequence[float], low: float, high: float) -> None:
    """Raise UserError unless stops on the way down from `high`, decreasing, lie between it and `low`."""
    if levels and not low < levels[-1] <= levels[0] < high:
        raise UserError(f"{name} is {tuple(levels)}; every level must lie between {low} and {high}")
