"""A denoiser that also tells real images from generated ones: two jobs of one network, for one optimiser.

Source   Yin et al. 2024 (DMD2, arXiv 2405.14867), section 4.3: the fake score's encoder sees the noised image, and a
         head on its bottleneck judges it. Xu et al. 2025 (f-distill, 2502.15681): the teacher's encoder, and a head on
         what it makes last at each of several resolutions.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import EDMPrecond, Preconditioned
from imagewright.models.recast import Ask, Recast
from imagewright.networks import UNet
from imagewright.networks.bottleneck_head import BottleneckHead, HasBottleneck
from imagewright.types import UNCONDITIONAL, Condition, UserError


class JudgingDenoiser(EDMPrecond):
    """E[x0 | x], and `judge`: how real a noised image looks. The head's weights are drawn, the rest a denoiser's.

    It exists in training alone: `describe`, hence a model file, leaves the head out.
    """

    head: BottleneckHead

    def judge(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """Logits [N] of noised images x [N, C, H, W] at sigma [N]; the decoder is not run."""
        logits: Tensor = self.head(bottleneck(self, x, sigma, cond))
        return logits

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, image_shape: tuple[int, int, int]) -> Self:
        """A copy of a denoiser, and a new head; image_shape: [C, H, W]. Raises UserError without a bottleneck."""
        network = copy.deepcopy(denoiser.network).requires_grad_(True)
        check_bottleneck(network)
        judging = cls(network, denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data, denoiser.noise_label)
        like = next(network.parameters())
        with torch.no_grad():
            maps = bottleneck(judging.eval(), like.new_zeros(1, *image_shape), like.new_ones(1))
        judging.head = BottleneckHead(maps.shape[1], min(maps.shape[2:])).to(like)
        return judging.train()


def bottleneck(denoiser: Preconditioned, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
    """What a denoiser's network has in its middle for x [N, C, H, W] at sigma [N]: [N, C', H', W'].

    The network must be one with a bottleneck (`check_bottleneck`); its decoder is not run.
    """
    return encoder_maps(denoiser, x, sigma, cond)[-1]


def encoder_maps(denoiser: Preconditioned, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> list[Tensor]:
    """What the encoder makes last at each resolution, from the finest to the bottleneck; the decoder is not run.

    Maps are [N, C', H', W'] each. A network that is no U-Net has its bottleneck alone.
    """
    seen: list[Tensor] = []

    def encoder(x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        network = _innermost(denoiser)
        if isinstance(network, UNet):
            seen.extend(_last_of_each_side(*network.encode(x, network.embed(noise_label, cond))))
        else:
            assert isinstance(network, HasBottleneck)
            seen.append(network.bottleneck(x, noise_label, cond))
        return x

    _asked(denoiser, encoder, x, sigma, cond)
    return seen


def answer_and_maps(
    denoiser: Preconditioned, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL
) -> tuple[Tensor, list[Tensor]]:
    """E[x0 | x]: [N, C, H, W], and `encoder_maps`; a U-Net's encoder runs once for both."""
    unet = _innermost(denoiser)
    if not isinstance(unet, UNet):
        return denoiser(x, sigma, cond), encoder_maps(denoiser, x, sigma, cond)
    seen: list[Tensor] = []

    def network(x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        emb = unet.embed(noise_label, cond)
        hidden, skips = unet.encode(x, emb)
        seen.extend(_last_of_each_side(hidden, skips))
        return unet.decode(hidden, skips, emb)

    return _asked(denoiser, network, x, sigma, cond), seen


def _innermost(denoiser: Preconditioned) -> nn.Module:
    """The network itself, where a flow's was recast."""
    network = denoiser.network
    return network.network if isinstance(network, Recast) else network


def _asked(denoiser: Preconditioned, network: Ask, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """The denoiser with another function in the innermost network's place."""
    outer = denoiser.network
    return denoiser.through(partial(outer.through, network) if isinstance(outer, Recast) else network, x, sigma, cond)


def _last_of_each_side(hidden: Tensor, skips: list[Tensor]) -> list[Tensor]:
    """hidden, and before it the last skip connection of each larger side: the blocks before the encoder halves it."""
    last = {skip.shape[-1]: skip for skip in skips if skip.shape[-1] > hidden.shape[-1]}
    return [*last.values(), hidden]


def check_bottleneck(network: object) -> None:
    """Raise UserError for a teacher's network that has no bottleneck."""
    if not isinstance(network, HasBottleneck):
        raise UserError(f"the teacher's network is {an(type(network).__name__)}, which has no bottleneck to judge by")
