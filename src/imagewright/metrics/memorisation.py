"""The real images nearest to generated ones, in pixels or in features: what shows whether a model copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from imagewright.metrics.features import FeatureExtractor, Images, ImageSource, in_batches
from imagewright.metrics.neighbours import nearest_rows
from imagewright.metrics.statistics import Floats
from imagewright.types import UserError

CHUNK = 1024


def nearest(
    images: Images, reference: ImageSource, extractor: FeatureExtractor | None = None, *, k: int = 5
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The k nearest reference images of each image: indices and Euclidean distances [n, k], nearest first.

    images: uint8 [n, H, W, C] of the reference's shape. extractor: feature space; None: pixels in [-1, 1],
    distances being over all H W C values. Raises UserError unless 1 <= k <= len(reference).
    """
    if not 1 <= k <= len(reference):
        raise UserError(f"k must lie in 1..{len(reference)} (the number of reference images), got {k}")

    def rows(batch: Images) -> npt.NDArray[Any]:
        if batch.shape[1:] != images.shape[1:]:
            raise UserError(f"images are {list(images.shape[1:])}, the reference's {list(batch.shape[1:])}")
        return batch.reshape(len(batch), -1) / 127.5 - 1 if extractor is None else extractor(batch)[0]

    queries = rows(images)
    indices = np.empty((len(images), 0), dtype=np.int64)
    distances: Floats = np.empty((len(images), 0))
    first = 0
    for batch in in_batches(reference, CHUNK):
        some, far = nearest_rows(queries, rows(batch), min(k, len(batch)))
        indices = np.concatenate([indices, some + first], axis=1)
        distances = np.concatenate([distances, far], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        indices = np.take_along_axis(indices, order, axis=1)
        distances = np.take_along_axis(distances, order, axis=1)
        first += len(batch)
    return indices, distances
