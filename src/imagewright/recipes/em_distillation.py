"""One-step generators by EM distillation (Xie et al. 2024, 2405.16852).

ImageNet-64: step sizes, K, lambda*, batch, rates and betas as in the paper's table, which is known here at second hand;
its length and its average are not, and are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.em_distillation import EMDistillation
from imagewright.recipes.distribution_matching import dmd2_digits, dmd2_emoji64_32
from imagewright.recipes.published import eps_of_mean, halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

BETAS = (0.0, 0.99)


def digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, K = 4: about three minutes on one core."""
    return _small(dmd2_digits(), 10_000, 2e-4, 8 * 8)


def emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser, K = 4."""
    run = _small(dmd2_emoji64_32(), 40_000, 5e-5, 3 * 32 * 32)
    return replace(run, training=replace(run.training, channels_last=False, log_images=1_600))


def _small(run: Experiment, total: int, lr: float, numbers: int) -> Experiment:
    """On a method's images and teacher; numbers: of an image."""
    optimizer = OptimizerConfig(lr=lr, betas=BETAS, eps=eps_of_mean(numbers), lr_cooldown_images=total * 2 // 5)
    training = replace(
        run.training,
        total_images=total,
        optimizer=optimizer,
        ema=EmaConfig(halflife_images=total // 10, rampup_ratio=0.1),
        log_images=640,
        snapshot_images=total // 5,
        checkpoint_images=total // 5,
    )
    # On small images the latents may move by more than on ImageNet-64.
    return replace(run, method=EMDistillation(steps=4, gamma_z=1e-4), training=training)


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
