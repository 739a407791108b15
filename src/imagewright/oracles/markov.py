"""Sequences of tokens that form a Markov chain: exact probabilities, entropy and conditionals, in any order.

p(x) = a[x_0] product of T[x_n-1, x_n]. Given visible tokens at some places, those between are independent of the rest:
p(x_n = v | visible) is proportional to T^d[left, v] T^e[v, right], d and e being the distances to the nearest visible
places, with the chain's own marginal where there is none on the left and 1 where there is none on the right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from imagewright.types import UNCONDITIONAL, Codec, Condition, ModelKind, Noise, UserError


class MarkovChain:
    """initial: [V], transition: [V, V], rows sum to 1; length: tokens of a sequence. Arithmetic is in their dtype.

    Raises UserError where they are no distributions.
    """

    def __init__(self, initial: Tensor, transition: Tensor, length: int) -> None:
        values = len(initial)
        if transition.shape != (values, values):
            raise UserError(f"MarkovChain.transition is {list(transition.shape)}; it must be {[values, values]}")
        rows = torch.cat([initial[None], transition])
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(1), torch.ones_like(rows[:, 0])):
            raise UserError("MarkovChain needs distributions: no entry below 0, and every row of sum 1")
        self.initial, self.transition, self.values, self.length = initial, transition, values, length
        powers = [torch.eye(values, dtype=initial.dtype, device=initial.device)]
        for _ in range(length):
            powers.append(powers[-1] @ transition)
        self.powers = torch.stack(powers)  # [length + 1, V, V]
        self.marginals = initial @ self.powers[:length]  # [length, V]

    def sample(self, n: int, noise: Noise) -> Tensor:
        """int64 [n, length]."""
        uniform = noise.uniform(self.initial.new_empty(n, self.length))
        tokens = torch.zeros(n, self.length, dtype=torch.int64, device=self.initial.device)
        rows = self.initial.expand(n, -1)
        for place in range(self.length):
            above = rows.cumsum(1) <= uniform[:, place, None]
            tokens[:, place] = above.sum(1).clamp(max=self.values - 1)
            rows = self.transition[tokens[:, place]]
        return tokens

    def log_prob(self, tokens: Tensor) -> Tensor:
        """ln p(tokens), [N]."""
        steps = self.transition.log()[tokens[:, :-1], tokens[:, 1:]].sum(1)
        return self.initial.log()[tokens[:, 0]] + steps

    def entropy(self) -> float:
        """Of a sequence, in nats: H(x_0) + sum over n of E H(x_n | x_n-1)."""
        per_row = torch.special.entr(self.transition).sum(1)
        return float(torch.special.entr(self.initial).sum() + (self.marginals[:-1] @ per_row).sum())

    def conditionals(self, tokens: Tensor) -> Tensor:
        """ln p(x_n = v | visible tokens), [N, length, V]; the token `values` is an unknown one.

        At a visible place all probability lies on what is seen.
        """
        n = len(tokens)
        places = torch.arange(self.length, device=tokens.device).expand(n, -1)
        seen = tokens < self.values
        left = torch.where(seen, places, -1).cummax(1).values
        right = torch.where(seen, places, self.length).flip(1).cummin(1).values.flip(1)
        before = tokens.gather(1, left.clamp(min=0))
        after = tokens.gather(1, right.clamp(max=self.length - 1))
        from_left = self.powers[places - left.clamp(min=0), before % self.values]
        from_left = torch.where((left < 0)[..., None], self.marginals[places], from_left)
        from_right = self.powers[right.clamp(max=self.length - 1) - places, :, after % self.values]
        weight = torch.where((right >= self.length)[..., None], from_left, from_left * from_right)
        return (weight / weight.sum(2, keepdim=True)).log()


class MarkovTokens:
    """A `MarkovChain` as a `TokenModel` (causal or masked) with its exact likelihood, on the images of a codec.

    Raises UserError where the codec's tokens are others than the chain's.
    """

    kind: ModelKind = "token_model"
    likelihood: Literal["exact", "bound"] = "exact"

    def __init__(self, chain: MarkovChain, codec: Codec, order: Literal["masked", "causal"] = "causal") -> None:
        if (codec.values, codec.length) != (chain.values, chain.length):
            raise UserError(
                f"the chain has {chain.length} tokens of {chain.values} values; "
                f"the codec {codec.length} of {codec.values}"
            )
        self.chain, self.codec, self.order = chain, codec, order

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        """As `types.TokenModel`: exact log-probabilities."""
        if self.order == "masked":
            return self.chain.conditionals(tokens)
        first = self.chain.initial.log().expand(len(tokens), 1, -1)
        return torch.cat([first, self.chain.transition.log()[tokens[:, :-1]]], 1)

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """As `types.LikelihoodModel`."""
        return -self.chain.log_prob(tokens).double()
