"""Align Your Flow: a map to any level is no worse with more calls, and better with a guided teacher (2506.14603)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from imagewright.bench.claims.autoguidance import GUIDE_AVERAGE, MAIN_AVERAGE, trees
from imagewright.bench.claims.claim import Budget, Check, Claim, Row, by_how_much, how_many_times
from imagewright.bench.claims.plane import PointTraining, distance, sampled, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.bench.claims.rings import distance_to, ring
from imagewright.bench.claims.told import told_denoiser
from imagewright.methods.align_your_flow import AlignYourFlow
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation
from imagewright.models.aligned import AlignedFlowMap
from imagewright.models.consistency import ContinuousConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.weighted import at_weight
from imagewright.networks.time_weight import TimeWeight
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import Jumps, MultistepConsistency
from imagewright.training.config import EmaConfig
from imagewright.tuning.jumps import JumpsSearch, search_jumps
from imagewright.types import Condition, Frozen, Method, Parts, Trained

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
CALLS = (1, 2, 4, 8, 16)
PASSES = 6
"""Of an update of each: the student's call, its gradient (2), a Jacobian-vector product (2), the teacher's call."""
UPDATES, TREE_UPDATES = 1200, 600
BETAS = (0.9, 0.99)
LEVELS = LogNormal(mean=-0.5, std=1.4)
AYF = AlignYourFlow(warmup=0.25)
SCD = ContinuousConsistencyDistillation(noise_levels=LEVELS, warmup=0.25)
LR_AYF, LR_SCD = 3e-3, 3e-4
TREE_SD, TREE_LEVELS = 0.4, LogNormal(mean=-2.3, std=1.5)
STRENGTHS = (1.0, 3.0)


def start(seed: int, oracle: GaussianMixture, iterations: int) -> EDMPrecond:
    """The denoiser from whose weights both students start; its network is told the straight path's time."""
    config = PointTraining(iterations=iterations, batch=256, seed=seed, levels=LEVELS, sigma_data=SIGMA_DATA)
    return train(told_denoiser(WIDTH, DEPTH, seed, SIGMA_DATA, "time"), mixture_points(oracle), config)


def learnt(method: Method, parts: Parts, draw: Any, updates: int, lr: float, seed: int, batch: int = 256) -> Any:
    """The averaged student."""
    pace = PointRun(iterations=updates, batch=batch, lr=lr, seed=seed, ema=EmaConfig(halflife_images=40 * batch))
    return distil(method, parts, draw, pace)


def aligned(
    method: AlignYourFlow, first: EDMPrecond, draw: Any, updates: int, lr: float, seed: int, **guides: nn.Module
) -> Any:
    """A map from the weights of a denoiser; guides: "teacher", and "weak" for one that is told the strength."""
    student = AlignedFlowMap.from_teacher(first, STRENGTHS if "weak" in guides else None)
    roles = {name: Frozen(module=module) for name, module in guides.items()}
    parts = Parts(student=Trained(module=student, betas=BETAS), **roles)
    return learnt(method, parts, draw, updates, lr, seed)


def consistent(first: EDMPrecond, oracle: GaussianMixture, updates: int, lr: float, seed: int) -> Any:
    """sCD of the exact velocity, from the same weights."""
    parts = Parts(
        student=Trained(module=ContinuousConsistencyModel.from_denoiser(first), betas=BETAS),
        weighting=Trained(module=TimeWeight(), ema=False, betas=BETAS),
        teacher=Frozen(module=ExactTeacher(oracle)),
    )
    return learnt(SCD, parts, mixture_points(oracle), updates, lr, seed)


def stops(calls: int) -> Jumps:
    """Even in the straight path's time."""
    return Jumps(num_steps=calls, shift=SIGMA_DATA, clip=False)


def by_calls(seed: int, full: bool) -> list[Row]:
    """Both students of the exact flow of a ring, at every number of calls with stops at the same levels."""
    oracle, count, updates = ring(seed), 3000 if full else 100, UPDATES if full else 3
    first = start(seed, oracle, 600 if full else 3)
    teacher, draw = ExactTeacher(oracle), mixture_points(oracle)
    students = {
        "AYF": aligned(AYF, first, draw, updates, LR_AYF, seed + 3000, teacher=teacher),
        "sCD": consistent(first, oracle, updates, LR_SCD, seed + 3000),
    }
    rows = []
    for name, student in students.items():
        for calls in CALLS:
            way: Any = stops(calls)
            if name == "sCD":
                way = MultistepConsistency(sigmas=way.stops(student.sigma_max), clip=False)
            points = sampled(student, way, seed + 2000, count)
            rows.append(Row(name=f"{name}, {calls}", score=distance_to(oracle, points), cost=calls, curve=name))
    return rows


