"""The trajectory model: a flow map from any noise level to any lower one, which contains a denoiser.

Source   Kim et al. 2024 (arXiv 2310.02279), section 3:  G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s),
         g = c_skip(t) x + c_out(t) F(c_in(t) x; c_noise(t), c_noise(s)) with EDM's scalings. As s -> t, g becomes the
         denoiser E[x0 | x_t], so the score comes with the map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn

from imagewright.models.preconditioning import EDMPrecond
from imagewright.types import UNCONDITIONAL, Condition


class Teachable(Protocol):
    """A network that can be told where to go; see `networks.UNet.told_destination`."""

    def told_destination(self) -> nn.Module: ...


class TrajectoryModel(EDMPrecond):
    """G(x, sigma, sigma_to) for 0 <= sigma_to <= sigma. sigma_min stands for the clean image, so 0 means sigma_min."""

    is_flow_map = True

    def towards(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """g: where the jump's straight line meets sigma = 0, [N, C, H, W]; the denoiser at sigma_to = sigma."""
        told = self.c_noise(sigma_to.clamp(min=self.sigma_min).to(torch.promote_types(sigma_to.dtype, torch.float32)))
        return super().forward(x, sigma, replace(cond, destination=told))

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`."""
        ratio = (sigma_to.clamp(min=self.sigma_min) / sigma)[:, None, None, None]
        return ratio * x + (1 - ratio) * self.towards(x, sigma, sigma_to, cond)

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond) -> Self:
        """A trajectory model whose g is, until it is trained, the denoiser's answer whatever the destination."""
        network = cast(Teachable, denoiser.network).told_destination().requires_grad_(True)
        return cls(network, denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data, denoiser.noise_label).train()
