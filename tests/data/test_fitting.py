"""Pictures of any shape to one size; sizes that one resolution divides; a folder of photographs as people have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.cli.main import main
from imagewright.data import open_images
from imagewright.data.fitting import fit_square
from imagewright.data.pixels import box_reduce
from imagewright.types import UserError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(8, 12, 0, 2), (13, 8, 2, 0), (8, 8, 0, 0)])
def test_the_square_in_the_middle(height: int, width: int, top: int, left: int) -> None:
    pixels = noise(height, width)
    assert np.array_equal(fit_square(pixels, 8, "crop", "box"), pixels[top : top + 8, left : left + 8])
    assert np.array_equal(fit_square(pixels, 4, "crop", "box"), box_reduce(pixels[top : top + 8, left : left + 8], 4))


def test_box_means_of_parts_of_pixels() -> None:
    """Three pixels to two: weights 2/3 and 1/3 along each side."""
    w = np.array([[2, 1, 0], [0, 1, 2]]) / 3
    pixels = noise(3, 3, 1)
    expected = w @ pixels[..., 0] @ w.T
    assert np.abs(fit_square(pixels, 2, "crop", "box")[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize(("name", "resampling"), [("lanczos", "LANCZOS"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_filters_are_pillows(name: str, resampling: str, channels: int) -> None:
    pixels = noise(40, 30, channels)
    square = Image.fromarray(pixels[5:35].squeeze())
    expected = np.asarray(square.resize((7, 7), getattr(Image.Resampling, resampling))).reshape(7, 7, channels)
    assert np.array_equal(fit_square(pixels, 7, "crop", name), expected)  # type: ignore[arg-type]


def test_padding_keeps_the_whole_on_white() -> None:
    pixels = noise(4, 8)
    square = fit_square(pixels, 8, "pad", "box")
    assert np.array_equal(square[2:6], pixels) and (square[:2] == 255).all() and (square[6:] == 255).all()
    assert (fit_square(noise(100, 1), 8, "pad", "lanczos")[:, [0, 1, 2, 4, 5, 6, 7]] == 255).all()  # never no column


def test_squashing_keeps_all_and_the_shape_not() -> None:
    pixels = noise(4, 8)
    expected = pixels.reshape(4, 4, 2, 3).astype(int).sum(2) + 1
    assert np.array_equal(fit_square(pixels, 4, "squash", "box"), expected // 2)
    wide = Image.fromarray(noise(30, 47))
    assert np.array_equal(fit_square(noise(30, 47), 9, "squash", "lanczos"), np.asarray(wide.resize((9, 9), 1)))


@pytest.mark.parametrize("name", ["box", "bicubic", "lanczos"])
def test_small_pictures_are_enlarged(name: str) -> None:
    flat = np.full((3, 5, 3), 77, dtype=np.uint8)
    assert (fit_square(flat, 8, "crop", name) == 77).all()  # type: ignore[arg-type]
    doubled = noise(4, 4)
    assert np.array_equal(fit_square(doubled, 8, "crop", "box"), doubled.repeat(2, 0).repeat(2, 1))


def save(path: Path, *shapes: tuple[int, int]) -> Path:
    path.mkdir()
    for i, (height, width) in enumerate(shapes):
        Image.fromarray(noise(height, width, seed=i)).save(path / f"{i}.png")
    return path


def test_photographs_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "photos", (30, 40), (40, 30), (16, 16), (20, 16))
    main(["data", "convert", str(source), str(tmp_path / "a.zip"), "--resolution", "8", "--fit", "crop"])
    said = capsys.readouterr().out
    assert (
        "4 images written to" in said
        and "8x8, the squares in the middle of the pictures, by lanczos filter; 0 left out" in said
    )
    images = open_images(tmp_path / "a.zip")
    assert images.spec.shape == (3, 8, 8)
    assert np.array_equal(images.images()[1], fit_square(noise(40, 30, seed=1), 8, "crop", "lanczos"))


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
    enlarged = open_images(source, resolution=10, fit="crop", filter="box")
    assert enlarged.preprocessing == "10x10, the squares in the middle of the pictures, by box filter, 2 enlarged"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": "crop"}, "fit is 'crop'; it must be one of crop, pad, squash, and needs a resolution"),
        ({"fit": "stretch", "resolution": 4}, "fit is 'stretch'; it must be one of crop, pad, squash"),
        ({"fit": "pad", "filter": "nearest", "resolution": 4}, "filter is 'nearest'; it must be one of box, bicubic"),
    ],
)
def test_a_fit_needs_a_resolution_and_a_filter(tmp_path: Path, options: dict[str, object], words: str) -> None:
    source = save(tmp_path / "one", (8, 8))
    with pytest.raises(UserError, match=words):
        open_images(source, **options)  # type: ignore[arg-type]


def test_pictures_too_many_to_keep_are_cropped_when_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "photos", (30, 40), (40, 30))
    kept = open_images(source, resolution=8, fit="crop", filter="bicubic")
    monkeypatch.setattr("imagewright.data.opening.KEEP_DECODED", 0)
    read = open_images(source, resolution=8, fit="crop", filter="bicubic")
    assert kept.in_memory and not read.in_memory and np.array_equal(kept.images(), read.images())


# --- a folder as people have it -------------------------------------------------------------------------------------


def photographs(folder: Path, number: int = 24) -> Path:
    """Pictures of many sizes in three formats, every fourth lying on its side, as cameras store them."""
    folder.mkdir()
    for i in range(number):
        height, width = 20 + 3 * (i % 5), 30 + 4 * (i % 3)
        image = Image.fromarray(np.full((height, width, 3), 10 * i, dtype=np.uint8))
        image.putpixel((0, 0), (255, 255, 255))
        kind = ("jpg", "png", "webp")[i % 3]
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 4 == 0 else 1
        image.save(folder / f"p{i:02}.{kind}", exif=exif)
    return folder


def test_a_folder_of_photographs_becomes_a_set_with_a_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = photographs(tmp_path / "photos")
    words = ["--resolution", "16", "--fit", "crop", "--holdout", "0.25"]
    main(["data", "convert", str(source), str(tmp_path / "a.zip"), *words])
    assert "24 images written" in (said := capsys.readouterr().out) and "splits: test " in said
    both = open_images(tmp_path / "a.zip", split="all")
    held = {both.digests[i] for i, split in enumerate(both.splits or ()) if split == "test"}
    assert len(open_images(tmp_path / "a.zip")) + len(held) == 24 and 0 < len(held) < 12
    (source / "p01.png").unlink()  # the others stay where they were
    (source / "p02.webp").rename(source / "z.webp")
    main(["data", "convert", str(source), str(tmp_path / "b.zip"), *words])
    fewer = open_images(tmp_path / "b.zip", split="test")
    assert set(fewer.digests) <= held and len(held) - len(fewer) <= 1


def test_a_photograph_on_its_side_is_turned_before_it_is_cut(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right-hand side
    pixels = noise(4, 8, seed=3)
    Image.fromarray(pixels).save(tmp_path / "one/a.png", exif=exif)
    images = open_images(tmp_path / "one", resolution=4, fit="pad", filter="box")
    assert np.array_equal(images.images()[0], fit_square(np.rot90(pixels, -1), 4, "pad", "box"))


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.jpg"])
def test_a_telephones_photographs_are_refused_by_name(tmp_path: Path, name: str) -> None:
    source = save(tmp_path / "photos", (8, 8))
    (source / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    with pytest.raises(UserError, match=rf"{name}: is HEIC or AVIF, which is not read here; save it as JPEG or PNG"):
        open_images(source, resolution=4, fit="crop")
    assert len(open_images(source, resolution=4, fit="crop", skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("share", "words"),
    [("0", "--holdout is 0"), ("1", "it must lie between"), ("0.000001", "puts all 6 pictures in split 'train'")],
)
def test_a_holdout_that_holds_nothing_is_refused(
    tmp_path: Path, share: str, words: str, refused: Callable[..., str]
) -> None:
    source = photographs(tmp_path / "photos", 6)
    told = refused(
        "data", "convert", source, tmp_path / "a.zip", "--resolution", 8, "--fit", "crop", "--holdout", share
    )
    assert words in told and not (tmp_path / "a.zip").exists()


def test_a_set_with_splits_keeps_them(tmp_path: Path, refused: Callable[..., str]) -> None:
    told = refused("data", "convert", "emoji64", tmp_path / "a.zip", "--holdout", 0.1)
    assert "already has splits ['test', 'train']; holdout would mix them" in told
