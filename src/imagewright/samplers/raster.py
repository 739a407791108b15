"""Raster decoding: a causal model's tokens one after the other, each from its distribution given those before.

Order    the model's own `places`: of most the raster's (row, column, channel); an Axial Transformer has its channels
         one after the other, and its cache is what that paper calls semi-parallel sampling.
Cost     one network evaluation a token. With the model's cache each asks for one place only, so that an image of L
         tokens costs O(L) places and O(L^2) in dense attention; without it O(L^2) and O(L^3).
Filling  the same with some tokens known: they stay, and each other one is drawn from those before it. What is known
         further on has no say, so that a region is drawn as the model would where it is the end of the picture.
Draws    one uniform number a token, turned by the inverse of the cumulative distribution: with and without the cache
         the same tokens come out wherever the logits agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagewright.checks import require_non_negative
from imagewright.errors import an
from imagewright.samplers.categorical import draw
from imagewright.samplers.filling import Filling
from imagewright.types import UNCONDITIONAL, Condition, Noise, OnStep, TokenModel, UserError

MOST_LOOKS = 64
"""`on_step` is called after this many places at most, evenly spread."""


@dataclass(frozen=True, kw_only=True)
class Raster(Filling):
    """Draws from a causal token model, in raster order."""

    temperature: float = 1.0
    """Divides the logits; 1 = the model's own distribution, 0 = the most probable token each time."""
    cache: bool = True
    """Ask for one place at a time, keeping what the attention needs of the places before; the same tokens."""

    def __post_init__(self) -> None:
        require_non_negative("sampler.temperature", self.temperature)

    @torch.no_grad()
    def fill(
        self,
        model: TokenModel,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """tokens: int64 [N, length], `codec.values` where they are unknown. Returns them with those drawn.

        on_step: called with the tokens so far decoded (twice; those to come are the middle value), and the share that
        was to come before the step. Raises UserError for a model that is not causal, or that has no cache where one is
        asked for.
        """
        self._check(model)
        if noise is None:
            raise ValueError("raster decoding draws at random; give it a noise source")
        codec, n = model.codec, len(tokens)
        uniform = noise.uniform(torch.zeros((n, codec.length), dtype=torch.float64, device=tokens.device))
        unknown = tokens == codec.values
        # What a place holds before it is drawn no causal model sees.
        tokens = tokens.masked_fill(unknown, codec.values // 2)
        cached: Any = model
        cache = cached.start(cond, n) if self.cache else None
        looks = _looks(codec.length) if on_step is not None else set()
        order: list[int] = getattr(model, "places", torch.arange(codec.length)).tolist()
        for i, place in enumerate(order):
            if self.cache:
                logits = cached.step(tokens[:, order[i - 1]] if i else None, cache)
            else:
                logits = model.logits(tokens, cond)[:, place]
            drawn = self._token(logits, uniform[:, place])
            tokens[:, place] = torch.where(unknown[:, place], drawn, tokens[:, place])
            if on_step is not None and i in looks:
                picture = codec.decode(tokens)
                on_step(picture, picture, 1 - i / codec.length)
        return tokens

    def _token(self, logits: Tensor, uniform: Tensor) -> Tensor:
        return draw(logits.double() / self.temperature, uniform) if self.temperature else logits.argmax(-1)

    def _check(self, model: TokenModel) -> None:
        name = type(model).__name__
        if model.order != "causal":
            raise UserError(f"sampler Raster draws from causal models; {an(name)} answers from tokens in any order")
        if self.cache and not getattr(model, "cached", hasattr(model, "step")):
            raise UserError(f"{an(name)} has no cache; draw without it, --set cache=false")


def _looks(length: int) -> set[int]:
    """At most MOST_LOOKS of 0 .. length - 1, the last among them."""
    count = min(length, MOST_LOOKS)
    return {(i + 1) * length // count - 1 for i in range(count)}
