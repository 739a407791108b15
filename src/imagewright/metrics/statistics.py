"""Mean and covariance of features, gathered batch by batch in float64; memory does not grow with the images.

Source     pairwise update of Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm".
File       npz with `mu` [d] and `sigma` [d, d], the keys of EDM's reference files, so either side reads the
           other's; ours adds `count`, `class_counts` and `provenance` (JSON text). Read with allow_pickle=False.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from imagewright.arrays import read_npz
from imagewright.files import parse_json, replacing
from imagewright.types import UserError

Floats = npt.NDArray[np.float64]


class HasMoments(Protocol):
    """What a Frechet distance needs: mean [d] and covariance [d, d], float64."""

    @property
    def mean(self) -> Floats: ...

    @property
    def cov(self) -> Floats: ...


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean [d] and unbiased covariance [d, d] at rest. `count` is None where the file did not say.

    class_counts: how many images each class has, where they have classes; what is drawn to be compared with these
    moments is drawn in the same shares (`draws`).
    """

    mean: Floats
    cov: Floats
    count: int | None = None
    class_counts: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


class FeatureStatistics:
    """Running mean and scatter of features: `update` with [n, d] batches, `merge` with others, then read."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean: Floats = np.zeros(dim)
        self._scatter: Floats = np.zeros((dim, dim))  # sum of outer products around the mean

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self._mean)

    def update(self, features: npt.NDArray[Any]) -> None:
        """Add features [n, d], any real dtype. Raises UserError on another shape or a non-finite value."""
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise UserError(f"features must have shape [n, {self.dim}], got {list(batch.shape)}")
        if not np.isfinite(batch).all():
            raise UserError("features hold values that are not finite; the images or the extractor are damaged")
        if len(batch):
            mean = batch.mean(axis=0)
            centred = batch - mean
            self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add everything another accumulator has seen, as if its batches had come here."""
        if other.dim != self.dim:
            raise UserError(f"cannot merge statistics of dimension {other.dim} into dimension {self.dim}")
        self._add(other.count, other._mean, other._scatter)

    def _add(self, count: int, mean: Floats, scatter: Floats) -> None:
        total = self.count + count
        if total == 0:
            return
        shift = mean - self._mean
        self._scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    @property
    def mean(self) -> Floats:
        """[d]; raises UserError before the first feature."""
        if self.count < 1:
            raise UserError("a mean needs at least 1 image, got 0")
        return self._mean.copy()

    @property
    def cov(self) -> Floats:
        """Unbiased covariance [d, d]; raises UserError with fewer than 2 features."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)

    def moments(self, provenance: Mapping[str, Any] | None = None) -> Moments:
        """The statistics so far, at rest."""
        return Moments(mean=self.mean, cov=self.cov, count=self.count, provenance=dict(provenance or {}))


def moments_of(features: npt.NDArray[Any]) -> Moments:
    """Moments of features [n, d] already in memory, n >= 2."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.moments()


def save_moments(path: Path, moments: Moments) -> None:
    """Write an npz that EDM's evaluation reads too (keys mu, sigma), atomically."""
    entries: dict[str, Any] = {"mu": moments.mean, "sigma": moments.cov}
    if moments.count is not None:
        entries["count"] = np.int64(moments.count)
    if moments.class_counts is not None:
        entries["class_counts"] = np.array(moments.class_counts, dtype=np.int64)
    entries["provenance"] = np.array(json.dumps(dict(moments.provenance)))
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, **entries)


def load_moments(path: Path) -> Moments:
    """Read mean and covariance from an npz with mu [d] and sigma [d, d]; all else is optional.

    Raises UserError when the file is missing, is no such npz, holds objects (pickles), or shapes disagree.
    """
    entries = read_npz(path, ("mu", "sigma", "count", "class_counts", "provenance"))
    try:
        mean, cov = (np.asarray(entries[key], dtype=np.float64) for key in ("mu", "sigma"))
        count = int(entries["count"]) if "count" in entries else None
        class_counts = tuple(int(k) for k in entries["class_counts"]) if "class_counts" in entries else None
        text = str(entries["provenance"]) if "provenance" in entries else "{}"
        provenance: dict[str, Any] = parse_json(text, f"{path}: provenance", dict)
    except KeyError as error:
        raise UserError(f"{path} lacks the array {error}; a reference file has mu [d] and sigma [d, d]") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no readable npz of mu and sigma: {error}") from None
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu {list(mean.shape)} and sigma {list(cov.shape)} must be [d] and [d, d]")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f"{path} holds values that are not finite")
    return Moments(mean=mean, cov=cov, count=count, class_counts=class_counts, provenance=provenance)
