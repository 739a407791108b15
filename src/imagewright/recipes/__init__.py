"""Complete runs as functions: paper x data set, with their hyper-parameters. `imagewright train NAME`.

Each module is a family: its `FAMILY` names its recipes, and its documentation's head says what it is. A new module
joins by being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType

from imagewright.training.experiment import Experiment

FIRST = ("edm", "consistency")
"""Families that are listed before the others, which are in the order of their names."""


def _families() -> dict[str, ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    ordered = [*FIRST, *(name for name in names if name not in FIRST)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in ordered}
    return {name: module for name, module in modules.items() if hasattr(module, "FAMILY")}


FAMILIES: Mapping[str, ModuleType] = _families()
"""The modules by name."""
RECIPES: Mapping[str, Callable[[], Experiment]] = {
    name: recipe for family in FAMILIES.values() for name, recipe in family.FAMILY.items()
}
"""Every recipe by its name on the command line."""

__all__ = ["FAMILIES", "RECIPES"]
