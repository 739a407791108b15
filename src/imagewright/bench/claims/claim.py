"""A miniature claim: a falsifiable comparison of a paper's that a small run can show, and what a run of it yields.

A claim file holds one function, `run(seed, budget)`, which does the work of one seed and returns rows, and the checks
that those rows have to pass. Seeds, files, spread, verdict and pictures are `runner`'s and `ledger`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Budget = Literal["full", "smoke"]
"""smoke: the same code on a fraction of the work, in seconds; its figures show nothing and are never recorded."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender's measurement of one seed.

    name: what was measured, the same for every seed. score: the claim's measure. cost: in the claim's unit, per sample.
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


@dataclass(frozen=True, kw_only=True)
class Check:
    """One statement about the rows of a seed. It holds when it is true of every seed."""

    says: str
    holds: Callable[[Rows], bool]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A comparison and its verdict's rule.

    headline:  the paper's own figure. miniature: what ours compares, in a sentence or two.
    measure:   name of the score; `better` says which way. cost: unit of the cost, e.g. "NFE per image".
    run:       (seed, budget) -> rows; deterministic in both, at most about 3 minutes a seed on 2 cores.
    tried:     where the claim does not hold, what was tried.
    """

    key: str
    paper: str
    headline: str
    miniature: str
    measure: str
    cost: str
    run: Callable[[int, Budget], Sequence[Row]]
    checks: Sequence[Check]
    better: Literal["lower", "higher"] = "lower"
    tried: str = ""
