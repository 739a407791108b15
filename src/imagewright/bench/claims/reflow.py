"""Reflow in the plane: a teacher's pairs, flows that learn them, and how far their ends are from its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imagewright.bench.claims.plane import PointTraining, point_denoiser, train
from imagewright.bench.claims.plane_training import PointRun, distil, mixture_points
from imagewright.bench.claims.rings import distance_to, ring
from imagewright.bench.claims.students import LEVELS, PLANE
from imagewright.models.flow import flow_of
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.schedules import karras_sigmas
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig
from imagewright.types import UNCONDITIONAL, Coupling, Parts, Trained

BATCH = 256
TEACHER = Heun(levels=tuple(karras_sigmas(30, 0.002, 80.0).tolist()))
"""How pairs are drawn and, upwards, real points inverted."""


@dataclass(frozen=True, kw_only=True)
class Reflow:
    """One seed: eight modes on a circle, pairs of a denoiser, and a trained denoiser to start flows from.

    pairs: to learn from. count: held-out noises, on which flows are judged. first: updates of the trained denoiser.
    exact: whether the modes' exact denoiser draws the pairs, or the trained one.
    """

    seed: int
    pairs: int
    count: int
    first: int
    exact: bool = True

    @cached_property
    def oracle(self) -> GaussianMixture:
        return ring(self.seed)

    @cached_property
    def learnt(self) -> Coupling:
        """The pairs to learn from."""
        return self.drawn(1000, self.pairs)

    @cached_property
    def held_out(self) -> Coupling:
        """The pairs to judge by."""
        return self.drawn(2000, self.count)

    def drawn(self, stream: int, count: int) -> Coupling:
        """Pairs of the teacher."""
        noise = StepNoise(self.seed + stream, 1).normal(torch.empty(count, 2, 1, 1, dtype=torch.float64))
        return Coupling(noise, TEACHER(self.teacher, noise))

    def inverted(self, count: int) -> Coupling:
        """Real points and the noise that the teacher's flow makes of them."""
        real = self.oracle.sample(count, StepNoise(self.seed + 4000, 1))
        return Coupling(TEACHER.invert(self.teacher, real), real)

    @property
    def teacher(self) -> Any:
        """Whose pairs they are."""
        return self.oracle if self.exact else self.denoiser

    @property
    def own_distance(self) -> float:
        """Energy distance x 1000 of the teacher's own held-out points to the modes."""
        return distance_to(self.oracle, self.held_out.images.flatten(1).numpy())

    @cached_property
    def denoiser(self) -> EDMPrecond:
        """What a teacher's weights stand for here: a network trained on the exact denoiser's points."""
        config = PointTraining(iterations=self.first, batch=BATCH, seed=self.seed, levels=LEVELS, sigma_data=PLANE)
        start = point_denoiser(128, 3, self.seed, sigma_data=PLANE)
        return train(start, lambda n, noise: (self.oracle.sample(n, noise).float(), UNCONDITIONAL), config)

    def flow(self, method: Any, updates: int, lr: float, *, fresh: bool = False, pairs: Coupling | None = None) -> Any:
        """A flow after so many updates, from the denoiser's weights or the network's first; the rate falls to 0."""
        start = point_denoiser(128, 3, self.seed + 3000, sigma_data=PLANE) if fresh else self.denoiser
        run = PointRun(
            iterations=max(updates, 1), batch=BATCH, lr=lr, seed=self.seed, ema=EmaConfig(halflife_images=20 * BATCH)
        )
        parts = Parts(flow=Trained(module=flow_of(start)))
        return distil(method, parts, mixture_points(self.oracle), run, pairs or self.learnt)

    def error(self, flow: Any, sampler: Any) -> float:
        """1000 E|x - x'|^2 of a flow's points and the teacher's, from the same held-out noise."""
        return 1000 * float((self.made(flow, sampler) - self.held_out.images).square().flatten(1).sum(1).mean())

    def distance(self, flow: Any, sampler: Any) -> float:
        """Energy distance x 1000 of a flow's points to the modes, exactly."""
        return distance_to(self.oracle, self.made(flow, sampler).flatten(1).numpy())

    def made(self, flow: Any, sampler: Any) -> Tensor:
        """A flow's points from the held-out noise, float64."""
        points: Tensor = sampler(flow, self.held_out.latents)
        return points.double()
