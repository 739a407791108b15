"""Inception score: exp E KL(p(y|x) || p(y)) of a classifier's predictions, over splits.

Source     Salimans et al. 2016 (1606.03498), section 4; splits, shuffling and the spread (divisor n) follow
           torch-fidelity's definition, so that equal logits and seed give its value.
Range      1 (every image is classified alike) .. number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp, xlogy

from imagewright.metrics.statistics import Floats
from imagewright.types import UserError

SPLITS = 10
SHUFFLE_SEED = 2020


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """Mean and standard deviation (divisor n) over the splits that received an image."""

    value: float
    std: float
    splits: int


class InceptionScoreStatistics:
    """Sums per split from which the score follows: memory is splits x classes, whatever the image count.

    E KL(p(y|x) || p(y)) = E sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y), so two sums are enough. Every run
    of `splits` consecutive images is dealt to the splits in a random order, so that sizes differ by at most
    one, classes generated in rotation do not gather in one split, and batch sizes do not matter.
    """

    def __init__(self, num_classes: int, *, splits: int = SPLITS, seed: int = SHUFFLE_SEED) -> None:
        if splits < 1:
            raise UserError(f"splits must be at least 1, got {splits}")
        self._probability = np.zeros((splits, num_classes))
        self._negative_entropy = np.zeros(splits)
        self._counts = np.zeros(splits, dtype=np.int64)
        self._random = np.random.RandomState(seed)
        self._deal: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def update(self, logits: npt.NDArray[Any], split: npt.NDArray[np.int64] | None = None) -> None:
        """Add logits [n, k]; `split` [n] overrides the dealing."""
        batch = np.asarray(logits, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self._probability.shape[1]:
            raise UserError(f"logits must have shape [n, {self._probability.shape[1]}], got {list(batch.shape)}")
        split = self._dealt(len(batch)) if split is None else split
        log_p: Floats = batch - logsumexp(batch, axis=1, keepdims=True)
        p = np.exp(log_p)
        np.add.at(self._probability, split, p)
        np.add.at(self._negative_entropy, split, (p * log_p).sum(axis=1))
        np.add.at(self._counts, split, 1)

    def _dealt(self, n: int) -> npt.NDArray[np.int64]:
        splits = len(self._counts)
        rounds = max(0, -(-(n - len(self._deal)) // splits))
        fresh = [self._random.permutation(splits) for _ in range(rounds)]
        deal = np.concatenate([self._deal, *fresh])
        self._deal = deal[n:]
        return deal[:n]

    def result(self) -> InceptionScore:
        """The score so far; raises UserError when there is no image."""
        used = self._counts > 0
        if not used.any():
            raise UserError("an Inception score needs at least 1 image, got 0")
        counts = self._counts[used]
        marginal = self._probability[used] / counts[:, None]
        scores = np.exp(self._negative_entropy[used] / counts - xlogy(marginal, marginal).sum(axis=1))
        return InceptionScore(value=float(scores.mean()), std=float(scores.std()), splits=int(used.sum()))


def inception_score(
    logits: npt.NDArray[Any], *, splits: int = SPLITS, shuffle: bool = True, seed: int = SHUFFLE_SEED
) -> InceptionScore:
    """Score of logits [n, k] that are all in memory: n is shuffled, then cut into `splits` consecutive parts.

    Raises UserError unless 1 <= splits <= n.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise UserError(f"splits must lie in 1..{n} (the number of images), got {splits}")
    order = np.random.RandomState(seed).permutation(n) if shuffle else np.arange(n)
    edges = np.arange(splits + 1) * n // splits
    statistics = InceptionScoreStatistics(logits.shape[1], splits=splits)
    statistics.update(np.asarray(logits)[order], np.repeat(np.arange(splits), np.diff(edges)))
    return statistics.result()
