"""Signals that announce the end of a run, which wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from imagewright.errors import ENDINGS


class Interrupted(Exception):  # noqa: N818, not an error: the user asked for it
    """A signal was honoured after a whole step; the state is saved at `checkpoint`. signal: its number."""

    def __init__(self, checkpoint: Path, number: int) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint, self.number = checkpoint, number


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect signals that announce the end instead of dying in mid-step; a second one kills as usual.

    One that is ignored stays ignored: `nohup` asks for that.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {s: handler for s in ENDINGS if (handler := signal.getsignal(s)) != signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)] or signal.SIG_DFL)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
