"""Sets in tar files: one, or shards of a set as webdataset writes them, on a disk or in an object store.

Read at random by where each file lies, which is found once (`index`), instead of as a stream through a buffer: the
order of training stays a function of seed and position alone, over any number of processes, and a run that is resumed
in mid-shard goes on at the very next picture. The price is one read for each picture, which a disk or store answers
many at a time.
Samples   a picture's name up to the first dot of its last part; beside it may lie NAME.cls, its class (a whole number),
          and NAME.txt, its caption. Without .cls one tar has the classes of its folders or dataset.json, shards none.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagewright import limits
from imagewright.data.annotations import LARGEST_LABEL, Annotations, annotate
from imagewright.data.archive import Archive, plain_name, sorted_out
from imagewright.data.packed import RAW, Places, Shards
from imagewright.data.pixels import BadPicture
from imagewright.data.remote import expanded, is_url, open_container
from imagewright.types import UserError

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TEXT = 1 << 16
"""Bytes of a class or caption."""


class Place(NamedTuple):
    """Where a file lies: which tar, from which byte, how many."""

    shard: int
    offset: int
    size: int


class TarReader:
    """The bytes of the files of tars by name; of two files of one name neither counts."""

    def __init__(self, files: tuple[str, ...], table: dict[str, list[Place]]) -> None:
        self._files, self.table = files, table
        self._shards = Shards(files)

    def places(self, names: Sequence[str]) -> Places:
        """Where files lie."""
        numbers = np.array([self.table[name][0] for name in names], np.int64).reshape(-1, 3)
        shards, offsets, sizes = np.ascontiguousarray(numbers.T)
        return Places(self._files, shards, offsets, sizes, sizes, np.full(len(sizes), RAW, np.uint8))

    def __call__(self, name: str) -> bytes:
        if len(self.table[name]) > 1:
            raise BadPicture(f"the tar holds {len(self.table[name])} files of this name")
        place = self.table[name][0]
        if place.size > limits.PICTURE_BYTES:
            raise BadPicture(f"larger than {limits.PICTURE_BYTES} bytes")
        content = self._shards(place.shard).at(place.offset, place.size)
        if len(content) < place.size:
            raise BadPicture("the file that holds it ends too early")
        return content


def tar_files(source: str | Path) -> tuple[str, ...]:
    """The tars that a source stands for: itself, the *.tar in a folder, or those of a URL with *. Raises UserError."""
    text = str(source)
    if text.lower().endswith(_PACKED):
        raise UserError(f"{source} is a compressed tar, in which no picture can be found alone; unpack it to .tar")
    if is_url(source):
        return tuple(expanded(text)) if text.endswith(".tar") else ()
    path = Path(source)
    if path.is_dir():
        return tuple(map(str, sorted(path.glob("*.tar"))))
    return (text,) if path.suffix.lower() == ".tar" and path.is_file() else ()


def open_tar(source: str | Path, *, labels: bool) -> tuple[Archive, Annotations] | None:
    """The files of tars as an archive, and what is known of its pictures; None where the source is no tar.

    Raises UserError where a tar is damaged, or a folder holds pictures beside tars.
    """
    files = tar_files(source)
    if not files:
        return None
    table: dict[str, list[Place]] = {}
    for shard, file in enumerate(files):
        prefix = f"{Path(file).name}/" if len(files) > 1 else ""
        for name, place in _listed(file, shard):
            table.setdefault(prefix + name, []).append(place)
    folders = {name.rpartition("/")[0] for name in table} - {""}
    archive = sorted_out(Path(source), list(table), folders, TarReader(files, table))
    known = _from_samples(archive, labels)
    if known is None:
        known = annotate(archive, labels=labels) if len(files) == 1 else Annotations()
    return archive, known


def _listed(file: str, shard: int) -> list[tuple[str, Place]]:
    """The regular files of one tar, of which only the headers are read."""
    found = []
    try:
        with open_container(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for entry in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all
                if entry.isreg() and not entry.issparse():
                    found.append((plain_name(entry.name), Place(shard, entry.offset_data, entry.size)))
    except UserError:
        raise
    except Exception as error:  # a damaged header raises tarfile's errors, but also value and unicode errors
        raise UserError(f"{file} is no readable tar: {error}") from None
    return found


def _from_samples(archive: Archive, labels: bool) -> Annotations | None:
    """Classes and captions that lie beside the pictures; None where there are none."""
    pictures = {_sample(name): name for name in archive.pictures}
    beside = sorted(name for name in archive.others if _sample(name) in pictures)
    classes, captions = ([name for name in beside if name.endswith(kind)] for kind in (".cls", ".txt"))
    if not classes and not captions:
        return None
    out = Annotations(labels={} if labels and classes else None)
    for name in captions:
        out.texts["name"][pictures[_sample(name)]] = _text(archive, name)
    if out.labels is None:
        return out
    for name in classes:
        written, picture = _text(archive, name).strip(), pictures[_sample(name)]
        if written.isascii() and written.isdigit() and int(written) <= LARGEST_LABEL:
            out.labels[picture] = int(written)
        else:
            out.bad.append(
                (picture, f"its class is {written[:20]!r}; it must be a whole number from 0 to {LARGEST_LABEL}")
            )
    named = {name for name, _ in out.bad}
    out.bad += [(n, "has no .cls beside it") for n in archive.pictures if n not in out.labels and n not in named]
    out.num_classes = max(out.labels.values(), default=-1) + 1
    return out


def _sample(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _text(archive: Archive, name: str) -> str:
    try:
        content = archive.read(name)
    except BadPicture as finding:
        raise UserError(f"{archive.path}: {name} cannot be read: {finding}") from None
    if len(content) > min(_TEXT, limits.LABELS):
        raise UserError(f"{archive.path}: {name} is larger than {_TEXT} bytes")
    return content.decode("utf-8", "replace")
