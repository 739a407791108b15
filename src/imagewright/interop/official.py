"""Official checkpoints in: a state dict and the constructor's arguments make one of our models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from imagewright.interop.clip import from_clip
from imagewright.interop.edm import from_ctm_cifar10, from_dmd2, from_edm, from_edm2, from_vct
from imagewright.interop.fitting import StateDict
from imagewright.interop.kl import from_kl
from imagewright.interop.lightningdit import from_lightningdit
from imagewright.interop.openai import from_consistency_models, from_ctm, from_guided_diffusion, from_openai
from imagewright.interop.vcmamba import from_vcmamba
from imagewright.models.classifier import Classifier
from imagewright.models.image_text import ImageText
from imagewright.models.kl import GaussianAutoencoder
from imagewright.models.preconditioning import Preconditioned
from imagewright.networks.config import did_you_mean
from imagewright.types import UserError

Imported = Preconditioned | Classifier | GaussianAutoencoder | ImageText
KINDS: dict[str, Callable[[StateDict, Mapping[str, Any]], Imported]] = {
    "edm": from_edm,
    "edm2": from_edm2,
    "dmd2": from_dmd2,
    "vct": from_vct,
    "guided-diffusion": from_guided_diffusion,
    "consistency-models": from_consistency_models,
    "openai": from_openai,
    "ctm": from_ctm,
    "ctm-cifar10": from_ctm_cifar10,
    "lightningdit": from_lightningdit,
    "kl": from_kl,
    "vcmamba": from_vcmamba,
    "clip": from_clip,
}
"""Every family of official checkpoints that can be read."""


def from_official(state_dict: StateDict, kind: str, config: Mapping[str, Any]) -> Any:
    """The model of an official checkpoint, in eval mode, float32, on the CPU.

    state_dict: tensors or arrays by official key; constant buffers may be absent.
    kind:   a family of checkpoints, see KINDS ("guided_diffusion" is "guided-diffusion").
    config: the official constructor's arguments, as the checkpoint's program has them; for EDM
            {"precond_class": name, **arguments}, as in the pickle's `init_kwargs`.

    Raises UserError naming what is unknown, missing, surplus, or of the wrong shape.
    """
    name = kind.replace("_", "-")
    if name not in KINDS:
        raise UserError(f"no kind of official checkpoint is called {kind!r}{did_you_mean(kind, KINDS)}")
    return KINDS[name](state_dict, config)
