"""Next-token likelihood: the autoregressive baseline, and the Sparse Transformer's loss (arXiv 1904.10509).

Source     The factorisation p(x) = product over n of p(x_n | x_<n), as van den Oord et al. 2016 (PixelRNN, arXiv
           1601.06759) have it for images. The baseline's network is a causal transformer that is told row, column and
           channel at every place, the class in every block; the Sparse Transformer's is `networks.sparse_transformer`.
Networks   model (trained, the product).
Loss       cross-entropy per token in nats, the mean over an image's tokens: the exact negative log-likelihood over L.
           On pixels, divided by ln 2, it is bits/dim.
Departs    Of the baseline nothing of a paper's is claimed: it is the exact case beside which bounds stand, the peer of
           parallel decoders in speed, and the control of what sees less. The Sparse Transformer's released loss is this
           one, the mean over batch and tokens; its weight decay spares gains and biases, ours does not.
Checked    causality; loss against a Markov chain's own entropy; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.models.causal import CausalTokenModel
from imagewright.models.tokens import negative_log
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
        per_image = negative_log(logits, tokens).mean(1)
        yield Update("model", per_image, parts=numbers(per_image, logits, tokens))


def numbers(per_image: Tensor, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What the log shows, of mean nats a token [N]: bits a token, and how often the likeliest value is right."""
    right = (logits.detach().argmax(2) == tokens).float().mean(1)
    return {"bits_per_token": per_image.detach() / math.log(2), "accuracy": right}
