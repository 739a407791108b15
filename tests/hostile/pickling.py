"""Pickles laid out as the official programs write them: persistent classes that carry source code, storages within."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

SOURCE = "import os\nos.system('touch OWNED')\n"
"""The source text that each persistent object carries; whoever executes it is found out."""


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a pickle was executed")


class Persistent:
    """An object that pickles as a persistent one."""

    def __init__(self, class_name: str, state: Mapping[str, Any]) -> None:
        self.class_name, self.state = class_name, dict(state)

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,)


class EasyDict(dict):
    """dnnlib's."""


@contextmanager
def official_names() -> Iterator[None]:
    """While a pickle is written, the classes above are where the official programs have them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = persistence.__name__, util.__name__
    parents = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    modules = {**parents, persistence.__name__: persistence, util.__name__: util}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


def network(class_name: str, state: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> Persistent:
    """A tree of persistent modules with the tensors of a state dict."""
    root = _module(class_name, {"_init_args": (), "_init_kwargs": dict(arguments)})
    for name, tensor in state.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            at = at.state["_modules"].setdefault(part, _module("Part"))
        buffer = last in ("freqs", "phases", "resample_filter", "u")
        group = "_buffers" if buffer else "_parameters"
        at.state[group][last] = tensor if buffer else torch.nn.Parameter(tensor, requires_grad=False)
    return root


def _module(class_name: str, more: Mapping[str, Any] = {}) -> Persistent:
    state: dict[str, Any] = {"training": False, "_non_persistent_buffers_set": set()}
    state |= {name: OrderedDict() for name in ("_parameters", "_buffers", "_modules", "_backward_hooks")}
    return Persistent(class_name, {**state, "_is_full_backward_hook": None, **more})


def dumped(content: Any, protocol: int = 4) -> bytes:
    """The pickle of a dictionary of networks."""
    with official_names():
        return pickle.dumps(content, protocol=protocol)
