"""Multi-student distillation (Song et al. 2025, 2410.23274): a one-step student for each part of the classes.

A recipe trains one student, of the first part of the classes unless `--data.classes` says another; each may be trained
on a machine of its own, and `imagewright join` makes one model of all. `students` makes a chain of all of them, one
after the other, and `student` of one of them; in a file, for `imagewright train`:

    experiment = students("digits", parts=2)

Published for ImageNet-64: 4 students of 250 consecutive classes, DMD and DMD2 from EDM's teacher, and that small ones
had 42% or 71% fewer parameters. Nothing of it is published for CIFAR-10: those runs are DMD's and DMD2's on half of the
classes. Widths of small students, and rate, batch and length of their first stage, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from imagewright.data.partition import Floats, Part, clustered, consecutive, spelled
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.multi_student import TeacherScoreMatching
from imagewright.pretrained import find_model
from imagewright.recipes.distribution_matching import (
    dmd2_emoji64_32_gan,
    dmd2_imagenet64_gan,
    dmd_cifar10,
    dmd_digits,
    dmd_emoji64_32,
    dmd_imagenet64,
)
from imagewright.recipes.edm import cifar10 as edm_cifar10
from imagewright.recipes.edm import digits as edm_digits
from imagewright.recipes.edm import emoji64_32 as edm_emoji64_32
from imagewright.recipes.edm import imagenet64 as edm_imagenet64
from imagewright.training.chain import OF_STAGE, Chain, Stage
from imagewright.training.experiment import Experiment
from imagewright.training.students import JoinStudents
from imagewright.types import UserError


def _of(run: Experiment, part: str) -> Experiment:
    return replace(run, data=replace(run.data, classes=(part,)))


def digits() -> Experiment:
    """DM: a student of half of the digits, from the run `runs/edm-digits` and couplings of all: three minutes."""
    return _of(dmd_digits(), "0-4")


def digits_gan() -> Experiment:
    """ADM: the student `runs/multi-student-digits` goes on with an adversary, a third as long."""
    run = dmd_digits()
    total = 125 * 64
    optimizer = replace(run.training.optimizer, lr=1e-4, lr_cooldown_images=total // 2)
    training = replace(run.training, total_images=total, optimizer=optimizer)
    data = replace(run.data, couplings=None)
    return _of(replace(run, data=data, method=DMD2(), start="runs/multi-student-digits", training=training), "0-4")


def digits_small() -> Experiment:
    """TSM: what a student of half the teacher's width begins with (`multi-student-digits --student` this run)."""
    run = edm_digits()
    return _of(_small(run, "runs/edm-digits", model_channels=16), "0-4")


def emoji64_32() -> Experiment:
    """DM: a student of the first five groups of emoji, from the shipped denoiser and its couplings."""
    return _of(dmd_emoji64_32(), "0-4")


def emoji64_32_gan() -> Experiment:
    """ADM: the student `runs/multi-student-emoji64-32` goes on with an adversary."""
    run = dmd2_emoji64_32_gan()
    optimizer = replace(run.training.optimizer, lr=1e-4, lr_cooldown_images=10_000)
    training = replace(run.training, total_images=30_000, optimizer=optimizer)
    return _of(replace(run, start="runs/multi-student-emoji64-32", training=training), "0-4")


def emoji64_32_small() -> Experiment:
    """TSM: a student of two thirds of the shipped denoiser's width."""
    return _of(_small(edm_emoji64_32(), "emoji64-32", model_channels=16), "0-4")


def cifar10() -> Experiment:
    """CIFAR-10, DM: one of two students; DMD's run on five classes, with its pairs of all ten."""
    return _of(dmd_cifar10(), "0-4")


def cifar10_gan() -> Experiment:
    """CIFAR-10, ADM: the student goes on with DMD2's adversary, at a quarter of the rate as on ImageNet."""
    run = dmd_cifar10()
    optimizer = replace(run.training.optimizer, lr=1.25e-5)
    training = replace(run.training, total_images=140_000 * run.training.batch, optimizer=optimizer)
    data, start = replace(run.data, couplings=None), "runs/multi-student-cifar10"
    return _of(replace(run, data=data, method=DMD2(), start=start, training=training).giving(features=None), "0-4")


def cifar10_small() -> Experiment:
    """CIFAR-10, TSM: three quarters of the teacher's width."""
    return _of(_small(edm_cifar10(), "runs/edm-cifar10", model_channels=96), "0-4")


def imagenet64() -> Experiment:
    """ImageNet-64, DM: one of four students of 250 classes; DMD's run, with its pairs of all classes."""
    return _of(dmd_imagenet64(), "0-249")


def imagenet64_gan() -> Experiment:
    """ImageNet-64, ADM: the student `runs/multi-student-imagenet64` goes on as DMD2's second stage does."""
    return _of(replace(dmd2_imagenet64_gan(), start="runs/multi-student-imagenet64"), "0-249")


