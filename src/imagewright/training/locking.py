"""A run is trained by one command at a time: its folder is locked while it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from imagewright.files import told_as_unwritable
from imagewright.locks import alone
from imagewright.training.distributed import Processes
from imagewright.types import UserError

LOCK = ".training.lock"


@contextmanager
def sole_trainer(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold a run's folder, made where it is missing; the first of several processes holds it for all.

    Raises UserError, in all of them, where another command holds it. A folder that stays empty is removed again.
    """
    with ExitStack() as held:
        busy = False
        if processes.is_first:
            missing = [place for place in (folder, *folder.parents) if not place.exists()]
            held.callback(_remove_empty, missing)
            with told_as_unwritable(folder):
                folder.mkdir(parents=True, exist_ok=True)
            busy = held.enter_context(alone(folder / LOCK)) == "busy"
        if processes.any(busy):
            raise UserError(f"{folder} is being trained by another command; wait until that ends, or stop it")
        yield


def require_there(folder: Path) -> None:
    """Raise UserError where a run's folder was removed under it: nothing is written into another of its name."""
    if not (folder / "experiment.json").exists():
        raise UserError(f"{folder} is gone, or its experiment.json is: it was removed or moved while it was trained")


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
