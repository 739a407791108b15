"""The full state of a run: networks, averages, optimisers, loss scales and the clock.

One safetensors file, `state-IMAGES.safetensors`. Of a run whose processes have a share of their networks each it holds
what is whole, and names the files beside it, one of each process, that hold their rows (`training.shares`):
`rows-IMAGES-K-of-N.safetensors`. It is read on any number of processes.

Randomness and data order are functions of the clock (`noise.StepNoise`, `data.Loader`), so no generator is stored.
A file is written aside, flushed and renamed, that which names the others last: whatever kills a run, the newest
checkpoint on disk is whole.

Own files, and not `torch.distributed.checkpoint`: that writes its plan as a pickle (`.metadata`), which would have to
be executed to read it; its safetensors writer is younger than the torch that this package runs with, takes tensors
alone, and knows no checksum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from imagewright.arrays import read_head, read_tensors
from imagewright.files import parse_json, replacing
from imagewright.models.files import weights_hash
from imagewright.shapes import brief, misfit
from imagewright.training.shares import Rows, Share
from imagewright.types import UserError

FORMAT = "imagewright-checkpoint/2"
EARLIER = "imagewright-checkpoint/1"
"""Without a checksum, and without a word on the run that it is of."""
State = dict[str, Any]
"""Nested dictionaries (string keys) and lists of tensors, shares of tensors and JSON values."""


class _Head(TypedDict):
    format: str
    run: str | None
    sha256: str
    state: dict[str, Any]
    rows: NotRequired[list[str]]


class Snapshot:
    """A state as it is now, in memory of its own, ready to be written while the run goes on."""

    def __init__(self, state: State) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._skeleton = _split(state, "", self._tensors, self._rows)

    def write_rows(self, path: Path, rank: int, world: int) -> str:
        """Write this process's rows, one of `world` files beside the checkpoint at `path`. Returns its checksum."""
        with replacing(_rows_path(path, rank, world)) as aside:
            save_file(self._rows, aside)
        return weights_hash(self._rows)

    def write(self, path: Path, run: str | None = None, rows: Sequence[str] = ()) -> None:
        """Write what is whole. run: what the state is of (`record.identity`); no other run goes on from it.

        rows: checksums of what each process has written of the rest.
        """
        head = {
            "format": FORMAT,
            "run": run,
            "sha256": _checksum(self._skeleton, self._tensors),
            "state": self._skeleton,
            **({"rows": list(rows)} if rows else {}),
        }
        # One entry: safetensors writes several in no fixed order, and equal states should be equal files.
        with replacing(path) as aside:
            save_file(self._tensors, aside, metadata={"imagewright": json.dumps(head)})


def save_checkpoint(path: Path, state: State, run: str | None = None) -> None:
    """Write a nested state without shares atomically: tensors as tensors, the rest as JSON in the header."""
    Snapshot(state).write(path, run)


def load_checkpoint(path: Path, run: str | None = None, *, whole: bool = True) -> State:
    """Read what was written, after so many images as the name says.

    run: what it has to be of; None = of any. whole: put tensors that several processes have written together; else they
    are `Rows`, which are read where they are asked for. Raises UserError naming the file when it is damaged, of another
    format, of another run, or of another moment.
    """
    try:
        head = _read_head(path)
        if run is not None and head["run"] not in (None, run):
            raise UserError(f"{path} is of another run than the folder's experiment.json")
        tensors = read_tensors(path)
        if head["format"] == FORMAT and _checksum(head["state"], tensors) != head["sha256"]:
            raise UserError(f"{path} does not have the checksum that it was written with")
        state = _join(head["state"], tensors, _read_rows(path, head.get("rows", [])), whole)
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


def run_of(path: Path) -> str | None:
    """The run that a checkpoint says it is of; None where it does not say. Raises UserError when it is damaged."""
    return _read_head(path)["run"]


