"""Drawing by several processes: each draws whole batches, as one would have cut them, so that no bit depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from imagewright.gathering import told_as_lost
from imagewright.samplers.generator import ImageGenerator, Labels
from imagewright.training.distributed import Processes

Images = npt.NDArray[np.uint8]


class SharedGenerator:
    """A generator whose batches are drawn in turn by all processes. The first asks and receives; the others `help`."""

    def __init__(self, generator: ImageGenerator, processes: Processes) -> None:
        self._generator, self._processes = generator, processes
        self.spec = generator.spec

    def labels(self, *args: Any, **options: Any) -> npt.NDArray[np.int64] | None:
        """As `ImageGenerator.labels`."""
        return self._generator.labels(*args, **options)

    def batches(self, n: int, *, labels: Labels | None = None, seed: int = 0, batch_size: int = 64) -> Iterator[Images]:
        """Images 0 .. n - 1 of a seed, batch by batch; for the first process."""
        told = self._generator.labels(n, seed) if labels is None else np.asarray(labels)
        with told_as_lost():
            dist.broadcast(torch.tensor([n, seed, batch_size, told is not None]), 0)
            if told is not None:
                dist.broadcast(torch.from_numpy(np.ascontiguousarray(told, np.int64)), 0)
        yield from self._rounds(n, seed, batch_size, told)

    def help(self) -> None:
        """Draw what falls to this process of one call of the first one's `batches`."""
        asked = torch.zeros(4, dtype=torch.int64)
        with told_as_lost():
            dist.broadcast(asked, 0)
            n, seed, batch_size, has_labels = asked.tolist()
            labels = torch.zeros(n, dtype=torch.int64)
            if has_labels:
                dist.broadcast(labels, 0)
        for _ in self._rounds(n, seed, batch_size, labels.numpy() if has_labels else None):
            pass

    def _rounds(self, n: int, seed: int, batch_size: int, labels: npt.NDArray[np.int64] | None) -> Iterator[Images]:
        """A batch of each process at a time, in order; none on others than the first."""
        group, size = self._processes, self.spec.resolution
        for first in range(0, n, batch_size * group.world):
            starts = range(first, min(first + batch_size * group.world, n), batch_size)
            drawn = torch.zeros(batch_size, self.spec.channels, size, size, dtype=torch.uint8)
            if group.rank < len(starts):
                rows = list(range(starts[group.rank], min(starts[group.rank] + batch_size, n)))
                images = self._generator.at(rows, labels=None if labels is None else labels[rows], seed=seed)
                drawn[: len(rows)] = torch.from_numpy(images).permute(0, 3, 1, 2)
            received = [torch.empty_like(drawn) for _ in range(group.world)] if group.is_first else None
            with told_as_lost():
                dist.gather(drawn, received)
            for start, batch in zip(starts, received or (), strict=False):
                # Laid out as `to_uint8` does: convolutions of grey pictures round by it.
                yield batch[: min(batch_size, n - start)].permute(0, 2, 3, 1).contiguous().numpy()
