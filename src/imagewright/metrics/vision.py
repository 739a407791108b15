"""Frozen networks whose feature maps latents are aligned with: our classifiers, or DINOv2 of a local folder.

Of a shipped classifier it is the last map before its rectification: rectified maps share a direction, which latents
would follow by being constant. A map is brought to the latents' grid by bilinear interpolation where its own is
another; the published one (DINOv2 at 224 x 224, 16 x 16 patches, for latents of 16 x 16) has theirs. DINOv2 sees
pictures in [-1, 1] as VA-VAE's program shows them, without the mean and spread of its own training, resized by bilinear
interpolation. Its table of positions, trained on 37 x 37 patches, is made smaller as `transformers` does it, without
antialiasing, which the program (by `timm`) has.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.metrics.extractors import named_extractor
from imagewright.metrics.features import EncoderFeatures
from imagewright.metrics.perceptual import EncoderMaps
from imagewright.metrics.vision_transformers import VisionTransformer
from imagewright.models.view import seen
from imagewright.networks import ConvClassifier
from imagewright.types import Encoder, UserError

SIDE = 224
"""Pixels a side at which a vision transformer sees pictures."""


class VisionFeatures(nn.Module):
    """Images [N, C, H, W] in [-1, 1] as the last map of a frozen encoder, [N, `dim`, side, side], without gradient.

    Raises UserError for an encoder without maps.
    """

    about: ClassVar[str] = (
        "Frozen encoder whose feature maps the latents are aligned with: digits or emoji (shipped classifiers), an "
        "encoder's file or run, or a folder of DINOv2; none = the classifier of the data set, where there is one."
    )

    def __init__(self, extractor: EncoderFeatures) -> None:
        super().__init__()
        self.maps, self.dim = EncoderMaps(extractor.encoder, extractor.sha256), 0
        view, name = extractor.view, extractor.name
        shown = self._maps(torch.zeros(1, view.channels, view.side, view.side))
        if shown.shape[2:] == (1, 1):
            raise UserError(f"vision {name} has no map of features; allowed: classifiers and DINOv2")
        self.dim = shown.shape[1]

    @classmethod
    def open(cls, name: str) -> Self:
        """The encoder of a name, file or folder. Raises UserError where it is none."""
        return cls(named_extractor(name))

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of it."""
        return {"weights_sha256": self.maps.sha256}

    @torch.no_grad()
    def forward(self, images: Tensor, side: int) -> Tensor:
        maps = self._maps(images)
        if maps.shape[2:] == (side, side):
            return maps
        return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)

    def _maps(self, images: Tensor) -> Tensor:
        encoder: Any = self.maps.encoder
        found: Tensor
        if isinstance(encoder.network, ConvClassifier):
            found = encoder.network.body[:-1](seen(images, encoder.view))
            return found
        if not isinstance(encoder, VisionTransformer):
            found = self.maps(images)[-1]
            return found
        shown = images.expand(-1, 3, -1, -1)
        shown = F.interpolate(shown, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        network: Any = encoder.network
        grid = SIDE // int(network.config.patch_size)
        tokens: Tensor = network(pixel_values=shown).last_hidden_state[:, -grid * grid :]  # behind class and registers
        return tokens.mT.reshape(len(tokens), -1, grid, grid)


class PooledFeatures(nn.Module):
    """Images [N, C, H, W] in [-1, 1] as the features of a frozen encoder, [N, `dim`], without gradient."""

    about: ClassVar[str] = (
        "Frozen encoder of pictures that teaches: digits or emoji (shipped classifiers), an encoder's file or run, or "
        "clip:FOLDER, dinov2:FOLDER."
    )

    def __init__(self, encoder: Encoder, sha256: str, dim: int) -> None:
        super().__init__()
        self.encoder, self.sha256, self.dim = encoder, sha256, dim

    @classmethod
    def open(cls, name: str) -> Self:
        """The encoder of a name, file or folder. Raises UserError where it is none."""
        found = named_extractor(name)
        return cls(found.encoder, found.sha256, found.dim)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of it."""
        return {"weights_sha256": self.sha256}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images).pooled
