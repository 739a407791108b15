"""Every sampler's order of convergence, on a mixture whose flow is integrated to 1e-9; and grids by name."""

import numpy as np
import pytest
import torch

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, GaussianOracle, IntegratedFlowMap
from imagewright.paths.grids import GRIDS, noise_levels
from imagewright.samplers import DDIM, SAMPLERS, DPMSolverPlusPlus, Euler, EulerMaruyama, Heun, UniPC
from imagewright.types import UNCONDITIONAL, UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOW, HIGH = 0.05, 20.0
MIXTURE = GaussianMixture(normal(3, 2, seed=1), 0.4)
LATENTS = normal(8, 2, seed=2)
AT = torch.ones(8, dtype=torch.float64)


def errors(make, steps):
    """Largest distance to the exact flow at the last level before zero."""
    want = IntegratedFlowMap(MIXTURE)(LATENTS * HIGH, HIGH * AT, LOW * AT)
    found = []
    for n in steps:
        seen = {}
        sampler = make(num_steps=n, sigma_min=LOW, sigma_max=HIGH)
        sampler(MIXTURE, LATENTS, on_step=lambda x, _, sigma, seen=seen: seen.update({round(sigma, 9): x}))
        found.append(float((seen[LOW] - want).abs().max()))
    return found


@pytest.mark.parametrize("grid", ["karras", "log"])
@pytest.mark.parametrize(
    ("make", "order"),
    [
        (Euler, 1),
        (DDIM, 1),
        (Heun, 2),
        (DPMSolverPlusPlus, 2),
        (lambda **k: UniPC(order=1, **k), 2),
        (lambda **k: UniPC(order=2, **k), 3),
    ],
    ids=["euler", "ddim", "heun", "dpm-solver++", "unipc-1", "unipc-2"],
)
def test_order_of_convergence(make, order, grid):
    steps = np.array([100, 200, 400])
    slope, _ = np.polyfit(np.log(steps), np.log(errors(lambda **k: make(grid=grid, **k), [int(n) for n in steps])), 1)
    assert -slope == pytest.approx(order, abs=0.25)


def test_higher_order_is_closer():
    by_order = [errors(lambda o=o, **k: UniPC(order=o, **k), [60])[0] for o in (1, 2, 3)]
    assert by_order[0] > 3 * by_order[1] and by_order[1] > by_order[2]


def test_ddim_without_noise_is_euler():
    settings = {"num_steps": 7, "grid": "vp", "sigma_max": 50.0}
    torch.testing.assert_close(DDIM(**settings)(MIXTURE, LATENTS), Euler(**settings)(MIXTURE, LATENTS))


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(num_steps=400, eta=1.0, grid="karras"),
        DDIM(num_steps=400, eta=0.5, grid="karras"),
        DPMSolverPlusPlus(num_steps=200, eta=1.0),
        DPMSolverPlusPlus(num_steps=200, eta=0.5),
        EulerMaruyama(num_steps=800),
        Heun(num_steps=200, S_churn=40.0),
    ],
    ids=["ancestral", "half ancestral", "sde 2m", "half sde", "euler-maruyama", "churn"],
)
def test_noise_keeps_the_distribution(sampler):
    shape = (8, 500)  # images of independent numbers: noise is made image by image
    oracle = GaussianOracle(torch.full(shape[1:], 0.3, dtype=torch.float64), std=0.5)
    drawn = sampler(oracle, normal(*shape, seed=3), noise=ImageNoise(5, range(shape[0])))
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.03)  # 3.8 standard errors
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.045)  # 4 standard errors


@pytest.mark.parametrize("sampler", [DDIM(eta=0.5), DPMSolverPlusPlus(eta=1.0), EulerMaruyama()])
def test_noise_has_to_be_handed_in(sampler):
    with pytest.raises(UserError, match="needs a noise source"):
        sampler(MIXTURE, LATENTS)


class Counter:
    """Notes the level of every call."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self):
        self.levels = []

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, cond=UNCONDITIONAL):
        self.levels.append(float(sigma[0]))
        return MIXTURE(x, sigma)


@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if s.model_kind == "denoiser"])
def test_calls_are_counted_exactly(name):
    counter, sampler = Counter(), SAMPLERS[name](num_steps=12)
    sampler(counter, LATENTS, noise=ImageNoise(0, range(8)))
    assert len(counter.levels) == sampler.nfe


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_grids_run_between_the_ends(name):
    levels = noise_levels(name, 9, 0.01, 60.0)
    assert levels.dtype == torch.float64 and levels.shape == (9,)
    assert float(levels[0]) == pytest.approx(60.0, rel=1e-12) and float(levels[-1]) == pytest.approx(0.01, rel=1e-9)
    assert (levels.diff() < 0).all()
    assert float(noise_levels(name, 1, 0.01, 60.0)[0]) == pytest.approx(60.0)


def test_grids_are_even_on_their_clocks():
    def spread(values):
        return float((values.diff() - values.diff().mean()).abs().max() / values.diff().abs().mean())

    get = lambda name: noise_levels(name, 9, 0.01, 60.0)  # noqa: E731
    assert spread(get("log").log()) < 1e-9 and spread(get("sigma")) < 1e-9
    assert spread(get("karras") ** (1 / 7)) < 1e-9
    assert spread(get("linear") / (1 + get("linear"))) < 1e-9
    assert spread((get("trigflow") / 0.5).atan()) < 1e-9
    assert spread(torch.acos(1 / torch.sqrt(1 + get("cosine") ** 2))) < 0.05  # but for the schedule's offset


def test_levels_replace_the_grid():
    counter, sampler = Counter(), Euler(levels=(40.0, 3.0, 0.5))
    sampler(counter, LATENTS)
    assert counter.levels == [40.0, 3.0, 0.5] and sampler.nfe == 3


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Euler(levels=(1.0, 2.0)),
            r"sampler\.levels is \(1\.0, 2\.0\); the levels must be positive and strictly",
        ),
        (lambda: Euler(levels=(1.0, 0.0)), "strictly decreasing"),
        (lambda: Euler(grid="edm"), "grid is 'edm'; it must be one of karras, log, sigma, vp, cosine, linear, trigfl"),
        (lambda: Euler(levels=(100.0, 1.0))(Counter(), LATENTS), "levels runs from 100 to 1; the model knows .* to 80"),
        (lambda: DDIM(eta=1.5), r"eta is 1\.5; it must lie in \[0, 1\]"),
        (lambda: DPMSolverPlusPlus(eta=-1.0), r"eta is -1\.0"),
        (lambda: UniPC(order=4), "order is 4; it must be 1, 2 or 3"),
    ],
)
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
