"""Autoencoders in whose latents other models live: latent diffusion's (2112.10752), and VA-VAE (2501.01423).

`train RECIPE --autoencoder RUN` brings any run on images into the latents of one (docs/latents.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.methods.va_vae import VAVAE
from imagewright.networks import KLAutoencoderConfig
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

IMAGES: dict[str, Any] = {"img_resolution": 16, "in_channels": 3}
"""Placeholders: a run takes these from its data."""


def kl_digits() -> Experiment:
    """Digits as 4 x 4 latents of 4 channels, without alignment: a minute or two on a CPU thread."""
    return Experiment(
        data=DataConfig(source="digits", labels=False),
        method=VAVAE(vf=0.0, adversarial=0.0, perceptual=0.1),
        network=KLAutoencoderConfig(
            **IMAGES, latent_channels=4, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=()
        ),
        training=TrainingConfig(
            total_images=40_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(lr=1e-3, betas=(0.5, 0.9), lr_cooldown_images=20_000),
            ema=EmaConfig(halflife_images=2_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=20_000,
            checkpoint_images=20_000,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {"kl-digits": kl_digits}

__all__ = ["FAMILY", "kl_digits", "replace"]
