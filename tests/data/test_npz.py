"""Images as an array in an npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imagewright.data import open_images
from imagewright.types import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(("images", "labels"), [("arr_0", "arr_1"), ("images", "labels"), ("arr_0", "labels")])
def test_images_and_labels_by_either_name(tmp_path: Path, images: str, labels: str) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **{images: PIXELS, labels: np.array([0, 1, 3, 1, 0])})
    found = open_images(path)
    assert np.array_equal(found.images(), PIXELS) and found.labels.tolist() == [0, 1, 3, 1, 0]
    assert found.spec.num_classes == 4 and found.source == str(path)
    assert open_images(path, labels=False).spec.num_classes == 0


@pytest.mark.parametrize("labels", [None, np.full(5, -1), np.zeros(5)])
def test_without_classes(tmp_path: Path, labels: np.ndarray | None) -> None:
    np.savez_compressed(tmp_path / "set.npz", arr_0=PIXELS, **({} if labels is None else {"arr_1": labels}))
    assert open_images(tmp_path / "set.npz").spec.num_classes == 0


def test_reduced(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", arr_0=PIXELS)
    found = open_images(tmp_path / "set.npz", resolution=4, channels=1)
    assert found.spec.shape == (1, 4, 4) and found.preprocessing == "4x4, box means of 8x8"
    with pytest.raises(UserError, match=r"resolution is 3; the pictures of .* have 8"):
        open_images(tmp_path / "set.npz", resolution=3)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": PIXELS}, "has x; images stand under arr_0 or images"),
        ({"arr_0": PIXELS.astype(np.float32)}, "they must be uint8"),
        ({"arr_0": PIXELS[:, :4]}, "they must be uint8"),
        ({"arr_0": np.array([{}], dtype=object)}, "is no readable npz of plain arrays"),
        ({"arr_0": PIXELS, "arr_1": np.array([0, 1])}, "labels must be 5 whole numbers"),
    ],
)
def test_others_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], complaint: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=complaint):
        open_images(tmp_path / "set.npz")


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_half_a_file(tmp_path: Path, cut: int) -> None:
    np.savez(tmp_path / "set.npz", arr_0=PIXELS)
    (tmp_path / "set.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:cut])
    with pytest.raises(UserError, match="is no readable npz of plain arrays"):
        open_images(tmp_path / "set.npz")


def test_an_array_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "set.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    monkeypatch.setattr("imagewright.limits.UNPACKED", 500)
    monkeypatch.setattr("imagewright.limits.RATIO", 1)
    with pytest.raises(UserError, match="would unpack to"):
        open_images(tmp_path / "set.npz")
