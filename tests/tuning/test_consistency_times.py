"""The greedy search of noise levels on scores whose best levels are known."""

from __future__ import annotations

import math

import pytest

from imagewright.paths.schedules import karras_sigmas
from imagewright.tuning.consistency_times import Levels, TimesSearch, search_times, ternary_search
from imagewright.types import UserError

LOW, HIGH = 0.002, 80.0


@pytest.mark.parametrize("best", [0, 1, 2, 17, 37, 38])
@pytest.mark.parametrize("high", [38, 100])
def test_ternary_search_finds_the_least_of_a_unimodal_score(best: int, high: int) -> None:
    asked: list[int] = []

    def score(index: int) -> float:
        asked.append(index)
        return abs(index - best) ** 1.5

    assert ternary_search(score, 0, high) == best
    assert all(0 <= index <= high for index in asked)


@pytest.mark.parametrize("width", [0, 1, 2])
def test_short_ranges_are_searched_whole(width: int) -> None:
    for best in range(5, 6 + width):
        assert ternary_search(lambda index, best=best: float(index != best), 5, 5 + width) == best  # type: ignore[misc]


def test_evaluations_grow_as_the_logarithm() -> None:
    counts = []
    for high in (100, 10_000):
        asked: set[int] = set()
        ternary_search(lambda index, asked=asked: asked.add(index) or abs(index - 33.0), 0, high)  # type: ignore[func-returns-value]
        counts.append(len(asked))
    assert counts[1] < 60 and counts[1] - counts[0] <= 2 * math.ceil(math.log(100, 1.5)) + 2


def far(sigmas: Levels, wanted: Levels) -> float:
    """Distance in ln sigma of each level from where it should be, plus one for each that is missing."""
    return sum(abs(math.log(a / b)) for a, b in zip(sigmas, wanted, strict=False)) + 10 * (len(wanted) - len(sigmas))


@pytest.mark.parametrize("wanted", [(0.8,), (5.0, 0.5), (30.0, 2.0, 0.1)])
def test_levels_are_found_one_after_the_other(wanted: Levels) -> None:
    calls: list[Levels] = []

    def score(sigmas: Levels) -> float:
        calls.append(sigmas)
        return far(sigmas, wanted)

    seen: list[tuple[int, float]] = []
    config = TimesSearch(steps=len(wanted) + 1)
    found = search_times(score, LOW, HIGH, config, lambda count, value: seen.append((count, value)))
    grid = karras_sigmas(40, LOW, HIGH).tolist()
    assert found.sigmas == tuple(min(grid, key=lambda s, w=w: abs(math.log(s / w))) for w in wanted)  # type: ignore[misc]
    assert list(found.sigmas) == sorted(found.sigmas, reverse=True)
    assert found.scores == tuple(far(found.sigmas[:k], wanted) for k in range(len(wanted) + 1))
    assert len(calls) == len(set(calls)) == len(found.measured) == len(seen)  # nothing is measured twice
    assert [c for c, _ in seen] == list(range(1, len(calls) + 1)) and dict(found.measured)[()] == found.scores[0]


def test_room_is_left_for_the_levels_to_come() -> None:
    """A score that wants every level as low as can be."""
    found = search_times(lambda sigmas: sum(sigmas), LOW, HIGH, TimesSearch(steps=4, points=5))
    assert found.sigmas == tuple(karras_sigmas(5, LOW, HIGH).tolist()[1:4])


def test_the_best_of_all_measured_is_kept() -> None:
    """A noisy score may lead the brackets away from the least that was seen."""
    values = {i: 5.0 - 0.1 * i for i in range(40)} | {13: 0.0}
    assert ternary_search(lambda i: values[i], 0, 39) == 13
    del values[13]
    assert ternary_search(lambda i: values.get(i, 1.6), 14, 39) == 39


def test_a_score_that_is_no_number_never_wins() -> None:
    nan = float("nan")
    assert ternary_search(lambda index: nan if index < 2 else float(index), 0, 4) == 2
    with pytest.raises(UserError, match="none of the candidates has a finite score"):
        ternary_search(lambda index: nan, 0, 2)


def test_bad_settings_get_one_sentence() -> None:
    for settings, sentence in (
        ({"steps": 1}, "steps is 1; a search for further noise levels needs at least 2"),
        ({"steps": 5, "points": 5}, "points is 5; for 5 steps the grid needs at least 6"),
        ({"rho": math.inf}, "rho is inf"),
    ):
        with pytest.raises(UserError, match=sentence):
            TimesSearch(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not a number"):
        search_times(lambda sigmas: math.nan, LOW, HIGH, TimesSearch())
