"""Restart against Heun, closed forms on a Gaussian, and its own count of calls."""

import math

import pytest
import torch

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.samplers import PRESETS, Heun, Restart
from imagewright.types import UNCONDITIONAL, UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MIXTURE = GaussianMixture(normal(3, 1, 2, 2), 0.3)
LATENTS = normal(3, 1, 2, 2, seed=1)
LEVEL = float(Heun(num_steps=18).sigmas(MIXTURE)[9])


class Recorder:
    """Notes the level and the state of every call."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, denoiser=MIXTURE):
        self.denoiser, self.levels, self.states = denoiser, [], []

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, cond=UNCONDITIONAL):
        self.levels.append(float(sigma[0]))
        self.states.append(x)
        return self.denoiser(x, sigma)


class Same:
    """The same numbers at every draw."""

    def __init__(self, pattern):
        self.pattern = pattern

    def normal(self, like):
        return self.pattern


def noise(seed=7, count=3):
    return ImageNoise(seed, range(count))


@pytest.mark.parametrize("intervals", [(), ((3, 0, 0.06, 0.3),)], ids=["none", "K = 0"])
def test_without_restarts_it_is_heun(intervals):
    assert torch.equal(
        Restart(intervals=intervals)(MIXTURE, LATENTS, noise=noise()), Heun(num_steps=18)(MIXTURE, LATENTS)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_published_configurations_cost_what_they_say(name):
    recorder, sampler = Recorder(), PRESETS[name]
    sampler(recorder, LATENTS, noise=noise())
    assert len(recorder.levels) == sampler.nfe == int(name.rsplit("-", 1)[1])


PUBLISHED = """
cifar10 edm 18 3 2 0.14 0.30
cifar10 vp 18 3 2 0.06 0.30
cifar10 vp 18 3 5 0.06 0.30
cifar10 vp 18 3 10 0.06 0.30
cifar10 vp 18 3 20 0.06 0.30
cifar10 vp 20 9 30 0.06 0.20
imagenet64 14 3 1 19.35 40.79 3 1 1.09 1.92 3 1 0.06 0.30
imagenet64 18 5 1 19.35 40.79 5 1 1.09 1.92 5 1 0.59 1.09 5 1 0.06 0.30
imagenet64 18 3 1 19.35 40.79 4 1 1.09 1.92 4 4 0.59 1.09 4 1 0.30 0.59 4 4 0.06 0.30
imagenet64 18 3 1 19.35 40.79 4 1 1.09 1.92 4 5 0.59 1.09 4 5 0.30 0.59 4 10 0.06 0.30
imagenet64 36 4 1 19.35 40.79 4 1 1.09 1.92 4 5 0.59 1.09 4 5 0.30 0.59 6 6 0.06 0.30
imagenet64 36 3 1 19.35 40.79 6 1 1.09 1.92 6 5 0.59 1.09 6 5 0.30 0.59 6 20 0.06 0.30
imagenet64 36 6 1 19.35 40.79 6 1 1.09 1.92 7 6 0.59 1.09 7 6 0.30 0.59 7 25 0.06 0.30
imagenet64 36 10 3 19.35 40.79 10 3 1.09 1.92 7 6 0.59 1.09 7 6 0.30 0.59 7 25 0.06 0.30
"""


@pytest.mark.parametrize("line", PUBLISHED.split("\n")[1:-1])
def test_the_published_configurations_are_the_official_files(line):
    """benchmarks/params_*.txt of Newbeeer/diffusion_restart_sampling at 8cbcb07; noise and churn as hyperparam.py."""
    words = line.split()
    data, (steps, *rest) = [w for w in words if w[0].isalpha()], [float(w) for w in words if not w[0].isalpha()]
    intervals = tuple(tuple(rest[i : i + 4]) for i in range(0, len(rest), 4))
    nfe = int(2 * steps - 1 + sum(2 * k * (n - 1) for n, k, _, _ in intervals))
    found = PRESETS[f"restart-{'-'.join(data)}-{nfe}"]
    assert found.num_steps == steps and found.intervals == intervals
    assert (found.restart_gamma, found.S_min, found.S_max) == (0.05, 0.01, 1.0)
    assert found.S_noise == (1.003 if data == ["imagenet64"] else 1.0) and found.rho == 7


def test_levels_go_up_once_and_come_back_to_the_grids_own():
    recorder = Recorder()
    Restart(intervals=((4, 2, 0.06, 0.30),), restart_gamma=0.0)(recorder, LATENTS, noise=noise())
    grid = Heun(num_steps=18).sigmas(recorder).tolist()
    snapped = min(grid, key=lambda s: abs(s - 0.06))
    at = recorder.levels.index(snapped) + 1  # the correction of the step that arrives there
    a, b = 0.30 ** (1 / 7), snapped ** (1 / 7)
    down = [(a + i / 3 * (b - a)) ** 7 for i in range(4)]
    expected = [down[0], down[1], down[1], down[2], down[2], down[3]]
    assert recorder.levels[at : at + 12] == pytest.approx(expected * 2, rel=1e-9)
    assert recorder.levels[at + 12] == snapped  # the main pass goes on


def test_small_churn_is_inside_restarts_only():
    plain, churned = Recorder(), Recorder()
    for gamma, recorder in ((0.0, plain), (0.05, churned)):
        Restart(intervals=((3, 1, 0.06, 0.30),), restart_gamma=gamma)(recorder, LATENTS, noise=noise())
    raised = [c / p for p, c in zip(plain.levels, churned.levels, strict=True) if c != p]
    assert raised == pytest.approx([1.05, 1.05])
    for levels, expected in (((0.0022, 0.0045), []), ((0.3, 1.9), [1.05]), ((2.0, 9.0), [])):  # in [0.01, 1] alone
        pair = Recorder(), Recorder()
        for gamma, recorder in zip((0.0, 0.05), pair, strict=True):
            Restart(intervals=((3, 1, *levels),), restart_gamma=gamma)(recorder, LATENTS, noise=noise())
        raised = [c / p for p, c in zip(*(r.levels for r in pair), strict=True) if c != p]
        assert raised == pytest.approx(expected)


@pytest.mark.parametrize("interval", [(0.1, 2.0), (1.0, 1.2)])
def test_a_cycle_keeps_the_variance_of_a_gaussian(interval):
    shape = (6, 1000)  # images of independent numbers: noise is made image by image
    oracle = GaussianOracle(torch.zeros(shape[1:], dtype=torch.float64), std=0.5)
    sampler = Restart(num_steps=60, intervals=((40, 2, *interval),))
    drawn = sampler(oracle, normal(*shape, seed=3), noise=noise(1, shape[0]))
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("high", [2.0, 3.0, 20.0])
def test_the_jump_adds_the_difference_of_the_variances(high):
    recorder = Recorder()
    sampler = Restart(num_steps=18, intervals=((2, 1, LEVEL, high),), restart_gamma=0.0, S_noise=1.5)
    sampler(recorder, LATENTS, noise=Same(torch.full_like(LATENTS, 2.0)))
    plain = Recorder()
    arrived = {}
    Heun(num_steps=18)(plain, LATENTS, on_step=lambda x, _, s: arrived.update({s: x}))
    jumped = recorder.states[recorder.levels.index(pytest.approx(high))]
    expected = arrived[LEVEL] + 2.0 * 1.5 * math.sqrt(high**2 - LEVEL**2)
    torch.testing.assert_close(jumped, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("cifar10-edm-43", [0.575144046158695, -0.721886340456777, 0.673128404000154, 0.641618147241732]),
        ("imagenet64-67", [0.567090121055512, -0.785351711466438, 0.682219864971854, 0.988458269561926]),
    ],
)
def test_the_official_samplers_numbers(name, official):
    """From `restart_sampler` of Newbeeer/diffusion_restart_sampling at 8cbcb07, the same noise at every draw; its
    restart grid is float32."""
    two_points = GaussianMixture(torch.tensor([-0.5, 0.5], dtype=torch.float64)[:, None, None, None], 0.1)
    latents = torch.tensor([0.9, -0.4, 1.3, -1.6], dtype=torch.float64)[:, None, None, None]
    pattern = torch.tensor([0.3, -1.1, 0.7, 1.9], dtype=torch.float64)[:, None, None, None]
    drawn = PRESETS[f"restart-{name}"](two_points, latents, noise=Same(pattern))
    torch.testing.assert_close(drawn.flatten(), torch.tensor(official, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_cycle_contracts_two_states_by_the_known_factor():
    std, high = 0.5, 2.0
    oracle = GaussianOracle(torch.zeros(1, 1, 1, dtype=torch.float64), std=std)
    states = []
    for latent in (-1.0, 1.0):
        recorder = Recorder(oracle)
        start = torch.full((1, 1, 1, 1), latent, dtype=torch.float64)
        sampler = Restart(num_steps=18, intervals=((400, 1, 0.1, high),), restart_gamma=0.0)
        sampler(recorder, start, noise=noise(1, 1))
        low = min(Heun(num_steps=18).sigmas(recorder).tolist(), key=lambda s: abs(s - 0.1))
        first = recorder.levels.index(low)
        second = first + 1 + 2 * 399
        assert recorder.levels[second] == low
        states.append((recorder.states[first], recorder.states[second]))
    # The states seen are Heun's predictions at the level, which at both places differ from the corrected ones alike.
    before, after = ((b - a).abs().item() for a, b in zip(*states, strict=True))
    assert after / before == pytest.approx(math.sqrt((std**2 + low**2) / (std**2 + high**2)), rel=0.1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Restart(intervals=((1, 2, 0.1, 0.3),)), "N_restart must be at least 2, K at least 0, 0 < t_min"),
        (lambda: Restart(intervals=((3, 2, 0.4, 0.3),)), "0 < t_min < t_max"),
        (lambda: Restart(intervals=((3, 2, 0.3),)), r"an entry is \[N_restart, K, t_min, t_max\]"),
        (lambda: Restart(restart_gamma=-1.0), r"restart_gamma is -1\.0"),
        (lambda: Restart(intervals=((3, 2, 0.1, 0.3),))(MIXTURE, LATENTS), "stochastic; it needs a noise source"),
    ],
)
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("intervals", "sentence"),
    [
        (((3, 1, 0.1, 100.0),), "must lie in the noise range of this model and grid, 0.002 to 80"),
        (((3, 1, 0.001, 1.0),), "must lie in the noise range"),
        (((3, 1, 1.0, 2.0), (3, 1, 1.01, 3.0)), "both start at level .* of the 18-step grid"),
        (((3, 1, 0.99 * LEVEL, 0.995 * LEVEL),), "not below its t_max; use more steps"),
    ],
)
def test_intervals_that_do_not_fit_the_model_are_refused(intervals, sentence):
    with pytest.raises(UserError, match=sentence):
        Restart(intervals=intervals)(Recorder(), LATENTS, noise=noise())
