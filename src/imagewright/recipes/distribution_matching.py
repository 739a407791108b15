"""One- and few-step generators by DMD (Yin et al. 2024, 2311.18828), DMD2 (2405.14867) and f-distill (2502.15681).

The published runs of DMD and DMD2 keep no average of the weights. Those of DMD need couplings of their teacher
(`imagewright couple`), on CIFAR-10 100,000 of 18 Heun steps, on ImageNet-64 25,000 of 256; and LPIPS, with its package
and weights installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from imagewright.data.config import DataConfig
from imagewright.methods.distribution_matching import KarrasLevels
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.f_distill import FDistill
from imagewright.recipes.published import halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment
from imagewright.training.given import named

NO_GAN = DMD2(generator_gan=0.0, fake_gan=0.0)
FOUR_STEPS: tuple[float, ...] = tuple(KarrasLevels().at(torch.tensor([749, 499, 249])).tolist())
"""Levels below sigma_max of a generator in four steps: by index those of the published text-to-image model."""


def dmd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits` and 3,000 couplings: about three minutes on two cores."""
    run = dmd2_digits()
    optimizer = replace(run.training.optimizer, lr=3e-4, lr_cooldown_images=150 * 64)
    return replace(
        run,
        data=replace(run.data, couplings="couplings/digits"),
        method=DMD(),
        training=replace(run.training, total_images=350 * 64, optimizer=optimizer),
    )


def dmd2_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, no adversary: about two minutes on two cores."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=NO_GAN,
        given={"teacher": "runs/edm-digits"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=500 * 64,
            batch=64,
            channels_last=True,
            # At half of this rate, with fake_updates = 1, the generator lost all recall.
            optimizer=_adamw(1e-3, lr_cooldown_images=200 * 64),
            ema=EmaConfig(halflife_images=500, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=10_000,
            checkpoint_images=10_000,
        ),
    )


def dmd2_digits_gan() -> Experiment:
    """One-step digits with the adversary, published weights: about three minutes on two cores."""
    return replace(dmd2_digits(), method=DMD2())


def dmd2_digits_4_steps() -> Experiment:
    """Digits in four steps, trained by backward simulation, with the adversary."""
    sampler = MultistepConsistency(sigmas=FOUR_STEPS, clip=False)  # training clips nothing on the way either
    return replace(dmd2_digits(), method=DMD2(sigmas=FOUR_STEPS), sampler=sampler)


def dmd_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser and its couplings."""
    run = dmd2_emoji64_32()
    optimizer = replace(run.training.optimizer, lr=1e-4)
    return replace(
        run,
        data=replace(run.data, couplings="couplings/emoji64-32"),
        method=DMD(),
        training=replace(run.training, total_images=60_000, optimizer=optimizer),
    )


def dmd2_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser, no adversary."""
    return Experiment(
        data=DataConfig(source="emoji64", resolution=32),
        method=NO_GAN,
        given={"teacher": "emoji64-32"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=100_000,
            batch=32,
            channels_last=True,
            optimizer=_adamw(4e-4, lr_cooldown_images=40_000),
            ema=EmaConfig(halflife_images=1_000, rampup_ratio=0.1),  # of the images that the generator learns from
            log_images=3_200,
            snapshot_images=16_000,
            checkpoint_images=16_000,
        ),
    )


def dmd2_emoji64_32_gan() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser, with the adversary, published weights."""
    return replace(dmd2_emoji64_32(), method=DMD2())


def f_distill_digits() -> Experiment:
    """One-step digits by f-distill, Jensen-Shannon, as on ImageNet-64: about two minutes on two cores."""
    return replace(dmd2_digits(), method=FDistill(ratio_decay=0.5))


def f_distill_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser by f-distill, Jensen-Shannon, as on ImageNet-64."""
    return replace(dmd2_emoji64_32(), method=FDistill(ratio_decay=0.5))


def dmd_cifar10() -> Experiment:
    """CIFAR-10, class-conditional, as published: LPIPS, 100,000 couplings, 300,000 steps of 392."""
    run = _published("cifar10-32x32.zip", "runs/edm-cifar10", 392, 300_000, 5e-5)
    data = replace(run.data, couplings="couplings/cifar10")
    return replace(run, data=data, method=DMD(), training=replace(run.training, micro_batch=56)).giving(
        features="lpips-average"
    )


