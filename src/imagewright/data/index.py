"""What opening a set found, kept so that it is found once: names, labels, checksums, and where each picture lies.

Kept in the user's cache (`cache`), an entry for each set and way to open it; nothing is written beside the pictures, so
that read-only sets have one as well. Some 80 bytes and the name of each picture, mapped into memory rather than read.
Valid     while no file's size, time of change of its content (mtime) or of its state (ctime, which no program can set)
          differs. A set that changed within the last `SETTLED` seconds is not kept: a clock may not tell two changes.
Checked   each picture that is decoded is held against its checksum, so that one that changed in spite of this is an
          error and never passes as another.
Alone     who makes an entry holds a lock; other processes wait for it and then read it, instead of decoding as well.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from imagewright import cache, limits
from imagewright.data import remote
from imagewright.data.archive import Archive, FileReader, open_archive
from imagewright.data.image_set import ImageSet, digest
from imagewright.data.packed import Digests, Places, Texts
from imagewright.data.pixels import BadPicture, Pixels, with_channels
from imagewright.data.reading import Contents, decoded_bytes, mapped_rows
from imagewright.data.remote import is_url
from imagewright.files import parse_json
from imagewright.types import DataSpec, UserError

try:
    import fcntl
except ImportError:  # not on every system; without it two processes may both do the work
    fcntl = None  # type: ignore[assignment]

FORMAT = "imagewright-index/1"
SETTLED = 2.0
_PLACES = ("shards", "offsets", "stored", "sizes", "methods")
_COLUMNS = ("captions", "subgroups", "splits")


class _Record(TypedDict):
    format: str
    stamp: str
    spec: dict[str, Any]
    source: str
    made: str | None
    skipped: list[tuple[str, str]]
    unread: list[str]
    packed: NotRequired[list[str]]


class Entry:
    """What is kept of one set as it is opened one way; `recall` what there is, else `keep` what was found.

    fit: what is done to every picture. how: whatever else what is found depends on.
    """

    def __init__(self, source: str | Path, fit: Any, *how: object) -> None:
        self._path, self._fit = Path(source), fit
        self._place = cache.entry("index", source if is_url(source) else os.path.realpath(source), fit, how)
        self._stamp, newest = _stamp(source) if self._place is not None else (None, 0.0)
        self._settled = newest < time.time() - SETTLED

    def recall(self) -> ImageSet | None:
        """The set, none of whose pictures is decoded yet; None where it has to be opened: then others wait for it."""
        if self._place is None or self._stamp is None or not self._settled:
            return None
        found = self._read()
        if found is None:
            _hold(self, self._place.with_suffix(".lock"))
            found = self._read()
        return found

    def _read(self) -> ImageSet | None:
        kept = cache.recall(self._place)
        if kept is None:
            return None
        tensors, head = kept
        try:
            record: _Record = parse_json(head.texts["index"], "the index", _Record)
            if record["format"] != FORMAT or record["stamp"] != self._stamp:
                return None
            return self._set(record, {name: tensor.numpy() for name, tensor in tensors.items()})
        except (UserError, KeyError, TypeError, ValueError, IndexError):
            return None

    def _set(self, record: _Record, arrays: dict[str, npt.NDArray[Any]]) -> ImageSet:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["spec"].items()}
        spec = DataSpec(**fields)
        texts = {k: Texts(arrays[k], arrays[f"{k}.ends"]) for k in ("names", "files", *_COLUMNS) if k in arrays}
        digests, labels = Digests(arrays["digests"]), arrays["labels"]
        if {len(digests), len(texts["names"])} != {len(labels)}:
            raise ValueError("its arrays have different lengths")
        contents: Contents
        if "packed" in record:
            columns = (arrays[f"places.{name}"] for name in _PLACES)
            contents = Places(tuple(record["packed"]), *columns)
        else:
            contents = _Files(FileReader(self._path), texts["files"])
        reader = Indexed(self._path, contents, texts["names"], self._fit, spec, digests, self._place)
        room = len(labels) * int(np.prod(spec.shape)) <= limits.KEPT
        return ImageSet(
            spec=spec,
            pixels=Keeping(reader, len(labels), spec) if room else reader,
            labels=labels,
            names=texts["names"],
            source=record["source"],
            digests=digests,
            captions=texts.get("captions"),
            subgroups=texts.get("subgroups"),
            splits=texts.get("splits"),
            skipped=tuple((name, reason) for name, reason in record["skipped"]),
            unread=tuple(record["unread"]),
            made=record["made"],
        )

    def keep(self, images: ImageSet, archive: Archive, files: Sequence[str]) -> None:
        """Keep what was found. files: names of the set's pictures in the archive."""
        if self._place is None or self._stamp is None or not self._settled:
            return
        arrays: dict[str, npt.NDArray[Any]] = {"labels": images.labels}
        record: dict[str, Any] = {"format": FORMAT, "stamp": self._stamp, "spec": asdict(images.spec)}
        record |= {name: getattr(images, name) for name in ("source", "made", "skipped", "unread")}
        if isinstance(archive.read, FileReader):
            arrays |= _columns("files", Texts.of(files))
        else:
            places = getattr(archive.read, "places", lambda files: None)(files)
            if places is None:
                return
            record["packed"] = [file if is_url(file) else os.path.abspath(file) for file in places.files]
            arrays |= {f"places.{name}": getattr(places, name) for name in _PLACES}
        for name in ("names", *_COLUMNS):
            column = getattr(images, name)
            if column is not None:
                arrays |= _columns(name, Texts.of(column))
        arrays["digests"] = np.frombuffer(b"".join(images.digests), np.uint8).reshape(-1, 32).copy()
        text = json.dumps(record)
        if len(text) < limits.RECORD:
            cache.keep(self._place, {k: torch.from_numpy(v) for k, v in arrays.items()}, {"index": text})


