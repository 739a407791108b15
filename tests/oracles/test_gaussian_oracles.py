"""Oracles against autograd, quadrature and simulation, not against another formula of their own."""

import pytest
import torch

from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.types import Condition, Denoiser, FlowMap, UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(d, seed=5):
    root = normal(d, d, seed=seed)
    return root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)


ORACLES = {
    "one std": GaussianOracle(normal(1, 2, 3), std=0.5),
    "std per pixel": GaussianOracle(normal(1, 2, 3), std=normal(1, 2, 3, seed=1).abs() + 0.1),
    "covariance": GaussianOracle(normal(1, 2, 3), cov=covariance(6)),
    "mixture": GaussianMixture(
        normal(3, 1, 2, 3), torch.tensor([0.3, 0.5, 1.0]), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    ),
}
SIGMA = torch.tensor([0.05, 0.4, 2.0, 30.0], dtype=torch.float64)


@pytest.fixture(params=ORACLES.values(), ids=ORACLES.keys())
def oracle(request):
    return request.param


def test_meets_the_protocol(oracle):
    assert isinstance(oracle, Denoiser)
    assert torch.equal(oracle.round_sigma(SIGMA), SIGMA)


def test_score_is_the_gradient_of_log_density(oracle):
    x = (normal(4, 1, 2, 3, seed=2) * (1 + SIGMA[:, None, None, None])).requires_grad_()
    (want,) = torch.autograd.grad(oracle.log_density(x, SIGMA).sum(), x)
    torch.testing.assert_close(oracle.score(x, SIGMA), want)


def test_denoiser_is_tweedies(oracle):
    x = normal(4, 1, 2, 3, seed=2) * (1 + SIGMA[:, None, None, None])
    sigma2 = SIGMA[:, None, None, None] ** 2
    torch.testing.assert_close((oracle(x, SIGMA) - x) / sigma2, oracle.score(x, SIGMA))


def moments(oracle):
    """Mean and covariance of the data, flattened, from the parameters."""
    if isinstance(oracle, GaussianOracle):
        basis = torch.eye(6, dtype=torch.float64) if oracle.basis is None else oracle.basis
        return oracle.mean.flatten(), basis @ oracle.variances.diag() @ basis.mT
    means, weights = oracle.means.flatten(1), oracle.weights
    mean = weights @ means
    within = (weights * oracle.stds**2).sum() * torch.eye(6, dtype=torch.float64)
    return mean, within + (means.mT * weights) @ means - mean.outer(mean)


def test_samples_have_the_moments_of_the_parameters(oracle):
    x = oracle.sample(100_000, StepNoise(3))
    assert x.shape == (100_000, 1, 2, 3)
    mean, cov = moments(oracle)
    torch.testing.assert_close(x.flatten(1).mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.flatten(1).mT), cov, rtol=0, atol=0.04)


def test_density_integrates_to_one(oracle):
    """By importance sampling, at two noise levels."""
    mean, cov = moments(oracle)
    for noise_level in (0.0, 1.0):
        wide = 2 * (cov + noise_level**2 * torch.eye(6, dtype=torch.float64))
        proposal = torch.distributions.MultivariateNormal(mean, wide)
        x = mean + normal(100_000, 6, seed=4) @ torch.linalg.cholesky(wide).mT
        sigma = torch.full((100_000,), noise_level, dtype=torch.float64)
        ratio = (oracle.log_density(x.reshape(-1, 1, 2, 3), sigma) - proposal.log_prob(x)).exp()
        error = float(ratio.std()) / len(ratio) ** 0.5
        assert error < 0.03
        assert float(ratio.mean()) == pytest.approx(1, abs=4 * error)


def test_denoiser_minimises_the_denoising_error(oracle):
    """E|D(x0 + sigma eps) - x0|^2 is stationary in D: the error correlates with no function of x."""
    n, noise = 50_000, StepNoise(6)
    x0 = oracle.sample(n, noise)
    x = x0 + 0.7 * noise.normal(x0)
    denoised = oracle(x, torch.full((n,), 0.7, dtype=torch.float64))
    for function in (torch.ones_like(x), x, denoised, torch.tanh(x)):
        correlation = ((denoised - x0) * function).mean(0)
        assert correlation.abs().max() < 0.03
    assert ((denoised - x0) ** 2).mean() < ((x - x0) ** 2).mean()


