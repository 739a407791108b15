"""Sets that come as batches of raw pixels: CIFAR-10, CIFAR-100 and downsampled ImageNet, as their authors publish them.

Source   Krizhevsky 2009 (python and binary versions of CIFAR); Chrabaszcz et al. 2017 (1707.08819):
         `train_data_batch_1` ... `val_data`, pickled or as npz. Rows are planes of red, green and blue, line by line.
Inside   the files lie in a folder, a tar or tar.gz, or a zip, also one folder deeper; nothing is unpacked or executed.
         Labels of downsampled ImageNet are 1 .. 1000 on disk, in the order of the challenge's development kit, and
         0 .. 999 here, in the same order: `clsloc` says of which class.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from imagewright import limits
from imagewright.arrays import read_npz_file
from imagewright.data.archive import few_folders
from imagewright.data.clsloc import CLSLOC
from imagewright.data.image_set import ImageSet, digest
from imagewright.data.numpy_pickle import read_arrays
from imagewright.data.pixels import Pixels, box_reduce, with_channels
from imagewright.files import open_regular
from imagewright.types import DataSpec, UserError

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Format:
    """A published set: which files are batches, those of its names of classes, and how a batch is read.

    names: by file, of its names of classes. needs: one of these must be there, where the batches' names say little.
    """

    title: str
    batch: re.Pattern[str]
    names: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    labels: str = "labels"
    first_label: int = 0
    bytes_before: int = 0
    classes: int = 10


_FORMATS = (
    _Format("CIFAR-10", re.compile(r"data_batch_\d+|test_batch"), ("batches.meta",)),
    _Format("CIFAR-10, binary", re.compile(r"(data_batch_\d+|test_batch)\.bin"), ("batches.meta.txt",), bytes_before=1),
    _Format("CIFAR-100", re.compile("train|test"), ("meta",), ("meta",), labels="fine_labels", classes=100),
    _Format(
        "CIFAR-100, binary",
        re.compile(r"(train|test)\.bin"),
        ("fine_label_names.txt",),
        ("fine_label_names.txt",),
        bytes_before=2,
        classes=100,
    ),
    _Format(
        "downsampled ImageNet", re.compile(r"(train_data_batch_\d+|val_data)(\.npz)?"), first_label=1, classes=1000
    ),
)


_FIRST = 64
"""Members of a tar among which a set of batches shows itself; one of pictures is not gone through."""


@dataclass(frozen=True)
class _Files:
    """The files of a folder, tar or zip by their last name, each opened when asked for; or one batch alone."""

    path: Path
    open: Mapping[str, Callable[[], Any]]


def open_batches(path: Path, *, resolution: int | None, channels: int | None, labels: bool) -> ImageSet | None:
    """All splits of a set of batches; None where `path` holds none.

    Sets above `limits.KEPT` are read a batch at a time: well for a conversion, badly for a training.
    Raises UserError where a batch is damaged, or `resolution` does not divide its size.
    """
    found = next(_candidates(path), None)
    if found is None:
        return None
    form, files = found
    names = sorted((n for n in files.open if form.batch.fullmatch(n)), key=_natural)
    names.sort(key=lambda name: ("train", "val", "test").index(_split(name)))
    counts: list[int] = []
    index: list[Labels] = []
    digests: list[bytes] = []
    side = 0
    kept: list[Pixels] | None = []
    for name in names:
        pixels, known = _read_batch(files, name, form)
        side = side or pixels.shape[1]
        if pixels.shape[1] != side:
            raise UserError(f"{path}: {name} has pictures of {pixels.shape[1]}, the others of {side}")
        if resolution is not None and side % resolution:
            raise UserError(f"resolution is {resolution}; the pictures of {path} have {side}, which it must divide")
        pixels = _shaped(pixels, resolution, channels)
        counts.append(len(pixels))
        index.append(known)
        digests += map(digest, pixels)
        if kept is not None:
            kept.append(pixels)
            kept = kept if sum(p.nbytes for p in kept) <= limits.KEPT else None
    classes = _class_names(files, form)
    spec = DataSpec(
        name=path.resolve().name.split(".")[0],
        resolution=resolution or side,
        channels=channels or 3,
        num_classes=form.classes if labels else 0,
        class_names=classes if labels and len(classes) == form.classes else (),
    )
    return ImageSet(
        spec=spec,
        pixels=np.concatenate(kept) if kept is not None else _Reader(files, form, names, counts, resolution, channels),
        labels=np.concatenate(index) if labels else np.full(sum(counts), -1, np.int64),
        names=tuple(f"{name}:{i}" for name, count in zip(names, counts, strict=True) for i in range(count)),
        source=f"{path} ({form.title})",
        digests=tuple(digests),
        splits=tuple(_split(name) for name, count in zip(names, counts, strict=True) for _ in range(count)),
        made=None if resolution in (None, side) else f"box means of {side}x{side}",
    )


def _shaped(pixels: Pixels, resolution: int | None, channels: int | None) -> Pixels:
    return with_channels(box_reduce(pixels, resolution or pixels.shape[1]), channels or 3)


def _natural(name: str) -> tuple[str, int]:
    digits = re.search(r"\d+", name)
    return (re.sub(r"\d+", "", name), int(digits[0]) if digits else 0)


def _split(name: str) -> str:
    return "val" if name.startswith("val") else "test" if name.startswith("test") else "train"


# --- files ----------------------------------------------------------------------------------------------------------


def _candidates(path: Path) -> Iterator[tuple[_Format, _Files]]:
    files = _files(path)
    for form in _FORMATS if files is not None else ():
        assert files is not None
        if all(n in files.open for n in form.needs) and any(form.batch.fullmatch(n) for n in files.open):
            yield form, files


def _files(path: Path) -> _Files | None:
    if path.is_dir():
        places = (path, *few_folders(path))
        inner = [Path(e.path) for place in places for e in os.scandir(place) if _ours(e.name) and e.is_file()]
        return _Files(path, {file.name: partial(open_regular, file) for file in inner})
    if any(form.batch.fullmatch(path.name) for form in _FORMATS) and path.is_file():
        return _Files(path.parent, {path.name: partial(open_regular, path)})
    if re.search(r"\.(tar|tgz|tar\.gz)$", path.name) and path.is_file():
        return _Files(path, _tar(path))
    if path.suffix == ".zip" and path.is_file():
        return _zip(path)
    return None


def _ours(name: str) -> bool:
    """Whether a file of this name is a batch of some set, or tells of its classes."""
    return any(name in (*form.names, *form.needs) or form.batch.fullmatch(name) for form in _FORMATS)


def _tar(path: Path) -> dict[str, Callable[[], Any]]:
    """The regular files of a tar, or tar.gz, that are batches or name classes, in memory."""
    found: dict[str, bytes] = {}
    try:
        with open_regular(path) as raw:
            size = raw.seek(0, 2)
            raw.seek(0)
            left = max(limits.UNPACKED, limits.RATIO * size)
            with tarfile.open(fileobj=raw) as archive:
                for count, member in enumerate(archive):
                    if count >= _FIRST and not found:
                        return {}
                    left -= member.size
                    if left < 0:
                        raise UserError(f"{path} would unpack to over {limits.RATIO} times its size")
                    name = PurePosixPath(member.name).name
                    if member.isreg() and _ours(name):
                        file = archive.extractfile(member)
                        found[name] = file.read() if file is not None else b""
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if not found:  # another reader says what is wrong with it
            return {}
        raise UserError(f"{path} is no readable tar: {error}") from None
    return {name: partial(io.BytesIO, content) for name, content in found.items()}


def _zip(path: Path) -> _Files | None:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = file.seek(0, 2)
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None  # what is wrong with it is said where zips of pictures are opened

    def opened(entry: zipfile.ZipInfo) -> io.BytesIO:
        if entry.file_size > max(limits.UNPACKED, limits.RATIO * size):
            raise UserError(f"{path} would unpack to {entry.file_size} bytes, over {limits.RATIO} times its size")
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                return io.BytesIO(archive.read(entry))
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError) as error:
            raise UserError(f"{path}: {entry.filename} cannot be read: {error}") from None

    return _Files(path, {PurePosixPath(e.filename).name: partial(opened, e) for e in entries if not e.is_dir()})


# --- one batch ------------------------------------------------------------------------------------------------------


def _read_batch(files: _Files, name: str, form: _Format) -> tuple[Pixels, Labels]:
    """Pixels uint8 [n, H, H, 3] and labels int64 [n] from 0."""
    where = files.path / name
    data: Any
    known: Any
    with files.open[name]() as file:
        if form.bytes_before:
            rows: Pixels = np.frombuffer(file.read(), np.uint8)
            width = form.bytes_before + 3 * 32 * 32
            if len(rows) % width or not len(rows):
                raise UserError(f"{where} has {len(rows)} bytes, no whole number of records of {width}")
            rows = rows.reshape(-1, width)
            data, known = rows[:, form.bytes_before :], rows[:, form.bytes_before - 1]
        else:
            entries = (
                read_npz_file(where, file, ("data", "labels")) if name.endswith(".npz") else read_arrays(where, file)
            )
            data, known = entries.get("data"), entries.get(form.labels)
    side = 0 if not isinstance(data, np.ndarray) or data.ndim != 2 else round((data.shape[1] / 3) ** 0.5)
    if not side or data.dtype != np.uint8 or data.shape[1] != 3 * side**2:
        raise UserError(f"{where} holds no pictures: `data` must be uint8 [N, 3 H H]")
    numbers = np.asarray(known)
    if numbers.shape != (len(data),) or numbers.dtype.kind not in "iu":
        raise UserError(f"{where} must have {len(data)} whole numbers under {form.labels!r}")
    labels: Labels = numbers.astype(np.int64) - form.first_label
    if len(labels) and not (labels.min() >= 0 and labels.max() < form.classes):
        last = form.first_label + form.classes - 1
        raise UserError(f"{where}: labels must lie in {form.first_label} .. {last}")
    return np.ascontiguousarray(data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)), labels


def _class_names(files: _Files, form: _Format) -> tuple[str, ...]:
    if form.title == "downsampled ImageNet":
        return CLSLOC
    name = next((n for n in form.names if n in files.open), None)
    if name is None:
        return ()
    with files.open[name]() as file:
        if name.endswith(".txt"):
            return tuple(line.strip() for line in file.read().decode("utf-8", "replace").split("\n") if line.strip())
        entries = read_arrays(files.path / name, file)
    found = entries.get("label_names", entries.get("fine_label_names", ()))
    return tuple(map(str, found)) if isinstance(found, list) else ()


class _Reader:
    """Pictures of a set that does not fit in memory, a batch at a time; the last one stays."""

    def __init__(
        self,
        files: _Files,
        form: _Format,
        names: list[str],
        counts: list[int],
        resolution: int | None,
        channels: int | None,
    ) -> None:
        self._ends = np.cumsum(counts)
        self._batch = lru_cache(maxsize=1)(
            lambda k: _shaped(_read_batch(files, names[k], form)[0], resolution, channels)
        )

    def __call__(self, rows: npt.NDArray[np.int64]) -> Pixels:
        which = np.searchsorted(self._ends, rows, side="right")
        parts = []
        for k in np.unique(which).tolist():
            first = self._ends[k - 1] if k else 0
            parts.append(self._batch(k)[rows[which == k] - first])
        order = np.argsort(which, kind="stable")
        out = np.empty((len(rows), *parts[0].shape[1:]), np.uint8)
        out[order] = np.concatenate(parts)
        return out
