"""Architectures only: tensors in, tensors out. No losses, no files, no knowledge of noise schedules."""

from imagewright.networks.adm_unet import ADMUNet, ADMUNetConfig
from imagewright.networks.axial_transformer import AxialTransformer, AxialTransformerConfig
from imagewright.networks.config import Network
from imagewright.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.edm2_unet import EDM2UNet, EDM2UNetConfig
from imagewright.networks.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from imagewright.networks.perceiver_ar import PerceiverAR, PerceiverARConfig
from imagewright.networks.pixel_unet import PixelUNet, PixelUNetConfig
from imagewright.networks.routing_transformer import RoutingTransformer, RoutingTransformerConfig
from imagewright.networks.song_unet import SongUNet, SongUNetConfig
from imagewright.networks.sparse_transformer import SparseTransformer, SparseTransformerConfig
from imagewright.networks.token_transformer import TokenTransformer, TokenTransformerConfig
from imagewright.networks.unet import UNet
from imagewright.networks.vq import VQAutoencoder, VQAutoencoderConfig
from imagewright.networks.wide_resnet import WideResNet, WideResNetConfig

NETWORKS: dict[str, type[Network]] = {
    "ADMUNet": ADMUNet,
    "AxialTransformer": AxialTransformer,
    "DhariwalUNet": DhariwalUNet,
    "EDM2UNet": EDM2UNet,
    "KLAutoencoder": KLAutoencoder,
    "PerceiverAR": PerceiverAR,
    "PixelUNet": PixelUNet,
    "RoutingTransformer": RoutingTransformer,
    "SongUNet": SongUNet,
    "SparseTransformer": SparseTransformer,
    "TokenTransformer": TokenTransformer,
    "VQAutoencoder": VQAutoencoder,
    "WideResNet": WideResNet,
}
"""Every architecture by the name that descriptions and official checkpoints use."""

__all__ = [
    "NETWORKS",
    "ADMUNet",
    "ADMUNetConfig",
    "AxialTransformer",
    "AxialTransformerConfig",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "EDM2UNet",
    "EDM2UNetConfig",
    "KLAutoencoder",
    "KLAutoencoderConfig",
    "Network",
    "PerceiverAR",
    "PerceiverARConfig",
    "PixelUNet",
    "PixelUNetConfig",
    "RoutingTransformer",
    "RoutingTransformerConfig",
    "SongUNet",
    "SongUNetConfig",
    "SparseTransformer",
    "SparseTransformerConfig",
    "TokenTransformer",
    "TokenTransformerConfig",
    "UNet",
    "VQAutoencoder",
    "VQAutoencoderConfig",
    "WideResNet",
    "WideResNetConfig",
]
