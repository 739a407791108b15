"""imagewright: train, distil, accelerate and measure image generators.

import imagewright
images = imagewright.load("emoji64-32").generate(16, labels=5, seed=0)     # uint8 [16, 32, 32, 3]

Names are imported when they are first used, so that the command's help and its answer to a mistake need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imagewright.errors import UserError
from imagewright.version import __version__

if TYPE_CHECKING:
    from imagewright.data import open_images
    from imagewright.pretrained import load
    from imagewright.types import Condition, DataSpec

_LATER = {"Condition": "types", "DataSpec": "types", "load": "pretrained", "open_images": "data"}

__all__ = ["Condition", "DataSpec", "UserError", "__version__", "load", "open_images"]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'imagewright' has no attribute {name!r}")
    return getattr(importlib.import_module(f"imagewright.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
