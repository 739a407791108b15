"""The U-Net of analog bits, in its authors' program called TransUNet (Chen et al. 2022, arXiv 2208.04202).

As ADM's, but: skip connections leave before a block's self-attention; the first convolution is normalised; every sum of
a branch and its input is divided by sqrt(2); between levels a convolution of stride 2, padded below and to the right,
or one behind a doubling; nothing stands in the middle; the class enters beside the time's first layer.

Source     google-research/pix2seq, architectures/transunet.py; its `transformer_blocks` and `n_mlp_blocks` are 0 in the
           published configurations, and left out.
Departs    q, k and v of a head alternate, as in this library's other networks. Group normalisation of fewer than 128
           channels in attention has groups of 4, not 32 of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.adm_unet import HalvingConv
from imagewright.networks.block import BlockStyle, UNetBlock
from imagewright.networks.config import UNetConfig, require
from imagewright.networks.layers import Init, PositionalEmbedding, UpConv, conv, group_norm, linear
from imagewright.networks.recompute import Block
from imagewright.networks.unet import Layer, Role, UNet, build_block
from imagewright.types import Condition, UserError

EPS = 1e-5
INIT = Init("xavier_uniform")
INIT_ZERO = Init("xavier_uniform", weight=1e-5)


@dataclass(frozen=True, kw_only=True)
class BitUNetConfig(UNetConfig):
    """Arguments of `BitUNet`; the defaults are CIFAR-10's. Raises UserError on a value outside its range."""

    model_channels: int = 256
    channel_mult: tuple[int, ...] = (1, 1, 1)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    dropout: float = 0.0
    channels_per_head: int = 64
    out_kernel: int = 3
    """Of the last convolution; 1 where it answers logits of all codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("augment_dim", "destination", "weight", "double_norm"):
            require(not getattr(self, name), name, getattr(self, name), "off: a BitUNet is not told it")
        require(self.channels_per_head >= 1, "channels_per_head", self.channels_per_head, "a positive integer")
        require(self.out_kernel in (1, 3), "out_kernel", self.out_kernel, "1 or 3")


class BitUNet(UNet):
    """F(x, 1000 gamma, cond). See `UNet` for shapes."""

    config_class = BitUNetConfig
    config: BitUNetConfig
    map_weight = None

    def __init__(self, config: BitUNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, emb_channels = config.model_channels, config.model_channels * config.channel_mult_emb
        self.map_noise = PositionalEmbedding(channels)
        self.map_layer0 = linear(channels, emb_channels, INIT)
        self.map_layer1 = linear(emb_channels + config.label_dim, emb_channels, INIT)
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=config.dropout,
            eps=EPS,
            skip_scale=math.sqrt(0.5),
            adaptive_scale=True,
            double_norm=False,
            destination=False,
            project_skip=False,
            channels_per_head=config.channels_per_head,
            init=INIT,
            init_zero=INIT_ZERO,
            init_attn=INIT,
        )
        self._encoder = list(_encoder_plan(config))
        self._decoder = list(_decoder_plan(config, self._encoder))
        self.enc = nn.ModuleDict({layer.name: _build(layer, style) for layer in self._encoder})
        self.dec = nn.ModuleDict({layer.name: _build(layer, style) for layer in self._decoder})
        stem = channels * config.channel_mult[0]
        self.stem_norm, self.out_norm = group_norm(stem, eps=EPS), group_norm(stem, eps=EPS)
        self.out_conv = conv(stem, config.out_channels, config.out_kernel, INIT_ZERO)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        cosines, sines = self.map_noise(noise_label).chunk(2, dim=1)
        emb = F.silu(self.map_layer0(torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)))
        if self.config.label_dim:
            emb = torch.cat([emb, self._label_rows(cond, emb).expand(len(emb), -1)], dim=1)
        return F.silu(self.map_layer1(emb))

    def embed_destination(self, noise_label: Tensor, cond: Condition) -> Tensor:
        raise ValueError("a BitUNet is not told where to go")

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        for i, layer in enumerate(self._encoder):
            module = self.enc[layer.name]
            x = module(x, emb) if layer.role is Role.BLOCK else module(x)
            x = self.stem_norm(x) if i == 0 else x
            if layer.role is not Role.ATTENTION:
                skips.append(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        skips = list(skips)
        for layer in self._decoder:
            module = self.dec[layer.name]
            x = module(torch.cat([x, skips.pop()], dim=1), emb) if layer.role is Role.MERGE else module(x)
        image: Tensor = self.out_conv(self.out_norm.activated(x))
        return image

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution of the last block."""
        return cast(nn.Parameter, cast(UNetBlock, self.merging_blocks()[-1]).conv1.weight)


