"""Training batches whose order depends on seed and position alone: a resumed run needs no saved state.

Contract: position = images seen so far; `batch(p, n)` gives images p .. p + n - 1 of one endless sequence.
Ahead      pictures that are decoded on demand, and pairs, are read by a thread while the batch before is computed. What
           comes next is not guessed: the trainer says which batches this process will ask for (`Turns`).
Moving     batches go to the device as they were read, from pinned memory; pictures are bytes until they are there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.data.couplings import Couplings, Mixture
from imagewright.data.image_set import ImageSet
from imagewright.data.workers import Workers
from imagewright.moving import pinned, sent
from imagewright.types import Batch, Condition, Coupling, Example, Examples, UserError

AHEAD = 2
"""Batches that are read before they are asked for."""
IDLE = 100
"""Passes in a row that may show nothing, of a set that chooses."""

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


class Loader:
    """An endless shuffled sequence: epoch e is a permutation drawn from (seed, e) (PCG64, SeedSequence).

    A set that does not show all of itself in every epoch says with `passing(generator)` which rows it shows in one.


    batch_size: size of a batch when `batch` is not told another. seed: >= 0. xflip: mirror each picture left
    to right with probability 1/2, decided by (seed, position), and of a pair its noise and its image together.
    couplings: a store, or a mixture of stores, whose pairs come along, as many as images, in an endless order of their
    own. workers: processes that decode; 0 = threads of this one. Raises UserError on an empty set or sizes out of
    range.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        xflip: bool = False,
        couplings: Couplings | Mixture | None = None,
        workers: int = 0,
    ) -> None:
        if len(examples) == 0:
            raise UserError(f"{examples.source} has no pictures to train on")
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; it must be >= 1")
        if seed < 0:
            raise UserError(f"data seed is {seed}; it must be >= 0")
        self.batch_size = batch_size
        if xflip:
            examples = cast(ImageSet, examples).mirrored()
        self._main = _Sequence(examples, seed, (0, 1))
        self._beside = None if couplings is None else _pairs(couplings, seed, xflip)
        decoded = not examples.in_memory
        self._read = Workers(examples.read, workers) if workers and decoded else examples.read
        # One thread, which itself decodes on all cores: batches are finished in the order in which they are needed.
        self._pool = ThreadPoolExecutor(max_workers=1) if decoded or couplings is not None else None
        self._ahead: dict[tuple[int, int], Future[Example]] = {}
        self.follow(Turns(stride=batch_size, first=0, count=1, size=batch_size))

    def follow(self, turns: Turns, device: torch.device | str = "cpu") -> None:
        """Read ahead by these turns, for that device. They change nothing but when pictures are decoded."""
        self._turns, self._device = turns, torch.device(device)

    def batch(self, position: int, size: int | None = None) -> Any:
        """Examples `position` .. `position + size - 1` of the sequence, on the device that `follow` was told of.

        Of pictures, a `Batch`: float32 [size, C, H, W] in [-1, 1]; the label is int64 [size], or None if the set has no
        classes. May straddle epochs.
        """
        size = self.batch_size if size is None else size
        if position < 0 or size < 1:
            raise ValueError(f"position is {position} and size is {size}; they must be >= 0 and >= 1")
        piece = self._piece(position, size) if self._pool is None else self._next(self._pool, position, size)
        return self._main.examples.prepared(piece.map(lambda t: sent(t, self._device)))

    def _next(self, pool: ThreadPoolExecutor, position: int, size: int) -> Example:
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

    def _piece(self, position: int, size: int) -> Example:
        """The batch on the CPU, in pinned memory where it will travel."""
        batch = self._main.batch(position, size, self._read)
        if self._beside is not None:
            batch = replace(cast(Batch, batch), coupling=cast(Coupling, self._beside.batch(position, size)))
        return batch.map(lambda t: pinned(t, self._device))


