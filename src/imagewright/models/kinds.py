"""The kinds of model: what each offers, what it has to agree with the data in, and what the commands do with it.

A command that has nothing to do for a kind says so in one sentence. docs/architecture.md has this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from imagewright.types import (
    Autoencoder,
    Codec,
    DataSpec,
    Denoiser,
    Encoder,
    FlowMap,
    LatentDenoiser,
    ModelKind,
    TokenModel,
)

Command = Literal["sample", "evaluate", "edit", "couple", "report", "export"]
Agreement = Literal["classes", "images", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of model.

    protocol: what it offers. agrees: whether it is of the data's resolution, channels and classes, of resolution and
    channels alone, or of nothing: it brings images to its own. does: what each command makes of it. what: it in words,
    where it is not what a command wants.
    answers: whether it is only ever asked by what learns beside it.
    """

    protocol: type
    agrees: Agreement
    does: Mapping[Command, str]
    what: str
    answers: bool = False

    def agreement(self, spec: DataSpec) -> tuple[int, ...]:
        """What has to be equal of a model's and the data's specification."""
        return (spec.resolution, spec.channels, spec.num_classes)[
            : {"classes": 3, "images": 2, "nothing": 0}[self.agrees]
        ]


_IMAGES: Mapping[Command, str] = {
    "sample": "images",
    "evaluate": "distances of images",
    "report": "images, scores",
    "export": "weights",
}

_OTHERS: Mapping[Command, str] = {"evaluate": "reconstructions", "report": "reconstructions", "export": "weights"}

KINDS: Mapping[ModelKind, Kind] = {
    "denoiser": Kind(
        protocol=Denoiser,
        agrees="classes",
        does={**_IMAGES, "evaluate": "distances of images, bits", "couple": "pairs"},
        what="makes images of noise in many steps",
    ),
    "latent_denoiser": Kind(
        protocol=LatentDenoiser,
        agrees="classes",
        does=_IMAGES,
        what="makes images of noise in many steps, in another space than theirs",
    ),
    "flow_map": Kind(
        protocol=FlowMap,
        agrees="classes",
        does={**_IMAGES, "edit": "images", "couple": "pairs"},
        what="makes images of noise in few steps",
    ),
    "token_model": Kind(
        protocol=TokenModel,
        agrees="classes",
        does={**_IMAGES, "evaluate": "distances of images, bits", "edit": "images"},
        what="draws images token by token",
    ),
    "codec": Kind(
        protocol=Codec,
        agrees="images",
        does=_OTHERS,
        what="turns images into tokens and back",
        answers=True,
    ),
    "autoencoder": Kind(
        protocol=Autoencoder,
        agrees="images",
        does=_OTHERS,
        what="turns images into latents and back",
        answers=True,
    ),
    "encoder": Kind(
        protocol=Encoder,
        agrees="nothing",
        does={"evaluate": "accuracy, of classifiers; retrieval, of VATT", "report": "losses", "export": "weights"},
        what="turns images into features",
        answers=True,
    ),
}


def words(kind: ModelKind) -> str:
    """The name of a kind in sentences."""
    return kind.replace("_", " ")
