"""Improved consistency training, iCT (Song and Dhariwal 2023, arXiv 2310.14189).

Networks   student (trained); no teacher. The target is the student itself under stop-gradient.
Time       the paper's t is our sigma; grids are EDM's (rho = 7).
Added      to `methods.consistency`: no average in the target (section 3.2); pseudo-Huber distance of whole images with
           c = 0.00054 sqrt(C H W) (3.3, `methods.distances`); weight 1 / (sigma_{i+1} - sigma_i) (3.1); intervals drawn
           as a log-normal of sigma falls on them (3.5); a grid whose intervals double in equal stages (3.4).
Recipes    RAdam, no decay; dropout, equal in both evaluations (`pairs.match`); Fourier scale 0.02 (`networks`).
Departs    No official program: what the paper leaves open is its predecessor's (`methods.consistency`).
           A stage is a share of the images, not a whole number of steps: it may begin up to one step later.
           target_decay, by_gap and noise_levels = None put the original recipe's choices back, for the ablation.
Checked    11, 11, 21, 1281 points at the ends of stages; interval probabilities; gradient of the distance <= 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.methods.distances import Distance, Features
from imagewright.methods.pairs import Neighbours, check_grid, check_range, column, consistency_parts, match
from imagewright.models.consistency import ConsistencyModel
from imagewright.moving import sent
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.paths.schedules import karras_sigmas
from imagewright.precision import wide
from imagewright.types import Batch, Clock, DataSpec, Event, Parts, UserError


@dataclass(frozen=True, kw_only=True)
class ImprovedConsistencyTraining:
    """One image under one noise at two adjacent levels of a grid that doubles, stage by stage."""

    product: ClassVar[str] = "student"

    s0: int = 10
    """Intervals of the grid in the first stage."""
    s1: int = 1280
    """Most intervals; with s0 = 10 the grid doubles seven times, in eight equal stages."""
    noise_levels: LogNormal | None = LogNormal(mean=-1.1, std=2.0)
    """Law of the interval's upper level; None = all intervals alike (the original recipe)."""
    by_gap: bool = True
    """Weight 1 / (difference of the two levels); False = 1 (the original recipe)."""
    target_decay: float = 0.0
    """0 = the target is the student under stop-gradient."""
    distance: Distance = Distance(kind="pseudo_huber")
    rho: float = 7.0
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_grid("s0 + 1", self.s0 + 1, self.rho)
        check_range(self.sigma_min, self.sigma_max, "method.")
        if self.s1 < self.s0:
            raise UserError(f"method.s1 is {self.s1}; it must be at least s0 ({self.s0})")
        require_positive("method.sigma_data", self.sigma_data)
        if not 0 <= self.target_decay < 1:
            raise UserError(f"method.target_decay is {self.target_decay}; it must lie in [0, 1)")

    @property
    def stages(self) -> int:
        """Stages of equal length: 1 + log2(s1 / s0), rounded down."""
        return int(math.log2(self.s1 // self.s0)) + 1

    def grid_points(self, fraction: float) -> int:
        """N(k) at a fraction k / K of training in [0, 1), as points of the grid."""
        stage = min(int(fraction * self.stages), self.stages - 1)
        return int(min(self.s0 * 2**stage, self.s1)) + 1

    def parts(self, *, network: nn.Module, spec: DataSpec, features: Features | None = None) -> Parts:
        """network: F(x, noise_label, cond) of `networks`, untrained."""
        student = ConsistencyModel(network, self.sigma_min, self.sigma_max, self.sigma_data)
        return consistency_parts(student, features, self.distance)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        t, t_next, weight = self.neighbours(clock.fraction, noise, batch.images[:, 0, 0, 0])
        z = noise.normal(batch.images)
        pair = (batch.images + column(t) * z, t), (batch.images + column(t_next) * z, t_next)
        yield from match(parts, *pair, batch.cond, noise, self.distance, self.target_decay, weight)

    def neighbours(self, fraction: float, noise: StepNoise, like: Tensor, most: float = math.inf) -> Neighbours:
        """Ends, cut at `most`, of intervals of the grid at a fraction of training, and their weights; like: [N]."""
        grid = self._grid(fraction)
        upper = self.draw_intervals(grid, noise, like)
        grid = grid.clamp(max=most).to(like)
        t, t_next = grid[upper], grid[upper + 1]
        return Neighbours(t, t_next, 1 / (t - t_next) if self.by_gap else None)

    def last_weight(self, fraction: float) -> float:
        """The weight of the grid's uppermost interval."""
        grid = self._grid(fraction)
        return 1 / float(grid[0] - grid[1]) if self.by_gap else 1.0

    def _grid(self, fraction: float) -> Tensor:
        return karras_sigmas(self.grid_points(fraction), self.sigma_min, self.sigma_max, self.rho)

    def draw_intervals(self, grid: Tensor, noise: StepNoise, like: Tensor) -> Tensor:
        """Indices int64 [N] into the falling grid of the upper ends of intervals; like: [N]."""
        if self.noise_levels is None:
            return noise.integers(len(grid) - 1, like)
        share = sent(interval_probabilities(grid, self.noise_levels).cumsum(0), like.device)
        return torch.searchsorted(share, noise.uniform(wide(like)), right=True).clamp(max=len(grid) - 2)


def interval_probabilities(grid: Tensor, levels: LogNormal) -> Tensor:
    """Probability of each interval of a falling grid [N] under a log-normal (eq. 10), float64 [N - 1]."""
    z = (wide(grid).log() - levels.mean) / (levels.std * math.sqrt(2))
    mass = z.erf()[:-1] - z.erf()[1:]
    return mass / mass.sum()
