"""The Axial Transformer's network (Ho et al. 2019, arXiv 1912.12180): attention along one axis at a time, and shifts.

Order      channels first: all of the red plane, then green given red, then blue; within a plane row by row.
Encoder    of the planes before: they, over the largest value, with those to come as zeros, and a plane of ones for the
           channel at hand; a 3x3 convolution, positions, pairs of blocks along rows and along columns, unmasked.
Outer      of the plane at hand: token vectors, positions and the encoder's answer; pairs of blocks along rows,
           unmasked, and along columns, causal; then all is moved down by one row: a row knows those above it.
Inner      tokens moved right by one column, plus the outer answer, positions and the encoder's; blocks along rows,
           causal; norm, logits.
Sampling   semi-parallel: the encoder runs once a channel, the outer decoder once a row (on the rows above it), the
           inner one once a place, with the keys of its row kept. The tokens are those of asking for all anew.
Blocks     pre-norm, x sigmoid(1.702 x), hidden width 1.
Init       layers that end a branch, and logits, with 1e-10 of the variance of the others, 1 / fan in (normal, cut at
           2); vectors of tokens and positions N(0, 25 / width); biases 0.
Source     google-research/google-research, axial/ (transformers.py, nn.py, config_imagenet64.py, config_imagenet32.py).
Departs    The released inner decoder runs on all of a row for each of its places, the outer one on the whole plane; it
           draws by the largest of logits plus Gumbel noise, we by one uniform number a token. Its variant with channels
           as rows of one tall image (MultiChannelTransformer2d) is not built in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.causal_body import CausalConfig, require_next
from imagewright.networks.config import Network, require
from imagewright.networks.layers import Init, class_index, conv
from imagewright.networks.patterns import Columns, Dense, Memory
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.noise import dropout
from imagewright.types import UNCONDITIONAL, Condition, UserError

TINY = 1e-5
"""Square root of the published 1e-10."""
TABLE_GAIN = 5.0


@dataclass(frozen=True, kw_only=True)
class AxialTransformerConfig(CausalConfig):
    """Arguments of `AxialTransformer`; `depth` is that of each stack. Raises UserError on a value outside its range."""

    mlp_ratio: float = 1.0
    encoder_depth: int | None = None
    """Blocks of the encoder, an even number; None = depth."""
    outer_depth: int | None = None
    """Blocks of the outer decoder, an even number; None = depth. With 0, no row knows what is above it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in zip(("encoder_depth", "outer_depth"), self.stacks, strict=True):
            even = isinstance(value, int) and not isinstance(value, bool) and value >= 0 and value % 2 == 0
            require(even, name, value, "an even number (depth, where it is none)")

    @property
    def stacks(self) -> tuple[int, int]:
        """Blocks of the encoder and of the outer decoder."""
        return (
            self.depth if self.encoder_depth is None else self.encoder_depth,
            self.depth if self.outer_depth is None else self.outer_depth,
        )


@dataclass
class AxialCache:
    """What decoding keeps: classes, tokens so far [N, H, W, C], the encoder's answer for the channel at hand, the outer
    decoder's for the row at hand, the inner one's keys and values of that row."""

    labels: Tensor
    planes: Tensor
    place: int = 0
    encoded: Tensor | None = None
    above: Tensor | None = None
    blocks: list[Memory] = field(default_factory=list)


