"""Conversions: all pairs of predictions both ways, end points, wrappers against a Gaussian's closed form."""

import math
from itertools import permutations

import pytest
import torch

from imagewright.oracles import GaussianOracle
from imagewright.paths.conversions import (
    PREDICTIONS,
    as_denoiser,
    convert,
    from_bounded,
    from_sigma,
    to_bounded,
    to_sigma,
    velocity_of,
)
from imagewright.paths.gaussian import (
    Cosine,
    Linear,
    TrigFlow,
    VarianceExploding,
    VariancePreserving,
    per_image,
)
from imagewright.types import UNCONDITIONAL, Denoiser, UserError

PATHS = [Linear(), VarianceExploding(), TrigFlow(), VariancePreserving(), Cosine()]
REACH_PURE_NOISE = [Linear(), TrigFlow(), Cosine()]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(path, n=5):
    """x0, eps, t and everything that can be predicted of x_t."""
    x0, eps = normal(n, 2, 3, 3), normal(n, 2, 3, 3, seed=1)
    t = torch.linspace(0.1, 0.9, n, dtype=torch.float64) * path.t_max
    alpha, sigma = per_image(path.alpha(t), x0), per_image(path.sigma(t), x0)
    truth = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": per_image(path.alpha_prime(t), x0) * x0 + per_image(path.sigma_prime(t), x0) * eps,
        "score": -eps / sigma,
    }
    return path.mix(x0, eps, t), t, truth


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_every_prediction_from_every_other(path, source, target):
    x_t, t, truth = case(path)
    got = convert(truth[source], x_t, t, path, source, target)
    torch.testing.assert_close(got, truth[target], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(("a", "b"), list(permutations(PREDICTIONS, 2)))
def test_predictions_round_trip(path, a, b):
    x_t, t, _ = case(path)
    value = normal(*x_t.shape, seed=7)  # not consistent with any x0: conversions are about x_t alone
    back = convert(convert(value, x_t, t, path, a, b), x_t, t, path, b, a)
    torch.testing.assert_close(back, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_is_the_derivative_along_the_path(path):
    _, t, truth = case(path)
    h = 1e-5 * path.t_max
    before, after = (path.mix(truth["x0"], truth["eps"], s) for s in (t - h, t + h))
    slope = (after - before) / (2 * h)
    torch.testing.assert_close(slope, truth["velocity"], rtol=1e-6, atol=1e-6)


def test_v_and_velocity_are_named_apart():
    _, _, truth = case(Linear())
    torch.testing.assert_close(truth["velocity"], truth["eps"] - truth["x0"])
    x_t, t, truth = case(TrigFlow(sigma_data=1.0))
    torch.testing.assert_close(convert(truth["v"], x_t, t, TrigFlow(sigma_data=1.0), "v", "velocity"), truth["v"])
    _, _, truth = case(TrigFlow(sigma_data=0.5))
    assert (truth["v"] - truth["velocity"]).abs().max() > 0.1


@pytest.mark.parametrize("path", REACH_PURE_NOISE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["x0", "v", "velocity"])
@pytest.mark.parametrize("target", PREDICTIONS)
def test_pure_noise_is_not_special(path, dtype, source, target):
    x0, eps = normal(2, 3, seed=2).to(dtype), normal(2, 3, seed=3).to(dtype)
    t = torch.full((2,), path.t_max, dtype=dtype)
    x_t = path.mix(x0, eps, t)
    value = convert(x0, x_t, t, path, "x0", source)
    assert torch.isfinite(value).all()
    want = convert(x0, x_t, t, path, "x0", target)
    torch.testing.assert_close(convert(value, x_t, t, path, source, target), want)


@pytest.mark.parametrize("path", REACH_PURE_NOISE, ids=repr)
def test_eps_cannot_tell_the_image_in_pure_noise(path):
    t = torch.full((2,), path.t_max, dtype=torch.float64)
    x_t = path.mix(normal(2, 3), normal(2, 3, seed=1), t)
    assert not torch.isfinite(convert(normal(2, 3, seed=1), x_t, t, path, "eps", "x0")).any()


@pytest.mark.parametrize("path", [Linear(), TrigFlow(), VarianceExploding()], ids=repr)
@pytest.mark.parametrize("source", ["eps", "v", "velocity"])
def test_clean_image_is_read_off(path, source):
    x0, t = normal(2, 3), torch.zeros(2, dtype=torch.float64)
    got = convert(normal(2, 3, seed=4), x0, t, path, source, "x0")
    torch.testing.assert_close(got, x0)


def test_conversion_is_differentiable_in_everything():
    x_t, t, truth = case(TrigFlow(), n=2)
    value = truth["velocity"].requires_grad_()

    def run(value, x_t, t):
        return convert(value, x_t, t, TrigFlow(), "velocity", "score")

    assert torch.autograd.gradcheck(run, (value, x_t.requires_grad_(), t.requires_grad_()))


def test_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="no prediction 'noise'; there are x0, eps, v, velocity, score"):
        convert(normal(1, 1), normal(1, 1), torch.ones(1), Linear(), "noise", "x0")


# --- points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_sigma_coordinates_are_signal_plus_noise(path):
    x_t, t, truth = case(path)
    x, sigma = to_sigma(x_t, t, path)
    torch.testing.assert_close(x, truth["x0"] + per_image(sigma, x) * truth["eps"])
    back, back_t = from_sigma(x, sigma, path)
    torch.testing.assert_close(back, x_t)
    torch.testing.assert_close(back_t, t)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_bounded_coordinates_are_those_of_the_docstring(path):
    x_t, t, _ = case(path)
    x, sigma = to_sigma(x_t, t, path)
    y, angle = to_bounded(x_t, t, path, sigma_data=0.7)
    torch.testing.assert_close(y, x / per_image(torch.sqrt(sigma**2 + 0.49), x))
    torch.testing.assert_close(angle, torch.atan(sigma / 0.7))
    back, back_t = from_bounded(y, angle, path, sigma_data=0.7)
    torch.testing.assert_close(back, x_t)
    torch.testing.assert_close(back_t, t)


@pytest.mark.parametrize("source", REACH_PURE_NOISE, ids=repr)
@pytest.mark.parametrize("target", REACH_PURE_NOISE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_travels_between_paths(source, target, dtype):
    eps, t = normal(2, 3).to(dtype), torch.full((2,), source.t_max, dtype=dtype)
    y, angle = to_bounded(source.mix(torch.zeros_like(eps), eps, t), t, source)
    torch.testing.assert_close(y, eps)
    assert torch.equal(angle, torch.full_like(t, math.pi / 2))
    x_t, t = from_bounded(y, angle, target)
    assert torch.equal(t, torch.full_like(t, target.t_max))
    torch.testing.assert_close(x_t, per_image(target.sigma(t), eps) * eps)


def test_bounded_coordinates_are_trigflows_own():
    x_t, t, _ = case(TrigFlow(sigma_data=0.5))
    y, angle = to_bounded(x_t, t, TrigFlow(sigma_data=0.5), sigma_data=0.5)
    torch.testing.assert_close(y, x_t / 0.5)
    torch.testing.assert_close(angle, t)


# --- models -------------------------------------------------------------------------------------------------

MEAN, STD = 0.3, 0.6
ORACLE = GaussianOracle(torch.full((2, 3), MEAN, dtype=torch.float64), std=STD)


def exact(path, prediction):
    """E[prediction | x_t] for N(MEAN, STD^2) data, from the path's own formulas, without `convert`."""

    def network(x_t, t, cond):
        alpha, sigma = per_image(path.alpha(t), x_t), per_image(path.sigma(t), x_t)
        score = -(x_t - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        eps = -sigma * score
        x0 = MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        a, s = per_image(path.alpha_prime(t), x_t), per_image(path.sigma_prime(t), x_t)
        v = alpha * eps - sigma * x0
        return {"x0": x0, "eps": eps, "v": v, "velocity": a * x0 + s * eps, "score": score}[prediction]

    return network


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_network_is_a_denoiser(path, prediction):
    denoiser = as_denoiser(path, exact(path, prediction), prediction)
    assert isinstance(denoiser, Denoiser)
    sigma = torch.tensor([0.05, 0.5, 5.0, 50.0], dtype=torch.float64)
    x = MEAN + torch.sqrt(STD**2 + sigma**2)[:, None, None] * normal(4, 2, 3)
    torch.testing.assert_close(denoiser(x, sigma), ORACLE(x, sigma), rtol=1e-8, atol=1e-8)


def test_denoiser_answers_in_the_images_dtype_and_passes_the_condition():
    seen = []

    def network(x_t, t, cond):
        seen.append((x_t.dtype, t.dtype, cond))
        return x_t

    denoiser = as_denoiser(Linear(), network, "velocity", sigma_max=80.0)
    out = denoiser(torch.ones(2, 1, 4, 4), torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert out.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32, UNCONDITIONAL)]
    assert denoiser.sigma_max == 80.0


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_of_a_denoiser(path):
    x_t, t = normal(5, 2, 3), torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * path.t_max
    got = velocity_of(ORACLE, path)(x_t, t, UNCONDITIONAL)
    torch.testing.assert_close(got, exact(path, "velocity")(x_t, t, UNCONDITIONAL), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", REACH_PURE_NOISE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_velocity_at_pure_noise(path, dtype):
    x_t, t = normal(2, 2, 3).to(dtype), torch.full((2,), path.t_max, dtype=dtype)
    got = velocity_of(ORACLE, path)(x_t, t, UNCONDITIONAL)
    want = exact(path, "velocity")(x_t, t, UNCONDITIONAL)  # finite: the mean image and the noise itself
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_velocity_never_asks_beyond_what_the_denoiser_knows():
    asked = []

    class Limited:
        sigma_min, sigma_max = 0.002, 80.0

        def __call__(self, x, sigma, cond=UNCONDITIONAL):
            asked.append((x, sigma))
            return torch.zeros_like(x)

        def round_sigma(self, sigma):
            return sigma

    x_t, t = normal(3, 4), torch.tensor([0.5, 0.999, 1.0], dtype=torch.float64)
    velocity_of(Limited(), Linear(), sigma_data=0.5)(x_t, t, UNCONDITIONAL)
    x, sigma = asked[0]
    torch.testing.assert_close(sigma, torch.tensor([1.0, 80.0, 80.0], dtype=torch.float64))
    y, _ = to_bounded(x_t, t, Linear(), sigma_data=0.5)
    torch.testing.assert_close(x, y * torch.sqrt(sigma**2 + 0.25)[:, None])


def test_there_and_back_again():
    path = TrigFlow()
    denoiser = as_denoiser(path, velocity_of(ORACLE, path), "velocity")
    x, sigma = normal(3, 2, 3), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, sigma), ORACLE(x, sigma))


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="no prediction 'epsilon'"):
        as_denoiser(Linear(), exact(Linear(), "eps"), "epsilon")
    with pytest.raises(UserError, match=r"0 <= sigma_min < sigma_max, got 2\.0 and 1\.0"):
        as_denoiser(Linear(), exact(Linear(), "eps"), "eps", sigma_min=2.0, sigma_max=1.0)
