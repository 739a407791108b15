"""The yardstick of every likelihood: what lossless picture files take, in bits per dimension.

PNG and WebP (lossless), by Pillow at their strongest settings; the whole file counts, header and all. Small pictures
are mostly header, so the same pictures are also written side by side, as one sheet: there the codec learns from all of
them together, which no model that answers image by image may do.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
SETTINGS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}
CODECS = {
    "png": "PNG, one file an image",
    "webp": "WebP lossless, one file an image",
    "png_sheet": "PNG, all images in one",
    "webp_sheet": "WebP lossless, all images in one",
}
"""What `codec_bits` measures, in words."""
MOST_SIDE = 16_383
"""Pixels a side of the largest WebP picture."""


def codec_bits(pixels: Pixels, on_progress: Callable[[int], None] | None = None) -> dict[str, float]:
    """Bits per dimension of "png", "webp" (files one by one), "png_sheet", "webp_sheet" (all in as few as may be).

    pixels: uint8 [n, H, W, C], C = 1 or 3. on_progress: called with the number of pictures written one by one.
    """
    sizes = dict.fromkeys(SETTINGS, 0)
    for i, picture in enumerate(pixels):
        for name in SETTINGS:
            sizes[name] += file_size(picture, name)
        if on_progress is not None:
            on_progress(i + 1)
    whole = sheets(pixels)
    sizes |= {f"{name}_sheet": sum(file_size(sheet, name) for sheet in whole) for name in SETTINGS}
    return {name: 8 * size / pixels.size for name, size in sizes.items()}


def file_size(picture: Pixels, name: str) -> int:
    """Bytes of a picture [H, W, C] as a file: "png" or "webp"."""
    stream = io.BytesIO()
    grey = picture.shape[2] == 1
    Image.fromarray(picture[:, :, 0] if grey else picture).save(stream, **SETTINGS[name])  # type: ignore[arg-type]
    return stream.tell()


def sheets(pixels: Pixels) -> list[Pixels]:
    """The pictures in rows, side by side, in nearly square sheets of at most MOST_SIDE pixels; [H', W', C] each.

    Every sheet is full: what does not fill a last row makes a sheet of one row.
    """
    n, height, width, channels = pixels.shape
    columns = max(1, min(math.isqrt(n), MOST_SIDE // width))
    most = columns * (MOST_SIDE // height)
    found = []
    for start in range(0, n, most):
        part = pixels[start : start + most]
        full = len(part) // columns * columns
        for some, across in ((part[:full], columns), (part[full:], len(part) - full)):
            if len(some):
                grid = some.reshape(-1, across, height, width, channels).swapaxes(1, 2)
                found.append(grid.reshape(-1, across * width, channels))
    return found
