"""`imagewright train RECIPE | FILE.py | --resume RUN`"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import tyro

from imagewright.cli.composing import COMPOSED, Run, usual_folder
from imagewright.cli.console import bar, printable, say, told_errors
from imagewright.cli.dry_run import dry_run
from imagewright.recipes import RECIPES
from imagewright.training.distributed import pick_device, processes
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.record import experiment_from_json, merged, read_record
from imagewright.training.shortening import as_begun, rate_fault, shortened
from imagewright.training.trainer import Interrupted, Progress
from imagewright.types import UserError

HELP = """imagewright train RECIPE [options]

RECIPE is one of the names below, or a Python file that defines `experiment`: an
imagewright Experiment, or a function that returns one. Every field of it can be
set: `imagewright train RECIPE --help` lists them with their defaults.

made to measure:
{composed}

recipes:
{recipes}

examples:
  imagewright train auto --data.source photos-64.zip   # any images: `imagewright data convert`
  imagewright train edm-digits --out runs/edm-digits
  imagewright train edm-digits --training.batch 64 --training.optimizer.lr 1e-3
  imagewright train cd-digits --teacher runs/edm-digits
  imagewright train edm-emoji64-32 --dry-run           # print the resolved run and stop
  imagewright train --resume runs/edm-digits           # go on after Ctrl-C or a crash
  torchrun --nproc-per-node 8 -m imagewright train edm-cifar10 --data.source cifar10.zip
"""


def main(args: Sequence[str]) -> None:
    """Parse and train."""
    args = list(args)
    if not args or args[0] in ("-h", "--help"):
        say(help_text())
        return
    if args[0] == "--resume":
        name, run, command = _resumed(args[1:])
    else:
        name, command = args[0], args
        with told_errors():
            default = _default(args)
        run = _in_proportion(parse(args, default), default.experiment, args)
    folder = run.out or _usual_folder(name)
    if run.dry_run:
        with told_errors():
            dry_run(run.experiment)
        return
    with processes() as group, told_errors():
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
                    command=_recorded(command),
                    processes=group,
                    on_progress=show,
                )
            except Interrupted as stopped:
                _say_stopped(stopped, folder)
                raise SystemExit(128 + stopped.number) from None
        if group.is_first:
            say(f"done: {folder}  (imagewright sample {folder}; imagewright evaluate {folder})")


def _default(args: Sequence[str]) -> Run:
    """What the options change: the recipe's run, or one made to measure, which stays what it was where it goes on."""
    if args[0] not in COMPOSED:
        return Run(experiment=find_experiment(args[0]))
    kind, compose, _ = COMPOSED[args[0]]
    if "--help" in args or "-h" in args:
        return kind(experiment=RECIPES["edm-digits" if args[0] == "auto" else "cd-digits"]())
    folder = usual_folder(args)
    if "--resume" in args and (folder / "experiment.json").exists():
        return kind(experiment=experiment_of(folder), out=folder)
    return compose(args, parse)


def _in_proportion(run: Run, recipe: Experiment, args: Sequence[str]) -> Run:
    """The run with its recipe's schedule in proportion, which is said; one that goes on has the one it began with."""
    given = [word.removeprefix("--").split("=")[0].replace("-", "_") for word in args if word.startswith("--")]
    path = (run.out or _usual_folder(args[0])) / "experiment.json"
    if run.resume and path.exists():
        return replace(run, experiment=as_begun(run.experiment, read_record(path.parent)["experiment"], given))
    experiment, changes = shortened(recipe, run.experiment, given)
    if changes:
        share = f"{run.experiment.training.total_images:,} of the recipe's {recipe.training.total_images:,} images"
        say(f"in proportion to {share}: {'; '.join(changes)}")
    if fault := rate_fault(experiment.training):
        say(f"note: {fault}")
    return replace(run, experiment=experiment)


def _say_stopped(stopped: Interrupted, folder: Path) -> None:
    with suppress(OSError):  # the terminal may be what was lost
        say(f"stopped; the state is in {stopped.checkpoint}\ngo on with: imagewright train --resume {folder}")


def _usual_folder(name: str) -> Path:
    return Path("runs") / Path(name).stem


def parse(args: Sequence[str], default: Run) -> Run:
    """Options of a recipe, whose name or file stands first, as a run. default: what they change."""
    return tyro.cli(
        type(default),
        default=default,
        args=args[1:],
        prog=f"imagewright train {args[0]}",
        config=(tyro.conf.AvoidSubcommands,),
        registry=NONE,
    )


NONE = tyro.constructors.ConstructorRegistry()
"""An option of a recipe is left empty by the word none; of other commands, by leaving it out."""


@NONE.primitive_rule
def _none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[None] | None:
    if info.type is not type(None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="none",
        choices=("none", "None"),
        instance_from_str=lambda args: None,
        is_instance=lambda x: x is None,
        str_from_instance=lambda instance: ["none"],
    )


def experiment_of(folder: Path) -> Experiment:
    """The experiment of a run folder, from its record alone. Raises UserError where this version cannot rebuild it."""
    path = folder / "experiment.json"
    experiment = experiment_from_json(read_record(folder)["experiment"], path)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} is no record of a run")
    return experiment


def _resumed(args: list[str]) -> tuple[str, Run, list[str] | None]:
    """Name, run and command of the run in a folder, with what the options change. No file it names is run."""
    if not args:
        raise UserError("--resume needs the folder of a run: imagewright train --resume runs/NAME")
    folder = Path(args[0])
    recorded = read_record(folder).get("command")
    try:
        experiment = experiment_of(folder)
    except UserError as error:
        file = recorded[0] if recorded else ""
        own = f"; it was started by {file}, go on with: imagewright train {file} --out {folder} --resume"
        raise UserError(f"{error}{own if file.endswith('.py') else ''}") from None
    name = printable(recorded[0] if recorded else folder.name)
    run = parse([name, *args[1:]], Run(experiment=experiment, out=folder, resume=True))
    return name, run, merged(recorded, args[1:]) if recorded else None


def _recorded(command: list[str] | None) -> list[str] | None:
    """The command without what only says where and how to start, and with the path of the user's file in full."""
    if command is None:
        return None
    name, *options = merged(command, [])
    return [os.path.abspath(name) if name.endswith(".py") else name, *options]


def help_text() -> str:
    """The command's help."""
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {(function.__doc__ or '').splitlines()[0]}" for name, function in RECIPES.items()]
    composed = [f"  {name:<{width}}  {what}" for name, (_, _, what) in COMPOSED.items()]
    return HELP.format(recipes="\n".join(lines), composed="\n".join(composed))


def find_experiment(name: str) -> Experiment:
    """A recipe by name, or the `experiment` of a Python file (which is run: it is the user's own)."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".py"):
        return _experiment_of_file(Path(name))
    known = (*COMPOSED, *RECIPES)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"there is no recipe {name!r}; {hint}")


def _experiment_of_file(path: Path) -> Experiment:
    """Run the user's file as a module of its own name, with its folder to import from, as Python itself would."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    name = path.stem if path.stem not in sys.modules else f"{path.stem} (a run of yours)"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, for annotations that are texts
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    experiment = getattr(module, "experiment", None)
    experiment = experiment() if callable(experiment) else experiment
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} must define `experiment`: an imagewright Experiment, or a function returning one")
    return experiment
