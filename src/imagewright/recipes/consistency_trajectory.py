"""Consistency trajectory models (Kim et al. 2024, 2310.02279; hyper-parameters: appendix D and the published commands).

The published runs have two stages: without an adversary, then from those weights with one (`..._gan`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from imagewright.methods.consistency_trajectory import Adversarial, ConsistencyTrajectory
from imagewright.methods.distances import Distance
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.samplers import Jumps
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

DISCRIMINATOR_LR = 2e-3


def ctm_digits() -> Experiment:
    """Jumps between any two levels for digits, from the run `runs/edm-digits`; no adversary."""
    run = cd_digits()
    return replace(
        run,
        method=ConsistencyTrajectory(
            grid_points=12, max_steps=4, target_decay=0.95, distance=Distance(kind="pseudo_huber", huber_c=0.3)
        ),
        sampler=Jumps(),
    )


def ctm_emoji64_32() -> Experiment:
    """Jumps for emoji at 32x32 from the shipped denoiser, with an adversary of our own in the last third."""
    run = cd_emoji64_32()
    return replace(
        run,
        method=ConsistencyTrajectory(
            grid_points=18,
            max_steps=4,
            target_decay=0.99,
            distance=Distance(kind="pseudo_huber", huber_c=0.3),
            adversarial=Adversarial(start=0.6, lr_scale=1.0, width=32),
        ),
        sampler=Jumps(),
    )


def ctm_cifar10() -> Experiment:
    """CIFAR-10, class-conditional, first stage as published, except l2 for LPIPS, whose weights are not shipped."""
    return _published("cifar10-32x32.zip", "runs/edm-cifar10", 256, 50_000, 4e-4, ConsistencyTrajectory(grid_points=18))


def ctm_cifar10_gan() -> Experiment:
    """The second stage, from the run `runs/ctm-cifar10`; a convolutional discriminator for the projected one."""
    return _second_stage(ctm_cifar10(), "runs/ctm-cifar10", 528, 4e-4, target_decay=0.9999)


def ctm_imagenet64() -> Experiment:
    """ImageNet-64, first stage as published, except l2 for LPIPS, whose weights are not shipped."""
    run = _published(
        "imagenet-64x64.zip", "runs/edm-imagenet64", 2048, 50_000, 8e-6, ConsistencyTrajectory(grid_points=40)
    )
    return replace(run, training=replace(run.training, micro_batch=32))


def ctm_imagenet64_gan() -> Experiment:
    """The second stage, from the run `runs/ctm-imagenet64`: n up to 20; convolutional discriminator."""
    run = _second_stage(ctm_imagenet64(), "runs/ctm-imagenet64", 4224, 8e-6, max_steps=20)
    return replace(run, training=replace(run.training, micro_batch=11))


def _published(
    source: str, teacher: str, batch: int, steps: int, lr: float, method: ConsistencyTrajectory
) -> Experiment:
    """What the published runs share: RAdam at a constant rate, no decay, no clipping, fp16, an average of 0.999."""
    return Experiment(
        data=DataConfig(source=source),
        method=method,
        teacher=teacher,
        sampler=Jumps(),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            precision="fp16",
            optimizer=OptimizerConfig(kind="radam", lr=lr),
            ema=EmaConfig(halflife_images=_halflife(batch), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=5_000 * batch,
            checkpoint_images=1_000 * batch,
        ),
    )


def _second_stage(first: Experiment, start: str, batch: int, lr: float, **method: float) -> Experiment:
    """30,000 steps, every other one the discriminator's."""
    adversarial = Adversarial(start=0.0, lr_scale=DISCRIMINATOR_LR / lr)
    training = replace(
        first.training,
        total_images=30_000 * batch,
        batch=batch,
        micro_batch=None,
        ema=EmaConfig(halflife_images=_halflife(batch), rampup_ratio=None),
        log_images=100 * batch,
        snapshot_images=5_000 * batch,
        checkpoint_images=1_000 * batch,
    )
    return replace(
        first, method=replace(first.method, adversarial=adversarial, **method), start=start, training=training
    )


def _halflife(batch: int) -> float:
    """In images, of an average that keeps 0.999 at every update of the student."""
    return batch * math.log(0.5) / math.log(0.999)