class AxialTransformer(Network):
    """(tokens, time, cond) -> logits; time is ignored. places: in which order they are answered."""

    config_class: ClassVar[type[AxialTransformerConfig]] = AxialTransformerConfig
    config: AxialTransformerConfig

    def __init__(self, config: AxialTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.side
        encoder, outer = config.stacks
        self.read = conv(2 * config.channels, width, 3, Init("lecun_normal"))
        self.tokens = nn.Embedding(config.values, width)
        # Rows and columns, of the encoder and of both decoders.
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(side, width)) for _ in range(4))
        self.encoder = self._pairs(encoder, causal_columns=False)
        self.outer = self._pairs(outer, causal_columns=True)
        self.inner = nn.ModuleList(ResidualBlock(self._style(), Dense()) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, config.values)
        self.initialise()

    def _style(self) -> Style:
        c = self.config
        return Style(
            width=c.width, heads=c.heads, hidden=round(c.mlp_ratio * c.width), dropout=c.dropout,
            activation="quick_gelu", classes=c.label_dim,
        )  # fmt: skip

    def _pairs(self, depth: int, *, causal_columns: bool) -> nn.ModuleList:
        patterns = (Dense(causal=False), Columns(causal=causal_columns))
        return nn.ModuleList(ResidualBlock(self._style(), patterns[i % 2]) for i in range(depth))

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights as published."""
        ends = [self.logits]
        for stack in (self.encoder, self.outer, self.inner):
            for block in stack:
                assert isinstance(block, ResidualBlock)
                ends += [block.out, block.down]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                Init("lecun_normal", weight=TINY if any(module is end for end in ends) else 1.0).fill(module)
        for table in (self.tokens.weight, *self.positions):
            nn.init.normal_(table, std=TABLE_GAIN / self.config.width**0.5)

    @property
    def places(self) -> Tensor:
        """Places of the raster (row, column, channel) in the order in which they are answered, int64 [L]."""
        c = self.config
        return torch.arange(c.length).view(-1, c.channels).T.flatten()

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """tokens: int64 [N, L] in raster order. Returns logits [N, L, V].

        Raises UserError for another number of tokens, or a label that is no class.
        """
        channels = [torch.full((len(tokens),), c, device=tokens.device) for c in range(self.config.channels)]
        planes = [self.plane(tokens, channel, cond) for channel in channels]
        return torch.stack(planes, 2).flatten(1, 2)

    def plane(self, tokens: Tensor, channel: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """Logits [N, H W, V] of one channel of each image, int64 [N]."""
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] != c.length:
            raise UserError(f"tokens are {list(tokens.shape)}; this network takes [N, {c.length}]")
        labels = class_index(cond, c.label_dim, len(tokens), tokens.device)
        planes = tokens.view(-1, c.side, c.side, c.channels)
        encoded = self._encoded(planes, channel, labels)
        at_hand = planes.gather(3, channel[:, None, None, None].expand(*planes.shape[:3], 1))[..., 0]
        h = self._vectors(at_hand)
        u = F.pad(self._above(h, encoded, labels)[:, :-1], (0, 0, 0, 0, 1, 0))
        h = F.pad(h[:, :, :-1], (0, 0, 1, 0)) + u + self._where(2) + encoded
        for block in self.inner:
            h = block(h, labels)
        logits: Tensor = self.logits(self.norm(h))
        return logits.flatten(1, 2)

    def training_pass(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """What a training step computes: one channel."""
        return self.plane(tokens, torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device), cond)

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1) -> AxialCache:
        """An empty cache for n sequences. Raises UserError where a label is no class."""
        c, device = self.config, self.tokens.weight.device
        planes = torch.zeros(n, c.side, c.side, c.channels, dtype=torch.int64, device=device)
        return AxialCache(class_index(cond, c.label_dim, n, device), planes)

    def step(self, before: Tensor | None, cache: Any) -> Tensor:
        """The logits [N, V] of the next of `places`: those of `forward`, at the cost of a place of its row.

        before: the token [N] that was put at the place before; None for the first. Moves the cache on by one.
        """
        c = self.config
        require_next(before, cache.place, c.length)
        area = c.side * c.side
        if before is not None:
            last, channel = (cache.place - 1) % area, (cache.place - 1) // area
            cache.planes[:, last // c.side, last % c.side, channel] = before
        channel, row, column = cache.place // area, cache.place % area // c.side, cache.place % c.side
        if row == column == 0:
            told = torch.full((len(cache.planes),), channel, device=cache.planes.device)
            cache.encoded = self._encoded(cache.planes, told, cache.labels)
        vectors = self._vectors(cache.planes[:, : row + 1, :, channel])
        if column == 0:
            cache.above = torch.zeros_like(vectors[:, 0])
            if row:
                known = self._above(vectors[:, :-1], cache.encoded[:, :row], cache.labels)
                cache.above = known[:, -1]
            cache.blocks = [Memory() for _ in self.inner]
        own = vectors[:, row, column - 1] if column else torch.zeros_like(vectors[:, 0, 0])
        h = own + cache.above[:, column] + self._where(2)[row, column] + cache.encoded[:, row, column]
        h = h[:, None]
        for block, memory in zip(self.inner, cache.blocks, strict=True):
            h = block.step(h, memory, column, c.side, cache.labels)  # type: ignore[operator]
        cache.place += 1
        return self.logits(self.norm(h))[:, 0]  # type: ignore[no-any-return]

    def _encoded(self, planes: Tensor, channel: Tensor, labels: Tensor) -> Tensor:
        """What the planes before a channel say, [N, H, W, width]."""
        c = self.config
        which = torch.arange(c.channels, device=planes.device)
        shown = planes * (which < channel[:, None])[:, None, None] / (c.values - 1)
        at_hand = (which == channel[:, None])[:, None, None].expand_as(shown)
        x = torch.cat([shown, at_hand.to(shown.dtype)], 3).movedim(3, 1).to(self.read.weight.dtype)
        h = self.read(x).movedim(1, 3) + self._where(0)
        for block in self.encoder:
            h = block(h, labels)
        return h  # type: ignore[no-any-return]

    def _above(self, h: Tensor, encoded: Tensor, labels: Tensor) -> Tensor:
        """What a row and those above it say, of the first rows [N, rows, W, width]; the same shape."""
        if not len(self.outer):
            return torch.zeros_like(h)
        u = h + self._where(2)[: h.shape[1]] + encoded
        for block in self.outer:
            u = block(u, labels)
        return u

    def _vectors(self, tokens: Tensor) -> Tensor:
        return dropout(self.tokens(tokens), self.config.embedding_dropout, self.training)

    def _where(self, first: int) -> Tensor:
        """Vectors of rows and columns, [H, W, width]; first: 0 of the encoder, 2 of the decoders."""
        rows, columns = self.positions[first], self.positions[first + 1]
        return rows[:, None] + columns  # type: ignore[no-any-return]
