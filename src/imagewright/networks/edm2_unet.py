"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696), configuration G: figure 21, appendix B.

No normalisation over groups and no biases: each weight vector has unit length; each sum, concatenation, non-linearity
and embedding keeps the expected magnitude. In training every forward pass writes the unit lengths back into the weights
(equation 66), so that a learning rate means an angle.

Keys       those of the published checkpoints, below `unet.`.
Departs    Writing back is skipped for weights that take no gradient. Attention runs in the stock kernel. What students
           add, a destination and a strength of guidance, are plain layers whose answer, at first zero, is added to the
           embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from imagewright.networks.config import UNetConfig, require
from imagewright.networks.image_network import destination_of
from imagewright.networks.layers import Init, Resample, ToldNumber
from imagewright.networks.recompute import Block
from imagewright.networks.tangents import attention, convolved
from imagewright.networks.unet import Layer, Role, UNet, decoder_plan, encoder_plan
from imagewright.noise import computing_again, dropout
from imagewright.types import Condition

EPS = 1e-4
TOLD = Init("xavier_uniform")
"""Of the layers that a student adds: plain ones, whose first answers are zero."""


@dataclass(frozen=True, kw_only=True)
class EDM2UNetConfig(UNetConfig):
    """Arguments of `EDM2UNet`; the defaults are the S network. Raises UserError on a value outside its range."""

    model_channels: int = 192
    """64, 128, 192, 256, 320, 384, 448 for XXS to XXL."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    dropout: float = 0.0
    channel_mult_noise: int = 1
    """Width of the noise embedding in units of `model_channels`."""
    channels_per_head: int = 64
    label_balance: float = 0.5
    """Share of the class in the embedding; the rest is the noise level's."""
    concat_balance: float = 0.5
    """Share of a skip connection where the decoder takes it."""
    res_balance: float = 0.3
    """Share of the residual branch."""
    attn_balance: float = 0.3
    """Share of the attention."""
    dropout_below: int | None = None
    """Dropout in the blocks of this resolution and lower ones alone; None = in all."""
    clip_act: float | None = 256.0
    """A block's outputs are cut at this; None = they are not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channel_mult_noise", "channels_per_head"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "a positive integer")
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        below = self.dropout_below
        require(below is None or (isinstance(below, int) and below >= 1), "dropout_below", below, "positive, or null")
        require(self.clip_act is None or self.clip_act > 0, "clip_act", self.clip_act, "positive, or null")
        for name in ("augment_dim", "double_norm"):
            require(not getattr(self, name), name, getattr(self, name), "0 or false: this network has no such part")


class EDM2UNet(UNet):
    """The magnitude-preserving network. See `UNet` for shapes."""

    config_class = EDM2UNetConfig
    config: EDM2UNetConfig

    def __init__(self, config: EDM2UNetConfig) -> None:
        super().__init__()
        self.config = config
        noise_channels = config.model_channels * config.channel_mult_noise
        emb_channels = config.model_channels * config.channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(config.label_dim, emb_channels) if config.label_dim else None
        self.map_weight = ToldNumber(noise_channels, emb_channels, TOLD) if config.weight else None
        self.map_to = ToldNumber(noise_channels, emb_channels, TOLD) if config.destination else None

        stem = config.model_channels * config.channel_mult[0]
        self._encoder = list(encoder_plan(config, stem_channels=stem))
        self._decoder = list(decoder_plan(config, self._encoder, attention_in_every_block=True))
        self.enc = nn.ModuleDict(
            {
                # One channel more: ones, which stand in for the biases.
                layer.name: MPConv(layer.in_channels + 1, layer.out_channels, 3, 3)
                if layer.role is Role.CONV
                else EDM2Block(layer, config, emb_channels, decoder=False)
                for layer in self._encoder
            }
        )
        self.dec = nn.ModuleDict(
            {layer.name: EDM2Block(layer, config, emb_channels, decoder=True) for layer in self._decoder}
        )
        self.out_conv = MPConv(self._decoder[-1].out_channels, config.out_channels, 3, 3)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb: Tensor = self.emb_noise(self.emb_fourier(noise_label).to(self.emb_noise.weight.dtype))
        if self.emb_label is not None:
            told = self.emb_label(self._label_rows(cond, emb) * math.sqrt(self.config.label_dim))
            emb = mp_sum(emb, told.expand_as(emb), self.config.label_balance)
        return self._told(mp_silu(emb), cond)

    def embed_destination(self, noise_label: Tensor, cond: Condition) -> Tensor:
        assert self.map_to is not None
        told: Tensor = self.map_to(noise_label)
        return told

    def _with_destination(self, emb: Tensor, cond: Condition) -> Tensor:
        # Added: a block has one vector, whose magnitude is kept, and no place for a second one.
        if self.map_to is None:
            return emb
        return emb + self.embed_destination(destination_of(cond), cond)

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
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
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = self.dec[layer.name](x, emb)
        image: Tensor = self.out_conv(x, self.out_gain)
        return image

    @property
    def last_layer(self) -> nn.Parameter:
        return self.out_conv.weight


class EDM2Block(Block):
    """Resampling, a residual branch that the embedding scales, then attention; the encoder normalises each pixel first.

    forward: x [N, in_channels, H, W], emb [N, emb_channels] -> [N, out_channels, H', W'].
    """

    def __init__(self, layer: Layer, config: EDM2UNetConfig, emb_channels: int, *, decoder: bool) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        drops = config.dropout_below is None or layer.resolution <= config.dropout_below
        self.dropout = config.dropout if drops else 0.0
        wide, out = layer.in_channels, layer.out_channels
        self.num_heads = out // config.channels_per_head if layer.attention else 0
        if self.num_heads:
            require(out % self.num_heads == 0, "channels_per_head", config.channels_per_head, f"a divisor of {out}")
        self.resample = Resample(layer.resample, (1, 1)) if layer.resample else None
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(wide if decoder else out, out, 3, 3)
        self.emb_linear = MPConv(emb_channels, out)
        self.conv_res1 = MPConv(out, out, 3, 3)
        self.conv_skip = MPConv(wide, out, 1, 1) if wide != out else None
        self.attn_qkv = MPConv(out, out * 3, 1, 1) if self.num_heads else None
        self.attn_proj = MPConv(out, out, 1, 1) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        config = self.config
        if self.resample is not None:
            x = self.resample(x)
        if not self.decoder:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(y * scale.to(y.dtype)[:, :, None, None])
        y = self.conv_res1(dropout(y, self.dropout, self.training))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, config.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), config.attn_balance)
        return x if config.clip_act is None else x.clip(-config.clip_act, config.clip_act)

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over all pixels of [N, C, H, W]; q, k and v have unit magnitude each."""
        assert self.attn_qkv is not None and self.attn_proj is not None
        split = rearrange(self.attn_qkv(x), "n (h c s) y x -> s n h (y x) c", h=self.num_heads, s=3)
        q, k, v = unit(split.contiguous(), dim=-1).unbind()  # the fused kernels want a place's numbers side by side
        found = attention(q, k, v)
        projected: Tensor = self.attn_proj(rearrange(found, "n h (y x) c -> n (h c) y x", y=x.shape[2]))
        return projected


