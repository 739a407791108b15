"""An encoder of the user's own images, in whose features distances to them are measured: `imagewright data encoder`.

With classes it learns to name them. Without, each picture is a class of its own that has to be recognised however it
is moved, turned, scaled, mirrored and coloured: exemplars (Dosovitskiy et al. 2014, 1406.6909), at most 4,096 of them.
Scores in its features are called fd_<name>, compare models of this one set, and have no scale in common with others.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from imagewright.data import ImageSet
from imagewright.files import replacing
from imagewright.metrics.features import PICTURES, classifier_header
from imagewright.metrics.train_features import Target, Training, accuracy, classes_of, fit_network
from imagewright.networks import ConvClassifierConfig
from imagewright.types import UserError
from imagewright.version import versions

MOST_EXEMPLARS = 4096
LEAST_IMAGES = 8
_SIDES = (8, 16, 32, 64)


def train_encoder(images: ImageSet, out: Path, *, steps: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Train on a set, write the encoder's file, and return what its header records.

    The file's stem is the encoder's name. Raises UserError for fewer than 8 images, or a name that is none.
    """
    if len(images) < LEAST_IMAGES:
        raise UserError(f"{images.source} has {len(images)} images; an encoder needs at least {LEAST_IMAGES}")
    name = out.stem
    if out.suffix != ".safetensors" or re.fullmatch(r"[A-Za-z0-9][\w.-]{0,40}", name) is None:
        raise UserError(f"{out} must be called NAME.safetensors, of letters, digits, - and _")
    exemplars = images.spec.num_classes < 2
    if exemplars and len(images) > MOST_EXEMPLARS:
        images = images.subset(np.linspace(0, len(images) - 1, MOST_EXEMPLARS).round().astype(np.int64))
    learned = replace(images, subgroups=None, labels=np.arange(len(images))) if exemplars else images
    classes = len(images) if exemplars else images.spec.num_classes
    target = Target(classes=tuple(map(str, range(classes))), group_of=torch.arange(classes), num_groups=classes)
    settings = _settings(images, steps)
    config = ConvClassifierConfig(
        img_resolution=settings.resolution, in_channels=settings.channels, widths=settings.widths, num_classes=classes
    )
    threads = torch.get_num_threads()
    network = fit_network(settings, config, learned, classes_of(learned, target), target, seed, threads)
    record = {
        "command": f"imagewright data encoder {images.source} {out.name} --steps {steps} --seed {seed}",
        "seed": seed,
        "steps": steps,
        "data": {"name": images.spec.name, "train": images.fingerprint},
        "images": {"train": len(images)},
        "accuracy": {"train": accuracy(network, learned, target)},
        "versions": versions(),
    }
    header = classifier_header(name, config, target=PICTURES if exemplars else "classes", training=record)
    with replacing(out) as aside:
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, aside, metadata=header)
    return record


def _settings(images: ImageSet, steps: int) -> Training:
    """A network of the size of the images, 64x64 at the most, that sees each of them in many positions."""
    side = max((s for s in _SIDES if s <= images.spec.resolution), default=_SIDES[0])
    batch = min(64, len(images))
    return Training(
        dataset=images.spec.name,
        resolution=side,
        channels=images.spec.channels,
        widths=(24, 48, 96, 96, 96)[: 2 + _SIDES.index(side)],
        epochs=max(1, steps * batch // (len(images) // batch * batch)),
        background=0.0,
        mirror=True,
        rotation=0.2,
        scale=0.25,
        shift=0.15,
        colour=0.3,
        batch_size=batch,
    )
