"""Denoisers of digits that several claims train alike: the recipe edm-digits, its schedules scaled to a shorter run.

Equal seeds, lengths and widths give equal weights. Noise and classes of the images that are scored follow from a seed
of their own, so contenders are paired.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

from torch import nn

from imagewright.data import Loader, open_images
from imagewright.metrics import digits_features, embed
from imagewright.metrics.frechet import frechet_distance, frechet_of_images
from imagewright.models.tokens import PixelCodec
from imagewright.recipes import RECIPES
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import assemble
from imagewright.training.trainer import Trainer
from imagewright.types import Sampler


def trained_digits(seed: int, images: int, channels: int = 32, *, labels: bool = True) -> nn.Module:
    """The recipe's denoiser after so many images; ramp, decay, cooldown and average keep their shares of the run.

    labels: whether it is told the classes.
    """
    recipe = RECIPES["edm-digits"]()
    share, given = images / recipe.training.total_images, recipe.training.optimizer
    optimizer = dataclasses.replace(
        given,
        lr_ramp_images=int(share * given.lr_ramp_images),
        lr_decay_images=int(share * (given.lr_decay_images or 0)) or None,
        lr_cooldown_images=int(share * given.lr_cooldown_images),
    )
    ema = dataclasses.replace(recipe.training.ema, halflife_images=share * recipe.training.ema.halflife_images)
    training = dataclasses.replace(
        recipe.training, seed=seed, total_images=images, optimizer=optimizer, ema=ema, checkpoint_images=images
    )
    network = dataclasses.replace(recipe.network, model_channels=channels)
    data = dataclasses.replace(recipe.data, labels=labels)
    assembled = assemble(dataclasses.replace(recipe, data=data, training=training, network=network))
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(assembled.images, training.batch, seed)
        trainer = Trainer(recipe.method, assembled.parts, loader, training, Path(folder))
        trainer.train()
    model: nn.Module = assembled.parts.denoiser
    model.load_state_dict(trainer.product_state())
    return model.eval()


LEVELS, BATCH = 5, 32
"""Grey levels of the digits that token models learn, and images of an update."""
CODEC = PixelCodec(8, 1, LEVELS)


def trained_tokens(
    method: Any,
    network: nn.Module,
    seed: int,
    updates: int,
    optimizer: OptimizerConfig,
    *,
    channels_last: bool = False,
) -> nn.Module:
    """A token model of the digits in few levels, its averaged weights. Equal seeds see the same images in order.

    optimizer: whose rate rises over a twentieth of the run, and falls over its second half.
    """
    images, total = open_images("digits"), updates * BATCH
    config = TrainingConfig(
        total_images=total,
        batch=BATCH,
        seed=seed,
        channels_last=channels_last,
        optimizer=dataclasses.replace(optimizer, lr_ramp_images=total // 20, lr_cooldown_images=total // 2),
        ema=EmaConfig(halflife_images=total / 40, rampup_ratio=None),
    )
    parts = method.parts(network=network, codec=CODEC, spec=images.spec)
    trainer = Trainer(method, parts, Loader(images, BATCH, seed), config, Path())  # only `train` writes
    for _ in range(updates):
        trainer.train_step()
    model = copy.deepcopy(trainer.learners["model"].module)
    model.load_state_dict(trainer.product_state())
    return model.eval()


class DigitsDistance:
    """fd_digits to the training images, or to the held-out ones; `floor` is the distance between the two."""

    def __init__(self, split: Literal["train", "test"] = "train") -> None:
        self.split, self.extractor = split, digits_features()
        images = open_images("digits", split=split)
        self.spec, self.reference = images.spec, embed(images, self.extractor).moments

    def floor(self) -> float:
        """What real digits score, with the classes as they come."""
        others = open_images("digits", split="test" if self.split == "train" else "train")
        return frechet_distance(embed(others, self.extractor).moments, self.reference)

    def of(self, model: nn.Module, sampler: Sampler, count: int, seed: int) -> float:
        """Distance of so many images of a seed; image i has the same noise and class whoever draws it."""
        batches = ImageGenerator(model, self.spec, sampler).batches(count, seed=seed, batch_size=250)
        return frechet_of_images(batches, self.extractor, self.reference)
