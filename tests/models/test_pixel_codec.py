"""The pixel codec: every level there and back, the order of the tokens, what it refuses."""

from __future__ import annotations

import pytest
import torch

from imagewright.models.tokens import PixelCodec, check_tokens
from imagewright.types import UserError


def test_every_level_comes_back() -> None:
    codec = PixelCodec(16, 1)
    tokens = torch.arange(256)[None]
    images = codec.decode(tokens)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert torch.equal(codec.encode(images), tokens)
    assert codec.length == 256


def test_tokens_are_in_the_order_row_column_channel() -> None:
    codec = PixelCodec(2, 3)
    images = codec.decode(torch.arange(12)[None])
    assert torch.equal(((images + 1) * 127.5).round().long()[0, :, 1, 0], torch.tensor([6, 7, 8]))
    assert torch.equal(codec.encode(images), torch.arange(12)[None])
    right = torch.tensor([[False, True], [False, True]])
    assert codec.places(right).nonzero().flatten().tolist() == [3, 4, 5, 9, 10, 11]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match="resolution is 0"):
        PixelCodec(0, 1)
    codec = PixelCodec(2, 1)
    with pytest.raises(UserError, match=r"images are \[1, 1, 4, 4\]; this codec takes \[N, 1, 2, 2\]"):
        codec.encode(torch.zeros(1, 1, 4, 4))
    check_tokens(torch.tensor([[0, 255, 256, 3]]), codec, unknown=True)
    with pytest.raises(UserError, match="token 257 is none of the codec's; they are 0 to 255, and 256 for unknown"):
        check_tokens(torch.tensor([[0, 257, 256, 3]]), codec, unknown=True)
