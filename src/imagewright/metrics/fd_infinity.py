"""FD-infinity: what a Frechet distance tends to as the number of generated images grows.

Source   Chong & Forsyth 2020 (1911.07023): the distance's bias is nearly proportional to 1 / n, so distances of subsets
         of several sizes are fitted by a straight line in 1 / n, and its value at 0 is taken.
Departs  subsets are drawn by our own generator, not by Sobol points; the reference's own bias (1 / N) stays, as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.statistics import Moments, moments_of
from imagewright.types import UserError

POINTS = 15
LEAST_SHARE = 0.1
"""The smallest subset, as a share of the images (the paper's 5,000 of 50,000)."""
SEED = 2020


@dataclass(frozen=True, kw_only=True)
class FDInfinity:
    """The line's value at 1 / n = 0, its standard error from the residuals, its slope, and the smallest subset.

    value may lie below 0 where the distances are hardly more than their bias.
    """

    value: float
    stderr: float
    slope: float
    points: int
    smallest: int


def fd_infinity(features: npt.NDArray[np.floating], reference: Moments, *, points: int = POINTS) -> FDInfinity:
    """features: [n, d] of generated images, n >= 20. Raises UserError on fewer."""
    count = len(features)
    if count < 20:
        raise UserError(f"fd_inf needs at least 20 images, and there are {count}")
    sizes = np.unique(np.linspace(max(LEAST_SHARE * count, 2), count, points).round().astype(int))
    random = np.random.Generator(np.random.PCG64(SEED))
    distances = [
        frechet_distance(moments_of(features[random.choice(count, size, replace=False)]), reference) for size in sizes
    ]
    x = 1 / sizes
    design = np.stack([np.ones_like(x), x], axis=1)
    (value, slope), *_ = np.linalg.lstsq(design, np.array(distances), rcond=None)
    residual = np.array(distances) - design @ np.array([value, slope])
    variance = residual @ residual / max(len(x) - 2, 1) * np.linalg.inv(design.T @ design)[0, 0]
    return FDInfinity(
        value=float(value),
        stderr=float(variance**0.5),
        slope=float(slope),
        points=len(sizes),
        smallest=int(sizes[0]),
    )
