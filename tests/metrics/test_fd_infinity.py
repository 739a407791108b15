"""The distance carried on to infinitely many images."""

from __future__ import annotations

import numpy as np
import pytest

from imagewright.metrics.fd_infinity import fd_infinity
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.statistics import moments_of
from imagewright.types import UserError


def test_of_equal_distributions_it_is_zero_where_the_distance_is_not() -> None:
    random = np.random.default_rng(0)
    reference = moments_of(random.standard_normal((50_000, 8)))
    values, plain = [], []
    for _ in range(10):
        features = random.standard_normal((400, 8))
        values.append(fd_infinity(features, reference).value)
        plain.append(frechet_distance(moments_of(features), reference))
    assert abs(np.mean(values)) < 0.2 * np.mean(plain) and np.mean(plain) > 0.02


def test_a_shift_stays() -> None:
    random = np.random.default_rng(1)
    reference = moments_of(random.standard_normal((50_000, 4)))
    found = fd_infinity(random.standard_normal((2000, 4)) + 1, reference)
    assert found.value == pytest.approx(4, abs=5 * found.stderr + 0.25) and found.smallest == 200 and found.points == 15


def test_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="needs at least 20 images, and there are 19"):
        fd_infinity(np.zeros((19, 2)), moments_of(np.eye(2)))
