"""Perceiver AR's network (Hawthorne et al. 2022, arXiv 2202.07765): depth over the last places alone.

Latents    of the N last places of what is known: each begins as a linear map of the vector that enters at its place,
           looks once, causally, at all inputs up to it (cross-attention; residual from the query; two layers), and then
           goes through L blocks of causal self-attention among the latents. Latent m answers its own place.
Training   on the N places before a random end (`window`; the ends are the method's).
Asked      for all of an image (`forward`), windows of N latents advance by `stride` places; the first answers N, each
           further one its last `stride`, so that every place but the first has N - stride latents before it at least.
           `test_latents` may be more than were trained with.
Sampling   with a cache (`step`): one new latent a token. Training never lets a latent see more than N - 1 before it, so
           when N are there, the last N - stride, and the new one, are computed from scratch; then it goes on. Cross-
           attention's keys and values are of the inputs and stay.
Blocks     pre-norm, squared ReLU, hidden width 4; a norm before the logits.
Input      vectors of row, column and channel of the token that enters are added to it; one vector for the start.
Init       weights normal, cut at 2, with variance 1 / fan in; vectors normal with deviation 1, cut at 2; biases and
           logits 0.
Source     google-research/perceiver-ar (perceiver_ar_model.py, sample_utils.py, experiment.py: imagenet_w_positions).
Departs    256 values, and no logits for padding, end and start. The start's vector is drawn as one; there it is a
           token's and three positions' of its own, so twice as long at first. The released sampler's reset leaves N / 2
           latents, the new one counted, where its evaluation advances by N / 2; here both are `stride`, so that what is
           sampled is what is evaluated, to the last digit. An input that is hidden from cross-attention
           (`input_dropout`) is not hidden from its own latent. Rotary positions (text, sound), latent dropout (0 in all
           its settings), random subsets of inputs and chunked cross-attention (PyTorch's fused kernel holds no n^2) are
           not built in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.causal_body import Body, CausalBody, CausalConfig, entering, require_next
from imagewright.networks.config import require
from imagewright.networks.layers import Init, class_index
from imagewright.networks.patterns import Dense, Memory, Pattern
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.noise import kept
from imagewright.types import UNCONDITIONAL, Condition


@dataclass(frozen=True, kw_only=True)
class PerceiverARConfig(CausalConfig):
    """Arguments of `PerceiverAR`. Raises UserError on a value outside its range."""

    latents: int = 1024
    """N in training; an image of fewer tokens has as many."""
    test_latents: int = 0
    """N when a model is asked; 0 = as in training."""
    stride: int = 0
    """Places by which windows advance when a model is asked; 0 = half of its latents."""
    input_dropout: float = 0.0
    """Share of inputs that cross-attention does not see in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("latents", 1)
        self.require_whole("test_latents", 0)
        self.require_whole("stride", 0)
        most = self.test_latents or self.latents
        require(self.stride <= most, "stride", self.stride, f"at most the latents, {most}")
        require(0 <= self.input_dropout < 1, "input_dropout", self.input_dropout, "in [0, 1)")

    @property
    def asked(self) -> tuple[int, int]:
        """Latents and stride when a model is asked."""
        latents = min(self.test_latents or self.latents, self.length)
        return latents, min(self.stride or max(latents // 2, 1), latents)


@dataclass
class LatentCache:
    """What decoding keeps: classes, vectors that entered, cross-attention's keys and values, and the latents'."""

    labels: Tensor
    entered: Tensor
    cross: Memory
    place: int = 0
    latents: int = 0
    """How many the blocks hold."""
    blocks: list[Memory] = field(default_factory=list)


class CrossBlock(ResidualBlock):
    """Latents look at inputs: z + f(LN(z), LN(inputs)), then two layers."""

    def __init__(self, style: Style) -> None:
        super().__init__(style, Dense())
        self.norm_inputs = nn.LayerNorm(style.width, eps=style.eps)

    def keys_values(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs [N, K, width], each [N, heads, K, width / heads]."""
        s = self.style
        weight, bias = self.qkv.weight[s.width :], self.qkv.bias[s.width :]
        key, value = F.linear(self.norm_inputs(inputs), weight, bias).chunk(2, -1)
        return self._heads(key, s.heads), self._heads(value, s.heads)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries alone; keys and values are of the inputs."""
        width = self.style.width
        query = self._heads(F.linear(x, self.qkv.weight[:width], self.qkv.bias[:width]), self.style.heads)
        return query, query, query

    def forward(  # type: ignore[override]
        self, z: Tensor, inputs: Tensor, sees: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """`look` at inputs [N, K, width]."""
        return self.look(z, *self.keys_values(inputs), sees, labels)

    def look(self, z: Tensor, keys: Tensor, values: Tensor, sees: Tensor, labels: Tensor | None) -> Tensor:
        """Latents [N, T, width] after it. sees: bool, which of the keys each may see, [T, K] or [N, 1, T, K]."""
        return self._through(
            z, labels, lambda query, _, __: F.scaled_dot_product_attention(query, keys, values, attn_mask=sees)
        )


class PerceiverAR(CausalBody):
    """(tokens, time, cond) -> logits; time is ignored."""

    config_class: ClassVar[type[PerceiverARConfig]] = PerceiverARConfig
    config: PerceiverARConfig
    BODY: ClassVar[Body] = Body(activation="squared_relu")

    def __init__(self, config: PerceiverARConfig) -> None:
        self.config = config
        super().__init__(config)

    def pattern(self, block: int) -> Pattern:
        return Dense()

    @torch.no_grad()
    def initialise(self) -> None:
        width = self.config.width
        self.begin = nn.Linear(width, width)
        self.cross = CrossBlock(self.style())
        init = Init("lecun_normal")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.fill(module)
        nn.init.zeros_(self.logits.weight)
        assert self.first is not None
        for table in (self.tokens.weight, self.first, *self.positions):
            nn.init.trunc_normal_(table, std=1.0, a=-2.0, b=2.0)

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `CausalBody.forward`, by windows."""
        labels = self.checked(tokens, cond)
        length = tokens.shape[1]
        inputs = self.embedded(entering(tokens), torch.arange(length, device=tokens.device))
        keys, values = self.cross.keys_values(inputs)
        latents, stride = self.config.asked
        found, answered = [], 0
        while answered < length:
            start = max(answered - (latents - stride), 0) if answered else 0
            end = min(start + latents, length)
            place = torch.arange(start, end, device=tokens.device)
            sees = torch.arange(end, device=tokens.device) <= place[:, None]
            z = self.cross.look(self.begin(inputs[:, start:end]), keys[:, :, :end], values[:, :, :end], sees, labels)
            for block in self.blocks:
                z = block(z, labels)
            found.append(self.answers(z[:, answered - start :]))
            answered = end
        return torch.cat(found, 1)

    def window(self, tokens: Tensor, ends: Tensor, cond: Condition = UNCONDITIONAL) -> tuple[Tensor, Tensor]:
        """Logits of the last places before each image's end, [N, T, V], and which places they are, int64 [N, T].

        ends: int64 [N], no fewer than the latents; of an image of fewer tokens than latents, its length.
        """
        labels = self.checked(tokens, cond)
        count = min(self.config.latents, tokens.shape[1])
        everywhere = torch.arange(tokens.shape[1], device=tokens.device)
        places = ends[:, None] - count + everywhere[:count]
        inputs = self.embedded(entering(tokens), everywhere)
        z = self.begin(inputs.gather(1, places[..., None].expand(-1, -1, inputs.shape[2])))
        sees = everywhere <= places[..., None]
        if self.training and self.config.input_dropout:
            shown = kept(inputs[..., 0], self.config.input_dropout)[:, None]
            sees = sees & (shown | (everywhere == places[..., None]))
        z = self.cross(z, inputs, sees[:, None], labels)
        for block in self.blocks:
            z = block(z, labels)
        return self.answers(z), places

    def training_pass(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        """What a training step computes."""
        ends = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        return self.window(tokens, ends, cond)[0]

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1) -> LatentCache:
        """As `CausalBody.start`."""
        labels = class_index(cond, self.config.label_dim, n, self.tokens.weight.device)
        entered = self.tokens.weight.new_zeros(n, self.config.length, self.config.width)
        return LatentCache(labels, entered, Memory())

    def step(self, before: Tensor | None, cache: Any) -> Tensor:
        """As `CausalBody.step`: one latent more, or, where they are full, those after a part of them was dropped."""
        c, place = self.config, cache.place
        require_next(before, place, c.length)
        latents, stride = c.asked
        token = torch.full_like(cache.labels, -1) if before is None else before
        h = self.embedded(token[:, None], torch.tensor([place], device=token.device))
        cache.entered[:, place] = h[:, 0]
        key, value = self.cross.keys_values(h)
        cache.cross.put(c.length, place, key, value)
        if cache.latents % latents == 0:  # none, or all
            cache.blocks, cache.latents = [Memory() for _ in self.blocks], 0
        again = latents - stride if place and not cache.latents else 0
        first = place - again
        at = torch.arange(first, place + 1, device=token.device)[:, None]
        sees = torch.arange(place + 1, device=token.device) <= at
        keys, values = cache.cross.read((slice(0, place + 1),))
        z = self.cross.look(self.begin(cache.entered[:, first : place + 1]), keys, values, sees, cache.labels)
        for block, memory in zip(self.blocks, cache.blocks, strict=True):
            z = _held(block, z, memory, cache.latents, latents, cache.labels)
        cache.latents += again + 1
        cache.place += 1
        return self.answers(z[:, -1:])[:, 0]


def _held(block: Any, z: Tensor, memory: Memory, held: int, latents: int, labels: Tensor) -> Tensor:
    """A block on one latent more, or on the first ones, which are then kept."""
    if z.shape[1] == 1:
        stepped: Tensor = block.step(z, memory, held, latents, labels)
        return stepped

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for i in range(key.shape[2]):
            memory.put(latents, i, key[:, :, i : i + 1], value[:, :, i : i + 1])
        mixed: Tensor = block.pattern(query, key, value)
        return mixed

    result: Tensor = block._through(z, labels, attend)
    return result
