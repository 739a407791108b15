"""`imagewright train` for methods in stages: a file or recipe that gives a chain, or the folder of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from imagewright.cli.command import plainly
from imagewright.cli.console import say
from imagewright.cli.train_options import NONE, with_options, without_options
from imagewright.training.chain import Chain, Stage, read_chain
from imagewright.training.experiment import Experiment
from imagewright.training.record import experiment_from_json, merged
from imagewright.types import UserError


@dataclass(frozen=True, kw_only=True)
class ChainRun:
    """Train in stages. Each stage's options begin with its name: --student.training.batch 64."""

    out: Path | None = None
    """Folder of the chain; default runs/NAME."""
    resume: bool = False
    """Go on where the chain stopped."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dry_run: bool = False
    """Print each stage's resolved run, sizes and costs, and stop."""


def parse_chain(args: Sequence[str], chain: Chain, default: ChainRun) -> tuple[Chain, ChainRun]:
    """The chain and the run with what the options change; the name of the chain stands first."""
    options: list[tuple[str, Any, Any]] = []
    for stage in chain.stages:
        shown = with_options(stage.work) if isinstance(stage.work, Experiment) else stage.work
        options.append((stage.name, Annotated[type(shown), tyro.conf.arg(name=stage.name)], field(default=shown)))
    told = make_dataclass("ChainOptions", options, bases=(ChainRun,), frozen=True, kw_only=True)
    told.__doc__ = ChainRun.__doc__
    values = {name: getattr(default, name) for name in ("out", "resume", "device", "dry_run")}
    with plainly(args):
        parsed: Any = tyro.cli(
            told,
            default=told(**values),
            args=list(args[1:]),
            prog=f"imagewright train {args[0]}",
            config=(tyro.conf.AvoidSubcommands,),
            registry=NONE,
        )
    changed = (_changed(stage, getattr(parsed, stage.name)) for stage in chain.stages)
    return Chain(*changed), ChainRun(**{name: getattr(parsed, name) for name in values})


def _changed(stage: Stage, work: Any) -> Stage:
    return Stage(stage.name, without_options(work) if isinstance(stage.work, Experiment) else work)


def resumed_chain(args: Sequence[str]) -> tuple[str, Chain, ChainRun, list[str] | None]:
    """Name, chain, run and command of the chain in a folder. No file that its record names is run."""
    folder = Path(args[0])
    record = read_chain(folder)
    stages = (Stage(s["name"], experiment_from_json(s["work"], folder / "chain.json")) for s in record["stages"])
    command = record.get("command")
    name = command[0] if command else folder.name
    chain, run = parse_chain([name, *args[1:]], Chain(*stages), ChainRun(out=folder, resume=True))
    return name, chain, run, merged(command, args[1:]) if command else None


def run_chain(
    chain: Chain,
    run: ChainRun,
    folder: Path,
    command: list[str] | None,
    train: Callable[[str, Experiment, Path, bool], None],
    device: Any,
) -> None:
    """Do what is left of a chain, saying at which stage it is."""
    count = len(chain.stages)

    def stage_of(stage: Stage, experiment: Experiment, at: Path, resume: bool) -> None:
        number = list(chain.stages).index(stage) + 1
        say(f"stage {number} of {count}: {stage.name}")
        try:
            train(stage.name, experiment, at, resume)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None

    chain.run(folder, stage_of, device, resume=run.resume, command=command)
    say(f"done: {folder}  (imagewright sample {folder}; imagewright report {folder})")