def _read_head(path: Path) -> _Head:
    texts, where = read_head(path).texts, f"{path}: its state"
    head = parse_json(texts.get("imagewright", "{}"), where, dict)
    if texts.get("format") == EARLIER:  # the first ones had two entries
        head = {"format": EARLIER, "state": parse_json(texts.get("state", "{}"), where, dict)}
    if head.get("format") == EARLIER:
        head = {"run": None, "sha256": "", **head}
    elif head.get("format") != FORMAT:
        raise UserError(f"{path} has format {brief(head.get('format'))}; this version reads {FORMAT!r}")
    fault = misfit(head, _Head)
    if fault is not None:
        raise UserError(f"{path}: its state is damaged: {fault}")
    return cast(_Head, head)


def _read_rows(path: Path, checksums: Sequence[str]) -> dict[str, Rows]:
    """Tensors in pieces by their names, from the files of all processes that wrote a checkpoint."""
    pieces: dict[str, list[Tensor]] = {}
    for rank, checksum in enumerate(checksums):
        there = _rows_path(path, rank, len(checksums))
        found = read_tensors(there)
        if weights_hash(found) != checksum:
            raise UserError(f"{there} does not have the checksum that it was written with")
        for name, piece in found.items():
            pieces.setdefault(name, []).append(piece)
    for name, each in pieces.items():
        if any(p.ndim == 0 or p.shape[1:] != each[0].shape[1:] or p.dtype != each[0].dtype for p in each):
            raise UserError(f"{path} has rows of {name!r} that do not fit each other")
    return {name: Rows(each) for name, each in pieces.items()}


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


def _rows_path(path: Path, rank: int, world: int) -> Path:
    return path.with_name(f"{path.stem.replace('state', 'rows')}-{rank + 1:04d}-of-{world:04d}.safetensors")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    return sorted(folder.glob("state-*.safetensors"))


def newest(folder: Path) -> int | None:
    """The images after which the newest whole checkpoint of a folder was written; None without one."""
    found = checkpoints(folder)
    return int(found[-1].stem.removeprefix("state-")) if found else None


def prune(folder: Path, keep: int, world: int = 1) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left behind.

    world: processes whose rows the newest one has; it may replace one of the same moment that others have written.
    """
    found = checkpoints(folder)
    newest = found[-1].stem.removeprefix("state-") if found else ""
    kept = {path.stem.removeprefix("state-") for path in found[-keep:]}
    gone = [*found[:-keep], *folder.glob(".state-*.partial")]
    for path in [*folder.glob("rows-*.safetensors"), *folder.glob(".rows-*.partial")]:
        match = _ROWS.fullmatch(path.name)
        if match and match["partial"]:
            if match["images"] < newest:  # else one may be being written
                gone.append(path)
        elif match and match["images"] <= newest:
            others = match["images"] == newest and int(match["world"]) != world
            if others or match["images"] not in kept:
                gone.append(path)
    for path in gone:
        path.unlink(missing_ok=True)


_ROWS = re.compile(r"\.?rows-(?P<images>\d{12})-\d{4}-of-(?P<world>\d{4})\.safetensors(?P<partial>\..*)?")


def copied(found: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Put tensors where others of the same names lie."""
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(found[name])


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


def _split(value: Any, path: str, tensors: dict[str, Tensor], rows: dict[str, Tensor]) -> Any:
    if isinstance(value, Share):
        if len(value.rows):
            rows[path] = value.rows.detach().cpu().clone().contiguous()
        return {"$rows": path}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"$tensor": path}
    if isinstance(value, Mapping):
        return {k: _split(v, f"{path}/{k}", tensors, rows) for k, v in value.items()}
    if isinstance(value, list):
        return [_split(v, f"{path}/{i}", tensors, rows) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], whole: bool) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[str(value["$tensor"])]
        if value.keys() == {"$rows"}:
            found = rows[str(value["$rows"])]
            return found.whole() if whole else found
        return {k: _join(v, tensors, rows, whole) for k, v in value.items()}
    if isinstance(value, list):
        return [_join(v, tensors, rows, whole) for v in value]
    return value
