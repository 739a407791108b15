"""Perceiver AR: how it is trained (Hawthorne et al. 2022, arXiv 2202.07765). The network is `networks.perceiver_ar`.

Networks   model (trained, the product).
Crops      of each image the tokens before a random end, uniform from N, the latents, to all; the last N are the
           targets, so that the first places, of which every crop would have some, are not seen more than others.
Loss       the sum over the N targets of the cross-entropy in nats, plus z_weight (1e-4) times the square of the
           logarithm of the softmax's normaliser, which is in no reported figure.
Optimiser  the run's: Adam, 10,000 steps of warm-up, gradients clipped at norm 1 (of a sum, so at every step).
Source     google-research/perceiver-ar (experiment.py, losses.py, dataset.py).
Departs    As the network's. The released loss is the sum over the batch, too; clipped at 1 the gradient is the same.
Checked    the crops' law; the z-loss by hand; causality; what is sampled is what is evaluated, with and without the
           cache; more latents when asked; parameter count of the published network; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.checks import require_non_negative
from imagewright.errors import an
from imagewright.methods.autoregressive import numbers
from imagewright.models.causal import CausalTokenModel
from imagewright.models.tokens import negative_log
from imagewright.networks import PerceiverAR
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class PerceiverLikelihood:
    """Maximum likelihood of the last tokens of a crop."""

    product: ClassVar[str] = "model"

    z_weight: float = 1e-4
    """Weight of the squared logarithm of the softmax's normaliser."""

    def __post_init__(self) -> None:
        require_non_negative("method.z_weight", self.z_weight)

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: a `PerceiverAR`. codec: a `types.Codec`, kept as it is. Raises UserError for another."""
        if not isinstance(network, PerceiverAR):
            raise UserError(f"network is {an(type(network).__name__)}; this method trains a PerceiverAR")
        return Parts(model=Trained(module=CausalTokenModel(network, codec)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model = parts.model
        network: PerceiverAR = model.network
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
            ends = crop_ends(tokens, network.config.latents, noise)
        logits, places = network.window(tokens, ends, batch.cond)
        logits, targets = logits.float(), tokens.gather(1, places)
        nats = negative_log(logits, targets)
        pull = self.z_weight * logits.logsumexp(2).square()
        yield Update("model", (nats + pull).sum(1), parts=numbers(nats.mean(1), logits, targets))


def crop_ends(tokens: Tensor, latents: int, noise: StepNoise) -> Tensor:
    """How many tokens of each image are known, uniform from the latents to all; int64 [N]."""
    length = tokens.shape[1]
    least = min(latents, length)
    return least + noise.integers(length - least + 1, tokens[:, 0])
