"""EDM's table 1: grids, schedules and scalings against the paper's formulas and each other."""

import math

import pytest
import torch

from imagewright.paths.gaussian import VariancePreserving
from imagewright.paths.schedules import (
    EDMGrid,
    IDDPMGrid,
    LinearSchedule,
    NoScaling,
    VEGrid,
    VESchedule,
    VPGrid,
    VPScaling,
    VPSchedule,
    karras_sigmas,
    time_steps,
)
from imagewright.types import UserError

GRIDS = [EDMGrid(), VPGrid(), VEGrid(), IDDPMGrid()]
SCHEDULES = [VPSchedule(), VESchedule(), LinearSchedule()]


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_karras_sigmas_are_equation_5():
    got = karras_sigmas(18, 0.002, 80.0, 7.0)
    want = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, levels(*want), rtol=1e-13, atol=0)


def test_karras_sigmas_with_rho_1_are_even_and_one_level_is_the_largest():
    torch.testing.assert_close(karras_sigmas(3, 1.0, 5.0, 1.0), levels(5, 3, 1))
    torch.testing.assert_close(karras_sigmas(1, 0.002, 80.0), levels(80))


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("n", [2, 18, 256])
def test_grids_fall_from_end_to_end(grid, n):
    low, high = grid.default_range
    sigmas = grid.sigmas(n, low, high)
    assert sigmas.shape == (n,)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all()
    if not isinstance(grid, IDDPMGrid):  # which only has the levels of its table
        torch.testing.assert_close(sigmas[[0, -1]], levels(high, low))


def test_default_ranges_are_those_of_the_paper():
    low, high = VPGrid().default_range
    assert low == pytest.approx(math.sqrt(math.exp(19.9e-6 / 2 + 1e-4) - 1), rel=1e-9)
    assert high == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1), rel=1e-12)
    assert [grid.default_range for grid in (VEGrid(), IDDPMGrid(), EDMGrid())] == [
        (0.02, 100.0),
        (0.002, 81.0),
        (0.002, 80.0),
    ]


def test_ve_grid_is_geometric():
    torch.testing.assert_close(VEGrid().sigmas(4, 0.1, 100.0), levels(100, 10, 1, 0.1))


def test_vp_grid_is_even_in_time():
    grid = VPGrid(epsilon_s=0.01)
    t = VPSchedule.through(0.05, 30.0, 0.01).time_of(grid.sigmas(5, 0.05, 30.0))
    torch.testing.assert_close(t, levels(1, 0.7525, 0.505, 0.2575, 0.01))


def test_vp_schedule_through_meets_both_ends():
    schedule = VPSchedule.through(0.007, 60.0, 1e-3)
    torch.testing.assert_close(schedule.sigma(levels(1e-3, 1)), levels(0.007, 60), rtol=1e-10, atol=0)


def test_vp_schedule_through_the_default_range_is_the_default():
    schedule = VPSchedule.through(*VPGrid().default_range)
    assert schedule.beta_d == pytest.approx(19.9, rel=1e-9)
    assert schedule.beta_min == pytest.approx(0.1, rel=1e-9)


def test_vp_schedule_and_scaling_are_the_vp_path():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(VPSchedule().sigma(t), VariancePreserving().nsr(t))
    torch.testing.assert_close(VPScaling().scale(t, VPSchedule()), VariancePreserving().alpha(t))
    torch.testing.assert_close(VPScaling().scale_prime(t, VPSchedule()), VariancePreserving().alpha_prime(t))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_derivative_and_inverse(schedule):
    t = torch.linspace(0.01, 1.5, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
    torch.testing.assert_close(schedule.sigma_prime(t), slope)
    torch.testing.assert_close(schedule.time_of(schedule.sigma(t)), t)
    assert schedule.time_of(levels(0)) == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("scaling", [VPScaling(), NoScaling()], ids=repr)
def test_scaling_derivative(schedule, scaling):
    t = torch.linspace(0.01, 1.5, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad((scaling.scale(t, schedule) + 0 * t).sum(), t)
    torch.testing.assert_close(scaling.scale_prime(t, schedule), slope)


def test_iddpm_table_obeys_its_recursion():
    grid = IDDPMGrid(M=50)
    u = grid.table()
    assert u.shape == (51,)
    assert u[-1] == 0
    assert (u.diff() < 0).all()
    for j in range(1, 51):
        alpha_bar = [math.sin(0.5 * math.pi * i / (50 * 1.008)) ** 2 for i in (j - 1, j)]
        ratio = (u[j] ** 2 + 1) / (u[j - 1] ** 2 + 1)
        assert float(ratio) == pytest.approx(max(alpha_bar[0] / alpha_bar[1], 0.001), rel=1e-6)


def test_iddpm_table_has_published_ends():
    u = IDDPMGrid().table()  # EDM, table 1 footnote and C.3.4: largest level 20291, the sampler starts at u_8, near 80
    assert float(u[0]) == pytest.approx(20291, rel=1e-4)
    assert float(u[8]) == pytest.approx(80, rel=0.02)


def test_iddpm_picks_from_the_table_by_rounded_index():
    grid = IDDPMGrid()
    u = grid.table()
    inside = u[(u >= 0.002) & (u <= 81)]
    got = grid.sigmas(7, 0.002, 81.0)
    want = inside[[round(i * (len(inside) - 1) / 6) for i in range(7)]]
    assert torch.equal(got, want)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_steps_visit_the_grid(grid, schedule):
    t = time_steps(grid, schedule, 18)
    assert t.shape == (19,)
    assert t[-1] == 0
    torch.testing.assert_close(schedule.sigma(t[:-1]), grid.sigmas(18, *grid.default_range))


def test_time_steps_round_levels_before_they_become_times():
    t = time_steps(EDMGrid(), VESchedule(), 5, 0.1, 10.0, round_sigma=lambda sigma: sigma.float().round())
    torch.testing.assert_close(t[:-1], karras_sigmas(5, 0.1, 10.0).round() ** 2)
    assert t.dtype == torch.float64


def test_time_steps_limit_one_end_alone():
    t = time_steps(EDMGrid(), LinearSchedule(), 3, sigma_max=10.0)
    torch.testing.assert_close(t, torch.cat([karras_sigmas(3, 0.002, 10.0), levels(0)]))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: karras_sigmas(0, 0.1, 1.0), "number of steps must be at least 1, got 0"),
        (lambda: karras_sigmas(3, 0.0, 1.0), "0 < sigma_min <= sigma_max < inf, got 0.0 and 1.0"),
        (lambda: karras_sigmas(3, 2.0, 1.0), "got 2.0 and 1.0"),
        (lambda: karras_sigmas(3, 0.1, 1.0, rho=0.0), "rho is 0.0; it must be positive and finite"),
        (lambda: EDMGrid(rho=-1.0), "rho is -1.0; it must be positive"),
        (lambda: VPGrid(epsilon_s=1.0), r"epsilon_s must lie in \(0, 1\), got 1.0"),
        (lambda: IDDPMGrid(C_1=0.0), "got C_1 = 0.0"),
        (lambda: IDDPMGrid().sigmas(3, 1e-6, 1e-5), "no level between 1e-06 and 1e-05"),
        (lambda: VEGrid().sigmas(3, 1.0, math.inf), "sigma_max < inf"),
    ],
)
def test_nonsense_is_refused(build, told):
    with pytest.raises(UserError, match=told):
        build()
