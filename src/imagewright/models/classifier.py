"""A classifier of images as a model on disk: a `types.Encoder` that also names classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.networks.wide_resnet import WideResNet
from imagewright.types import ModelKind, UserError


class Classifier(nn.Module):
    """Images [N, C, H, W] in [-1, 1] as features [N, D], and as logits of their classes.

    network: a `WideResNet`, which says what size and colours it sees. mean: what is subtracted, one number or one for
    each channel, in [0, 1] as the network sees colours. Raises UserError for others.
    """

    kind: ClassVar[ModelKind] = "encoder"

    def __init__(self, network: nn.Module, mean: Sequence[float] = (0.5,)) -> None:
        super().__init__()
        if not isinstance(network, WideResNet):
            raise UserError(f"a classifier needs a WideResNet as its network, not a {type(network).__name__}")
        if len(mean) not in (1, network.config.in_channels) or not all(0 <= m <= 1 for m in mean):
            channels = network.config.in_channels
            raise UserError(f"mean is {tuple(mean)}; it must be one number in [0, 1], or one for each of {channels}")
        self.network, self.mean = network, tuple(float(m) for m in mean)
        self.centre: Tensor
        self.register_buffer("centre", torch.tensor(self.mean)[:, None, None], persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """What the network sees of images in [-1, 1]: colours in [0, 1], less the mean."""
        return (images + 1) / 2 - self.centre

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] and logits [N, classes] of images [N, C, H, W]. Raises UserError for another shape."""
        config = self.network.config
        wanted = (config.in_channels, config.img_resolution, config.img_resolution)
        if tuple(images.shape[1:]) != wanted:
            raise UserError(f"this classifier sees images of shape {wanted}, not {tuple(images.shape[1:])}")
        answer: tuple[Tensor, Tensor] = self.network(self.normalised(images))
        return answer

    def features(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, D], float32."""
        return self._full(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, classes], float32."""
        return self._full(images)[1]

    def maps(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, D, h, w], the features before they are pooled; float32."""
        network: Any = self.network
        with torch.autocast(images.device.type, enabled=False):
            maps: Tensor = network.maps(self.normalised(images.float()))
        return maps

    def _full(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):  # a feature shall not depend on a run's precision
            answer: tuple[Tensor, Tensor] = self(images.float())
        return answer

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        return {"class": type(self).__name__, "mean": list(self.mean), "network": self.network.describe()}
