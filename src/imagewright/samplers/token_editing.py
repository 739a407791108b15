"""Editing with a masked token model (Chang et al. 2022, MaskGIT, arXiv 2202.04200, section 4.3): no further training.

The picture is encoded, the tokens of the region to draw (grown by one where a token's pixels depend on its neighbours)
become unknown, and are decoded from pass 2 of 12, under the picture's class or another (by a causal model one after the
other, each from those before it: `samplers.raster`; by one of random orders after all that is known:
`samplers.randomized_parallel`). What comes back is laid over the picture through the mask of those
tokens, blurred by 15/16 of a token's side. Any model of tokens will do, of a codebook or of pixels. Extending a picture
beyond its edge is the same on a canvas that is moved by half: `Outpainting`.

Departs  Every token that the region touches is drawn, and those next to it; of a box that is not on the tokens' grid
         the released program may leave out the far side's. 15/16 is that program's blur at 256 x 256 pixels (in pixels,
         one less than there are tokens along a side). The mask is enlarged to pixels by the nearest neighbour, and its
         border's values go on outside when it is blurred; the released program lets an imaging library do both
         (bicubic; boxes in place of a Gaussian).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from imagewright.samplers.masked_decoding import MaskedDecoding
from imagewright.samplers.randomized_parallel import RandomizedParallel
from imagewright.samplers.raster import Raster
from imagewright.types import UNCONDITIONAL, Condition, Noise, TokenModel, UserError

Side = Literal["left", "right", "top", "bottom"]
BLUR = 15 / 16
"""Published deviation of the mask's blur, in units of a token's side (15 pixels of 16)."""


@dataclass(frozen=True, kw_only=True)
class TokenEditing:
    """Draws a region of a picture anew."""

    decoding: MaskedDecoding | RandomizedParallel | Raster = MaskedDecoding(num_steps=12)
    start: int = 2
    """The first pass of masked decoding, from 0; those before would have left more unknown than an edit does."""
    blur: float | None = None
    """Deviation of the mask's blur, in pixels; None = 15/16 of a token's side, and no blur where a token is a pixel."""

    def __post_init__(self) -> None:
        if isinstance(self.decoding, MaskedDecoding) and not 0 <= self.start < self.decoding.num_steps:
            raise UserError(f"start is {self.start}; it must lie in 0 .. {self.decoding.num_steps - 1}")
        if self.blur is not None and not 0 <= self.blur < math.inf:
            raise UserError(f"blur is {self.blur}; it must be >= 0 and finite")

    @property
    def nfe(self) -> int:
        """Network evaluations per image, of masked decoding."""
        assert isinstance(self.decoding, MaskedDecoding)
        return self.decoding.nfe // self.decoding.num_steps * (self.decoding.num_steps - self.start)

    @torch.no_grad()
    def __call__(
        self,
        model: TokenModel,
        picture: Tensor,
        region: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise,
    ) -> Tensor:
        """picture: [N, C, H, W] in [-1, 1]. region: bool [H, W], what is to be drawn. Returns [N, C, H, W].

        Raises UserError for a model that fills in tokens in one order only.
        """
        codec: Any = model.codec
        tokens = codec.encode(picture)
        places = codec.places(region.to(tokens.device))
        unknown = tokens.masked_fill(places, codec.values)
        if isinstance(self.decoding, MaskedDecoding):
            drawn = self.decoding.fill(model, unknown, cond, noise=noise, start=self.start)
        else:
            drawn = self.decoding.fill(model, unknown, cond, noise=noise)
        weight = self._weight(region, codec, places).to(picture)
        edited: Tensor = picture + weight * (codec.decode(drawn).to(picture) - picture)
        return edited

    def _weight(self, region: Tensor, codec: Any, places: Tensor) -> Tensor:
        """How much of what was drawn each pixel takes, [H, W]. places: bool [length], the tokens that were drawn."""
        side = math.isqrt(codec.length)
        if codec.length >= region.numel():  # a token is a pixel's, or a part of one
            return blurred(region, self.blur or 0.0)
        drawn = F.interpolate(places.view(1, 1, side, side).float(), size=region.shape, mode="nearest")[0, 0]
        factor = region.shape[0] / side
        return blurred(drawn > 0, BLUR * factor if self.blur is None else self.blur)


def blurred(region: Tensor, deviation: float) -> Tensor:
    """bool [H, W] as float32 weights in [0, 1], convolved with a Gaussian; the border's values go on outside."""
    weights = region.float()
    if not deviation:
        return weights
    reach = min(math.ceil(3 * deviation), *(side - 1 for side in region.shape))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    taps = (taps / taps.sum()).to(weights.device)
    padded = F.pad(weights[None, None], (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, taps.view(1, 1, 1, -1))
    return F.conv2d(across, taps.view(1, 1, -1, 1))[0, 0].clamp(0, 1)


@dataclass(frozen=True)
class Outpainting:
    """A picture that is to go on beyond one side, by half of itself."""

    side: Side

    def region(self, height: int, width: int) -> Tensor:
        """What is free of the canvas: bool [H, W]."""
        free = self._face_right(torch.zeros(height, width, dtype=torch.bool)).clone()
        free[..., free.shape[-1] // 2 :] = True
        return self._turn_back(free)

    def canvas(self, pictures: Tensor) -> Tensor:
        """[N, C, H, W] moved away from the side by half, the free part 0."""
        facing = self._face_right(pictures)
        kept = facing.shape[-1] // 2
        moved = torch.zeros_like(facing)
        moved[..., :kept] = facing[..., -kept:]
        return self._turn_back(moved)

    def join(self, pictures: Tensor, filled: Tensor) -> Tensor:
        """The pictures [N, C, H, W] and the filled canvas in one, half as large again towards the side."""
        first, second = self._face_right(pictures), self._face_right(filled)
        outside = first.shape[-1] - first.shape[-1] // 2
        return self._turn_back(torch.cat([first[..., :outside], second], -1))

    def _face_right(self, x: Tensor) -> Tensor:
        """Turned so that the side is on the right."""
        x = x.transpose(-1, -2) if self.side in ("top", "bottom") else x
        return x.flip(-1) if self.side in ("left", "top") else x

    def _turn_back(self, x: Tensor) -> Tensor:
        x = x.flip(-1) if self.side in ("left", "top") else x
        return x.transpose(-1, -2) if self.side in ("top", "bottom") else x
