"""Distances to a ring of modes in closed form, against those to many of its points."""

import numpy as np
import pytest

from imagewright.bench.claims.rings import distance_to, frechet_to, ring
from imagewright.metrics.energy import energy_distance
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.statistics import moments_of
from imagewright.noise import StepNoise


def points(seed: int, count: int, std: float = 0.15):
    return ring(3, std).sample(count, StepNoise(seed, 2)).flatten(1).numpy()


@pytest.mark.parametrize("shift", [0.05, 0.4])
def test_distances_are_the_limit_of_those_to_many_points(shift):
    moved, real = points(1, 800) + shift, points(2, 20_000)
    assert distance_to(ring(3), moved) == pytest.approx(1000 * energy_distance(moved, real), abs=1.0)
    limit = 1000 * frechet_distance(moments_of(moved), moments_of(real))
    assert frechet_to(ring(3), moved) == pytest.approx(limit, rel=0.15, abs=1.0)


def test_points_of_the_ring_are_at_distance_zero_on_average():
    values = [distance_to(ring(3), points(seed, 300)) for seed in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert np.mean(values) < 0.1 * distance_to(ring(3), points(1, 300, std=0.4))
