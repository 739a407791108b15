"""Pictures of any shape to one square size: cut, padded or squashed, and brought to it by a named filter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagewright.data.pixels import Pixels, box_reduce, with_channels

Fit = Literal["crop", "pad", "squash"]
Filter = Literal["box", "bicubic", "lanczos"]
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
_WORDS = {
    "crop": "the squares in the middle of the pictures",
    "pad": "whole pictures on white squares",
    "squash": "whole pictures squashed to squares",
}
_WHITE = 255


def fit_square(pixels: Pixels, resolution: int, fit: Fit, filter: Filter) -> Pixels:
    """A picture of any size as a square of one: uint8 [H, W, C] -> [resolution, resolution, C].

    fit: "crop", the largest square in the middle (an odd row or column more is cut at the end); "pad", all of it on a
    white square (the odd row or column more is at the end); "squash", each side by a factor of its own.
    filter: "box", the mean over the area of each new pixel; or Pillow's "bicubic" or "lanczos".
    A picture that is smaller is enlarged by the same filter.
    """
    height, width = pixels.shape[:2]
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resize(pixels[top : top + side, left : left + side], resolution, resolution, filter)
    if fit == "squash":
        return resize(pixels, resolution, resolution, filter)
    longer = max(height, width)
    rows, columns = (max(1, round(resolution * length / longer)) for length in (height, width))
    top, left = (resolution - rows) // 2, (resolution - columns) // 2
    square = np.full((resolution, resolution, pixels.shape[2]), _WHITE, dtype=np.uint8)
    square[top : top + rows, left : left + columns] = resize(pixels, rows, columns, filter)
    return square


def resize(pixels: Pixels, height: int, width: int, filter: Filter) -> Pixels:
    """uint8 [H, W, C] -> [height, width, C] by a filter, as in `fit_square`."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if filter == "box":  # Pillow's takes a pixel whole or not at all
        square = pixels.shape[0] == pixels.shape[1] and height == width and pixels.shape[0] % height == 0
        return box_reduce(pixels, height) if square else _area_means(pixels, height, width)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized: Pixels = np.asarray(image.resize((width, height), _RESAMPLING[filter]))
    return resized.reshape(height, width, -1)


def _area_means(pixels: Pixels, height: int, width: int) -> Pixels:
    """Means over parts of pixels, rounded half up: uint8 [H, W, C] -> [height, width, C]."""
    rows, columns = _overlaps(pixels.shape[0], height), _overlaps(pixels.shape[1], width)
    means = np.stack([_one_row(pixels, row, columns) for row in rows])
    out: Pixels = np.floor(means + 0.5 + 1e-9).astype(np.uint8)
    return out


def _overlaps(length: int, parts: int) -> npt.NDArray[np.float64]:
    """[parts, length]: which share of each of so many equal parts each pixel is."""
    edges = np.linspace(0, length, parts + 1)
    first = np.arange(length)
    overlap = np.minimum(edges[1:, None], first + 1) - np.maximum(edges[:-1, None], first)
    shares: npt.NDArray[np.float64] = np.clip(overlap, 0, None) * parts / length
    return shares


def _one_row(pixels: Pixels, row: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rows = np.flatnonzero(row)
    part = slice(rows[0], rows[-1] + 1)
    means: npt.NDArray[np.float64] = columns @ np.tensordot(row[part], pixels[part].astype(np.float64), 1)
    return means


@dataclass(frozen=True)
class Fitting:
    """What is done to every picture of a set: grey first, reduced then.

    fit: None reduces by whole blocks alone; a size that they do not allow is left as it is, for the complaint.
    """

    resolution: int | None
    channels: int | None
    fit: Fit | None = None
    filter: Filter = "lanczos"

    def __call__(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        pixels = with_channels(pixels, 1) if self.channels == 1 else pixels
        if self.resolution is None:
            return pixels
        if self.fit is not None:
            return fit_square(pixels, self.resolution, self.fit, self.filter)
        whole = height == width and height % self.resolution == 0
        return box_reduce(pixels, self.resolution) if whole else pixels

    def words(self, sizes: Collection[tuple[int, int]]) -> str | None:
        """What was done to pictures of these sizes (width, height); None where nothing was."""
        side = self.resolution
        if side is None or set(sizes) == {(side, side)}:
            return None
        if self.fit is None:
            return "box means of " + " and ".join(f"{s}x{s}" for s in sorted({w for w, _ in sizes}))
        shorter = max if self.fit == "pad" else min
        enlarged = sum(shorter(size) < side for size in sizes)
        return f"{_WORDS[self.fit]}, by {self.filter} filter" + (f", {enlarged} enlarged" if enlarged else "")
