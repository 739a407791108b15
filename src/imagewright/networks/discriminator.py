"""Discriminators: does an image look real, seen at many places? Both answer `(images, cond) -> logits [N, K]`.

ConvDiscriminator        a residual convolutional network on the image itself; needs no other network's weights.
                         Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957), class by projection (Miyato and
                         Koyama 2018, 1802.05637).
ProjectedDiscriminator   small heads on the features of frozen networks, mixed at random across channels and scales
                         (Sauer et al. 2021, 2111.01007), told the class (StyleGAN-XL, Sauer et al. 2022, 2202.00273).
                         The published one looks through DeiT-base (distilled) and EfficientNet-lite0 at size 224.
Departs    The heads have group normalisation where the published ones have batch normalisation: no state that processes
           would have to share. Class vectors are learned; StyleGAN-XL takes them from a classifier's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from imagewright.networks.layers import group_norm
from imagewright.types import UNCONDITIONAL, Condition, UserError

SLOPE = 0.2
"""Of the leaky rectifiers."""
LAST_SIDE = 4
"""Side of the features at which the convolutional discriminator stops halving and judges each place."""
HEAD_SIDE = 8
"""The same of a head on features."""
MOST_CHANNELS = 512


class ConvDiscriminator(nn.Module):
    """Judges images at the places of a grid of about 4 x 4, K in number.

    resolution: height and width of the images, >= 8. channels: of the images. width: channels at full resolution,
    doubled at every halving up to 512. num_classes: 0 = labels are ignored. Raises UserError on other values.
    """

    def __init__(self, resolution: int, channels: int, num_classes: int = 0, width: int = 64) -> None:
        super().__init__()
        if resolution < 8 or channels < 1 or num_classes < 0 or width < 1:
            raise UserError(
                f"a discriminator of width {width} for {channels} channels, resolution {resolution} and {num_classes} "
                "classes; resolution must be at least 8, width and channels at least 1, and classes at least 0"
            )
        self.stem = _conv(channels, width, 3)
        blocks, side = [], resolution
        while side > LAST_SIDE:
            wider = min(2 * width, MOST_CHANNELS)
            blocks.append(_HalvingBlock(width, wider))
            width, side = wider, side // 2
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv(width, width, 3)
        self.judge = ClassProjection(width, num_classes)

    def forward(self, images: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """images: [N, C, H, W] in [-1, 1]. Returns logits [N, K]: positive where the image looks real."""
        hidden = self.blocks(self.stem(images))
        logits: Tensor = self.judge(F.leaky_relu(self.last(F.leaky_relu(hidden, SLOPE)), SLOPE), cond)
        return logits


class ProjectedDiscriminator(nn.Module):
    """Judges the features of frozen networks at several scales.

    features: modules that turn images [N, C, H, W] in [-1, 1] into a list of maps [N, C_i, H_i, W_i], the finest
    first (normalising colours, and making grids of tokens, are theirs). They are frozen here. image_shape: [C, H, W].
    size: side to which images are brought for the features (bilinear), None = as they are. width: channels after
    mixing at the finest scale, doubled at each coarser one. Raises UserError where a module gives no such list.
    """

    def __init__(
        self,
        features: Sequence[nn.Module],
        image_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        size: int | None = 224,
        width: int = 64,
    ) -> None:
        super().__init__()
        if not features:
            raise UserError("a projected discriminator needs at least one feature network")
        self.size = size
        self.features = nn.ModuleList(features).requires_grad_(False).eval()
        self.mixers, self.heads = nn.ModuleList(), nn.ModuleList()
        for network in self.features:
            shapes = self._shapes(network, image_shape)
            mixer = RandomMixer([channels for channels, _ in shapes], width)
            self.mixers.append(mixer)
            heads = zip(mixer.widths, shapes, strict=True)
            self.heads.append(nn.ModuleList(_Head(mixed, side, num_classes) for mixed, (_, side) in heads))

    def forward(self, images: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """images: [N, C, H, W] in [-1, 1]. Returns logits [N, K] of all networks, scales and places."""
        resized = self._resized(images)
        logits = []
        for network, mixer, heads in zip(self.features, self.mixers, self.heads, strict=True):
            maps = mixer(list(network(resized)))
            assert isinstance(heads, nn.ModuleList)
            logits += [head(features, cond) for head, features in zip(heads, maps, strict=True)]
        return torch.cat(logits, 1)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but the feature networks stay in eval mode."""
        super().train(mode)
        self.features.eval()
        return self

    def _resized(self, images: Tensor) -> Tensor:
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)

    def _shapes(self, network: nn.Module, image_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Channels and smaller side of each map."""
        like = next(network.parameters(), torch.zeros(()))
        with torch.no_grad():
            maps = network(self._resized(like.new_zeros(1, *image_shape)))
        if not isinstance(maps, list | tuple) or not maps or any(m.ndim != 4 for m in maps):
            raise UserError(f"{type(network).__name__} must turn images into a list of feature maps [N, C, H, W]")
        return [(m.shape[1], min(m.shape[2:])) for m in maps]


class RandomMixer(nn.Module):
    """Fixed random mixing of feature maps: each map's channels, then coarser maps into finer ones.

    channels: of each map, finest first. width: channels of the finest mixed map; the next ones have 2, 4, ... times
    as many (`widths`). Its weights are drawn once, never trained, and kept with the discriminator's.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.widths = [width * 2**level for level in range(len(channels))]
        self.across_channels = nn.ModuleList(
            _random(given, mixed, 1) for given, mixed in zip(channels, self.widths, strict=True)
        )
        self.down = nn.ModuleList(_random(mixed, mixed // 2, 1) for mixed in self.widths[1:])
        self.across_scales = nn.ModuleList(_random(mixed, mixed, 3) for mixed in self.widths)
        self.requires_grad_(False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [N, C_i, H_i, W_i] -> [N, widths_i, H_i, W_i]."""
        mixed = [layer(m) for layer, m in zip(self.across_channels, maps, strict=True)]
        coarser: Tensor | None = None
        fused: list[Tensor] = []
        for level in range(len(mixed) - 1, -1, -1):
            here = mixed[level]
            if coarser is not None:
                finer = F.interpolate(coarser, size=here.shape[2:], mode="bilinear", align_corners=False)
                here = here + self.down[level](finer)
            coarser = self.across_scales[level](here)
            fused.append(coarser)
        return fused[::-1]


class ClassProjection(nn.Module):
    """Logits of places: <features, w + class vector> / sqrt(C). forward: [N, C, H, W] -> [N, H W].

    Without a label (none, or -1) an image is judged by w alone.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(channels)
        self.direction = nn.Parameter(torch.randn(channels))
        self.classes = nn.Embedding(num_classes, channels) if num_classes else None

    def forward(self, features: Tensor, cond: Condition) -> Tensor:
        direction = self.direction.expand(len(features), -1)
        if self.classes is not None and cond.label is not None:
            known = (cond.label >= 0)[:, None]
            direction = direction + self.classes(cond.label.clamp(min=0)) * known
        return torch.einsum("nc,nchw->nhw", direction, features).flatten(1) * self.scale


class _HalvingBlock(nn.Module):
    """A residual block that halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = _conv(in_channels, in_channels, 3)
        self.conv1 = _conv(in_channels, out_channels, 3)
        self.skip = _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.conv0(F.leaky_relu(x, SLOPE)), SLOPE))
        halved: Tensor = F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))
        return halved


class _Head(nn.Module):
    """Strided convolutions down to about 8 x 8, one over 4 x 4 places, and the judgement of each of those."""

    def __init__(self, channels: int, side: int, num_classes: int, judged: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > HEAD_SIDE:
            wider = min(2 * channels, MOST_CHANNELS)
            halving = spectral_norm(nn.Conv2d(channels, wider, 4, stride=2, padding=1))
            layers += [halving, group_norm(wider, eps=1e-5), nn.LeakyReLU(SLOPE)]
            channels, side = wider, side // 2
        layers.append(spectral_norm(nn.Conv2d(channels, judged, min(4, side))))
        self.layers = nn.Sequential(*layers)
        self.judge = ClassProjection(judged, num_classes)

    def forward(self, features: Tensor, cond: Condition) -> Tensor:
        logits: Tensor = self.judge(self.layers(features), cond)
        return logits


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    """A spectrally normalised convolution that keeps the resolution."""
    return spectral_norm(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2))


def _random(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution whose random weights keep the scale of its input."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return layer
