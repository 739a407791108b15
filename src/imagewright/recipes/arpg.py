"""ARPG (Li et al. 2025, 2503.10568): tokens in random orders, decoded several at a time.

Published for ImageNet at 256 x 256 with a tokenizer of 16,384 codes; here the tokens are those of our VQ tokenizer, or
pixels. Rates, batch and length are those of the released program; so are mirrored pictures, of which its codes (those
of RandAR, "adm") hold one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.config import DataConfig
from imagewright.methods.arpg import RandomOrders
from imagewright.networks import ARPGConfig
from imagewright.recipes import autoregressive, maskgit
from imagewright.samplers import RandomizedParallel
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

TOKENS: dict[str, Any] = {"values": 2, "length": 1}
"""Placeholders: a run takes these from its data and its tokenizer."""
SMALL: dict[str, Any] = {**TOKENS, "heads": 4, "hidden_multiple": 8, "rotary_base": 30.0, "init_std": 0.1}
"""The published 10,000 and 0.02 are for larger grids and ten times the width: with them half of a head's pairs hardly
turn over 8 rows, and digits take twice as many updates."""
IMAGENET = 1_281_167
EPOCHS, WARM_UP = 400, 100


def digits() -> Experiment:
    """64 pixels of digits as tokens, two blocks in each pass: minutes on one CPU thread, as long as the baseline."""
    baseline = autoregressive.digits()
    return replace(
        baseline,
        method=RandomOrders(),
        network=ARPGConfig(**SMALL, width=64, depth=4, embedding_dropout=0.0),
        sampler=RandomizedParallel(num_steps=32),
    )


def emoji64_32() -> Experiment:
    """Emoji at 32x32 from the 64 tokens of the run `runs/vq-emoji64-32`: minutes on a CPU thread of its own."""
    baseline = maskgit.maskgit_emoji64_32()
    optimizer = replace(baseline.training.optimizer, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0)
    return replace(
        baseline,
        method=RandomOrders(),
        network=ARPGConfig(**SMALL, width=96, depth=4),
        sampler=RandomizedParallel(num_steps=16),
        training=replace(baseline.training, optimizer=optimizer),
    )


def emoji64_16() -> Experiment:
    """Emoji at 16x16 from their 768 values, three to a pixel; hours on a CPU, as long as the causal baseline."""
    baseline = autoregressive.emoji64_16()
    return replace(
        baseline,
        method=RandomOrders(),
        network=ARPGConfig(**SMALL, width=128, depth=6, embedding_dropout=0.0),
        sampler=RandomizedParallel(num_steps=64),
    )


def imagenet256() -> Experiment:
    """ImageNet-256 from the 256 tokens of the run `runs/vq-imagenet256`: ARPG-L as published, but for the tokenizer."""
    batch = 1024
    return Experiment(
        data=DataConfig(source="imagenet-256x256.zip", xflip=True),
        method=RandomOrders(),
        given={"tokenizer": "runs/vq-imagenet256"},
        network=ARPGConfig(**TOKENS),
        sampler=RandomizedParallel(guidance=5.0),
        training=TrainingConfig(
            total_images=EPOCHS * IMAGENET,
            batch=batch,
            precision="bf16",
            optimizer=OptimizerConfig(
                kind="adamw", lr=1e-4 * batch / 256, lr_ramp_images=WARM_UP * IMAGENET,
                lr_cooldown_images=(EPOCHS - WARM_UP) * IMAGENET, lr_cooldown_shape="cosine", betas=(0.9, 0.95),
                weight_decay=0.05, clip_norm=1.0,
            ),
            ema=EmaConfig(halflife_images=0, rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=5_000 * batch,
        ),
    )  # fmt: skip


def imagenet64() -> Experiment:
    """ImageNet-64 from the 256 tokens of the run `runs/vq-imagenet64`, with the published network and training."""
    run = imagenet256()
    return replace(run, data=replace(run.data, source="imagenet-64x64.zip")).giving(tokenizer="runs/vq-imagenet64")


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "arpg-digits": digits,
    "arpg-emoji64-16": emoji64_16,
    "arpg-emoji64-32": emoji64_32,
    "arpg-imagenet64": imagenet64,
    "arpg-imagenet256": imagenet256,
}
