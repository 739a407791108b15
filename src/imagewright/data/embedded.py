"""The two sets inside the package: emoji64 (an EDM zip of our own) and scikit-learn's digits.

Sources: docs/data/emoji64.md and docs/data/digits.md, with licences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imagewright.data.image_set import ImageSet, digest, held_out
from imagewright.data.pixels import Pixels, box_reduce, with_channels
from imagewright.types import DataSpec, UserError

EMOJI64 = Path(__file__).parent / "assets" / "emoji64.zip"
EMOJI64_SHA256 = "e2a264a275083549a25717167e7d62d177d2415d81cd84593d513eab248a5efb"

_DIGITS_SIZE = 8


def open_digits(*, resolution: int | None = None, channels: int = 1, labels: bool = True) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8; grey values 0 .. 16 become round(v * 255 / 16).

    The split is a hash of the index. Raises UserError unless `resolution` divides 8.
    """
    from sklearn.datasets import load_digits  # slow to import, and the other sets do without

    if resolution is not None and _DIGITS_SIZE % resolution:
        raise UserError(f"resolution is {resolution}; digits are {_DIGITS_SIZE}x{_DIGITS_SIZE}, which it must divide")
    values, targets = load_digits(return_X_y=True)
    grey: Pixels = np.floor(values * 255 / 16 + 0.5).astype(np.uint8).reshape(-1, _DIGITS_SIZE, _DIGITS_SIZE, 1)
    pixels = with_channels(box_reduce(grey, resolution or _DIGITS_SIZE), channels)
    indices = tuple(str(i) for i in range(len(pixels)))
    return ImageSet(
        spec=DataSpec(
            name="digits",
            resolution=pixels.shape[1],
            channels=channels,
            num_classes=10 if labels else 0,
            class_names=tuple("0123456789") if labels else (),
        ),
        pixels=pixels,
        labels=targets.astype(np.int64) if labels else np.full(len(pixels), -1, dtype=np.int64),
        names=indices,
        source="digits (scikit-learn load_digits; UCI optical recognition of handwritten digits, CC BY 4.0)",
        digests=tuple(map(digest, pixels)),
        made=None if pixels.shape[1] == _DIGITS_SIZE else f"box means of {_DIGITS_SIZE}x{_DIGITS_SIZE}",
        splits=tuple("test" if held_out(i) else "train" for i in indices),
    )
