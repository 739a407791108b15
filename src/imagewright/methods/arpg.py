"""ARPG: autoregression in random orders, decoded in parallel (Li et al. 2025, arXiv 2503.10568).

Networks   model (trained, the product): an `networks.arpg`.
Orders     a fresh one for each image in each step, uniform among all.
Loss       the plain cross-entropy in nats of every token given those before it in the order: the mean over an image's
           tokens, then over images. No smoothing, nothing is masked.
Classes    hidden from a tenth of the images, so that sampling can be guided.
Optimiser  the run's: AdamW (0.9, 0.95), weight decay 0.05, clipped at norm 1; 1e-4 per 256 images of a batch, linear
           warm-up over 100 of 400 epochs, half a cosine to the end; no average.
Decoding   `samplers.randomized_parallel`.
Source     hp-l33/ARPG (models/arpg.py, train_c2i.py, GETTING_STARTED.md).
Departs    Weight decay spares gains of norms there, not here; the rate ends at 0, there at 1e-5. The published tokens
           are those of a tokenizer with 16,384 codes of 8 numbers (LlamaGen's VQ-16), ours of any `codec`: the recipes
           take our VQ tokenizer, which is MaskGIT's, or pixels. Text, pictures in ten crops and control features are
           not built in.
Checked    logits, loss and gradient against the released program; orders' law; logits decoded with the cache are those
           of training; likelihood; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from imagewright.errors import an
from imagewright.methods.autoregressive import numbers
from imagewright.methods.maskgit import hide_labels
from imagewright.models.random_order import RandomOrderModel, random_order
from imagewright.models.tokens import negative_log
from imagewright.networks import ARPG
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class RandomOrders:
    """Maximum likelihood of tokens in random orders."""

    product: ClassVar[str] = "model"

    label_dropout: float = 0.1
    """Share of images whose class is hidden, for classifier-free guidance."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"method.label_dropout is {self.label_dropout}; it must lie in [0, 1]")

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: an `ARPG`. codec: a `types.Codec`, kept as it is. Raises UserError for another network."""
        if not isinstance(network, ARPG):
            raise UserError(f"network is {an(type(network).__name__)}; this method trains an ARPG")
        hidden = self.label_dropout if spec.num_classes else 0.0  # without classes there is nothing to guide by
        return Parts(model=Trained(module=RandomOrderModel(network, codec, hidden)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model: RandomOrderModel = parts.model
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
        order = random_order(tokens, noise)
        logits = model.in_order(tokens, order, hide_labels(batch.cond, self.label_dropout, noise))
        targets = tokens.gather(1, order)
        per_image = negative_log(logits, targets).mean(1)
        yield Update("model", per_image, parts=numbers(per_image, logits, targets))
