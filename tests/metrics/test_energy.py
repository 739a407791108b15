import numpy as np
import pytest

from imagewright.metrics.energy import energy_distance
from imagewright.types import UserError


def test_two_points_each_by_hand():
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    # between: (1 + 5 + 1 + 3) / 4; within: 2 and 4
    assert energy_distance(a, b) == pytest.approx(2 * 2.5 - 2 - 4)


def test_shifted_normals_have_the_known_distance():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(4000, 1)), generator.normal(size=(3000, 1)) + 1.0
    # E|N(m, 2)| = sqrt(4/pi) exp(-m^2/4) + m erf(m/2)
    from math import erf, exp, pi, sqrt

    def folded(m):
        return sqrt(4 / pi) * exp(-(m**2) / 4) + m * erf(m / 2)

    assert energy_distance(a, b) == pytest.approx(2 * folded(1.0) - 2 * folded(0.0), abs=0.06)
    assert abs(energy_distance(a, generator.normal(size=(3000, 1)))) < 0.005


def test_shapes_are_checked():
    with pytest.raises(UserError, match=r"got \(3, 2\) and \(3, 1\)"):
        energy_distance(np.zeros((3, 2)), np.zeros((3, 1)))
