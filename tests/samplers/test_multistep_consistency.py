"""Multistep consistency sampling (Song et al. 2023, algorithm 1) on the exact flow map of a Gaussian."""

import math

import pytest
import torch

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianOracle
from imagewright.samplers import MultistepConsistency
from imagewright.types import UNCONDITIONAL, Condition, UserError

LOW, HIGH, STD = 0.002, 80.0, 0.5
LATENTS = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Recorder:
    """The exact flow map of N(0, STD^2) on [LOW, HIGH], which notes every call."""

    sigma_min, sigma_max = LOW, HIGH

    def __init__(self):
        self.exact = GaussianOracle(torch.zeros(1, 2, 2, dtype=torch.float64), std=STD).flow_map()
        self.calls = []

    def __call__(self, x, sigma, sigma_to, cond=UNCONDITIONAL):
        assert sigma.shape == sigma_to.shape == (len(x),)
        assert (sigma_to == 0).all()
        assert (sigma == sigma[0]).all()
        self.calls.append((x.clone(), float(sigma[0]), cond))
        return self.exact(x, sigma, sigma_to, cond)


class Counted:
    def __init__(self):
        self.source, self.draws = ImageNoise(0, range(3)), []

    def normal(self, like):
        self.draws.append(self.source.normal(like))
        return self.draws[-1]


@pytest.mark.parametrize("sigmas", [(), (1.382,), (20.0, 1.0, 0.1)])
def test_levels_and_nfe(sigmas):
    flow_map, cond, sampler = Recorder(), Condition(label=torch.tensor([0, 1, 2])), MultistepConsistency(sigmas=sigmas)
    sampler(flow_map, LATENTS, cond, noise=Counted())
    assert [sigma for _, sigma, _ in flow_map.calls] == [HIGH, *sigmas]
    assert len(flow_map.calls) == sampler.nfe == 1 + len(sigmas)
    assert all(c is cond for _, _, c in flow_map.calls)


def test_one_step_is_the_flow_and_draws_nothing():
    noise = Counted()
    drawn = MultistepConsistency(clip=False)(Recorder(), LATENTS, noise=noise)
    torch.testing.assert_close(drawn, LATENTS * HIGH * STD / math.hypot(HIGH, STD))
    assert not noise.draws
    assert torch.equal(drawn, MultistepConsistency(clip=False)(Recorder(), LATENTS))


def test_every_further_step_noises_up_to_its_level_from_sigma_min():
    flow_map, noise, seen = Recorder(), Counted(), []
    sampler = MultistepConsistency(sigmas=(20.0, 1.0), clip=False)
    drawn = sampler(flow_map, LATENTS, noise=noise, on_step=lambda *step: seen.append(step))
    want = LATENTS * HIGH * STD / math.hypot(HIGH, STD)
    for (asked, _, _), sigma, fresh in zip(flow_map.calls[1:], (20.0, 1.0), noise.draws, strict=True):
        noised = want + math.sqrt(sigma**2 - LOW**2) * fresh
        torch.testing.assert_close(asked, noised)
        want = noised * STD / math.hypot(sigma, STD)
    torch.testing.assert_close(drawn, want)
    assert [sigma for _, _, sigma in seen] == [HIGH, 20.0, 1.0]
    assert all(torch.equal(x, asked) for (x, _, _), (asked, _, _) in zip(seen, flow_map.calls, strict=True))
    assert torch.equal(seen[-1][1], drawn)


def test_clip_keeps_every_estimate_in_range():
    seen = []
    sampler = MultistepConsistency(sigmas=(0.3,))
    sampler(Recorder(), 4 * LATENTS, noise=Counted(), on_step=lambda x, start, sigma: seen.append(start))
    assert [float(start.abs().max()) for start in seen] == [1.0, 1.0]
    assert sampler.clip


def test_the_latents_dtype_is_kept():
    assert MultistepConsistency()(Recorder(), LATENTS.float()).dtype == torch.float32


@pytest.mark.parametrize("sigmas", [(0.0,), (-1.0,), (1.0, 2.0), (1.0, 1.0), (math.nan,)])
def test_levels_must_fall(sigmas):
    with pytest.raises(UserError, match="the levels must be positive and strictly decreasing"):
        MultistepConsistency(sigmas=sigmas)


@pytest.mark.parametrize("sigmas", [(80.0,), (100.0, 1.0), (1.0, 0.002)])
def test_levels_must_lie_in_the_models_range(sigmas):
    with pytest.raises(UserError, match=r"every level must lie between 0\.002 and 80\.0"):
        MultistepConsistency(sigmas=sigmas)(Recorder(), LATENTS, noise=Counted())


def test_several_steps_need_a_noise_source():
    with pytest.raises(UserError, match=r"sigmas is \(1\.0,\); sampling in several steps needs a noise source"):
        MultistepConsistency(sigmas=(1.0,))(Recorder(), LATENTS)
