"""Training batches whose order depends on seed and position alone: a resumed run needs no saved state.

Contract: position = images seen so far; `batch(p, n)` gives images p .. p + n - 1 of one endless sequence.
Ahead      pictures that are decoded on demand, and pairs, are read by a thread while the batch before is computed. What
           comes next is not guessed: the trainer says which batches this process will ask for (`Turns`).
Moving     pictures go to the device as bytes, from pinned memory, and become float32, four times as many, there.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.data.couplings import Couplings
from imagewright.data.image_set import ImageSet
from imagewright.data.pixels import from_uint8
from imagewright.data.workers import Workers
from imagewright.types import Batch, Condition, Coupling, UserError

AHEAD = 2
"""Batches that are read before they are asked for."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What one process asks for: of every `stride` images, `count` batches of `size` from `first` on.

    end: steps that would start at this position or beyond are not taken; None = there is no end.
    """

    stride: int
    first: int
    count: int
    size: int
    end: int | None = None

    def after(self, position: int) -> int | None:
        """Where the batch begins that follows the one at `position`; None after the last."""
        step = position - position % self.stride
        if position + self.size < step + self.first + self.count * self.size:
            return position + self.size
        following = step + self.stride
        return None if self.end is not None and following >= self.end else following + self.first


class _Piece(NamedTuple):
    """What a batch is made of: uint8 [n, H, W, C], rows of the set, and pairs."""

    pixels: Tensor
    rows: Rows
    coupling: Coupling | None


class Loader:
    """An endless shuffled sequence: epoch e is a permutation drawn from (seed, e) (PCG64, SeedSequence).

    batch_size: size of a batch when `batch` is not told another. seed: >= 0. xflip: mirror each picture left
    to right with probability 1/2, decided by (seed, position). couplings: a store whose pairs come along, as many as
    images, in an endless order of their own; they are never mirrored. workers: processes that decode; 0 = threads of
    this one. Raises UserError on an empty set or sizes out of range.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        seed: int,
        xflip: bool = False,
        couplings: Couplings | None = None,
        workers: int = 0,
    ) -> None:
        if len(image_set) == 0:
            raise UserError(f"{image_set.source} has no pictures to train on")
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; it must be >= 1")
        if seed < 0:
            raise UserError(f"data seed is {seed}; it must be >= 0")
        self.image_set = image_set
        self.batch_size = batch_size
        self.seed = seed
        self.xflip = xflip
        self.couplings = couplings
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)
        self._coupling_order = lru_cache(maxsize=4)(self._draw_coupling_order)
        decoded = not image_set.in_memory
        self._read = Workers(image_set.images, workers) if workers and decoded else image_set.images
        # One thread, which itself decodes on all cores: batches are finished in the order in which they are needed.
        self._pool = ThreadPoolExecutor(max_workers=1) if decoded or couplings is not None else None
        self._ahead: dict[tuple[int, int], Future[_Piece]] = {}
        self.follow(Turns(stride=batch_size, first=0, count=1, size=batch_size))

    def follow(self, turns: Turns, device: torch.device | str = "cpu") -> None:
        """Read ahead by these turns, for that device. They change nothing but when pictures are decoded."""
        self._turns, self._device = turns, torch.device(device)

    def batch(self, position: int, size: int | None = None) -> Batch:
        """Images `position` .. `position + size - 1` of the sequence: float32 [size, C, H, W] in [-1, 1].

        The label is int64 [size], or None if the set has no classes. May straddle epochs. All but the images, which
        are on the device that `follow` was told of, is on the CPU.
        """
        size = self.batch_size if size is None else size
        if position < 0 or size < 1:
            raise ValueError(f"position is {position} and size is {size}; they must be >= 0 and >= 1")
        piece = self._piece(position, size) if self._pool is None else self._next(self._pool, position, size)
        label = torch.from_numpy(self.image_set.labels[piece.rows]) if self.image_set.spec.num_classes else None
        return Batch(from_uint8(piece.pixels, self._device), Condition(label=label), piece.coupling)

    def _next(self, pool: ThreadPoolExecutor, position: int, size: int) -> _Piece:
        """A piece that was begun already, or is now; the next ones are begun, those no longer wanted forgotten."""
        wanted, at = [(position, size)], position
        for _ in range(AHEAD):
            following = self._turns.after(at)
            if following is None:
                break
            wanted, at = [*wanted, (following, self._turns.size)], following
        for key in self._ahead.keys() - set(wanted):
            self._ahead.pop(key).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = pool.submit(self._piece, *key)
        return self._ahead.pop((position, size)).result()

    def _piece(self, position: int, size: int) -> _Piece:
        rows, flips = self._rows(position, size)
        pixels = self._read(rows)
        if flips is not None:
            pixels[flips] = pixels[flips, :, ::-1]
        tensor = torch.from_numpy(pixels)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return _Piece(tensor, rows, self._coupling(position, size))

    def _coupling(self, position: int, size: int) -> Coupling | None:
        if self.couplings is None:
            return None
        parts = _slices(position, size, len(self.couplings))
        return self.couplings.coupling(np.concatenate([self._coupling_order(epoch)[part] for epoch, part in parts]))

    def _draw_coupling_order(self, epoch: int) -> Rows:
        assert self.couplings is not None
        key = np.random.SeedSequence((self.seed, epoch, 2))
        return np.random.Generator(np.random.PCG64(key)).permutation(len(self.couplings))

    def _draw_epoch(self, epoch: int) -> tuple[Rows, npt.NDArray[np.bool_] | None]:
        n = len(self.image_set)
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 0)))).permutation(n)
        if not self.xflip:
            return order, None
        bits = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 1)))).random(n)
        return order, bits < 0.5

    def _rows(self, position: int, size: int) -> tuple[Rows, npt.NDArray[np.bool_] | None]:
        """Indices into the set and whether each is mirrored, both [size]; None: none is."""
        parts = [(self._epoch(epoch), part) for epoch, part in _slices(position, size, len(self.image_set))]
        rows = np.concatenate([order[part] for (order, _), part in parts])
        flips = [flips[part] for (_, flips), part in parts if flips is not None]
        return rows, np.concatenate(flips) if flips else None


def _slices(position: int, size: int, n: int) -> list[tuple[int, slice]]:
    """Places `position` .. `position + size - 1` of an endless sequence as parts of its epochs of n places."""
    parts, end = [], position + size
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        parts.append((epoch, slice(start, stop)))
        position += stop - start
    return parts
