"""Opening a file under watch: in a process of its own, and what it did besides is told.

Watched are: code that was run, programs started, connections made, files written outside the case's folder, memory,
time, what reached the terminal, and how it ended: well, or with one sentence.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Bytes above what the process began with."""
CPU_SECONDS = 10.0
WALL_SECONDS = 90.0
_ALWAYS = frozenset(
    {
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
        *("pickle.find_class", "socket.connect", "socket.bind", "urllib.Request"),
    }
)
_OF_PATHS = frozenset(
    {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watched(action: Callable[[], Any], folder: Path, cases: int = 1) -> tuple[list[str], bool]:
    """What went wrong while the action ran, in words, and whether it was refused.

    folder: where it may write. cases: how many files it opens.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        _child(action, folder, cases)
    os.close(writing)
    said, late = _collect(reading, child, WALL_SECONDS + 30 * (cases - 1))
    _, status, used = os.wait4(child, 0)
    faults = ["it had to be stopped: it waited"] if late else []
    code = os.waitstatus_to_exitcode(status)
    if not late and code not in (0, 2):
        faults.append(f"it ended with {code}: {said[-600:]!r}")
    if "Traceback" in said:
        faults.append(f"a traceback was shown: {said[-1500:]}")
    if code == 2 and not said.strip():
        faults.append("it was refused without a word")
    obeyed = {c for c in said if not c.isprintable() and c not in "\n\t"}
    if obeyed:
        faults.append(f"the terminal was given {sorted(obeyed)}")
    faults += [line.removeprefix("WATCH ") for line in said.splitlines() if line.startswith("WATCH ")]
    cpu = used.ru_utime + used.ru_stime
    if cpu > CPU_SECONDS * cases:
        faults.append(f"it took {cpu:.1f} s")
    more = used.ru_maxrss * 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if more > MEMORY:
        faults.append(f"it took {more / 2**30:.1f} GiB")
    return faults, code == 2


def _collect(reading: int, child: int, seconds: float) -> tuple[str, bool]:
    said, start = b"", time.monotonic()
    while True:
        left = seconds - (time.monotonic() - start)
        ready, _, _ = select.select([reading], [], [], max(left, 0))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.close(reading)
            return said.decode("utf-8", "surrogateescape"), True
        part = os.read(reading, 1 << 16)
        if not part:
            os.close(reading)
            return said.decode("utf-8", "surrogateescape"), False
        said = (said + part)[-(1 << 20) :]


def _child(action: Callable[[], Any], folder: Path, cases: int) -> None:
    from imagewright.data.reading import use_threads
    from imagewright.types import UserError

    use_threads(2)  # as many pictures are in memory at a time, whatever the machine has
    allowed = os.path.realpath(folder)
    noticed: set[str] = set()

    def outside(path: Any) -> bool:
        if isinstance(path, (bytes, str)):
            real = os.path.realpath(os.fsdecode(path))
            return not real.startswith((allowed + os.sep, "/dev/shm/")) and real != allowed
        return False

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event in _ALWAYS:
            noticed.add(f"WATCH {event} {args[:1]!r}")
        elif event == "open":
            path, _, flags = args
            if flags & _WRITING and path != os.devnull and outside(path):
                noticed.add(f"WATCH it wrote to {path!r}")
        elif event in _OF_PATHS and any(outside(each) for each in args):
            noticed.add(f"WATCH {event} {args!r}")

    code = 0
    try:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (int(3 * CPU_SECONDS) * cases, int(4 * CPU_SECONDS) * cases))
        sys.addaudithook(note)
        action()
    except UserError as error:
        from imagewright.cli.console import printable

        print(f"refused: {printable(str(error))}", file=sys.stderr)
        code = 2
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    for line in sorted(noticed):
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
