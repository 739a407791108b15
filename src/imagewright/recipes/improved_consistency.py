"""Improved consistency training, iCT (Song and Dhariwal 2023, 2310.14189; hyper-parameters: appendix A, table 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining
from imagewright.recipes.consistency import ct_cifar10, ct_imagenet64
from imagewright.recipes.edm import digits as edm_digits
from imagewright.recipes.published import halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment


def digits() -> Experiment:
    """One-step digits without a teacher, by iCT."""
    return Experiment(
        data=DataConfig(source="digits"),
        # The paper's grid doubles seven times in 400,000 steps; a thousand steps have time for three.
        method=ImprovedConsistencyTraining(s0=10, s1=80),
        network=replace(edm_digits().network, dropout=0.1),
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=64_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(kind="radam", lr=1e-3, lr_cooldown_images=20_000),
            ema=EmaConfig(halflife_images=5_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=20_000,
            checkpoint_images=20_000,
        ),
    )


def cifar10() -> Experiment:
    """CIFAR-10, unconditional NCSN++, as published: 8 doublings, Fourier scale 0.02, dropout 0.3; two steps."""
    run = ct_cifar10()
    return replace(
        run,
        method=ImprovedConsistencyTraining(),
        network=replace(run.network, dropout=0.3, fourier_scale=0.02),
        sampler=MultistepConsistency(sigmas=(0.821,)),
        training=_published(run.training, batch=1024, steps=400_000, ema_decay=0.99993),
    ).giving(features=None)


def imagenet64() -> Experiment:
    """ImageNet-64, class-conditional ADM; batch, steps, average and dropout as reported by others; two steps."""
    run = ct_imagenet64()
    return replace(
        run,
        method=ImprovedConsistencyTraining(),
        network=replace(run.network, dropout=0.2),
        sampler=MultistepConsistency(sigmas=(1.526,)),
        training=_published(run.training, batch=4096, steps=800_000, ema_decay=0.99997),
    ).giving(features=None)


def deep_cifar10() -> Experiment:
    """iCT-deep on CIFAR-10: twice the residual blocks at every resolution."""
    return _deep(cifar10())


def deep_imagenet64() -> Experiment:
    """iCT-deep on ImageNet-64: twice the residual blocks at every resolution."""
    return _deep(imagenet64())


def _deep(run: Experiment) -> Experiment:
    return replace(run, network=replace(run.network, num_blocks=2 * run.network.num_blocks))


def _published(training: TrainingConfig, batch: int, steps: int, ema_decay: float) -> TrainingConfig:
    """RAdam at 1e-4 without ramp or decay; `ema_decay` per step."""
    return replace(
        training,
        batch=batch,
        total_images=batch * steps,
        optimizer=OptimizerConfig(kind="radam", lr=1e-4),
        ema=EmaConfig(halflife_images=halflife_images(batch, ema_decay), rampup_ratio=None),
        log_images=100 * batch,
        snapshot_images=10_000 * batch,
        checkpoint_images=10_000 * batch,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "ict-digits": digits,
    "ict-cifar10": cifar10,
    "ict-imagenet64": imagenet64,
    "ict-deep-cifar10": deep_cifar10,
    "ict-deep-imagenet64": deep_imagenet64,
}
