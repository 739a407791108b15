"""Energy distance between two samples: zero in the limit only if the distributions agree (Szekely and Rizzo 2013).

2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean norms: for points in few dimensions, where no features are needed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from imagewright.types import UserError


def energy_distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """a: [N, d], b: [M, d], N and M at least 2. Unbiased, so it may fall below 0 for samples of one distribution.

    Cost: N M + N^2 + M^2 distances. Raises UserError for other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(f"energy distance needs two samples [N, d] and [M, d], got {a.shape} and {b.shape}")
    return 2 * _mean_between(a, b) - _mean_within(a) - _mean_within(b)


def _mean_between(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """In rows of 1000, so that memory does not grow with N M."""
    return sum(float(cdist(a[i : i + 1000], b).sum()) for i in range(0, len(a), 1000)) / (len(a) * len(b))


def _mean_within(a: npt.NDArray[np.float64]) -> float:
    """Mean distance of different points; a point's own distance, 0, is not counted."""
    return _mean_between(a, a) * len(a) / (len(a) - 1)
