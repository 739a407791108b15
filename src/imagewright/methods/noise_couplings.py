"""Couplings of noise and data: which noise a flow learns to carry to which image. One interface, three ways.

    Independent   fresh noise for every image (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, 2209.03003)
    Transported   the same, and then each image of a batch is given the noise of the batch that makes the whole
                  squared distance smallest (Pooladian et al. 2023, 2304.14772; Tong et al. 2023, 2302.00482)
    Stored        pairs that a teacher has made, from `data.couplings`: reflow

Departs    The assignment is over the images of a micro-batch, on the CPU: a device waits for it. Classes are not looked
           at, as in both papers; with them, noise and class become dependent within a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from imagewright.types import Batch, Coupling, Noise, UserError


@dataclass(frozen=True, kw_only=True)
class Independent:
    """Images of the batch with noise of their own."""

    stored: ClassVar[bool] = False

    def __call__(self, batch: Batch, noise: Noise) -> Coupling:
        """As many pairs as the batch has images."""
        return Coupling(noise.normal(batch.images), batch.images, batch.cond)


@dataclass(frozen=True, kw_only=True)
class Transported:
    """Images of the batch with the batch's noise, as near to each other as all can be at once."""

    stored: ClassVar[bool] = False

    def __call__(self, batch: Batch, noise: Noise) -> Coupling:
        """As many pairs as the batch has images."""
        latents = noise.normal(batch.images)
        return Coupling(latents[nearest(batch.images, latents)], batch.images, batch.cond)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The pairs that come with the batch."""

    stored: ClassVar[bool] = True

    def __call__(self, batch: Batch, noise: Noise) -> Coupling:
        """The batch's pairs."""
        assert batch.coupling is not None, "parts() was told that there are couplings"
        return batch.coupling


AnyCoupling = Independent | Transported | Stored


def nearest(images: Tensor, latents: Tensor) -> Tensor:
    """Which of the latents each image gets, int64 [N]: the permutation of the smallest sum of squared distances."""
    # |x - z|^2 without the terms that no permutation changes.
    cost = -(images.flatten(1).double().cpu() @ latents.flatten(1).double().cpu().T)
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(columns).to(images.device)


def check_coupling(coupling: AnyCoupling, couplings: bool) -> None:
    """Raise UserError where stored pairs are wanted and there are none, or the other way about."""
    if coupling.stored and not couplings:
        raise UserError(
            "method.coupling is stored pairs: give data.couplings (written by `imagewright couple`), or set "
            "method.coupling to independent or transported"
        )
    if couplings and not coupling.stored:
        raise UserError(
            f"method.coupling is {type(coupling).__name__.lower()}; data.couplings has no effect unless it is stored"
        )
