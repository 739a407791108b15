"""What the commands share: progress bars, plain messages, and how a mistake is told (one sentence, exit code 2)."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

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

from imagewright.training.trainer import ENDINGS
from imagewright.types import UserError

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
"""Bars and errors go to stderr, so that stdout stays what a script would want."""


def say(text: str) -> None:
    """A line for the user (plain text, no markup)."""
    OUT.print(shown(text, OUT), markup=False)


def shown(text: str, console: Console) -> str:
    """The text with what the console's encoding lacks, such as bytes of a name that are no UTF-8, written as \\xE9."""
    encoding = console.encoding or "utf-8"
    raw = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return raw.encode(encoding, "backslashreplace").decode(encoding)


def table(*heads: str) -> Table:
    """An empty table, for `OUT.print`: narrow, as evaluations have nine columns, and with nothing cut off."""
    return Table(*(Column(head, overflow="fold") for head in heads), box=box.SIMPLE_HEAD, padding=(0, 0))


@contextmanager
def bar(description: str, total: int, unit: str = "images") -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance_to(done, note="", total=None)`. On no terminal it prints a line now and then."""
    description = shown(description, ERR)
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
    progress = Progress(*columns, console=ERR)
    with _without_terminal():
        progress.start()
    task = progress.add_task(description, total=total, note="")

    def advance_to(done: int, note: str = "", total: int | None = None) -> None:
        with _without_terminal():
            progress.update(task, completed=done, note=note, total=total)

    try:
        yield advance_to
    finally:
        with _without_terminal():
            progress.stop()


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Go on where the terminal is gone: what the bar shows is worth no work that is lost."""
    with suppress(OSError):
        yield


def _lines(description: str, total: int, unit: str) -> Callable[..., None]:
    last, first_total = -1, total

    def advance_to(done: int, note: str = "", total: int | None = None) -> None:
        nonlocal last
        total = total or first_total
        tenth = 10 * done // max(total, 1)
        if tenth > last:
            last = tenth
            with _without_terminal():
                print(f"{description}: {done}/{total} {unit} {note}".rstrip(), file=sys.stderr, flush=True)

    return advance_to


class Terminated(BaseException):
    """A signal that announces the end arrived; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def told_errors() -> Iterator[None]:
    """Turn what a user can mend into one sentence on stderr and exit code 2, and signals into 128 + their number.

    That is a UserError, and whatever the system says of a file: a full disk, a folder that is read-only, a file in the
    way. Whoever waits for a signal in mid-work (training) takes it before it comes here.
    """
    try:
        with _signals():
            yield
    except UserError as error:
        _complain(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _complain("interrupted")
        raise SystemExit(130) from None
    except Terminated as signalled:
        _complain(f"stopped by {signal.Signals(signalled.number).name}")
        raise SystemExit(128 + signalled.number) from None
    except BrokenPipeError:
        with suppress(OSError):
            sys.stderr.close()
        raise SystemExit(141) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}")
        raise SystemExit(2) from None


def _complain(text: str) -> None:
    with suppress(OSError):
        ERR.print(shown(f"imagewright: {text}", ERR), markup=False, style="red")


@contextmanager
def _signals() -> Iterator[None]:
    """Raise Terminated where a signal that announces the end arrives, so that nothing half-written is left."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        for number in ENDINGS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
