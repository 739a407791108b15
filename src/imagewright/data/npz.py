"""Images as one array in an npz, as evaluators of ADM's kind and `imagewright sample --npz` write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from imagewright.arrays import array_names, read_npz
from imagewright.data.image_set import ImageSet
from imagewright.data.pixels import box_reduce, with_channels
from imagewright.types import UserError

IMAGES = ("arr_0", "images")
LABELS = ("arr_1", "labels")
"""Names of the arrays, the first of which that is there counts."""


def open_npz(path: Path, *, resolution: int | None, channels: int | None, labels: bool) -> ImageSet:
    """uint8 [N, H, H, 1 or 3] under `arr_0` or `images`, with int labels [N] under `arr_1` or `labels`, if any.

    Labels that are all -1 are none. Raises UserError where the file, or an array in it, is another.
    """
    there = array_names(path)
    key, known = (next((k for k in names if k in there), None) for names in (IMAGES, LABELS))
    if key is None:
        raise UserError(f"{path} has {', '.join(there[:10]) or 'nothing'}; images stand under arr_0 or images")
    arrays = read_npz(path, [key, known] if known is not None and labels else [key])
    pixels, index = arrays[key], arrays.get(known or "")
    if index is not None and (index.dtype.kind != "i" or (index == -1).all()):
        index = None
    images = ImageSet.of(pixels, index, name=path.stem)
    side = images.spec.resolution
    if resolution is None and channels in (None, images.spec.channels):
        return replace(images, source=str(path))
    if resolution is not None and side % resolution:
        raise UserError(f"resolution is {resolution}; the pictures of {path} have {side}, which it must divide")
    reduced = with_channels(box_reduce(pixels, resolution or side), channels or images.spec.channels)
    made = None if resolution in (None, side) else f"box means of {side}x{side}"
    return replace(ImageSet.of(reduced, index, name=path.stem), source=str(path), made=made)
