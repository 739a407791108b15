"""Neighbour measures on points one can check by hand, and against the published formulas by brute force."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from imagewright.metrics.neighbours import nearest_rows, neighbourhood, squared_distances, squared_radii
from imagewright.types import UserError


def line(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_by_hand_on_a_line() -> None:
    # Real 0 1 3 with k = 1: radii 1 1 2. Generated 2 10 11: radii 8 1 1.
    got = neighbourhood(line(0, 1, 3), line(2, 10, 11), k_precision_recall=1, k_density_coverage=1)
    assert got.precision == pytest.approx(1 / 3)  # 2 lies in the balls of 1 (on the border) and 3; 10, 11 in none
    assert got.recall == pytest.approx(1)  # the ball of 2 reaches from -6 to 10
    assert got.density == pytest.approx(1 / 3)  # open balls: 2 is inside that of 3 alone
    assert got.coverage == pytest.approx(1 / 3)  # only the ball of 3 holds a generated point


def test_precision_is_quality_and_recall_is_diversity() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(200, 2))
    collapsed = real[:1] + random.normal(0, 1e-3, (200, 2))  # good images, all alike
    scattered = random.normal(0, 30, (200, 2))  # everything, most of it bad
    assert neighbourhood(real, collapsed).precision == 1
    assert neighbourhood(real, collapsed).recall < 0.05
    assert neighbourhood(real, scattered).recall > 0.9
    assert neighbourhood(real, scattered).precision < 0.1


def test_swapping_the_sets_swaps_precision_and_recall() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 40, 3))
    one, other = neighbourhood(a, b), neighbourhood(b, a)
    assert (one.precision, one.recall) == (other.recall, other.precision)


def test_agrees_with_the_published_formulas() -> None:
    random = np.random.default_rng(2)
    real, fake = random.normal(size=(60, 4)), random.normal(0.4, 1, (45, 4))

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b) ** 2).sum(axis=2))

    def radius(a: np.ndarray, k: int) -> np.ndarray:
        return np.sort(distance(a, a), axis=1)[:, k]  # column 0 is the point itself

    got = neighbourhood(real, fake, chunk=7)
    assert got.precision == (distance(fake, real) <= radius(real, 3)).any(axis=1).mean()
    assert got.recall == (distance(real, fake) <= radius(fake, 3)).any(axis=1).mean()
    assert got.density == pytest.approx((distance(fake, real) < radius(real, 5)).sum() / (5 * 45), rel=1e-12)
    assert got.coverage == (distance(real, fake).min(axis=1) < radius(real, 5)).mean()


@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_blocks_do_not_matter(chunk: int, columns: int) -> None:
    a, b = np.random.default_rng(3).integers(-9, 9, size=(2, 50, 3))  # whole numbers: no round-off, and ties
    assert neighbourhood(a, b, chunk=chunk, columns=columns) == neighbourhood(a, b)
    for one, other in zip(nearest_rows(b, a, 6, chunk, columns), nearest_rows(b, a, 6), strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Numbers that are made, beside the features: at 50,000 x 50,000 it was 2.6 GB, and is 0.3 at any number."""
    random = np.random.default_rng(5)
    a, b = (random.normal(size=(n, 2)).astype(np.float32) for n in (4000, 100))
    tracemalloc.start()
    neighbourhood(b, a, chunk=100, columns=200)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1.6e6  # 100 rows by 4000 columns alone would be 3.2 MB


def test_copies_are_found_at_distance_zero() -> None:
    # Far from the origin the expanded square would leave a remainder of round-off between equal points.
    points = np.random.default_rng(4).normal(1e3, 1, (50, 64))
    assert (np.diag(squared_distances(points, points.copy())) == 0).all()
    twins = np.repeat(points[:10], 2, axis=0)
    assert (squared_radii(twins, (1,)) == 0).all()
    assert neighbourhood(twins, twins[::2], k_precision_recall=1, k_density_coverage=2).precision == 1


def test_nearest_rows_are_sorted_and_ties_keep_their_order() -> None:
    indices, distances = nearest_rows(line(0, 9), line(5, -1, 1, 10), 3)
    np.testing.assert_array_equal(indices, [[1, 2, 0], [3, 0, 2]])
    np.testing.assert_allclose(distances, [[1, 1, 5], [1, 4, 8]])


def test_k_has_a_range() -> None:
    with pytest.raises(UserError, match=r"1\.\.2 for 3 points, got 3"):
        neighbourhood(line(0, 1, 2), line(0, 1, 2, 3))
    with pytest.raises(UserError, match=r"1\.\.2"):
        nearest_rows(line(0), line(0, 1), 3)
