"""Few-step students at equal cost: what the claims of consistency models share.

Cost is counted in passes of the one network that all have: a call is 1, a gradient through it 2 more, whoever's
weights they are (teacher, target or student; the exact teacher's calls too). A contender's updates are its budget of
passes over the passes of an update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.bench.claims.plane import PointNetwork, PointTraining, distance, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.pairs import consistency_parts
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles.mixture import Mixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerKind
from imagewright.tuning.consistency_times import TimesSearch, search_times
from imagewright.types import UNCONDITIONAL, Average, Frozen, Method, Parts, Trained

Points = npt.NDArray[np.float64]

COST = {"CD": 6, "PD": 5, "CT": 4, "MCD": 5}
"""Passes of an update: student 3, target 1 (not PD's), teacher 2 (CD, PD) or 1 (MCD) or 0 (CT)."""
ONE_STEP = MultistepConsistency(clip=False)
PLANE = 0.7
"""sigma_data of `rings.ring`."""
LEVELS = LogNormal(mean=-0.5, std=1.4)
"""Of the trained denoisers that students start from."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One seed: the data, the samples to compare with, and how much training each contender gets.

    passes: each contender's budget, in passes of the network over a batch. count: of a sample; the reference has twice
    as many. network: the untrained network of all contenders.
    """

    seed: int
    passes: int
    count: int
    oracle: Mixture
    batch: int = 256
    sigma_data: float = PLANE
    network: Callable[[], nn.Module] = lambda: PointNetwork(128, 3)

    def untrained(self) -> nn.Module:
        """The network, with the weights of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.network()

    def denoiser(self, iterations: int) -> EDMPrecond:
        """A trained denoiser, from whose weights students of the exact one start."""
        first = EDMPrecond(self.untrained(), sigma_data=self.sigma_data)
        config = PointTraining(
            iterations=iterations, batch=self.batch, seed=self.seed, levels=LEVELS, sigma_data=self.sigma_data
        )
        return train(first, lambda n, noise: (self.oracle.sample(n, noise).float(), UNCONDITIONAL), config)

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
        run = PointRun(
            iterations=max(int(share * self.passes / cost), 1), batch=self.batch, lr=lr, kind=kind,
            seed=self.seed + stream, ema=EmaConfig(halflife_images=40 * self.batch),
        )  # fmt: skip
        return distil(method, parts, mixture_points(self.oracle), run)  # type: ignore[arg-type]

    def distilled(self, first: EDMPrecond, method: ConsistencyDistillation, lr: float) -> Any:
        """CD of the exact denoiser, from the weights of a trained one."""
        student = ConsistencyModel.from_denoiser(first)
        parts = consistency_parts(student, None, method.distance, teacher=self.teacher)
        return self.learnt(method, parts, COST["CD"], lr)

    def halved(self, first: EDMPrecond, method: ProgressiveDistillation, lr: float) -> Any:
        """PD of the exact denoiser, from the same weights, as published: each stage has its own optimiser and decay."""
        stages = method.stages
        student, teacher = copy.deepcopy(first), Average(module=ExactTeacher(self.oracle))  # type: ignore[arg-type]
        for stage, steps in enumerate(sorted(set(stages), reverse=True)):
            parts = Parts(student=Trained(module=student.requires_grad_(True)), teacher=teacher)
            one = ProgressiveDistillation(start_steps=steps, end_steps=steps)
            share = stages.count(steps) / len(stages)
            student = self.learnt(one, parts, COST["PD"], lr, "adam", share, 6000 + stage)
            teacher = Average(module=copy.deepcopy(student))
        return student

    @property
    def teacher(self) -> Frozen:
        """The exact denoiser."""
        return Frozen(module=ExactTeacher(self.oracle))  # type: ignore[arg-type]

    def real(self, stream: int, count: int) -> Points:
        """Of the true distribution, [count, D]; streams are independent."""
        return _flat(self.oracle.sample(count, StepNoise(self.seed + stream, 2)))

    @cached_property
    def reference(self) -> Points:
        return self.real(1000, 2 * self.count)

    def drawn(self, model: Any, sampler: Any, stream: int = 2000, count: int | None = None) -> Points:
        """A sample of a model, [count, D]; all contenders share latents and noise."""
        noise = StepNoise(self.seed + stream, 1)
        latents = noise.normal(self.oracle.means.new_empty(count or self.count, *self.oracle.means.shape[1:]))
        return _flat(sampler(model, latents, UNCONDITIONAL, noise=noise))

    def score(self, model: Any, sampler: Any = ONE_STEP) -> float:
        """Energy distance x 1000 of a model's sample to the reference."""
        return distance(self.drawn(model, sampler), self.reference)

    def floor(self) -> float:
        """The score of as many real ones."""
        return distance(self.real(5000, self.count), self.reference)

    def two_steps(self, model: Any) -> MultistepConsistency:
        """The sampler whose second level `tune times` would find, on a sample of its own."""
        own = self.real(3000, self.count)

        def measured(sigmas: tuple[float, ...]) -> float:
            sampler = MultistepConsistency(sigmas=sigmas, clip=False)
            return distance(self.drawn(model, sampler, 4000, self.count // 2), own)

        found = search_times(measured, model.sigma_min, model.sigma_max, TimesSearch(steps=2))
        return MultistepConsistency(sigmas=found.sigmas, clip=False)


def _flat(samples: Tensor) -> Points:
    flat: Points = samples.flatten(1).double().numpy()
    return flat
