"""Autoencoders in whose latents other models live: latent diffusion's (2112.10752), and VA-VAE (2501.01423).

`train RECIPE --autoencoder RUN` brings a run on images into the latents of one (docs/latents.md). Of ImageNet at
256 x 256: sizes, rates, lengths and weights are those of the released configurations, f16d32. An epoch has 1,281,167
images; a process has 8 of a batch, over which the discriminator normalises and the losses are balanced, so these are
the micro-batches here; the discriminator comes in after 2,501 batches (5,001 steps of both optimisers). Features for
the perceptual distance (`lpips`) and for the alignment (DINOv2, ViT-L/14, a folder of that name) are not shipped. The
released program crops pictures at random, where these are cropped once, in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.config import DataConfig
from imagewright.methods.va_vae import VAVAE
from imagewright.networks import KLAutoencoderConfig
from imagewright.training.chain import OF_STAGE, Chain, Stage
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

IMAGES: dict[str, Any] = {"img_resolution": 16, "in_channels": 3}
"""Placeholders: a run takes these from its data."""
EPOCH, BATCH = 1_281_167, 256
"""Images of ImageNet's training set, and of a published batch."""
STAGES: Mapping[str, tuple[int, dict[str, float]]] = {
    "align": (100, {"vf": 0.5, "cosine_margin": 0.0, "distance_margin": 0.0}),
    "rebuild": (15, {"vf": 0.1, "cosine_margin": 0.0, "distance_margin": 0.0, "adversarial_start_images": 0}),
    "margins": (15, {"vf": 0.1, "cosine_margin": 0.5, "distance_margin": 0.25, "adversarial_start_images": 0}),
}
"""Epochs and settings of the released autoencoder's stages. Its later ones have the discriminator from step 1 on."""


def kl_digits() -> Experiment:
    """Digits as 4 x 4 latents of 4 channels, not aligned with anything: two minutes on a CPU thread."""
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


def vavae_digits() -> Experiment:
    """Digits as 4 x 4 latents of 8 channels, aligned with the classifier of digits: two minutes on a CPU thread."""
    run = kl_digits()
    method = replace(
        run.method, vf=0.5, cosine_margin=0.0, distance_margin=0.0, adversarial=0.1, adversarial_start_images=0.5,
        discriminator_width=16, discriminator_layers=1,
    )  # fmt: skip
    return replace(run, method=method, network=replace(run.network, latent_channels=8))


def kl_emoji64_32() -> Experiment:
    """Emoji at 32x32 as 8 x 8 latents of 4 channels, not aligned: five minutes on a CPU thread of its own."""
    run = kl_digits()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32, labels=False),
        network=replace(run.network, model_channels=16, channel_mult=(1, 2, 4)),
        training=replace(
            run.training,
            total_images=24_000,
            batch=16,
            optimizer=replace(run.training.optimizer, lr_cooldown_images=16_000),
            ema=EmaConfig(halflife_images=800, rampup_ratio=0.1),
            snapshot_images=8_000,
            checkpoint_images=4_000,
        ),
    )


def vavae_emoji64_32() -> Experiment:
    """Emoji at 32x32 as 8 x 8 latents of 32 channels, aligned with the classifier of emoji: eight minutes alone."""
    run = kl_emoji64_32()
    method = replace(
        run.method, vf=0.5, cosine_margin=0.0, distance_margin=0.0, adversarial=0.1, adversarial_start_images=0.75,
        discriminator_width=16, discriminator_layers=2,
    )  # fmt: skip
    return replace(run, method=method, network=replace(run.network, latent_channels=32))


def kl_imagenet256() -> Experiment:
    """ImageNet-256 as 16 x 16 latents of 32 channels, not aligned: the published f16d32, 50 epochs."""
    return Experiment(
        data=DataConfig(source="imagenet-256x256.zip", labels=False),
        method=VAVAE(vf=0.0, adversarial_start_images=2_501 * BATCH),
        given={"features": "lpips"},
        network=KLAutoencoderConfig(**IMAGES),
        training=TrainingConfig(
            total_images=_whole_batches(50 * EPOCH, BATCH),
            batch=BATCH,
            micro_batch=8,
            channels_last=True,
            optimizer=OptimizerConfig(lr=1e-4, betas=(0.5, 0.9)),
            ema=EmaConfig(halflife_images=0),
            log_images=25_600,
            snapshot_images=EPOCH,
            checkpoint_images=EPOCH,
        ),
    )


def vavae_imagenet256() -> Experiment:
    """The same, aligned with DINOv2 at weight 0.1 and both margins: the published experiments, 50 epochs."""
    run = kl_imagenet256()
    return replace(run, method=replace(run.method, vf=0.1)).giving(features="lpips", vision="dinov2-large")


def three_stages(run: Experiment, total_images: int | None = None) -> Chain:
    """A run of VA-VAE as the released autoencoder was trained: aligned strongly, then less, then with margins.

    total_images: of all stages, 100 to 15 to 15 of them; None = the run's, published 130 epochs. For a file of one's
    own: `experiment = three_stages(vavae_imagenet256(), 130 * EPOCH)`.
    """
    whole, training = total_images or run.training.total_images, run.training
    stages, before = [], None
    for name, (epochs, settings) in STAGES.items():
        share = epochs / sum(each for each, _ in STAGES.values())
        total = _whole_batches(whole * share, training.batch)
        fall = round(training.optimizer.lr_cooldown_images * total / training.total_images)
        optimizer = replace(training.optimizer, lr_cooldown_images=fall)
        work = replace(
            run, method=replace(run.method, **settings), start=before,
            training=replace(training, total_images=total, optimizer=optimizer),
        )  # fmt: skip
        stages.append(Stage(name, work))
        before = f"{OF_STAGE}{name}"
    return Chain(*stages)


def _whole_batches(images: float, batch: int) -> int:
    return max(int(images) // batch, 1) * batch


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "kl-digits": kl_digits,
    "vavae-digits": vavae_digits,
    "kl-emoji64-32": kl_emoji64_32,
    "vavae-emoji64-32": vavae_emoji64_32,
    "kl-imagenet256": kl_imagenet256,
    "vavae-imagenet256": vavae_imagenet256,
}
