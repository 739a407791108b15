"""Kernel distance (KID on Inception features): unbiased squared MMD with a cubic polynomial kernel.

Source     Binkowski et al. 2018 (1801.01401), section 4: k(x, y) = (x . y / d + 1)^3, unbiased estimator
           averaged over random subsets. Subset drawing and defaults (100 subsets of 1000) follow
           torch-fidelity's definition, so that equal features and an equal seed give its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewright.metrics.statistics import Floats
from imagewright.types import UserError

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020
"""Of the subsets, torch-fidelity's."""


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """Mean over subsets; `std` between subsets (divisor n); `stderr` of the mean.

    Subsets overlap, so `stderr` covers the drawing of subsets only, not the drawing of the images themselves.
    The estimator is unbiased: values slightly below 0 are valid and mean "indistinguishable".
    """

    value: float
    std: float
    stderr: float
    subsets: int
    subset_size: int


def polynomial_kernel(x: Floats, y: Floats) -> Floats:
    """(x . y / d + 1)^3 for every pair: [n, d], [m, d] -> [n, m]."""
    base: Floats = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # several times faster than a power


def unbiased_mmd2(x: Floats, y: Floats) -> float:
    """Unbiased squared maximum mean discrepancy of x [n, d] and y [m, d], n and m at least 2."""

    def within(k: Floats) -> float:
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    between = float(polynomial_kernel(x, y).mean())
    return within(polynomial_kernel(x, x)) + within(polynomial_kernel(y, y)) - 2 * between


def kernel_distance(
    a: npt.NDArray[np.floating],
    b: npt.NDArray[np.floating],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> KernelDistance:
    """Kernel distance between features a [n, d] and b [m, d], computed in float64.

    subset_size: 2 .. min(n, m); it sets the spread, not the expectation. Raises UserError outside that range.
    seed: 0 .. 2**32 - 1, of NumPy's frozen RandomState, whose draws are the same in every NumPy version.
    """
    largest = min(len(a), len(b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"features must be [n, d] and [m, d], got {list(a.shape)} and {list(b.shape)}")
    if not 2 <= subset_size <= largest:
        raise UserError(f"subset_size must lie in 2..{largest} (the smaller set), got {subset_size}")
    if subsets < 1:
        raise UserError(f"subsets must be at least 1, got {subsets}")
    random = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        x = a[random.choice(len(a), subset_size, replace=False)].astype(np.float64)
        y = b[random.choice(len(b), subset_size, replace=False)].astype(np.float64)
        values[i] = unbiased_mmd2(x, y)
    std = float(values.std())
    stderr = float(values.std(ddof=1) / np.sqrt(subsets)) if subsets > 1 else float("nan")
    return KernelDistance(value=float(values.mean()), std=std, stderr=stderr, subsets=subsets, subset_size=subset_size)
