"""Classifiers of downsampled images: wide residual networks (Chrabaszcz et al. 2017, 1707.08819).

Published for ImageNet at 32 x 32 (k = 2, 5, 10) and at 64 x 64 (k = 2, 5), in the release's own files, which
`imagewright data downsample IMAGENET imagenet-32x32 --size 32 --preset chrabaszcz` makes, too. Rate, batch, decay and
length are the program's: 40 epochs of every picture as it is and mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from imagewright.data.config import DataConfig
from imagewright.methods.classification import Classification
from imagewright.networks.wide_resnet import WideResNetConfig
from imagewright.training.config import OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

IMAGENET = 1_281_167
"""Training images."""
EPOCHS = 80
"""Passes over them: 40 of the program's epochs, which have each picture twice."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of the channels of ImageNet's pictures, in [0, 1]."""


def digits() -> Experiment:
    """8x8 handwritten digits, WRN-12-1 of two stacks: three minutes on a CPU thread."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=Classification(shift=1),
        network=WideResNetConfig(img_resolution=8, in_channels=1, num_classes=10, blocks=2, widen=1),
        training=_training(30_000, batch=64, lr=0.05, each=10_000),
    )


def emoji64_16() -> Experiment:
    """Emoji at 16x16 into their nine groups, WRN-12-2 of two stacks."""
    return Experiment(
        data=DataConfig(source="emoji64", resolution=16, xflip=True),
        method=Classification(shift=2),
        network=WideResNetConfig(img_resolution=16, num_classes=9, blocks=2, widen=2),
        training=_training(60_000, batch=64, lr=0.05, each=20_000),
    )


def imagenet(side: int, widen: int) -> Experiment:
    """ImageNet at 32x32 (WRN-28-k) or 64x64 (WRN-36-k), as published."""
    total = EPOCHS * IMAGENET
    training = _training(total, batch=128, lr=0.01, each=IMAGENET)
    return Experiment(
        data=DataConfig(source=f"imagenet-{side}x{side}", xflip=True),
        method=Classification(mean=IMAGENET_MEAN),
        network=WideResNetConfig(img_resolution=side, widen=widen),
        training=replace(training, log_images=51_200, keep_checkpoints=1),
    )


def _training(total: int, batch: int, lr: float, each: int) -> TrainingConfig:
    """The program's schedule: a fifth of the rate after each quarter. each: images between checkpoints."""
    return TrainingConfig(
        total_images=total,
        batch=batch,
        channels_last=True,
        optimizer=OptimizerConfig(kind="sgd", lr=lr, momentum=0.9, lr_step_images=0.25, weight_decay=1e-3),
        log_images=2_560,
        snapshot_images=each,
        checkpoint_images=each,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "wrn-digits": digits,
    "wrn-emoji64-16": emoji64_16,
    **{
        f"wrn{28 if side == 32 else 36}-{k}-imagenet{side}": partial(imagenet, side, k)
        for side, ks in ((32, (2, 5, 10)), (64, (2, 5)))
        for k in ks
    },
}
