"""An encoder of event frames as a model on disk, with the heads by which it is pre-trained (arXiv 2301.01928).

Heads    three layers from a class token, 384-4096-4096-256, for events and for pictures; predictors of two,
         256-4096-256, behind them on the side that learns; no biases, a norm of batches and ReLU between, a norm
         without scale last. One linear layer without bias takes a teacher's features of pictures there.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.shared_norm import SharedBatchNorm
from imagewright.models.view import seen
from imagewright.networks.event_vit import EventViT
from imagewright.precision import uncast
from imagewright.types import Encoding, ModelKind, UserError, View


class EventEncoder(nn.Module):
    """Frames of events in [-1, 1] as features: a `types.Encoder` of pictures of the network's channels.

    network: an `EventViT`. taught: length of the features of a teacher of pictures, for pre-training; 0 = it has no
    heads for that. hidden, out: widths of those heads. Raises UserError for another network or sizes.
    """

    kind: ClassVar[ModelKind] = "encoder"
    for_training: ClassVar[tuple[str, ...]] = ("contrast.", "network.head.")
    begins_afresh: ClassVar[tuple[str, ...]] = ("network.head.",)

    def __init__(self, network: nn.Module, taught: int = 0, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        if not isinstance(network, EventViT):
            raise UserError(f"an encoder of events needs an EventViT as its network, not {an(type(network).__name__)}")
        for name, value, least in (("taught", taught, 0), ("hidden", hidden, 1), ("out", out, 1)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}; it must be a whole number >= {least}")
        self.network, self.taught, self.hidden, self.out = network, taught, hidden, out
        self.view = View(side=network.config.img_resolution, channels=network.config.in_channels)
        self.contrast = Contrast(network.config.width, taught, hidden, out) if taught else None

    @property
    def pretrained(self) -> bool:
        """Whether its features are what was learnt, and its classes are there to show what they are worth."""
        return self.contrast is not None

    def forward(self, frames: Tensor) -> Encoding:
        """As `encode`, in the number format of the run."""
        answer: Encoding = self.network(seen(frames, self.view))
        return answer

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1] -> features, tokens and logits, float32. Raises UserError for other shapes."""
        with uncast(images.device):
            answer: Encoding = self(images.float())
        return answer

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        heads = {"taught": self.taught, "hidden": self.hidden, "out": self.out}
        return {"class": type(self).__name__, "network": self.network.describe(), **heads}


class Contrast(nn.Module):
    """The heads of both class tokens, their predictors, and the layer for a teacher's features."""

    def __init__(self, width: int, taught: int, hidden: int, out: int) -> None:
        super().__init__()
        self.event, self.image = (_mlp(width, hidden, hidden, out) for _ in "ei")
        self.event_predictor, self.image_predictor = (_mlp(out, hidden, out) for _ in "ei")
        self.teacher = nn.Linear(taught, out, bias=False)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        layers += [nn.Linear(inner, outer, bias=False), SharedBatchNorm(outer, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)
