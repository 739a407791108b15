"""A transformer over an image's tokens: bidirectional as MaskGIT has it, or causal with a cache for decoding.

Tokens     One table of vectors for everything: 0 .. V-1 the values, V the unknown token, V+1+k class k, and one more
           for no class. A class token stands before the sequence. Positions are learned.
Blocks     Attention, then two layers with GELU (tanh form) between; post_norm: h = LN(h + f(h)), eps 1e-12, with a
           norm after the embedding (BERT, MaskGIT); otherwise h = h + f(LN(h)), with a norm after the last block, and
           the layers that end a branch begin smaller by sqrt(2 depth).
Head       dense, GELU, LN, then logits that are inner products with the values' vectors, plus a bias.
Causal     place n is answered from the class and the places before n: the input is shifted by the class token. Told at
           every place are the class (its vector again) and where the answer stands: vectors of its row, its column and
           its channel, added. One class token before thousands, and positions without rows, leave both unused for long.
Source     Chang et al. 2022 (MaskGIT, arXiv 2202.04200), released configuration; Devlin et al. 2019 (BERT, 1810.04805);
           Child et al. 2019 (1904.10509) for the pre-norm initialisation and positions by row, column and channel.
Departs    One vector more, for no class. Logits and their bias are those of the values alone, where the released
           network has them for classes and the unknown token too. The attention's dropout is drawn for every image and
           head; the released one draws it once for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.causal_body import Cache, require_next
from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import class_index
from imagewright.networks.patterns import Dense
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.noise import dropout
from imagewright.types import UNCONDITIONAL, Condition, UserError

EPS = 1e-12
STD = 0.02


@dataclass(frozen=True, kw_only=True)
class TokenTransformerConfig(NetworkConfig):
    """Arguments of `TokenTransformer`; the defaults are MaskGIT's. Raises UserError on a value outside its range."""

    values: int
    """V: how many values a token has."""
    length: int
    """L: tokens of an image."""
    channels: int = 1
    """Tokens of one place, one after the other: the colours of a pixel. What a causal network takes positions from."""
    label_dim: int = 0
    """Number of classes; 0 = labels are ignored."""
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    """Hidden width of a block's two layers, in units of `width`."""
    dropout: float = 0.1
    """On the embedding, on what each branch adds, and on the attention's weights."""
    causal: bool = False
    """Every place sees those before alone."""
    post_norm: bool = True
    """Normalise after adding a branch (BERT), or before it."""
    told_blocks: int = 0
    """Blocks, from the first, in which the class also scales and shifts what goes into both branches (`residual`); -1 =
    all."""

    def __post_init__(self) -> None:
        whole_numbers = {"values": 2, "length": 1, "channels": 1, "label_dim": 0, "width": 1, "depth": 1, "heads": 1}
        for name, least in whole_numbers.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(whole, name, value, f"an integer >= {least}")
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width, {self.width}")
        require(self.mlp_ratio * self.width >= 1, "mlp_ratio", self.mlp_ratio, "positive, a hidden unit at least")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        told = isinstance(self.told_blocks, int) and -1 <= self.told_blocks <= self.depth
        require(told, "told_blocks", self.told_blocks, f"from 0 to the depth, {self.depth}, or -1 for all")
        if self.causal:
            square = self.length == self.channels * self.side**2
            require(square, "length", self.length, f"a square number times channels, {self.channels}")

    @property
    def side(self) -> int:
        """Rows of the image's square of places."""
        return math.isqrt(self.length // self.channels)


class TokenTransformer(Network):
    """(tokens, time, cond) -> logits; time is ignored."""

    config_class: ClassVar[type[TokenTransformerConfig]] = TokenTransformerConfig
    config: TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.values + 2 + config.label_dim, width)
        counts = (config.side, config.side, config.channels) if config.causal else (config.length + 1,)
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(count, width)) for count in counts)
        self.norm = nn.LayerNorm(width, eps=EPS)
        style = Style(
            width=width, heads=config.heads, hidden=round(config.mlp_ratio * width), dropout=config.dropout,
            post_norm=config.post_norm, eps=EPS,
        )  # fmt: skip
        told = config.depth if config.told_blocks < 0 else config.told_blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(
                replace(style, classes=config.label_dim if i < told else 0),
                Dense(config.dropout, causal=config.causal),
            )
            for i in range(config.depth)
        )
        self.dense = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.values))
        self.apply(_initialise)
        for table in self.positions:
            _truncated(table, STD)
        if not config.post_norm:
            for module in self.blocks:
                assert isinstance(module, ResidualBlock)
                for layer in (module.out, module.down):
                    _truncated(layer.weight, STD / (2 * config.depth) ** 0.5)
        for module in self.blocks:
            if isinstance(module.told, nn.Embedding):
                nn.init.zeros_(module.told.weight)

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """tokens: int64 [N, L], `values` = unknown. Returns logits [N, L, V].

        Raises UserError for another number of tokens, or a label that is no class.
        """
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] != c.length:
            raise UserError(f"tokens are {list(tokens.shape)}; this network takes [N, {c.length}]")
        labels = self._labels(cond, len(tokens), tokens.device)
        sequence = torch.cat([labels[:, None], tokens], 1)
        if c.causal:
            sequence = sequence[:, :-1]
        h = self._embedded(sequence, torch.arange(sequence.shape[1], device=tokens.device), labels)
        classes = labels - c.values - 1
        for block in self.blocks:
            h = block(h, classes)
        return self._logits(h if c.causal else h[:, 1:])

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1) -> Cache:
        """An empty cache for n sequences. Raises UserError where the network is not causal, or a label is no class."""
        if not self.config.causal:
            raise UserError("a bidirectional transformer has no cache: every token it is shown changes every answer")
        labels = self._labels(cond, n, self.bias.device)
        return Cache(labels, 0, [block.pattern.memory() for block in self.blocks])  # type: ignore[union-attr,operator]

    def step(self, before: Tensor | None, cache: Cache) -> Tensor:
        """The logits [N, V] of the next place: those of `forward`, at the cost of one token.

        before: the token [N] that was put at the place before; None for the first. Moves the cache on by one.
        """
        require_next(before, cache.place, self.config.length)
        token = cache.labels if before is None else before
        h = self._embedded(token[:, None], torch.tensor([cache.place], device=token.device), cache.labels)
        classes = cache.labels - self.config.values - 1
        for block, memory in zip(self.blocks, cache.blocks, strict=True):
            h = block.step(h, memory, cache.place, self.config.length, classes)  # type: ignore[operator]
        cache.place += 1
        return self._logits(h)[:, 0]

    def _labels(self, cond: Condition, n: int, device: torch.device) -> Tensor:
        """The class token of each sequence, int64 [N]."""
        return self.config.values + 1 + class_index(cond, self.config.label_dim, n, device)

    def _embedded(self, sequence: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """sequence: [N, K], of which each stands at one of the places [K]."""
        h = self.tokens(sequence)
        if self.config.causal:
            side, channels = self.config.side, self.config.channels
            where = [places // (side * channels), places // channels % side, places % channels]
            h = h + self.tokens(labels)[:, None]
        else:
            where = [places]
        for table, index in zip(self.positions, where, strict=True):
            h = h + table[index]
        return dropout(self.norm(h) if self.config.post_norm else h, self.config.dropout, self.training)

    def _logits(self, h: Tensor) -> Tensor:
        h = h if self.config.post_norm else self.norm(h)
        h = self.head_norm(F.gelu(self.dense(h), approximate="tanh"))
        return F.linear(h, self.tokens.weight[: self.config.values], self.bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        _truncated(module.weight, STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _truncated(weight: Tensor, std: float) -> None:
    """Normal, cut at two standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
