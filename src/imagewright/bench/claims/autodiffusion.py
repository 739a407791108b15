"""AutoDiffusion: time steps, and skipped layers, found by evolution beat uniform and random ones (2309.10438)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row
from imagewright.data import ImageSet, Loader
from imagewright.guidance.layer_skipping import layers_of
from imagewright.metrics import digits_features, embed
from imagewright.networks.unet import UNet
from imagewright.noise import StepNoise, derive_seed
from imagewright.oracles import GaussianMixture
from imagewright.paths.discrete import DiscreteSchedule
from imagewright.recipes import RECIPES
from imagewright.samplers import DDIM
from imagewright.training.experiment import assemble
from imagewright.training.trainer import Trainer
from imagewright.tuning.autodiffusion import AutoDiffusion, Candidate, Space, random_search, search
from imagewright.tuning.feature_distance import FeatureDistance

STEPS = 4
MODES = 6
FULL_STEPS = 3.5
"""The layer budget, in evaluations of the full network."""
SCHEDULE = DiscreteSchedule()
JOINT = AutoDiffusion(
    generations=4, population=20, parents=5, mutants=10, crossovers=4, first_random=10, full_generations=2, max_prun=0.3
)
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
    few, many = (2000, 20_000) if full else (100, 200)
    config = AutoDiffusion(seed=seed) if full else dataclasses.replace(TINY, seed=seed)
    oracle, space = mixture(seed), Space(schedule=SCHEDULE, steps=STEPS)
    real = Energy(oracle.sample(2 * few, StepNoise(seed, 1)))

    def fitness(candidate: Candidate) -> float:
        return real.to(drawn(oracle, candidate, few, seed, 2, *candidate.times))

    found = search(space, fitness, config)
    control = random_search(space, fitness, len(found.best_so_far), config)
    fresh = Energy(oracle.sample(many, StepNoise(seed, 3)))
    contenders = {"uniform": space.uniform(), "searched": found.best, "best random": control.best}
    return [
        Row(
            name=f"plane, {name} times",
            score=fresh.to(drawn(oracle, candidate, many, seed, 4)),
            cost=STEPS,
            more={f"t{i + 1}": float(t) for i, t in enumerate(candidate.times)},
        )
        for name, candidate in contenders.items()
    ]


# --- with skipped layers: a small network on digits -------------------------------------------------------------------


def trained(seed: int, images: int) -> tuple[torch.nn.Module, ImageSet]:
    """The digits recipe with half its channels, cut short: the denoiser, and what it learned from."""
    recipe = RECIPES["edm-digits"]()
    optimizer = dataclasses.replace(
        recipe.training.optimizer, lr_ramp_images=images // 10, lr_decay_images=None, lr_cooldown_images=images // 2
    )
    ema = dataclasses.replace(recipe.training.ema, halflife_images=images // 20)
    training = dataclasses.replace(
        recipe.training, seed=seed, total_images=images, optimizer=optimizer, ema=ema, checkpoint_images=images
    )
    network = dataclasses.replace(recipe.network, model_channels=16)
    assembled = assemble(dataclasses.replace(recipe, training=training, network=network))
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(assembled.images, training.batch, seed)
        trainer = Trainer(recipe.method, assembled.parts, loader, training, Path(folder))
        trainer.train()
    model: torch.nn.Module = assembled.parts.denoiser
    model.load_state_dict(trainer.product_state())
    return model.eval(), assembled.images


def searched_layers(seed: int, budget: Budget) -> list[Row]:
    """fd_digits of fresh images at a budget of layers: the full network's uniform steps, searched, best random."""
    full = budget == "full"
    model, images = trained(seed, 12_800 if full else 128)
    extractor = digits_features()
    measure = FeatureDistance(
        model=model,
        spec=images.spec,
        extractor=extractor,
        reference=embed(images, extractor).moments,
        schedule=SCHEDULE,
        images=200 if full else 8,
        seed=derive_seed(seed, 5),
    )
    layers = len(layers_of(cast(UNet, model.network)))
    known = tuple(SCHEDULE.known(measure.model.sigma_min, measure.model.sigma_max))  # type: ignore[arg-type]
    space = Space(schedule=SCHEDULE, times=known, layers=layers, max_layers=int(FULL_STEPS * layers))
    config = dataclasses.replace(JOINT if full else TINY, seed=seed)
    found = search(space, measure, config)
    control = random_search(space, measure, len(found.best_so_far), config)
    fresh = dataclasses.replace(measure, images=2000 if full else 16, seed=derive_seed(seed, 6))
    contenders = {"uniform, full network": space.uniform(), "searched": found.best, "best random": control.best}
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
    miniature="Plane: exact denoiser of 6 modes, cosine schedule, 4 of 1000 time steps, 500 evaluations of an energy "
    "distance on 2000 points; reported on 20000 fresh ones. Digits: a small U-Net, layers worth 3.5 steps of the full "
    "network, 80 evaluations on 200 images each; reported as fd_digits of 2000 fresh ones. The random control may do "
    "as many evaluations.",
    measure="energy distance (plane), fd_digits (digits)",
    cost="full network evaluations per sample",
    run=run,
    checks=(
        Check(
            says="plane: searched times are better than uniform DDIM's, by at least a quarter",
            holds=lambda r: r.score("plane, searched times") <= 0.75 * r.score("plane, uniform times"),
        ),
        Check(
            says="plane: they are better than the best of as many random ones",
            holds=lambda r: r.score("plane, searched times") < r.score("plane, best random times"),
        ),
        Check(
            says="digits: searched times and layers are better than uniform steps of the full network",
            holds=lambda r: r.score("digits, searched") < r.score("digits, uniform, full network"),
        ),
        Check(
            says="digits: they are better than the best of as many random ones at the same budget",
            holds=lambda r: r.score("digits, searched") < r.score("digits, best random"),
        ),
    ),
)