def guided(seed: int, full: bool) -> list[Row]:
    """Students of trained denoisers of two branching classes, with a weak model as guide and without, at 4 calls.

    gamma and strength are found as `tune jumps` does, on points of their own.
    """
    oracle, iterations, count = trees(seed), 600 if full else 8, 1500 if full else 60

    def draw(n: int, noise: StepNoise) -> tuple[torch.Tensor, Condition]:
        cond = Condition(label=noise.integers(2, torch.empty(n)))
        return oracle.sample(n, noise, cond).float(), cond

    def fitted(width: int, steps: int, average: float, stream: int) -> EDMPrecond:
        config = PointTraining(
            iterations=steps, batch=256, lr=5e-3, seed=seed + stream, cooldown=False, levels=TREE_LEVELS,
            sigma_data=TREE_SD, ema=EmaConfig(halflife_images=average * steps * 256, rampup_ratio=None),
        )  # fmt: skip
        return train(told_denoiser(width, 4, seed + stream, TREE_SD, "time", classes=2), draw, config)

    main = fitted(64, iterations, MAIN_AVERAGE, 4000)
    weak = fitted(32, iterations // 8, GUIDE_AVERAGE, 4001)
    labels = Condition(label=torch.arange(count) % 2)
    wanted = {stream: real_points_of(oracle, seed + stream, 2 * count) for stream in (5000, 5001)}
    rows = [Row(name="real points", score=distance(real_points_of(oracle, seed + 5002, count), wanted[5000]), cost=0)]
    for name, guides in (("unguided", {}), ("autoguided", {"weak": weak})):
        student = aligned(
            AYF, main, draw, TREE_UPDATES if full else 3, LR_AYF, seed + 6000, teacher=main, **guides
        )  # fmt: skip

        def score(gamma: float, weight: float | None, student: Any = student, stream: int = 5001) -> float:
            asked = student if weight is None else at_weight(student, weight)
            way = Jumps(num_steps=4, shift=TREE_SD, gamma=gamma, clip=False)
            return distance(sampled(asked, way, seed + stream + 1000, count, labels), wanted[stream])

        found = search_jumps(score, JumpsSearch(steps=4, gammas=(0.0, 0.5), strengths=5), student.weights)
        more = {"gamma": found.gamma, "strength": 1.0 if found.weight is None else found.weight}
        rows.append(Row(name=name, score=score(found.gamma, found.weight, stream=5000), cost=4, more=more))
    return rows


def real_points_of(oracle: GaussianMixture, seed: int, count: int) -> Any:
    """Of both classes, [count, 2], in turns."""
    cond = Condition(label=torch.arange(count) % 2)
    return oracle.sample(count, StepNoise(seed, 2), cond).flatten(1).double().numpy()


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distances by number of calls, then with and without a guide."""
    return [*by_calls(seed, budget == "full"), *guided(seed, budget == "full")]


CLAIM = Claim(
    key="align_your_flow",
    paper="2506.14603",
    headline="ImageNet-512 FID 1.70 at four steps (sCD 1.84 there, and worse with more); without autoguidance 2.32",
    miniature="8 modes in the plane, exact velocity: a map to any level (AYF) and a consistency model (sCD) from the "
    "weights of one small denoiser, 1,200 updates each of 6 passes of the network, at its own best rate, drawn with "
    "stops at the same levels, even in the straight path's time. Then, 600 updates, two classes that branch, trained "
    "denoisers: four jumps of a student whose teacher a weaker model guides, against one whose teacher is alone; gamma "
    "and strength as `tune jumps` finds them on other points.",
    measure="energy distance x 1000",
    cost="calls per point",
    run=run,
    checks=(
        Check(says="AYF at 16 calls is at most half of AYF at one", effect=how_many_times("AYF, 16", "AYF, 1"),
              scale="ratio", margin=2.0),
        Check(says="AYF at 16 calls is no more than 1 above AYF at four", effect=by_how_much("AYF, 16", "AYF, 4"),
              margin=-1.0),
        Check(says="sCD at 16 calls is above sCD at two", effect=by_how_much("sCD, 2", "sCD, 16")),
        Check(says="AYF is below sCD at 16 calls", effect=how_many_times("AYF, 16", "sCD, 16"), scale="ratio"),
        Check(says="with a guided teacher four jumps are nearer", effect=how_many_times("autoguided", "unguided"),
              scale="ratio"),
    ),
)  # fmt: skip
