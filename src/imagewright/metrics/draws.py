"""What is drawn for a score: images of a model, each class as often as the reference has it.

A distance to real images compares all of their distribution, the shares of the classes included. A model that is told
its classes does not choose them, so whoever draws for a score chooses for it: as the reference has them, or the score
charges the model for the choice. Everything that draws for a score, commands and searches alike, draws here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from imagewright.metrics.features import FeatureExtractor, Images
from imagewright.metrics.frechet import frechet_of_images
from imagewright.metrics.reference import Reference
from imagewright.metrics.statistics import Floats, Moments
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import DataSpec

ClassLaw = Literal["reference", "uniform"]


def class_shares(
    spec: DataSpec, reference: Reference | Moments, law: ClassLaw = "reference"
) -> tuple[ClassLaw | None, Floats | None]:
    """By which law a model's classes are drawn, and the probability of each, [K].

    spec: the model's; without classes there is nothing to draw: None twice. A reference that counts other classes, or
    none, cannot say how often they come: uniform.
    """
    if not spec.num_classes:
        return None, None
    counts = reference.moments.class_counts if isinstance(reference, Reference) else reference.class_counts
    if law == "uniform" or counts is None or len(counts) != spec.num_classes:
        known = np.array([k not in spec.empty_classes for k in range(spec.num_classes)])
        return "uniform", known / known.sum()
    return "reference", np.array(counts) / sum(counts)


class Drawing(Protocol):
    """What draws images by batches: an `ImageGenerator`, or several processes that share one."""

    spec: DataSpec

    def labels(self, n: int, seed: int, first: int = 0, shares: Floats | None = None) -> npt.NDArray[np.int64] | None:
        """As `ImageGenerator.labels`."""
        ...

    def batches(
        self, n: int, *, labels: npt.NDArray[np.int64] | None = None, seed: int = 0, batch_size: int = 64
    ) -> Iterator[Images]:
        """As `ImageGenerator.batches`."""
        ...


def draw_for_score(
    generator: Drawing,
    n: int,
    reference: Reference | Moments,
    *,
    classes: ClassLaw = "reference",
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Images]:
    """Images 0 .. n - 1 of a seed, batch by batch; image i depends on (seed, i) and the shares alone."""
    labels = labels_for_score(generator, n, reference, classes=classes, seed=seed)
    return generator.batches(n, labels=labels, seed=seed, batch_size=batch_size)


def labels_for_score(
    generator: Drawing, n: int, reference: Reference | Moments, *, classes: ClassLaw = "reference", seed: int = 0
) -> npt.NDArray[np.int64] | None:
    """The classes of `draw_for_score`'s images, [n]; None: the model is told none."""
    law, shares = class_shares(generator.spec, reference, classes)
    return generator.labels(n, seed, shares=shares if law == "reference" else None)


def frechet_of_model(
    generator: ImageGenerator,
    n: int,
    extractor: FeatureExtractor,
    reference: Moments,
    *,
    seed: int = 0,
    batch_size: int = 250,
) -> float:
    """Frechet distance of n images of a seed to the moments of real ones: a search's score."""
    batches = draw_for_score(generator, n, reference, seed=seed, batch_size=batch_size)
    return frechet_of_images(batches, extractor, reference)
