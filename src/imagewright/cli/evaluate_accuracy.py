"""`imagewright evaluate CLASSIFIER`: how often it names the class of held-out pictures."""

from __future__ import annotations

from typing import Any

from torch import nn

from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.scoring import real_images
from imagewright.data import ImageSet
from imagewright.metrics.accuracy import measure_accuracy, pooled
from imagewright.metrics.probe import probe_accuracy
from imagewright.models.files import ModelFile
from imagewright.training.distributed import pick_device
from imagewright.types import UserError


def evaluate_accuracy(
    target: str, file: ModelFile, data: str | None, split: str, n: int | None, batch_size: int, device: str
) -> dict[str, Any]:
    """The entry of metrics.json. Raises UserError for a model that names no classes, and for other pictures."""
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    images = real_images(target, data, file.spec, split)
    if n is not None:
        if not 1 <= n <= len(images):
            raise UserError(f"--n is {n}; there are {len(images)} images in split {split}, so it must be 1 to that")
        images = images.subset([i * len(images) // n for i in range(n)])
    with bar(f"accuracy of {target}", len(images)) as advance_to:
        found = measure_accuracy(
            file.model, images, batch_size=batch_size, device=pick_device(device), on_progress=advance_to
        )
    probe = {}
    if getattr(file.model, "pretrained", False):
        probe = {"probe": _probe(file.model, real_images(target, data, file.spec, "train"), images, batch_size, device)}
    return {"target": target, "report": {**found.as_dict(), "split": split, **probe}}


def _probe(model: nn.Module, train: ImageSet, test: ImageSet, batch_size: int, device: str) -> float:
    """How well classes can be read off features by a linear map that is learnt from the training pictures'."""
    x, u = (pooled(model, images, batch_size=batch_size, device=pick_device(device)) for images in (train, test))
    return probe_accuracy(x, train.labels, u, test.labels)


def show_accuracy(entry: dict[str, Any]) -> None:
    """The table on the terminal."""
    report = entry["report"]
    rows = table("", "top-1", "±", "top-5")
    five = "" if report["top5"] is None else f"{report['top5']:.2%}"
    rows.add_row(entry["target"], f"{report['top1']:.2%}", f"{report['stderr']:.2%}", five)
    OUT.print(rows)
    if "probe" in report:
        say(f"a linear probe of its features, learnt from the training pictures: {report['probe']:.2%}")
    say(f"{report['num_images']} images, split {report['split']}, {report['classes']} classes")
