"""AutoDiffusion: time steps, and skipped layers, found by evolution beat uniform and random ones (2309.10438)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Claim, Row, times
from imagewright.bench.claims.digits import trained_digits
from imagewright.data import open_images
from imagewright.guidance.layer_skipping import layers_of
from imagewright.metrics import digits_features, embed
from imagewright.networks.unet import UNet
from imagewright.noise import StepNoise, derive_seed
from imagewright.oracles import GaussianMixture
from imagewright.paths.discrete import DiscreteSchedule
from imagewright.samplers import DDIM
from imagewright.tuning.autodiffusion import AutoDiffusion, Candidate, Fitness, Space, random_search, search
from imagewright.tuning.feature_distance import FeatureDistance

STEPS = 4
MODES = 6
FULL_STEPS = 1.7
"""The layer budget, in evaluations of the full network: one step of it, or two steps without four of 26 layers."""
SCHEDULE = DiscreteSchedule()
TIMES = AutoDiffusion()
JOINT = AutoDiffusion.joint(population=20, parents=5, mutants=10, crossovers=4, first_random=10, max_prun=0.3)
"""The published shares of a joint population, of 20 in place of 50."""
TINY = AutoDiffusion(generations=2, population=5, parents=2, mutants=2, crossovers=1, first_random=2, max_prun=0.3)


# --- time steps alone: a mixture in the plane -------------------------------------------------------------------------


def mixture(seed: int) -> GaussianMixture:
    """Six modes of unequal weight at random places, of unit variance in all."""
    noise = StepNoise(seed, 0)
    means = noise.normal(torch.empty(MODES, 2, dtype=torch.float64))
    weights = 0.5 + noise.uniform(torch.empty(MODES, dtype=torch.float64))
    means = means - (weights[:, None] * means).sum(0) / weights.sum()
    scale = ((weights[:, None] * means**2).sum(0) / weights.sum()).sqrt()
    return GaussianMixture(means / scale, 0.1, weights)


def drawn(oracle: GaussianMixture, candidate: Candidate, count: int, *key: int) -> Tensor:
    """Points that DDIM draws with a candidate, [count, 2]."""
    levels = tuple(candidate.levels(SCHEDULE, oracle))
    # The paper starts from x_t of unit variance, which in a denoiser's coordinates is 1 + sigma^2.
    start = (1 + levels[0] ** 2) ** 0.5 / levels[0]
    latents = start * StepNoise(*key).normal(torch.empty(count, 2, dtype=torch.float64))
    return DDIM(levels=levels)(oracle, latents)


class Energy:
    """`metrics.energy` to fixed points b [m, 2], whose own term is computed once: it is asked a thousand times."""

    def __init__(self, points: Tensor) -> None:
        self.points, self.within = points, _within(points)

    def to(self, points: Tensor) -> float:
        """The distance of points [n, 2]."""
        return 2 * _mean_distance(points, self.points) - _within(points) - self.within


def _within(points: Tensor) -> float:
    return _mean_distance(points, points) * len(points) / (len(points) - 1)


def _mean_distance(a: Tensor, b: Tensor) -> float:
    a, b, total = a.float(), b.float(), 0.0
    for start in range(0, len(a), 64):  # few rows at a time: their distances stay in the processor's cache
        total += float(torch.cdist(a[start : start + 64], b).sum(dtype=torch.float64))
    return total / (len(a) * len(b))


def searched_times(seed: int, budget: Budget) -> list[Row]:
    """Energy distance of fresh points to fresh references, for the uniform, the searched and the best random times."""
    full = budget == "full"
    few, many = (600, 10_000) if full else (100, 200)
    config = dataclasses.replace(TIMES if full else TINY, seed=seed)
    oracle, space = mixture(seed), Space(schedule=SCHEDULE, steps=STEPS)
    real = Energy(oracle.sample(2 * few, StepNoise(seed, 1)))

    def fitness(candidate: Candidate) -> float:
        return real.to(drawn(oracle, candidate, few, seed, 2, *candidate.times))

    fresh = Energy(oracle.sample(many, StepNoise(seed, 3)))
    contenders = {
        "uniform": space.uniform(),
        "searched": search(space, fitness, config).best,
        "best random": random_search(space, fitness, config).best,
    }
    return [
        Row(
            name=f"plane, {name} times",
            score=1000 * fresh.to(drawn(oracle, candidate, many, seed, 4)),
            cost=STEPS,
            more={f"t{i + 1}": float(t) for i, t in enumerate(candidate.times)},
        )
        for name, candidate in contenders.items()
    ]


# --- with skipped layers: the digits denoiser -------------------------------------------------------------------------


def searched_layers(seed: int, budget: Budget) -> list[Row]:
    """fd_digits of fresh images at a budget of layers: times alone, times and layers searched, and best random."""
    full = budget == "full"
    model = trained_digits(seed, 16_000 if full else 256, 8, labels=False)
    images, extractor = open_images("digits", split="train", labels=False), digits_features()
    measure = FeatureDistance(
        model=model,
        spec=images.spec,
        extractor=extractor,
        reference=embed(images, extractor).moments,
        schedule=SCHEDULE,
        images=150 if full else 8,
        seed=derive_seed(seed, 5),
    )
    layers = len(layers_of(cast(UNet, model.network)))
    known = tuple(SCHEDULE.known(measure.model.sigma_min, measure.model.sigma_max))  # type: ignore[arg-type]
    space = Space(schedule=SCHEDULE, times=known, layers=layers, max_layers=int(FULL_STEPS * layers))
    alone = Space(schedule=SCHEDULE, times=known, steps=space.full_steps)
    config, fitness = dataclasses.replace(JOINT if full else TINY, seed=seed), cast(Fitness, measure)
    fresh = dataclasses.replace(measure, images=2000 if full else 16, seed=derive_seed(seed, 6))
    contenders = {
        "times searched": search(
            alone, fitness, dataclasses.replace(config, generations=min(5, config.generations))
        ).best,
        "times and layers searched": search(space, fitness, config).best,
        "best random times and layers": random_search(space, fitness, config).best,
    }
    return [
        Row(
            name=f"digits, {name}",
            score=fresh(candidate),
            cost=space.cost(candidate.skips) / layers,
            more={"steps": len(candidate.times), "skipped": sum(map(len, candidate.skips))},
        )
        for name, candidate in contenders.items()
    ]


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Both parts."""
    return [*searched_times(seed, budget), *searched_layers(seed, budget)]