class AttentionBlock(UNetBlock):
    """Self-attention alone, added to its input [N, C, H, W]; drawn as Keras draws its kernels of three axes."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        Block.__init__(self)
        self.style, self.num_heads = style, style.num_heads(channels)
        if not self.num_heads:
            raise UserError(
                f"channels_per_head is {style.channels_per_head}; an attention layer of {channels} channels has no head"
            )
        width = channels // self.num_heads
        self.norm2 = group_norm(channels, eps=style.eps)
        # Keras takes a kernel's first axes, [channels, heads, width] or [heads, width, channels], for places.
        inwards = math.sqrt(4 / (self.num_heads + width))
        outwards = math.sqrt(2 * channels / (self.num_heads * (width + channels)))
        self.qkv = conv(channels, 3 * channels, 1, Init("xavier_uniform", weight=inwards))
        self.proj = conv(channels, channels, 1, Init("xavier_uniform", weight=outwards))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.attended(x)


def _with_attention(config: UNetConfig, layer: Layer) -> Iterator[Layer]:
    """A block, and at some resolutions self-attention behind it."""
    yield layer
    if layer.resolution in config.attn_resolutions:
        width = layer.out_channels
        yield Layer(Role.ATTENTION, layer.resolution, f"{layer.suffix}_attention", width, width)


def _encoder_plan(config: UNetConfig) -> Iterator[Layer]:
    channels = config.model_channels * config.channel_mult[0]
    yield Layer(Role.CONV, config.img_resolution, "conv", config.in_channels, channels)
    for level, mult in enumerate(config.channel_mult):
        resolution, width = config.img_resolution >> level, config.model_channels * mult
        for index in range(config.num_blocks):
            yield from _with_attention(config, Layer(Role.BLOCK, resolution, f"block{index}", channels, width))
            channels = width
        if level < len(config.channel_mult) - 1:
            yield Layer(Role.CONV, resolution, "down", width, width, resample="down")


def _decoder_plan(config: UNetConfig, encoder: list[Layer]) -> Iterator[Layer]:
    skips = [layer.out_channels for layer in encoder if layer.role is not Role.ATTENTION]
    channels = skips[-1]
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        resolution, width = config.img_resolution >> level, config.model_channels * mult
        for index in range(config.num_blocks + 1):
            merge = Layer(Role.MERGE, resolution, f"block{index}", channels + skips.pop(), width)
            yield from _with_attention(config, merge)
            channels = width
        if level:
            yield Layer(Role.CONV, resolution, "up", width, width, resample="up")


def _build(layer: Layer, style: BlockStyle) -> nn.Module:
    if layer.role is Role.ATTENTION:
        return AttentionBlock(layer.out_channels, style)
    if layer.role is not Role.CONV:
        return build_block(layer, style)
    if layer.resample == "up":
        return UpConv(layer.in_channels, layer.out_channels, 3, INIT, (1, 1))
    if layer.resample == "down":
        return HalvingConv(layer.in_channels, INIT, pad_behind=True)
    return conv(layer.in_channels, layer.out_channels, 3, INIT)
