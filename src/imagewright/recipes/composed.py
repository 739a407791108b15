"""Runs that are made to measure: `auto`, a denoiser for any set of images, and `distill`, its student in one step.

What a paper fixes for one data set is here a rule over the images' size and number, the device and the time there is.
Shapes of schedules are those of the recipes for digits and emoji, which were tuned on a CPU; sizes of networks on a GPU
follow EDM's for CIFAR-10 and ImageNet-64. The rules were not tuned on any other set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from imagewright.data.augment import Augment
from imagewright.data.config import DataConfig
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.distances import Distance
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.edm import EDM
from imagewright.networks import SongUNetConfig
from imagewright.recipes.published import eps_of_mean
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment
from imagewright.types import DataSpec

FEW = 50_000
"""Pictures below which they are augmented, as CIFAR-10's are."""
PASSES = 2_000
"""Times that each picture is seen, where there is time for it: EDM shows each of CIFAR-10's 4,000 times."""
LEAST_IMAGES, MOST_IMAGES = 200_000, 200_000_000
SMALLEST_MAP = 8
HOURS: Mapping[str, float] = {"cpu": 1.0}
"""How long a run may take where nothing is said, by kind of device; USUAL_HOURS elsewhere."""
USUAL_HOURS = 4.0


def auto(data: DataConfig, spec: DataSpec, count: int, device: str) -> Experiment:
    """A class-conditional denoiser of `count` images of a set, for a kind of device ("cpu", "cuda", "mps").

    Its length is what quality asks for; `lasting` shortens it to the time there is.
    """
    small = device == "cpu"
    network = _network(spec, small, count)
    batch = 32 if small else max(64, 256 * 32 // max(spec.resolution, 32))
    total = min(max(PASSES * count, LEAST_IMAGES), MOST_IMAGES)
    return Experiment(
        data=data,
        method=EDM(augment=Augment(p=0.12 if count < FEW and spec.resolution >= 16 else 0.0)),
        network=network,
        sampler=Heun(num_steps=18),
        training=_schedule(
            TrainingConfig(
                total_images=total,
                batch=batch,
                channels_last=True,
                precision="bf16" if device == "cuda" else "fp32",
                optimizer=OptimizerConfig(lr=1e-3, eps=eps_of_mean(spec.channels * spec.resolution**2)),
            )
        ),
    )


def _network(spec: DataSpec, small: bool, count: int) -> SongUNetConfig:
    """Halved down to 8x8 where the size allows; the deeper, the wider, and on a CPU narrow throughout."""
    sizes = [spec.resolution]
    while sizes[-1] % 2 == 0 and sizes[-1] > SMALLEST_MAP:
        sizes.append(sizes[-1] // 2)
    if spec.resolution == SMALLEST_MAP:
        sizes.append(4)
    if small:
        channels = 32 if spec.resolution <= 16 else 24 if spec.resolution <= 32 else 16
    else:
        channels = 64 if count < 10_000 or spec.resolution > 64 else 128
    widths = tuple(1 if i == 0 else 2 if i < 3 else 4 for i in range(len(sizes)))
    if sizes[-1] > 16:  # an odd size, which cannot be halved: all that it learns it learns at one resolution
        widths = (2,) * len(sizes)
    return SongUNetConfig(
        img_resolution=spec.resolution,
        in_channels=spec.channels,
        out_channels=spec.channels,
        model_channels=channels,
        channel_mult=widths,
        num_blocks=1 if small else 3,
        attn_resolutions=tuple(s for s in sizes if s <= (SMALLEST_MAP if small else 16)),
        dropout=0.0 if small else 0.13,
    )


def _schedule(training: TrainingConfig) -> TrainingConfig:
    """Ramp, decay, cool-down and average as shares of the run, as the recipe for digits has them."""
    total = training.total_images
    return replace(
        training,
        optimizer=replace(
            training.optimizer,
            lr_ramp_images=total // 13,
            lr_decay_images=max(total * 2 // 5, 1),
            lr_cooldown_images=total * 2 // 5,
        ),
        ema=EmaConfig(halflife_images=total / 10, rampup_ratio=0.1),
        log_images=max(total // 50, 1),
        snapshot_images=max(total // 5, 1),
        checkpoint_images=max(total // 10, 1),
    )


def lasting(run: Experiment, hours: float, images_per_second: float) -> Experiment:
    """The run no longer than so many hours at that pace, in two digits of images, its schedule in proportion."""
    most = max(hours * 3600 * images_per_second, run.training.batch)
    if run.training.total_images <= most:
        return run
    unit = 10 ** max(len(str(int(most))) - 2, 0)
    return replace(run, training=_schedule(replace(run.training, total_images=int(most) // unit * unit)))


@dataclass(frozen=True)
class _Student:
    """One way to distil: what is changed of the teacher's run, and the share of its length."""

    make: Callable[[Experiment], Experiment]
    share: float


def _consistency(run: Experiment) -> Experiment:
    """Consistency distillation, as for emoji."""
    optimizer = replace(run.training.optimizer, kind="radam", lr=4e-4, eps=1e-8, betas=(0.9, 0.999), lr_ramp_images=0)
    method = ConsistencyDistillation(grid_points=18, distance=Distance(kind="pseudo_huber", huber_c=0.3))
    return replace(run, method=method, training=replace(run.training, optimizer=optimizer))


def _dmd2(run: Experiment) -> Experiment:
    """Distribution matching without the adversary, as for emoji."""
    rate = replace(run.training.optimizer, kind="adamw", lr=4e-4, eps=1e-8, weight_decay=0.01, clip_norm=10.0)
    ema = replace(run.training.ema, halflife_images=run.training.total_images / 100)
    rate = replace(rate, betas=(0.9, 0.999), lr_ramp_images=0, lr_decay_images=None)
    training = replace(run.training, optimizer=rate, ema=ema)
    return replace(run, method=DMD2(generator_gan=0.0, fake_gan=0.0), training=training)


STUDENTS: Mapping[str, _Student] = {"consistency": _Student(_consistency, 0.5), "dmd2": _Student(_dmd2, 0.5)}
"""Ways to distil by their names on the command line."""


def distill(teacher: str, run: Experiment, by: str = "consistency") -> Experiment:
    """A student in one step of a denoiser's run.

    Its data, batch, precision and hardware settings are the teacher's, and it trains half as long.
    """
    chosen = STUDENTS[by]
    total = max(int(run.training.total_images * chosen.share), run.training.batch)
    training = replace(run.training, total_images=total, weights_images=None)
    student = replace(
        run,
        network=None,
        given={"teacher": teacher},
        start=None,
        data=replace(run.data, couplings=None),
        sampler=MultistepConsistency(),
        training=_schedule(training),
    )
    return chosen.make(student)
