"""The widest floats of a device: 64 bits, but on Apple's, which have none. Decided here alone."""

from __future__ import annotations

import torch
from torch import Tensor


def widest(device: torch.device | str) -> torch.dtype:
    """float64, or float32 where the device has no more."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the widest floats of its device."""
    return tensor.to(widest(tensor.device))
