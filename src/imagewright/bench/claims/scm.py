"""sCM: consistency in continuous time, against discrete consistency at few and at many steps (2410.11081)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Claim, Row, times
from imagewright.bench.claims.plane import PLANE, PointTraining, sampled, train
from imagewright.bench.claims.plane_training import mixture_points
from imagewright.bench.claims.rings import ring
from imagewright.bench.claims.students import LEVELS, ONE_STEP
from imagewright.bench.claims.trial import Contender, Trial
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.continuous_consistency import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
)
from imagewright.methods.distances import Distance
from imagewright.methods.pairs import consistency_parts
from imagewright.models.consistency import ConsistencyModel, ContinuousConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks.time_weight import TimeWeight
from imagewright.training.config import EmaConfig
from imagewright.types import Parts, Trained, UserError

PASSES = 4_200
"""What each training may cost: passes of one batch through the network. Backward counts two, the teacher as one."""
HUBER = Distance(kind="pseudo_huber", huber_c=0.03)
DIVERGED = 1e6
"""Score of a training whose numbers stopped being finite."""
RESTLESS = 64.0
"""How much faster than the others' the waves of the time embedding turn that stands for Fourier scale 16."""
SCD = ContinuousConsistencyDistillation(noise_levels=LEVELS, warmup=0.25)
SCT = ContinuousConsistencyTraining(noise_levels=SCD.noise_levels, warmup=SCD.warmup, sigma_data=PLANE)


@dataclass(frozen=True, kw_only=True)
class Variant(Contender):
    """A method with its own best settings of the search on tuning seeds.

    restless: from the denoiser with the fast embedding. fixed: weight 1 / sigma alone. trainings: on each seed, from
    the same weights on other points and noises; their mean is the score.
    """

    restless: bool = False
    fixed: bool = False
    trainings: int = 1


def passes(method: object) -> int:
    """Of an update. sCD and sCT: a call, a backward pass, a Jacobian-vector product (measured: two calls), and sCD's
    teacher. CD: a Heun step, two further calls and a backward pass."""
    return 5 if isinstance(method, ContinuousConsistencyTraining) else 6


def discrete(points: int, decay: float) -> ConsistencyDistillation:
    """CD on a grid."""
    return ConsistencyDistillation(grid_points=points, target_decay=decay, distance=HUBER)


CONTENDERS = {
    "sCD": Variant(method=SCD, lr=3e-4, trainings=2),
    "CD, N = 18": Variant(method=discrete(18, 0.95), lr=6e-3, trainings=2),
    "CD, N = 1024": Variant(method=discrete(1024, 0.0), lr=3e-4, trainings=2),
    "sCT": Variant(method=SCT, lr=3e-4),
    "sCD, tangent as it is": Variant(method=replace(SCD, tangent="none"), lr=1e-4),
    "sCD, weight 1 / sigma": Variant(method=SCD, lr=3e-4, fixed=True),
    "sCD, restless embedding": Variant(method=SCD, lr=3e-4, restless=True),
}


class PriorWeight(nn.Module):
    """No learnt weight: w = 0, so that 1 / sigma is all; as the method's v = w - ln(sigma D), [N] -> [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor) -> Tensor:
        return -(PLANE * t.tan() * 2).log() + 0 * self.nothing


def start(trial: Trial, iterations: int, restless: bool) -> EDMPrecond:
    """The denoiser from whose weights every contender starts, with TrigFlow's time as label."""
    network: Any = trial.untrained()
    if restless:
        network.frequencies.mul_(RESTLESS)
    untrained = EDMPrecond(network, sigma_data=PLANE, noise_label="angle")
    config = PointTraining(iterations=iterations, seed=trial.seed, levels=LEVELS)
    return train(untrained, mixture_points(trial.oracle), config)


def parts_of(contender: Variant, denoiser: EDMPrecond, trial: Trial) -> Parts:
    """As the methods make them, but with an exact teacher."""
    if isinstance(contender.method, ConsistencyDistillation):
        return consistency_parts(ConsistencyModel.from_denoiser(denoiser), None, HUBER, teacher=trial.teacher)
    student = ContinuousConsistencyModel.from_denoiser(denoiser)
    weighting = PriorWeight() if contender.fixed else TimeWeight()
    more = {} if isinstance(contender.method, ContinuousConsistencyTraining) else {"teacher": trial.teacher}
    betas = (0.9, 0.99)  # as in all recipes
    return Parts(
        student=Trained(module=student, betas=betas),
        weighting=Trained(module=weighting, ema=False, betas=betas),
        **more,
    )


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance of one-step points to real ones, after trainings of equal cost from the same weights."""
    affordable, count, warm = (PASSES, 6000, 1000) if budget == "full" else (18, 100, 3)
    trial = Trial(seed=seed, oracle=ring(seed), count=count)
    starts = {restless: start(trial, warm, restless) for restless in (False, True)}

    def score(contender: Variant, training: int) -> float:
        parts = parts_of(contender, starts[contender.restless], trial)
        pace: dict[str, Any] = {"seed": seed + 3000 + 1000 * training, "ema": EmaConfig(halflife_images=10_000)}
        try:
            updates = affordable // passes(contender.method)
            student = trial.trained(contender.method, parts, updates, contender.lr, **pace)
        except UserError:  # a loss or tangent stopped being finite
            return DIVERGED
        return trial.distance(sampled(student, ONE_STEP, seed + 2000, count))

    rows = []
    for name, contender in CONTENDERS.items():
        scores = [score(contender, training) for training in range(contender.trainings)]
        rows.append(Row(name=name, score=statistics.fmean(scores), cost=PASSES, more={"worst training": max(scores)}))
    return rows


CLAIM = Claim(
    key="scm",
    paper="2410.11081",
    headline="CIFAR-10 FID 3.66 (sCD) and 2.97 (sCT), ImageNet-64 2.44 and 2.04, at one step",
    miniature="8 modes in the plane, exact velocity (sCD) or none (sCT), all from the weights of one small denoiser; "
    "trainings of equal cost (700 updates of sCD and CD), each contender with its own best settings.",
    measure="energy distance x 1000",
    cost="network passes of a training",
    run=run,
    checks=(
        *(times(f"sCD is below discrete distillation at N = {n}", "sCD", f"CD, N = {n}") for n in (18, 1024)),
        times("it is worse with the tangent as it is", "sCD", "sCD, tangent as it is"),
        times("it is worse with the weight 1 / sigma alone", "sCD", "sCD, weight 1 / sigma"),
        times("it is worse with a restless embedding", "sCD", "sCD, restless embedding"),
        times("sCT is within 1.5 times sCD", "sCT", "sCD", by=1 / 1.5),
    ),
)
