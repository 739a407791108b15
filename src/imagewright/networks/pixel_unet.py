"""MD4's network on pixels: each sub-pixel's 256 values are a table of vectors; a U-Net without downsampling.

Input      a vector of `model_channels` for each sub-pixel, those of a pixel side by side, a 3x3 convolution.
Blocks     `num_blocks` down, one more up, each of the latter on the concatenation with a skip connection. A block:
           normalisation, swish, 3x3 convolution, the same with dropout and zeros at the start.
Middle     block, self-attention of one head, block (CIFAR-10); or a DiT on patches (ImageNet-64).
Condition  sines of 1000 t, beside them a vector of the class; two layers with swish between. CIFAR-10: a projection
           without bias, zeros at the start, is added after each block's first convolution; normalisations have
           weights of their own. ImageNet-64: every group normalisation, the last one too, is scaled and shifted by a
           projection of zeros at the start, and has no weights of its own.
DiT        swish before its projections; dropout on the attention's weights and within the two layers, and of whole
           channels on what the attention adds; positions learned, from sines of row and column. Its answer is zeros
           at the start and takes the place of what came in.
Output     a convolution of zeros to `values` logits a sub-pixel: all values alike at the start.
Source     Shi et al. 2024 (MD4, arXiv 2406.04329), appendix on experiments; Kingma et al. 2021 (VDM, 2107.00630) for
           the U-Net; Peebles and Xie 2023 (DiT, 2212.09748) for the middle. Parameter counts and answers are those of
           the released program, weights begin as flax has them.
Departs    One class vector more, for no class. Groups of normalisation have at least 4 channels, where the released one
           always has 32 groups: another network below 128 channels. The released network for patches can also halve
           the resolution (no published run does). The network for text is not built in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import Init, PositionalEmbedding, class_index, conv, grid_sines, group_norm, linear
from imagewright.networks.recompute import Block
from imagewright.networks.tangents import GroupNorm, attention
from imagewright.noise import dropout
from imagewright.types import UNCONDITIONAL, Condition, UserError

EPS = 1e-6
USUAL = Init("lecun_normal")
ZERO = Init("lecun_normal", weight=0)


@dataclass(frozen=True, kw_only=True)
class PixelUNetConfig(NetworkConfig):
    """Arguments of `PixelUNet`; the defaults are those for CIFAR-10. Raises UserError on a value outside its range."""

    img_resolution: int
    """Height and width of the images; a multiple of `patch` where there is a transformer."""
    in_channels: int
    values: int = 256
    """V: how many values a sub-pixel has."""
    label_dim: int = 0
    """Number of classes; 0 = labels are ignored."""
    model_channels: int = 128
    num_blocks: int = 32
    """Residual blocks on the way down; there is one more on the way up."""
    dropout: float = 0.1
    transformer_depth: int = 0
    """Layers of the transformer in the middle; 0 = attention between two blocks, and the condition added."""
    transformer_width: int = 768
    transformer_heads: int = 12
    patch: int = 2
    """Side of the transformer's patches, in pixels."""

    def __post_init__(self) -> None:
        names = {"img_resolution": 1, "in_channels": 1, "values": 2, "label_dim": 0, "model_channels": 4,
                 "num_blocks": 1, "transformer_depth": 0, "transformer_width": 1, "transformer_heads": 1,
                 "patch": 1}  # fmt: skip
        for name, least in names.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(whole, name, value, f"an integer >= {least}")
        require(self.model_channels % 2 == 0, "model_channels", self.model_channels, "even (half of them are sines)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        if self.transformer_depth:
            width, heads = self.transformer_width, self.transformer_heads
            require(width % heads == 0, "transformer_heads", heads, f"a divisor of transformer_width, {width}")
            require(width % 4 == 0, "transformer_width", width, "divisible by 4 (sines of rows and columns)")
            require(self.img_resolution % self.patch == 0, "patch", self.patch,
                    f"a divisor of img_resolution, {self.img_resolution}")  # fmt: skip

    @property
    def length(self) -> int:
        """Tokens of an image: its sub-pixels."""
        return self.in_channels * self.img_resolution**2


class PixelUNet(Network):
    """(tokens, time, cond) -> logits; tokens are sub-pixels in the order row, column, channel."""

    config_class: ClassVar[type[PixelUNetConfig]] = PixelUNetConfig
    config: PixelUNetConfig

    def __init__(self, config: PixelUNetConfig) -> None:
        super().__init__()
        self.config = config
        width, count, dropout = config.model_channels, config.num_blocks, config.dropout
        scales = config.transformer_depth > 0
        self.tokens = _table(config.values + 1, width)
        self.stem = conv(config.in_channels * width, width, 3, USUAL)
        self.sines = PositionalEmbedding(width, endpoint=True)
        self.classes = _table(config.label_dim + 1, width) if config.label_dim else None
        known = width * (2 if config.label_dim else 1)
        self.told = nn.Sequential(linear(known, 4 * width, USUAL), nn.SiLU(), linear(4 * width, width, USUAL))
        block: type[AddingBlock] | type[ScalingBlock] = ScalingBlock if scales else AddingBlock
        self.down = nn.ModuleList(block(width, width, width, dropout) for _ in range(count))
        attended = [block(width, width, width, dropout), PixelAttention(width), block(width, width, width, dropout)]
        self.middle = nn.ModuleList([PatchTransformer(config)] if scales else attended)
        self.up = nn.ModuleList(block(2 * width, width, width, dropout) for _ in range(count + 1))
        self.norm = ScaledNorm(width, width) if scales else group_norm(width, eps=EPS)
        self.head = conv(width, config.in_channels * config.values, 3, ZERO)

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """tokens: int64 [N, L], `values` = unknown. time: [N] in [0, 1]. Returns logits [N, L, V].

        Raises UserError for another number of tokens, a missing time, or a label that is no class.
        """
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] != c.length:
            raise UserError(f"tokens are {list(tokens.shape)}; this network takes [N, {c.length}]")
        if time is None:
            raise UserError("this network is told the time; give it the share of masked places, [N] in [0, 1]")
        told = self._condition(time, cond)
        side = c.img_resolution
        h = self.tokens(tokens.view(-1, side, side, c.in_channels)).flatten(3)
        h = self.stem(h.permute(0, 3, 1, 2))
        skips = [h]
        for block in self.down:
            h = block(h, told)
            skips.append(h)
        for module in self.middle:
            h = module(h, told)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), told)
        h = self.norm(h, told) if isinstance(self.norm, ScaledNorm) else self.norm(h)
        logits: Tensor = self.head(F.silu(h))
        return logits.permute(0, 2, 3, 1).reshape(len(tokens), c.length, c.values)

    def _condition(self, time: Tensor, cond: Condition) -> Tensor:
        """What all blocks are told, [N, width]."""
        weight = self.tokens.weight
        known = self.sines(1000 * time.float()).to(weight.dtype)
        if self.classes is not None:
            index = class_index(cond, self.config.label_dim, len(time), weight.device)
            known = torch.cat([known, self.classes(index)], 1)
        told: Tensor = self.told(known)
        return told


