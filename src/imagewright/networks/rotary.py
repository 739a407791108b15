"""Rotary positions in two dimensions: pairs of a head's channels are turned by angles that grow with row and column.

Half of a head's channels are turned by the row, half by the column; within a half pair i turns by
position / base^(2i / channels of the half). The inner product of a query and a key then depends on how far apart they
stand. Positions are given, and need neither be whole numbers nor in any order.

Source   Su et al. 2021 (RoFormer, arXiv 2104.09864); the two-dimensional form of Heo et al. 2024 (2403.13298), axial,
         with neighbouring channels as pairs, as ARPG (2503.10568) and LightningDiT (2501.01423) have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def grid(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """Row and column of every place of a picture in raster order, float32 [rows * columns, 2]."""
    axes = (torch.arange(count, dtype=torch.float32, device=device) for count in (rows, columns))
    return torch.cartesian_prod(*axes)


def turns(positions: Tensor, width: int, base: float = BASE) -> Tensor:
    """Cosine and sine by which each pair of a head's channels is turned, [..., width / 2, 2], dtype of the positions.

    positions: [..., 2], row and column. width: channels of a head, a multiple of 4. Raises ValueError for others.
    """
    if width % 4:
        raise ValueError(f"rotary positions in two dimensions need heads of a multiple of 4 channels, not {width}")
    half = width // 2
    pair = torch.arange(0, half, 2, dtype=positions.dtype, device=positions.device)
    angles = (positions[..., None] * base ** (-pair / half)).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()], -1)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., K, width] turned by `turns` [..., K, width / 2, 2], broadcast against it; shape and dtype of x.

    Computed in float32 at least. Turns that are zeros give zeros.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = pairs.reshape(*x.shape[:-1], -1, 2)
    turns = turns.to(pairs.dtype)
    if torch.compiler.is_compiling():  # which knows no complex numbers, and needs none: all of it becomes one kernel
        first, second = pairs.unbind(-1)
        cosine, sine = turns.unbind(-1)
        both = torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1)
    else:  # one pass over memory instead of nine
        both = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return both.flatten(-2).to(x.dtype)
