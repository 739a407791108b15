"""Meta CLIP 2: a threshold for each language keeps rare things seen, and a larger batch keeps English (2507.22062)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows, lower, times
from imagewright.data import ImageSet, Loader, from_uint8
from imagewright.data.captions import CaptionsConfig, Rebalance
from imagewright.data.curation.balancing import Balance
from imagewright.data.curation.labelled import balanced
from imagewright.data.standin_captions import SHARES, standin_captions
from imagewright.methods.metaclip2 import MetaCLIP2
from imagewright.metrics import digits_features, embed
from imagewright.metrics.frechet import frechet_distance
from imagewright.models.image_text import ImageText
from imagewright.networks import CLIP, CLIPConfig, SongUNet
from imagewright.noise import derive_seed
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.trainer import Trainer

PAIRS = 4000
ZIPF = 2.0
STEPS, BATCH = 180, 32
GENERATED_BATCH, GENERATOR_STEPS, GENERATOR_RATE = 32, 200, 4e-3
"""The one rate that was tried, on seed 0 with a batch of 64; for both alike."""
RARE = "ja"
THIRD = 3
"""Of ten classes, those of the fewest captions."""


@dataclass(frozen=True)
class Arm:
    """A contender: how its pool is balanced, in which languages, and its batch and rate."""

    rule: Rebalance = "language"
    languages: tuple[str, ...] = ()
    batch: int = BATCH
    rate: float = 2e-3


ARMS = {
    "a threshold for each language": Arm(rate=4e-3),
    "one threshold": Arm("global"),
    "not balanced": Arm("none"),
    "English alone": Arm(languages=("en",)),
    "larger batch": Arm(batch=round(BATCH / SHARES["en"]), rate=4e-3),
}
"""Rates are the better of 2e-3 and 4e-3 on seeds 0 and 1 by what is named in all languages (English alone: in English).
On seed 0 neither 1e-3 nor 8e-3 was better where it was next; in 300 steps English gains by the others' pictures."""


def trained(arm: Arm, seed: int, steps: int, pairs: int) -> tuple[ImageText, Any]:
    """A CLIP after so many steps. Equal seeds begin alike and have the same pool."""
    data = CaptionsConfig(pairs=pairs, seed=seed, zipf=ZIPF, length=9, balance=arm.rule, languages=arm.languages).open()
    sizes = CLIPConfig(
        img_resolution=8, in_channels=1, patch=4, width=32, depth=4, head_width=16, embed=24, length=9,
        vocabulary=data.texts.vocabulary.values, text_width=32, text_depth=2, text_heads=2,
    )  # fmt: skip
    method = MetaCLIP2(area=1.0, resize="box")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 0))
        parts = method.parts(network=CLIP(sizes), texts=data.texts)
    total = steps * arm.batch
    optimizer = OptimizerConfig(
        kind="adamw", lr=arm.rate, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, decay_vectors=False,
        lr_ramp_images=0.05, lr_cooldown_images=0.95, lr_cooldown_shape="cosine",
    )  # fmt: skip
    config = TrainingConfig(total_images=total, batch=arm.batch, seed=seed, optimizer=optimizer, log_images=total)
    trainer = Trainer(method, parts, Loader(data, arm.batch, seed), config, Path())  # only `train` writes
    for _ in range(steps):
        trainer.train_step()
    return parts.clip.eval(), data


@torch.no_grad()
def accuracies(model: ImageText, images: ImageSet) -> dict[str, Tensor]:
    """Of each language, the share of right answers in each class, [10]."""
    pooled = model.encode(from_uint8(images.images())).pooled
    labels = torch.from_numpy(images.labels)
    found = {}
    for language in SHARES:
        right = (model.logits(pooled, model.classes(language)).argmax(1) == labels).double()
        found[language] = torch.stack([right[labels == k].mean() for k in range(images.spec.num_classes)])
    return found


def pool_of_labels(seed: int, pairs: int) -> tuple[ImageSet, ImageSet]:
    """The English pairs' pictures with the classes that their captions name, long-tailed; and the even test."""
    made = standin_captions("digits", None, pairs, seed, ZIPF)
    told = np.array([language == "en" for language in made.languages]) & (made.concept >= 0)
    return made.images.subset(made.picture[told]), made.held_out


