"""A token model that was trained in random orders: it answers any places, given any others, with a cache."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from imagewright.models.masked import MaskedTokenModel
from imagewright.models.tokens import check_tokens, negative_log
from imagewright.types import UNCONDITIONAL, Condition, Noise


class RandomOrderModel(MaskedTokenModel):
    """network(tokens, time, cond, order) -> logits; `start`, `show` and `ask` are its cache (ARPG).

    In one order the product of its answers is a probability of all tokens, exactly. Sampling one token a step draws the
    order first, so that its probability is the mean over all orders; minus the logarithm of that of one order, drawn at
    random, is in the mean no less than minus the logarithm of this mean.
    """

    usual_sampler: ClassVar[str] = "randomized-parallel"
    likelihood: Literal["exact", "bound"] = "bound"
    likelihood_note: ClassVar[str] = (
        "each pass draws an order for each image, in which the likelihood is exact; their mean bounds that of drawing "
        "an order first"
    )

    def in_order(self, tokens: Tensor, order: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """Logits [N, length, values] of places order[:, i], int64 [N, length], given the tokens before them in it."""
        return self.wide(self.network(tokens, None, cond, order))

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """As `types.LikelihoodModel`, of a random order for each sequence; times are not used.

        Raises UserError for a token that is none of the codec's.
        """
        check_tokens(tokens, self.codec)
        if noise is None:
            raise ValueError("the bound is drawn at random; give it a noise source")
        order = random_order(tokens, noise)
        return negative_log(self.in_order(tokens, order, cond).double(), tokens.gather(1, order)).sum(1)

    def start(self, cond: Condition = UNCONDITIONAL, n: int = 1, expansion: int = 1) -> Any:
        """The network's cache for n sequences, of a grid with so many times as many rows and columns."""
        return self.network.start(cond, n, expansion)  # type: ignore[operator]

    def show(self, tokens: Tensor, places: Tensor, cache: Any, *, causal: bool = False) -> None:
        """Show it tokens [N, K] at places [N, K]; causal: each sees those before it alone, as in training."""
        self.network.show(tokens, places, cache, causal=causal)  # type: ignore[operator]

    def ask(self, places: Tensor, cache: Any) -> Tensor:
        """Logits [N, K, values] of places [N, K], given all that it was shown."""
        return self.wide(self.network.ask(places, cache))  # type: ignore[operator]


def random_order(tokens: Tensor, noise: Noise) -> Tensor:
    """A uniformly random order of the places of each sequence [N, L], int64."""
    return noise.uniform(tokens.double()).argsort(1)
