"""Continuous-time consistency models, sCM (Lu and Song 2024, 2410.11081), and the TrigFlow denoisers they start from.

Constants of the CIFAR-10 and ImageNet-64 runs are those of FastGen's configurations (scd_cifar10, sct_cifar10,
scd_in64); of sct-imagenet64 those of the paper as far as they are known. Two steps: stop at sigma 0.821 on CIFAR-10 and
1.1 on ImageNet-64 (`--set sigmas=[0.821]`).
Departs    Denoisers are TrigFlow's, as in the paper; FastGen starts from EDM's. Of FastGen's averages the one that it
           evaluates is kept. RAdam's first steps, which divide by nothing, grow with the gradient: ours, see
           `cifar10_training`, are larger. In sct-imagenet64 the network is ADM where the paper has EDM2's, and dropout
           is in all blocks where the paper's is at resolutions <= 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.methods.continuous_consistency import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
)
from imagewright.methods.edm import EDM
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import edm
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.recipes.published import halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

CIFAR10 = LogNormal(mean=-1.0, std=1.4)
IMAGENET64 = LogNormal(mean=-1.0, std=1.6)
WARMUP_STEPS = 10_000


def scd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, in continuous time."""
    run = cd_digits()
    return replace(
        run,
        method=ContinuousConsistencyDistillation(warmup=0.2),
        training=replace(
            run.training, optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), lr_cooldown_images=14_000)
        ),
    )


def sct_digits() -> Experiment:
    """One-step digits from the weights of `runs/edm-digits`, without asking it again."""
    run = scd_digits()
    return replace(
        run,
        method=ContinuousConsistencyTraining(warmup=0.2, noise_label="log"),
        network=edm.digits().network,
        start="runs/edm-digits",
    ).giving(teacher=None)


def scd_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser, in continuous time."""
    run = cd_emoji64_32()
    return replace(
        run,
        method=ContinuousConsistencyDistillation(warmup=0.1),
        training=replace(
            run.training, optimizer=OptimizerConfig(lr=4e-4, betas=(0.9, 0.99), lr_cooldown_images=40_000)
        ),
    )


def trigflow_digits() -> Experiment:
    """A TrigFlow denoiser of digits: EDM's loss, the time as label, double normalisation; a teacher for sCM."""
    return _trigflow(edm.digits(), CIFAR10)


def trigflow_cifar10() -> Experiment:
    """A TrigFlow denoiser of CIFAR-10, unconditional."""
    run = edm.cifar10()
    return _trigflow(replace(run, data=replace(run.data, labels=False)), CIFAR10)


def trigflow_imagenet64() -> Experiment:
    """A TrigFlow denoiser of ImageNet-64."""
    return _trigflow(edm.imagenet64(), IMAGENET64)


def scd_cifar10() -> Experiment:
    """CIFAR-10 distillation: 500,000 steps of 512, RAdam at 1e-4, no dropout."""
    run = trigflow_cifar10()
    method = ContinuousConsistencyDistillation(noise_levels=CIFAR10, warmup=WARMUP_STEPS / 500_000)
    return _student(replace(run, network=None), method, cifar10_training(500_000), teacher="runs/trigflow-cifar10")


def sct_cifar10() -> Experiment:
    """CIFAR-10 training: 350,000 steps of 512, dropout 0.2, from the weights of the denoiser."""
    run = trigflow_cifar10()
    # The denoiser's network has an input for augmentation; it is kept, and given nothing.
    run = replace(run, network=replace(run.network, dropout=0.2, augment_dim=run.method.augment_dim))
    method = ContinuousConsistencyTraining(noise_levels=CIFAR10, warmup=WARMUP_STEPS / 350_000)
    return _student(run, method, cifar10_training(350_000), start="runs/trigflow-cifar10")


def scd_imagenet64() -> Experiment:
    """ImageNet-64 distillation: 600,000 steps of 1024, Adam at 7e-5 falling as 1 / sqrt after 35,000 steps."""
    method = ContinuousConsistencyDistillation(noise_levels=IMAGENET64, warmup=WARMUP_STEPS / 600_000)
    run = replace(trigflow_imagenet64(), network=None)
    training = imagenet64_training(1024, 600_000)
    optimizer = replace(training.optimizer, clip_norm=10 * math.sqrt(3 * 64 * 64))  # see cifar10_training
    return _student(run, method, replace(training, optimizer=optimizer), teacher="runs/trigflow-imagenet64")


def sct_imagenet64() -> Experiment:
    """ImageNet-64 training from the weights of the denoiser: 400,000 steps of 2048, dropout 0.45."""
    run = trigflow_imagenet64()
    run = replace(run, network=replace(run.network, dropout=0.45))
    method = ContinuousConsistencyTraining(noise_levels=IMAGENET64, warmup=WARMUP_STEPS / 400_000)
    return _student(run, method, imagenet64_training(2048, 400_000), start="runs/trigflow-imagenet64")


def _trigflow(run: Experiment, levels: LogNormal) -> Experiment:
    return replace(
        run,
        method=EDM(noise_label="angle", noise_levels=levels, augment=run.method.augment),
        network=replace(run.network, double_norm=True),
    )


def cifar10_training(steps: int) -> TrainingConfig:
    """RAdam (0.9, 0.99) at 1e-4 in full precision, an average of 0.9999.

    FastGen's tangents have root mean square 1 where ours have length 1. With w at its optimum its gradients are
    therefore smaller by sqrt(D), and beside ours its eps is that much larger.
    """
    batch = 512
    return TrainingConfig(
        total_images=batch * steps,
        batch=batch,
        micro_batch=64,
        optimizer=OptimizerConfig(kind="radam", lr=1e-4, betas=(0.9, 0.99), eps=1e-8 * math.sqrt(3 * 32 * 32)),
        ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
        **paced(batch),
    )


def imagenet64_training(batch: int, steps: int) -> TrainingConfig:
    """Adam (0.9, 0.99) at 7e-5, an average of 0.9999, bf16 networks with a float32 tangent."""
    optimizer = OptimizerConfig(
        lr=7e-5, betas=(0.9, 0.99), eps=1e-11 * math.sqrt(3 * 64 * 64), lr_decay_images=35_000 * batch
    )
    return TrainingConfig(
        total_images=batch * steps,
        batch=batch,
        micro_batch=64,
        channels_last=True,
        precision="bf16",
        optimizer=optimizer,
        ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None, power_std=(0.05, 0.1)),
        **paced(batch),
    )


def paced(batch: int) -> dict[str, Any]:
    """How often a published run is logged, shown and kept, in images."""
    return {"log_images": 100 * batch, "snapshot_images": 10_000 * batch, "checkpoint_images": 10_000 * batch}


def _student(
    run: Experiment,
    method: ContinuousConsistencyDistillation | ContinuousConsistencyTraining,
    training: TrainingConfig,
    *,
    teacher: str | None = None,
    start: str | None = None,
) -> Experiment:
    return replace(run, method=method, start=start, sampler=MultistepConsistency(), training=training).giving(
        teacher=teacher
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "trigflow-digits": trigflow_digits,
    "trigflow-cifar10": trigflow_cifar10,
    "trigflow-imagenet64": trigflow_imagenet64,
    "scd-digits": scd_digits,
    "scd-emoji64-32": scd_emoji64_32,
    "scd-cifar10": scd_cifar10,
    "scd-imagenet64": scd_imagenet64,
    "sct-digits": sct_digits,
    "sct-cifar10": sct_cifar10,
    "sct-imagenet64": sct_imagenet64,
}
