"""VCMamba as a classifier (Munir et al. 2025, 2509.04669): convolutions, and at the end of the last stage scans.

Published for ImageNet at 224 pixels, S, M and B; a teacher is given with --teacher (there RegNetY-160). At 64 pixels
the stem has no stride, so that the last grid has 8x8 cells. Rate, batch, decay and length are the program's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from imagewright.data.config import DataConfig
from imagewright.methods.vcmamba import VCMambaTraining
from imagewright.networks.vcmamba import SIZES, VCMambaConfig
from imagewright.recipes.classification import IMAGENET, IMAGENET_MEAN
from imagewright.recipes.published import halflife_images
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

IMAGENET_STD = (0.229, 0.224, 0.225)
EPOCHS, WARM_UP = 300, 5
BATCH = 17 * 128
"""Of the released scripts: 17 GPUs, 128 images each."""
DECAY = 0.99996
"""Of the average, a step."""


def digits() -> Experiment:
    """8x8 handwritten digits, two stages of 8x8 and 4x4 cells: three minutes on a CPU thread."""
    sizes = VCMambaConfig(
        img_resolution=8, in_channels=1, num_classes=10, widths=(16, 32), depths=(1, 3), mamba=2, stem=1, drop_path=0.05
    )
    return Experiment(
        data=DataConfig(source="digits"),
        method=VCMambaTraining(shift=1, mixup=0.2, cutmix=0.0, erasing=0.0),
        network=sizes,
        training=_small(30_000, each=10_000),
    )


def emoji64_32() -> Experiment:
    """Emoji at 32x32 into their nine groups, three stages of 32x32 to 8x8 cells."""
    sizes = VCMambaConfig(
        img_resolution=32, num_classes=9, widths=(16, 32, 64), depths=(1, 2, 4), mamba=2, stem=1, drop_path=0.1
    )
    return Experiment(
        data=DataConfig(source="emoji64", resolution=32, xflip=True),
        method=VCMambaTraining(shift=3),
        network=sizes,
        training=_small(200_000, each=50_000),
    )


def imagenet(size: str, side: int) -> Experiment:
    """ImageNet at 224x224 as published, or at 64x64."""
    stem = 4 if side == 224 else 1
    total, warm = EPOCHS * IMAGENET, WARM_UP * IMAGENET
    optimizer = OptimizerConfig(
        kind="adamw",
        lr=1e-3 * BATCH / 512,
        weight_decay=0.05,
        decay_vectors=False,
        lr_ramp_images=warm,
        lr_cooldown_images=total,
        lr_cooldown_shape="cosine",
    )
    return Experiment(
        data=DataConfig(source=f"imagenet-{side}x{side}.zip", xflip=True),
        method=VCMambaTraining(area=0.08, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        network=VCMambaConfig(img_resolution=side, stem=stem, drop_path=0.2, **SIZES[size]),
        training=TrainingConfig(
            total_images=total,
            batch=BATCH,
            channels_last=True,
            optimizer=optimizer,
            ema=EmaConfig(halflife_images=halflife_images(BATCH, DECAY), rampup_ratio=None),
            log_images=204_800,
            snapshot_images=IMAGENET,
            checkpoint_images=IMAGENET,
            keep_checkpoints=1,
        ),
    )


def _small(total: int, each: int) -> TrainingConfig:
    """AdamW and half a cosine, as published, over a short run."""
    return TrainingConfig(
        total_images=total,
        batch=64,
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=2e-3,
            weight_decay=0.05,
            lr_ramp_images=0.05,
            lr_cooldown_images=0.95,
            lr_cooldown_shape="cosine",
        ),
        ema=EmaConfig(halflife_images=2_000),
        log_images=2_560,
        snapshot_images=each,
        checkpoint_images=each,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "vcmamba-digits": digits,
    "vcmamba-emoji64-32": emoji64_32,
    **{
        f"vcmamba-{size.lower()}-imagenet{'' if side == 224 else side}": partial(imagenet, size, side)
        for side in (224, 64)
        for size in SIZES
    },
}
