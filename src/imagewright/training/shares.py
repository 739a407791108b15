"""Tensors of which each process of a run has some rows: how they are cut, and how files of several are read as one.

The rows of n that process k of w has are those of `torch.chunk`: ceil(n / w) from k times as many on, or what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's rows of a tensor whose whole shape is `shape`."""

    rows: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A tensor in pieces, one below the other."""

    pieces: Sequence[Tensor]

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((sum(len(piece) for piece in self.pieces), *self.pieces[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Of all pieces."""
        return self.pieces[0].dtype

    def whole(self) -> Tensor:
        """In one."""
        return torch.cat(list(self.pieces))

    def between(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1."""
        found, at = [self.pieces[0][:0]], 0
        for piece in self.pieces:
            found.append(piece[max(start - at, 0) : max(stop - at, 0)])
            at += len(piece)
        return torch.cat(found)


def rows_of(tensor: Tensor | Rows, rank: int, world: int) -> Tensor:
    """A copy of what a process has of a tensor with rows."""
    each = -(-tensor.shape[0] // world)
    pieces = Rows([tensor]) if isinstance(tensor, Tensor) else tensor
    return pieces.between(min(rank * each, tensor.shape[0]), min((rank + 1) * each, tensor.shape[0]))
