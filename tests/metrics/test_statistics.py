"""Streaming moments equal two-pass moments, whatever the batches; files go round and bad ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from imagewright.metrics.statistics import FeatureStatistics, Moments, load_moments, moments_of, save_moments
from imagewright.types import UserError


def features(n: int = 57, d: int = 5, seed: int = 0) -> np.ndarray:
    # A mean far above the spread, where the naive E[x^2] - E[x]^2 loses its digits.
    return np.random.default_rng(seed).normal(1e4, 1e-1, (n, d))


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [20, 0, 30, 7]])
def test_batches_do_not_matter(sizes: list[int]) -> None:
    x = features()
    statistics = FeatureStatistics(5)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        statistics.update(part)
    assert statistics.count == 57
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics.cov, np.cov(x.T), rtol=1e-8, atol=1e-14)


def test_merging_is_updating() -> None:
    x = features()
    one, other, empty = FeatureStatistics(5), FeatureStatistics(5), FeatureStatistics(5)
    one.update(x[:13])
    other.update(x[13:])
    one.merge(other)
    one.merge(empty)
    np.testing.assert_allclose(one.cov, np.cov(x.T), rtol=1e-8, atol=1e-14)
    assert one.count == 57


def test_float32_features_are_accumulated_in_float64() -> None:
    x = features().astype(np.float32)
    np.testing.assert_allclose(moments_of(x).cov, np.cov(x.astype(np.float64).T), rtol=1e-8, atol=1e-14)


def test_too_few_and_damaged_features() -> None:
    statistics = FeatureStatistics(2)
    with pytest.raises(UserError, match="at least 1"):
        _ = statistics.mean
    statistics.update(np.ones((1, 2)))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        _ = statistics.cov
    with pytest.raises(UserError, match=r"\[n, 2\]"):
        statistics.update(np.ones((1, 3)))
    with pytest.raises(UserError, match="not finite"):
        statistics.update(np.array([[np.nan, 0.0]]))


def test_file_goes_round(tmp_path) -> None:
    path = tmp_path / "ref.npz"
    moments = Moments(mean=np.arange(3.0), cov=np.diag([1.0, 2.0, 3.0]), count=7, provenance={"extractor": "e"})
    save_moments(path, moments)
    back = load_moments(path)
    np.testing.assert_array_equal(back.mean, moments.mean)
    np.testing.assert_array_equal(back.cov, moments.cov)
    assert (back.count, back.provenance) == (7, {"extractor": "e"})
    assert {"mu", "sigma"} <= set(np.load(path, allow_pickle=False).files)


def test_a_file_of_mu_and_sigma_alone_is_read(tmp_path) -> None:
    path = tmp_path / "edm.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    assert load_moments(path).count is None


def test_bad_files_are_refused(tmp_path) -> None:
    def refused(match: str, **entries: object) -> None:
        np.savez(tmp_path / "bad.npz", **entries)
        with pytest.raises(UserError, match=match):
            load_moments(tmp_path / "bad.npz")

    refused("lacks the array 'sigma'", mu=np.zeros(2))
    refused(r"\[d\] and \[d, d\]", mu=np.zeros(2), sigma=np.eye(3))
    refused("not finite", mu=np.full(2, np.nan), sigma=np.eye(2))
    refused("no readable npz", mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(UserError, match="does not exist"):
        load_moments(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="no readable npz"):
        load_moments(tmp_path / "text.npz")
