"""Training batches whose order depends on seed and position alone: a resumed run needs no saved state.

Contract: position = images seen so far; `batch(p, n)` gives images p .. p + n - 1 of one endless sequence.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from imagewright.data.couplings import Couplings
from imagewright.data.image_set import ImageSet
from imagewright.data.pixels import Pixels, from_uint8
from imagewright.types import Batch, Condition, Coupling, UserError


class Loader:
    """An endless shuffled sequence: epoch e is a permutation drawn from (seed, e) (PCG64, SeedSequence).

    batch_size: size of a batch when `batch` is not told another. seed: >= 0. xflip: mirror each picture left
    to right with probability 1/2, decided by (seed, position). couplings: a store whose pairs come along, as many as
    images, in an endless order of their own; they are never mirrored. Raises UserError on an empty set or sizes out
    of range.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        seed: int,
        xflip: bool = False,
        couplings: Couplings | None = None,
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
        self._coupling_order = lru_cache(maxsize=2)(self._draw_coupling_order)
        # Sets that are decoded on demand: the batch that will probably be asked for next is decoded
        # meanwhile.
        self._pool = None if image_set.in_memory else ThreadPoolExecutor(max_workers=1)
        self._last: int | None = None
        self._ahead: tuple[tuple[int, int], Future[Pixels]] | None = None

    def batch(self, position: int, size: int | None = None) -> Batch:
        """Images `position` .. `position + size - 1` of the sequence: float32 [size, C, H, W] in [-1, 1].

        The label is int64 [size], or None if the set has no classes. May straddle epochs.
        """
        size = self.batch_size if size is None else size
        if position < 0 or size < 1:
            raise ValueError(f"position is {position} and size is {size}; they must be >= 0 and >= 1")
        rows, flips = self._rows(position, size)
        pixels = self._pixels(position, size, rows)
        pixels[flips] = pixels[flips, :, ::-1]
        label = torch.from_numpy(self.image_set.labels[rows]) if self.image_set.spec.num_classes else None
        return Batch(from_uint8(pixels), Condition(label=label), self._coupling(position, size))

    def _coupling(self, position: int, size: int) -> Coupling | None:
        if self.couplings is None:
            return None
        n = len(self.couplings)
        epochs = range(position // n, (position + size - 1) // n + 1)
        order = np.concatenate([self._coupling_order(e) for e in epochs])
        return self.couplings.coupling(order[position - epochs[0] * n :][:size])

    def _draw_coupling_order(self, epoch: int) -> npt.NDArray[np.int64]:
        assert self.couplings is not None
        key = np.random.SeedSequence((self.seed, epoch, 2))
        return np.random.Generator(np.random.PCG64(key)).permutation(len(self.couplings))

    def _draw_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        n = len(self.image_set)
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 0)))).permutation(n)
        if not self.xflip:
            return order, np.zeros(n, dtype=np.bool_)
        bits = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 1)))).random(n)
        return order, bits < 0.5

    def _rows(self, position: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Indices into the set and whether each is mirrored, both [size]."""
        n = len(self.image_set)
        first, last = position // n, (position + size - 1) // n
        epochs = [self._epoch(e) for e in range(first, last + 1)]
        here = slice(position - first * n, position - first * n + size)
        return np.concatenate([e[0] for e in epochs])[here], np.concatenate([e[1] for e in epochs])[here]

    def _pixels(self, position: int, size: int, rows: npt.NDArray[np.int64]) -> Pixels:
        if self._pool is None:
            return self.image_set.images(rows)
        ready = self._ahead
        pixels = ready[1].result() if ready and ready[0] == (position, size) else self.image_set.images(rows)
        stride = size if self._last is None or self._last >= position else position - self._last
        following = position + stride
        future = self._pool.submit(self.image_set.images, self._rows(following, size)[0])
        self._last, self._ahead = position, ((following, size), future)
        return pixels
