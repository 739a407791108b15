"""The causal baseline on pixels: every 8-bit value is a token, R, G and B of a pixel one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.autoregressive import Autoregressive
from imagewright.networks import TokenTransformerConfig
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

FROM_DATA = {"values": 256, "length": 64}
"""Placeholders: a run takes these from its codec."""


def digits() -> Experiment:
    """64 tokens an image; minutes on one CPU thread."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=Autoregressive(),
        network=TokenTransformerConfig(
            **FROM_DATA, width=64, depth=4, heads=4, dropout=0.1, causal=True, post_norm=False,
            told_blocks=-1,
        ),
        training=TrainingConfig(
            total_images=40_000,
            batch=64,
            optimizer=OptimizerConfig(
                kind="adamw", lr=2e-3, lr_ramp_images=3_200, lr_cooldown_images=25_000, betas=(0.9, 0.95),
                weight_decay=0.05, clip_norm=1.0,
            ),
            ema=EmaConfig(halflife_images=2_000, rampup_ratio=0.1),
            log_images=1_280,
            snapshot_images=20_000,
            checkpoint_images=20_000,
        ),
    )  # fmt: skip


def emoji64_16() -> Experiment:
    """768 tokens an image; hours on a CPU."""
    base = digits()
    return replace(
        base,
        data=DataConfig(source="emoji64", resolution=16),
        network=TokenTransformerConfig(
            **FROM_DATA,
            width=128,
            depth=6,
            heads=4,
            dropout=0.1,
            causal=True,
            post_norm=False,
            told_blocks=-1,
        ),
        training=replace(
            base.training,
            total_images=200_000,
            batch=32,
            optimizer=replace(base.training.optimizer, lr=1e-3, lr_cooldown_images=100_000),
            ema=EmaConfig(halflife_images=10_000, rampup_ratio=0.1),
        ),
    )


def emoji64_32() -> Experiment:
    """3,072 tokens an image, the attention over all of them; a GPU's work."""
    base = emoji64_16()
    return replace(
        base,
        data=DataConfig(source="emoji64", resolution=32),
        training=replace(base.training, micro_batch=8),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "causal-digits": digits,
    "causal-emoji64-16": emoji64_16,
    "causal-emoji64-32": emoji64_32,
}
