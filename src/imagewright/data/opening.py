"""Opening a set by name or path: list, annotate, decode and check every file, complain once.

Contract: what cannot be used is named with its reason, in one UserError for all of them or, with `skip_bad`,
in `ImageSet.skipped`. Nothing is left out silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np

from imagewright import limits
from imagewright.data.annotations import Annotations, annotate
from imagewright.data.archive import SAMPLES, Archive, open_archive, readable_name
from imagewright.data.batches import open_batches
from imagewright.data.embedded import EMOJI64, open_digits
from imagewright.data.fitting import Filter, Fit, Fitting
from imagewright.data.image_set import ImageSet, Split, digest
from imagewright.data.index import Entry
from imagewright.data.npz import open_npz
from imagewright.data.parquet import open_parquet
from imagewright.data.pixels import BadPicture, Pixels, with_channels
from imagewright.data.reading import Reader, chunk_size, decoded, in_parallel
from imagewright.data.remote import is_url
from imagewright.data.tar import open_tar
from imagewright.types import DataSpec, UserError

KEEP_DECODED = limits.KEPT

Progress = Callable[[int, int], None]
_NAMED = 10
_RUN = "experiment.json"
"""What `training` writes beside the grids of a run."""


def open_images(
    source: str | Path,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    split: Split = "train",
    fit: Fit | None = None,
    filter: Filter = "lanczos",
    skip_bad: bool = False,
    labels: bool = True,
    on_progress: Progress | None = None,
) -> ImageSet:
    """Open "digits", "emoji64", a folder, zip or tars of pictures, or an npz of an array; every file is checked.

    source:      a str that is one of the two names is the embedded set; one with "://" is a URL of a tar (with *: of
                 several), for fsspec; any other str, and every Path, is a path. A folder of *.tar is their set.
    resolution:  reduce by exact box means to this many pixels a side, which has to divide every picture's; None =
                 as it is.
    fit, filter: bring pictures of any shape and size to `resolution` (`fitting.fit_square`).
    channels:    1 or 3; None = 3 if any file has colour, else 1.
    split:       of the embedded sets and those whose dataset.json or folders name splits ("test" is "val" where there
                 is no other); elsewhere "train" and "all" are everything.
    skip_bad:    leave out unusable files (listed in `skipped`) instead of refusing the set.
    labels:      False makes the set unconditional.
    on_progress: called with (files checked, files in all).

    Classes are those of dataset.json, else the sub-folders in sorted order, else none. Without a resolution the size of
    the set is the most common one (the first met of equals); a file of another size or not square is unusable.
    Raises UserError: no such source, no pictures, unusable files, an impossible resolution, no such split.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"resolution is {resolution}; it must be >= 1")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}; it must be 1 or 3")
    if split not in get_args(Split):
        raise UserError(f"split is {split!r}; allowed: {', '.join(get_args(Split))}")
    if fit is not None and (resolution is None or fit not in get_args(Fit)):
        raise UserError(f"fit is {fit!r}; it must be one of {', '.join(get_args(Fit))}, and needs a resolution")
    if filter not in get_args(Filter):
        raise UserError(f"filter is {filter!r}; it must be one of {', '.join(get_args(Filter))}")
    if source == "digits":
        return _choose(open_digits(resolution=resolution, channels=channels or 1, labels=labels), split)
    path = EMOJI64 if source == "emoji64" else Path(source)
    batches = open_batches(path, resolution=resolution, channels=channels, labels=labels)
    if batches is not None:
        if fit is not None:
            raise UserError(f"{path} is a set of equal squares, which --fit does not touch; leave it out")
        return _choose(batches, split)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _choose(open_npz(path, resolution=resolution, channels=channels, labels=labels), split)
    fitting = Fitting(resolution, channels, fit, filter)
    if is_url(source) and not str(source).endswith(".tar"):
        raise UserError(f"{source}: a URL has to end in .tar; other containers are read from a disk")
    place = source if is_url(source) else path
    entry = Entry(place, fitting, skip_bad, labels)
    kept = entry.recall()
    if kept is not None:
        return _choose(kept, split)
    found = open_tar(place, labels=labels) or open_parquet(path, labels=labels)
    archive, known = (open_archive(path), None) if found is None else found
    if found is None and (path / _RUN).is_file():
        raise UserError(f"{path} is a run's folder and no set of pictures; those that it drew are grids in its samples")
    if not archive.pictures and not archive.bad:
        raise UserError(f"{path} holds no pictures (png, jpeg, webp, gif, bmp, tiff, ppm)")
    known = known or annotate(archive, labels=labels)
    bad: dict[str, str] = {}  # a file may fail in several ways; the first reason stands
    for file, reason in (*archive.bad, *known.bad):
        bad.setdefault(file, reason)
    checked = _check(archive, bad, fitting, on_progress)
    size = _common_size(checked)
    if fit is None and resolution is not None and size % resolution:
        raise UserError(f"resolution is {resolution}; the pictures of {path} have {size}, which it must divide")
    sized = list(zip(checked.names, checked.sizes, strict=True))
    bad |= checked.bad | {n: fault for n, s in sized if (fault := _wrong_size(s, size, resolution, fit))}
    if bad and not skip_bad:
        raise UserError(_complaint(path, bad))
    if all(n in bad for n in checked.names):
        raise UserError(f"{path} holds no usable picture; {_complaint(path, bad)}")
    images = _assemble(archive, known, checked, resolution or size, bad)
    if source == "emoji64":
        images = replace(images, source="emoji64 (embedded; Noto emoji, Apache-2.0)")
    entry.keep(images, archive, [n for n in checked.names if n not in bad])
    return _choose(images, split)


