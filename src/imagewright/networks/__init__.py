"""Architectures only: tensors in, tensors out. No losses, no files, no knowledge of noise schedules."""

from imagewright.networks.adm_unet import ADMUNet, ADMUNetConfig
from imagewright.networks.arpg import ARPG, ARPGConfig
from imagewright.networks.axial_transformer import AxialTransformer, AxialTransformerConfig
from imagewright.networks.bit_unet import BitUNet, BitUNetConfig
from imagewright.networks.clip import CLIP, CLIPConfig
from imagewright.networks.config import Network
from imagewright.networks.conv_classifier import ConvClassifier, ConvClassifierConfig
from imagewright.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.dit import DiT, DiTConfig
from imagewright.networks.edm2_unet import EDM2UNet, EDM2UNetConfig
from imagewright.networks.event_vit import EventViT, EventViTConfig
from imagewright.networks.image_network import ImageNetwork
from imagewright.networks.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from imagewright.networks.latent_encoder import LatentEncoder, LatentEncoderConfig
from imagewright.networks.perceiver_ar import PerceiverAR, PerceiverARConfig
from imagewright.networks.pixel_unet import PixelUNet, PixelUNetConfig
from imagewright.networks.routing_transformer import RoutingTransformer, RoutingTransformerConfig
from imagewright.networks.song_unet import SongUNet, SongUNetConfig
from imagewright.networks.sparse_transformer import SparseTransformer, SparseTransformerConfig
from imagewright.networks.token_transformer import TokenTransformer, TokenTransformerConfig
from imagewright.networks.unet import UNet
from imagewright.networks.vatt import VATT, VATTConfig
from imagewright.networks.vcmamba import VCMamba, VCMambaConfig
from imagewright.networks.vq import VQAutoencoder, VQAutoencoderConfig
from imagewright.networks.wide_resnet import WideResNet, WideResNetConfig

NETWORKS: dict[str, type[Network]] = {
    "ADMUNet": ADMUNet,
    "ARPG": ARPG,
    "AxialTransformer": AxialTransformer,
    "BitUNet": BitUNet,
    "CLIP": CLIP,
    "ConvClassifier": ConvClassifier,
    "DhariwalUNet": DhariwalUNet,
    "DiT": DiT,
    "EDM2UNet": EDM2UNet,
    "EventViT": EventViT,
    "KLAutoencoder": KLAutoencoder,
    "LatentEncoder": LatentEncoder,
    "PerceiverAR": PerceiverAR,
    "PixelUNet": PixelUNet,
    "RoutingTransformer": RoutingTransformer,
    "SongUNet": SongUNet,
    "SparseTransformer": SparseTransformer,
    "TokenTransformer": TokenTransformer,
    "VATT": VATT,
    "VCMamba": VCMamba,
    "VQAutoencoder": VQAutoencoder,
    "WideResNet": WideResNet,
}
"""Every architecture by the name that descriptions and official checkpoints use."""

__all__ = [
    "ARPG",
    "CLIP",
    "NETWORKS",
    "VATT",
    "ADMUNet",
    "ADMUNetConfig",
    "ARPGConfig",
    "AxialTransformer",
    "AxialTransformerConfig",
    "BitUNet",
    "BitUNetConfig",
    "CLIPConfig",
    "ConvClassifier",
    "ConvClassifierConfig",
    "DhariwalUNet",
    "DhariwalUNetConfig",
    "DiT",
    "DiTConfig",
    "EDM2UNet",
    "EDM2UNetConfig",
    "EventViT",
    "EventViTConfig",
    "ImageNetwork",
    "KLAutoencoder",
    "KLAutoencoderConfig",
    "LatentEncoder",
    "LatentEncoderConfig",
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
    "VATTConfig",
    "VCMamba",
    "VCMambaConfig",
    "VQAutoencoder",
    "VQAutoencoderConfig",
    "WideResNet",
    "WideResNetConfig",
]
