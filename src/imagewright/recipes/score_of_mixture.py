"""One-step generators from images alone, SMT, and from a teacher, SMD (Jayashankar et al. 2025, 2502.09609).

CIFAR-10 (without classes) and ImageNet-64 as in the published scripts: seven processes of 40 images, 400,000 steps (the
paper's figures are of 150,000 and 200,000), no average of the weights. On ImageNet-64 the generator of SMT has been
warmed up as a denoiser for 40,000 steps, which the paper says and the script does not show; by EDM's recipe here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.score_of_mixture import ScoreOfMixtureDistillation, ScoreOfMixtureTraining
from imagewright.recipes import edm
from imagewright.recipes.distribution_matching import dmd2_digits, dmd2_emoji64_32, dmd2_imagenet64
from imagewright.training.experiment import Experiment

BATCH, STEPS = 280, 400_000


def smd_digits() -> Experiment:
    """One-step digits from the run `runs/edm-digits`: about three minutes on two cores."""
    return replace(dmd2_digits(), method=ScoreOfMixtureDistillation())


def smt_digits() -> Experiment:
    """One-step digits from images, the generator warmed up by the run `runs/edm-digits`: minutes on two cores."""
    return _from_images(smd_digits(), edm.digits(), "runs/edm-digits", 5e-4, 1_000 * 64)


def smd_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser."""
    return replace(dmd2_emoji64_32(), method=ScoreOfMixtureDistillation())


def smt_emoji64_32() -> Experiment:
    """One-step emoji at 32x32 from images, the generator warmed up by the run `runs/edm-emoji64-32`."""
    return _from_images(smd_emoji64_32(), edm.emoji64_32(), "runs/edm-emoji64-32", 2e-4, 200_000)


def _from_images(run: Experiment, of: Experiment, warmup: str, lr: float, total: int) -> Experiment:
    """SMT's run, of another's length and rate, with the network of a denoiser's."""
    optimizer = replace(run.training.optimizer, lr=lr, lr_cooldown_images=0)
    training = replace(run.training, total_images=total, optimizer=optimizer)
    method = ScoreOfMixtureTraining(score_rate=2.0)
    return replace(run, method=method, network=of.network, given={"warmup": warmup}, training=training)


def smt_cifar10_uncond() -> Experiment:
    """CIFAR-10 without classes, SMT as published; the generator begins untrained."""
    run = _mirrored(_published(edm.cifar10_uncond(), 1e-4))
    network = replace(edm.cifar10_uncond().network, dropout=0.13)
    return replace(run, method=ScoreOfMixtureTraining(), network=network)


def smt_imagenet64() -> Experiment:
    """ImageNet-64, SMT as published, the generator warmed up by the run `runs/smt-imagenet64-warmup`."""
    run = _published(edm.imagenet64(), 5e-6)
    network = replace(edm.imagenet64().network, dropout=0.0)
    return replace(run, method=ScoreOfMixtureTraining(score_rate=10.0), network=network).giving(
        warmup="runs/smt-imagenet64-warmup"
    )


def smt_imagenet64_warmup() -> Experiment:
    """ImageNet-64, the warm-up of SMT's generator: a denoiser after 40,000 steps of 280."""
    run = edm.imagenet64()
    training = replace(run.training, total_images=40_000 * BATCH, batch=BATCH, micro_batch=40)
    return replace(run, training=training)


def smd_cifar10_uncond() -> Experiment:
    """CIFAR-10 without classes, SMD as published."""
    run = _mirrored(_published(edm.cifar10_uncond(), 5e-5))
    return replace(run, method=ScoreOfMixtureDistillation()).giving(teacher="runs/edm-cifar10-uncond")


def smd_imagenet64() -> Experiment:
    """ImageNet-64, SMD as published."""
    run = _published(edm.imagenet64(), 2e-6)
    return replace(run, method=ScoreOfMixtureDistillation()).giving(teacher="runs/edm-imagenet64")


def _published(of: Experiment, lr: float) -> Experiment:
    """What the scripts share with DMD2's, on a recipe's images."""
    run = dmd2_imagenet64()
    training = replace(run.training, total_images=BATCH * STEPS, optimizer=replace(run.training.optimizer, lr=lr))
    return replace(run, data=of.data, method=ScoreOfMixtureDistillation(), given={}, training=training)


def _mirrored(run: Experiment) -> Experiment:
    """As the program's CIFAR-10 is; its ImageNet is not."""
    return replace(run, data=replace(run.data, xflip=True))


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "smt-digits": smt_digits,
    "smt-emoji64-32": smt_emoji64_32,
    "smt-cifar10-uncond": smt_cifar10_uncond,
    "smt-imagenet64-warmup": smt_imagenet64_warmup,
    "smt-imagenet64": smt_imagenet64,
    "smd-digits": smd_digits,
    "smd-emoji64-32": smd_emoji64_32,
    "smd-cifar10-uncond": smd_cifar10_uncond,
    "smd-imagenet64": smd_imagenet64,
}
