"""Networks of few bits: whole numbers for the weights of convolutions and linear layers, clipped inputs of theirs.

Quantizer  uniform and asymmetric, k bits, n = 2^k - 1: step = (u - l) / n, offset = round(l / step),
           code = clamp(round(x / step) - offset, 0, n), answer = (code + offset) step. Of weights l and u are the least
           and greatest of an output channel; of a layer's inputs a range that was measured (`tuning/quantization.py`),
           one for each bucket of noise levels. As in the public code of GDFQ (Xu et al. 2020, 2003.03603), whose codes
           are ours less 2^(k-1).
Storage    2, 4 or 8 bits a weight, the least that hold it, packed into bytes; a step and an offset a channel. Weights
           are unpacked in every call, so that they are small in memory too.
A network stays what it was, an instance of its class: its layers' classes change (`simulate`, `store`), and its
description says so. While it is `simulated` its weights are floats, rounded in every call with a straight-through
gradient, and may be trained; `store` keeps the rounded ones alone, and answers the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.types import UserError

Layer = nn.Conv2d | nn.Linear
"""What is quantized."""
Watch = Callable[["Quantizing", Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Quantized(NetworkConfig):
    """What a network's description says of its bits."""

    bits: int
    """Of a weight, 2 to 8."""
    activation_bits: int = 0
    """Of a layer's inputs, 2 to 8; 0 = they stay floats."""
    buckets: int = 1
    """Of noise levels, each with ranges of its own."""

    def __post_init__(self) -> None:
        require(2 <= self.bits <= 8, "bits", self.bits, "2 to 8")
        require(self.activation_bits in (0, *range(2, 9)), "activation_bits", self.activation_bits, "0, or 2 to 8")
        require(1 <= self.buckets <= 1000, "buckets", self.buckets, "1 to 1000")


# --- the quantizer ------------------------------------------------------------------------------------------


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """step and offset of ranges. Where low is high the range is from there to 0; where both are 0 the step is 1."""
    flat = low >= high
    low, high = torch.where(flat, low.clamp_max(0), low), torch.where(flat, high.clamp_min(0), high)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (low / step).round()


def encoded(x: Tensor, step: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1, as floats."""
    return (x / step).round_().sub_(offset).clamp_(0, 2**bits - 1)


def rounded(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x on the grid of a range; the gradient is 1 inside and 0 outside of it."""
    step, offset = grid(low, high, bits)
    on_grid = encoded(x.detach(), step, offset, bits).add_(offset).mul_(step)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return on_grid
    clipped = x.clamp(offset * step, (offset + 2**bits - 1) * step)
    answer: Tensor = clipped + (on_grid - clipped).detach()
    return answer


def of_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each output channel, of the weight's number of dimensions."""
    low, high = weight.detach().flatten(1).aminmax(dim=1)
    shape = (-1, *(1,) * (weight.ndim - 1))
    return low.view(shape), high.view(shape)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as bytes, uint8 [ceil(codes * width / 8)], the first in the lowest bits."""
    each = 8 // width(bits)
    flat = nn.functional.pad(codes.flatten().to(torch.uint8), (0, -codes.numel() % each)).view(-1, each)
    shifted = flat << (torch.arange(each, dtype=torch.uint8, device=flat.device) * width(bits))
    data: Tensor = shifted.sum(1, dtype=torch.uint8)
    return data


def unpacked(data: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The inverse of `packed`."""
    each = 8 // width(bits)
    shifts = torch.arange(each, dtype=torch.uint8, device=data.device) * width(bits)
    codes: Tensor = (data[:, None] >> shifts) & (2 ** width(bits) - 1)
    return codes.flatten()[: shape.numel()].view(shape)


def width(bits: int) -> int:
    """Bits that a stored weight takes: 2, 4 or 8."""
    return next(w for w in (2, 4, 8) if w >= bits)


# --- layers -------------------------------------------------------------------------------------------------


class Levels:
    """Which bucket each image of a call is in: set by the network, read by its layers. None = all are in the first."""

    index: Tensor | None = None
    _common: tuple[Tensor, int | None] | None = None

    @property
    def common(self) -> int | None:
        """The one bucket of all images of a call, None where there are several; looked at once a call."""
        assert self.index is not None
        if self._common is None or self._common[0] is not self.index:
            first = int(self.index[0])
            self._common = self.index, first if bool((self.index == first).all()) else None
        return self._common[1]


class Quantizing(nn.Module):
    """What a layer of a quantized network has before its own class: rounded weights and inputs.

    low, high: [buckets], ranges of the inputs; where they are equal inputs stay as they are. watch: told the inputs of
    a layer that rounds nothing.
    """

    told: Quantized
    levels: Levels
    watch: Watch | None
    low: Tensor
    high: Tensor

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        answer: Tensor = super()._conv_forward(self.seen(input), weight, bias)  # type: ignore[misc]  # of the base
        return answer

    def seen(self, x: Tensor) -> Tensor:
        """The inputs as the layer's arithmetic has them."""
        if self.watch is not None:
            self.watch(self, x)
            return x
        bits = self.told.activation_bits
        if not bits:
            return x
        low, high = self.range_of(x)
        return torch.where(high > low, rounded(x, low, high, bits), x)

    def product(self, x: Tensor) -> Tensor:
        """Of a linear layer."""
        layer = cast(nn.Linear, self)
        return nn.functional.linear(self.seen(x), layer.weight, layer.bias)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's range where rows are images, [N, 1, ...], else the hull of all."""
        index = self.levels.index
        if index is None or len(self.low) == 1:
            return self.low[0], self.high[0]
        if len(index) != len(x):
            return self.low.amin(), self.high.amax()
        shape = (-1, *(1,) * (x.ndim - 1))
        return self.low[index].view(shape), self.high[index].view(shape)


class Simulated(Quantizing):
    """The layer with a trainable weight, of which it uses the rounded values."""

    @property
    def weight(self) -> Tensor:
        """On its channels' grids; as it is while the layer is watched."""
        weight = cast(nn.Parameter, self._parameters["weight"])
        return weight if self.watch is not None else rounded(weight, *of_channels(weight), self.told.bits)


class Stored(Quantizing):
    """The layer whose weight is whole numbers. codes: uint8; step, offset: [out, 1, ...]."""

    codes: Tensor
    step: Tensor
    offset: Tensor
    shape: torch.Size

    @property
    def weight(self) -> Tensor:
        """Unpacked."""
        return (unpacked(self.codes, self.told.bits, self.shape).to(self.step.dtype) + self.offset) * self.step


class _Linear(Quantizing):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


_CLASSES: dict[tuple[type, type], type] = {}


def become(layer: nn.Module, role: type[Quantizing]) -> None:
    """Change a layer's class to one that does this before its own."""
    own = getattr(type(layer), "own", type(layer))
    if (role, own) not in _CLASSES:
        bases = (role, _Linear, own) if issubclass(own, nn.Linear) else (role, own)
        _CLASSES[role, own] = type(f"{role.__name__}{own.__name__}", bases, {"own": own})
    layer.__class__ = _CLASSES[role, own]


# --- networks -----------------------------------------------------------------------------------------------


class _ByLevel(Network):
    """A network that notes in which bucket of noise levels its images are."""

    levels: Levels
    edges: Tensor
    """[buckets - 1], noise labels between the buckets, ascending."""

    def forward(self, x: Tensor, noise_label: Tensor, *rest: Any, **named: Any) -> Any:
        self._note(noise_label)
        return super().forward(x, noise_label, *rest, **named)

    def _note(self, noise_label: Tensor) -> None:
        self.levels.index = torch.bucketize(noise_label, self.edges.to(noise_label.dtype))


class _PartsByLevel(_ByLevel):
    """The same of a U-Net, whose parts may be asked one by one; this is the first."""

    def embed(self, noise_label: Tensor, *rest: Any) -> Tensor:
        self._note(noise_label)
        answer: Tensor = super().embed(noise_label, *rest)  # type: ignore[misc]  # of the base
        return answer


def networks_of(model: nn.Module) -> list[Network]:
    """The networks of a model, without those inside of another."""
    found: list[Network] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, Network) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of a model are whole numbers."""
    return any(network.quantized is not None for network in networks_of(model))


def layers_of(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions and linear layers by name, quantized or not."""
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, Layer))


