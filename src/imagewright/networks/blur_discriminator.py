"""A discriminator of StyleGAN's type: residual blocks that halve the resolution through a blur filter.

Source   MaskGIT's tokenizer (arXiv 2202.04200) is trained against StyleGAN's (Karras et al. 2020, 1912.04958) with
         blurred resampling, but without equalised learning rates and minibatch statistics: Xavier weights, zero biases.
         Parameter counts and answers are those of MaskGIT's released program.
Departs  By default it judges every place of its last grid (a patch discriminator, as VQGAN's) where the published one
         gives one number; `judge = "image"` gives that. Images are in [-1, 1], as the tokenizer's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.layers import Init, Resample, conv, linear
from imagewright.types import UNCONDITIONAL, Condition, UserError

SLOPE = 0.2
"""Of the leaky rectifiers."""
LAST_SIDE = 4
"""Side of the features at which it stops halving."""
MOST_CHANNELS = 512
BLUR = (1.0, 3.0, 3.0, 1.0)
"""Taps of the filter before every other pixel is taken."""

USUAL = Init("xavier_uniform")

Judge = Literal["patches", "image"]


class BlurDiscriminator(nn.Module):
    """Judges images [N, C, H, W] by logits [N, K]: K places of about 4 x 4, or one for the whole image.

    resolution: height and width of the images, >= 8. width: channels at full resolution, doubled at every halving up to
    512; published: 64 at 256 x 256 pixels, hence 256 at 64 x 64. Raises UserError on other values.
    """

    def __init__(self, resolution: int, channels: int, width: int = 64, judge: Judge = "patches") -> None:
        super().__init__()
        if resolution < 8 or channels < 1 or width < 1 or judge not in ("patches", "image"):
            raise UserError(
                f"a discriminator of width {width} and judge {judge!r} for {channels} channels and resolution "
                f"{resolution}; resolution must be at least 8, the others at least 1, judge patches or image"
            )
        layers: list[nn.Module] = [conv(channels, width, 3, USUAL), nn.LeakyReLU(SLOPE)]
        side = resolution
        while side > LAST_SIDE:
            wider = min(2 * width, MOST_CHANNELS)
            layers.append(_HalvingBlock(width, wider))
            width, side = wider, side // 2
        layers += [conv(width, width, 3, USUAL), nn.LeakyReLU(SLOPE)]
        if judge == "patches":
            layers += [conv(width, 1, 1, USUAL), nn.Flatten()]
        else:
            layers += [nn.Flatten(), linear(width * side**2, width, USUAL), nn.LeakyReLU(SLOPE)]
            layers += [linear(width, 1, USUAL)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """images: [N, C, H, W] in [-1, 1]. Returns logits [N, K]: positive where the image looks real."""
        logits: Tensor = self.layers(images)
        return logits


class _HalvingBlock(nn.Module):
    """Two convolutions and a direct path, both blurred and halved; their sum keeps the scale."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = conv(in_channels, in_channels, 3, USUAL)
        self.conv1 = conv(in_channels, out_channels, 3, USUAL)
        self.skip = conv(in_channels, out_channels, 1, USUAL, bias=False)
        self.halve = Resample("down", BLUR)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv0(x), SLOPE)
        h = F.leaky_relu(self.conv1(self.halve(h)), SLOPE)
        summed: Tensor = (h + self.skip(self.halve(x))) / math.sqrt(2)
        return summed