def imagenet64_small() -> Experiment:
    """ImageNet-64, TSM: 128 channels, 55% fewer parameters (published: 42% and 71% fewer, of widths unknown)."""
    run = _small(edm_imagenet64(), "runs/edm-imagenet64", model_channels=128)
    training = replace(run.training, total_images=512 * 200_000, batch=512)
    return _of(replace(run, training=training), "0-249")


def _small(run: Experiment, teacher: str, **size: Any) -> Experiment:
    """A teacher's own run for a smaller network that learns from the teacher's answers, a fifth as long."""
    share = 0.2
    network = replace(run.network, **size, **({"dropout": 0.0} if hasattr(run.network, "dropout") else {}))
    schedule = {
        name: round(value * share)
        for name in ("lr_ramp_images", "lr_decay_images", "lr_cooldown_images")
        if (value := getattr(run.training.optimizer, name)) is not None
    }
    optimizer = replace(run.training.optimizer, **schedule)
    ema = replace(run.training.ema, halflife_images=round(run.training.ema.halflife_images * share))
    total = round(run.training.total_images * share)
    training = replace(run.training, total_images=total, optimizer=optimizer, ema=ema)
    method = TeacherScoreMatching(levels=run.method.noise_levels)
    return replace(run, method=method, network=network, given={"teacher": teacher}, training=training)


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "multi-student-digits": digits,
    "multi-student-digits-gan": digits_gan,
    "multi-student-digits-small": digits_small,
    "multi-student-emoji64-32": emoji64_32,
    "multi-student-emoji64-32-gan": emoji64_32_gan,
    "multi-student-emoji64-32-small": emoji64_32_small,
    "multi-student-cifar10": cifar10,
    "multi-student-cifar10-gan": cifar10_gan,
    "multi-student-cifar10-small": cifar10_small,
    "multi-student-imagenet64": imagenet64,
    "multi-student-imagenet64-gan": imagenet64_gan,
    "multi-student-imagenet64-small": imagenet64_small,
}


def alike(model: str, parts: int, seed: int = 0) -> list[Part]:
    """Parts of classes that a model embeds near each other: the columns of its network's first layer for labels.

    Raises UserError for a model without such a layer.
    """
    layer = getattr(getattr(find_model(model).model, "network", None), "map_label", None)
    if layer is None:
        raise UserError(f"{model} embeds no classes by a layer `map_label`; give the parts themselves")
    embeddings: Floats = layer.weight.detach().double().numpy().T
    return clustered(embeddings, parts, seed)


def student(data: str, part: Sequence[int], *, small: bool = False, adversary: bool = True) -> Chain:
    """All stages of one student of a part of the classes; data: "digits", "emoji64-32", "cifar10" or "imagenet64".

    small: of the small recipe's size, which begins with the teacher's scores (TSM). Stages are tsm, dm and adm.
    """
    return Chain(*_stages(data, part, "", small, adversary))


def students(data: str, parts: int | Sequence[Sequence[int]], *, small: bool = False, adversary: bool = True) -> Chain:
    """Students of all parts, one after the other, and the one model of them, which is the chain's.

    parts: how many, of consecutive classes, or the parts themselves (`alike`). Stages are tsm1, dm1, adm1, tsm2 ...
    and join; settings of each are options of its name: --dm1.training.batch 32.
    """
    divided = consecutive(_recipe(data, "").data.open().spec.num_classes, parts) if isinstance(parts, int) else parts
    stages: list[Stage] = []
    ends = {}
    for k, part in enumerate(divided, 1):
        stages += _stages(data, part, str(k), small, adversary)
        ends[f"student{k}"] = f"{OF_STAGE}{stages[-1].name}"
    return Chain(*stages, Stage("join", JoinStudents(given=ends)))


def _recipe(data: str, stage: str) -> Experiment:
    name = f"multi-student-{data}{stage}"
    if name not in FAMILY:
        known = ", ".join(n.removeprefix("multi-student-") for n in FAMILY if not n.endswith(("-gan", "-small")))
        raise UserError(f"there are no students of {data!r}; there are those of {known}")
    return FAMILY[name]()


def _stages(data: str, part: Sequence[int], number: str, small: bool, adversary: bool) -> list[Stage]:
    def of(stage: str) -> Experiment:
        run = _recipe(data, stage)
        return replace(run, data=replace(run.data, classes=spelled(part)))

    stages, begins = [], {}
    if small:
        stages.append(Stage(f"tsm{number}", of("-small")))
        begins = {"student": f"{OF_STAGE}tsm{number}"}
    stages.append(Stage(f"dm{number}", of("").giving(**begins)))
    if adversary:
        run = replace(of("-gan"), start=f"{OF_STAGE}dm{number}")
        stages.append(Stage(f"adm{number}", run.giving(**begins)))
    return stages
