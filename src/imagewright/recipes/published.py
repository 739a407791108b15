"""Published settings in this library's units: what recipes that follow an official program share."""

from __future__ import annotations

import math

from imagewright.training.config import EmaConfig
from imagewright.training.ema import gamma_of_std


def halflife_images(batch: int, decay: float) -> float:
    """Half-life, in images, of an average that keeps `decay` at every step of `batch` images."""
    return batch * math.log(0.5) / math.log(decay)


def eps_of_mean(numbers: int, *, eps: float = 1e-8, loss_scale: float = 1.0) -> float:
    """Adam's eps for a loss that is the mean over an image's `numbers`, where the official program takes their sum.

    Gradients are smaller by that factor, and with eps smaller by as much every step is the official one. eps: the
    official program's. loss_scale: a constant that it leaves in its gradients.

    Programs that take the mean themselves keep their eps: both of the consistency models' (CD, CT, progressive
    distillation) and those that are made of them.
    """
    return eps / (numbers * loss_scale)


def power_average(std: float, total_images: int) -> EmaConfig:
    """EDM2's average of relative width `std`, nearly: a half-life that grows with the run for all of it."""
    return EmaConfig(halflife_images=total_images, rampup_ratio=math.log(2) / (gamma_of_std(std) + 1))
