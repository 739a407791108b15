"""Training with self-conditioning: half of the images are shown the network's own estimate (Chen et al. 2022).

Rule       every second image of the batch, by its place: a first pass with no estimate, in training mode and under the
           image's own condition, whose answer is shown in the second pass and takes no gradient. The others are shown
           zeros. The loss is the second pass's, of all. A half pass forward is a sixth of an update, more or less.
Departs    The official program takes the first half of the batch, here it is every second image, so that micro-batches
           and processes share the first passes evenly. A micro-batch of one image makes the pass in any case, as
           networks that processes share are called equally often.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from imagewright.noise import StepNoise
from imagewright.types import Condition


def estimated(denoiser: nn.Module, x: Tensor, sigma: Tensor, cond: Condition, noise: StepNoise) -> Condition:
    """The condition with estimates of every second image's x0 (zeros for the others); x: [N, C, H, W], sigma: [N]."""
    n, first = len(x), noise.first_place % 2
    rows = range(first, n, 2) or range(n)
    told = slice(rows.start, rows.stop, rows.step)
    with torch.no_grad(), noise.among(rows):
        found = denoiser(x[told], sigma[told], cond[told])
    torch.clear_autocast_cache()  # which holds weights that were cast without a gradient
    estimate = torch.zeros_like(x)
    if first < n:
        estimate[told] = found.to(x.dtype)
    return replace(cond, estimate=estimate)
