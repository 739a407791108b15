"""Draws from categorical distributions that depend on one uniform number each."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: int64, shape of `uniform`.

    logits: [..., V], unnormalised log-probabilities, -inf allowed. uniform: [...], in [0, 1).
    Sums are float64, so the same numbers come out whatever the batch around them; values of probability 0 never do.
    """
    probabilities = torch.softmax(logits.double(), -1)
    cumulative = probabilities.cumsum(-1)
    # Rounding may leave the last sum a little off 1: the draw is scaled to the sum that there is.
    aim = uniform.double()[..., None] * cumulative[..., -1:]
    drawn = (cumulative <= aim).sum(-1)
    # A uniform next to 1 may round to the whole sum; the last value that has any probability is meant.
    last = logits.shape[-1] - 1 - (probabilities.flip(-1) > 0).long().argmax(-1)
    return torch.minimum(drawn, last)
