"""What `evaluate` and `tune` share: which real images a model is compared with, and through which features."""

from __future__ import annotations

from pathlib import Path

import torch

from imagewright.data import ImageSet, open_images
from imagewright.metrics.features import FeatureExtractor, digits_features, emoji_features
from imagewright.metrics.inception import InceptionFeatures
from imagewright.training.record import get_field, read_record
from imagewright.types import DataSpec, UserError

EXTRACTORS = {"digits": digits_features, "emoji64": emoji_features}


def training_data(model: str, spec: DataSpec) -> str:
    """The images that a run or shipped model was trained on. Raises UserError when it does not say."""
    if (Path(model) / "experiment.json").exists():
        source = get_field(read_record(Path(model))["experiment"], "data.source")
        if not isinstance(source, str):
            raise UserError(f"{model}/experiment.json does not say which images the run was trained on")
        return source
    if spec.name in EXTRACTORS:
        return spec.name
    raise UserError(f"{model} does not say which images it was trained on; name them with --data")


def reference_images(source: str, spec: DataSpec, split: str, *, own_colours: bool = False) -> ImageSet:
    """Real images at a model's size, in its colours, or in their own."""
    channels = None if own_colours else spec.channels
    return open_images(source, resolution=spec.resolution, channels=channels, split=split)  # type: ignore[arg-type]


def extractor_for(data: str, inception: str | None, device: torch.device) -> FeatureExtractor:
    """Our classifier of an embedded set, or the Inception network. Raises UserError for other data without it."""
    if inception is not None:
        return InceptionFeatures(inception, device=device)
    if data not in EXTRACTORS:
        raise UserError(
            f"there is no feature extractor of our own for {data}; give the Inception weights with --inception"
        )
    return EXTRACTORS[data](device)
