"""Containers that lie in an object store: a URL (s3://, gs://, https://, ...) is read in ranges through fsspec.

fsspec comes with torch; what speaks to a store is a package of its own (s3fs, gcsfs, aiohttp), whose absence is told.
Nothing is fetched but what is asked for, and only where the user names a URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from imagewright.data.pixels import BadPicture
from imagewright.files import open_regular
from imagewright.types import UserError

_TIMES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5Hash")
"""What stores call that which changes with a file's content."""


def is_url(source: object) -> bool:
    """Whether a source is a URL and no path."""
    return isinstance(source, str) and "://" in source


@contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has its own
        raise UserError(f"{url} cannot be read: {error or type(error).__name__}") from None


def _store(url: str) -> tuple[Any, str]:
    import fsspec  # only where a URL is named

    with _told(url):
        fs, path = fsspec.core.url_to_fs(url)
        return fs, path


def expanded(url: str) -> list[str]:
    """The URLs that one with * or ? stands for, in order; itself where it has none. Raises UserError where none is."""
    if not any(sign in url for sign in "*?["):
        return [url]
    fs, path = _store(url)
    with _told(url):
        found = sorted(fs.glob(path))
    if not found:
        raise UserError(f"{url} stands for no file")
    return [fs.unstrip_protocol(each) for each in found]


def stamp(url: str) -> str | None:
    """What changes with the content of a URL's file; None where its store does not say."""
    fs, path = _store(url)
    with _told(url):
        info = fs.info(path)
    known = [f"{name}={info[name]}" for name in _TIMES if info.get(name)]
    return f"{info.get('size')} {known}" if known else None


def open_container(where: str) -> BinaryIO:
    """A file by its path or URL, to read and seek in. Raises UserError where there is none."""
    if not is_url(where):
        return open_regular(Path(where))
    fs, path = _store(where)
    with _told(where):
        return cast(BinaryIO, fs.open(path, "rb"))


class RemoteFile:
    """A URL's file that threads read at any place."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._path = _store(url)
        except UserError as error:
            raise BadPicture(str(error)) from None

    def at(self, offset: int, count: int) -> bytes:
        """So many bytes, or as many as there are."""
        try:
            return bytes(self._fs.cat_file(self._path, start=offset, end=offset + count))
        except Exception as error:  # each store has its own
            raise BadPicture(f"cannot be read: {error or type(error).__name__}") from None
