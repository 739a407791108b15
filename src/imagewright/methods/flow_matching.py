"""Flow matching on the straight path (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, 2209.03003), and how
LightningDiT trains it (Yao et al. 2025, 2501.01423).

Networks   flow (trained), from fresh weights, or from a denoiser's by an exact change of coordinates (`models.flow`).
Time       t = 0 is the image, 1 the noise, x_t = (1 - t) x0 + t z; papers that count from the noise have 1 - t.
Ingredients   loss |v(x_t, t) - (z - x0)|^2, the mean over an image's numbers, weight 1; a law of t: uniform (the
           papers'), logit-normal (Esser et al. 2024), towards both ends (Lee et al. 2024), towards the noise (Kim et
           al. 2024); a coupling of noise and images: independent (flow matching, the 1-rectified flow), minibatch
           optimal transport, or a teacher's pairs (reflow: the 2-rectified flow of Liu et al.).
           LightningDiT's: logit-normal times, uniform ones from the middle of a long run on; beside the squares the
           velocity direction loss: 1 minus the cosine of v and z - x0 over a pixel's channels, the mean over pixels.
Departs    No path but the straight one. Uniform times stay within [1e-5, 1 - 1e-5]. In `preconditioning` "edm" the
           network's answer enters through EDM's factors and the loss stays the velocity's. LightningDiT counts time
           from the noise: the network is told 1 - t there, and asked for x0 - z, which a fresh one does not mind. Its
           program can also train on a part of the times alone (no published run does).
Checked    the flow of a denoiser has its ODE and end point; the loss's minimum for Gaussian data; the assignment is the
           best permutation; resume bit for bit; both losses are those of LightningDiT's program; the direction's is
           least at another velocity, and how far off that is (tests/methods/test_velocity_direction.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.checks import require_non_negative, require_positive
from imagewright.methods.noise_couplings import AnyCoupling, Independent, check_coupling
from imagewright.models.flow import EDMFlow, VelocityFlow, flow_of
from imagewright.paths.gaussian import Linear
from imagewright.paths.noise_levels import ExponentialTime, LogitNormal, UniformTime, UShaped
from imagewright.precision import wide
from imagewright.types import (
    Batch,
    Clock,
    Coupling,
    DataSpec,
    Denoiser,
    Event,
    Noise,
    Parts,
    Span,
    Trained,
    Update,
    UserError,
)

Times = UniformTime | LogitNormal | UShaped | ExponentialTime
FlowPreconditioning = Literal["velocity", "edm"]
PATH = Linear()
TIME_SCALE = 999.0
"""What multiplies the times that a network is told, of flows without a scale of their own."""


class OnPath(NamedTuple):
    """Pairs on the straight path: the points x_t [N, C, H, W], t and sigma [N], and their velocity z - x0."""

    x_t: Tensor
    t: Tensor
    sigma: Tensor
    velocity: Tensor


def on_path(pair: Coupling, times: Times, noise: Noise) -> OnPath:
    """Pairs at times drawn from a law, one for each; t in float64, where 1 - t keeps its digits."""
    sigma = times.sample(noise, pair.images[:, 0, 0, 0])
    t = PATH.time_of(wide(sigma))
    return OnPath(PATH.mix(pair.images, pair.latents, t), t, sigma, pair.latents - pair.images)


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Learn the velocity of the straight path between noise and images."""

    product: ClassVar[str] = "flow"

    times: Times = UniformTime()
    """Law of t in training."""
    uniform_from_images: Span | None = None
    """From so many images of the run on, t is uniform instead; None = never."""
    direction: float = 0.0
    """Weight of the velocity direction loss, beside the squares; LightningDiT: 1. At a guess of zero, as those of a
    fresh network are, its gradient is 1e8 a pixel: it wants an optimiser that forgets that (betas 0.9, 0.95 in hundreds
    of updates, 0.9, 0.999 in tens of thousands)."""
    time_scale: float = TIME_SCALE
    """Of a fresh network in preconditioning "velocity": it is told time_scale * t; LightningDiT: 1."""
    coupling: AnyCoupling = Independent()
    """Which noise belongs to which image."""
    preconditioning: FlowPreconditioning = "velocity"
    """Of a fresh network: it is asked for the velocity itself, or through EDM's factors. A teacher's stays its own."""
    dropout: float = 0.0
    """Of a network that starts from a teacher's; a fresh one has its own."""

    def __post_init__(self) -> None:
        if self.preconditioning not in get_args(FlowPreconditioning):
            allowed = ", ".join(get_args(FlowPreconditioning))
            raise UserError(f"method.preconditioning is {self.preconditioning!r}; allowed: {allowed}")
        require_non_negative("method.direction", self.direction)
        require_positive("method.time_scale", self.time_scale)
        if self.time_scale != TIME_SCALE and self.preconditioning != "velocity":
            raise UserError(f"method.time_scale is {self.time_scale}; it has no effect with EDM's preconditioning")
        if self.uniform_from_images is not None:
            require_non_negative("method.uniform_from_images", self.uniform_from_images)
            if isinstance(self.times, UniformTime):
                raise UserError(
                    f"method.uniform_from_images is {self.uniform_from_images}; it has no effect with uniform times"
                )

    def parts(
        self,
        *,
        spec: DataSpec,
        network: nn.Module | None = None,
        teacher: Denoiser | None = None,
        couplings: bool = False,
    ) -> Parts:
        """network: what begins afresh; or teacher: the denoiser whose flow it begins as.

        Raises UserError for both or neither, for a teacher without an exact flow, for pairs that do not fit
        `coupling`, and for a direction's loss on images of one channel.
        """
        check_coupling(self.coupling, couplings)
        if self.direction and spec.channels == 1:
            raise UserError(
                f"method.direction is {self.direction}; it has no effect on images of one channel, whose directions "
                "are up and down"
            )
        return Parts(flow=Trained(module=self.start(network, teacher)))

    def start(self, network: nn.Module | None, teacher: Denoiser | None) -> nn.Module:
        """The flow at the start of training."""
        if (network is None) == (teacher is None):
            both = "both are given" if network is not None else "neither is given"
            raise UserError(
                f"a flow starts from a network or from a teacher (--teacher RUN), and {both}; recipes whose names end "
                "in -from-edm have no network of their own"
            )
        if network is None:
            for name, usual in (("preconditioning", "velocity"), ("time_scale", TIME_SCALE)):
                if getattr(self, name) != usual:
                    value = getattr(self, name)
                    raise UserError(f"method.{name} is {value!r}; it has no effect with a teacher, whose own is kept")
            return flow_of(teacher, self.dropout)
        if self.dropout:
            raise UserError(f"method.dropout is {self.dropout}; without a teacher it is network.dropout that counts")
        return (
            VelocityFlow(network, time_scale=self.time_scale)
            if self.preconditioning == "velocity"
            else EDMFlow(network)
        )

    def times_at(self, clock: Clock) -> Times:
        """The law of t at this place of the run."""
        start = self.uniform_from_images
        if start is None or clock.images < (start if start >= 1 else start * clock.total_images):
            return self.times
        return UniformTime()

    def step(self, parts: Any, batch: Batch, noise: Noise, clock: Clock) -> Iterator[Event]:
        """One update of the flow."""
        pair = self.coupling(batch, noise)
        point = on_path(pair, self.times_at(clock), noise)
        guess = parts.flow.velocity(point.x_t, point.t, pair.cond)
        loss = squares = (guess - point.velocity).square().flatten(1).mean(1)
        seen: dict[str, Tensor] = {}
        if self.direction:
            off = off_course(guess, point.velocity)
            loss, seen = squares + self.direction * off, {"velocity": squares, "direction": off}
        yield Update("flow", loss, parts=seen, at=point.sigma)


def off_course(guess: Tensor, velocity: Tensor) -> Tensor:
    """1 minus the cosine of two velocities [N, C, H, W] over channels, mean over pixels, [N]; 1 for a guess of zero."""
    return 1 - F.cosine_similarity(guess, velocity, dim=1).flatten(1).mean(1)  # whose eps, 1e-8, is the program's too
