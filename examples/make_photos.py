"""A folder of made-up photographs: hills, a lake, a sun and trees, as cameras would leave them.

    python examples/make_photos.py photos 48

Sizes differ, formats are JPEG, PNG and WebP, and every fourth picture lies on its side with an EXIF mark that says so.
Nobody's rights are touched: each picture is drawn from its number.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((640, 480), (480, 640), (800, 450), (600, 600), (512, 384))
FORMATS = ("jpg", "png", "webp")
ORIENTATION, TURNED_LEFT = 0x0112, 6


def scene(number: int) -> Image.Image:
    """The picture of a number: always the same."""
    random = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    high, low = _sky(random)
    rows = np.linspace(0, 1, height)[:, None, None] ** 0.8
    sky = high * (1 - rows) + low * rows + random.normal(0, 3, (height, width, 1))
    image = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    x, y, radius = random.uniform(0.15, 0.85) * width, random.uniform(0.1, 0.4) * height, 0.07 * min(width, height)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 244, 200))
    for layer in range(3):
        _hills(draw, random, width, height, layer)
    for _ in range(random.integers(2, 7)):
        _tree(draw, random, width, height)
    return image


def _sky(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    day = np.array([[70, 130, 210], [190, 220, 245]]), np.array([[60, 40, 100], [250, 150, 90]])
    high, low = day[int(random.random() < 0.4)] + random.normal(0, 12, (2, 3))
    return high, low


def _hills(draw: ImageDraw.ImageDraw, random: np.random.Generator, width: int, height: int, layer: int) -> None:
    x = np.arange(0, width + 8, 8)
    base = (0.5 + 0.14 * layer) * height
    waves = sum(
        random.uniform(0.02, 0.06) * height * np.sin(x / width * k + random.uniform(0, 6.3)) for k in (4, 9, 17)
    )
    shade = np.array([60 + 30 * (2 - layer), 110 + 20 * (2 - layer), 70 + 45 * (2 - layer)]) + random.normal(0, 8, 3)
    points = [
        (0.0, float(height)),
        *zip(x.tolist(), (base + waves).tolist(), strict=True),
        (float(width), float(height)),
    ]
    draw.polygon(points, fill=tuple(int(v) for v in shade.clip(0, 255)))


def _tree(draw: ImageDraw.ImageDraw, random: np.random.Generator, width: int, height: int) -> None:
    x, foot = random.uniform(0, 1) * width, random.uniform(0.8, 0.97) * height
    tall = random.uniform(0.12, 0.28) * height
    draw.rectangle((x - tall / 24, foot - tall / 3, x + tall / 24, foot), fill=(80, 55, 35))
    green = tuple(int(v) for v in (np.array([35, 85, 40]) + random.normal(0, 12, 3)).clip(0, 255))
    for k in range(3):
        top, half = foot - tall * (0.45 + 0.2 * k), tall * (0.26 - 0.05 * k)
        draw.polygon([(x - half, top + tall / 4), (x + half, top + tall / 4), (x, top - tall / 8)], fill=green)


def main(folder: Path, count: int) -> None:
    """Write `count` pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, exif = scene(number), Image.Exif()
        if number % 4 == 0:
            image, exif[ORIENTATION] = image.transpose(Image.Transpose.ROTATE_90), TURNED_LEFT
        image.save(folder / f"IMG_{number:04}.{FORMATS[number % 3]}", exif=exif, quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
