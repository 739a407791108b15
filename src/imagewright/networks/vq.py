"""A convolutional autoencoder with a codebook between its halves: VQGAN as MaskGIT has it, without attention.

Encoder    3x3 convolution; per level residual blocks, then a 2x2 average (but the last); further blocks; group
           normalisation, swish, 1x1 convolution to the codebook's dimension.
Decoder    the mirror: 3x3 convolution; blocks; from the lowest level up residual blocks, then nearest neighbour and a
           3x3 convolution; normalisation, swish, 3x3 convolution to the image.
Quantiser  the nearest code by squared distance; the gradient passes straight through.
Biases     none in the encoder's first convolution nor in any block; elsewhere zeros at first. Convolutions begin as
           flax has them, codes uniformly within sqrt(3/K) (variance scaling over K rows).
Blocks     where a block changes the width, its 1x1 convolution is of the branch's own answer, not of the block's
           input: the released program has it so, and its weights are made for that.
Source     Chang et al. 2022 (MaskGIT, arXiv 2202.04200), section 3.1; Esser et al. 2021 (VQGAN, 2012.09841); van den
           Oord et al. 2017 (VQ-VAE, 1711.00937). Parameter counts and answers are those of the released program.
Departs    Pictures go in and come out in [-1, 1]; the released program has them in [0, 1]. Groups of normalisation have
           at least 4 channels, where the released one always has 32 groups: another network below 128 channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import Init, conv, group_norm
from imagewright.networks.recompute import Block
from imagewright.precision import uncast
from imagewright.types import UserError

EPS = 1e-6
USUAL = Init("lecun_normal")


@dataclass(frozen=True, kw_only=True)
class VQAutoencoderConfig(NetworkConfig):
    """Arguments of `VQAutoencoder`; the defaults are MaskGIT's, a token for 16 x 16 pixels.

    Raises UserError on a value outside its range.
    """

    img_resolution: int
    """Height and width of the images, a multiple of 2 ** (levels - 1)."""
    in_channels: int
    model_channels: int = 128
    """Base number of channels, multiplied per level by `channel_mult`."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One multiplier per level, from full resolution downwards; each level but the first halves the resolution."""
    num_blocks: int = 2
    """Residual blocks per level, and at the lowest resolution as many again."""
    codebook_size: int = 1024
    """K: how many different tokens there are."""
    codebook_dim: int = 256

    def __post_init__(self) -> None:
        require(isinstance(self.channel_mult, list | tuple), "channel_mult", self.channel_mult, "a list")
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        for name in ("img_resolution", "in_channels", "model_channels", "num_blocks", "codebook_dim"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "a positive integer")
        size, mult = self.codebook_size, self.channel_mult
        require(isinstance(size, int) and size >= 2, "codebook_size", size, "an integer >= 2")
        positive = all(isinstance(m, int) and m >= 1 for m in mult)
        require(bool(mult) and positive, "channel_mult", mult, "positive integers, one per level, at least one")
        require(
            self.img_resolution % self.factor == 0,
            "img_resolution",
            self.img_resolution,
            f"divisible by {self.factor} for the {len(mult)} levels of channel_mult",
        )

    @property
    def factor(self) -> int:
        """Side of the square of pixels that a token stands for."""
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def side(self) -> int:
        """Tokens along each side of an image."""
        return self.img_resolution // self.factor


@dataclass(frozen=True)
class Quantised:
    """What the quantiser makes of an encoder's output.

    z:         [N, D, h, w], that output.    codebook: [K, D], its own.
    codes:     [N, D, h, w], the nearest codes, without the straight-through gradient: their own is the codebook's.
    passed:    the same values with the gradient of z: what the decoder sees.
    tokens:    int64 [N, h w], the codes' indices, row by row.
    distances: [N, h w, K], squared distances of z to all codes.
    """

    z: Tensor
    codebook: Tensor
    codes: Tensor
    passed: Tensor
    tokens: Tensor
    distances: Tensor


