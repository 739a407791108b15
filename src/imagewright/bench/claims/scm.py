"""sCM: consistency in continuous time, against discrete consistency at few and at many steps (2410.11081)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, how_many_times
from imagewright.bench.claims.plane import PointNetwork, PointTraining, distance, real_points, sampled, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
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
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig
from imagewright.types import Frozen, Method, Parts, Trained, UserError

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
PASSES = 4_200
"""What each training may cost: passes of one batch through the network. Backward counts two, the teacher as one."""
HUBER = Distance(kind="pseudo_huber", huber_c=0.03)
DIVERGED = 1e6
"""Score of a training whose numbers stopped being finite."""
RESTLESS = 64.0
"""How much faster than the others' the waves of the time embedding turn that stands for Fourier scale 16."""
SCD = ContinuousConsistencyDistillation(noise_levels=LogNormal(mean=-0.5, std=1.4), warmup=0.25)
SCT = ContinuousConsistencyTraining(noise_levels=SCD.noise_levels, warmup=SCD.warmup, sigma_data=SIGMA_DATA)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its own best settings of the search on tuning seeds.

    passes: what an update costs. restless: from the denoiser with the fast embedding. fixed: weight 1 / sigma alone.
    trainings: on each seed, from the same weights on other points and noises; their mean is the score.
    """

    method: Method
    lr: float
    passes: float
    restless: bool = False
    fixed: bool = False
    trainings: int = 1

    @property
    def updates(self) -> int:
        """Of the whole training."""
        return round(PASSES / self.passes)


def continuous(method: Method, lr: float, **more: Any) -> Contender:
    """sCD or sCT: a call, a backward pass, a Jacobian-vector product (measured: two calls); sCD's teacher one more."""
    taught = isinstance(method, ContinuousConsistencyDistillation)
    return Contender(method=method, lr=lr, passes=6 if taught else 5, **more)


def discrete(points: int, lr: float, decay: float, **more: Any) -> Contender:
    """CD: a Heun step, two further calls and a backward pass."""
    method = ConsistencyDistillation(grid_points=points, target_decay=decay, distance=HUBER)
    return Contender(method=method, lr=lr, passes=6, **more)


CONTENDERS = {
    "sCD": continuous(SCD, 3e-4, trainings=2),
    "CD, N = 18": discrete(18, 6e-3, 0.95, trainings=2),
    "CD, N = 1024": discrete(1024, 3e-4, 0.0, trainings=2),
    "sCT": continuous(SCT, 3e-4),
    "sCD, tangent as it is": continuous(replace(SCD, tangent="none"), 1e-4),
    "sCD, weight 1 / sigma": continuous(SCD, 3e-4, fixed=True),
    "sCD, restless embedding": continuous(SCD, 3e-4, restless=True),
}


class PriorWeight(nn.Module):
    """No learnt weight: w = 0, so that 1 / sigma is all; as the method's v = w - ln(sigma D), [N] -> [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, t: Tensor) -> Tensor:
        return -(SIGMA_DATA * t.tan() * 2).log() + 0 * self.nothing


def ring(seed: int) -> GaussianMixture:
    """Eight modes on a circle of radius 1, turned by a random angle."""
    turn = StepNoise(seed, 4).uniform(torch.empty(1, dtype=torch.float64))[0]
    angles = (torch.arange(8, dtype=torch.float64) + turn) * 2 * math.pi / 8
    return GaussianMixture(torch.stack([angles.cos(), angles.sin()], 1).reshape(8, 2, 1, 1), 0.15)


def start(seed: int, oracle: GaussianMixture, iterations: int, restless: bool = False) -> EDMPrecond:
    """The denoiser from whose weights every contender starts, with TrigFlow's time as label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PointNetwork(WIDTH, DEPTH)
        if restless:
            network.frequencies.mul_(RESTLESS)
        untrained = EDMPrecond(network, sigma_data=SIGMA_DATA, noise_label="angle")
    levels = LogNormal(mean=-0.5, std=1.4)
    config = PointTraining(iterations=iterations, seed=seed, levels=levels, sigma_data=SIGMA_DATA)
    return train(untrained, mixture_points(oracle), config)


def parts_of(contender: Contender, denoiser: EDMPrecond, oracle: GaussianMixture) -> Parts:
    """As the methods make them, but with an exact teacher."""
    teacher = Frozen(module=ExactTeacher(oracle))
    if isinstance(contender.method, ConsistencyDistillation):
        return consistency_parts(ConsistencyModel.from_denoiser(denoiser), None, HUBER, teacher=teacher)
    student = ContinuousConsistencyModel.from_denoiser(denoiser)
    weighting = PriorWeight() if contender.fixed else TimeWeight()
    more = {"teacher": teacher} if isinstance(contender.method, ContinuousConsistencyDistillation) else {}
    betas = (0.9, 0.99)  # as in all recipes
    return Parts(
        student=Trained(module=student, betas=betas),
        weighting=Trained(module=weighting, ema=False, betas=betas),
        **more,
    )


def trained(contender: Contender, denoiser: EDMPrecond, oracle: GaussianMixture, seed: int, updates: int) -> nn.Module:
    """The averaged student. Raises UserError when a loss or tangent stops being finite."""
    average = EmaConfig(halflife_images=10_000)
    pace = PointRun(iterations=updates, batch=256, lr=contender.lr, seed=seed, ema=average)
    return distil(contender.method, parts_of(contender, denoiser, oracle), mixture_points(oracle), pace)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance of one-step points to real ones, after trainings of equal cost from the same weights."""
    full = budget == "full"
    count = 6000 if full else 100
    oracle = ring(seed)
    reference = real_points(oracle, seed + 1000, 2 * count)
    starts = {restless: start(seed, oracle, 1000 if full else 3, restless) for restless in (False, True)}

    def score(contender: Contender, training: int) -> float:
        try:
            updates = contender.updates if full else 3
            student = trained(contender, starts[contender.restless], oracle, seed + 3000 + 1000 * training, updates)
        except UserError:
            return DIVERGED
        points = sampled(student, MultistepConsistency(clip=False), seed + 2000, count)  # type: ignore[arg-type]
        return distance(points, reference)

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
        *(
            Check(
                says=f"sCD is below discrete distillation at N = {points}",
                effect=how_many_times("sCD", f"CD, N = {points}"),
                scale="ratio",
            )
            for points in (18, 1024)
        ),
        *(
            Check(says=f"it is worse {how}", effect=how_many_times("sCD", f"sCD, {name}"), scale="ratio")
            for how, name in (
                ("with the tangent as it is", "tangent as it is"),
                ("with the weight 1 / sigma alone", "weight 1 / sigma"),
                ("with a restless embedding", "restless embedding"),
            )
        ),
        Check(says="sCT is within 1.5 times sCD", effect=how_many_times("sCT", "sCD"), scale="ratio", margin=1 / 1.5),
    ),
)
