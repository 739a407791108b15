"""EDM: training a denoiser (Karras et al. 2022, arXiv 2206.00364), section 5 and the rows VP and VE of table 1.

Networks   denoiser (trained), preconditioned as in table 1.   Time   the paper's sigma is ours.
Ingredients   loss lambda(sigma) |D(y + n; sigma) - y|^2, one sigma per image;
             edm   lambda = (sigma^2 + sd^2) / (sigma sd)^2,  ln sigma ~ N(-1.2, 1.2^2)
             vp    lambda = 1 / sigma^2,  time of the VP schedule uniform on [1e-5, 1]
             ve    lambda = 1 / sigma^2,  ln sigma uniform between sigma_min and sigma_max
           non-leaking augmentation whose parameters the network sees;
             uncertainty   lambda |D - y|^2 / exp(u(sigma)) + u(sigma), u learned (Karras et al. 2024, EDM2, 2312.02696,
             equation 21; its network is `networks.EDM2UNet`, whose weights keep unit length in training).
           Half-life EMA with ramp-up and the learning-rate ramp are the trainer's (`training.config`).
Departs    The loss is the mean over an image's D numbers where the official program sums them: gradients are smaller by
           D, and Adam's step is the same when its eps is too, which is the recipes' business (`recipes.published`).
           Gradients that are not finite stop the training, where the official program sets them to 0 or +-1e5.
           Rate and half-life count the batch at hand: their ramps are one batch ahead of the official program's, whose
           first step has rate 0. Half precision is autocast with a loss scale that is divided out again, where the
           official one casts the network and leaves its constant scale in the gradient (the recipe's eps makes up).
           Images come in a new order an epoch, theirs from a window of half the set that moves over one order.
           Noise levels are drawn in float64: the official VP law loses half its digits in float32 near t = 1e-5.
           iDDPM's row is for imported weights alone: the paper trains nothing with it.
Checked    losses and gradients of the three official losses (`tests/parity`); lambda c_out^2 = 1; zero loss for the
           exact denoiser of a point mass; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.data.augment import Augment
from imagewright.methods.self_conditioning import estimated
from imagewright.models.edm2 import EDM2Precond
from imagewright.models.preconditioning import EDMPrecond, NoiseLabel, VEPrecond, VPPrecond
from imagewright.models.self_conditioned import SelfConditioned
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal, LogUniform, NoiseLevels, VPTime
from imagewright.types import Batch, Clock, Condition, DataSpec, Event, Noise, Parts, Trained, Update, UserError

Row = Literal["edm", "vp", "ve"]
RANGES: dict[Row, tuple[float, float]] = {"edm": (0.002, 80.0), "ve": (0.02, 100.0)}
"""Noise levels that a denoiser is made for, where its schedule does not say so."""
IDLE: dict[Row, tuple[str, ...]] = {
    "edm": (),
    "vp": ("sigma_data", "sigma_min", "sigma_max", "noise_label", "noise_levels", "uncertainty"),
    "ve": ("sigma_data", "noise_label", "noise_levels", "uncertainty"),
}
"""Settings without effect."""


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Train a denoiser on images."""

    product: ClassVar[str] = "denoiser"

    preconditioning: Row = "edm"
    """Row of table 1: with the wrapper come its loss weight and, for vp and ve, its law of noise levels."""
    sigma_data: float = 0.5
    """Standard deviation of the data; enters the preconditioning and the loss weight (edm)."""
    sigma_min: float | None = None
    """None = 0.002 (edm), 0.02 (ve); of edm the sampler's range, of ve that of training too."""
    sigma_max: float | None = None
    """None = 80 (edm), 100 (ve)."""
    noise_label: NoiseLabel = "log"
    """How the network is told sigma; "angle" makes a TrigFlow teacher for continuous-time consistency models (edm)."""
    noise_levels: LogNormal | LogUniform = LogNormal(mean=-1.2, std=1.2)
    """Law of sigma in training (edm)."""
    uncertainty: bool = False
    """Learn beside the denoiser how uncertain it is at each sigma, and weigh the loss by it, as EDM2 does (edm)."""
    self_conditioning: bool = False
    """Show the network its own earlier answer, as analog bits do (`methods.self_conditioning`): of every second image
    in training, along the whole path in sampling."""
    augment: Augment = Augment(p=0.0)
    """p = 0: none, and the network takes no augmentation vector."""

    def __post_init__(self) -> None:
        if self.preconditioning not in get_args(Row):
            raise UserError(f"method.preconditioning is {self.preconditioning!r}; allowed: {', '.join(get_args(Row))}")
        require_positive("method.sigma_data", self.sigma_data)
        defaults = {f.name: f.default for f in fields(self)}
        for name in IDLE[self.preconditioning]:
            if getattr(self, name) != defaults[name]:
                raise UserError(
                    f"method.{name} is {getattr(self, name)}; it has no effect with preconditioning "
                    f"{self.preconditioning!r}, whose own is that of the paper's table 1"
                )
        _ = self.training_levels  # which checks the range that it is given

    @property
    def augment_dim(self) -> int:
        """Length of the augmentation vector that the network has to take."""
        return self.augment.augment_dim if self.augment.p > 0 else 0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level (edm, ve)."""
        low, high = RANGES[self.preconditioning]
        return low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max

    @property
    def training_levels(self) -> NoiseLevels:
        """The law of sigma in training."""
        match self.preconditioning:
            case "edm":
                return self.noise_levels
            case "vp":
                return VPTime()
            case "ve":
                low, high = self.sigma_range
                return LogUniform(sigma_min=low, sigma_max=high)

    def sizes(self, *, spec: DataSpec) -> dict[str, int]:
        """Of the network, beside those of the data."""
        return {"in_channels": 2 * spec.channels} if self.self_conditioning else {}

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: F(x, noise_label, cond) of `networks`."""
        denoiser: nn.Module
        network = SelfConditioned(network) if self.self_conditioning else network
        match self.preconditioning:
            case "edm":
                wrapper = EDM2Precond if self.uncertainty else EDMPrecond
                denoiser = wrapper(network, *self.sigma_range, self.sigma_data, self.noise_label)
            case "vp":
                denoiser = VPPrecond(network)
            case "ve":
                denoiser = VEPrecond(network, *self.sigma_range)
        return Parts(denoiser=Trained(module=denoiser))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the denoiser."""
        images, cond = batch.images, batch.cond
        if self.augment.p > 0:
            images, parameters = self.augment(images, noise)
            cond = replace(cond, augment=parameters)
        sigma = self.training_levels.sample(noise, images[:, 0, 0, 0])
        noisy = images + sigma[:, None, None, None] * noise.normal(images)
        if self.self_conditioning:
            cond = estimated(parts.denoiser, noisy, sigma, cond, noise)
        loss = self.weight(sigma) * squared_error(parts.denoiser, images, noisy, sigma, cond)
        if self.uncertainty:
            u = parts.denoiser.log_variance(sigma)
            loss = loss / u.exp() + u
        yield Update("denoiser", loss, at=sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma) of the row. [N] -> [N]."""
        return loss_weight(sigma, self.sigma_data) if self.preconditioning == "edm" else 1 / sigma**2


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's lambda(sigma) of table 1: makes the network's effective loss weight 1 at every noise level. [N] -> [N]."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(
    denoiser: nn.Module, images: Tensor, sigma: Tensor, cond: Condition, noise: Noise, sigma_data: float
) -> Tensor:
    """Weighted squared error of a denoiser, equation 2 with EDM's weight; images [N, C, H, W] -> [N]."""
    return loss_weight(sigma, sigma_data) * denoising_error(denoiser, images, sigma, cond, noise)


def denoising_error(denoiser: nn.Module, images: Tensor, sigma: Tensor, cond: Condition, noise: Noise) -> Tensor:
    """Mean squared error of a denoiser on noised images [N, C, H, W] -> [N]; sigma: [N]."""
    return squared_error(denoiser, images, images + sigma[:, None, None, None] * noise.normal(images), sigma, cond)


def squared_error(denoiser: nn.Module, images: Tensor, noisy: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """The same, of noisy images [N, C, H, W] that are made."""
    error: Tensor = (denoiser(noisy, sigma, cond) - images).square().flatten(1).mean(1)
    return error
