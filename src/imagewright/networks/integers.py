"""Products of whole numbers for stored networks of few bits: as the same numbers in floats, and in less time.

Arithmetic a layer's inputs and weights are whole numbers times a step (`networks.quantized`), so its sums are of 8-bit
           products, exact in 32 bits, and are floats again once they are done. A weight's whole number, code + offset,
           has to lie in -128 .. 127; where a channel's do not, a constant is taken off them and given back: as many
           times the sum of the inputs, which one more channel of ones counts.
Backend    PyTorch's oneDNN (`torch.ops.onednn`), which its own compiler lowers 8-bit networks to, on processors that
           add 8-bit products without losing any (VNNI, AMX): one example is counted before it is trusted.
Left       in floats: layers whose inputs have no range (the first), or one without 0, which padding is made of; calls
           of images of several noise levels with ranges of their own; grouped layers that would need the channel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagewright.networks.quantized import Stored, become, encoded, grid, networks_of
from imagewright.types import UserError

LOW, HIGH = -128, 127
"""Of a weight's whole number."""
LEAST = 4_000_000
"""Products that a call takes for whole numbers to be faster than floats."""
AFTER: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
"""What oneDNN is to do with sums: make them floats."""
ZERO = 255
"""Greatest code that 0 may have among the inputs."""


def with_integers(model: nn.Module) -> None:
    """Let a stored model's layers multiply whole numbers from now on; it answers as before but for rounding.

    Raises UserError where the model has no layer for it, or the processor no such products.
    """
    stored = [m for network in networks_of(model) for m in network.modules() if isinstance(m, Stored)]
    if not stored:
        raise UserError("its weights are floats; int8 multiplies the whole numbers of `imagewright tune quantize`")
    if stored[0].codes.device.type != "cpu" or not _exact():
        raise UserError(
            "int8 needs a CPU that adds 8-bit products (VNNI or AMX), and oneDNN in PyTorch; this device has none"
        )
    made = [Prepared.of(layer) for layer in stored]
    if not any(made):
        raise UserError(
            "none of its layers has a range of inputs with 0 in it; int8 needs one (`tune quantize --activations 8`)"
        )
    for layer, prepared in zip(stored, made, strict=True):
        weight = layer.weight
        become(layer, Integral)
        cast(Integral, layer).prepared, cast(Integral, layer).unpacked = prepared, weight


