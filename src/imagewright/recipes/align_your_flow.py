"""Align Your Flow (Sabour et al. 2025, 2506.14603): maps between any two times, and teachers aligned for them.

Constants of ImageNet-64 are the paper's as far as they are known: EDM2's S network, 50,000 steps of 2,048 at 1e-4, r to
0.99 over 10,000, lambda in [1, 3], then 3,000 steps with an adversary. The paper has no CIFAR-10; that run has the same
method on EDM's network, with sCD's optimiser. Guided runs take a weak model, --weak RUN; without one nothing guides.
Departs    The teachers of ImageNet-64 are EDM2's published S and XS, averaged by relative widths of 0.045 and 0.11;
           give the runs named here, or the weights that `imagewright import` brings in. Averages are a plain 0.9999.
           Momenta and eps of the paper's optimiser are not known; they are sCD's. Stops are even in
           sigma / (sigma + 1), a shift of the paper's time, in which `--set shift=0.5` has them even.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.align_your_flow import AlignYourFlow, RelativisticFinish
from imagewright.methods.time_alignment import TimeAlignment
from imagewright.recipes.consistency import cd_digits, cd_emoji64_32
from imagewright.recipes.continuous_consistency import cifar10_training, imagenet64_training, paced
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Heun, Jumps
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

STOPS = Jumps(num_steps=4)
WARMUP_STEPS, STEPS, FINISH_STEPS = 10_000, 50_000, 3_000


def ayf_digits() -> Experiment:
    """Digits in any number of jumps from the run `runs/edm-digits`; with --weak RUN guided, and told how much."""
    run = cd_digits()
    return replace(
        run,
        method=AlignYourFlow(),
        sampler=STOPS,
        training=replace(
            run.training, optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), lr_cooldown_images=14_000)
        ),
    )


def align_digits() -> Experiment:
    """The run `runs/edm-digits`, told the straight path's time: seconds."""
    return _alignment(ayf_digits(), "runs/edm-digits", 200, 64)


def ayf_emoji64_32() -> Experiment:
    """Emoji at 32x32 from the shipped denoiser, with an adversary in the last tenth."""
    run = cd_emoji64_32()
    return replace(
        run,
        method=AlignYourFlow(adversarial=RelativisticFinish(width=32)),
        sampler=STOPS,
        training=replace(
            run.training, optimizer=OptimizerConfig(lr=4e-4, betas=(0.9, 0.99), lr_cooldown_images=40_000)
        ),
    )


def align_emoji64_32() -> Experiment:
    """The shipped denoiser, told the straight path's time."""
    return _alignment(ayf_emoji64_32(), "emoji64-32", 500, 32)


def ayf_cifar10() -> Experiment:
    """CIFAR-10, class-conditional, from the run `runs/align-cifar10`."""
    training = cifar10_training(STEPS + FINISH_STEPS)
    return _published("cifar10-32x32.zip", training).giving(teacher="runs/align-cifar10")


def align_cifar10() -> Experiment:
    """The run `runs/edm-cifar10`, told the straight path's time."""
    return _alignment(ayf_cifar10(), "runs/edm-cifar10", 10_000, 512)


def ayf_imagenet64() -> Experiment:
    """ImageNet-64 from EDM2's S, aligned in `runs/align-imagenet64`, guided by its XS in `runs/edm2-imagenet64-xs`."""
    batch = 2048
    training = imagenet64_training(batch, STEPS + FINISH_STEPS)
    optimizer = replace(training.optimizer, lr=1e-4, lr_decay_images=None)
    run = _published("imagenet-64x64.zip", replace(training, optimizer=optimizer))
    return run.giving(teacher="runs/align-imagenet64", weak="runs/edm2-imagenet64-xs")


def align_imagenet64() -> Experiment:
    """EDM2's S in `runs/edm2-imagenet64-s`, told the straight path's time."""
    return _alignment(ayf_imagenet64(), "runs/edm2-imagenet64-s", 10_000, 2048)


def _published(source: str, training: TrainingConfig) -> Experiment:
    steps = STEPS + FINISH_STEPS
    method = AlignYourFlow(warmup=WARMUP_STEPS / steps, adversarial=RelativisticFinish(start=STEPS / steps, width=128))
    return Experiment(data=DataConfig(source=source, xflip=True), method=method, sampler=STOPS, training=training)


def _alignment(run: Experiment, teacher: str, steps: int, batch: int) -> Experiment:
    """So many steps of Adam at 1e-3, cooled down over the second half; no image passes through the network's body."""
    total = steps * batch
    return replace(
        run,
        method=TimeAlignment(),
        given={"teacher": teacher},
        sampler=Heun(num_steps=18),
        training=replace(
            run.training,
            total_images=total,
            batch=batch,
            micro_batch=None,
            precision="fp32",
            optimizer=OptimizerConfig(lr=1e-3, lr_cooldown_images=total // 2),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.95), rampup_ratio=None),
            **(paced(batch) | {"log_images": total // 10, "snapshot_images": total, "checkpoint_images": total}),
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "ayf-digits": ayf_digits,
    "ayf-emoji64-32": ayf_emoji64_32,
    "ayf-cifar10": ayf_cifar10,
    "ayf-imagenet64": ayf_imagenet64,
    "align-digits": align_digits,
    "align-emoji64-32": align_emoji64_32,
    "align-cifar10": align_cifar10,
    "align-imagenet64": align_imagenet64,
}
