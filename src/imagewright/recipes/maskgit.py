"""MaskGIT (Chang et al. 2022, 2202.04200): the VQ tokenizer, and the transformer on its tokens.

Published for ImageNet at 256 x 256 (8 passes): that is `vq_imagenet256` and `maskgit_imagenet256`. Adam with weight
decay 0.045 beside the gradient.
"""

from __future__ import annotations

from dataclasses import replace

from imagewright.methods.vq_tokenizer import VQTokenizerTraining
from imagewright.networks import VQAutoencoderConfig
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

VQ_FROM_DATA = {"img_resolution": 16, "in_channels": 3}
"""Placeholders: a run takes these from its data."""


def vq_digits() -> Experiment:
    """A tokenizer of the digits: 4 x 4 tokens of 64 values."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=VQTokenizerTraining(discriminator_width=16),
        network=VQAutoencoderConfig(
            **VQ_FROM_DATA, model_channels=32, channel_mult=(1, 2), num_blocks=1, codebook_size=64, codebook_dim=16
        ),
        training=TrainingConfig(
            total_images=60_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(lr=1e-3, betas=(0.0, 0.99), lr_cooldown_images=20_000),
            ema=EmaConfig(halflife_images=2_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=20_000,
            checkpoint_images=20_000,
        ),
    )
