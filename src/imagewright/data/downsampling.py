"""ImageNet made small, as papers' data sets were: by several processes, resumable, with the same bits for any number.

Presets  chrabaszcz    the whole picture squashed by Pillow's box filter (1707.08819; its script offers others);
                       shuffled, ten batches and `val_data`, labels 1 .. 1000 in the development kit's order.
         edm           the central square, one Lanczos step (2206.00364); a zip of uncompressed PNGs, classes in
                       alphabetical order from 0.
         adm           halved by box means while the shorter side is at least twice the size, then bicubic, then the
                       central square (2105.05233); in EDM's container, classes as above.
         van-den-oord  refused: the program of PixelRNN's "ImageNet 64x64" (1601.06759) was never published.
Source   the geometry of the programs of PatrykChrabaszcz/Imagenet32_Scripts, NVlabs/edm and openai/guided-diffusion, to
         which the pixels are equal where the same Pillow decodes (tests give their numbers).
Departs  the official shuffle is unseeded and its order of files is the file system's: here files are sorted by name and
         the shuffle has a seed. ADM takes classes from file names, here from folders, which for ImageNet's training set
         are the same. Pictures that are neither grey nor RGB are converted; EDM's program would misread those of four
         channels.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL import __version__ as pillow_version

from imagewright import limits
from imagewright.data.archive import EXTENSIONS
from imagewright.data.clsloc import CLSLOC
from imagewright.data.edm_zip import file_name
from imagewright.data.numpy_pickle import write_arrays
from imagewright.data.pixels import FORMATS, Pixels
from imagewright.files import read_json, replacing, write_json
from imagewright.types import UserError

Preset = Literal["chrabaszcz", "edm", "adm", "van-den-oord"]
Format = Literal["npz", "pickle"]
FILTERS: Mapping[str, Image.Resampling] = {
    name: Image.Resampling[name.upper()] for name in ("box", "lanczos", "nearest", "bilinear", "bicubic", "hamming")
}
"""Pillow's filters that the script of downsampled ImageNet offers."""
SHARD = 1024
BATCHES = 10
_SPLITS = ("train", "val", "test")
_PARTS = "parts"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is made of which files. filter: of preset chrabaszcz alone. seed: of its shuffle."""

    source: Path
    size: int
    preset: Preset
    filter: str = "box"
    format: Format = "npz"
    seed: int = 0
    val_labels: Path | None = None

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise UserError(f"preset is {self.preset!r}; allowed: {', '.join(get_args(Preset))}")
        if self.preset == "van-den-oord":
            raise UserError(
                "preset van-den-oord cannot be made: how PixelRNN's 64x64 and 32x32 ImageNet was resized was never "
                "published; read its own files (a folder, tar or npz), whose validation set has 49,999 pictures"
            )
        if self.filter not in FILTERS:
            raise UserError(f"filter is {self.filter!r}; allowed: {', '.join(FILTERS)}")
        if self.preset != "chrabaszcz" and self.filter != "box":
            raise UserError(f"filter {self.filter} has no effect on preset {self.preset}, whose filters are its own")
        if self.preset != "chrabaszcz" and self.format != "npz":
            raise UserError(f"format {self.format} has no effect on preset {self.preset}, which makes EDM zips")
        if self.size < 1:
            raise UserError(f"size is {self.size}; it must be >= 1")


@dataclass(frozen=True)
class Made:
    """What was written: files, pictures of each split, unusable files (name, reason)."""

    files: tuple[Path, ...]
    counts: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...]


def downsample(
    job: Job,
    out: Path,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Made | None:
    """Make the set in folder `out`. A job that was interrupted goes on where it stopped.

    workers: processes; the result does not depend on it. on_progress: called with (pictures done, in all).
    rank, world: of several such calls, on machines that share the folder, each makes every world-th part; wait returns
    when all have come as far. The first puts the parts together, the others return None.
    Raises UserError where there is nothing to read, files are unusable (without skip_bad), or `out` holds parts of
    another job.
    """
    splits = listing(job)
    parts = out / _PARTS
    _claim(parts, job, splits)
    tasks = [
        (parts / f"{split}-{k // SHARD:06}.npy", [str(p) for p, _ in files[k : k + SHARD]])
        for split, files in splits.items()
        for k in range(0, len(files), SHARD)
    ]
    total, done = sum(map(len, splits.values())), 0
    for count in _each(partial(_shard, job), tasks[rank::world], workers):
        done += count
        on_progress(done, total)
    wait()
    if rank:
        return None
    bad = {name: reason for path, _ in tasks for name, reason in read_json(_beside(path))}
    if bad and not skip_bad:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:10])
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(f"{job.source} has {len(bad)} unusable files: {listed}{more}; --skip-bad leaves them out")
    files, counts = [], {}
    for split, listed_files in splits.items():
        pictures = _Pictures([path for path, _ in tasks if path.name.startswith(f"{split}-")])
        good = [i for i, (path, _) in enumerate(listed_files) if str(path) not in bad]
        labels = [listed_files[i][1] for i in good]
        files += (
            _write_batches(job, out, split, pictures, good, labels)
            if job.preset == "chrabaszcz"
            else ([_write_zip(out / f"{split}.zip", pictures, good, labels, _classes(splits))])
        )
        counts[split] = len(good)
    for path, _ in tasks:
        path.unlink()
        _beside(path).unlink()
    (parts / "job.json").unlink()
    parts.rmdir()
    return Made(tuple(files), counts, tuple(bad.items()))


# --- which files ----------------------------------------------------------------------------------------------------


def listing(job: Job) -> dict[str, list[tuple[Path, int]]]:
    """By split, each picture's path and class from 0, in the order of the set before it is shuffled."""
    root = next((p for p in (job.source, job.source / "ILSVRC/Data/CLS-LOC") if (p / "train").is_dir()), job.source)
    if not root.is_dir():
        raise UserError(f"{job.source} is no folder of pictures")
    places = {split: root / split for split in _SPLITS if (root / split).is_dir()}
    splits = places if "train" in places else {"train": root}
    folders = {split: _folders(place) for split, place in splits.items()}
    classes = _ordered({name for names in folders.values() for name in names}, job.preset)
    if not classes:
        raise UserError(f"{job.source} has no folders of classes: they lie in it, or in its train and val folders")
    found: dict[str, list[tuple[Path, int]]] = {}
    for split, place in splits.items():
        if folders[split]:
            found[split] = [(p, k) for k, name in enumerate(classes) for p in _pictures(place / name)]
        elif job.val_labels is not None:
            found[split] = _flat(place, job, classes)
        elif split == "val":
            raise UserError(
                f"{place} has no folders of classes; give the classes of its pictures, one number from 1 a line in the "
                "order of their names, with --val-labels (the development kit's validation ground truth)"
            )
    if not any(found.values()):
        raise UserError(f"{job.source} holds no pictures")
    return found


