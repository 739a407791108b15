"""Skip-Tuning: identities at factors 1 and 0, the schedule's convention, gradients, and what the diagnostics see."""

import math

import pytest
import torch

from imagewright.guidance import Guided, SkipScale, SkipTuned, evaluations, skip_ratios
from imagewright.guidance.skip_tuning import run_with_scaled_skips
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.oracles import GaussianOracle
from imagewright.types import Condition, Denoiser, UserError

SIZES = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4}
COND = Condition(label=torch.tensor([0, 3]))


def networks():
    torch.manual_seed(0)
    song = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}
    found = {
        "DDPM++": SongUNet(SongUNetConfig(**SIZES, **song)),
        "NCSN++": SongUNet(SongUNetConfig(**SIZES, **song, encoder_type="residual", embedding_type="fourier")),
        "ADM": DhariwalUNet(
            DhariwalUNetConfig(
                **SIZES, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=0.0
            )
        ),
    }
    for network in found.values():
        for parameter in network.parameters():  # away from the zeros of the initialisation
            torch.nn.init.normal_(parameter, std=0.2)
        network.double().eval()
    return found


NETWORKS = networks()
EVERY = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def x(seed=1):
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SIGMA = torch.tensor([0.3, 5.0], dtype=torch.float64)


@EVERY
def test_factor_one_is_the_plain_network_bit_for_bit(network):
    plain = EDMPrecond(network)
    tuned = SkipTuned(plain, SkipScale())
    assert isinstance(tuned, Denoiser)
    assert torch.equal(tuned(x(), SIGMA, COND), plain(x(), SIGMA, COND))
    assert evaluations(tuned, 1.0) == 1


def test_the_schedule_counts_from_the_bottom():
    rho = SkipScale(bottom=0.6, top=1.0).factors(torch.ones(1, dtype=torch.float64), 4)
    assert rho[0].tolist() == pytest.approx([0.6, 0.7, 0.8, 0.9])


@EVERY
def test_every_skip_counts_and_its_gradient_is_right(network):
    count = network.num_skips
    rho = torch.full((2, count), 0.8, dtype=torch.float64, requires_grad=True)
    label = SIGMA.log() / 4
    value = run_with_scaled_skips(network, x(), label, COND, rho).square().sum()
    (gradient,) = torch.autograd.grad(value, rho)
    assert bool((gradient.abs() > 1e-8).all())
    for i in range(count):
        ends = []
        for step in (1e-5, -1e-5):
            moved = rho.detach().clone()
            moved[0, i] += step
            ends.append(float(run_with_scaled_skips(network, x(), label, COND, moved).detach().square().sum()))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(gradient[0, i]), rel=1e-4)


@EVERY
def test_factor_zero_makes_the_skips_irrelevant(network):
    emb = network.embed(SIGMA.log() / 4, COND)
    hidden, skips = network.encode(x(), emb)
    tuned = run_with_scaled_skips(network, x(), SIGMA.log() / 4, COND, torch.zeros(2, network.num_skips))
    torch.testing.assert_close(tuned, network.decode(hidden, [torch.zeros_like(s) for s in skips], emb))
    assert not torch.allclose(tuned, network.decode(hidden, skips, emb))


def test_layer_factors_reach_their_layer():
    """The bottom factor touches the skip of the lowest resolution alone."""
    network = NETWORKS["DDPM++"]
    label, count = SIGMA.log() / 4, NETWORKS["DDPM++"].num_skips
    emb = network.embed(label, COND)
    hidden, skips = network.encode(x(), emb)
    skips[-1] = skips[-1] * 0.5
    rho = torch.ones(2, count)
    rho[:, 0] = 0.5
    torch.testing.assert_close(
        run_with_scaled_skips(network, x(), label, COND, rho), network.decode(hidden, skips, emb)
    )


def test_interval_and_change_with_noise():
    scale = SkipScale(bottom=0.5, bottom_at_low=0.9, interval=(0.1, 10.0))
    sigma = torch.tensor([0.05, 0.1, 0.1001, 1.0, 10.0, 20.0], dtype=torch.float64)
    assert scale.factors(sigma, 2)[:, 0].tolist() == pytest.approx([1.0, 1.0, 0.9, 0.7, 0.5, 1.0], abs=1e-3)
    plain = EDMPrecond(NETWORKS["DDPM++"])
    out = SkipTuned(plain, SkipScale(bottom=0.5, interval=(1.0, 80.0)))(x(), SIGMA, COND)
    want = plain(x(), SIGMA, COND)
    torch.testing.assert_close(out[0], want[0])
    assert not torch.allclose(out[1], want[1])


def test_composes_with_guidance():
    plain = EDMPrecond(NETWORKS["DDPM++"])
    tuned = SkipTuned(plain, SkipScale(bottom=0.7))
    want = 2 * tuned(x(), SIGMA, COND) - plain(x(), SIGMA, COND)
    torch.testing.assert_close(Guided(tuned, plain, 2.0)(x(), SIGMA, COND), want)


@EVERY
def test_ratios_see_every_merge(network):
    label = SIGMA.log() / 4
    emb = network.embed(label, COND)
    hidden, skips = network.encode(x(), emb)
    ratios = skip_ratios(network, x(), label, COND)
    assert ratios.shape == (network.num_skips,)
    if network is NETWORKS["ADM"]:  # whose first merge sees what two blocks made of the bottom
        bottom = network.dec["4x4_in1"](network.dec["4x4_in0"](hidden, emb), emb)
        want = (skips[-1].flatten(1).norm(dim=1) / bottom.flatten(1).norm(dim=1)).mean()
        torch.testing.assert_close(ratios[0], want)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SkipScale(bottom=-0.1), r"skip factors are \[-0\.1, 1\.0\]; they must be >= 0"),
        (lambda: SkipScale(layers=(math.nan,)), "must be >= 0 and finite"),
        (lambda: SkipScale(interval=(2.0, 1.0)), "skip interval is 2 to 1"),
        (lambda: SkipScale(bottom_at_low=0.5), "needs an interval with both ends"),
        (
            lambda: SkipTuned(EDMPrecond(NETWORKS["ADM"]), SkipScale(layers=(0.5,))),
            "1 skip factors were given",
        ),
        (lambda: SkipTuned(GaussianOracle(torch.zeros(1), std=1.0), SkipScale()), "a denoiser made of a U-Net; this"),
    ],
)
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
