"""aDDIM: DDIM without variance, its norm identity, and that the variance helps where steps are few."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.samplers import DDIM
from imagewright.samplers.addim import ADDIM, addim_step
from imagewright.types import UserError

SHAPE = (6, 3, 4, 4)
SIGMA = torch.tensor([80.0, 20.0, 3.0, 1.0, 0.3, 0.01], dtype=torch.float64)
NEXT = torch.tensor([10.0, 0.0, 2.9, 0.2, 0.0, 0.002], dtype=torch.float64)


def normal(seed: int) -> Tensor:
    return StepNoise(seed).normal(torch.empty(SHAPE, dtype=torch.float64))


def column(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def test_without_variance_it_is_ddim() -> None:
    x, clean = normal(0), normal(1)
    want = clean + column(NEXT / SIGMA) * (x - clean)
    torch.testing.assert_close(addim_step(x, clean, SIGMA, NEXT, torch.zeros_like(SIGMA)), want, rtol=1e-12, atol=1e-12)
    oracle = GaussianOracle(torch.zeros(SHAPE[1:], dtype=torch.float64), std=0.5)
    torch.testing.assert_close(ADDIM(num_steps=7, variance=0.0)(oracle, x), DDIM(num_steps=7)(oracle, x))


def test_norm_grows_by_the_missing_variance() -> None:
    """If x_hat is orthogonal to eps: |z_s|^2 = |DDIM's z_s|^2 + d z_var, z_var = (a_s - a_t s_s / s_t)^2 x_var."""
    eps, clean = normal(2), normal(3)
    clean = clean - column((clean * eps).sum((1, 2, 3)) / (eps * eps).sum((1, 2, 3))) * eps
    x = clean + column(SIGMA) * eps
    x_var = torch.linspace(0.01, 0.4, 6, dtype=torch.float64)
    a = lambda s: 1 / (1 + s**2).sqrt()  # noqa: E731, the paper's scales, from ours
    z_s = column(a(NEXT)) * addim_step(x, clean, SIGMA, NEXT, x_var)
    plain = column(a(NEXT)) * addim_step(x, clean, SIGMA, NEXT, 0 * x_var)
    s_over_s = a(NEXT) * NEXT / (a(SIGMA) * SIGMA)
    z_var = (a(NEXT) - a(SIGMA) * s_over_s) ** 2 * x_var
    gained = (z_s**2).sum((1, 2, 3)) - (plain**2).sum((1, 2, 3))
    torch.testing.assert_close(gained, math.prod(SHAPE[1:]) * z_var, rtol=1e-9, atol=1e-12)


def test_each_image_has_its_own_norm() -> None:
    x, clean, x_var = normal(4), normal(5), torch.full((6,), 0.2, dtype=torch.float64)
    together = addim_step(x, clean, SIGMA, NEXT, x_var)
    for i in range(6):
        rows = slice(i, i + 1)
        alone = addim_step(x[rows], clean[rows], SIGMA[rows], NEXT[rows], x_var[rows])
        torch.testing.assert_close(alone, together[rows], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_noise_at_all_stays_finite(dtype: torch.dtype) -> None:
    x = normal(6).to(dtype)
    x_var = torch.full((6,), 0.2, dtype=dtype)
    assert torch.equal(addim_step(x, x, SIGMA.to(dtype), NEXT.to(dtype), x_var), x)


def test_the_variance_is_the_papers() -> None:
    """One step from sigma to 0, by hand."""
    sigma, latents = 3.0, normal(7)
    oracle = GaussianOracle(torch.zeros(SHAPE[1:], dtype=torch.float64), std=0.5)
    got = ADDIM(levels=(sigma,))(oracle, latents)
    x = sigma * latents
    clean = x * 0.25 / (0.25 + sigma**2)
    eps = (x - clean) / sigma
    x_var = 0.1 / (2 + 1 / sigma**2)
    want = clean + eps / column((eps**2).mean((1, 2, 3)).sqrt()) * math.sqrt(x_var)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [8, 16])
def test_it_restores_most_of_the_variance_that_ddim_loses(steps: int) -> None:
    """Numbers of deviation 0.5, for which the paper's 0.1 is made."""
    oracle = GaussianOracle(torch.zeros(1, 16, 16, dtype=torch.float64), std=0.5)
    latents = StepNoise(8).normal(torch.empty(64, 1, 16, 16, dtype=torch.float64))
    ddim, addim = (float(s(oracle, latents).std()) - 0.5 for s in (DDIM(num_steps=steps), ADDIM(num_steps=steps)))
    assert ddim < -0.04
    assert abs(addim) < 0.25 * abs(ddim)


@pytest.mark.parametrize("variance", [-0.1, math.inf, math.nan])
def test_bad_settings_are_refused(variance: float) -> None:
    with pytest.raises(UserError, match=rf"sampler\.variance is {variance}; it must be >= 0 and finite"):
        ADDIM(variance=variance)
