"""Grids of pictures: the snapshot that a run leaves at intervals, and the general sheet other commands use."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagewright import limits
from imagewright.data.pixels import BadPicture, decode
from imagewright.files import read_bytes, replacing
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import UserError

Images = npt.NDArray[np.uint8]
ORIGIN = "imagewright"
"""Keyword of the text in a PNG that says where the picture comes from."""


def grid(images: Images, columns: int, gap: int = 1) -> Images:
    """Arrange uint8 [N, H, W, C] row by row on white, `gap` pixels apart: uint8 [H', W', C]."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet


def coloured(frame: Images) -> Images:
    """Frames of events, uint8 [..., 2], on white: red where brightness rose, blue where it fell, as RGB."""
    rose, fell = (255 - frame[..., axis].astype(np.int64) for axis in (0, 1))
    rgb: Images = np.stack([fell, np.minimum(rose, fell), rose], -1).astype(np.uint8)
    return rgb


def save_image(path: Path, image: Images, scale: int = 1, origin: str | None = None, *, flush: bool = True) -> None:
    """Write one uint8 [H, W, C] picture as PNG, atomically; `scale` enlarges every pixel to a square of that size.

    origin: where the picture comes from, kept in the file; `image_origin` reads it. flush: as in `replacing`.
    Of 2 channels it is a frame of events, which is coloured. Raises UserError for pictures of more than 3.
    """
    if image.shape[2] == 2:
        image = coloured(image)
    if image.shape[2] not in (1, 3):
        raise UserError(
            f"a picture of {image.shape[2]} channels is none; a model of latents draws pictures once it has their "
            "autoencoder (`imagewright import ... --autoencoder RUN`)"
        )
    enlarged = image.repeat(scale, 0).repeat(scale, 1)
    told = PngInfo()
    if origin is not None:
        told.add_text(ORIGIN, origin)
    with replacing(path, flush=flush) as aside:
        picture = Image.fromarray(enlarged[:, :, 0] if enlarged.shape[2] == 1 else enlarged)
        picture.save(aside, format="PNG", pnginfo=told)


def image_origin(path: Path) -> str | None:
    """What `save_image` was told of a picture's origin; None for a file without it, or that is no PNG."""
    try:
        content = read_bytes(path, limits.PICTURE_BYTES)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.width * image.height > limits.PIXELS:
                return None
            image.load()
            found = image.info.get(ORIGIN)
    except Exception:  # a stranger's file may be anything
        return None
    return found if isinstance(found, str) else None


def read_image(path: Path, shape: tuple[int, ...]) -> Images:
    """A picture that `save_image` wrote, uint8 of that shape [H, W, C]. Raises UserError where it is another."""
    try:
        pixels = decode(read_bytes(path, limits.PICTURE_BYTES))
    except BadPicture as finding:
        raise UserError(f"{path}: {finding}") from None
    if shape[2:] == (2,) and pixels.shape[2] == 3:
        pixels = 255 - pixels[..., [2, 0]]  # `coloured` undone
    if pixels.shape != shape:
        raise UserError(f"{path} is {pixels.shape}, not {shape}; choose another --out, or move it away")
    return pixels


def snapshot_path(run: Path, images: int) -> Path:
    """Where a run's snapshot after so many images lies."""
    return run / "samples" / f"{images:012d}.png"


def class_grid_labels(num_classes: int, columns: int) -> npt.NDArray[np.int64] | None:
    """Labels of a sheet with one class per row (at most ten rows), or None for a model without classes."""
    if not num_classes:
        return None
    return np.repeat(np.arange(min(num_classes, 10), dtype=np.int64), columns)


def save_grid(path: Path, generator: ImageGenerator, columns: int = 10, seed: int = 0) -> None:
    """A sheet of samples from fixed seeds: one class per row, or ten rows of whatever comes."""
    labels = class_grid_labels(generator.spec.num_classes, columns)
    images = generator.generate(10 * columns if labels is None else len(labels), labels=labels, seed=seed)
    save_image(path, grid(images, columns), scale=max(1, 64 // generator.spec.resolution))