class MPConv(nn.Module):
    """A convolution (odd kernel) or, without one, a linear layer, of unit weight vectors. Equations 47 and 66.

    forced: what training writes back into `weight`, of any of its rows.
    """

    def __init__(self, in_channels: int, out_channels: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        if self.training and self.weight.requires_grad and not computing_again():
            # Once a pass: lengths made unit twice differ in their last bits. Not through autograd's eyes: micro-batches
            # run before the first of them goes backward.
            self.weight.data.copy_(self.forced(self.weight.data))
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        w = (unit(w) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else convolved(x, w, padding=w.shape[-1] // 2)

    @staticmethod
    def forced(rows: Tensor) -> Tensor:
        """Weights [out, ...] brought back to unit magnitude, as training does after each step."""
        return unit(rows)


class MPFourier(nn.Module):
    """Cosines of unit magnitude at random frequencies and phases, drawn once. Equation 75. forward: [N] -> [N, C]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = torch.outer(x.to(dtype), self.freqs.to(dtype)) + self.phases.to(dtype)
        return angles.cos() * math.sqrt(2)


def unit(x: Tensor, dim: int | None = None) -> Tensor:
    """x divided by its root mean square over `dim`; over all dimensions but the first by default."""
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    norm = EPS + norm / math.sqrt(math.prod(x.shape[d] for d in dims))
    return torch.div(x, norm.to(x.dtype))


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of normal numbers. Equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of the magnitude of each. Equation 88."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b side by side, of which b has the share t of the magnitude. Equation 103."""
    na, nb = a.shape[1], b.shape[1]
    whole = math.sqrt(na + nb) / math.hypot(1 - t, t)
    return torch.cat([whole * (1 - t) / math.sqrt(na) * a, whole * t / math.sqrt(nb) * b], dim=1)
