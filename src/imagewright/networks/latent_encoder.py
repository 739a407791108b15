"""Discrete latents of a clean image, as logits: a vision transformer with a learned token for each latent.

Source     Xu et al. 2024 (DisCo-Diff, arXiv 2407.03300): 12 layers, width 768, 12 heads, patches of 8 pixels at 64x64.
           Its image program is not public; pre-norm blocks are ViT's (Dosovitskiy et al. 2021, 2010.11929).
Docking    the same authors' program, gcorso/disco-diffdock, normalises over the batch what its logits are made of
           (`models/latent_encoder.py`, two layers with BatchNorm and ReLU before the last); `batch_norm` does so once.
Departs    What the paper leaves open is ours: one output layer for all latents; weights begin as ViT's (Xavier's law),
           tokens and positions with deviation 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.patterns import Dense
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.types import UserError

EPS = 1e-6
STD = 0.02


@dataclass(frozen=True, kw_only=True)
class LatentEncoderConfig(NetworkConfig):
    """Arguments of `LatentEncoder`; the defaults are the paper's for ImageNet-64. UserError for values out of range."""

    img_resolution: int
    in_channels: int
    length: int = 10
    """m: how many latents an image has."""
    values: int = 100
    """k: how many values a latent has."""
    patch: int = 8
    """Side of the patches, in pixels."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    batch_norm: bool = False
    """Every number of which a latent's logits are made has mean 0 and deviation 1 over the batch (in use, over what
    training saw), and no bias: no value is the likeliest of all images."""

    def __post_init__(self) -> None:
        for name in ("img_resolution", "in_channels", "length", "values", "patch", "width", "depth", "heads"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(whole, name, value, "an integer >= 1")
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width, {self.width}")
        require(
            self.img_resolution % self.patch == 0, "patch", self.patch, f"a divisor of {self.img_resolution} pixels"
        )


class LatentEncoder(Network):
    """Images [N, C, H, W] in [-1, 1] -> logits [N, m, k]."""

    config_class: ClassVar[type[LatentEncoderConfig]] = LatentEncoderConfig
    config: LatentEncoderConfig

    def __init__(self, config: LatentEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        patches = (c.img_resolution // c.patch) ** 2
        self.into = nn.Linear(c.in_channels * c.patch**2, c.width)
        self.positions = nn.Parameter(torch.empty(patches, c.width))
        self.latents = nn.Parameter(torch.empty(c.length, c.width))
        style = Style(width=c.width, heads=c.heads, hidden=4 * c.width, eps=EPS)
        self.blocks = nn.ModuleList(ResidualBlock(style, Dense(causal=False)) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=EPS)
        self.over_batch = nn.BatchNorm1d(c.length * c.width, affine=False) if c.batch_norm else None
        self.out = nn.Linear(c.width, c.values, bias=not c.batch_norm)
        self.apply(begin)
        for table in (self.positions, self.latents):
            nn.init.normal_(table, std=STD)

    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError for images of another shape."""
        c = self.config
        if tuple(images.shape[1:]) != (c.in_channels, c.img_resolution, c.img_resolution):
            side = c.img_resolution
            raise UserError(f"images are {list(images.shape)}; this encoder takes [N, {c.in_channels}, {side}, {side}]")
        patches = F.pixel_unshuffle(images.to(self.into.weight.dtype), c.patch).flatten(2).transpose(1, 2)
        h = torch.cat([self.latents.expand(len(images), -1, -1), self.into(patches) + self.positions], 1)
        for block in self.blocks:
            h = block(h)
        h = self.norm(h[:, : c.length])
        if self.over_batch is not None:
            h = self.over_batch(h.flatten(1)).view_as(h)
        logits: Tensor = self.out(h)
        return logits


def begin(module: nn.Module) -> None:
    """Linear layers as ViT's: Xavier's law, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
