"""SIMS: moving away from a self-trained copy improves a model, and a self-consuming loop survives (2408.16333)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Claim, Row, lower
from imagewright.bench.claims.plane import PointTraining, from_set, point_denoiser, sampled, train
from imagewright.bench.claims.rings import distance_to, ring
from imagewright.guidance import sims
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.samplers import UniPC
from imagewright.training.config import EmaConfig
from imagewright.training.ema import Ema, HalfLife
from imagewright.tuning.sims import Recipe, best_setting, self_consuming

STD = 0.05
BUDGETS = (60, 125, 250, 500)
"""Updates of fine-tuning: 2% to 17% of the base's own."""
OMEGAS, CONTROL_OMEGAS = (0.25, 0.5, 1.0, 2.0, 3.0), (-1.0, -0.5, 0.5, 1.0, 2.0)
SWEEP = (-1.0, 0.5, 1.0, 2.0)
GENERATIONS = 2
PLAIN_LAST, SIMS_LAST = (f"{which} loop, generation {GENERATIONS - 1}" for which in ("plain", "SIMS"))
TWICE_THE_STEPS, CONTROL = "base, twice the steps", "copy trained on real points"
SAMPLER = UniPC(num_steps=14, sigma_max=10.0, sigma_min=0.02)
TWICE = replace(SAMPLER, num_steps=28)
Copies = tuple[EDMPrecond, ...]
"""Fine-tuned copies, one for each budget."""


