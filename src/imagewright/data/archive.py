"""The files of a folder or a zip, by name, without unpacking anything.

Contract: names use "/" and are relative to the folder or the zip; pictures are told by their extension; links to
folders are followed, once around; hidden files, `__MACOSX` and other files (.txt, Thumbs.db) are not read, but named;
what cannot be read is a finding (BadPicture), not a crash.
"""

from __future__ import annotations

import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from imagewright import limits
from imagewright.data.packed import Places
from imagewright.data.pixels import BadPicture
from imagewright.files import open_regular
from imagewright.types import UserError

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".heic", ".heif", ".hif", ".avif"}  # pictures, though refused: a telephone's must not be left out in silence
)
SAMPLES = "samples.json"
BESIDE = frozenset({"grid.png", "trajectory.png"})
"""What `imagewright sample` puts beside its pictures, in the folder of its record SAMPLES: no pictures of the set."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What a folder or a zip holds.

    pictures: names in sorted order. others: names of the other files, and of hidden folders, which end in "/".
    folders:  names of the folders, empty ones too.
    bad:      (name, reason) of what is unusable before it is read; none of it is among `pictures`.
    read:     the bytes of a file; raises BadPicture when they cannot be had.
    """

    path: Path
    pictures: tuple[str, ...]
    others: frozenset[str]
    folders: frozenset[str]
    bad: tuple[tuple[str, str], ...]
    read: Callable[[str], bytes]


def open_archive(path: Path) -> Archive:
    """List a folder or a zip. Raises UserError when there is neither, or the zip's directory is damaged."""
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise UserError(f"{path} does not exist; a data set is a folder, a zip, or one of: digits, emoji64")
        return _open_zip(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def few_folders(path: Path, most: int = 8) -> list[Path]:
    """The folders in a folder, where they are few: a set's container, not its classes, which would all be listed."""
    try:
        found = sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry.name))
    except OSError:
        return []
    return found if len(found) <= most else []


def _open_folder(path: Path) -> Archive:
    names: list[str] = []
    folders: list[str] = []
    bad: list[tuple[str, str]] = []

    def walk(folder: Path, prefix: str, above: tuple[str, ...]) -> None:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            name = prefix + entry.name
            if entry.is_dir():
                if _hidden(entry.name):
                    names.append(f"{name}/")
                elif (real := os.path.realpath(entry.path)) in above:
                    bad.append((name, "a link to a folder that it lies in"))
                else:
                    folders.append(name)
                    walk(Path(entry.path), f"{name}/", (*above, real))
            elif _is_picture(name) and not entry.is_file():
                bad.append((name, "a broken link" if entry.is_symlink() else "not a regular file"))
            else:
                names.append(name)

    walk(path, "", (os.path.realpath(path),))

    return sorted_out(path, names, folders, FileReader(path), bad)


@dataclass(frozen=True)
class FileReader:
    """The bytes of a folder's files."""

    folder: Path

    def __call__(self, name: str) -> bytes:
        path = self.folder / name
        try:
            with open_regular(path) as file:
                content = file.read(limits.PICTURE_BYTES + 1)
        except UserError as error:
            raise BadPicture(str(error).removeprefix(f"{path} ")) from None
        except OSError as error:
            raise BadPicture(f"cannot be read: {error.strerror or error}") from None
        if len(content) > limits.PICTURE_BYTES:
            raise BadPicture(f"larger than {limits.PICTURE_BYTES} bytes")
        return content


def _open_zip(path: Path) -> Archive:
    reader = ZipReader(path)
    folders: set[str] = set()
    for name in reader.entries:
        folders |= {str(parent) for parent in PurePosixPath(name).parents}
    folders |= reader.folders
    return sorted_out(path, list(reader.entries), (f for f in folders if not any(map(_hidden, f.split("/")))), reader)


class ZipReader:
    """The bytes of a zip's files. Other processes can be given it: they open the zip themselves.

    Raises UserError where the zip's directory is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(open_regular(path))
        except (OSError, UserError):
            raise
        except Exception as error:  # a damaged directory raises BadZipFile, but also struct and value errors
            raise UserError(f"{path} is not a folder and not a readable zip: {error}") from None
        self.entries: dict[str, list[zipfile.ZipInfo]] = {}
        self.folders: set[str] = set()
        for entry in self._archive.infolist():
            name = plain_name(entry.filename)
            if name.endswith("/"):
                self.folders |= {str(parent) for parent in PurePosixPath(name).parents} | {name.rstrip("/")}
            else:
                self.entries.setdefault(name, []).append(entry)

    def places(self, names: Sequence[str]) -> Places | None:
        """Where files lie; None where one is packed by a method that `Places` does not undo."""
        entries = [self.entries[name][0] for name in names]
        if any(entry.compress_type not in (0, 8) for entry in entries):
            return None
        numbers = np.array(
            [(e.header_offset, e.compress_size, e.file_size, e.compress_type) for e in entries], np.int64
        )
        offsets, stored, sizes, methods = np.ascontiguousarray(numbers.reshape(-1, 4).T)
        shards = np.zeros_like(offsets)
        return Places((str(self._path),), shards, offsets, stored, sizes, methods.astype(np.uint8))

    def __reduce__(self) -> tuple[type[ZipReader], tuple[Path]]:
        return ZipReader, (self._path,)

    def __call__(self, name: str) -> bytes:
        if name not in self.entries:
            raise BadPicture("no longer in the zip")
        entry, *doubles = self.entries[name]
        if doubles:
            raise BadPicture(f"the zip holds {1 + len(doubles)} files of this name")
        if entry.file_size > limits.PICTURE_BYTES:
            raise BadPicture(f"larger than {limits.PICTURE_BYTES} bytes")
        if entry.flag_bits & 1:
            raise BadPicture("encrypted")
        try:
            return self._archive.read(entry)
        except Exception as error:  # zlib, lzma, struct, zipfile: a damaged entry raises any of theirs
            raise BadPicture(f"damaged in the zip: {error}") from None


def sorted_out(
    path: Path,
    names: list[str],
    folders: Iterable[str],
    read: Callable[[str], bytes],
    bad: Iterable[tuple[str, str]] = (),
) -> Archive:
    """An archive whose names are told apart: pictures, what says something of them, what leads out of it."""
    homes = [n.removesuffix(SAMPLES) for n in names if PurePosixPath(n).name == SAMPLES]
    beside = frozenset(home + name for home in homes for name in BESIDE)
    pictures = sorted(n for n in names if _is_picture(n) and n not in beside)
    return Archive(
        path=path,
        pictures=tuple(n for n in pictures if not _leads_out(n)),
        others=frozenset(n for n in names if not _is_picture(n) or n in beside),
        folders=frozenset(folders),
        bad=(*bad, *((n, "its name leads out of the archive") for n in pictures if _leads_out(n))),
        read=read,
    )


def plain_name(name: str) -> str:
    """A name with "/" for the backslashes that some Windows programs write, and no "./" parts."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part != ".")


def same_name(name: str) -> str:
    """A name as it is compared: plain, and one form of the letters that systems compose differently (Unicode NFC)."""
    return unicodedata.normalize("NFC", plain_name(name))


def readable_name(name: str) -> str:
    """A name as text that any encoder takes: composed, and bytes that are no UTF-8 written as \\xE9."""
    return same_name(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS and not any(map(_hidden, name.split("/")))


def _leads_out(name: str) -> bool:
    return name.startswith("/") or re.match("[A-Za-z]:", name) is not None or ".." in name.split("/")


def _hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part != "..")
