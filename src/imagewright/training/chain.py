"""Methods in stages: runs that follow each other, each given what those before it made.

    chain = Chain(
        Stage("teacher", RECIPES["edm-digits"]()),
        Stage("student", RECIPES["cd-digits"]().giving(teacher="stage:teacher")),
    )

Every stage is a run of its own, in a folder of its own below the chain's: `1-teacher`, `2-student`. Where a run names
what it is given, "stage:NAME" is the folder of an earlier stage. A stage may be other work than a run (`Work`): pairs
that a teacher draws, pictures for a round of self-play. A chain is resumed where it stopped: finished stages find that
they have nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from imagewright.files import read_formatted, write_json
from imagewright.training.experiment import Experiment
from imagewright.training.record import get_field, places, set_field, to_json
from imagewright.types import UserError

FORMAT = "imagewright-chain/1"
FILE = "chain.json"
OF_STAGE = "stage:"


@runtime_checkable
class Work(Protocol):
    """What a stage does that is no training: a frozen dataclass of settings, which a record can hold.

    It goes on where it stopped when it is called again with the same folder.
    """

    def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
        """Do it, in a folder. stages: the folders of the earlier stages, by name."""
        ...


@dataclass(frozen=True)
class Stage:
    """A part of a chain. name: a Python identifier, as it is also the name of the stage's options."""

    name: str
    work: Experiment | Work


class Chain:
    """Stages in order. Raises UserError where names are no identifiers or occur twice, or a stage names a later one."""

    def __init__(self, *stages: Stage) -> None:
        names = [stage.name for stage in stages]
        for i, stage in enumerate(stages):
            if not stage.name.isidentifier() or names.count(stage.name) > 1:
                raise UserError(f"stage {stage.name!r}: names of stages must be Python identifiers, each once")
            for named in _named(stage.work):
                if named not in names[:i]:
                    raise UserError(f"stage {stage.name} names {OF_STAGE}{named}, which is no stage before it")
        if not stages:
            raise UserError("a chain needs at least one stage")
        self.stages: Sequence[Stage] = stages

    def folders(self, out: Path) -> dict[str, Path]:
        """Where each stage's folder is, by name."""
        return {stage.name: out / f"{i}-{stage.name}" for i, stage in enumerate(self.stages, 1)}

    def run(
        self,
        out: Path,
        train: Callable[[Stage, Experiment, Path, bool], None],
        device: Any,
        *,
        resume: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        """Do every stage in order. train: trains a stage's run in a folder, resuming it where it says so.

        Raises UserError where there is a chain at `out` and it is not resumed, or it is another one.
        """
        record = self.record(command)
        if (out / FILE).exists():
            if not resume:
                raise UserError(f"{out} already holds a chain; add --resume to go on with it, or choose another --out")
            if [each["name"] for each in read_chain(out)["stages"]] != [stage.name for stage in self.stages]:
                raise UserError(f"{out} holds a chain of other stages; resume it with its own")
        else:
            write_json(out / FILE, record)
        folders = self.folders(out)
        for stage in self.stages:
            folder = folders[stage.name]
            if isinstance(stage.work, Experiment):
                train(stage, placed(stage.work, folders), folder, (folder / "experiment.json").exists())
            else:
                stage.work(folder, folders, device)

    def record(self, command: Sequence[str] | None) -> dict[str, Any]:
        """What chain.json holds."""
        stages = [{"name": stage.name, "work": to_json(stage.work)} for stage in self.stages]
        return {"format": FORMAT, "command": None if command is None else list(command), "stages": stages}


class _StageRecord(TypedDict):
    name: str
    work: dict[str, Any]


class ChainRecord(TypedDict):
    """What chain.json holds, as far as it is read."""

    format: str
    command: NotRequired[list[str] | None]
    stages: list[_StageRecord]


def read_chain(folder: Path) -> ChainRecord:
    """The record of a chain. Raises UserError when it is missing or damaged."""
    record: ChainRecord = read_formatted(folder / FILE, FORMAT, ChainRecord)
    return record


def stage_folders(folder: Path) -> list[Path]:
    """The folders of a chain's stages that have been begun, in order; [] where there is no chain."""
    if not (folder / FILE).exists():
        return []
    found = (folder / f"{i}-{stage['name']}" for i, stage in enumerate(read_chain(folder)["stages"], 1))
    return [path for path in found if path.is_dir()]


def placed(experiment: Experiment, folders: Mapping[str, Path]) -> Experiment:
    """The experiment with the folders of earlier stages in place of their names."""
    for path in places(experiment).values():
        value = get_field(experiment, path)
        if isinstance(value, str) and value.startswith(OF_STAGE):
            experiment = set_field(experiment, path, str(folders[value.removeprefix(OF_STAGE)]))
    return experiment


def _named(work: Any) -> list[str]:
    values = (get_field(work, path) for path in places(work).values())
    return [v.removeprefix(OF_STAGE) for v in values if isinstance(v, str) and v.startswith(OF_STAGE)]
