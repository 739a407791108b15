"""Frechet distance between two Gaussians, the number behind FID, fd_digits and fd_emoji.

Source     Dowson & Landau (1982); Heusel et al. 2017 (1706.08500), eq. 6, for its use on network features.
Departs    no matrix square root of a non-symmetric product: tr sqrt(A B) is the nuclear norm of sqrt(A)
           sqrt(B), with both roots from symmetric eigenvalues. Nothing complex appears, nothing needs
           regularising when the covariances are rank-deficient (fewer images than dimensions), and round-off
           stays at 1e-16 of the scale rather than at its square root.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from imagewright.metrics.features import FeatureExtractor, Images
from imagewright.metrics.statistics import FeatureStatistics, Floats, HasMoments
from imagewright.types import UserError


def frechet_distance(a: HasMoments, b: HasMoments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)), in squared feature units, float64.

    a, b: mean [d] and symmetric positive semi-definite covariance [d, d]. Never below 0.
    Raises UserError when the dimensions differ. Cost: two eigendecompositions and one SVD of [d, d].
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"statistics have different dimensions, {a.mean.shape[0]} and {b.mean.shape[0]}")
    cov_a, cov_b = a.cov, b.cov
    cross = np.linalg.svd(_root(cov_a) @ _root(cov_b).T, compute_uv=False).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)


def frechet_of_images(batches: Iterable[Images], extractor: FeatureExtractor, reference: HasMoments) -> float:
    """Frechet distance of images, uint8 [N, H, W, C] batch by batch, to the moments of real ones: a search's score."""
    statistics = FeatureStatistics(extractor.dim)
    for batch in batches:
        statistics.update(extractor(batch)[0])
    return frechet_distance(statistics, reference)


def _root(cov: Floats) -> Floats:
    """R [d, d] with R^T R = cov; eigenvalues that round-off cannot tell from zero count as zero."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    root: Floats = np.sqrt(np.where(values > floor, values, 0.0))[:, None] * vectors.T
    return root
