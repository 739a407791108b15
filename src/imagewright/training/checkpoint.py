"""The full state of a run in one safetensors file: networks, averages, optimisers, loss scales and the clock.

Randomness and data order are functions of the clock (`noise.StepNoise`, `data.Loader`), so no generator is stored.
A file is written aside, flushed and renamed: whatever kills a run, the newest checkpoint on disk is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagewright.files import replacing
from imagewright.types import UserError

FORMAT = "imagewright-checkpoint/1"
State = dict[str, Any]
"""Nested dictionaries (string keys) and lists of tensors and JSON values."""


def save_checkpoint(path: Path, state: State) -> None:
    """Write a nested state atomically: tensors as tensors, the rest as JSON in the header."""
    tensors: dict[str, Tensor] = {}
    skeleton = _split(state, "", tensors)
    # One entry: safetensors writes several in no fixed order, and equal states should be equal files.
    header = json.dumps({"format": FORMAT, "state": skeleton})
    with replacing(path) as aside:
        save_file(tensors, aside, metadata={"imagewright": header})


def load_checkpoint(path: Path) -> State:
    """Read what `save_checkpoint` wrote. Raises UserError naming the file when it is damaged or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("imagewright", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole checkpoint ({error}); remove it to go on from the one before it, if there is one"
        ) from None
    if header.get("format") != FORMAT:
        raise UserError(f"{path} has format {header.get('format')!r}; this version reads {FORMAT!r}")
    joined = _join(header["state"], tensors)
    assert isinstance(joined, dict)
    return joined


def checkpoint_path(folder: Path, images: int) -> Path:
    """Where the checkpoint after so many images lies; names sort by age."""
    return folder / f"state-{images:012d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    return sorted(folder.glob("state-*.safetensors"))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(".state-*.partial")]:
        path.unlink(missing_ok=True)


def optimizer_state(optimizer: torch.optim.Optimizer, names: list[str]) -> State:
    """An optimiser's per-parameter state by the parameter's name (group settings come from the configuration)."""
    state = optimizer.state_dict()["state"]
    return {names[index]: dict(values) for index, values in state.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, names: list[str], state: Mapping[str, Any]) -> None:
    """Inverse of `optimizer_state`."""
    index = {name: i for i, name in enumerate(names)}
    whole = optimizer.state_dict()
    whole["state"] = {index[name]: dict(values) for name, values in state.items()}
    optimizer.load_state_dict(whole)
    # Files hold rows in the plain order. Fused optimisers walk the memory of weights and moments side by side, so the
    # moments of a channels-last weight have to lie as it does, or they would be paired with the wrong numbers.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"$tensor": path}
    if isinstance(value, Mapping):
        return {k: _split(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {k: _join(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value
