"""Gamma and, where the model is told it, the strength of guidance of a flow map's jumps, for a number of steps.

Source     Sabour et al. 2025 (AYF, arXiv 2506.14603), section 5: stops even in time, and for every number of steps a
           share gamma of new noise and a lambda of its own. The paper does not say how it found them.
Search     one of the two at a time, each over a fixed list, in turns until neither moves; scores are kept and never
           taken twice. A single step has no gamma, and a model that is told no strength none.
Checked    finds the best pair of a convex score; takes no score twice; what has no effect is not varied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imagewright.samplers.grid import check_steps
from imagewright.tuning.scores import lowest
from imagewright.types import UserError

Setting = tuple[float, float | None]
"""gamma, and the strength of guidance or None."""


@dataclass(frozen=True, kw_only=True)
class JumpsSearch:
    """What is tried."""

    steps: int = 4
    gammas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    strengths: int = 5
    """Of guidance, evenly over the range of training."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.gammas or not all(0 <= gamma <= 1 for gamma in self.gammas):
            raise UserError(f"gammas is {self.gammas}; one or more are needed, all in [0, 1]")
        if self.strengths < 2:
            raise UserError(f"strengths is {self.strengths}; it must be at least 2, the ends of the range")

    def weights(self, trained: tuple[float, float] | None) -> Sequence[float | None]:
        """The strengths that are tried of a range."""
        if trained is None:
            return (None,)
        low, high = trained
        return [low + (high - low) * i / (self.strengths - 1) for i in range(self.strengths)]


@dataclass(frozen=True, kw_only=True)
class FoundJumps:
    """The best of all that were measured; measured: every setting and its score, in order."""

    gamma: float
    weight: float | None
    measured: tuple[tuple[Setting, float], ...]

    @property
    def score(self) -> float:
        return dict(self.measured)[self.gamma, self.weight]


def search_jumps(
    score: Callable[[float, float | None], float],
    config: JumpsSearch,
    trained: tuple[float, float] | None,
    on_score: Callable[[int, float], None] = lambda count, value: None,
) -> FoundJumps:
    """score(gamma, strength), which is to be small. trained: the model's range of strengths; None = it is told none.

    on_score: called with the number of scores taken and the newest. Raises UserError when a score is not a number.
    """
    gammas = config.gammas if config.steps > 1 else (0.0,)
    weights = config.weights(trained)
    taken: dict[Setting, float] = {}

    def known(setting: Setting) -> float:
        if setting not in taken:
            taken[setting] = score(*setting)
            if math.isnan(taken[setting]):
                raise UserError(f"the score at gamma {setting[0]} and weight {setting[1]} is not a number")
            on_score(len(taken), taken[setting])
        return taken[setting]

    best: Setting = (gammas[0], weights[0])
    while True:
        before = best
        best = lowest([((gamma, best[1]), known((gamma, best[1]))) for gamma in gammas])
        best = lowest([((best[0], weight), known((best[0], weight))) for weight in weights])
        if best == before:
            return FoundJumps(gamma=best[0], weight=best[1], measured=tuple(taken.items()))
