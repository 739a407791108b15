"""What `evaluate` and `tune` share: which real images a model is compared with, and through which features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from imagewright.data import ImageSet, open_images
from imagewright.data.event_files import EventFiles
from imagewright.data.events import StandinEvents
from imagewright.data.partition import of_classes
from imagewright.metrics.extractors import OF_DATA, find_extractor
from imagewright.metrics.features import FeatureExtractor
from imagewright.pretrained import folder_of
from imagewright.training.record import experiment_from_json, get_field, read_record
from imagewright.types import DataSpec, UserError


def training_data(model: str, spec: DataSpec) -> str:
    """The images that a run or shipped model was trained on. Raises UserError when it does not say."""
    run = folder_of(model)
    if (run / "experiment.json").exists():
        source = get_field(read_record(run)["experiment"], "data.source")
        if not isinstance(source, str):
            raise UserError(f"{model}/experiment.json does not say which images the run was trained on")
        return source
    if spec.name in OF_DATA:
        return spec.name
    raise UserError(f"{model} does not say which images it was trained on; name them with --data")


def real_images(model: str, data: str | None, spec: DataSpec, split: str) -> ImageSet:
    """What a model is compared with: the set that is named, else what it was trained on, of the classes that it knows.

    Raises UserError where neither says.
    """
    if data is not None:
        return reference_images(data, spec, split)
    run = folder_of(model)
    frames = _frames_of_events(run, split)
    if frames is not None:
        return frames
    images = reference_images(training_data(model, spec), spec, split)
    if not (run / "experiment.json").exists():
        return images
    return of_classes(images, get_field(read_record(run)["experiment"], "data.classes") or ())


def _frames_of_events(run: Path, split: str) -> ImageSet | None:
    """Of a run on events, the frames of a split; None of another run, or none."""
    if not (run / "experiment.json").exists():
        return None
    told = get_field(read_record(run)["experiment"], "data")
    data = experiment_from_json(told, run / "experiment.json")
    if not isinstance(data, StandinEvents | EventFiles):
        return None
    frames: ImageSet = replace(data, split=split, frames=True).open()
    return frames


def reference_images(source: str, spec: DataSpec, split: str, *, own_colours: bool = False) -> ImageSet:
    """Real images at a model's size, in its colours, or in their own."""
    channels = None if own_colours else spec.channels
    return open_images(source, resolution=spec.resolution, channels=channels, split=split)  # type: ignore[arg-type]


def extractor_for(
    data: str, inception: str | None, device: torch.device, features: str | None = None
) -> FeatureExtractor:
    """What a set is compared by: what was asked for, else the set's own classifier, else the default (`extractors`)."""
    return find_extractor(features, data, inception, device)
