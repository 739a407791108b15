"""What floats a device has and uses, decided here alone: the widest are of 64 bits, but on Apple's, which have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16"]
Drawn = Literal[Precision, "int8"]
"""How a model's calls are computed that is not trained: int8 of what was quantized (`networks.integers`)."""


def widest(device: torch.device | str) -> torch.dtype:
    """float64, or float32 where the device has no more."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def exact_float32() -> None:
    """Let 32 bits mean 32 bits on NVIDIA's GPUs too, from here on in this process.

    torch lets convolutions round their inputs to TF32, 10 bits of mantissa in place of 23. The official programs of EDM
    and of what was made from it (SiD, Uni-Instruct, Diff-Instruct) forbid it, as this library does.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within it NVIDIA's GPUs may round the inputs of 32-bit products to TF32, or may not.

    What draws or measures forbids it itself: an answer shall not depend on whether a command asks, or Python does.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def casts(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Within it networks on the device compute in that format (autocast); their weights stay as they are."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def uncast(device: torch.device) -> AbstractContextManager[Any]:
    """Within it numbers stay in their own formats, whatever the run's; torch's meta device casts nothing anyway."""
    return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the widest floats of its device."""
    return tensor.to(widest(tensor.device))
