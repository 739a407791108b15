"""The search for gamma and strength: the best pair, no score twice, and nothing varied that has no effect."""

from __future__ import annotations

import math

import pytest

from imagewright.samplers import Jumps
from imagewright.tuning.jumps import JumpsSearch, search_jumps
from imagewright.types import UserError


def test_the_best_pair_of_a_convex_score_is_found_and_no_score_taken_twice() -> None:
    asked: list[tuple[float, float | None]] = []

    def score(gamma: float, weight: float | None) -> float:
        asked.append((gamma, weight))
        assert weight is not None
        return (gamma - 0.6) ** 2 + (weight - 2.4) ** 2 + 0.5 * gamma * weight

    found = search_jumps(score, JumpsSearch(steps=4, strengths=5), (1.0, 3.0))
    every = {(g, w): score(g, w) for g in JumpsSearch.gammas for w in (1.0, 1.5, 2.0, 2.5, 3.0)}
    assert (found.gamma, found.weight) == min(every, key=lambda k: every[k])
    taken = asked[: len(found.measured)]
    assert len(set(taken)) == len(taken) == len(found.measured) and found.score == min(every.values())


def test_what_has_no_effect_is_not_varied() -> None:
    one = search_jumps(lambda gamma, weight: weight or 0.0, JumpsSearch(steps=1, strengths=3), (1.0, 3.0))
    assert {g for (g, _), _ in one.measured} == {0.0} and one.weight == 1.0
    plain = search_jumps(lambda gamma, weight: -gamma, JumpsSearch(steps=4), None)
    assert plain.weight is None and plain.gamma == 1.0 and len(plain.measured) == len(JumpsSearch.gammas)


def test_settings_and_scores_that_are_none_are_told() -> None:
    with pytest.raises(UserError, match=r"gammas is \(2.0,\)"):
        JumpsSearch(gammas=(2.0,))
    with pytest.raises(UserError, match="strengths is 1"):
        JumpsSearch(strengths=1)
    with pytest.raises(UserError, match="not a number"):
        search_jumps(lambda gamma, weight: math.nan, JumpsSearch(), None)


def test_stops_are_even_in_the_straight_paths_time() -> None:
    jumps = Jumps(num_steps=4, shift=0.5)
    assert jumps.nfe == 4
    times = [sigma / (sigma + 0.5) for sigma in (80.0, *jumps.stops(80.0))]
    assert [a - b for a, b in zip(times, [*times[1:], 0.0], strict=True)] == pytest.approx([times[0] / 4] * 4)
    assert Jumps(num_steps=1).stops(80.0) == () and Jumps(sigmas=(3.0,)).stops(80.0) == (3.0,)
    with pytest.raises(UserError, match="give one of them"):
        Jumps(num_steps=2, sigmas=(1.0,))
    with pytest.raises(UserError, match="shift"):
        Jumps(shift=0.0)
