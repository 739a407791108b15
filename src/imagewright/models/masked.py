"""A masked token model: it is shown some of an image's tokens and says what may stand at the others."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from imagewright.models.tokens import TokenNetworkModel
from imagewright.types import Codec, UserError


class MaskedTokenModel(TokenNetworkModel):
    """network(tokens, time, cond) -> logits, the token `codec.values` being an unknown one (MaskGIT).

    label_dropout: the share of training images whose class was hidden; above 0 the model also answers without one.
    """

    order: ClassVar[Literal["masked", "causal"]] = "masked"
    settings: ClassVar[tuple[str, ...]] = ("label_dropout",)

    def __init__(self, network: nn.Module, codec: Codec, label_dropout: float = 0.0) -> None:
        super().__init__(network, codec)
        if not 0 <= label_dropout <= 1:
            raise UserError(f"label_dropout is {label_dropout}; it must lie in [0, 1]")
        self.label_dropout = label_dropout
