"""Randomized parallel decoding (Li et al. 2025, ARPG, arXiv 2503.10568): a random order, several places a step.

Step t of T, of N unknown tokens:
  (a) n = floor(N * ratio((t+1)/T)), kept within 1 .. left - 1, stay unknown, none after the last step; ratio(u) is
      arccos(u) / (pi/2) or cos(pi/2 * u). With T = N either schedule decodes one token a step;
  (b) the tokens of step t - 1 are shown to the model, which keeps of them what later steps need, and the next places in
      the order are asked for, all at once: an answer depends on what was shown alone;
  (c) all are drawn. Nothing is drawn twice.

Guidance   logits of no class, plus s times what the class adds; s = 1 + (guidance - 1) * share of tokens decoded, this
           step's included, or `guidance` throughout. Both streams are one batch twice as large.
Known      tokens (editing) come first in the order and are shown at once; they count as decoded.
Expansion  a grid of k times as many rows and columns, whose positions are the trained ones divided finer.
Source     hp-l33/ARPG (models/arpg.py: generate).
Departs    Each image has an order of its own, so that it does not depend on its batch; there a batch has one. Known
           tokens are shown in a random order, each seeing those before it, as in training (no program of it is public).
           Of T > N steps N are taken; there the others draw nothing. Top-k and top-p, off in all published settings,
           are not built in.
Cost       a step takes each new token once through pass 1, and each asked for once through pass 2: all in all as many
           tokens as one pass over the picture, whatever T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from imagewright.checks import require_non_negative, require_whole
from imagewright.errors import an
from imagewright.models.tokens import check_tokens
from imagewright.samplers.categorical import draw
from imagewright.samplers.filling import Filling
from imagewright.samplers.grid import check_steps
from imagewright.samplers.masked_decoding import check_guidance
from imagewright.types import UNCONDITIONAL, Condition, Noise, OnStep, TokenModel, UserError

RATIOS: Mapping[str, Callable[[int, int], float]] = {
    "arccos": lambda step, steps: math.acos(step / steps) / (math.pi / 2),
    "cosine": lambda step, steps: math.cos(math.pi / 2 * step / steps),
}
"""Share of tokens that are unknown after so many of the steps, in the released order of operations: cos(pi / 3) of 64
tokens is 31.99.. in one and 32 in another."""


@dataclass(frozen=True, kw_only=True)
class RandomizedParallel(Filling):
    """Draws from a model of random orders, in `num_steps` passes."""

    num_steps: int = 64
    """T: passes, at most as many as there are tokens (64 for 256 tokens)."""
    schedule: str = "arccos"
    """How many tokens are unknown after each pass: arccos, or cosine, the paper's first."""
    temperature: float = 1.0
    """Divides the logits; 0 = the most probable token each time."""
    guidance: float = 1.0
    """Strength of classifier-free guidance at the last token (published 4.5 to 7.5); 1 = none, and one stream alone."""
    ramp: Literal["linear", "constant"] = "linear"
    """How guidance's strength grows with the share of decoded tokens, from 1; or that it does not."""
    causal: bool = False
    """Whether tokens of one step see those before them in the order alone, as in training; published: each other."""
    expansion: int = 1
    """How many times as many rows and columns as the model was trained for."""

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        if self.schedule not in RATIOS:
            raise UserError(f"sampler.schedule is {self.schedule!r}; it must be one of {', '.join(RATIOS)}")
        require_non_negative("sampler.temperature", self.temperature)
        require_non_negative("sampler.guidance", self.guidance)
        if self.ramp not in ("linear", "constant"):
            raise UserError(f"sampler.ramp is {self.ramp!r}; allowed: linear, constant")
        require_whole("sampler.expansion", self.expansion, 1, 16)

    def sizes(self, unknown: int) -> list[int]:
        """(a): how many tokens each step decodes, of so many; at least one each."""
        steps, left, found = min(self.num_steps, unknown), unknown, []
        for t in range(1, steps + 1):
            stay = max(1, min(left - 1, int(unknown * RATIOS[self.schedule](t, steps)))) if t < steps else 0
            found.append(left - stay)
            left = stay
        return found

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
        """Draw the tokens that are `codec.values`, as many of each image; the others stay. int64 [N, length].

        on_step: called with the tokens so far decoded (twice; those to come are the middle value), and the share that
        was to come before the step. Raises UserError for a model of another kind, guidance of one that needs its
        label, or images with different numbers of unknown tokens.
        """
        check_tokens(tokens, model.codec, unknown=True, expansion=self.expansion)
        self._check(model)
        if noise is None:
            raise ValueError("randomized decoding draws at random; give it a noise source")
        values, unknown = model.codec.values, tokens == model.codec.values
        left = int(unknown[0].sum())
        if tokens.device.type == "cpu" and not (unknown.sum(1) == left).all():
            raise UserError("every image must have as many unknown tokens as the others")
        like = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        order = (noise.uniform(like) + unknown).argsort(1)  # what is known comes first
        uniform = noise.uniform(like)
        tokens = tokens.masked_fill(unknown, values // 2)
        stream, done = _Streams(model, cond, len(tokens), self), tokens.shape[1] - left
        if done:
            stream.show(tokens.gather(1, order[:, :done]), order[:, :done], causal=True)
        for size in self.sizes(left):
            places, share = order[:, done : done + size], 1 - done / tokens.shape[1]
            done += size
            drawn = self._drawn(stream.ask(places, done / tokens.shape[1]), uniform.gather(1, places))
            tokens = tokens.scatter(1, places, drawn)
            if on_step is not None:
                picture = self.decoded(model.codec, tokens)
                on_step(picture, picture, share)
            if done < tokens.shape[1]:
                stream.show(drawn, places, causal=self.causal)
        return tokens

    def strength(self, share: float) -> float:
        """Of the guidance, where this share of the tokens is decoded, the step's own included."""
        return self.guidance if self.ramp == "constant" else 1 + (self.guidance - 1) * share

    def _drawn(self, logits: Tensor, uniform: Tensor) -> Tensor:
        return draw(logits.double() / self.temperature, uniform) if self.temperature else logits.argmax(-1)

    def length(self, codec: Any) -> int:
        return super().length(codec) * self.expansion**2

    def decoded(self, codec: Any, tokens: Tensor) -> Tensor:
        if self.expansion == 1:
            return super().decoded(codec, tokens)
        larger: Tensor = codec.decode(tokens, self.expansion)
        return larger

    def _check(self, model: TokenModel) -> None:
        if not hasattr(model, "ask"):
            raise UserError(
                f"sampler RandomizedParallel draws from a model of random orders (ARPG); {an(type(model).__name__)} is "
                "none"
            )
        check_guidance(model, self.guidance)


class _Streams:
    """A model with its class, or with and without it at once, and what it was shown."""

    def __init__(self, model: Any, cond: Condition, n: int, sampler: RandomizedParallel) -> None:
        self.model, self.sampler = model, sampler
        self.times = 1 if sampler.guidance == 1 else 2
        if self.times == 2 and cond.label is not None:
            cond = Condition(label=torch.cat([cond.label, torch.full_like(cond.label, -1)]))
        self.cache = model.start(cond, self.times * n, sampler.expansion)

    def show(self, tokens: Tensor, places: Tensor, *, causal: bool) -> None:
        self.model.show(tokens.repeat(self.times, 1), places.repeat(self.times, 1), self.cache, causal=causal)

    def ask(self, places: Tensor, share: float) -> Tensor:
        logits: Tensor = self.model.ask(places.repeat(self.times, 1), self.cache)
        if self.times == 1:
            return logits
        told, plain = logits.chunk(2)
        return plain + self.sampler.strength(share) * (told - plain)
