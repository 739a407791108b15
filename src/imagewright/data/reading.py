"""Decoding the pictures of an archive, many at a time, within bounds of memory (`limits`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagewright import limits
from imagewright.data.archive import Archive
from imagewright.data.fitting import Fitting
from imagewright.data.pixels import BadPicture, Pixels, announced, decode, with_channels
from imagewright.types import DataSpec, UserError

A = TypeVar("A")
R = TypeVar("R")
Contents = Callable[[int], bytes]
"""The bytes of a picture's file, by its number."""
_ROOM = limits.Room(limits.PIXELS)
_TASK = 8
"""Pictures that a thread takes at a time: for each alone, handing it over costs a third of a small one's decoding."""
_threads = os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Decode on so many threads from now on; the number of cores where nothing was said."""
    global _threads
    _threads = count
    _pool.cache_clear()


def chunk_size() -> int:
    """Pictures that are in work at a time where a whole set is gone through."""
    return 16 * _threads


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """The threads that decode, started once: starting them for each batch takes longer than a small batch."""
    return ThreadPoolExecutor(max_workers=_threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


def decoded(archive: Archive, name: str, fit: Fitting) -> tuple[tuple[int, int], Pixels]:
    """(width, height) of a picture and its fitted pixels; all that are in work at a time are bounded (`limits`)."""
    return decoded_bytes(archive.read(name), fit)


def decoded_bytes(content: bytes, fit: Fitting) -> tuple[tuple[int, int], Pixels]:
    """`decoded` of a file's bytes."""
    with _ROOM.take(announced(content)):
        whole = decode(content)
        return (whole.shape[1], whole.shape[0]), fit(whole)


def in_parallel(function: Callable[[A], R], items: Sequence[A]) -> Iterator[tuple[A, R]]:
    """Map with threads (decoders release the lock), by chunks so that results do not pile up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about a file's metadata; what matters is whether it decodes
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for first in range(0, len(items), chunk_size()):
            chunk = items[first : first + chunk_size()]
            yield from zip(chunk, mapped(function, chunk), strict=True)


def mapped(function: Callable[[A], R], items: Sequence[A]) -> list[R]:
    """All results in order, on the decoding threads."""
    return [function(each) for each in items] if _threads == 1 else list(_pool().map(function, items))


def mapped_rows(one: Callable[[int], Pixels], indices: npt.NDArray[np.int64], spec: DataSpec) -> Pixels:
    """Pictures by number, uint8 [n, H, W, C], on the decoding threads."""
    out = np.empty((len(indices), spec.resolution, spec.resolution, spec.channels), np.uint8)

    def fill(part: range) -> None:
        for place in part:
            out[place] = one(int(indices[place]))

    mapped(fill, [range(at, min(at + _TASK, len(indices))) for at in range(0, len(indices), _TASK)])
    return out


@dataclass(frozen=True)
class Reader:
    """Decodes pictures of a set that does not fit in memory: rows [n] -> uint8 [n, H, W, C]."""

    archive: Archive
    names: tuple[str, ...]
    fit: Fitting
    spec: DataSpec

    def __call__(self, indices: npt.NDArray[np.int64]) -> Pixels:
        return mapped_rows(self._one, indices, self.spec)

    def _one(self, index: int) -> Pixels:
        name = self.names[index]
        try:
            _, pixels = decoded(self.archive, name, self.fit)
        except BadPicture as finding:
            raise UserError(f"{self.archive.path}: {name} was usable when opened and no longer is: {finding}") from None
        return with_channels(pixels, self.spec.channels)
