"""Frozen networks whose feature maps latents are aligned with: our classifiers, or DINOv2 of a local folder.

A map is brought to the latents' grid by bilinear interpolation, where its own is another; the published one (DINOv2 at
224 x 224, 16 x 16 patches, for latents of 16 x 16) has theirs. DINOv2 sees pictures in [-1, 1] as VA-VAE's program
shows them, without the mean and spread of its own training, enlarged or reduced by bilinear interpolation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.metrics.extractors import find_extractor
from imagewright.metrics.features import ClassifierFeatures, EncoderFeatures, FeatureExtractor, fitted
from imagewright.metrics.vision_transformers import TransformerFeatures
from imagewright.types import UserError

SIDE = 224
"""Pixels a side at which a vision transformer sees pictures."""


class VisionFeatures(nn.Module):
    """Images [N, C, H, W] in [-1, 1] as the last map of a frozen network, [N, `dim`, side, side], without gradient.

    Raises UserError for a network without maps.
    """

    about: ClassVar[str] = (
        "Frozen network whose feature maps the latents are aligned with: digits or emoji (shipped classifiers), an "
        "encoder's file or run, or a folder of DINOv2; none = the classifier of the data set, where there is one."
    )

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor, self.dim = [extractor], extractor.dim  # a list, as its own weights are no part of this module
        network: Any
        if isinstance(extractor, ClassifierFeatures):
            network, self._side, self._channels = extractor.network, extractor.network.config.resolution, 0
        elif isinstance(extractor, EncoderFeatures) and hasattr(extractor.network, "maps"):
            network, self._side, self._channels = extractor.network, extractor.side, 0
        elif isinstance(extractor, TransformerFeatures) and extractor.family == "dinov2":
            network, self._side, self._channels = extractor.network, SIDE, 3
        else:
            raise UserError(f"vision {extractor.name} has no maps of features; allowed: classifiers and DINOv2")
        self.network = network.requires_grad_(False).eval()

    @classmethod
    def open(cls, name: str) -> Self:
        """The network of a name, file or folder. Raises UserError where it is none."""
        return cls(find_extractor(name, ""))

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of it."""
        return {"weights_sha256": self.extractor[0].sha256}

    @torch.no_grad()
    def forward(self, images: Tensor, side: int) -> Tensor:
        maps = self._maps(images)
        if maps.shape[2:] == (side, side):
            return maps
        return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)

    def _maps(self, images: Tensor) -> Tensor:
        network: Any = self.network
        found: Tensor
        if self._channels:  # a transformer
            shown = images.expand(-1, self._channels, -1, -1)
            shown = F.interpolate(shown, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            patch = int(network.config.patch_size)
            grid = SIDE // patch
            found = network(pixel_values=shown).last_hidden_state[:, -grid * grid :]  # behind class and registers
            return found.transpose(1, 2).reshape(len(found), -1, grid, grid)
        extractor: Any = self.extractor[0]
        shown = fitted(images, self._side, extractor.channels)
        found = network.body(shown) if isinstance(extractor, ClassifierFeatures) else network.maps(shown)
        return found
