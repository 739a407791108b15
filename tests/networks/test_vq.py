"""The VQ autoencoder and its discriminator: shapes, straight-through gradient, what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from imagewright.models.description import build, describe
from imagewright.networks import VQAutoencoder, VQAutoencoderConfig
from imagewright.networks.blur_discriminator import BlurDiscriminator
from imagewright.networks.vq import Quantiser
from imagewright.types import UserError

TINY = VQAutoencoderConfig(
    img_resolution=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, codebook_size=5,
    codebook_dim=4,
)  # fmt: skip


def autoencoder() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(TINY)


def test_the_published_size_has_a_token_for_16_by_16_pixels() -> None:
    config = VQAutoencoderConfig(img_resolution=256, in_channels=3)
    with torch.device("meta"):
        network = VQAutoencoder(config)
        images, quantised = network(torch.empty(1, 3, 256, 256))
    assert images.shape == (1, 3, 256, 256) and quantised.tokens.shape == (1, 256)
    assert quantised.z.shape == (1, 256, 16, 16) and quantised.codebook.shape == (1024, 256)


def test_weights_begin_as_the_released_ones() -> None:
    torch.manual_seed(0)
    book = Quantiser(64, 256).codebook.detach()
    assert float(book.std()) == pytest.approx((1 / 64) ** 0.5, rel=0.02) and book.abs().max() <= (3 / 64) ** 0.5
    network = VQAutoencoder(VQAutoencoderConfig(img_resolution=8, in_channels=3, channel_mult=(1, 2), num_blocks=1))
    kernel = network.encoder[1].conv0.weight.detach()  # normal, cut at two deviations, of variance 1 / fan-in
    assert float(kernel.std()) == pytest.approx((1 / (9 * 128)) ** 0.5, rel=0.02)
    assert float(kernel.abs().max() / kernel.std()) == pytest.approx(2 / 0.8796, rel=0.01)
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    torch.manual_seed(0)
    dense = BlurDiscriminator(16, 3, 64, "image").layers[-1]
    assert float(dense.weight.detach().abs().max()) == pytest.approx((6 / 257) ** 0.5, rel=0.05)  # Xavier, uniform
    assert not dense.bias.any()


def test_every_place_gets_the_nearest_code() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(7, 3).double()
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = quantiser(z)
    places = z.permute(0, 2, 3, 1).reshape(32, 3)
    exact = torch.cdist(places, quantiser.codebook).square()
    torch.testing.assert_close(found.distances.reshape(32, 7), exact)
    assert torch.equal(found.tokens.flatten(), exact.argmin(1))
    codes = quantiser.codebook[found.tokens].reshape(2, 4, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.codes, codes)
    torch.testing.assert_close(found.passed, codes)
    assert torch.equal(quantiser.lookup(found.tokens, 4), found.codes)


def test_the_gradient_passes_straight_through() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(7, 3).double()
    z = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: quantiser(x).passed, z)
    assert torch.equal(jacobian.reshape(12, 12), torch.eye(12, dtype=torch.float64))
    (slope,) = torch.autograd.grad(quantiser(z).passed.sum(), quantiser.codebook, allow_unused=True)
    assert slope is None or not slope.any()  # the codebook learns by its own loss alone


def test_it_describes_itself() -> None:
    network = autoencoder()
    again = build(describe(network))
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert isinstance(again, VQAutoencoder)
    assert torch.equal(again.encode(images).tokens, network.encode(images).tokens)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"img_resolution is 10; it must be divisible by 4 for the 3 levels"):
        replace(TINY, img_resolution=10, channel_mult=(1, 1, 1))
    with pytest.raises(UserError, match="codebook_size is 1; it must be an integer >= 2"):
        replace(TINY, codebook_size=1)
    with pytest.raises(UserError, match="channel_mult is "):
        replace(TINY, channel_mult=())
    with pytest.raises(UserError, match="num_blocks is 0"):
        replace(TINY, num_blocks=0)
    with pytest.raises(UserError, match=r"images are \[1, 1, 16, 16\]; this tokenizer takes \[N, 1, 8, 8\]"):
        autoencoder().encode(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(("judge", "places"), [("patches", 16), ("image", 1)])
def test_the_discriminator_judges_places_or_the_image(judge: str, places: int) -> None:
    torch.manual_seed(0)
    network = BlurDiscriminator(16, 3, 8, judge)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 16, 16)
    logits = network(images)
    assert logits.shape == (2, places)
    torch.testing.assert_close(network(images[1:]), logits[1:])


def test_the_discriminator_names_mistakes() -> None:
    with pytest.raises(UserError, match="resolution 4; resolution must be at least 8"):
        BlurDiscriminator(4, 1)
    with pytest.raises(UserError, match="judge 'pixels'"):
        BlurDiscriminator(8, 1, judge="pixels")  # type: ignore[arg-type]
