"""MD4: masked diffusion in its simplest form (Shi et al. 2024, arXiv 2406.04329, sections 2 to 4).

Networks   model (trained, the product): says what may stand at unknown tokens, given the others and the time.
Noise      each token is unknown with probability 1 - alpha_t, on its own; alpha is linear, polynomial, cosine or
           geometric, squeezed by epsilon 1e-4 at both ends (`paths.masking`).
Loss       -alpha'_t / (1 - alpha_t) times the cross-entropy of the unknown tokens, summed: in expectation over t the
           continuous-time bound on -ln p, the same for every schedule. In bits per token. With `steps` the
           discrete-time bound in its place.
Times      antithetic: t_i = 1 - (u + i/B) mod 1 from one u a batch.
Optimiser  the run's: AdamW with betas (0.9, 0.99), average 0.9999.
Departs    The network is told 1 - alpha_t in place of t (the same for the linear schedule, but for epsilon). Times are
           spread over a micro-batch where a batch is cut up. The geometric schedule is the paper's, not the released
           program's; that one's networks for text are not built in.
Checked    networks against the released program; the bound against exact likelihoods for every schedule; the weight in
           discrete time; uniform answers cost (1 - epsilon) log2 V a token; known tokens give no gradient; resume bit
           for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.models.masked_diffusion import MaskedDiffusionModel
from imagewright.noise import StepNoise
from imagewright.paths.masking import MaskingSchedule
from imagewright.types import Batch, Clock, Codec, DataSpec, Event, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class MD4:
    """The bound of masked diffusion, as a loss."""

    product: ClassVar[str] = "model"

    schedule: str = "linear"
    """Of alpha: linear, polynomial, cosine, geometric."""
    power: float = 1.0
    """Of the polynomial schedule."""
    epsilon: float = 1e-4
    """1 - alpha at the start, and alpha at the end."""
    steps: int | None = None
    """T of the discrete-time bound; None = continuous time."""

    def __post_init__(self) -> None:
        MaskingSchedule(name=self.schedule, power=self.power, epsilon=self.epsilon)
        if self.steps is not None and self.steps < 1:
            raise UserError(f"method.steps is {self.steps}; it must be at least 1, or none for continuous time")

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: (tokens, time, cond) -> logits. codec: a `types.Codec`, kept as it is."""
        model = MaskedDiffusionModel(network, codec, self.schedule, self.power, self.epsilon)
        return Parts(model=Trained(module=model))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model = parts.model
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
        t = model.times(batch_times(tokens, noise), self.steps)
        masked = draw_mask(model, tokens, t, noise)
        nats = model.bound(tokens, masked, t, batch.cond, self.steps).published
        yield Update("model", bits_per_token(nats, tokens), parts=numbers(nats, tokens))


def batch_times(tokens: Tensor, noise: StepNoise) -> Tensor:
    """Numbers in [0, 1), those of the whole batch evenly spread from a random start; float64 [N]."""
    places, batch = noise.places(tokens)
    return (noise.common(torch.zeros(1, dtype=torch.float64, device=tokens.device)) + places.double() / batch) % 1


def draw_mask(model: MaskedDiffusionModel, tokens: Tensor, t: Tensor, noise: StepNoise) -> Tensor:
    """Which tokens are unknown at times t [N]: bool [N, L]."""
    uniform = noise.uniform(torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device))
    with torch.no_grad():
        return uniform < model.hidden(tokens, t)


def bits_per_token(nats: Tensor, tokens: Tensor) -> Tensor:
    """The published loss [N]: the bound in bits per token, bits/dim on pixels."""
    return nats / (tokens.shape[1] * math.log(2))


def numbers(nats: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What the log shows: the bound in bits per token."""
    return {"bits_per_token": bits_per_token(nats.detach(), tokens)}
