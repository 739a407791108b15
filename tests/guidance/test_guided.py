"""Guidance against closed forms on Gaussians, and the identities that fix its conventions."""

import math

import pytest
import torch

from imagewright.guidance import Guided, Unlabelled, classifier_free, evaluations, sims
from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.samplers import Heun, Restart
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import Condition, DataSpec, Denoiser, UserError


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MAIN = GaussianMixture(normal(4, 1, 2, 2), 0.3, classes=torch.arange(4))
GUIDE = GaussianMixture(normal(4, 1, 2, 2), 0.6, classes=torch.arange(4))
X, SIGMA = normal(5, 1, 2, 2, seed=1), torch.tensor([0.1, 0.5, 1.0, 4.0, 20.0], dtype=torch.float64)
COND = Condition(label=torch.tensor([0, 1, 2, 3, -1]))


def test_is_a_denoiser():
    assert isinstance(Guided(MAIN, GUIDE, 2.0), Denoiser) and isinstance(Unlabelled(MAIN), Denoiser)


def test_weight_one_is_the_main_model_and_weight_zero_the_guide():
    assert torch.equal(Guided(MAIN, GUIDE, 1.0)(X, SIGMA, COND), MAIN(X, SIGMA, COND))
    assert torch.equal(Guided(MAIN, GUIDE, 0.0)(X, SIGMA, COND), GUIDE(X, SIGMA, COND))


def test_sims_is_guidance_with_omega_plus_one():
    assert torch.equal(sims(MAIN, GUIDE, 0.0)(X, SIGMA, COND), MAIN(X, SIGMA, COND))
    assert torch.equal(sims(MAIN, GUIDE, -1.0)(X, SIGMA, COND), GUIDE(X, SIGMA, COND))
    assert torch.equal(sims(MAIN, GUIDE, 0.5)(X, SIGMA, COND), Guided(MAIN, GUIDE, 1.5)(X, SIGMA, COND))


@pytest.mark.parametrize("weight", [0.0, 2.0, 7.5])
def test_a_copy_as_guide_changes_nothing(weight):
    torch.testing.assert_close(Guided(MAIN, MAIN, weight)(X, SIGMA, COND), MAIN(X, SIGMA, COND))


def test_the_interval_leaves_other_levels_alone():
    guided, all_levels = Guided(MAIN, GUIDE, 2.0, (0.5, 4.0)), Guided(MAIN, GUIDE, 2.0)
    out = guided(X, SIGMA, COND)
    inside = torch.tensor([False, False, True, True, False])  # low < sigma <= high
    torch.testing.assert_close(out[inside], all_levels(X, SIGMA, COND)[inside])
    assert torch.equal(out[~inside], MAIN(X, SIGMA, COND)[~inside])
    assert [evaluations(guided, float(s)) for s in SIGMA] == [1, 1, 2, 2, 1]


def test_classifier_free_asks_without_the_label():
    want = 3.0 * MAIN(X, SIGMA, COND) - 2.0 * MAIN(X, SIGMA)
    torch.testing.assert_close(classifier_free(MAIN, 3.0)(X, SIGMA, COND), want)


@pytest.mark.parametrize("weight", [0.5, 1.7, 3.0])
def test_the_flow_between_gaussians_is_the_closed_form(weight):
    s1, s2, high, low = 0.5, 0.8, 50.0, 0.01
    zero = torch.zeros(1, dtype=torch.float64)
    guided = Guided(GaussianOracle(zero, std=s1), GaussianOracle(zero, std=s2), weight)
    seen = {}
    Heun(num_steps=400, sigma_max=high, sigma_min=low)(
        guided, torch.ones(1, 1, dtype=torch.float64), on_step=lambda x, _, s: seen.update({round(s, 9): float(x)})
    )
    f1, f2 = ((s**2 + low**2) / (s**2 + high**2) for s in (s1, s2))
    assert seen[low] == pytest.approx(high * f1 ** (weight / 2) * f2 ** (-(weight - 1) / 2), rel=1e-3)


