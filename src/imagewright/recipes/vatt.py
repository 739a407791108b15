"""VATT, encoders of video, sound and words (Akbari et al. 2021, 2104.11178): a backbone for each, or one for all.

Published for HowTo100M and AudioSet: clips in folders (`data.clip_folder`), 32 frames of 224 pixels at 10 a second and
3.2 seconds of sound at 48 kHz. The small ones learn from stand-ins (`data.standin_triplets`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from imagewright.data.clip_folder import ClipFolderConfig
from imagewright.data.standin_triplets import StandinTripletsConfig
from imagewright.methods.vatt import VATTTraining
from imagewright.networks.vatt import SETS, VATTConfig
from imagewright.training.config import OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

BATCH, STEPS, WARM_UP = 2048, 500_000, 5_000


def standin_digits(shared: bool = False) -> Experiment:
    """Clips made of handwritten digits: four minutes on a CPU thread."""
    return Experiment(
        data=StandinTripletsConfig(source="digits"),
        method=VATTTraining(),
        network=_small(1, shared=shared),
        training=_training(100_000),
    )


def standin_emoji() -> Experiment:
    """Clips made of emoji, whose captions name one of nine groups."""
    return Experiment(
        data=StandinTripletsConfig(source="emoji64"),
        method=VATTTraining(),
        network=_small(3, shared=False),
        training=_training(120_000),
    )


def published(which: str) -> Experiment:
    """HowTo100M and AudioSet in folders: rate, batch and length are the released code's."""
    total, warm = BATCH * STEPS, BATCH * WARM_UP
    return Experiment(
        data=ClipFolderConfig(source="howto100m"),
        method=VATTTraining(area=0.08, flip=True, colours=True),
        network=VATTConfig(**SETS[which]),
        training=TrainingConfig(
            total_images=total,
            batch=BATCH,
            optimizer=OptimizerConfig(
                lr=1e-4,
                eps=1e-7,
                lr_ramp_images=warm,
                lr_cooldown_images=total - warm,
                lr_cooldown_shape="cosine",
                lr_cooldown_to=0.5,
            ),
            log_images=100 * BATCH,
            snapshot_images=10_000 * BATCH,
            checkpoint_images=10_000 * BATCH,
        ),
    )


def _small(channels: int, *, shared: bool) -> VATTConfig:
    """Patches of 4 frames and 8x8 pixels: 32 tokens; 16 of sound."""
    size = (64, 2, 2)
    return VATTConfig(
        img_resolution=32,
        in_channels=channels,
        patch=(4, 8),
        word_width=32,
        video=size,
        audio=size,
        text=size,
        shared=shared,
        after=64,
        joint=(64, 32),
        dropout=0.0,
    )


def _training(total: int) -> TrainingConfig:
    """Adam and half a cosine to half the rate, as published, over a short run."""
    return TrainingConfig(
        total_images=total,
        batch=32,
        optimizer=OptimizerConfig(
            lr=1e-3,
            eps=1e-7,
            lr_ramp_images=0.05,
            lr_cooldown_images=0.95,
            lr_cooldown_shape="cosine",
            lr_cooldown_to=0.5,
        ),
        log_images=1_280,
        snapshot_images=total // 2,
        checkpoint_images=total // 2,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "vatt-standin-digits": standin_digits,
    "vatt-standin-digits-shared": partial(standin_digits, shared=True),
    "vatt-standin-emoji": standin_emoji,
    **{f"vatt-{which.lower()}-howto100m": partial(published, which) for which in SETS},
}