@dataclass(kw_only=True)
class _Checked:
    """Every file that decodes: name, (width, height) upright, channels, digest, fitted pixels while there is room."""

    fit: Fitting
    names: list[str]
    sizes: list[tuple[int, int]]
    channels: list[int]
    digests: list[bytes]
    pixels: list[Pixels] | None
    bad: dict[str, str]


def _check(
    archive: Archive,
    bad: Mapping[str, str],
    fit: Fitting,
    on_progress: Progress | None,
) -> _Checked:
    """Decode every file that is not known to be bad, in order, on all cores."""
    names = [n for n in archive.pictures if n not in bad]
    out = _Checked(fit=fit, names=[], sizes=[], channels=[], digests=[], pixels=[], bad={})
    held = 0

    def examine(name: str) -> tuple[tuple[int, int], int, Pixels | None, bytes] | BadPicture:
        try:
            size, pixels = decoded(archive, name, fit)
        except BadPicture as finding:
            return finding
        # What is large waits for its turn on the disk, not in memory: a chunk of such pictures would be far too much.
        return size, pixels.shape[-1], pixels if pixels.size <= limits.KEPT // chunk_size() else None, digest(pixels)

    for done, (name, found) in enumerate(in_parallel(examine, names), start=1):
        if isinstance(found, BadPicture):
            out.bad[name] = str(found)
        else:
            size, channels, pixels, its_digest = found
            out.names.append(name)
            out.sizes.append(size)
            out.channels.append(channels)
            out.digests.append(its_digest)
            held += 0 if pixels is None else pixels.size * (3 // channels)
            if pixels is None or held > KEEP_DECODED:
                out.pixels = None
            if pixels is not None and out.pixels is not None:
                out.pixels.append(pixels)
        if on_progress is not None:
            on_progress(done, len(names))
    return out


def _common_size(checked: _Checked) -> int:
    """Side of the most common square size, the first met of equals; 0 when there is none."""
    squares = Counter(w for w, h in checked.sizes if w == h)
    return squares.most_common(1)[0][0] if squares else 0


def _wrong_size(size: tuple[int, int], common: int, resolution: int | None, fit: Fit | None) -> str | None:
    if fit is not None:
        return None
    shape = f"is {size[0]}x{size[1]}"
    if size[0] != size[1]:
        return f"{shape}; pictures have to be square (`data convert --resolution N --fit crop` cuts them to that)"
    if resolution is not None:
        return f"{shape}, which {resolution} does not divide" if size[0] % resolution else None
    return f"{shape}; most of the set is {common}x{common}" if size[0] != common else None


def _complaint(path: Path, bad: Mapping[str, str]) -> str:
    listed = "; ".join(f"{_printable(name)}: {reason}" for name, reason in islice(bad.items(), _NAMED))
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"{path} has {len(bad)} unusable file{'s' if len(bad) > 1 else ''}: {listed}{more}"


def _printable(name: str) -> str:
    """A file's name without what could upset a terminal or an encoder: line ends, escapes, stray bytes."""
    name = readable_name(name)
    return name if name.isprintable() else ascii(name)[1:-1]


def _assemble(
    archive: Archive,
    known: Annotations,
    checked: _Checked,
    resolution: int,
    bad: Mapping[str, str],
) -> ImageSet:
    rows = [i for i, n in enumerate(checked.names) if n not in bad]
    names = tuple(checked.names[i] for i in rows)
    c = checked.fit.channels or max(checked.channels[i] for i in rows)
    spec = DataSpec(
        name=archive.path.resolve().stem,
        resolution=resolution,
        channels=c,
        num_classes=known.num_classes,
        class_names=known.class_names,
    )
    reading: Pixels | Reader = Reader(archive, names, checked.fit, spec)
    if checked.pixels is not None:
        reading = np.stack([with_channels(checked.pixels[i], c) for i in rows])

    def texts(key: str) -> tuple[str, ...] | None:
        of = known.texts[key]
        return tuple(of[n] for n in names) if all(n in of for n in names) else None

    return ImageSet(
        spec=spec,
        pixels=reading,
        labels=np.array([-1 if known.labels is None else known.labels[n] for n in names], dtype=np.int64),
        names=tuple(map(readable_name, names)),
        source=readable_name(str(archive.path)),
        digests=tuple(checked.digests[i] for i in rows),
        captions=texts("name"),
        subgroups=texts("subgroup"),
        splits=texts("split"),
        skipped=tuple((readable_name(name), reason) for name, reason in bad.items()),
        unread=tuple(sorted(readable_name(n) for n in archive.others if not _is_ours(n))),
        made=checked.fit.words([checked.sizes[i] for i in rows]),
    )


def _is_ours(name: str) -> bool:
    return name.rpartition("/")[2] in ("dataset.json", SAMPLES)


def _choose(images: ImageSet, split: Split) -> ImageSet:
    """The pictures of one split; a set without splits is all training."""
    if split == "all":
        return images
    if images.splits is None:
        if split != "train":
            raise UserError(f"{images.source} has no {split} split: neither its dataset.json nor its folders name one")
        return images
    wanted = "val" if split == "test" and "test" not in images.splits else split
    rows = [i for i, s in enumerate(images.splits) if s == wanted]
    if not rows:
        raise UserError(f"{images.source} has no pictures in split {split!r}; it names {sorted(set(images.splits))}")
    return images.subset(rows)