class _Sequence:
    """An endless shuffled sequence of a set's examples. streams: which random numbers decide order and chances."""

    def __init__(self, examples: Examples, seed: int, streams: tuple[int, int]) -> None:
        self.examples, self.seed, self.streams = examples, seed, streams
        self._order = lru_cache(maxsize=4)(self._epoch)
        self._chances = lru_cache(maxsize=4)(lambda epoch: self._generator(epoch, 1).random(len(examples)))
        self._ends: list[int] = []

    def batch(self, position: int, size: int, read: Callable[[Rows], Any] | None = None) -> Example:
        """Examples `position` .. `position + size - 1`, as read in place of the set's own reading."""
        parts = self._slices(position, size)
        rows = np.concatenate([self._order(epoch)[part] for epoch, part in parts])

        def chance() -> npt.NDArray[np.float64]:
            return np.concatenate([self._chances(epoch)[part] for epoch, part in parts])

        return self.examples.batch((read or self.examples.read)(rows), rows, chance)

    def _epoch(self, epoch: int) -> Rows:
        """The rows of an epoch, in order."""
        generator = self._generator(epoch, 0)
        passing = getattr(self.examples, "passing", None)
        rows: Rows = generator.permutation(len(self.examples) if passing is None else passing(generator))
        return rows

    def _slices(self, position: int, size: int) -> list[tuple[int, slice]]:
        """Places `position` .. `position + size - 1` as parts of epochs, whose lengths may differ."""
        if getattr(self.examples, "passing", None) is None:
            return _slices(position, size, len(self.examples))
        parts, end = [], position + size
        while position < end:
            epoch = bisect_right(self._ends, position)
            if epoch == len(self._ends):
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + len(self._order(epoch)))
                if self._ends[-IDLE:] == [0] * IDLE:
                    raise UserError(f"{self.examples.source} shows nothing in {IDLE} passes; balance it less")
                continue
            start = self._ends[epoch - 1] if epoch else 0
            stop = min(self._ends[epoch], end)
            parts.append((epoch, slice(position - start, stop - start)))
            position = stop
        return parts

    def _generator(self, epoch: int, which: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, self.streams[which]))))


def _pairs(couplings: Couplings | Mixture, seed: int, xflip: bool) -> _Sequence | _Mixed:
    stores = couplings.stores if isinstance(couplings, Mixture) else (couplings,)
    sequences = [
        _Sequence(store.mirrored() if xflip else store, seed, (2 + 2 * k, 3 + 2 * k)) for k, store in enumerate(stores)
    ]
    return _Mixed(sequences, couplings.weights, seed) if isinstance(couplings, Mixture) else sequences[0]


class _Mixed:
    """Sequences of pairs as one: blocks of BLOCK places in random order, of which each has its share, without drift."""

    BLOCK = 256

    def __init__(self, sequences: list[_Sequence], weights: tuple[float, ...], seed: int) -> None:
        self.sequences, self.seed = sequences, seed
        self._shares = np.cumsum([0.0, *weights])
        self._whose = lru_cache(maxsize=8)(self._block)

    def batch(self, position: int, size: int) -> Coupling:
        """Pairs `position` .. `position + size - 1`."""
        block, start = divmod(position, self.BLOCK)
        blocks = range(block, (position + size - 1) // self.BLOCK + 1)
        whose = np.concatenate([self._whose(each) for each in blocks])
        wanted = whose[start : start + size]
        before = self._passed(block) + np.bincount(whose[:start], minlength=len(self.sequences))
        counts = np.bincount(wanted, minlength=len(self.sequences))
        parts = [
            cast(Coupling, sequence.batch(int(before[k]), int(counts[k])))
            for k, sequence in enumerate(self.sequences)
            if counts[k]
        ]
        order = torch.from_numpy(np.argsort(np.argsort(wanted, kind="stable"), kind="stable"))
        return _joined(parts)[order]

    def _passed(self, block: int) -> npt.NDArray[np.int64]:
        """How many places before a block are each sequence's."""
        return np.diff(np.floor(self._shares * (block * self.BLOCK) + 0.5)).astype(np.int64)

    def _block(self, block: int) -> npt.NDArray[np.int64]:
        """Whose the places of a block are."""
        counts = self._passed(block + 1) - self._passed(block)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, block, 0, 1))))
        return generator.permutation(np.repeat(np.arange(len(counts)), counts))


def _joined(parts: list[Coupling]) -> Coupling:
    """Pairs one after the other; all of one kind."""

    def join(tensors: list[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(there) if there else None

    latents, images = torch.cat([p.latents for p in parts]), torch.cat([p.images for p in parts])
    cond = Condition(label=join([p.cond.label for p in parts]))
    return Coupling(latents, images, cond, join([p.points for p in parts]), join([p.times for p in parts]))


def _slices(position: int, size: int, n: int) -> list[tuple[int, slice]]:
    """Places `position` .. `position + size - 1` of an endless sequence as parts of its epochs of n places."""
    parts, end = [], position + size
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        parts.append((epoch, slice(start, stop)))
        position += stop - start
    return parts
