"""Flow maps in the time of the straight path, from any time to any other: the students of Align Your Flow.

Source   Sabour et al. 2025 (arXiv 2506.14603), section 3: f(x_t, t, s) = x_t + (s - t) F(x_t, t, s), F(x_t, t, t) being
         the velocity. In units of the data's deviation, with t = sigma / (sigma + sd) and x_t = (1 - t) x / sd, this
         is a trajectory model (`models.trajectory`) in other coordinates: with EDM's scalings and n^2 = t^2 + (1 - t)^2

             F(x_t, t, s) = (2 t - 1) x_t / n^2 - F_network(x_t / n; c_noise(t), c_noise(s), lambda) / n,

         which is finite at both ends. Its trajectories end at t = 0, the clean image itself, where CTM's end at
         sigma_min.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from imagewright.models.preconditioning import EDMPrecond, NoiseLabel
from imagewright.models.trajectory import TrajectoryModel, told_destination
from imagewright.models.weighted import Weighted, told_weight
from imagewright.types import UNCONDITIONAL, Condition


class AlignedFlowMap(Weighted, TrajectoryModel):
    """f between any two noise levels, up or down, and F in the straight path's time.

    weights: range of the guidance strength that the network is told, None for one that is told none. weight: its own.
    """

    settings = (*EDMPrecond.settings, "weights", "weight")
    usual_sampler = "jumps"

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "time",
        weights: Sequence[float] | None = None,
        weight: float | None = None,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, noise_label)
        self.set_weights(weights, weight)

    def end(self, sigma_to: Tensor) -> Tensor:
        return sigma_to

    def time_of(self, sigma: float | Tensor) -> Tensor:
        """t of the straight path, in units of the data's deviation; float64 of a number."""
        level = torch.as_tensor(sigma, dtype=None if isinstance(sigma, Tensor) else torch.float64)
        return level / (level + self.sigma_data)

    def mean_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """F(x_t, t, s), shape of x_t [N, C, H, W]; t in (0, 1), s in [0, 1): [N].

        Not by the module's call, since a compiled one has no forward-mode derivative.
        """
        sd, norm = self.sigma_data, (t**2 + (1 - t) ** 2).sqrt()[:, None, None, None]
        told = self.told(replace(cond, destination=self.label_to(sd * s / (1 - s))), x_t)
        answer: Tensor = self.network.forward(x_t / norm, self.c_noise(sd * t / (1 - t)), told)
        straight: Tensor = (2 * t - 1)[:, None, None, None] * x_t / norm**2
        return straight - answer[:, : x_t.shape[1]] / norm

    @classmethod
    def from_teacher(cls, denoiser: EDMPrecond, weights: tuple[float, float] | None = None) -> Self:
        """A map whose F is, until it is trained, the denoiser's velocity, whatever the destination and the strength.

        Raises UserError when the denoiser's network can be told neither.
        """
        network, d = told_destination(denoiser), denoiser
        network = told_weight(network) if weights is not None else network
        network = network.requires_grad_(True)
        return cls(network, d.sigma_min, d.sigma_max, d.sigma_data, d.noise_label, weights).train()
