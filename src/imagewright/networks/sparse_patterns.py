"""Patterns of about sqrt(n) keys a query, of which two together reach all places before.

Source   Child et al. 2019 (Sparse Transformer, arXiv 1904.10509), section 4: `patterns.Window` and `Stride` are the
         strided pattern's two, `Block` and `Summary` the fixed one's; `Union` lets one head see both, `Split` gives
         heads different ones. Released: openai/sparse_attention, which computes strided attention as local attention
         of the transposed sequence, as here.
Departs  A `Summary` place sees itself, too, where it stands alone: the first ones would see nothing. The released fixed
         pattern is the union of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.patterns import Memory, Pattern, Window, cut, together, triangle, weighed


class Block(Pattern):
    """Its own block up to itself: floor(i / block) = floor(j / block)."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (cut(t, self.block) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.flatten(2, 3)[:, :, : query.shape[2]]

    def weighed(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Banded.weighed`."""
        q, k, v = (cut(t, self.block) for t in (query, key, value))
        mixed, sums = weighed(q, k, v, triangle(q.shape[3], 0, query.device))
        return mixed.flatten(2, 3)[:, :, : query.shape[2]], sums.flatten(2, 3)[:, :, : query.shape[2]]

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query // self.block == key // self.block)

    def slots(self, length: int) -> int:
        return min(self.block, length)

    def slot(self, place: int, length: int) -> int:
        return place % self.block

    def seen(self, place: int, length: int) -> Sequence[slice]:
        return (slice(0, place % self.block + 1),)


class Stride(Pattern):
    """Every `stride`-th place before, and its own: (i - j) mod stride = 0. Dense attention, the sequence transposed."""

    fused = False  # transposed, the plain way is one kernel

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (cut(t, self.stride).transpose(2, 3) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(2, 3).flatten(2, 3)[:, :, : query.shape[2]]

    def beyond(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Banded.weighed`, without the place itself, which another pattern sees."""
        q, k, v = (cut(t, self.stride).transpose(2, 3) for t in (query, key, value))
        mixed, sums = weighed(q, k, v, triangle(q.shape[3], -1, query.device))
        whole = slice(query.shape[2])
        return mixed.transpose(2, 3).flatten(2, 3)[:, :, whole], sums.transpose(2, 3).flatten(2, 3)[:, :, whole]

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key) % self.stride == 0)

    def slots(self, length: int) -> int:
        return self.stride * self._rows(length)

    def slot(self, place: int, length: int) -> int:
        return place % self.stride * self._rows(length) + place // self.stride

    def seen(self, place: int, length: int) -> Sequence[slice]:
        last = self.slot(place, length)
        return (slice(last - place // self.stride, last + 1),)

    def keep_beyond(self, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> tuple[Tensor, Tensor]:
        """As `keep`, without the place itself."""
        keys, values = self.keep(key, value, memory, place, length)
        return keys[:, :, :-1], values[:, :, :-1]

    def _rows(self, length: int) -> int:
        return -(-length // self.stride)


class Summary(Pattern):
    """Cells at the end of every block that sum it up, `cells` of each, another sub-block of them for each head."""

    def __init__(self, block: int, cells: int, heads: int) -> None:
        super().__init__()
        self.block, self.cells, self.heads = block, cells, heads

    @property
    def subblocks(self) -> int:
        """How many different ones the heads have: as many as fit into a block."""
        return max(1, min(self.heads, self.block // self.cells))

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed, sums = self._of_cells(query, key, value, own=True)
        alone = (query * key).sum(-1) / math.sqrt(query.shape[3])
        # Where the place is no cell itself it sees itself beside them.
        place = torch.arange(query.shape[2], device=query.device)
        head = torch.arange(query.shape[1], device=query.device)[:, None]
        alone = alone.masked_fill(self._is_cell(head, place), -math.inf)
        return together((mixed, sums), (value, alone))

    def beyond(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Banded.weighed`, of the blocks before alone."""
        return self._of_cells(query, key, value, own=False)

    def _of_cells(self, query: Tensor, key: Tensor, value: Tensor, *, own: bool) -> tuple[Tensor, Tensor]:
        length = query.shape[2]
        at = self._places(query.shape[1], -(-length // self.block), query.device)  # [heads, cells]
        place = torch.arange(length, device=query.device)[:, None]
        sees = at[:, None] <= place if own else at[:, None] // self.block < place // self.block
        inside = at.clamp(max=length - 1)
        head = torch.arange(len(at), device=query.device)[:, None]
        return weighed(query, key[:, head, inside], value[:, head, inside], sees & (at < length)[:, None])

    def _places(self, heads: int, blocks: int, device: torch.device) -> Tensor:
        """Where the cells of each head are, int64 [heads, blocks x cells], in order."""
        first = self.block - (torch.arange(heads, device=device) % self.subblocks + 1) * self.cells
        within = first[:, None] + torch.arange(self.cells, device=device)
        return (torch.arange(blocks, device=device)[:, None] * self.block + within[:, None]).flatten(1)

    def _is_cell(self, head: Tensor, place: Tensor) -> Tensor:
        return (self.block - 1 - place % self.block) // self.cells == head % self.subblocks

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (self._is_cell(head, key) | (key == query))

    def slots(self, length: int) -> int:
        return -(-length // self.block) * self.cells

    def step(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> Tensor:
        keys, values = self.keep_beyond(key, value, memory, place, length, own=True)
        # Cells of this block are seen from when they are there; what is no cell of a head sees itself beside them.
        at = self._places(query.shape[1], place // self.block + 1, query.device)
        head = torch.arange(query.shape[1], device=query.device)
        alone = ~self._is_cell(head, torch.tensor(place, device=query.device))
        sees = torch.cat([at <= place, alone[:, None]], 1)[:, None]
        return F.scaled_dot_product_attention(
            query, torch.cat([keys, key], 2), torch.cat([values, value], 2), attn_mask=sees
        )

    def keep_beyond(
        self, key: Tensor, value: Tensor, memory: Memory, place: int, length: int, *, own: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Keep a place for those heads of which it is a cell; returns all of the blocks before, and of its own."""
        from_end = self.block - 1 - place % self.block
        mine = [h for h in range(key.shape[1]) if h % self.subblocks == from_end // self.cells]
        slot = place // self.block * self.cells + self.cells - 1 - from_end % self.cells
        memory.put(self.slots(length), slot, key, value, mine)
        return memory.read((slice(0, (place // self.block + own) * self.cells),))


class Union(Pattern):
    """Every head sees what either of two patterns lets it: near places (`Window`, `Block`) and far ones.

    In one softmax: each is computed by itself, and they are weighed by what their weights sum to.
    """

    def __init__(self, near: Window | Block, far: Stride | Summary) -> None:
        super().__init__()
        self.near, self.far = near, far

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return together(self.near.weighed(query, key, value), self.far.beyond(query, key, value))

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.near.allows(head, query, key) | self.far.allows(head, query, key)

    def memory(self) -> Memory:
        return Memory(parts=(Memory(), Memory()))

    def step(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> Tensor:
        near = self.near.keep(key, value, memory.parts[0], place, length)
        far = self.far.keep_beyond(key, value, memory.parts[1], place, length)
        keys, values = (torch.cat(pair, 2) for pair in zip(near, far, strict=True))
        return F.scaled_dot_product_attention(query, keys, values)


class Split(Pattern):
    """Some heads by one pattern, others by another. heads: how many each has."""

    fused = False

    def __init__(self, patterns: Sequence[Pattern], heads: Sequence[int]) -> None:
        super().__init__()
        self.patterns, self.heads = nn.ModuleList(patterns), tuple(heads)

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shares = self._shares(query, key, value)
        return torch.cat([pattern(*share) for pattern, share in zip(self.patterns, shares, strict=True)], 1)

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first, allowed = 0, torch.zeros_like(head == query)
        for pattern, count in zip(self._each(), self.heads, strict=True):
            mine = (head >= first) & (head < first + count)
            allowed = allowed | (mine & pattern.allows(head - first, query, key))
            first += count
        return allowed

    def memory(self) -> Memory:
        return Memory(parts=tuple(pattern.memory() for pattern in self._each()))

    def step(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> Tensor:
        each = zip(self._each(), self._shares(query, key, value), memory.parts, strict=True)
        return torch.cat([pattern.step(q, k, v, kept, place, length) for pattern, (q, k, v), kept in each], 1)

    def _shares(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The heads of each pattern, of each tensor."""
        return zip(*(torch.split(t, list(self.heads), 1) for t in tensors), strict=True)

    def _each(self) -> list[Pattern]:
        return [pattern for pattern in self.patterns if isinstance(pattern, Pattern)]
