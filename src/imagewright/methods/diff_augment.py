"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv 2006.10738).

Colour (brightness, saturation, contrast), then a shift by whole pixels, then a square hole. Gradients pass through to
the images. What comes in from outside, and the hole, are 0: the middle grey of images in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from imagewright.types import Noise, UserError


@dataclass(frozen=True, kw_only=True)
class DiffAugment:
    """Random changes, drawn per image; 0 switches one off. The defaults are the paper's, but for the hole.

    Its side is a fifth of the image's, as in CTM's program (sony/ctm, `cutout_ratio`); the paper's is a half.

    brightness: largest number added to all values. saturation, contrast: largest relative change of the distance from
    the pixel's, the image's mean. translation, cutout: largest shift, side of the hole, as shares of the image's side.
    Raises UserError for a negative number, or a share above 1.
    """

    brightness: float = 0.5
    saturation: float = 1.0
    contrast: float = 0.5
    translation: float = 0.125
    cutout: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = 1.0 if field.name in ("translation", "cutout") else math.inf
            value = getattr(self, field.name)
            if not (0 <= value <= limit and value < math.inf):
                allowed = "lie in [0, 1]" if limit == 1 else "be >= 0 and finite"
                raise UserError(f"augment.{field.name} is {value}; it must {allowed}")

    def __call__(self, images: Tensor, noise: Noise) -> Tensor:
        """images: [N, C, H, W]. Returns the same shape; seven draws of [N] whatever is switched off."""
        like = images.detach()[:, 0, 0, 0]
        brightness, saturation, contrast, down, right, top, left = (noise.uniform(like) for _ in range(7))
        images = images + _column(self.brightness * (2 * brightness - 1))
        images = _stretched(images, images.mean(1, keepdim=True), self.saturation * (2 * saturation - 1))
        images = _stretched(images, images.mean((1, 2, 3), keepdim=True), self.contrast * (2 * contrast - 1))
        images = _shifted(_shifted(images, down, self.translation, 2), right, self.translation, 3)
        hole = (
            _covered(images, top, self.cutout, 2)[:, None, :, None]
            & _covered(images, left, self.cutout, 3)[:, None, None]
        )
        return images.masked_fill(hole, 0)


def _column(per_image: Tensor) -> Tensor:
    return per_image[:, None, None, None]


def _stretched(images: Tensor, mean: Tensor, by: Tensor) -> Tensor:
    """Distances from the mean made longer by a share; by: [N]."""
    return images + (images - mean) * _column(by)


def _shifted(images: Tensor, uniform: Tensor, share: float, axis: int) -> Tensor:
    """Each image moved along an axis by whole pixels, at most a share of its side; uniform: [N] in [0, 1)."""
    side = images.shape[axis]
    reach = int(side * share + 0.5)
    shift = (uniform * (2 * reach + 1)).floor().long() - reach
    source = torch.arange(side, device=images.device) - shift[:, None]  # [N, side]
    shape = (len(images), 1, side, 1) if axis == 2 else (len(images), 1, 1, side)
    moved = images.gather(axis, source.clamp(0, side - 1).reshape(shape).expand_as(images))
    return moved.masked_fill(((source < 0) | (source >= side)).reshape(shape), 0)


def _covered(images: Tensor, uniform: Tensor, share: float, axis: int) -> Tensor:
    """Which rows (or columns) the hole covers, [N, side]; its middle lies anywhere in the image."""
    side = images.shape[axis]
    length = int(side * share + 0.5)
    start = (uniform * (side + 1 - length % 2)).floor().long()[:, None] - length // 2
    position = torch.arange(side, device=images.device)
    return (position >= start) & (position < start + length)
