"""Rings of Gaussian modes in the plane, and how far points are from one: exactly, without points to compare with."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.special import ive
from torch import Tensor

from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.statistics import Moments, moments_of
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture

Points = npt.NDArray[np.float64]
MODES = 8


def angles(seed: int, count: int) -> Tensor:
    """Angles of points evenly on a circle, turned by a random one, [count], float64."""
    turn = StepNoise(seed, 4).uniform(torch.empty(1, dtype=torch.float64))[0]
    return (torch.arange(count, dtype=torch.float64) + turn) * 2 * math.pi / count


def circle(seed: int, count: int) -> Tensor:
    """These points on the unit circle, [count, 2, 1, 1]."""
    turned = angles(seed, count)
    return torch.stack([turned.cos(), turned.sin()], 1).reshape(count, 2, 1, 1)


def ring(seed: int, std: float = 0.15) -> GaussianMixture:
    """Eight modes of one std on the unit circle, turned by a random angle; means [8, 2, 1, 1]."""
    return GaussianMixture(circle(seed, MODES), std)


def modes_in(points: Points, oracle: GaussianMixture) -> float:
    """How many of the ring's modes have points: a quarter of their share, within 3 deviations."""
    near = torch.cdist(torch.from_numpy(points), oracle.means.flatten(1)) < 3 * float(oracle.stds[0])
    return float((near.double().mean(0) > 1 / (4 * MODES)).sum())


def distance_to(oracle: GaussianMixture, points: Points) -> float:
    """Energy distance x 1000 of points [N, 2] to a mixture of equal weights and stds; unbiased.

    2 E|x - Y| - E|x - x'| - E|Y - Y'| with the first and the last in closed form: what is left of noise is the
    points' own. Memory: N^2 / 2 numbers.
    """
    means, std = oracle.means.flatten(1).numpy(), float(oracle.stds[0])
    between = _mean_norm(cdist(points, means), std).mean()
    truth = _mean_norm(cdist(means, means), math.sqrt(2) * std).mean()
    return float(1000 * (2 * between - pdist(points).mean() - truth))


def _mean_norm(offset: Points, std: float) -> Points:
    """E|offset + std z|, z standard normal in the plane: Rice's mean, std sqrt(pi / 2) L_1/2(-offset^2 / 2 std^2)."""
    half = offset**2 / (4 * std**2)
    mean: Points = std * math.sqrt(math.pi / 2) * ((1 + 2 * half) * ive(0, half) + 2 * half * ive(1, half))
    return mean


def frechet_to(oracle: GaussianMixture, points: Points) -> float:
    """Frechet distance x 1000 of points' moments to a mixture's, which has equal weights and stds."""
    means, variance = oracle.means.flatten(1).numpy(), float(oracle.stds[0]) ** 2
    truth = Moments(mean=means.mean(0), cov=np.cov(means.T, bias=True) + variance * np.eye(means.shape[1]))
    return 1000 * frechet_distance(moments_of(points), truth)
