"""Labelled pictures balanced by their classes: a class is the one entry of its pictures."""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from imagewright.data.curation.balancing import Balance, Chances, Curation
from imagewright.data.image_set import ImageSet
from imagewright.types import UserError

LABELS = ""
"""The language of labels, which are of none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BalancedSet(ImageSet):
    """Pictures of which every pass shows some, anew: each with its own probability, float64 [N]."""

    keep: Chances

    def passing(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """The pictures of one pass."""
        return np.flatnonzero(generator.random(len(self)) < self.keep)

    @property
    def fingerprint(self) -> str:
        """Of the pictures, and their probabilities."""
        return sha256(super().fingerprint.encode() + self.keep.astype("<f8").tobytes()).hexdigest()

    def subset(self, indices: npt.NDArray[np.int64]) -> BalancedSet:  # type: ignore[override]
        """The pictures at `indices`, with their probabilities."""
        chosen = super().subset(indices)
        return _with(chosen, self.keep[np.asarray(indices, dtype=np.int64)])


def balanced(images: ImageSet, how: Balance) -> tuple[BalancedSet, Curation]:
    """A set of which each pass shows classes up to the threshold alike, and what was counted.

    Pictures without a class are never shown, as captions without an entry. Raises UserError for a set without classes.
    """
    if not images.spec.num_classes or not (images.labels >= 0).any():
        raise UserError(f"{images.source} has no classes to balance")
    counts = np.bincount(images.labels[images.labels >= 0], minlength=images.spec.num_classes)
    curation = Curation.of({LABELS: counts}, how)
    chance = np.append(curation.chances[LABELS], 0.0)  # of label -1
    return _with(images, chance[images.labels]), curation


def _with(images: ImageSet, keep: Chances) -> BalancedSet:
    known = {each.name: getattr(images, each.name) for each in fields(ImageSet)}
    return BalancedSet(**known, keep=keep)
