"""The residual block of the EDM family's U-Nets, with optional resampling and self-attention.

Source   Song et al. 2021 (2011.13456) for DDPM++ and NCSN++; Dhariwal and Nichol 2021 (2105.05233) for ADM;
         unified in Karras et al. 2022 (arXiv 2206.00364). What differs between them is a `BlockStyle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from imagewright.networks.layers import DownConv, Init, Resample, UpConv, conv, group_norm, linear
from imagewright.networks.recompute import Block
from imagewright.networks.tangents import attention, on_rows
from imagewright.noise import dropout
from imagewright.types import UserError


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What all blocks of one network share."""

    emb_channels: int
    dropout: float
    eps: float
    """Of the group normalisations."""
    skip_scale: float
    """Factor on the sum of a residual branch and its input; sqrt(1/2) keeps the variance."""
    adaptive_scale: bool
    """The embedding scales and shifts after the second norm (ADM), or is added before it (DDPM++)."""
    double_norm: bool
    """Scale and shift are normalised to unit mean square themselves (Lu and Song 2024, 2410.11081, section 4.1)."""
    destination: bool
    """The embedding's second half says where to go; each block starts out deaf to it."""
    project_skip: bool
    """A resampled skip branch always has a 1x1 convolution, even when the channels agree."""
    channels_per_head: int | None
    """None: `heads`. Otherwise as many heads as fit, and no attention where not even one does (ADM)."""
    init: Init
    init_zero: Init
    """Of the last convolution of each residual branch."""
    init_attn: Init
    resample_filter: Sequence[float] = (1, 1)
    heads: int = 1
    """Of an attention layer, where `channels_per_head` is None."""
    groups: int | None = None
    """Of the group normalisations; see `group_norm`."""

    def num_heads(self, channels: int) -> int:
        """Heads of an attention layer. Raises UserError where they cannot share the channels equally."""
        width = self.channels_per_head
        heads = self.heads if width is None else channels // width
        if heads and channels % heads:
            raise UserError(
                f"model_channels and channel_mult give an attention layer of {channels} channels, "
                f"which its {heads} heads cannot share equally; use multiples of {heads if width is None else width}"
            )
        return heads


class UNetBlock(Block):
    """norm, silu, resampling, conv, embedding, norm, silu, dropout, conv, plus a skip branch; then attention.

    forward: x [N, in_channels, H, W], emb [N, emb_channels] -> [N, out_channels, H', W'].
    Its two halves, `residual` and `attended`, are public, for methods that leave one out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.style = style
        self.num_heads = style.num_heads(out_channels) if attention else 0

        self.norm0 = group_norm(in_channels, eps=style.eps, groups=style.groups)
        self.conv0 = _convolution(in_channels, out_channels, 3, style, resample)
        told = out_channels * (2 if style.adaptive_scale else 1)
        self.affine = linear(style.emb_channels, told, style.init)
        self.affine_to = (
            linear(style.emb_channels, told, Init(style.init.scheme, weight=0)) if style.destination else None
        )
        self.norm1 = group_norm(out_channels, eps=style.eps, groups=style.groups)
        self.conv1 = conv(out_channels, out_channels, 3, style.init_zero)

        self.skip: nn.Module | None = None
        if in_channels != out_channels or (resample and style.project_skip):
            self.skip = _convolution(in_channels, out_channels, 1, style, resample)
        elif resample:
            self.skip = Resample(resample, style.resample_filter)

        if self.num_heads:
            self.norm2 = group_norm(out_channels, eps=style.eps, groups=style.groups)
            self.qkv = conv(out_channels, out_channels * 3, 1, style.init_attn)
            self.proj = conv(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attended(self.residual(x, emb))

    def residual(self, x: Tensor, emb: Tensor) -> Tensor:
        """The convolutions, added to the shortcut; shapes as in `forward`."""
        style = self.style
        h = self.conv0(self.norm0.activated(x))
        params = self._told(emb).to(h.dtype)[:, :, None, None]
        if style.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            scale, shift = (_unit(scale), _unit(shift)) if style.double_norm else (scale + 1, shift)
            h = self.norm1.activated(h, scale, shift)
        else:
            h = self.norm1.activated(h + params)
        h = self.conv1(dropout(h, style.dropout, self.training))
        return self._add(self.shortcut(x), h)

    def _told(self, emb: Tensor) -> Tensor:
        if self.affine_to is None:
            told: Tensor = self.affine(emb)
        else:
            here, there = emb.chunk(2, dim=1)
            told = self.affine(here) + self.affine_to(there)
        return told

    def shortcut(self, x: Tensor) -> Tensor:
        """What the convolutions are added to: x itself, or resampled, or through a 1x1 convolution."""
        return x if self.skip is None else self.skip(x)

    def attended(self, x: Tensor) -> Tensor:
        """x [N, out_channels, H', W'] plus its self-attention; x itself in a block without."""
        return self._add(x, self._attend(x)) if self.num_heads else x

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x + branch
        return x if self.style.skip_scale == 1 else x * self.style.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over all pixels of [N, C, H, W]; q, k, v alternate along the channels of a head."""
        h, height = self.norm2(x), x.shape[2]
        if on_rows(h):
            attended = rearrange(attention(*self._from_rows(h)), "n h (y x) c -> n y x (h c)", y=height)
            attended = attended.permute(0, 3, 1, 2)
        else:
            split = rearrange(self.qkv(h), "n (h c s) y x -> s n h (y x) c", h=self.num_heads, s=3)
            q, k, v = split.contiguous().unbind()  # the fused kernels want a place's numbers side by side
            attended = rearrange(attention(q, k, v), "n h (y x) c -> n (h c) y x", y=height)
        projected: Tensor = self.proj(attended)
        return projected

    def _from_rows(self, h: Tensor) -> Iterator[Tensor]:
        """q, k, v, each [N, heads, T, C], of h [N, C, H, W], channels last.

        The weight's rows are put in their order, so that a place's numbers lie side by side without being moved.
        """
        assert self.qkv.bias is not None
        h = getattr(self.qkv, "seen", nn.Identity())(h)  # of few bits (`networks.quantized`)
        weight = rearrange(self.qkv.weight[:, :, 0, 0], "(h c s) i -> (s h c) i", h=self.num_heads, s=3)
        bias = rearrange(self.qkv.bias, "(h c s) -> (s h c)", h=self.num_heads, s=3)
        rows = h.permute(0, 2, 3, 1).flatten(0, 2)
        told = F.linear(rows, weight, bias).view(len(h), -1, 3, self.num_heads, h.shape[1] // self.num_heads)
        return (each.transpose(1, 2) for each in told.unbind(2))


def _unit(vector: Tensor) -> Tensor:
    """Each image's vector [N, C, 1, 1] divided by its root mean square."""
    return vector * torch.rsqrt(vector.square().mean(dim=1, keepdim=True) + 1e-8)


def _convolution(
    in_channels: int,
    out_channels: int,
    kernel: int,
    style: BlockStyle,
    resample: Literal["up", "down"] | None,
) -> nn.Conv2d:
    match resample:
        case "up":
            return UpConv(in_channels, out_channels, kernel, style.init, style.resample_filter)
        case "down":
            return DownConv(in_channels, out_channels, kernel, style.init, style.resample_filter)
        case None:
            return conv(in_channels, out_channels, kernel, style.init)
