"""The general sampler: equal to Heun and Euler where they meet, and exact on Gaussians everywhere."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from imagewright.models import preconditioning
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.samplers import Ablation, Euler, Heun
from imagewright.types import UNCONDITIONAL, UserError

GRIDS, SCHEDULES, SCALINGS = ("edm", "vp", "ve", "iddpm"), ("linear", "vp", "ve"), ("none", "vp")
CLOCKS = pytest.mark.parametrize(("schedule", "scaling"), list(product(SCHEDULES, SCALINGS)))
CHURN = {"S_churn": 5.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LATENTS = normal(3, 1, 2, 2, seed=1)
ORACLE = GaussianOracle(normal(1, 2, 2), std=torch.tensor([[[0.3, 0.5], [0.8, 1.3]]], dtype=torch.float64))
MIXTURE = GaussianMixture(normal(2, 1, 2, 2, seed=2), 0.3)


class Seeded:
    """The same draws for every sampler that starts anew."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(11)

    def normal(self, like):
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)


class Recorder:
    """A mixture that notes the level of every call, with the range and the table of another denoiser."""

    def __init__(self, like=MIXTURE):
        self.like, self.sigma_min, self.sigma_max = like, like.sigma_min, like.sigma_max
        self.levels = []

    def round_sigma(self, sigma):
        return self.like.round_sigma(sigma)

    def __call__(self, x, sigma, cond=UNCONDITIONAL):
        self.levels.append(float(sigma[0]))
        return MIXTURE(x, sigma, cond)


@pytest.mark.parametrize("churn", [{}, CHURN], ids=["plain", "churn"])
@pytest.mark.parametrize(("solver", "special"), [("heun", Heun), ("euler", Euler)])
def test_edm_linear_none_is_the_papers_sampler(solver, special, churn):
    general = Ablation(num_steps=12, solver=solver, **churn)
    want = special(num_steps=12, **churn)(MIXTURE, LATENTS, noise=Seeded())
    torch.testing.assert_close(general(MIXTURE, LATENTS, noise=Seeded()), want, rtol=1e-12, atol=1e-12)
    assert general.nfe == special(num_steps=12).nfe


@CLOCKS
@pytest.mark.parametrize(("solver", "alpha", "order"), [("heun", 1.0, 2), ("heun", 2 / 3, 2), ("euler", 1.0, 1)])
def test_order(schedule, scaling, solver, alpha, order):
    # The state at sigma_min is measured: on a curved clock the last step, to 0, misses by its own length.
    # A Ralston step stands for alpha < 1, since the midpoint rule happens to be of order 3 on a Gaussian.
    low, high, steps = 0.05, 20.0, np.array([50, 100, 200])
    at = torch.ones(3, dtype=torch.float64)
    want = ORACLE.flow_map()(LATENTS * high, high * at, low * at)
    errors = []
    for n in steps:
        seen = {}
        Ablation(
            num_steps=int(n), solver=solver, alpha=alpha, schedule=schedule, scaling=scaling,
            sigma_min=low, sigma_max=high,
        )(ORACLE, LATENTS, on_step=lambda x, _, sigma, seen=seen: seen.update({round(sigma, 9): x}))  # fmt: skip
        errors.append(float((seen[low] - want).abs().max()))
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert -slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("grid", GRIDS)
@CLOCKS
def test_every_combination_reaches_the_data(grid, schedule, scaling):
    denoiser = Recorder()
    steps = 240 if grid == "iddpm" else 60  # its steps are long where the noise is strong
    sampler = Ablation(num_steps=steps, grid=grid, schedule=schedule, scaling=scaling, sigma_min=0.01, sigma_max=50.0)
    drawn = sampler(denoiser, LATENTS)
    want = Heun(num_steps=200, sigma_min=0.01, sigma_max=denoiser.levels[0])(MIXTURE, LATENTS)
    torch.testing.assert_close(drawn, want, rtol=0, atol=0.05)
    assert len(denoiser.levels) == sampler.nfe == 2 * steps - 1


@CLOCKS
@pytest.mark.parametrize("grid", ["vp", "iddpm"])
def test_levels_are_cut_to_the_denoisers_range_and_rounded_to_its_table(grid, schedule, scaling):
    iddpm = preconditioning.iDDPMPrecond(torch.nn.Identity(), M=200)
    denoiser = Recorder(iddpm)
    Ablation(num_steps=7, solver="euler", grid=grid, schedule=schedule, scaling=scaling, **CHURN)(
        denoiser, LATENTS, noise=Seeded()
    )
    asked = torch.tensor(denoiser.levels, dtype=torch.float64)
    torch.testing.assert_close(iddpm.round_sigma(asked), asked, rtol=1e-9, atol=0)
    assert iddpm.sigma_min <= asked.min()
    assert asked.max() <= iddpm.sigma_max


@CLOCKS
def test_churn_keeps_the_distribution(schedule, scaling):
    oracle = GaussianOracle(torch.zeros(1, 1, 1, dtype=torch.float64), std=0.5)
    sampler = Ablation(num_steps=200, schedule=schedule, scaling=scaling, sigma_min=0.01, S_churn=20.0)
    drawn = sampler(oracle, normal(4000, 1, 1, 1, seed=3), noise=Seeded())
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.04)  # 3.5 standard errors


@CLOCKS
def test_on_step_sees_unscaled_states(schedule, scaling):
    seen = []
    sampler = Ablation(num_steps=80, schedule=schedule, scaling=scaling)
    drawn = sampler(ORACLE, LATENTS, on_step=lambda *step: seen.append(step))
    assert len(seen) == 80
    assert torch.equal(seen[-1][0], drawn)
    at = torch.ones(3, dtype=torch.float64)
    for x, _, sigma in seen[:-1]:
        want = ORACLE.flow_map()(LATENTS * 80, 80 * at, sigma * at)
        torch.testing.assert_close(x, want, rtol=0.05, atol=0.05)


def test_churn_needs_a_noise_source():
    with pytest.raises(UserError, match=r"sampler\.S_churn is 1\.0; a stochastic sampler needs a noise source"):
        Ablation(S_churn=1.0)(ORACLE, LATENTS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"solver": "rk4"}, "solver is 'rk4'; it must be one of heun, euler"),
        ({"grid": "ddim"}, "grid is 'ddim'; it must be one of edm, vp, ve, iddpm"),
        ({"schedule": "edm"}, "schedule is 'edm'; it must be one of linear, vp, ve"),
        ({"scaling": "ve"}, "scaling is 've'; it must be one of none, vp"),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"alpha": 0.0}, r"alpha is 0\.0; it must lie in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
        ({"S_churn": -1.0}, r"S_churn is -1\.0"),
        ({"S_min": 2.0, "S_max": 1.0}, r"S_min is 2\.0 and S_max is 1\.0"),
        ({"sigma_min": 0.0}, r"sigma_min is 0\.0"),
        ({"sigma_max": math.inf}, "sigma_max is inf"),
        ({"grid": "ve", "sigma_max": 0.01}, r"sigma_max is 0\.01; .*\(grid 've' has 0\.02 and 0\.01\)"),
        ({"rho": -1.0}, r"rho is -1\.0; it must be positive and finite"),
        ({"grid": "vp", "epsilon_s": 1.0}, "epsilon_s must lie in"),
        ({"grid": "iddpm", "C_1": 2.0}, r"the iDDPM table needs .* got C_1 = 2\.0"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Ablation(**settings)
