"""Bits of tokens: codes there and back, their order, heads, descriptions, mistakes."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.models.bits import AnalogBits, BitDenoiser, Encoding, answers, codes
from imagewright.models.description import build, describe
from imagewright.models.self_conditioned import SelfConditioned
from imagewright.models.tokens import PixelCodec
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.types import UNCONDITIONAL, Condition, LatentDenoiser, UserError

ENCODINGS = get_args(Encoding)
RGB = PixelCodec(16, 3)


class Codebook(nn.Module):
    """Stands in for a tokenizer of so many values on 4 x 4 places."""

    kind, lossless, length = "codec", False, 16

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("values", [256, 64, 6, 2])
def test_tokens_come_back(encoding: Encoding, values: int) -> None:
    bits = AnalogBits(Codebook(values), encoding, scale=0.5)
    tokens = (torch.arange(16 * 16) % values).view(16, 16)
    analog = bits.encode(tokens)
    assert analog.shape[1:] == bits.latent and set(analog.unique().tolist()) == {-0.5, 0.5}
    assert torch.equal(bits.decode(analog), tokens)
    faint = 0.01 * analog + 0.004 * torch.sin(torch.arange(analog.numel())).view_as(analog)
    assert torch.equal(bits.decode(faint), tokens)  # signs alone count, or which is largest


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pixels_come_back_with_the_bits_of_a_colour_together(encoding: Encoding) -> None:
    bits = AnalogBits(RGB, encoding)
    tokens = torch.arange(768).view(1, 768) % 256
    analog = bits.encode(tokens)
    assert torch.equal(bits.decode(analog), tokens)
    if encoding == "binary":  # the second pixel's green is token 4
        assert analog[0, 8:16, 0, 1].tolist() == [-1, -1, 1, -1, -1, -1, -1, -1]


def test_neighbours_of_gray_codes_differ_in_one_bit_and_codes_are_permutations() -> None:
    for encoding in ("binary", "gray", "random"):
        code, value = codes(encoding, 256)  # type: ignore[arg-type]
        assert np.array_equal(value[code], np.arange(256)) and np.array_equal(code[value], np.arange(256))
    gray = codes("gray", 256)[0]
    assert all(int(a ^ b).bit_count() == 1 for a, b in itertools.pairwise(gray))
    shuffled = codes("random", 256)[0]
    assert shuffled[:5].tolist() == [228, 6, 79, 206, 117] and shuffled[-3:].tolist() == [92, 179, 102]  # the released


def test_a_code_that_is_no_value_is_read_as_the_largest() -> None:
    bits = AnalogBits(Codebook(6))
    analog = torch.ones(1, 3, 4, 4)  # code 7
    assert bits.decode(analog).unique().tolist() == [5]


class Answer(nn.Module):
    """Answers a given tensor."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.told = label
        return self.answer.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_heads_that_are_sure_answer_the_bits(encoding: Encoding) -> None:
    codec = PixelCodec(2, 1)
    bits = AnalogBits(codec, encoding, 0.5)
    tokens = torch.tensor([[3, 200, 0, 255]])
    analog = bits.encode(tokens).double()
    sure = 60 * nn.functional.one_hot(bits.codes_of(tokens), len(bits.patterns)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    for head, answer in {"mse": analog, "sigmoid": 100 * analog, "softmax": sure.double()}.items():
        model = BitDenoiser(Answer(answer), codec, encoding, 0.5, head)  # type: ignore[arg-type]
        assert answers(bits, head) == answer.shape[1]  # type: ignore[arg-type]
        x0 = model(torch.zeros_like(analog), torch.tensor([2.0], dtype=torch.float64))
        torch.testing.assert_close(x0, analog, rtol=0, atol=1e-10)
        assert float(model.loss(answer, tokens)[0]) == pytest.approx(0, abs=1e-10)
        assert float(model.network.told[0]) == pytest.approx(1000 / 5)  # 1000 gamma at sigma 2


def test_a_softmax_answers_the_mean_of_its_codes_bits() -> None:
    codec = PixelCodec(1, 1)
    logits = torch.full((1, 256, 1, 1), -100.0, dtype=torch.float64)
    logits[0, [1, 3]] = torch.tensor([0.25, 0.75], dtype=torch.float64).log()[:, None, None]
    x0 = BitDenoiser(Answer(logits), codec, head="softmax").estimate(logits)
    assert x0.flatten().tolist() == pytest.approx([1, 0.5, -1, -1, -1, -1, -1, -1])


def small(**changes: int) -> SongUNet:
    sizes = {"img_resolution": 4, "in_channels": 16, "out_channels": 8, **changes}
    return SongUNet(SongUNetConfig(**sizes, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()))


def test_a_model_describes_itself_and_meets_its_protocol() -> None:
    model = BitDenoiser(SelfConditioned(small(), 0.5), PixelCodec(4, 1), "gray", 0.5, "sigmoid", "linear")
    assert isinstance(model, LatentDenoiser)
    again = build(describe(model))
    assert describe(again) == describe(model)
    assert again.latent == (8, 4, 4) and again.sigma_max == pytest.approx(1e9**0.5, rel=1e-6)


def test_mistakes_are_named() -> None:
    codec = PixelCodec(4, 1)
    with pytest.raises(UserError, match="encoding is 'grey'; allowed: binary, gray, random, one-hot"):
        AnalogBits(codec, "grey")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has 2000 values; encoding 'one-hot' takes at most 1024"):
        AnalogBits(Codebook(2000), "one-hot")
    with pytest.raises(UserError, match="has 70000 values; encoding 'gray' takes at most 65536"):
        AnalogBits(Codebook(70_000), "gray")
    with pytest.raises(UserError, match="head is 'l2'; allowed: mse, sigmoid, softmax"):
        BitDenoiser(small(), codec, head="l2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="schedule is 'sigmoid'; it must be one of cosine, linear"):
        BitDenoiser(small(), codec, schedule="sigmoid")
    with pytest.raises(UserError, match="in_channels of the network is 16; bits of this codec need 8"):
        BitDenoiser(small(), codec)
    with pytest.raises(UserError, match="takes twice the channels; this one takes 3"):
        SelfConditioned(small(in_channels=3))
