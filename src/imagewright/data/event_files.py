"""Recorded events, of files, paired with a folder of pictures: N-ImageNet's npz, and text.

npz      `event_data` with fields x, y, t, p (N-ImageNet's), or arrays x_pos, y_pos, timestamp, polarity; times in
         microseconds.
Text     .txt, .csv: a line for each event, x y t p, split by spaces or commas, times in seconds; lines that begin with
         # are not read.
Signs    1 and -1, or 1 and 0; in npz also true and false. Places are those of the sensor and are scaled to the frame,
         not resampled.
Pairs    an events' file and a picture of the same path, without what comes after the last dot: `n01440764/n01440764_1`.
         The picture's class is the pair's. Pictures are cut to the square in their middle and reduced by the bicubic
         filter.
Source   Yan98/Event-Camera-Data-Pre-training, data/imagenet_dataset.py; extract_clip_feature.py for pictures.
Departs  Events that are not in the order of their times are sorted. Pictures are cut, then reduced (there the other way
         round).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from imagewright import limits
from imagewright.arrays import read_npz
from imagewright.checks import require_whole
from imagewright.data.event_simulator import Events
from imagewright.data.events import EventSet, Rows, framed
from imagewright.data.image_set import ImageSet
from imagewright.data.opening import open_images
from imagewright.data.pixels import Pixels
from imagewright.data.source import DataSource
from imagewright.files import read_bytes
from imagewright.types import DataSpec, UserError

MICRO = 1e-6
BOUND = 1e30
"""Above numbers of an event, which are kept as float32."""
NAMES = ("x_pos", "y_pos", "timestamp", "polarity")
KINDS = (".npz", ".txt", ".csv")
FOLDERS = {
    "train": ("extracted_train", "train"),
    "test": ("extracted_val", "val", "test"),
}
"""Of each split, by the names that they have; without any of them all is for training."""


def read_events(path: Path, sensor: tuple[int, int], side: int) -> Events:
    """Events [n, 4] of a file, in the order of their times, on a frame of side x side.

    sensor: height and width. Raises UserError naming the file where it is damaged, or holds what is no event.
    """
    table = _from_npz(path) if path.suffix == ".npz" else _from_text(path)
    if not (np.abs(table) < BOUND).all():
        raise UserError(f"{path} is damaged: it holds numbers that are not finite, or not below {BOUND:g}")
    height, width = sensor
    x, y, p = table[:, 0], table[:, 1], table[:, 3]
    if len(table) and (x.min() < 0 or y.min() < 0 or x.max() >= width or y.max() >= height):
        raise UserError(
            f"{path} has events from ({x.min():g}, {y.min():g}) to ({x.max():g}, {y.max():g}); data.sensor is {height} "
            f"x {width}"
        )
    if not np.isin(p, (-1, 0, 1)).all() or ((p == 0).any() and (p == -1).any()):
        raise UserError(f"{path} is damaged: signs of events must be 1 and -1, or 1 and 0")
    table = table[np.argsort(table[:, 2], kind="stable")]
    table[:, 2] -= table[:1, 2]
    table[:, 3] = np.where(table[:, 3] > 0, 1, -1)
    table[:, 0] *= side / width
    table[:, 1] *= side / height
    table[:, :2] = np.minimum(table[:, :2], np.nextafter(np.float32(side), np.float32(0)))  # float32 may round up to it
    return table.astype(np.float32)


def _from_npz(path: Path) -> npt.NDArray[np.float64]:
    found = read_npz(path, ("event_data", *NAMES))
    columns: list[Any] = []
    if "event_data" in found:
        data = found["event_data"]
        if data.dtype.names is None or not {"x", "y", "t", "p"} <= set(data.dtype.names):
            raise UserError(f"{path} is damaged: its event_data has no fields x, y, t and p")
        columns = [data[name] for name in "xytp"]
    elif set(NAMES) <= found.keys():
        columns = [found[name] for name in NAMES]
    else:
        raise UserError(f"{path} holds no events: neither event_data nor {', '.join(NAMES)}")
    kinds = {c.dtype.kind for c in columns}
    if len({c.shape for c in columns}) > 1 or columns[0].ndim != 1 or not kinds <= set("biuf"):
        raise UserError(f"{path} is damaged: x, y, t and p must be as many numbers each")
    table = np.stack([c.astype(np.float64) for c in columns], 1)
    table[:, 2] *= MICRO
    return table


def _from_text(path: Path) -> npt.NDArray[np.float64]:
    lines = read_bytes(path, limits.PICTURE_BYTES).decode("utf-8-sig", "replace").replace(",", " ").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    bad = next((i for i, row in enumerate(rows) if len(row) != 4), None)
    try:
        if bad is not None:
            raise ValueError(" ".join(rows[bad])[:40])
        return np.array(rows, dtype=np.float64).reshape(-1, 4)
    except ValueError as error:
        raise UserError(f"{path} is damaged: a line must be four numbers, x y t p ({error})") from None


@dataclass(frozen=True)
class Recorded:
    """Reads events of files by index."""

    files: tuple[Path, ...]
    sensor: tuple[int, int]
    side: int

    def __call__(self, rows: Rows, pictures: Pixels) -> list[Events]:
        return [read_events(self.files[row], self.sensor, self.side) for row in rows.tolist()]


@dataclass(frozen=True, kw_only=True)
class EventFiles(DataSource):
    """Recorded events and the pictures that were in front of the camera."""

    source: str
    """Folder of events' files, .npz, .txt or .csv, perhaps within `extracted_train` and `extracted_val`."""
    pictures: str
    """Folder or zip of the pictures; a folder perhaps with `train` and `val`. Those without events are not read."""
    resolution: int = 224
    """Of the events' frames."""
    picture_resolution: int = 224
    """Pictures are cut to squares of this size."""
    sensor: tuple[int, int] = (480, 640)
    """Height and width of the camera's."""
    split: str = "train"
    labels: bool = True
    """Whether examples have the pictures' classes."""
    most: int = 30_000
    """Events of an example; of longer recordings so many, from a random place on."""
    frames: bool = False
    """Yield the frames as pictures of two channels, for generators and classifiers, without the pictures."""
    workers: int = 0
    """Processes that read; 0 = a thread of this one."""

    def __post_init__(self) -> None:
        for name in ("resolution", "picture_resolution"):
            require_whole(f"data.{name}", getattr(self, name), 1, limits.SIDE)
        require_whole("data.most", self.most, 1, 1 << 22)
        require_whole("data.workers", self.workers, 0, 1024)
        if len(self.sensor) != 2 or not all(1 <= s <= limits.SIDE for s in self.sensor):
            raise UserError(f"data.sensor is {self.sensor}; it must be a height and a width")
        if self.split not in FOLDERS:
            raise UserError(f"data.split is {self.split!r}; allowed: {', '.join(FOLDERS)}")

    def absent(self) -> Any:
        """An empty set like N-ImageNet's where the events are not there, for a dry run; None where they are."""
        if Path(self.source).exists():
            return None
        classes = 1000 if self.labels else 0
        spec = DataSpec(
            name="nimagenet",
            resolution=self.picture_resolution,
            channels=3,
            num_classes=classes,
            class_names=tuple(map(str, range(classes))),
        )
        side = self.picture_resolution
        empty = ImageSet(
            spec=spec,
            pixels=np.zeros((0, side, side, 3), np.uint8),
            labels=np.zeros(0, np.int64),
            names=(),
            source=self.pictures,
            digests=(),
        )
        return self._paired(empty, ())

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """The pairs. Raises UserError where there are none, or an events' file has no picture."""
        root = _of_split(Path(self.source), self.split)
        files = [path for path in sorted(root.rglob("*")) if path.suffix in KINDS]
        if not files:
            raise UserError(f"{root} holds no events' files ({', '.join(KINDS)})")
        pictures = open_images(
            str(_of_split(Path(self.pictures), self.split)),
            resolution=self.picture_resolution,
            fit="crop",
            filter="bicubic",
            labels=self.labels,
            on_progress=on_progress,
        )
        wanted = _places([path.relative_to(root).as_posix() for path in files], str(root))
        places = _places(pictures.names, pictures.source)
        lonely = [key for key in wanted if key not in places]
        if lonely:
            first = files[wanted[lonely[0]]]
            raise UserError(f"{first} has no picture {lonely[0]}.* in {pictures.source} ({len(lonely)} have none)")
        return self._paired(pictures.subset([places[key] for key in wanted]), tuple(files))

    def _paired(self, pictures: ImageSet, files: tuple[Path, ...]) -> Any:
        found = EventSet(
            spec=framed(pictures.spec, self.resolution, "events"),
            pictures=pictures,
            recordings=Recorded(files, self.sensor, self.resolution),
            source=self.source,
            identity=f"{self.resolution} {self.sensor} {self.most} {_sizes(files)}",
            most=self.most,
        )
        return found.frames() if self.frames else found


def _of_split(root: Path, split: str) -> Path:
    """The folder of a split: below the root, or the root itself where it has none for any split."""
    if not root.exists():
        raise UserError(f"{root} does not exist")
    below = {of: [root / name for name in names if (root / name).is_dir()] for of, names in FOLDERS.items()}
    if below[split]:
        return below[split][0]
    if split != "train" or any(below.values()):
        wanted = " or ".join(FOLDERS[split])
        raise UserError(f"{root} has no {split} split: no folder {wanted}")
    return root


def _places(names: Sequence[str], source: str) -> dict[str, int]:
    """Where each file is, by its name without what comes after the last dot. Raises UserError where two have one."""
    places: dict[str, int] = {}
    for i, name in enumerate(names):
        key = str(PurePosixPath(name).with_suffix(""))
        if key in places:
            raise UserError(f"{source} has {names[places[key]]} and {name}; a pair has one file of each kind")
        places[key] = i
    return places


def _sizes(files: Iterable[Path]) -> str:
    """sha256 (hex) of files' names and sizes; what is in them is not read for it."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
    return total.hexdigest()
