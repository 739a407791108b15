"""Multistep consistency models (Heek et al. 2024, 2403.06807; no official code: see `_published`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.config import DataConfig
from imagewright.methods.multistep_consistency import MultistepConsistencyDistillation, MultistepConsistencyTraining
from imagewright.models.segments import segment_stops
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.recipes.edm import digits as edm_digits
from imagewright.recipes.edm import imagenet64 as edm_imagenet64
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Jumps
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment


def mcd_digits() -> Experiment:
    """Digits in four evaluations from the run `runs/edm-digits`: about two minutes on two cores."""
    return _by_adam(cd_digits())


def mcd_emoji64_32() -> Experiment:
    """Emoji at 32x32 in four evaluations from the shipped denoiser."""
    return _by_adam(cd_emoji64_32())


def mct_digits() -> Experiment:
    """Digits in four evaluations without a teacher."""
    teacher = edm_digits()
    assert teacher.network is not None
    return replace(
        mcd_digits(),
        method=MultistepConsistencyTraining(segments=4),
        network=replace(teacher.network, dropout=0.0),
    ).giving(teacher=None)


def mcd_imagenet64() -> Experiment:
    """ImageNet-64 distillation to eight evaluations."""
    return _published(MultistepConsistencyDistillation(segments=8)).giving(teacher="runs/edm-imagenet64")


def mct_imagenet64() -> Experiment:
    """ImageNet-64 training without a teacher, to eight evaluations."""
    network = replace(edm_imagenet64().network, dropout=0.0)
    return _published(MultistepConsistencyTraining(segments=8), network=network)


def _by_adam(run: Experiment) -> Experiment:
    """A run of consistency distillation as one of this paper's, in four segments."""
    return replace(
        run,
        method=MultistepConsistencyDistillation(segments=4),
        sampler=Jumps(sigmas=segment_stops(4)),
        training=replace(run.training, optimizer=replace(run.training.optimizer, kind="adam")),
    )


def _published(method: Any, **start: Any) -> Experiment:
    """ADM stands for the paper's own U-Nets and UViTs, whose sizes are not public.

    Unverified, for want of a release: 200k steps, batch 2048, Adam, evaluation EMA 0.9999 a step. The rate is ours, and
    so is that images are not mirrored and students have no dropout, of which the paper says nothing.
    """
    batch, steps = 2048, 200_000
    return Experiment(
        data=DataConfig(source="imagenet-64x64.zip"),
        method=method,
        sampler=Jumps(sigmas=segment_stops(method.segments)),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            micro_batch=64,
            channels_last=True,
            precision="fp16",
            optimizer=OptimizerConfig(lr=1e-4),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
        **start,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "mcd-digits": mcd_digits,
    "mcd-emoji64-32": mcd_emoji64_32,
    "mcd-imagenet64": mcd_imagenet64,
    "mct-digits": mct_digits,
    "mct-imagenet64": mct_imagenet64,
}
