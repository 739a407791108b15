"""What a network costs before anything is computed: parameters, operations and the activations that training keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from imagewright.models.classifier import Sees
from imagewright.networks import VATT, EventViT, ImageNetwork, KLAutoencoder
from imagewright.networks.image_network import innermost
from imagewright.networks.recompute import blocks
from imagewright.precision import Precision
from imagewright.types import UNCONDITIONAL, Condition, DataSpec


@dataclass(frozen=True)
class Footprint:
    """Of one call on one image: floating-point operations (a multiply-add counts 2), and bytes kept for backward."""

    flops: int
    activation_bytes: int


def footprint(
    network: nn.Module | None, spec: DataSpec, precision: Precision = "fp32", *, recompute: bool = False
) -> Footprint | None:
    """Measured on shapes alone (torch's meta device): no memory is taken, nothing is computed.

    precision: number format of the pass. recompute: what is inside of a block is computed again for backward, one block
    at a time: what blocks are given is kept, and of their insides the largest. Memory that several tensors share counts
    once, and attention is taken to be fused, as it is on CPUs and GPUs. None for what is no network of images or of
    tokens.
    """
    if network is None:
        return None
    network = innermost(network)
    config: Any = getattr(network, "config", None)
    level = torch.empty(1, device="meta")
    told: tuple[Any, ...] = ()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if isinstance(network, VATT):
        c = network.config
        x = torch.empty(1, c.in_channels, c.frames, c.img_resolution, c.img_resolution, device="meta")
        words = torch.empty(1, c.length, dtype=torch.int64, device="meta")
        told = (torch.empty(1, c.samples, dtype=dtype, device="meta"), words)
    elif isinstance(network, ImageNetwork):
        side = getattr(network.config, "img_resolution", spec.resolution)  # of latents and bits their own
        x = torch.empty(1, network.config.in_channels, side, side, device="meta")
        to, weight = (level if asked else None for asked in (network.config.destination, network.config.weight))
        told = (level, Condition(destination=to, weight=weight))
    elif hasattr(config, "values") and hasattr(config, "length"):
        x = torch.empty(1, config.length, dtype=torch.int64, device="meta")
        told = (level, UNCONDITIONAL)
    elif isinstance(network, Sees | EventViT | KLAutoencoder):
        x = torch.empty(1, *spec.shape, device="meta")
    else:
        return None
    shell: nn.Module = copy.deepcopy(network).to("meta", dtype).train().requires_grad_(True)
    x = x.to(dtype) if x.is_floating_point() else x
    kept = _Kept(shell)
    for block in blocks(shell) if recompute else ():
        block.register_forward_pre_hook(kept.enter)
        block.register_forward_hook(kept.leave)
    counter = FlopCounterMode(display=False)
    with counter, _FusedAttention(), saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        # What a training step computes, where that is not all of what the network can be asked for.
        getattr(shell, "training_pass", shell)(x, *told)
    return Footprint(counter.get_total_flops(), kept.size(kept.outside) + kept.within)


class _Kept:
    """Memory kept for backward, once each: outside of blocks that are computed again, and of those the most."""

    def __init__(self, network: nn.Module) -> None:
        self._own = {p.untyped_storage()._cdata for p in network.parameters()}
        self.outside: dict[int, UntypedStorage] = {}
        self.within = 0
        self._now = self.outside

    def keep(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        self._now[memory._cdata] = memory
        return tensor

    def enter(self, block: nn.Module, given: tuple[Any, ...]) -> None:
        for each in given:
            if isinstance(each, Tensor):
                self.keep(each)
        self._now = {}

    def leave(self, block: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        self.within = max(self.within, self.size(self._now))
        self._now = self.outside

    def size(self, kept: dict[int, UntypedStorage]) -> int:
        """Bytes, but for the network's own."""
        return sum(memory.nbytes() for key, memory in kept.items() if key not in self._own)


def model_footprint(
    model: nn.Module, spec: DataSpec, precision: Precision = "fp32", *, recompute: bool = False
) -> Footprint | None:
    """Of one call of a model on one image, by its `network`; a model may show it several rows an image (`rows`)."""
    found = footprint(getattr(model, "network", None), spec, precision, recompute=recompute)
    rows = getattr(model, "rows", 1)
    return None if found is None else Footprint(rows * found.flops, rows * found.activation_bytes)


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what fused kernels keep: its inputs, its output and a number a row."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT) @ v
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
