"""Every option of every command, with what it does not expect: `fuzz.py [--short | --long SEED] [NAMES]`.

Options come from the parsers, so that a new one is tried by itself. Whatever stands behind it, the command ends well or
with one sentence, writes nothing outside, and takes little (`watch`). NAMES: only command lines that match. --short: a
hundred lines; --long: one value for each option, again and again until it is stopped; else all values.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)  # what has threads of its own cannot be forked

from stops import commands, prepare  # noqa: E402
from watch import watched  # noqa: E402

from imagewright.cli import main as program  # noqa: E402
from imagewright.cli.command import options  # noqa: E402
from imagewright.cli.train import Run  # noqa: E402
from imagewright.cli.train_options import with_options  # noqa: E402
from imagewright.recipes import RECIPES  # noqa: E402

NUMBERS = (
    *("", "-1", "0", "1", "2", "0.5", "-0.0", "1e309", "-1e309", "nan", "inf", "-inf", "1e-400", "0x10", "1_0", "1,2"),
    *("9" * 19, "9" * 5000, "-" + "9" * 400, "\u0661", "\uff11", "\u00bd"),
)
PATHS = (
    *("nowhere", "model", "run", "pictures", "one.png", "model/model.json", "fifo", ".", "~", "/proc/self"),
    *("/dev/null", "/dev/zero", "x" * 300, "x/" * 3000, "http://[", "file:///etc/passwd", "https://"),
)
TEXTS = (
    *(
        " ",
        "-",
        "--",
        "[1]",
        "{}",
        '{"a":',
        "true",
        "None",
        "none",
        "a b",
        "*",
        "%s",
        "{0}",
        "$HOME",
        "`id`",
        "=",
        "a=b",
    ),
    *(
        "a=b",
        "sigmas=[]",
        "num_steps=0",
        "num_steps=nan",
        "class=x",
        "[bold]x[/bold]",
        "[/]",
        "\x1b[31mred",
        "\x07",
        "\r",
    ),
    *("a\nb", "\u202egnp", "\u00e9", "\U0001f600", "\udce9", "\ufeff", "e\u0301"),
)
VALUES = (*NUMBERS, *PATHS, *TEXTS)
OTHERS = ("train", "completion")
"""Commands whose options are a recipe's, or that have none."""
HEAVY = ("bench", "orders")
"""It computes for long whatever it is told."""
SHORT = 100
"""Command lines of the short form."""
TOGETHER = 25
"""Command lines in one process."""


def functions() -> Iterator[tuple[tuple[str, ...], Callable[..., Any]]]:
    """Every command but `train`, and the function that its options are of."""
    for name, (module, _) in program.COMMANDS.items():
        if name not in OTHERS:
            for word, function in importlib.import_module(module).COMMANDS.items():
                if (name, word) != HEAVY:
                    yield ((name, word) if word else (name,)), function


def shallow(words: tuple[str, ...], function: Callable[..., Any]) -> list[str]:
    """A line that ends before any work: what a command cannot do without is nowhere."""
    hints, line = typing.get_type_hints(function, include_extras=True), list(words)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            value = {"task": "denoise", "std": "0.1"}.get(name, "nowhere")
            line += [value] if "Positional" in str(hints[name]) else [f"--{name.replace('_', '-')}", value]
    if "nowhere" not in line:
        line += ["--device", "nowhere"] if "device" in hints else ["nowhere"]
    return line


def lines(rng: random.Random, each: int) -> Iterator[list[str]]:
    """Command lines: every option of every command, with so many values each."""
    deep = {tuple(c.words[: 2 if c.words[0] in ("tune", "bench", "data") else 1]): c.words for c in commands().values()}
    for words, function in functions():
        for option in options(function):
            bases = [shallow(words, function), *([list(deep[words])] if words in deep else [])]
            for value in rng.sample(VALUES, min(each, len(VALUES))):
                yield with_option(rng.choice(bases), option, [value] * rng.choice((1, 1, 1, 2)))
    for recipe in rng.sample(sorted(RECIPES), 2):
        known = list(options(Run, Run(experiment=with_options(RECIPES[recipe]()))))
        for option in rng.sample(known, min(6 * each, len(known))):
            yield with_option(["train", recipe, "--out", "new", "--dry-run"], option, [rng.choice(VALUES)])


def with_option(base: list[str], option: str, values: list[str]) -> list[str]:
    """The line with the option, in the place of its own."""
    line = list(base)
    if option in line:
        at = line.index(option)
        end = next((i for i in range(at + 1, len(line)) if line[i].startswith("--")), len(line))
        del line[at:end]
    return [*line, option, *values]


def faults_of(batch: list[list[str]], sources: Path, place: Path) -> dict[str, list[str]]:
    """Run lines in one process; where anything went wrong, each once more by itself."""

    def run_all() -> None:
        for line in batch:
            try:
                program.main(line)
            except SystemExit as ended:
                if ended.code not in (0, 2, None):
                    raise

    _anew(sources, place)
    faults, _ = watched(run_all, place, len(batch))
    if not faults:
        return {}
    if len(batch) == 1:
        return {" ".join(batch[0])[:300]: faults}
    return {name: each for line in batch for name, each in faults_of([line], sources, place).items()}


def _anew(sources: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sources, place)
    os.mkfifo(place / "fifo")


def main(args: list[str]) -> int:
    """How many lines went wrong."""
    how = "long" if "--long" in args else "short" if "--short" in args else "all"
    seed = args[args.index("--long") + 1] if how == "long" else "0"
    part = next((a for a in args if not a.startswith("--") and (how != "long" or a != seed)), "")
    rng, tried, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        sources, place = Path(folder) / "sources", Path(folder) / "place"
        sources.mkdir()
        prepare(sources)
        while True:
            asked = lines(rng, len(VALUES) if how == "all" else 1)
            chosen = [line for line in asked if re.search(part, " ".join(line))]
            if how == "short":
                chosen = rng.sample(chosen, min(SHORT, len(chosen)))
            for at in range(0, len(chosen), TOGETHER):
                found = faults_of(chosen[at : at + TOGETHER], sources, place)
                tried, wrong = tried + len(chosen[at : at + TOGETHER]), wrong + len(found)
                for line, faults in found.items():
                    print("\n".join(f"{line!a}: {fault}" for fault in faults), flush=True)
            print(f"{tried} lines, {wrong} went wrong", flush=True)
            if how != "long":
                return wrong


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
