"""The plan and the skeleton that SongUNet and DhariwalUNet share: which layers there are, in which order.

A network is laid out as data first (`Layer`), then built and run from it. Names of layers are those of the
published checkpoints: `enc.<name>` and `dec.<name>`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from imagewright.networks.block import BlockStyle, UNetBlock
from imagewright.networks.config import UNetConfig
from imagewright.networks.image_network import ImageNetwork, destination_of, weight_of
from imagewright.networks.layers import ToldNumber, one_hot
from imagewright.noise import kept
from imagewright.types import UNCONDITIONAL, Condition


class Role(Enum):
    """What a layer does in the forward pass."""

    CONV = "input convolution"
    BLOCK = "residual block"
    MERGE = "residual block on the concatenation with the last unused skip connection"
    ATTENTION = "self-attention that is no block's"
    AUX_RESAMPLE = "resamples the image pyramid beside the network"
    AUX_SKIP = "adds the image pyramid to the features"
    AUX_RESIDUAL = "averages the features with a pyramid that learns"
    AUX_NORM = "first half of an image output"
    AUX_CONV = "second half of an image output, added to the pyramid"


@dataclass(frozen=True)
class Layer:
    """One entry of the encoder or decoder."""

    role: Role
    resolution: int
    suffix: str
    in_channels: int
    out_channels: int
    resample: Literal["up", "down"] | None = None
    attention: bool = False

    @property
    def name(self) -> str:
        """Key in the module dictionary, hence in the state dict."""
        return f"{self.resolution}x{self.resolution}_{self.suffix}"


def encoder_plan(config: UNetConfig, *, stem_channels: int) -> Iterator[Layer]:
    """A convolution to `stem_channels`, a halving block per further level, `num_blocks` blocks per level."""
    channels = stem_channels
    for level, mult in enumerate(config.channel_mult):
        res = config.img_resolution >> level
        if level == 0:
            yield Layer(Role.CONV, res, "conv", config.in_channels, channels)
        else:
            yield Layer(Role.BLOCK, res, "down", channels, channels, resample="down")
        for index in range(config.num_blocks):
            width = config.model_channels * mult
            attention = res in config.attn_resolutions
            yield Layer(Role.BLOCK, res, f"block{index}", channels, width, attention=attention)
            channels = width


def decoder_plan(config: UNetConfig, encoder: Sequence[Layer], *, attention_in_every_block: bool) -> Iterator[Layer]:
    """From the lowest level up: two blocks or a doubling one, then `num_blocks + 1` blocks that merge skips.

    attention_in_every_block: at `attn_resolutions`; otherwise only in the last block of a level.
    """
    skips = [layer.out_channels for layer in encoder]
    channels = skips[-1]
    lowest = len(config.channel_mult) - 1
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        res = config.img_resolution >> level
        if level == lowest:
            yield Layer(Role.BLOCK, res, "in0", channels, channels, attention=True)
            yield Layer(Role.BLOCK, res, "in1", channels, channels)
        else:
            yield Layer(Role.BLOCK, res, "up", channels, channels, resample="up")
        for index in range(config.num_blocks + 1):
            width = config.model_channels * mult
            here = attention_in_every_block or index == config.num_blocks
            attention = here and res in config.attn_resolutions
            yield Layer(Role.MERGE, res, f"block{index}", channels + skips.pop(), width, attention=attention)
            channels = width


def build_block(layer: Layer, style: BlockStyle) -> UNetBlock:
    """The module of a layer whose role is BLOCK or MERGE."""
    return UNetBlock(layer.in_channels, layer.out_channels, style, resample=layer.resample, attention=layer.attention)


class UNet(ImageNetwork):
    """A network F(x; noise_label, cond): an embedding, an encoder and a decoder joined by skip connections.

    The three stages are public, for methods that look at or change what passes between them.
    """

    config_class: ClassVar[type[UNetConfig]]
    config: UNetConfig
    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_weight: ToldNumber | None
    _encoder: list[Layer]
    _decoder: list[Layer]

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, in_channels, H, W]; noise_label: [N] (c_noise). Returns [N, out_channels, H, W]."""
        emb = self.embed(noise_label, cond)
        hidden, skips = self.encode(x, emb)
        return self.decode(hidden, skips, emb)

    @property
    def num_skips(self) -> int:
        """Skip connections from the encoder to the decoder."""
        return len(self.merging_blocks())

    def merging_blocks(self) -> list[nn.Module]:
        """The decoder's blocks that take a skip connection, in order: from the lowest resolution up."""
        return [self.dec[layer.name] for layer in self._decoder if layer.role is Role.MERGE]

    def plan(self) -> dict[str, Layer]:
        """All layers by name ("enc.8x8_block0"), in the order in which they run."""
        stages = {"enc": self._encoder, "dec": self._decoder}
        return {f"{stage}.{layer.name}": layer for stage, layers in stages.items() for layer in layers}

    def blocks(self) -> dict[str, UNetBlock]:
        """The residual blocks by name ("enc.8x8_block0"), in the order in which they run."""
        stages = {"enc": self.enc, "dec": self.dec}
        named = ((f"{stage}.{name}", module) for stage, modules in stages.items() for name, module in modules.items())
        return {name: module for name, module in named if isinstance(module, UNetBlock)}

    def with_blocks(self, others: Mapping[str, nn.Module]) -> Self:
        """This network with other modules in place of some `blocks`. All else is shared; this one stays as it is."""
        changed = copy.copy(self)
        stages = {"enc": self.enc, "dec": self.dec}
        swapped = {
            stage: nn.ModuleDict({name: others.get(f"{stage}.{name}", module) for name, module in modules.items()})
            for stage, modules in stages.items()
        }
        # What stands in the place of its `forward` is the original's (`samplers.replay`).
        vars(changed).pop("forward", None)
        # A copied module shares its table of children with the original, so it gets a table of its own.
        changed._modules = {**self._modules, **swapped}
        return changed

    @abstractmethod
    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        """The vector that every block is told: [N, emb_channels], twice as long with a destination."""

    @abstractmethod
    def embed_destination(self, noise_label: Tensor, cond: Condition) -> Tensor:
        """The second half of that vector, [N or 1, emb_channels], from the noise label [N] of the level to go to."""

    @abstractmethod
    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The lowest-resolution features and the skip connections, in the order in which they were made."""

    @abstractmethod
    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The output image from the lowest-resolution features; takes the skips from the end of the list."""

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """The lowest-resolution features alone; arguments as of `forward`."""
        return self.encode(x, self.embed(noise_label, cond))[0]

    def time_layers(self) -> list[nn.Module]:
        """The layers through which the noise level comes into the embedding."""
        names = ("map_layer0", "map_layer1", "emb_noise")
        return [module for name, module in self.named_children() if name in names]

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution of the last output block: where methods compare gradients of losses."""
        last = self.dec[self._decoder[-1].name]
        return cast(nn.Parameter, (last.conv1 if isinstance(last, UNetBlock) else last).weight)

    def _told(self, emb: Tensor, cond: Condition) -> Tensor:
        """The embedding [N or 1, emb_channels] with the strength of guidance in it, the destination's behind it."""
        if self.map_weight is not None:
            emb = emb + self.map_weight(weight_of(cond))
        return self._with_destination(emb, cond)

    def _with_destination(self, emb: Tensor, cond: Condition) -> Tensor:
        if not self.config.destination:
            return emb
        return torch.cat([emb, self.embed_destination(destination_of(cond), cond).expand(emb.shape[0], -1)], dim=1)

    def _label_rows(self, cond: Condition, like: Tensor) -> Tensor:
        """One-hot labels [N or 1, label_dim]; zeros where there is none, or where dropout hides it."""
        if cond.label is None:
            return like.new_zeros(1, self.config.label_dim)
        rows = one_hot(cond.label, self.config.label_dim, like.dtype)
        if self.training and self.config.label_dropout:
            rows = rows * kept(rows[:, :1], self.config.label_dropout)
        return rows
