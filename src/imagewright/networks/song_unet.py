"""DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456) as EDM has them (Karras et al. 2022, 2206.00364).

DDPM++   positional embedding, standard encoder and decoder, box resampling (the defaults).
NCSN++   embedding_type "fourier", channel_mult_noise 2, encoder_type "residual", filter (1, 3, 3, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.block import BlockStyle
from imagewright.networks.config import UNetConfig, require
from imagewright.networks.layers import (
    ConvDown,
    FourierEmbedding,
    Init,
    PositionalEmbedding,
    Resample,
    ToldNumber,
    conv,
    fir_kernel,
    group_norm,
    linear,
)
from imagewright.networks.unet import Layer, Role, UNet, build_block, decoder_plan, encoder_plan
from imagewright.types import Condition

EPS = 1e-6
INIT = Init("xavier_uniform")
INIT_ZERO = Init("xavier_uniform", weight=1e-5)
INIT_ATTN = Init("xavier_uniform", weight=math.sqrt(0.2))


@dataclass(frozen=True, kw_only=True)
class SongUNetConfig(UNetConfig):
    """Arguments of `SongUNet`; the defaults are DDPM++. Raises UserError on a value outside its range."""

    embedding_type: Literal["positional", "fourier"] = "positional"
    fourier_scale: float = 16.0
    """Deviation of the Fourier embedding's frequencies: 16 for NCSN++, 0.02 in the improved consistency models."""
    channel_mult_noise: int = 1
    """Width of the noise embedding in units of `model_channels`: 1 for DDPM++, 2 for NCSN++."""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """What goes down beside the features: nothing, the image, or a learned pyramid (NCSN++)."""
    decoder_type: Literal["standard", "skip"] = "standard"
    """Where the image is made: at full resolution only, or as a sum over all levels."""
    resample_filter: tuple[float, ...] = (1, 1)
    """Taps of the resampling filter, an even number: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "skip", "residual")),
            ("decoder_type", ("standard", "skip")),
        ):
            require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")
        require(0 < self.fourier_scale < math.inf, "fourier_scale", self.fourier_scale, "positive and finite")
        mult = self.channel_mult_noise
        require(isinstance(mult, int) and mult >= 1, "channel_mult_noise", mult, "a positive integer")
        object.__setattr__(self, "resample_filter", tuple(self.resample_filter))
        fir_kernel(self.resample_filter)


class SongUNet(UNet):
    """The DDPM++ / NCSN++ network. See `UNet` for shapes."""

    config_class = SongUNetConfig
    config: SongUNetConfig

    def __init__(self, config: SongUNetConfig) -> None:
        super().__init__()
        self.config = config
        noise_channels = config.model_channels * config.channel_mult_noise
        emb_channels = config.model_channels * config.channel_mult_emb

        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if config.embedding_type == "positional"
            else FourierEmbedding(noise_channels, scale=config.fourier_scale)
        )
        self.map_label = linear(config.label_dim, noise_channels, INIT) if config.label_dim else None
        self.map_augment = linear(config.augment_dim, noise_channels, INIT, bias=False) if config.augment_dim else None
        self.map_layer0 = linear(noise_channels, emb_channels, INIT)
        self.map_layer1 = linear(emb_channels, emb_channels, INIT)
        if config.destination:
            self.map_layer0_to = linear(noise_channels, emb_channels, INIT)
            self.map_layer1_to = linear(emb_channels, emb_channels, INIT)
        self.map_weight = ToldNumber(noise_channels, emb_channels, INIT) if config.weight else None

        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=config.dropout,
            eps=EPS,
            skip_scale=math.sqrt(0.5),
            adaptive_scale=config.double_norm,
            double_norm=config.double_norm,
            destination=config.destination,
            project_skip=True,
            channels_per_head=None,
            init=INIT,
            init_zero=INIT_ZERO,
            init_attn=INIT_ATTN,
            resample_filter=config.resample_filter,
        )
        encoder = list(encoder_plan(config, stem_channels=config.model_channels))
        decoder = list(decoder_plan(config, encoder, attention_in_every_block=False))
        self._encoder = list(with_input_pyramid(config, encoder))
        self._decoder = list(with_output_pyramid(config, decoder))
        self.enc = nn.ModuleDict({layer.name: _build(layer, style) for layer in self._encoder})
        self.dec = nn.ModuleDict({layer.name: _build(layer, style) for layer in self._decoder})

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = self._with_class(self._waves(noise_label), cond)
        if self.map_augment is not None and cond.augment is not None:
            emb = emb + self.map_augment(cond.augment.to(emb.dtype))
        return self._told(F.silu(self.map_layer1(F.silu(self.map_layer0(emb)))), cond)

    def embed_destination(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = self._with_class(self._waves(noise_label), cond)
        return F.silu(self.map_layer1_to(F.silu(self.map_layer0_to(emb))))

    def _waves(self, noise_label: Tensor) -> Tensor:
        # The checkpoints of this family expect sines before cosines.
        cosines, sines = self.map_noise(noise_label).chunk(2, dim=1)
        return torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)

    def _with_class(self, emb: Tensor, cond: Condition) -> Tensor:
        if self.map_label is None:
            return emb
        told: Tensor = emb + self.map_label(self._label_rows(cond, emb) * math.sqrt(self.config.label_dim))
        return told

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        pyramid = x
        skips: list[Tensor] = []
        for layer in self._encoder:
            module = self.enc[layer.name]
            match layer.role:
                case Role.CONV:
                    x = module(x)
                    skips.append(x)
                case Role.BLOCK:
                    x = module(x, emb)
                    skips.append(x)
                case Role.AUX_RESAMPLE:
                    pyramid = module(pyramid)
                case Role.AUX_SKIP:
                    x = skips[-1] = x + module(pyramid)
                case Role.AUX_RESIDUAL:
                    x = skips[-1] = pyramid = (x + module(pyramid)) * math.sqrt(0.5)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        skips = list(skips)
        image: Tensor | None = None
        output = x
        for layer in self._decoder:
            module = self.dec[layer.name]
            match layer.role:
                case Role.BLOCK:
                    x = module(x, emb)
                case Role.MERGE:
                    x = module(torch.cat([x, skips.pop()], dim=1), emb)
                case Role.AUX_RESAMPLE:
                    image = module(image)
                case Role.AUX_NORM:
                    output = module(x)
                case Role.AUX_CONV:
                    output = module(F.silu(output))
                    image = output if image is None else image + output
        assert image is not None  # the plan ends with an image output at full resolution
        return image


def with_input_pyramid(config: SongUNetConfig, encoder: Sequence[Layer]) -> Iterator[Layer]:
    """The encoder's plan with, behind each halving block, the layers that bring the image down beside it."""
    pyramid = config.in_channels
    for layer in encoder:
        yield layer
        if layer.resample is None:
            continue
        res, width = layer.resolution, layer.out_channels
        if config.encoder_type == "skip":
            yield Layer(Role.AUX_RESAMPLE, res, "aux_down", pyramid, pyramid, resample="down")
            yield Layer(Role.AUX_SKIP, res, "aux_skip", pyramid, width)
        elif config.encoder_type == "residual":
            yield Layer(Role.AUX_RESIDUAL, res, "aux_residual", pyramid, width, resample="down")
            pyramid = width


