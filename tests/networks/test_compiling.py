"""Blocks of one kind are compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.networks.compiling import compile_network
from imagewright.networks.tangents import derivative


def test_alike_blocks_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, plain = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **o: plain(self, backend=counter, fullgraph=True, **o))
    config: Any = {"img_resolution": 4, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1,)}
    network = SongUNet(SongUNetConfig(**config, num_blocks=1, attn_resolutions=(), dropout=0.0))
    x, level = torch.randn(2, 1, 4, 4), torch.rand(2)
    with torch.no_grad():
        expected = network(x, level)
        compile_network(network)
        torch.testing.assert_close(network(x, level), expected)
    blocks = list(network.blocks().values())
    shapes = {tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks}
    assert counter.frame_count == len(shapes) < len(blocks)


def test_derivatives_are_those_of_what_is_not_compiled() -> None:
    """A compiled block has no forward-mode derivative."""
    config: Any = {"img_resolution": 4, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1,)}
    network = SongUNet(SongUNetConfig(**config, num_blocks=1, attn_resolutions=(), dropout=0.0))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    at, along = (torch.randn(2, 1, 4, 4), torch.rand(2)), (torch.randn(2, 1, 4, 4), torch.ones(2))
    expected = derivative(network.forward, at, along)
    asked: list[None] = []
    for block in network.blocks().values():
        block._compiled_call_impl = lambda *args: asked.append(None) or torch.zeros(2, 8, 4, 4)
    for product in (derivative, torch.func.jvp):
        torch.testing.assert_close(product(network.forward, at, along), expected)
    assert not asked
    network(*at)
    assert asked
