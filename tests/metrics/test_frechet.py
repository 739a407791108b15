"""The Frechet distance against closed forms on Gaussians, and the published formula with scipy's sqrtm."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.statistics import Moments, moments_of
from imagewright.types import UserError


def gaussian(mean: np.ndarray, cov: np.ndarray) -> Moments:
    return Moments(mean=mean, cov=cov)


def test_diagonal_gaussians() -> None:
    random = np.random.default_rng(0)
    m, n, s, t = random.uniform(0.1, 3, (4, 6))
    got = frechet_distance(gaussian(m, np.diag(s**2)), gaussian(n, np.diag(t**2)))
    assert got == pytest.approx(((m - n) ** 2).sum() + ((s - t) ** 2).sum(), rel=1e-12)


def test_rotating_both_changes_nothing() -> None:
    random = np.random.default_rng(1)
    m, n, s, t = random.uniform(0.1, 3, (4, 6))
    q = ortho_group.rvs(6, random_state=2)
    got = frechet_distance(gaussian(q @ m, q @ np.diag(s) @ q.T), gaussian(q @ n, q @ np.diag(t) @ q.T))
    assert got == pytest.approx(((m - n) ** 2).sum() + ((s**0.5 - t**0.5) ** 2).sum(), rel=1e-12)


def test_two_by_two_that_do_not_commute() -> None:
    # tr sqrt(AB) = sqrt(tr AB + 2 sqrt det AB) in two dimensions.
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    got = frechet_distance(gaussian(np.zeros(2), a), gaussian(np.zeros(2), b))
    assert got == pytest.approx(np.trace(a) + np.trace(b) - 2 * cross, rel=1e-12)


def test_identical_is_zero_also_when_rank_deficient() -> None:
    x = np.random.default_rng(3).normal(0, 100, (10, 64))  # rank 9 of 64
    a = moments_of(x)
    assert 0 <= frechet_distance(a, a) < 1e-12 * np.trace(a.cov)


def test_rank_one_covariances() -> None:
    # sqrt(u u^T) = u u^T / |u|, so tr sqrt(AB) = |u . v|.
    u, v = np.random.default_rng(4).normal(size=(2, 32))
    got = frechet_distance(gaussian(np.zeros(32), np.outer(u, u)), gaussian(np.zeros(32), np.outer(v, v)))
    assert got == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)


def test_a_point_against_a_gaussian() -> None:
    cov = np.diag([1.0, 4.0])
    assert frechet_distance(gaussian(np.zeros(2), np.zeros((2, 2))), gaussian(np.ones(2), cov)) == pytest.approx(7)


def test_agrees_with_the_published_formula() -> None:
    random = np.random.default_rng(5)
    x, y = random.normal(size=(200, 12)), random.normal(0.3, 1.5, (150, 12)) @ random.normal(size=(12, 12))
    a, b = moments_of(x), moments_of(y)
    published = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * sqrtm(a.cov @ b.cov).real)
    assert frechet_distance(a, b) == pytest.approx(published, rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_dimensions_must_agree() -> None:
    with pytest.raises(UserError, match="2 and 3"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))
