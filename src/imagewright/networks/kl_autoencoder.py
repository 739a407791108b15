"""A convolutional autoencoder with a Gaussian between its halves: the KL autoencoder of latent diffusion.

Encoder    3x3 convolution; per level residual blocks, with attention at `attn_resolutions`, then a strided 3x3
           convolution (but the last), padded right and below; two blocks around attention; normalisation, swish, a 3x3
           convolution to twice the latent channels; a 1x1 convolution of these (`quant_conv`): mean and ln variance.
Decoder    a 1x1 convolution (`post_quant_conv`), then the mirror: one block more on each level, nearest neighbour and a
           3x3 convolution.
Biases     everywhere; PyTorch's own initialisation, as the released program has it. Attention has one head.
Source     Rombach et al. 2022 (arXiv 2112.10752), appendix E.3; the layers and names of its program, of which VA-VAE
           (Yao et al. 2025, 2501.01423) takes f16d32: weights of either need no change.
Departs    Groups of normalisation have at least 4 channels, where the released one always has 32 groups: another
           network below 128 channels. Dropout, 0 in all published configurations, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import group_norm
from imagewright.networks.recompute import Block
from imagewright.types import UserError

EPS = 1e-6
LOG_VARIANCE = (-30.0, 20.0)
"""Between which the logarithm of the variance is held."""


@dataclass(frozen=True, kw_only=True)
class KLAutoencoderConfig(NetworkConfig):
    """Arguments of `KLAutoencoder`; the defaults are VA-VAE's f16d32. Raises UserError out of range."""

    img_resolution: int
    """Height and width of the images, a multiple of 2 ** (levels - 1)."""
    in_channels: int
    latent_channels: int = 32
    model_channels: int = 128
    """Base number of channels, multiplied per level by `channel_mult`."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One multiplier per level, from full resolution downwards; each level but the first halves the resolution."""
    num_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Sides at which every block is followed by attention; at its narrow end each half has one in any case."""

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions"):
            value = getattr(self, name)
            good = isinstance(value, list | tuple) and all(_whole(m) for m in value)
            require(good, name, value, "a list of positive integers")
            object.__setattr__(self, name, tuple(value))
        for name in ("img_resolution", "in_channels", "latent_channels", "model_channels", "num_blocks"):
            require(_whole(getattr(self, name)), name, getattr(self, name), "a positive integer")
        require(bool(self.channel_mult), "channel_mult", self.channel_mult, "one multiplier per level, at least one")
        require(
            self.img_resolution % self.factor == 0,
            "img_resolution",
            self.img_resolution,
            f"divisible by {self.factor} for the {len(self.channel_mult)} levels of channel_mult",
        )

    @property
    def factor(self) -> int:
        """Side of the square of pixels that a place of the latents stands for: f."""
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def side(self) -> int:
        """Places along each side of the latents."""
        return self.img_resolution // self.factor


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class KLAutoencoder(Network):
    """Encoder and decoder."""

    config_class: ClassVar[type[KLAutoencoderConfig]] = KLAutoencoderConfig
    config: KLAutoencoderConfig

    def __init__(self, config: KLAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: [N, C, H, W] in [-1, 1]. Returns mean and ln variance of the latents, each [N, D, h, w].

        Raises UserError for another size than the configuration's.
        """
        wanted = (self.config.in_channels, self.config.img_resolution, self.config.img_resolution)
        if images.ndim != 4 or images.shape[1:] != wanted:
            shape = ", ".join(map(str, wanted))
            raise UserError(f"images are {list(images.shape)}; this autoencoder takes [N, {shape}]")
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [N, D, h, w]. Returns images [N, C, H, W], not clipped."""
        images: Tensor = self.decoder(self.post_quant_conv(latents))
        return images

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images: [N, C, H, W]; noise: standard normal [N, D, h, w], or None for none.

        Returns images that are decoded of latents drawn with that noise, their mean, ln variance, and the latents.
        """
        mean, log_variance = self.encode(images)
        latents = mean if noise is None else mean + (log_variance / 2).exp() * noise
        return self.decode(latents), mean, log_variance, latents

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where gradients of losses of its pictures are compared."""
        return cast(nn.Parameter, self.decoder.conv_out.weight)

    @property
    def last_of_encoder(self) -> nn.Parameter:
        """The encoder's last 3x3 weight, where gradients of losses of its latents are compared."""
        return cast(nn.Parameter, self.encoder.conv_out.weight)


class ResidualBlock(Block):
    """Twice normalisation, swish and a 3x3 convolution, added to the input, or to a 1x1 of it where widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels, eps=EPS), group_norm(out_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        added: Tensor = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return added


class AttentionBlock(Block):
    """Self-attention over all places with one head, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        added: Tensor = x + self.proj_out(attended)
        return added


class _Halving(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class _Doubling(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class _Level(nn.Module):
    """Blocks of one resolution, each followed by attention where there is any, then what changes the resolution."""

    def __init__(self, widths: list[int], *, attention: bool) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(AttentionBlock(b) for _, b in pairs if attention)
        self.downsample: nn.Module
        self.upsample: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return answer


class Encoder(nn.Module):
    """Images to twice the latent channels."""

    def __init__(self, config: KLAutoencoderConfig) -> None:
        super().__init__()
        before = config.model_channels
        self.conv_in = nn.Conv2d(config.in_channels, before, 3, padding=1)
        self.down = nn.ModuleList()
        for index, mult in enumerate(config.channel_mult):
            width = config.model_channels * mult
            attention = config.img_resolution >> index in config.attn_resolutions
            level = _Level([before] + [width] * config.num_blocks, attention=attention)
            if index < len(config.channel_mult) - 1:
                level.downsample = _Halving(width)
            self.down.append(level)
            before = width
        self.mid, self.norm_out = _Middle(before), group_norm(before, eps=EPS)
        self.conv_out = nn.Conv2d(before, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        answer: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return answer


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, config: KLAutoencoderConfig) -> None:
        super().__init__()
        before = config.model_channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, before, 3, padding=1)
        self.mid = _Middle(before)
        levels = []
        for index, mult in reversed(list(enumerate(config.channel_mult))):
            width = config.model_channels * mult
            attention = config.img_resolution >> index in config.attn_resolutions
            level = _Level([before] + [width] * (config.num_blocks + 1), attention=attention)
            if index > 0:
                level.upsample = _Doubling(width)
            levels.append(level)
            before = width
        self.up = nn.ModuleList(levels[::-1])  # the names count from full resolution
        self.norm_out = group_norm(before, eps=EPS)
        self.conv_out = nn.Conv2d(before, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        answer: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return answer
