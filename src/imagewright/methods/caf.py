"""Constant acceleration flow: an initial velocity, and an acceleration that sees it (Park et al. 2024, 2411.00322).

Networks   first stage: flow (trained), `models.acceleration.InitialVelocity`. Second: flow (trained),
           `AccelerationFlow`: the first stage's velocity, its average, frozen, and a fresh network with twice the
           channels. Third: the same, begun from the second's weights (`start`), and discriminator (trained).
Time       in this file s, the paper's: 0 the noise, 1 the image. A point x_s = (1 - s^2) z + s^2 x + v0 (s - s^2).
Pairs      of a teacher's noise and images (`data.couplings`), the images clamped to [-1, 1].
Velocity   at the true v0 = alpha (x - z), alpha = 1.5, and every s: m(v - v0) + d(x_s + (1 - s) v / alpha, x).
Acceleration  v0 is predicted, without gradient, at (z, 0): the point is rebuilt with it, the network sees it, and the
           target is 2 (x - z) - 2 v0, so that the acceleration mends what the velocity lacks: m(a - target) +
           d(x_s + (1 - s) v0 + (1 + s) / 2 (1 - s) a, x).
           m is the Huber of 2-rectified flow++, c = 0.00054 D, over D numbers; d perceptual, or none.
Adversary  every other step: the product's one-step images z + v0 + a / 2 from the pairs' noise, against real images;
           hinge for the discriminator, minus the mean logit for the generator, its weight |grad 2 L| / (|grad g| +
           1e-4) at the last block's last convolution, clipped to [0.01, 10]. Published: s on 10 intervals, no d.
Times      uniform on {0, 1/n, ..., 1}, n = `intervals`; or towards both ends (`towards_ends`).
Sampling   `samplers.Accelerated`: N + 1 calls, and back.
Source     the paper; github.com/mlvlab/CAF: `flow/pipeline_caf.py`, `flow/train_util.py`, `flow/script_util.py`.
Departs    The velocity's network has the image's channels; the program's has as many again, which are always 0. Its
           average follows the weights with decay min(0.9999, 1 - (1 + n)^(-2/3)), which it never leaves in its runs;
           here the decay is constant. Its acceleration and adversary choose the weights of the best FID, here the
           last. Fake and real images are augmented apart, and mean logits are over all of both discriminators', not
           of each alike; the discriminator is the library's (`networks.discriminator`), convolutional unless
           `projections` are given. In the third stage the program mirrors half of the real images and none of the
           pairs, here `data.xflip` mirrors both or neither. Its steps begin at s rounded down to thousandths, here at
           s; its reconstructions keep the inversion's v0, here it is asked for anew at the noise. Inpainting by
           inversion is left out.
Checked    losses, gradients, weight, draws and inversions against the program's numbers; the path's ends; N steps are
           exact with true velocity and acceleration; alpha = 1 is flow matching; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_whole
from imagewright.errors import an
from imagewright.methods.adversary import adaptive_weight
from imagewright.methods.consistency_trajectory import Adversarial, discriminator_part
from imagewright.methods.distances import Distance, Features
from imagewright.methods.noise_couplings import Stored, check_coupling
from imagewright.methods.pairs import column
from imagewright.methods.rectified_flow_pp import velocity_loss
from imagewright.models.acceleration import AccelerationFlow, InitialVelocity, advanced, check_alpha
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import UShaped
from imagewright.precision import wide
from imagewright.types import (
    Batch,
    Clock,
    Coupling,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)

Regression = Literal["huber", "squared"]
PERCEPTUAL = Distance(kind="perceptual")
HUBER_C = 0.00054
ADVERSARY = Adversarial(start=0.0, lr_scale=50.0, betas=(0.9, 0.999))
"""The published third stage's: rates of 1e-3 and 2e-5, from the first step on."""


