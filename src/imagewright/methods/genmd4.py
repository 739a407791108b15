"""GenMD4: masked diffusion whose schedule depends on the token's value, and is learned (arXiv 2406.04329, section 6).

Networks   model (trained, the product): the network, and w = softplus of a parameter for each of V values, 1 at first.
Noise      a token of value v is visible at t with probability 1 - (1 - epsilon) t^w_v, epsilon 1e-4.
Loss       the bound over [t1, 1], t1 = 1e-3, at weight (1 - t1): sum over unknown tokens of
           (w_x (-ln mu[x] - 1) + sum over v of w_v mu[v]) / t; and the reconstruction at t1,
           (1 - epsilon) t1^w_x (logsumexp over v of w_v ln t1 - w_x ln t1). In bits per token.
Gradient   masks depend on w: two independent masks at the same t, losses L1 and L2, and
           (L1 + L2)/2 + sg(L1 - L2)/2 (ln q(mask 1) - ln q(mask 2)), REINFORCE with the other as its baseline.
Times      antithetic, as MD4.
Departs    The weight 1 - t1 of the interval, without which the loss were no bound. The paper has this method for text
           and gives no image sampler; ours is `samplers.ancestral`, with a law of revealing for each value.
Checked    equal w give MD4's loss with the polynomial schedule; the gradient against enumeration of all masks; with the
           exact answer the bound is -ln p whatever w is; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.methods.md4 import batch_times, bits_per_token, draw_mask, numbers
from imagewright.models.masked_diffusion import LearnedMaskingModel
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Codec, Condition, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class GenMD4:
    """The bound of masked diffusion with a learned schedule for each value, as a loss."""

    product: ClassVar[str] = "model"

    epsilon: float = 1e-4
    """Tokens visible at t = 1."""
    first: float = 1e-3
    """t1, from which the integral runs."""

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 0.5:
            raise UserError(f"method.epsilon is {self.epsilon}; it must lie in [0, 0.5)")
        if not 0 < self.first < 1:
            raise UserError(f"method.first is {self.first}; it must lie in (0, 1)")

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: (tokens, time, cond) -> logits. codec: a `types.Codec`, kept as it is."""
        model = LearnedMaskingModel(network, codec, self.epsilon, self.first)
        return Parts(model=Trained(module=model))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model and its schedule."""
        model = parts.model
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
        t = model.times(batch_times(tokens, noise))
        masks = (draw_mask(model, tokens, t, noise), draw_mask(model, tokens, t, noise))
        nats, surrogate = leave_one_out(model, tokens, masks, t, batch.cond)
        powers = model.powers.detach()
        spread = {"power_least": powers.min(), "power_most": powers.max()}
        yield Update("model", bits_per_token(surrogate, tokens), parts=numbers(nats, tokens) | spread)


def leave_one_out(
    model: LearnedMaskingModel, tokens: Tensor, masks: tuple[Tensor, Tensor], t: Tensor, cond: Condition
) -> tuple[Tensor, Tensor]:
    """The bound, the mean of two masks' [N], and the same with the gradient of both network and schedule, in nats."""
    bounds = [model.bound(tokens, mask, t, cond).published for mask in masks]
    hidden = model.hidden(tokens, t)
    first, second = (mask_log_probability(hidden, mask) for mask in masks)
    nats = (bounds[0] + bounds[1]) / 2
    score = (bounds[0] - bounds[1]).detach() / 2 * (first - second)
    # The score counts by its gradient alone; its value would only stand in the log.
    return nats, nats + score - score.detach()


def mask_log_probability(hidden: Tensor, masked: Tensor) -> Tensor:
    """ln q of masks [N, L] whose tokens are unknown with probability `hidden`, [N]."""
    return torch.where(masked, hidden, 1 - hidden).log().sum(1)
