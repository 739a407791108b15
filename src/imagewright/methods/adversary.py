"""What methods with a discriminator share: the balance of two losses, the penalty of slopes, and losses of pairs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.types import UserError

SCALE = 2.0**12
"""Of losses whose gradients are compared: in half precision those of a mean over pixels would vanish."""


@runtime_checkable
class HasLastLayer(Protocol):
    """A network that says where gradients of losses are compared; see `networks.UNet.last_layer`."""

    @property
    def last_layer(self) -> nn.Parameter: ...


def adaptive_weight(loss: Tensor, other: Tensor, layer: nn.Parameter, *, most: float = 1e4) -> Tensor:
    """|grad loss| / (|grad other| + 1e-4) at a layer's weight, at most `most`; a number, without gradient.

    loss, other: [N]; the gradients are those of their means. Esser et al. 2021 (VQGAN, arXiv 2012.09841), eq. 7.
    Raises UserError where the layer is part of a block that processes share, as no process has it whole.
    """
    if hasattr(layer, "to_local"):  # of FSDP
        raise UserError(
            "--training.parallel is shard; this method compares gradients at a layer of a block, which no process has "
            "whole; give --training.parallel replicate"
        )
    first, second = (
        torch.autograd.grad(SCALE * each.mean(), layer, retain_graph=True)[0].norm() / SCALE for each in (loss, other)
    )
    weight: Tensor = (first / (second + 1e-4)).clamp(max=most)
    return weight


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """|grad D|^2 of each image, [N], differentiable; D is the mean of its logits [N, K]."""
    (slope,) = torch.autograd.grad(logits.mean(1).sum(), images, create_graph=True)
    squares: Tensor = slope.square().flatten(1).sum(1)
    return squares


def relativistic(more: Tensor, less: Tensor) -> Tensor:
    """softplus(less - more), [N]: small where each image of the first kind looks more real than its partner.

    more, less: logits [N, K], of which the mean over places is an image's. Jolicoeur-Martineau 2019 (1807.00734);
    Huang et al. 2024 (R3GAN, 2501.05441), with both penalties beside it.
    """
    return F.softplus(less.mean(1) - more.mean(1))
