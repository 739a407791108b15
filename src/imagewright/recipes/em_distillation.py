"""One-step generators by EM distillation (Xie et al. 2024, 2405.16852).

ImageNet-64: step sizes, K, lambda*, batch, rates and betas as in the paper's table, which is known here at second hand;
its length and its average are not, and are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.em_distillation import EMDistillation
from imagewright.recipes.published import eps_of_mean, halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

BETAS = (0.0, 0.99)


def digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, K = 4: about three minutes on one core."""
    return Experiment(
        data=DataConfig(source="digits"),
        # On small images the latents may move by more than on ImageNet-64.
        method=EMDistillation(steps=4, gamma_z=1e-4),
        given={"teacher": "runs/edm-digits"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=10_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(lr=2e-4, betas=BETAS, eps=eps_of_mean(8 * 8), lr_cooldown_images=4_000),
            ema=EmaConfig(halflife_images=1_000, rampup_ratio=0.1),
            log_images=640,
            snapshot_images=2_500,
            checkpoint_images=5_000,
        ),
    )


def emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser, K = 4."""
    run = digits()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        training=replace(
            run.training,
            total_images=40_000,
            batch=32,
            channels_last=False,
            optimizer=OptimizerConfig(lr=5e-5, betas=BETAS, eps=eps_of_mean(3 * 32 * 32), lr_cooldown_images=15_000),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
            log_images=1_600,
            snapshot_images=8_000,
            checkpoint_images=8_000,
        ),
    ).giving(teacher="emoji64-32")


def imagenet64() -> Experiment:
    """ImageNet-64, K = 16: 200,000 steps of 128."""
    batch = 128
    return Experiment(
        data=DataConfig(source="imagenet-64x64.zip"),
        method=EMDistillation(),
        given={"teacher": "runs/edm-imagenet64"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=200_000 * batch,
            batch=batch,
            optimizer=OptimizerConfig(lr=2e-6, betas=BETAS, eps=eps_of_mean(3 * 64 * 64)),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=5_000 * batch,
            checkpoint_images=5_000 * batch,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "em-distillation-digits": digits,
    "em-distillation-emoji64-32": emoji64_32,
    "em-distillation-imagenet64": imagenet64,
}
