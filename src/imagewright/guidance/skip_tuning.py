"""Skip-Tuning: scale a U-Net's skip connections at sampling time (Ma et al. 2024, arXiv 2402.15170).

Every decoder block that concatenates its input u_i with a skip d_i gets [u_i, rho_i d_i]: the skip half alone is
scaled, before the block's first normalisation. Blocks count from the bottom (lowest resolution), i = 0 .. k - 1:

    rho_i = rho_bottom + (rho_top - rho_bottom) / k * i        so rho_top is what i = k would have

Ingredients  the linear schedule, or factors layer by layer; constant, or changing with the noise level, or only in an
             interval of it; both evaluations of a Heun step; the norm ratios |d_i| / |u_i| as a diagnostic. Nothing is
             trained, and the network's code is not touched: a U-Net's stages are public (`networks.unet.UNet`).
Departs    no official program was found: the index convention (top is reached only at i = k) is the formula's as
             printed. Transformers' skips (U-ViT) and latent models are not here; the library has neither. The
             factors are searched by `tune skip` and by hand; the paper's comparison with fine-tuning is not made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import Preconditioned
from imagewright.networks.unet import UNet
from imagewright.types import UNCONDITIONAL, Condition, UserError


@dataclass(frozen=True, kw_only=True)
class SkipScale:
    """The factors. 1 everywhere is the plain network."""

    bottom: float = 1.0
    """rho_bottom, >= 0; the paper's searched number."""
    top: float = 1.0
    """rho_top, >= 0."""
    layers: tuple[float, ...] = ()
    """Factors from the bottom up, one for each skip, in place of the linear schedule."""
    bottom_at_low: float | None = None
    """rho_bottom at the low end of the interval; in between it changes linearly with ln sigma. None: constant."""
    interval: tuple[float, float] = (0.0, math.inf)
    """Noise levels sigma_low < sigma <= sigma_high at which skips are scaled."""

    def __post_init__(self) -> None:
        given = [self.bottom, self.top, *self.layers, *([] if self.bottom_at_low is None else [self.bottom_at_low])]
        if not all(0 <= value < math.inf for value in given):
            raise UserError(f"skip factors are {given}; they must be >= 0 and finite")
        low, high = self.interval
        if not 0 <= low < high:
            raise UserError(f"skip interval is {low:g} to {high:g}; it must satisfy 0 <= low < high")
        if self.bottom_at_low is not None and not (0 < low < high < math.inf):
            raise UserError("bottom_at_low needs an interval with both ends positive and finite")

    def factors(self, sigma: Tensor, count: int) -> Tensor:
        """rho [N, count], bottom first, for noise levels sigma [N]. Raises UserError unless `layers` fits."""
        if self.layers and len(self.layers) != count:
            raise UserError(f"{len(self.layers)} skip factors were given; this network has {count} skip connections")
        if self.layers:
            rho = torch.tensor(self.layers, dtype=sigma.dtype, device=sigma.device).expand(len(sigma), -1)
        else:
            index = torch.arange(count, dtype=sigma.dtype, device=sigma.device)
            bottom = self._bottom(sigma)[:, None]
            rho = bottom + (self.top - bottom) / count * index
        inside = (sigma > self.interval[0]) & (sigma <= self.interval[1])
        return torch.where(inside[:, None], rho, torch.ones_like(rho))

    def _bottom(self, sigma: Tensor) -> Tensor:
        if self.bottom_at_low is None:
            return torch.full_like(sigma, self.bottom)
        low, high = (math.log(end) for end in self.interval)
        share = ((sigma.clamp(min=1e-12).log() - low) / (high - low)).clamp(0, 1)
        return self.bottom_at_low + share * (self.bottom - self.bottom_at_low)


class SkipTuned(nn.Module):
    """A denoiser whose U-Net's skips are scaled: again a `Denoiser`. Raises UserError for one that has no U-Net."""

    def __init__(self, denoiser: nn.Module, scale: SkipScale) -> None:
        super().__init__()
        if not (isinstance(denoiser, Preconditioned) and isinstance(denoiser.network, UNet)):
            raise UserError(
                f"skip scaling needs a denoiser made of a U-Net; this model is {an(type(denoiser).__name__)}"
            )
        self.denoiser, self.scale = denoiser, scale
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        scale.factors(torch.ones(1), self.skips)

    @property
    def skips(self) -> int:
        """k: how many skip connections there are."""
        return cast(UNet, self.denoiser.network).num_skips

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`."""
        rho = self.scale.factors(sigma.reshape(-1).expand(len(x)), self.skips)
        network = cast(UNet, self.denoiser.informed(self.denoiser.network, cond))

        def scaled(image: Tensor, noise_label: Tensor, told: Condition) -> Tensor:
            return run_with_scaled_skips(network, image, noise_label, told, rho)

        return self.denoiser.through(scaled, x, sigma, cond)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The denoiser's."""
        return self.denoiser.round_sigma(sigma)


def run_with_scaled_skips(network: UNet, x: Tensor, noise_label: Tensor, cond: Condition, rho: Tensor) -> Tensor:
    """The network with skip i from the bottom multiplied by rho[:, i]; rho: [N, k]."""
    emb = network.embed(noise_label, cond)
    hidden, skips = network.encode(x, emb)
    # The decoder takes skips from the end of the list: the last one is the bottom's.
    scaled = [skip * rho[:, -1 - i, None, None, None].to(skip.dtype) for i, skip in enumerate(skips)]
    return network.decode(hidden, scaled, emb)


@torch.no_grad()
def skip_ratios(network: UNet, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
    """|d_i| / |u_i| of every merging block, bottom first, mean over images: [k] (the paper's diagnostic)."""
    emb = network.embed(noise_label, cond)
    hidden, skips = network.encode(x, emb)
    widths = [skip.shape[1] for skip in reversed(skips)]
    ratios: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        width = widths[len(ratios)]
        merged = inputs[0].flatten(2)
        own, skip = merged[:, : merged.shape[1] - width], merged[:, merged.shape[1] - width :]
        ratios.append((skip.flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)).mean())

    hooks = [block.register_forward_pre_hook(look) for block in network.merging_blocks()]
    try:
        network.decode(hidden, skips, emb)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(ratios)
