"""What a set holds, in numbers, and its conversion to EDM's format: the library behind `imagewright data`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from imagewright.data.edm_zip import write_edm_zip
from imagewright.data.fitting import Filter, Fit
from imagewright.data.image_set import ImageSet
from imagewright.data.opening import Progress, open_images
from imagewright.types import DataSpec, UserError

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
    fit: Fit | None = None,
    filter: Filter = "lanczos",
    holdout: float | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> ImageSet:
    """Write any set, all splits, as an EDM zip (`write_edm_zip`); returns the set that was written.

    holdout: share of the pictures that become the test split (`hold_out`). Raises UserError as `open_images`,
    `hold_out` and `write_edm_zip` do.
    """
    images = open_images(
        source,
        resolution=resolution,
        channels=channels,
        split="all",
        fit=fit,
        filter=filter,
        skip_bad=skip_bad,
        on_progress=on_progress,
    )
    if holdout is not None:
        images = hold_out(images, holdout)
    write_edm_zip(images, out)
    return images


def hold_out(images: ImageSet, share: float) -> ImageSet:
    """The set with a test split of about that share of it, decided by each picture's own hash.

    Pictures of equal pixels are on one side, and a picture stays on its side whatever is added, taken away or renamed.
    Raises UserError where the set has splits, the share is not within (0, 1), or a side would be empty.
    """
    if not 0 < share < 1:
        raise UserError(f"holdout is {share:g}; it must lie between 0 and 1")
    if images.splits is not None:
        raise UserError(f"{images.source} already has splits {sorted(set(images.splits))}; holdout would mix them")
    splits = tuple("test" if int.from_bytes(d[:8]) < share * 2**64 else "train" for d in images.digests)
    if len(set(splits)) < 2:
        raise UserError(
            f"holdout {share:g} puts all {len(splits)} pictures in split {splits[0]!r}; choose another share"
        )
    return replace(images, splits=splits)
