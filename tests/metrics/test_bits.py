"""Bits per dimension against closed forms: independent pixels, a Markov chain, a Gaussian; and what has none."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.data import ImageSet, open_images
from imagewright.metrics.bits import BitsSettings, measure_bits, scorer, spread_times, standard_error
from imagewright.metrics.likelihood import LEVEL_WIDTH
from imagewright.models.causal import CausalTokenModel
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.tokens import PixelCodec, TokenNetworkModel
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import SongUNet, SongUNetConfig, TokenTransformer, TokenTransformerConfig
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import GaussianOracle, MarkovChain, MarkovTokens
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, Noise, UserError

SPEC = DataSpec(name="test", resolution=4, channels=1)
LN2 = math.log(2)


def chain(sharpness: int = 8) -> MarkovChain:
    rows = torch.rand(257, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** sharpness
    rows /= rows.sum(1, keepdim=True)
    return MarkovChain(rows[0], rows[1:], 16)


def pictures(tokens: Tensor) -> ImageSet:
    return ImageSet.of(tokens.reshape(-1, 4, 4, 1).numpy().astype(np.uint8))


class Independent(torch.nn.Module):
    """Every pixel from one distribution of its own, whatever the others: network of a causal model."""

    def __init__(self, log_p: Tensor) -> None:
        super().__init__()
        self.log_p = log_p

    def forward(self, tokens: Tensor, time: Tensor | None, cond: Condition) -> Tensor:
        return self.log_p.expand(len(tokens), *self.log_p.shape)


class Bound(TokenNetworkModel):
    """A bound by the weighted number of masked tokens of independent uniform pixels: its mean is 8 bits a pixel."""

    order = "masked"
    likelihood = "bound"

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        assert noise is not None
        assert times is not None
        time = times.clamp(min=1e-6)
        masked = noise.uniform(tokens.double()) < time[:, None]
        return masked.double().sum(1) / time * math.log(256)


# --- exact ----------------------------------------------------------------------------------------------------


def test_independent_pixels() -> None:
    log_p = torch.log_softmax(torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).double() * 2, 1)
    tokens = torch.randint(256, (50, 16), generator=torch.Generator().manual_seed(1))
    model = CausalTokenModel(Independent(log_p), PixelCodec(4, 1))
    report = measure_bits(model, SPEC, pictures(tokens), split="test", batch_size=7)
    by_hand = -log_p[torch.arange(16), tokens].mean() / LN2
    assert report.bpd == pytest.approx(float(by_hand), abs=1e-10)
    assert (report.kind, report.stderr, report.settings) == ("exact", None, {})


def test_a_markov_chain_takes_its_entropy() -> None:
    source = chain()
    images = pictures(source.sample(3000, StepNoise(0)))
    report = measure_bits(MarkovTokens(source, PixelCodec(4, 1)), SPEC, images, split="all")
    assert report.spread is not None
    assert report.bpd == pytest.approx(source.entropy() / 16 / LN2, abs=3 * report.spread)
    # Another chain's code is longer, by the divergence.
    other = measure_bits(MarkovTokens(chain(4), PixelCodec(4, 1)), SPEC, images, split="all")
    assert other.bpd > report.bpd + 10 * report.spread


def test_uniform_pixels_take_eight_bits() -> None:
    model = CausalTokenModel(Independent(torch.zeros(16, 256)), PixelCodec(4, 1))
    report = measure_bits(model, SPEC, pictures(torch.randint(256, (3, 16))), split="all")
    assert report.bpd == pytest.approx(8, abs=1e-12)


# --- bounds ---------------------------------------------------------------------------------------------------


def test_a_bound_and_its_error() -> None:
    images = pictures(torch.randint(256, (64, 16), generator=torch.Generator().manual_seed(0)))
    model = Bound(torch.nn.Identity(), PixelCodec(4, 1))
    found = [measure_bits(model, SPEC, images, split="test", seed=s) for s in range(20)]
    errors = np.array([r.bpd - 8 for r in found])
    told = np.array([r.stderr for r in found])
    assert (found[0].kind, found[0].settings) == ("bound", {"passes": 8})
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(20)
    assert 0.6 < told.mean() / errors.std() < 1.6  # what is told is what it scatters by
    one = measure_bits(model, SPEC, images, split="test", settings=BitsSettings(passes=1))
    assert one.stderr is None


def test_values_do_not_depend_on_the_batch() -> None:
    images = pictures(torch.randint(256, (10, 16)))
    model = Bound(torch.nn.Identity(), PixelCodec(4, 1))
    whole, parts = (measure_bits(model, SPEC, images, split="all", batch_size=b).bpd for b in (10, 3))
    assert whole == pytest.approx(parts, abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_times_are_spread_evenly(n: int) -> None:
    first, second = spread_times(n, 0, 0), spread_times(n, 0, 1)
    assert ((first >= 0) & (first < 1)).all()
    assert not torch.equal(first, second)
    gaps = first.double().sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((n - 1,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_standard_error_of_independent_passes() -> None:
    bits = StepNoise(0).normal(torch.zeros(4, 5000, dtype=torch.float64)) * 3 + torch.linspace(0, 50, 5000)
    error = standard_error(bits, "probability flow")
    assert error == pytest.approx(3 / math.sqrt(4 * 5000), rel=0.03)  # the images' own differences do not count
    assert standard_error(bits[:1], "probability flow") is None


# --- the probability flow -------------------------------------------------------------------------------------


class Ranged(torch.nn.Module):
    """The denoiser of independent Gaussian pixels over EDM's range."""

    sigma_min, sigma_max = 0.002, 80.0
    oracle = GaussianOracle(torch.full((1, 4, 4), 0.1, dtype=torch.float64), std=0.3)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.oracle(x, sigma, cond)


