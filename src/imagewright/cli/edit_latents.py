"""The part of `imagewright edit` that is of models in latents: which tasks there are, and regions among latents."""

from __future__ import annotations

import torch
from torch import Tensor

from imagewright.models.files import ModelFile
from imagewright.models.latents import LatentSpace
from imagewright.models.vq import touched_places
from imagewright.types import UserError

OF_PIXELS = ("colourise", "upscale")
"""What keeps sums of single pixels, of which latents have none."""


def check_task(name: str, file: ModelFile, task: str) -> None:
    """Raise UserError where a model in latents cannot do the task."""
    if file.space is not None and task in OF_PIXELS:
        raise UserError(f"{name} lives in an autoencoder's latents, which have no pixels to keep; --task {task} has")


def places(region: Tensor, space: LatentSpace | None) -> Tensor:
    """Where a region of pixels, bool [H, W], has to be drawn anew: there; or at latents' places, bool [h, w]."""
    return region if space is None else touched_places(region, region.shape[0] // space.shape[1])


def put_back(made: Tensor, before: Tensor, region: Tensor) -> Tensor:
    """Images as they were outside of a region, since what is decoded there is only near them."""
    return torch.where(region.to(made.device), made, before.to(made))
