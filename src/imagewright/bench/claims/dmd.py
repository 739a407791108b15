"""DMD: matching and regression each mend what the other lacks, and without its fake score it collapses (2311.18828)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.bench.claims.plane import PointTraining, distance, latents, point_denoiser, real_points, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.methods.distances import Distance
from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    diversity,
    matching_direction,
    surrogate,
)
from imagewright.methods.dmd import DMD
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.types import UNCONDITIONAL, Coupling, Frozen, Parts, Trained, Update

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
STD = 0.08
SIDE = 5
PAIRS = 1000
RUN = PointRun(iterations=1000, batch=256, lr=1e-3)
HIT = 0.2
"""A mode is hit by this share of the samples that are due to it."""
MODES, INSIDE, VARIANCE = "modes hit", "inside 3 std, %", "variance within modes"


class WithoutFake(DMD):
    """The control: the teacher alone says where to go, as in score distillation."""

    def generator_update(
        self, parts: Any, generated: Generated, coupling: Coupling | None, noise: StepNoise
    ) -> Update:
        x = generated.images
        sigma = self.levels.sample(noise, x[:, 0, 0, 0])
        with torch.no_grad():
            noisy = x + sigma[:, None, None, None] * noise.normal(x)
            real = parts.teacher(noisy, sigma, generated.cond)
        loss = surrogate(x, matching_direction(real, x, x))
        return Update("generator", loss, parts={"diversity": diversity(x)}, at=sigma)


class RegressionAlone(DMD):
    """The other control: the pairs alone."""

    def generator_update(
        self, parts: Any, generated: Generated, coupling: Coupling | None, noise: StepNoise
    ) -> Update:
        whole = super().generator_update(parts, generated, coupling, noise)
        return Update("generator", whole.parts["regression"], parts=whole.parts, at=whole.at)


def grid() -> GaussianMixture:
    """5 x 5 modes on [-1, 1]^2, a twelfth of their spacing wide."""
    line = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    return GaussianMixture(torch.cartesian_prod(line, line).reshape(-1, 2, 1, 1), STD)


def teachers_pairs(oracle: GaussianMixture, seed: int, count: int) -> Coupling:
    """Where the exact teacher's flow leads from noise."""
    z = latents(seed, count)
    return Coupling(z.float(), Heun(num_steps=18)(oracle, z).float())


def parts_of(denoiser: EDMPrecond, oracle: GaussianMixture) -> Parts:
    """As `methods.distribution_matching.matching_parts` makes them, but with an exact teacher."""
    return Parts(
        generator=Trained(module=FewStepGenerator.from_denoiser(denoiser)),
        teacher=Frozen(module=ExactTeacher(oracle)),
        fake_score=Trained(module=copy.deepcopy(denoiser).requires_grad_(True).train(), ema=False),
    )


def start_of(oracle: GaussianMixture, seed: int, iterations: int) -> EDMPrecond:
    """A denoiser trained on points, from which generators and fake scores start: an exact teacher has no weights."""
    denoiser = point_denoiser(WIDTH, DEPTH, seed, sigma_data=SIGMA_DATA)
    training = PointTraining(iterations=iterations, seed=seed, sigma_data=SIGMA_DATA)
    return train(denoiser, lambda n, noise: (oracle.sample(n, noise).float(), UNCONDITIONAL), training)


def modes_of(points: Tensor, oracle: GaussianMixture) -> dict[str, float]:
    """How many modes are hit, share of points near one, and the mean variance about their own mean of those that are.

    The variance is in units of what the truth has within three deviations.
    """
    means = oracle.means.flatten(1)
    off = (points[:, None] - means).norm(dim=2)
    nearest = off.argmin(1)
    inside = off.min(1).values < 3 * STD
    counts = torch.bincount(nearest[inside], minlength=len(means))
    spreads = [
        points[inside & (nearest == k)].var(0, correction=1).mean() for k in range(len(means)) if counts[k] >= 10
    ]
    truth = STD**2 * (1 - 4.5 * torch.tensor(-4.5).exp() / (1 - torch.tensor(-4.5).exp()))
    return {
        MODES: float((counts >= HIT * len(points) / len(means)).sum()),
        INSIDE: 100 * float(inside.double().mean()),
        VARIANCE: float(torch.stack(spreads).mean() / truth) if spreads else 0.0,
    }
