"""Raster decoding: cached equals uncached, the distribution is the model's, what is counted and told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.models.causal import CausalTokenModel
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import ImageNoise
from imagewright.oracles import MarkovChain, MarkovTokens
from imagewright.samplers import Heun, MaskedDecoding, Raster
from imagewright.samplers.generator import ImageGenerator, sampler_from_json, sampler_to_json
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, UserError

SPEC = DataSpec(name="test", resolution=4, channels=1, num_classes=3)


class Levels:
    """A codec of few grey levels, evenly spread."""

    lossless = False

    def __init__(self, values: int, length: int) -> None:
        self.values, self.length = values, length

    def encode(self, images: Tensor) -> Tensor:
        return ((images.flatten(1) + 1) / 2 * (self.values - 1)).round().long()

    def decode(self, tokens: Tensor) -> Tensor:
        return (tokens.float() / (self.values - 1) * 2 - 1).reshape(len(tokens), 1, -1, 1)


def model(causal: bool = True, dtype: torch.dtype = torch.float32) -> CausalTokenModel | MaskedTokenModel:
    torch.manual_seed(0)
    config = TokenTransformerConfig(values=256, length=16, label_dim=3, width=16, depth=2, heads=2, causal=causal)
    network = TokenTransformer(config)
    for p in network.parameters():
        p.data += 0.2 * torch.randn_like(p)
    made = (CausalTokenModel if causal else MaskedTokenModel)(network, PixelCodec(4, 1))
    return made.to(dtype).eval()


def test_the_cache_changes_no_token() -> None:
    latents, cond = torch.zeros(5, 1), Condition(label=torch.tensor([0, 1, 2, -1, 0]))
    made = model(dtype=torch.float64)
    with_it, without = (Raster(cache=c)(made, latents, cond, noise=ImageNoise(3, range(5))) for c in (True, False))
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
    assert len({image.numpy().tobytes() for image in with_it}) == 5


def test_samples_are_the_models_distribution() -> None:
    """Every one of 2^3 sequences of a Markov chain comes as often as it should."""
    initial, transition = torch.tensor([0.3, 0.7]).double(), torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double()
    chain, codec, n = MarkovChain(initial, transition, 3), Levels(2, 3), 8000
    images = Raster(cache=False)(MarkovTokens(chain, codec), torch.zeros(n, 1), noise=ImageNoise(0, range(n)))
    code = (codec.encode(images) * torch.tensor([4, 2, 1])).sum(1)
    share = torch.bincount(code, minlength=8) / n
    every = torch.tensor([[i // 4, i // 2 % 2, i % 2] for i in range(8)])
    exact = chain.log_prob(every).exp()
    assert ((share - exact).abs() < 4 * (exact * (1 - exact) / n).sqrt() + 1e-9).all()


def test_temperature_zero_is_the_most_probable_token() -> None:
    initial, transition = torch.tensor([0.4, 0.6]).double(), torch.tensor([[0.9, 0.1], [0.8, 0.2]]).double()
    made = MarkovTokens(MarkovChain(initial, transition, 3), Levels(2, 3))
    images = Raster(cache=False, temperature=0.0)(made, torch.zeros(4, 1), noise=ImageNoise(0, range(4)))
    assert made.codec.encode(images).tolist() == [[1, 0, 0]] * 4


def test_as_the_generators_default_with_calls_counted() -> None:
    causal, masked = ImageGenerator(model(), SPEC), ImageGenerator(model(causal=False), SPEC)
    assert causal.sampler == Raster()
    assert masked.sampler == MaskedDecoding()
    assert (causal.nfe, masked.nfe) == (16, 8)
    assert ImageGenerator(model(), SPEC, Raster(cache=False)).nfe == 16
    assert ImageGenerator(model(causal=False), SPEC, MaskedDecoding(num_steps=3)).nfe == 3
    whole = causal.generate(6, seed=2)
    assert whole.shape == (6, 4, 4, 1)
    assert np.array_equal(
        causal.generate(2, seed=2, first=3, batch_size=1, labels=causal.labels(6, 2)[3:5]), whole[3:5]
    )


def test_on_step_tells_how_much_is_left() -> None:
    seen: list[tuple[Tensor, float]] = []

    def note(x: Tensor, estimate: Tensor, left: float) -> None:
        assert torch.equal(x, estimate)
        seen.append((x, left))

    drawn = Raster()(model(), torch.zeros(2, 1), noise=ImageNoise(0, range(2)), on_step=note)
    assert [left for _, left in seen] == [1 - i / 16 for i in range(16)]
    torch.testing.assert_close(seen[-1][0], drawn)
    # What is drawn stays, and what is to come is the middle value.
    for place, (x, _) in enumerate(seen):
        assert torch.equal(x.flatten(1)[:, : place + 1], drawn.flatten(1)[:, : place + 1])
        assert (model().codec.encode(x)[:, place + 1 :] == 128).all()


def test_long_images_are_told_of_now_and_then() -> None:
    lefts: list[float] = []
    made = MarkovTokens(MarkovChain(torch.ones(2) / 2, torch.ones(2, 2) / 2, 1000), Levels(2, 1000))
    noise = ImageNoise(0, [0])
    Raster(cache=False)(made, torch.zeros(1, 1), noise=noise, on_step=lambda x, e, left: lefts.append(left))
    assert len(lefts) == 64
    assert lefts[-1] == pytest.approx(1 / 1000)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match=r"sampler\.temperature is -1"):
        Raster(temperature=-1)
    with pytest.raises(UserError, match="Raster draws from causal models; a MaskedTokenModel"):
        ImageGenerator(model(causal=False), SPEC, Raster()).generate(1)
    with pytest.raises(UserError, match="MaskedDecoding fills in tokens in any order"):
        ImageGenerator(model(), SPEC, MaskedDecoding()).generate(1)
    with pytest.raises(UserError, match="sampler Heun draws from a denoiser; this model is a token model"):
        ImageGenerator(model(), SPEC, Heun())
    with pytest.raises(UserError, match="a CausalTokenModel needs 64-bit floats, which mps does not have"):
        ImageGenerator(model(), SPEC, Raster(), "mps")
    codec = PixelCodec(4, 1)
    codec.kind = "codec"
    with pytest.raises(UserError, match="a PixelCodec draws no images; it turns images into tokens and back"):
        ImageGenerator(codec, SPEC)
    chain = MarkovTokens(MarkovChain(torch.ones(2) / 2, torch.ones(2, 2) / 2, 3), Levels(2, 3))
    with pytest.raises(UserError, match="has no cache; draw without it, --set cache=false"):
        Raster()(chain, torch.zeros(1, 1), noise=ImageNoise(0, [0]))
    with pytest.raises(ValueError, match="noise source"):
        Raster()(model(), torch.zeros(1, 1))


def test_settings_as_json() -> None:
    made = Raster(temperature=0.9, cache=False)
    assert sampler_from_json(sampler_to_json(made)) == made


def test_a_network_without_a_cache_is_drawn_from_without() -> None:
    class Plain(nn.Module):
        def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
            return torch.zeros(*tokens.shape, 3)

    spec = DataSpec(name="x", resolution=2, channels=1, num_classes=0)
    plain = CausalTokenModel(Plain(), PixelCodec(2, 1, 3))
    with pytest.raises(UserError, match="has no cache; draw without it, --set cache=false"):
        ImageGenerator(plain, spec, Raster()).generate(1)
    generator = ImageGenerator(plain, spec, Raster(cache=False))
    assert generator.generate(2).shape == (2, 2, 2, 1) and generator.nfe == 4
