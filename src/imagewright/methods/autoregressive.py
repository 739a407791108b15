"""The autoregressive baseline: tokens one after the other in raster order, each from those before.

Source     The factorisation p(x) = product over n of p(x_n | x_<n), as van den Oord et al. 2016 (PixelRNN, arXiv
           1601.06759) have it for images; the network is a causal transformer that is told the class and row, column
           and channel at every place.
Networks   model (trained, the product).
Loss       cross-entropy per token in nats, the mean over an image's tokens: the exact negative log-likelihood over L.
           On pixels, divided by ln 2, it is bits/dim.
Departs    Nothing of a paper's is claimed: it is the exact case beside which bounds stand, and the peer of parallel
           decoders in speed.
Checked    causality; loss against a Markov chain's own entropy; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from imagewright.models.causal import CausalTokenModel
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Noise, Parts, Trained, Update


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Maximum likelihood of the next token."""

    product: ClassVar[str] = "model"

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: causal, (tokens, time, cond) -> logits. codec: a `types.Codec`, kept as it is."""
        return Parts(model=Trained(module=CausalTokenModel(network, codec)))

    def step(self, parts: Any, batch: Batch, noise: Noise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model = parts.model
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
        logits = model.logits(tokens, batch.cond)
        per_token = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        per_image = per_token.view_as(tokens).mean(1)
        right = (logits.detach().argmax(2) == tokens).float().mean(1)
        yield Update("model", per_image, parts={"bits_per_token": per_image.detach() / math.log(2), "accuracy": right})
