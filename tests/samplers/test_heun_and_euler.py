"""Heun and Euler against closed forms on a Gaussian, whose probability flow is known exactly."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.samplers import Euler, Heun
from imagewright.types import UNCONDITIONAL, Condition, UserError

BOTH = pytest.mark.parametrize("sampler", [Heun, Euler])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MEAN, STD = normal(1, 2, 2), torch.tensor([[[0.3, 0.5], [0.8, 1.3]]], dtype=torch.float64)
ORACLE = GaussianOracle(MEAN, std=STD)
LATENTS = normal(3, 1, 2, 2, seed=1)


class Recorder:
    """A denoiser that notes every call: (x, sigma, cond)."""

    def __init__(self, denoiser=ORACLE, sigma_min=0.0, sigma_max=math.inf, rounding=None):
        self.denoiser, self.sigma_min, self.sigma_max = denoiser, sigma_min, sigma_max
        self.rounding = rounding or (lambda sigma: sigma)
        self.calls = []

    def round_sigma(self, sigma):
        return self.rounding(sigma)

    def __call__(self, x, sigma, cond=UNCONDITIONAL):
        self.calls.append((x.clone(), sigma, cond))
        return self.denoiser(x, sigma, cond)

    @property
    def levels(self):
        assert all(sigma.shape == (len(x),) and (sigma == sigma[0]).all() for x, sigma, _ in self.calls)
        return [float(sigma[0]) for _, sigma, _ in self.calls]


def grid(n, low=0.002, high=80.0, rho=7):
    """Equation 5, in plain Python."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + i / (n - 1) * (b - a)) ** rho for i in range(n)]


# --- the ODE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 18])
@BOTH
def test_every_step_scales_the_offset_by_its_known_factor(sampler, num_steps):
    # On a Gaussian the slope is sigma / (var + sigma^2) times the offset from the mean.
    offset = LATENTS * 80 - MEAN
    for here, there in pairwise([*grid(num_steps), 0.0]):
        slope = here / (STD**2 + here**2)
        factor = 1 + (there - here) * slope
        if sampler is Heun and there > 0:
            factor = 1 + (there - here) * (slope + factor * there / (STD**2 + there**2)) / 2
        offset = offset * factor
    drawn = sampler(num_steps=num_steps)(ORACLE, LATENTS)
    torch.testing.assert_close(drawn, MEAN + offset, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sampler", "order"), [(Heun, 2), (Euler, 1)])
def test_order(sampler, order):
    low, high = 0.05, 20.0
    at = torch.ones(3, dtype=torch.float64)
    # The exact flow down to the last level, from where one Euler step lands on the denoiser's estimate.
    want = ORACLE(ORACLE.flow_map()(LATENTS * high, high * at, low * at), low * at)
    steps = np.array([64, 128, 256])
    errors = [
        float((sampler(num_steps=int(n), sigma_min=low, sigma_max=high)(ORACLE, LATENTS) - want).abs().max())
        for n in steps
    ]
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert -slope == pytest.approx(order, abs=0.1)


def test_default_settings_reach_the_data():
    at = torch.ones(3, dtype=torch.float64)
    want = ORACLE.flow_map()(LATENTS * 80, 80 * at, 0 * at)
    torch.testing.assert_close(Heun(num_steps=100)(ORACLE, LATENTS), want, rtol=1e-3, atol=1e-3)


def test_rho_shapes_the_grid_and_one_step_is_the_denoiser():
    denoiser = Recorder()
    Euler(num_steps=4, rho=1.0, sigma_min=1.0, sigma_max=7.0)(denoiser, LATENTS)
    assert denoiser.levels == pytest.approx([7, 5, 3, 1], rel=1e-12)
    drawn = Heun(num_steps=1)(ORACLE, LATENTS)
    torch.testing.assert_close(drawn, ORACLE(LATENTS * 80, torch.full((3,), 80.0, dtype=torch.float64)))


# --- what the network is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 5, 18])
@BOTH
def test_levels_are_the_papers_grid_and_nfe_counts_the_calls(sampler, num_steps):
    denoiser = Recorder()
    settings = sampler(num_steps=num_steps)
    settings(denoiser, LATENTS)
    first, *rest = grid(num_steps)
    want = [first, *(s for s in rest for _ in range(2))] if sampler is Heun else [first, *rest]
    assert denoiser.levels == pytest.approx(want, rel=1e-12)
    assert len(denoiser.calls) == settings.nfe == (2 * num_steps - 1 if sampler is Heun else num_steps)


def test_range_is_cut_to_the_denoisers():
    for low, high in ((0.02, 50.0), (0.0, math.inf)):
        denoiser = Recorder(sigma_min=low, sigma_max=high)
        Euler(num_steps=6)(denoiser, LATENTS)
        assert denoiser.levels == pytest.approx(grid(6, max(low, 0.002), min(high, 80.0)), rel=1e-12)


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_levels_are_rounded_to_those_the_denoiser_knows(churn):
    denoiser = Recorder(rounding=torch.round, sigma_min=1.0)
    Heun(num_steps=6, S_churn=churn)(denoiser, LATENTS, noise=ImageNoise(0, range(3)))
    assert all(level == round(level) and level >= 1 for level in denoiser.levels)


def test_state_is_float64_and_the_latents_and_condition_are_left_alone():
    latents, cond = LATENTS.float(), Condition(label=torch.tensor([0, 1, 2]))
    before, denoiser = latents.clone(), Recorder()
    drawn = Heun(num_steps=3)(denoiser, latents, cond)
    assert drawn.dtype == torch.float64
    assert all(x.dtype == sigma.dtype == torch.float64 and c is cond for x, sigma, c in denoiser.calls)
    assert torch.equal(latents, before)


def test_labels_steer():
    means = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)[:, None, None, None].expand(3, 1, 2, 2)
    mixture = GaussianMixture(means, 0.05, classes=torch.arange(3))
    drawn = Heun()(mixture, LATENTS, Condition(label=torch.tensor([2, 0, 1])))
    assert drawn.mean((1, 2, 3)).tolist() == pytest.approx([2, -2, 0], abs=0.15)


