"""Constant acceleration: an initial velocity and what is added to it on the way (Park et al. 2024, arXiv 2411.00322).

Path       x_s = (1 - s^2) z + s^2 x + v0 (s - s^2), s = 0 the noise, 1 the image: from z with the velocity v0 and the
           acceleration a = 2 (x - z) - 2 v0. Its end is x whatever v0. With v0 = alpha (x - z) it is the straight line,
           run through at another pace: x_s = (1 - b) z + b x, b = alpha s + (1 - alpha) s^2, so sigma = (1 - b) / b.
Models     `InitialVelocity` is asked for v0 at x_s: alpha times a flow's velocity at that pace, hence a denoiser.
           `AccelerationFlow` has such a one, frozen, and a network that is asked for a at x_s, and is shown v0: a flow
           map, of two calls a jump; `samplers.Accelerated` asks for v0 once.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.errors import an
from imagewright.models.flow import SIGMA_MAX, SIGMA_MIN, Flow, checked_times
from imagewright.models.preconditioning import Describable, Preconditioned, Scalings
from imagewright.networks import UNet
from imagewright.paths.gaussian import per_image
from imagewright.types import UNCONDITIONAL, Condition, ModelKind, UserError


def check_alpha(name: str, alpha: float) -> float:
    """alpha as a number. Raises UserError unless it lies in (0, 2): beyond, the path would turn back."""
    if not 0 < float(alpha) < 2:
        raise UserError(f"{name} is {alpha}; it must lie in (0, 2), or the path would run back")
    return float(alpha)


def progress_of(sigma: Tensor, alpha: float) -> Tensor:
    """s in [0, 1] at noise level sigma, where alpha s + (1 - alpha) s^2 = 1 / (1 + sigma)."""
    b = 1 / (1 + sigma)
    return 2 * b / (alpha + (alpha**2 + 4 * (1 - alpha) * b).clamp(min=0).sqrt())


class InitialVelocity(Flow, Preconditioned):
    """A network asked for v0 = alpha (x - z) on the path; it is told time_scale * s."""

    settings = ("sigma_min", "sigma_max", "alpha", "time_scale")

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        alpha: float = 1.5,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = checked_times(sigma_min, sigma_max)
        self.alpha = check_alpha("alpha", alpha)
        require_positive("time_scale", time_scale)
        self.time_scale = float(time_scale)

    def scalings(self, sigma: Tensor) -> Scalings:
        b = 1 / (1 + sigma)
        told = self.time_scale * progress_of(sigma, self.alpha)
        return Scalings(c_skip=b, c_out=sigma * b / self.alpha, c_in=b, c_noise=told)

    def initial(self, x_s: Tensor, s: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """v0 at x_s [N, C, H, W] and s [N] in [0, 1]; dtype of x_s."""
        return _asked(self.network, x_s, self.time_scale * s, cond, x_s.shape[1])


class AccelerationFlow(nn.Module):
    """Jumps along the path: v0 of one network, then the acceleration of another, which is shown the point and v0."""

    kind: ClassVar[ModelKind] = "flow_map"
    usual_sampler: ClassVar[str] = "accelerated"
    shown: ClassVar[int] = 2
    """Images that the network sees at once: the point, and v0."""

    def __init__(self, velocity: InitialVelocity, network: nn.Module) -> None:
        super().__init__()
        self.velocity, self.network = velocity, network
        self.sigma_min, self.sigma_max = velocity.sigma_min, velocity.sigma_max
        velocity.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but the velocity only ever answers."""
        super().train(mode)
        self.velocity.eval()
        return self

    @torch.no_grad()
    def initial(self, x_s: Tensor, s: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """v0 [N, C, H, W], without gradient; as `InitialVelocity.initial`."""
        return self.velocity.initial(x_s, s, cond)

    def acceleration(self, x_s: Tensor, s: Tensor, v0: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """a at x_s [N, C, H, W] and s [N], shown v0; dtype of x_s."""
        seen = torch.cat([x_s, v0.to(x_s.dtype)], 1)
        return _asked(self.network, seen, self.velocity.time_scale * s, cond, x_s.shape[1])

    def forward(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.FlowMap`."""
        s, to = (progress_of(level, self.velocity.alpha) for level in (sigma, sigma_to))
        at = x / per_image(1 + sigma, x)
        v0 = self.initial(at, s, cond)
        moved = advanced(at, v0, self.acceleration(at, s, v0, cond), s, to)
        landed: Tensor = moved * per_image(1 + sigma_to, x)
        return landed.to(x.dtype)

    def evaluations(self, sigma: float) -> int:
        """Network evaluations of one jump."""
        return 2

    def describe(self) -> dict[str, Any]:
        """As `Preconditioned.describe`."""
        network = cast(Describable, self.network).describe()
        return {"class": type(self).__name__, "velocity": self.velocity.describe(), "network": network}

    @classmethod
    def after(cls, velocity: InitialVelocity, network: nn.Module) -> Self:
        """A copy of a trained velocity with a fresh network of the architecture given, that sees twice the channels.

        Raises UserError for what is no U-Net of the library.
        """
        if not isinstance(network, UNet):
            raise UserError(f"the network is {an(type(network).__name__)}, whose number of channels cannot be doubled")
        config = replace(network.config, in_channels=2 * network.config.out_channels)
        return cls(copy.deepcopy(velocity), type(network)(config))


def advanced(x_s: Tensor, v0: Tensor, a: Tensor, s: Tensor, to: Tensor) -> Tensor:
    """From s to `to` [N] with the velocity v0 + a s; exact where a is constant."""
    step, middle = (per_image(each, x_s) for each in (to - s, (s + to) / 2))
    return x_s + step * v0 + middle * step * a


def _asked(network: nn.Module, x: Tensor, label: Tensor, cond: Condition, channels: int) -> Tensor:
    parameter = next(network.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    answer: Tensor = network(x.to(dtype), label.to(at_least_float32).expand(len(x)), cond)
    return answer[:, :channels].to(at_least_float32).to(x.dtype)
