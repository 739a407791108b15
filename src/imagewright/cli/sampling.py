"""How commands name a model and a sampler: `MODEL --sampler heun --steps 18 --set S_churn=40`."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

from imagewright.models.files import ModelFile
from imagewright.samplers import PRESETS, SAMPLERS
from imagewright.samplers.generator import ImageGenerator, generator_from, sampler_from_json, sampler_to_json
from imagewright.training.distributed import pick_device
from imagewright.types import Sampler, UserError


def make_sampler(file: ModelFile, name: str | None, steps: int | None, settings: tuple[str, ...]) -> Sampler | None:
    """The sampler asked for; None = the model's own. Settings that are not given stay as the model was saved with."""
    saved = dict(file.sampler or {})
    if name is None and steps is None and not settings:
        return None
    chosen = name or saved.get("class", "heun")
    values: dict[str, Any] = saved if saved.get("class") == chosen else {"class": chosen}
    if chosen in PRESETS:
        values = sampler_to_json(PRESETS[chosen])
        chosen = values["class"]
    if chosen not in SAMPLERS:
        near = difflib.get_close_matches(chosen, [*SAMPLERS, *PRESETS], n=1)
        raise UserError(f"there is no sampler {chosen!r}; {_hint(near, [*SAMPLERS, *PRESETS])}")
    fields = {f.name for f in dataclasses.fields(SAMPLERS[chosen])}
    given = [*settings, *([f"num_steps={steps}"] if steps is not None else [])]
    for setting in given:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes name=value, got {setting!r}")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise UserError(f"sampler {chosen!r} has no setting {key!r}; {_hint(near, sorted(fields))}")
        values[key] = _parse(text)
    try:
        return sampler_from_json(values)
    except TypeError as error:
        raise UserError(f"sampler {chosen!r} with {', '.join(given)}: {error}") from None


def make_generator(
    file: ModelFile, name: str | None, steps: int | None, settings: tuple[str, ...], device: str
) -> ImageGenerator:
    """A generator on a device with the sampler asked for."""
    return generator_from(file, make_sampler(file, name, steps, settings), pick_device(device))


def _parse(text: str) -> Any:
    """A JSON value (numbers, lists, true); anything else is a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _hint(near: list[str], all_names: list[str]) -> str:
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(all_names)}"
