"""Models that ship with the package, and the one way to find a model: by its name or by its folder."""

from __future__ import annotations

from pathlib import Path

from imagewright.models.files import ModelFile, load_model
from imagewright.types import UserError

_FOLDER = Path(__file__).parent


def shipped() -> list[str]:
    """Names of the models in the package."""
    return sorted(p.parent.name for p in _FOLDER.glob("*/model.json"))


def find_model(name: str | Path) -> ModelFile:
    """A shipped model by name, or the model of a run or model folder. Raises UserError if there is neither."""
    if str(name) in shipped():
        return load_model(_FOLDER / str(name))
    folder = Path(name)
    if not (folder / "model.json").exists():
        raise UserError(
            f"{name} is neither a folder with a model.json nor a shipped model ({', '.join(shipped()) or 'none'})"
        )
    return load_model(folder)
