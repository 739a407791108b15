"""What losses over a whole batch need of several processes: everybody's rows, and sums; with gradients.

Without other processes rows are what they are. A process's gradients are those of the sum of all processes' losses, as
the trainer adds gradients up. Of a batch in several micro-batches only those are seen that are computed at one moment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_row(rows: int) -> int:
    """Where this process's rows begin among everybody's, of which all have as many."""
    return dist.get_rank() * rows if world() > 1 else 0


def gathered(x: Tensor) -> Tensor:
    """[N, ...] -> [world N, ...]: the rows of every process, in the order of their ranks."""
    if world() == 1:
        return x
    everyone: Tensor = _Gathered.apply(x)  # type: ignore[no-untyped-call]
    return everyone


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() == 1:
        return x
    total: Tensor = _Summed.apply(x)  # type: ignore[no-untyped-call]
    return total


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = slice(first_row(len(x)), first_row(len(x)) + len(x))
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(found, x.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.rows]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
