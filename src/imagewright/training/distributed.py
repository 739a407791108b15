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

from imagewright.precision import exact_float32
from imagewright.types import UserError


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
    if _world_size() == 1:
        yield Processes()
        return
    # Both where there are GPUs: `--device cpu` has to work there too.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _world_size() -> int:
    """WORLD_SIZE, empty or absent = 1. Raises UserError for no number, or without what torchrun sets beside it."""
    text = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r} in the environment; it must be a whole number >= 1, or not be set")
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(text) > 1 and absent:
        raise UserError(
            f"WORLD_SIZE is {text} in the environment without {', '.join(absent)}: start several processes with "
            "torchrun --nproc-per-node N -m imagewright ..., or unset WORLD_SIZE"
        )
    return int(text)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` = the local rank's GPU, else Apple's, else the CPU; `cuda` = the local rank's GPU; else cpu, cuda:N, mps.

    On any of them 32 bits mean 32 bits from here on (`precision.exact_float32`).

    Raises UserError for another name, and for a device that this machine lacks.
    """
    gpus = torch.cuda.device_count()
    apple = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if apple else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; allowed: auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    exact_float32()
    missing = {"cuda": (device.index or 0) >= gpus, "mps": not apple, "cpu": False}
    if missing.get(device.type, True):
        raise UserError(f"--device is {name!r}; this machine has {gpus} CUDA devices and {'an' if apple else 'no'} mps")
    return device
