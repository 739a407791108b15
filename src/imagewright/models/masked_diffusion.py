"""Masked diffusion: a masked token model with a noise process, hence a bound on -ln p and a law of revealing.

`MaskedDiffusionModel` (MD4) has one schedule for all tokens; `LearnedMaskingModel` (GenMD4) learns one for each value.

Bound      the integral over time of what revealing costs, plus two ends that no network is asked for:
           reconstruction, of tokens still unknown at t = 0, any value alike; prior, of tokens already visible at
           t = 1: as often as the schedule has them, and any value alike. Each is ln V times its share of tokens. The
           prior (epsilon, 0.0008 bits/dim on pixels) is left out of the published figures; `nll` has it, or it would
           be no bound.
Source     Shi et al. 2024 (arXiv 2406.04329), sections 3, 4 and 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.models.tokens import TokenNetworkModel, check_tokens, negative_log
from imagewright.paths.masking import MaskingSchedule
from imagewright.types import UNCONDITIONAL, Codec, Condition, Noise, UserError


@dataclass(frozen=True)
class Bound:
    """A draw of the bound on -ln p of each sequence, in nats, float64 [N]; the parts add up.

    diffusion: drawn. reconstruction, prior: the two ends.
    """

    diffusion: Tensor
    reconstruction: Tensor
    prior: Tensor

    @property
    def published(self) -> Tensor:
        """What the paper trains and reports: all but the prior."""
        return self.diffusion + self.reconstruction


class MaskedDiffusionModel(TokenNetworkModel):
    """network(tokens, time, cond) -> logits, the token `codec.values` being an unknown one.

    schedule, power, epsilon: of `MaskingSchedule`. The network is told 1 - alpha, the share of masked tokens to be
    expected, so that a trained one serves every schedule.
    """

    order: ClassVar[Literal["masked", "causal"]] = "masked"
    usual_sampler: ClassVar[str] = "ancestral"
    settings: ClassVar[tuple[str, ...]] = ("schedule", "power", "epsilon")
    likelihood: Literal["exact", "bound"] = "bound"

    def __init__(
        self, network: nn.Module, codec: Codec, schedule: str = "linear", power: float = 1.0, epsilon: float = 1e-4
    ) -> None:
        super().__init__(network, codec)
        self.path = MaskingSchedule(name=schedule, power=power, epsilon=epsilon)
        self.schedule, self.power, self.epsilon = schedule, power, epsilon

    # --- the noise process ------------------------------------------------------------------------------------

    def told(self, t: Tensor) -> Tensor:
        """What the network is told at time t, shape of t."""
        return self.path.masked(t)

    def hidden(self, tokens: Tensor, t: Tensor) -> Tensor:
        """The probability that each token is masked at its sequence's time t [N]: [N, L], or [N, 1] where all alike."""
        return self.path.masked(t)[:, None]

    def reveal(self, t: Tensor, s: Tensor) -> Tensor:
        """The probability that a token unknown at t is visible at s < t, by its value: [V], or [1] where all alike."""
        return self.path.reveal(t, s).reshape(1)

    # --- the bound --------------------------------------------------------------------------------------------

    def bound(
        self, tokens: Tensor, masked: Tensor, t: Tensor, cond: Condition = UNCONDITIONAL, steps: int | None = None
    ) -> Bound:
        """tokens: [N, L]. masked: bool [N, L], drawn at times t [N] in (0, 1].

        steps: T of the discrete-time bound, whose times are multiples of 1/T; None = continuous time, the least bound.
        """
        logits = self.logits(tokens.masked_fill(masked, self.codec.values), cond, self.told(t).float())
        weight = self.path.rate(t) if steps is None else steps * self.path.reveal(t, t - 1 / steps)
        cost = negative_log(logits, tokens).double().masked_fill(~masked, 0.0).sum(1)
        unknown_first, visible_last = self.path.masked(torch.zeros_like(cost)), self.path.alpha(torch.ones_like(cost))
        each = tokens.shape[1] * math.log(self.codec.values)
        return Bound(weight * cost, unknown_first * each, visible_last * each)

    def times(self, uniform: Tensor, steps: int | None = None) -> Tensor:
        """Times (0, 1] from uniform numbers [0, 1), float64, for `bound`."""
        t = 1 - uniform.double()
        return t if steps is None else (t * steps).ceil() / steps

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """As `types.LikelihoodModel`: one time and one mask a sequence. steps: as `bound` has it.

        Raises UserError for a token that is none of the codec's.
        """
        check_tokens(tokens, self.codec)
        if noise is None:
            raise ValueError("the bound is drawn at random; give it a noise source")
        like = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        t = self.times(noise.uniform(like[:, 0]) if times is None else times, steps)
        masked = noise.uniform(like) < self.hidden(tokens, t)
        found = self.bound(tokens, masked, t, cond, steps)
        return found.published + found.prior


