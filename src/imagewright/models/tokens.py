"""Token models made of a network and a codec, and the codec that takes an image's own 8-bit values as tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.errors import an
from imagewright.models.preconditioning import Describable
from imagewright.types import UNCONDITIONAL, Codec, Condition, ModelKind, UserError, kind_of


class PixelCodec(nn.Module):
    """Every sub-pixel is a token, in the order row, column, channel. No weights.

    values: evenly spaced levels that a token tells apart, 2 to 256; below 256 the codec is not lossless.
    """

    kind: ClassVar[ModelKind] = "codec"

    def __init__(self, resolution: int, channels: int, values: int = 256) -> None:
        super().__init__()
        if resolution < 1 or channels < 1:
            raise UserError(f"resolution is {resolution} and channels is {channels}; both must be at least 1")
        if not 2 <= values <= 256:
            raise UserError(f"values is {values}; a pixel has 2 to 256 levels")
        self.resolution, self.channels = resolution, channels
        self.values, self.lossless = values, values == 256
        self.length = channels * resolution**2

    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> int64 [N, H W C], the nearest levels. Raises UserError for another size."""
        wanted = (self.channels, self.resolution, self.resolution)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise UserError(f"images are {list(images.shape)}; this codec takes [N, {', '.join(map(str, wanted))}]")
        half = (self.values - 1) / 2
        levels = (images.float() * half + half).round().clamp(0, self.values - 1).long()
        return levels.permute(0, 2, 3, 1).flatten(1)

    def decode(self, tokens: Tensor, expansion: int = 1) -> Tensor:
        """The inverse; float32. expansion: how many times as many rows and columns they are of."""
        side = self.resolution * expansion
        grid = tokens.view(len(tokens), side, side, self.channels)
        return grid.permute(0, 3, 1, 2).float() / ((self.values - 1) / 2) - 1

    def places(self, pixels: Tensor) -> Tensor:
        """Which tokens [length] belong to some pixels, bool [H, W]."""
        return pixels.reshape(-1, 1).expand(-1, self.channels).flatten()

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        names = ("resolution", "channels", "values")
        return {"class": type(self).__name__, **{name: getattr(self, name) for name in names}}


class TokenNetworkModel(nn.Module):
    """A `types.TokenModel`: network(tokens, time, cond) -> logits, around it the codec.

    The base of masked and causal models; `settings` names further arguments of a subclass's constructor,
    `usual_sampler` the one of `samplers.SAMPLERS` that draws from it where nobody names another.
    """

    kind: ClassVar[ModelKind] = "token_model"
    order: ClassVar[Literal["masked", "causal"]]
    usual_sampler: ClassVar[str] = "masked-decoding"
    settings: ClassVar[tuple[str, ...]] = ()
    label_dropout: float = 0.0
    """Share of training images whose class was hidden; only above 0 may sampling be guided away from no class."""

    def __init__(self, network: nn.Module, codec: Codec) -> None:
        super().__init__()
        self.network = network
        self.codec = codec
        ours = (self.codec.length, self.codec.values)
        config = getattr(network, "config", None)
        theirs = tuple(getattr(config, name, known) for name, known in zip(("length", "values"), ours, strict=True))
        if theirs != ours:
            raise UserError(
                f"the network knows {theirs[0]} tokens of {theirs[1]} values; the codec has {ours[0]} of {ours[1]}"
            )

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        """As `types.TokenModel`."""
        return self.wide(self.network(tokens, time, cond))

    @staticmethod
    def wide(logits: Tensor) -> Tensor:
        """float32 at least."""
        return logits if logits.dtype == torch.float64 else logits.float()

    def told_of_share(self, unknown: Tensor) -> Tensor:
        """The time at which the network sees this share [N] of unknown tokens, for samplers that go by shares."""
        return unknown

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        modules = {"network": self.network, "codec": self.codec}
        described = {name: cast(Describable, module).describe() for name, module in modules.items()}
        return {"class": type(self).__name__, **described, **{name: getattr(self, name) for name in self.settings}}


def check_device(model: object, device: torch.device | str) -> None:
    """Raise UserError for a token model on a device without 64-bit floats, in which its probabilities are summed."""
    if kind_of(model) == "token_model" and torch.device(device).type == "mps":
        raise UserError(f"{an(type(model).__name__)} needs 64-bit floats, which mps does not have; use --device cpu")


def check_tokens(tokens: Tensor, codec: Codec, *, unknown: bool = False, expansion: int = 1) -> None:
    """Raise UserError unless tokens are [N, length] of the codec's values (and of `values`, if unknown ones may be).

    expansion: they are of a grid with so many times as many rows and columns.
    """
    length = codec.length * expansion**2
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise UserError(f"tokens are {list(tokens.shape)}; the codec's are [N, {length}]")
    if tokens.device.type != "cpu":
        return  # its host would have to wait; what is there was made by a codec, or checked before it was moved
    wrong = (tokens < 0) | (tokens >= codec.values + unknown)
    if bool(wrong.any()):
        also = f", and {codec.values} for unknown" if unknown else ""
        raise UserError(f"token {int(tokens[wrong][0])} is none of the codec's; they are 0 to {codec.values - 1}{also}")


def negative_log(logits: Tensor, tokens: Tensor) -> Tensor:
    """-ln of the probability that logits [..., V] give to tokens [...]: their shape, dtype of the logits."""
    return F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)
