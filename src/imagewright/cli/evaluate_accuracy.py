"""`imagewright evaluate CLASSIFIER`: how often it names the class of held-out pictures; in each language it speaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.scoring import real_images, reference_images
from imagewright.data import ImageSet
from imagewright.data.captions import CaptionsConfig
from imagewright.metrics.accuracy import measure_accuracy, pooled
from imagewright.metrics.probe import probe_accuracy
from imagewright.models.files import ModelFile
from imagewright.models.image_text import ImageText
from imagewright.training.distributed import pick_device
from imagewright.training.record import experiment_from_json, get_field, read_record
from imagewright.types import UserError


def evaluate_accuracy(
    target: str, file: ModelFile, data: str | None, split: str | None, n: int | None, batch_size: int, device: str
) -> list[dict[str, Any]]:
    """The entries of metrics.json: one, or one for each language of a model's prompts.

    Raises UserError for a model that names no classes, and for other pictures.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    if isinstance(file.model, ImageText):
        if not file.model.prompts:
            raise UserError(f"{target} was trained without data.prompts, so it has no names of classes")
        images = _labelled(target, file, data, split)
    else:
        images = real_images(target, data, file.spec, split or "test")
    split = split or "test"
    if n is not None:
        if not 1 <= n <= len(images):
            raise UserError(f"--n is {n}; there are {len(images)} images in split {split}, so it must be 1 to that")
        images = images.subset([i * len(images) // n for i in range(n)])
    if not isinstance(file.model, ImageText):
        return [_measured(target, file, data, images, split, batch_size, device)]
    entries = []
    for language in file.model.prompts:
        file.model.speak(language)
        entry = _measured(target, file, data, images, split, batch_size, device)
        entries.append({**entry, "language": language})
    return entries


def _measured(
    target: str, file: ModelFile, data: str | None, images: ImageSet, split: str, batch_size: int, device: str
) -> dict[str, Any]:
    with bar(f"accuracy of {target}", len(images)) as advance_to:
        found = measure_accuracy(
            file.model, images, batch_size=batch_size, device=pick_device(device), on_progress=advance_to
        )
    probe = {}
    if getattr(file.model, "pretrained", False):
        train = real_images(target, data, file.spec, "train")
        probe = {"probe": _probe(file.model, train, images, batch_size, device)}
    return {"target": target, "report": {**found.as_dict(), "split": split, **probe}}


def _probe(model: nn.Module, train: ImageSet, test: ImageSet, batch_size: int, device: str) -> float:
    """How well classes can be read off features by a linear map that is learnt from the training pictures'."""
    x, u = (pooled(model, images, batch_size=batch_size, device=pick_device(device)) for images in (train, test))
    return probe_accuracy(x, train.labels, u, test.labels)


def _labelled(target: str, file: ModelFile, data: str | None, split: str | None) -> ImageSet:
    """Labelled pictures: those that are named, else those that the run's captions were not of."""
    if data is not None:
        images = reference_images(data, replace(file.spec, num_classes=0), split or "test")
        assert isinstance(images, ImageSet)
        return images
    if not (Path(target) / "experiment.json").exists():
        raise UserError(f"{target} does not say which pictures were held out; name labelled ones with --data")
    if split is not None:
        raise UserError("--split goes with --data; without it the pictures are those that no caption was of")
    record = get_field(read_record(Path(target))["experiment"], "data")
    known = experiment_from_json(record, Path(target) / "experiment.json")
    if not isinstance(known, CaptionsConfig):
        raise UserError(f"{target} was not trained on captions; name labelled pictures with --data")
    return known.held_out()


def show_accuracy(entries: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    spoken = "language" in entries[0]
    rows = table("", *(("language",) if spoken else ()), "top-1", "±", "top-5")
    for entry in entries:
        report = entry["report"]
        five = "" if report["top5"] is None else f"{report['top5']:.2%}"
        told = (entry["language"],) if spoken else ()
        rows.add_row(entry["target"], *told, f"{report['top1']:.2%}", f"{report['stderr']:.2%}", five)
    OUT.print(rows)
    if "probe" in report:
        say(f"a linear probe of its features, learnt from the training pictures: {report['probe']:.2%}")
    say(f"{report['num_images']} images, split {report['split']}, {report['classes']} classes")
