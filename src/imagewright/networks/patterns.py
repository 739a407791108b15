"""Which places see which: causal attention over a sequence, dense, in a window, or by any pattern of a mask.

Each pattern is computed in blocks, so that neither time nor memory is spent on pairs that do not see each other, and
keeps for decoding those keys and values alone that a later place may ask for. `sparse_patterns` has those of two parts.

Source   Child et al. 2019 (Sparse Transformer, arXiv 1904.10509), section 4, for `Window`; `LookBack` is the local
         attention of Roy et al. 2020 (2003.05997).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Memory:
    """What a layer keeps of the places before, for decoding: keys and values [N, heads, slots, D], made when needed.

    parts: of a pattern that is made of others.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    parts: tuple[Memory, ...] = ()

    def put(
        self, slots: int, slot: int, key: Tensor, value: Tensor, heads: Sequence[int] | slice = slice(None)
    ) -> None:
        """Keep those of one place, [N, heads, 1, D], of some heads."""
        if self.keys is None or self.values is None:
            self.keys = key.new_zeros((*key.shape[:2], slots, key.shape[3]))
            self.values = value.new_zeros((*value.shape[:2], slots, value.shape[3]))
        self.keys[:, heads, slot] = key[:, heads, 0]
        self.values[:, heads, slot] = value[:, heads, 0]

    def read(self, seen: Sequence[slice]) -> tuple[Tensor, Tensor]:
        """Keys and values of some slots, in that order."""
        assert self.keys is not None and self.values is not None
        keys, values = ([kept[:, :, s] for s in seen] for kept in (self.keys, self.values))
        return (keys[0], values[0]) if len(seen) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))


