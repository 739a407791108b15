"""What a network costs before anything is computed: parameters, operations and the activations that training keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from imagewright.networks import UNet
from imagewright.types import Condition, DataSpec


@dataclass(frozen=True)
class Footprint:
    """Of one call on one image: floating-point operations (a multiply-add counts 2), and bytes kept for backward."""

    flops: int
    activation_bytes: int


def footprint(network: UNet, spec: DataSpec) -> Footprint:
    """Measured on shapes alone (torch's meta device), in float32: no memory is taken, nothing is computed."""
    shell: nn.Module = copy.deepcopy(network).to("meta").train().requires_grad_(True)
    own = {id(p) for p in shell.parameters()}
    x, level = torch.empty(1, *spec.shape, device="meta"), torch.empty(1, device="meta")
    kept: dict[int, Tensor] = {}  # by identity: several operations may keep the same tensor

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        shell(x, level, Condition(destination=level if network.config.destination else None))
    return Footprint(counter.get_total_flops(), sum(t.numel() * t.element_size() for t in kept.values()))
