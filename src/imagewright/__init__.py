"""imagewright: train, distil, accelerate and measure image generators.

import imagewright
images = imagewright.load("emoji64-32").generate(16, labels=5, seed=0)     # uint8 [16, 32, 32, 3]
"""

from imagewright.data import open_images
from imagewright.pretrained import load
from imagewright.types import Condition, DataSpec, UserError
from imagewright.version import __version__

__all__ = ["Condition", "DataSpec", "UserError", "__version__", "load", "open_images"]
