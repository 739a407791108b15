"""Writing files so that nothing half-written ever replaces a whole one, and reading them with a clear complaint.

What a writer that was killed left aside (`.NAME.xxxxxxxx.partial`) is removed when the same file is written again. A
writer holds what it writes aside locked, so that what is removed is nobody's.

Reading: only regular files, of a bounded size; links are followed to one. A FIFO, a socket or a device is refused, and
never waited for. Writing: nothing but a regular file is ever replaced; a link to a folder is followed.
"""

from __future__ import annotations

import glob
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from safetensors import SafetensorError

from imagewright import limits
from imagewright.shapes import brief, misfit
from imagewright.types import UserError

try:
    import fcntl
except ImportError:  # not on every system; what was left aside then stays
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_OURS = (".partial", ".lock")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a link"),
)


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a path aside to write to; on success it is flushed to disk and renamed over `path`, else removed.

    flush: False for one of many files that can be made again: the system writes it when it likes, and after a power
    failure (not after a kill) it may be empty.
    Raises UserError naming the file where it cannot be written: a full disk, a read-only folder, a file in the way.
    """
    with told_as_unwritable(path):
        require_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, handle = _beside(path)
    try:
        with told_as_unwritable(path):
            yield aside
            _finish(aside, path, flush)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _beside(path: Path) -> tuple[Path, int]:
    """A new empty file, which is locked as long as the handle is open."""
    _remove_left(path)
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        if _locked(handle) is not False and os.path.exists(name):
            return Path(name), handle
        os.close(handle)  # another writer took it for left, before it was locked


def _locked(handle: int) -> bool | None:
    """Whether the file is locked now; False: another has it; None: there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_left(path: Path) -> None:
    """Remove what killed writers of this very file left aside."""
    for name in _left_in(path.parent.absolute()).pop(path.name, ()):
        with suppress(OSError):
            handle = os.open(name, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if _locked(handle):
                    os.unlink(name)
            finally:
                os.close(handle)


@cache
def _left_in(folder: Path) -> dict[str, list[str]]:
    """What lies aside in a folder, by the name of what it was to be; looked up once, as a folder may hold millions."""
    found: dict[str, list[str]] = {}
    for name in glob.glob(".*.????????.partial", root_dir=folder, include_hidden=True):
        found.setdefault(name[1 : -len(".xxxxxxxx.partial")], []).append(os.path.join(folder, name))
    return found


def _finish(aside: Path, path: Path, flush: bool) -> None:
    if flush:
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    aside.chmod(0o666 & ~umask)
    aside.replace(path)


@contextmanager
def told_as_unwritable(path: Path) -> Iterator[None]:
    """Turn what the system says about `path`, its folders, or no file, into a UserError; other files' errors pass."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    except OSError as error:
        name = None if error.filename is None else os.fsdecode(error.filename)
        if name is not None and not name.endswith(_OURS) and Path(name) not in (path, *path.parents):
            raise
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is in the way" if in_the_way else error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}") from None


def require_replaceable(path: Path) -> None:
    """Raise UserError where something stands at `path` that a new file must not take the place of."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):  # nothing is there, or it cannot be looked at: then writing will say why
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is {_kind(mode)}, which is never replaced by a file; choose another place")


def try_output(path: Path) -> None:
    """Raise UserError where neither a file nor a folder can be made at `path`, before the work whose result it holds.

    Leaves nothing behind: what is tried is the nearest folder above that is there.
    """
    if not path.is_dir():
        require_replaceable(path)
    place = path if path.is_dir() else path.parent
    with told_as_unwritable(path):
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError
        aside, handle = _beside(place / path.name)
        try:
            os.write(handle, b"x")
        finally:
            os.close(handle)
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may hold bytes that are no text


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; non-finite numbers are refused, as no other reader takes them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


# --- reading --------------------------------------------------------------------------------------------------------


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "something else")


def open_regular(path: Path) -> BinaryIO:
    """A regular file, or what a link to one leads to, opened for reading.

    Raises UserError where it is missing, cannot be read or is anything else; never waits for a writer.
    """
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening alone can move a tape
        if stat.S_ISREG(mode):
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            file = os.fdopen(handle, "rb")
            mode = os.fstat(handle).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raise UserError(f"{path} is {_kind(mode)}, not a file")


def require_regular(path: Path) -> int:
    """The size in bytes of a file that others open; raises UserError as `open_regular` does."""
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def read_bytes(path: Path, most: int = limits.RECORD) -> bytes:
    """A whole regular file of at most so many bytes; raises UserError for another."""
    with open_regular(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > most:
        raise UserError(f"{path} is larger than {most} bytes, the most that such a file may have")
    return content


@overload
def read_json(path: Path, *, most: int = limits.RECORD) -> Any: ...
@overload
def read_json(path: Path, shape: type[T], *, most: int = limits.RECORD) -> T: ...
def read_json(path: Path, shape: Any = Any, *, most: int = limits.RECORD) -> Any:
    """Read JSON of a shape (`shapes`); raises UserError naming the file when it is missing, damaged or another."""
    return parse_json(read_bytes(path, most), str(path), shape)


def read_formatted(path: Path, form: str, shape: type[T], most: int = limits.RECORD) -> T:
    """JSON of ours of one format, whose name it carries under "format"; raises UserError as `read_json` does."""
    return of_format(read_json(path, most=most), str(path), form, shape)


def of_format(value: Any, where: str, form: str, shape: type[T]) -> T:
    """The value, if it is of a format and shape; raises UserError beginning with `where` for another."""
    found = value.get("format") if isinstance(value, dict) else None
    if found != form:
        said = (
            found if found is None and isinstance(value, dict) else brief(found if isinstance(value, dict) else value)
        )
        raise UserError(f"{where} has format {said}; this version reads {form!r}")
    fault = misfit(value, shape)
    if fault is not None:
        raise UserError(f"{where} is damaged: {fault}")
    whole: T = value
    return whole


@overload
def parse_json(content: bytes | str, where: str) -> Any: ...
@overload
def parse_json(content: bytes | str, where: str, shape: type[T]) -> T: ...
def parse_json(content: bytes | str, where: str, shape: Any = Any) -> Any:
    """JSON of a shape; numbers are finite, values few and not deep in each other (`limits`).

    Raises UserError beginning with `where`.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        opened = text.count("[") + text.count("{")
        if opened > limits.CONTAINERS or opened + text.count(",") > limits.VALUES:
            raise ValueError("it holds too many values")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise UserError(f"{where} is not readable as JSON: it is nested too deep") from None
    except ValueError as error:  # of the encoding, of the JSON, of a number
        raise UserError(f"{where} is not readable as JSON: {error}") from None
    if _too_deep(value):
        raise UserError(f"{where} is not readable as JSON: it is nested over {limits.DEPTH} deep")
    fault = misfit(value, shape)
    if fault is not None:
        raise UserError(f"{where} is damaged: {fault}")
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _no_number(text[:20])


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(limits.DEPTH + 1):
        level = [
            child
            for each in level
            if isinstance(each, (dict, list))
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
