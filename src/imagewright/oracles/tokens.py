"""Tokens whose distribution is a mixture of products: exact probabilities and conditionals given any visible tokens.

p(x) = sum over k of w_k product over n of P_k[n, x_n]. Given visible tokens the components have the weights
w_k product over visible n of P_k[n, x_n], and the others are independent within each component.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from imagewright.types import UNCONDITIONAL, Codec, Condition, ModelKind, Noise, UserError


class ProductMixture:
    """weights: [K]; tables: [K, length, V], rows that sum to 1. Arithmetic is in their dtype.

    Raises UserError where they are no distributions.
    """

    def __init__(self, weights: Tensor, tables: Tensor) -> None:
        if tables.ndim != 3 or weights.shape != tables.shape[:1]:
            raise UserError(f"ProductMixture.tables is {list(tables.shape)}; it must be [{len(weights)}, length, V]")
        sums = torch.cat([weights.sum()[None], tables.sum(2).flatten()])
        negative = bool((weights < 0).any()) or bool((tables < 0).any())
        if negative or not torch.allclose(sums, torch.ones_like(sums)):
            raise UserError("ProductMixture needs distributions: no entry below 0, weights and every row of sum 1")
        self.weights, self.tables = weights, tables
        self.length, self.values = tables.shape[1:]

    def sample(self, n: int, noise: Noise) -> Tensor:
        """int64 [n, length]."""
        uniform = noise.uniform(self.weights.new_empty(n, self.length + 1))
        component = (self.weights.cumsum(0) <= uniform[:, :1]).sum(1).clamp(max=len(self.weights) - 1)
        above = self.tables[component].cumsum(2) <= uniform[:, 1:, None]
        return above.sum(2).clamp(max=self.values - 1)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """ln p(tokens), [N]."""
        return torch.logsumexp(self._posterior(tokens), 1)

    def conditionals(self, tokens: Tensor) -> Tensor:
        """ln p(x_n = v | visible tokens), [N, length, V]; the token `values` is an unknown one.

        At a visible place all probability lies on what is seen.
        """
        shares = torch.softmax(self._posterior(tokens), 1)
        unknown = torch.einsum("nk,klv->nlv", shares, self.tables)
        seen = torch.nn.functional.one_hot(tokens.clamp(max=self.values - 1), self.values).to(unknown)
        return torch.where((tokens < self.values)[..., None], seen, unknown).log()

    def entropy(self, n: int, noise: Noise) -> tuple[float, float]:
        """Of a sequence, in nats: the mean of -ln p over n samples, and its standard error."""
        nats = -self.log_prob(self.sample(n, noise))
        return float(nats.mean()), float(nats.std() / n**0.5)

    def _posterior(self, tokens: Tensor) -> Tensor:
        """Unnormalised log-weights of the components given the visible tokens, [N, K]."""
        seen = tokens < self.values
        places = torch.arange(self.length, device=tokens.device)
        log_p = self.tables.log()[:, places, tokens.clamp(max=self.values - 1)].movedim(0, 1)  # [N, K, length]
        return self.weights.log() + torch.where(seen[:, None], log_p, 0.0).sum(2)


class MixtureTokens:
    """A `ProductMixture` as a masked `TokenModel` on the images of a codec, with its exact likelihood.

    Raises UserError where the codec's tokens are others than the mixture's.
    """

    kind: ModelKind = "token_model"
    order: Literal["masked", "causal"] = "masked"
    likelihood: Literal["exact", "bound"] = "exact"

    def __init__(self, mixture: ProductMixture, codec: Codec) -> None:
        if (codec.values, codec.length) != (mixture.values, mixture.length):
            raise UserError(
                f"the mixture has {mixture.length} tokens of {mixture.values} values; "
                f"the codec {codec.length} of {codec.values}"
            )
        self.mixture, self.codec = mixture, codec

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        """As `types.TokenModel`: exact log-probabilities."""
        return self.mixture.conditionals(tokens)

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """As `types.LikelihoodModel`."""
        return -self.mixture.log_prob(tokens).double()
