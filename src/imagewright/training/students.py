"""Students of parts of the classes as one generator: what multi-student distillation ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imagewright.errors import an
from imagewright.models.files import ModelFile, has_model, save_model
from imagewright.models.routed import NOBODY, RoutedMap
from imagewright.models.start_map import StartMap
from imagewright.pretrained import find_model
from imagewright.training.chain import placed_name
from imagewright.types import UserError


@dataclass(frozen=True, kw_only=True)
class JoinStudents:
    """Write one model of several students into the stage's folder; does nothing where it has its model already."""

    given: Mapping[str, str] = field(default_factory=dict)
    """Where the students lie, by any names: {"student1": "stage:adm1", ...}."""

    def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
        """As `training.chain.Work`."""
        if not has_model(folder):
            save_model(folder, joined([placed_name(name, stages) for name in self.given.values()]))


def joined(names: Sequence[str]) -> ModelFile:
    """Students, each a run or model folder, as one model; a class belongs to the student that saw pictures of it.

    Classes that none of them saw are empty ones of the whole. Raises UserError for models that are no one-step
    generators, of different images or samplers, without classes, or of a class that two of them know.
    """
    if len(names) < 2:
        raise UserError(f"a model of students needs at least two; given: {', '.join(names) or 'none'}")
    files = [find_model(name) for name in names]
    first = files[0]
    table = [NOBODY] * first.spec.num_classes
    for k, (name, file) in enumerate(zip(names, files, strict=True)):
        _check(name, file, names[0], first)
        for label in file.spec.known_classes:
            if table[label] != NOBODY:
                raise UserError(f"{names[table[label]]} and {name} both make class {label}; a class belongs to one")
            table[label] = k
    spec = replace(first.spec, empty_classes=tuple(c for c, k in enumerate(table) if k == NOBODY))
    origin = {
        "method": "multi-student distillation",
        "students": [{"model": str(n), "weights_sha256": f.weights_sha256} for n, f in zip(names, files, strict=True)],
        "images_seen": sum(file.origin.get("images_seen", 0) for file in files),
    }
    model = RoutedMap([file.model for file in files], table)
    return ModelFile(model=model, spec=spec, sampler=first.sampler, origin=origin, space=first.space)


def _check(name: str, file: ModelFile, other: str, first: ModelFile) -> None:
    """Raise UserError where a student is none, or goes with another one not."""
    if not isinstance(file.model, StartMap):
        raise UserError(f"{name} is {an(type(file.model).__name__)}, which is no one-step generator")
    if not file.spec.num_classes:
        raise UserError(f"{name} has no classes, by which students are told apart")
    ours, theirs = ((*s.shape, s.num_classes) for s in (file.spec, first.spec))
    if ours != theirs:
        raise UserError(f"{name} makes images of {list(ours)} (channels, sides, classes), {other} of {list(theirs)}")
    if (first.space is not None or file.space is not None) and not (file.space and file.space.same_as(first.space)):
        raise UserError(f"{name} and {other} see different latents, or one of the two sees images")
    if file.sampler != first.sampler:
        raise UserError(f"{name} is drawn from by another sampler than {other}: {file.sampler}, not {first.sampler}")
