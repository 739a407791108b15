"""Models that ship with the package, and the one way to find a model: by its name or by its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from imagewright.interop.hub import PREFIX, load_from_hub
from imagewright.models.files import ModelFile, has_model, load_model
from imagewright.models.weighted import at_weight
from imagewright.samplers.generator import ImageGenerator, generator_from
from imagewright.types import Sampler, UserError

_FOLDER = Path(__file__).parent
RUN = "experiment.json"
"""The file that makes a folder a run, whether or not it has made a model yet."""
CHAIN = "chain.json"
"""The file that makes a folder one of several runs, each in a folder of its own: `1-teacher`, `2-student`."""


def shipped() -> list[str]:
    """Names of the models in the package."""
    return sorted(p.parent.name for p in _FOLDER.glob("*/model.safetensors"))


def find_model(name: str | Path) -> ModelFile:
    """A shipped model by name, "hub:owner/name", or the model of a run or model folder. Raises UserError for none."""
    if str(name).startswith(PREFIX):
        return load_from_hub(str(name))
    if str(name) in shipped():
        return load_model(_FOLDER / str(name))
    folder = folder_of(name)
    if not has_model(folder) and (Path(name) / RUN).exists():
        raise UserError(f"{name} is a run that has made no model yet; go on with: imagewright train --resume {name}")
    if not has_model(folder):
        there = ", ".join(shipped()) or "none"
        raise UserError(f"{name} is neither a folder with a model.safetensors nor a shipped model ({there})")
    return load_model(folder)


def folder_of(name: str | Path) -> Path:
    """The folder that a name of a run or model means: of a chain that of the last stage which made a model."""
    folder = Path(name)
    if not (folder / CHAIN).exists():
        return folder
    made = [path for path in folder.glob("[0-9]*-*") if has_model(path)]
    return max(made, key=_number_of_stage, default=folder)


def _number_of_stage(folder: Path) -> int:
    number = folder.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def load(
    name: str | Path,
    sampler: Sampler | None = None,
    device: torch.device | str = "cpu",
    *,
    weight: float | None = None,
) -> ImageGenerator:
    """The generator of a shipped model, a run or model folder, or one on a hub: `load("emoji64-32").generate(16)`.

    sampler: None = the one saved with the model. weight: strength of the guidance, of a model that is told it; None =
    its own. Raises UserError if there is no such model, or for a strength that it was not trained for.
    """
    file = find_model(name)
    file = file if weight is None else replace(file, model=at_weight(file.model, weight))
    return generator_from(file, sampler, device)
