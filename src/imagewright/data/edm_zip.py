"""Writing EDM's data-set format: an uncompressed zip of PNGs, 00000/img00000000.png ..., and a dataset.json.

Source: the format that `dataset_tool.py` of NVlabs/edm writes, {"labels": [[file, class], ...] or null}. We
add keys that
other readers ignore: "classes" (names), "subgroups" (names), "pictures" ({file: {"name", "subgroup", "split",
...}}).
The bytes are a function of the pixels and what is known about them: fixed time stamps, fixed order.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagewright.data.image_set import ImageSet
from imagewright.data.pixels import Pixels, encode_png
from imagewright.files import replacing
from imagewright.types import UserError

_READ_AT_ONCE = 256


def write_edm_zip(
    images: ImageSet | Iterable[Pixels],
    out: Path | str,
    *,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Write pictures as an EDM zip, atomically; the same pictures give the same bytes.

    images: a set, whose labels, class names, captions, subgroups and splits are kept; or arrays uint8 [H, W,
    C] of one square size, with `labels` (one >= 0 for each, or None) and class names.
    Raises UserError when `out` is no .zip or cannot be written, there is nothing to write, sizes differ, or
    the labels do not fit.
    """
    target = Path(out)
    if target.suffix.lower() != ".zip":
        raise UserError(f"{target} has to end in .zip, by which readers know the format")
    pictures: dict[str, dict[str, str]] = {}
    if isinstance(images, ImageSet):
        labels = None if (images.labels < 0).all() else images.labels.tolist()
        classes = images.spec.class_names
        pictures = _known(images)
        arrays: Iterable[Pixels] = _each(images)
    else:
        arrays = images
    meta: dict[str, Any] = {"labels": None}
    if labels is not None:
        if any(label < 0 or (classes and label >= len(classes)) for label in labels):
            top = f" and < {len(classes)}" if classes else ""
            raise UserError(f"{target}: labels to write must all be >= 0{top}, or all be absent")
        meta["labels"] = [[file_name(i), int(label)] for i, label in enumerate(labels)]
    if classes:
        meta["classes"] = list(classes)
    if pictures:
        meta["pictures"] = pictures
    names = sorted({p["subgroup"] for p in pictures.values() if "subgroup" in p})
    if names:
        meta["subgroups"] = names
    try:
        with replacing(target) as aside:
            count = write_entries(aside, _checked(arrays, target), meta)
            if count == 0:
                raise UserError(f"{target}: there are no pictures to write")
            if labels is not None and len(labels) != count:
                raise UserError(f"{target}: {len(labels)} labels for {count} pictures")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def write_entries(out: Path, pictures: Iterable[Pixels], meta: Mapping[str, Any]) -> int:
    """Write the zip itself to `out` (not atomic); returns the number of pictures."""
    count = 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for count, pixels in enumerate(pictures, start=1):
            _add(archive, file_name(count - 1), encode_png(pixels))
        _add(archive, "dataset.json", json.dumps(meta, ensure_ascii=False).encode())
    return count


def file_name(index: int) -> str:
    """EDM's name of picture `index`: 00012/img00012345.png."""
    return f"{index:08d}"[:5] + f"/img{index:08d}.png"


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, also where the zip is written on Windows: same bytes everywhere
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content)


def _known(images: ImageSet) -> dict[str, dict[str, str]]:
    columns = {"name": images.captions, "subgroup": images.subgroups, "split": images.splits}
    present = {key: column for key, column in columns.items() if column is not None}
    if not present:
        return {}
    return {file_name(i): {key: col[i] for key, col in present.items()} for i in range(len(images))}


def _each(images: ImageSet) -> Iterable[Pixels]:
    for first in range(0, len(images), _READ_AT_ONCE):
        yield from images.images(slice(first, first + _READ_AT_ONCE))


def _checked(arrays: Iterable[Pixels], target: Path) -> Iterable[Pixels]:
    shape: tuple[int, ...] | None = None
    for i, pixels in enumerate(arrays):
        shape = shape or pixels.shape
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise UserError(f"{target}: picture {i} is {pixels.dtype} {pixels.shape}; it must be uint8 [H, W, 1 or 3]")
        if pixels.shape != shape or shape[0] != shape[1]:
            raise UserError(f"{target}: picture {i} is {pixels.shape}; all must be square and of one size, {shape}")
        yield pixels
