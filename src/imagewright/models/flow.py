"""Flows: denoisers that say how a point moves on the straight path, x_t = (1 - t) x0 + t z, dx_t/dt = z - x0.

Both are one function in two coordinates: sigma = t / (1 - t), x = x_t / (1 - t), D(x; sigma) = x_t - t v(x_t, t). A
flow is a `Denoiser`, so whatever draws from, guides, searches or learns from a denoiser takes a flow; beside that it
has `velocity`, which is finite up to t = 1.

    VelocityFlow   a network that is asked for the velocity itself: F(x_t; label) = v(x_t, t), as a preconditioning
                   c_skip = c_in = 1 / (1 + sigma), c_out = -sigma / (1 + sigma); or for x0 - z and told 1 - t
                   (from_noise), as SiT and LightningDiT have it
    EDMFlow, VPFlow, VEFlow
                   a denoiser's own preconditioning and network, which is that denoiser's flow exactly: the start of
                   reflow (Lee et al. 2024, arXiv 2405.20320, section 4.3), whatever the denoiser was trained as

Range      times from 1e-5 to 1 - 1e-5, as in the official program of the latter; beyond the levels that the denoiser
           was trained for, its formulas go on as they are, and training on the path makes them true.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.errors import an
from imagewright.models.edm2 import EDM2Precond
from imagewright.models.preconditioning import (
    EDMPrecond,
    NoiseLabel,
    Preconditioned,
    Scalings,
    VEPrecond,
    VPPrecond,
    student_network,
)
from imagewright.paths.conversions import velocity_of
from imagewright.paths.gaussian import Linear
from imagewright.types import UNCONDITIONAL, Condition, UserError

MARGIN = 1e-5
"""How near to both ends of the path a flow is trained and asked."""
SIGMA_MIN, SIGMA_MAX = MARGIN / (1 - MARGIN), (1 - MARGIN) / MARGIN
"""The noise levels of these times."""


class Flow:
    """What a denoiser needs beside its answers to be a flow."""

    usual_sampler: ClassVar[str] = "straight"

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """dx_t/dt at x_t [N, C, H, W] and times t [N] in (0, 1], best in float64; dtype of x_t."""
        return velocity_of(self, Linear())(x_t, t, cond)  # type: ignore[arg-type]  # which is a Denoiser


class VelocityFlow(Flow, Preconditioned):
    """A network trained on the velocity of the straight path.

    time_scale: the network is told time_scale * t. from_noise: it counts time from the noise, 1 - t, and its answer is
    the way from there to the image.
    """

    settings = ("sigma_min", "sigma_max", "time_scale", "from_noise")

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        time_scale: float = 999.0,
        from_noise: bool = False,
    ) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = checked_times(sigma_min, sigma_max)
        require_positive("time_scale", time_scale)
        self.time_scale, self.from_noise = float(time_scale), bool(from_noise)

    def scalings(self, sigma: Tensor) -> Scalings:
        alpha, t = 1 / (1 + sigma), sigma / (1 + sigma)
        told, c_out = (alpha, t) if self.from_noise else (t, -t)
        return Scalings(c_skip=alpha, c_out=c_out, c_in=alpha, c_noise=self.time_scale * told)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `Flow.velocity`, t in [0, 1]: what the network says."""
        parameter = next(self.network.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        at_least_float32 = torch.promote_types(dtype, torch.float32)
        label = (self.time_scale * (1 - t if self.from_noise else t)).to(at_least_float32).expand(len(x_t))
        answer: Tensor = self.network(x_t.to(dtype), label, cond)
        answer = answer[:, : x_t.shape[1]].to(at_least_float32).to(x_t.dtype)
        return -answer if self.from_noise else answer


class EDMFlow(Flow, EDMPrecond):
    """EDM's preconditioning up to the ends of the straight path."""

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
    ) -> None:
        super().__init__(network, *checked_times(sigma_min, sigma_max), sigma_data, noise_label)

    def as_denoiser(self) -> EDMPrecond:
        """The same network, not copied, as a denoiser of EDM's usual range: what students of denoisers learn from."""
        return EDMPrecond(self.network, sigma_data=self.sigma_data, noise_label=self.noise_label).train(self.training)


class VPFlow(Flow, VPPrecond):
    """The variance-preserving row up to the ends of the straight path; its clock goes on beyond t = 1."""

    settings = (*VPPrecond.settings, "sigma_min", "sigma_max")

    def __init__(
        self,
        network: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
    ) -> None:
        super().__init__(network, beta_d, beta_min, M, epsilon_t)
        self.sigma_min, self.sigma_max = checked_times(sigma_min, sigma_max)


class VEFlow(Flow, VEPrecond):
    """The variance-exploding row up to the ends of the straight path."""

    def __init__(self, network: nn.Module, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> None:
        super().__init__(network, *checked_times(sigma_min, sigma_max))


FLOWS: Mapping[type[Preconditioned], type[Preconditioned]] = {
    EDMPrecond: EDMFlow,
    EDM2Precond: EDMFlow,
    VPPrecond: VPFlow,
    VEPrecond: VEFlow,
}
"""The flow of each denoiser that has an exact one and is none."""


def flow_of(denoiser: object, dropout: float = 0.0) -> Preconditioned:
    """The flow of a denoiser, exactly, to train on: a copy of its network, with its own dropout.

    Raises UserError for a denoiser that knows a table of noise levels alone, or is no network with a preconditioning.
    """
    kind: Any = type(denoiser) if isinstance(denoiser, Flow) else FLOWS.get(type(denoiser))  # type: ignore[arg-type]
    if kind is None or not isinstance(denoiser, Preconditioned):
        names = ", ".join(sorted(kind.__name__ for kind in FLOWS))
        raise UserError(
            f"the teacher is {an(type(denoiser).__name__)}, which has no exact flow at every time; a flow starts from "
            f"another, or from one of {names}"
        )
    own = {name: getattr(denoiser, name) for name in kind.settings if name not in ("sigma_min", "sigma_max")}
    flow: Preconditioned = kind(student_network(denoiser, dropout), **own)
    return flow


def forgotten(flow: Preconditioned) -> Preconditioned:
    """The same flow with a fresh network of the same architecture, drawn from torch's generator."""
    network: Any = flow.network
    fresh = copy.copy(flow)
    fresh._modules = {**flow._modules, "network": type(network)(network.config)}
    return fresh


def checked_times(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The ends of the range as numbers. Raises UserError unless 0 < sigma_min < sigma_max, both finite."""
    low, high = float(sigma_min), float(sigma_max)
    if not 0 < low < high < float("inf"):
        raise UserError(f"sigma_min is {low} and sigma_max is {high}; a flow needs 0 < sigma_min < sigma_max < inf")
    return low, high
