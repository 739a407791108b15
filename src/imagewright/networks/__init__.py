"""Architectures only: tensors in, tensors out. No losses, no files, no knowledge of noise schedules."""

from imagewright.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.song_unet import SongUNet, SongUNetConfig
from imagewright.networks.unet import UNet

NETWORKS: dict[str, type[UNet]] = {
    "DhariwalUNet": DhariwalUNet,
    "SongUNet": SongUNet,
}
"""Every architecture by the name that descriptions and official checkpoints use."""

__all__ = ["NETWORKS", "DhariwalUNet", "DhariwalUNetConfig", "SongUNet", "SongUNetConfig", "UNet"]
