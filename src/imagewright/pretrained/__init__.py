"""Models that ship with the package, and the one way to find a model: by its name or by its folder."""

from __future__ import annotations

from pathlib import Path

import torch

from imagewright.interop.hub import PREFIX, load_from_hub
from imagewright.models.files import ModelFile, has_model, load_model
from imagewright.samplers.generator import ImageGenerator, generator_from
from imagewright.types import Sampler, UserError

_FOLDER = Path(__file__).parent


def shipped() -> list[str]:
    """Names of the models in the package."""
    return sorted(p.parent.name for p in _FOLDER.glob("*/model.safetensors"))


def find_model(name: str | Path) -> ModelFile:
    """A shipped model by name, "hub:owner/name", or the model of a run or model folder. Raises UserError for none."""
    if str(name).startswith(PREFIX):
        return load_from_hub(str(name))
    if str(name) in shipped():
        return load_model(_FOLDER / str(name))
    folder = Path(name)
    if (folder / "chain.json").exists():  # of a chain, what its last stage made
        made = [path for path in sorted(folder.glob("[0-9]*-*")) if has_model(path)]
        folder = made[-1] if made else folder
    if not has_model(folder):
        there = ", ".join(shipped()) or "none"
        raise UserError(f"{name} is neither a folder with a model.safetensors nor a shipped model ({there})")
    return load_model(folder)


def load(name: str | Path, sampler: Sampler | None = None, device: torch.device | str = "cpu") -> ImageGenerator:
    """The generator of a shipped model, a run or model folder, or one on a hub: `load("emoji64-32").generate(16)`.

    sampler: None = the one saved with the model. Raises UserError if there is no such model.
    """
    return generator_from(find_model(name), sampler, device)
