"""ADM (Dhariwal and Nichol 2021, arXiv 2105.05233), as used in EDM (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.block import BlockStyle
from imagewright.networks.config import UNetConfig
from imagewright.networks.layers import Init, PositionalEmbedding, ToldNumber, conv, group_norm, linear
from imagewright.networks.unet import Layer, Role, UNet, build_block, decoder_plan, encoder_plan
from imagewright.types import Condition

EPS = 1e-5
INIT = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
INIT_ZERO = Init("kaiming_uniform", weight=0.0)


@dataclass(frozen=True, kw_only=True)
class DhariwalUNetConfig(UNetConfig):
    """Arguments of `DhariwalUNet`; the defaults are EDM's ImageNet-64 network."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)


class DhariwalUNet(UNet):
    """The ADM network: adaptive scale and shift, attention heads of 64 channels. See `UNet` for shapes."""

    config_class = DhariwalUNetConfig
    config: DhariwalUNetConfig

    def __init__(self, config: DhariwalUNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.model_channels
        emb_channels = channels * config.channel_mult_emb

        self.map_noise = PositionalEmbedding(channels)
        self.map_augment = linear(config.augment_dim, channels, INIT_ZERO, bias=False) if config.augment_dim else None
        self.map_layer0 = linear(channels, emb_channels, INIT)
        self.map_layer1 = linear(emb_channels, emb_channels, INIT)
        if config.destination:
            self.map_layer0_to = linear(channels, emb_channels, INIT)
            self.map_layer1_to = linear(emb_channels, emb_channels, INIT)
        self.map_weight = ToldNumber(channels, emb_channels, INIT) if config.weight else None
        init_label = Init("kaiming_normal", weight=math.sqrt(config.label_dim))
        self.map_label = linear(config.label_dim, emb_channels, init_label, bias=False) if config.label_dim else None

        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=config.dropout,
            eps=EPS,
            skip_scale=1.0,
            adaptive_scale=True,
            double_norm=config.double_norm,
            destination=config.destination,
            project_skip=False,
            channels_per_head=64,
            init=INIT,
            init_zero=INIT_ZERO,
            init_attn=INIT,
        )
        self._encoder = list(encoder_plan(config, stem_channels=channels * config.channel_mult[0]))
        self._decoder = list(decoder_plan(config, self._encoder, attention_in_every_block=True))
        self.enc = nn.ModuleDict({layer.name: _build(layer, style) for layer in self._encoder})
        self.dec = nn.ModuleDict({layer.name: _build(layer, style) for layer in self._decoder})
        width = self._decoder[-1].out_channels
        self.out_norm = group_norm(width, eps=EPS)
        self.out_conv = conv(width, config.out_channels, 3, INIT_ZERO)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = self.map_noise(noise_label).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and cond.augment is not None:
            emb = emb + self.map_augment(cond.augment.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._label_rows(cond, emb))
        return self._told(F.silu(emb), cond)

    def embed_destination(self, noise_label: Tensor, cond: Condition) -> Tensor:
        # Without the class, as in the published ADM network of CTM; that of DDPM++ is told it twice.
        emb = self.map_noise(noise_label).to(self.map_layer0_to.weight.dtype)
        return F.silu(self.map_layer1_to(F.silu(self.map_layer0_to(emb))))

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        for layer in self._encoder:
            module = self.enc[layer.name]
            x = module(x) if layer.role is Role.CONV else module(x, emb)
            skips.append(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        skips = list(skips)
        for layer in self._decoder:
            if layer.role is Role.MERGE:
                x = torch.cat([x, skips.pop()], dim=1)
            module = self.dec[layer.name]
            x = module(x) if layer.role is Role.CONV else module(x, emb)
        image: Tensor = self.out_conv(self.out_norm.activated(x))
        return image


def _build(layer: Layer, style: BlockStyle) -> nn.Module:
    if layer.role is Role.CONV:
        return conv(layer.in_channels, layer.out_channels, 3, style.init)
    return build_block(layer, style)
