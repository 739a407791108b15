"""How long things take on a device, and how much memory: what every part measures with."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
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
