"""The trajectory model: a flow map from any noise level to any lower one, which contains a denoiser.

Source   Kim et al. 2024 (arXiv 2310.02279), section 3:  G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s),
         g = c_skip(t) x + c_out(t) F(c_in(t) x; c_noise(t), c_noise(s)) with EDM's scalings. As s -> t, g becomes the
         denoiser E[x0 | x_t], so the score comes with the map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import EDMPrecond, student_network
from imagewright.types import UNCONDITIONAL, Condition, UserError


@runtime_checkable
class Teachable(Protocol):
    """A network that can be told where to go; see `networks.UNet.told_destination`."""

    def told_destination(self) -> nn.Module: ...


class TrajectoryModel(EDMPrecond):
    """G(x, sigma, sigma_to) for 0 <= sigma_to <= sigma. sigma_min stands for the clean image, so 0 means sigma_min."""

    kind = "flow_map"

    def towards(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """g: where the jump's straight line meets sigma = 0, [N, C, H, W]; the denoiser at sigma_to = sigma."""
        parameter = next(self.network.parameters(), None)
        dtype = torch.promote_types(torch.float32 if parameter is None else parameter.dtype, torch.float32)
        told = self.label_to(sigma_to.to(dtype))
        return super().forward(x, sigma, replace(cond, destination=told))

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`."""
        ratio = (self.end(sigma_to) / sigma)[:, None, None, None]
        jumped: Tensor = ratio * x + (1 - ratio) * self.towards(x, sigma, sigma_to, cond)
        return jumped.to(x.dtype)

    def end(self, sigma_to: Tensor) -> Tensor:
        """The level where a jump towards sigma_to ends."""
        return sigma_to.clamp(min=self.sigma_min)

    def label_to(self, sigma_to: Tensor) -> Tensor:
        """What the network is told of where to go."""
        return self.c_noise(sigma_to.clamp(min=self.sigma_min))

    def denoiser(self) -> ContainedDenoiser:
        """g(x, t, t) as a `Denoiser` with the same weights: for ODE samplers and for the likelihood."""
        return ContainedDenoiser(self)

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, dropout: float = 0.0) -> Self:
        """A trajectory model whose g is, until it is trained, the denoiser's answer whatever the destination.

        Raises UserError when the denoiser's network cannot be told a destination.
        """
        network = told_destination(denoiser, dropout).requires_grad_(True)
        return cls(network, denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data, denoiser.noise_label).train()


def told_destination(denoiser: EDMPrecond, dropout: float = 0.0) -> nn.Module:
    """A student's network that is told where to go. Raises UserError when the denoiser's cannot be."""
    if not isinstance(denoiser.network, Teachable):
        raise UserError(
            f"the denoiser's network is {an(type(denoiser.network).__name__)}, which cannot be told where to go; "
            "it needs a method told_destination()"
        )
    return cast(Teachable, student_network(denoiser, dropout)).told_destination()


class ContainedDenoiser(nn.Module):
    """The denoiser that a trajectory model contains, x -> g(x, sigma, sigma)."""

    def __init__(self, model: TrajectoryModel) -> None:
        super().__init__()
        self.model = model
        self.sigma_min, self.sigma_max = model.sigma_min, model.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`."""
        return self.model.towards(x, sigma, sigma, cond)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return torch.as_tensor(sigma)
