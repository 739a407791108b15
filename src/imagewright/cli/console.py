"""What the commands share: progress bars, plain messages, and how a mistake is told (one sentence, exit code 2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from imagewright.types import UserError

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
"""Bars and errors go to stderr, so that stdout stays what a script would want."""


def say(text: str) -> None:
    """A line for the user (plain text, no markup)."""
    OUT.print(text, markup=False)


def table(*heads: str) -> Table:
    """An empty table, for `OUT.print`: narrow, as evaluations have nine columns, and with nothing cut off."""
    return Table(*(Column(head, overflow="fold") for head in heads), box=box.SIMPLE_HEAD, padding=(0, 0))


@contextmanager
def bar(description: str, total: int, unit: str = "images") -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance_to(done, note="", total=None)`. On no terminal it prints a line now and then."""
    if not ERR.is_terminal:
        yield _lines(description, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance_to(done: int, note: str = "", total: int | None = None) -> None:
            progress.update(task, completed=done, note=note, total=total)

        yield advance_to


def _lines(description: str, total: int, unit: str) -> Callable[..., None]:
    last, first_total = -1, total

    def advance_to(done: int, note: str = "", total: int | None = None) -> None:
        nonlocal last
        total = total or first_total
        tenth = 10 * done // max(total, 1)
        if tenth > last:
            last = tenth
            print(f"{description}: {done}/{total} {unit} {note}".rstrip(), file=sys.stderr, flush=True)

    return advance_to


@contextmanager
def told_errors() -> Iterator[None]:
    """Turn a UserError into one sentence on stderr and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except UserError as error:
        ERR.print(f"imagewright: {error}", markup=False, style="red")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        ERR.print("imagewright: interrupted", markup=False)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