def test_generator_counts_the_guides_calls():
    spec = DataSpec(name="x", resolution=2, channels=1, num_classes=4)
    plain = Heun(num_steps=5)

    def nfe(model, sampler=plain):
        return ImageGenerator(model, spec, sampler).nfe

    class Module(torch.nn.Module):
        sigma_min, sigma_max = 0.002, 80.0

        def forward(self, x, sigma, cond=None):
            raise AssertionError("counting asks no network")

        def round_sigma(self, sigma):
            return sigma

    assert nfe(Module()) == plain.nfe == 9
    assert nfe(Guided(Module(), Module(), 2.0)) == 18
    assert nfe(Guided(Module(), Module(), 1.0)) == 9
    levels = plain.sigmas(Module()).tolist()
    # Six of the nine calls are at the three levels within it.
    assert nfe(Guided(Module(), Module(), 2.0, (0.0, levels[2]))) == 9 + 6
    restart = Restart(num_steps=18)
    assert nfe(Module(), restart) == restart.nfe == 43


def test_guided_samples_keep_their_seeds():
    spec = DataSpec(name="x", resolution=2, channels=1, num_classes=4)
    generator = ImageGenerator(_Module(), spec, Heun(num_steps=4))
    one = generator.generate(6, seed=3, batch_size=2)
    assert (one == generator.generate(6, seed=3, batch_size=6)).all()


class _Module(torch.nn.Module):
    """The guided mixture as a module."""

    sigma_min, sigma_max = 0.002, 80.0

    def forward(self, x, sigma, cond=None):
        return Guided(MAIN, GUIDE, 2.0, (0.1, 5.0))(x, sigma, cond)

    def round_sigma(self, sigma):
        return sigma


class _Range:
    def __init__(self, low, high):
        self.sigma_min, self.sigma_max = low, high


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Guided(MAIN, GUIDE, math.nan), "guidance weight is nan"),
        (lambda: Guided(MAIN, GUIDE, 2.0, (3.0, 1.0)), "interval is 3 to 1; it must satisfy 0 <= low < high"),
        (lambda: Guided(_Range(0.1, 1.0), _Range(2.0, 80.0), 2.0), "they have none in common"),
        (lambda: Guided(_Range(0.1, 1.0), _Range(0.1, 1.0), 2.0, (5.0, 9.0)), "noise range of the models is 0.1 to 1"),
    ],
)
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_noise_source_is_shared():
    count = 4
    drawn = Restart(num_steps=8, intervals=((3, 1, 0.1, 1.0),))(
        Guided(MAIN, GUIDE, 1.5), normal(count, 1, 2, 2), noise=ImageNoise(0, range(count))
    )
    assert drawn.shape == (count, 1, 2, 2) and bool(drawn.isfinite().all())


def test_some_channels_are_guided_alone():
    main, guide = (GaussianMixture(normal(4, 3, 2, 2, seed=k), 0.3) for k in (5, 6))
    x = normal(5, 3, 2, 2, seed=7)
    everything, two = Guided(main, guide, 2.5), Guided(main, guide, 2.5, channels=2)
    torch.testing.assert_close(two(x, SIGMA)[:, :2], everything(x, SIGMA)[:, :2])
    assert torch.equal(two(x, SIGMA)[:, 2:], main(x, SIGMA)[:, 2:])
    assert torch.equal(Guided(main, guide, 2.5, channels=3)(x, SIGMA), everything(x, SIGMA))
    assert torch.equal(Guided(main, guide, 1.0, channels=2)(x, SIGMA), main(x, SIGMA))
    within = Guided(main, guide, 2.5, (0.5, 4.0), channels=2)(x, SIGMA)
    inside = torch.tensor([False, False, True, True, False])
    torch.testing.assert_close(within[inside], two(x, SIGMA)[inside])
    assert torch.equal(within[~inside], main(x, SIGMA)[~inside])
    with pytest.raises(UserError, match="guided channels is 0"):
        Guided(main, guide, 2.5, channels=0)
