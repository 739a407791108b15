"""EDM: training a denoiser (Karras et al. 2022, arXiv 2206.00364), section 5.

Networks   denoiser (trained), preconditioned as in table 1.   Time   the paper's sigma is ours.
Ingredients   loss lambda(sigma) |D(y + n; sigma) - y|^2 with lambda = (sigma^2 + sd^2) / (sigma sd)^2 and
           ln sigma ~ N(-1.2, 1.2^2); one sigma per image; non-leaking augmentation whose parameters the network sees.
           Half-life EMA with ramp-up and the learning-rate ramp are the trainer's (`training.config`).
Departs    The loss is the mean over pixels where the paper's code sums: Adam's step is the same. Gradients are not
           rewritten when they are not finite (the paper's code sets NaN to 0): the trainer stops and says so.
Checked    lambda c_out^2 = 1; zero loss for the exact denoiser of a point mass; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.data.augment import Augment
from imagewright.models.preconditioning import EDMPrecond, NoiseLabel, VEPrecond, VPPrecond
from imagewright.paths.noise_levels import LogNormal, LogUniform
from imagewright.types import Batch, Clock, Condition, DataSpec, Event, Noise, Parts, Trained, Update


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Train a denoiser on images."""

    product: ClassVar[str] = "denoiser"

    preconditioning: Literal["edm", "vp", "ve"] = "edm"
    sigma_data: float = 0.5
    """Standard deviation of the data; enters the preconditioning and the loss weight."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    noise_label: NoiseLabel = "log"
    """How the network is told sigma; "angle" makes a TrigFlow teacher for continuous-time consistency models."""
    noise_levels: LogNormal | LogUniform = LogNormal(mean=-1.2, std=1.2)
    augment: Augment = Augment(p=0.0)
    """p = 0: none, and the network takes no augmentation vector."""

    def __post_init__(self) -> None:
        require_positive("method.sigma_data", self.sigma_data)

    @property
    def augment_dim(self) -> int:
        """Length of the augmentation vector that the network has to take."""
        return self.augment.augment_dim if self.augment.p > 0 else 0

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: F(x, noise_label, cond) of `networks`."""
        if self.preconditioning == "edm":
            denoiser: nn.Module = EDMPrecond(network, self.sigma_min, self.sigma_max, self.sigma_data, self.noise_label)
        else:
            denoiser = {"vp": VPPrecond, "ve": VEPrecond}[self.preconditioning](network)
        return Parts(denoiser=Trained(module=denoiser))

    def step(self, parts: Any, batch: Batch, noise: Noise, clock: Clock) -> Iterator[Event]:
        """One update of the denoiser."""
        images, cond = batch.images, batch.cond
        if self.augment.p > 0:
            images, parameters = self.augment(images, noise)
            cond = replace(cond, augment=parameters)
        sigma = self.noise_levels.sample(noise, images[:, 0, 0, 0])
        loss = denoising_loss(parts.denoiser, images, sigma, cond, noise, self.sigma_data)
        yield Update("denoiser", loss, at=sigma)


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) of table 1: makes the network's effective loss weight 1 at every noise level. [N] -> [N]."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(
    denoiser: nn.Module, images: Tensor, sigma: Tensor, cond: Condition, noise: Noise, sigma_data: float
) -> Tensor:
    """Weighted squared error of a denoiser, equation 2 with the weight of table 1; images [N, C, H, W] -> [N]."""
    noisy = images + sigma[:, None, None, None] * noise.normal(images)
    error = (denoiser(noisy, sigma, cond) - images).square().flatten(1).mean(1)
    weighted: Tensor = loss_weight(sigma, sigma_data) * error
    return weighted