def generator(images: ImageSet, seed: int, steps: int) -> torch.nn.Module:
    """A denoiser that is told classes, the recipe's in small, after so many steps. Equal seeds begin alike."""
    recipe = RECIPES["edm-digits"]()
    total = steps * GENERATED_BATCH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 1))
        network = SongUNet(
            replace(recipe.network, img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=16)
        )
        parts = recipe.method.parts(network=network, spec=images.spec)
    optimizer = replace(
        recipe.training.optimizer, lr=GENERATOR_RATE, lr_ramp_images=total // 13, lr_decay_images=None,
        lr_cooldown_images=total // 2,
    )  # fmt: skip
    config = replace(
        recipe.training, total_images=total, batch=GENERATED_BATCH, seed=seed, optimizer=optimizer,
        ema=EmaConfig(halflife_images=total / 20, rampup_ratio=None),
    )  # fmt: skip
    trainer = Trainer(recipe.method, parts, Loader(images, GENERATED_BATCH, seed), config, Path())
    for _ in range(steps):
        trainer.train_step()
    model = trainer.product()
    assert model is not None
    return model.eval()


def distance(model: torch.nn.Module, test: ImageSet, seed: int, each: int) -> float:
    """fd_digits of as many images of each class to the even test."""
    extractor, labels = digits_features(), np.repeat(np.arange(10), each)
    made = ImageGenerator(model, test.spec, Heun(num_steps=8)).generate(
        len(labels), labels=labels, seed=seed, batch_size=250
    )
    return frechet_distance(embed(ImageSet.of(made, labels), extractor).moments, embed(test, extractor).moments)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Wrong answers of each CLIP, and the distances of both generators."""
    full = budget == "full"
    steps, pairs = (STEPS, PAIRS) if full else (1, 400)
    pool = standin_captions("digits", None, pairs, seed, ZIPF)
    rarest = torch.from_numpy(pool.order[RARE][-THIRD:])
    rows = []
    for name, arm in ARMS.items():
        right = accuracies(trained(arm, seed, steps, pairs)[0], pool.held_out)
        wrong = {language: 1 - float(each.mean()) for language, each in right.items()}
        rare = 1 - float(right[RARE][rarest].mean())
        mean = sum(wrong.values()) / len(wrong)
        rows.append(Row(name=name, score=mean, cost=steps * arm.batch, more={**wrong, "rare": rare}))
    images, test = pool_of_labels(seed, pairs)
    draws = {"generator, balanced draw": balanced(images, Balance())[0], "generator, raw draw": images}
    steps = GENERATOR_STEPS if full else 1
    for name, data in draws.items():
        score = distance(generator(data, seed, steps), test, seed, 50 if full else 2)
        rows.append(Row(name=name, score=score, cost=steps * GENERATED_BATCH))
    return rows


OURS = "a threshold for each language"


def english_kept(rows: Rows) -> float:
    """What English gains by it, over the better of both controls."""
    return min(rows.number(other, "en") for other in ("one threshold", "not balanced")) - rows.number(OURS, "en")


CLAIM = Claim(
    key="metaclip2",
    paper="2507.22062",
    headline="H/14, 29 B pairs of all languages: ImageNet 81.3 (English alone 80.5), Babel-ImageNet 50.2; with as many "
    "pairs as English alone has 79.5. B/32: a list and a threshold for each language 64.7, one for all 62.1",
    miniature="4,000 made-up captions of handwritten digits in three languages, the third four times rarer, each with "
    "another head (k^-2); a CLIP of 4 and 2 blocks, width 32, 180 steps of 32 pairs: a threshold for each language, "
    "English's for all, none; English alone; and a batch of 73 (1 / 0.44). And two denoisers that are told classes, of "
    "the English pairs' pictures as they come or balanced, 200 steps of 32.",
    measure="share of wrong answers, mean over languages; of generators fd_digits",
    cost="pairs",
    run=run,
    checks=(
        lower("of the rarest third in the rare language 5 points fewer are wrong than without balancing", OURS,
              "not balanced", of="rare", by=0.05),
        lower("of the rarest third in the rare language 5 points fewer are wrong than with one threshold", OURS,
              "one threshold", of="rare", by=0.05),
        Check(says="English loses less than 1 point to either", effect=english_kept, margin=-0.01),
        lower("with the batch of English alone, other languages cost English", "English alone", OURS, of="en"),
        lower("with a batch larger by 1 / 0.44 English is within 1 point of English alone", "larger batch",
              "English alone", of="en", by=-0.01),
        Check(
            says="and the others are better than chance by 50 points",
            effect=lambda rows: 0.9 - max(rows.number("larger batch", each) for each in ("de", "ja")),
            margin=0.5,
        ),
        times("a generator of the balanced draw is nearer to the even test", "generator, balanced draw",
              "generator, raw draw"),
    ),
)  # fmt: skip
