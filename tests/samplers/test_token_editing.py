"""Editing by tokens: what is kept, what is blended, pictures that go on beyond a side."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from imagewright.models.tokens import PixelCodec
from imagewright.models.vq import VQTokenizer
from imagewright.networks import VQAutoencoder, VQAutoencoderConfig
from imagewright.noise import StepNoise
from imagewright.samplers import MaskedDecoding
from imagewright.samplers.token_editing import Outpainting, TokenEditing, blurred
from imagewright.types import UNCONDITIONAL, Condition, UserError


class Even:
    """All values alike at every place; keeps what it is shown and told."""

    order: Literal["masked", "causal"] = "masked"

    def __init__(self, codec: Any) -> None:
        self.codec, self.seen, self.labels = codec, [], []
        self.decoded: list[Tensor] = []

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        self.seen.append(tokens.clone())
        self.labels.append(cond.label)
        return torch.zeros(*tokens.shape, self.codec.values)


def vq() -> VQTokenizer:
    torch.manual_seed(0)
    network = VQAutoencoder(
        VQAutoencoderConfig(
            img_resolution=16,
            in_channels=1,
            model_channels=4,
            channel_mult=(1, 1, 1),
            num_blocks=1,
            codebook_size=6,
            codebook_dim=4,
        )
    )
    torch.nn.init.normal_(network.quantiser.codebook)
    return VQTokenizer(network).eval()


def region(side: int) -> Tensor:
    wanted = torch.zeros(side, side, dtype=torch.bool)
    wanted[: side // 4, : side // 4] = True
    return wanted


def pictures(side: int, n: int = 2) -> Tensor:
    levels = torch.randint(256, (n, 1, side, side), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


def test_pixels_outside_never_change_with_a_lossless_codec() -> None:
    model = Even(PixelCodec(8, 1))
    given, wanted = pictures(8), region(8)
    edited = TokenEditing()(model, given, wanted, noise=StepNoise(0))
    assert torch.equal(edited[:, :, ~wanted], given[:, :, ~wanted])
    assert not torch.equal(edited, given)
    shown = model.seen[0]
    assert torch.equal(shown.view(2, 8, 8) == 256, wanted.expand(2, 8, 8))  # no token more than the region's


def test_tokens_outside_never_change_with_a_codebook() -> None:
    codec = vq()
    model = Even(codec)
    given, wanted = pictures(16), region(16)
    places = codec.places(wanted)
    assert 0 < int(places.sum()) < 16
    drawn: list[Tensor] = []
    decode = codec.decode
    codec.decode = lambda tokens: drawn.append(tokens) or decode(tokens)  # type: ignore[assignment, func-returns-value]
    edited = TokenEditing()(model, given, wanted, noise=StepNoise(0))
    tokens = codec.encode(given)
    assert all(torch.equal(shown[:, ~places], tokens[:, ~places]) for shown in model.seen)
    assert torch.equal(drawn[-1][:, ~places], tokens[:, ~places])
    # Blended by the drawn tokens' mask, blurred by 15/16 of their side of 4 pixels.
    drawn_pixels = places.view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert drawn_pixels[:8, :8].all() and int(drawn_pixels.sum()) == 64  # the region's token, and the next ones
    weight = blurred(drawn_pixels, 3.75)
    torch.testing.assert_close(edited, given + weight * (decode(drawn[-1]) - given))
    narrow = TokenEditing(blur=1.0)(model, given, wanted, noise=StepNoise(0))
    weight = blurred(drawn_pixels, 1.0)
    assert torch.equal(narrow[:, :, weight == 0], given[:, :, weight == 0]) and (weight == 0).any()


def test_the_class_is_that_of_the_edit_and_two_of_twelve_passes_are_skipped() -> None:
    model = Even(PixelCodec(8, 1))
    label = torch.tensor([3, 1])
    editing = TokenEditing()
    editing(model, pictures(8), region(8), Condition(label=label), noise=StepNoise(0))
    assert len(model.seen) == 10 == editing.nfe and all(torch.equal(told, label) for told in model.labels)
    assert TokenEditing(decoding=MaskedDecoding(num_steps=4, guidance=2), start=1).nfe == 6


def test_a_blurred_mask_keeps_its_mass_and_range() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[12:20, 12:20] = True
    weight = blurred(mask, 2.0)
    assert float(weight.sum()) == pytest.approx(64, rel=1e-4) and weight.min() >= 0 and weight.max() <= 1
    torch.testing.assert_close(weight, weight.T)
    assert torch.equal(blurred(mask, 0.0), mask.float())
    assert torch.equal(blurred(torch.ones(4, 4, dtype=torch.bool), 5.0) > 0.999, torch.ones(4, 4, dtype=torch.bool))
    left = blurred(torch.arange(8)[None].expand(8, 8) < 4, 1.0)
    assert left[0, 0] > 0.999 and left[0, 7] < 0.001 and 0.3 < left[0, 4] < 0.5 < left[0, 3] < 0.7


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
@pytest.mark.parametrize("size", [8, 7])
def test_a_picture_goes_on_beyond_a_side(side: Literal["left", "right", "top", "bottom"], size: int) -> None:
    beyond = Outpainting(side)
    given = torch.rand(1, 1, size, size) + 1  # no zeros
    canvas, free = beyond.canvas(given), beyond.region(size, size)
    assert int(free.sum()) == size * (size - size // 2)
    assert torch.equal(canvas[0, 0] == 0, free)
    joined = beyond.join(given, torch.where(free, -1.0, canvas))
    more = size - size // 2
    horizontal = side in ("left", "right")
    assert joined.shape[2:] == ((size, size + more) if horizontal else (size + more, size))
    # The picture is in it whole, and the rest is what was filled in.
    kept = {
        "right": joined[..., :size], "left": joined[..., more:], "bottom": joined[..., :size, :],
        "top": joined[..., more:, :],
    }[side]  # fmt: skip
    assert torch.equal(kept, given)
    assert int((joined == -1).sum()) == size * more


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"start is 12; it must lie in 0 .. 11"):
        TokenEditing(start=12)
    with pytest.raises(UserError, match="blur is -1"):
        TokenEditing(blur=-1.0)