def dmd_imagenet64() -> Experiment:
    """ImageNet-64 as published: LPIPS, 25,000 couplings, 350,000 steps of 336."""
    run = _published("imagenet-64x64.zip", "runs/edm-imagenet64", 336, 350_000, 2e-6)
    data = replace(run.data, couplings="couplings/imagenet64")
    training = replace(run.training, micro_batch=48, channels_last=True, precision="bf16")
    return replace(run, data=data, method=DMD(), training=training).giving(features="lpips-average")


def dmd2_imagenet64() -> Experiment:
    """ImageNet-64, first stage as published: no adversary, 405,500 steps of 280."""
    run = _published("imagenet-64x64.zip", "runs/edm-imagenet64", 280, 405_500, 2e-6)
    # The program's 500 steps of warm-up are counted on each of its seven processes: 72 steps of the run.
    optimizer = replace(run.training.optimizer, lr_ramp_images=500 * 40)
    return replace(
        run, training=replace(run.training, micro_batch=40, channels_last=True, precision="bf16", optimizer=optimizer)
    )


def dmd2_imagenet64_gan() -> Experiment:
    """ImageNet-64, second stage, from the weights of both networks of `runs/dmd2-imagenet64`: with the adversary."""
    run = dmd2_imagenet64()
    training = replace(run.training, total_images=140_000 * 280, optimizer=replace(run.training.optimizer, lr=5e-7))
    return replace(run, method=DMD2(), start="runs/dmd2-imagenet64", training=training)


def f_distill_cifar10() -> Experiment:
    """CIFAR-10, class-conditional, forward KL, as published: 100,000 steps of 2,048, a fifth the generator's."""
    run = _published("cifar10-32x32.zip", "runs/edm-cifar10", 2048, 100_000, 1e-4)
    method = FDistill(divergence="kl", gan_weight=1e-3, judged="all")
    return replace(run, method=method, training=_averaged(run.training, 256))


def f_distill_imagenet64() -> Experiment:
    """ImageNet-64, Jensen-Shannon, as published: 600,000 steps of 512, a fifth the generator's."""
    run = _published("imagenet-64x64.zip", "runs/edm-imagenet64", 512, 600_000, 2e-6)
    return replace(run, method=FDistill(ratio_decay=0.5), training=_averaged(run.training, 32))


def _averaged(training: TrainingConfig, micro_batch: int) -> TrainingConfig:
    """f-distill's: no warm-up, and an average of decay 0.9999 a step, five of which make one of the generator's.

    micro_batch: over which, on all processes together, ratios and weights have mean one: the program's on a process.
    """
    ema = EmaConfig(halflife_images=halflife_images(training.batch, 0.9999**5), rampup_ratio=None)
    optimizer = replace(training.optimizer, lr_ramp_images=0)
    return replace(training, ema=ema, optimizer=optimizer, micro_batch=micro_batch)


def _published(source: str, teacher: str, batch: int, steps: int, lr: float) -> Experiment:
    """What the published runs share: AdamW after 500 steps of warm-up, gradients clipped at 10, no average."""
    return Experiment(
        data=DataConfig(source=source),
        method=NO_GAN,
        given=named(teacher=teacher),
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            optimizer=_adamw(lr, lr_ramp_images=500 * batch),
            ema=EmaConfig(halflife_images=0, rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=5_000 * batch,
            checkpoint_images=5_000 * batch,
        ),
    )


def _adamw(lr: float, **schedule: Any) -> OptimizerConfig:
    return OptimizerConfig(kind="adamw", lr=lr, weight_decay=0.01, clip_norm=10.0, **schedule)


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "dmd-digits": dmd_digits,
    "dmd-emoji64-32": dmd_emoji64_32,
    "dmd-cifar10": dmd_cifar10,
    "dmd-imagenet64": dmd_imagenet64,
    "dmd2-digits": dmd2_digits,
    "dmd2-digits-gan": dmd2_digits_gan,
    "dmd2-digits-4-steps": dmd2_digits_4_steps,
    "dmd2-emoji64-32": dmd2_emoji64_32,
    "dmd2-emoji64-32-gan": dmd2_emoji64_32_gan,
    "dmd2-imagenet64": dmd2_imagenet64,
    "dmd2-imagenet64-gan": dmd2_imagenet64_gan,
    "f-distill-digits": f_distill_digits,
    "f-distill-emoji64-32": f_distill_emoji64_32,
    "f-distill-cifar10": f_distill_cifar10,
    "f-distill-imagenet64": f_distill_imagenet64,
}