def _folders(place: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith("."))


def _ordered(names: set[str], preset: Preset) -> list[str]:
    """Classes in the set's order: the development kit's where all are WordNet ids of it; else alphabetical."""
    if preset == "chrabaszcz" and names <= set(CLSLOC) and names:
        return list(CLSLOC)
    return sorted(names)


def _classes(splits: Mapping[str, list[tuple[Path, int]]]) -> list[str]:
    named = {label: path.parent.name for files in splits.values() for path, label in files}
    return [named.get(k, "") for k in range(max(named) + 1)]


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    names = sorted(e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
    return [folder / name for name in names if Path(name).suffix.lower() in EXTENSIONS]


def _flat(place: Path, job: Job, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Pictures in one folder, with the development kit's list of their classes."""
    assert job.val_labels is not None
    pictures = _pictures(place)
    try:
        labels = [int(word) for word in job.val_labels.read_text("ascii").split()]
    except (OSError, ValueError) as error:
        raise UserError(f"{job.val_labels} is no list of classes: {error}") from None
    if len(labels) != len(pictures) or not all(1 <= n <= len(CLSLOC) for n in labels):
        raise UserError(
            f"{job.val_labels} must hold {len(pictures)} numbers from 1 to {len(CLSLOC)}; it has {len(labels)}"
        )
    index = {name: k for k, name in enumerate(classes)}
    return [(p, index[CLSLOC[n - 1]]) for p, n in zip(pictures, labels, strict=True) if CLSLOC[n - 1] in index]


def _claim(parts: Path, job: Job, splits: Mapping[str, list[tuple[Path, int]]]) -> None:
    """Take the folder of parts for this job. Raises UserError where it holds those of another."""
    listed = sha256()
    for split, files in splits.items():
        listed.update(json.dumps([split, [(str(p.relative_to(job.source)), k) for p, k in files]]).encode())
    record = {
        "preset": job.preset,
        "size": job.size,
        "filter": job.filter,
        "shard": SHARD,
        "files": listed.hexdigest(),
        "pillow": pillow_version,
    }
    path = parts / "job.json"
    if path.exists():
        before = read_json(path, dict)
        changed = [name for name, value in record.items() if before.get(name) != value]
        if changed:
            raise UserError(f"{parts} holds parts of a job with another {', '.join(changed)}; remove it, or finish it")
        return
    write_json(path, record)


# --- the work -------------------------------------------------------------------------------------------------------

Task = tuple[Path, list[str]]


def _each(work: Callable[[Task], int], tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Results in order: here, or by other processes, which are started anew (a fork would share threads and locks)."""
    if workers <= 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks)


def _shard(job: Job, task: Task) -> int:
    """Make one part, unless it is there; returns how many pictures it has. An unusable file is black, and listed."""
    path, files = task
    if path.exists() and _beside(path).exists():
        return len(files)
    pixels = np.zeros((len(files), job.size, job.size, 3), np.uint8)
    bad = []
    for i, name in enumerate(files):
        try:
            pixels[i] = small(name, job)
        except Exception as error:  # decoders answer damaged bytes with any exception there is
            bad.append((name, f"damaged: {error}"[:200]))
    with replacing(path) as aside, aside.open("wb") as file:
        np.lib.format.write_array(file, pixels, allow_pickle=False)
    write_json(_beside(path), bad)
    return len(files)


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def small(path: str | Path, job: Job) -> Pixels:
    """One picture as the preset makes it, uint8 [size, size, 3]."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > limits.PIXELS:
            raise ValueError(f"more than {limits.PIXELS} pixels")
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        made = _MAKE[job.preset](rgb, job)
        return np.asarray(made)


def _squashed(image: Image.Image, job: Job) -> Image.Image:
    return image.resize((job.size, job.size), FILTERS[job.filter])


def _cropped(image: Image.Image, job: Job) -> Image.Image:
    side, (width, height) = min(image.size), image.size
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    return image.crop(box).resize((job.size, job.size), Image.Resampling.LANCZOS)


def _halved(image: Image.Image, job: Job) -> Image.Image:
    while min(image.size) >= 2 * job.size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = job.size / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - job.size) // 2, (height - job.size) // 2
    return image.crop((left, top, left + job.size, top + job.size))


_MAKE: Mapping[str, Callable[[Image.Image, Job], Image.Image]] = {
    "chrabaszcz": _squashed,
    "edm": _cropped,
    "adm": _halved,
}


# --- what is written ------------------------------------------------------------------------------------------------


class _Pictures:
    """The rows of all parts of a split, from disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]

    def __call__(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[Pixels]:
        return (self._parts[row // SHARD][row % SHARD] for row in rows)


def batch_sizes(count: int) -> list[int]:
    """How many pictures each of the ten batches has: the last one the remainder more."""
    size = count // BATCHES
    return [size] * (BATCHES - 1) + [count - (BATCHES - 1) * size]


def _write_batches(
    job: Job, out: Path, split: str, pictures: _Pictures, good: Sequence[int], labels: Sequence[int]
) -> list[Path]:
    """Ten shuffled batches with the mean of all of them, or one of a split that is not trained on."""
    rows, classes = np.array(good, np.int64), np.array(labels, np.int64) + 1
    if split != "train":
        return [_write_batch(job, out / f"{split}_data", _planes(pictures, rows, job.size), classes, None)]
    total = np.zeros(3 * job.size**2, np.int64)
    for row in pictures(rows):
        total += row.transpose(2, 0, 1).reshape(-1)
    mean = total / max(len(rows), 1)
    order = np.random.Generator(np.random.PCG64(job.seed)).permutation(len(rows))
    written, at = [], 0
    for k, size in enumerate(batch_sizes(len(rows)), start=1):
        mine = order[at : at + size]
        data = _planes(pictures, rows[mine], job.size)
        written.append(_write_batch(job, out / f"train_data_batch_{k}", data, classes[mine], mean))
        at += size
    return written


def _planes(pictures: _Pictures, rows: npt.NDArray[np.int64], size: int) -> Pixels:
    data = np.empty((len(rows), 3 * size * size), np.uint8)
    for i, row in enumerate(pictures(rows)):
        data[i] = row.transpose(2, 0, 1).reshape(-1)
    return data


def _write_batch(
    job: Job, path: Path, data: Pixels, labels: npt.NDArray[np.int64], mean: npt.NDArray[np.float64] | None
) -> Path:
    if job.format == "pickle":  # as the official script
        with replacing(path) as aside, aside.open("wb") as file:
            write_arrays(file, {"data": data, "labels": labels.tolist(), **({} if mean is None else {"mean": mean})})
        return path
    target = path.with_name(f"{path.name}.npz")
    arrays = {"data": data, "labels": labels} | ({} if mean is None else {"mean": mean})
    with replacing(target) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)  # type: ignore[arg-type]
    return target


def _write_zip(
    path: Path, pictures: _Pictures, good: Sequence[int], labels: Sequence[int], classes: Sequence[str]
) -> Path:
    """EDM's container: an uncompressed zip of uncompressed PNGs, and dataset.json."""
    meta = {"labels": [[file_name(i), int(k)] for i, k in enumerate(labels)], "classes": list(classes)}
    with replacing(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        for i, row in enumerate(pictures(good)):
            content = BytesIO()
            Image.fromarray(row).save(content, format="PNG", compress_level=0, optimize=False)
            archive.writestr(zipfile.ZipInfo(file_name(i), (1980, 1, 1, 0, 0, 0)), content.getvalue())
        archive.writestr(zipfile.ZipInfo("dataset.json", (1980, 1, 1, 0, 0, 0)), json.dumps(meta))
    return path
