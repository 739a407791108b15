"""How long things take on a device, and how much memory: what every part measures with."""

from __future__ import annotations

import gc
import itertools
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

Numbers = dict[str, Any]


class OutOfTime(Exception):  # noqa: N818, a part's end, not an error
    """A part's share of the minutes is used up."""


class Deadline:
    """When a part has to be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raise OutOfTime when nothing is left."""
        if self.left <= 0:
            raise OutOfTime


def timed(action: Callable[[], object], device: torch.device, warm: int, count: int) -> Numbers:
    """Seconds of one call: median, least and largest of `count` after `warm` that do not count.

    The calls follow each other without waiting for the device, as in use; on CUDA events on the stream part them.
    """
    for _ in range(warm):
        action()
    if device.type == "cuda":
        marks = [_mark() for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            action()
            mark.record()
        torch.cuda.synchronize(device)
        each = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
    else:
        each = []
        for _ in range(count):
            started = time.perf_counter()
            action()
            each.append(time.perf_counter() - started)
    return {"seconds": statistics.median(each), "least": min(each), "largest": max(each), "count": count}


@contextmanager
def aside(results: Numbers, name: str, deadline: Deadline, most: float = math.inf) -> Iterator[Numbers]:
    """Results of one measurement, for at most so many seconds; what fails is written down, and nothing else lost.

    Raises OutOfTime where nothing of the whole is left.
    """
    deadline.check()
    own: Numbers = {}
    results[name] = own
    started, seconds = time.monotonic(), min(most, deadline.left)
    try:
        with alarm(seconds):
            yield own
    except Exception as error:
        # What interrupts a compiler comes out of it as the compiler's own error.
        late = isinstance(error, OutOfTime) or time.monotonic() - started >= seconds
        own["error"] = f"out of time, {seconds:.0f} s" if late else "".join(traceback.format_exception(error))[-1500:]
        error.__traceback__ = None  # which holds the measurement's memory
    own["wall_seconds"] = time.monotonic() - started
    deadline.check()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within it after so long, as soon as Python gets to run: a compiler does not ask the time.

    One within another puts the outer one back, with what is left of it.
    """

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        left = max(outer - (time.monotonic() - started), 0.1) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def kernels(action: Callable[[], object], device: torch.device, count: int = 20) -> Numbers:
    """Milliseconds and calls of the kernels that take longest in one call; all kernels', the device's idle time beside.

    wall: from the first kernel's start to the last one's end.
    """
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        action()
        torch.cuda.synchronize(device)
    spans: dict[str, list[float]] = {}
    first, last = math.inf, 0.0
    for event in watched.events() or []:
        # An optimiser's step has a span of its own around its kernels.
        if str(event.device_type).endswith("CUDA") and not event.name.startswith(("Optimizer.", "ProfilerStep")):
            spans.setdefault(event.name[:160], []).append(event.time_range.elapsed_us() / 1000)
            first, last = min(first, event.time_range.start), max(last, event.time_range.end)
    order = sorted(spans, key=lambda name: -sum(spans[name]))
    return {
        "longest": [[name, round(sum(spans[name]), 3), len(spans[name])] for name in order[:count]],
        "milliseconds": sum(map(sum, spans.values())),
        "wall": (last - first) / 1000 if spans else None,
        "launches": sum(map(len, spans.values())),
    }


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def forget(device: torch.device) -> None:
    """Give back what is no longer held, and let the highest memory be counted anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that tensors held since `forget`; None where nobody counts it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def out_of_memory(error: Exception) -> bool:
    """Whether the device had no room."""
    return isinstance(error, torch.OutOfMemoryError)
