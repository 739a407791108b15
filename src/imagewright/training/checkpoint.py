"""The full state of a run in one safetensors file: networks, averages, optimisers, loss scales and the clock.

Randomness and data order are functions of the clock (`noise.StepNoise`, `data.Loader`), so no generator is stored.
A file is written aside, flushed and renamed: whatever kills a run, the newest checkpoint on disk is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor

from imagewright.arrays import read_head, read_tensors
from imagewright.files import parse_json, replacing
from imagewright.models.files import weights_hash
from imagewright.shapes import brief, misfit
from imagewright.types import UserError

FORMAT = "imagewright-checkpoint/2"
State = dict[str, Any]
"""Nested dictionaries (string keys) and lists of tensors and JSON values."""


class _Head(TypedDict):
    format: str
    run: str | None
    sha256: str
    state: dict[str, Any]


def save_checkpoint(path: Path, state: State, run: str | None = None) -> None:
    """Write a nested state atomically: tensors as tensors, the rest as JSON in the header, with a checksum of all.

    run: what the state is of (`record.identity`); no other run goes on from it.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _split(state, "", tensors)
    head = {"format": FORMAT, "run": run, "sha256": _checksum(skeleton, tensors), "state": skeleton}
    # One entry: safetensors writes several in no fixed order, and equal states should be equal files.
    with replacing(path) as aside:
        save_file(tensors, aside, metadata={"imagewright": json.dumps(head)})


def load_checkpoint(path: Path, run: str | None = None) -> State:
    """Read what `save_checkpoint` wrote, after so many images as the name says.

    run: what it has to be of; None = of any. Raises UserError naming the file when it is damaged, of another format, of
    another run, or of another moment.
    """
    try:
        head = parse_json(read_head(path).texts.get("imagewright", "{}"), f"{path}: its state", dict)
        if head.get("format") != FORMAT:
            raise UserError(f"{path} has format {head.get('format')!r}; this version reads {FORMAT!r}")
        fault = misfit(head, _Head)
        if fault is not None:
            raise UserError(f"{path}: its state is damaged: {fault}")
        if run is not None and head["run"] not in (None, run):
            raise UserError(f"{path} is of another run than the folder's experiment.json")
        tensors = read_tensors(path)
        if _checksum(head["state"], tensors) != head["sha256"]:
            raise UserError(f"{path} does not have the checksum that it was written with")
        state = _join(head["state"], tensors)
    except KeyError as error:
        raise UserError(f"{path} lacks the tensor {error}") from None
    except UserError as error:
        raise UserError(
            f"{path} is not a whole checkpoint of this run ({str(error).removeprefix(f'{path} ')}); remove it to go on "
            "from the one before it, if there is one"
        ) from None
    assert isinstance(state, dict)
    images = state.get("images")
    if type(images) is not int or path.name != checkpoint_path(path.parent, images).name:
        raise UserError(f"{path} holds the state after {brief(images)} images, not what its name says")
    return state


def _checksum(skeleton: Any, tensors: Mapping[str, Tensor]) -> str:
    return sha256(f"{json.dumps(skeleton, sort_keys=True)} {weights_hash(tensors)}".encode()).hexdigest()


def require_fit(found: Any, wanted: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError unless tensors are those that are wanted, by name, shape and number type.

    To be asked before any is used: an optimiser walks the memory of weights and moments side by side.
    """
    if not isinstance(found, Mapping):
        raise UserError(f"{what} has no tensors")
    for name in sorted({*found, *wanted}):
        if name not in wanted or not isinstance(found.get(name), Tensor):
            raise UserError(f"{what} {'has another' if name in found else 'lacks'} {name!r}")
        ours, theirs = wanted[name], found[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise UserError(
                f"{what} has {name!r} as {theirs.dtype} {list(theirs.shape)}; this run's is "
                f"{ours.dtype} {list(ours.shape)}"
            )


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
    """Inverse of `optimizer_state`. Raises UserError, before anything moves, where a moment is not like its weight."""
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    for name, values in state.items():
        if name not in parameters:
            raise UserError(f"the checkpoint's optimiser knows {name!r}, which this run does not train")
        require_fit(values, _moments(optimizer, parameters[name]), f"the checkpoint's optimiser of {name!r}")
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


def _moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """What an optimiser keeps of a weight: tensors of the right shapes."""
    step = {"step": torch.tensor(0.0)}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": weight}
    if not isinstance(optimizer, torch.optim.Adafactor):
        return {**step, "exp_avg": weight, "exp_avg_sq": weight}
    if weight.ndim < 2:
        return {**step, "variance": weight}
    return {**step, "row_var": weight[..., :1], "col_var": weight[..., :1, :]}


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
