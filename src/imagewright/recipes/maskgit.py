"""MaskGIT (Chang et al. 2022, 2202.04200): the VQ tokenizer, and the transformer on its tokens.

Published for ImageNet at 256 x 256: `vq_imagenet256`, then `maskgit_imagenet256`. Rates, batches, lengths and averages
(0.999 an update, in both stages) are those of the released configuration; it names no augmentation. Its numbers for a
tokenizer's warm-up and decay stand beside a schedule that is "constant", and are left out. At 64 x 64 the same 256
tokens stand for 4 x 4 pixels each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.config import DataConfig
from imagewright.methods.maskgit import MaskGIT
from imagewright.methods.vq_tokenizer import VQTokenizerTraining
from imagewright.networks import TokenTransformerConfig, VQAutoencoderConfig
from imagewright.recipes.published import halflife_images
from imagewright.samplers import MaskedDecoding
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

IMAGES: dict[str, Any] = {"img_resolution": 16, "in_channels": 3}
TOKENS: dict[str, Any] = {"values": 2, "length": 1}
"""Placeholders: a run takes these from its data and its tokenizer."""


def vq_digits() -> Experiment:
    """A tokenizer of digits, 4 x 4 tokens of 64 values: two to three minutes on a CPU thread."""
    return Experiment(
        data=DataConfig(source="digits"),
        # With the published weight of pixels, for 256 x 256 of them, digits come back at 21.4 dB.
        method=VQTokenizerTraining(pixels=4.0, discriminator_width=16),
        network=VQAutoencoderConfig(
            **IMAGES, model_channels=32, channel_mult=(1, 2), num_blocks=1, codebook_size=64, codebook_dim=16
        ),
        training=TrainingConfig(
            total_images=40_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(lr=1e-3, betas=(0.0, 0.99), lr_cooldown_images=20_000),
            ema=EmaConfig(halflife_images=2_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=20_000,
            checkpoint_images=20_000,
        ),
    )


def maskgit_digits() -> Experiment:
    """Digits from the tokens of the run `runs/vq-digits`: two minutes on a CPU thread."""
    return Experiment(
        data=DataConfig(source="digits"),
        # Labels are hidden now and then so that sampling can be guided (--set guidance=2).
        method=MaskGIT(label_dropout=0.1),
        given={"tokenizer": "runs/vq-digits"},
        network=TokenTransformerConfig(**TOKENS, width=96, depth=4, heads=4, post_norm=False),
        sampler=MaskedDecoding(num_steps=8, temperature=2.0),
        training=TrainingConfig(
            total_images=120_000,
            batch=64,
            optimizer=OptimizerConfig(
                kind="adamw", lr=1e-3, lr_ramp_images=6_400, lr_cooldown_images=60_000, weight_decay=0.045
            ),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=40_000,
            checkpoint_images=40_000,
        ),
    )


def vq_emoji64_32() -> Experiment:
    """A tokenizer of emoji at 32x32: 8 x 8 tokens of 256 values; five minutes on a CPU thread of its own."""
    run = vq_digits()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        method=VQTokenizerTraining(pixels=4.0, adversarial_start=0.75, discriminator_width=16),
        network=VQAutoencoderConfig(
            **IMAGES, model_channels=16, channel_mult=(1, 2, 4), num_blocks=1, codebook_size=256, codebook_dim=32
        ),
        training=replace(
            run.training,
            total_images=24_000,
            batch=16,
            optimizer=replace(run.training.optimizer, lr=1e-3, lr_cooldown_images=16_000),
            ema=EmaConfig(halflife_images=800, rampup_ratio=0.1),
            snapshot_images=8_000,
            checkpoint_images=4_000,
        ),
    )


def maskgit_emoji64_32() -> Experiment:
    """Emoji at 32x32 from the tokens of the run `runs/vq-emoji64-32`: four minutes on a CPU thread of its own."""
    run = maskgit_digits()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        sampler=MaskedDecoding(num_steps=8),
        training=replace(
            run.training,
            total_images=32_000,
            batch=32,
            optimizer=replace(run.training.optimizer, lr=2e-3, lr_ramp_images=1_600, lr_cooldown_images=24_000),
            ema=EmaConfig(halflife_images=1_600, rampup_ratio=0.1),
            snapshot_images=16_000,
            checkpoint_images=8_000,
        ),
    ).giving(tokenizer="runs/vq-emoji64-32")


def vq_imagenet256() -> Experiment:
    """ImageNet-256 tokenizer, 16 x 16 tokens of 1,024 values; as published but for features, which are not shipped."""
    batch = 256
    return Experiment(
        data=DataConfig(source="imagenet-256x256.zip", labels=False),
        # Published: perceptual=0.1, with features of a classifier of ImageNet: --features lpips --method.perceptual 0.1
        method=VQTokenizerTraining(perceptual=0.0, judge="image"),
        network=VQAutoencoderConfig(**IMAGES),
        training=TrainingConfig(
            total_images=1_000_000 * batch,
            batch=batch,
            optimizer=OptimizerConfig(lr=1e-4, betas=(0.0, 0.99)),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


def maskgit_imagenet256() -> Experiment:
    """ImageNet-256 from the tokens of the run `runs/vq-imagenet256`, as published: 24 layers of width 768."""
    batch = 256
    return Experiment(
        data=DataConfig(source="imagenet-256x256.zip"),
        method=MaskGIT(),
        given={"tokenizer": "runs/vq-imagenet256"},
        network=TokenTransformerConfig(**TOKENS),
        sampler=MaskedDecoding(num_steps=8),
        training=TrainingConfig(
            total_images=2_000_000 * batch,
            batch=batch,
            optimizer=OptimizerConfig(kind="adamw", lr=1e-4, lr_ramp_images=5_000 * batch, weight_decay=0.045),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


def vq_imagenet64() -> Experiment:
    """ImageNet-64 tokenizer: as published, but three levels, so that 64 x 64 pixels are 16 x 16 tokens."""
    run = vq_imagenet256()
    return replace(
        run,
        data=replace(run.data, source="imagenet-64x64.zip"),
        network=replace(run.network, channel_mult=(1, 2, 4)),
        # The published discriminator has 256 channels at 64 x 64 pixels, whatever the size of the image.
        method=replace(run.method, discriminator_width=256),
    )


def maskgit_imagenet64() -> Experiment:
    """ImageNet-64 from the tokens of the run `runs/vq-imagenet64`, with the published transformer."""
    run = maskgit_imagenet256()
    return replace(run, data=replace(run.data, source="imagenet-64x64.zip")).giving(tokenizer="runs/vq-imagenet64")


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "vq-digits": vq_digits,
    "vq-emoji64-32": vq_emoji64_32,
    "vq-imagenet64": vq_imagenet64,
    "vq-imagenet256": vq_imagenet256,
    "maskgit-digits": maskgit_digits,
    "maskgit-emoji64-32": maskgit_emoji64_32,
    "maskgit-imagenet64": maskgit_imagenet64,
    "maskgit-imagenet256": maskgit_imagenet256,
}
