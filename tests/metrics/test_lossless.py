"""Bits of lossless files: they hold every pixel, noise costs its entropy, sheets lose none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from imagewright.metrics.lossless import SETTINGS, codec_bits, file_size, sheets


def noise(n: int, side: int, channels: int, values: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, values, (n, side, side, channels)).astype(np.uint8)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_files_are_lossless(name: str, channels: int) -> None:
    picture = noise(1, 16, channels)[0]
    stream = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if channels == 1 else picture).save(stream, **SETTINGS[name])
    back = np.asarray(Image.open(stream).convert("L" if channels == 1 else "RGB")).reshape(picture.shape)
    assert np.array_equal(back, picture)
    assert file_size(picture, name) == len(stream.getvalue())


def test_noise_takes_its_entropy_and_headers_shrink_in_a_sheet() -> None:
    found = codec_bits(noise(100, 8, 3))
    assert all(found[name] > 8 for name in ("png", "webp"))
    assert all(8 < found[f"{name}_sheet"] < 8.3 for name in ("png", "webp"))
    two = codec_bits(noise(400, 8, 1, values=2))
    assert 1 < two["webp_sheet"] < 1.3
    assert 1 < two["png_sheet"] < 2


def test_even_pictures_take_next_to_nothing() -> None:
    assert codec_bits(np.full((64, 16, 16, 3), 7, np.uint8))["webp_sheet"] < 0.01


@pytest.mark.parametrize("n", [1, 2, 7, 12, 16])
def test_sheets_hold_every_picture_once(n: int) -> None:
    pixels = noise(n, 4, 3)
    parts = sheets(pixels)
    assert sum(sheet.size for sheet in parts) == pixels.size
    seen = {
        sheet[y : y + 4, x : x + 4].tobytes()
        for sheet in parts
        for y in range(0, sheet.shape[0], 4)
        for x in range(0, sheet.shape[1], 4)
    }
    assert seen == {picture.tobytes() for picture in pixels}
