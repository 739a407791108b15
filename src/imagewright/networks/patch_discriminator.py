"""The discriminator of pix2pix, as autoencoders of latent diffusion have it: logits of overlapping patches.

Source     Isola et al. 2017 (arXiv 1611.07004); layers, initialisation and parameter count are those of VQGAN's program
           (Esser et al. 2021, 2012.09841), which LDM and VA-VAE use: weights N(0, 0.02), of normalisations N(1, 0.02).
State      Batch normalisation's statistics are a micro-batch's own, as in that program a process's.
"""

from __future__ import annotations

from torch import Tensor, nn

from imagewright.types import UNCONDITIONAL, Condition, UserError

SLOPE = 0.2
"""Of the leaky rectifiers."""
STD = 0.02
MOST = 8
"""Largest width, in units of the first."""


class PatchDiscriminator(nn.Module):
    """Judges images [N, C, H, W] by logits [N, K], one for each patch.

    layers: halvings of the resolution; width: channels after the first, doubled at each of the others up to 8 times.
    Published: 3 and 64, patches of 70 x 70. Raises UserError where images are too small for that, or numbers below 1.
    """

    def __init__(self, resolution: int, channels: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if min(resolution, channels, width, layers) < 1 or resolution >> layers < 3:
            raise UserError(
                f"a discriminator of {layers} halvings and width {width} for {channels} channels and resolution "
                f"{resolution}; all must be at least 1, and after the halvings 3 pixels a side must be left"
            )
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        before = width
        for n in range(1, layers + 1):
            after = width * min(2**n, MOST)
            modules += [nn.Conv2d(before, after, 4, 2 if n < layers else 1, 1, bias=False), nn.BatchNorm2d(after)]
            modules.append(nn.LeakyReLU(SLOPE))
            before = after
        modules += [nn.Conv2d(before, 1, 4, 1, 1), nn.Flatten()]
        self.main = nn.Sequential(*modules)
        for module in modules:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, STD)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, STD)

    def forward(self, images: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """images: [N, C, H, W] in [-1, 1]. Returns logits [N, K]: positive where the image looks real."""
        logits: Tensor = self.main(images)
        return logits
