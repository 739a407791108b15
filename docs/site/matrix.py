"""Which methods, networks and samplers are tested together: docs/matrix.md, of the recipes and the tests' tables.

    PYTHONPATH=src python docs/site/matrix.py > docs/matrix.md

A test holds the page to what this says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKS = {
    "A": "assembled at its true size, without data or memory, as its recipe has it (`tests/cli/test_dry_run.py`)",
    "S": "takes a training step on a device without 64-bit floats (`tests/training/test_narrow_devices.py`)",
    "R": "dies and is resumed with the same bits, and is drawn (`tests/training/test_resume_of_methods.py`)",
    "P": "trained by two processes, replicated or in shares, and resumed (`tests/distributed/families.py`)",
    "G": "takes steps on a GPU, where there is one (`tests/test_cuda.py`)",
}
HEAD = """# Tested pairs

Which methods, networks and samplers have been seen to work together: made by `docs/site/matrix.py` from the recipes and
from the tables of the tests, and held by a test to be current. What is not here is refused, or has not been tried:
parts of one kind fit each other by their contracts ([architecture](architecture.md#kinds-of-model)), and a dry run
(`imagewright train RECIPE --dry-run`) says in seconds whether they do. A sampler `-` is the model's own way to draw.

"""
Trial = tuple[str, str, str]


def page() -> str:
    """The whole page."""
    found: dict[Trial, set[str]] = {}
    named: dict[Trial, list[str]] = {}
    for mark, recipe, experiment in _tried():
        trial = _trial(experiment)
        found.setdefault(trial, set()).add(mark)
        if recipe and recipe not in named.setdefault(trial, []):
            named[trial].append(recipe)
    lines = [HEAD, "| | |", "|---|---|", *(f"| **{mark}** | {what} |" for mark, what in MARKS.items()), ""]
    lines += ["| method | network | sampler | tested | recipes |", "|---|---|---|---|---|"]
    for trial in sorted(found):
        marks = "".join(mark for mark in MARKS if mark in found[trial])
        lines.append(f"| {' | '.join(trial)} | {marks} | {_some(named.get(trial, []))} |")
    lines += ["", f"{len(found)} combinations of {len({m for m, _, _ in found})} methods."]
    return "\n".join(lines) + "\n"


def _tried() -> Iterator[tuple[str, str, Any]]:
    """A mark, the recipe's name or "", and the experiment, of everything that the tests build."""
    sys.path[:0] = [str(ROOT / "tests" / name) for name in ("", "training", "distributed")]
    import families
    import test_cuda
    import test_narrow_devices

    from imagewright.recipes import RECIPES

    for name, recipe in RECIPES.items():
        yield "A", name, recipe()
    for name in test_narrow_devices.FAMILIES:
        yield "S", name, RECIPES[name]()
    for name in test_cuda.FAMILIES:
        yield "G", name, RECIPES[name]()
    for name, experiment in families.experiments(Path("runs")):
        yield "P", "", experiment
        if name in families.resumes.METHODS:
            yield "R", "", experiment


def _trial(experiment: Any) -> Trial:
    network = type(experiment.network).__name__.removesuffix("Config") if experiment.network else "the teacher's"
    sampler = "-" if experiment.sampler is None else type(experiment.sampler).__name__
    return type(experiment.method).__name__, network, sampler


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return f"{shown}, {len(names) - 3} more" if len(names) > 3 else shown


if __name__ == "__main__":
    sys.stdout.write(page())
