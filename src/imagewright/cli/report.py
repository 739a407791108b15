"""`imagewright report RUN ...`: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.files import try_output
from imagewright.report import collect_run, write_report
from imagewright.training.chain import stage_folders
from imagewright.types import UserError


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    seed: int = 0,
    weight: float | None = None,
    features: str | None = None,
) -> None:
    """Write one HTML page about one or more runs: samples, trajectory, losses, quality against cost, neighbours.

    The page needs no other file and no network.

    Args:
        runs: run folders; several are compared side by side, and so are the stages of a chain.
        out: where the page goes; default report.html in the first run's folder.
        seed: of the images shown.
        features: encoder in whose features the nearest training images are sought, as for `imagewright evaluate`;
            default the data's own classifier.
        weight: strength of the guidance at which they are drawn, of runs whose model is told it; default its own.
    """
    if not runs:
        raise UserError("imagewright report needs at least one run folder")
    sections = []
    path = out or runs[0] / "report.html"
    try_output(path)
    for folder in (each for given in runs for each in (stage_folders(given) or [given])):
        say(f"collecting {folder}")
        sections.append(collect_run(folder, seed=seed, weight=weight, features=features))
    if weight is not None and all(section.weight is None for section in sections):
        raise UserError(f"--weight is {weight:g}; no model of these runs is told the strength of guidance")
    if features is not None and not any(section.neighbours for section in sections):
        raise UserError(f"--features is {features}; no images of these runs can be compared with training images")
    write_report(path, sections)
    say(f"written to {path}")


COMMANDS: Mapping[str, Callable[..., None]] = {"": report}


def main(args: Sequence[str]) -> None:
    """Parse and write the page."""
    run(report, args, "imagewright report")
