"""A miniature claim: a falsifiable comparison of a paper's that a small run can show, and what a run of it yields.

A claim file holds one function, `run(seed, budget)`, which does the work of one seed and returns rows, and the checks:
numbers computed from those rows that are positive where the paper is right. Seeds, files, intervals, verdict and
pictures are `runner`'s, `verdict`'s and `ledger`'s; what is to be said of an outcome stands in docs/claims/KEY.md, so
that the code of a claim is older than its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Budget = Literal["full", "smoke"]
"""smoke: the same code on a fraction of the work, in seconds; its figures show nothing and are never recorded."""

TUNING_SEEDS = range(1_000)
"""For choosing settings. They can be run, and are never recorded."""
REPORTED_SEEDS = range(10_000, 11_000)
"""For records, and for nothing else. A claim may add up to 8,999 to a seed for streams of its own."""
DEFAULT_SEEDS = tuple(REPORTED_SEEDS[:5])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender's measurement of one seed.

    name: what was measured, the same for every seed. score: the claim's measure. cost: in the claim's unit.
    more: further numbers worth a column. curve: rows of one curve name become a line of the figure, in order of cost.
    """

    name: str
    score: float
    cost: float
    curve: str | None = None
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """All rows of one seed, by name."""

    rows: Sequence[Row]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[r.name for r in self.rows]}")

    def score(self, name: str) -> float:
        """Score of a row."""
        return self[name].score

    def number(self, name: str, of: str | None) -> float:
        """One of a row's further numbers, or its score."""
        return self[name].score if of is None else self[name].more[of]


Effect = Callable[[Rows], float]
"""A number of one seed's rows, larger the more the paper is right. Contenders are paired: they share the seed."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One statement. It holds when the 95% interval of its effect's mean over the seeds lies above the margin.

    scale:  "difference", or "ratio": the effect is positive, and its geometric mean is judged.
    margin: what the effect has to exceed; None = 0 of a difference, 1 of a ratio.
    """

    says: str
    effect: Effect
    scale: Literal["difference", "ratio"] = "difference"
    margin: float | None = None

    @property
    def least(self) -> float:
        """The margin, given or not."""
        return self.margin if self.margin is not None else (1.0 if self.scale == "ratio" else 0.0)


def by_how_much(ours: str, theirs: str, of: str | None = None) -> Effect:
    """The effect "score of theirs minus ours", or a further number `of` them: positive where ours is lower."""
    return lambda rows: rows.number(theirs, of) - rows.number(ours, of)


def how_many_times(ours: str, theirs: str, of: str | None = None) -> Effect:
    """The effect "score of theirs over ours", or a further number `of` them, all positive: above 1 where ours is
    lower."""
    return lambda rows: rows.number(theirs, of) / rows.number(ours, of)


def lower(says: str, ours: str, theirs: str, *, of: str | None = None, by: float | None = None) -> Check:
    """Ours is lower than theirs, by more than a margin. What should be higher is named second."""
    return Check(says=says, effect=by_how_much(ours, theirs, of), margin=by)


def times(says: str, ours: str, theirs: str, *, of: str | None = None, by: float | None = None) -> Check:
    """Theirs is more than `by` (1) times ours."""
    return Check(says=says, effect=how_many_times(ours, theirs, of), scale="ratio", margin=by)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A comparison and its verdict's rule.

    headline:  the paper's own figure. miniature: what ours compares, in a sentence or two.
    measure:   name of the score; `better` says which way. cost: unit of the cost, e.g. "NFE per image".
    run:       (seed, budget) -> rows; deterministic in both, at most 3 minutes a seed on 2 cores.
    """

    key: str
    paper: str
    headline: str
    miniature: str
    measure: str
    cost: str
    run: Callable[[int, Budget], Sequence[Row]]
    checks: Sequence[Check]
    better: Literal["lower", "higher", "nearer to 0"] = "lower"
