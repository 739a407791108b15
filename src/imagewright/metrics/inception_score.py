"""Inception score: exp E KL(p(y|x) || p(y)) of a classifier's predictions, over splits.

Source     Salimans et al. 2016 (1606.03498), section 4; splits, shuffling and the spread (divisor n) follow
           torch-fidelity's definition, so that equal logits and seed give its value.
Range      1 (every image is classified alike) .. number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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
    """Mean and standard deviation (divisor n) over the splits."""

    value: float
    std: float
    splits: int


def inception_score(
    logits: npt.NDArray[Any], *, splits: int = SPLITS, shuffle: bool = True, seed: int = SHUFFLE_SEED
) -> InceptionScore:
    """Score of logits [n, k]: n is shuffled, then cut into `splits` consecutive parts.

    Raises UserError unless 1 <= splits <= n.
    """
    if np.ndim(logits) != 2:
        raise UserError(f"logits must have shape [n, classes], got {list(np.shape(logits))}")
    n = len(logits)
    if not 1 <= splits <= n:
        raise UserError(f"splits must lie in 1..{n} (the number of images), got {splits}")
    order = np.random.RandomState(seed).permutation(n) if shuffle else np.arange(n)
    edges = np.arange(splits + 1) * n // splits
    parts = [order[start:stop] for start, stop in pairwise(edges)]
    scores = np.array([_of_part(np.asarray(logits[rows], dtype=np.float64)) for rows in parts])
    return InceptionScore(value=float(scores.mean()), std=float(scores.std()), splits=splits)


def _of_part(logits: Floats) -> float:
    """exp of E KL(p(y|x) || p(y)) = E sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y)."""
    log_p = logits - logsumexp(logits, axis=1, keepdims=True)
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    return float(np.exp((p * log_p).sum(axis=1).mean() - xlogy(marginal, marginal).sum()))
