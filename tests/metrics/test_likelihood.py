"""The likelihood by the probability flow against densities in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imagewright.metrics.likelihood import bits_per_dim, dequantised, log_likelihood
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.types import UNCONDITIONAL, Condition, UserError

RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}
SHAPE = (1, 2, 3)


def correlated() -> GaussianOracle:
    root = StepNoise(1).normal(torch.empty(6, 6, dtype=torch.float64))
    return GaussianOracle(torch.full(SHAPE, 0.2, dtype=torch.float64), cov=0.1 * root @ root.mT + 0.02 * torch.eye(6))


def two_modes() -> GaussianMixture:
    means = torch.tensor([[-0.6, 0.1], [0.5, 0.3]], dtype=torch.float64).reshape(2, 2, 1, 1)
    return GaussianMixture(means, torch.tensor([0.2, 0.3]), weights=torch.tensor([0.3, 0.7]), classes=torch.arange(2))


def levels(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma, dtype=x.dtype)


def pushed_forward(oracle: GaussianOracle, x: Tensor) -> Tensor:
    """The density at sigma 0.002 of N(0, 80^2) carried down by the exact flow, which is linear."""
    variances, (low, high) = oracle.variances, RANGE.values()
    start = oracle.flow_map()(x, levels(x, low), levels(x, high))
    volume = 0.5 * torch.log((high**2 + variances) / (low**2 + variances)).sum()
    return volume - 0.5 * (start / high).square().flatten(1).sum(1) - 3 * math.log(2 * math.pi * high**2)


def test_gaussian_is_exact() -> None:
    oracle = correlated()
    x = oracle.sample(16, StepNoise(2))
    found = log_likelihood(oracle, x, steps=400, probes=None, **RANGE)
    torch.testing.assert_close(found, pushed_forward(oracle, x), rtol=0, atol=1e-6)
    # The density of the data themselves: the prior lacks their mean, 0.2.
    torch.testing.assert_close(found, oracle.log_density(x, levels(x, 0.002)), rtol=0, atol=0.05)


def test_mixture_is_exact_from_far_away() -> None:
    oracle = two_modes()
    x = oracle.sample(16, StepNoise(2))
    found = log_likelihood(oracle, x, steps=400, probes=None, sigma_min=0.002, sigma_max=1e7)
    torch.testing.assert_close(found, oracle.log_density(x, levels(x, 0.002)), rtol=0, atol=3e-5)


def test_error_is_of_fourth_order() -> None:
    oracle, errors = correlated(), []
    x = oracle.sample(32, StepNoise(2))
    for steps in (50, 100, 200):
        found = log_likelihood(oracle, x, steps=steps, probes=None, **RANGE)
        errors.append(float((found - pushed_forward(oracle, x)).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.4)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(4, abs=0.2)


def test_labels_reach_the_denoiser() -> None:
    oracle, cond = two_modes(), Condition(label=torch.tensor([0, 1, 0, 1]))
    x = oracle.sample(4, StepNoise(3), cond)
    found = log_likelihood(oracle, x, cond, steps=200, probes=None, sigma_min=0.002, sigma_max=1e6)
    torch.testing.assert_close(found, oracle.log_density(x, levels(x, 0.002), cond), rtol=0, atol=1e-4)


def test_probes_are_unbiased() -> None:
    """For a correlated Gaussian single probes scatter; their mean over many draws is the exact value."""
    oracle = correlated()
    x = oracle.sample(1, StepNoise(4)).expand(3000, *SHAPE)
    exact = log_likelihood(oracle, x[:1], steps=24, probes=None, **RANGE)
    one = log_likelihood(oracle, x, noise=StepNoise(5), steps=24, probes=1, **RANGE)
    four = log_likelihood(oracle, x, noise=StepNoise(5), steps=24, probes=4, **RANGE)
    assert float(one.std()) > 0.05
    for found in (one, four):
        assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / math.sqrt(3000)
    assert float(four.std()) == pytest.approx(float(one.std()) / 2, rel=0.1)


def test_a_diagonal_jacobian_needs_one_probe() -> None:
    oracle = GaussianOracle(torch.zeros(SHAPE, dtype=torch.float64), std=torch.linspace(0.1, 0.6, 6).reshape(SHAPE))
    x = oracle.sample(4, StepNoise(6))
    found = log_likelihood(oracle, x, noise=StepNoise(7), steps=300, probes=1, **RANGE)
    torch.testing.assert_close(found, pushed_forward(oracle, x), rtol=0, atol=1e-5)


def test_bits_per_dim_of_uniform_noise() -> None:
    """A density of 1/2 over [-1, 1] is 8 bits over 255 bins and one."""
    log_density = torch.full((3,), 10 * math.log(0.5), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(log_density, 10), torch.full((3,), math.log2(255), dtype=torch.float64))
    assert float(bits_per_dim(log_density, 10, level_width=2 / 256)[0]) == pytest.approx(8.0)


def test_dequantised_values_stay_in_their_bins() -> None:
    values = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    spread = dequantised(values / 127.5 - 1, StepNoise(8))
    assert torch.equal(((spread + 1) * 127.5).round(), values) and (spread != values / 127.5 - 1).all()


def test_no_gradient_is_kept_and_inputs_stay() -> None:
    oracle = two_modes()
    x = oracle.sample(2, StepNoise(9)).float().requires_grad_(True)
    with torch.no_grad():
        found = log_likelihood(oracle, x, UNCONDITIONAL, noise=StepNoise(1), steps=2, **RANGE)
    assert found.dtype == torch.float64 and not found.requires_grad and x.grad is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sigma_min": 0.0}, "sigma_min is 0.0 and sigma_max is 80.0; they must satisfy 0 < sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max is inf"),
        ({"sigma_min": 90.0}, "sigma_min is 90.0"),
        ({"steps": 0}, "steps is 0"),
        ({"probes": 0}, "probes is 0"),
        ({"noise": None}, "probes is 1; an estimate of the trace needs a noise source"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, object], sentence: str) -> None:
    x = torch.zeros(1, 2, 1, 1)
    with pytest.raises(UserError, match=sentence):
        log_likelihood(two_modes(), x, **(RANGE | {"noise": StepNoise(1)} | settings))  # type: ignore[arg-type]


def test_limits_are_the_denoisers_by_default() -> None:
    with pytest.raises(UserError, match=r"sigma_min is 0\.0 and sigma_max is inf"):
        log_likelihood(two_modes(), torch.zeros(1, 2, 1, 1), probes=None)