class LearnedMaskingModel(MaskedDiffusionModel):
    """GenMD4: a token of value v is visible at t with probability 1 - (1 - epsilon) t^w_v; the w are learned.

    first: the time from which the bound's integral runs; below it tokens are guessed from the schedule alone. The
    network is told t. Discrete time is not known to it.
    """

    settings: ClassVar[tuple[str, ...]] = ("epsilon", "first")

    def __init__(self, network: nn.Module, codec: Codec, epsilon: float = 1e-4, first: float = 1e-3) -> None:
        super().__init__(network, codec, epsilon=epsilon)
        if not 0 < first < 1:
            raise UserError(f"first is {first}; it must lie in (0, 1)")
        self.first = first
        one = math.log(math.expm1(1.0))  # softplus gives 1
        self.raw_powers = nn.Parameter(torch.full((self.codec.values,), one))

    @property
    def powers(self) -> Tensor:
        """w [V], float64, positive, with gradient."""
        return F.softplus(self.raw_powers.double())

    def told(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    @torch.no_grad()
    def told_of_share(self, unknown: Tensor) -> Tensor:
        """The t at which tokens of all values, equally often, would be unknown to this share; by bisection."""
        low, high = torch.zeros_like(unknown, dtype=torch.float64), torch.ones_like(unknown, dtype=torch.float64)
        for _ in range(40):
            middle = (low + high) / 2
            share = (1 - self.epsilon) * (middle[:, None] ** self.powers).mean(1)
            low, high = torch.where(share < unknown, middle, low), torch.where(share < unknown, high, middle)
        return high.to(unknown)

    def hidden(self, tokens: Tensor, t: Tensor) -> Tensor:
        """As the base class; with gradient."""
        return (1 - self.epsilon) * t.double()[:, None] ** self.powers[tokens]

    def reveal(self, t: Tensor, s: Tensor) -> Tensor:
        """As the base class."""
        return 1 - (s.double() / t.double()) ** self.powers.to(t.device)

    def bound(
        self, tokens: Tensor, masked: Tensor, t: Tensor, cond: Condition = UNCONDITIONAL, steps: int | None = None
    ) -> Bound:
        """As the base class. A revealed value's cost has two terms more, which cancel where all w are equal.

        Raises UserError for discrete time.
        """
        if steps is not None:
            raise UserError(f"steps is {steps}; the bound of a learned schedule is known in continuous time only")
        logits = self.logits(tokens.masked_fill(masked, self.codec.values), cond, self.told(t).float())
        powers = self.powers
        own = powers[tokens]
        # How fast the model itself would reveal. No matrix product, which a run in half precision would round.
        expected = (torch.softmax(logits, 2) * powers.to(logits.dtype)).sum(2).double()
        cost = own * (negative_log(logits, tokens).double() - 1) + expected
        diffusion = (1 - self.first) / t.double() * cost.masked_fill(~masked, 0.0).sum(1)
        start = torch.full_like(t, self.first, dtype=torch.float64)
        exponents = powers * math.log(self.first)
        unlikely = torch.logsumexp(exponents, 0) - exponents[tokens]
        reconstruction = (self.hidden(tokens, start) * unlikely).sum(1)
        prior = torch.full_like(diffusion, tokens.shape[1] * self.epsilon * math.log(self.codec.values))
        return Bound(diffusion, reconstruction, prior)

    def times(self, uniform: Tensor, steps: int | None = None) -> Tensor:
        """As the base class, in (first, 1]."""
        return self.first + (1 - self.first) * super().times(uniform, steps)
