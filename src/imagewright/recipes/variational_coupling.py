"""Consistency models with a learnt coupling, VCT (Silvestri et al. 2025, 2502.18197), and ECM (Geng et al. 2024,
2406.14548). CIFAR-10 and ImageNet-64: the commands of the programs' READMEs.

Departs    The commands of VCT say a batch for each device and no number of devices; here there is one. Its images of
           CIFAR-10 are mirrored, ECM's and those of ImageNet-64 are not, as there. EDM2's average is a half-life that
           grows with the run, nearly the same as the paper's; the program gives the average so far the new weights'
           share and the new weights the average's (`ema_update`), so that what it draws from is hardly averaged. It
           starts from EDM2's S averaged by a relative width of 0.075; give those weights, or the run named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.distances import Distance
from imagewright.methods.easy_consistency import EasyConsistencyTuning
from imagewright.methods.vct import ICT, Learnt, VariationalConsistencyTraining
from imagewright.networks import EDM2UNetConfig
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import edm, improved_consistency
from imagewright.recipes.consistency import cd_emoji64_32
from imagewright.recipes.published import halflife_images, power_average
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

CLIP = 200.0
ECM_IMAGENET64 = EasyConsistencyTuning(
    noise_levels=LogNormal(mean=-0.8, std=1.6), q=4.0, stages=4, weighting="edm",
    distance=Distance(kind="pseudo_huber", huber_c=0.06 / (3 * 64 * 64) ** 0.5),
)  # fmt: skip


def ecm_digits() -> Experiment:
    """One-step digits from the weights of `runs/edm-digits`, without asking it again."""
    run = edm.digits()
    training = replace(
        improved_consistency.digits().training,
        total_images=28_000,
        optimizer=OptimizerConfig(kind="radam", lr=1e-3, lr_cooldown_images=14_000),
    )
    return replace(
        run, method=EasyConsistencyTuning(stages=4), start="runs/edm-digits", sampler=MultistepConsistency(),
        training=training,
    )  # fmt: skip


def vct_digits() -> Experiment:
    """Digits in two steps without a teacher: iCT with a learnt coupling."""
    run = improved_consistency.digits()
    base = replace(ICT, s0=run.method.s0, s1=run.method.s1)
    method = VariationalConsistencyTraining(base=base, coupling=Learnt(beta=30.0, channels=4))
    training = replace(run.training, optimizer=replace(run.training.optimizer, clip_norm=CLIP))
    return replace(run, method=method, sampler=MultistepConsistency(sigmas=(0.4,)), training=training)


def vct_ecm_digits() -> Experiment:
    """Digits in two steps from the weights of `runs/edm-digits`: ECM with a learnt coupling."""
    run = ecm_digits()
    method = VariationalConsistencyTraining(base=run.method, coupling=Learnt(beta=10.0, channels=4))
    training = replace(run.training, optimizer=replace(run.training.optimizer, clip_norm=CLIP))
    return replace(run, method=method, sampler=MultistepConsistency(sigmas=(0.4,)), training=training)


def vct_emoji64_32() -> Experiment:
    """Emoji at 32x32 in two steps from the shipped denoiser's weights: ECM with a learnt coupling."""
    run = cd_emoji64_32()
    method = VariationalConsistencyTraining(base=EasyConsistencyTuning(), coupling=Learnt(beta=10.0, channels=8))
    training = replace(
        run.training,
        optimizer=OptimizerConfig(kind="radam", lr=4e-4, lr_cooldown_images=40_000, clip_norm=CLIP),
    )
    return replace(
        run, method=method, network=edm.emoji64_32().network, start="emoji64-32",
        sampler=MultistepConsistency(sigmas=(0.821,)), training=training,
    ).giving(teacher=None)  # fmt: skip


def ecm_cifar10() -> Experiment:
    """CIFAR-10, unconditional, from EDM's DDPM++: 200,000 steps of 128; two steps."""
    return _cifar10(EasyConsistencyTuning(), 128, 200_000, 0.2, "runs/edm-cifar10-uncond")


def vct_cifar10() -> Experiment:
    """iCT with a learnt coupling on CIFAR-10, unconditional DDPM++, as published: 400,000 steps of 512; two steps."""
    return _coupled(_cifar10(VariationalConsistencyTraining(), 512, 400_000, 0.3, None))


def vct_ecm_cifar10() -> Experiment:
    """ECM with a learnt coupling on CIFAR-10 as published: 400,000 steps of 128, beta 10; two steps."""
    method = VariationalConsistencyTraining(base=EasyConsistencyTuning(), coupling=Learnt(beta=10.0))
    return _coupled(_cifar10(method, 128, 400_000, 0.2, "runs/edm-cifar10-uncond"))


def vct_ecm_imagenet64() -> Experiment:
    """ECM with a learnt coupling on ImageNet-64 as published: linear path, EDM2's S network, beta 90; two steps."""
    batch, total = 128, 200_000 * 128
    method = VariationalConsistencyTraining(base=ECM_IMAGENET64, coupling=Learnt(beta=90.0, blocks=2), kernel="li")
    optimizer = OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), lr_decay_images=2_000 * batch, clip_norm=CLIP)
    return replace(
        edm.edm2_imagenet64_s(),
        method=method,
        network=EDM2UNetConfig(**edm.FROM_DATA, dropout=0.4, dropout_below=16),
        start="runs/edm2-imagenet64-s",
        sampler=MultistepConsistency(sigmas=(1.526 / (1 - 1.526 / 80),)),
        training=_training(batch, total, optimizer, power_average(0.1, total)),
    )


def _cifar10(
    method: EasyConsistencyTuning | VariationalConsistencyTraining,
    batch: int,
    steps: int,
    dropout: float,
    start: str | None,
) -> Experiment:
    """RAdam at 1e-4 without ramp or decay, an average of 0.9999 a step."""
    run = edm.cifar10_uncond()
    # A denoiser's network has an input for augmentation; it is kept, and given nothing.
    augment_dim = run.method.augment_dim if start else 0
    ema = EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None)
    return replace(
        run,
        method=method,
        network=replace(run.network, dropout=dropout, augment_dim=augment_dim),
        start=start,
        sampler=MultistepConsistency(sigmas=(0.821,)),
        training=_training(batch, batch * steps, OptimizerConfig(kind="radam", lr=1e-4), ema),
    )


def _coupled(run: Experiment) -> Experiment:
    """What the program of VCT has beside: mirrored images, and a bound on the gradient's norm."""
    optimizer = replace(run.training.optimizer, clip_norm=CLIP)
    return replace(run, data=replace(run.data, xflip=True), training=replace(run.training, optimizer=optimizer))


def _training(batch: int, total_images: int, optimizer: OptimizerConfig, ema: EmaConfig) -> TrainingConfig:
    return TrainingConfig(
        total_images=total_images,
        batch=batch,
        optimizer=optimizer,
        ema=ema,
        log_images=100 * batch,
        snapshot_images=10_000 * batch,
        checkpoint_images=10_000 * batch,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "ecm-digits": ecm_digits,
    "ecm-cifar10": ecm_cifar10,
    "vct-digits": vct_digits,
    "vct-ecm-digits": vct_ecm_digits,
    "vct-emoji64-32": vct_emoji64_32,
    "vct-cifar10": vct_cifar10,
    "vct-ecm-cifar10": vct_ecm_cifar10,
    "vct-ecm-imagenet64": vct_ecm_imagenet64,
}