class AddingBlock(Block):
    """x [N, in_channels, H, W], condition [N, D] -> [N, out_channels, H, W]; what the condition says is added."""

    def __init__(self, in_channels: int, out_channels: int, told: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm0, self.conv0 = group_norm(in_channels, eps=EPS), conv(in_channels, out_channels, 3, USUAL)
        self.shift = linear(told, out_channels, ZERO, bias=False)
        self.norm1, self.conv1 = group_norm(out_channels, eps=EPS), conv(out_channels, out_channels, 3, ZERO)
        self.skip = conv(in_channels, out_channels, 1, USUAL) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = h + self.shift(told).to(h.dtype)[:, :, None, None]
        h = dropout(F.silu(self.norm1(h)), self.dropout, self.training)
        added: Tensor = self.skip(x) + self.conv1(h)
        return added


class ScaledNorm(nn.Module):
    """Group normalisation, scaled and shifted by what the condition [N, D] says."""

    def __init__(self, channels: int, told: int) -> None:
        super().__init__()
        usual = group_norm(channels, eps=EPS)
        self.norm = GroupNorm(usual.num_groups, channels, eps=EPS, affine=False)
        self.affine = linear(told, 2 * channels, ZERO)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.affine(told).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), scale + 1)


class ScalingBlock(Block):
    """As `AddingBlock`; the condition scales and shifts both normalisations."""

    def __init__(self, in_channels: int, out_channels: int, told: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm0, self.conv0 = ScaledNorm(in_channels, told), conv(in_channels, out_channels, 3, USUAL)
        self.norm1, self.conv1 = ScaledNorm(out_channels, told), conv(out_channels, out_channels, 3, ZERO)
        self.skip = conv(in_channels, out_channels, 1, USUAL) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x, told)))
        h = dropout(F.silu(self.norm1(h, told)), self.dropout, self.training)
        added: Tensor = self.skip(x) + self.conv1(h)
        return added


