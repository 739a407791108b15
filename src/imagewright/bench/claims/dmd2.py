"""DMD2: two time scales steady the matching, and only real points correct a biased teacher (2405.14867)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, how_many_times
from imagewright.bench.claims.matching import Contender, made, on_a_circle, passes, start_of, steps_for, taught
from imagewright.bench.claims.plane import distance, latents, real_points
from imagewright.bench.claims.plane_training import PointRun
from imagewright.methods.dmd2 import DMD2
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig

WIDTH, DEPTH = 64, 3
SIGMA_DATA = 0.85
BIAS = 1.6
"""Factor on the variance of every component of the teacher."""
PASSES = 20_000
"""Of networks over one point, times the batch: what each contender may spend."""
RUN = PointRun(batch=256, iterations=1, ema=EmaConfig(halflife_images=5_000, rampup_ratio=None))
NO_GAN = DMD2(generator_gan=0.0, fake_gan=0.0)
RATIO_1, RATIO_5, TEACHER = "ratio 1", "ratio 5", "teacher, 40 Heun steps"
WITH_GAN, FOR_TWO = "ratio 5, with GAN", "ratio 5, with GAN, weights for two numbers"
NUMBERS = 3 * 64 * 64
"""Of an image of the published run. Beside a loss that is a mean over them an adversary's gradient weighs, by its norm,
sqrt(NUMBERS / 2) times what it does beside the mean of a point's two."""
SCALE = math.sqrt(NUMBERS / 2)
CONTENDERS: Mapping[str, Contender] = {
    RATIO_1: Contender(method=replace(NO_GAN, fake_updates=1), lr=1e-3, fake_scale=4.0),
    RATIO_5: Contender(method=NO_GAN, lr=3e-3, fake_scale=4.0),
    WITH_GAN: Contender(method=DMD2(), lr=3e-3, fake_scale=4.0),
    FOR_TWO: Contender(method=DMD2(generator_gan=3e-3 * SCALE, fake_gan=1e-2 * SCALE), lr=3e-3, fake_scale=4.0),
}
"""Searched on tuning seeds: rates 1e-3 and 3e-3, the fake score's once and 4 times as high."""


def wide_modes(seed: int) -> GaussianMixture:
    """Three wide components on a circle, turned by a random angle."""
    means = on_a_circle(seed)
    stds, weights = torch.tensor([[0.4, 0.5, 0.4], [2, 3, 1]], dtype=torch.float64)
    return GaussianMixture(means, stds, weights)


def widened(oracle: GaussianMixture, factor: float) -> GaussianMixture:
    """A teacher of the wrong data: every component's variance times a factor."""
    return GaussianMixture(oracle.means, math.sqrt(factor) * oracle.stds, oracle.weights)


def run(seed: int, budget: Budget, contenders: Mapping[str, Contender] = CONTENDERS) -> Sequence[Row]:
    """Energy distance to the truth of the biased teacher's points, and of the generators that it taught."""
    full = budget == "full"
    afford, warm, count = (PASSES, 250, 4000) if full else (60, 3, 1500)
    oracle = wide_modes(seed)
    teacher = widened(oracle, BIAS)
    start = start_of(teacher, WIDTH, DEPTH, seed, warm, SIGMA_DATA)
    truth, lesson = (real_points(law, seed + 1000, 2 * count) for law in (oracle, teacher))
    z = latents(seed + 2000, count)

    def row(name: str, points: npt.NDArray[np.float64], cost: float) -> Row:
        more = {"energy distance to the teacher's points x 1000": distance(points, lesson)}
        return Row(name=name, score=distance(points, truth), cost=cost, more=more)

    rows = [
        row("real points", real_points(oracle, seed + 3000, count), 0),
        row(TEACHER, Heun(num_steps=40)(teacher, z).flatten(1).numpy(), 0),
    ]
    for name, contender in contenders.items():
        method = contender.method
        assert isinstance(method, DMD2)
        steps = steps_for(afford, passes(method), method.fake_updates)
        generator = taught(contender, start, teacher, oracle, replace(RUN, seed=seed, iterations=steps))
        rows.append(row(name, made(generator, z), steps * passes(method)))
    return rows


CLAIM = Claim(
    key="dmd2",
    paper="2405.14867",
    headline="ImageNet-64 FID at 1 NFE: 1.28 with the adversary, 2.61 without (DMD 2.62, teacher 2.32 at 511 NFE)",
    miniature="Three wide modes in the plane and an exact teacher of the wrong data, each mode's variance 1.6 times "
    "the truth's. One-step generators from one start, at equal cost in passes of all networks: the fake score updated "
    "once and five times for each update of the generator, and five times with an adversary that sees true points, at "
    "the recipes' weights and at weights that stand to two numbers as the published ones do to an image's 12,288. The "
    "rates of generator and fake score were searched for each on a tuning seed.",
    measure="energy distance to the truth x 1000",
    cost="passes of networks per point",
    run=run,
    checks=(
        Check(
            says="five updates of the fake score for one are better than one",
            effect=how_many_times(RATIO_5, RATIO_1),
            scale="ratio",
        ),
        *(
            Check(says=f"{what} it is better still", effect=how_many_times(name, RATIO_5), scale="ratio")
            for name, what in (
                (WITH_GAN, "with the adversary"),
                (FOR_TWO, "with the adversary weighed for two numbers"),
            )
        ),
        Check(
            says="with the adversary weighed for two numbers it is better than its own teacher in 40 steps",
            effect=how_many_times(FOR_TWO, TEACHER),
            scale="ratio",
        ),
        Check(
            says="without the adversary neither is better than the teacher",
            effect=lambda rows: min(rows.score(RATIO_1), rows.score(RATIO_5)) / rows.score(TEACHER),
            scale="ratio",
        ),
    ),
)