@BOTH
def test_on_step_sees_every_step(sampler):
    seen, denoiser = [], Recorder()
    drawn = sampler(num_steps=4)(denoiser, LATENTS, on_step=lambda *step: seen.append(step))
    assert [sigma for _, _, sigma in seen] == pytest.approx([*grid(4)[1:], 0], rel=1e-12)
    assert torch.equal(seen[-1][0], drawn)
    asked, sigma, _ = denoiser.calls[0]
    assert torch.equal(seen[0][1], ORACLE(asked, sigma))


# --- churn ----------------------------------------------------------------------------------------------------


class Counted:
    """Noise that counts its draws."""

    def __init__(self, n=3):
        self.source, self.draws = ImageNoise(7, range(n)), []

    def normal(self, like):
        self.draws.append(self.source.normal(like))
        return self.draws[-1]


@pytest.mark.parametrize(("churn", "gamma"), [(2.0, 0.25), (40.0, math.sqrt(2) - 1)])
def test_churn_raises_the_level_inside_its_window(churn, gamma):
    denoiser, noise = Recorder(), Counted()
    Euler(num_steps=8, S_churn=churn, S_min=0.05, S_max=20.0)(denoiser, LATENTS, noise=noise)
    want = [s * (1 + gamma) if 0.05 <= s <= 20 else s for s in grid(8)]
    assert len({s < 0.05 for s in want}) == len({s > 80 * 0.99 for s in want}) == 2  # the window cuts both ends
    assert denoiser.levels == pytest.approx(want, rel=1e-12)
    assert len(noise.draws) == 8  # outside the window too: later steps see the same numbers whatever the window


def test_churn_adds_the_missing_variance_times_s_noise():
    denoiser, noise = Recorder(), Counted()
    Euler(num_steps=8, S_churn=2.0, S_noise=1.1)(denoiser, LATENTS, noise=noise)
    want = LATENTS * 80 + 80 * math.sqrt(1.25**2 - 1) * 1.1 * noise.draws[0]
    torch.testing.assert_close(denoiser.calls[0][0], want, rtol=1e-12, atol=0)


def test_churn_keeps_the_distribution():
    n = 4000
    oracle = GaussianOracle(torch.zeros(1, 1, 1, dtype=torch.float64), std=0.5)
    drawn = Heun(num_steps=200, S_churn=20.0)(oracle, normal(n, 1, 1, 1, seed=3), noise=Fast())
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.04)  # 3.5 standard errors
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)


class Fast:
    """One generator for all images."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(11)

    def normal(self, like):
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)


@BOTH
def test_churn_needs_a_noise_source_and_nothing_else_draws(sampler):
    with pytest.raises(UserError, match=r"sampler\.S_churn is 1\.0; a stochastic sampler needs a noise source"):
        sampler(S_churn=1.0)(ORACLE, LATENTS)
    noise = Counted()
    drawn = sampler(num_steps=3)(ORACLE, LATENTS, noise=noise)
    assert not noise.draws
    assert torch.equal(drawn, sampler(num_steps=3)(ORACLE, LATENTS))


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"num_steps": 5.5}, r"num_steps is 5\.5; it must be at least 1, a whole number"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, r"sigma_min is 2\.0 and sigma_max is 1\.0"),
        ({"rho": 0.0}, r"rho is 0\.0; it must be positive"),
        ({"S_churn": -1.0}, r"S_churn is -1\.0"),
        ({"S_churn": math.nan}, "S_churn is nan"),
        ({"S_noise": -1.0}, r"S_noise is -1\.0"),
        ({"S_min": 2.0, "S_max": 1.0}, r"S_min is 2\.0 and S_max is 1\.0"),
    ],
)
@BOTH
def test_bad_settings_are_refused(sampler, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        sampler(**settings)


def test_ranges_that_do_not_meet_are_refused():
    with pytest.raises(UserError, match=r"got 0\.1 and 0\.01"):
        Heun(sigma_min=0.1)(Recorder(sigma_max=0.01), LATENTS)
