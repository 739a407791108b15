"""`imagewright train` for methods in stages: a file or recipe that gives a chain, or the folder of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from imagewright.cli.command import plainly
from imagewright.cli.console import printable, say
from imagewright.cli.train_options import NONE, with_options, without_options
from imagewright.pretrained import CHAIN
from imagewright.training.chain import Chain, Stage, read_chain
from imagewright.training.distributed import Processes
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
    values = {each.name: getattr(default, each.name) for each in fields(ChainRun)}
    options: list[tuple[str, Any, Any]] = []
    for stage in chain.stages:
        if stage.name in values:
            raise UserError(f"stage {stage.name}: the chain itself has an option of that name; call it otherwise")
        shown = with_options(stage.work) if isinstance(stage.work, Experiment) else stage.work
        options.append((stage.name, Annotated[type(shown), tyro.conf.arg(name=stage.name)], field(default=shown)))
    told = make_dataclass("ChainOptions", options, bases=(ChainRun,), frozen=True, kw_only=True)
    told.__doc__ = ChainRun.__doc__
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
    command = record.get("command")
    try:
        works = [experiment_from_json(stage["work"], folder / CHAIN) for stage in record["stages"]]
    except UserError as error:
        raise UserError(f"{error}{own_file(command, folder)}") from None
    recorded = Chain(*(Stage(s["name"], work) for s, work in zip(record["stages"], works, strict=True)))
    name = printable(command[0] if command else folder.name)
    chain, run = parse_chain([name, *args[1:]], recorded, ChainRun(out=folder, resume=True))
    return name, chain, run, merged(command, args[1:]) if command else None


def own_file(command: Sequence[str] | None, folder: Path) -> str:
    """How to go on with what was started by the user's own file, to be said where its record does not tell all."""
    file = command[0] if command else ""
    go_on = f"; it was started by {file}, go on with: imagewright train {file} --out {folder} --resume"
    return go_on if file.endswith(".py") else ""


def run_chain(
    chain: Chain,
    run: ChainRun,
    folder: Path,
    command: list[str] | None,
    train: Callable[[str, Experiment, Path], None],
    device: Any,
    processes: Processes,
) -> None:
    """Do what is left of a chain, saying at which stage it is."""

    def show(number: int, name: str) -> None:
        if processes.is_first:
            say(f"stage {number} of {len(chain.stages)}: {name}")

    chain.run(folder, train, device, resume=run.resume, command=command, processes=processes, on_stage=show)
    if processes.is_first:
        say(f"done: {folder}  (imagewright sample {folder}; imagewright report {folder})")
