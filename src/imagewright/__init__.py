"""imagewright: train, distil, accelerate and measure image generators.

import imagewright
images = imagewright.load("emoji64-32").generate(16, labels=5, seed=0)     # uint8 [16, 32, 32, 3]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagewright.data import open_images
    from imagewright.pretrained import load
    from imagewright.types import Condition, DataSpec, UserError
    from imagewright.version import __version__

__all__ = ["Condition", "DataSpec", "UserError", "__version__", "load", "open_images"]
_PLACES = {
    "open_images": "data",
    "load": "pretrained",
    "Condition": "types",
    "DataSpec": "types",
    "UserError": "types",
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    """What is public, imported when it is asked for: that takes seconds, in which a command must be able to stop."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
