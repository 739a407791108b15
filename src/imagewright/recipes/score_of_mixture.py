"""One-step generators from images alone, SMT, and from a teacher, SMD (Jayashankar et al. 2025, 2502.09609).

CIFAR-10 (without classes) and ImageNet-64 as in the published scripts: seven processes of 40 images, 400,000 steps (the
paper's figures are of 150,000 and 200,000), no average of the weights. On ImageNet-64 the generator of SMT has been
warmed up as a denoiser for 40,000 steps, which the paper says and the script does not show; by EDM's recipe here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.score_of_mixture import ScoreOfMixtureDistillation, ScoreOfMixtureTraining
from imagewright.recipes import edm
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

BATCH, STEPS = 280, 400_000


def smd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`: about three minutes on two cores."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=ScoreOfMixtureDistillation(),
        given={"teacher": "runs/edm-digits"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=500 * 64,
            batch=64,
            channels_last=True,
            optimizer=_adamw(1e-3, lr_cooldown_images=200 * 64),
            ema=EmaConfig(halflife_images=500, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=10_000,
            checkpoint_images=10_000,
        ),
    )


def smt_digits() -> Experiment:
    """One-step digits from images, the generator warmed up by the run `runs/edm-digits`: minutes on two cores."""
    run = smd_digits()
    optimizer = replace(run.training.optimizer, lr=5e-4, lr_cooldown_images=0)
    return replace(
        run,
        method=ScoreOfMixtureTraining(score_rate=2.0),
        network=edm.digits().network,
        given={"warmup": "runs/edm-digits"},
        training=replace(run.training, total_images=1_000 * 64, optimizer=optimizer),
    )


def smd_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser."""
    run = smd_digits()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        training=replace(
            run.training,
            total_images=100_000,
            batch=32,
            optimizer=_adamw(4e-4, lr_cooldown_images=40_000),
            ema=EmaConfig(halflife_images=1_000, rampup_ratio=0.1),
            log_images=3_200,
            snapshot_images=16_000,
            checkpoint_images=16_000,
        ),
    ).giving(teacher="emoji64-32")


def smt_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from images, the generator warmed up by the run `runs/edm-emoji64-32`."""
    run = smd_emoji64_32()
    optimizer = replace(run.training.optimizer, lr=2e-4, lr_cooldown_images=0)
    return replace(
        run,
        method=ScoreOfMixtureTraining(score_rate=2.0),
        network=edm.emoji64_32().network,
        given={"warmup": "runs/edm-emoji64-32"},
        training=replace(run.training, total_images=200_000, optimizer=optimizer),
    )


def smt_cifar10_uncond() -> Experiment:
    """CIFAR-10 without classes, SMT as published; the generator begins untrained."""
    run = _mirrored(_published(edm.cifar10_uncond(), 1e-4))
    network = replace(edm.cifar10_uncond().network, dropout=0.13)
    return replace(run, method=ScoreOfMixtureTraining(), network=network)


def smt_imagenet64() -> Experiment:
    """ImageNet-64, SMT as published, the generator warmed up by the run `runs/smt-imagenet64-warmup`."""
    run = _published(edm.imagenet64(), 5e-6)
    network = replace(edm.imagenet64().network, dropout=0.0)
    return replace(run, method=ScoreOfMixtureTraining(score_rate=10.0), network=network).giving(
        warmup="runs/smt-imagenet64-warmup"
    )


def smt_imagenet64_warmup() -> Experiment:
    """ImageNet-64, the warm-up of SMT's generator: a denoiser after 40,000 steps of 280."""
    run = edm.imagenet64()
    training = replace(run.training, total_images=40_000 * BATCH, batch=BATCH, micro_batch=40)
    return replace(run, training=training)


def smd_cifar10_uncond() -> Experiment:
    """CIFAR-10 without classes, SMD as published."""
    run = _mirrored(_published(edm.cifar10_uncond(), 5e-5))
    return replace(run, method=ScoreOfMixtureDistillation()).giving(teacher="runs/edm-cifar10-uncond")


def smd_imagenet64() -> Experiment:
    """ImageNet-64, SMD as published."""
    run = _published(edm.imagenet64(), 2e-6)
    return replace(run, method=ScoreOfMixtureDistillation()).giving(teacher="runs/edm-imagenet64")


def _published(of: Experiment, lr: float) -> Experiment:
    """What the scripts share, on a recipe's images."""
    return Experiment(
        data=of.data,
        method=ScoreOfMixtureDistillation(),
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=BATCH * STEPS,
            batch=BATCH,
            micro_batch=40,
            precision="bf16",
            # 500 steps of warm-up that are counted on each of seven processes: 72 steps of the run.
            optimizer=_adamw(lr, lr_ramp_images=500 * 40),
            ema=EmaConfig(halflife_images=0, rampup_ratio=None),
            log_images=100 * BATCH,
            snapshot_images=5_000 * BATCH,
            checkpoint_images=5_000 * BATCH,
        ),
    )


def _mirrored(run: Experiment) -> Experiment:
    """As the program's CIFAR-10 is; its ImageNet is not."""
    return replace(run, data=replace(run.data, xflip=True))


def _adamw(lr: float, *, lr_ramp_images: int = 0, lr_cooldown_images: int = 0) -> OptimizerConfig:
    return OptimizerConfig(
        kind="adamw", lr=lr, weight_decay=0.01, clip_norm=10.0,
        lr_ramp_images=lr_ramp_images, lr_cooldown_images=lr_cooldown_images,
    )  # fmt: skip


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "smt-digits": smt_digits,
    "smt-emoji64-32": smt_emoji64_32,
    "smt-cifar10-uncond": smt_cifar10_uncond,
    "smt-imagenet64-warmup": smt_imagenet64_warmup,
    "smt-imagenet64": smt_imagenet64,
    "smd-digits": smd_digits,
    "smd-emoji64-32": smd_emoji64_32,
    "smd-cifar10-uncond": smd_cifar10_uncond,
    "smd-imagenet64": smd_imagenet64,
}
