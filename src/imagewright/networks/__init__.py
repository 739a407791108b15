"""Architectures only: tensors in, tensors out. No losses, no files, no knowledge of noise schedules."""

from imagewright.networks.config import Network
from imagewright.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.pixel_unet import PixelUNet, PixelUNetConfig
from imagewright.networks.song_unet import SongUNet, SongUNetConfig
from imagewright.networks.token_transformer import TokenTransformer, TokenTransformerConfig
from imagewright.networks.unet import UNet
from imagewright.networks.vq import VQAutoencoder, VQAutoencoderConfig

NETWORKS: dict[str, type[Network]] = {
    "DhariwalUNet": DhariwalUNet,
    "PixelUNet": PixelUNet,
    "SongUNet": SongUNet,
    "TokenTransformer": TokenTransformer,
    "VQAutoencoder": VQAutoencoder,
}
"""Every architecture by the name that descriptions and official checkpoints use."""

__all__ = [
    "NETWORKS",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "Network",
    "PixelUNet",
    "PixelUNetConfig",
    "SongUNet",
    "SongUNetConfig",
    "TokenTransformer",
    "TokenTransformerConfig",
    "UNet",
    "VQAutoencoder",
    "VQAutoencoderConfig",
]
