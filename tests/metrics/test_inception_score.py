"""The classifier score against its definition and at its two extremes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from imagewright.metrics.inception_score import inception_score
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


def test_one_split_is_the_definition() -> None:
    assert inception_score(logits(), splits=1).value == pytest.approx(by_definition(logits()), rel=1e-12)


def test_classes_in_rotation_do_not_gather_in_one_split() -> None:
    # Ten classes, a hundred images of each in a row, ten splits: without shuffling each split has one class, score 1.
    z = np.repeat(np.eye(10) * 1000, 100, axis=0)
    assert inception_score(z).value > 8
    assert inception_score(z, shuffle=False).value == pytest.approx(1)


def test_impossible_requests() -> None:
    with pytest.raises(UserError, match=r"1\.\.3"):
        inception_score(np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"\[n, classes\], got \[3\]"):
        inception_score(np.zeros(3))
