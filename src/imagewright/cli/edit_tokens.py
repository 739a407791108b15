"""The part of `imagewright edit` that is a token model's: which models and options fit, and the drawing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.files import ModelFile
from imagewright.models.kinds import KINDS, words
from imagewright.noise import ImageNoise
from imagewright.samplers import MaskedDecoding, RandomizedParallel, Raster
from imagewright.samplers.generator import sampler_from_json
from imagewright.samplers.token_editing import TokenEditing
from imagewright.types import Condition, UserError, kind_of

TASKS = ("inpaint", "outpaint")
"""What a token model can do; a flow map can do all tasks."""
NOT_FOR_TOKENS = ("levels",)
"""Options without effect on a token model."""


def check_model(name: str, model: nn.Module, task: str, given: dict[str, Any]) -> None:
    """Raise UserError where this kind of model cannot do the task, or has no use for an option."""
    kind = kind_of(model)
    if KINDS[kind].answers:
        made = "edit with a model that was trained on what it makes"
        raise UserError(f"{name} draws nothing; it {KINDS[kind].what}; {made}")
    if kind in ("denoiser", "latent_denoiser"):
        raise UserError(
            f"{name} is {an(words(kind))}; editing needs a flow map that jumps to the clean image, such as a "
            "consistency model (imagewright train cd-digits --teacher RUN), or a token model"
        )
    if kind != "token_model":
        return
    order = getattr(model, "order", "masked")
    if task not in TASKS:
        raise UserError(f"{name} is a {order} token model; it knows --task {' and '.join(TASKS)}, not {task}")
    for option in NOT_FOR_TOKENS:
        if given[option] is not None:
            raise UserError(f"--{option} has no effect on a {order} token model, which knows no noise")
    if order == "causal" and given["steps"] is not None:
        raise UserError("--steps has no effect on a causal token model, which draws one token after the other")


def at_own_size(file: ModelFile) -> ModelFile:
    """The model with a sampler that draws pictures of the size it was trained for."""
    if file.sampler is None or "expansion" not in file.sampler:
        return file
    return replace(file, sampler={**file.sampler, "expansion": 1})


def fill_tokens(
    file: ModelFile, pictures: Tensor, region: Tensor, cond: Condition, noise: ImageNoise, steps: int | None
) -> Tensor:
    """The pictures [N, C, H, W] with the region [H, W] drawn anew; steps: passes in all, default 12.

    The model's own decoding where it is MaskGIT's, but for the number of passes. A sixth of them is skipped, as the
    published 2 of 12 are. A model of random orders is shown what is known and decodes the rest, by default in as many
    passes as it samples in. A causal model draws one token after the other, each from those before it.
    """
    saved = sampler_from_json(dict(file.sampler)) if file.sampler else None
    causal: Any = file.model
    if causal.order == "causal":
        raster = saved if isinstance(saved, Raster) else Raster()
        return TokenEditing(decoding=raster, start=0)(causal, pictures, region, cond, noise=noise)
    if hasattr(causal, "ask"):
        ours = saved if isinstance(saved, RandomizedParallel) else RandomizedParallel()
        ours = replace(ours, num_steps=ours.num_steps if steps is None else steps)
        return TokenEditing(decoding=ours, start=0)(causal, pictures, region, cond, noise=noise)
    decoding = saved if isinstance(saved, MaskedDecoding) else MaskedDecoding()
    passes = 12 if steps is None else steps
    editing = TokenEditing(decoding=replace(decoding, num_steps=passes), start=passes // 6)
    model: Any = file.model
    return editing(model, pictures, region, cond, noise=noise)
