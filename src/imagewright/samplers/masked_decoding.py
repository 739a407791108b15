"""MaskGIT's decoding: all tokens in a few passes, the surest first (Chang et al. 2022, arXiv 2202.04200, section 3.2).

Pass t of T, from N0 unknown tokens at the start:
  (a) logits of all places; (b) every unknown token is drawn from its distribution;
  (c) its confidence is log p(drawn), that of known tokens infinite;
  (d) plus temperature * (1 - (t+1)/T) * Gumbel noise;
  (e) n = floor(N0 * ratio((t+1)/T)), kept within 1 .. unknown - 1, is how many stay unknown;
  (f) the n least sure become unknown again. Tokens once kept are never looked at again.
The last pass gives the whole drawn grid.

Departs    (e) is computed in float64, and a product that is a whole number but for rounding counts as that: in the
           program's float32 511 of 1,024 tokens stay unknown after pass 8 of 12, here 512.

Also ours: `choice = "random"` keeps random tokens in place of the surest ones: with one token a pass that is drawing in
any order, whose only error is the model's. Classifier-free guidance, which the paper has not: log p = log p(no class) +
guidance * (log p(class) - log p(no class)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imagewright.checks import require_non_negative
from imagewright.errors import an
from imagewright.models.tokens import check_tokens, negative_log
from imagewright.paths.mask_ratios import check_ratio, mask_ratio
from imagewright.samplers.categorical import draw
from imagewright.samplers.filling import Filling
from imagewright.samplers.grid import check_steps
from imagewright.types import UNCONDITIONAL, Condition, Noise, OnStep, TokenModel, UserError

Choice = Literal["confidence", "random"]


@dataclass(frozen=True, kw_only=True)
class MaskedDecoding(Filling):
    """Draws from a masked token model in `num_steps` passes."""

    num_steps: int = 8
    """T: passes (8 for 256 x 256 pixels, 12 for 512 x 512)."""
    schedule: str = "cosine"
    """How many tokens are unknown after each pass: cosine, cubic, square, linear, sqrt, exp, log."""
    temperature: float = 4.5
    """Of the noise on the confidence, in the first pass; it falls linearly to 0."""
    choice: Choice = "confidence"
    """Which tokens are kept: the surest, or random ones."""
    guidance: float = 1.0
    """Strength of classifier-free guidance; 1 = none, and then one evaluation a pass."""

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        check_ratio("sampler.schedule", self.schedule)
        require_non_negative("sampler.temperature", self.temperature)
        if self.choice not in get_args(Choice):
            raise UserError(f"sampler.choice is {self.choice!r}; allowed: {', '.join(get_args(Choice))}")
        require_non_negative("sampler.guidance", self.guidance)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps * (1 if self.guidance == 1 else 2)

    def unknown_after(self, step: int, unknown: int) -> int:
        """(e): how many of `unknown` tokens stay unknown after pass `step` (0 .. num_steps - 1), before its bounds."""
        r = torch.tensor((step + 1) / self.num_steps, dtype=torch.float64)
        # A product that is a whole number but for rounding shall not lose one.
        return math.floor(float(mask_ratio(self.schedule, r, unknown)) * unknown + 1e-9)

    @torch.no_grad()
    def fill(
        self,
        model: TokenModel,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        start: int = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw the tokens that are `codec.values`; the others stay as they are. int64 [N, length].

        start: the first pass, as if the ones before had left these tokens unknown (editing: 2 of 12).
        on_step: called with the drawn grid decoded (twice), and the share of tokens that were unknown.
        Raises UserError for a model that answers from the places before, or guidance of one that needs its label.
        """
        self._check(model, tokens, start)
        if noise is None:
            raise ValueError("masked decoding draws at random; give it a noise source")
        mask, tokens = model.codec.values, tokens.clone()
        begun = (tokens == mask).sum(1)
        remaining = [[self.unknown_after(t, int(n)) for n in begun] for t in range(self.num_steps)]
        for t in range(start, self.num_steps):
            unknown = tokens == mask
            logits = self._logits(model, tokens, cond, unknown)
            like = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
            drawn = torch.where(unknown, draw(logits, noise.uniform(like)), tokens)
            if on_step is not None:
                picture = model.codec.decode(drawn)
                on_step(picture, picture, float(unknown.double().mean()))
            if t == self.num_steps - 1:
                return drawn
            surety = self._surety(logits, drawn, noise.uniform(like), t).masked_fill(~unknown, math.inf)
            least = torch.tensor(remaining[t], device=tokens.device)
            count = torch.minimum(least, unknown.sum(1) - 1).clamp(min=1)
            rank = surety.argsort(dim=1, stable=True).argsort(1)
            tokens = torch.where(unknown & (rank < count[:, None]), mask, drawn)
        return tokens

    def _surety(self, logits: Tensor, drawn: Tensor, uniform: Tensor, t: int) -> Tensor:
        """(c) and (d), [N, length], float64."""
        if self.choice == "random":
            return uniform
        surety = -negative_log(logits.double(), drawn)
        scale = self.temperature * (1 - (t + 1) / self.num_steps)
        return surety + scale * -(-uniform.log()).log() if scale else surety

    def _logits(self, model: TokenModel, tokens: Tensor, cond: Condition, unknown: Tensor) -> Tensor:
        time = unknown.double().mean(1).float()
        if hasattr(model, "told_of_share"):
            time = model.told_of_share(time)
        logits = model.logits(tokens, cond, time)
        if self.guidance == 1:
            return logits
        without = Condition(label=torch.full_like(cond.label, -1)) if cond.label is not None else UNCONDITIONAL
        plain = torch.log_softmax(model.logits(tokens, without, time), -1)
        return plain + self.guidance * (torch.log_softmax(logits, -1) - plain)

    def _check(self, model: TokenModel, tokens: Tensor, start: int) -> None:
        if model.order != "masked":
            raise UserError(
                f"sampler MaskedDecoding fills in tokens in any order; {an(type(model).__name__)} knows only those "
                "before"
            )
        check_guidance(model, self.guidance)
        if not 0 <= start < self.num_steps:
            raise UserError(f"start is {start}; it must lie in 0 .. {self.num_steps - 1}")
        check_tokens(tokens, model.codec, unknown=True)


def check_guidance(model: object, guidance: float) -> None:
    """Raise UserError for guidance of a model that says it never answered without its class."""
    known: Any = getattr(model, "label_dropout", None)
    if guidance != 1 and known == 0:
        raise UserError(
            f"sampler.guidance is {guidance}; it needs a model whose class was at times hidden in training "
            "(--method.label-dropout above 0), and this one always saw it"
        )
