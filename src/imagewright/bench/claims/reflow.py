"""Reflow in the plane: a teacher's pairs, flows that learn them, and how far their ends are from its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Row
from imagewright.bench.claims.plane import PointTraining, point_denoiser
from imagewright.bench.claims.plane_training import PointRun, distil, mixture_points
from imagewright.bench.claims.rings import distance_to, ring
from imagewright.bench.claims.students import LEVELS
from imagewright.bench.claims.trial import Trial
from imagewright.models.flow import flow_of
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.schedules import karras_sigmas
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig
from imagewright.types import Coupling, Parts, Trained

BATCH = 256
TEACHER = Heun(levels=tuple(karras_sigmas(30, 0.002, 80.0).tolist()))
"""How pairs are drawn and, upwards, real points inverted."""
ENERGY = "energy distance x 1000"


@dataclass(frozen=True, kw_only=True)
class Reflow:
    """One seed: eight modes on a circle, pairs of a denoiser, and a trained denoiser to start flows from.

    pairs: to learn from. count: held-out noises, on which flows are judged. first: updates of the trained denoiser.
    exact: whether the modes' exact denoiser draws the pairs, or the trained one.
    """

    seed: int
    pairs: int
    count: int
    first: int = 0
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
        warm = PointTraining(iterations=self.first, batch=BATCH, levels=LEVELS)
        return Trial(seed=self.seed, oracle=self.oracle, count=self.count, warm=warm).start

    def flow(self, method: Any, updates: int, lr: float, *, fresh: bool = False, pairs: Coupling | None = None) -> Any:
        """A flow after so many updates, from the denoiser's weights or the network's first."""
        start = point_denoiser(128, 3, self.seed + 3000) if fresh else self.denoiser
        return self.trained(method, Parts(flow=Trained(module=flow_of(start))), updates, lr, pairs)

    def trained(self, method: Any, parts: Parts, updates: int, lr: float, pairs: Coupling | None = None) -> Any:
        """What a method makes of the pairs; the rate falls to 0."""
        run = PointRun(
            iterations=max(updates, 1), batch=BATCH, lr=lr, seed=self.seed, ema=EmaConfig(halflife_images=20 * BATCH)
        )
        return distil(method, parts, mixture_points(self.oracle), run, pairs or self.learnt)

    def row(self, name: str, flow: Any, sampler: Any, energy: str = ENERGY) -> Row:
        """How far a flow's points are from its teacher's and, as a further number, from the modes."""
        more = {energy: self.distance(flow, sampler)}
        return Row(name=name, score=self.error(flow, sampler), cost=sampler.nfe, more=more)

    def error(self, flow: Any, sampler: Any, pairs: Coupling | None = None) -> float:
        """1000 E|x - x'|^2 of a flow's points and the teacher's, from the same noise: the held-out one."""
        pairs = pairs or self.held_out
        made = sampler(flow, pairs.latents).double()
        return 1000 * float((made - pairs.images).square().flatten(1).sum(1).mean())

    def distance(self, flow: Any, sampler: Any) -> float:
        """Energy distance x 1000 of a flow's points to the modes, exactly."""
        made: Tensor = sampler(flow, self.held_out.latents)
        return distance_to(self.oracle, made.double().flatten(1).numpy())
