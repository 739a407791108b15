"""Bespoke: a few dozen numbers, learnt for one model and step count, set plain midpoint steps right (2310.19075)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows, times
from imagewright.bench.claims.rings import ring
from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, IntegratedFlowMap
from imagewright.samplers import Ablation, DPMSolverPlusPlus, Euler, Heun, UniPC
from imagewright.samplers.bespoke import Bespoke
from imagewright.tuning.bespoke import BespokeTraining, Vary, rms, train_bespoke
from imagewright.types import CountedSampler, Sampler

STEPS = (4, 5)
LEARNT: dict[str, Vary] = {"Bespoke": "both", "time only": "times", "scale only": "scales"}
"""The ablations are trained for the larger number of steps alone."""
STD = 0.05

GRIDS: list[dict[str, Any]] = [
    *({"grid": "karras", "rho": rho} for rho in (1.0, 2.0, 3.0, 7.0)),
    *({"grid": name} for name in ("log", "linear", "trigflow")),
]
CLOCKS: list[dict[str, Any]] = [
    {"grid": "edm", "rho": rho, "schedule": clock, "scaling": scaling}
    for rho in (1.0, 3.0, 7.0)
    for clock, scaling in (("linear", "none"), ("vp", "vp"), ("ve", "none"))
]
"""Where `Ablation` differs from Heun: the second slope within a step, and the clock that a step is straight on."""
STARTS, ENDS = (1.5, 2.0, 3.0, 5.0, 10.0, 80.0), (0.002, 0.01, 0.02, 0.05, 0.1)
"""Highest and lowest noise level that the search tries on every grid."""
SOLVERS: dict[str, tuple[Callable[..., CountedSampler], Sequence[dict[str, Any]], dict[str, Any]]] = {
    "Euler (DDIM)": (Euler, GRIDS, {}),
    "Heun": (Heun, GRIDS, {}),
    "midpoint in sigma": (Ablation, CLOCKS, {"alpha": 0.5}),
    "Ralston in sigma": (Ablation, CLOCKS, {"alpha": 2 / 3}),
    "DPM-Solver++ 2M": (DPMSolverPlusPlus, GRIDS, {}),
    "UniPC-1": (UniPC, GRIDS, {"order": 1}),
    "UniPC-2": (UniPC, GRIDS, {"order": 2}),
    "UniPC-3": (UniPC, GRIDS, {"order": 3}),
}
"""Every deterministic solver of the library. The others end elsewhere on purpose: fresh noise, or aDDIM's length."""
TWO_CALLS = {"Heun", "midpoint in sigma", "Ralston in sigma"}
PURE = 1e4
"""A noise level at which the data is no longer seen: the exact flow starts there."""


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Distance of each solver's end points to the exact flow's, from noise that nothing was learnt or chosen on."""
    full = budget == "full"
    oracle = ring(seed, STD)
    held = _Noise(oracle, seed, first=0, count=2000 if full else 32)
    other = _Noise(oracle, seed, first=10_000, count=300 if full else 16)

    def row(name: str, n: int, by_mean: CountedSampler, by_square: CountedSampler) -> Row:
        errors, squares = held.errors(by_mean), held.errors(by_square).square()
        more = {"root mean square": float(squares.mean().sqrt()), "median": float(errors.median())}
        return Row(name=f"{name}, n = {n}", score=float(errors.mean()), cost=by_mean.nfe, curve=name, more=more)

    rows = []
    for n in STEPS:
        plain = Bespoke(num_steps=n)
        rows.append(row("midpoint, uniform", n, plain, plain))
        for name in SOLVERS:
            tried = [(other.errors(sampler), sampler) for sampler in _choices(name, n, full)]
            by_mean = min(tried, key=lambda pair: float(pair[0].mean()))[1]
            rows.append(row(name, n, by_mean, min(tried, key=lambda pair: float(pair[0].square().mean()))[1]))
        for name, vary in LEARNT.items() if n == STEPS[-1] else [("Bespoke", LEARNT["Bespoke"])]:
            learnt = train_bespoke(oracle, oracle.means.shape[1:], config=_training(n, vary, seed, full)).sampler
            rows.append(row(name, n, learnt, learnt))
    return rows


def _choices(name: str, n: int, full: bool) -> list[CountedSampler]:
    """A solver on all grids, from all starts to all ends, at 2 n calls; those whose calls are odd get one more."""
    solver, grids, settings = SOLVERS[name]
    steps = n + 1 if name in TWO_CALLS else 2 * n
    ends = product(STARTS, ENDS) if full else [(STARTS[-1], ENDS[0])]
    return [
        solver(num_steps=steps, sigma_max=high, sigma_min=low, **grid, **settings)
        for high, low in ends
        for grid in grids
    ]


def _training(n: int, vary: Vary, seed: int, full: bool) -> BespokeTraining:
    sizes = {"iterations": 400, "batch": 64, "pool": 8, "validation": 4}
    small = {"iterations": 3, "batch": 4, "pool": 1, "validation": 1}
    return BespokeTraining(num_steps=n, vary=vary, lr=2e-2, seed=seed, **(sizes if full else small))


class _Noise:
    """Images `first` .. of a seed, and where the exact flow takes them."""

    def __init__(self, oracle: GaussianMixture, seed: int, first: int, count: int) -> None:
        self.oracle = oracle
        like = torch.empty(count, *oracle.means.shape[1:], dtype=torch.float64)
        self.latents = ImageNoise(seed, range(first, first + count)).normal(like)
        flow = IntegratedFlowMap(oracle, tolerance=1e-6)
        self.ends = flow(PURE * self.latents, like.new_tensor([PURE]), like.new_tensor([0.0]))

    def errors(self, sampler: Sampler) -> Tensor:
        """Root mean square over the coordinates, of each point."""
        return rms(sampler(self.oracle, self.latents) - self.ends)


def _times_as_far(
    says: str,
    others: Sequence[str],
    steps: Sequence[int] = STEPS,
    measure: str | None = None,
    by: float | None = None,
) -> Check:
    """How many times as far as Bespoke the best of the others is, at the number of steps where that is least."""

    def effect(rows: Rows) -> float:
        def ratio(n: int) -> float:
            far = [rows.number(f"{name}, n = {n}", measure) for name in (*others, "Bespoke")]
            return min(far[:-1]) / far[-1]

        return min(ratio(n) for n in steps)

    return Check(says=says, effect=effect, scale="ratio", margin=by)


CLAIM = Claim(
    key="bespoke",
    paper="2310.19075",
    headline="CIFAR-10 FID 2.73 at 10 NFE (best dedicated solver 4.17); the dense solver's is 2.59",
    miniature="An exact denoiser of 8 modes in the plane: distance of the end points to the exact flow's, on held-out "
    "noise, for solvers of n = 4 and 5 midpoint steps (8 and 10 calls). Against it all deterministic solvers of the "
    "library at 2 n calls (9 and 11 where calls are odd), each on the best of 210 to 270 grids "
    "(by its mean and, for the root mean square, by that), chosen on other noise.",
    measure="mean RMS error of end points",
    cost="NFE per sample",
    run=run,
    checks=(
        _times_as_far("uniform midpoint steps are more than twice as far as Bespoke", ["midpoint, uniform"], by=2.0),
        _times_as_far("the best dedicated solver on its best grid is so many times as far, by the mean", list(SOLVERS)),
        _times_as_far("and by the root mean square", list(SOLVERS), measure="root mean square"),
        _times_as_far("so is time alone, or scale alone (n = 5)", ["time only", "scale only"], STEPS[-1:]),
        times(
            "uniform midpoint steps are so many times as far as learnt times alone (n = 5)",
            "time only, n = 5",
            "midpoint, uniform, n = 5",
        ),
    ),
)
