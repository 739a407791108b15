"""Consistency distillation and training (Song et al. 2023, 2303.01469; hyper-parameters: appendix C, table 3).

Also the paper's variants in continuous time and its baseline, progressive distillation, as its CIFAR-10 code has them.
"""

from __future__ import annotations

from dataclasses import replace

from imagewright.methods.consistency import ConsistencyDistillation, ConsistencyTraining
from imagewright.methods.consistency_limits import ContinuousTimeDistillation, ContinuousTimeTraining
from imagewright.methods.distances import Distance
from imagewright.methods.progressive_distillation import ProgressiveDistillation, steps_sampler
from imagewright.networks import DhariwalUNetConfig
from imagewright.recipes import edm
from imagewright.recipes.edm import FROM_DATA
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment


def cd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`: about two minutes on two cores."""
    return Experiment(
        data=DataConfig(source="digits"),
        # A larger c than is usual: at 0.03 the one-step distance was twice as high.
        method=ConsistencyDistillation(grid_points=12, distance=Distance(kind="pseudo_huber", huber_c=0.3)),
        teacher="runs/edm-digits",
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=28_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(kind="radam", lr=1e-3, lr_decay_images=12_000, lr_cooldown_images=14_000),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
            log_images=2_560,
            snapshot_images=10_000,
            checkpoint_images=10_000,
        ),
    )


def cd_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser."""
    return Experiment(
        data=DataConfig(source="emoji64", resolution=32),
        method=ConsistencyDistillation(grid_points=18, distance=Distance(kind="pseudo_huber", huber_c=0.3)),
        teacher="emoji64-32",
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=100_000,
            batch=32,
            optimizer=OptimizerConfig(kind="radam", lr=4e-4, lr_decay_images=40_000, lr_cooldown_images=40_000),
            ema=EmaConfig(halflife_images=10_000, rampup_ratio=0.1),
            log_images=3_200,
            snapshot_images=16_000,
            checkpoint_images=16_000,
        ),
    )


def ct_digits() -> Experiment:
    """One-step digits without a teacher."""
    teacher = edm.digits()
    assert teacher.network is not None
    return replace(
        cd_digits(),
        # The target is an average, and what it knows climbs the grid a point at a time: a thousandth of the paper's
        # steps needs a coarser grid and a faster target than the paper's.
        method=ConsistencyTraining(s1=20, mu0=0.2, distance=Distance(kind="pseudo_huber", huber_c=0.03)),
        network=replace(teacher.network, dropout=0.0),
        teacher=None,
    )


def _published(source: str, batch: int, steps: int, lr: float, lr_ramp_images: int, ema_decay: float) -> Experiment:
    """What the published runs share: RAdam, no decay of the rate, no clipping; `ema_decay` per step."""
    halflife = batch * 0.6931471805599453 / (1 - ema_decay)
    return Experiment(
        data=DataConfig(source=source),
        method=ConsistencyDistillation(),
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            optimizer=OptimizerConfig(kind="radam", lr=lr, lr_ramp_images=lr_ramp_images),
            ema=EmaConfig(halflife_images=halflife, rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


def cd_cifar10() -> Experiment:
    """CIFAR-10 distillation as published, except l2 for LPIPS, whose weights are not shipped."""
    run = _published("cifar10-32x32.zip", 512, 800_000, 4e-4, 10_000_000, 0.9999)
    return replace(
        run,
        data=replace(run.data, labels=False),
        teacher="edm-cifar10",
        method=ConsistencyDistillation(grid_points=18, target_decay=0.0),
    )


def cd_imagenet64() -> Experiment:
    """ImageNet-64 distillation as published, except l2 for LPIPS, whose weights are not shipped."""
    run = _published("imagenet-64x64.zip", 2048, 600_000, 8e-6, 0, 0.999943)
    return replace(
        run,
        training=replace(run.training, precision="fp16", micro_batch=64),
        teacher="edm-imagenet64",
        method=ConsistencyDistillation(grid_points=40, target_decay=0.95),
    )


def ct_cifar10() -> Experiment:
    """CIFAR-10 training without a teacher as published (NCSN++), except l2 for LPIPS."""
    run = _published("cifar10-32x32.zip", 512, 800_000, 4e-4, 10_000_000, 0.9999)
    network = replace(edm.cifar10_ncsnpp().network, dropout=0.0)
    method = ConsistencyTraining(s0=2, s1=150, mu0=0.9)
    return replace(run, data=replace(run.data, labels=False), network=network, method=method)


def ct_imagenet64() -> Experiment:
    """ImageNet-64 training without a teacher as published (ADM), except l2 for LPIPS."""
    run = _published("imagenet-64x64.zip", 2048, 800_000, 1e-4, 0, 0.999943)
    network = DhariwalUNetConfig(
        **FROM_DATA,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.0,
    )
    method = ConsistencyTraining(s0=2, s1=200, mu0=0.95)
    return replace(
        run, training=replace(run.training, precision="fp16", micro_batch=64), network=network, method=method
    )


def ctcd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, in continuous time."""
    return replace(cd_digits(), method=ContinuousTimeDistillation())


def ctcd_cifar10() -> Experiment:
    """CIFAR-10 distillation in continuous time, l2, the tangent itself learnt: 1e-3 and dropout 0.3."""
    run = cd_cifar10()
    return replace(
        run,
        method=ContinuousTimeDistillation(metric="norm", dropout=0.3),
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=1e-3)),
    )


def ctcd_cifar10_stop_gradient() -> Experiment:
    """CIFAR-10 distillation in continuous time, l2, under stop-gradient: 5e-6."""
    run = cd_cifar10()
    return replace(
        run,
        method=ContinuousTimeDistillation(stop_gradient=True, dropout=0.0),
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=5e-6)),
    )


def ctct_cifar10() -> Experiment:
    """CIFAR-10 training in continuous time, l2: 5e-6, from the weights of a denoiser."""
    run = ct_cifar10()
    return replace(
        run,
        method=ContinuousTimeTraining(),
        # The denoiser's network has an input for augmentation; it is kept, and given nothing.
        network=replace(run.network, augment_dim=edm.cifar10_ncsnpp().method.augment_dim),
        start="edm-cifar10-ncsnpp",
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=5e-6)),
    )


def pd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits` by halving the number of steps, 32 to 1: as long as cd-digits."""
    run = cd_digits()
    return replace(
        run,
        method=ProgressiveDistillation(start_steps=32),
        sampler=steps_sampler(1),
        training=replace(
            run.training,
            optimizer=OptimizerConfig(lr=5e-4, lr_cooldown_images=7_000, clip_norm=1.0),
            ema=EmaConfig(halflife_images=1_000, rampup_ratio=0.1),
        ),
    )


def pd_cifar10() -> Experiment:
    """CIFAR-10 progressive distillation as published, 4096 steps to 1, except that the rate falls in the last alone."""
    run = cd_cifar10()
    batch, share = 512, 50_000
    return replace(
        run,
        method=ProgressiveDistillation(start_steps=4096),
        sampler=steps_sampler(1),
        training=replace(
            run.training,
            total_images=15 * share * batch,
            optimizer=OptimizerConfig(lr=5e-5, lr_cooldown_images=2 * share * batch, clip_norm=1.0),
            ema=EmaConfig(halflife_images=0, rampup_ratio=None),  # none: the raw weights are the product
        ),
    )
