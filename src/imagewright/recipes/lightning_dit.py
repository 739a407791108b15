"""Transformers on patches, trained as LightningDiT is (Yao et al. 2025, 2501.01423): in pixels, or in latents
(docs/latents.md).

ImageNet at 256 x 256: `configs/reproductions` of the released program, XL/1, 64 epochs; of its 800 epochs the second
half has uniform times (`--method.uniform-from-images 0.5`). Sizes and lengths of the others are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.flow_matching import FlowMatching
from imagewright.networks import DiTConfig
from imagewright.paths.noise_levels import LogitNormal
from imagewright.recipes import edm
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Straight
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

METHOD = FlowMatching(times=LogitNormal(), direction=1.0, time_scale=1.0)
PUBLISHED_STEPS = Straight(num_steps=249, order=1, shift=0.3)
"""Euler's, between 250 points."""
FEW_STEPS = replace(PUBLISHED_STEPS, num_steps=50)
OPTIMIZER = OptimizerConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.95))


def digits() -> Experiment:
    """8x8 digits in 16 patches, 0.7 M parameters: about two minutes on two cores.

    Without the direction's loss: pixels of one channel have none.
    """
    run = edm.digits()
    optimizer = replace(OPTIMIZER, lr=2e-3, lr_ramp_images=4_000, lr_cooldown_images=60_000)
    return replace(
        run,
        method=replace(METHOD, direction=0.0),
        network=DiTConfig(**edm.FROM_DATA, patch=2, width=96, depth=4, heads=4),
        sampler=FEW_STEPS,
        training=replace(run.training, total_images=120_000, channels_last=False, optimizer=optimizer),
    )


def emoji64_32() -> Experiment:
    """Emoji at 32x32 in 64 patches, 5.5 M parameters: hours on two cores."""
    return _emoji(edm.emoji64_32(), patch=4)


def emoji64_64() -> Experiment:
    """Emoji at 64x64 in 256 patches, the same network: minutes on a data-centre GPU."""
    return _emoji(edm.emoji64_64(), patch=4)


def digits_latents() -> Experiment:
    """Digits in the 4 x 4 latents of 8 channels of the run `runs/vavae-digits`, 16 tokens: two minutes on two cores."""
    run = digits()
    return _in_latents(replace(run, network=replace(run.network, patch=1)), "runs/vavae-digits")


def emoji64_32_latents() -> Experiment:
    """Emoji at 32x32 in the 8 x 8 latents of 32 channels of the run `runs/vavae-emoji64-32`, 64 tokens."""
    run = emoji64_32()
    return _in_latents(replace(run, network=replace(run.network, patch=1)), "runs/vavae-emoji64-32")


def imagenet256() -> Experiment:
    """ImageNet-256 in the 16 x 16 latents of 32 channels of `runs/vavae-imagenet256`: XL/1 as published, 64 epochs."""
    batch = 1024
    run = Experiment(
        data=DataConfig(source="imagenet-256x256.zip", xflip=True),
        method=METHOD,
        network=DiTConfig(**edm.FROM_DATA),
        sampler=PUBLISHED_STEPS,
        training=TrainingConfig(
            total_images=80_000 * batch,
            batch=batch,
            micro_batch=32,
            precision="bf16",
            # The program takes the mean itself, so its eps is as it is.
            optimizer=replace(OPTIMIZER, lr=2e-4),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=20_000 * batch,
            checkpoint_images=20_000 * batch,
        ),
    )
    return _in_latents(run, "runs/vavae-imagenet256")


def _in_latents(run: Experiment, autoencoder: str) -> Experiment:
    """With latents of deviation 1 in every channel, and the direction's loss, whatever the pictures have."""
    data = replace(run.data, latent_std=1.0)
    return replace(run, data=data, method=METHOD, given={"autoencoder": autoencoder})


def _emoji(run: Experiment, patch: int) -> Experiment:
    before = run.training.optimizer
    optimizer = replace(OPTIMIZER, lr_ramp_images=before.lr_ramp_images, lr_cooldown_images=before.lr_cooldown_images)
    return replace(
        run,
        method=METHOD,
        network=DiTConfig(**edm.FROM_DATA, patch=patch, width=192, depth=8, heads=6),
        sampler=FEW_STEPS,
        training=replace(run.training, channels_last=False, optimizer=optimizer),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "lightning-dit-digits": digits,
    "lightning-dit-emoji64-32": emoji64_32,
    "lightning-dit-emoji64-64": emoji64_64,
    "lightning-dit-digits-latents": digits_latents,
    "lightning-dit-emoji64-32-latents": emoji64_32_latents,
    "lightning-dit-imagenet256": imagenet256,
}
