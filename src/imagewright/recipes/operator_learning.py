"""One call for a whole trajectory, DSNO (Zheng et al. 2023, 2211.13449). CIFAR-10 and ImageNet-64: the program's
configurations; 8 and 64 devices.

Pairs      imagewright couple runs/dsno-cifar10-teacher --n 1000000 --sampler ddim --steps 512
               --times 0.5492 0.2929 0.0897 --out couplings/cifar10-points
           and so for the others, `--times 0.7071 0.5 0.2929` for ImageNet-64. The paper's numbers of them, 1,000,000
           and 2,300,000, are not in its program.
Departs    Teachers are EDM's denoisers; that of CIFAR-10 has the program's network, trained as `edm-cifar10-uncond`
           without augmentation. On ImageNet-64 the published trajectories have 16 steps of a distilled teacher, and the
           class enters with a bias (768 numbers). The rate rises from 0, not from a thousandth. VGG's features are
           taken where they are installed, elsewhere the mean absolute difference, as on ImageNet-64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.distances import Distance
from imagewright.methods.dsno import OperatorDistillation
from imagewright.methods.edm import EDM
from imagewright.metrics.perceptual import lpips_installed
from imagewright.networks import ADMUNetConfig
from imagewright.recipes import edm
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.recipes.published import halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment


def digits() -> Experiment:
    """Digits of `runs/edm-digits` and its couplings with points: four times at once, one call."""
    run = cd_digits()
    return replace(
        run,
        data=replace(run.data, couplings="couplings/digits-points"),
        method=OperatorDistillation(),
        training=replace(run.training, optimizer=OptimizerConfig(lr=1e-3, lr_ramp_images=0.02, lr_cooldown_images=0.5)),
    )


def emoji64_32() -> Experiment:
    """Emoji at 32x32 of the shipped denoiser and its couplings with points."""
    run = cd_emoji64_32()
    optimizer = OptimizerConfig(lr=4e-4, lr_ramp_images=0.02, lr_cooldown_images=0.5)
    return replace(
        run,
        data=replace(run.data, couplings="couplings/emoji64-32-points"),
        method=OperatorDistillation(),
        training=replace(run.training, optimizer=optimizer),
    )


def cifar10_teacher() -> Experiment:
    """The denoiser of the CIFAR-10 run: its program's network of 60.0 M parameters, unconditional, mirrored images."""
    run = edm.cifar10_uncond()
    network = ADMUNetConfig(
        **edm.FROM_DATA, model_channels=256, channel_mult=(1, 1, 1), num_blocks=3, attn_resolutions=(16, 8),
        channels_per_head=None, heads=1, eps=1e-6, dropout=0.2,
    )  # fmt: skip
    return replace(run, data=replace(run.data, xflip=True), method=EDM(), network=network)


def cifar10() -> Experiment:
    """CIFAR-10, unconditional, as published: quad times, VGG's features, 400,000 steps of 256."""
    run = cifar10_teacher()
    method = OperatorDistillation(dropout=0.2)
    if lpips_installed():
        method = replace(method, distance=Distance(kind="perceptual"))
    published = _published(run, method, "cifar10", "runs/dsno-cifar10-teacher", 256, 400_000, 100_000)
    return published.giving(features="vgg" if lpips_installed() else None)


def imagenet64() -> Experiment:
    """ImageNet-64 as published: uniform times, mean absolute difference, fp16; 120,000 steps of 2,048.

    The program's `n_iters`, 480,000, counts the four parts of every batch. Its rate is halved after 200,000 steps,
    which it does not reach.
    """
    method = OperatorDistillation(spacing="uniform", dropout=0.1)
    run = _published(edm.imagenet64(), method, "imagenet64", "runs/edm-imagenet64", 2048, 120_000, None)
    return replace(run, training=replace(run.training, micro_batch=8, channels_last=True, precision="fp16"))


def _published(
    run: Experiment, method: OperatorDistillation, name: str, teacher: str, batch: int, steps: int, halving: int | None
) -> Experiment:
    """Adam at 2e-4, 10,000 steps of warm-up, halved every so many steps (None = never), an average of 0.9999 a step."""
    optimizer = OptimizerConfig(lr=2e-4, lr_ramp_images=10_000 * batch)
    if halving:
        optimizer = replace(optimizer, lr_step_images=halving * batch, lr_step_factor=0.5)
    return replace(
        run,
        data=replace(run.data, xflip=False, couplings=f"couplings/{name}-points"),
        method=method,
        network=None,
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            optimizer=optimizer,
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    ).giving(teacher=teacher)


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "dsno-digits": digits,
    "dsno-emoji64-32": emoji64_32,
    "dsno-cifar10-teacher": cifar10_teacher,
    "dsno-cifar10": cifar10,
    "dsno-imagenet64": imagenet64,
}
