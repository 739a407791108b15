"""Autoguidance: a worse model of the same kind as guide sharpens without losing variety (2406.02507), in the plane.

The paper's toy in miniature: two classes that branch like trees, a conditional main model, a guide of half the width
and an eighth of the training, and for comparison the same small guide without the label (classifier-free guidance).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.bench.claims.plane import PointTraining, point_denoiser, sampled, train
from imagewright.guidance import Guided, Unlabelled
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import Heun
from imagewright.types import Condition, Denoiser

DEPTH, BEADS, THICKNESS = 5, 5, 0.03
WEIGHTS = (1.5, 2.0, 3.0)
"""The checks use w = 2, chosen on seed 10."""
CFG_WEIGHTS = (1.5, 2.0, 3.0, 4.0)
BRANCHES = 2**DEPTH - 1


def trees(seed: int) -> GaussianMixture:
    """Two classes from one root: branches that fork `DEPTH` - 1 times, each a row of small Gaussians."""
    noise, like = StepNoise(seed, 5), torch.empty(2, BRANCHES, 2, dtype=torch.float64)
    jitter = 2 * noise.uniform(like) - 1
    means, weights = [], []
    for c in range(2):
        ends: list[tuple[torch.Tensor, float]] = []
        for b in range(BRANCHES):
            level = int(math.log2(b + 1))
            root = (torch.zeros(2, dtype=torch.float64), math.pi * (0.3 + 0.4 * c)) if b == 0 else ends[(b - 1) // 2]
            turn = 0.0 if b == 0 else (0.5 if b % 2 else -0.5) + 0.15 * float(jitter[c, b, 0])
            angle, length = root[1] + turn, 0.55 * 0.78**level * (1 + 0.15 * float(jitter[c, b, 1]))
            step = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) * length
            means += [root[0] + step * (i + 0.5) / BEADS for i in range(BEADS)]
            weights += [length * 0.7**level] * BEADS
            ends.append((root[0] + step, angle))
    points = torch.stack(means).reshape(-1, 2, 1, 1)
    centred = points - points.mean(0)
    classes = torch.arange(2).repeat_interleave(BRANCHES * BEADS)
    return GaussianMixture(centred, THICKNESS, torch.tensor(weights, dtype=torch.float64), classes)


def _train(oracle: GaussianMixture, seed: int, width: int, iterations: int, labelled: bool) -> EDMPrecond:
    def draw(n: int, noise: StepNoise) -> tuple[torch.Tensor, Condition]:
        cond = Condition(label=noise.integers(2, torch.empty(n)))
        return oracle.sample(n, noise, cond).float(), cond if labelled else Condition()

    config = PointTraining(
        iterations=iterations, batch=1024, lr=5e-3, seed=seed, levels=LogNormal(mean=-2.3, std=1.5), sigma_data=0.4
    )
    start = point_denoiser(width, 4, seed, classes=2 if labelled else 0, sigma_data=0.4)
    return train(start, draw, config)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Share of points that the true density of the class would hardly ever give, with likelihood and variety."""
    full = budget == "full"
    oracle, count, iterations = trees(seed), 3000 if full else 100, 3000 if full else 16
    main = _train(oracle, seed, 64, iterations, labelled=True)
    guide = _train(oracle, seed + 1, 32, iterations // 8, labelled=True)
    unlabelled = _train(oracle, seed + 2, 32, iterations // 8, labelled=False)
    cond = Condition(label=torch.zeros(count, dtype=torch.int64))
    real = oracle.sample(count, StepNoise(seed, 6), cond)
    zero = torch.zeros(count, dtype=torch.float64)
    rare = float(torch.quantile(oracle.log_density(real, zero, cond), 0.01))

    def row(name: str, denoiser: Denoiser | None, steps: int, evaluations: int, curve: str) -> Row:
        points = real
        if denoiser is not None:
            sampler = Heun(num_steps=steps, sigma_max=5.0)
            points = torch.from_numpy(sampled(denoiser, sampler, seed + 3, count, cond)).reshape(real.shape)
        density = oracle.log_density(points, zero, cond)
        branch = oracle.responsibilities(points, zero, cond).argmax(1)[:, None] // BEADS
        shares = np.bincount(branch[:, 0].numpy(), minlength=2 * BRANCHES) / count
        entropy = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
        off = 100 * float((density < rare).double().mean())
        more = {"mean log-likelihood": float(density.clamp(min=-50).mean()), "branches (perplexity)": math.exp(entropy)}
        return Row(name=name, score=off, cost=evaluations, curve=curve, more=more)

    rows = [
        row("real points", None, 0, 0, "real"),
        row("main model", main, 32, 63, "main model"),
        row("main model, as many evaluations", main, 63, 125, "main model"),
        row("guided by itself, w = 3", Guided(main, main, 3.0), 32, 126, "itself"),
    ]
    rows += [row(f"autoguidance, w = {w:g}", Guided(main, guide, w), 32, 126, "autoguidance") for w in WEIGHTS]
    return rows + [
        row(f"classifier-free, w = {w:g}", Guided(main, Unlabelled(unlabelled), w), 32, 126, "classifier-free")
        for w in CFG_WEIGHTS
    ]


def _variety(rows: Rows, name: str) -> float:
    """Branch perplexity relative to real points'."""
    return rows[name].more["branches (perplexity)"] / rows["real points"].more["branches (perplexity)"]


def _dominated(rows: Rows, name: str) -> bool:
    """Whether autoguidance has fewer points off the data, or more variety, than this row: it is not beaten by it."""
    best = rows["autoguidance, w = 2"]
    return rows.score(name) > best.score or _variety(rows, name) < _variety(rows, best.name)


CLAIM = Claim(
    key="autoguidance",
    paper="2406.02507",
    headline="ImageNet-64 FID 1.01 (1.58 without guidance)",
    miniature="Two classes that branch like trees, exact densities. Main model of width 64, guide of width 32 with an "
    "eighth of its training, 32 Heun steps. Off the data: below the density that 1% of real points fall under.",
    measure="points off the data, %",
    cost="evaluations per sample",
    run=run,
    tried="The one check that fails, fails narrowly: on seed 1 the share falls from 11.57% to 7.73%, by 33.2% where a "
    "third was asked for. With branches of 0.012 instead of 0.03, on another seed, none helped so poor a model.",
    checks=(
        Check(
            says="at w = 2 a third fewer points are off the data than without guidance at as many evaluations",
            holds=lambda r: (
                r.score("autoguidance, w = 2") < 2 / 3 * r.score("main model, as many evaluations")
                and r["autoguidance, w = 2"].more["mean log-likelihood"]
                > r["main model, as many evaluations"].more["mean log-likelihood"]
            ),
        ),
        Check(
            says="its variety stays within 15% of the real points'",
            holds=lambda r: abs(_variety(r, "autoguidance, w = 2") - 1) < 0.15,
        ),
        Check(
            says="no weight of classifier-free guidance leaves as few points off the data with as much variety",
            holds=lambda r: all(_dominated(r, f"classifier-free, w = {w:g}") for w in CFG_WEIGHTS),
        ),
        Check(
            says="a copy of the main model as guide changes nothing",
            holds=lambda r: abs(r.score("guided by itself, w = 3") - r.score("main model")) < 0.15,
        ),
    ),
)
