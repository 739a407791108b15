"""One-step and few-step generators: a denoiser's network and scalings, asked at a few fixed noise levels only.

Source   Yin et al. 2024 (DMD, arXiv 2311.18828), section 4.1: G(z) = D(sigma_max z; sigma_max), from the denoiser's
         weights. Few steps (DMD2, 2405.14867, section 4.4): the answer is noised again to the next level, and so on,
         which is what `samplers.MultistepConsistency` does with any flow map.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor

from imagewright.models.preconditioning import EDMPrecond
from imagewright.types import UNCONDITIONAL, Condition


class FewStepGenerator(EDMPrecond):
    """G(x, sigma), an image from noise at sigma_max, or from a noised image at another level that it was trained for.

    As a `FlowMap` it answers for sigma_to = 0 alone. It is no map along trajectories: what it keeps is the law.
    """

    kind = "flow_map"

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0 = none."""
        return int(getattr(getattr(self.network, "config", None), "label_dim", 0))

    def start(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """The image [N, C, H, W] from x at noise level sigma [N]."""
        return super().forward(x, sigma, cond)

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`; raises ValueError for a sigma_to other than 0."""
        if torch.any(torch.as_tensor(sigma_to) != 0):
            raise ValueError("a generator only goes to sigma_to = 0")
        return self.start(x, sigma, cond)

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, sigma_max: float | None = None) -> Self:
        """A generator that starts from a copy of a denoiser's network; sigma_max: level of pure noise, None = its."""
        return cls(
            copy.deepcopy(denoiser.network).requires_grad_(True),
            denoiser.sigma_min,
            denoiser.sigma_max if sigma_max is None else sigma_max,
            denoiser.sigma_data,
            denoiser.noise_label,
        ).train()
