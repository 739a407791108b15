"""CTM: jumps stay on the teacher's trajectories, and hold its score, on points in the plane (2310.02279)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from imagewright.bench.claims.claim import Budget, Claim, Row, lower, times
from imagewright.bench.claims.plane import PLANE, PointTraining, train
from imagewright.bench.claims.plane_training import mixture_points
from imagewright.bench.claims.rings import angles
from imagewright.bench.claims.trial import Contender, Trial
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.consistency_trajectory import ConsistencyTrajectory
from imagewright.methods.distances import Distance
from imagewright.methods.edm import loss_weight
from imagewright.methods.pairs import consistency_parts
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, IntegratedFlowMap
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import Jumps, MultistepConsistency
from imagewright.types import CountedSampler, Denoiser, FlowMap

GRID, MOST_STEPS = 18, 4
"""As of the shipped emoji recipe."""
PASSES = 12_000
"""What each training may cost: passes of one batch through the network. Backward counts two, the teacher as one."""
STOPS: Mapping[int, tuple[float, ...]] = {1: (), 2: (4.0,), 4: (4.0, 1.0, 0.2)}
"""Levels on the way, by number of evaluations."""
ENERGY, SCORE = "energy distance x 1000", "score error"


CONTENDERS = {
    name: Contender(method=method, lr=1.2e-2)
    for name, method in {
        "CTM": ConsistencyTrajectory(grid_points=GRID, max_steps=MOST_STEPS, target_decay=0.95),
        "CTM without denoising": ConsistencyTrajectory(
            grid_points=GRID, max_steps=MOST_STEPS, target_decay=0.95, denoising=0.0
        ),
        "CD": ConsistencyDistillation(grid_points=GRID, target_decay=0.95),
    }.items()
}
"""Each at its own best rate and target average of the search on tuning seeds."""


def passes(method: ConsistencyTrajectory | ConsistencyDistillation) -> float:
    """Of an update. CD: a Heun step, two further calls and one backward pass.

    CTM: on average n = (2 MOST_STEPS + 1) / 3 Heun steps, five further calls, three backward passes, and the way back
    through the target to the last layer, for the adaptive weight. Without the denoising loss a call and a backward pass
    less, and no such weight.
    """
    if isinstance(method, ConsistencyDistillation):
        return 6
    return 2 * (2 * MOST_STEPS + 1) / 3 + (5 + 3 * 2 + 1 if method.denoising else 4 + 2 * 2)


def modes(seed: int) -> GaussianMixture:
    """Five modes of different weight and width on two circles, turned by a random angle."""
    turned = angles(seed, 5)
    radii, stds = torch.tensor([1.0, 0.6, 1.0, 0.8, 1.0]).double(), torch.tensor([0.1, 0.2, 0.15, 0.1, 0.2]).double()
    means = torch.stack([radii * turned.cos(), radii * turned.sin()], 1).reshape(5, 2, 1, 1)
    return GaussianMixture(means, stds, weights=torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0]).double())


def score_error(denoiser: Denoiser, oracle: GaussianMixture, seed: int, count: int) -> float:
    """Squared error against the exact denoiser, with EDM's weight, over the noise levels of its training."""
    noise = StepNoise(seed, 5)
    points = oracle.sample(count, noise)
    sigma = LogNormal().sample(noise, points[:, 0, 0, 0])
    noisy = points + sigma[:, None, None, None] * noise.normal(points)
    with torch.no_grad():
        error = (denoiser(noisy, sigma) - oracle(noisy, sigma)).square().flatten(1).mean(1)
    return float((loss_weight(sigma, PLANE) * error).mean())


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Distance of each sampler's points to where the teacher's flow leads from the same noise."""
    full = budget == "full"
    trial = Trial(seed=seed, oracle=modes(seed), count=4000 if full else 50)
    oracle, start, level = trial.oracle, trial.z, trial.z.new_ones(trial.count)
    end = IntegratedFlowMap(oracle, tolerance=1e-7)(80 * start, 80 * level, 0.002 * level)
    untrained = EDMPrecond(trial.untrained(), sigma_data=PLANE)
    first = train(untrained, mixture_points(oracle), PointTraining(iterations=1000 if full else 4, seed=seed))
    rows = []

    def measure(curve: str, model: FlowMap, sampler: CountedSampler, **more: float) -> None:
        points = sampler(model, start, noise=StepNoise(seed + 2000, 1))
        off = float((points - end).flatten(1).norm(dim=1).mean())
        numbers = {ENERGY: trial.distance(points.flatten(1).double().numpy()), **more}
        rows.append(Row(name=f"{curve}, {sampler.nfe} NFE", score=off, cost=sampler.nfe, curve=curve, more=numbers))

    for name, contender in CONTENDERS.items():
        kind: Any = TrajectoryModel if isinstance(contender.method, ConsistencyTrajectory) else ConsistencyModel
        parts = consistency_parts(kind.from_denoiser(first), None, Distance(), teacher=trial.teacher)
        updates = round(PASSES / passes(contender.method)) if full else 4
        model = trial.trained(contender.method, parts, updates, contender.lr)
        if isinstance(model, TrajectoryModel):
            error = {SCORE: score_error(model.denoiser(), oracle, seed, trial.count)}
            for stops in STOPS.values():
                measure(name, model, Jumps(sigmas=stops, clip=False), **error)
        if name == "CTM":
            for stops in filter(None, STOPS.values()):
                measure("CTM, all noise new", model, Jumps(sigmas=stops, gamma=1.0, clip=False))
        if name == "CD":
            for stops in STOPS.values():
                measure(name, model, MultistepConsistency(sigmas=stops, clip=False))
    return rows


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
        lower("CTM's distance to the trajectory's end falls from one evaluation to four", "CTM, 4 NFE", "CTM, 1 NFE"),
        lower("so does the energy distance to the data", "CTM, 4 NFE", "CTM, 1 NFE", of=ENERGY),
        lower(
            "at four evaluations new noise at every stop is further from the data than none",
            "CTM, 4 NFE",
            "CTM, all noise new, 4 NFE",
            of=ENERGY,
        ),
        times(
            "the denoising loss lowers the error of the score that the model holds",
            "CTM, 1 NFE",
            "CTM without denoising, 1 NFE",
            of=SCORE,
        ),
        times("at one evaluation CTM is nearer to the trajectory's end than CD", "CTM, 1 NFE", "CD, 1 NFE"),
        lower("at one evaluation CTM is nearer to the data than CD", "CTM, 1 NFE", "CD, 1 NFE", of=ENERGY),
    ),
)
