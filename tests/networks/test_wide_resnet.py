"""The wide residual network: its official program's number of parameters, its shapes, its blocks."""

from __future__ import annotations

import pytest
import torch

from imagewright.networks.wide_resnet import WideResNet, WideResNetConfig
from imagewright.types import UserError


def official_count(size: int, n: int, k: int, classes: int = 1000) -> int:
    """Trainable numbers, layer by layer as the official function lists them (a norm has two a channel)."""
    widths = [16 * k, 32 * k, 64 * k, 128 * k][: 2 + (size >= 32) + (size >= 64)]
    total, inner = 3 * 16 * 9 + 2 * 16, 16
    for i, width in enumerate(widths):
        for b in range(n):
            total += 0 if i == b == 0 else 2 * inner  # the norm before
            total += 9 * inner * width + 2 * width  # the first convolution and its norm
            total += 9 * width * width + width  # the second, with its bias
            total += inner * width if b == 0 else 0  # the projection
            inner = width
    return total + 2 * inner + inner * classes + classes


@pytest.mark.parametrize(
    ("size", "n", "k", "millions"),
    [(32, 4, 2, 1.6), (32, 4, 5, 9.5), (32, 4, 10, 37.1), (64, 4, 2, 6.2), (16, 4, 2, 0.4)],
)
def test_the_count_is_the_official_programs(size: int, n: int, k: int, millions: float) -> None:
    with torch.device("meta"):
        network = WideResNet(WideResNetConfig(img_resolution=size, blocks=n, widen=k))
    count = sum(p.numel() for p in network.parameters())
    assert count == official_count(size, n, k) and count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes(size: int) -> None:
    network = WideResNet(WideResNetConfig(img_resolution=size, num_classes=7, blocks=1, widen=1)).eval()
    made = network(torch.randn(2, 3, size, size))
    width = {16: 32, 32: 64, 64: 128}[size]
    assert made.pooled.shape == (2, width) and made.logits.shape == (2, 7)
    assert made.grid == (8, 8) and made.tokens.shape == (2, 64, width)


def test_without_its_branches_a_block_is_its_skip() -> None:
    """Pre-activation: what flows along the skips meets no norm and no ReLU until the end."""
    network = WideResNet(WideResNetConfig(img_resolution=16, num_classes=3, blocks=3, widen=1)).eval()
    for block in network.blocks:
        torch.nn.init.zeros_(block.two.weight)
    x = torch.randn(2, 3, 16, 16)
    start = torch.relu(network.norm(network.first(x)))
    expected = network.blocks[3].skip(network.blocks[0].skip(start))
    assert torch.equal(network.blocks(start), expected) and (expected < 0).any()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="widen is 0"):
        WideResNetConfig(img_resolution=32, widen=0)
