"""Consistency distillation and training (Song et al. 2023, 2303.01469; hyper-parameters: appendix C, table 3).

Also the paper's variants in continuous time and its baseline, progressive distillation, as its CIFAR-10 code has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.consistency import ConsistencyDistillation, ConsistencyTraining
from imagewright.methods.consistency_limits import ContinuousTimeDistillation, ContinuousTimeTraining
from imagewright.methods.distances import Distance
from imagewright.methods.edm import EDM
from imagewright.methods.progressive_distillation import ProgressiveDistillation, steps_sampler
from imagewright.metrics.perceptual import lpips_installed
from imagewright.paths.schedules import karras_sigmas
from imagewright.recipes import edm
from imagewright.recipes.published import eps_of_mean, halflife_images
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

EPS_OF_PULL = 2 * eps_of_mean(3 * 32 * 32)
"""Under stop-gradient in continuous time the official loss is a sum, half of ours times the numbers of an image."""


def cd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`: about two minutes on two cores."""
    return Experiment(
        data=DataConfig(source="digits"),
        # A larger c than is usual: at 0.03 the one-step distance was twice as high.
        method=ConsistencyDistillation(grid_points=12, distance=Distance(kind="pseudo_huber", huber_c=0.3)),
        given={"teacher": "runs/edm-digits"},
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
        given={"teacher": "emoji64-32"},
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


def cd_emoji64_64() -> Experiment:
    """One-step emoji at 64x64 from the run `runs/edm-emoji64-64`: minutes on a data-centre GPU."""
    run = cd_emoji64_32()
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=64),
        given={"teacher": "runs/edm-emoji64-64"},
        training=replace(
            run.training,
            total_images=400_000,
            batch=128,
            channels_last=True,
            precision="bf16",
            optimizer=replace(run.training.optimizer, lr_decay_images=100_000, lr_cooldown_images=160_000),
            ema=EmaConfig(halflife_images=20_000, rampup_ratio=0.1),
            log_images=12_800,
            snapshot_images=64_000,
            checkpoint_images=64_000,
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
    ).giving(teacher=None)


