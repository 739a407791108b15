"""Networks that are also told of which mixture of real and generated images they are asked: one for all shares.

Source   Jayashankar et al. 2025 (score-of-mixture training, arXiv 2502.09609) as published (tkj516/
         score-of-mixture-training, `main/sjsd/networks.py`): the share less a half through an embedding of its own,
         of the kind that the noise level has; beside that one's before the first layer (DDPM++), or added to the last
         one's output under one more SiLU (ADM).
"""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.layers import FourierEmbedding, PositionalEmbedding, linear
from imagewright.networks.song_unet import INIT, SongUNet, SongUNetConfig
from imagewright.types import Condition, UserError


@runtime_checkable
class Shareable(Protocol):
    """A network of one's own that can be told the share of real images, `cond.share`."""

    def told_share(self) -> nn.Module:
        """An untrained network like this one that is told it."""
        ...


class MixtureSongUNet(SongUNet):
    """DDPM++ or NCSN++, told the share; it takes no augmentation vector."""

    def __init__(self, config: SongUNetConfig) -> None:
        super().__init__(config)
        noise_channels = config.model_channels * config.channel_mult_noise
        self.map_share = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if config.embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_layer0 = linear(2 * noise_channels, config.model_channels * config.channel_mult_emb, INIT)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = self._with_class(self._waves(noise_label), cond).expand(len(noise_label), -1)
        share = self.map_share(centred(cond, noise_label)).to(emb.dtype)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(torch.cat([emb, share], 1)))))


class MixtureDhariwalUNet(DhariwalUNet):
    """ADM, told the share; it takes no augmentation vector."""

    def __init__(self, config: DhariwalUNetConfig) -> None:
        super().__init__(config)
        self.map_share = FourierEmbedding(config.model_channels * config.channel_mult_emb)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = super().embed(noise_label, cond)
        return F.silu(emb + self.map_share(centred(cond, noise_label)).to(emb.dtype))


def centred(cond: Condition, noise_label: Tensor) -> Tensor:
    """The share less a half, [N] as `noise_label`; 0 where none is said."""
    return torch.zeros_like(noise_label) if cond.share is None else cond.share.to(noise_label) - 0.5


def told_share(network: nn.Module) -> nn.Module:
    """An untrained network like this one that is also told the share. Raises UserError for one that cannot be."""
    told: nn.Module
    if isinstance(network, Shareable):
        told = network.told_share()
    elif type(network) is SongUNet:
        told = MixtureSongUNet(network.config)
    elif type(network) is DhariwalUNet:
        told = MixtureDhariwalUNet(network.config)
    else:
        raise UserError(
            f"the network is {an(type(network).__name__)}, which cannot be told a share of real images; "
            "SongUNet and DhariwalUNet can"
        )
    return told.to(cast(Tensor, next(network.parameters())))
