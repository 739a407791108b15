"""EDM2's denoiser: EDM's wrapper, and beside the answer how uncertain it is at each noise level.

Source   Karras et al. 2024 (arXiv 2312.02696), appendix B.2, equations 14 to 21: u(sigma) is a linear layer on Fourier
         features of c_noise; training divides the loss by exp(u) and adds u, which makes all levels count alike.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from imagewright.models.preconditioning import EDMPrecond, NoiseLabel
from imagewright.networks.edm2_unet import MPConv, MPFourier


class EDM2Precond(EDMPrecond):
    """EDM's denoiser with `log_variance`, which only training asks for."""

    settings = (*EDMPrecond.settings, "logvar_channels")
    for_training: ClassVar[tuple[str, ...]] = ("logvar_",)
    """What a run that starts from these weights may leave."""

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
        logvar_channels: int = 128,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, noise_label)
        self.logvar_channels = logvar_channels
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    def log_variance(self, sigma: Tensor) -> Tensor:
        """u(sigma), [N] -> [N]: logarithm of the weighted squared error to be expected."""
        u: Tensor = self.logvar_linear(self.logvar_fourier(self.c_noise(sigma)).to(self.logvar_linear.weight.dtype))
        return u[:, 0]
