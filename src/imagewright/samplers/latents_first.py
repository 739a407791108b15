"""What is drawn of an image before its sampler begins: the discrete latents of models that have them, in raster order.

The prior's numbers come from a stream of noise of their own (`STREAM`), so that any sampler finds the same latents, and
its own noise untouched. What stands around such a denoiser, guidance or skipped layers, hands the condition on to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imagewright.models.discrete_latents import LatentDenoiser, told_latents
from imagewright.samplers.raster import Raster
from imagewright.types import Condition, Noise

STREAM = 2
"""Of `ImageNoise`, for latents."""


@torch.no_grad()
def draw_latents(model: LatentDenoiser, n: int, cond: Condition, noise: Noise) -> Tensor:
    """Latents int64 [n, m] of n images from the prior. Raises UserError where there is none yet."""
    prior: Any = model.token_model()
    device = model.latents.null.device
    unknown = torch.full((n, prior.codec.length), prior.codec.values, dtype=torch.int64, device=device)
    return Raster(cache=prior.cached).fill(prior, unknown, cond, noise=noise)


@torch.no_grad()
def latents_first(model: object, n: int, cond: Condition, noise: Noise) -> Condition:
    """The condition of n images with their latents in it; as it is where a model has none, or no prior yet."""
    told = told_latents(model)
    if told is None or told.prior is None:
        return cond
    return told.with_latents(cond, draw_latents(told, n, cond, noise))
