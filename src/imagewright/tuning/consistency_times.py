"""The noise levels of multistep consistency sampling, by greedy ternary search (Song et al. 2023, 2303.01469, alg. 1).

Source     section 4.2 and appendix C: one level after the other, each by ternary search on the score (FID in the paper)
           of samples drawn with the levels found so far; the score is taken to be unimodal in the level.
Grid       as in the official code, levels are points of an EDM grid, so that scores are kept and never taken twice.
Departs    A level is the best of all that were measured, not of the last bracket alone: measured scores are noisy.
           Every search leaves room below for the levels still to come.
Checked    finds the best point of unimodal scores; evaluations grow as the logarithm of the grid; levels fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from imagewright.checks import require_positive
from imagewright.paths.schedules import karras_sigmas
from imagewright.tuning.scores import cost, lowest
from imagewright.types import UserError

Levels = tuple[float, ...]
Score = Callable[[Levels], float]
"""Further noise levels, decreasing, to what is to be small; the same levels always give the same number."""


@dataclass(frozen=True, kw_only=True)
class TimesSearch:
    """How many steps, and where their levels may lie."""

    steps: int = 2
    """Network evaluations of the sampler; the levels of all but the first are searched."""
    points: int = 40
    """Of the grid from sigma_max to sigma_min whose inner points are candidates (40 in the paper's CD)."""
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"steps is {self.steps}; a search for further noise levels needs at least 2")
        if self.points < self.steps + 1:
            raise UserError(f"points is {self.points}; for {self.steps} steps the grid needs at least {self.steps + 1}")
        require_positive("rho", self.rho)


@dataclass(frozen=True, kw_only=True)
class FoundTimes:
    """What a search found.

    sigmas: for `MultistepConsistency`. scores: with none of them, the first, the first two, ... .
    measured: every candidate and its score, in order.
    """

    sigmas: Levels
    scores: tuple[float, ...]
    measured: tuple[tuple[Levels, float], ...]


def search_times(
    score: Score,
    sigma_min: float,
    sigma_max: float,
    config: TimesSearch,
    on_score: Callable[[int, float], None] = lambda count, best: None,
) -> FoundTimes:
    """Levels one by one, from high to low. on_score: called with the number of scores taken and the newest.

    Raises UserError when a score is not a number.
    """
    grid = karras_sigmas(config.points, sigma_min, sigma_max, config.rho).tolist()
    taken: dict[Levels, float] = {}

    def known(sigmas: Levels) -> float:
        if sigmas not in taken:
            taken[sigmas] = score(sigmas)
            if math.isnan(taken[sigmas]):
                raise UserError(f"the score at the noise levels {sigmas} is not a number")
            on_score(len(taken), taken[sigmas])
        return taken[sigmas]

    sigmas: Levels = ()
    scores, last = [known(sigmas)], 0
    for left in range(config.steps - 2, -1, -1):
        before = sigmas

        def at(index: int, before: Levels = before) -> float:
            return known((*before, grid[index]))

        last = ternary_search(at, last + 1, config.points - 2 - left)
        sigmas = (*before, grid[last])
        scores.append(known(sigmas))
    return FoundTimes(sigmas=sigmas, scores=tuple(scores), measured=tuple(taken.items()))


def ternary_search(score: Callable[[int], float], low: int, high: int) -> int:
    """The whole number from low to high with the least score among those asked; its least if the score is unimodal.

    Asks about 2 log_1.5(high - low) times; the first of equals.
    """
    asked: dict[int, float] = {}

    def at(index: int) -> float:
        asked[index] = cost(score(index))
        return asked[index]

    while high - low > 2:
        third = (high - low) // 3
        if at(low + third) <= at(high - third):
            high -= third
        else:
            low += third
    for index in range(low, high + 1):
        at(index)
    return lowest(sorted(asked.items()))
