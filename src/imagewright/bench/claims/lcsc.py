"""LCSC: a searched combination of a consistency model's raw checkpoints beats any average of them (2404.02241)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Claim, Row, times
from imagewright.bench.claims.plane import PointTraining, point_denoiser, sampled, train
from imagewright.bench.claims.plane_training import mixture_points
from imagewright.bench.claims.rings import distance_to, frechet_to, ring
from imagewright.bench.claims.students import LEVELS, ONE_STEP
from imagewright.bench.claims.trial import Trial
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.distances import Distance
from imagewright.methods.pairs import consistency_parts
from imagewright.models.consistency import ConsistencyModel
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, IntegratedFlowMap
from imagewright.training.weights import flatten, unflatten
from imagewright.tuning.lcsc import LCSC, Found, Vector, random_control, search
from imagewright.types import Batch, Clock, Event, Parts

CHECKPOINTS, EVERY = 20, 50
LR, BATCH = 6e-3, 256
"""The rate at which averages are best, of 3e-4, 1e-3, 3e-3, 6e-3 and 12e-3, on tuning seed 3."""
POINTS, EVALUATIONS = 3000, 300
TRAINED_ON = 12
"""More checkpoints for the control that is given the search's cost: 300 x 3000 calls are 590 updates of 256 x 6."""
SCALES = (0.1, 0.3)
"""How far the random combinations go from the best average, half the evaluations each: the best two of 0.1, 0.3, 1."""
FRECHET = "Frechet x 1000"
L2 = Distance()


@dataclass
class Kept:
    """A method that notes the student's raw weights every `EVERY` steps, from step `first` on."""

    product: ClassVar[str] = "student"
    method: ConsistencyDistillation
    first: int
    rows: list[Tensor] = field(default_factory=list)
    taken: int = 0

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """The method's own step; before it, what the steps so far have made."""
        if self.taken > self.first and (self.taken - self.first) % EVERY == 0:
            self.rows.append(flatten(parts.student.state_dict()).clone())
        self.taken += 1
        yield from self.method.step(parts, batch, noise, clock)


def checkpoints(seed: int, oracle: GaussianMixture, full: bool) -> tuple[ConsistencyModel, Tensor]:
    """A consistency model, and raw weights [K, parameters] along its distillation at a constant rate."""
    trial = Trial(seed=seed, oracle=oracle, count=0)
    config = PointTraining(iterations=400 if full else 2, batch=BATCH, seed=seed, levels=LEVELS)
    student = ConsistencyModel.from_denoiser(train(point_denoiser(32, 3, seed), mixture_points(oracle), config))
    parts: Parts = consistency_parts(student, None, L2, teacher=trial.teacher)
    kept = Kept(ConsistencyDistillation(grid_points=18, distance=L2), first=300 if full else 0)
    steps = kept.first + EVERY * (CHECKPOINTS + TRAINED_ON) + 1 if full else EVERY * 4 + 1
    trial.trained(kept, parts, steps, LR, kind="radam", cooldown=False)
    return copy.deepcopy(student).eval(), torch.stack(kept.rows)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance on fresh noise; the searches saw other noise."""
    full = budget == "full"
    points, fresh, evaluations = (POINTS, 2 * POINTS, EVALUATIONS) if full else (64, 64, 24)
    oracle = ring(seed)
    model, kept = checkpoints(seed, oracle, full)
    rows, later = (kept[:CHECKPOINTS], kept[-CHECKPOINTS:]) if full else (kept[:3], kept[-3:])

    def combined(rows: Tensor, alpha: Vector) -> ConsistencyModel:
        flat = rows[0] + torch.from_numpy(alpha[1:]).float() @ (rows[1:] - rows[0])
        model.load_state_dict(unflatten(flat, model.state_dict()))
        return model

    def fitness_of(rows: Tensor) -> Callable[[Vector], float]:
        return lambda alpha: distance_to(oracle, sampled(combined(rows, alpha), ONE_STEP, seed + 3000, points))

    def searched(rows: Tensor, evaluations: int) -> Found:
        return search(len(rows), fitness_of(rows), LCSC(evaluations=evaluations, seed=seed))

    found, longer = searched(rows, evaluations), searched(later, 20)
    assert found.best_average_coefficients is not None and longer.best_average_coefficients is not None
    average = found.best_average_coefficients
    tries = [random_control(average, fitness_of(rows), evaluations // 2, seed, scale) for scale in SCALES]
    chance = min(tries, key=lambda f: f.fitness)

    def row(name: str, flow_map: Any, alpha: Vector | None = None) -> Row:
        drawn = sampled(flow_map, ONE_STEP, seed + 6000, fresh)
        more = {FRECHET: frechet_to(oracle, drawn)}
        if alpha is not None:
            more |= {"on the search's noise": fitness_of(rows)(alpha), "largest |alpha|": float(np.abs(alpha).max())}
        return Row(name=name, score=distance_to(oracle, drawn), cost=1, more=more)

    def of(name: str, alpha: Vector) -> Row:
        return row(name, combined(rows, alpha), alpha)

    return [
        row("exact flow map", _Exact(oracle)),
        of("last weights", np.eye(len(rows))[-1]),
        of("best of 20 averages", average),
        row("trained on, best of 20 averages", combined(later, longer.best_average_coefficients)),
        of("random combinations", chance.coefficients),
        of("LCSC", found.coefficients),
    ]


class _Exact:
    """The flow itself, as far down as a consistency model goes."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, oracle: GaussianMixture) -> None:
        self.flow = IntegratedFlowMap(oracle, tolerance=1e-4)

    def __call__(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Any = None) -> Tensor:
        return self.flow(x, sigma, torch.full_like(sigma, self.sigma_min))


CLAIM = Claim(
    key="lcsc",
    paper="2404.02241",
    headline="training of consistency models 23 times (CIFAR-10) and 15 times (ImageNet-64) shorter at equal FID",
    miniature="Consistency distillation of the exact denoiser of 8 modes in the plane at a constant learning rate, 20 "
    "raw checkpoints 50 updates apart; 300 candidates of 3000 points drawn in one step, which has no truncation error. "
    "Controls: the best of 20 averages, of these checkpoints and after as many more updates as the search cost; 300 "
    "random combinations about the best average. Measured on fresh noise, against the true density.",
    measure="energy distance x 1000",
    cost="NFE per sample",
    run=run,
    checks=(
        times("on fresh noise the best average is so many times as far as LCSC", "LCSC", "best of 20 averages"),
        times("by the Frechet distance, which was not searched for, too", "LCSC", "best of 20 averages", of=FRECHET),
        times(
            "so is the best average of a run that trained on for the search's cost",
            "LCSC",
            "trained on, best of 20 averages",
        ),
        times("so are as many random combinations about the best average", "LCSC", "random combinations"),
    ),
)
