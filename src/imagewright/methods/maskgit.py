"""MaskGIT, stage 2: fill in masked tokens (Chang et al. 2022, arXiv 2202.04200, section 3.1).

Networks   model (trained, the product): a bidirectional transformer over the tokens of a frozen codec.
Masking    r uniform on [0, 1) for each image; ceil(ratio(r) * L) of its L tokens are masked, at random places;
           ratio is cos(pi r / 2), kept within [1e-6, 1].
Loss       cross-entropy on the masked places alone, the answer smoothed: s/V for each of the V values, 1 - s more for
           the right one, s = 0.1. The mean over an image's masked places, then over images: every image counts alike.
Optimiser  Adam with betas (0.9, 0.96), here the part's own; the rest is the run's.
Departs    The training loop was never released, nor what its configuration's `min_masking_rate` of 0.5 does; how many
           places are masked is the paper's text. V are the codec's values, where the released network answers for the
           class and unknown tokens too, and smoothing gives those their share. `label_dropout` is ours: it hides
           labels, so that sampling may use classifier-free guidance, which the paper has not. Of its evaluation the
           classification accuracy score, and rejection by a classifier, are not built in. The recipes take the
           configuration's Adam with a weight decay for AdamW, on all weights.
Checked    loss and network against the released program; how many places are masked; places that are known give no
           gradient; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.models.masked import MaskedTokenModel
from imagewright.noise import StepNoise
from imagewright.paths.mask_ratios import check_ratio, mask_ratio
from imagewright.types import Batch, Clock, Codec, Condition, DataSpec, Event, Parts, Trained, Update, UserError

BETAS = (0.9, 0.96)


@dataclass(frozen=True, kw_only=True)
class MaskGIT:
    """Guess masked tokens from the others, whatever their number."""

    product: ClassVar[str] = "model"

    schedule: str = "cosine"
    """Share of masked tokens over r uniform in [0, 1): cosine, cubic, square, linear, sqrt, exp, log."""
    label_smoothing: float = 0.1
    label_dropout: float = 0.0
    """Share of images whose class is hidden, for classifier-free guidance; published: 0."""

    def __post_init__(self) -> None:
        check_ratio("method.schedule", self.schedule)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"method.label_smoothing is {self.label_smoothing}; it must lie in [0, 1)")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"method.label_dropout is {self.label_dropout}; it must lie in [0, 1]")

    def parts(self, *, network: nn.Module, codec: Codec, spec: DataSpec) -> Parts:
        """network: (tokens, time, cond) -> logits. codec: a `types.Codec`, kept as it is."""
        model = MaskedTokenModel(network, codec, self.label_dropout)
        return Parts(model=Trained(module=model, betas=BETAS))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model."""
        model = parts.model
        with torch.no_grad():
            tokens = model.codec.encode(batch.images)
        masked = self.mask(tokens, noise)
        cond = hide_labels(batch.cond, self.label_dropout, noise)
        time = masked.float().mean(1)
        logits = model.logits(tokens.masked_fill(masked, model.codec.values), cond, time)
        smoothed, plain = cross_entropies(logits, tokens, self.label_smoothing)
        right = (logits.argmax(2) == tokens) & masked
        numbers = {
            "cross_entropy": (plain * masked).sum() / masked.sum(),
            "accuracy": right.sum() / masked.sum(),
        }
        yield Update("model", (smoothed * masked).sum(1) / masked.sum(1), parts=numbers)

    def mask(self, tokens: Tensor, noise: StepNoise) -> Tensor:
        """Which places are masked, bool, shape of `tokens` [N, L]; at least one of each image."""
        like = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        ratio = mask_ratio(self.schedule, noise.uniform(like[:, 0]), tokens.shape[1])
        count = (ratio * tokens.shape[1]).ceil()
        rank = noise.uniform(like).argsort(1).argsort(1)
        return rank < count[:, None]


def hide_labels(cond: Condition, share: float, noise: StepNoise) -> Condition:
    """-1 for that share of the labels, at random; nothing is drawn where there is nothing to hide."""
    if cond.label is None or not share:
        return cond
    hidden = noise.uniform(cond.label.double()) < share
    return replace(cond, label=cond.label.masked_fill(hidden, -1))


def cross_entropies(logits: Tensor, tokens: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Of every place, [N, L]: against the smoothed answer, and the plain one without gradient.

    logits: [N, L, V]. The smoothed answer gives every value smoothing / V, and the right one 1 - smoothing more.
    """
    log_p = torch.log_softmax(logits, 2)
    right = log_p.gather(2, tokens[..., None])[..., 0]
    return -(1 - smoothing) * right - smoothing * log_p.mean(2), -right.detach()
