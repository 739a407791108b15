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
)
from imagewright.metrics.inception import InceptionFeatures
from imagewright.metrics.vision_transformers import TransformerFeatures, is_transformer
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
    """The extractor of a name (digits, emoji), an encoder's file or run, a folder of DINOv2 or CLIP; or Inception's.

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
    if features in SHIPPED:
        chosen = SHIPPED[features](device)
        chosen.note = "" if OF_DATA.get(data) == features else FOREIGN.replace("emoji", features, 1)
        return chosen
    path = Path(features)
    if path.is_dir() and is_transformer(path):
        return TransformerFeatures(path, device=device)
    if path.is_dir() and has_model(path):
        return EncoderFeatures(path, device=device)
    if path.is_file():
        return ClassifierFeatures(path, device=device)
    raise UserError(
        f"features is {features!r}; it must be {' or '.join(SHIPPED)}, an encoder's file (`imagewright data encoder`), "
        "a classifier's run, or a folder with the config.json of a DINOv2 or CLIP network"
    )
