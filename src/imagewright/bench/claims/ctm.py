"""CTM: jumps stay on the teacher's trajectories, and hold its score, on points in the plane (2310.02279)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from imagewright.bench.claims.claim import Budget, Check, Claim, Effect, Row, by_how_much, how_many_times
from imagewright.bench.claims.plane import PointTraining, distance, latents, point_denoiser, real_points, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.consistency_trajectory import ConsistencyTrajectory
from imagewright.methods.edm import loss_weight
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, IntegratedFlowMap
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import Jumps, MultistepConsistency
from imagewright.types import (
    Average,
    CountedSampler,
    Denoiser,
    FlowMap,
    Frozen,
    Parts,
    Trained,
)

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
GRID, MOST_STEPS = 18, 4
"""As of the shipped emoji recipe."""
PASSES = 12_000
"""What each training may cost: passes of one batch through the network. Backward counts two, the teacher as one."""
STOPS: Mapping[int, tuple[float, ...]] = {1: (), 2: (4.0,), 4: (4.0, 1.0, 0.2)}
"""Levels on the way, by number of evaluations."""
ENERGY, SCORE = "energy distance x 1000", "score error"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its own best settings of the search on tuning seeds, and what one of its updates costs."""

    method: ConsistencyTrajectory | ConsistencyDistillation
    lr: float
    passes: float

    @property
    def updates(self) -> int:
        """Of the whole training."""
        return round(PASSES / self.passes)


def trajectory_model(lr: float, decay: float, denoising: float = 1.0) -> Contender:
    """CTM: on average n = (2 MOST_STEPS + 1) / 3 Heun steps, five further calls, three backward passes, and the way
    back through the target to the last layer, for the adaptive weight.

    Without the denoising loss a call and a backward pass less, and no such weight.
    """
    method = ConsistencyTrajectory(grid_points=GRID, max_steps=MOST_STEPS, target_decay=decay, denoising=denoising)
    teacher = 2 * (2 * MOST_STEPS + 1) / 3
    return Contender(method=method, lr=lr, passes=teacher + (5 + 3 * 2 + 1 if denoising else 4 + 2 * 2))


def consistency_model(lr: float, decay: float) -> Contender:
    """CD: a Heun step, two further calls and one backward pass."""
    return Contender(method=ConsistencyDistillation(grid_points=GRID, target_decay=decay), lr=lr, passes=6)


CONTENDERS = {
    "CTM": trajectory_model(1.2e-2, 0.95),
    "CTM without denoising": trajectory_model(1.2e-2, 0.95, denoising=0.0),
    "CD": consistency_model(1.2e-2, 0.95),
}


def modes(seed: int) -> GaussianMixture:
    """Five modes of different weight and width on two circles, turned by a random angle."""
    turn = StepNoise(seed, 4).uniform(torch.empty(1, dtype=torch.float64))[0]
    angles = (torch.arange(5, dtype=torch.float64) + turn) * 2 * math.pi / 5
    radii, stds = torch.tensor([1.0, 0.6, 1.0, 0.8, 1.0]).double(), torch.tensor([0.1, 0.2, 0.15, 0.1, 0.2]).double()
    means = torch.stack([radii * angles.cos(), radii * angles.sin()], 1).reshape(5, 2, 1, 1)
    return GaussianMixture(means, stds, weights=torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0]).double())


def parts_of(student: EDMPrecond, oracle: GaussianMixture) -> Parts:
    """As the methods make them, but with an exact teacher."""
    target = copy.deepcopy(student).requires_grad_(False)
    return Parts(
        student=Trained(module=student), target=Average(module=target), teacher=Frozen(module=ExactTeacher(oracle))
    )


