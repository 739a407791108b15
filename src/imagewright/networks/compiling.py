"""torch.compile by block: a deep network's many blocks are of few kinds, and each kind is compiled once."""

from __future__ import annotations

import torch
from torch import nn

from imagewright.networks.image_network import ImageNetwork, innermost
from imagewright.networks.recompute import blocks
from imagewright.networks.vatt import VATT

KINDS = 64
"""Kinds of blocks (channels, resolution, training or not) that torch keeps apart; more are computed uncompiled."""


def compile_network(network: nn.Module) -> None:
    """Let a network's calls be compiled when they first come: one of images or clips block by block, any other whole.

    What lies between the blocks stays as it is. Sizes are taken as fixed: another batch size compiles anew.
    """
    network = innermost(network)
    if not isinstance(network, ImageNetwork | VATT):  # of a VATT each tower is asked by itself
        network.compile()
        return
    settings = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    setattr(settings, name, max(getattr(settings, name), KINDS))
    for block in blocks(network):
        block.compile(dynamic=False)
