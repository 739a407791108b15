"""Measures from nearest neighbours in feature space: precision, recall, density and coverage.

Source     precision and recall: Kynkaanniemi et al. 2019 (1904.06991), section 2, k = 3;
           density and coverage: Naeem et al. 2020 (2002.09797), section 3, k = 5.
Which way  precision = share of *generated* images inside the union of *real* balls (quality);
           recall    = share of *real* images inside the union of *generated* balls (diversity);
           density   = mean number of real balls around a generated image, over k (may exceed 1);
           coverage  = share of real balls that hold a generated image.
Balls      A point's ball reaches its k-th neighbour in its own set, itself not counted. The first pair of
           measures counts the border in, the second does not, as in their authors' programs.

All arithmetic is float64 and cut into chunks: memory is chunk x n, time n x m x d.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagewright.metrics.statistics import Floats
from imagewright.types import UserError

CHUNK = 1024
K_PRECISION_RECALL, K_DENSITY_COVERAGE = 3, 5


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Precision, recall and coverage in [0, 1]; density >= 0; the k of each pair."""

    precision: float
    recall: float
    density: float
    coverage: float
    k_precision_recall: int
    k_density_coverage: int


def squared_distances(a: Floats, b: Floats) -> Floats:
    """Squared Euclidean distances [n, m] of a [n, d] and b [m, d].

    By |a|^2 + |b|^2 - 2 a.b, whose round-off could part two equal points; below that round-off counts as 0.
    """
    scale = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    squared: Floats = scale - 2 * (a @ b.T)
    squared[squared < a.shape[1] * np.finfo(np.float64).eps * scale] = 0.0
    return squared


def _chunks(a: Floats, b: Floats, chunk: int) -> Iterator[tuple[int, Floats]]:
    for start in range(0, len(a), chunk):
        yield start, squared_distances(a[start : start + chunk], b)


def squared_radii(points: Floats, ks: tuple[int, ...], chunk: int = CHUNK) -> Floats:
    """Squared distance of each point [n, d] to its k-th neighbour in the set, itself left out: [len(ks), n].

    Raises UserError unless 1 <= k < n for every k.
    """
    for k in ks:
        if not 1 <= k < len(points):
            raise UserError(f"k must lie in 1..{len(points) - 1} for {len(points)} points, got {k}")
    radii = np.empty((len(ks), len(points)))
    for start, squared in _chunks(points, points, chunk):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = -1.0  # a point is its own neighbour 0, also where it has duplicates
        ordered = np.partition(squared, ks, axis=1)
        radii[:, start : start + len(squared)] = ordered[:, ks].T
    return radii


def neighbourhood(
    real: npt.NDArray[Any],
    fake: npt.NDArray[Any],
    *,
    k_precision_recall: int = K_PRECISION_RECALL,
    k_density_coverage: int = K_DENSITY_COVERAGE,
    chunk: int = CHUNK,
) -> Neighbourhood:
    """The four measures of real [n, d] and generated [m, d] features; a set needs more points than its k."""
    real, fake = np.asarray(real, dtype=np.float64), np.asarray(fake, dtype=np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise UserError(f"features must be [n, d] and [m, d], got {list(real.shape)} and {list(fake.shape)}")
    real_closed, real_open = squared_radii(real, (k_precision_recall, k_density_coverage), chunk)
    (fake_closed,) = squared_radii(fake, (k_precision_recall,), chunk)
    precise = balls = 0
    recalled = np.zeros(len(real), dtype=bool)
    covered = np.zeros(len(real), dtype=bool)
    for start, squared in _chunks(fake, real, chunk):
        precise += int((squared <= real_closed).any(axis=1).sum())
        recalled |= (squared <= fake_closed[start : start + len(squared), None]).any(axis=0)
        inside = squared < real_open
        balls += int(inside.sum())
        covered |= inside.any(axis=0)
    return Neighbourhood(
        precision=precise / len(fake),
        recall=float(recalled.mean()),
        density=balls / (k_density_coverage * len(fake)),
        coverage=float(covered.mean()),
        k_precision_recall=k_precision_recall,
        k_density_coverage=k_density_coverage,
    )


def nearest_rows(
    queries: npt.NDArray[Any], points: npt.NDArray[Any], k: int, chunk: int = CHUNK
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The k nearest of points [m, d] for each query [n, d]: indices and distances [n, k], nearest first.

    Equal distances come in the order of their index. Raises UserError unless 1 <= k <= m.
    """
    queries, points = np.asarray(queries, dtype=np.float64), np.asarray(points, dtype=np.float64)
    if not 1 <= k <= len(points):
        raise UserError(f"k must lie in 1..{len(points)} (the number of reference images), got {k}")
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k))
    for start, squared in _chunks(queries, points, chunk):
        rows = slice(start, start + len(squared))
        indices[rows] = np.argsort(squared, axis=1, kind="stable")[:, :k]
        distances[rows] = np.sqrt(np.take_along_axis(squared, indices[rows], axis=1))
    return indices, distances
