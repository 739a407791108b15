"""Checkpoints written beside the training: a run waits for a copy in memory, and not for the disk.

One thread of each process that has something to write. Where networks are sharded every process writes its rows; their
checksums meet (on a group of connections of its own, so that training's are not disturbed), and the first process
writes the file that makes them a checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from imagewright.gathering import told_as_lost
from imagewright.training.checkpoint import Snapshot, State, prune
from imagewright.training.distributed import Processes
from imagewright.types import UserError

WAITS = timedelta(hours=2)
"""How long a process waits for the slowest to write its rows."""


class Saver:
    """The checkpoints of a run. shares: whether every process has rows to write."""

    def __init__(self, processes: Processes, keep: int, run: str | None, *, shares: bool) -> None:
        self._processes, self._keep, self._run, self._shares = processes, keep, run, shares
        self._group: Any = dist.new_group(backend="gloo", timeout=WAITS) if shares else None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def begin(self, path: Path, state: Callable[[], State]) -> None:
        """Copy the state, and write it from now on. Raises UserError where the one before was not written."""
        self.finish()
        if not (self._shares or self._processes.is_first):
            return
        snapshot = Snapshot(state())
        self._thread = threading.Thread(target=self._write, args=(path, snapshot), name="checkpoint")
        self._thread.start()

    def look(self) -> None:
        """Raise UserError where a checkpoint could not be written, as far as that is known."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Return when all is on disk. Raises UserError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except BaseException:
            if error is None:  # what was raised first is told
                raise

    def _write(self, path: Path, snapshot: Snapshot) -> None:
        try:
            checksums = self._write_rows(path, snapshot) if self._shares else []
            if self._processes.is_first:
                snapshot.write(path, self._run, checksums)
                prune(path.parent, self._keep, self._processes.world)
        except BaseException as error:  # raised where the run looks
            self._failed = error

    def _write_rows(self, path: Path, snapshot: Snapshot) -> list[str]:
        """Write this process's rows; returns the checksums of all. Raises UserError where one of them failed."""
        place, failed = self._processes, None
        digest = bytes(32)
        try:
            digest = bytes.fromhex(snapshot.write_rows(path, place.rank, place.world))
        except Exception as error:  # the others are told
            failed = error
        mine = torch.tensor([*digest, failed is None], dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(place.world)]
        with told_as_lost():
            dist.all_gather(found, mine, group=self._group)
        if failed is not None:
            raise failed
        lost = [rank for rank, each in enumerate(found) if not each[-1]]
        if lost:
            raise UserError(f"process {lost[0]} could not write its share of {path}")
        return [bytes(each[:-1].tolist()).hex() for each in found]
