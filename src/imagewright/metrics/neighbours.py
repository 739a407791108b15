"""Measures from nearest neighbours in feature space: precision, recall, density and coverage.

Source     precision and recall: Kynkaanniemi et al. 2019 (1904.06991), section 2, k = 3;
           density and coverage: Naeem et al. 2020 (2002.09797), section 3, k = 5.
Which way  precision = share of *generated* images inside the union of *real* balls (quality);
           recall    = share of *real* images inside the union of *generated* balls (diversity);
           density   = mean number of real balls around a generated image, over k (may exceed 1);
           coverage  = share of real balls that hold a generated image.
Balls      A point's ball reaches its k-th neighbour in its own set, itself not counted. The first pair of
           measures counts the border in, the second does not, as in their authors' programs.

All arithmetic is float64, in blocks of both sets: memory is some 0.3 GB beside the features, whatever their number;
time is n x m x d.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagewright.metrics.statistics import Floats
from imagewright.types import UserError

CHUNK, COLUMNS = 1024, 4096
"""Rows and columns of a block of distances."""
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
    """Squared Euclidean distances [n, m] of a [n, d] and b [m, d], float64.

    By |a|^2 + |b|^2 - 2 a.b, whose round-off could part two equal points; below that round-off counts as 0.
    """
    scale = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    squared: Floats = -2 * (a @ b.T)
    squared += scale
    scale *= a.shape[1] * np.finfo(np.float64).eps
    squared[squared < scale] = 0.0
    return squared


def _blocks(a: npt.NDArray[Any], b: npt.NDArray[Any], columns: int) -> Iterator[tuple[slice, Floats]]:
    """Squared distances of all of a [n, d] and some of b [m, d] at a time; columns: their number."""
    rows = a.astype(np.float64)
    for start in range(0, len(b), columns):
        part = slice(start, min(start + columns, len(b)))
        yield part, squared_distances(rows, b[part].astype(np.float64))


def _row_parts(points: npt.NDArray[Any], chunk: int) -> Iterator[slice]:
    for start in range(0, len(points), chunk):
        yield slice(start, min(start + chunk, len(points)))


def squared_radii(points: npt.NDArray[Any], ks: tuple[int, ...], chunk: int = CHUNK, columns: int = COLUMNS) -> Floats:
    """Squared distance of each point [n, d] to its k-th neighbour in the set, itself left out: [len(ks), n].

    Raises UserError unless 1 <= k < n for every k.
    """
    for k in ks:
        if not 1 <= k < len(points):
            raise UserError(f"k must lie in 1..{len(points) - 1} for {len(points)} points, got {k}")
    radii, most = np.empty((len(ks), len(points))), max(ks)
    for rows in _row_parts(points, chunk):
        nearest = np.empty((rows.stop - rows.start, 0))
        for part, squared in _blocks(points[rows], points, columns):
            # A point is its own neighbour 0, also where it has duplicates.
            own = np.arange(max(rows.start, part.start), min(rows.stop, part.stop))
            squared[own - rows.start, own - part.start] = -1.0
            if squared.shape[1] > most + 1:
                squared = np.partition(squared, most, axis=1)[:, : most + 1]
            nearest = np.sort(np.concatenate([nearest, squared], axis=1), axis=1)[:, : most + 1]
        radii[:, rows] = nearest[:, ks].T
    return radii


def neighbourhood(
    real: npt.NDArray[Any],
    fake: npt.NDArray[Any],
    *,
    k_precision_recall: int = K_PRECISION_RECALL,
    k_density_coverage: int = K_DENSITY_COVERAGE,
    chunk: int = CHUNK,
    columns: int = COLUMNS,
) -> Neighbourhood:
    """The four measures of real [n, d] and generated [m, d] features; a set needs more points than its k."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise UserError(f"features must be [n, d] and [m, d], got {list(real.shape)} and {list(fake.shape)}")
    real_closed, real_open = squared_radii(real, (k_precision_recall, k_density_coverage), chunk, columns)
    (fake_closed,) = squared_radii(fake, (k_precision_recall,), chunk, columns)
    precise, recalled, covered = (np.zeros(n, dtype=bool) for n in (len(fake), len(real), len(real)))
    balls = 0
    for rows in _row_parts(fake, chunk):
        for part, squared in _blocks(fake[rows], real, columns):
            precise[rows] |= (squared <= real_closed[part]).any(axis=1)
            recalled[part] |= (squared <= fake_closed[rows, None]).any(axis=0)
            inside = squared < real_open[part]
            balls += int(inside.sum())
            covered[part] |= inside.any(axis=0)
    return Neighbourhood(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=balls / (k_density_coverage * len(fake)),
        coverage=float(covered.mean()),
        k_precision_recall=k_precision_recall,
        k_density_coverage=k_density_coverage,
    )


def nearest_rows(
    queries: npt.NDArray[Any], points: npt.NDArray[Any], k: int, chunk: int = CHUNK, columns: int = COLUMNS
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The k nearest of points [m, d] for each query [n, d]: indices and distances [n, k], nearest first.

    Equal distances come in the order of their index. Raises UserError unless 1 <= k <= m.
    """
    if not 1 <= k <= len(points):
        raise UserError(f"k must lie in 1..{len(points)} (the number of reference images), got {k}")
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k))
    for rows in _row_parts(queries, chunk):
        count = rows.stop - rows.start
        found, far = np.empty((count, 0), dtype=np.int64), np.empty((count, 0))
        for part, squared in _blocks(queries[rows], points, columns):
            here = np.broadcast_to(np.arange(part.start, part.stop), squared.shape)
            found, far = np.concatenate([found, here], axis=1), np.concatenate([far, squared], axis=1)
            order = np.argsort(far, axis=1, kind="stable")[:, :k]  # stable: what was found before has lower indices
            found, far = np.take_along_axis(found, order, axis=1), np.take_along_axis(far, order, axis=1)
        indices[rows], distances[rows] = found, np.sqrt(far)
    return indices, distances
