"""Masked diffusion (Shi et al. 2024, 2406.04329): MD4 and GenMD4.

The published runs: AdamW at 2e-4 with betas (0.9, 0.99) and weight decay 0.01, 100 updates of warm-up, then a cosine
down to 0; averages of 0.9999 an update; 2,000,000 updates; linear schedule, continuous time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.config import DataConfig
from imagewright.methods.genmd4 import GenMD4
from imagewright.methods.md4 import MD4
from imagewright.networks import PixelUNetConfig, TokenTransformerConfig
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Ancestral
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

IMAGES: dict[str, Any] = {"img_resolution": 32, "in_channels": 3}
TOKENS: dict[str, Any] = {"values": 2, "length": 1}
"""Placeholders: a run takes these from its data and its codec."""


def md4_digits() -> Experiment:
    """The pixels of digits: under four minutes on a CPU thread."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=MD4(),
        network=PixelUNetConfig(**IMAGES, model_channels=32, num_blocks=2),
        sampler=Ancestral(num_steps=64),
        training=TrainingConfig(
            total_images=48_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(
                kind="adamw", lr=2e-3, lr_ramp_images=1_600, lr_cooldown_images=28_800, betas=(0.9, 0.99),
                weight_decay=0.01,
            ),
            ema=EmaConfig(halflife_images=2_000, rampup_ratio=0.1),
            log_images=1_280,
            snapshot_images=24_000,
            checkpoint_images=24_000,
        ),
    )  # fmt: skip


def genmd4_digits() -> Experiment:
    """The same with a learned schedule for each grey level: twice the work an image."""
    return replace(md4_digits(), method=GenMD4())


def md4_codebook_digits() -> Experiment:
    """Digits from the tokens of the run `runs/vq-digits`: a minute or two on a CPU thread."""
    run = md4_digits()
    return replace(
        run,
        network=TokenTransformerConfig(**TOKENS, width=96, depth=4, heads=4, post_norm=False),
        sampler=Ancestral(num_steps=16),
        training=replace(
            run.training,
            total_images=120_000,
            channels_last=False,
            optimizer=replace(run.training.optimizer, lr=1e-3, lr_ramp_images=6_400, lr_cooldown_images=60_000),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
        ),
    ).giving(tokenizer="runs/vq-digits")


def md4_emoji64_32() -> Experiment:
    """The 3,072 sub-pixels of an emoji; seven hours on a CPU thread (0.25 s an image), for a GPU."""
    run = md4_digits()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        network=PixelUNetConfig(**IMAGES, model_channels=64, num_blocks=4, dropout=0.2),
        sampler=Ancestral(num_steps=256),
        training=replace(
            run.training,
            total_images=100_000,
            batch=32,
            optimizer=replace(run.training.optimizer, lr=1e-3, lr_cooldown_images=60_000),
            ema=EmaConfig(halflife_images=5_000, rampup_ratio=0.1),
        ),
    )


def md4_cifar10() -> Experiment:
    """CIFAR-10 as published: 2.75 bits/dim."""
    batch = 256
    total = 2_000_000 * batch
    return Experiment(
        data=DataConfig(source="cifar10-32x32.zip", labels=False),
        method=MD4(),
        network=PixelUNetConfig(**IMAGES),
        sampler=Ancestral(num_steps=256),
        training=TrainingConfig(
            total_images=total,
            batch=batch,
            channels_last=True,
            optimizer=OptimizerConfig(
                kind="adamw", lr=2e-4, lr_ramp_images=100 * batch, lr_cooldown_images=total - 100 * batch,
                lr_cooldown_shape="cosine", betas=(0.9, 0.99), weight_decay=0.01,
            ),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )  # fmt: skip


def md4_imagenet64() -> Experiment:
    """ImageNet-64 without classes, for the likelihood, as published: 3.40 bits/dim on the old set (docs/tokens.md)."""
    run = md4_cifar10()
    batch = 512
    total = 2_000_000 * batch
    return replace(
        run,
        data=DataConfig(source="imagenet-64x64.zip", labels=False),
        network=PixelUNetConfig(**IMAGES, model_channels=256, num_blocks=24, transformer_depth=12),
        training=replace(
            run.training,
            total_images=total,
            batch=batch,
            optimizer=replace(
                run.training.optimizer, lr_ramp_images=100 * batch, lr_cooldown_images=total - 100 * batch
            ),
            ema=replace(run.training.ema, halflife_images=halflife_images(batch, 0.9999)),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


def md4_imagenet64_classes() -> Experiment:
    """ImageNet-64 by class, for samples: the cosine schedule and, with it, the uniform grid."""
    run = md4_imagenet64()
    return replace(
        run,
        data=DataConfig(source="imagenet-64x64.zip"),
        method=MD4(schedule="cosine"),
        network=replace(run.network, num_blocks=8, transformer_depth=20),
        sampler=Ancestral(num_steps=256, grid="uniform"),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "md4-digits": md4_digits,
    "md4-codebook-digits": md4_codebook_digits,
    "md4-emoji64-32": md4_emoji64_32,
    "md4-cifar10": md4_cifar10,
    "md4-imagenet64": md4_imagenet64,
    "md4-imagenet64-classes": md4_imagenet64_classes,
    "genmd4-digits": genmd4_digits,
}
