"""Cross-attention to discrete latents, put behind the self-attentions of any of our U-Nets.

Source     Xu et al. 2024 (DisCo-Diff, arXiv 2407.03300). Each latent's value has a vector in a codebook; a transformer
           of 6 layers, width 192, goes over an image's vectors; what it gives are keys and values of a cross-attention
           behind every self-attention (queries: the image's features there). In the group-hierarchical variant the
           latents are cut into as many groups as there are resolutions with attention on the way up: the first group
           speaks to the lowest alone, the last to the highest, and the way down hears of none.
Teacher    the new layers' last convolutions begin as zeros: a trained network begins as it is, whatever the latents.
Null       a learned vector in every latent's place stands for "no latents".
Departs    The image program is not public. What the paper leaves open is ours: a codebook for each latent (so that
           positions need no vectors), heads, the normalisation before the queries, and that groups go through the
           transformer separately, so that none knows of another.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from imagewright.networks.latent_encoder import EPS, begin
from imagewright.networks.layers import Init, conv, group_norm, linear
from imagewright.networks.patterns import Dense
from imagewright.networks.recompute import Block
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.networks.tangents import attention
from imagewright.networks.unet import UNet
from imagewright.types import UserError

USUAL = Init("xavier_uniform")
ZERO = Init("xavier_uniform", weight=0)


class CrossAttention(Block):
    """x [N, C, H, W] plus what its places find among an image's vectors [N or 1, M, width]; zero at the start."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, eps=EPS)
        self.query, self.out = conv(channels, channels, 1, USUAL), conv(channels, channels, 1, ZERO)
        self.told = linear(width, 2 * channels, USUAL)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        query = rearrange(self.query(self.norm(x)), "n (h c) y x -> n h (y x) c", h=self.heads)
        told = self.told(vectors.to(self.told.weight.dtype)).to(query.dtype)
        key, value = rearrange(told, "n m (s h c) -> s n h m c", s=2, h=self.heads).expand(-1, len(x), -1, -1, -1)
        found = attention(query.contiguous(), key, value)
        added: Tensor = x + self.out(rearrange(found, "n h (y x) c -> n (h c) y x", y=x.shape[2]))
        return added


class LatentLayers(nn.Module):
    """Codebooks, transformer and cross-attentions for a U-Net, which itself stays as it is.

    length, values: how many latents, of how many values each. groups: 1 = every attention hears of all latents;
    otherwise the number of resolutions with attention on the way up. Raises UserError for a network without attention,
    for another number of groups, and for latents that they cannot share equally.
    """

    def __init__(
        self, network: UNet, length: int, values: int, groups: int = 1, width: int = 192, depth: int = 6, heads: int = 4
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads is {heads}; it must be a divisor of width, {width}")
        self.groups, self.shares = groups, shares(network, length, groups)
        self.codebook = nn.Parameter(torch.empty(length, values, width))
        self.null = nn.Parameter(torch.empty(length, width))
        style = Style(width=width, heads=heads, hidden=4 * width, eps=EPS)
        self.blocks = nn.ModuleList(ResidualBlock(style, Dense(causal=False)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.blocks.apply(begin)
        for table in (self.codebook, self.null):
            nn.init.normal_(table)
        plan = network.plan()
        self.attend = nn.ModuleDict(
            {
                name.replace(".", "_"): CrossAttention(plan[name].out_channels, _heads(network, name), width)
                for name in self.shares
            }
        )

    def forward(self, latents: Tensor | None, dropped: Tensor | None = None) -> Tensor:
        """An image's vectors [N, m, width] from shares of all values [N, m, k], or values int64 [N, m].

        None: the null vectors, [1, m, width]. dropped: bool [N], of which images the latents are hidden.
        """
        if latents is None:
            h = self.null[None]
        elif latents.is_floating_point():
            h = torch.einsum("nmk,mkd->nmd", latents.to(self.codebook.dtype), self.codebook)
        else:
            h = self.codebook[torch.arange(len(self.codebook), device=latents.device), latents]
        if dropped is not None:
            h = torch.where(dropped[:, None, None], self.null, h)
        n = len(h)
        h = h.reshape(n * self.groups, -1, h.shape[2])
        for block in self.blocks:
            h = block(h)
        normed: Tensor = self.norm(h).reshape(n, -1, h.shape[2])
        return normed

    def of(self, network: UNet, vectors: Tensor) -> UNet:
        """The U-Net with these layers behind its blocks; nothing is copied. vectors: [N or 1, m, width]."""
        changed = {}
        for name, share in self.shares.items():
            stage, _, block = name.partition(".")
            modules = network.enc if stage == "enc" else network.dec
            changed[name] = _Told(modules[block], self.attend[name.replace(".", "_")], vectors[:, share])
        return network.with_blocks(changed)


class _Told(nn.Module):
    """A block, then its cross-attention."""

    def __init__(self, block: nn.Module, attend: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.block, self.attend, self.vectors = block, attend, vectors

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        told: Tensor = self.attend(self.block(x, emb), self.vectors)
        return told


def shares(network: UNet, length: int, groups: int) -> dict[str, slice]:
    """Which of the latents each block with self-attention hears of, by its name."""
    layers = network.plan()
    found = [name for name in layers if _heads(network, name)]
    if not found:
        raise UserError("the network has no self-attention, behind which latents would be told; set attn_resolutions")
    if groups == 1:
        return dict.fromkeys(found, slice(0, length))
    up = [name for name in found if name.startswith("dec.")]
    sides = sorted({layers[name].resolution for name in up})
    if groups != len(sides):
        known = ", ".join(map(str, sides))
        raise UserError(f"groups is {groups}; on its way up this network attends at {known} pixels: 1 or {len(sides)}")
    if length % groups:
        raise UserError(f"{length} latents cannot be shared by {groups} groups equally")
    size = length // groups
    each = {side: slice(i * size, (i + 1) * size) for i, side in enumerate(sides)}
    return {name: each[layers[name].resolution] for name in up}


def _heads(network: UNet, name: str) -> int:
    """Of a block's self-attention; 0 where it has none."""
    stage, _, block = name.partition(".")
    return getattr((network.enc if stage == "enc" else network.dec)[block], "num_heads", 0)
