"""How many processes train together, and the few things they say to each other (torchrun starts them).

Gradients are averaged with one `torch.distributed.all_reduce` per optimiser step rather than by DDP's hooks: a method
calls its networks several times, in any order, between two updates, which those hooks do not allow for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average_(self, gradients: list[Tensor]) -> None:
        """Sum tensors over all processes, in place. (Losses are divided by the global count beforehand.)"""
        if self.world > 1 and gradients:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.total(torch.tensor(float(flag), device=device)) > 0)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started (WORLD_SIZE in the environment), or just this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def pick_device(name: str = "auto") -> torch.device:
    """`auto` = the local rank's GPU, else Apple's, else the CPU; any torch device name otherwise."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
