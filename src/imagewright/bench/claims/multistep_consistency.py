"""Multistep consistency: S segments in S evaluations, and aDDIM, which keeps the variance DDIM loses (2403.06807)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows, how_many_times
from imagewright.bench.claims.plane import distance
from imagewright.bench.claims.students import COST, Contest, Points
from imagewright.data import open_images
from imagewright.data.pixels import from_uint8
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.distances import Distance
from imagewright.methods.multistep_consistency import Levels, MultistepConsistencyDistillation, segmented_parts
from imagewright.methods.progressive_distillation import ProgressiveDistillation, steps_sampler
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.segments import MultistepConsistencyModel, segment_boundaries, segment_stops
from imagewright.oracles import LowRankMixture
from imagewright.samplers import DDIM, Jumps, MultistepConsistency
from imagewright.samplers.addim import ADDIM
from imagewright.tuning.consistency_times import TimesSearch, search_times
from imagewright.types import UNCONDITIONAL, Condition

PASSES = 3000
SEGMENTS = (1, 2, 4)
BASELINE = 2
CONTROL = 4
CLASSES, RANK = 5, 16
SIGMA_DATA = 0.75
LR_MCD, LR_PD, LR_CD = 3e-3, 8e-3, 8e-3
"""On tuning seed 20, at two steps; about half and twice were worse."""
PD_START = 8
CD = ConsistencyDistillation(grid_points=18, target_decay=0.9, distance=Distance(kind="pseudo_huber", huber_c=0.03))


class PixelNetwork(nn.Module):
    """F(x, noise_label) for 8x8 images: a multilayer perceptron on the pixels and sines of the noise label."""

    frequencies: Tensor

    def __init__(self, width: int = 128, depth: int = 3, frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(frequencies) * math.pi / 16)
        inner = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(64 + 2 * frequencies, width), nn.SiLU(), *inner, nn.Linear(width, 64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, 1, 8, 8]; noise_label: [N]. Returns [N, 1, 8, 8]."""
        phase = noise_label[:, None] * self.frequencies
        answer: Tensor = self.layers(torch.cat([x.flatten(1), phase.sin(), phase.cos()], 1))
        return answer.reshape(x.shape)


class WithoutInverse(MultistepConsistencyDistillation):
    """The control: the student's estimates at both levels are compared as they are."""

    @staticmethod
    def reference(guess: Tensor, upper: Tensor, lower: Tensor, at: Levels) -> Tensor:
        return guess


def digits() -> LowRankMixture:
    """A Gaussian of rank 16 and a floor for each of the digits 0 to 4: an exact denoiser of 64 numbers, float32."""
    data = open_images("digits")
    rows = np.flatnonzero(data.labels < CLASSES)
    fitted = LowRankMixture.from_images(
        from_uint8(data.images(rows)).double(), torch.from_numpy(data.labels[rows]), RANK
    )
    means, axes, variances = fitted.means.float(), fitted.axes.float(), fitted.variances.float()
    return LowRankMixture(means, axes, variances, fitted.floor, fitted.weights.float(), fitted.classes)


def segmented(contest: Contest, first: EDMPrecond, method: MultistepConsistencyDistillation, lr: float) -> Any:
    """A student of the exact denoiser, from the weights of a trained one."""
    student = MultistepConsistencyModel.from_denoiser(first, method.segments)
    parts = segmented_parts(student, teacher=contest.teacher)
    return contest.learnt(method, parts, COST["MCD"], lr, "adam")


def jumps(segments: int) -> Jumps:
    """S evaluations, from each boundary to the next."""
    return Jumps(sigmas=segment_stops(segments), clip=False)


def contest(seed: int, full: bool) -> Contest:
    """All contenders' data, cost and start."""
    return Contest(
        seed=seed,
        passes=PASSES if full else 60,
        count=1000 if full else 60,
        oracle=digits(),
        batch=128,
        sigma_data=SIGMA_DATA,
        network=PixelNetwork,
    )