def test_follows_dtype_and_accepts_one_sigma_for_all(oracle):
    x = normal(4, 1, 2, 3, seed=2)
    got = oracle(x.float(), torch.tensor(0.4))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), oracle(x, torch.full((4,), 0.4)), rtol=1e-5, atol=1e-5)


# --- Gaussian -----------------------------------------------------------------------------------------------

GAUSSIANS = {name: ORACLES[name] for name in ("one std", "std per pixel", "covariance")}


@pytest.fixture(params=GAUSSIANS.values(), ids=GAUSSIANS.keys())
def gaussian(request):
    return request.param


def test_density_agrees_with_torch_distributions():
    oracle, x = GAUSSIANS["covariance"], normal(4, 1, 2, 3, seed=2)
    for sigma in (0.0, 0.7):
        reference = torch.distributions.MultivariateNormal(
            oracle.mean.flatten(), covariance(6) + sigma**2 * torch.eye(6, dtype=torch.float64)
        )
        got = oracle.log_density(x, torch.full((4,), sigma, dtype=torch.float64))
        torch.testing.assert_close(got, reference.log_prob(x.flatten(1)))


def test_flow_map_is_the_closed_form():
    oracle, x = GaussianOracle(torch.zeros(3, dtype=torch.float64), std=0.5), normal(4, 3)
    got = oracle.flow_map()(x * 80, torch.full((4,), 80.0), SIGMA)
    torch.testing.assert_close(got, x * 80 * torch.sqrt((SIGMA**2 + 0.25) / (80**2 + 0.25))[:, None])


def test_flow_map_solves_the_probability_flow(gaussian):
    flow = gaussian.flow_map()
    assert isinstance(flow, FlowMap)
    x, sigma = normal(4, 1, 2, 3, seed=2), torch.full((4,), 1.5, dtype=torch.float64)

    def at(s):
        return flow(x, sigma, torch.full((4,), s, dtype=torch.float64))

    here = at(0.6)  # dx/dsigma = (x - D(x; sigma)) / sigma
    slope = (here - gaussian(here, torch.full((4,), 0.6, dtype=torch.float64))) / 0.6
    torch.testing.assert_close((at(0.6 + 1e-5) - at(0.6 - 1e-5)) / 2e-5, slope, rtol=1e-6, atol=1e-8)


def test_flow_map_composes_and_stands_still(gaussian):
    flow, x = gaussian.flow_map(), normal(4, 1, 2, 3, seed=2)
    a, b, c = (torch.full((4,), s, dtype=torch.float64) for s in (10.0, 1.0, 0.0))
    torch.testing.assert_close(flow(flow(x, a, b), b, c), flow(x, a, c))
    torch.testing.assert_close(flow(x, a, a), x)


def test_flow_map_carries_the_noised_density_to_the_data():
    oracle = GAUSSIANS["covariance"]
    n = 20_000
    x = oracle.sample(n, StepNoise(1)) + 3.0 * normal(n, 1, 2, 3, seed=9)
    x0 = oracle.flow_map()(x, torch.full((n,), 3.0), torch.zeros(n)).flatten(1)
    torch.testing.assert_close(torch.cov(x0.mT), covariance(6), rtol=0, atol=0.05)


def test_singular_covariance_is_allowed():
    oracle = GaussianOracle(torch.zeros(2, dtype=torch.float64), cov=torch.ones(2, 2, dtype=torch.float64))
    got = oracle(torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([0.1]))
    torch.testing.assert_close(got, torch.zeros(1, 2, dtype=torch.float64))


# --- mixture ------------------------------------------------------------------------------------------------


def test_mixture_of_one_is_a_gaussian():
    mean, x = normal(1, 1, 2, 3), normal(4, 1, 2, 3, seed=2)
    mixture, single = GaussianMixture(mean, 0.5), GaussianOracle(mean[0], std=0.5)
    torch.testing.assert_close(mixture(x, SIGMA), single(x, SIGMA))
    torch.testing.assert_close(mixture.log_density(x, SIGMA), single.log_density(x, SIGMA))


