"""Masking: rates are derivatives, the discrete weight is the paper's and tends to the rate, shares telescope, times."""

from __future__ import annotations

import math

import pytest
import torch

from imagewright.paths.masking import SCHEDULES, MaskingSchedule, time_grid
from imagewright.types import UserError

ALL = [MaskingSchedule(name=name) for name in SCHEDULES]
ALL += [MaskingSchedule(name="polynomial", power=p) for p in (0.5, 2.0, 5.0)]
each = pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{s.name}-{s.power}")
INSIDE = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)


@each
def test_alpha_falls_between_its_squeezed_ends(schedule: MaskingSchedule) -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert (alpha.diff() < 0).all()
    if schedule.name != "geometric":  # which does not reach its ends by itself
        assert float(alpha[0]) == pytest.approx(1 - 1e-4, abs=1e-14)
        assert float(alpha[-1]) == pytest.approx(1e-4, abs=1e-14)
    assert ((alpha >= 1e-4 - 1e-14) & (alpha <= 1 - 1e-4 + 1e-14)).all()


def test_the_schedules_are_the_papers() -> None:
    t = torch.tensor([0.25], dtype=torch.float64)
    expected = {
        "linear": 0.75,
        "cosine": 1 - math.cos(math.pi / 2 * 0.75),
        "geometric": math.exp(-(1e-5**0.75) * 20**0.25),
    }
    for name, alpha in expected.items():
        found = MaskingSchedule(name=name, epsilon=0.0).alpha(t)
        assert float(found) == pytest.approx(alpha, abs=1e-14), name
    assert float(MaskingSchedule(name="polynomial", power=3.0, epsilon=0.0).alpha(t)) == pytest.approx(1 - 0.25**3)
    squeezed = MaskingSchedule(epsilon=0.1).alpha(t)
    assert float(squeezed) == pytest.approx(0.8 * 0.75 + 0.1)
    assert float(MaskingSchedule(epsilon=0.0).rate(t)) == pytest.approx(4.0, abs=1e-12)  # 1 / t


@each
def test_the_rate_is_the_derivative(schedule: MaskingSchedule) -> None:
    t = INSIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.rate(INSIDE), -slope / (1 - schedule.alpha(INSIDE)), rtol=1e-6, atol=0)


@each
@pytest.mark.parametrize("steps", [1, 2, 16, 256])
def test_the_discrete_weight_is_the_papers(schedule: MaskingSchedule, steps: int) -> None:
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    s = t - 1 / steps

    def odds(x: torch.Tensor) -> torch.Tensor:
        return (schedule.alpha(x) / (1 - schedule.alpha(x))).log()

    published = steps * torch.expm1(odds(t) - odds(s)) * schedule.alpha(s)
    torch.testing.assert_close(-steps * schedule.reveal(t, s), published, rtol=1e-8, atol=1e-8)


@each
def test_the_discrete_weight_tends_to_the_rate(schedule: MaskingSchedule) -> None:
    t = INSIDE[20:-20]
    error = [float((n * schedule.reveal(t, t - 1 / n) / schedule.rate(t) - 1).abs().max()) for n in (1e3, 1e4, 1e5)]
    assert error[1] <= max(error[0] / 8, 1e-9) and error[2] <= max(error[1] / 8, 1e-9) and error[2] < 2e-3


@each
def test_staying_unknown_over_two_steps_is_the_product(schedule: MaskingSchedule) -> None:
    t, u, s = (torch.tensor(x, dtype=torch.float64) for x in (0.9, 0.5, 0.2))
    stay = (1 - schedule.reveal(t, u)) * (1 - schedule.reveal(u, s))
    torch.testing.assert_close(stay, 1 - schedule.reveal(t, s))
    torch.testing.assert_close(stay, schedule.masked(s) / schedule.masked(t))


def test_grids_run_from_one_to_nought() -> None:
    uniform, cosine = time_grid("uniform", 8), time_grid("cosine", 8)
    torch.testing.assert_close(uniform, torch.linspace(1, 0, 9, dtype=torch.float64))
    torch.testing.assert_close(cosine[:-1], torch.cos(math.pi / 2 * (1 - uniform[:-1])))
    for grid in (uniform, cosine):
        assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0) and (grid.diff() < 0).all()
    # The cosine schedule on the uniform grid visits what the linear one does on the cosine grid.
    linear, other = MaskingSchedule(epsilon=0.0), MaskingSchedule(name="cosine", epsilon=0.0)
    torch.testing.assert_close(linear.masked(cosine), other.masked(uniform))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="schedule is 'sine'; it must be one of cosine, geometric, linear, polynomial"):
        MaskingSchedule(name="sine")
    with pytest.raises(UserError, match=r"power is 0;"):
        MaskingSchedule(name="polynomial", power=0)
    with pytest.raises(UserError, match=r"power is 2.0; it has no effect on schedule 'linear'"):
        MaskingSchedule(power=2.0)
    with pytest.raises(UserError, match=r"epsilon is 0.5; it must lie in \[0, 0.5\)"):
        MaskingSchedule(epsilon=0.5)
