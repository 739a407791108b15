"""The tokenizer on disk: a codec, its range, which tokens an edit touches, how its codebook is used."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.tokens import PixelCodec
from imagewright.models.vq import VQTokenizer, codebook_usage
from imagewright.networks import TokenTransformer, TokenTransformerConfig, VQAutoencoder, VQAutoencoderConfig
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import DataSpec, UserError, kind_of

CONFIG = VQAutoencoderConfig(
    img_resolution=16, in_channels=1, model_channels=8, channel_mult=(1, 1, 2), num_blocks=1, codebook_size=6,
    codebook_dim=4,
)  # fmt: skip
SPEC = DataSpec(name="test", resolution=16, channels=1)


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQAutoencoder(CONFIG)).eval()


def test_images_become_tokens_and_come_back_in_range() -> None:
    codec = tokenizer()
    assert (codec.values, codec.length, codec.lossless, kind_of(codec)) == (6, 16, False, "codec")
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    tokens = codec.encode(images)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 16) and 0 <= tokens.min() <= tokens.max() < 6
    rebuilt = codec.decode(tokens)
    assert rebuilt.dtype == torch.float32 and rebuilt.shape == images.shape and rebuilt.abs().max() <= 1
    torch.testing.assert_close(rebuilt, codec(images)[0].detach().clamp(-1, 1))


def test_a_tokenizer_is_a_model_on_disk_that_draws_nothing(tmp_path: Path) -> None:
    codec = tokenizer()
    save_model(tmp_path, ModelFile(model=codec, spec=SPEC))
    file = load_model(tmp_path)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(file.model.encode(images), codec.encode(images))  # type: ignore[operator]
    with pytest.raises(UserError, match="VQTokenizer draws no images"):
        ImageGenerator(file.model, file.spec)


def test_a_model_of_its_tokens_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = TokenTransformer(TokenTransformerConfig(values=6, length=16, width=8, depth=1, heads=2))
    model = MaskedTokenModel(network, tokenizer(), label_dropout=0.25)
    save_model(tmp_path, ModelFile(model=model, spec=SPEC))
    again = load_model(tmp_path).model
    assert isinstance(again, MaskedTokenModel) and again.label_dropout == 0.25
    tokens = torch.randint(7, (2, 16))
    assert torch.equal(again.logits(tokens), model.eval().logits(tokens))
    assert torch.equal(again.codec.decode(tokens % 6), model.codec.decode(tokens % 6))


def test_an_edit_touches_its_tokens_and_the_next_ones() -> None:
    pixels = torch.zeros(16, 16, dtype=torch.bool)
    pixels[5, 0] = True  # the token in row 1, column 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0:3, 0:2] = True
    assert torch.equal(tokenizer().places(pixels).view(4, 4), expected)
    assert not tokenizer().places(torch.zeros(16, 16, dtype=torch.bool)).any()
    # Of the pixels themselves only what is asked for.
    mask = torch.rand(4, 4) < 0.5
    assert torch.equal(PixelCodec(4, 3).places(mask).view(4, 4, 3), mask[..., None].expand(4, 4, 3))


def test_usage_of_a_codebook() -> None:
    even = codebook_usage(torch.arange(8).repeat(3, 1), 8)
    assert even.perplexity == pytest.approx(8) and even.dead == 0
    uneven = codebook_usage(torch.tensor([0, 0, 0, 1]), 4)
    assert uneven.perplexity == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert uneven.dead == 2


def test_grey_levels_are_tokens_too() -> None:
    codec = PixelCodec(2, 1, values=5)
    images = torch.tensor([[-1.0, -0.3], [0.2, 0.9]])[None, None]
    assert codec.encode(images).tolist() == [[0, 1, 2, 4]]
    assert codec.decode(codec.encode(images)).flatten().tolist() == [-1, -0.5, 0, 1]
    assert not codec.lossless and PixelCodec(2, 1).lossless


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="needs a VQAutoencoder as its network, not a Linear"):
        VQTokenizer(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"token 6 is none of the codec's; they are 0 to 5$"):
        tokenizer().decode(torch.full((1, 16), 6))
    with pytest.raises(UserError, match=r"tokens are \[1, 9\]; the codec's are \[N, 16\]"):
        tokenizer().decode(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(UserError, match="values is 1; a pixel has 2 to 256 levels"):
        PixelCodec(4, 1, values=1)
    with pytest.raises(UserError, match="label_dropout is 2; it must lie in"):
        MaskedTokenModel(torch.nn.Identity(), tokenizer(), label_dropout=2)
    network = TokenTransformer(TokenTransformerConfig(values=7, length=16, width=8, depth=1, heads=2))
    with pytest.raises(UserError, match="the network knows 16 tokens of 7 values; the codec has 16 of 6"):
        MaskedTokenModel(network, tokenizer())