def test_mixture_denoiser_by_quadrature():
    mixture = GaussianMixture(
        torch.tensor([[-1.0], [0.8]], dtype=torch.float64), torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.7])
    )
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)[:, None]
    prior = mixture.log_density(grid, torch.zeros(len(grid), dtype=torch.float64)).exp()
    for x, sigma in ((0.1, 0.5), (-1.5, 2.0)):
        posterior = prior * torch.exp(-0.5 * ((x - grid[:, 0]) / sigma) ** 2)
        want = (posterior * grid[:, 0]).sum() / posterior.sum()
        got = mixture(torch.tensor([[x]], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
        torch.testing.assert_close(got[0, 0], want)


def test_mixture_samples_each_component_by_its_weight():
    mixture = GaussianMixture(torch.tensor([[-5.0], [0.0], [5.0]]), 0.01, torch.tensor([1.0, 2.0, 5.0]))
    x = mixture.sample(8000, StepNoise(2))[:, 0].round()
    shares = [float((x == mean).float().mean()) for mean in (-5, 0, 5)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.02)


def test_finite_set_of_images():
    images = normal(5, 1, 4, 4)
    denoiser = GaussianMixture(images, 0.0)
    sigma = torch.full((5,), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(denoiser(images + 1e-3 * normal(5, 1, 4, 4, seed=1), sigma), images)
    far = torch.full((5,), 1e4, dtype=torch.float64)
    torch.testing.assert_close(
        denoiser(images + 1e4 * normal(5, 1, 4, 4, seed=1), far),
        images.mean(0).expand(5, -1, -1, -1),
        rtol=0,
        atol=2e-3,
    )


def test_label_restricts_to_the_class():
    means, classes = normal(4, 2), torch.tensor([0, 1, 1, 0])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixture = GaussianMixture(means, 0.5, weights, classes)
    ones = GaussianMixture(means[1:3], 0.5, weights[1:3])
    x = normal(4, 2, seed=2)
    labels = Condition(label=torch.tensor([1, 1, 1, 1]))
    torch.testing.assert_close(mixture(x, SIGMA, labels), ones(x, SIGMA))
    torch.testing.assert_close(mixture.score(x, SIGMA, labels), ones.score(x, SIGMA))
    torch.testing.assert_close(mixture.log_density(x, SIGMA, labels), ones.log_density(x, SIGMA))
    anyone = Condition(label=torch.tensor([-1, -1, -1, -1]))
    torch.testing.assert_close(mixture(x, SIGMA, anyone), mixture(x, SIGMA))


def test_labelled_samples_belong_to_their_class():
    mixture = GaussianMixture(torch.tensor([[-5.0], [0.0], [5.0]]), 0.01, classes=torch.tensor([0, 1, 0]))
    label = torch.tensor([0, 1]).repeat(500)
    x = mixture.sample(1000, StepNoise(2), Condition(label=label))[:, 0].round()
    assert torch.equal(x == 0, label == 1)
    assert {float(v) for v in x} == {-5.0, 0.0, 5.0}


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: GaussianOracle(torch.zeros(2)), "exactly one of std and cov"),
        (lambda: GaussianOracle(torch.zeros(2), std=-1.0), "std must be >= 0"),
        (lambda: GaussianOracle(torch.zeros(2), cov=torch.eye(3)), r"symmetric \[2, 2\], got shape \[3, 3\]"),
        (lambda: GaussianOracle(torch.zeros(2), cov=-torch.eye(2)), "positive semidefinite"),
        (lambda: GaussianMixture(torch.zeros(2, 3), -0.1), "stds must be >= 0"),
        (
            lambda: GaussianMixture(torch.zeros(2, 3), 0.1, torch.tensor([1.0, 0.0])),
            "weights must all be positive",
        ),
        (lambda: GaussianMixture(torch.zeros(2, 3), 0.1, torch.ones(3)), r"weights must have shape \[2\]"),
    ],
)
def test_nonsense_is_refused(build, told):
    with pytest.raises(UserError, match=told):
        build()


def test_unknown_label_is_named():
    mixture = GaussianMixture(torch.zeros(2, 3), 0.1, classes=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no component has class 7"):
        mixture(torch.zeros(1, 3), torch.ones(1), Condition(label=torch.tensor([7])))
