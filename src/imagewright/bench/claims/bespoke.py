"""Bespoke: a few dozen numbers, learnt for one model and step count, set plain midpoint steps right (2310.19075)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.bench.claims.edm import ring
from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, IntegratedFlowMap
from imagewright.samplers import Heun
from imagewright.samplers.bespoke import Bespoke
from imagewright.tuning.bespoke import BespokeTraining, Vary, rms, train_bespoke
from imagewright.types import CountedSampler, Sampler

STEPS = (4, 5)
LEARNT: dict[str, Vary] = {"Bespoke": "both", "time only": "times", "scale only": "scales"}
GRIDS = [
    *(("karras", rho) for rho in (1.0, 2.0, 3.0, 5.0, 7.0)),
    *((name, 7.0) for name in ("log", "linear", "cosine", "trigflow")),
]
"""Grids and rho of the control that chooses Heun's grid for this model, at each of `STARTS`."""
STARTS = (2.0, 3.0, 5.0, 10.0, 20.0, 80.0)
PURE = 1e4
"""A noise level at which the data is no longer seen: the exact flow starts there."""


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Distance of each solver's end points to the exact flow's, from noise that nothing was learnt or chosen on."""
    full = budget == "full"
    oracle = ring(seed)
    held = _Noise(oracle, seed, first=0, count=2000 if full else 32)
    other = _Noise(oracle, seed, first=10_000, count=500 if full else 16)

    def row(name: str, sampler: CountedSampler, steps: int) -> Row:
        errors = held.errors(sampler)
        more = {"root mean square": float(errors.square().mean().sqrt()), "median": float(errors.median())}
        return Row(name=f"{name}, n = {steps}", score=float(errors.mean()), cost=sampler.nfe, curve=name, more=more)

    rows = []
    for n in STEPS:
        rows.append(row("midpoint, uniform", Bespoke(num_steps=n), n))
        # Heun's calls are odd: it gets one more.
        rows.append(row("Heun, EDM's grid", Heun(num_steps=n + 1), n))
        choices = [
            Heun(num_steps=n + 1, grid=g, rho=rho, sigma_max=s)
            for g, rho in GRIDS
            for s in (STARTS if full else STARTS[-1:])
        ]
        rows.append(row("Heun, best grid", min(choices, key=lambda s: float(other.errors(s).mean())), n))
        for name, vary in LEARNT.items():
            config = BespokeTraining(
                num_steps=n,
                vary=vary,
                iterations=1000 if full else 3,
                lr=4e-3,
                batch=64 if full else 4,
                pool=8 if full else 1,
                validation=4 if full else 1,
                seed=seed,
            )
            rows.append(row(name, train_bespoke(oracle, (2,), config=config).sampler, n))
    return rows


class _Noise:
    """Images `first` .. of a seed, and where the exact flow takes them."""

    def __init__(self, oracle: GaussianMixture, seed: int, first: int, count: int) -> None:
        self.oracle = oracle
        like = torch.empty(count, 2, dtype=torch.float64)
        self.latents = ImageNoise(seed, range(first, first + count)).normal(like)
        flow = IntegratedFlowMap(oracle, tolerance=1e-6)
        self.ends = flow(PURE * self.latents, like.new_tensor([PURE]), like.new_tensor([0.0]))

    def errors(self, sampler: Sampler) -> Tensor:
        """Root mean square over the coordinates, of each point."""
        return rms(sampler(self.oracle, self.latents) - self.ends)


def _all(rows: Rows, better: str, worse: str, factor: float = 1.0) -> bool:
    return all(factor * rows.score(f"{better}, n = {n}") <= rows.score(f"{worse}, n = {n}") for n in STEPS)


CLAIM = Claim(
    key="bespoke",
    paper="2310.19075",
    headline="CIFAR-10 FID 2.73 at 10 NFE (best dedicated solver 4.17); the dense solver's is 2.59",
    miniature="An exact denoiser of 8 modes in the plane: distance of the end points to the exact flow's, on held-out "
    "noise, for solvers of n = 4 and 5 midpoint steps (8 and 10 calls). Heun gets one call more (9 and 11), on the "
    "paper's grid and on the best of 54 grids, chosen on other noise.",
    measure="mean RMS error of end points",
    cost="NFE per sample",
    run=run,
    checks=(
        Check(
            says="Bespoke's error is at most half of uniform midpoint's",
            holds=lambda r: _all(r, "Bespoke", "midpoint, uniform", 2.0),
        ),
        Check(
            says="it is below Heun's, on EDM's grid and on the best grid, though Heun has a call more",
            holds=lambda r: _all(r, "Bespoke", "Heun, EDM's grid") and _all(r, "Bespoke", "Heun, best grid"),
        ),
        Check(
            says="time alone is better than uniform steps, and time and scale are better than time alone",
            holds=lambda r: _all(r, "Bespoke", "time only") and _all(r, "time only", "midpoint, uniform"),
        ),
        Check(
            says="time and scale are better than scale alone",
            holds=lambda r: _all(r, "Bespoke", "scale only"),
        ),
    ),
)
