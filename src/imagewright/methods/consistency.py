"""Consistency distillation and consistency training (Song et al. 2023, arXiv 2303.01469), algorithms 2 and 3.

Networks   student (trained), target (average of the student), teacher (frozen; distillation only).
Time       the paper's t is our sigma; the grid is EDM's (rho = 7), n runs over its N - 1 intervals uniformly.
Pair       distillation: one Heun step of the teacher from (x_t, t) to t'. Training: the same z at both levels.
Kept       boundary condition in the scalings (`models.consistency`); the same dropout mask for both evaluations, both
           networks in training mode; target average (mu) apart from the evaluation average (the trainer's EMA);
           N(k) and mu(k) schedules for training; RAdam, no clipping, no decay (recipes).
Departs    The continuous-time variants and progressive distillation (the paper's baseline) are not in this file.
           c_noise is EDM's ln(sigma) / 4, as in the CIFAR-10 program; that for ImageNet-64 has 250 ln(sigma), but so a
           teacher's weights mean the same to the student. LPIPS is its own package's, with VGG's maxima, where the
           ImageNet-64 program puts averages in their place. A loss that is not finite stops the training, where the
           CIFAR-10 program leaves it out of the sum. Half precision is autocast, theirs casts the network. torch's
           RAdam adds eps before it corrects the second moment's bias, optax's after.
Checked    losses and gradients of both official programs (`tests/parity`); f(x, sigma_min) = x; shared z; the exact
           flow of Gaussian data has a loss that vanishes as N grows.
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
from imagewright.methods.pairs import check_grid, check_range, column, consistency_parts, heun_step, match
from imagewright.models.consistency import ConsistencyModel, edm_teacher
from imagewright.noise import StepNoise
from imagewright.paths.schedules import karras_grid
from imagewright.types import Batch, Clock, DataSpec, Denoiser, Event, Frozen, Parts, UserError


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """Algorithm 2: adjacent points of a teacher's trajectory must lead to the same image."""

    product: ClassVar[str] = "student"

    grid_points: int = 18
    """N of the paper: points of the noise grid (18 on CIFAR-10, 40 on ImageNet-64)."""
    rho: float = 7.0
    target_decay: float = 0.0
    """mu of the paper; 0 = the target is the student itself under stop-gradient (the CIFAR-10 setting)."""
    distance: Distance = Distance()

    def __post_init__(self) -> None:
        check_grid("grid_points", self.grid_points, self.rho)
        if not 0 <= self.target_decay < 1:
            raise UserError(f"method.target_decay is {self.target_decay}; it must lie in [0, 1)")

    def parts(self, *, teacher: Denoiser, spec: DataSpec, features: Features | None = None) -> Parts:
        """teacher: an EDM-preconditioned denoiser; student and target start from its weights."""
        known = edm_teacher(teacher)
        student = ConsistencyModel.from_denoiser(known)
        return consistency_parts(student, features, self.distance, teacher=Frozen(module=known))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, then of the target."""
        t, t_next = _random_interval(self.grid_points, self.rho, parts.student, batch.images, noise)
        x = batch.images + column(t) * noise.normal(batch.images)
        with torch.no_grad():
            x_next = heun_step(parts.teacher, x, t, t_next, batch.cond)
        yield from match(parts, (x, t), (x_next, t_next), batch.cond, noise, self.distance, self.target_decay)


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining:
    """Algorithm 3: no teacher; the pair is one image under one noise at two adjacent levels of a growing grid."""

    product: ClassVar[str] = "student"

    s0: int = 2
    """Points of the noise grid at the start of training."""
    s1: int = 150
    """Intervals of the grid, one fewer than its points, at the end (150 on CIFAR-10, 200 on ImageNet-64)."""
    mu0: float = 0.9
    """mu_0 of the paper (0.9 on CIFAR-10, 0.95 on ImageNet-64); the target's decay starts at mu0^s0."""
    rho: float = 7.0
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    distance: Distance = Distance()

    def __post_init__(self) -> None:
        check_grid("s0", self.s0, self.rho)
        check_range(self.sigma_min, self.sigma_max, "method.")
        require_positive("method.sigma_data", self.sigma_data)
        if self.s1 < self.s0 or not 0 < self.mu0 < 1:
            raise UserError(
                f"method.s1 is {self.s1} and mu0 is {self.mu0}; s1 must be at least s0 ({self.s0}), mu0 in (0, 1)"
            )

    def grid_points(self, fraction: float) -> int:
        """N(k) at a fraction k / K of training in [0, 1], as points of the grid: from s0 to s1 + 1."""
        return math.ceil(math.sqrt(fraction * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1) + 1

    def target_decay(self, fraction: float) -> float:
        """mu(k) = exp(s0 ln(mu0) / (N(k) - 1)), as the paper's code counts: rises to 1 as the grid gets finer."""
        return math.exp(self.s0 * math.log(self.mu0) / (self.grid_points(fraction) - 1))

    def parts(self, *, network: nn.Module, spec: DataSpec, features: Features | None = None) -> Parts:
        """network: F(x, noise_label, cond) of `networks`, untrained or trained."""
        student = ConsistencyModel(network, self.sigma_min, self.sigma_max, self.sigma_data)
        return consistency_parts(student, features, self.distance)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, then of the target."""
        points = self.grid_points(clock.fraction)
        t, t_next = _random_interval(points, self.rho, parts.student, batch.images, noise)
        z = noise.normal(batch.images)
        pair = (batch.images + column(t) * z, t), (batch.images + column(t_next) * z, t_next)
        yield from match(parts, *pair, batch.cond, noise, self.distance, self.target_decay(clock.fraction))


def _random_interval(
    points: int, rho: float, model: ConsistencyModel, images: Tensor, noise: StepNoise
) -> tuple[Tensor, Tensor]:
    """Upper and lower noise level, each [N], of intervals drawn uniformly from the grid."""
    grid = karras_grid(points, model.sigma_min, model.sigma_max, rho, images.device, images.dtype)
    upper = noise.integers(points - 1, images[:, 0, 0, 0])
    return grid[upper], grid[upper + 1]
