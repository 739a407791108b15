"""The kernel distance against sums written out, its expectation, and a fixed value of the subset drawing."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from imagewright.metrics.kernel import kernel_distance, unbiased_mmd2
from imagewright.types import UserError


def k(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def test_mmd_is_the_sum_over_distinct_pairs() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 3)), random.normal(size=(4, 3))
    xx = np.mean([k(a, b) for (i, a), (j, b) in product(enumerate(x), repeat=2) if i != j])
    yy = np.mean([k(a, b) for (i, a), (j, b) in product(enumerate(y), repeat=2) if i != j])
    xy = np.mean([k(a, b) for a, b in product(x, y)])
    assert unbiased_mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_one_dimension_by_hand() -> None:
    # x = {0, 1}, y = {0, 2}: k(0, .) = 1, k(1, 2) = 27.
    assert unbiased_mmd2(np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])) == pytest.approx(1 + 1 - 2 * 30 / 4)


def test_is_unbiased_for_equal_distributions() -> None:
    random = np.random.default_rng(1)
    draws = [unbiased_mmd2(random.normal(size=(8, 2)), random.normal(size=(8, 2))) for _ in range(4000)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    assert min(draws) < 0


def test_subsets_are_those_of_the_reference_implementation() -> None:
    # Each subset: rows of the first set, then of the second, without replacement, from RandomState(seed).
    random = np.random.default_rng(2)
    a, b = random.normal(size=(30, 4)), random.normal(size=(25, 4)) + 0.5
    state = np.random.RandomState(2020)
    values = []
    for _ in range(7):
        x = a[state.choice(30, 10, replace=False)]
        y = b[state.choice(25, 10, replace=False)]
        values.append(unbiased_mmd2(x, y))
    got = kernel_distance(a, b, subsets=7, subset_size=10, seed=2020)
    assert got.value == pytest.approx(np.mean(values), rel=1e-12)
    assert got.std == pytest.approx(np.std(values), rel=1e-12)
    assert got.stderr == pytest.approx(np.std(values) / np.sqrt(6), rel=1e-12)


def test_float32_features_are_computed_in_float64() -> None:
    a, b = np.random.default_rng(3).normal(size=(2, 20, 4)).astype(np.float32)
    low = kernel_distance(a, b, subsets=3, subset_size=20)
    high = kernel_distance(a.astype(np.float64), b.astype(np.float64), subsets=3, subset_size=20)
    assert low == high


@pytest.mark.parametrize("size", [1, 21])
def test_subset_size_has_a_range(size: int) -> None:
    with pytest.raises(UserError, match=rf"2\.\.20.*got {size}"):
        kernel_distance(np.zeros((20, 2)), np.zeros((30, 2)), subset_size=size)