def with_output_pyramid(config: SongUNetConfig, decoder: Sequence[Layer]) -> Iterator[Layer]:
    """The decoder's plan with, behind a level, its image output: at full resolution only, or everywhere."""
    everywhere = config.decoder_type == "skip"
    lowest = decoder[0].resolution
    image = config.out_channels
    for res, level in groupby(decoder, key=lambda layer: layer.resolution):
        layers = list(level)
        yield from layers
        width = layers[-1].out_channels
        if everywhere and res != lowest:
            yield Layer(Role.AUX_RESAMPLE, res, "aux_up", image, image, resample="up")
        if everywhere or res == config.img_resolution:
            yield Layer(Role.AUX_NORM, res, "aux_norm", width, width)
            yield Layer(Role.AUX_CONV, res, "aux_conv", width, image)


def _build(layer: Layer, style: BlockStyle) -> nn.Module:
    match layer.role:
        case Role.BLOCK | Role.MERGE:
            return build_block(layer, style)
        case Role.ATTENTION:
            raise ValueError("self-attention is part of this network's blocks")
        case Role.CONV:
            return conv(layer.in_channels, layer.out_channels, 3, style.init)
        case Role.AUX_RESAMPLE:
            assert layer.resample is not None
            return Resample(layer.resample, style.resample_filter)
        case Role.AUX_SKIP:
            return conv(layer.in_channels, layer.out_channels, 1, style.init)
        case Role.AUX_RESIDUAL:
            return ConvDown(layer.in_channels, layer.out_channels, 3, style.init, style.resample_filter)
        case Role.AUX_NORM:
            return group_norm(layer.in_channels, eps=style.eps)
        case Role.AUX_CONV:
            return conv(layer.in_channels, layer.out_channels, 3, style.init_zero)
