"""Non-leaking augmentation: random geometry that the network is told about, and told is absent when sampling.

Source: Karras et al. 2022 (EDM), appendix F.2 and table 6, after Karras et al. 2020 (StyleGAN2-ADA, appendix
B). Colour operations, which EDM leaves out, are left out.

Labels   one row per image, zero where an operation was not applied; in this order, of the operations that are on:

    xflip           1  1 if mirrored left to right
    yflip           1  1 if mirrored upside down
    rotate_int      2  quarter turns k = 0..3: (k is 1 or 2, k is 2 or 3)
    translate_int   2  shift (right, up) / (translate_int_max * size), about -1..1
    scale           1  w; the image grows by 2^(scale_std w)
    rotate_frac     2  cos(angle) - 1, sin(angle); angle in radians, counter-clockwise as seen
    aniso           2  w cos(direction), w sin(direction); grows by 2^(aniso_std w) that way, shrinks across it
    translate_frac  2  shift (right, down) / (translate_frac_std * size)

w and the fractional shifts are standard normal, angles and directions uniform. What comes in from outside the image is
its reflection. As published, aniso's label is the same for (w, direction) and (-w, opposite direction).

Departs  Images that no geometric operation moves are not filtered, and come back bit for bit; the official pipe sends
         the whole batch through the warp, which changes them by rounding.
Checked  images and labels of the official pipe on equal draws (`tests/parity`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from imagewright.types import Noise, UserError

# The low-pass filter of the least asymmetric Daubechies wavelet with 12 taps (Daubechies 1992, table 6.3). It
# is orthonormal to its shifts by two, so halving the resolution undoes doubling it.
SYM6 = (
    0.015404109327044805,
    0.003490712084222162,
    -0.11799011114851977,
    -0.04831174258569758,
    0.4910559419279738,
    0.7876411410286507,
    0.33792942172816565,
    -0.07263752278637652,
    -0.021060292512370852,
    0.04472490177078131,
    0.0017677118642539882,
    -0.007800708325032378,
)
LABEL_WIDTHS = {
    "xflip": 1,
    "yflip": 1,
    "rotate_int": 2,
    "translate_int": 2,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Geometric augmentation of a batch. The defaults are EDM's for small data sets: labels of 9 numbers.

    p: probability of each operation, in [0, 1]. The operations' own fields multiply it (0: off, without
    labels; 1e8: always considered, so that one image in two is mirrored at any p > 0). The others are the
    operations' sizes: largest shift and standard deviation of the shift as shares of the image size, largest
    angle as a share of half a turn to either side, log2 standard deviations of the scalings, and the
    probability that an anisotropic scaling is not along the axes.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    rotate_int: float = 0.0
    translate_int: float = 0.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    translate_int_max: float = 0.125
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            limit = 1.0 if field.name in ("p", "aniso_rotate_prob", "rotate_frac_max") else math.inf
            if not (math.isfinite(value) and 0 <= value <= limit):
                allowed = "in [0, 1]" if limit == 1 else ">= 0 and finite"
                raise UserError(f"Augment.{field.name} must be {allowed}, got {value}")

    @property
    def augment_dim(self) -> int:
        """Numbers in a label: what the network's `augment_dim` has to be."""
        return sum(width for name, width in LABEL_WIDTHS.items() if getattr(self, name) > 0)

    def __call__(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """images: float [N, C, H, W], H, W >= 2. Returns new images and labels, float32 [N, augment_dim].

        Every image takes the same number of draws from `noise` whatever happens to it. Images with a zero
        label come back bit for bit. Raises ValueError for integer images, and for rotate_int on images that
        are not square.
        """
        if not images.is_floating_point():
            raise ValueError(f"augmentation needs floating-point images, got {images.dtype}")
        draw = _Draws(images, noise, self.p)
        images, blit_labels = self._blit(images, draw)
        inverse, moved, warp_labels = self._geometry(images, draw)
        if moved.any():
            images = images.clone()
            images[moved] = warp(images[moved], inverse[moved])
        labels = [images.new_zeros(len(images), 0), *blit_labels, *warp_labels]
        return images, torch.cat([label.reshape(len(images), -1) for label in labels], dim=1).float()

    def _blit(self, images: Tensor, draw: _Draws) -> tuple[Tensor, list[Tensor]]:
        """The operations that move whole pixels, in order, and their labels."""
        labels = []
        if self.xflip > 0:
            flip = (draw.uniform() >= 0.5) & draw.applies(self.xflip)
            images = torch.where(_wide(flip), images.flip(3), images)
            labels.append(flip.to(images.dtype))
        if self.yflip > 0:
            flip = (draw.uniform() >= 0.5) & draw.applies(self.yflip)
            images = torch.where(_wide(flip), images.flip(2), images)
            labels.append(flip.to(images.dtype))
        if self.rotate_int > 0:
            turns = (draw.uniform() * 4).floor() * draw.applies(self.rotate_int)
            images, label = quarter_turns(images, turns)
            labels.append(label)
        if self.translate_int > 0:
            reach = self.translate_int_max * images.new_tensor(images.shape[:1:-1])  # of width, of height
            shift = ((2 * draw.uniform(2) - 1) * reach).round() * draw.applies(self.translate_int)[:, None]
            images = shift_reflecting(images, shift[:, 0].long(), shift[:, 1].long())
            labels.append(shift / reach.clamp(min=torch.finfo(reach.dtype).tiny))
        return images, labels

    def _geometry(self, images: Tensor, draw: _Draws) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Inverse transforms [N, 3, 3] from output to input, which images they move [N], and the labels.

        Matrices act on (x, y, 1) in pixels, x to the right and y down, from the centre of the image.
        """
        count, (height, width) = len(images), images.shape[2:]
        inverse = torch.eye(3, dtype=images.dtype, device=images.device).repeat(count, 1, 1)
        moved = torch.zeros(count, dtype=torch.bool, device=images.device)
        labels = []
        if self.scale > 0:
            w, applies = draw.normal(), draw.applies(self.scale)
            w = w * applies
            factor = torch.exp2(self.scale_std * w)
            inverse, moved = inverse @ _scaling(1 / factor, 1 / factor), moved | applies
            labels.append(w)
        if self.rotate_frac > 0:
            angle, applies = draw.angle() * self.rotate_frac_max, draw.applies(self.rotate_frac)
            angle = angle * applies
            inverse, moved = inverse @ _rotation(angle), moved | applies
            labels.append(torch.stack([angle.cos() - 1, angle.sin()], dim=1))
        if self.aniso > 0:
            w, direction, applies = draw.normal(), draw.angle(), draw.applies(self.aniso)
            w = w * applies
            direction = direction * draw.with_probability(self.aniso_rotate_prob)
            factor = torch.exp2(self.aniso_std * w)
            inverse = inverse @ _rotation(-direction) @ _scaling(1 / factor, factor) @ _rotation(direction)
            moved = moved | applies
            labels.append(torch.stack([w * direction.cos(), w * direction.sin()], dim=1))
        if self.translate_frac > 0:
            w, applies = draw.normal(2), draw.applies(self.translate_frac)
            w = w * applies[:, None]
            shift = self.translate_frac_std * w * w.new_tensor([width, height])
            inverse, moved = inverse @ _translation(-shift[:, 0], -shift[:, 1]), moved | applies
            labels.append(w)
        return inverse, moved, labels


@dataclass(frozen=True)
class _Draws:
    """Random numbers for a batch, each [N] or [N, k], and whether an operation happens."""

    images: Tensor
    noise: Noise
    p: float

    def _like(self, width: int | None) -> Tensor:
        count = len(self.images)
        return self.images.new_empty((count,) if width is None else (count, width))

    def normal(self, width: int | None = None) -> Tensor:
        return self.noise.normal(self._like(width))

    def uniform(self, width: int | None = None) -> Tensor:
        return self.noise.uniform(self._like(width))

    def angle(self) -> Tensor:
        return (2 * self.uniform() - 1) * math.pi

    def with_probability(self, probability: float) -> Tensor:
        return self.uniform() < probability

    def applies(self, multiplier: float) -> Tensor:
        return self.with_probability(multiplier * self.p)


# --- whole pixels -------------------------------------------------------------------------------------------


def quarter_turns(images: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each square image by turns [N] (0..3) quarters, counter-clockwise as seen. Also the labels [N, 2].

    Raises ValueError when the images are not square.
    """
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"rotate_int needs square images, got {images.shape[2]}x{images.shape[3]}")
    mirrored, turned_over = (turns == 1) | (turns == 2), (turns == 2) | (turns == 3)
    images = torch.where(_wide(mirrored), images.flip(3), images)
    images = torch.where(_wide(turned_over), images.flip(2), images)
    images = torch.where(_wide(turns % 2 == 1), images.transpose(2, 3), images)
    return images, torch.stack([mirrored, turned_over], dim=1).to(images.dtype)


