"""The version, and the versions of what computes, where every module can import them."""

import platform
import sys

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """What a recorded number depends on besides its settings."""
    import numpy as np  # not needed to say the version
    import torch

    return {
        "imagewright": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }
