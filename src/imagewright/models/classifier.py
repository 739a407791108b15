"""A classifier of images as a model on disk: a `types.Encoder` that also names classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.view import seen
from imagewright.networks import ConvClassifier, VCMamba, WideResNet
from imagewright.precision import uncast
from imagewright.types import Encoding, ModelKind, Resize, UserError, View

Sees = ConvClassifier | VCMamba | WideResNet
"""Networks that make an `Encoding` of pictures."""


class Classifier(nn.Module):
    """Pictures of any square size as features, tokens and logits of their classes.

    network: says what size and colours it sees. mean, std, resize: the rest of its view (`types.View`). Raises
    UserError for another network, or other settings.
    """

    kind: ClassVar[ModelKind] = "encoder"

    def __init__(
        self, network: nn.Module, mean: Sequence[float] = (0.5,), std: Sequence[float] = (1.0,), resize: Resize = "box"
    ) -> None:
        super().__init__()
        if not isinstance(network, Sees):
            known = " or ".join(sorted(k.__name__ for k in get_args(Sees)))
            raise UserError(f"a classifier needs a {known} as its network, not {an(type(network).__name__)}")
        channels = network.config.in_channels
        for name, values, low in (("mean", mean, 0.0), ("std", std, 1e-3)):
            if len(values) not in (1, channels) or not all(low <= v <= 1 for v in values):
                allowed = f"one number in [{low:g}, 1], or one for each of {channels}"
                raise UserError(f"{name} is {tuple(values)}; it must be {allowed}")
        if resize not in get_args(Resize):
            raise UserError(f"resize is {resize!r}; allowed: {', '.join(get_args(Resize))}")
        self.network = network
        self.view = View(
            side=network.config.img_resolution,
            channels=channels,
            resize=resize,
            mean=tuple(float(m) for m in mean),
            std=tuple(float(s) for s in std),
        )

    def forward(self, images: Tensor) -> Encoding:
        """As `encode`, in the number format of the run."""
        answer: Encoding = self.network(seen(images, self.view))
        return answer

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1] -> features, tokens and logits, float32. Raises UserError for other shapes."""
        with uncast(images.device):  # a feature shall not depend on a run's precision
            answer: Encoding = self(images.float())
        return answer

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        view = {"mean": list(self.view.mean), "std": list(self.view.std), "resize": self.view.resize}
        return {"class": type(self).__name__, **view, "network": self.network.describe()}
