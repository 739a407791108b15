"""DMD: matching and regression each mend what the other lacks (2311.18828)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imagewright.bench.claims.claim import Budget, Check, Claim, Effect, Row, how_many_times
from imagewright.bench.claims.matching import BOTH, Contender, made, passes, start_of, steps_for, taught
from imagewright.bench.claims.plane import distance, latents, real_points
from imagewright.bench.claims.plane_training import PointRun
from imagewright.methods.distances import Distance
from imagewright.methods.distribution_matching import generate
from imagewright.methods.dmd import DMD
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Heun
from imagewright.types import Batch, Clock, Coupling, Event, Update

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
STD = 0.08
SIDE = 5
PAIRS = 500
PASSES = 7_000
"""Of networks over one point, times the batch: what each contender may spend."""
RUN = PointRun(batch=256, iterations=1)
L2 = Distance(kind="l2")
HIT = 0.2
"""A mode is hit by this share of the samples that are due to it."""
NEAR, MODES, VARIANCE = "near a mode, %", "modes hit", "variance within modes"
DMD_ROW, MATCHING, REGRESSION = "DMD", "matching alone", "regression alone"


class RegressionAlone(DMD):
    """A control: the pairs alone."""

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        assert batch.coupling is not None
        answer = generate(parts.generator, batch.coupling.latents, batch.coupling.cond).images
        yield Update("generator", self.regression(answer, batch.coupling.images, None))


CONTENDERS: Mapping[str, Contender] = {
    DMD_ROW: Contender(method=DMD(regression_weight=4.0, regression=L2), lr=1e-3),
    MATCHING: Contender(method=DMD(regression_weight=0.0), lr=1e-3, fake_scale=4.0),
    REGRESSION: Contender(method=RegressionAlone(regression=L2), lr=2e-3),
}
"""Searched on tuning seeds: rates from 5e-4 to 4e-3, the fake score's 1, 4 or 8 times, weights 0.25, 1 and 4."""


def cost_of(method: Any) -> float:
    """Passes of one step, for the control too."""
    return BOTH if isinstance(method, RegressionAlone) else passes(method)


def grid() -> GaussianMixture:
    """5 x 5 modes on [-1, 1]^2."""
    line = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    return GaussianMixture(torch.cartesian_prod(line, line).reshape(-1, 2, 1, 1), STD)


def teachers_pairs(oracle: GaussianMixture, seed: int, count: int) -> Coupling:
    """Where the exact teacher's flow leads from noise."""
    z = latents(seed, count)
    return Coupling(z.float(), Heun(num_steps=18)(oracle, z).float())


def row(name: str, points: npt.NDArray[np.float64], reference: npt.NDArray[np.float64], cost: float) -> Row:
    """Energy distance, the share of points within three deviations of a mode, how many modes are hit, and the variance
    about their own mean of the points of a mode: a mean over modes, in units of the truth's within three deviations."""
    means = grid().means.flatten(1).numpy()
    off = np.linalg.norm(points[:, None] - means, axis=2)
    nearest, inside = off.argmin(1), off.min(1) < 3 * STD
    counts = np.bincount(nearest[inside], minlength=len(means))
    spreads = [points[inside & (nearest == k)].var(0, ddof=1).mean() for k in range(len(means)) if counts[k] >= 10]
    cut = math.exp(-4.5)
    truth = STD**2 * (1 - 4.5 * cut / (1 - cut))
    more = {
        NEAR: 100 * float(inside.mean()),
        MODES: float((counts >= HIT * len(points) / len(means)).sum()),
        VARIANCE: float(np.mean(spreads)) / truth if spreads else 0.0,
    }
    return Row(name=name, score=distance(points, reference), cost=cost, more=more)


def run(seed: int, budget: Budget, contenders: Mapping[str, Contender] = CONTENDERS) -> Sequence[Row]:
    """Generators from one start, of equal cost, and points of the truth."""
    full = budget == "full"
    afford, warm, count = (PASSES, 300, 4000) if full else (40, 3, 50)
    oracle = grid()
    start = start_of(oracle, WIDTH, DEPTH, seed, warm, SIGMA_DATA)
    pairs = teachers_pairs(oracle, seed + 4000, PAIRS if full else 20)
    reference = real_points(oracle, seed + 1000, 2 * count)
    z = latents(seed + 2000, count)
    rows = [row("real points", real_points(oracle, seed + 3000, count), reference, 0)]
    for name, contender in contenders.items():
        step = cost_of(contender.method)
        steps = steps_for(afford, step)
        pace = replace(RUN, seed=seed, iterations=steps)
        rows.append(row(name, made(taught(contender, start, oracle, oracle, pace, pairs), z), reference, steps * step))
    return rows


def higher(number: str, ours: str, theirs: str) -> Effect:
    """The effect "a further number of ours minus theirs"."""
    return lambda rows: rows[ours].more[number] - rows[theirs].more[number]


CLAIM = Claim(
    key="dmd",
    paper="2311.18828",
    headline="ImageNet-64 FID 2.62 at 1 NFE; about 5.6 without the regression, about 9.2 without the matching",
    miniature="25 modes in the plane, an exact teacher, 500 pairs of its flow, one small network and start. One-step "
    "generators at equal cost in passes of all networks: DMD, matching alone, and regression alone. The rates of "
    "generator and fake score, and the weight of DMD's regression, were searched for each on a tuning seed, by the "
    "energy distance. A mode is hit by a fifth of the samples that are due to it.",
    measure="energy distance to the truth x 1000",
    cost="passes of networks per point",
    run=run,
    checks=(
        Check(
            says="DMD is nearer to the truth than matching alone",
            effect=how_many_times(DMD_ROW, MATCHING),
            scale="ratio",
        ),
        Check(
            says="DMD is nearer to the truth than regression alone",
            effect=how_many_times(DMD_ROW, REGRESSION),
            scale="ratio",
        ),
        Check(
            says="DMD puts more samples near a mode than regression alone, in per cent",
            effect=higher(NEAR, DMD_ROW, REGRESSION),
        ),
    ),
)
