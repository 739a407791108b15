"""Routing Transformer: how it is trained (Roy et al. 2020, arXiv 2003.05997). Network: `networks.routing_transformer`.

Networks   model (trained, the product); its centroids have no gradient and move once an optimiser step.
Loss       the mean over tokens of the cross-entropy in nats, plus the commitment of each block's routing vectors to
           their nearest centroids, beta (1e-4) times the mean square distance over heads, places and numbers; twice,
           as queries and keys have one each and are the same.
Optimiser  the run's: Adafactor, its rate 0.01 from the first step on and after 10,000 steps as their inverse square
           root; no gradient clipping.
Source     google-research/google-research, routing_transformer/.
Departs    As the network's. With centroids at rest within a step, every micro-batch sees the same ones; the released
           program moves them after each forward pass, which is the same where a step has one. Queries, keys and values
           are one matrix here, whose size, update's limit and column averages Adafactor takes together, and positions'
           averages are factored; there each is a matrix of its own, and positions' are not.
Checked    one cluster of all places is dense attention; centroids after a step by hand, over micro-batches and
           processes; both selections' causality, one by a counter-example; sampling with and without the cache; resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from imagewright.checks import require_non_negative
from imagewright.errors import an
from imagewright.methods.autoregressive import numbers
from imagewright.models.causal import CausalTokenModel
from imagewright.models.tokens import negative_log
from imagewright.networks import RoutingTransformer
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class RoutingLikelihood:
    """Maximum likelihood of the next token, and commitment to the clusters."""

    product: ClassVar[str] = "model"

    beta: float = 1e-4
    """Weight of the commitment."""

    def __post_init__(self) -> None:
        require_non_negative("method.beta", self.beta)

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: a `RoutingTransformer`. codec: a `types.Codec`, kept as it is. Raises UserError for another."""
        if not isinstance(network, RoutingTransformer):
            raise UserError(f"network is {an(type(network).__name__)}; this method trains a RoutingTransformer")
        return Parts(model=Trained(module=CausalTokenModel(network, codec)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model = parts.model
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
        logits = model.logits(tokens, batch.cond)
        nats = negative_log(logits, tokens).mean(1)
        commitment = model.network.commitment()
        shown = {**numbers(nats, logits, tokens), "commitment": commitment}
        yield Update("model", nats + 2 * self.beta * commitment, parts=shown)