def _columns(name: str, texts: Texts) -> dict[str, npt.NDArray[Any]]:
    return {name: texts.content, f"{name}.ends": texts.ends}


def _hold(entry: Entry, path: Path) -> None:
    """Wait for the lock of an entry and hold it as long as the object lives; the lock goes with the process."""
    if fcntl is None:
        return
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        weakref.finalize(entry, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # no locks here: two processes may both do the work
        pass


def _stamp(source: str | Path) -> tuple[str | None, float]:
    """What tells whether a set is as it was, and when it last changed; None for what is no folder or regular file."""
    if is_url(source):
        told = [remote.stamp(url) for url in remote.expanded(str(source))]
        return (None if None in told else sha256(repr(told).encode()).hexdigest()), 0.0
    path = Path(source)
    try:
        if path.is_file():
            return _of_files([("", os.stat(path))])
        if not path.is_dir():
            return None, 0.0
        archive = open_archive(path)
        names = [*archive.pictures, *sorted(archive.others), *(name for name, _ in archive.bad)]
        return _of_files([(name, os.stat(path / name)) for name in names])
    except (OSError, UserError, ValueError):  # a broken link, a name that no system takes: opening will say so
        return None, 0.0


def _of_files(found: list[tuple[str, os.stat_result]]) -> tuple[str, float]:
    total = sha256()
    for name, of in found:
        total.update(f"{of.st_size} {of.st_mtime_ns} {of.st_ctime_ns} {of.st_ino} ".encode())
        total.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return total.hexdigest(), max(max(of.st_mtime, of.st_ctime) for _, of in found) if found else 0.0


@dataclass(frozen=True)
class _Files:
    """Files of a folder by number."""

    read: FileReader
    names: Texts

    def __call__(self, row: int) -> bytes:
        return self.read(self.names[row])


@dataclass(frozen=True, eq=False)
class Indexed:
    """Decodes pictures by number: rows [n] -> uint8 [n, H, W, C], each held against its checksum."""

    path: Path
    contents: Contents
    names: Texts
    fit: Any
    spec: DataSpec
    digests: Digests
    place: Path | None

    def __call__(self, indices: npt.NDArray[np.int64]) -> Pixels:
        return mapped_rows(self._one, indices, self.spec)

    def _one(self, row: int) -> Pixels:
        try:
            _, pixels = decoded_bytes(self.contents(row), self.fit)
            pixels = with_channels(pixels, self.spec.channels)
        except BadPicture as finding:
            raise self._changed(f"{self.names[row]} was usable when opened and no longer is: {finding}") from None
        if digest(pixels) != self.digests[row]:
            raise self._changed(f"{self.names[row]} is another picture than when the set was first opened")
        return pixels

    def _changed(self, what: str) -> UserError:
        if self.place is not None:
            self.place.unlink(missing_ok=True)
        return UserError(f"{self.path}: {what}; the set will be read anew when it is next opened")


class Keeping:
    """A reader's pictures, kept when they were decoded once. Other processes are given the reader alone."""

    def __init__(self, read: Indexed, count: int, spec: DataSpec) -> None:
        self._read = read
        self._pixels = np.empty((count, spec.resolution, spec.resolution, spec.channels), np.uint8)
        self._there = np.zeros(count, dtype=np.bool_)

    def __call__(self, indices: npt.NDArray[np.int64]) -> Pixels:
        missing = np.unique(indices[~self._there[indices]])
        if len(missing):
            self._pixels[missing] = self._read(missing)
            self._there[missing] = True
        return self._pixels[indices]

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._read,)


def _itself(read: Indexed) -> Indexed:
    return read
