"""How many processes work together, and the few things they say to each other (torchrun starts them).

How they hold networks and add up gradients: `training.parallel`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imagewright.gathering import told_as_lost
from imagewright.precision import exact_float32
from imagewright.types import UserError


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.world > 1:
            value = value.clone()
            with told_as_lost():
                dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Hosts speak to each other here; no device is waited for."""
        return flag if self.world == 1 else bool(self.total(torch.tensor(float(flag))) > 0)

    def from_first(self, number: float) -> float:
        """The first process's number."""
        if self.world == 1:
            return number
        told = torch.tensor(number, dtype=torch.float64)
        with told_as_lost():
            dist.broadcast(told, 0)
        return told.item()

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            with told_as_lost():
                dist.barrier()


MEETING = timedelta(seconds=45)
"""In which processes that torchrun has started anew have to find each other."""


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started (WORLD_SIZE in the environment), or just this one.

    A program of your own that calls this ends best by `leaving.run_and_leave`.
    """
    if _world_size() == 1:
        yield Processes()
        return
    # Both where there are GPUs: `--device cpu` has to work there too.
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with told_as_lost():
        if restarted():
            # Two that are started anew at once may each wait for the other's call; whoever gives up is started again.
            from torch.distributed.rendezvous import rendezvous

            store, rank, world = next(rendezvous("env://", timeout=MEETING))
            dist.init_process_group(backends, timeout=MEETING, store=_empty(store), rank=rank, world_size=world)
            dist.distributed_c10d._set_pg_timeout(dist.distributed_c10d.default_pg_timeout)
        else:
            dist.init_process_group(backends)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started these processes anew, after one of them was lost (`--max-restarts`)."""
    return _starts() > 0


def _starts() -> int:
    """How often torchrun has started these processes anew."""
    return _whole("TORCHELASTIC_RESTART_COUNT", 0, 0, 1 << 20)


def _empty(store: Any) -> Any:
    """A part of torchrun's store in which nobody has written: on one machine it keeps what processes before left there.

    Who reads the addresses of those calls processes that are gone. Machines may count their starts differently, so that
    several of them have the whole store, as torch does.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    alone = _whole("LOCAL_WORLD_SIZE", 0, 0, 1 << 20) == _world_size()
    return PrefixStore(f"start {_starts()}", store) if alone else store


def _world_size() -> int:
    """WORLD_SIZE, empty or absent = 1. Raises UserError for no number, or without what torchrun sets beside it."""
    world = _whole("WORLD_SIZE", 1, 1, 1 << 20)
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and absent:
        raise UserError(
            f"WORLD_SIZE is {world} in the environment without {', '.join(absent)}: start several processes with "
            "torchrun --nproc-per-node N -m imagewright ..., or unset WORLD_SIZE"
        )
    if world > 1:
        _whole("RANK", 0, 0, world - 1)
        local_rank()
        _whole("MASTER_PORT", 0, 0, 65535)
    return world


def local_rank() -> int:
    """This process's number on its machine, by LOCAL_RANK; 0 without. Raises UserError for no number."""
    return _whole("LOCAL_RANK", 0, 0, 1 << 20)


def _whole(name: str, usual: int, least: int, most: int) -> int:
    """A whole number in the environment, `usual` where there is none."""
    text = os.environ.get(name, "").strip() or str(usual)
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not least <= int(text) <= most:
        allowed = f">= {least}" if most == 1 << 20 else f"from {least} to {most}"
        raise UserError(
            f"{name} is {text[:40]!r} in the environment; it must be a whole number {allowed}, or not be set"
        )
    return int(text)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` = the local rank's GPU, else Apple's, else the CPU; `cuda` = the local rank's GPU; else cpu, cuda:N, mps.

    On any of them 32 bits mean 32 bits from here on (`precision.exact_float32`); a GPU is this process's current one.

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
        device = torch.device("cuda", local_rank())
    exact_float32()
    missing = {"cuda": (device.index or 0) >= gpus, "mps": not apple, "cpu": False}
    if missing.get(device.type, True):
        raise UserError(f"--device is {name!r}; this machine has {gpus} CUDA devices and {'an' if apple else 'no'} mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
