"""Axial Transformer: how it is trained (Ho et al. 2019, arXiv 1912.12180). The network is `networks.axial_transformer`.

Networks   model (trained, the product), on pixels.
Loss       of each image one channel at random, uniform, in each step: the mean over its places of the cross-entropy in
           bits. In expectation the bits/dim of all channels, at the cost of one.
Optimiser  the run's: Adam, 5,000 steps of warm-up, then constant; gradients clipped at norm 1; averages 0.99995.
Source     google-research/google-research, axial/ (models.py: SlicedChannelModel).
Departs    As the network's. The released program clips the gradient of each core's share of the batch at norm 1, before
           they are averaged; here that of the whole batch.
Checked    the loss's expectation over channels; causality in the order of channels; sampling with and without the
           cache; parameter counts of the published networks; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from imagewright.errors import an
from imagewright.methods.autoregressive import numbers
from imagewright.models.causal import CausalTokenModel
from imagewright.models.tokens import negative_log
from imagewright.networks import AxialTransformer
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class AxialLikelihood:
    """Maximum likelihood of a channel at random."""

    product: ClassVar[str] = "model"

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: an `AxialTransformer`. codec: a `types.Codec`, kept as it is. Raises UserError for another."""
        if not isinstance(network, AxialTransformer):
            raise UserError(f"network is {an(type(network).__name__)}; this method trains an AxialTransformer")
        return Parts(model=Trained(module=CausalTokenModel(network, codec)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model = parts.model
        network: AxialTransformer = model.network
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
            channel = noise.integers(network.config.channels, tokens[:, 0])
        logits = network.plane(tokens, channel, batch.cond).float()
        planes = tokens.view(len(tokens), -1, network.config.channels)
        targets = planes.gather(2, channel[:, None, None].expand(*planes.shape[:2], 1))[..., 0]
        nats = negative_log(logits, targets).mean(1)
        yield Update("model", nats / math.log(2), parts=numbers(nats, logits, targets))
