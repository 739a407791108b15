"""Whether this is one of several processes, and how one of them ends."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def is_alone() -> bool:
    """Whether torchrun has started no other process beside this one (WORLD_SIZE, which may be absent or empty)."""
    return os.environ.get("WORLD_SIZE", "").strip() in ("", "1")


def run_and_leave(run: Callable[[], object]) -> NoReturn:
    """Run a program, and end this process with its exit code, without taking Python down first.

    torch's threads of connections (gloo) outlive `destroy_process_group` wherever torch itself still knows the group.
    One that lets go of a tensor needs Python's lock for that; while Python is being taken down it is ended for asking,
    and the process aborts ("terminate called without an active exception") after all its work is done and written.
    """
    code: object = 1
    try:
        run()
        code = 0
    except SystemExit as leaving:
        code = 0 if leaving.code is None else leaving.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if not isinstance(code, int):  # a text is told, as Python does
        os.write(2, f"{code}\n".encode())
        code = 1
    with suppress(BaseException):  # what is told at the end of any program: decoding workers stop here
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
