"""What contenders of the claims about matching distributions are said to cost is what they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imagewright.bench.claims import dmd, dmd2
from imagewright.bench.claims.matching import parts_of, passes
from imagewright.bench.claims.plane import PointNetwork, point_denoiser
from imagewright.bench.claims.plane_training import ExactTeacher
from imagewright.bench.claims.trial import BOTH, FORWARD, Contender, steps_for
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Coupling

TEACHER = dmd2.widened(dmd2.wide_modes(0), 1.6)


@pytest.mark.parametrize(
    "method",
    [
        DMD(regression=dmd.L2),
        DMD(regression_weight=0.0),
        dmd.RegressionAlone(regression=dmd.L2),
        DMD2(generator_gan=0.0, fake_gan=0.0, fake_updates=1),
        DMD2(generator_gan=0.0, fake_gan=0.0),
        DMD2(),
    ],
)
def test_passes_are_those_of_the_calls(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call counts 3 where gradients are kept and 1 where not; the exact teacher's count like a network's."""
    spent = 0

    def spy(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal spent
            spent += BOTH if torch.is_grad_enabled() else FORWARD
            answer: Tensor = original(self, *args, **kwargs)
            return answer

        monkeypatch.setattr(owner, name, counted)

    spy(PointNetwork, "bottleneck")
    spy(ExactTeacher, "forward")
    start = point_denoiser(8, 2, 0, sigma_data=0.85)
    parts = parts_of(start, TEACHER, Contender(method=method, lr=1e-3), 0)
    points = StepNoise(1).normal(torch.empty(4, 2, 1, 1))
    spent, every = 0, getattr(method, "fake_updates", 1)
    for step in range(every):
        list(method.step(parts, Batch(points, coupling=Coupling(points, points)), StepNoise(2), Clock(step, 0, 1)))
    assert spent == pytest.approx(every * dmd.cost_of(method))


def test_steps_that_a_budget_affords() -> None:
    assert passes(DMD2()) == pytest.approx(57 / 5)
    assert steps_for(1000, passes(DMD2()), 5) == 85 and steps_for(1, 10) == 1
