"""Writing files so that nothing half-written ever replaces a whole one, and reading JSON with a clear complaint."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from imagewright.types import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path aside to write to; on success it is flushed to disk and renamed over `path`, else removed.

    Raises UserError naming the file where it cannot be written: a full disk, a read-only folder, a file in the way.
    """
    with told_as_unwritable(path):
        aside = _beside(path)
    try:
        with told_as_unwritable(path):
            yield aside
            _finish(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    return Path(name)


def _finish(aside: Path, path: Path) -> None:
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
        if name is not None and not name.endswith(".partial") and Path(name) not in (path, *path.parents):
            raise
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is in the way" if in_the_way else error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}") from None


def try_output(path: Path) -> None:
    """Raise UserError where neither a file nor a folder can be made at `path`, before the work whose result it holds.

    Leaves nothing behind: what is tried is the nearest folder above that is there.
    """
    place = path if path.is_dir() else path.parent
    with told_as_unwritable(path):
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError
        handle, name = tempfile.mkstemp(suffix=".partial", dir=place)
        try:
            os.write(handle, b"x")
        finally:
            os.close(handle)
            os.unlink(name)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; non-finite numbers are refused, as no other reader takes them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises UserError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from None
