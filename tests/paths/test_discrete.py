"""Discrete schedules: their tables, sub-sequences, the uniform rule, and the way to noise levels."""

import math

import pytest
import torch

from imagewright.paths.discrete import DiscreteSchedule, uniform_times
from imagewright.paths.gaussian import Cosine
from imagewright.types import UserError

BOTH = pytest.mark.parametrize("schedule", [DiscreteSchedule(), DiscreteSchedule(kind="linear")], ids=lambda s: s.kind)
SEARCHED = (94, 217, 354, 574, 834, 944)
"""A sequence that the AutoDiffusion paper prints."""


def test_linear_betas_are_ddpms():
    betas = DiscreteSchedule(kind="linear").betas()
    assert (float(betas[0]), float(betas[-1]), len(betas)) == pytest.approx((1e-4, 0.02, 1000))


def test_cosine_follows_its_path_up_to_the_cut():
    schedule = DiscreteSchedule()
    path = Cosine().alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000) ** 2
    torch.testing.assert_close(schedule.alpha_bars()[:-1], path[:-1], rtol=1e-9, atol=0)
    assert float(schedule.betas()[-1]) == 0.999  # the path itself has no signal left there


@BOTH
def test_all_steps_have_the_schedules_own_betas(schedule):
    torch.testing.assert_close(schedule.sub_betas(range(1000)), schedule.betas(), rtol=1e-10, atol=0)


@BOTH
@pytest.mark.parametrize("times", [SEARCHED, uniform_times(4), (999,)])
def test_a_sub_sequence_keeps_the_signal_at_its_times(schedule, times):
    kept = (1 - schedule.sub_betas(times)).cumprod(0)
    torch.testing.assert_close(kept, schedule.alpha_bars()[list(times)], rtol=1e-10, atol=1e-15)


@BOTH
def test_noise_levels_are_noise_over_signal(schedule):
    kept = schedule.alpha_bars()[list(SEARCHED)]
    torch.testing.assert_close(schedule.sigmas(SEARCHED), ((1 - kept) / kept).sqrt())
    levels = schedule.sigmas(range(1000))
    assert bool((levels.diff() > 0).all())


@pytest.mark.parametrize(
    ("steps", "times"), [(4, (0, 250, 500, 750)), (6, (0, 167, 334, 501, 668, 835)), (1, (0,)), (1000, range(1000))]
)
def test_uniform_sequences(steps, times):
    assert uniform_times(steps) == tuple(times)


def test_levels_are_cut_to_what_a_denoiser_knows():
    schedule = DiscreteSchedule()
    assert schedule.sigmas([0, 500, 999], 0.02, 80.0).tolist() == [0.02, float(schedule.sigmas([500])[0]), 80.0]
    known = schedule.known(0.02, 80.0)
    inside = schedule.sigmas(known)
    assert float(inside[0]) >= 0.02 and float(inside[-1]) <= 80.0
    outside = schedule.sigmas([known[0] - 1, known[-1] + 1])
    assert float(outside[0]) < 0.02 and float(outside[1]) > 80.0
    assert schedule.known(0, math.inf) == range(1000)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DiscreteSchedule(kind="sine"), "schedule.kind is 'sine'; it must be one of cosine, linear"),
        (lambda: DiscreteSchedule(kind="linear", T=20), "needs a whole number of at least 21"),
        (lambda: DiscreteSchedule().sigmas([0, 1000]), "whole numbers in 0 to 999"),
        (lambda: DiscreteSchedule().sigmas([]), "must be one or more"),
        (lambda: DiscreteSchedule().sub_betas([5, 5]), "strictly increasing"),
        (lambda: DiscreteSchedule().known(1e-9, 1e-8), "no time step of the cosine schedule"),
        (lambda: uniform_times(400), "steps is 400; no even stride"),
    ],
)
def test_bad_values_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
