"""Events paired with pictures: what a data set of them yields, and the stand-in that a moving picture makes.

An event is (x, y, t, p): its pixel in the frame, its time in seconds, and whether brightness rose (+1) or fell (-1).
Examples hold as many rows each; rows that are no event have p = 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright import limits
from imagewright.checks import require_whole
from imagewright.data.event_augment import histogram, normalised
from imagewright.data.event_simulator import Events, Simulator
from imagewright.data.image_set import ImageSet, Labels
from imagewright.data.opening import open_images
from imagewright.data.pixels import Pixels, from_uint8
from imagewright.data.source import DataSource
from imagewright.types import UNCONDITIONAL, Chance, Condition, DataSpec, Example, UserError

Rows = npt.NDArray[np.int64]
SCALES = Literal[1, 2, 4, 8]
CHANNELS = 2
"""Of a frame: brighter, darker."""


@dataclass(frozen=True)
class EventPairs(Example):
    """Events paired with pictures: events float32 [N, M, 4], images [N, C, H, W] in [-1, 1]."""

    events: Tensor
    images: Tensor
    cond: Condition = UNCONDITIONAL


class Recordings(Protocol):
    """Where events come from."""

    def __call__(self, rows: Rows, pictures: Pixels) -> list[Events]:
        """The events of some examples, whose pictures are given, in the order of their times."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EventSet:
    """N event streams with the pictures of what they saw.

    spec: of the events' frames. pictures: as many, with the labels. most: events that an example has at the most; of
    more, so many after each other, from a random place on. identity: what the events are, beside the pictures.
    """

    spec: DataSpec
    pictures: ImageSet
    recordings: Recordings
    source: str
    identity: str
    most: int
    in_memory: ClassVar[bool] = False
    example: ClassVar[type[Example]] = EventPairs

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def labels(self) -> Labels:
        """Class of each, int64 [N], -1 = none."""
        return self.pictures.labels

    @property
    def empty_classes(self) -> tuple[int, ...]:
        """Classes without examples."""
        return self.pictures.empty_classes

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the pictures' and of what makes the events, or their files' names and sizes."""
        return hashlib.sha256(f"{self.pictures.fingerprint} {self.identity}".encode()).hexdigest()

    def read(self, rows: Rows) -> tuple[list[Events], Pixels]:
        """Events and pictures by index."""
        pictures = self.pictures.images(rows)
        return self.recordings(rows, pictures), pictures

    def batch(self, read: tuple[list[Events], Pixels], rows: Rows, chance: Chance) -> EventPairs:
        """Events, cut to `most`; pictures as they are stored."""
        events, pictures = read
        cut = padded(events, self.most, chance())
        label = torch.from_numpy(self.labels[rows]) if self.spec.num_classes else None
        return EventPairs(torch.from_numpy(cut), torch.from_numpy(pictures), Condition(label=label))

    def prepared(self, batch: EventPairs) -> EventPairs:
        """Pictures as methods are given them."""
        return replace(batch, images=from_uint8(batch.images))

    def frames(self) -> ImageSet:
        """The normalised frames of all events, of longer recordings of those in the middle, as 8-bit pictures."""
        own = self.identity.encode()
        return replace(
            self.pictures,
            spec=self.spec,
            pixels=Framed(self),
            digests=tuple(hashlib.sha256(own + each).digest() for each in self.pictures.digests),
            source=self.source,
            made="frames of events",
        )


@dataclass(frozen=True)
class Framed:
    """Reads frames of an event set by index: uint8 [n, H, W, 2]."""

    of: EventSet

    def __call__(self, rows: Rows) -> Pixels:
        events, _ = self.of.read(rows)
        cut = torch.from_numpy(padded(events, self.of.most, np.full(len(rows), 0.5)))
        frames = normalised(histogram(cut, self.of.spec.resolution))
        levels = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels: Pixels = levels.permute(0, 2, 3, 1).contiguous().numpy()
        return pixels


def padded(events: Sequence[Events], most: int, chance: npt.NDArray[np.float64]) -> Events:
    """[n, most, 4]: of longer streams `most` events from a random place on; chance: [n] in [0, 1)."""
    out = np.zeros((len(events), most, 4), np.float32)
    for row, each, share in zip(out, events, chance, strict=True):
        start = int(share * (max(len(each) - most, 0) + 1))
        some = each[start : start + most]
        row[: len(some)] = some
    return out


@dataclass
class Simulated:
    """Events made of pictures when they are first asked for, and kept while there is room (`limits.KEPT`)."""

    simulator: Simulator
    seed: int
    scale: int
    ground: int = 0
    kept: dict[int, Events] = field(default_factory=dict)
    size: int = 0

    def __call__(self, rows: Rows, pictures: Pixels) -> list[Events]:
        missing = [place for place, row in enumerate(rows.tolist()) if row not in self.kept]
        around = (self.ground, self.ground)
        grounded = np.pad(pictures[missing], ((0, 0), around, around, (0, 0)))
        made = self.simulator(grounded, [int(rows[i]) for i in missing], self.seed, self.scale)
        fresh = dict(zip((int(rows[i]) for i in missing), made, strict=True))
        for row, events in fresh.items():
            if self.size + events.nbytes <= limits.KEPT:
                self.kept[row] = events
                self.size += events.nbytes
        return [fresh[row] if row in fresh else self.kept[row] for row in rows.tolist()]


@dataclass(frozen=True, kw_only=True)
class StandinEvents(DataSource):
    """Events that a picture of a set makes when a window moves over it, paired with the still picture."""

    source: str
    """"digits", "emoji64", or the path of an EDM-format zip or image folder: the pictures."""
    resolution: int | None = None
    """Of the pictures, reduced by box filter; None = the set's own."""
    scale: int = 1
    """Pixels of an event's frame for each of the picture's, along a side: 1, 2, 4 or 8."""
    ground: int = 0
    """Black pixels around the picture, on each side, so that what moves stays within the frame."""
    split: str = "train"
    labels: bool = True
    """Whether examples have the pictures' classes."""
    most: int = 4096
    """Events of an example; of longer streams so many, from a random place on."""
    seed: int = 0
    """Of the movements, thresholds and noise."""
    simulator: Simulator = Simulator()
    frames: bool = False
    """Yield the frames as pictures of two channels, for generators and classifiers, without the still pictures."""
    workers: int = 0
    """Processes that simulate; 0 = a thread of this one."""

    def __post_init__(self) -> None:
        require_whole("data.most", self.most, 1, 1 << 22)
        require_whole("data.ground", self.ground, 0, 256)
        require_whole("data.seed", self.seed, 0)
        require_whole("data.workers", self.workers, 0, 1024)
        if self.scale not in get_args(SCALES):
            raise UserError(f"data.scale is {self.scale}; it must be 1, 2, 4 or 8")

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """The set; its events are made when they are asked for."""
        split: Any = self.split
        pictures = open_images(
            self.source, resolution=self.resolution, split=split, labels=self.labels, on_progress=on_progress
        )
        made = {"scale": self.scale, "seed": self.seed, "most": self.most, **asdict(self.simulator)}
        made |= {"ground": self.ground} if self.ground else {}
        side = (pictures.spec.resolution + 2 * self.ground) * self.scale
        found = EventSet(
            spec=framed(pictures.spec, side, "standin_events"),
            pictures=pictures,
            recordings=Simulated(self.simulator, self.seed, self.scale, self.ground),
            source=f"standin_events of {pictures.source}",
            identity=json.dumps(made, sort_keys=True),
            most=self.most,
        )
        return found.frames() if self.frames else found


def framed(pictures: DataSpec, side: int, name: str) -> DataSpec:
    """What frames of events are, with the classes of the pictures beside them."""
    return replace(pictures, name=f"{name}_{pictures.name}", resolution=side, channels=CHANNELS)