def shift_reflecting(images: Tensor, right: Tensor, up: Tensor) -> Tensor:
    """Move each image by whole pixels, int64 [N], filling with its reflection (edge pixels not repeated)."""
    height, width = images.shape[2:]
    x = _reflect(torch.arange(width, device=images.device) - right[:, None], width)[:, None, None, :]
    y = _reflect(torch.arange(height, device=images.device) + up[:, None], height)[:, None, :, None]
    rows = images.gather(2, y.expand(-1, images.shape[1], -1, width))
    return rows.gather(3, x.expand(-1, images.shape[1], height, -1))


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold any integer into 0..size-1 by reflection at the end pixels."""
    around = index % (2 * size - 2)
    return torch.minimum(around, 2 * size - 2 - around)


def _wide(flag: Tensor) -> Tensor:
    return flag[:, None, None, None]


# --- warping ------------------------------------------------------------------------------------------------


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Affine transforms of images [N, C, H, W], at twice the resolution between two wavelet filters.

    inverse: [N, 3, 3], from output to input coordinates, in pixels from the centre (x right, y down). Where
    it points farther out than one reflection, the result fades to zero. Returns [N, C, H, W]; the images
    themselves, up to rounding, for the identity.
    """
    height, width = images.shape[2:]
    taps = len(SYM6) // 4  # output pixels that the filter needs beyond each edge
    left, right, top, bottom = _margins(inverse, height, width, 2 * taps)
    padded = F.pad(images, (left, right, top, bottom), mode="reflect")
    fine = _double(padded)

    offset = inverse.new_tensor([(left - right) / 2, (top - bottom) / 2])
    inverse = _translation(*offset) @ inverse
    # To pixels of twice the resolution. The filter's centre of mass lies half a fine pixel before its middle,
    # which a rotation about the middle would show as a drift.
    two, half = inverse.new_tensor(2.0), inverse.new_tensor(0.5)
    inverse = _scaling(two, two) @ inverse @ _scaling(half, half)
    inverse = _translation(-half, -half) @ inverse @ _translation(half, half)

    size = (2 * (height + 2 * taps), 2 * (width + 2 * taps))
    # affine_grid and grid_sample count from -1 to 1 between the outer edges of the outermost pixels.
    to_unit = _scaling(*inverse.new_tensor([2 / fine.shape[3], 2 / fine.shape[2]]))
    from_unit = _scaling(*inverse.new_tensor([size[1] / 2, size[0] / 2]))
    theta = (to_unit @ inverse @ from_unit)[:, :2]
    grid = F.affine_grid(theta, [*images.shape[:2], *size], align_corners=False)
    sampled = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _halve(sampled)[:, :, taps:-taps, taps:-taps]