def simulate(network: Network, told: Quantized) -> None:
    """Let a network answer as one of few bits, its weights still floats, its ranges empty.

    Raises UserError where it has no layer to quantize, or is quantized.
    """
    if network.quantized is not None:
        raise UserError("the model is quantized; quantize the one that it was made of")
    levels, layers = Levels(), [layer for _, layer in layers_of(network)]
    if not layers:
        raise UserError(f"{an(type(network).__name__)} has no convolution or linear layer of torch's to quantize")
    network.quantized = told
    for layer in layers:
        _equip(layer, told, levels)
        become(layer, Simulated)
    if told.buckets > 1:
        _note_levels(network, told, levels)


def store(network: Network) -> None:
    """Keep of a simulated network's weights the whole numbers alone."""
    for _, layer in layers_of(network):
        weight = layer._parameters.pop("weight").detach()
        step, offset = grid(*of_channels(weight), layer.told.bits)
        become(layer, Stored)
        codes = packed(encoded(weight, step, offset, layer.told.bits), layer.told.bits)
        _buffers(layer, weight.shape, codes=codes, step=step, offset=offset)


def empty(network: Network, told: Quantized) -> None:
    """Give a fresh network the layers of a stored one, to be filled from a file."""
    simulate(network, told)
    store(network)


def count_parameters(model: nn.Module) -> int:
    """Of a model, whole numbers included."""
    whole = sum(m.shape.numel() for m in model.modules() if isinstance(m, Stored))
    return whole + sum(p.numel() for p in model.parameters())


def _equip(layer: Any, told: Quantized, levels: Levels) -> None:
    layer.told, layer.levels, layer.watch = told, levels, None
    if told.activation_bits:
        ranges = layer.weight.new_zeros(told.buckets)
        _buffers(layer, low=ranges, high=ranges.clone())


def _note_levels(network: Network, told: Quantized, levels: Levels) -> None:
    own, like = type(network), next(network.parameters())
    role = _PartsByLevel if hasattr(own, "embed") else _ByLevel
    if (role, own) not in _CLASSES:
        _CLASSES[role, own] = type(own.__name__, (role, own), {})  # of the same name, which describes it
    network.__class__ = _CLASSES[role, own]
    cast(Any, network).levels = levels
    network.register_buffer("edges", like.new_zeros(told.buckets - 1))


def _buffers(layer: nn.Module, shape: torch.Size | None = None, **tensors: Tensor) -> None:
    if shape is not None:
        cast(Stored, layer).shape = shape
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor)
