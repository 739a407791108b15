"""What seeds say of a check: the 95% interval of its effect's mean, by Student's t over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from scipy.stats import t as student

from imagewright.bench.claims.claim import Check

Verdict = Literal["holds", "does not hold", "undecided"]
LEAST_SEEDS = 5
"""Fewer decide nothing."""
CONFIDENCE = 0.95


def interval(effects: Sequence[float], scale: Literal["difference", "ratio"]) -> tuple[float, float, float]:
    """Mean of the effects and the ends of its interval; geometric for ratios. One effect has an infinite interval.

    Raises ValueError on an effect that is not finite, and on a ratio that is not positive.
    """
    if any(not math.isfinite(e) or (scale == "ratio" and e <= 0) for e in effects):
        raise ValueError(f"effects must be finite, and ratios positive, got {list(effects)}")
    values = [math.log(e) for e in effects] if scale == "ratio" else list(effects)
    mean = statistics.fmean(values)
    half = math.inf
    if len(values) > 1:
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    low, high = mean - half, mean + half
    return (_exp(mean), _exp(low), _exp(high)) if scale == "ratio" else (mean, low, high)


def judge(check: Check, effects: Sequence[float]) -> Verdict:
    """Holds where the interval lies above the margin, does not where it lies at or below it, else is undecided."""
    if len(effects) < LEAST_SEEDS:
        return "undecided"
    _, low, high = interval(effects, check.scale)
    if low > check.least:
        return "holds"
    return "does not hold" if high <= check.least else "undecided"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim holds when all its checks do, and does not when one does not."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and all(v == "holds" for v in verdicts) else "undecided"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
