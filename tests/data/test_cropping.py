"""Pictures of any shape to one size, and sizes that one resolution divides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.cli.main import main
from imagewright.data import open_images
from imagewright.data.pixels import BadPicture, box_reduce, crop_and_reduce
from imagewright.types import UserError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(8, 12, 0, 2), (13, 8, 2, 0), (8, 8, 0, 0)])
def test_the_square_in_the_middle(height: int, width: int, top: int, left: int) -> None:
    pixels = noise(height, width)
    assert np.array_equal(crop_and_reduce(pixels, 8, "box"), pixels[top : top + 8, left : left + 8])
    assert np.array_equal(crop_and_reduce(pixels, 4, "box"), box_reduce(pixels[top : top + 8, left : left + 8], 4))


def test_box_means_of_parts_of_pixels() -> None:
    """Three pixels to two: weights 2/3 and 1/3 along each side."""
    w = np.array([[2, 1, 0], [0, 1, 2]]) / 3
    pixels = noise(3, 3, 1)
    expected = w @ pixels[..., 0] @ w.T
    assert np.abs(crop_and_reduce(pixels, 2, "box")[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize(("name", "resampling"), [("lanczos", "LANCZOS"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_filters_are_pillows(name: str, resampling: str, channels: int) -> None:
    pixels = noise(40, 30, channels)
    square = Image.fromarray(pixels[5:35].squeeze())
    expected = np.asarray(square.resize((7, 7), getattr(Image.Resampling, resampling))).reshape(7, 7, channels)
    assert np.array_equal(crop_and_reduce(pixels, 7, name), expected)  # type: ignore[arg-type]


def test_nothing_is_enlarged() -> None:
    with pytest.raises(BadPicture, match="is 9x7, smaller than 8x8"):
        crop_and_reduce(noise(7, 9), 8, "box")


def save(path: Path, *shapes: tuple[int, int]) -> Path:
    path.mkdir()
    for i, (height, width) in enumerate(shapes):
        Image.fromarray(noise(height, width, seed=i)).save(path / f"{i}.png")
    return path


def test_photographs_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "photos", (30, 40), (40, 30), (16, 16), (20, 16))
    main(["data", "convert", str(source), str(tmp_path / "a.zip"), "--resolution", "8", "--crop", "lanczos"])
    said = capsys.readouterr().out
    assert "4 images written to" in said and "8x8, squares in the middle of the pictures, by lanczos filter" in said
    images = open_images(tmp_path / "a.zip")
    assert images.spec.shape == (3, 8, 8)
    assert np.array_equal(images.images()[1], crop_and_reduce(noise(40, 30, seed=1), 8, "lanczos"))


def test_sizes_that_the_resolution_divides(tmp_path: Path) -> None:
    source = save(tmp_path / "squares", (8, 8), (16, 16), (8, 8), (32, 32))
    images = open_images(source, resolution=8)
    assert images.preprocessing == "8x8, box means of 8x8 and 16x16 and 32x32"
    assert np.array_equal(images.images()[3], box_reduce(noise(32, 32, seed=3), 8))
    with pytest.raises(UserError, match="most of the set is 8x8"):
        open_images(source)


def test_of_other_sizes_it_is_said_which(tmp_path: Path) -> None:
    source = save(tmp_path / "mixed", (8, 8), (12, 12), (8, 9))
    with pytest.raises(UserError, match=r"1\.png: is 12x12, which 8 does not divide; 2\.png: is 9x8; pictures have"):
        open_images(source, resolution=8)
    assert len(open_images(source, resolution=8, skip_bad=True)) == 1
    with pytest.raises(UserError, match=r"0\.png: is 8x8, smaller than 10x10"):
        open_images(source, resolution=10, crop="box")


@pytest.mark.parametrize("options", [{"crop": "box"}, {"crop": "nearest", "resolution": 4}])
def test_a_crop_needs_a_resolution_and_a_filter(tmp_path: Path, options: dict[str, object]) -> None:
    source = save(tmp_path / "one", (8, 8))
    with pytest.raises(UserError, match=r"crop is '(box|nearest)'; it must be one of box, bicubic, lanczos, and needs"):
        open_images(source, **options)  # type: ignore[arg-type]


def test_pictures_too_many_to_keep_are_cropped_when_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "photos", (30, 40), (40, 30))
    kept = open_images(source, resolution=8, crop="bicubic")
    monkeypatch.setattr("imagewright.data.opening.KEEP_DECODED", 0)
    read = open_images(source, resolution=8, crop="bicubic")
    assert kept.in_memory and not read.in_memory and np.array_equal(kept.images(), read.images())
