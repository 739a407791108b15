"""Fourier layers over the times of a trajectory, put behind the residual blocks of any of our U-Nets.

Source   Zheng et al. 2023 (DSNO, arXiv 2211.13449), section 3; the program devzhk/DSNO-pytorch (`models/layers.py`,
         `models/tddpmm.py`): y = x + LeakyReLU(K x), behind every residual block with its attention, of encoder and
         decoder and the first of the middle, not behind those that resample. K is rFFT over T, the lowest modes alone,
         each times a complex matrix of channels, inverse rFFT; in 32 bits whatever the network runs in.
Rows     The T times of an image are neighbouring rows of the batch, so that the network need not know of them.
Departs  The transforms are real sums over T, which is small, and a complex product is three real ones (Gauss's): the
         same numbers without complex ones. With fewer times than the modes need, those that exist are taken (one at
         T = 1), where the program fails. Imaginary parts of the mean (and, at T even, of the fastest mode) are without
         effect, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from imagewright.networks.unet import Role, UNet
from imagewright.precision import uncast
from imagewright.types import Condition


class TimeMixing(nn.Module):
    """x + LeakyReLU(K x) of features [N T, C, H, W], T rows an image."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        # Nearly nothing at first, so that a trained network begins as it is, at each time by itself.
        self.weight = nn.Parameter(torch.rand(channels, channels, modes, 2) / channels**2)

    def forward(self, x: Tensor, times: int) -> Tensor:
        with uncast(x.device):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            (c, h, w), weight = x.shape[1:], self.weight.to(wide.dtype)
            # In the order in which the features lie, so that nothing is moved.
            if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
                rows = wide.permute(0, 2, 3, 1).reshape(-1, times, h * w, c)
                mixed = spectral(rows, weight, -1).reshape(-1, h, w, c).permute(0, 3, 1, 2)
            else:
                mixed = spectral(wide.reshape(-1, times, c, h * w), weight, -2).reshape(-1, c, h, w)
            return wide + leaky_relu(mixed, inplace=True)


def spectral(x: Tensor, weight: Tensor, axis: int = -1) -> Tensor:
    """K x over the second axis: x real, [N, T, P, C] (axis -1) or [N, T, C, P] (axis -2); weight [C, C, modes, 2]."""
    n, times, *each = x.shape
    there, back = _waves(times, weight.shape[2])
    matrices = []
    for k in range(min(weight.shape[2], times // 2 + 1)):
        real, imaginary = weight[:, :, k].unbind(-1)
        matrices += [real] if _is_real(k, times) else [real, imaginary - real, real + imaginary]
    spectrum = (x.new_tensor(there) @ x.reshape(n, times, -1)).reshape(n, len(there), *each)
    mapped = _mapped(spectrum, torch.stack(matrices), axis)
    return (x.new_tensor(back) @ mapped.reshape(n, len(there), -1)).reshape(x.shape)


def _mapped(features: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Row m of the second axis times matrix m: [N, M, P, C] or [N, M, C, P]; matrix [M, C, C]."""
    channels, places = features.shape[axis], features.shape[-3 - axis]
    if places < channels:  # else the gradient of the matrices would be made for each image before it is summed
        return torch.einsum("nmpc,mcd->nmpd" if axis == -1 else "nmcp,mcd->nmdp", features, matrix)
    return features @ matrix if axis == -1 else matrix.mT @ features


def _is_real(mode: int, times: int) -> bool:
    return mode == 0 or 2 * mode == times


@cache
def _waves(times: int, modes: int) -> tuple[list[list[float]], list[list[float]]]:
    """Matrices [M, T] to the spectrum and [T, M] back, with what a complex product in three real ones needs.

    (a + ib)(R + iI) = (m1 - m3) + i (m1 + m2) of m1 = (a + b) R, m2 = a (I - R), m3 = b (R + I) (Gauss): a complex
    mode has three rows, a real one one.
    """
    there, back = [], []
    for k in range(min(modes, times // 2 + 1)):
        a = [math.cos(2 * math.pi * k * t / times) for t in range(times)]
        b = [-math.sin(2 * math.pi * k * t / times) for t in range(times)]
        if _is_real(k, times):
            there.append(a)
            back.append([each / times for each in a])
            continue
        both = [x + y for x, y in zip(a, b, strict=True)]
        there += [both, a, b]
        back += [[2 * each / times for each in row] for row in (both, b, [-each for each in a])]
    return there, [list(row) for row in zip(*back, strict=True)]


class TimeLayers(nn.ModuleDict):
    """The `TimeMixing` of every block of a U-Net that gets one, by the block's name with "_" for its dot."""

    def __init__(self, network: UNet, modes: int) -> None:
        super().__init__(
            {
                name.replace(".", "_"): TimeMixing(layer.out_channels, modes)
                for name, layer in network.plan().items()
                if modes and layer.role in (Role.BLOCK, Role.MERGE) and not layer.resample and layer.suffix != "in1"
            }
        )

    def of(self, network: UNet, times: int) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        """The U-Net with these layers behind its blocks, for rows of `times` an image; nothing is copied."""
        stages = {"enc": network.enc, "dec": network.dec}
        others: dict[str, nn.Module] = {}
        for name, mixing in self.items():
            stage, _, block = name.partition("_")
            others[f"{stage}.{block}"] = _Mixed(stages[stage][block], mixing, times)
        return network.with_blocks(others)


class _Mixed(nn.Module):
    """A block, then its layer over time."""

    def __init__(self, block: nn.Module, mixing: nn.Module, times: int) -> None:
        super().__init__()
        self.block, self.mixing, self.times = block, mixing, times

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        mixed: Tensor = self.mixing(self.block(x, emb), self.times)
        return mixed
