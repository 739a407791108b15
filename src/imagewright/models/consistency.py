"""Consistency models: flow maps that go to the start of the trajectory from anywhere on it.

Source   Song et al. 2023 (arXiv 2303.01469), section 3 and appendix C: the boundary condition f(x, sigma_min) = x is
         built into the scalings,  c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2),
         c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2),  c_in = 1 / sqrt(sigma^2 + sd^2).
         Lu and Song 2024 (2410.11081), section 3: f = cos(t) x_t - sin(t) sd F. In our coordinates, t being
         arctan(sigma / sd) and x_t = cos(t) x, these are EDM's own scalings (with -F for F); f(x, 0) = x.
"""

from __future__ import annotations

import math
from typing import Self

from torch import Tensor

from imagewright.errors import an
from imagewright.models.flow import EDMFlow
from imagewright.models.preconditioning import EDMPrecond, Preconditioned, Scalings, student_network
from imagewright.models.recast import knows_every_level, recast
from imagewright.models.start_map import StartMap
from imagewright.types import UserError, kind_of


class ConsistencyModel(StartMap):
    """f(x, sigma): EDM's wrapper with the boundary condition.

    The trajectory's start is its point at sigma_min, which stands for the clean image.
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        above = sigma - self.sigma_min
        total = sigma**2 + self.sigma_data**2
        return Scalings(
            c_skip=self.sigma_data**2 / (above**2 + self.sigma_data**2),
            c_out=self.sigma_data * above / total.sqrt(),
            c_in=1 / total.sqrt(),
            c_noise=self.c_noise(sigma),
        )

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, dropout: float = 0.0) -> Self:
        """A consistency model that starts from a denoiser's weights, noise range and sigma_data."""
        network, d = student_network(denoiser, dropout), denoiser
        return cls(network, d.sigma_min, d.sigma_max, d.sigma_data, d.noise_label).train()


class ContinuousConsistencyModel(ConsistencyModel):
    """The TrigFlow consistency model: the trajectory's start is the clean image itself, at sigma = 0.

    sigma_min is the lowest noise level in training; below it the answer is x, nearly.
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        return EDMPrecond.scalings(self, sigma)


def edm_teacher(teacher: object) -> EDMPrecond:
    """The teacher, if its trajectories can be distilled: a denoiser of every noise level, and no flow map.

    Of one with another preconditioning than EDM's, a flow or a VP or VE denoiser, the same with EDM's (`recast`).
    Raises UserError otherwise.
    """
    if isinstance(teacher, EDMFlow):
        return teacher.as_denoiser()
    # A consistency model has EDM's wrapper too, but its answer is no posterior mean.
    if not isinstance(teacher, Preconditioned) or kind_of(teacher) != "denoiser" or not knows_every_level(teacher):
        raise UserError(
            f"the teacher is {an(type(teacher).__name__)}; distillation needs a denoiser that knows every noise level"
        )
    if not isinstance(teacher, EDMPrecond):
        return recast(teacher)
    if not 0 < teacher.sigma_min < teacher.sigma_max < math.inf:
        raise UserError(
            f"the teacher's sigma_min is {teacher.sigma_min} and sigma_max is {teacher.sigma_max}; "
            "they must satisfy 0 < sigma_min < sigma_max, both finite"
        )
    return teacher
