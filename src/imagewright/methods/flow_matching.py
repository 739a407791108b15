"""Flow matching on the straight path (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, 2209.03003).

Networks   flow (trained), from fresh weights, or from a denoiser's by an exact change of coordinates (`models.flow`).
Time       t = 0 is the image, 1 the noise, x_t = (1 - t) x0 + t z; papers that count from the noise have 1 - t.
Ingredients   loss |v(x_t, t) - (z - x0)|^2, the mean over an image's numbers, weight 1; a law of t: uniform (the
           papers'), logit-normal (Esser et al. 2024), towards both ends (Lee et al. 2024), towards the noise (Kim et
           al. 2024); a coupling of noise and images: independent (flow matching, the 1-rectified flow), minibatch
           optimal transport, or a teacher's pairs (reflow: the 2-rectified flow of Liu et al.).
Departs    No path but the straight one. Times stay within [1e-5, 1 - 1e-5]. In `preconditioning` "edm" the network's
           answer enters through EDM's factors and the loss stays the velocity's.
Checked    the flow of a denoiser has its ODE and end point; the loss's minimum for Gaussian data; the assignment is the
           best permutation; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor, nn

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
    Trained,
    Update,
    UserError,
)

Times = UniformTime | LogitNormal | UShaped | ExponentialTime
FlowPreconditioning = Literal["velocity", "edm"]
PATH = Linear()


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

    def parts(
        self,
        *,
        spec: DataSpec,
        network: nn.Module | None = None,
        teacher: Denoiser | None = None,
        couplings: bool = False,
    ) -> Parts:
        """network: what begins afresh; or teacher: the denoiser whose flow it begins as.

        Raises UserError for both or neither, for a teacher without an exact flow, and for pairs that do not fit
        `coupling`.
        """
        check_coupling(self.coupling, couplings)
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
            if self.preconditioning != "velocity":
                raise UserError(
                    f"method.preconditioning is {self.preconditioning!r}; it has no effect with a teacher, whose own "
                    "is kept"
                )
            return flow_of(teacher, self.dropout)
        if self.dropout:
            raise UserError(f"method.dropout is {self.dropout}; without a teacher it is network.dropout that counts")
        return VelocityFlow(network) if self.preconditioning == "velocity" else EDMFlow(network)

    def step(self, parts: Any, batch: Batch, noise: Noise, clock: Clock) -> Iterator[Event]:
        """One update of the flow."""
        pair = self.coupling(batch, noise)
        point = on_path(pair, self.times, noise)
        guess = parts.flow.velocity(point.x_t, point.t, pair.cond)
        yield Update("flow", (guess - point.velocity).square().flatten(1).mean(1), at=point.sigma)
