"""Rows of all processes that train together, for losses in which examples are compared with each other.

A method that compares every example with all others of the batch asks for `gathered` rows, and gives the trainer the
losses of its own: gradients that other processes' losses have for a row come back to the process that made it, so
that the sum over processes is the gradient of one process with the whole batch. Every process has to ask alike, and
for as many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imagewright.errors import UserError


def gathered(rows: Tensor) -> Tensor:
    """Rows [N, ...] of every process, [processes x N, ...], in the order of their ranks; differentiable."""
    if world() == 1:
        return rows
    if not rows.is_floating_point():
        return _all(rows)
    whole: Tensor = _Gathered.apply(rows)  # type: ignore[no-untyped-call]
    return whole


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes; differentiable."""
    if world() == 1:
        return x
    total: Tensor = _Summed.apply(x)  # type: ignore[no-untyped-call]
    return total


def own(rows: int) -> slice:
    """Which of the gathered rows are this process's, of which it has so many."""
    first = rows * (dist.get_rank() if world() > 1 else 0)
    return slice(first, first + rows)


@contextmanager
def told_as_lost() -> Iterator[None]:
    """Turn what is said where processes no longer reach each other into a UserError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[:1] or ["no reason is given"]
        raise UserError(f"the processes that train together have lost each other: {reason[0]}") from None


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
    with told_as_lost():
        dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.own = own(len(rows))
        return _all(rows)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        slope = slope.contiguous()
        with told_as_lost():
            dist.all_reduce(slope)
        return slope[ctx.own]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _total(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return _total(slope)


def _total(x: Tensor) -> Tensor:
    total = x.contiguous().clone()
    with told_as_lost():
        dist.all_reduce(total)
    return total