class PixelAttention(nn.Module):
    """Self-attention of one head over all pixels of [N, C, H, W], added to the input; the condition is ignored."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=EPS)
        self.qkv, self.out = conv(channels, 3 * channels, 1, USUAL), conv(channels, channels, 1, USUAL)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        places = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # numbers of a place side by side
        q, k, v = places[:, None].chunk(3, dim=3)
        mixed = attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        added: Tensor = x + self.out(mixed)
        return added


class PatchTransformer(nn.Module):
    """A DiT on the patches of [N, C, H, W] -> the same shape, zeros at the start."""

    def __init__(self, config: PixelUNetConfig) -> None:
        super().__init__()
        self.patch, width = config.patch, config.transformer_width
        told, pixels = config.model_channels, config.model_channels * config.patch**2
        self.into = linear(pixels, width, USUAL)
        self.positions = nn.Parameter(grid_sines(config.img_resolution // config.patch, width))
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.transformer_heads, told, config.dropout)
            for _ in range(config.transformer_depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.affine = linear(told, 2 * width, ZERO)
        self.out = linear(width, pixels, ZERO)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        told = F.silu(told)
        h = self.into(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.positions
        for layer in self.layers:
            h = layer(h, told)
        shift, scale = self.affine(told)[:, None].chunk(2, dim=2)
        h = self.out(torch.addcmul(shift, self.norm(h), scale + 1)).transpose(1, 2)
        rows = x.shape[2] // self.patch
        return F.pixel_shuffle(h.reshape(len(x), -1, rows, h.shape[2] // rows), self.patch)


class TransformerLayer(Block):
    """A layer of DiT: attention, then two layers with GELU; the condition scales, shifts and gates both."""

    def __init__(self, width: int, heads: int, told: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.affine = linear(told, 6 * width, ZERO)
        self.qkv, self.out = linear(width, 3 * width, USUAL), linear(width, width, USUAL, bias=False)
        self.grow, self.shrink = linear(width, 4 * width, USUAL), linear(4 * width, width, USUAL)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        """[N, L, width] -> the same."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.affine(told)[:, None].chunk(6, dim=2)
        h = h + gate0 * self._attention(torch.addcmul(shift0, self.norm(h), scale0 + 1))
        hidden = F.gelu(self.grow(torch.addcmul(shift1, self.norm(h), scale1 + 1)), approximate="tanh")
        added: Tensor = h + gate1 * self._dropped(self.shrink(self._dropped(hidden)))
        return added

    def _attention(self, h: Tensor) -> Tensor:
        n, length, width = h.shape
        split = self.qkv(h).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=p).transpose(1, 2).flatten(2)
        # Whole channels, the same for every place.
        channels = dropout(torch.ones_like(mixed[:, :1]), self.dropout, self.training)
        return self.out(mixed) * channels  # type: ignore[no-any-return]

    def _dropped(self, h: Tensor) -> Tensor:
        return dropout(h, self.dropout, self.training)


def _table(rows: int, width: int) -> nn.Embedding:
    """Vectors of about unit length, as flax draws them."""
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=1 / math.sqrt(width))
    return table
