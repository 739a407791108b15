"""The small parts of the EDM family's U-Nets: initialisation, normalisation, resampling, embeddings.

Source   Karras et al. 2022 (arXiv 2206.00364), table of architectures; Song et al. 2021 (arXiv 2011.13456);
         Dhariwal and Nichol 2021 (arXiv 2105.05233).
Keys     Every learned tensor carries the name it has in the published checkpoints. Resampling kernels are
         constants and are left out of the state dict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.tangents import Conv2d, GroupNorm
from imagewright.types import Condition, UserError

# --- initialisation -----------------------------------------------------------------------------------------


CUT_STD = 0.87962566103423978
"""Standard deviation of a standard normal that is cut at +-2."""


@dataclass(frozen=True)
class Init:
    """How a layer's weight and bias are drawn: a standard scheme, times a gain for each (0 = zeros)."""

    scheme: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal", "lecun_normal"]
    weight: float = 1.0
    bias: float = 0.0

    @torch.no_grad()
    def fill(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Draw the layer's parameters in place; the bias uses the fans of the weight."""
        receptive = layer.weight[0, 0].numel()
        fan_in, fan_out = layer.weight.shape[1] * receptive, layer.weight.shape[0] * receptive
        self._draw(layer.weight, self.weight, fan_in, fan_out)
        if layer.bias is not None:
            self._draw(layer.bias, self.bias, fan_in, fan_out)

    def _draw(self, tensor: Tensor, gain: float, fan_in: int, fan_out: int) -> None:
        match self.scheme:
            case "xavier_uniform":
                bound = gain * math.sqrt(6 / (fan_in + fan_out))
                tensor.uniform_(-bound, bound)
            case "kaiming_uniform":
                bound = gain * math.sqrt(3 / fan_in)
                tensor.uniform_(-bound, bound)
            case "kaiming_normal":
                tensor.normal_(0.0, gain * math.sqrt(1 / fan_in))
            case "lecun_normal" if gain == 0:
                tensor.zero_()
            case "lecun_normal":  # flax's default: cut at two deviations, and as wide as the uncut one
                std = gain * math.sqrt(1 / fan_in) / CUT_STD
                nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def linear(in_features: int, out_features: int, init: Init, *, bias: bool = True) -> nn.Linear:
    """A fully connected layer with drawn parameters."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    init.fill(layer)
    return layer


def conv(in_channels: int, out_channels: int, kernel: int, init: Init, *, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the resolution (odd kernel), with drawn parameters."""
    layer = Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
    init.fill(layer)
    return layer


def group_norm(channels: int, *, eps: float, groups: int | None = None) -> GroupNorm:
    """Group normalisation with `groups` groups, or, where they are None, at most 32 of at least 4 channels.

    Where that number does not divide the channels, the largest smaller number that does is taken. Raises UserError for
    groups that cannot share the channels.
    """
    if groups is not None:
        if channels % groups:
            raise UserError(f"a normalisation of {channels} channels cannot have {groups} groups of equal size")
        return GroupNorm(groups, channels, eps=eps)
    most = max(1, min(32, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=eps)


# --- resampling ---------------------------------------------------------------------------------------------


def fir_kernel(taps: Sequence[float]) -> Tensor:
    """The separable kernel [1, 1, K, K] of sum 1. Raises UserError on an odd number of taps or a zero sum."""
    if len(taps) % 2 or sum(taps) == 0:
        raise UserError(f"resample_filter is {list(taps)}; it must be an even number of taps with a nonzero sum")
    t = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(t, t)[None, None] / t.sum().square()


class Resample(nn.Module):
    """Halves or doubles the resolution of [N, C, H, W] with a separable filter; outside the image is zero.

    padded=False leaves the border out when halving, for an input that was padded before.
    Two equal taps are the 2x2 average and the nearest neighbour, which have faster kernels.
    """

    kernel: Tensor

    def __init__(self, direction: Literal["up", "down"], taps: Sequence[float], *, padded: bool = True) -> None:
        super().__init__()
        self.direction = direction
        self.is_box = len(taps) == 2 and taps[0] == taps[1]
        self.padding = (len(taps) - 1) // 2 if padded else 0
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_box:
            return F.avg_pool2d(x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=channels)
        return F.conv_transpose2d(x, kernel * 4, stride=2, padding=self.padding, groups=channels)


class UpConv(Conv2d):
    """Doubles the resolution, then convolves."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, init: Init, taps: Sequence[float]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        init.fill(self)
        self.resample = Resample("up", taps)
        # A pointwise convolution commutes with copying pixels, and is four times cheaper before it.
        self.convolve_first = kernel == 1 and self.resample.is_box

    def forward(self, x: Tensor) -> Tensor:
        if self.convolve_first:
            return self.resample(super().forward(x))  # type: ignore[no-any-return]
        return super().forward(self.resample(x))


class DownConv(Conv2d):
    """Halves the resolution, then convolves."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, init: Init, taps: Sequence[float]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        init.fill(self)
        self.resample = Resample("down", taps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.resample(x))


class ConvDown(Conv2d):
    """Convolves, padded for both operations, then halves the resolution (residual pyramid of NCSN++)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, init: Init, taps: Sequence[float]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2 + (len(taps) - 1) // 2)
        init.fill(self)
        self.resample = Resample("down", taps, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(super().forward(x))  # type: ignore[no-any-return]


# --- embeddings of the noise level --------------------------------------------------------------------------


class PositionalEmbedding(nn.Module):
    """Cosines then sines of geometrically spaced frequencies from 1 down to 1 / 10000 (DDPM++ and ADM).

    endpoint=True reaches 1 / 10000 exactly (DDPM++), otherwise the series stops one step before (ADM).
    forward: [N] -> [N, num_channels].
    """

    def __init__(self, num_channels: int, *, endpoint: bool = False) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.endpoint = endpoint

    def forward(self, noise_label: Tensor) -> Tensor:
        half = self.num_channels // 2
        # Not a buffer: a module cast to half precision would round the frequencies.
        exponent = torch.arange(half, dtype=torch.float32, device=noise_label.device) / (half - self.endpoint)
        angles = torch.outer(noise_label, ((1 / 10000) ** exponent).to(noise_label.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_sines(side: int, width: int) -> Tensor:
    """Positions of a square of tokens, [side^2, width]: sines and cosines of the column, then of the row (DiT)."""
    count = width // 4
    rates = 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    each = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    rows, columns = each[:, None].expand(-1, side, -1), each[None].expand(side, -1, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1).float()


class FourierEmbedding(nn.Module):
    """Cosines then sines of fixed random frequencies of standard deviation `scale` (NCSN++).

    The frequencies are drawn once and belong to the weights. forward: [N] -> [N, num_channels].
    """

    freqs: Tensor

    def __init__(self, num_channels: int, *, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, noise_label: Tensor) -> Tensor:
        angles = torch.outer(noise_label, (2 * math.pi * self.freqs).to(noise_label.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class ToldNumber(nn.Module):
    """A further number in a network's embedding, inert until it is trained: its last layer begins as zeros.

    A positional embedding and two layers, as the noise level has them. forward: [N] -> [N, out_channels].
    """

    def __init__(self, num_channels: int, out_channels: int, init: Init) -> None:
        super().__init__()
        self.waves = PositionalEmbedding(num_channels)
        self.layer0 = linear(num_channels, out_channels, init)
        self.layer1 = linear(out_channels, out_channels, Init(init.scheme, weight=0))

    def forward(self, number: Tensor) -> Tensor:
        told: Tensor = self.layer1(F.silu(self.layer0(self.waves(number).to(self.layer0.weight.dtype))))
        return told


def one_hot(label: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """int64 [N] in [-1, classes) -> [N, classes]; -1 is a row of zeros. Raises on a label out of range."""
    return F.one_hot(label + 1, classes + 1)[:, 1:].to(dtype)


def class_index(cond: Condition, classes: int, n: int, device: torch.device) -> Tensor:
    """The row of a table of classes + 1 rows for each of n images, int64 [N]; the last row stands for no class.

    A network without classes looks at no label. Raises UserError for a label that is no class, nor -1: on the CPU only,
    as a host would have to wait for labels elsewhere (whoever put them there has checked them), and not when compiled.
    """
    if cond.label is None or not classes:
        return torch.full((n,), classes, dtype=torch.int64, device=device)
    if cond.label.device.type == "cpu" and not torch.compiler.is_compiling():
        _require_classes(cond.label, classes)
    return torch.where(cond.label < 0, classes, cond.label)


def _require_classes(label: Tensor, classes: int) -> None:
    wrong = (label < -1) | (label >= classes)
    if bool(wrong.any()):
        raise UserError(f"label {int(label[wrong][0])} is no class; they are 0 to {classes - 1}, or -1 = none")
