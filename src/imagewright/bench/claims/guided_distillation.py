"""Guided distillation: one student of every strength, in few calls, against its teacher's guided steps (2210.03142)."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, how_many_times
from imagewright.bench.claims.plane import PointTraining, distance, sampled, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil
from imagewright.bench.claims.told import told_denoiser
from imagewright.guidance import classifier_free
from imagewright.methods.guided_distillation import GuidedDistillation, guided_sampler
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.weighted import GuidedDenoiser, at_weight
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig
from imagewright.types import Average, Condition, Frozen, Parts, Trained

SIGMA_DATA = 0.9
STRENGTHS = (1.0, 1.3, 2.0, 3.0, 5.0)
"""1 + w for the paper's w of 0, 0.3, 1, 2 and 4."""
CALLS = (8, 4, 2, 1)
BATCH = 256
LR, LR_HALVING = 3e-3, 3e-3
FIRST, HALVING = 1200, 150
"""Updates of stage 1, and of a halving; those to two calls and to one take twice as many, as published."""
REFERENCE = Heun(num_steps=48)


def two_classes(seed: int) -> GaussianMixture:
    """Eight modes on two circles, of one class and the other in turns."""
    turn = StepNoise(seed, 4).uniform(torch.empty(1, dtype=torch.float64))[0]
    angles = (torch.arange(8, dtype=torch.float64) + turn) * 2 * torch.pi / 8
    radius = torch.tensor([1.0, 1.4], dtype=torch.float64).repeat(4)
    means = torch.stack([radius * angles.cos(), radius * angles.sin()], 1).reshape(8, 2, 1, 1)
    return GaussianMixture(means, 0.15, classes=torch.arange(8) % 2)


class Trainings:
    """Both stages of one seed on points of the oracle, one training after the other."""

    def __init__(self, oracle: GaussianMixture, seed: int, full: bool) -> None:
        self.oracle, self.seed, self.full = oracle, seed, full

    def draw(self, n: int, noise: StepNoise) -> tuple[Tensor, Condition]:
        cond = Condition(label=noise.integers(2, torch.empty(n)))
        return self.oracle.sample(n, noise, cond).float(), cond

    def start(self) -> EDMPrecond:
        """A denoiser that knows both classes."""
        config = PointTraining(
            iterations=500 if self.full else 3, batch=BATCH, seed=self.seed, levels=LogNormal(mean=-0.5, std=1.4),
            sigma_data=SIGMA_DATA,
        )  # fmt: skip
        return train(told_denoiser(128, 3, self.seed, SIGMA_DATA, classes=2), self.draw, config)

    def students(self, first: EDMPrecond, lr: float = LR, lr_halving: float = LR_HALVING) -> dict[int, Any]:
        """The student of every number of calls: the guided one, then its halvings, each from the one before."""
        frozen = Frozen(module=ExactTeacher(self.oracle))
        before = Average(module=copy.deepcopy(first))
        parts = Parts(student=Trained(module=first), guided=frozen, teacher=before)
        # Almost all of the run is stage 1: the share behind it is less than a step.
        student = self._learnt(
            GuidedDistillation(start_steps=CALLS[0], end_steps=CALLS[0], first=1 - 1e-9), parts, FIRST, lr
        )
        made = {}
        for calls in CALLS:
            method = GuidedDistillation(start_steps=calls, end_steps=calls, first=0.0)
            parts = Parts(student=Trained(module=copy.deepcopy(student)), teacher=Average(module=student))
            made[calls] = student = self._learnt(method, parts, HALVING * (2 if calls <= 2 else 1), lr_halving, calls)
        return made

    def _learnt(self, method: GuidedDistillation, parts: Parts, updates: int, lr: float, stream: int = 0) -> Any:
        parts.student.requires_grad_(True)
        pace = PointRun(
            iterations=updates if self.full else 2, batch=BATCH, lr=lr, seed=self.seed + 3000 + stream, cooldown=False,
            ema=EmaConfig(halflife_images=20 * BATCH),
        )  # fmt: skip
        return distil(replace(method, anneal=True), parts, self.draw, pace)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance to guided points of the exact flow, mean over strengths, by number of steps."""
    full = budget == "full"
    oracle, count = two_classes(seed), 1200 if full else 60
    labels = Condition(label=torch.arange(count) % 2)
    trainings = Trainings(oracle, seed, full)
    first = trainings.start()
    exact = ExactTeacher(oracle)

    def drawn(model: Any, sampler: Any, stream: int = 2000) -> Any:
        return sampled(model, sampler, seed + stream, count, labels)

    wanted = {w: drawn(classifier_free(exact, w), REFERENCE, 1000) for w in STRENGTHS}

    def row(name: str, calls: int, of: Any, sampler: Any, cost: int) -> Row:
        scores = {w: distance(drawn(of(w), sampler), wanted[w]) for w in STRENGTHS}
        more = {f"at {w:g}": score for w, score in scores.items()}
        return Row(name=f"{name}, {calls}", score=statistics.fmean(scores.values()), cost=cost, curve=name, more=more)

    rows = [row("the same flow", 64, lambda w: classifier_free(exact, w), Heun(num_steps=32), 126)]
    told = trainings.students(GuidedDenoiser.from_denoiser(first, (STRENGTHS[0], STRENGTHS[-1])))
    deaf = trainings.students(copy.deepcopy(first))  # whose network has no place for the strength
    for calls in CALLS:
        sampler = guided_sampler(calls)
        rows.append(row("student", calls, lambda w, calls=calls: at_weight(told[calls], w), sampler, calls))
        rows.append(row("teacher", calls, lambda w: classifier_free(exact, w), sampler, 2 * calls))
    rows.append(row("not told the strength", 4, lambda w: deaf[4], guided_sampler(4), 4))
    return rows


CLAIM = Claim(
    key="guided_distillation",
    paper="2210.03142",
    headline="ImageNet-64: four steps of one network near the 1,024 guided steps of two, at every strength",
    miniature="Two classes in the plane with exact denoisers, of class and of both. One small student of all strengths "
    "from 1 to 5 (w from 0 to 4): 1,200 updates of stage 1, then 150 a halving to 8, 4, 2 and 1 steps, twice as many "
    "for the last two; against as many steps of the guided teacher, which cost two calls each. Control: a student that "
    "is not told the strength, trained alike.",
    measure="energy distance x 1000 to the guided flow's points, mean over five strengths",
    cost="calls per point",
    run=run,
    checks=(
        *(
            Check(
                says=f"in {calls} step{'s' if calls > 1 else ''} the student is nearer than the guided teacher",
                effect=how_many_times(f"student, {calls}", f"teacher, {calls}"),
                scale="ratio",
            )
            for calls in CALLS
        ),
        Check(
            says="and at four at most a third as far as a student that is not told the strength",
            effect=how_many_times("student, 4", "not told the strength, 4"),
            scale="ratio",
            margin=3.0,
        ),
    ),
)
