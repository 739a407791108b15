"""The U-Net of analog bits against the released program: one answer, the number of parameters, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from imagewright.networks import BitUNet, BitUNetConfig
from imagewright.types import Condition, UserError

PUBLISHED = {"img_resolution": 32, "in_channels": 48, "out_channels": 24, "label_dim": 10}


def filled(*shape: int, kind: str = "kernel") -> Tensor:
    """The rule by which the released program's layers were filled: a function of a tensor's shape, in Keras's order."""
    n = math.prod(shape)
    wave = torch.sin(torch.arange(n, dtype=torch.float64) * 0.37 + n * 0.11 + len(kind)).reshape(shape)
    return wave * math.sqrt(shape[-1] / n) if kind == "kernel" else 0.1 * wave + (kind == "gamma")


@torch.no_grad()
def fill(net: nn.Module) -> None:
    for module in net.modules():
        for name, conv in module.named_children():
            if isinstance(conv, nn.Linear):
                conv.weight.copy_(filled(conv.in_features, conv.out_features).T)
                conv.bias.copy_(filled(conv.out_features, kind="bias"))
            elif isinstance(conv, nn.GroupNorm):
                conv.weight.copy_(filled(conv.num_channels, kind="gamma"))
                conv.bias.copy_(filled(conv.num_channels, kind="beta"))
            elif isinstance(conv, nn.Conv2d) and name == "qkv":
                kernel, bias = filled(conv.in_channels, conv.in_channels).T, filled(conv.in_channels, kind="bias")
                order = {"h": module.num_heads, "s": 3}
                conv.weight[..., 0, 0] = rearrange(torch.stack([kernel] * 3), "s (h c) i -> (h c s) i", **order)
                conv.bias.copy_(rearrange(torch.stack([bias] * 3), "s (h c) -> (h c s)", **order))
            elif isinstance(conv, nn.Conv2d):
                size = conv.kernel_size[0]
                conv.weight.copy_(filled(size, size, conv.in_channels, conv.out_channels).permute(3, 2, 0, 1))
                conv.bias.copy_(filled(conv.out_channels, kind="bias"))


def test_it_answers_as_the_released_network_does() -> None:
    """architectures/transunet.py, its TensorFlow layers replaced by PyTorch's in float64."""
    config = BitUNetConfig(img_resolution=16, in_channels=6, out_channels=3, label_dim=3, model_channels=128,
                           channel_mult=(1, 2), num_blocks=1)  # fmt: skip
    net = BitUNet(config).double()
    fill(net)
    x = torch.sin(torch.arange(2 * 6 * 256, dtype=torch.float64) * 0.7).reshape(2, 6, 16, 16)
    with torch.no_grad():
        answer = net(x, torch.tensor([300.0, 900.0], dtype=torch.float64), Condition(label=torch.tensor([1, 2])))
    assert sum(p.numel() for p in net.parameters()) == 9_059_971
    assert float(answer.mean()) == pytest.approx(-0.2052596868619144, abs=1e-8)
    assert float(answer.std()) == pytest.approx(0.19667908529460065, abs=1e-8)
    assert answer[1, 2, -1, -3:].tolist() == pytest.approx(
        [-0.3813145126097745, -0.40871853056823326, 0.00864476140909913], abs=1e-7
    )


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 52_027_672),
        ({"out_channels": 768, "out_kernel": 1}, 52_169_728),
        ({"img_resolution": 64, "label_dim": 1000, "model_channels": 192, "channel_mult": (1, 2, 3, 4)}, 247_189_464),
    ],
)
def test_published_networks_have_the_released_number_of_parameters(changes: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        net = BitUNet(BitUNetConfig(**{**PUBLISHED, **changes}))  # type: ignore[arg-type]
    assert sum(p.numel() for p in net.parameters()) == count


def test_weights_begin_as_keras_draws_them() -> None:
    torch.manual_seed(0)
    config = BitUNetConfig(img_resolution=8, in_channels=6, out_channels=3, channel_mult=(1,), num_blocks=1)
    net = BitUNet(config)
    attention = net.enc["8x8_block0_attention"]
    bounds = {attention.qkv: 6 / (256 * 4 + 256 * 64), attention.proj: 6 / (4 * 64 + 4 * 256),
              net.enc["8x8_conv"]: 6 / (9 * 6 + 9 * 256)}  # fmt: skip
    for layer, square in bounds.items():
        assert float(layer.weight.detach().abs().max()) == pytest.approx(math.sqrt(square), rel=1e-3)
    assert float(net.out_conv.weight.detach().abs().max()) < 2e-6


def test_what_it_is_not_told_is_refused() -> None:
    with pytest.raises(UserError, match="destination is True; it must be off: a BitUNet is not told it"):
        BitUNetConfig(**PUBLISHED, destination=True)
    with pytest.raises(UserError, match="channels_per_head is 64; an attention layer of 32 channels has no head"):
        BitUNet(BitUNetConfig(**PUBLISHED, model_channels=32))
