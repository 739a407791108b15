"""A set of labelled pictures, in memory or decoded when asked for.

Contract: `images(indices)` gives uint8 [n, H, W, C]; every other attribute describes the same N pictures in
order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from imagewright.data.packed import Digests, Texts
from imagewright.data.pixels import Pixels, from_uint8, with_channels
from imagewright.types import Batch, Chance, Condition, DataSpec, Example, UserError

Labels = npt.NDArray[np.int64]
Split = Literal["train", "val", "test", "all"]
T = TypeVar("T")
Read = Callable[[npt.NDArray[np.int64]], Pixels]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """N pictures of one size, what is known of each, and where they came from.

    labels:      int64 [N], class index, -1 where there is none.
    names:       file name (or index, as text) of each picture.
    captions, subgroups, splits: one text a picture, or None where the source has none.
    skipped:     (name, reason) of the files that were left out because `skip_bad` was asked for.
    unread:      names of what lies beside the pictures and is none: texts, hidden files and folders.
    source:      where the pictures came from, in words.
    digests:     sha256 of each picture's pixels, from which `fingerprint` is made.
    made:        what was done to the source's pictures, in words; None = nothing.
    xflip:       half of the pictures in batches are mirrored, at random.
    """

    spec: DataSpec
    pixels: Pixels | Read
    labels: Labels
    names: Sequence[str]
    source: str
    digests: Sequence[bytes]
    captions: Sequence[str] | None = None
    subgroups: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    made: str | None = None
    xflip: bool = False

    example: ClassVar[type[Example]] = Batch

    @property
    def preprocessing(self) -> str:
        """How the pictures were made from the source's, in words."""
        side = self.spec.resolution
        return f"{side}x{side}, {self.made or 'as stored'}"

    @classmethod
    def of(
        cls,
        pixels: Pixels,
        labels: Sequence[int] | Labels | None = None,
        *,
        name: str = "memory",
        class_names: Sequence[str] = (),
    ) -> ImageSet:
        """A set of an array uint8 [N, H, H, C], C = 1 or 3, with labels >= 0 or none at all.

        class_names: names of all classes; () = as many nameless classes as the labels need.
        Raises UserError when shapes, types or labels are others.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2]:
            raise UserError(f"{name}: pictures are {pixels.dtype} {pixels.shape}; they must be uint8 [N, H, H, C]")
        if pixels.shape[3] not in (1, 3):
            raise UserError(f"{name}: pictures have {pixels.shape[3]} channels; they must have 1 or 3")
        index = np.full(len(pixels), -1) if labels is None else np.asarray(labels)
        if index.shape != (len(pixels),) or (labels is not None and (index < 0).any()):
            raise UserError(f"{name}: labels must be {len(pixels)} whole numbers >= 0")
        spec = DataSpec(
            name=name,
            resolution=pixels.shape[1],
            channels=pixels.shape[3],
            num_classes=len(class_names) or int(index.max(initial=-1)) + 1,
            class_names=tuple(class_names),
        )
        return cls(
            spec=spec,
            pixels=pixels,
            labels=index.astype(np.int64),
            names=tuple(map(str, range(len(pixels)))),
            source=name,
            digests=tuple(map(digest, pixels)),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """False when every `images` call decodes files."""
        return isinstance(self.pixels, np.ndarray)

    def images(self, indices: Sequence[int] | npt.NDArray[np.int64] | slice | None = None) -> Pixels:
        """Pictures by index (None: all), uint8 [n, H, W, C], a fresh array; IndexError out of range."""
        n = len(self)
        if indices is None or isinstance(indices, slice):
            rows = np.arange(n)[indices or slice(None)]
        else:
            given = np.asarray(indices)
            rows = np.flatnonzero(given) if given.dtype == np.bool_ else given.astype(np.int64)
        if len(rows) and not (-n <= rows.min() and rows.max() < n):
            raise IndexError(f"pictures are 0 .. {n - 1}; asked for {rows.min()} .. {rows.max()}")
        return self.pixels[rows] if isinstance(self.pixels, np.ndarray) else self.pixels(rows % n)

    def mirrored(self) -> ImageSet:
        """The set whose batches mirror half of the pictures left to right."""
        return replace(self, xflip=True)

    def read(self, rows: npt.NDArray[np.int64]) -> Pixels:
        """As `images`: what a loader asks for, in other threads or processes."""
        return self.images(rows)

    def batch(self, read: Pixels, rows: npt.NDArray[np.int64], chance: Chance) -> Batch:
        """Pictures as they are stored, uint8 [n, H, W, C], and their classes, int64 [n], if the set has any."""
        if self.xflip:
            flips = chance() < 0.5
            read[flips] = read[flips, :, ::-1]
        label = torch.from_numpy(self.labels[rows]) if self.spec.num_classes else None
        return Batch(torch.from_numpy(read), Condition(label=label))

    def prepared(self, batch: Batch) -> Batch:
        """Pictures as methods are given them, float32 [n, C, H, W] in [-1, 1]."""
        return replace(batch, images=from_uint8(batch.images))

    @property
    def empty_classes(self) -> tuple[int, ...]:
        """Classes without pictures, which nothing can be learnt of; where there are no pictures, what `spec` says."""
        if not len(self):
            return self.spec.empty_classes
        counts = np.bincount(self.labels[self.labels >= 0], minlength=self.spec.num_classes)
        return tuple(np.flatnonzero(counts[: self.spec.num_classes] == 0).tolist())

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of shape, labels and pixels, in order: equal for equal content in any container."""
        return fingerprint(self.spec, self.labels, self.digests)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSet:
        """The pictures at `indices`, in that order, as a set of its own."""
        rows = np.asarray(indices, dtype=np.int64)
        parent = self.pixels

        return replace(
            self,
            pixels=parent[rows] if isinstance(parent, np.ndarray) else _Part(parent, rows),
            labels=self.labels[rows],
            names=_picked(self.names, rows),
            digests=_picked(self.digests, rows),
            captions=None if self.captions is None else _picked(self.captions, rows),
            subgroups=None if self.subgroups is None else _picked(self.subgroups, rows),
            splits=None if self.splits is None else _picked(self.splits, rows),
        )


def _picked(values: Sequence[T], rows: npt.NDArray[np.int64]) -> Sequence[T]:
    """Those at `rows`; what is packed stays packed."""
    if isinstance(values, (Texts, Digests)):
        return cast(Sequence[T], values.pick(rows))
    return tuple(values[i] for i in rows)


@dataclass(frozen=True)
class _Part:
    """Some of what a reader reads; other processes can be given it."""

    read: Read
    rows: npt.NDArray[np.int64]

    def __call__(self, indices: npt.NDArray[np.int64]) -> Pixels:
        return self.read(self.rows[indices])


def digest(pixels: Pixels) -> bytes:
    """sha256 of one picture's pixels [H, W, C] as RGB, so that a grey file and its RGB copy agree."""
    return hashlib.sha256(with_channels(pixels, 3).tobytes()).digest()


def fingerprint(spec: DataSpec, labels: Labels, digests: Iterable[bytes]) -> str:
    """sha256 (hex) over the shape of the set, its labels and the pictures' own digests, in order."""
    total = hashlib.sha256(f"{len(labels)}x{'x'.join(map(str, spec.shape))}".encode())
    total.update(labels.astype("<i8").tobytes())
    for each in [np.ascontiguousarray(digests.array).data] if isinstance(digests, Digests) else digests:
        total.update(each)
    return total.hexdigest()


def held_out(key: str) -> bool:
    """Whether the picture known by `key` is in the test split: a tenth of all keys, by their sha256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()) % 10 == 0
