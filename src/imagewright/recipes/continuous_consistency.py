"""Continuous-time consistency models, sCM (Lu and Song 2024, 2410.11081), and the TrigFlow denoisers they start from.

The ImageNet-64 runs have the paper's sizes as far as they are known (batch, rate, law of t, decay); the network is ADM
where the paper has EDM2's, and dropout is in all blocks where the paper's is at resolutions <= 16.
"""

from __future__ import annotations

from dataclasses import replace

from imagewright.methods.continuous_consistency import (
    ContinuousConsistencyDistillation,
    ContinuousConsistencyTraining,
)
from imagewright.methods.edm import EDM
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import edm
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

CIFAR10 = LogNormal(mean=-1.0, std=1.4)
IMAGENET64 = LogNormal(mean=-1.0, std=1.6)


def scd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, in continuous time."""
    run = cd_digits()
    return replace(
        run,
        method=ContinuousConsistencyDistillation(warmup_images=5_000),
        training=replace(
            run.training, optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), lr_cooldown_images=14_000)
        ),
    )


def sct_digits() -> Experiment:
    """One-step digits from the weights of `runs/edm-digits`, without asking it again."""
    run = scd_digits()
    return replace(
        run,
        method=ContinuousConsistencyTraining(warmup_images=5_000, noise_label="log"),
        network=edm.digits().network,
        teacher=None,
        start="runs/edm-digits",
    )


def scd_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser, in continuous time."""
    run = cd_emoji64_32()
    return replace(
        run,
        method=ContinuousConsistencyDistillation(warmup_images=10_000),
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
    """CIFAR-10 distillation as published: batch 512, Adam at 1e-4, no dropout."""
    method = ContinuousConsistencyDistillation(noise_levels=CIFAR10)
    return _published(trigflow_cifar10(), method, batch=512, steps=400_000, teacher="runs/trigflow-cifar10")


def sct_cifar10() -> Experiment:
    """CIFAR-10 training as published: dropout 0.2, from the weights of the denoiser."""
    run = trigflow_cifar10()
    # The denoiser's network has an input for augmentation; it is kept, and given nothing.
    run = replace(run, network=replace(run.network, dropout=0.2, augment_dim=run.method.augment_dim))
    method = ContinuousConsistencyTraining(noise_levels=CIFAR10)
    return _published(run, method, batch=512, steps=400_000, start="runs/trigflow-cifar10")


def scd_imagenet64() -> Experiment:
    """ImageNet-64 distillation: batch 2048, Adam at 7e-5 falling as 1 / sqrt after 35,000 steps."""
    method = ContinuousConsistencyDistillation(noise_levels=IMAGENET64, warmup_images=10_000 * 2048)
    return _published(
        trigflow_imagenet64(),
        method,
        batch=2048,
        steps=400_000,
        lr=7e-5,
        decay=35_000,
        teacher="runs/trigflow-imagenet64",
    )


def sct_imagenet64() -> Experiment:
    """ImageNet-64 training from the weights of the denoiser, dropout 0.45."""
    run = trigflow_imagenet64()
    run = replace(run, network=replace(run.network, dropout=0.45))
    method = ContinuousConsistencyTraining(noise_levels=IMAGENET64, warmup_images=10_000 * 2048)
    return _published(run, method, batch=2048, steps=400_000, lr=7e-5, decay=35_000, start="runs/trigflow-imagenet64")


def _trigflow(run: Experiment, levels: LogNormal) -> Experiment:
    return replace(
        run,
        method=EDM(noise_label="angle", noise_levels=levels, augment=run.method.augment),
        network=replace(run.network, double_norm=True),
    )


def _published(
    run: Experiment,
    method: ContinuousConsistencyDistillation | ContinuousConsistencyTraining,
    *,
    batch: int,
    steps: int,
    lr: float = 1e-4,
    decay: int | None = None,
    teacher: str | None = None,
    start: str | None = None,
) -> Experiment:
    """What the published runs share: Adam (0.9, 0.99), a long average, bf16 networks with a float32 tangent."""
    return replace(
        run,
        method=method,
        network=None if teacher else run.network,
        teacher=teacher,
        start=start,
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            micro_batch=min(batch, 64),
            precision="bf16",
            optimizer=OptimizerConfig(
                lr=lr, betas=(0.9, 0.99), eps=1e-11, lr_decay_images=None if decay is None else decay * batch
            ),
            ema=EmaConfig(halflife_images=500_000, rampup_ratio=None, power_std=(0.05, 0.1)),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )
