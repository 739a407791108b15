"""ARPG's network (Li et al. 2025, arXiv 2503.10568): what is known and what is asked for are two passes.

Content    pass 1: half of the blocks, causal self-attention over [class, known tokens], each turned (`rotary`) by where
           its token stands. What comes out gives one set of keys, turned alike, and of values for all blocks of pass 2.
Queries    pass 2: the other half, cross-attention. Every query begins as the same vector, that of the unknown token,
           and knows its target by how it is turned alone. Queries do not see each other, so that any number of places
           can be asked for at once, and an answer does not depend on what else is asked.
Blocks     pre-norm, RMSNorm (1e-5), SwiGLU, no biases; dropout on what either branch adds, and on vectors of content.
Training   in an order of each image's own (`forward` with an order): [class, x_o(1), ..] enters, query i sees the class
           and the first i - 1 tokens, and answers x_o(i).
Decoding   with a cache (`start`, `show`, `ask`). Whether tokens that are shown together see only those before them is
           an argument; the released module ties it to training or not. Keys are kept turned.
Without    an order `forward` answers as masked models do: from all tokens that are not unknown, which see each other
           and the class, as if they had been shown together.
Init       normal, deviation 0.02 (`init_std`); the logits' layer 0.
Source     hp-l33/ARPG (models/arpg.py).
Departs    The released table of vectors has one more, that no program uses. `class_turn` "zero", the default, is the
           released one: where places have cosine and sine, the class has zeros, so that its key is the zero vector and
           answers depend on differences of positions alone; with "none" it is not turned, and they know the frame from
           the second token on. Of tokens that share a place, the channels of a pixel, a vector of the channel
           is added to content and queries (the paper has one token a place). Larger grids (`expansion`) have the
           trained one's positions, divided finer, as the paper says; no program of it is public, nor of control
           features in place of queries, which are not built in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.gated import SwiGLU, swiglu_hidden
from imagewright.networks.layers import class_index
from imagewright.networks.recompute import Block
from imagewright.networks.rotary import BASE, grid, turned, turns
from imagewright.noise import dropout
from imagewright.types import UNCONDITIONAL, Condition, UserError

ClassTurn = Literal["zero", "none"]
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class ARPGConfig(NetworkConfig):
    """Arguments of `ARPG`; the defaults are those of ARPG-L. Raises UserError on a value outside its range."""

    values: int
    """V: how many values a token has."""
    length: int
    """L: tokens of an image."""
    channels: int = 1
    """Tokens of one place, one after the other: the colours of a pixel."""
    label_dim: int = 0
    """Number of classes; 0 = labels are ignored."""
    width: int = 1024
    depth: int = 24
    """Blocks of both passes, half of them each."""
    heads: int = 16
    hidden_multiple: int = 256
    """SwiGLU's middle is 8/3 of the width, rounded up to a multiple of this."""
    dropout: float = 0.1
    """On what each branch adds."""
    embedding_dropout: float = 0.1
    """On the vectors of class and tokens."""
    rotary_base: float = BASE
    """How much slower the last pair of a head's channels turns than the first: 100 will do for a few rows."""
    init_std: float = 0.02
    """Deviation of the first weights, made for widths of a thousand."""
    class_turn: ClassTurn = "zero"
    """How the class is turned, which has no place: by zeros, as released, or not at all."""

    def __post_init__(self) -> None:
        whole_numbers = {"values": 2, "length": 1, "channels": 1, "label_dim": 0, "width": 4, "depth": 2, "heads": 1}
        for name, least in {**whole_numbers, "hidden_multiple": 1}.items():
            self.require_whole(name, least)
        require(self.depth % 2 == 0, "depth", self.depth, "even: each pass has half of the blocks")
        heads = f"a divisor of width, {self.width}, that leaves a multiple of 4"
        require(self.width % (4 * self.heads) == 0, "heads", self.heads, heads)
        for name in ("dropout", "embedding_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(self.rotary_base > 1, "rotary_base", self.rotary_base, "above 1")
        require(0 < self.init_std < 1, "init_std", self.init_std, "in (0, 1)")
        square = self.length == self.channels * self.side**2
        require(square, "length", self.length, f"a square number times channels, {self.channels}")
        require(self.class_turn in get_args(ClassTurn), "class_turn", self.class_turn, ", ".join(get_args(ClassTurn)))

    @property
    def side(self) -> int:
        """Rows of the image's square of places."""
        return math.isqrt(self.length // self.channels)


class Kept:
    """Keys and values that decoding keeps, [N, heads, slots, D], made when the first come."""

    def __init__(self, slots: int) -> None:
        self.slots, self.count = slots, 0
        self._both: tuple[Tensor, Tensor] | None = None

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep some more, [N, heads, K, D]; returns all there are."""
        if self._both is None:
            self._both = tuple(t.new_empty((*t.shape[:2], self.slots, t.shape[3])) for t in (key, value))  # type: ignore[assignment]
        assert self._both is not None
        start, self.count = self.count, self.count + key.shape[2]
        for kept, new in zip(self._both, (key, value), strict=True):
            kept[:, :, start : self.count] = new
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """All there are."""
        assert self._both is not None
        keys, values = self._both
        return keys[:, :, : self.count], values[:, :, : self.count]


@dataclass
class Shown:
    """What decoding keeps: each block of pass 1's keys and values, those shared by pass 2, and turns by place.

    turns: [1 + places, D / 2, 2], the class's first.
    """

    blocks: list[Kept]
    shared: Kept
    turns: Tensor


Attend = Callable[..., Tensor]
"""Queries, keys and values of a block's input (queries alone in pass 2), [N, heads, K, D] each -> [N, heads, K, D]."""


class PassBlock(Block):
    """h + f(RMSNorm(h)) with f an attention, then SwiGLU. projections: 3 = queries, keys, values; 1 = queries."""

    def __init__(self, config: ARPGConfig, projections: int) -> None:
        super().__init__()
        width = config.width
        self.heads, self.projections, self.dropout = config.heads, projections, config.dropout
        self.norm0, self.norm1 = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.project = nn.Linear(width, projections * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gated = SwiGLU(width, swiglu_hidden(width, config.hidden_multiple))

    def _through(self, h: Tensor, attend: Attend) -> Tensor:
        mixed = attend(*split(self.project(self.norm0(h)), self.projections, self.heads))
        h = h + dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return h + dropout(self.gated(self.norm1(h)), self.dropout, self.training)


class ContentBlock(PassBlock):
    """Of pass 1."""

    def __init__(self, config: ARPGConfig) -> None:
        super().__init__(config, 3)

    def forward(self, h: Tensor, turns: Tensor, sees: Tensor | None) -> Tensor:
        """h: [N, K, width]. sees: which keys each may see, bool, broadcast to [N, 1, K, K]; None = those up to it."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = turned(query, turns), turned(key, turns)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=sees, is_causal=sees is None)

        return self._through(h, attend)

    def step(self, h: Tensor, turns: Tensor, kept: Kept, causal: bool) -> Tensor:
        """The same of tokens that follow those kept, and are then kept themselves."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = kept.add(turned(key, turns), value)
            sees = _last_see(query, keys) if causal and query.shape[2] > 1 else None
            return F.scaled_dot_product_attention(turned(query, turns), keys, values, attn_mask=sees)

        return self._through(h, attend)


class QueryBlock(PassBlock):
    """Of pass 2."""

    def __init__(self, config: ARPGConfig) -> None:
        super().__init__(config, 1)

    def forward(
        self, h: Tensor, turns: Tensor, keys: Tensor, values: Tensor, sees: Tensor | None, causal: bool
    ) -> Tensor:
        """h: [N, K, width]. sees: which keys may be seen, bool; None = all. causal: the nth query sees the first n."""

        def attend(query: Tensor) -> Tensor:
            query = turned(query, turns)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=sees, is_causal=causal)

        return self._through(h, attend)


class ARPG(Network):
    """(tokens, time, cond) -> logits; time is ignored."""

    config_class: ClassVar[type[ARPGConfig]] = ARPGConfig
    config: ARPGConfig

    def __init__(self, config: ARPGConfig) -> None:
        super().__init__()
        self.config = config
        width, half = config.width, config.depth // 2
        self.tokens = nn.Embedding(config.values + 2 + config.label_dim, width)
        self.channel = nn.Embedding(config.channels, width) if config.channels > 1 else None
        self.content = nn.ModuleList(ContentBlock(config) for _ in range(half))
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.shared = nn.Linear(width, 2 * width, bias=False)
        self.queries = nn.ModuleList(QueryBlock(config) for _ in range(half))
        self.last_norm = nn.RMSNorm(width, eps=EPS)
        self.logits = nn.Linear(width, config.values, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
        nn.init.zeros_(self.logits.weight)

    def forward(
        self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL, order: Tensor | None = None
    ) -> Tensor:
        """tokens: int64 [N, L], `values` = unknown. Returns logits [N, L, V] of all places, given those that are known.

        order: the places of each image in its own order, int64 [N, L]; then logits i are those of place order[i], given
        the tokens of the places before it in the order. Raises UserError for another number of tokens, or a label that
        is no class.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.config.length:
            raise UserError(f"tokens are {list(tokens.shape)}; this network takes [N, {self.config.length}]")
        table, labels = self._table(1, tokens.device), self._labels(cond, len(tokens), tokens.device)
        if order is None:
            places = torch.arange(self.config.length, device=tokens.device)
            known = torch.cat([torch.ones_like(labels[:, None], dtype=torch.bool), tokens < self.config.values], 1)
            asked, shown = known[:, None, None], known[:, None, None].repeat(1, 1, known.shape[1], 1)
            shown[:, :, 0, 1:] = False  # the class is shown first
            entering, slots = tokens, places
        else:
            places, asked, shown = order, None, None
            entering, slots = tokens.gather(1, order[:, :-1]), order[:, :-1]
        own = self._turns(slots, table)
        own = torch.cat([table[:1].expand(*own.shape[:-3], -1, -1, -1), own], -3)
        h = torch.cat([self.tokens(labels)[:, None], self._told(self.tokens(entering), slots)], 1)
        h = dropout(h, self.config.embedding_dropout, self.training)
        for block in self.content:
            h = block(h, own, shown)
        keys, values = self._keys_values(h, own)
        return self._answers(len(tokens), places, table, keys, values, asked, causal=order is not None)

    def training_pass(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """What a training step computes."""
        return self(tokens, time, cond, torch.arange(self.config.length, device=tokens.device).expand_as(tokens))  # type: ignore[no-any-return]

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1, expansion: int = 1) -> Shown:
        """A cache for n sequences to which the class alone was shown. Raises UserError where a label is no class.

        expansion: of a grid of so many times as many rows and columns.
        """
        device = self.tokens.weight.device
        slots = 1 + self.config.length * expansion**2
        cache = Shown([Kept(slots) for _ in self.content], Kept(slots), self._table(expansion, device))
        self._show(self.tokens(self._labels(cond, n, device))[:, None], cache.turns[:1], cache, causal=False)
        return cache

    def show(self, tokens: Tensor, places: Tensor, cache: Shown, *, causal: bool = False) -> None:
        """Pass 1 of tokens [N, K] at places [N, K] that were not shown before.

        causal: they see those before them, as in training; otherwise each other, too.
        """
        h = self._told(self.tokens(tokens), places)
        self._show(h, self._turns(places, cache.turns), cache, causal)

    def ask(self, places: Tensor, cache: Shown) -> Tensor:
        """Pass 2: logits [N, K, V] of places [N, K], given all that was shown."""
        return self._answers(len(places), places, cache.turns, *cache.shared.read())

    def _show(self, h: Tensor, own: Tensor, cache: Shown, causal: bool) -> None:
        for block, kept in zip(self.content, cache.blocks, strict=True):
            h = block.step(h, own, kept, causal)  # type: ignore[operator]
        cache.shared.add(*self._keys_values(h, own))

    def _keys_values(self, h: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """For all blocks of pass 2, [N, heads, K, D] each; the keys are turned."""
        key, value = split(self.shared(self.norm(h)), 2, self.config.heads)
        return turned(key, own), value

    def _answers(
        self, n: int, places: Tensor, table: Tensor, keys: Tensor, values: Tensor,
        sees: Tensor | None = None, *, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """places: [N, K], or [K] where all images are asked the same."""
        unknown = self.tokens.weight[self.config.values]
        q = self._told(unknown.expand(*places.shape, -1), places).expand(n, -1, -1)
        own = self._turns(places, table)
        for block in self.queries:
            q = block(q, own, keys, values, sees, causal)
        return self.logits(self.last_norm(q))  # type: ignore[no-any-return]

    def _told(self, h: Tensor, places: Tensor) -> Tensor:
        """With the vector of each place's channel, where there are several."""
        return h if self.channel is None else h + self.channel(places % self.config.channels)

    def _turns(self, places: Tensor, table: Tensor) -> Tensor:
        """Of places [N, K] or [K]: [N, 1, K, D / 2, 2] or [K, D / 2, 2]."""
        own = table[1 + places // self.config.channels]
        return own[:, None] if places.ndim == 2 else own

    def _table(self, expansion: int, device: torch.device) -> Tensor:
        """Turns of the class, and of every place in raster order, [1 + places, D / 2, 2]."""
        c = self.config
        side = c.side * expansion
        positions = grid(side, side, device) / expansion
        wide = torch.promote_types(self.tokens.weight.dtype, torch.float32)
        of_places = turns(positions.to(wide), c.width // c.heads, c.rotary_base)
        of_class = torch.zeros_like(of_places[:1])
        if c.class_turn == "none":
            of_class[..., 0] = 1
        return torch.cat([of_class, of_places])

    def _labels(self, cond: Condition, n: int, device: torch.device) -> Tensor:
        """The class's row of the table of vectors, int64 [N]."""
        return self.config.values + 1 + class_index(cond, self.config.label_dim, n, device)


def split(x: Tensor, projections: int, heads: int) -> tuple[Tensor, ...]:
    """So many projections, side by side in the last axis of [N, K, ..], each as [N, heads, K, D]."""
    return x.reshape(*x.shape[:2], projections, heads, -1).permute(2, 0, 3, 1, 4).unbind()


def _last_see(query: Tensor, keys: Tensor) -> Tensor:
    """Which of the keys [.., T, D] the queries [.., K, D], of the last of them, see: those up to it; bool [K, T]."""
    count, total = query.shape[2], keys.shape[2]
    return torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)
