"""sCM: consistency in continuous time, against discrete consistency at few and at many steps (2410.11081)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

from imagewright.bench.claims.claim import Budget, Check, Claim, Row
from imagewright.bench.claims.plane import PointNetwork, PointTraining, distance, real_points, sampled, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.bench.claims.restart import ring
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
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig
from imagewright.types import Frozen, Method, Parts, Trained, UserError

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
LEVELS = LogNormal(mean=-0.5, std=1.4)
HUBER = Distance(kind="pseudo_huber", huber_c=0.03)
DIVERGED = 1e6
"""Score of a training whose numbers stopped being finite."""
RESTLESS = 64.0
"""How much faster than the others' the waves of the time embedding turn that stands for Fourier scale 16."""


def start(seed: int, oracle: GaussianMixture, iterations: int, restless: bool = False) -> EDMPrecond:
    """The denoiser from whose weights every contender starts, with TrigFlow's time as label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PointNetwork(WIDTH, DEPTH)
        if restless:
            network.frequencies.mul_(RESTLESS)
        untrained = EDMPrecond(network, sigma_data=SIGMA_DATA, noise_label="angle")
    config = PointTraining(iterations=iterations, seed=seed, levels=LEVELS, sigma_data=SIGMA_DATA)
    return train(untrained, mixture_points(oracle), config)


def continuous_parts(denoiser: EDMPrecond, teacher: ExactTeacher | None) -> Parts:
    """Student, weighting and teacher as the method's own `parts` makes them, with an exact teacher."""
    student = ContinuousConsistencyModel.from_denoiser(denoiser)
    more = {} if teacher is None else {"teacher": Frozen(module=teacher)}
    return Parts(student=Trained(module=student), weighting=Trained(module=TimeWeight(), ema=False), **more)


def discrete_parts(denoiser: EDMPrecond, teacher: ExactTeacher) -> Parts:
    """As `methods.consistency`, with an exact teacher."""
    return consistency_parts(ConsistencyModel.from_denoiser(denoiser), None, HUBER, teacher=Frozen(module=teacher))


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance of one-step points to real ones, after the same number of updates from the same weights."""
    full = budget == "full"
    iterations, count = (5000, 10_000) if full else (3, 100)
    oracle = ring(seed)
    reference, teacher = real_points(oracle, seed + 1000, 2 * count), ExactTeacher(oracle)
    steady, restless = (start(seed, oracle, 2000 if full else 3, r) for r in (False, True))
    pace = PointRun(iterations=iterations, batch=256, lr=1e-3, seed=seed, ema=EmaConfig(halflife_images=10_000))
    scd = ContinuousConsistencyDistillation(noise_levels=LEVELS, warmup=0.25)
    sct = ContinuousConsistencyTraining(noise_levels=LEVELS, warmup=0.25, sigma_data=SIGMA_DATA)

    def row(name: str, method: Method, parts: Parts) -> Row:
        try:
            student = distil(method, copy.deepcopy(parts), mixture_points(oracle), pace)
        except UserError:  # a loss or tangent that is not finite
            return Row(name=name, score=DIVERGED, cost=iterations)
        points = sampled(student, MultistepConsistency(clip=False), seed + 2000, count)  # type: ignore[arg-type]
        return Row(name=name, score=distance(points, reference), cost=iterations)

    learnt = continuous_parts(steady, teacher)
    return [
        row("sCD", scd, learnt),
        row("CD, N = 18", ConsistencyDistillation(grid_points=18, distance=HUBER), discrete_parts(steady, teacher)),
        row("CD, N = 1024", ConsistencyDistillation(grid_points=1024, distance=HUBER), discrete_parts(steady, teacher)),
        row("sCT", sct, continuous_parts(steady, None)),
        row("sCD, tangent as it is", dataclasses.replace(scd, tangent="none"), learnt),
        row("sCD, restless embedding", scd, continuous_parts(restless, teacher)),
        row("sCD, no warm-up", dataclasses.replace(scd, warmup=0.0), learnt),
    ]


CLAIM = Claim(
    key="scm",
    paper="2410.11081",
    headline="CIFAR-10 FID 3.66 (sCD) and 2.97 (sCT), ImageNet-64 2.44 and 2.04, at one step",
    miniature="8 modes in the plane, exact velocity (sCD) or none (sCT), all from the weights of one small denoiser.",
    measure="energy distance x 1000",
    cost="updates",
    run=run,
    checks=(
        Check(
            says="sCD is below discrete distillation at N = 18 and at N = 1024",
            holds=lambda r: r.score("sCD") < min(r.score("CD, N = 18"), r.score("CD, N = 1024")),
        ),
        Check(
            says="it is worse with the tangent as it is, with a restless embedding, and without warm-up",
            holds=lambda r: r.score("sCD") < min(row.score for row in r.rows if row.name.startswith("sCD,")),
        ),
        Check(says="sCT is within 1.5 times sCD", holds=lambda r: r.score("sCT") < 1.5 * r.score("sCD")),
    ),
    tried="On another seed (10) sCD was very sensitive to the law of t: with mean -0.5 and deviation 1.4 it came to "
    "0.7 to 0.8 after 6,000 updates (CD at N = 18: 1.9), with each neighbouring law to about three times that; a rate "
    "of 3e-3 diverges. That law and 1e-3 are used here. sCT stayed behind sCD at every setting tried.",
)
