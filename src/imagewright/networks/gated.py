"""SwiGLU: the two layers of a transformer's block with a gate (Shazeer 2020, arXiv 2002.05202).

`torch.nn.RMSNorm` is the norm that goes with it: in float32, then scaled, as the programs that use both have it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); gate and up are one layer, in this order. hidden: width of the middle."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        gate, up = self.gate_up(x).chunk(2, -1)
        opened = F.silu(gate)
        # What backward asks for must stay as it is; without it, a third less memory is touched.
        return self.down(opened * up if torch.is_grad_enabled() else opened.mul_(up))  # type: ignore[no-any-return]


def swiglu_hidden(width: int, multiple: int = 1) -> int:
    """Width of the middle at which SwiGLU has the parameters of two layers of 4 x width: 8/3 of it, rounded down.

    multiple: then rounded up to one of it.
    """
    hidden = 8 * width // 3
    return hidden + -hidden % multiple
