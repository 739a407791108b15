"""Training noise distributions: densities integrate to one, samples follow them, nonsense is refused."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from imagewright.paths.noise_levels import (
    ExponentialTime,
    LogitNormal,
    LogNormal,
    LogUniform,
    NoiseLevels,
    Uniform,
    UniformTime,
    UShaped,
    VPTime,
)
from imagewright.types import UserError


class SeededNoise:
    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, like):
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator)

    def uniform(self, like):
        return torch.rand(like.shape, dtype=like.dtype, generator=self.generator)


ALL = [
    LogNormal(),
    LogNormal(mean=0.4, std=2.0),
    LogitNormal(mean=-0.5, std=0.8),
    LogUniform(sigma_min=0.002, sigma_max=80.0),
    Uniform(sigma_min=0.1, sigma_max=3.0),
    UniformTime(),
    UShaped(),
    UShaped(sharpness=1.5, margin=0.01),
    ExponentialTime(),
    ExponentialTime(base=0.2, margin=0.01),
    VPTime(),
    VPTime(beta_d=5.0, beta_min=1.0, epsilon_t=0.01),
]


def cumulative(levels: NoiseLevels) -> tuple[np.ndarray, np.ndarray]:
    """log(sigma) and P(noise level <= sigma), by integrating the density over a fine logarithmic grid."""
    log_sigma = np.linspace(math.log(1e-8), math.log(1e8), 100_001)
    density = (levels.density(torch.from_numpy(np.exp(log_sigma)))).numpy() * np.exp(log_sigma)
    return log_sigma, integrate.cumulative_trapezoid(density, log_sigma, initial=0)


@pytest.mark.parametrize("levels", ALL, ids=repr)
def test_density_integrates_to_one(levels):
    assert cumulative(levels)[1][-1] == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("levels", ALL, ids=repr)
def test_samples_follow_the_density(levels):
    sigma = levels.sample(SeededNoise(1), torch.empty(20_000, dtype=torch.float64))
    log_sigma, below = cumulative(levels)
    test = stats.kstest(sigma.log().numpy(), lambda z: np.interp(z, log_sigma, below))
    assert test.pvalue > 1e-3


@pytest.mark.parametrize("levels", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_keep_dtype_and_are_usable(levels, dtype):
    sigma = levels.sample(SeededNoise(2), torch.empty(4096, dtype=dtype))
    assert sigma.shape == (4096,)
    assert sigma.dtype == dtype
    assert torch.isfinite(sigma).all()
    assert (sigma > 0).all()
    assert torch.equal(sigma, levels.sample(SeededNoise(2), torch.empty(4096, dtype=dtype)))


@pytest.mark.parametrize("levels", ALL[3:], ids=repr)
def test_density_is_zero_outside_the_support(levels):
    assert torch.equal(levels.density(torch.tensor([1e-9, 1e9])), torch.zeros(2))


def test_log_normal_agrees_with_scipy():
    sigma = torch.tensor([0.01, 0.3, 5.0], dtype=torch.float64)
    want = stats.lognorm(s=1.2, scale=math.exp(-1.2)).logpdf(sigma.numpy())
    np.testing.assert_allclose(LogNormal().log_prob(sigma).numpy(), want, rtol=1e-12)


def test_logit_normal_time_is_logit_normal():
    sigma = LogitNormal(mean=0.3, std=0.7).sample(SeededNoise(3), torch.empty(20_000, dtype=torch.float64))
    t = sigma / (1 + sigma)
    assert stats.kstest(torch.logit(t).numpy(), stats.norm(0.3, 0.7).cdf).pvalue > 1e-3


def test_u_shape_is_the_papers_density_over_time():
    a, margin = 4.0, 1e-5
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    inner = (t - margin) / (1 - 2 * margin)
    want = a * ((a * inner).exp() + (a * (1 - inner)).exp()) / (2 * (math.exp(a) - 1)) / (1 - 2 * margin)
    got = UShaped(sharpness=a, margin=margin).density(t / (1 - t)) / (1 - t) ** 2  # dsigma/dt = 1 / (1 - t)^2
    torch.testing.assert_close(got, want)


def test_u_shape_reaches_both_margins():
    class Ends:
        def uniform(self, like):
            return torch.tensor([0.0, 0.5, 1.0], dtype=like.dtype)

    sigma = UShaped(margin=0.01).sample(Ends(), torch.empty(3, dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor([0.01 / 0.99, 1.0, 0.99 / 0.01], dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: LogNormal(std=0.0), "LogNormal.std is 0.0; it must be positive and finite"),
        (lambda: LogNormal(mean=math.nan), "LogNormal.mean must be finite, got nan"),
        (lambda: LogitNormal(std=-1.0), "std is -1.0; it must be positive"),
        (lambda: LogUniform(sigma_min=0.0, sigma_max=1.0), "LogUniform.sigma_min is 0.0; it must be positive"),
        (lambda: Uniform(sigma_min=2.0, sigma_max=1.0), "sigma_min must be below sigma_max, got 2.0 and 1.0"),
        (lambda: UniformTime(margin=0.5), "UniformTime.margin must lie in"),
        (lambda: UShaped(sharpness=0.0), "UShaped.sharpness is 0.0; it must be positive"),
        (lambda: ExponentialTime(base=1.0), "ExponentialTime.base must not be 1"),
        (lambda: VPTime(beta_min=0.0), "VPTime.beta_min is 0.0; it must be positive"),
        (lambda: VPTime(epsilon_t=1.0), "VPTime.epsilon_t must lie in"),
        (lambda: UShaped(margin=0.0), "UShaped.margin must lie in"),
    ],
)
def test_nonsense_is_refused(build, told):
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        build()