CLAIM = Claim(
    key="autodiffusion",
    paper="2309.10438",
    headline="ImageNet-64 FID 17.86 at 4 steps, against 138.66 with uniform steps",
    miniature="Plane: exact denoiser of 6 modes, cosine schedule, 4 of 1000 time steps; 500 candidates, by the energy "
    "distance of 600 points; reported on 10,000 fresh ones. Digits: the recipe edm-digits with 8 channels, without "
    "classes, after 16,000 images; layers worth 1.7 steps of the full network; 300 candidates (100 where the single "
    "step's time is all there is to choose), by 150 images each; reported on 2000 fresh ones. The random search walks "
    "through the same stages with as many.",
    measure="energy distance x 1000 (plane), fd_digits (digits)",
    cost="full network evaluations per sample",
    run=run,
    checks=(
        times("plane: searched times are better than uniform DDIM's", "plane, searched times", "plane, uniform times"),
        times(
            "plane: they are better than the best of as many random ones",
            "plane, searched times",
            "plane, best random times",
        ),
        times(
            "digits: with skipped layers the budget buys better images than with the full network",
            "digits, times and layers searched",
            "digits, times searched",
        ),
        times(
            "digits: searched times and layers are better than the best of as many random ones",
            "digits, times and layers searched",
            "digits, best random times and layers",
        ),
    ),
)