class Prepared:
    """A layer's weight as oneDNN wants it, with what turns its sums into floats.

    ranges: the step and the code of 0 of each bucket's inputs, then of the hull of all.
    """

    def __init__(self, layer: Any, ranges: list[tuple[float, int]]) -> None:
        shape = layer.shape
        whole = _whole(layer)
        self.extra = _beyond(whole)
        whole = whole - self.extra.view(-1, *(1,) * (len(shape) - 1))
        self.scales = layer.step.flatten().float()
        self.back = (self.extra * self.scales).view(-1, *(1,) * (len(shape) - 2)) if self.extra.any() else None
        if self.back is not None:
            whole = torch.cat([whole, torch.ones_like(whole[:1])])
            self.scales = torch.cat([self.scales, torch.ones(1)])
        self.ranges, self.zeros = ranges, torch.zeros(len(whole), dtype=torch.int32)
        self.grids = [(torch.tensor(step), torch.tensor(-float(zero))) for step, zero in ranges]
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        if self.bias is not None and self.back is not None:
            self.bias = torch.cat([self.bias, torch.zeros(1)])
        codes = whole.to(torch.int8).contiguous()
        if isinstance(layer, nn.Linear):
            self.like: tuple[Any, ...] = ()
            self.weight = torch.ops.onednn.qlinear_prepack(codes, None)
        else:
            self.like = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
            self.weight = torch.ops.onednn.qconv_prepack(codes, self.scales, *ranges[0], *self.like)

    @classmethod
    def of(cls, layer: Any) -> Prepared | None:
        """None where a layer stays with floats."""
        bits = layer.told.activation_bits
        if not bits or isinstance(getattr(layer, "padding", ()), str) or not bool((layer.high > layer.low).all()):
            return None
        low, high = torch.cat([layer.low, layer.low.amin()[None]]), torch.cat([layer.high, layer.high.amax()[None]])
        step, offset = grid(low, high, bits)
        if not bool(((offset <= 0) & (offset >= -ZERO)).all()):
            return None
        if getattr(layer, "groups", 1) > 1 and bool(_beyond(_whole(layer)).any()):
            return None
        return cls(layer, [(float(s), -int(o)) for s, o in zip(step, offset, strict=True)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        """Itself, as nothing in it changes; oneDNN's weights cannot be copied."""
        return self

    def answer(self, codes: Tensor, bucket: int) -> Tensor:
        """What the layer says of inputs' codes, uint8 of its inputs' shape, float32."""
        told = (codes, *self.ranges[bucket], self.weight, self.scales, self.zeros, self.bias)
        if not self.like:
            answer: Tensor = torch.ops.onednn.qlinear_pointwise(*told, *AFTER)
            return answer if self.back is None else torch.addcmul(answer[..., :-1], answer[..., -1:], self.back)
        answer = torch.ops.onednn.qconv2d_pointwise(*told, *self.like, *AFTER)
        return answer if self.back is None else torch.addcmul(answer[:, :-1], answer[:, -1:], self.back)


class Integral(Stored):
    """The layer that multiplies whole numbers where it can; else its weight is unpacked once."""

    prepared: Prepared | None
    unpacked: Tensor

    @property
    def weight(self) -> Tensor:
        """In floats."""
        return self.unpacked

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = self._counted(input) if weight is self.unpacked else None
        return super()._conv_forward(input, weight, bias) if found is None else found

    def product(self, x: Tensor) -> Tensor:
        """Of a linear layer."""
        found = self._counted(x)
        return super().product(x) if found is None else found

    def _counted(self, x: Tensor) -> Tensor | None:
        if self.prepared is None or x.dtype != torch.float32 or self._products(x) < LEAST:
            return None
        bucket = self._bucket(x)
        if bucket is None:
            return None
        codes = encoded(x, *self.prepared.grids[bucket], self.told.activation_bits)
        return self.prepared.answer(codes.to(torch.int32).to(torch.uint8), bucket)  # thrice as fast as at once

    def _products(self, x: Tensor) -> int:
        """Of numbers, that a call takes."""
        channels, apart = (x.shape[1], math.prod(self.stride)) if isinstance(self, nn.Conv2d) else (x.shape[-1], 1)
        return x.numel() // channels // apart * self.unpacked.numel()

    def _bucket(self, x: Tensor) -> int | None:
        """That of all images of a call, -1 for the hull of all buckets; None where they are of several."""
        index = self.levels.index
        if index is None or len(self.low) == 1:
            return 0
        if len(index) != len(x):
            return -1
        return self.levels.common


def _whole(layer: Stored) -> Tensor:
    """code + offset of each weight, as floats."""
    return (layer.weight / layer.step).round()


def _beyond(whole: Tensor) -> Tensor:
    """What has to be taken off each channel's whole numbers so that they have 8 bits."""
    low, high = whole.flatten(1).aminmax(dim=1)
    return torch.where((low < LOW) | (high > HIGH), low - LOW, torch.zeros_like(low))


@lru_cache
def _exact() -> bool:
    """Whether this processor's sums of the greatest 8-bit products are right: 16 bits do not hold two of them."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    codes, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((16, 64), HIGH, dtype=torch.int8)
    zeros, ones = torch.zeros(16, dtype=torch.int32), torch.ones(16)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    found = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, packed, ones, zeros, None, *AFTER)
    return bool((found == 255 * HIGH * 64).all())
