"""EDM denoisers (Karras et al. 2022, 2206.00364). CIFAR-10 and ImageNet-64: appendix F.1, table 7, and the official
program's README, which lists the options of every published model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.augment import Augment
from imagewright.data.config import DataConfig
from imagewright.methods.edm import EDM
from imagewright.networks import DhariwalUNetConfig, EDM2UNetConfig, SongUNetConfig
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes.published import eps_of_mean
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

FROM_DATA: dict[str, Any] = {"img_resolution": 64, "in_channels": 3, "out_channels": 3}
"""Sizes that `training.experiment.assemble` replaces by those of the data set."""


def digits() -> Experiment:
    """8x8 handwritten digits, class-conditional, 0.7 M parameters: about two minutes on two cores."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=EDM(),
        network=SongUNetConfig(
            **FROM_DATA, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0
        ),
        sampler=Heun(num_steps=18),
        training=TrainingConfig(
            total_images=52_000,
            batch=64,
            channels_last=True,  # 8% faster on CPU
            optimizer=OptimizerConfig(
                lr=2e-3,
                lr_ramp_images=4_000,
                lr_decay_images=20_000,
                lr_cooldown_images=20_000,
                eps=eps_of_mean(8 * 8),
            ),
            ema=EmaConfig(halflife_images=5_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=20_000,
            checkpoint_images=20_000,
        ),
    )


def emoji64_16() -> Experiment:
    """Emoji at 16x16, for claims that need many trainings."""
    return _emoji(16, total_images=150_000)


def emoji64_32() -> Experiment:
    """Emoji at 32x32, class-conditional, 3.9 M parameters: the recipe of the shipped model (hours on two cores)."""
    return _emoji(32, total_images=332_000)


def emoji64_64() -> Experiment:
    """Emoji at 64x64, class-conditional, 7.1 M parameters: minutes on a data-centre GPU."""
    run = _emoji(64, total_images=1_000_000)
    return replace(
        run,
        network=replace(run.network, model_channels=32, attn_resolutions=(16, 8), dropout=0.1),
        training=replace(
            run.training,
            batch=128,
            micro_batch=None,
            precision="bf16",
            optimizer=replace(
                run.training.optimizer, lr_ramp_images=20_000, lr_decay_images=200_000, lr_cooldown_images=300_000
            ),
            ema=EmaConfig(halflife_images=30_000, rampup_ratio=0.05),
            log_images=12_800,
            snapshot_images=128_000,
            checkpoint_images=64_000,
        ),
    )


def _emoji(resolution: int, total_images: int) -> Experiment:
    return Experiment(
        data=DataConfig(source="emoji64", resolution=resolution),
        method=EDM(),
        network=SongUNetConfig(
            **FROM_DATA, model_channels=24, channel_mult=(1, 2, 4, 4), num_blocks=2, attn_resolutions=(8,), dropout=0.0
        ),
        sampler=Heun(num_steps=18),
        training=TrainingConfig(
            total_images=total_images,
            batch=32,
            channels_last=True,  # 14% faster on CPU
            micro_batch=16,  # two processes of one thread each train 1.5 times as fast as one of two threads
            optimizer=OptimizerConfig(
                lr=1e-3,
                lr_ramp_images=5_000,
                lr_decay_images=60_000,
                lr_cooldown_images=60_000,
                eps=eps_of_mean(3 * resolution**2),
            ),
            ema=EmaConfig(halflife_images=10_000, rampup_ratio=0.05),
            log_images=3_200,
            snapshot_images=32_000,
            checkpoint_images=16_000,
        ),
    )


def cifar10() -> Experiment:
    """CIFAR-10, class-conditional DDPM++, as published (8 GPUs; give the data as an EDM-format zip)."""
    return Experiment(
        data=DataConfig(source="cifar10-32x32.zip"),
        method=EDM(augment=Augment(p=0.12)),
        network=SongUNetConfig(**FROM_DATA, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, dropout=0.13),
        sampler=Heun(num_steps=18),
        training=TrainingConfig(
            total_images=200_000_000,
            batch=512,
            optimizer=OptimizerConfig(lr=1e-3, lr_ramp_images=10_000_000, eps=eps_of_mean(3 * 32 * 32)),
            ema=EmaConfig(halflife_images=500_000, rampup_ratio=0.05),
            log_images=50_000,
            snapshot_images=2_500_000,
            checkpoint_images=2_500_000,
        ),
    )


