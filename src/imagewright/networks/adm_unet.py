"""ADM as its authors published it (Dhariwal and Nichol 2021, arXiv 2105.05233), with what later code varied in it.

`DhariwalUNet` is EDM's reading of one of these networks. This one has the others' freedom: heads by number or by
width, the embedding added or as scale and shift, resampling in a block or by a convolution, a fixed number of groups,
the noise label times 1000 (consistency models). With these it is also DDPM's network, diffusers' `UNet2DModel`.

Source     openai/guided-diffusion, openai/consistency_models (unet.py); for the last four settings diffusers.
Departs    q, k and v of a head alternate (as in `DhariwalUNet`) where the published programs have them one behind the
           other, in two orders: importing permutes the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.block import BlockStyle
from imagewright.networks.config import require
from imagewright.networks.dhariwal_unet import INIT, INIT_ZERO, DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.layers import Init, PositionalEmbedding, ToldNumber, UpConv, conv, group_norm, linear
from imagewright.networks.tangents import Conv2d
from imagewright.networks.unet import Layer, Role, UNet, build_block, decoder_plan, encoder_plan
from imagewright.types import Condition


@dataclass(frozen=True, kw_only=True)
class ADMUNetConfig(DhariwalUNetConfig):
    """Arguments of `ADMUNet`. Raises UserError on a value outside its range."""

    noise_channels: int | None = None
    """Width of the noise embedding before its layers; None = model_channels."""
    channels_per_head: int | None = 64
    """None: every attention has `heads`."""
    heads: int = 1
    adaptive_scale: bool = True
    """The embedding scales and shifts after the second norm; otherwise it is added before it."""
    resampling: Literal["block", "conv"] = "block"
    """Between levels: a residual block, or one convolution."""
    label_scale: float = 1.0
    """Factor on the noise label: 1000 in the consistency models, which know ln(sigma) / 4 by it."""
    groups: int = 32
    eps: float = 1e-5
    sines_first: bool = False
    """Of the noise embedding; otherwise cosines."""
    endpoint: bool = False
    """Its slowest frequency is 1 / 10000 exactly."""
    pad_behind: bool = False
    """A halving convolution pads below and to the right alone (resampling "conv")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels_per_head", "heads", "groups", "noise_channels"):
            value = getattr(self, name)
            optional = value is None and name in ("channels_per_head", "noise_channels")
            require(optional or (isinstance(value, int) and value >= 1), name, value, "a positive integer")
        require(self.resampling in ("block", "conv"), "resampling", self.resampling, "block or conv")
        require(0 < self.label_scale < math.inf, "label_scale", self.label_scale, "positive and finite")
        require(0 < self.eps < 1, "eps", self.eps, "between 0 and 1")
        require(
            (self.noise_channels or 4) % 2 == 0, "noise_channels", self.noise_channels, "even: half of them are sines"
        )


class ADMUNet(DhariwalUNet):
    """The network of guided-diffusion, the consistency models and CTM. See `UNet` for shapes."""

    config_class = ADMUNetConfig
    config: ADMUNetConfig

    def __init__(self, config: ADMUNetConfig) -> None:
        UNet.__init__(self)  # whose children are named as DhariwalUNet's, and made here
        self.config = config
        channels = config.model_channels
        emb_channels, noise_channels = channels * config.channel_mult_emb, config.noise_channels or channels
        self.map_noise = PositionalEmbedding(noise_channels, endpoint=config.endpoint)
        self.map_augment = (
            linear(config.augment_dim, noise_channels, INIT_ZERO, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = linear(noise_channels, emb_channels, INIT)
        self.map_layer1 = linear(emb_channels, emb_channels, INIT)
        if config.destination:
            self.map_layer0_to = linear(noise_channels, emb_channels, INIT)
            self.map_layer1_to = linear(emb_channels, emb_channels, INIT)
        self.map_weight = ToldNumber(noise_channels, emb_channels, INIT) if config.weight else None
        init_label = Init("kaiming_normal", weight=math.sqrt(config.label_dim))
        self.map_label = linear(config.label_dim, emb_channels, init_label, bias=False) if config.label_dim else None

        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=config.dropout,
            eps=config.eps,
            skip_scale=1.0,
            adaptive_scale=config.adaptive_scale,
            double_norm=config.double_norm,
            destination=config.destination,
            project_skip=False,
            channels_per_head=config.channels_per_head,
            heads=config.heads,
            groups=config.groups,
            init=INIT,
            init_zero=INIT_ZERO,
            init_attn=INIT,
        )
        encoder = list(encoder_plan(config, stem_channels=channels * config.channel_mult[0]))
        decoder = list(decoder_plan(config, encoder, attention_in_every_block=True))
        self._encoder = [self._resampled(layer) for layer in encoder]
        self._decoder = [self._resampled(layer) for layer in decoder]
        self.enc = nn.ModuleDict({layer.name: self._build(layer, style) for layer in self._encoder})
        self.dec = nn.ModuleDict({layer.name: self._build(layer, style) for layer in self._decoder})
        width = self._decoder[-1].out_channels
        self.out_norm = group_norm(width, eps=config.eps, groups=config.groups)
        self.out_conv = conv(width, config.out_channels, 3, INIT_ZERO)

    def _resampled(self, layer: Layer) -> Layer:
        """A layer that changes the resolution is a convolution where the configuration says so."""
        return replace(layer, role=Role.CONV) if layer.resample and self.config.resampling == "conv" else layer

    def _build(self, layer: Layer, style: BlockStyle) -> nn.Module:
        if layer.role is not Role.CONV:
            return build_block(layer, style)
        if layer.resample == "up":
            return UpConv(layer.in_channels, layer.out_channels, 3, style.init, (1, 1))
        if layer.resample == "down":
            return HalvingConv(layer.in_channels, style.init, pad_behind=self.config.pad_behind)
        return conv(layer.in_channels, layer.out_channels, 3, style.init)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = self._waves(noise_label)
        if self.map_augment is not None and cond.augment is not None:
            emb = emb + self.map_augment(cond.augment.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._label_rows(cond, emb))
        return self._told(F.silu(emb), cond)

    def embed_destination(self, noise_label: Tensor, cond: Condition) -> Tensor:
        return F.silu(self.map_layer1_to(F.silu(self.map_layer0_to(self._waves(noise_label)))))

    def _waves(self, noise_label: Tensor) -> Tensor:
        cosines, sines = self.map_noise(noise_label * self.config.label_scale).chunk(2, dim=1)
        pair = (sines, cosines) if self.config.sines_first else (cosines, sines)
        return torch.cat(pair, dim=1).to(self.map_layer0.weight.dtype)


class HalvingConv(Conv2d):
    """A 3x3 convolution at every second place."""

    def __init__(self, channels: int, init: Init, *, pad_behind: bool) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=0 if pad_behind else 1)
        self.pad_behind = pad_behind
        init.fill(self)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.pad_behind else x)
