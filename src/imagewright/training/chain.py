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

import inspect
import json
import keyword
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

from imagewright.files import read_formatted, try_output, write_json
from imagewright.pretrained import CHAIN
from imagewright.shapes import brief
from imagewright.training.distributed import Processes
from imagewright.training.experiment import Experiment
from imagewright.training.locking import sole_trainer
from imagewright.training.record import claim, get_field, located, places, set_field, to_json, with_defaults
from imagewright.types import UserError

FORMAT = "imagewright-chain/1"
OF_STAGE = "stage:"


class Work(Protocol):
    """What a stage does that is no training: a frozen dataclass of settings, which a record can hold.

    It goes on where it stopped when it is called again with the same folder. Of several processes the first does it.
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
    """Stages in order.

    Raises UserError where names are no identifiers or occur twice, a stage is no work, or names a later one.
    """

    def __init__(self, *stages: Stage) -> None:
        names = [stage.name for stage in stages]
        for i, stage in enumerate(stages):
            if not _is_name(stage.name) or names.count(stage.name) > 1:
                raise UserError(f"stage {stage.name!r}: names of stages must be Python identifiers, each once")
            if not isinstance(stage.work, Experiment) and not _is_work(stage.work):
                raise UserError(
                    f"stage {stage.name} is {type(stage.work).__name__}; it must be an Experiment, or a dataclass "
                    "with __call__(folder, stages, device)"
                )
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
        train: Callable[[str, Experiment, Path], None],
        device: Any,
        *,
        resume: bool = False,
        command: Sequence[str] | None = None,
        processes: Processes | None = None,
        on_stage: Callable[[int, str], None] = lambda number, name: None,
    ) -> None:
        """Do every stage in order.

        train: trains the run of a stage, by its name, in a folder, resuming it where the chain is resumed.
        on_stage: called before each stage with its number, from 1, and its name.
        Raises UserError where there is a chain at `out` and it is not resumed, is another one, or is in use.
        """
        processes = processes or Processes()
        try_output(out)
        with sole_trainer(out, processes):
            folders = self.folders(out)
            self._claim(out, folders, resume)
            processes.wait()  # or a slow process would find the record of this very chain
            if processes.is_first:
                write_json(out / CHAIN, self.record(command))
            for number, stage in enumerate(self.stages, 1):
                on_stage(number, stage.name)
                folder = folders[stage.name]
                try:
                    if isinstance(stage.work, Experiment):
                        train(stage.name, placed(stage.work, folders), folder)
                    elif processes.is_first:
                        stage.work(folder, folders, device)
                except UserError as error:
                    raise UserError(f"stage {stage.name}: {error}") from None
                processes.wait()  # for what the first process has yet to write

    def _claim(self, out: Path, folders: Mapping[str, Path], resume: bool) -> None:
        """Refuse what is another run or chain, or another one in a stage that was begun, before anything is written."""
        if (out / "experiment.json").exists():
            raise UserError(f"{out} already holds a run, which is no chain; choose another --out")
        known: dict[str, Any] = {}
        if (out / CHAIN).exists():
            if not resume:
                raise UserError(f"{out} already holds a chain; add --resume to go on with it, or choose another --out")
            known = {each["name"]: each["work"] for each in read_chain(out)["stages"]}
            if list(known) != list(folders):
                raise UserError(f"{out} holds a chain of other stages; resume it with its own")
        for stage in self.stages:
            folder, work = folders[stage.name], stage.work
            if isinstance(work, Experiment):
                claim(folder, located(placed(work, folders), folder).in_images(), resume)
            elif folder.exists() and json.loads(json.dumps(to_json(work))) != with_defaults(known.get(stage.name)):
                raise UserError(f"{folder} was made with other settings; resume the chain with its own")

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
    record: ChainRecord = read_formatted(folder / CHAIN, FORMAT, ChainRecord)
    for stage in record["stages"]:
        if not _is_name(stage["name"]):
            raise UserError(f"{folder / CHAIN} is damaged: no stage can be called {brief(stage['name'])}")
    return record


def stage_folders(folder: Path) -> list[Path]:
    """The folders of a chain's stages that have been begun, in order; [] where there is no chain."""
    if not (folder / CHAIN).exists():
        return []
    found = (folder / f"{i}-{stage['name']}" for i, stage in enumerate(read_chain(folder)["stages"], 1))
    return [path for path in found if path.is_dir()]


def _is_name(name: str) -> bool:
    """Whether a stage may be called so: its options and its folder are."""
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_work(value: Any) -> bool:
    whole = is_dataclass(value) and not isinstance(value, type) and callable(value)
    return whole and list(inspect.signature(value).parameters) == list(inspect.signature(Work.__call__).parameters)[1:]


def placed_name(name: str, folders: Mapping[str, Path]) -> str:
    """Where a thing lies: the folder of a stage that is named, else the name."""
    return str(folders[name.removeprefix(OF_STAGE)]) if name.startswith(OF_STAGE) else name


def placed(experiment: Experiment, folders: Mapping[str, Path]) -> Experiment:
    """The experiment with the folders of earlier stages in place of their names."""
    for path in places(experiment).values():
        value = get_field(experiment, path)
        if isinstance(value, str) and value.startswith(OF_STAGE):
            experiment = set_field(experiment, path, placed_name(value, folders))
    return experiment


def _named(work: Any) -> list[str]:
    """The stages that a run or other work names."""
    values: Iterable[Any] = (get_field(work, path) for path in places(work).values())
    if not isinstance(work, Experiment):
        values = vars(work).values()
    return [v.removeprefix(OF_STAGE) for v in values if isinstance(v, str) and v.startswith(OF_STAGE)]
