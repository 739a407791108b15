"""What a set holds, in numbers, and its conversion to EDM's format: the library behind `imagewright data`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagewright.data.edm_zip import write_edm_zip
from imagewright.data.image_set import ImageSet
from imagewright.data.opening import Progress, open_images
from imagewright.data.pixels import Filter
from imagewright.types import DataSpec

_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Info:
    """A set in numbers.

    per_class: pictures of each class, empty without classes. per_split: pictures of each split ("train"
    without splits).
    mean, std: over all pixels and channels in [-1, 1]; std is the sigma_data of the set.
    """

    spec: DataSpec
    source: str
    count: int
    per_class: tuple[int, ...]
    per_split: dict[str, int]
    mean: float
    std: float
    skipped: tuple[tuple[str, str], ...]
    unread: tuple[str, ...]
    fingerprint: str


def info(
    source: str | Path,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    on_progress: Progress | None = None,
) -> Info:
    """Open a set, all splits, and count. Unusable files are listed in `skipped` rather than refused.

    Raises UserError as `open_images` does.
    """
    images = open_images(
        source, resolution=resolution, channels=channels, split="all", skip_bad=True, on_progress=on_progress
    )
    mean, std = pixel_moments(images)
    return Info(
        spec=images.spec,
        source=images.source,
        count=len(images),
        per_class=tuple(np.bincount(images.labels, minlength=images.spec.num_classes).tolist())
        if images.spec.num_classes
        else (),
        per_split=dict(Counter(images.splits or ["train"] * len(images))),
        mean=mean,
        std=std,
        skipped=images.skipped,
        unread=images.unread,
        fingerprint=images.fingerprint,
    )


def pixel_moments(images: ImageSet) -> tuple[float, float]:
    """Mean and standard deviation of all pixels in [-1, 1], from exact counts of the 256 values."""
    histogram = np.zeros(256, dtype=np.int64)
    for first in range(0, len(images), _AT_ONCE):
        histogram += np.bincount(images.images(slice(first, first + _AT_ONCE)).ravel(), minlength=256)
    values = np.arange(256) / 127.5 - 1
    share = histogram / histogram.sum()
    mean = float(share @ values)
    return mean, float(np.sqrt(share @ (values - mean) ** 2))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    crop: Filter | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> ImageSet:
    """Write any set, all splits, as an EDM zip (`write_edm_zip`); returns the set that was written.

    Raises UserError as `open_images` and `write_edm_zip` do.
    """
    images = open_images(
        source,
        resolution=resolution,
        channels=channels,
        split="all",
        crop=crop,
        skip_bad=skip_bad,
        on_progress=on_progress,
    )
    write_edm_zip(images, out)
    return images
