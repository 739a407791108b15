"""What is known of many pictures, without an object for each: texts and checksums in arrays, places in a file."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from imagewright import limits
from imagewright.data.pixels import BadPicture
from imagewright.data.remote import RemoteFile, is_url
from imagewright.files import open_regular
from imagewright.types import UserError

Bytes = npt.NDArray[np.uint8]
Whole = npt.NDArray[np.int64]
OPEN = 256
"""Containers that are open at a time."""
RAW = 255
"""Method of a file that lies in its container as it is, at its own offset (a tar's)."""
_SEEN = 512
"""Bytes of a zip's local header, name and extra field that are read along with a file."""


class _Packed(Sequence[Any]):
    """A sequence of equal content equals it, as tuples do."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class Texts(_Packed):
    """N texts as one array of bytes (UTF-8, stray bytes kept) and their ends [N]."""

    def __init__(self, content: Bytes, ends: Whole) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Pack texts."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8).copy(), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        i = range(len(self))[at]
        start = int(self.ends[i - 1]) if i else 0
        return self.content[start : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")

    def pick(self, rows: Whole) -> Texts:
        """Those at `rows`."""
        starts = np.concatenate([[0], self.ends[:-1]])[rows]
        lengths = self.ends[rows] - starts
        ends = np.cumsum(lengths)
        places = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return Texts(self.content[places], ends)


class Digests(_Packed):
    """N checksums, uint8 [N, 32]."""

    def __init__(self, array: Bytes) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[bytes, ...]: ...
    def __getitem__(self, at: int | slice) -> bytes | tuple[bytes, ...]:
        return tuple(map(bytes, self.array[at])) if isinstance(at, slice) else self.array[at].tobytes()

    def pick(self, rows: Whole) -> Digests:
        """Those at `rows`."""
        return Digests(self.array[rows])


@dataclass(frozen=True, eq=False)
class Places:
    """Files inside containers, by number: read at their offsets by any thread or process, without a directory.

    files: paths or URLs of the containers. shards: which one, of each picture. offsets: of a zip's local header, or of
    a tar's content. stored, sizes: bytes as they lie there, and unpacked. methods: 0 stored, 8 deflated (zips), or RAW.
    """

    files: tuple[str, ...]
    shards: Whole
    offsets: Whole
    stored: Whole
    sizes: Whole
    methods: Bytes

    def __len__(self) -> int:
        return len(self.offsets)

    def pick(self, rows: Whole) -> Places:
        """Those at `rows`."""
        shards, offsets, stored, sizes = (c[rows] for c in (self.shards, self.offsets, self.stored, self.sizes))
        return Places(self.files, shards, offsets, stored, sizes, self.methods[rows])

    def __call__(self, row: int) -> bytes:
        """The bytes of a file. Raises BadPicture where they are not to be had."""
        offset, stored, size = int(self.offsets[row]), int(self.stored[row]), int(self.sizes[row])
        method, file = int(self.methods[row]), self._open(int(self.shards[row]))
        if max(stored, size) > limits.PICTURE_BYTES:
            raise BadPicture(f"larger than {limits.PICTURE_BYTES} bytes")
        if method == RAW:
            return _whole(file, offset, stored)
        content = file.at(offset, _SEEN + stored)
        if content[:4] != b"PK\x03\x04":
            raise BadPicture("damaged in the zip: there is no file where its directory says")
        start = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
        packed = content[start : start + stored] if start <= _SEEN else _whole(file, offset + start, stored)
        if len(packed) < stored:
            raise BadPicture("damaged in the zip: it ends too early")
        return packed if method == 0 else _inflated(packed, size)

    @cached_property
    def _open(self) -> Shards:
        return Shards(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}


class Shards:
    """Containers by number, opened when they are first read from; a few at a time stay open."""

    def __init__(self, files: tuple[str, ...]) -> None:
        self._files = files
        self._open = lru_cache(maxsize=OPEN)(self._opened)

    def __call__(self, number: int) -> _File | RemoteFile:
        return self._open(number)

    def _opened(self, number: int) -> _File | RemoteFile:
        where = self._files[number]
        return RemoteFile(where) if is_url(where) else _File(Path(where))


def _whole(file: _File | RemoteFile, offset: int, count: int) -> bytes:
    content = file.at(offset, count)
    if len(content) < count:
        raise BadPicture("the file that holds it ends too early")
    return content


class _File:
    """A file that threads read at any place."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = open_regular(path)
        except UserError as error:
            raise BadPicture(str(error)) from None
        self._lock = threading.Lock()

    def at(self, offset: int, count: int) -> bytes:
        try:
            if hasattr(os, "pread"):
                return os.pread(self._file.fileno(), count, offset)
            with self._lock:
                self._file.seek(offset)
                return self._file.read(count)
        except OSError as error:
            raise BadPicture(f"cannot be read: {error.strerror or error}") from None


def _inflated(packed: bytes, size: int) -> bytes:
    try:
        whole = zlib.decompressobj(-15).decompress(packed, size + 1)
    except zlib.error as error:
        raise BadPicture(f"damaged in the zip: {error}") from None
    if len(whole) != size:
        raise BadPicture("damaged in the zip: it has another size than its directory says")
    return whole
