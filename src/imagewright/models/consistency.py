"""The consistency model: a flow map that goes to the start of the trajectory from anywhere on it.

Source   Song et al. 2023 (arXiv 2303.01469), section 3 and appendix C: the boundary condition f(x, sigma_min) = x is
         built into the scalings,  c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2),
         c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2),  c_in = 1 / sqrt(sigma^2 + sd^2).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from imagewright.models.preconditioning import EDMPrecond, Scalings
from imagewright.types import UNCONDITIONAL, Condition


class ConsistencyModel(EDMPrecond):
    """f(x, sigma): EDM's wrapper with the boundary condition. As a `FlowMap` it answers for sigma_to = 0 alone.

    The trajectory's start is its point at sigma_min, which stands for the clean image.
    """

    is_flow_map = True

    def scalings(self, sigma: Tensor) -> Scalings:
        above = sigma - self.sigma_min
        total = sigma**2 + self.sigma_data**2
        return Scalings(
            c_skip=self.sigma_data**2 / (above**2 + self.sigma_data**2),
            c_out=self.sigma_data * above / total.sqrt(),
            c_in=1 / total.sqrt(),
            c_noise=sigma.log() / 4,
        )

    def start(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """The trajectory's start, [N, C, H, W], from its point x at sigma [N] >= sigma_min."""
        return super().forward(x, sigma, cond)

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`; raises ValueError for a sigma_to other than 0."""
        if torch.any(torch.as_tensor(sigma_to) != 0):
            raise ValueError("a consistency model only goes to sigma_to = 0")
        return self.start(x, sigma, cond)

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond) -> ConsistencyModel:
        """A consistency model that starts from a copy of a denoiser's network, noise range and sigma_data."""
        network = copy.deepcopy(denoiser.network).requires_grad_(True)
        return cls(network, denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data).train()
