"""Ancestral sampling of masked diffusion: all tokens unknown at first, revealed at random places step by step.

From t to s every unknown token becomes value v with probability reveal_v(t, s) * mu[v], else it stays unknown, drawn
from one categorical over V + 1; what is revealed never changes.

Grids    uniform t = 1 - i/T; cosine t = cos(pi i / 2T). The cosine grid fits the linear schedule, the uniform one the
         cosine schedule.
Source   Shi et al. 2024 (MD4, arXiv 2406.04329), section 4 and appendix on sampling. Learned schedules (GenMD4), for
         which the paper has no image sampler, have a reveal of their own for each value.
Departs  The last step reveals all that is left, drawn from its mu. The paper leaves epsilon / (1 - alpha_t) of it
         unknown and takes the most probable values of one evaluation more, at t = 0. Its sampler with top-p, for
         text, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagewright.models.tokens import check_tokens
from imagewright.paths.masking import TIME_GRIDS, time_grid
from imagewright.samplers.categorical import draw
from imagewright.samplers.filling import Filling
from imagewright.samplers.grid import check_steps
from imagewright.types import UNCONDITIONAL, Condition, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class Ancestral(Filling):
    """Draws from a masked diffusion model in `num_steps` evaluations."""

    num_steps: int = 256
    """T."""
    grid: str = "cosine"
    """Times of the steps: cosine (for the linear schedule), uniform (for the cosine schedule)."""

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        if self.grid not in TIME_GRIDS:
            raise UserError(f"sampler.grid is {self.grid!r}; it must be one of {', '.join(TIME_GRIDS)}")

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps

    @torch.no_grad()
    def fill(
        self,
        model: Any,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw the tokens that are `codec.values`; the others stay as they are. int64 [N, length].

        on_step: called with the tokens so far decoded (twice; unknown ones are the most probable values), and the share
        that was unknown before the step. Raises UserError for a model without a noise process.
        """
        if not hasattr(model, "reveal"):
            raise UserError(
                f"sampler Ancestral draws from masked diffusion, which knows when tokens are revealed; a "
                f"{type(model).__name__} does not"
            )
        if noise is None:
            raise ValueError("ancestral sampling draws at random; give it a noise source")
        check_tokens(tokens, model.codec, unknown=True)
        mask, tokens = model.codec.values, tokens.clone()
        times = time_grid(self.grid, self.num_steps).to(tokens.device)
        for i in range(self.num_steps):
            t, s = times[i], times[i + 1]
            unknown = tokens == mask
            logits = model.logits(tokens, cond, model.told(t).float().expand(len(tokens)))
            uniform = fine_uniform(noise, tokens)
            if i == self.num_steps - 1:
                tokens[unknown] = draw(logits[unknown], uniform[unknown])
            else:
                tokens[unknown] = revealed(logits, unknown, uniform, model.reveal(t, s))
            if on_step is not None:
                picture = model.codec.decode(torch.where(tokens == mask, logits.argmax(2), tokens))
                on_step(picture, picture, float(unknown.double().mean()))
        return tokens


def revealed(logits: Tensor, unknown: Tensor, uniform: Tensor, reveal: Tensor) -> Tensor:
    """What the unknown tokens become, int64, one for each True of `unknown` [N, L]: a value, or V = still unknown.

    logits: [N, L, V]. uniform: [N, L], in [0, 1). reveal: [V] or [1], the probability of being revealed, by value.
    """
    values = logits.shape[2]
    uniform = uniform[unknown]
    became = torch.full_like(uniform, values, dtype=torch.int64)
    # Values come first on the line of probabilities: a number beyond the likeliest reveal stays unknown whatever mu is.
    near = uniform < reveal.max()
    places = unknown.clone()
    places[unknown] = near
    value = torch.softmax(logits[places].double(), 1) * reveal
    stay = (1 - value.sum(1, keepdim=True)).clamp(min=0.0)
    became[near] = draw(torch.cat([value, stay], 1).log(), uniform[near])
    return became


def fine_uniform(noise: Noise, tokens: Tensor) -> Tensor:
    """Uniform on [0, 1) for each token, float64 [N, L], in steps of 2^-48.

    A source's own steps are 2^-24: where one in 50,000 tokens is revealed, they would tell 300 of its values apart.
    """
    like = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    return noise.uniform(like) + noise.uniform(like) * 2**-24