@dataclass(frozen=True, kw_only=True)
class _Regressed:
    """What both stages' losses and times are set by."""

    regression: Regression = "huber"
    """Of velocity or acceleration: huber; squared, the mean of squares."""
    image: Distance | None = PERCEPTUAL
    """Of the image that is reached; None = none."""
    intervals: int = 1000
    """Times are uniform on the ends of as many equal intervals."""
    towards_ends: bool = False
    """Draw times of both ends more often, as 2-rectified flow++ does; then there are no intervals."""

    def __post_init__(self) -> None:
        if self.regression not in get_args(Regression):
            allowed = ", ".join(get_args(Regression))
            raise UserError(f"method.regression is {self.regression!r}; allowed: {allowed}")
        require_whole("method.intervals", self.intervals, 1)
        if self.towards_ends and self.intervals != _Regressed.intervals:
            raise UserError(f"method.intervals is {self.intervals}; it has no effect with method.towards_ends")

    def times(self, noise: StepNoise, like: Tensor) -> Tensor:
        """s [N] in [0, 1], float64."""
        if self.towards_ends:
            sigma = UShaped().sample(noise, wide(like))
            return sigma / (1 + sigma)
        places = (wide(noise.uniform(like)) * (self.intervals + 1)).floor().clamp(max=self.intervals)
        return places / self.intervals

    def losses(self, parts: Any, off: Tensor, reached: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole [N], and its terms."""
        found = {"regression": velocity_loss(self.regression, off, HUBER_C)}
        if self.image is not None:
            found["image"] = self.image(reached, images, getattr(parts, "features", None))
        return torch.stack(list(found.values())).sum(0), found

    def compared(self, features: Features | None) -> dict[str, Frozen]:
        """The part that images are compared by. Raises UserError where it is needed and not given."""
        if self.image is None or self.image.kind != "perceptual":
            return {}
        if not isinstance(features, nn.Module):
            raise UserError("method.image.kind is 'perceptual'; it needs a feature network (give `features`)")
        return {"features": Frozen(module=features)}


@dataclass(frozen=True, kw_only=True)
class InitialVelocityLearning(_Regressed):
    """The first stage: the velocity with which each pair's path begins."""

    product: ClassVar[str] = "flow"

    alpha: float = 1.5
    """The initial velocity in units of the straight line's: above 1 slowing down, 1 constant, below 1 speeding up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("method.alpha", self.alpha)

    def parts(
        self, *, network: nn.Module, spec: DataSpec, features: Features | None = None, couplings: bool = True
    ) -> Parts:
        """network: what begins afresh. Raises UserError without pairs, or without features to compare by."""
        check_coupling(Stored(), couplings)
        flow = InitialVelocity(network, alpha=self.alpha)
        return Parts(flow=Trained(module=flow), **self.compared(features))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the velocity."""
        pair = clamped(Stored()(batch, noise))
        s = self.times(noise, pair.images[:, 0, 0, 0])
        target = self.alpha * (pair.images - pair.latents)
        x_s = on_path(pair, target, s)
        guess = parts.flow.initial(x_s, s, pair.cond)
        reached = x_s + column((1 - s) / self.alpha).to(x_s.dtype) * guess
        loss, told = self.losses(parts, guess - target, reached, pair.images)
        yield Update("flow", loss, parts=told)


@dataclass(frozen=True, kw_only=True)
class ConstantAcceleration(_Regressed):
    """The second stage, the acceleration that carries each pair's noise to its image; the third, with an adversary."""

    product: ClassVar[str] = "flow"

    adversarial: Adversarial | None = None
    """The third stage's; None = the second stage."""

    def parts(
        self,
        *,
        network: nn.Module,
        velocity: Denoiser,
        spec: DataSpec,
        features: Features | None = None,
        couplings: bool = True,
        projections: Sequence[nn.Module] = (),
    ) -> Parts:
        """network: the acceleration's architecture. velocity: the first stage's flow.

        Raises UserError for another velocity, without pairs, without features to compare by, and where an adversary's
        weight has no last layer to be taken at.
        """
        check_coupling(Stored(), couplings)
        if not isinstance(velocity, InitialVelocity):
            raise UserError(
                f"velocity is {an(type(velocity).__name__)}; this method takes what InitialVelocityLearning has made "
                "(recipes caf-...-velocity)"
            )
        roles: dict[str, Any] = {"flow": Trained(module=AccelerationFlow.after(velocity, network))}
        if self.adversarial is not None:
            roles["discriminator"] = discriminator_part(self.adversarial, spec, projections)
        return Parts(**roles, **self.compared(features))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the acceleration; with an adversary every other one is the discriminator's."""
        adversary = self.adversarial if self.adversarial and clock.fraction >= self.adversarial.start else None
        pair = clamped(Stored()(batch, noise))
        first = torch.zeros_like(wide(pair.images[:, 0, 0, 0]))
        v0 = parts.flow.initial(pair.latents, first, pair.cond)
        if adversary is not None and clock.step % 2:
            with torch.no_grad():
                fake = one_step(parts.flow, pair, v0, first)
            yield self._discriminate(parts, batch.images, fake, adversary, noise)
            return
        s = self.times(noise, pair.images[:, 0, 0, 0])
        x_s = on_path(pair, v0, s)
        a = parts.flow.acceleration(x_s, s, v0, pair.cond)
        target = 2 * (pair.images - pair.latents) - 2 * v0
        reached = advanced(x_s, v0, a, s, torch.ones_like(s))
        loss, told = self.losses(parts, a - target, reached, pair.images)
        if adversary is not None:
            fake = one_step(parts.flow, pair, v0, first)
            fooled = -parts.discriminator(adversary.augment(fake, noise)).mean(1)
            weight = adaptive_weight(2 * loss, fooled, parts.flow.network.last_layer)
            weight = weight.clamp(adversary.least_weight, adversary.most_weight)
            loss = loss + weight * fooled
            told |= {"adversarial": fooled, "adversarial_weight": weight}
        yield Update("flow", loss, parts=told)

    def _discriminate(self, parts: Any, real: Tensor, fake: Tensor, adversary: Adversarial, noise: StepNoise) -> Update:
        """The discriminator's hinge loss."""
        real_logits, fake_logits = (parts.discriminator(adversary.augment(each, noise)) for each in (real, fake))
        told = {"real": F.relu(1 - real_logits).mean(1), "fake": F.relu(1 + fake_logits).mean(1)}
        return Update("discriminator", told["real"] + told["fake"], parts=told)


def clamped(pair: Coupling) -> Coupling:
    """The pair with its images in [-1, 1]."""
    return Coupling(pair.latents, pair.images.clamp(-1, 1), pair.cond)


def on_path(pair: Coupling, v0: Tensor, s: Tensor) -> Tensor:
    """x_s [N, C, H, W] of pairs, begun with v0, at s [N]."""
    square, between = (column(each).to(v0.dtype) for each in (s**2, s - s**2))
    return (1 - square) * pair.latents + square * pair.images + between * v0


def one_step(flow: AccelerationFlow, pair: Coupling, v0: Tensor, first: Tensor) -> Tensor:
    """z + v0 + a / 2."""
    a = flow.acceleration(pair.latents, first, v0, pair.cond)
    return advanced(pair.latents, v0, a, first, torch.ones_like(first))
