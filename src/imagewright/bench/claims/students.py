"""Few-step students at equal cost: what the claims of consistency models share.

Cost is counted as in `trial`, in passes of the one network that all have.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from imagewright.bench.claims.plane import PointTraining, distance
from imagewright.bench.claims.plane_training import ExactTeacher
from imagewright.bench.claims.trial import Points, Trial
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.pairs import consistency_parts
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerKind
from imagewright.tuning.consistency_times import TimesSearch, search_times
from imagewright.types import UNCONDITIONAL, Average, Method, Parts, Trained

COST = {"CD": 6, "PD": 5, "CT": 4, "MCD": 5}
"""Passes of an update: student 3, target 1 (not PD's), teacher 2 (CD, PD) or 1 (MCD) or 0 (CT)."""
ONE_STEP = MultistepConsistency(clip=False)
LEVELS = LogNormal(mean=-0.5, std=1.4)
"""Of the trained denoisers that students start from."""


@dataclass(frozen=True, kw_only=True)
class Contest(Trial):
    """A trial of few-step students, whose noise is that of training steps."""

    batch: int = 256

    def denoiser(self, iterations: int) -> EDMPrecond:
        """A trained denoiser, from whose weights students of the exact one start."""
        return replace(self, warm=PointTraining(iterations=iterations, batch=self.batch, levels=LEVELS)).start

    def learnt(
        self,
        method: Method,
        parts: Parts,
        cost: int,
        lr: float,
        kind: OptimizerKind = "radam",
        share: float = 1.0,
        stream: int = 0,
    ) -> Any:
        """The product after updates of `cost` passes each for a share of the budget; the rate falls to 0 over them."""
        updates, ema = max(int(share * self.passes / cost), 1), EmaConfig(halflife_images=40 * self.batch)
        pace: dict[str, Any] = {"batch": self.batch, "kind": kind, "seed": self.seed + stream, "ema": ema}
        return self.trained(method, parts, updates, lr, **pace)

    def distilled(self, first: EDMPrecond, method: ConsistencyDistillation, lr: float) -> Any:
        """CD of the exact denoiser, from the weights of a trained one."""
        student = ConsistencyModel.from_denoiser(first)
        parts = consistency_parts(student, None, method.distance, teacher=self.teacher)
        return self.learnt(method, parts, COST["CD"], lr)

    def halved(self, first: EDMPrecond, method: ProgressiveDistillation, lr: float) -> Any:
        """PD of the exact denoiser, from the same weights, as published: each stage has its own optimiser and decay."""
        stages = method.stages
        student, teacher = copy.deepcopy(first), Average(module=ExactTeacher(self.oracle))
        for stage, steps in enumerate(sorted(set(stages), reverse=True)):
            parts = Parts(student=Trained(module=student.requires_grad_(True)), teacher=teacher)
            one = ProgressiveDistillation(start_steps=steps, end_steps=steps)
            share = stages.count(steps) / len(stages)
            student = self.learnt(one, parts, COST["PD"], lr, "adam", share, 6000 + stage)
            teacher = Average(module=copy.deepcopy(student))
        return student

    def drawn(self, model: Any, sampler: Any, stream: int = 2000, count: int | None = None) -> Points:
        """A sample of a model, [count, D]; all contenders share latents and noise."""
        noise = StepNoise(self.seed + stream, 1)
        latents = noise.normal(self.oracle.means.new_empty(count or self.count, *self.oracle.means.shape[1:]))
        points: Points = sampler(model, latents, UNCONDITIONAL, noise=noise).flatten(1).double().numpy()
        return points

    def score(self, model: Any, sampler: Any = ONE_STEP) -> float:
        """Energy distance x 1000 of a model's sample to the reference."""
        return self.distance(self.drawn(model, sampler))

    def floor(self) -> float:
        """The score of as many real ones."""
        return self.distance(self.real(5000))

    def searched(self, model: Any, search: TimesSearch, count: int) -> tuple[float, ...]:
        """The levels that `tune times` would find for consistency sampling, by a sample of so many of its own."""
        own = self.real(3000, count)

        def measured(sigmas: tuple[float, ...]) -> float:
            sampler = MultistepConsistency(sigmas=sigmas, clip=False)
            return distance(self.drawn(model, sampler, 4000, self.count // 2), own)

        return search_times(measured, model.sigma_min, model.sigma_max, search).sigmas

    def two_steps(self, model: Any) -> MultistepConsistency:
        """The sampler with the second level that is found."""
        return MultistepConsistency(sigmas=self.searched(model, TimesSearch(steps=2), self.count), clip=False)
