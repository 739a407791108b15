"""The files of a folder or a zip, by name, without unpacking anything.

Contract: names use "/" and are relative to the folder or the zip; pictures are told by their extension;
hidden files, `__MACOSX` and other files (.txt, Thumbs.db) are ignored; what cannot be read is a finding
(BadPicture), not a crash.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from imagewright.data.pixels import BadPicture
from imagewright.types import UserError

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
LARGEST_FILE = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What a folder or a zip holds.

    pictures: names in sorted order. others: names of the other files.
    bad:      (name, reason) of pictures whose name alone makes them unusable; they are not among `pictures`.
    read:     the bytes of a file; raises BadPicture when they cannot be had.
    """

    path: Path
    pictures: tuple[str, ...]
    others: frozenset[str]
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


def _open_folder(path: Path) -> Archive:
    def refuse(error: OSError) -> None:
        raise error

    names: list[str] = []
    for folder, subfolders, files in os.walk(path, onerror=refuse):
        subfolders[:] = [s for s in subfolders if not _hidden(s)]
        names += [(Path(folder) / f).relative_to(path).as_posix() for f in files]

    def read(name: str) -> bytes:
        try:
            if (path / name).stat().st_size > LARGEST_FILE:
                raise BadPicture(f"larger than {LARGEST_FILE} bytes")
            return (path / name).read_bytes()
        except OSError as error:
            raise BadPicture(f"cannot be read: {error.strerror or error}") from None

    return _sorted_out(path, names, read)


def _open_zip(path: Path) -> Archive:
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # a damaged directory raises BadZipFile, but also struct and value errors
        raise UserError(f"{path} is not a folder and not a readable zip: {error}") from None
    entries: dict[str, list[zipfile.ZipInfo]] = {}
    for entry in archive.infolist():
        name = plain_name(entry.filename)
        if not name.endswith("/"):
            entries.setdefault(name, []).append(entry)

    def read(name: str) -> bytes:
        entry, *doubles = entries[name]
        if doubles:
            raise BadPicture(f"the zip holds {1 + len(doubles)} files of this name")
        if entry.file_size > LARGEST_FILE:
            raise BadPicture(f"larger than {LARGEST_FILE} bytes")
        if entry.flag_bits & 1:
            raise BadPicture("encrypted")
        try:
            return archive.read(entry)
        except Exception as error:  # zlib, lzma, struct, zipfile: a damaged entry raises any of theirs
            raise BadPicture(f"damaged in the zip: {error}") from None

    return _sorted_out(path, list(entries), read)


def _sorted_out(path: Path, names: list[str], read: Callable[[str], bytes]) -> Archive:
    pictures = sorted(filter(_is_picture, names))
    return Archive(
        path=path,
        pictures=tuple(n for n in pictures if not _leads_out(n)),
        others=frozenset(n for n in names if not _is_picture(n)),
        bad=tuple((n, "its name leads out of the archive") for n in pictures if _leads_out(n)),
        read=read,
    )


def plain_name(name: str) -> str:
    """A name as it is compared: "/" for the backslashes that some Windows programs write, no "./" parts."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part != ".")


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS and not any(map(_hidden, name.split("/")))


def _leads_out(name: str) -> bool:
    return name.startswith("/") or re.match("[A-Za-z]:", name) is not None or ".." in name.split("/")


def _hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part != "..")
