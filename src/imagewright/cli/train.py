"""`imagewright train RECIPE | FILE.py | --resume RUN`"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.console import bar, say, told_errors
from imagewright.cli.dry_run import dry_run
from imagewright.files import read_json
from imagewright.recipes import RECIPES
from imagewright.training.distributed import pick_device, processes
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.trainer import Interrupted, Progress
from imagewright.types import UserError

HELP = """imagewright train RECIPE [options]

RECIPE is one of the names below, or a Python file that defines `experiment`: an
imagewright Experiment, or a function that returns one. Every field of it can be
set: `imagewright train RECIPE --help` lists them with their defaults.

recipes:
{recipes}

examples:
  imagewright train edm-digits --out runs/edm-digits
  imagewright train edm-digits --training.batch 64 --training.optimizer.lr 1e-3
  imagewright train cd-digits --teacher runs/edm-digits
  imagewright train edm-emoji64-32 --dry-run           # print the resolved run and stop
  imagewright train --resume runs/edm-digits           # go on after Ctrl-C or a crash
  torchrun --nproc-per-node 8 -m imagewright train edm-cifar10 --data.source cifar10.zip
"""


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


def main(args: Sequence[str]) -> None:
    """Parse and train."""
    args = list(args)
    if not args or args[0] in ("-h", "--help"):
        say(help_text())
        return
    if args[0] == "--resume":
        args = _recorded_command(args[1:])
    name, run = args[0], parse(args)
    folder = run.out or Path("runs") / Path(name).stem
    with processes() as group, told_errors():
        if run.dry_run:
            dry_run(run.experiment)
            return
        device = pick_device(run.device)
        total = run.experiment.training.total_images
        with bar(f"{name} on {device}", total) as advance_to:

            def show(progress: Progress) -> None:
                if group.is_first:
                    advance_to(progress.images, f"loss {progress.loss:.4f}  {progress.rate:.0f} images/s")

            try:
                run_experiment(
                    run.experiment,
                    folder,
                    device=device,
                    resume=run.resume,
                    command=args,
                    processes=group,
                    on_progress=show,
                )
            except Interrupted as stopped:
                say(f"stopped; the state is in {stopped.checkpoint}\ngo on with: imagewright train --resume {folder}")
                raise SystemExit(130) from None
        if group.is_first:
            say(f"done: {folder}  (imagewright sample {folder}; imagewright evaluate {folder})")


def parse(args: Sequence[str]) -> Run:
    """A recipe's name or file, and options, as a run."""
    name, default = args[0], Run(experiment=find_experiment(args[0]))
    return tyro.cli(
        Run, default=default, args=args[1:], prog=f"imagewright train {name}", config=(tyro.conf.AvoidSubcommands,)
    )


def experiment_of(folder: Path) -> Experiment:
    """The experiment that a run folder was started with. Raises UserError when it was not by the command line."""
    return parse(_recorded_command([str(folder)])).experiment


def help_text() -> str:
    """The command's help."""
    lines = []
    for name, function in RECIPES.items():
        lines.append(f"  {name:<16} {(function.__doc__ or '').splitlines()[0]}")
    return HELP.format(recipes="\n".join(lines))


def find_experiment(name: str) -> Experiment:
    """A recipe by name, or the `experiment` of a Python file (which is run: it is the user's own)."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".py"):
        return _experiment_of_file(Path(name))
    near = difflib.get_close_matches(name, RECIPES, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}"
    raise UserError(f"there is no recipe {name!r}; {hint}")


def _experiment_of_file(path: Path) -> Experiment:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = getattr(module, "experiment", None)
    experiment = experiment() if callable(experiment) else experiment
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} must define `experiment`: an imagewright Experiment, or a function returning one")
    return experiment


def _recorded_command(args: list[str]) -> list[str]:
    """The arguments with which a run folder was started, pointed at that folder with --resume."""
    if not args:
        raise UserError("--resume needs the folder of a run: imagewright train --resume runs/NAME")
    record = read_json(Path(args[0]) / "experiment.json")
    if not record.get("command"):
        raise UserError(f"{args[0]} was not started from the command line; resume it with its recipe and --out")
    command = [a for a in record["command"] if a != "--resume"]
    return [*command, *args[1:], "--out", args[0], "--resume"]


def recipe_fields() -> list[str]:
    """Names of the experiment's own fields (for shell completion)."""
    return [f.name for f in dataclasses.fields(Experiment)]