class Quantiser(nn.Module):
    """A codebook [K, D] of vectors, begun uniformly within sqrt(3/K): all of variance 1/K."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / size)
        self.codebook = nn.Parameter(torch.empty(size, dim).uniform_(-bound, bound))

    def forward(self, z: Tensor) -> Quantised:
        """z: [N, D, h, w]."""
        n, dim, h, w = z.shape
        places = z.permute(0, 2, 3, 1).reshape(n, h * w, dim)
        # In half precision nearest codes would be rounded; the entropy loss divides the distances by 0.01.
        with uncast(z.device):
            places, codebook = (v if v.dtype == torch.float64 else v.float() for v in (places, self.codebook))
            squares = places.square().sum(2, keepdim=True) + codebook.square().sum(1)
            distances = squares - 2 * places @ codebook.T
        tokens = distances.argmin(2)
        codes = self.lookup(tokens, h)
        return Quantised(z, self.codebook, codes, z + (codes - z).detach(), tokens, distances)

    def lookup(self, tokens: Tensor, rows: int) -> Tensor:
        """Tokens [N, L], each in the codebook, as codes [N, D, rows, L / rows]."""
        codes = F.embedding(tokens, self.codebook).transpose(1, 2)
        return codes.reshape(len(tokens), -1, rows, tokens.shape[1] // rows)


class VQAutoencoder(Network):
    """Encoder, quantiser and decoder."""

    config_class: ClassVar[type[VQAutoencoderConfig]] = VQAutoencoderConfig
    config: VQAutoencoderConfig

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.model_channels * mult for mult in config.channel_mult]
        self.encoder = _encoder(config, widths)
        self.quantiser = Quantiser(config.codebook_size, config.codebook_dim)
        self.decoder = _decoder(config, widths)

    def encode(self, images: Tensor) -> Quantised:
        """images: [N, C, H, W] in [-1, 1]. Raises UserError for another size than the configuration's."""
        wanted = (self.config.in_channels, self.config.img_resolution, self.config.img_resolution)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise UserError(f"images are {list(images.shape)}; this tokenizer takes [N, {', '.join(map(str, wanted))}]")
        quantised: Quantised = self.quantiser(self.encoder(images))
        return quantised

    def decode(self, codes: Tensor) -> Tensor:
        """codes: [N, D, h, w]. Returns images [N, C, H, W], not clipped."""
        images: Tensor = self.decoder(codes)
        return images

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """The images again, through the codebook, and what it made of them."""
        quantised = self.encode(images)
        return self.decode(quantised.passed), quantised


class ResidualBlock(Block):
    """Twice normalisation, swish and a 3x3 convolution, added to the input; to a 1x1 of itself where the width changes.

    No convolution has a bias.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = group_norm(in_channels, eps=EPS), group_norm(out_channels, eps=EPS)
        self.conv0 = conv(in_channels, out_channels, 3, USUAL, bias=False)
        self.conv1 = conv(out_channels, out_channels, 3, USUAL, bias=False)
        self.skip = conv(out_channels, out_channels, 1, USUAL, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.conv1(F.silu(self.norm1(h)))
        added: Tensor = h + (x if self.skip is None else self.skip(h))
        return added


def _encoder(config: VQAutoencoderConfig, widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = [conv(config.in_channels, widths[0], 3, USUAL, bias=False)]
    before = widths[0]
    for level, width in enumerate(widths):
        layers += _blocks(before, width, config.num_blocks)
        if level < len(widths) - 1:
            layers.append(nn.AvgPool2d(2))
        before = width
    layers += _blocks(before, before, config.num_blocks)
    layers += [group_norm(before, eps=EPS), nn.SiLU(), conv(before, config.codebook_dim, 1, USUAL)]
    return nn.Sequential(*layers)


def _decoder(config: VQAutoencoderConfig, widths: list[int]) -> nn.Sequential:
    lowest = widths[-1]
    layers: list[nn.Module] = [conv(config.codebook_dim, lowest, 3, USUAL)]
    layers += _blocks(lowest, lowest, config.num_blocks)
    before = lowest
    for level, width in reversed(list(enumerate(widths))):
        layers += _blocks(before, width, config.num_blocks)
        if level > 0:
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), conv(width, width, 3, USUAL)]
        before = width
    layers += [group_norm(before, eps=EPS), nn.SiLU(), conv(before, config.in_channels, 3, USUAL)]
    return nn.Sequential(*layers)


def _blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count)]