def gaussian_images(n: int) -> ImageSet:
    x = Ranged.oracle.sample(n, StepNoise(0))
    return ImageSet.of(((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8))


@pytest.mark.parametrize("probes", [1, 0])
def test_a_gaussians_flow_has_its_density(probes: int) -> None:
    """With levels much finer than the deviation, bits are the differential entropy at their width."""
    images = gaussian_images(60)
    settings = BitsSettings(ode_steps=60, probes=probes)
    report = measure_bits(Ranged(), SPEC, images, split="all", settings=settings)
    expected = (0.5 * math.log(2 * math.pi * math.e * 0.09) - math.log(LEVEL_WIDTH)) / LN2
    assert report.spread is not None
    assert report.bpd == pytest.approx(expected, abs=3 * report.spread + 0.005)
    # The Jacobian of independent pixels is diagonal: one probe is exact, only dequantisation is drawn.
    assert report.stderr is not None
    assert 0 < report.stderr < 1e-3
    assert report.settings["trace"] == ("Hutchinson, probes: 1" if probes else "exact")
    assert report.preprocessing == "4x4, as stored, 8-bit values, dequantised uniformly over their bins"


def test_a_trajectory_model_is_measured_by_the_denoiser_within() -> None:
    torch.manual_seed(0)
    config = SongUNetConfig(
        img_resolution=4, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(), dropout=0.0,
    )  # fmt: skip
    teacher = EDMPrecond(SongUNet(config))
    model = TrajectoryModel.from_denoiser(teacher)
    images, settings = gaussian_images(3), BitsSettings(ode_steps=8, passes=1)
    theirs, ours = (
        measure_bits(m, SPEC, images, split="all", settings=settings) for m in (teacher.double(), model.double())
    )
    assert ours.bpd == pytest.approx(theirs.bpd, abs=1e-6)
    assert (ours.kind, ours.stderr) == ("probability flow", None)


# --- what is told, what is refused ----------------------------------------------------------------------------


def test_the_report_names_split_preprocessing_and_classes() -> None:
    images = open_images("digits", resolution=4, split="test")
    spec = images.spec
    torch.manual_seed(0)
    config = TokenTransformerConfig(values=256, length=16, label_dim=10, width=8, depth=1, heads=1, causal=True)
    model = CausalTokenModel(TokenTransformer(config), PixelCodec(4, 1))
    report = measure_bits(model, spec, images, split="test")
    assert (report.split, report.per_class, report.num_images) == ("test", True, 168)
    assert report.preprocessing == "4x4, box means of 8x8, 8-bit values"
    assert "class is told to the model and not counted" in report.notes[0]
    assert json.loads(json.dumps(report.as_dict()))["settings"] == {}
    labelled = model.nll(model.codec.encode(torch.as_tensor(images.images()).permute(0, 3, 1, 2) / 127.5 - 1),
                         Condition(label=torch.as_tensor(images.labels)))  # fmt: skip
    assert report.bpd == pytest.approx(float(labelled.mean().detach()) / 16 / LN2, abs=1e-6)


def test_models_without_a_likelihood_say_so() -> None:
    torch.manual_seed(0)
    net = TokenTransformer(TokenTransformerConfig(values=256, length=16, width=8, depth=1, heads=1))
    lossy = PixelCodec(4, 1)
    lossy.lossless = False
    codec = PixelCodec(4, 1)
    codec.kind = "codec"
    for model, told in (
        (MaskedTokenModel(net, PixelCodec(4, 1)), "a MaskedTokenModel has no likelihood: it was trained to fill in"),
        (Bound(net, lossy), "the tokens of PixelCodec do not hold all of an image"),
        (ConsistencyModel(net, 0.002, 80.0, 0.5), "a ConsistencyModel jumps along the flow and contains no denoiser"),
        (codec, "a PixelCodec turns images into tokens and back; it gives images no probability"),
    ):
        with pytest.raises(UserError, match=told):
            scorer(model)


def test_images_that_are_not_the_models_are_named() -> None:
    model = CausalTokenModel(Independent(torch.zeros(16, 256)), PixelCodec(4, 1))
    with pytest.raises(UserError, match=r"images are \[1, 8, 8\] .* the model's \[1, 4, 4\]"):
        measure_bits(model, SPEC, open_images("digits", split="test"), split="test")
    with pytest.raises(UserError, match=r"told each image's class, 0 to 2; .* class -1"):
        measure_bits(model, replace(SPEC, num_classes=3), pictures(torch.zeros(2, 16)), split="all")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"passes": 0}, "passes is 0"),
        ({"ode_steps": 0}, "ode-steps is 0"),
        ({"probes": -1}, "probes is -1; it must be at least 1, or 0 for the exact trace"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        BitsSettings(**settings)


def test_settings_without_effect_are_named() -> None:
    images = pictures(torch.zeros(2, 16))
    exact = CausalTokenModel(Independent(torch.zeros(16, 256)), PixelCodec(4, 1))
    with pytest.raises(UserError, match="passes is 3; it has no effect on an exact likelihood"):
        measure_bits(exact, SPEC, images, split="all", settings=BitsSettings(passes=3))
    bound = Bound(torch.nn.Identity(), PixelCodec(4, 1))
    with pytest.raises(UserError, match="ode-steps is 9; it has no effect on a bound"):
        measure_bits(bound, SPEC, images, split="all", settings=BitsSettings(ode_steps=9))


def test_noise_of_passes_and_of_sampling_are_apart() -> None:
    like = torch.zeros(1, 4)
    draws = {tuple(ImageNoise(0, [0], stream).uniform(like)[0].tolist()) for stream in range(8)}
    assert len(draws) == 8
