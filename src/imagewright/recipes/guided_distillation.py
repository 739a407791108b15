"""Guided diffusion models in few steps (Meng et al. 2022, 2210.03142), and the denoisers from which they learn.

Constants of CIFAR-10 and ImageNet-64 are those of the released configurations of progressive distillation (batch, rate,
50,000 steps a halving, clipping at 1), to which the paper refers, with its stage 1 before (3e-4, unverified).
Departs    The teachers are EDM's with the label hidden from a tenth of the images, not the paper's. Stage 1 has half of
           the run; the paper does not say how long it is. The released ImageNet-64 run's network has two outputs.
           The average, of which the released halvings have none, is 0.9999, as the paper has it. The gradient is cut as
           a whole; there each device's share of it is, before they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.guided_distillation import GuidedDistillation, guided_sampler
from imagewright.recipes import edm
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.recipes.published import halflife_images
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment


def guided_digits() -> Experiment:
    """Guided digits in four steps from the run `runs/guided-digits-teacher`."""
    run = cd_digits()
    method = GuidedDistillation(start_steps=16, end_steps=4)
    training = replace(run.training, optimizer=OptimizerConfig(lr=1e-3), total_images=56_000)
    return replace(
        run, method=method, given={"teacher": "runs/guided-digits-teacher"}, sampler=_sampler(method), training=training
    )


def guided_digits_stochastic() -> Experiment:
    """The same for the sampler that goes two steps and noises back by one."""
    run = guided_digits()
    method = replace(run.method, stochastic=True)
    return replace(run, method=method, sampler=_sampler(method))


def guided_digits_encoder() -> Experiment:
    """The same for the way from image to noise: `imagewright couple RUN --invert digits --weight 2`."""
    run = guided_digits()
    return replace(run, method=replace(run.method, direction="encode"))


def guided_digits_teacher() -> Experiment:
    """The denoiser of digits, from which a tenth of the classes are hidden."""
    return _teacher(edm.digits())


def guided_emoji64_32() -> Experiment:
    """Guided emoji at 32x32 in four steps from the run `runs/guided-emoji64-32-teacher`."""
    run = cd_emoji64_32()
    method = GuidedDistillation(start_steps=16, end_steps=4)
    training = replace(run.training, optimizer=OptimizerConfig(lr=4e-4), total_images=200_000)
    return replace(
        run,
        method=method,
        given={"teacher": "runs/guided-emoji64-32-teacher"},
        sampler=_sampler(method),
        training=training,
    )


def guided_emoji64_32_teacher() -> Experiment:
    """The denoiser of emoji at 32x32, from which a tenth of the classes are hidden."""
    return _teacher(edm.emoji64_32())


def guided_cifar10() -> Experiment:
    """CIFAR-10 down to one step, batch 128: the released rate of halvings, 5e-5, behind 3e-4."""
    return _published("cifar10-32x32.zip", "runs/guided-cifar10-teacher", 128, 5e-5)


def guided_cifar10_teacher() -> Experiment:
    """EDM's class-conditional CIFAR-10, from which a tenth of the classes are hidden."""
    return _teacher(edm.cifar10())


def guided_imagenet64() -> Experiment:
    """ImageNet-64 down to one step, batch 2048: 1e-4 behind 3e-4."""
    run = _published("imagenet-64x64.zip", "runs/guided-imagenet64-teacher", 2048, 1e-4)
    return replace(run, training=replace(run.training, micro_batch=64, channels_last=True, precision="bf16"))


def guided_imagenet64_teacher() -> Experiment:
    """EDM's ImageNet-64, from which a tenth of the classes are hidden."""
    return _teacher(edm.imagenet64())


def _teacher(run: Experiment) -> Experiment:
    return replace(run, network=replace(run.network, label_dropout=0.1))


def _sampler(method: GuidedDistillation) -> object:
    return guided_sampler(method.end_steps, stochastic=method.stochastic)


def _published(source: str, teacher: str, batch: int, rate: float) -> Experiment:
    """50,000 steps a halving, those to two and to one twice as many; as many again before them.

    Adam's eps stays as released: its loss is a mean over an image's numbers, as ours is.
    """
    method = GuidedDistillation(start_steps=512, end_steps=1, halving_rate=rate / 3e-4)
    steps = 2 * 50_000 * len(method.stages)
    return Experiment(
        data=DataConfig(source=source, xflip=True),
        method=method,
        given={"teacher": teacher},
        sampler=_sampler(method),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            optimizer=OptimizerConfig(lr=3e-4, clip_norm=1.0),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=10_000 * batch,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "guided-digits": guided_digits,
    "guided-digits-stochastic": guided_digits_stochastic,
    "guided-digits-encoder": guided_digits_encoder,
    "guided-digits-teacher": guided_digits_teacher,
    "guided-emoji64-32": guided_emoji64_32,
    "guided-emoji64-32-teacher": guided_emoji64_32_teacher,
    "guided-cifar10": guided_cifar10,
    "guided-cifar10-teacher": guided_cifar10_teacher,
    "guided-imagenet64": guided_imagenet64,
    "guided-imagenet64-teacher": guided_imagenet64_teacher,
}
