"""How curved the paths of a sampler are: their length against the distance of their ends."""

from __future__ import annotations

import torch
from torch import Tensor

from imagewright.precision import wide
from imagewright.samplers.grid import OnGrid
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise


@torch.no_grad()
def excess_length(
    sampler: OnGrid,
    denoiser: Denoiser,
    latents: Tensor,
    cond: Condition = UNCONDITIONAL,
    *,
    noise: Noise | None = None,
) -> Tensor:
    """Length of each path x(sigma), in straight pieces from level to level, over its ends' distance, minus 1: [N].

    0 for a straight path, whatever its speed. latents: standard normal [N, C, H, W].
    """
    points = [wide(latents) * float(sampler.sigmas(denoiser)[0])]
    sampler(denoiser, latents, cond, noise=noise, on_step=lambda x, x0, sigma: points.append(x))  # type: ignore[operator]
    path = torch.stack(points).flatten(2)
    length = path.diff(dim=0).norm(dim=2).sum(0)
    excess: Tensor = length / (path[-1] - path[0]).norm(dim=1) - 1
    return excess
