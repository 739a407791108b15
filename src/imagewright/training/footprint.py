"""What a network costs before anything is computed: parameters, operations and the activations that training keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from imagewright.networks import UNet
from imagewright.types import UNCONDITIONAL, Condition, DataSpec


@dataclass(frozen=True)
class Footprint:
    """Of one call on one image: floating-point operations (a multiply-add counts 2), and bytes kept for backward."""

    flops: int
    activation_bytes: int


def footprint(network: nn.Module | None, spec: DataSpec) -> Footprint | None:
    """Measured on shapes alone (torch's meta device), in float32: no memory is taken, nothing is computed.

    None for what is no network of images or of tokens.
    """
    if network is None:
        return None
    config: Any = getattr(network, "config", None)
    level = torch.empty(1, device="meta")
    if isinstance(network, UNet):
        x = torch.empty(1, *spec.shape, device="meta")
        cond = Condition(destination=level if network.config.destination else None)
    elif hasattr(config, "values") and hasattr(config, "length"):
        x = torch.empty(1, config.length, dtype=torch.int64, device="meta")
        cond = UNCONDITIONAL
    else:
        return None
    shell: nn.Module = copy.deepcopy(network).to("meta").train().requires_grad_(True)
    own = {id(p) for p in shell.parameters()}
    kept: dict[int, Tensor] = {}  # by identity: several operations may keep the same tensor

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        shell(x, level, cond)
    return Footprint(counter.get_total_flops(), sum(t.numel() * t.element_size() for t in kept.values()))
