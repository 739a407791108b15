"""One-step and few-step generators: a denoiser's network and scalings, asked at a few fixed noise levels only.

Source   Yin et al. 2024 (DMD, arXiv 2311.18828), section 4.1: G(z) = D(sigma_max z; sigma_max), from the denoiser's
         weights. Few steps (DMD2, 2405.14867, section 4.4): the answer is noised again to the next level, and so on,
         which is what `samplers.MultistepConsistency` does with any flow map.
"""

from __future__ import annotations

import copy
from typing import Self

from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.start_map import StartMap


class FewStepGenerator(StartMap):
    """G(x, sigma), an image from noise at sigma_max, or from a noised image at another level that it was trained for.

    It is no map along trajectories: what it keeps is the law.
    """

    asked: tuple[int, ...] | None = None
    """Classes that training asks it for; None = all. Not described: a model's file says which it never saw."""

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
