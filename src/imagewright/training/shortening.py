"""A run shorter than its recipe's keeps the recipe's shape: what the recipe counts in images shrinks with the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from imagewright.training.config import TrainingConfig
from imagewright.training.experiment import Experiment
from imagewright.training.record import get_field, set_field
from imagewright.types import UserError

RATE = ("lr_ramp_images", "lr_decay_images", "lr_cooldown_images")


def shortened(recipe: Experiment, run: Experiment, given: Collection[str] = ()) -> tuple[Experiment, list[str]]:
    """The run with the recipe's schedule in proportion, and what was changed, in words.

    That is the rate's ramp, decay and cool-down, the average's half-life, and what the method counts in images. Fields
    in `given` (dotted names, as in the command) stay as the user set them, and so does a run that is not shorter.
    Raises UserError where options make the rate's ramp and cool-down longer than the run; a recipe or file that is so
    by itself may be (`rate_fault` tells).
    """
    share = run.training.total_images / recipe.training.total_images
    changes: list[str] = []
    if share < 1:
        for field in _counted_in_images(run):
            value, before = get_field(run, field), get_field(recipe, field)
            if not value or value != before or field in given:
                continue
            new = type(value)(max(round(value * share), 1))
            run = set_field(run, field, new)
            changes.append(f"{field} {value:,} -> {new:,}")
    too_long = rate_fault(run.training)
    if too_long and rate_fault(recipe.training) is None:
        raise UserError(too_long)
    return run, changes


def as_begun(run: Experiment, record: Mapping[str, Any], given: Collection[str] = ()) -> Experiment:
    """The run with the schedule that it was begun with, by its record (`record.to_json`); `given` as in `shortened`."""
    for field in _counted_in_images(run):
        value = get_field(record, field)
        if isinstance(value, (int, float)) and field not in given:
            run = set_field(run, field, value)
    return run


def rate_fault(training: TrainingConfig) -> str | None:
    """A sentence where the learning rate never reaches its height: ramp and cool-down exceed the run."""
    rate = training.optimizer
    if rate.lr_ramp_images + rate.lr_cooldown_images <= training.total_images:
        return None
    return (
        f"training.total_images is {training.total_images}; the rate's ramp ({rate.lr_ramp_images} images) and "
        f"cool-down ({rate.lr_cooldown_images}) together must be no longer, or it never reaches its height: set "
        "training.optimizer.lr_ramp_images and training.optimizer.lr_cooldown_images"
    )


def _counted_in_images(run: Experiment) -> Iterator[str]:
    yield from (f"training.optimizer.{name}" for name in RATE)
    yield "training.ema.halflife_images"
    for field in dataclasses.fields(run.method):
        if field.name.endswith("_images") and isinstance(getattr(run.method, field.name), int | float):
            yield f"method.{field.name}"
