"""Bespoke's step against the plain solvers it contains, its order on a fixed change, and DDIM as one of its members."""

import json
from dataclasses import asdict

import pytest
import torch

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, GaussianOracle, IntegratedFlowMap
from imagewright.samplers import DDIM
from imagewright.samplers.bespoke import Bespoke, Change, bespoke_step, straight_velocity
from imagewright.types import Condition, UserError

COUNT = 6
MIXTURE = GaussianMixture(ImageNoise(3, range(4)).normal(torch.empty(4, 1, 2, 2, dtype=torch.float64)), 0.4)
LATENTS = ImageNoise(1, range(COUNT)).normal(torch.empty(COUNT, 1, 2, 2, dtype=torch.float64))
VELOCITY = straight_velocity(MIXTURE, 0.002, 80.0)


def u(x, t):
    return VELOCITY(x, torch.full((len(x),), t, dtype=torch.float64), Condition())


class Recorder:
    """Notes the level of every call."""

    sigma_min, sigma_max = 0.01, 50.0

    def __init__(self):
        self.levels = []

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, cond=None):
        self.levels.append(float(sigma[0]))
        return MIXTURE(x, sigma)


def smooth(m):
    """A fixed smooth change of time and scale with its exact derivatives, at m evaluations."""
    r = torch.arange(m + 1, dtype=torch.float64) / m
    bend = 0.1 * torch.sin(2 * torch.pi * r)
    scales = torch.exp(0.4 * torch.sin(3 * r))
    times = r + bend
    times[-1] = 1
    return Change(
        times,
        1 + 0.2 * torch.pi * torch.cos(2 * torch.pi * r[:-1]),
        scales,
        (1.2 * torch.cos(3 * r) * scales)[:-1],
    )


@pytest.mark.parametrize("make", [Bespoke.identity, lambda n, order: Bespoke(num_steps=n, order=order)])
@pytest.mark.parametrize("n", [3, 8])
def test_the_identity_is_euler_and_midpoint_bit_for_bit(make, n):
    euler, midpoint = LATENTS, LATENTS
    for i in range(n):
        euler = euler + 1 / n * u(euler, i / n)
        half = midpoint + 1 / n / 2 * u(midpoint, i / n)
        midpoint = midpoint + 1 / n * u(half, (2 * i + 1) / (2 * n))
    assert torch.equal(make(n, 1)(MIXTURE, LATENTS), euler)
    assert torch.equal(make(n, 2)(MIXTURE, LATENTS), midpoint)


@pytest.mark.parametrize(("order", "n"), [(1, 5), (1, 10), (2, 5), (2, 10)])
def test_counts_of_calls_and_of_free_numbers(order, n):
    sampler, recorder = Bespoke(num_steps=n, order=order), Recorder()
    sampler(recorder, LATENTS)
    assert len(recorder.levels) == sampler.nfe == order * n
    assert sampler.parameters == (4 * n - 1 if order == 1 else 8 * n - 1)
    written = Bespoke.identity(n, order)
    fixed = 3  # t_0 = 0, t_1 = 1, s_0 = 1
    assert sum(len(getattr(written, name)) for name in Change._fields) - fixed == sampler.parameters


@pytest.mark.parametrize("order", [1, 2])
def test_error_falls_with_the_base_solvers_order(order):
    flow = IntegratedFlowMap(MIXTURE, 1e-10)
    # Pure noise, as far as a float64 flow can start from: the mean is what a straight line from infinity adds.
    start = 1e5 * LATENTS + MIXTURE.means.mean(0)
    truth = flow(start, torch.tensor([1e5]), torch.tensor([0.0]))
    errors = []
    for n in (32, 64, 128):
        sampler = Bespoke.of(smooth(order * n), order, sigma_min=1e-5, sigma_max=1e5)
        errors.append(float((sampler(MIXTURE, LATENTS) - truth).square().mean().sqrt()))
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert ratios == pytest.approx([2.0**order] * 2, rel=0.15)


