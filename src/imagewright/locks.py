"""One process at a time. A lock goes with the process that holds it, however that ends: none is ever stale."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, SoftFileLock, Timeout

from imagewright.files import require_replaceable, told_as_unwritable

Lock = Literal["held", "busy", "none"]
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[Lock]:
    """Whether this process may do what the lock file `path` stands for; none = the system has no locks, and it may.

    The file is removed by who held it. wait: until another has let go of it.
    """
    require_replaceable(path)
    lock = FileLock(path, timeout=-1 if wait else 0)
    state: Lock = "none"
    try:
        lock.acquire()
        state = "held"
    except Timeout:
        state = "busy"
    except OSError as fault:
        if fault.errno not in NO_LOCKS:
            raise
    try:
        yield state
    finally:
        if state == "held":
            if not isinstance(lock, SoftFileLock):  # which removes its file itself
                with suppress(OSError):
                    path.unlink()  # while it is ours: who waits for it sees that it is gone, and asks again
            lock.release()


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Be the only one who reads, changes and writes a file, so that no change by another is lost; waits for the others.

    Raises UserError where nothing can be written beside it.
    """
    with told_as_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f".{path.name}.lock"), wait=True):
            yield
