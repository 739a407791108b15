"""Processes that decode pictures, where threads of one are not enough: Python's own share of a small picture's work
holds the interpreter's lock."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import numpy.typing as npt

from imagewright.data import reading
from imagewright.data.image_set import Read
from imagewright.data.pixels import Pixels
from imagewright.types import UserError

_read: Read | None = None


class Workers:
    """`read` by that many other processes, each a share of the rows; the answer does not depend on how many.

    They are started anew (`spawn`), never forked, as threads and a GPU do not survive that: whatever starts them needs
    a main module that may be imported. Raises UserError where one dies.
    """

    def __init__(self, read: Read, count: int) -> None:
        self._count = count
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(read,))

    def __call__(self, rows: npt.NDArray[np.int64]) -> Pixels:
        shares = [share for share in np.array_split(rows, self._count) if len(share)]
        try:
            return np.concatenate(list(self._pool.map(_share, shares)))
        except BrokenProcessPool:
            raise UserError(
                f"one of {self._count} processes that decode pictures ended before its work was done (out of memory? "
                "a main module that cannot be imported?); data.workers 0 uses threads"
            ) from None


def _begin(read: Read) -> None:
    global _read
    _read = read
    reading.use_threads(1)


def _share(rows: npt.NDArray[np.int64]) -> Pixels:
    assert _read is not None
    return _read(rows)
