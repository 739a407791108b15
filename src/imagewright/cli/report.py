"""`imagewright report RUN ...`: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.console import say
from imagewright.report import collect_run, write_report
from imagewright.types import UserError


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    seed: int = 0,
) -> None:
    """Write one HTML page about one or more runs: samples, trajectory, losses, quality against cost, neighbours.

    The page needs no other file and no network.

    Args:
        runs: run folders; several are compared side by side.
        out: where the page goes; default report.html in the first run's folder.
        seed: of the images shown.
    """
    if not runs:
        raise UserError("imagewright report needs at least one run folder")
    sections = []
    for run in runs:
        say(f"collecting {run}")
        sections.append(collect_run(run, seed=seed))
    path = out or runs[0] / "report.html"
    write_report(path, sections)
    say(f"written to {path}")


def main(args: Sequence[str]) -> None:
    """Parse and write the page."""
    tyro.cli(report, args=args, prog="imagewright report")
