"""What the samplers of token models share: a picture is drawn by filling in tokens, all of which are unknown."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from imagewright.types import UNCONDITIONAL, Condition, ModelKind, Noise, OnStep


@dataclass(frozen=True, kw_only=True)
class Filling:
    """Base of samplers whose `fill` draws the unknown ones of given tokens."""

    model_kind: ClassVar[ModelKind] = "token_model"

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """latents: [N, ...]; only their number and device matter. Returns images [N, C, H, W] in [-1, 1].

        on_step, UserError: as `fill`.
        """
        shape = (len(latents), self.length(model.codec))
        unknown = torch.full(shape, model.codec.values, dtype=torch.int64, device=latents.device)
        return self.decoded(model.codec, self.fill(model, unknown, cond, noise=noise, on_step=on_step))

    @abstractmethod
    def fill(
        self,
        model: Any,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """tokens: int64 [N, length], `codec.values` where they are unknown. Returns them with those drawn."""

    def length(self, codec: Any) -> int:
        """Tokens of a picture."""
        length: int = codec.length
        return length

    def decoded(self, codec: Any, tokens: Tensor) -> Tensor:
        """The picture of tokens."""
        picture: Tensor = codec.decode(tokens)
        return picture
