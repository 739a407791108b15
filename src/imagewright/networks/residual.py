"""The residual block of the transformers over tokens: attention by some pattern, then two layers; told the class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.patterns import Memory, Pattern
from imagewright.networks.recompute import Block
from imagewright.noise import dropout

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "exact_gelu": F.gelu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """What all blocks of one network share.

    hidden: width of the two layers' middle. dropout: on what each branch adds. key_width: of all heads' queries, and of
    their keys; None = width. shared: of the first heads, keys are the queries. post_norm: normalise after adding a
    branch, or before it. bias: whether attention's layers have one. classes: told in every block; 0 = none is.
    """

    width: int
    heads: int
    hidden: int
    dropout: float = 0.0
    key_width: int | None = None
    shared: int = 0
    post_norm: bool = False
    eps: float = 1e-5
    activation: str = "gelu"
    bias: bool = True
    classes: int = 0

    @property
    def keys(self) -> tuple[int, int]:
        """Width of the queries of all heads, and of the keys that are no queries."""
        width = self.key_width or self.width
        return width, width // self.heads * (self.heads - self.shared)


class ResidualBlock(Block):
    """h + f(LN(h)) with f an attention, then two layers; or LN(h + f(h)).

    The class scales and shifts what goes into either f, by a table of its own in each block (adaLN, Peebles and Xie
    2022, 2212.09748, whose network of the condition a table is for classes). It begins as zeros: without effect.
    """

    def __init__(self, style: Style, pattern: Pattern) -> None:
        super().__init__()
        self.style, self.pattern = style, pattern
        width, (queries, keys) = style.width, style.keys
        self.norm0, self.norm1 = nn.LayerNorm(width, eps=style.eps), nn.LayerNorm(width, eps=style.eps)
        self.qkv = nn.Linear(width, queries + keys + width, bias=style.bias)
        self.out = nn.Linear(width, width, bias=style.bias)
        self.up, self.down = nn.Linear(width, style.hidden), nn.Linear(style.hidden, width)
        self.told = nn.Embedding(style.classes + 1, 4 * width) if style.classes else None
        if self.told is not None:
            nn.init.zeros_(self.told.weight)

    def forward(self, h: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N, ..., width] -> the same. labels: row of the table of classes for each of N."""
        return self._through(h, labels, self.pattern)

    def step(self, h: Tensor, memory: Memory, place: int, length: int, labels: Tensor | None = None) -> Tensor:
        """The same of one place [N, 1, width] of so many, given those in memory."""
        return self._through(h, labels, lambda q, k, v: self.pattern.step(q, k, v, memory, place, length))

    def _through(self, h: Tensor, labels: Tensor | None, attend: Callable[..., Tensor]) -> Tensor:
        told = self._told(labels, h.ndim)
        h = self._added(h, self.norm0, told[:2], lambda x: self.mixed(attend(*self.split(x))))
        return self._added(h, self.norm1, told[2:], self.dense)

    def _added(
        self, h: Tensor, norm: nn.Module, told: tuple[Tensor, ...], branch: Callable[[Tensor], Tensor]
    ) -> Tensor:
        x = h if self.style.post_norm else norm(h)
        if told:
            x = x * (1 + told[0]) + told[1]
        h = h + dropout(branch(x), self.style.dropout, self.training)
        return norm(h) if self.style.post_norm else h

    def _told(self, labels: Tensor | None, ndim: int) -> tuple[Tensor, ...]:
        """Scale and shift of the first branch, and of the second, each [N, 1, ..., width]; () without classes."""
        if self.told is None or labels is None:
            return ()
        rows = self.told(labels)
        return tuple(rows.view(len(rows), *(1,) * (ndim - 2), -1).chunk(4, -1))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values of each head, [N, heads, ..., width / heads] each."""
        s = self.style
        queries, keys = s.keys
        query, key, value = self.qkv(x).split([queries, keys, s.width], -1)
        query, value = self._heads(query, s.heads), self._heads(value, s.heads)
        if s.shared == s.heads:
            return query, query, value
        key = self._heads(key, s.heads - s.shared)
        return query, torch.cat([query[:, : s.shared], key], 1) if s.shared else key, value

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        return x.reshape(*x.shape[:-1], heads, -1).movedim(-2, 1)

    def mixed(self, attended: Tensor) -> Tensor:
        """What attention adds: [N, heads, ..., width / heads] -> [N, ..., width]."""
        return self.out(attended.movedim(1, -2).flatten(-2))  # type: ignore[no-any-return]

    def dense(self, x: Tensor) -> Tensor:
        """What the two layers add."""
        return self.down(ACTIVATIONS[self.style.activation](self.up(x)))  # type: ignore[no-any-return]
