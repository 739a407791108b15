"""Low-rank mixtures against dense Gaussians and autograd; integrated flows against closed forms."""

import numpy as np
import pytest
import torch

from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, GaussianOracle, IntegratedFlowMap, LowRankMixture
from imagewright.types import Condition, Denoiser, FlowMap, UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


AXES = torch.linalg.qr(normal(3, 6, 2, seed=1)).Q
VARIANCES = normal(3, 2, seed=2).square() + 0.1
FLOOR = 0.2
MIXTURE = LowRankMixture(normal(3, 1, 2, 3), AXES, VARIANCES, FLOOR, torch.tensor([1.0, 2.0, 3.0]).double(), None)
LABELLED = LowRankMixture(MIXTURE.means, AXES, VARIANCES, FLOOR, MIXTURE.weights, torch.tensor([0, 1, 1]))
SIGMA = torch.tensor([0.05, 0.4, 2.0, 30.0], dtype=torch.float64)
X = normal(4, 1, 2, 3, seed=3) * (1 + SIGMA[:, None, None, None])


def dense(k):
    cov = AXES[k] @ VARIANCES[k].diag() @ AXES[k].mT + FLOOR**2 * torch.eye(6, dtype=torch.float64)
    return GaussianOracle(MIXTURE.means[k], cov=cov)


def test_meets_the_protocol():
    assert isinstance(MIXTURE, Denoiser) and isinstance(IntegratedFlowMap(MIXTURE), FlowMap)


def test_density_is_the_dense_one():
    parts = torch.stack([dense(k).log_density(X, SIGMA) for k in range(3)], 1)
    want = torch.logsumexp(parts + MIXTURE.weights.log(), 1)
    torch.testing.assert_close(MIXTURE.log_density(X, SIGMA), want)


def test_score_is_the_gradient_and_denoiser_is_tweedies():
    x = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(MIXTURE.log_density(x, SIGMA).sum(), x)
    torch.testing.assert_close(MIXTURE.score(X, SIGMA), want)
    torch.testing.assert_close(MIXTURE(X, SIGMA), X + SIGMA[:, None, None, None] ** 2 * want)


def test_a_label_leaves_its_class_alone():
    cond = Condition(label=torch.tensor([0, 0, 0, 0]))
    torch.testing.assert_close(LABELLED(X, SIGMA, cond), dense(0)(X, SIGMA))
    assert not torch.allclose(LABELLED(X, SIGMA), LABELLED(X, SIGMA, cond))
    torch.testing.assert_close(LABELLED(X, SIGMA, Condition(label=-torch.ones(4).long())), LABELLED(X, SIGMA))


def test_samples_have_the_moments():
    one = LowRankMixture(MIXTURE.means[:1], AXES[:1], VARIANCES[:1], FLOOR)
    drawn = one.sample(40_000, StepNoise(1)).flatten(1)
    want = AXES[0] @ VARIANCES[0].diag() @ AXES[0].mT + FLOOR**2 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(drawn.mean(0), MIXTURE.means[0].flatten(), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(drawn.mT), want, rtol=0, atol=0.06)


def test_fit_recovers_a_mixture():
    labels = torch.arange(60_000) % 2
    means = MIXTURE.means[:2]
    truth = LowRankMixture(means, AXES[:2], VARIANCES[:2] + 0.5, FLOOR, None, torch.arange(2))
    fitted = LowRankMixture.from_images(truth.sample(60_000, StepNoise(2), Condition(label=labels)), labels, rank=2)
    torch.testing.assert_close(fitted.means, means, rtol=0, atol=0.03)
    assert fitted.floor == pytest.approx(FLOOR, rel=0.02)
    projectors, wanted = fitted.axes @ fitted.axes.mT, AXES[:2] @ AXES[:2].mT
    torch.testing.assert_close(projectors, wanted, rtol=0, atol=0.03)


def test_rank_and_shapes_are_checked():
    with pytest.raises(UserError, match="rank is 6; it must be at least 1 and below 6"):
        LowRankMixture.from_images(normal(50, 1, 2, 3), rank=6)
    with pytest.raises(UserError, match="orthonormal"):
        LowRankMixture(MIXTURE.means, AXES * 2, VARIANCES, FLOOR)
    with pytest.raises(UserError, match=r"axes must have shape \[3, 6, R\]"):
        LowRankMixture(MIXTURE.means, AXES[:, :5], VARIANCES, FLOOR)


# --- flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(80.0, 0.0), (80.0, 0.3), (0.0, 5.0)])
def test_flow_of_a_gaussian_is_the_closed_form(start, end):
    oracle = GaussianOracle(normal(1, 2, 3), std=normal(1, 2, 3, seed=4).abs() + 0.1)
    x, at = normal(4, 1, 2, 3, seed=5) * (start + 1), torch.ones(4, dtype=torch.float64)
    flow, exact = IntegratedFlowMap(_Unconditional(oracle)), oracle.flow_map()
    torch.testing.assert_close(flow(x, start * at, end * at), exact(x, start * at, end * at), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("oracle", [MIXTURE, GaussianMixture(normal(3, 1, 2, 3), 0.3)], ids=["low rank", "isotropic"])
def test_flow_of_a_mixture_composes_and_returns(oracle):
    x, at = normal(4, 1, 2, 3, seed=6) * 80, torch.ones(4, dtype=torch.float64)
    flow = IntegratedFlowMap(oracle)
    down = flow(x, 80 * at, 0.01 * at)
    torch.testing.assert_close(flow(flow(x, 80 * at, 1.0 * at), 1.0 * at, 0.01 * at), down, rtol=0, atol=1e-7)
    torch.testing.assert_close(flow(down, 0.01 * at, 80 * at), x, rtol=0, atol=1e-4)  # up, errors grow with sigma


def test_flow_carries_noise_to_the_data():
    line = GaussianMixture(torch.tensor([[-1.0], [1.0]]).double(), 0.2)
    x = 300 * normal(20_000, 1, seed=7)
    at = torch.ones(len(x), dtype=torch.float64)
    ends = IntegratedFlowMap(line, tolerance=1e-6)(x, 300 * at, 0 * at)
    drawn = line.sample(20_000, StepNoise(3))
    levels = np.delete(np.linspace(0.05, 0.95, 19), 9)  # the median lies in the gap between the modes
    np.testing.assert_allclose(np.quantile(ends.numpy(), levels), np.quantile(drawn.numpy(), levels), atol=0.1)


def test_levels_must_agree():
    with pytest.raises(ValueError, match="same two levels"):
        IntegratedFlowMap(MIXTURE)(X, SIGMA, 0 * SIGMA)


class _Unconditional:
    """A Gaussian's score takes no condition."""

    def __init__(self, oracle):
        self.oracle = oracle

    def score(self, x, sigma, cond=None):
        return self.oracle.score(x, sigma)
