"""`imagewright train auto` and `imagewright distill`: runs made to measure, from the data, the machine, the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from imagewright.checks import require_positive
from imagewright.cli.console import bar, duration, say
from imagewright.data.config import DataConfig
from imagewright.errors import an
from imagewright.models.kinds import words
from imagewright.pretrained import find_model, folder_of
from imagewright.recipes import RECIPES
from imagewright.recipes.composed import HOURS, USUAL_HOURS, auto, distill, lasting
from imagewright.training.distributed import Processes, pick_device
from imagewright.training.experiment import Experiment
from imagewright.training.pace import images_per_second
from imagewright.training.record import EMBEDDED, experiment_from_json, located, read_record
from imagewright.types import UserError, kind_of


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder of the run; default runs/RECIPE."""
    resume: bool = False
    """Go on from the folder's newest checkpoint (from the start if there is none)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dry_run: bool = False
    """Print the resolved run, its networks' sizes and costs, and stop; neither data nor teacher need be there."""


@dataclass(frozen=True, kw_only=True)
class AutoRun(Run):
    """Train a denoiser of any set of images; network, batch, schedule and length are chosen for it."""

    hours: float | None = None
    """The longest that it may take, by a measurement of its first steps; default 1 on a CPU, 4 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class DistillRun(Run):
    """Distil a denoiser into a generator in one step; all that is not said comes from the teacher's run."""

    by: Literal["consistency", "dmd2"] = "consistency"
    """Consistency distillation, or distribution matching (DMD2 without an adversary)."""


Parse = Callable[[Sequence[str], Run], Run]
"""Options of a run, its name first, over a run that they change."""


def compose_auto(args: Sequence[str], parse: Parse, group: Processes) -> Run:
    """The run that `train auto OPTIONS` asks for, before its options change it; says what was chosen and why."""
    placeholder = RECIPES["edm-digits"]()
    asked = parse(args, AutoRun(experiment=replace(placeholder, data=DataConfig(source=""))))
    assert isinstance(asked, AutoRun)
    data = asked.experiment.data
    if not data.source:
        raise UserError(
            "train auto needs --data.source: a folder or zip of images (`imagewright data convert` makes one)"
        )
    device = pick_device(asked.device)
    with bar(f"opening {data.source}", 1, "files") as advance_to:
        images = data.open(lambda done, total: advance_to(done, total=total))
    run = auto(data, images.spec, len(images), device.type)
    pace = images_per_second(run, images, device, processes=group)
    hours = HOURS.get(device.type, USUAL_HOURS) if asked.hours is None else asked.hours
    require_positive("--hours", hours)
    run = lasting(run, hours, pace)
    spec, training = images.spec, run.training
    say(
        f"{len(images)} images of {spec.resolution}x{spec.resolution}x{spec.channels}, {spec.num_classes or 'no'} "
        f"classes, on {device}: SongUNet of {run.network.model_channels} channels x {run.network.channel_mult}, "
        f"{'augmented, ' if run.method.augment_dim else ''}batch {training.batch}, {training.precision}\n"
        f"{training.total_images:,} images ({training.total_images / len(images):,.0f} times each) at {pace:.0f} a "
        f"second: {duration(training.total_images / pace)} (--hours {hours:g} is the limit; snapshots at every fifth)"
    )
    return AutoRun(experiment=run, hours=asked.hours, out=usual_folder(args))


def compose_distill(args: Sequence[str], parse: Parse, group: Processes) -> Run:
    """The run that `train distill --teacher RUN OPTIONS` asks for, before its options change it."""
    teacher, by = _option(args, "teacher"), _option(args, "by") or "consistency"
    if teacher is None:
        raise UserError("distill needs a teacher: imagewright distill RUN")
    file = find_model(teacher)
    if kind_of(file.model) != "denoiser":
        raise UserError(f"{teacher} is {an(words(kind_of(file.model)))}; what is distilled is a denoiser")
    run = _teachers_run(teacher, file.spec.name, file.spec.resolution)
    if by not in ("consistency", "dmd2"):
        raise UserError(f"--by is {by!r}; allowed: consistency, dmd2")
    student = distill(teacher, run, by)
    training = student.training
    say(f"teacher {teacher}: {run.data.source}, batch {training.batch}; by {by}, {training.total_images:,} images")
    return DistillRun(experiment=student, by=by, out=usual_folder(args))  # type: ignore[arg-type]  # one of the two


def _teachers_run(teacher: str, name: str, resolution: int) -> Experiment:
    """The run that made a teacher; of a shipped model, or one without a record, what its images tell."""
    folder = folder_of(teacher)
    if (folder / "experiment.json").exists():
        run = experiment_of(folder)
        return replace(run, data=located(run, folder).data)
    if name not in EMBEDDED:
        raise UserError(f"{teacher} has no experiment.json that says which images it was trained on; use `train`")
    return replace(RECIPES["edm-emoji64-32"](), data=DataConfig(source=name, resolution=resolution))


def experiment_of(folder: Path) -> Experiment:
    """The experiment of a run folder, from its record alone. Raises UserError where this version cannot rebuild it."""
    path = folder / "experiment.json"
    experiment = experiment_from_json(read_record(folder)["experiment"], path)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} is no record of a run")
    return experiment


def _option(args: Sequence[str], name: str) -> str | None:
    """The value of an option among words that are not parsed yet: --name VALUE or --name=VALUE."""
    for i, word in enumerate(args):
        if word == f"--{name}" and i + 1 < len(args):
            return args[i + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def usual_folder(args: Sequence[str]) -> Path:
    """Where a composed run goes: --out, else a folder named after its images or its teacher."""
    of = Path(_option(args, "data.source" if args[0] == "auto" else "teacher") or "").resolve().stem
    return Path(_option(args, "out") or f"runs/{args[0]}-{of}")


COMPOSED: Mapping[str, tuple[type[Run], Callable[[Sequence[str], Parse, Processes], Run], str]] = {
    "auto": (AutoRun, compose_auto, "A denoiser of any images (--data.source), sized to them and to this machine."),
    "distill": (DistillRun, compose_distill, "A one-step student of a denoiser's run (--teacher), on its own images."),
}
"""Names that `imagewright train` takes besides those of recipes: options, what makes the run, and what it is."""
