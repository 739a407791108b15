"""A causal token model: what may stand at each place, given those before. Its likelihood is exact."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from imagewright.models.tokens import TokenNetworkModel, check_tokens, negative_log
from imagewright.types import UNCONDITIONAL, Codec, Condition, Noise, UserError


class CausalTokenModel(TokenNetworkModel):
    """network(tokens, time, cond) -> logits, those of a place depending on the tokens before it (in `places`) alone.

    Where the network has a cache (`start`, `step`), so has the model: `cached`. Raises UserError for a network that
    says it is not causal.
    """

    order: ClassVar[Literal["masked", "causal"]] = "causal"
    usual_sampler: ClassVar[str] = "raster"
    likelihood: Literal["exact", "bound"] = "exact"

    def __init__(self, network: nn.Module, codec: Codec) -> None:
        super().__init__(network, codec)
        if not getattr(getattr(network, "config", None), "causal", True):
            raise UserError("network.causal is False; an autoregressive model needs a network that sees no later token")

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """As `types.LikelihoodModel`; nothing is drawn. Raises UserError for a token that is none of the codec's."""
        check_tokens(tokens, self.codec)
        return negative_log(self.logits(tokens, cond).double(), tokens).sum(1)

    @property
    def places(self) -> Tensor:
        """In which order places are answered, int64 [length]: that of the raster, unless the network has its own."""
        own: Tensor | None = getattr(self.network, "places", None)
        return torch.arange(self.codec.length) if own is None else own

    @property
    def cached(self) -> bool:
        """Whether the network has a cache."""
        return hasattr(self.network, "step")

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1) -> Any:
        """The network's empty cache for n sequences."""
        return self.network.start(cond, n)  # type: ignore[operator]

    def step(self, before: Tensor | None, cache: Any) -> Tensor:
        """Logits [N, values] of the next of `places`, given the token [N] at the one before; None at the first."""
        return self.wide(self.network.step(before, cache))  # type: ignore[operator]
