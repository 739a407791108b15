"""What the commands share: progress bars, plain messages, and how a mistake is told (one sentence, exit code 2)."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import unicodedata
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
from rich.text import Text

from imagewright.errors import ENDINGS, UserError
from imagewright.leaving import is_alone

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
"""Bars and errors go to stderr, so that stdout stays what a script would want."""


def first_alone() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one: others say nothing."""
    return os.environ.get("RANK", "0").strip() in ("", "0") or is_alone()


def say(text: str) -> None:
    """A line for the user (plain text, no markup)."""
    if first_alone():
        OUT.print(shown(text, OUT), markup=False)


def shown(text: str, console: Console) -> str:
    """The text as a terminal may have it, whatever it came from: lines and tabs stay.

    Written as \\xE9 is what the console's encoding lacks, such as bytes of a name that are no UTF-8, and what a
    terminal obeys rather than shows: control characters, marks that turn the direction, lone surrogates.
    """
    encoding = console.encoding or "utf-8"
    raw = text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if not raw.isprintable():
        raw = "".join(c if c in "\n\t" or unicodedata.category(c) not in _OBEYED else _escaped(c) for c in raw)
    return raw.encode(encoding, "backslashreplace").decode(encoding)


_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's kinds of characters that are not shown: control, format, surrogates, ends of lines and paragraphs."""


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def printable(name: str) -> str:
    """A name from a file in one line, for messages and for whoever prints without `shown`."""
    return shown(name, ERR).replace("\n", "\\n").replace("\t", "\\t")


class _Plain(Table):
    """A table whose cells are texts as they are: no markup, nothing that a terminal obeys."""

    def add_row(self, *cells: Any, style: Any = None, end_section: bool = False) -> None:
        """As rich's."""
        plain = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, style=style, end_section=end_section)


def table(*heads: str) -> Table:
    """An empty table, for `OUT.print`: narrow, as evaluations have nine columns, and with nothing cut off."""
    heads = tuple(map(printable, heads))
    return _Plain(*(Column(Text(head), overflow="fold") for head in heads), box=box.SIMPLE_HEAD, padding=(0, 0))


@contextmanager
def bar(description: str, total: int, unit: str = "images") -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance_to(done, note="", total=None)`. On no terminal it prints a line now and then."""
    if not first_alone():
        yield lambda done, note="", total=None: None
        return
    description = shown(description, ERR)
    if not ERR.is_terminal:
        yield _lines(description, total, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
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


def pace(loss: float, rate: float) -> str:
    """What a training's bar says beside the images.

    A loss that is no number is that of a product not yet updated, or on a GPU, where losses are read with the log's
    lines.
    """
    learnt = f"loss {loss:.4f}" if math.isfinite(loss) else "no loss known yet"
    return f"{learnt}  {rate:.0f} images/s"


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
                line = f"{description}: {done}/{total} {unit} {shown(note, ERR)}"
                print(line.rstrip(), file=sys.stderr, flush=True)

    return advance_to


def duration(seconds: float) -> str:
    """A time in the largest unit of which there are two."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


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
    except MemoryError:
        _complain("there is not enough memory for this")
        raise SystemExit(2) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}")
        raise SystemExit(2) from None


def _complain(text: str) -> None:
    with suppress(OSError):
        ERR.print(f"imagewright: {printable(text)}", markup=False, style="red")


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