def cifar10_ncsnpp() -> Experiment:
    """CIFAR-10 with the other published network, NCSN++."""
    run = cifar10()
    return replace(
        run,
        network=replace(
            run.network,
            embedding_type="fourier",
            channel_mult_noise=2,
            encoder_type="residual",
            resample_filter=(1, 3, 3, 1),
        ),
    )


def cifar10_uncond() -> Experiment:
    """CIFAR-10, unconditional DDPM++, as published."""
    return _without_labels(cifar10())


def cifar10_uncond_ncsnpp() -> Experiment:
    """CIFAR-10, unconditional NCSN++, as published."""
    return _without_labels(cifar10_ncsnpp())


def _without_labels(run: Experiment) -> Experiment:
    return replace(run, data=replace(run.data, labels=False))


def imagenet64() -> Experiment:
    """ImageNet-64, class-conditional ADM, as published (32 GPUs; give the data as an EDM-format zip)."""
    return Experiment(
        data=DataConfig(source="imagenet-64x64.zip"),
        method=EDM(),
        network=DhariwalUNetConfig(
            **FROM_DATA,
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_blocks=3,
            attn_resolutions=(32, 16, 8),
            dropout=0.10,
        ),
        sampler=Heun(num_steps=256, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003),
        training=TrainingConfig(
            total_images=2_500_000_000,
            batch=4096,
            micro_batch=64,
            channels_last=True,
            precision="fp16",
            # --ls=100, which the official program does not divide out again.
            optimizer=OptimizerConfig(lr=1e-4, lr_ramp_images=10_000_000, eps=eps_of_mean(3 * 64 * 64, loss_scale=100)),
            ema=EmaConfig(halflife_images=50_000_000, rampup_ratio=0.05),
            log_images=50_000,
            snapshot_images=10_000_000,
            checkpoint_images=10_000_000,
        ),
    )


def edm2_imagenet64_s() -> Experiment:
    """ImageNet-64, EDM2's S network and training (Karras et al. 2024, 2312.02696; preset edm2-img64-s)."""
    return _edm2(192, 0.0100, 1_073_741_824)


def edm2_imagenet64_xs() -> Experiment:
    """EDM2's XS, an eighth as long: the weak model that guides S (preset edm2-img64-s-autog-fid)."""
    return _edm2(128, 0.0120, 134_217_728)


def _edm2(channels: int, lr: float, images: int) -> Experiment:
    """EDM2's presets; its averages are made of the two that are kept (`tune ema`), the plain one is ours."""
    batch = 2048
    return Experiment(
        data=DataConfig(source="imagenet-64x64.zip"),
        method=EDM(uncertainty=True, noise_levels=LogNormal(mean=-0.8, std=1.6)),
        network=EDM2UNetConfig(**FROM_DATA, model_channels=channels),
        sampler=Heun(num_steps=32),
        training=TrainingConfig(
            total_images=images,
            batch=batch,
            micro_batch=64,
            channels_last=True,
            precision="fp16",
            optimizer=OptimizerConfig(
                lr=lr,
                betas=(0.9, 0.99),
                lr_ramp_images=10_000_000,
                lr_decay_images=35_000 * batch,
                eps=eps_of_mean(3 * 64 * 64),
            ),
            ema=EmaConfig(halflife_images=50_000_000, power_std=(0.05, 0.1)),
            log_images=100_000,
            snapshot_images=10_000_000,
            checkpoint_images=10_000_000,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "edm-digits": digits,
    "edm-emoji64-16": emoji64_16,
    "edm-emoji64-32": emoji64_32,
    "edm-emoji64-64": emoji64_64,
    "edm-cifar10": cifar10,
    "edm-cifar10-ncsnpp": cifar10_ncsnpp,
    "edm-cifar10-uncond": cifar10_uncond,
    "edm-cifar10-uncond-ncsnpp": cifar10_uncond_ncsnpp,
    "edm-imagenet64": imagenet64,
    "edm2-imagenet64-s": edm2_imagenet64_s,
    "edm2-imagenet64-xs": edm2_imagenet64_xs,
}
