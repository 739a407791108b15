"""Numbers between the host and a device: who may go on before they have arrived is decided here alone.

To a CUDA device nobody has to wait: whatever reads there what was sent is queued behind it, and torch keeps pinned
memory until it has been read. On the way back the reader is the host, which is behind nothing: it has to wait, on the
stream of the device that sends. Elsewhere (Apple's) a copy for which nobody waits may read memory that is gone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In memory that a CUDA device fetches it from beside its work; as it is for another device."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, for which the host waits only where it has to."""
    device = torch.device(device)
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type == "cuda")


def fetched(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to bring tensors of one device to the host. What is returned waits until they are there."""
    device = tensors[0].device
    if device.type != "cuda":
        return lambda: [tensor.cpu() for tensor in tensors]
    here = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(device))  # theirs: the process's current device may be another

    def wait() -> list[Tensor]:
        arrived.synchronize()
        return here

    return wait
