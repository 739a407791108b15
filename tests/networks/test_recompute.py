"""Blocks that are computed again for backward: the same numbers, dropout included, and less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from imagewright.networks import (
    DhariwalUNet,
    DhariwalUNetConfig,
    EDM2UNet,
    EDM2UNetConfig,
    PixelUNet,
    PixelUNetConfig,
    SongUNet,
    SongUNetConfig,
    TokenTransformer,
    TokenTransformerConfig,
)
from imagewright.networks.recompute import blocks
from imagewright.noise import BatchNoise

SONG = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                      num_blocks=1, attn_resolutions=(8,), dropout=0.3)  # fmt: skip
EDM2 = EDM2UNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=(1,),
                      num_blocks=1, attn_resolutions=(8,), dropout=0.3)  # fmt: skip
DHARIWAL = DhariwalUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=32, channel_mult=(1,),
                              num_blocks=1, attn_resolutions=(8,), dropout=0.3)  # fmt: skip
TOKENS = TokenTransformerConfig(values=5, length=16, width=16, depth=3, heads=2, dropout=0.3)
PIXELS = PixelUNetConfig(img_resolution=4, in_channels=1, values=5, model_channels=8, num_blocks=2, dropout=0.3,
                         transformer_depth=2, transformer_width=16, transformer_heads=2)  # fmt: skip
IMAGES = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)
INDEX = torch.arange(48).view(3, 16) % 5
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "song": (lambda: SongUNet(SONG), lambda net: net(IMAGES, torch.tensor([0.1, 0.2, 0.3]))),
    "edm2": (lambda: EDM2UNet(EDM2), lambda net: net(IMAGES, torch.tensor([0.1, 0.2, 0.3]))),
    "dhariwal": (lambda: DhariwalUNet(DHARIWAL), lambda net: net(IMAGES, torch.tensor([0.1, 0.2, 0.3]))),
    "tokens": (lambda: TokenTransformer(TOKENS), lambda net: net(INDEX)),
    "pixels": (lambda: PixelUNet(PIXELS), lambda net: net(INDEX, torch.tensor([0.1, 0.2, 0.3]))),
}


def passed(net: nn.Module, call: Callable[[Any], Tensor]) -> tuple[list[Tensor], int]:
    """Two calls as in one step of training, one update; losses, gradients, and how many numbers were kept."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    noise = BatchNoise(0, 7, range(3, 6), 8)
    with noise.for_networks(2), saved_tensors_hooks(keep, lambda tensor: tensor):
        once = call(net).square().mean()
        loss = once + call(net).square().mean()
        held = sum(kept.values())
        loss.backward()
        after = call(net).square().mean()  # draws what comes next, not what was drawn again
    return [
        once.detach(),
        loss.detach(),
        after.detach(),
        *(p.grad for p in net.parameters() if p.grad is not None),
    ], held


@pytest.mark.parametrize("name", CASES)
def test_computed_again_it_is_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, call = CASES[name]
    net = make().train()
    for parameter in net.parameters():  # nothing is zero, as last layers are
        nn.init.normal_(parameter, std=0.3)
    again = copy.deepcopy(net)
    found = list(blocks(again))
    assert len(found) >= 2
    for block in found:
        block.recompute = True
    (plain, kept), (twice, less) = passed(net, call), passed(again, call)
    assert len(plain) == len(twice) > 8
    for a, b in zip(plain, twice, strict=True):
        if name == "edm2":  # whose second call has written its weights anew before the first goes backward
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(a, b)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain[1] != 2 * plain[0] and plain[2] != plain[0]  # each call has its own dropout
    assert less < 0.7 * kept
    copied = copy.deepcopy(again)  # computes with its own weights
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert not torch.equal(passed(copied, call)[0][1], twice[1])
