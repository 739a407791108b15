"""Gaussian paths: derivatives, inverses, end points and the papers' own formulas."""

import math

import pytest
import torch

from imagewright.paths.gaussian import Cosine, Linear, TrigFlow, VarianceExploding, VariancePreserving
from imagewright.types import UserError

PATHS = [
    Linear(),
    VarianceExploding(),
    TrigFlow(),
    TrigFlow(sigma_data=1.3),
    VariancePreserving(),
    Cosine(),
    Cosine(C_2=0.0),
]
REACH_PURE_NOISE = [path for path in PATHS if isinstance(path, Linear | TrigFlow | Cosine)]


def times(path, n=101, dtype=torch.float64):
    """Strictly inside (0, t_max)."""
    return torch.linspace(0, 1, n + 2, dtype=dtype)[1:-1] * path.t_max


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_derivatives_are_those_of_autograd(path, name):
    t = times(path).requires_grad_()
    (want,) = torch.autograd.grad((getattr(path, name)(t) + 0 * t).sum(), t)
    torch.testing.assert_close(getattr(path, f"{name}_prime")(t), want)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_time_of_inverts_the_noise_level(path):
    t = times(path)
    torch.testing.assert_close(path.nsr(t), path.sigma(t) / path.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(path.time_of(path.nsr(t)), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_noise_level_survives_time_at_every_scale(path):
    nsr = torch.logspace(-6, 2, 200, dtype=torch.float64)
    torch.testing.assert_close(path.nsr(path.time_of(nsr)), nsr, rtol=1e-10, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_time_of_is_differentiable(path):
    nsr = torch.logspace(-2, 1, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(path.time_of, nsr)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clean_end(path, dtype):
    zero = torch.zeros(1, dtype=dtype)
    torch.testing.assert_close(path.alpha(zero), zero + 1)
    assert path.sigma(zero) == 0
    assert path.nsr(zero) == 0
    assert path.time_of(zero) == 0
    assert path.alpha(zero).dtype == path.sigma(zero).dtype == path.time_of(zero).dtype == dtype


@pytest.mark.parametrize("path", REACH_PURE_NOISE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_is_exact(path, dtype):
    end = torch.tensor([path.t_max], dtype=dtype)
    assert path.alpha(end) == 0
    assert path.nsr(end) == math.inf
    torch.testing.assert_close(path.time_of(torch.full_like(end, math.inf)), end, rtol=0, atol=0)
    assert torch.isfinite(path.alpha_prime(end)).all()
    assert torch.isfinite(path.sigma_prime(end)).all()


@pytest.mark.parametrize("path", [VariancePreserving(), VarianceExploding()], ids=repr)
def test_paths_without_pure_noise_say_so(path):
    assert path.time_of(torch.tensor(math.inf)) == math.inf


@pytest.mark.parametrize("path", [VariancePreserving(), Cosine()], ids=repr)
def test_variance_is_preserved(path):
    t = times(path)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


def test_vp_obeys_its_stochastic_equation():
    path, t = VariancePreserving(beta_d=7.0, beta_min=0.3), times(VariancePreserving())
    beta = 0.3 + 7.0 * t  # dx = -beta/2 x dt + sqrt(beta) dw
    torch.testing.assert_close(path.alpha_prime(t) / path.alpha(t), -beta / 2)
    torch.testing.assert_close(
        2 * path.sigma(t) * (path.sigma_prime(t) - path.sigma(t) * path.alpha_prime(t) / path.alpha(t)), beta
    )


def test_vp_reaches_the_noise_level_of_edm_table_1():
    nsr = VariancePreserving().nsr(torch.tensor(1.0, dtype=torch.float64))
    assert float(nsr) == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1), rel=1e-12)


def test_cosine_is_the_papers_alpha_bar():
    t = times(Cosine())
    alpha_bar = (torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    torch.testing.assert_close(Cosine().alpha(t) ** 2, alpha_bar)


def test_cosine_without_offset_is_a_quarter_turn():
    t = times(Cosine())
    torch.testing.assert_close(Cosine(C_2=0.0).alpha(t), torch.cos(math.pi * t / 2))
    torch.testing.assert_close(Cosine(C_2=0.0).sigma(t), torch.sin(math.pi * t / 2))


def test_trigflow_keeps_the_standard_deviation_of_the_data():
    path, t = TrigFlow(sigma_data=0.3), times(TrigFlow())
    torch.testing.assert_close((0.3 * path.alpha(t)) ** 2 + path.sigma(t) ** 2, torch.full_like(t, 0.09))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_mix_has_one_time_per_image(path):
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = times(path, 3)
    for i in range(3):
        want = path.alpha(t[i]) * x0[i] + path.sigma(t[i]) * eps[i]
        torch.testing.assert_close(path.mix(x0, eps, t)[i], want)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: TrigFlow(sigma_data=0.0), "TrigFlow.sigma_data is 0.0; it must be positive"),
        (
            lambda: VarianceExploding(sigma_max=math.inf),
            "VarianceExploding.sigma_max is inf; it must be positive and finite",
        ),
        (lambda: VariancePreserving(beta_min=-0.1), "VariancePreserving.beta_min is -0.1; it must be positive"),
        (lambda: Cosine(C_2=1.0), r"Cosine.C_2 must lie in \[0, 1\), got 1.0"),
    ],
)
def test_nonsense_is_refused(build, told):
    with pytest.raises(UserError, match=told):
        build()
