"""Real images are embedded once for each extractor, and never taken for others'."""

from __future__ import annotations

import numpy as np
import pytest

from imagewright.data import ImageSet
from imagewright.metrics.reference import embed

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)


class Extractor:
    """Means of rows; counts the images it sees."""

    name, dim, num_classes, channels = "rows", 4, 2, 1

    def __init__(self, sha256: str = "a", made_on: str = "cpu") -> None:
        self.sha256, self.made_on, self.seen = sha256, made_on, 0

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.seen += len(images)
        return images.mean((2, 3)).astype(np.float32), np.zeros((len(images), 2), np.float32)


def test_features_are_computed_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEWRIGHT_CACHE", str(tmp_path))
    images, extractor = ImageSet.of(PIXELS), Extractor()
    first = embed(images, extractor)
    again = embed(ImageSet.of(PIXELS), extractor)
    assert extractor.seen == 300
    np.testing.assert_array_equal(first.features, again.features)
    assert first.moments.count == again.moments.count and again.image_shape == (4, 4, 1)
    others = [
        (ImageSet.of(PIXELS[::-1].copy()), extractor),  # the same pictures in another order
        (images, Extractor("b")),
        (images, Extractor(made_on="cuda:0")),
    ]
    for source, by in others:
        before = by.seen
        embed(source, by)
        assert by.seen == before + 300
    for entry in tmp_path.iterdir():
        entry.write_bytes(entry.read_bytes()[:-8])
    np.testing.assert_array_equal(embed(images, extractor).features, first.features)
    assert extractor.seen == 900
    monkeypatch.setenv("IMAGEWRIGHT_CACHE", "")
    embed(images, extractor)
    assert extractor.seen == 1200