class Pattern(nn.Module):
    """Causal attention in which every place sees some of those up to itself.

    forward: queries, keys, values [N, heads, L, D] -> [N, heads, L, D of the values].
    """

    fused = True
    """Whether a GPU may compute it by FlexAttention (`flexible`), from `allows`."""
    flex = False
    """Whether it does: a setting of the network's."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.flex and self.fused and query.is_cuda:
            return flexible(self, query, key, value)
        return self.plain(query, key, value)

    @abstractmethod
    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same by PyTorch's ordinary operations."""

    @abstractmethod
    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a head's query place sees a key place: bool of the indices' common shape."""

    def slots(self, length: int) -> int:
        """How many places it keeps when decoding so many."""
        return length

    def slot(self, place: int, length: int) -> int:
        """Where it keeps a place."""
        return place

    def seen(self, place: int, length: int) -> Sequence[slice]:
        """Slots that a place sees, once it is kept itself."""
        return (slice(0, place + 1),)

    def memory(self) -> Memory:
        """An empty one."""
        return Memory()

    def step(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> Tensor:
        """The answer [N, heads, 1, D] of one place, which is then kept."""
        return F.scaled_dot_product_attention(query, *self.keep(key, value, memory, place, length))

    def keep(self, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> tuple[Tensor, Tensor]:
        """Keep a place; returns the keys and values that it sees."""
        memory.put(self.slots(length), self.slot(place, length), key, value)
        return memory.read(self.seen(place, length))


class Dense(Pattern):
    """Every place sees all up to itself, or all where it is not causal. dropout: of the attention's weights.

    What stands between heads and the places may have further axes, each a sequence of its own.
    """

    fused = False  # the plain way is one kernel

    def __init__(self, dropout: float = 0.0, *, causal: bool = True) -> None:
        super().__init__()
        self.dropout, self.causal = dropout, causal

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=self.causal)

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query


class Columns(Dense):
    """Of an image [N, heads, H, W, D]: every column a sequence of its own."""

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.transpose(2, 3) for t in (query, key, value))
        return super().plain(query, key, value).transpose(2, 3)


class Banded(Pattern):
    """Blocks of `block` places that see themselves and the one before, by some mask."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, size = query.shape[2], min(self.block, query.shape[2])
        q, k, v = (cut(t, size) for t in (query, key, value))
        if q.shape[2] > 1:
            k, v = (torch.cat([_before(t), t], 3) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(q.shape[2], size, query.device))
        return mixed.flatten(2, 3)[:, :, :length]

    def weighed(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The answer, and how much its weights sum to, as a logarithm [N, heads, L]."""
        length, size = query.shape[2], min(self.block, query.shape[2])
        q, k, v = (cut(t, size) for t in (query, key, value))
        if q.shape[2] > 1:
            k, v = (torch.cat([_before(t), t], 3) for t in (k, v))
        mixed, sums = weighed(q, k, v, self._mask(q.shape[2], size, query.device))
        return mixed.flatten(2, 3)[:, :, :length], sums.flatten(2, 3)[:, :, :length]

    def _mask(self, blocks: int, size: int, device: torch.device) -> Tensor:
        """Of queries [blocks, size] for the keys of two blocks (of one where there is but one)."""
        start = torch.arange(blocks, device=device)[:, None, None] * size
        query = start + torch.arange(size, device=device)[:, None]
        key = start + torch.arange(0 if blocks == 1 else -size, size, device=device)
        return (key >= 0) & self.allows(start, query, key)


class Window(Banded):
    """The last `block` places, its own among them: i - j < block."""

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < self.block)

    def slots(self, length: int) -> int:
        return min(self.block, length)

    def slot(self, place: int, length: int) -> int:
        return place % self.block

    def seen(self, place: int, length: int) -> Sequence[slice]:
        return (slice(0, min(place + 1, self.block)),)


class LookBack(Banded):
    """Its own block up to itself, and all of the block before."""

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query // self.block - key // self.block <= 1)

    def slots(self, length: int) -> int:
        return min(2 * self.block, length)

    def slot(self, place: int, length: int) -> int:
        return place % (2 * self.block)

    def seen(self, place: int, length: int) -> Sequence[slice]:
        own = slice(0, place % (2 * self.block) + 1)
        if place // self.block % 2 or place < self.block:
            return (own,)
        return (slice(self.block, 2 * self.block), own)


def mask(pattern: Pattern, heads: int, length: int) -> Tensor:
    """Who sees whom, bool [heads, length, length]: what `plain` computes without ever making it."""
    place = torch.arange(length)
    return pattern.allows(torch.arange(heads)[:, None, None], place[:, None], place).expand(heads, -1, -1)


def weighed(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of what its weights sum to; -inf, and zeros, where a query sees nothing."""
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~sees, -math.inf)
    sums = scores.logsumexp(-1)
    weights = (scores - sums.clamp(min=-1e30)[..., None]).exp()
    return weights @ value, sums


def together(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """One softmax over the keys of several attentions, each with what its weights sum to."""
    shares = torch.stack([sums for _, sums in parts]).softmax(0)
    return sum((share[..., None] * mixed for share, (mixed, _) in zip(shares, parts, strict=True)), torch.tensor(0.0))


def cut(x: Tensor, size: int) -> Tensor:
    """[N, heads, L, D] -> [N, heads, blocks, size, D], with zeros after the end: no place before sees them."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return padded.reshape(*x.shape[:2], -1, size, x.shape[3])


def _before(blocks: Tensor) -> Tensor:
    """Of each block [N, heads, blocks, size, D] the one before; zeros before the first."""
    return F.pad(blocks[:, :, :-1], (0, 0, 0, 0, 1, 0))


def triangle(size: int, diagonal: int, device: torch.device) -> Tensor:
    """Which of `size` places may see which, bool [size, size]: all up to itself, moved by `diagonal`."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(diagonal)


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def flexible(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A pattern's attention by PyTorch's compiled FlexAttention, which leaves out the blocks that see nothing."""
    mixed: Tensor = _compiled()(
        query, key, value, block_mask=_blocks(pattern, query.shape[1], query.shape[2], query.device)
    )
    return mixed


@lru_cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def _blocks(pattern: Pattern, heads: int, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.allows(head, q, k)

    return create_block_mask(sees, None, heads, length, length, device=device)
