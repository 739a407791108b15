"""The KL autoencoder as a model on disk: a `types.Autoencoder`, in whose latents other models live."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.networks.kl_autoencoder import KLAutoencoder
from imagewright.types import ModelKind, Noise, UserError


class GaussianAutoencoder(nn.Module):
    """Images as normal distributions of latents, and latents as images.

    network: a `KLAutoencoder`. aligned: channels of the frozen features with which its latents were aligned, to which
    a 1x1 convolution without bias takes them (VA-VAE); 0 = none. Raises UserError for another network.
    """

    kind: ClassVar[ModelKind] = "autoencoder"
    for_training: ClassVar[tuple[str, ...]] = ("projection.",)
    begins_afresh: ClassVar[tuple[str, ...]] = ("projection.",)

    def __init__(self, network: nn.Module, aligned: int = 0) -> None:
        super().__init__()
        if not isinstance(network, KLAutoencoder):
            raise UserError(f"this autoencoder needs a KLAutoencoder as its network, not {an(type(network).__name__)}")
        if not isinstance(aligned, int) or aligned < 0:
            raise UserError(f"aligned is {aligned!r}; it must be a number of channels, or 0")
        self.network, self.aligned = network, aligned
        config = network.config
        self.latent = (config.latent_channels, config.side, config.side)
        if aligned:
            self.projection = nn.Conv2d(config.latent_channels, aligned, 1, bias=False)

    def forward(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reconstructions [N, C, H, W] of drawn latents; mean, ln variance and the latents, each [N, *latent]."""
        drawn = noise.normal(images.new_empty(len(images), *self.latent))
        answer: tuple[Tensor, Tensor, Tensor, Tensor] = self.network(images, drawn)
        return answer

    def project(self, latents: Tensor) -> Tensor:
        """Latents [N, *latent] in the space of the features that they are aligned with: [N, aligned, h, w]."""
        projected: Tensor = self.projection(latents)
        return projected

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """As `types.Autoencoder`; float32. Raises UserError for images of another size."""
        with torch.autocast(images.device.type, enabled=False):  # latents shall not depend on a run's precision
            mean, log_variance = self.network.encode(images.float())
        return mean if noise is None else mean + (log_variance / 2).exp() * noise.normal(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `types.Autoencoder`; float32, clipped. Raises UserError for latents of another shape."""
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent:
            shape = ", ".join(map(str, self.latent))
            raise UserError(f"latents are {list(latents.shape)}; this autoencoder decodes [N, {shape}]")
        with torch.autocast(latents.device.type, enabled=False):
            return self.network.decode(latents.float()).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        return {"class": type(self).__name__, "network": self.network.describe(), "aligned": self.aligned}
