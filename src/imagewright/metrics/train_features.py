"""Training the shipped feature classifiers.

    python -m imagewright.metrics.train_features digits|emoji --out FILE --seed 0

digits     8x8 grey, 10 classes. Augmentation: shift, rotation, scale.
emoji      32x32 RGB, Unicode subgroups; the loss also asks for the group, whose probability is the sum
           over its subgroups. Augmentation: shift, rotation, scale, mirroring.
Determinism  the same seed, versions and processor give the same file (two threads, deterministic kernels).

Only the train split is learned from; the accuracy on the test split is recorded in the file's header.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imagewright.data import ImageSet, open_images
from imagewright.files import replacing
from imagewright.metrics.features import classifier_header
from imagewright.models.view import fit
from imagewright.networks import ConvClassifier, ConvClassifierConfig
from imagewright.types import UserError
from imagewright.version import versions

THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of one classifier. rotation in radians, scale and shift relative, all drawn uniformly."""

    dataset: str
    resolution: int
    channels: int
    widths: tuple[int, ...]
    epochs: int
    background: float  # what moves into the picture, in [-1, 1]
    mirror: bool
    rotation: float
    scale: float
    shift: float
    colour: float = 0.0  # brightness and contrast, relative
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1


TRAININGS = {
    "digits": Training(
        dataset="digits",
        resolution=8,
        channels=1,
        widths=(32, 64),
        epochs=40,
        background=-1.0,
        mirror=False,
        rotation=0.15,
        scale=0.1,
        shift=0.1,
    ),
    "emoji": Training(
        dataset="emoji64",
        resolution=32,
        channels=3,
        widths=(24, 48, 96, 96),
        epochs=45,
        background=1.0,
        mirror=True,
        rotation=0.2,
        scale=0.15,
        shift=0.1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is learned: class names, and the group (label of the data set) that each class belongs to."""

    classes: tuple[str, ...]
    group_of: Tensor  # int64 [classes]
    num_groups: int

    def group_log_probability(self, logits: Tensor) -> Tensor:
        """[N, classes] -> [N, groups]: log of the sum of the member classes' probabilities."""
        members = nn.functional.one_hot(self.group_of, self.num_groups).to(logits.dtype)
        return (logits.softmax(dim=1) @ members).clamp_min(1e-12).log()


def train(name: str, out: Path, seed: int = 0) -> dict[str, Any]:
    """Train one classifier, write it to `out` and return what its header records about the training."""
    if name not in TRAININGS:
        raise UserError(f"there is no feature classifier {name!r}; there are {', '.join(TRAININGS)}")
    settings = TRAININGS[name]
    data = open_images(settings.dataset, resolution=settings.resolution, split="train")
    test = open_images(settings.dataset, resolution=settings.resolution, split="test")
    target = _target(data)
    config = ConvClassifierConfig(
        img_resolution=settings.resolution,
        in_channels=settings.channels,
        widths=settings.widths,
        num_classes=len(target.classes),
    )
    network = fit_network(settings, config, data, classes_of(data, target), target, seed)
    record = {
        "command": f"python -m imagewright.metrics.train_features {name} --out {out.name} --seed {seed}",
        "seed": seed,
        "epochs": settings.epochs,
        "data": {"name": settings.dataset, "train": data.fingerprint, "test": test.fingerprint},
        "images": {"train": len(data), "test": len(test)},
        "accuracy": {"train": accuracy(network, data, target), "test": accuracy(network, test, target)},
        "versions": versions(),
    }
    header = classifier_header(
        name,
        config,
        classes=list(target.classes),
        group_of=target.group_of.tolist(),
        groups=list(data.spec.class_names),
        training=record,
    )
    with replacing(out) as aside:
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, aside, metadata=header)
    return record


def _target(data: ImageSet) -> Target:
    if data.subgroups is None:
        names = data.spec.class_names or tuple(map(str, range(data.spec.num_classes)))
        return Target(classes=names, group_of=torch.arange(len(names)), num_groups=len(names))
    group = dict(zip(data.subgroups, data.labels.tolist(), strict=True))
    classes = tuple(sorted(group))
    return Target(classes=classes, group_of=torch.tensor([group[c] for c in classes]), num_groups=data.spec.num_classes)


def classes_of(data: ImageSet, target: Target) -> Tensor:
    """int64 [N]; -1 for an image whose class has no training image."""
    if data.subgroups is None:
        return torch.from_numpy(data.labels)
    index = {name: i for i, name in enumerate(target.classes)}
    return torch.tensor([index.get(name, -1) for name in data.subgroups])


def fit_network(
    settings: Training,
    config: ConvClassifierConfig,
    data: ImageSet,
    classes: Tensor,
    target: Target,
    seed: int,
    threads: int = THREADS,
) -> ConvClassifier:
    """A classifier of the images into `classes` [N]; one seed, version, processor and `threads` give one result."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _descend(settings, config, data, classes, target)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


def _descend(
    settings: Training, config: ConvClassifierConfig, data: ImageSet, classes: Tensor, target: Target
) -> ConvClassifier:
    """AdamW, warm-up and cosine decay; every epoch is a new order of the images."""
    images = fit(data.images(), config.img_resolution, config.in_channels).contiguous()
    network = ConvClassifier(config).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * (len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    for _ in range(settings.epochs):  # the last, incomplete batch of an epoch is dropped
        order = torch.randperm(len(images))
        for start in range(0, len(images) - settings.batch_size + 1, settings.batch_size):
            rows = order[start : start + settings.batch_size]
            logits: Tensor = network(augment(images[rows], settings)).logits
            fine = nn.functional.cross_entropy(logits, classes[rows], label_smoothing=settings.label_smoothing)
            coarse = nn.functional.nll_loss(target.group_log_probability(logits), target.group_of[classes[rows]])
            optimizer.zero_grad()
            (fine + coarse).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def augment(images: Tensor, settings: Training) -> Tensor:
    """Shift, rotate, scale and perhaps mirror each image [N, C, H, W] on its own, over the background."""
    n = len(images)
    angle, size, dx, dy = ((torch.rand(n) * 2 - 1) * limit for limit in _limits(settings))
    zoom = 1 + size
    mirrored = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if settings.mirror else torch.ones(n)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos * mirrored, -sin, dx]), torch.stack([sin * mirrored, cos, dy])])
    grid = nn.functional.affine_grid(theta.permute(2, 0, 1), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images - settings.background, grid, align_corners=False)
    moved = moved + settings.background
    if settings.colour:
        gain, level = ((torch.rand(n, 1, 1, 1) * 2 - 1) * settings.colour for _ in range(2))
        moved = moved * (1 + gain) + level
    return moved


def _limits(settings: Training) -> tuple[float, float, float, float]:
    shift = 2 * settings.shift  # the grid spans [-1, 1], a width of 2
    return settings.rotation, settings.scale, shift, shift


def accuracy(network: ConvClassifier, data: ImageSet, target: Target) -> dict[str, float]:
    """Share of images whose class, and whose group, is the most probable one."""
    with torch.inference_mode():
        x = fit(data.images(), network.config.img_resolution, network.config.in_channels)
        logits: Tensor = network(x).logits
    found = {"class": logits.argmax(1) == classes_of(data, target)}
    if target.num_groups < len(target.classes):
        found["group"] = target.group_log_probability(logits).argmax(1) == torch.from_numpy(data.labels)
    return {key: round(hits.double().mean().item(), 4) for key, hits in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 and one sentence on bad input."""
    parser = argparse.ArgumentParser(prog="python -m imagewright.metrics.train_features")
    parser.add_argument("name", choices=sorted(TRAININGS))
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        record = train(options.name, options.out, options.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: accuracy {record['accuracy']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
