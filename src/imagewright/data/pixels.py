"""Bytes of a picture to uint8 pixels and back, box reduction, and the two ends of the [-1, 1] range.

Inside one decoded picture is uint8 [H, W, C] with C = 1 (grey) or 3 (RGB); transparency is composited on
white.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from imagewright import limits
from imagewright.data import png
from imagewright.moving import fetched, sent
from imagewright.types import UserError

Pixels = npt.NDArray[np.uint8]

_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_GREY_MODES = ("1", "L", "LA", *_WIDE_MODES)
_ALPHA_MODES = ("LA", "PA", "RGBA")


class BadPicture(Exception):  # noqa: N818 - not an error of the program, but a finding about a file
    """A file is no usable picture; the message is the reason, made for a list of `file: reason`."""


def _formats() -> tuple[str, ...]:
    """The formats we let Pillow try; EPS and its kind would start other programs, so never all of them."""
    Image.init()
    return tuple(f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM") if f in Image.OPEN)


FORMATS = _formats()
_HEIF = frozenset({b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"})
"""Brands of telephones' photographs (ISO/IEC 23008-12), whatever the file is called: their codecs are not Pillow's."""


def decode(content: bytes) -> Pixels:
    """Decode one picture: first frame, EXIF orientation applied, alpha on white, 16-bit grey scaled to 8.

    Returns uint8 [H, W, C], C = 1 for grey files and 3 for all others (palette, CMYK, ...). Of 16-bit colour
    the upper byte is kept, as Pillow has no such mode. Metadata never decides: where a PNG's text, profile or the like
    is damaged or too large, the picture is read without it.
    Raises BadPicture with the reason, whatever is wrong with the bytes.
    """
    if not content:
        raise BadPicture("the file is empty")
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF:
        raise BadPicture("is HEIC or AVIF, which is not read here; save it as JPEG or PNG")
    if not png.is_png(content):
        return _decoded(content)
    try:
        bare = png.without_metadata(content)
    except png.Damaged as fault:
        raise BadPicture(f"damaged: {fault}") from None
    try:
        return _decoded(content, png.facts(content))
    except BadPicture as first:
        try:
            return _decoded(bare, png.facts(bare))
        except BadPicture:
            raise first from None


def _decoded(content: bytes, known: png.Facts | None = None) -> Pixels:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > limits.PIXELS:
                raise BadPicture(f"more than {limits.PIXELS} pixels (decompression bomb?)")
            image.load()
            return _to_pixels(image, known)
    except BadPicture:
        raise
    except UnidentifiedImageError:
        raise BadPicture("not a picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"more than {limits.PIXELS} pixels (decompression bomb?)") from None
    except Exception as error:  # decoders answer damaged bytes with any exception there is
        raise BadPicture(f"damaged: {error}" if str(error) else "damaged") from None


def announced(content: bytes) -> int:
    """Pixels that a picture says it has, so that room can be made for them; 0 where it is none."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # `decode` says what is wrong
        return 0


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata raises anything; the pixels are whole
        return image


