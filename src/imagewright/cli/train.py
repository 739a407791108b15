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
from typing import Any

import torch
import tyro

from imagewright.cli.command import plainly
from imagewright.cli.composing import COMPOSED, Run, experiment_of, usual_folder
from imagewright.cli.console import bar, pace, printable, say, told_errors
from imagewright.cli.dry_run import dry_run, parameters
from imagewright.cli.train_chain import ChainRun, own_file, parse_chain, resumed_chain, run_chain
from imagewright.cli.train_options import NONE, with_options, without_options
from imagewright.models.files import read_model_record
from imagewright.models.kinds import KINDS
from imagewright.pretrained import CHAIN, folder_of
from imagewright.recipes import FAMILIES, RECIPES
from imagewright.training.chain import Chain, Stage
from imagewright.training.distributed import Processes, pick_device, processes, restarted
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.given import SPACE, options
from imagewright.training.record import experiment_from_json, merged, option_name, read_record
from imagewright.training.schedule import as_begun, rate_fault, shortened
from imagewright.training.trainer import Interrupted, Progress
from imagewright.types import UserError

HELP = """imagewright train RECIPE [options]

RECIPE is one of the names below, or a Python file that defines `experiment`: an
imagewright Experiment, a Chain of them, or a function that returns one. Every
field of it can be set: `imagewright train RECIPE --help` lists them with their
defaults; `imagewright train edm` lists all that begin so, with their sizes.

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
    with processes() as group, told_errors():
        _main(list(args), group)


def _main(args: list[str], group: Processes) -> None:
    if not args or args[0] in ("-h", "--help"):
        say(help_text())
        return
    if args[0] == "--resume" and len(args) > 1 and (Path(args[1]) / CHAIN).exists():
        name, chain, chained, command = resumed_chain(args[1:])
        _train_chain(name, chain, chain, chained, args, command, group)
        return
    if args[0] == "--resume":
        name, run, command = _resumed(args[1:])
    else:
        name, command = args[0], args
        recipe = None if args[0] in COMPOSED else find_training(args[0])
        if isinstance(recipe, Chain):
            _train_chain(name, recipe, *parse_chain(args, recipe, ChainRun()), args, command, group)
            return
        default = _composed(args, group) if recipe is None else Run(experiment=recipe)
        run = parse(args, default)
        run = replace(run, resume=run.resume or restarted())
        begun = (run.out or _usual_folder(name)) if run.resume else None
        run = replace(run, experiment=_in_proportion(run.experiment, default.experiment, _named(args), begun))
    folder = run.out or _usual_folder(name)
    if run.dry_run:
        dry_run(run.experiment)
        return
    _train(name, run.experiment, folder, pick_device(run.device), group, run.resume, _recorded(command))
    if group.is_first:
        does = KINDS[read_model_record(folder)["kind"]].does
        hints = [f"imagewright {c} {folder}" for c in ("sample", "evaluate", "report") if c in does]
        say(f"done: {folder}  ({'; '.join(hints[:2])})")


def _composed(args: Sequence[str], group: Processes) -> Run:
    """A run made to measure, which stays what it was where it goes on."""
    kind, compose, _ = COMPOSED[args[0]]
    if "--help" in args or "-h" in args:
        return kind(experiment=RECIPES["edm-digits" if args[0] == "auto" else "cd-digits"]())
    folder = usual_folder(args)
    if ("--resume" in args or restarted()) and (folder / "experiment.json").exists():
        return kind(experiment=experiment_of(folder), out=folder)
    return compose(args, parse, group)


def _train_chain(
    name: str,
    recipe: Chain,
    chain: Chain,
    run: ChainRun,
    args: Sequence[str],
    command: list[str] | None,
    group: Processes,
) -> None:
    """Train the chain that options made of a recipe."""
    folder, run = run.out or _usual_folder(name), replace(run, resume=run.resume or restarted())
    chain = _stages_in_proportion(chain, recipe, folder, run.resume, args)
    if run.dry_run:
        for stage in chain.stages:
            say(f"stage {stage.name}:")
            if isinstance(stage.work, Experiment):
                dry_run(stage.work, {s.name: s.work for s in chain.stages})
        return
    device = pick_device(run.device)

    def train(stage: str, experiment: Experiment, at: Path) -> None:
        _train(f"{name} {stage}", experiment, at, device, group, run.resume, None, whole=folder)

    run_chain(chain, run, folder, _recorded(command), train, device, group)


def _train(
    name: str,
    experiment: Experiment,
    folder: Path,
    device: torch.device,
    group: Processes,
    resume: bool,
    command: list[str] | None,
    whole: Path | None = None,
) -> None:
    """Train one run with a bar; whole: the folder of the chain to which it belongs."""
    with bar(f"{name} on {device}", experiment.training.total_images) as advance_to:

        def show(progress: Progress) -> None:
            if group.is_first:
                advance_to(progress.images, pace(progress.loss, progress.rate))

        try:
            run_experiment(
                experiment,
                folder,
                device=device,
                resume=resume,
                command=command,
                processes=group,
                on_progress=show,
            )
        except Interrupted as stopped:
            _say_stopped(stopped, whole or folder)
            raise SystemExit(128 + stopped.number) from None


def _in_proportion(
    run: Experiment, recipe: Experiment, given: Sequence[str], begun: Path | None, stage: str = ""
) -> Experiment:
    """The run with its recipe's schedule in proportion, which is said; one that goes on has the one it began with.

    given: options of the command, as `option_name` has them. begun: the folder of the run that goes on.
    """
    run = _as_the_teachers(run, given)
    if begun is not None and (begun / "experiment.json").exists():
        return as_begun(run, read_record(begun)["experiment"], given)
    experiment, changes = shortened(recipe, run, given)
    if changes:
        share = f"{run.training.total_images:,} of the recipe's {recipe.training.total_images:,} images"
        say(f"{stage}in proportion to {share}: {'; '.join(changes)}")
    if fault := rate_fault(experiment.training):
        say(f"{stage}note: {fault}")
    return experiment


def _stages_in_proportion(chain: Chain, recipe: Chain, folder: Path, resume: bool, args: Sequence[str]) -> Chain:
    """The chain with its stages' schedules in proportion to its recipe's."""
    stages, folders = [], chain.folders(folder)
    for stage, before in zip(chain.stages, recipe.stages, strict=True):
        if isinstance(stage.work, Experiment) and isinstance(before.work, Experiment):
            own = f"{stage.name}."
            given = [name.removeprefix(own) for name in _named(args) if name.startswith(own)]
            begun = folders[stage.name] if resume else None
            run = _in_proportion(stage.work, before.work, given, begun, f"stage {stage.name}: ")
            stage = Stage(stage.name, run)
        stages.append(stage)
    return Chain(*stages)


def _named(args: Sequence[str]) -> list[str]:
    """The dotted names of the fields that options set."""
    return [option_name(word).replace("-", "_") for word in args if word.startswith("--")]


def _as_the_teachers(run: Experiment, given: Sequence[str]) -> Experiment:
    """The run on the data of a teacher, and in its latents, in all that the command does not say itself."""
    teacher = run.given.get("teacher")
    if "teacher" not in given or not isinstance(teacher, str):
        return run
    theirs_at = folder_of(teacher)
    if not (theirs_at / "experiment.json").exists():
        return run
    whole = read_record(theirs_at)["experiment"]
    named = SPACE.name in given or SPACE.name in run.given or SPACE.name not in options(run.method)
    if SPACE.name in (whole.get("given") or {}) and not named:
        run = run.giving(**{SPACE.name: teacher})
        say(f"as the teacher's: the latents in which it lives ({SPACE.name} {teacher})")
    record = whole.get("data")
    if not isinstance(record, dict) or record.get("class") != type(run.data).__name__:
        return run  # which has fields of its own
    known = experiment_from_json(record, theirs_at / "experiment.json")
    shared = ("source", "resolution", "labels", "xflip")
    theirs = {name: getattr(known, name) for name in shared if hasattr(known, name) and f"data.{name}" not in given}
    changed = {name: value for name, value in theirs.items() if getattr(run.data, name, value) != value}
    if not changed:
        return run
    say(f"as the teacher's: {'; '.join(f'data.{name} {value}' for name, value in changed.items())}")
    return replace(run, data=replace(run.data, **changed))


def _say_stopped(stopped: Interrupted, folder: Path) -> None:
    with suppress(OSError):  # the terminal may be what was lost
        say(f"stopped; the state is in {stopped.checkpoint}\ngo on with: imagewright train --resume {folder}")


def _usual_folder(name: str) -> Path:
    return Path("runs") / Path(name).stem


def parse(args: Sequence[str], default: Run) -> Run:
    """Options of a recipe, whose name or file stands first, as a run. default: what they change."""
    with plainly(args):
        run = tyro.cli(
            type(default),
            default=replace(default, experiment=with_options(default.experiment)),
            args=args[1:],
            prog=f"imagewright train {args[0]}",
            config=(tyro.conf.AvoidSubcommands,),
            registry=NONE,
        )
    return replace(run, experiment=without_options(run.experiment))


def _resumed(args: list[str]) -> tuple[str, Run, list[str] | None]:
    """Name, run and command of the run in a folder, with what the options change. No file it names is run."""
    if not args:
        raise UserError("--resume needs the folder of a run: imagewright train --resume runs/NAME")
    folder = Path(args[0])
    recorded = read_record(folder).get("command")
    try:
        experiment = experiment_of(folder)
    except UserError as error:
        raise UserError(f"{error}{own_file(recorded, folder)}") from None
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
    lines, width = [], max(map(len, RECIPES))
    for family in FAMILIES.values():
        lines.append(f"\n{_head(family)}")
        lines += [f"  {name:<{width}}  {_head(recipe)}" for name, recipe in family.FAMILY.items()]
    composed = [f"  {name:<{width}}  {what}" for name, (_, _, what) in COMPOSED.items()]
    return HELP.format(recipes="\n".join(lines).lstrip("\n"), composed="\n".join(composed))


def _head(documented: Any) -> str:
    """The first line of its documentation."""
    return str((documented.__doc__ or "").splitlines()[0])


def _listed(prefix: str) -> list[str]:
    """Lines on the recipes whose names begin so: sizes, lengths and advice."""
    lines = []
    for name in (name for name in RECIPES if name.startswith(f"{prefix}-")):
        run = RECIPES[name]()
        size = f"{parameters(run) / 1e6:.2f} M parameters, {run.training.total_images:,} images by {run.training.batch}"
        lines += [f"{name}: {size}", f"    {_head(RECIPES[name])}"]
    return lines


def find_experiment(name: str) -> Experiment:
    """As `find_training`. Raises UserError for a chain."""
    found = find_training(name)
    if isinstance(found, Chain):
        raise UserError(f"{name} is a chain of runs; this command takes one run")
    return found


def find_training(name: str) -> Experiment | Chain:
    """A recipe by name, or the `experiment` of a Python file (which is run: it is the user's own)."""
    if name in RECIPES:
        return RECIPES[name]()
    if lines := _listed(name):
        raise UserError(f"there is no recipe {name!r}, but a family of them:\n" + "\n".join(lines))
    if name.endswith(".py"):
        return _experiment_of_file(Path(name))
    known = (*COMPOSED, *RECIPES)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"there is no recipe {name!r}; {hint}")


def _experiment_of_file(path: Path) -> Experiment | Chain:
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
    if not isinstance(experiment, (Experiment, Chain)):
        raise UserError(
            f"{path} must define `experiment`: an imagewright Experiment or Chain, or a function returning one"
        )
    return experiment
