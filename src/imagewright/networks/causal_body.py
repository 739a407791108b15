"""The body of causal transformers over an image's tokens: embeddings, blocks, head and cache, without an attention.

What differs between the papers is in their own files: which pattern each block's attention has (`pattern`), the `BODY`
of settings, and the initialisation. Perceiver AR, whose blocks see a part of the sequence alone, has its forward pass
there, too.

Input      place n is answered from the tokens before it: token n - 1 enters there, at the first place a vector of its
           own. Three tables of positions, of row, column and channel, are added: of the token that enters, or of the
           place that is answered, as the paper has it.
Class      told in every block (`residual`), not at the input. The papers' models have none, or a vector at the input.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import class_index
from imagewright.networks.patterns import Memory, Pattern
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.noise import dropout
from imagewright.types import UNCONDITIONAL, Condition, UserError


@dataclass(frozen=True, kw_only=True)
class CausalConfig(NetworkConfig):
    """Arguments that all causal bodies share. Raises UserError on a value outside its range."""

    values: int
    """V: how many values a token has."""
    length: int
    """L: tokens of an image."""
    channels: int = 1
    """Tokens of one place, one after the other: the colours of a pixel."""
    label_dim: int = 0
    """Number of classes; 0 = labels are ignored."""
    width: int = 512
    depth: int = 8
    heads: int = 8
    mlp_ratio: float = 4.0
    """Hidden width of a block's two layers, in units of `width`."""
    dropout: float = 0.0
    """On what each branch adds."""
    embedding_dropout: float = 0.0
    """On the embedding."""

    def __post_init__(self) -> None:
        whole_numbers = {"values": 2, "length": 1, "channels": 1, "label_dim": 0, "width": 1, "depth": 1, "heads": 1}
        for name, least in whole_numbers.items():
            self.require_whole(name, least)
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width, {self.width}")
        require(self.mlp_ratio * self.width >= 1, "mlp_ratio", self.mlp_ratio, "positive, a hidden unit at least")
        for name in ("dropout", "embedding_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        square = self.length == self.channels * self.side**2
        require(square, "length", self.length, f"a square number times channels, {self.channels}")

    @property
    def side(self) -> int:
        """Rows of the image's square of places."""
        return math.isqrt(self.length // self.channels)

    @property
    def causal(self) -> bool:
        """All of them are."""
        return True


@dataclass(frozen=True, kw_only=True)
class Body:
    """A paper's settings, beside those of its configuration.

    answered: positions are those of the place that is answered; otherwise of the token that enters. by_channel: each
    channel has a table of values, and of rows and columns, of its own, and there is no vector for the start (value 0
    enters). scale: multiplies the values' vectors. final_eps: of the norm before the logits; None = there is none.
    """

    post_norm: bool = False
    eps: float = 1e-5
    final_eps: float | None = 1e-5
    activation: str = "gelu"
    bias: bool = True
    logits_bias: bool = True
    answered: bool = False
    by_channel: bool = False
    scale: bool = False


@dataclass
class Cache:
    """What decoding keeps: the classes [N], and of each block what its pattern needs of the places before."""

    labels: Tensor
    place: int = 0
    """How many places were answered."""
    blocks: list[Memory] = field(default_factory=list)


class CausalBody(Network):
    """(tokens, time, cond) -> logits; time is ignored."""

    BODY: ClassVar[Body] = Body()
    config: Any

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        body, width, side, channels = self.BODY, config.width, config.side, config.channels
        tables = channels if body.by_channel else 1
        self.tokens = nn.Embedding(config.values * tables, width)
        self.first = None if body.by_channel else nn.Parameter(torch.empty(width))
        counts = (side * channels, side * channels) if body.by_channel else (side, side, channels)
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(count, width)) for count in counts)
        self.blocks = nn.ModuleList(ResidualBlock(self.style(), self.pattern(i)) for i in range(config.depth))
        self.norm = nn.Identity() if body.final_eps is None else nn.LayerNorm(width, eps=body.final_eps)
        self.logits = nn.Linear(width, config.values, bias=body.logits_bias)
        self.initialise()

    def style(self) -> Style:
        """Of the blocks."""
        c, body = self.config, self.BODY
        return Style(
            width=c.width, heads=c.heads, hidden=round(c.mlp_ratio * c.width), dropout=c.dropout, bias=body.bias,
            post_norm=body.post_norm, eps=body.eps, activation=body.activation, classes=c.label_dim,
        )  # fmt: skip

    @abstractmethod
    def pattern(self, block: int) -> Pattern:
        """What the places of a block see."""

    @abstractmethod
    def initialise(self) -> None:
        """Draw the weights as the paper does."""

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """tokens: int64 [N, L]. Returns logits [N, L, V].

        Raises UserError for another number of tokens, or a label that is no class.
        """
        labels = self.checked(tokens, cond)
        h = self.embedded(entering(tokens), torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            h = block(h, labels)
        return self.answers(h)

    def answers(self, h: Tensor) -> Tensor:
        """Logits [N, K, V] of what the last block gave."""
        return self.logits(self.norm(h))  # type: ignore[no-any-return]

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1) -> Any:
        """An empty cache for n sequences. Raises UserError where a label is no class."""
        labels = class_index(cond, self.config.label_dim, n, self.tokens.weight.device)
        return Cache(labels, 0, [block.pattern.memory() for block in self.blocks])  # type: ignore[union-attr,operator]

    def step(self, before: Tensor | None, cache: Any) -> Tensor:
        """The logits [N, V] of the next place: those of `forward`, at the cost of one token.

        before: the token [N] that was put at the place before; None for the first. Moves the cache on by one.
        """
        require_next(before, cache.place, self.config.length)
        h = self.embedded(_one(before, cache.labels), torch.tensor([cache.place], device=cache.labels.device))
        for block, memory in zip(self.blocks, cache.blocks, strict=True):
            h = block.step(h, memory, cache.place, self.config.length, cache.labels)  # type: ignore[operator]
        cache.place += 1
        return self.answers(h)[:, 0]

    def embedded(self, before: Tensor, places: Tensor) -> Tensor:
        """What enters at places [K] (or [N, K], of each image its own): [N, K, width].

        before: the token before each, int64 [N, K], -1 where there is none.
        """
        c, body = self.config, self.BODY
        side, channels = c.side, c.channels
        at = places if body.answered else (places - 1).clamp(min=0)
        row, column, channel = at // (side * channels), at // channels % side, at % channels
        known = before.clamp(min=0)
        if body.by_channel:
            h = self.tokens(known + c.values * channel)
            where = [row * channels + channel, column * channels + channel]
        else:
            h, where = self.tokens(known), [row, column, channel]
        h = h * c.width**0.5 if body.scale else h
        told = sum((table[index] for table, index in zip(self.positions, where, strict=True)), torch.tensor(0.0))
        if self.first is None:
            h = h + told
        elif body.answered:
            h = torch.where((before < 0)[..., None], self.first, h) + told
        else:
            h = torch.where((before < 0)[..., None], self.first, h + told)
        return dropout(h, c.embedding_dropout, self.training)

    def checked(self, tokens: Tensor, cond: Condition) -> Tensor:
        """The classes' rows [N]. Raises UserError for another number of tokens, or a label that is no class."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.length:
            raise UserError(f"tokens are {list(tokens.shape)}; this network takes [N, {self.config.length}]")
        return class_index(cond, self.config.label_dim, len(tokens), tokens.device)


def entering(tokens: Tensor) -> Tensor:
    """The token before each place, [N, L]; -1 before the first."""
    return torch.cat([torch.full_like(tokens[:, :1], -1), tokens[:, :-1]], 1)


def _one(before: Tensor | None, labels: Tensor) -> Tensor:
    return torch.full_like(labels, -1)[:, None] if before is None else before[:, None]


def require_next(before: Tensor | None, place: int, length: int) -> None:
    """Raise ValueError where a cache is asked for another place than its next."""
    if (before is None) != (place == 0) or place >= length:
        raise ValueError(f"place {place} of {length} asked for with token {before}")
