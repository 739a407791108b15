"""A data set seen through a feature extractor: what generated images are compared with, embedded once."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from imagewright import cache
from imagewright.data import ImageSet
from imagewright.metrics.features import FeatureExtractor, ImageSource, in_batches
from imagewright.metrics.statistics import Moments, moments_of
from imagewright.types import UserError

OnProgress = Callable[[int], None]
"""Called with the number of images done so far."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images with their features, in order.

    features: float32 [N, d], all in memory (N d 4 bytes).   image_shape: (H, W, C).
    fingerprint: the source's own.
    """

    source: ImageSource
    features: npt.NDArray[np.float32]
    moments: Moments
    image_shape: tuple[int, int, int]
    fingerprint: str
    extractor_sha256: str

    def __len__(self) -> int:
        return len(self.features)


def embed(source: ImageSource, extractor: FeatureExtractor, on_progress: OnProgress | None = None) -> Reference:
    """A whole data set through an extractor, once (`cache`); raises UserError with fewer than 2 images."""
    if len(source) < 2:
        raise UserError(f"a reference needs at least 2 images, got {len(source)}")
    height, width, channels = source.images(np.array([0])).shape[1:]
    everything = _features(source, extractor, on_progress)
    return Reference(
        source=source,
        features=everything,
        moments=replace(moments_of(everything), class_counts=_class_counts(source)),
        image_shape=(height, width, channels),
        fingerprint=source.fingerprint,
        extractor_sha256=extractor.sha256,
    )


def _features(
    source: ImageSource, extractor: FeatureExtractor, on_progress: OnProgress | None
) -> npt.NDArray[np.float32]:
    """Features [N, d] of all images, kept (`cache`) by what they are a function of, to the last bit.

    That is the images, the extractor's weights, and what computed them: device, number type, batch, library, threads.
    """
    made_by = (
        getattr(extractor, "made_on", ""),
        torch.__version__,
        np.__version__,
        torch.get_num_threads(),
        platform.machine(),
    )
    place = cache.entry("features", source.fingerprint, extractor.name, extractor.sha256, extractor.dim, made_by)
    kept = cache.recall(place)
    if kept is not None and kept[0].get("features", torch.empty(0)).shape == (len(source), extractor.dim):
        found: npt.NDArray[np.float32] = kept[0]["features"].numpy()
        if np.isfinite(found).all():
            return found
    everything = np.empty((len(source), extractor.dim), np.float32)
    done = 0
    for batch in in_batches(source):
        everything[done : done + len(batch)] = extractor(batch)[0]
        done += len(batch)
        if on_progress is not None:
            on_progress(done)
    cache.keep(place, {"features": torch.from_numpy(everything)}, {})
    return everything


def _class_counts(source: ImageSource) -> tuple[int, ...] | None:
    """Images of each class; None where the images have none."""
    if not isinstance(source, ImageSet) or not source.spec.num_classes:
        return None
    labelled = source.labels[source.labels >= 0]
    return tuple(np.bincount(labelled, minlength=source.spec.num_classes).tolist()) if len(labelled) else None