def test_one_step_is_ddims_in_ddims_coordinates():
    high, low = 3.0, 0.7
    x = high * LATENTS  # any point
    ddim = DDIM(levels=(high, low))
    states = []
    # DDIM scales its latents; the first on_step is the step from high to low.
    ddim(MIXTURE, LATENTS, on_step=lambda x, denoised, sigma: states.append((x, denoised)))
    # s = 1 / alpha = 1 + sigma with sigma = high + r (low - high); alpha = t on the straight path.
    sigma = torch.tensor([high, low], dtype=torch.float64)
    t, s = 1 / (1 + sigma), 1 + sigma
    change = Change(t, ((high - low) * t**2)[:1], s, torch.tensor([low - high], dtype=torch.float64))
    after, estimate = bespoke_step(VELOCITY, x * t[0], change, 1, 0)
    torch.testing.assert_close(after / t[1], states[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate, states[0][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_the_scale_of_the_coordinates_does_not_matter(order):
    change = smooth(order * 3)
    larger = change._replace(scales=7 * change.scales, scales_prime=7 * change.scales_prime)
    for i in range(3):
        a, _ = bespoke_step(VELOCITY, LATENTS, change, order, i)
        b, _ = bespoke_step(VELOCITY, LATENTS, larger, order, i)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_a_batch_of_steps_is_the_steps_one_by_one():
    change = smooth(6)
    batch, _ = bespoke_step(VELOCITY, LATENTS, change, 2, torch.arange(COUNT) % 3)
    for row in range(COUNT):
        alone, _ = bespoke_step(VELOCITY, LATENTS[row : row + 1], change, 2, row % 3)
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=0, atol=1e-13)


def test_velocity_on_a_gaussian_is_the_closed_form_and_stays_at_the_ends():
    std = 0.5
    oracle = GaussianOracle(torch.zeros(1, 2, 2, dtype=torch.float64), std=std)
    velocity = straight_velocity(oracle, 0.002, 1e6)
    for time in (0.0, 0.2, 0.7, 0.99):
        # std_t^2 = (std t)^2 + (1 - t)^2 and u = x d ln std_t / dt
        factor = (std**2 * time - (1 - time)) / ((std * time) ** 2 + (1 - time) ** 2)
        t = torch.full((COUNT,), time, dtype=torch.float64)
        torch.testing.assert_close(velocity(LATENTS, t, Condition()), factor * LATENTS, rtol=1e-5, atol=1e-6)
    last, end = (torch.full((COUNT,), t, dtype=torch.float64) for t in (1 / 1.002, 1.0))
    assert torch.equal(velocity(LATENTS, last, Condition()), velocity(LATENTS, end, Condition()))


def test_the_denoiser_is_asked_within_its_range_and_steps_are_told_in_the_librarys_coordinates():
    recorder, seen = Recorder(), []
    out = Bespoke(num_steps=400, order=1)(recorder, LATENTS, on_step=lambda *step: seen.append(step))
    assert recorder.levels[0] == pytest.approx(50.0) and min(recorder.levels) == pytest.approx(0.01)
    sigmas = [sigma for _, _, sigma in seen]
    assert sigmas == pytest.approx([(400 - i) / i for i in range(1, 401)]) and sigmas[-1] == 0
    assert torch.equal(seen[-1][0], out)
    x, estimate, sigma = seen[199]
    before, level = seen[198][0], seen[198][2]
    torch.testing.assert_close(estimate, MIXTURE(before, torch.tensor([level], dtype=torch.float64)), rtol=0, atol=1e-9)
    torch.testing.assert_close(x, before + (sigma - level) * (before - estimate) / level, rtol=0, atol=0.02)


def test_settings_survive_json():
    sampler = Bespoke.of(smooth(6), 2)
    assert sampler.num_steps == 3
    assert Bespoke(**json.loads(json.dumps(asdict(sampler)))) == sampler


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"order": 3}, r"sampler\.order is 3; it must be 1"),
        ({"num_steps": 0}, r"sampler\.num_steps is 0"),
        ({"times": (0.0, 0.5, 0.7, 1.0)}, "times 4, .* each must be order"),
        ({"times": (0.0, 0.5, 1.0), "scales": (1.0, 1.0)}, "scales 2, .* times and scales one more"),
        ({"times": (0.0, 0.5, 0.9)}, r"sampler\.times is \(0, 0\.5, 0\.9\); it must increase strictly from 0 to 1"),
        ({"times": (0.0, 0.5, 0.5, 0.7, 1.0)}, "increase strictly"),
        ({"times_prime": (1.0, 0.0)}, r"times_prime is \(1, 0\); it must be positive"),
        ({"scales": (2.0, 1.0, 1.0)}, "positive and finite and start with 1"),
        ({"scales": (1.0, -1.0, 1.0)}, "positive and finite and start with 1"),
        ({"scales_prime": (0.0, float("nan"))}, "it must be finite"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Bespoke(**settings)
