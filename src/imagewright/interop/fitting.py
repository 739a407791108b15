"""Putting tensors of official names into a model of ours: each once, of the right shape, none left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.description import unbuilt
from imagewright.networks.config import did_you_mean
from imagewright.shapes import brief
from imagewright.types import UserError

StateDict = Mapping[str, Tensor | np.ndarray[Any, Any]]

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_SHOWN = 10
"""How many keys an error sentence lists."""


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from: its official name, and what makes it ours."""

    name: str
    change: Callable[[Tensor], Tensor] | None = None


Sources = Callable[[nn.Module], Mapping[str, Source]]
"""The source of every tensor of a model, by our names."""


def fitted(
    make: Callable[[], M],
    config: Mapping[str, Any],
    state: StateDict,
    sources: Sources,
    is_constant: Callable[[str], bool] = lambda name: False,
) -> M:
    """The model with the weights of the state dict, in eval mode, float32, on the CPU.

    is_constant: official names of what is no weight; they may be there or not.
    Raises UserError naming what is missing, surplus or of the wrong shape, before a model of that size is made.
    """
    found = {key: tensor_of(key, value) for key, value in state.items() if not is_constant(key)}
    planned = unbuilt(make, config, len(found))  # so that widths that the weights have not cost nothing
    ours = _translated(planned, found, sources(planned))
    model = make()
    model.load_state_dict(ours)
    return model.eval()


def _translated(model: nn.Module, found: Mapping[str, Tensor], sources: Mapping[str, Source]) -> dict[str, Tensor]:
    expected = model.state_dict()
    names = {source.name for source in sources.values()}
    ours, misfits = {}, []
    for key, source in sources.items():
        if source.name not in found:
            continue
        given = found[source.name]
        try:
            ours[key] = given if source.change is None else source.change(given)
        except (RuntimeError, ValueError, IndexError):
            ours[key] = given
        if ours[key].shape != expected[key].shape:
            misfits.append(f"{source.name!r} {list(given.shape)} instead of {list(expected[key].shape)}")
    complaints = [
        _list("missing", [repr(s.name) for s in sources.values() if s.name not in found]),
        _list("surplus", [repr(name) for name in found if name not in names]),
        _list("of the wrong shape", misfits),
    ]
    if any(complaints):
        raise UserError("the state dict does not fit config: " + "; ".join(c for c in complaints if c))
    return ours


def _list(what: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what}: {', '.join(items[:_SHOWN])}{more}" if items else ""


def tensor_of(key: str, value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """An entry of a state dict as a float32 tensor."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float32)
    raise UserError(
        f"the state dict's {key!r} is {an(type(value).__name__)}; it must be a tensor or an array of numbers"
    )


def look_up(table: Mapping[str, T], config: Mapping[str, Any], argument: str, default: str) -> T:
    """The entry that an argument of the config names."""
    name = config.get(argument, default)
    if not isinstance(name, str) or name not in table:
        raise UserError(f"config has {argument} {brief(name)}, which is unknown{did_you_mean(str(name), table)}")
    return table[name]


def require_known(config: Mapping[str, Any], known: Iterable[str], whose: str) -> None:
    """Raise UserError for an argument that is none of those known."""
    known = set(known)
    for name in config:
        if name not in known:
            raise UserError(f"config has {name!r}, unknown to {whose}" + did_you_mean(name, known))


def require_given(config: Mapping[str, Any], needed: Iterable[str], whose: str) -> None:
    """Raise UserError where an argument is missing."""
    for name in needed:
        if name not in config:
            raise UserError(f"config of {whose} needs {name}")
