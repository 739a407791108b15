"""Skip-Tuning: skip connections scaled down at few steps give better samples, and a worse pixel loss (2402.15170)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.data import ImageSet, open_images
from imagewright.data.pixels import from_uint8
from imagewright.guidance import SkipScale, SkipTuned
from imagewright.methods.edm import denoising_loss
from imagewright.metrics import digits_features, embed
from imagewright.metrics.frechet import frechet_of_images
from imagewright.models.files import ModelFile
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.experiment import run_experiment
from imagewright.types import Condition

FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0)
STEPS = 5


def digits_denoiser(seed: int, images: int) -> ModelFile:
    """The recipe edm-digits, cut to so many images."""
    recipe = RECIPES["edm-digits"]()
    training = replace(recipe.training, total_images=images, snapshot_images=images, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        run_experiment(replace(recipe, training=training), Path(folder) / "run")
        return find_model(Path(folder) / "run")


def _pixel_loss(file: ModelFile, factor: float, images: ImageSet, seed: int) -> float:
    """EDM's weighted denoising loss on held-out images, four noise draws each."""
    rows = list(range(len(images))) * 4
    clean, noise = from_uint8(images.images(rows)), StepNoise(seed, 8)
    cond = Condition(label=torch.as_tensor(images.labels[rows]))
    sigma = LogNormal().sample(noise, clean[:, 0, 0, 0])
    with torch.no_grad():
        model = SkipTuned(file.model, SkipScale(bottom=factor))
        return float(denoising_loss(model, clean, sigma, cond, noise, 0.5).mean())


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Choose rho_bottom on one set of noise and the training images; measure on other noise and held-out images."""
    full = budget == "full"
    file = digits_denoiser(seed, 24_000 if full else 256)
    extractor, held_out = digits_features(), open_images("digits", split="test")
    train_moments = embed(open_images("digits", split="train"), extractor).moments
    test_moments = embed(held_out, extractor).moments

    def generator(factor: float) -> ImageGenerator:
        return ImageGenerator(SkipTuned(file.model, SkipScale(bottom=factor)), file.spec, Heun(num_steps=STEPS))

    count = 1000 if full else 32
    rows = []
    for factor in FACTORS:
        batches = generator(factor).batches(count, seed=seed + 1000, batch_size=250)
        score = frechet_of_images(batches, extractor, train_moments)
        loss = _pixel_loss(file, factor, held_out, seed)
        more = {"rho_bottom": factor, "pixel loss": loss}
        rows.append(Row(name=f"search, rho = {factor:g}", score=score, cost=9, curve="search", more=more))
    chosen = min(rows, key=lambda row: row.score).more["rho_bottom"]
    for name, factor in (("report, chosen rho", chosen), ("report, rho = 1", 1.0)):
        batches = generator(factor).batches(2 * count, seed=seed + 2000, batch_size=250)
        score = frechet_of_images(batches, extractor, test_moments)
        more = {"rho_bottom": factor, "pixel loss": _pixel_loss(file, factor, held_out, seed)}
        rows.append(Row(name=name, score=score, cost=9, curve=name, more=more))
    return rows


def _chosen(rows: Rows) -> float:
    return rows["report, chosen rho"].more["rho_bottom"]


CLAIM = Claim(
    key="skip_tuning",
    paper="2402.15170",
    headline="ImageNet-64 (EDM) FID 1.75 at 19 NFE and 1.57 at 39, without training",
    miniature="The digits U-Net after 24,000 images, 5 Heun steps. rho_bottom chosen among five on 1000 images against "
    "the training set; measured on 2000 others against held-out images.",
    measure="fd_digits",
    cost="NFE per image",
    run=run,
    checks=(
        Check(says="the chosen rho is below 1", holds=lambda r: _chosen(r) < 1),
        Check(
            says="on fresh noise and held-out images it is better than rho = 1 at equal NFE",
            holds=lambda r: r.score("report, chosen rho") < r.score("report, rho = 1"),
        ),
        Check(
            says="its pixel denoising loss is higher",
            holds=lambda r: r["report, chosen rho"].more["pixel loss"] > r["report, rho = 1"].more["pixel loss"],
        ),
    ),
)
