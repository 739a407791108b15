"""One seed of a claim in the plane: the truth, and contenders that learn from one start at equal cost.

Cost is counted in passes of a network over one point: a call is 1, a gradient through it 2 more, whoever's weights they
are (student, target, fake score, teacher; an exact teacher's calls too). A contender's updates are its budget of passes
over the passes of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from imagewright.bench.claims.plane import PLANE, PointNetwork, PointTraining, latents, real_points, seeded, train
from imagewright.bench.claims.plane import distance as energy
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.types import UNCONDITIONAL, Condition, Coupling, Frozen, Parts

FORWARD, BOTH = 1, 3
"""Passes of a forward call, and of one that is followed by a backward."""
Points = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with what a search on tuning seeds chose for it. fake_scale: its fake score's rate, in units of lr."""

    method: Any
    lr: float
    fake_scale: float = 1.0


def steps_for(budget: float, step: float, every: int = 1) -> int:
    """How many steps of a cost a budget affords: a multiple of `every`, at least one."""
    return max(int(budget / step / every), 1) * every


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the contenders of a seed have in common.

    oracle: the truth. lesson: the law whose exact denoiser teaches; None = the truth. count: points of a sample; the
    reference has twice as many. passes: each contender's budget, times the batch. warm, pace: how the denoiser that
    contenders start from is trained, and how they are; seed, rate and length are the trial's.
    """

    seed: int
    oracle: Any
    count: int
    passes: float = 0.0
    lesson: Any = None
    network: Callable[[], nn.Module] = lambda: PointNetwork(128, 3)
    sigma_data: float = PLANE
    warm: PointTraining = PointTraining(iterations=1)
    pace: PointRun = PointRun(iterations=1, batch=256)

    @property
    def taught(self) -> Any:
        """The teacher's law."""
        return self.oracle if self.lesson is None else self.lesson

    def points(self, n: int, noise: StepNoise) -> tuple[Tensor, Condition]:
        """The teacher's law's, float32, for `train`."""
        return self.taught.sample(n, noise).float(), UNCONDITIONAL

    def untrained(self) -> nn.Module:
        """The network, with the weights of the seed."""
        return seeded(self.seed, self.network)

    @cached_property
    def start(self) -> EDMPrecond:
        """A trained denoiser, from whose weights students of an exact one start: an oracle has none."""
        config = replace(self.warm, seed=self.seed, sigma_data=self.sigma_data)
        untrained = EDMPrecond(self.untrained(), sigma_data=self.sigma_data)
        return train(untrained, self.points, config)

    @property
    def teacher(self) -> Frozen:
        """The exact denoiser."""
        return Frozen(module=ExactTeacher(self.taught))

    def trained(
        self, method: Any, parts: Parts, updates: int, lr: float, pairs: Coupling | None = None, **pace: Any
    ) -> Any:
        """The product after so many updates on the truth's points; pace: what else of a `PointRun` is changed."""
        run = replace(self.pace, iterations=updates, lr=lr, **{"seed": self.seed, **pace})
        return distil(method, parts, mixture_points(self.oracle), run, pairs)

    def compared(
        self,
        contenders: Mapping[str, Contender],
        parts_of: Callable[[Any], Parts],
        passes: Callable[[Any], float],
        every: Callable[[Any], int] = lambda method: 1,
        pairs: Coupling | None = None,
    ) -> Iterator[tuple[str, Any, float]]:
        """Name, product and cost of every contender, after as many updates as the budget affords.

        parts_of: of a contender. passes: of an update by a method. every: of what the updates are a multiple.
        """
        for name, contender in contenders.items():
            cost = passes(contender.method)
            updates = steps_for(self.passes, cost, every(contender.method))
            product = self.trained(contender.method, parts_of(contender), updates, contender.lr, pairs)
            yield name, product, updates * cost

    def real(self, stream: int, count: int | None = None) -> Points:
        """Of the true distribution, [count, D]; streams are independent."""
        return real_points(self.oracle, self.seed + stream, count or self.count)

    @cached_property
    def reference(self) -> Points:
        """What samples are compared with."""
        return self.real(1000, 2 * self.count)

    @cached_property
    def z(self) -> Tensor:
        """The noise that all samples are made of, [count, 2, 1, 1], float64."""
        return latents(self.seed + 2000, self.count)

    def distance(self, points: Points) -> float:
        """Energy distance x 1000 to the reference."""
        return energy(points, self.reference)
