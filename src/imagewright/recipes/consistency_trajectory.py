"""Consistency trajectory models (Kim et al. 2024, 2310.02279; hyper-parameters: the published commands).

The published runs have two stages: without an adversary, then from those weights with one (`..._gan`). Constants are
those of the commands of Kim-Dongjun/ctm-cifar10 (class-conditional) and sony/ctm; lengths are their advice: 10,000 to
50,000 steps, then at least 30,000.
Departs    l2 for LPIPS where it is not installed, and its own maxima where the programs' VGG has average pooling; a
           convolutional discriminator for the projected one. The second stage starts from the first one's averaged
           weights with fresh optimisers; the published runs go on from raw weights, averages and RAdam's moments. fp16
           is autocast of every network; there the discriminator stays in float32. The programs add up the gradients of
           a process's micro-batches, ours are their mean: eps is smaller by as much, but RAdam's first five steps,
           which divide by nothing, are smaller too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.consistency_trajectory import Adversarial, ConsistencyTrajectory
from imagewright.methods.distances import Distance
from imagewright.metrics.perceptual import lpips_installed
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Jumps
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment
from imagewright.training.given import named

DISCRIMINATOR_LR = 2e-3


def ctm_digits() -> Experiment:
    """Jumps between any two levels for digits, from the run `runs/edm-digits`; no adversary."""
    run = cd_digits()
    return replace(
        run,
        method=ConsistencyTrajectory(
            grid_points=12, max_steps=4, target_decay=0.95, distance=Distance(kind="pseudo_huber", huber_c=0.3)
        ),
        sampler=Jumps(),
    )


def ctm_emoji64_32() -> Experiment:
    """Jumps for emoji at 32x32 from the shipped denoiser, with an adversary of our own in the last third."""
    run = cd_emoji64_32()
    return replace(
        run,
        method=ConsistencyTrajectory(
            grid_points=18,
            max_steps=4,
            target_decay=0.99,
            distance=Distance(kind="pseudo_huber", huber_c=0.3),
            adversarial=Adversarial(start=0.6, lr_scale=1.0, width=32),
        ),
        sampler=Jumps(),
    )


def ctm_cifar10() -> Experiment:
    """CIFAR-10, class-conditional, first stage; the program leaves the network's dropout on."""
    method = ConsistencyTrajectory(grid_points=18, dropout=0.13)
    return _published("cifar10-32x32.zip", "runs/edm-cifar10", 256, 16, 4, 4e-4, method)


def ctm_cifar10_gan() -> Experiment:
    """The second stage, from the run `runs/ctm-cifar10` (the unconditional one has a target average of 0.9999)."""
    return _second_stage(ctm_cifar10(), "runs/ctm-cifar10", 528, 4, 4e-4)


def ctm_imagenet64() -> Experiment:
    """ImageNet-64, first stage: 1440 at 4e-4 as in the command; the program's defaults are 2048 at 8e-6."""
    return _published(
        "imagenet-64x64.zip", "runs/edm-imagenet64", 1440, 18, 8, 4e-4, ConsistencyTrajectory(grid_points=40)
    )


def ctm_imagenet64_gan() -> Experiment:
    """The second stage, from the run `runs/ctm-imagenet64`: n up to 20, 8e-6."""
    return _second_stage(ctm_imagenet64(), "runs/ctm-imagenet64", 4224, 8, 8e-6, max_steps=20)


def _published(
    source: str, teacher: str, batch: int, micro_batch: int, processes: int, lr: float, method: ConsistencyTrajectory
) -> Experiment:
    """50,000 steps; LPIPS where it is installed; RAdam at a constant rate, no clipping, fp16, mirrored images.

    micro_batch: each has adaptive weights of its own, so its size is part of the method. processes: of the command.
    """
    compares = lpips_installed()
    return Experiment(
        data=DataConfig(source=source, xflip=True),
        method=replace(method, distance=Distance(kind="perceptual")) if compares else method,
        given=named(features="lpips-average" if compares else None, teacher=teacher),
        sampler=Jumps(),
        training=_paced(TrainingConfig(
            total_images=50_000 * batch,
            batch=batch,
            micro_batch=micro_batch,
            channels_last=True, precision="fp16",
            optimizer=OptimizerConfig(kind="radam", lr=lr, eps=_eps(batch, micro_batch, processes)),
        )),
    )  # fmt: skip


def _second_stage(first: Experiment, start: str, batch: int, processes: int, lr: float, **method: int) -> Experiment:
    """30,000 steps, every other one the discriminator's."""
    micro_batch = 11
    adversarial = Adversarial(start=0.0, lr_scale=DISCRIMINATOR_LR / lr)
    training = replace(
        first.training,
        total_images=30_000 * batch,
        batch=batch,
        micro_batch=micro_batch,
        optimizer=replace(first.training.optimizer, lr=lr, eps=_eps(batch, micro_batch, processes)),
    )
    return replace(
        first, method=replace(first.method, adversarial=adversarial, **method), start=start, training=_paced(training)
    )


def _eps(batch: int, micro_batch: int, processes: int) -> float:
    """Of a mean over micro-batches, where the programs have the sum of each process's own."""
    return 1e-8 / (batch // processes // micro_batch)


def _paced(training: TrainingConfig) -> TrainingConfig:
    """With an average that keeps 0.999 at every update of the student, and what is counted in steps."""
    batch = training.batch
    return replace(
        training,
        ema=EmaConfig(halflife_images=halflife_images(batch, 0.999), rampup_ratio=None),
        log_images=100 * batch,
        snapshot_images=5_000 * batch,
        checkpoint_images=1_000 * batch,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "ctm-digits": ctm_digits,
    "ctm-emoji64-32": ctm_emoji64_32,
    "ctm-cifar10": ctm_cifar10,
    "ctm-cifar10-gan": ctm_cifar10_gan,
    "ctm-imagenet64": ctm_imagenet64,
    "ctm-imagenet64-gan": ctm_imagenet64_gan,
}