def _margins(inverse: Tensor, height: int, width: int, extra: int) -> tuple[int, int, int, int]:
    """Pixels of reflection that the batch needs: left, right, top, bottom, each at most size - 1."""
    half = inverse.new_tensor([(width - 1) / 2, (height - 1) / 2])
    signs = inverse.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    corners = F.pad(signs * half, (0, 1), value=1.0)  # [4, 3]
    points = (corners @ inverse.transpose(1, 2))[..., :2].flatten(0, 1)  # [4 N, 2]
    limit = inverse.new_tensor([width - 1, height - 1])
    before = (-points.amin(0) - half + extra).clamp(min=0).minimum(limit).ceil()
    after = (points.amax(0) - half + extra).clamp(min=0).minimum(limit).ceil()
    left, top, right, bottom = (int(v) for v in torch.cat([before, after]).tolist())
    return left, right, top, bottom


def _double(images: Tensor) -> Tensor:
    """Twice the resolution: each pixel leaves a copy of the filter. [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    across, down = _filters(images)
    pad, channels = len(SYM6) // 2 - 1, images.shape[1]
    images = F.conv_transpose2d(images, across, stride=(1, 2), padding=(0, pad), groups=channels)
    return F.conv_transpose2d(images, down, stride=(2, 1), padding=(pad, 0), groups=channels)


def _halve(images: Tensor) -> Tensor:
    """Half the resolution, the transpose of `_double` as a matrix. [N, C, 2 H, 2 W] -> [N, C, H, W]."""
    across, down = _filters(images)
    pad, channels = len(SYM6) // 2 - 1, images.shape[1]
    images = F.conv2d(images, across, stride=(1, 2), padding=(0, pad), groups=channels)
    return F.conv2d(images, down, stride=(2, 1), padding=(pad, 0), groups=channels)


def _filters(images: Tensor) -> tuple[Tensor, Tensor]:
    """SYM6 along x, [C, 1, 1, 12], and along y, [C, 1, 12, 1]."""
    taps = images.new_tensor(SYM6).repeat(images.shape[1], 1)
    return taps[:, None, None, :], taps[:, None, :, None]


# --- matrices -----------------------------------------------------------------------------------------------


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _rotation(angle: Tensor) -> Tensor:
    one, zero, cos, sin = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])