def _published(source: str, batch: int, steps: int, lr: float, ema_decay: float) -> Experiment:
    """What the published runs share: mirrored images, RAdam at a constant rate, no clipping; `ema_decay` per step.

    The CIFAR-10 configurations name a warm-up of 10 M images, which the official program gives to Adam alone.
    """
    return Experiment(
        data=DataConfig(source=source, xflip=True),
        method=ConsistencyDistillation(),
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            optimizer=OptimizerConfig(kind="radam", lr=lr),
            ema=EmaConfig(halflife_images=halflife_images(batch, ema_decay), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


def _published_cifar10() -> Experiment:
    run = _published("cifar10-32x32.zip", 512, 800_000, 4e-4, 0.9999)
    return replace(run, data=replace(run.data, labels=False))


def _published_imagenet64(steps: int, lr: float) -> Experiment:
    run = _published("imagenet-64x64.zip", 2048, steps, lr, 0.9999432189950708)
    return replace(run, training=replace(run.training, channels_last=True, precision="fp16", micro_batch=64))


def _comparing(
    run: Experiment, method: ConsistencyDistillation | ConsistencyTraining, features: str = "lpips"
) -> Experiment:
    """With LPIPS, as for the published figures, where it is installed; elsewhere with l2, another published run.

    features: the program for ImageNet pools by means ("lpips-average"), that for CIFAR-10 by maxima.
    """
    if lpips_installed():
        return replace(run, method=replace(method, distance=Distance(kind="perceptual"))).giving(features=features)
    return replace(run, method=method)


def cd_cifar10_teacher() -> Experiment:
    """The denoiser of the published CIFAR-10 runs: unconditional NCSN++, mirrored images, no other augmentation."""
    run = edm.cifar10_uncond_ncsnpp()
    return replace(
        run,
        data=replace(run.data, xflip=True),
        method=EDM(),
        training=replace(
            run.training,
            total_images=400_000 * run.training.batch,
            ema=replace(run.training.ema, rampup_ratio=None),
        ),
    )


def cd_cifar10() -> Experiment:
    """CIFAR-10 distillation as published: LPIPS where it is installed, else l2."""
    run = _published_cifar10().giving(teacher="runs/cd-cifar10-teacher")
    return _comparing(run, ConsistencyDistillation(grid_points=18, target_decay=0.0))


def cd_imagenet64() -> Experiment:
    """ImageNet-64 distillation as published: LPIPS where it is installed, else l2; samples in two steps."""
    run = replace(
        _published_imagenet64(600_000, 8e-6),
        sampler=MultistepConsistency(sigmas=(_grid_level(40, 22),)),
    ).giving(teacher="runs/edm-imagenet64")
    return _comparing(run, ConsistencyDistillation(grid_points=40, target_decay=0.95), "lpips-average")


def ct_cifar10() -> Experiment:
    """CIFAR-10 training without a teacher as published (NCSN++): LPIPS where it is installed, else l2."""
    run = replace(_published_cifar10(), network=replace(cd_cifar10_teacher().network, dropout=0.0))
    return _comparing(run, ConsistencyTraining(s0=2, s1=150, mu0=0.9))


def ct_imagenet64() -> Experiment:
    """ImageNet-64 training without a teacher as published: LPIPS where installed, else l2; samples in two steps.

    From random weights, as the paper has it; the released command starts from a denoiser's, by
    --start runs/edm-imagenet64.
    """
    run = replace(
        _published_imagenet64(800_000, 1e-4),
        network=replace(edm.imagenet64().network, dropout=0.0),
        sampler=MultistepConsistency(sigmas=(_grid_level(201, 106),)),
    )
    return _comparing(run, ConsistencyTraining(s0=2, s1=200, mu0=0.95), "lpips-average")


def _grid_level(points: int, index: int) -> float:
    """The published level of the second step, which the official commands give as an index of the grid."""
    return float(karras_sigmas(points, 0.002, 80.0)[index])


def ctcd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`, in continuous time."""
    return replace(cd_digits(), method=ContinuousTimeDistillation())


def ctcd_cifar10() -> Experiment:
    """CIFAR-10 distillation in continuous time, l2, the tangent itself learnt: 1e-3; dropout 0.3."""
    run = cd_cifar10()
    return replace(
        run,
        method=ContinuousTimeDistillation(metric="norm", dropout=0.3),
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=1e-3)),
    ).giving(features=None)


def ctcd_cifar10_stop_gradient() -> Experiment:
    """CIFAR-10 distillation in continuous time, l2, under stop-gradient: 5e-6; dropout 0.3."""
    run = ctcd_cifar10()
    return replace(
        run,
        method=ContinuousTimeDistillation(stop_gradient=True, dropout=0.3),
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=5e-6, eps=EPS_OF_PULL)),
    )


def ctct_cifar10() -> Experiment:
    """CIFAR-10 training in continuous time, l2: 5e-6, dropout 0.3, from the weights of a denoiser."""
    run = ct_cifar10()
    return replace(
        run,
        method=ContinuousTimeTraining(),
        network=replace(run.network, dropout=0.3),
        start="runs/cd-cifar10-teacher",
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=5e-6, eps=EPS_OF_PULL)),
    ).giving(features=None)


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
    """CIFAR-10 progressive distillation as published, 4096 steps to 1; the rate falls to 0 in every stage."""
    run = cd_cifar10()
    batch, share = 512, 50_000
    return replace(
        run,
        method=ProgressiveDistillation(start_steps=4096, anneal=True),
        sampler=steps_sampler(1),
        training=replace(
            run.training,
            total_images=15 * share * batch,
            optimizer=OptimizerConfig(lr=5e-5, clip_norm=1.0),
            ema=EmaConfig(halflife_images=0, rampup_ratio=None),  # none: the raw weights are the product
        ),
    ).giving(features=None)


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "cd-digits": cd_digits,
    "cd-emoji64-32": cd_emoji64_32,
    "cd-emoji64-64": cd_emoji64_64,
    "cd-cifar10-teacher": cd_cifar10_teacher,
    "cd-cifar10": cd_cifar10,
    "cd-imagenet64": cd_imagenet64,
    "ct-digits": ct_digits,
    "ct-cifar10": ct_cifar10,
    "ct-imagenet64": ct_imagenet64,
    "ctcd-digits": ctcd_digits,
    "ctcd-cifar10": ctcd_cifar10,
    "ctcd-cifar10-stop-gradient": ctcd_cifar10_stop_gradient,
    "ctct-cifar10": ctct_cifar10,
    "pd-digits": pd_digits,
    "pd-cifar10": pd_cifar10,
}
