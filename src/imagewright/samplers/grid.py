"""What the samplers share that step down a list of noise levels: the list, its checks, and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imagewright import limits
from imagewright.checks import require_positive
from imagewright.paths.grids import GRIDS, check_decreasing, noise_levels
from imagewright.shapes import brief
from imagewright.types import Denoiser, ModelKind, UserError


@dataclass(frozen=True, kw_only=True)
class OnGrid:
    """Settings of the noise levels: a named grid, or the levels themselves. The last step goes to sigma = 0.

    sigma_min, sigma_max are cut to the denoiser's own range.
    """

    model_kind: ClassVar[ModelKind] = "denoiser"

    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    grid: str = "karras"
    """karras, log, sigma, or the path whose time is divided evenly: vp, cosine, linear, trigflow."""
    rho: float = 7.0
    """Of grid "karras"."""
    levels: tuple[float, ...] = ()
    """The noise levels themselves, decreasing, > 0, in place of a grid; num_steps is then their number."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        if self.levels:
            check_decreasing("sampler.levels", self.levels)
            object.__setattr__(self, "num_steps", len(self.levels))
        check_steps(self.num_steps)
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"sampler.sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}; "
                "they must satisfy 0 < sigma_min < sigma_max"
            )
        if self.grid not in GRIDS:
            raise UserError(f"sampler.grid is {self.grid!r}; it must be one of {', '.join(GRIDS)}")
        require_positive("sampler.rho", self.rho)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps

    def sigmas(self, denoiser: Denoiser) -> Tensor:
        """The noise levels of the steps, float64 [num_steps + 1], the last 0.

        Raises UserError when `levels` leaves the denoiser's range.
        """
        low, high = max(self.sigma_min, denoiser.sigma_min), min(self.sigma_max, denoiser.sigma_max)
        if self.levels:
            if not denoiser.sigma_min <= self.levels[-1] <= self.levels[0] <= denoiser.sigma_max:
                raise UserError(
                    f"sampler.levels runs from {self.levels[0]:g} to {self.levels[-1]:g}; "
                    f"the model knows the noise levels {denoiser.sigma_min:g} to {denoiser.sigma_max:g}"
                )
            visited = torch.tensor(self.levels, dtype=torch.float64)
        else:
            visited = noise_levels(self.grid, self.num_steps, low, high, self.rho)
        rounded = denoiser.round_sigma(visited).to(torch.float64).cpu()
        return torch.cat([rounded, torch.zeros(1, dtype=torch.float64)])


def per_row(x: Tensor, sigma: float) -> Tensor:
    """One noise level for every image: [N], dtype and device of x."""
    return torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)


def check_steps(num_steps: int) -> None:
    """Raise UserError unless it is a whole number from 1 to what is ever sensible."""
    if not isinstance(num_steps, int) or not 1 <= num_steps <= limits.STEPS:
        most = f" and at most {limits.STEPS}" if isinstance(num_steps, int) and num_steps > 1 else ""
        raise UserError(f"sampler.num_steps is {brief(num_steps)}; it must be at least 1{most}, a whole number")
