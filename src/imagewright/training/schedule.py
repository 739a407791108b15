"""How a run's phases lie in its length: shares of it, what shrinks with a shorter run, and what there is, in words.

A length below 1 is a share of the run (`config.Span`) and moves with it by itself. What a recipe has in images, as
papers do, shrinks when a run is made shorter than its recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from imagewright.training.config import TrainingConfig
from imagewright.training.experiment import Experiment
from imagewright.training.record import get_field, set_field
from imagewright.types import UserError

INTERVALS = ("log_images", "snapshot_images", "checkpoint_images", "weights_images")
RATE = ("lr_ramp_images", "lr_decay_images", "lr_step_images", "lr_cooldown_images")


def shortened(recipe: Experiment, run: Experiment, given: Collection[str] = ()) -> tuple[Experiment, list[str]]:
    """The run with the recipe's schedule in proportion, and what was changed, in words.

    That is the rate's ramp, decay, steps and cool-down, the average's half-life, and what the method counts in images.
    Fields in `given` (dotted names, as in the command) stay as the user set them; so does a run that is not shorter.
    Raises UserError where options make the rate's ramp and cool-down longer than the run; a recipe or file that is so
    by itself may be (`rate_fault` tells).
    """
    share = run.training.total_images / recipe.training.total_images
    changes: list[str] = []
    if share < 1:
        for field in _counted_in_images(run):
            value, before = get_field(run, field), get_field(recipe, field)
            if not value or value != before or field in given or value < 1:
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


def phases(run: Experiment) -> dict[str, float]:
    """What lasts how many images: the fields that count in images, by their dotted names; those that are 0 left out."""
    fields = [*_counted_in_images(run), *(f"training.{name}" for name in INTERVALS)]
    run = run.in_images()
    return {field: value for field in fields if (value := get_field(run, field))}


def rate_fault(training: TrainingConfig) -> str | None:
    """A sentence where the learning rate never reaches its height: ramp and cool-down exceed the run."""
    rate = training.in_images().optimizer
    if rate.lr_ramp_images + rate.lr_cooldown_images <= training.total_images + 1:  # each was rounded
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
