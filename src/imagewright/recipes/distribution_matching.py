"""One- and few-step generators by DMD (Yin et al. 2024, 2311.18828) and DMD2 (2405.14867), with published settings.

The published runs keep no average of the weights. Those of DMD need couplings (`imagewright couple`) of their teacher:
CIFAR-10 100,000 of 18 Heun steps, ImageNet-64 25,000 of 256; and LPIPS, for which `features="lpips"`.
"""

from __future__ import annotations

from dataclasses import replace

from imagewright.methods.distances import Distance
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, Precision, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

NO_AVERAGE = EmaConfig(halflife_images=0, rampup_ratio=None)
NO_GAN = DMD2(generator_gan=0.0, fake_gan=0.0)


def dmd2_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, without an adversary."""
    batch = 64
    return Experiment(
        data=DataConfig(source="digits"),
        method=NO_GAN,
        teacher="runs/edm-digits",
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=600 * batch,
            batch=batch,
            channels_last=True,
            optimizer=OptimizerConfig(
                kind="adamw", lr=1e-3, weight_decay=0.01, lr_cooldown_images=200 * batch, clip_norm=10.0
            ),
            ema=EmaConfig(halflife_images=500, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=10_000,
            checkpoint_images=10_000,
        ),
    )