class Plane:
    """The recipe of the loop for points: how much is trained on how many."""

    def __init__(self, seed: int, full: bool) -> None:
        self.seed, self.full = seed, full
        self.budgets = BUDGETS if full else (1, 2)
        self.base = PointTraining(iterations=3000 if full else 8, batch=256, lr=3e-3, seed=seed)
        self.synthetic = 20_000 if full else 64
        self.budget = self.budgets[0]
        self.first: EDMPrecond | None = None
        self.recipe: Recipe[EDMPrecond, Tensor] = Recipe(self._train, self._fine_tune, self._draw, self._mix)

    def copies(self, model: EDMPrecond, points: Tensor, generation: int, budgets: Sequence[int]) -> Copies:
        """Copies fine-tuned at the base's rate as it was after two thirds of its run: one for each budget."""
        average, found = Ema(model, HalfLife(5_000, None)), []

        def keep(step: int, student: nn.Module) -> None:
            average.update(student, step * 256, 256)
            if step in budgets:
                found.append(copy.deepcopy(model))
                found[-1].load_state_dict(average.state)

        seed = self.seed + 10 * generation + 1
        constant = PointTraining(iterations=budgets[-1], batch=256, lr=1e-3, seed=seed, cooldown=False)
        train(model, from_set(points), replace(constant, ema=EmaConfig(halflife_images=5_000)), on_step=keep)
        return tuple(found)

    def draw(self, model: EDMPrecond, other: EDMPrecond | None, omega: float, seed: int, count: int) -> Any:
        """Points [count, 2] of a model, or of it and away from another."""
        return sampled(model if other is None else sims(model, other, omega), SAMPLER, seed, count)

    def _train(self, points: Tensor, generation: int) -> EDMPrecond:
        """Every loop begins with the same model, which is trained once."""
        if generation == 0 and self.first is not None:
            return self.first
        seed = self.seed + 10 * generation
        model = train(point_denoiser(32, 3, seed), from_set(points), replace(self.base, seed=seed))
        self.first = self.first or model
        return model

    def _fine_tune(self, model: EDMPrecond, points: Tensor, generation: int) -> EDMPrecond:
        return self.copies(model, points, generation, [self.budget])[0]

    def _draw(self, base: EDMPrecond, auxiliary: EDMPrecond | None, omega: float, generation: int) -> Tensor:
        seed = self.seed + 10 * generation + 2 + int(auxiliary is not None)
        drawn = self.draw(base, auxiliary, omega, seed, self.synthetic)
        return torch.from_numpy(drawn).float().reshape(-1, 2, 1, 1)

    def _mix(self, real: Tensor, synthetic: Tensor, generation: int) -> Tensor:
        """Sixty synthetic points to each hundred real ones, the most at which the paper still sees improvement."""
        return torch.cat([real, synthetic[: round(0.6 * len(real))]])


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance to the true density on fresh noise; budget and omega are chosen on other noise."""
    full = budget == "full"
    count = 6000 if full else 64
    oracle, plane = ring(seed, STD), Plane(seed, full)
    real = oracle.sample(2000 if full else 64, StepNoise(seed, 7)).float()
    base = plane.recipe.train(real, 0)

    def score(model: EDMPrecond, other: EDMPrecond | None, omega: float, fresh: int) -> float:
        return distance_to(oracle, plane.draw(model, other, omega, seed + 2000 + fresh, count if fresh else count // 2))

    def chosen(copies: Copies, omegas: Sequence[float]) -> tuple[int, float]:
        settings = product(range(len(copies)), omegas)
        return best_setting([((k, o), score(base, copies[k], o, 0)) for k, o in settings])

    own = plane.copies(base, plane.recipe.draw(base, None, 0.0, 0), 0, plane.budgets)
    more = plane.copies(base, real, 0, plane.budgets)
    (at, omega), (control, strength) = chosen(own, OMEGAS), chosen(more, CONTROL_OMEGAS)
    twice = distance_to(oracle, sampled(base, TWICE, seed + 2001, count))
    exact = distance_to(oracle, sampled(oracle, SAMPLER, seed + 2001, count))
    plain, pair = float(SAMPLER.nfe), 2.0 * SAMPLER.nfe
    settings = {"updates": float(plane.budgets[at]), "omega": omega}
    its_own = {"updates": float(plane.budgets[control]), "omega": strength}
    rows = [
        Row(name="exact denoiser", score=exact, cost=plain),
        Row(name="base", score=score(base, None, 0.0, 1), cost=plain),
        Row(name=TWICE_THE_STEPS, score=twice, cost=pair),
        Row(name="SIMS", score=score(base, own[at], omega, 1), cost=pair, more=settings),
        Row(name=CONTROL, score=score(base, more[control], strength, 1), cost=pair, more=its_own),
    ]
    for o in SWEEP:
        value = score(base, own[at], o, 1)
        rows.append(Row(name=f"own samples, omega = {o:g}", score=value, cost=plain if o == -1 else pair))
    plane.budget = plane.budgets[at]
    for what, strength in (("plain loop", 0.0), ("SIMS loop", omega)):
        for g in self_consuming(real, plane.recipe, GENERATIONS, strength):
            value = score(g.base, g.auxiliary, strength, 1)
            rows.append(Row(name=f"{what}, generation {g.index}", score=value, cost=pair if strength else plain))
    return rows


CLAIM = Claim(
    key="sims",
    paper="2408.16333",
    headline="CIFAR-10 FID 1.33 (from 1.97), ImageNet-64 0.92 (from 1.58)",
    miniature="A small network on 2000 points of 8 modes; a copy fine-tuned on 20,000 of its own. The updates of "
    "fine-tuning (four budgets) and omega (five) are searched together on noise of their own; so are those of the "
    "control, a copy that goes on with the real points and may be moved to or from. Then a second generation, trained "
    "on the real points and 60% as many of the first's. UniPC, 14 steps; scored against the true density.",
    measure="energy distance x 1000",
    cost="NFE per sample",
    run=run,
    checks=(
        lower("SIMS is below the base at equal calls", "SIMS", TWICE_THE_STEPS),
        lower("the self-trained copy alone (omega = -1) is above the base", "base", "own samples, omega = -1"),
        lower("SIMS is below what as many updates on the real points come to", "SIMS", CONTROL),
        lower("the plain loop's second generation is above its first", "plain loop, generation 0", PLAIN_LAST),
        lower("with SIMS in both generations the second is below the plain loop's second", SIMS_LAST, PLAIN_LAST),
        lower("and below the first base model", SIMS_LAST, TWICE_THE_STEPS),
    ),
)