def searched(contest: Contest, model: Any, steps: int) -> tuple[float, ...]:
    """The levels that `tune times` would find for consistency sampling, on a sample of its own."""
    own = contest.real(3000, contest.count // 2)

    def measured(sigmas: tuple[float, ...]) -> float:
        sampler = MultistepConsistency(sigmas=sigmas, clip=False)
        return distance(contest.drawn(model, sampler, 4000, contest.count // 2), own)

    return search_times(measured, model.sigma_min, model.sigma_max, TimesSearch(steps=steps, points=20)).sigmas


def even(kind: type[DDIM] | type[ADDIM], steps: int) -> DDIM | ADDIM:
    """The paper's grid: even in the cosine schedule's time from sigma_max to 0."""
    return kind(levels=segment_boundaries(steps)[:0:-1])


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Samplers of the exact denoiser without training, then its students at equal cost."""
    full = budget == "full"
    common = contest(seed, full)
    first = common.denoiser(1000 if full else 3)

    def row(name: str, steps: int, points: Points, curve: str | None = None) -> Row:
        return _row(f"{name}, {steps} NFE" if steps else name, points, common.reference, steps, curve)

    rows = [row("real images", 0, common.real(5000, common.count))]
    for kind in (DDIM, ADDIM):
        for steps in (*SEGMENTS, 8, 16):
            name = f"teacher, {kind.__name__}"
            rows.append(row(name, steps, common.drawn(common.oracle, even(kind, steps)), name))
    for steps in SEGMENTS:
        method = MultistepConsistencyDistillation(segments=steps)
        rows.append(
            row("student", steps, common.drawn(segmented(common, first, method, LR_MCD), jumps(steps)), "student")
        )
    for name, control in (
        ("eta = 0", MultistepConsistencyDistillation(segments=CONTROL, eta=0.0)),
        ("without invDDIM", WithoutInverse(segments=CONTROL)),
    ):
        student = segmented(common, first, control, LR_MCD)
        rows.append(row(name, CONTROL, common.drawn(student, jumps(CONTROL)), name))
    halved = common.halved(first, ProgressiveDistillation(start_steps=PD_START, end_steps=BASELINE), LR_PD)
    rows.append(row("PD", BASELINE, common.drawn(halved, steps_sampler(BASELINE)), "PD"))
    distilled = common.distilled(first, CD, LR_CD)
    levels = searched(common, distilled, SEGMENTS[-1])
    for steps in SEGMENTS:
        sampler = MultistepConsistency(sigmas=levels[: steps - 1], clip=False)
        rows.append(row("CD", steps, common.drawn(distilled, sampler), "CD"))
    return rows


def _row(name: str, points: Points, reference: Points, cost: float, curve: str | None) -> Row:
    """Energy distance, and the errors of the norms' distribution (Wasserstein) and of the covariance, in percent."""
    norms, true_norms = (np.quantile(np.linalg.norm(p, axis=1), QUANTILES) for p in (points, reference))
    covariance, truth = np.cov(points.T), np.cov(reference.T)
    more = {
        "norm error, %": 100 * float(np.abs(norms - true_norms).mean() / true_norms.mean()),
        "covariance error, %": 100 * float(np.linalg.norm(covariance - truth) / np.linalg.norm(truth)),
    }
    return Row(name=name, score=distance(points, reference), cost=cost, curve=curve, more=more)


QUANTILES = np.linspace(0.0005, 0.9995, 1000)


def _least(rows: Rows, theirs: str, ours: str, pairs: Sequence[tuple[int, int]]) -> float:
    """Smallest of the ratios theirs / ours over pairs of numbers of steps (theirs, ours)."""
    return min(rows.score(f"{theirs}, {a} NFE") / rows.score(f"{ours}, {b} NFE") for a, b in pairs)


def _closer(rows: Rows, error: str) -> float:
    """Smaller of the ratios of DDIM's error to aDDIM's, at 8 and 16 calls."""
    ours, theirs = ([rows[f"teacher, {kind}, {n} NFE"].more[error] for n in (8, 16)] for kind in ("ADDIM", "DDIM"))
    return min(b / a for a, b in zip(ours, theirs, strict=True))


CLAIM = Claim(
    key="multistep_consistency",
    paper="2403.06807",
    headline="ImageNet-64 FID 3.20 at 1 step, 1.90 at 2, 1.4 at 8; progressive distillation 10.70 at 1 step, 4.70 at 2",
    miniature="The exact denoiser of a mixture fitted to the 8x8 digits 0 to 4 (64 numbers) as teacher; students with "
    "S = 1, 2, 4 segments and S calls a sample, against the teacher's DDIM on the same levels, progressive "
    "distillation (PD) to 2 steps and consistency distillation (CD) in S steps at searched levels. All start from the "
    "weights of one trained denoiser and cost 3,000 passes of the network; on a tuning seed the students had four "
    "rates, PD three and two first numbers of steps, CD three. Controls at S = 4: eta = 0 (DDIM in place of aDDIM), and "
    "estimates compared without invDDIM. aDDIM against DDIM as samplers, on the teacher.",
    measure="energy distance x 1000",
    cost="NFE per sample",
    run=run,
    checks=(
        Check(
            says="the student's distance falls from S = 1 to 2 and 4",
            effect=lambda r: _least(r, "student", "student", [(1, 2), (2, 4)]),
            scale="ratio",
        ),
        Check(
            says="at every S it is below a third of the teacher's DDIM at S calls",
            effect=lambda r: _least(r, "teacher, DDIM", "student", [(s, s) for s in SEGMENTS]),
            scale="ratio",
            margin=3,
        ),
        *(
            Check(
                says=f"at {s} calls it is below {name}",
                effect=how_many_times(f"student, {s} NFE", f"{name}, {s} NFE"),
                scale="ratio",
            )
            for name, s in (("PD", 2), ("CD", 2), ("CD", 4))
        ),
        Check(
            says="with DDIM in place of aDDIM (eta = 0) it is further away",
            effect=how_many_times(f"student, {CONTROL} NFE", f"eta = 0, {CONTROL} NFE"),
            scale="ratio",
        ),
        Check(
            says="without invDDIM too",
            effect=how_many_times(f"student, {CONTROL} NFE", f"without invDDIM, {CONTROL} NFE"),
            scale="ratio",
        ),
        Check(
            says="as a sampler aDDIM errs less than DDIM in the norms, at 8 and 16 calls",
            effect=lambda r: _closer(r, "norm error, %"),
            scale="ratio",
        ),
        Check(says="and in the covariance", effect=lambda r: _closer(r, "covariance error, %"), scale="ratio"),
    ),
)
