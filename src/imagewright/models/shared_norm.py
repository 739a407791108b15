"""A norm of batches whose statistics are those of the rows of all processes, in training and out of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagewright.gathering import summed, world

EPS = 1e-5


class SharedBatchNorm(nn.Module):
    """[N, D] -> [N, D] with mean 0 and variance 1 over everybody's rows, then scaled and moved where `affine`.

    It keeps no running statistics: for heads that only training asks.
    """

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rows = len(x) * world()
        centred = wide - summed(wide.sum(0)) / rows
        out = centred * torch.rsqrt(summed(centred.square().sum(0)) / rows + EPS)
        if self.weight is not None and self.bias is not None:
            out = out * self.weight + self.bias
        return out.to(x.dtype)