def score_error(denoiser: Denoiser, oracle: GaussianMixture, seed: int, count: int) -> float:
    """Squared error against the exact denoiser, with EDM's weight, over the noise levels of its training."""
    noise = StepNoise(seed, 5)
    points = oracle.sample(count, noise)
    sigma = LogNormal().sample(noise, points[:, 0, 0, 0])
    noisy = points + sigma[:, None, None, None] * noise.normal(points)
    with torch.no_grad():
        error = (denoiser(noisy, sigma) - oracle(noisy, sigma)).square().flatten(1).mean(1)
    return float((loss_weight(sigma, SIGMA_DATA) * error).mean())


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Distance of each sampler's points to where the teacher's flow leads from the same noise."""
    full = budget == "full"
    count = 4000 if full else 50
    oracle, denoiser = first(seed, 1000 if full else 4)
    start = latents(seed + 2000, count)
    level = start.new_ones(count)
    end = IntegratedFlowMap(oracle, tolerance=1e-7)(80 * start, 80 * level, 0.002 * level)
    reference = real_points(oracle, seed + 1000, 2 * count)
    rows = []

    def measure(curve: str, model: FlowMap, sampler: CountedSampler, **more: float) -> None:
        points = sampler(model, start, noise=StepNoise(seed + 2000, 1))
        off = float((points - end).flatten(1).norm(dim=1).mean())
        energy = distance(points.flatten(1).double().numpy(), reference)
        name, nfe = name_of(curve, sampler.nfe), sampler.nfe
        rows.append(Row(name=name, score=off, cost=nfe, curve=curve, more={ENERGY: energy, **more}))

    for name, contender in CONTENDERS.items():
        model = trained(contender, oracle, denoiser, seed, contender.updates if full else 4)
        if isinstance(model, TrajectoryModel):
            error = {SCORE: score_error(model.denoiser(), oracle, seed, count)}
            for stops in STOPS.values():
                measure(name, model, Jumps(sigmas=stops, clip=False), **error)
        if name == "CTM":
            for stops in filter(None, STOPS.values()):
                measure("CTM, all noise new", model, Jumps(sigmas=stops, gamma=1.0, clip=False))
        if name == "CD":
            for stops in STOPS.values():
                measure(name, model, MultistepConsistency(sigmas=stops, clip=False))
    return rows


def first(seed: int, iterations: int) -> tuple[GaussianMixture, EDMPrecond]:
    """The distribution, and the denoiser from whose weights every contender starts."""
    oracle = modes(seed)
    untrained = point_denoiser(WIDTH, DEPTH, seed, sigma_data=SIGMA_DATA)
    training = PointTraining(iterations=iterations, seed=seed, sigma_data=SIGMA_DATA)
    return oracle, train(untrained, mixture_points(oracle), training)


def trained(contender: Contender, oracle: GaussianMixture, denoiser: EDMPrecond, seed: int, updates: int) -> FlowMap:
    """The averaged student of an exact teacher; same points, levels' seeds and initial weights for all."""
    kind = TrajectoryModel if isinstance(contender.method, ConsistencyTrajectory) else ConsistencyModel
    pace = PointRun(iterations=updates, batch=256, lr=contender.lr, seed=seed)
    model = distil(contender.method, parts_of(kind.from_denoiser(denoiser), oracle), mixture_points(oracle), pace)
    return cast(FlowMap, model)


def name_of(curve: str, nfe: int) -> str:
    """Name of a row."""
    return f"{curve}, {nfe} NFE"


def nearer_to_the_data(ours: str, theirs: str) -> Effect:
    """How much lower our energy distance is."""
    return lambda rows: rows[theirs].more[ENERGY] - rows[ours].more[ENERGY]


CLAIM = Claim(
    key="ctm",
    paper="2310.02279",
    headline="CIFAR-10 FID 1.73 at 1 NFE; ImageNet-64 1.92 at 1 NFE, 1.73 at 2 (EDM at 79 NFE 2.44, CD at 1 NFE 6.20)",
    miniature="Five modes in the plane, an exact teacher, no adversary. CTM, with and without its denoising loss, and "
    "consistency distillation: one network, start and stream of points, and trainings of equal cost (an update of CTM "
    "costs as much as three of CD), each with its own best rate and target average. The score error is that of "
    "g(x, t, t), weighted as in EDM's loss.",
    measure="mean distance to the end of the teacher's trajectory from the same noise",
    cost="NFE per sample",
    run=run,
    checks=(
        Check(
            says="CTM's distance to the trajectory's end falls from one evaluation to four",
            effect=by_how_much("CTM, 4 NFE", "CTM, 1 NFE"),
        ),
        Check(
            says="so does the energy distance to the data",
            effect=nearer_to_the_data("CTM, 4 NFE", "CTM, 1 NFE"),
        ),
        Check(
            says="at four evaluations new noise at every stop is further from the data than none",
            effect=nearer_to_the_data("CTM, 4 NFE", "CTM, all noise new, 4 NFE"),
        ),
        Check(
            says="the denoising loss lowers the error of the score that the model holds",
            effect=lambda r: r["CTM without denoising, 1 NFE"].more[SCORE] / r["CTM, 1 NFE"].more[SCORE],
            scale="ratio",
        ),
        Check(
            says="at one evaluation CTM is nearer to the trajectory's end than CD",
            effect=how_many_times("CTM, 1 NFE", "CD, 1 NFE"),
            scale="ratio",
        ),
        Check(
            says="at one evaluation CTM is nearer to the data than CD",
            effect=nearer_to_the_data("CTM, 1 NFE", "CD, 1 NFE"),
        ),
    ),
)
