"""What keeps networks on the fast kernels: memory layouts, number formats, one graph when compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imagewright.networks import (
    DhariwalUNet,
    DhariwalUNetConfig,
    PixelUNet,
    PixelUNetConfig,
    SongUNet,
    SongUNetConfig,
    TokenTransformer,
    TokenTransformerConfig,
)
from imagewright.networks import block as block_module
from imagewright.networks import pixel_unet as pixel_module
from imagewright.networks.layers import group_norm
from imagewright.networks.tangents import derivative
from imagewright.types import Condition

IMAGES: dict[str, Any] = {"img_resolution": 8, "in_channels": 3, "label_dim": 10, "model_channels": 32, "num_blocks": 1}
UNET: dict[str, Any] = {**IMAGES, "out_channels": 3, "channel_mult": (1, 2), "attn_resolutions": (4,)}
PIXELS = {**IMAGES, "values": 16, "transformer_width": 16, "transformer_heads": 2}
TOKENS: dict[str, Any] = {"values": 16, "length": 16, "width": 16, "depth": 1, "heads": 2, "label_dim": 10}
COND = Condition(label=torch.tensor([1, -1]))


def networks() -> dict[str, tuple[torch.nn.Module, tuple[Any, ...]]]:
    image, time = torch.randn(2, 3, 8, 8), torch.rand(2)
    tokens = torch.randint(16, (2, 192))
    return {
        "adm": (DhariwalUNet(DhariwalUNetConfig(**UNET)), (image, time, COND)),
        "song": (SongUNet(SongUNetConfig(**UNET)), (image, time, COND)),
        "pixels": (PixelUNet(PixelUNetConfig(**PIXELS)), (tokens, time, COND)),
        "patches": (PixelUNet(PixelUNetConfig(**PIXELS, transformer_depth=1)), (tokens, time, COND)),
        "masked": (TokenTransformer(TokenTransformerConfig(**TOKENS)), (tokens[:, :16], None, COND)),
        "causal": (TokenTransformer(TokenTransformerConfig(**TOKENS, causal=True)), (tokens[:, :16], None, COND)),
    }


@pytest.mark.parametrize("name", ["adm", "song", "pixels"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_gets_numbers_side_by_side(name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's fused kernels are left for a slow one where the last stride of q, k or v is not 1."""
    seen: list[int] = []
    plain = block_module.attention

    def watched(*qkv: Tensor) -> Tensor:
        seen.extend(t.stride(-1) for t in qkv)
        return plain(*qkv)

    monkeypatch.setattr(block_module, "attention", watched)
    monkeypatch.setattr(pixel_module, "attention", watched)
    network, args = networks()[name]
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network(*args)
    assert seen and set(seen) == {1}


@pytest.mark.parametrize("name", ["patches", "masked", "causal"])
def test_a_network_is_one_graph(name: str) -> None:
    network, args = networks()[name]
    torch._dynamo.reset()
    explained = torch._dynamo.explain(network)(*args)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_normalisation_stays_in_half_precision() -> None:
    """Under autocast too, whose own rule is float32; the sums are float32 all the same."""
    norm, x = group_norm(64, eps=1e-5), 100 + torch.randn(2, 64, 16, 16)
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    exact = norm(x.bfloat16().float())
    assert ((half.float() - exact).norm() / exact.norm()).item() < 4e-3
    torch.testing.assert_close(norm(x), torch.nn.functional.group_norm(x, 16, norm.weight, norm.bias, 1e-5))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_on_rows_is_attention(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, taken on the CPU: values, gradients and a derivative along a direction."""
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=(1,),
                            num_blocks=1, attn_resolutions=(8,), dropout=0.0)  # fmt: skip
    block = next(b for b in SongUNet(config).blocks().values() if b.num_heads)
    block.num_heads = heads
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    found = []
    for rows in (False, True):
        taken = (lambda x: x.is_contiguous(memory_format=torch.channels_last)) if rows else (lambda x: False)
        monkeypatch.setattr("imagewright.networks.block.on_rows", taken)
        monkeypatch.setattr("imagewright.networks.tangents.on_rows", taken)
        answer = block.attended(x)
        learned = [p for name, p in block.named_parameters() if name.startswith(("qkv", "proj"))]
        gradients = torch.autograd.grad(answer.square().sum(), learned)
        found.append((answer, *gradients, *derivative(block.attended, (x,), (torch.cos(x),))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
