"""Pictures as an encoder's network sees them: size, channels and normalisation (`types.View`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.types import UserError, View


def seen(images: Tensor, view: View) -> Tensor:
    """[N, C, H, H] in [-1, 1] -> [N, view.channels, view.side, view.side], normalised; differentiable.

    Raises UserError for images that are not square, or of a number of channels that the network cannot take.
    """
    x = _resized(images, view)
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (view.mean, view.std))
    return (x - (2 * mean - 1)) / (2 * std)


def _resized(images: Tensor, view: View) -> Tensor:
    channels, height, width = images.shape[1:]
    if height != width:
        raise UserError(f"this encoder takes square images, got {height} x {width}")
    if channels not in (1, view.channels):
        raise UserError(f"this extractor takes images of {view.channels} channel(s), got {channels}")
    if view.resize == "box":
        return fitted(images, view.side, view.channels)
    size = (view.side, view.side)
    if view.resize == "tensorflow":
        images = resize_bilinear_tf1(images, size)
    elif height != view.side:
        images = nn.functional.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        images = images.clamp(-1, 1)
    return images.expand(-1, view.channels, -1, -1)


def fit(images: npt.NDArray[np.uint8], resolution: int, channels: int) -> Tensor:
    """`fitted`, of uint8 [n, H, H, C]: float32 [n, channels, resolution, resolution] in [-1, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise UserError(f"images must be uint8 [n, H, H, C], got {images.dtype} {list(images.shape)}")
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return fitted(x, resolution, channels)


def fitted(x: Tensor, resolution: int, channels: int) -> Tensor:
    """[n, C, H, H] -> [n, channels, resolution, resolution]; differentiable.

    Larger images are averaged over boxes, smaller ones repeat their pixels (which averaging undoes exactly); where
    neither size divides the other they are interpolated (bilinear, antialiased). Grey images repeat their channel.
    Raises UserError on any other channel count.
    """
    size, have = x.shape[2], x.shape[1]
    if have not in (1, channels):
        raise UserError(f"this extractor takes images of {channels} channel(s), got {have}")
    if size >= resolution and size % resolution == 0:
        x = nn.functional.avg_pool2d(x, size // resolution) if size > resolution else x
    elif resolution % size == 0:
        x = x.repeat_interleave(resolution // size, dim=2).repeat_interleave(resolution // size, dim=3)
    else:
        x = nn.functional.interpolate(
            x, size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=True
        )
    return x.expand(-1, channels, -1, -1)


def resize_bilinear_tf1(x: Tensor, size: tuple[int, int]) -> Tensor:
    """TensorFlow 1's bilinear resize, align_corners=False: output pixel i reads position i * (in / out).

    x: float [N, C, H, W]; size: (height, width). The scale is rounded to float32 as the original does;
    positions past the last pixel repeat it. Width is interpolated first, then height, without antialiasing.
    """
    for axis in (3, 2):
        length, wanted = x.shape[axis], size[axis - 2]
        scale = torch.tensor(length / wanted, dtype=torch.float32, device=x.device)
        position = torch.arange(wanted, dtype=x.dtype, device=x.device) * scale
        low = position.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        part = (position - low).view([-1 if i == axis else 1 for i in range(4)])
        below, above = x.index_select(axis, low), x.index_select(axis, high)
        x = below + (above - below) * part
    return x