def _to_pixels(image: Image.Image, known: png.Facts | None) -> Pixels:
    upright = _upright(image)
    mode, transparency = upright.mode, upright.info.get("transparency")
    if mode == "F":
        raise BadPicture("floating-point pixels, whose range is not known")
    if mode in _WIDE_MODES:
        return _from_wide(np.asarray(upright), transparency)
    grey = mode in _GREY_MODES or (known is not None and known.grey)
    if known is not None and known.transparent is not None:  # in the file's levels, not in those of 8 bits
        pixels = np.asarray(upright.convert("L" if grey else "RGB"))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return np.where((pixels == known.transparent).all(-1, keepdims=True), np.uint8(255), pixels)
    if mode in _ALPHA_MODES or transparency is not None:
        return _on_white(np.asarray(upright.convert("RGBA")))[..., : 1 if grey else 3]
    pixels = np.asarray(upright.convert("L" if grey else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _from_wide(values: npt.NDArray[Any], transparency: Any) -> Pixels:
    """16-bit grey to 8: v / 257, rounded, so that 65535 -> 255. Pillow's own conversion clips instead."""
    if values.min() < 0 or values.max() > 65535:
        raise BadPicture(f"grey values from {values.min()} to {values.max()}; at most 16 bits are understood")

    def strip(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        wide = rows.astype(np.int64)
        out = (2 * wide + 257) // 514
        return np.where(wide == transparency, 255, out) if isinstance(transparency, int) else out

    return _by_strips(strip, values)[..., None]


def _on_white(rgba: Pixels) -> Pixels:
    """Composite uint8 [H, W, 4] with straight alpha on white, rounded half up; [H, W, 3]."""

    def strip(rows: Pixels) -> npt.NDArray[Any]:
        color, alpha = rows[..., :3].astype(np.int32), rows[..., 3:].astype(np.int32)
        return (2 * (color * alpha + 255 * (255 - alpha)) + 255) // 510

    return _by_strips(strip, rgba)


def _by_strips(function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], values: npt.NDArray[Any]) -> Pixels:
    """A function of each value alone, to uint8, a few rows at once: what it needs in between stays small."""
    step = max(1, (1 << 20) // max(values[:1].size, 1))
    parts = [function(values[at : at + step]).astype(np.uint8) for at in range(0, len(values), step)]
    return np.concatenate(parts) if parts else function(values).astype(np.uint8)


def encode_png(pixels: Pixels) -> bytes:
    """uint8 [H, W, C], C = 1 or 3, as an optimised PNG; one build of Pillow gives the same bytes."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def box_reduce(pixels: Pixels, resolution: int) -> Pixels:
    """Exact block means, rounded half up: uint8 [..., H, H, C] -> [..., resolution, resolution, C].

    Raises ValueError unless `resolution` divides H.
    """
    size = pixels.shape[-2]
    if resolution < 1 or size % resolution:
        raise ValueError(f"{size} pixels cannot be reduced to {resolution} by whole blocks")
    k = size // resolution
    if k == 1:
        return pixels
    rows = pixels.reshape(*pixels.shape[:-3], resolution, k, size, pixels.shape[-1]).sum(axis=-3, dtype=np.int64)
    total = rows.reshape(*rows.shape[:-2], resolution, k, pixels.shape[-1]).sum(axis=-2)
    out: Pixels = ((2 * total + k * k) // (2 * k * k)).astype(np.uint8)
    return out


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """[..., C] to 1 or 3 channels: grey is repeated; RGB becomes BT.601 luma, .299 R + .587 G + .114 B."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    return _by_strips(lambda rows: (rows.astype(np.int64) @ np.array([299, 587, 114]) + 500) // 1000, pixels)[..., None]


def from_uint8(images: Pixels | Tensor, device: torch.device | str | None = None) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]: v / 127.5 - 1. Bytes travel, not numbers.

    device: None = where they are.
    """
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements=("C", "W")))
    pixels = pixels if device is None else sent(pixels, device)
    return pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Pixels:
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]; values outside are clamped, halves round up.

    Inverse of `from_uint8` on its range. Raises UserError when there is a NaN (a model that diverged).
    """
    return uint8_later(images)()


def uint8_later(images: Tensor) -> Callable[[], Pixels]:
    """`to_uint8`, begun where the images are; what is returned waits for it, after the caller has begun other work."""
    bad = images.isnan().flatten(1).any(1).sum()
    scaled = ((images.detach().float() + 1) * 127.5).clamp(0, 255)
    coming = fetched(bad, (scaled + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 1).contiguous())

    def finish() -> Pixels:
        bad, pixels = coming()
        if int(bad):
            raise UserError(f"{int(bad)} of {len(images)} images contain NaN; the model has diverged")
        out: Pixels = pixels.numpy()
        return out

    return finish
