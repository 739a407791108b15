"""The classifier score against its definition, at its two extremes, streamed and whole."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from imagewright.metrics.inception_score import InceptionScoreStatistics, inception_score
from imagewright.types import UserError


def by_definition(logits: np.ndarray) -> float:
    p = softmax(logits.astype(np.float64), axis=1)
    return float(np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))


def logits(n: int = 103, k: int = 7) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (n, k))


def test_each_split_follows_the_definition() -> None:
    z = logits()
    order = np.random.RandomState(2020).permutation(103)
    parts = [by_definition(z[order][i * 103 // 10 : (i + 1) * 103 // 10]) for i in range(10)]
    got = inception_score(z)
    assert got.value == pytest.approx(np.mean(parts), rel=1e-12)
    assert got.std == pytest.approx(np.std(parts), rel=1e-9)
    assert got.splits == 10


def test_confident_and_balanced_scores_the_number_of_classes() -> None:
    assert inception_score(np.tile(np.eye(5) * 1000, (8, 1)), splits=1).value == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [1000.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
def test_equal_predictions_score_one(row: list[float]) -> None:
    assert inception_score(np.tile(row, (20, 1))).value == pytest.approx(1, abs=1e-12)


def test_streaming_in_one_split_is_the_definition() -> None:
    z = logits()
    statistics = InceptionScoreStatistics(7, splits=1)
    for part in np.array_split(z, 6):
        statistics.update(part)
    assert statistics.result().value == pytest.approx(by_definition(z), rel=1e-12)


@pytest.mark.parametrize("parts", [1, 7, 103])
def test_streaming_does_not_depend_on_batches(parts: int) -> None:
    z = logits()
    whole, cut = InceptionScoreStatistics(7), InceptionScoreStatistics(7)
    whole.update(z)
    for part in np.array_split(z, parts):
        cut.update(part)
    assert cut.result().value == pytest.approx(whole.result().value, rel=1e-12)


def test_classes_in_rotation_do_not_gather_in_one_split() -> None:
    # Ten classes in turn, ten splits: dealing image i to split i % 10 would give each one class, score 1.
    statistics = InceptionScoreStatistics(10)
    statistics.update(np.tile(np.eye(10) * 1000, (100, 1)))
    assert statistics.result().value > 8


def test_impossible_requests() -> None:
    with pytest.raises(UserError, match=r"1\.\.3"):
        inception_score(np.zeros((3, 2)))
    with pytest.raises(UserError, match="at least 1 image"):
        InceptionScoreStatistics(2).result()
    with pytest.raises(UserError, match=r"\[n, 2\]"):
        InceptionScoreStatistics(2).update(np.zeros((3, 4)))
