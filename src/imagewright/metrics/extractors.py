"""Which features images are compared in: by name, file or folder, and the default where nothing is said.

The default is the shipped classifier of the data set; of any other set the one of emoji, whose limits the score's
notes then state. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from imagewright.metrics.features import (
    ClassifierFeatures,
    EncoderFeatures,
    FeatureExtractor,
    digits_features,
    emoji_features,
    model_features,
)
from imagewright.metrics.inception import InceptionFeatures
from imagewright.metrics.vision_transformers import FAMILIES, TransformerFeatures, family_of, is_transformer
from imagewright.models.files import has_model
from imagewright.types import UserError

SHIPPED: Mapping[str, Callable[[torch.device | str], ClassifierFeatures]] = {
    "digits": digits_features,
    "emoji": emoji_features,
}
"""Shipped classifiers by the names that `--features` takes, as in training."""
OF_DATA: Mapping[str, str] = {"digits": "digits", "emoji64": "emoji"}
FOREIGN = (
    "fd_emoji is measured in features of a classifier of emoji at 32x32, as these images have none of their own: it "
    "tells blur, noise and colour apart better than content; train an encoder with `imagewright data encoder`, or give "
    "--inception or --features FOLDER (DINOv2, CLIP)"
)


def find_extractor(
    features: str | None, data: str, inception: str | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor that `named_extractor` finds; or Inception's.

    data: the set's name, which decides where neither is given. Raises UserError for both, or what is none of these.
    """
    if features is not None and inception is not None:
        raise UserError("--features and --inception are two ways to compare; give one")
    if inception is not None:
        return InceptionFeatures(inception, device=device)
    if features is None:
        name = OF_DATA.get(data)
        if name is not None:
            return SHIPPED[name](device)
        fallback = emoji_features(device)
        fallback.note = FOREIGN
        return fallback
    chosen = named_extractor(features, device)
    if features in SHIPPED and OF_DATA.get(data) != features:
        chosen.note = FOREIGN.replace("emoji", features, 1)
    return chosen


def named_extractor(features: str, device: torch.device | str = "cpu") -> EncoderFeatures:
    """The encoder of a name, as `--features` takes it. Raises UserError for what is none."""
    if features in SHIPPED:
        return SHIPPED[features](device)
    family, _, inside = features.partition(":")
    told = family in FAMILIES and inside != ""
    path = Path(inside) if told else Path(features)
    if told and not is_transformer(path):
        raise UserError(f"features is {features!r}; {path} is no folder with the config.json of a {family} network")
    if path.is_dir() and is_transformer(path):
        if told and family_of(path) != family:
            raise UserError(f"features is {features!r}; {path} holds a {family_of(path)} network")
        return TransformerFeatures(path, device=device)
    if path.is_dir() and has_model(path):
        return model_features(path, device=device)
    if path.is_file():
        return ClassifierFeatures(path, device=device)
    raise UserError(
        f"features is {features!r}; it must be {' or '.join(SHIPPED)}, an encoder's file (`imagewright data encoder`), "
        "a classifier's run, or dinov2:FOLDER or clip:FOLDER with the config.json of such a network"
    )
