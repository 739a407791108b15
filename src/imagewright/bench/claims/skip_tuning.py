"""Skip-Tuning: skip connections scaled down at few steps give better samples, and a worse pixel loss (2402.15170)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from imagewright.bench.claims.claim import Budget, Claim, Row, lower, times
from imagewright.bench.claims.digits import DigitsDistance, trained_digits
from imagewright.data import open_images, to_uint8
from imagewright.data.pixels import from_uint8
from imagewright.guidance import SkipScale, SkipTuned
from imagewright.methods.edm import loss_weight
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.samplers import Heun
from imagewright.types import Condition

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""From no bottom skip at all to the plain network."""
STEPS = (3, 5, 10)
CHOSEN, PLAIN = "fresh, {} steps, chosen rho", "fresh, {} steps, rho = 1"


def losses(model: nn.Module, distance: DigitsDistance, seed: int) -> tuple[float, float]:
    """EDM's weighted loss on held-out images, four noise draws each, in pixels and in the classifier's features."""
    images = open_images("digits", split="test")
    rows = list(range(len(images))) * 4
    clean, noise = from_uint8(images.images(rows)), StepNoise(seed, 8)
    sigma = LogNormal().sample(noise, clean[:, 0, 0, 0])
    noisy = clean + sigma[:, None, None, None] * noise.normal(clean)
    with torch.no_grad():
        denoised = model(noisy, sigma, Condition(label=torch.as_tensor(images.labels[rows])))
    weight = loss_weight(sigma, 0.5)
    pixels = (denoised - clean).square().flatten(1).mean(1)
    given, wanted = (distance.extractor(to_uint8(x))[0].astype(np.float64) for x in (denoised, clean))
    features = torch.as_tensor(np.square(given - wanted).mean(1))
    return float((weight * pixels).mean()), float((weight * features).mean())


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Choose rho_bottom at each number of steps on one set of noise; measure on other noise and held-out images."""
    images, count = (24_000, 400) if budget == "full" else (256, 32)
    model = trained_digits(seed, images, 8)
    search, held_out = DigitsDistance("train"), DigitsDistance("test")
    tuned = {factor: SkipTuned(model, SkipScale(bottom=factor)) for factor in FACTORS}
    lost = {factor: losses(tuned[factor], held_out, seed) for factor in FACTORS}

    def more(factor: float) -> dict[str, float]:
        pixels, features = lost[factor]
        return {"rho_bottom": factor, "pixel loss": pixels, "feature loss": features}

    rows = [
        Row(
            name=f"{steps} steps, rho = {factor:g}",
            score=search.of(tuned[factor], Heun(num_steps=steps), count, seed + 1000),
            cost=2 * steps - 1,
            curve=f"rho = {factor:g}",
            more=more(factor),
        )
        for factor in FACTORS
        for steps in STEPS
    ]
    for steps in STEPS:
        best = min((row for row in rows if row.cost == 2 * steps - 1), key=lambda row: row.score).more["rho_bottom"]
        for name, factor in ((CHOSEN, best), (PLAIN, 1.0)):
            score = held_out.of(tuned[factor], Heun(num_steps=steps), 2 * count, seed + 2000)
            rows.append(Row(name=name.format(steps), score=score, cost=2 * steps - 1, more=more(factor)))
    return [*rows, Row(name="real digits", score=held_out.floor(), cost=0, more=more(1.0))]


CLAIM = Claim(
    key="skip_tuning",
    paper="2402.15170",
    headline="ImageNet-64 (EDM) FID 1.75 at 19 NFE and 1.57 at 39, without training",
    miniature="The recipe edm-digits with 8 channels, after 24,000 images; 3, 5 and 10 Heun steps. rho_bottom chosen "
    "for each among five on 400 images against the training set, and measured on 800 others against held-out images.",
    measure="fd_digits",
    cost="NFE per image",
    run=run,
    checks=(
        times("5 steps: the chosen rho is better than rho = 1", CHOSEN.format(5), PLAIN.format(5)),
        times("10 steps: the chosen rho is better than rho = 1", CHOSEN.format(10), PLAIN.format(10)),
        lower("5 steps want a smaller rho than 10", CHOSEN.format(5), CHOSEN.format(10), of="rho_bottom"),
        times(
            "the pixel loss at the rho of 5 steps is higher than the plain network's",
            PLAIN.format(5),
            CHOSEN.format(5),
            of="pixel loss",
        ),
        times("its loss in the classifier's features is lower", CHOSEN.format(5), PLAIN.format(5), of="feature loss"),
    ),
)
