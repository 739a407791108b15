"""How often each entry may be kept, and so which captions are: counts, a threshold for each language, probabilities.

c          How many captions of the pool hold an entry, by language.
t          An entry of at most t captions is *tail* and always kept; one of more is *head*, and kept with probability
           t / c.
p          The share of all matches that are tail's. It is chosen in one language (there: t = 170,000 in English, which
           gives some 6 %), and every other one gets the t that gives the same p: the count at which the cumulative
           share of its sorted counts is nearest to p.
A caption  of those of one picture that hold an entry is chosen first, evenly; then it is kept with 1 - prod(1 - P(e))
           over its entries e: one draw for each entry, and one success suffices. One without entries is never kept.
Source     facebookresearch/MetaCLIP, `metaclip/curation/curate.py` and `src/training/data_metaclip_v2.py`.
Departs    Entries that no caption holds are left out of the cumulative shares (there they are in, and where p is small
           t becomes 0, by which nothing would be kept). The reference may be any language, and p be given itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from imagewright.checks import require_number, require_whole
from imagewright.types import UserError

Counts = npt.NDArray[np.int64]
Chances = npt.NDArray[np.float64]
Rule = Literal["language", "global"]
TAIL = 0.06
"""p, where nothing else is asked for: about that of English with t = 170,000."""
REFERENCE = "en"


def t_to_p(counts: Counts, t: float) -> float:
    """The share of matches that fall on entries of fewer than t. Raises ValueError without any match."""
    _require_matches(counts)
    return float(counts[counts < t].sum() / counts.sum())


def p_to_t(counts: Counts, p: float) -> int:
    """The count whose cumulative share of all matches is nearest to p; the smaller of equals, and at least 1."""
    _require_matches(counts)
    found = np.sort(counts[counts > 0])
    return int(found[np.abs(np.cumsum(found) / found.sum() - p).argmin()])


def chances(counts: Counts, t: float) -> Chances:
    """The probability of keeping each entry: 1 up to t, t / c above."""
    return t / np.maximum(counts.astype(np.float64), t)


def keeping(chance: Chances, matched: Sequence[int]) -> float:
    """The probability of keeping a caption with these entries; 0 without any."""
    return float(1 - np.prod(1 - chance[list(matched)]))


def _require_matches(counts: Counts) -> None:
    if not counts.sum():
        raise ValueError("no entry was found in any caption")


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How a pool is balanced. Raises UserError for values outside their range, and for both t and tail.

    t: of the reference language; None = by `tail`, the share of its matches that shall be tail (None = 0.06).
    reference: the language in which t or tail is meant; where only one has matches, "en" stands for that. rule: every
    other language's t by the reference's share (language), or the reference's t itself (global).
    """

    t: int | None = None
    tail: float | None = None
    reference: str = REFERENCE
    rule: Rule = "language"

    def __post_init__(self) -> None:
        if self.t is not None:
            require_whole("t", self.t, 1, 10**12)
        if self.tail is not None:
            require_number("tail", self.tail, 0, 1)
        if self.t is not None and self.tail is not None:
            raise UserError(f"t is {self.t} and tail is {self.tail}; give one of the two")
        if self.rule not in get_args(Rule):
            raise UserError(f"rule is {self.rule!r}; allowed: {', '.join(get_args(Rule))}")


@dataclass(frozen=True)
class Curation:
    """What balancing makes of a pool's counts, by language: thresholds and entries' probabilities.

    tail: p, the reference's share of matches that are tail's.
    """

    counts: Mapping[str, Counts]
    thresholds: Mapping[str, int]
    chances: Mapping[str, Chances]
    tail: float

    @classmethod
    def of(cls, counts: Mapping[str, Counts], how: Balance) -> Curation:
        """Raises UserError where nothing matched, or the reference has no matches."""
        there = {language: each for language, each in counts.items() if each.sum()}
        if not there:
            raise UserError("no caption holds any entry of its language's list, so nothing could be kept")
        alone = len(there) == 1 and how.reference == REFERENCE
        reference = next(iter(there)) if alone else how.reference
        if reference not in there:
            known = ", ".join(there) if any(there) else "labels, which are of no language"
            raise UserError(f"reference is {reference!r}, a language without matches; there are {known}")
        t = how.t if how.t is not None else p_to_t(there[reference], TAIL if how.tail is None else how.tail)
        p = t_to_p(there[reference], t)
        # As published: given t, the others' are by the share that lies below it; a share that was asked for is itself.
        share = p if how.t is not None else TAIL if how.tail is None else how.tail
        thresholds = {
            name: t if name == reference or how.rule == "global" else p_to_t(each, share)
            for name, each in there.items()
        }
        return cls(there, thresholds, {name: chances(each, thresholds[name]) for name, each in there.items()}, p)

    def keep(self, language: str, matched: Sequence[int]) -> float:
        """The probability of keeping a caption, by its list's name and its entries."""
        return keeping(self.chances[language], matched) if matched else 0.0

    def expected(self, language: str, matched: Sequence[Sequence[int]]) -> Chances:
        """Of captions of a language: how many matches of each entry are kept in the mean."""
        out = np.zeros(len(self.counts[language]))
        for each in matched:
            out[list(each)] += self.keep(language, each)
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain values: what a record says."""
        return {
            "tail": self.tail,
            "thresholds": dict(self.thresholds),
            "entries": {name: int((each > 0).sum()) for name, each in self.counts.items()},
            "matches": {name: int(each.sum()) for name, each in self.counts.items()},
        }


def count(matched: Sequence[Sequence[int]], entries: int) -> Counts:
    """How many captions hold each of a list's entries."""
    flat = [place for each in matched for place in each]
    return np.bincount(np.array(flat, np.int64), minlength=entries).astype(np.int64)
