"""The shipped classifiers are what their headers say; images are brought to size; training repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imagewright.data import ImageSet, open_images
from imagewright.metrics import evaluate
from imagewright.metrics import train_features as training
from imagewright.metrics.features import (
    ASSETS,
    ClassifierFeatures,
    FeatureExtractor,
    classifier_header,
    digits_features,
    emoji_features,
    file_sha256,
)
from imagewright.models.view import fit
from imagewright.networks import ConvClassifier, ConvClassifierConfig
from imagewright.types import UserError


def test_fit_averages_boxes_and_repeats_pixels() -> None:
    small = np.array([[[0], [255]], [[255], [0]]], dtype=np.uint8)[None]
    torch.testing.assert_close(fit(small, 1, 1), torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(
        fit(small, 4, 3)[0, 2, 0],
        torch.tensor([-1.0, -1.0, 1.0, 1.0]),
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    up = images.repeat(2, axis=1).repeat(2, axis=2)
    torch.testing.assert_close(fit(up, 16, 3), fit(images, 16, 3))


def test_fit_refuses_what_it_cannot_bring_to_size() -> None:
    with pytest.raises(UserError, match="1 channel"):
        fit(np.zeros((1, 8, 8, 3), np.uint8), 8, 1)
    with pytest.raises(UserError, match="uint8"):
        fit(np.zeros((1, 8, 8, 1)), 8, 1)


def accuracy(extractor: ClassifierFeatures, test: ImageSet) -> float:
    classes = extractor.header["classes"]
    truth = test.labels if test.subgroups is None else np.array([classes.index(s) for s in test.subgroups])
    return float((extractor(test.images())[1].argmax(axis=1) == truth).mean())


@pytest.mark.parametrize(
    ("load", "name", "dataset", "dim", "classes", "at_least"),
    [
        (digits_features, "digits", "digits", 64, 10, 0.97),
        (emoji_features, "emoji", "emoji64", 96, 98, 0.4),
    ],
)
def test_shipped_classifier(load, name: str, dataset: str, dim: int, classes: int, at_least: float) -> None:
    extractor = load()
    face: FeatureExtractor = extractor
    path = ASSETS / f"{name}.safetensors"
    assert (face.name, face.dim, face.num_classes, face.sha256) == (name, dim, classes, file_sha256(path))
    assert path.stat().st_size < 2_000_000
    record = extractor.header["training"]
    assert record["command"].startswith(f"python -m imagewright.metrics.train_features {name} ")
    test = open_images(dataset, split="test", resolution=training.TRAININGS[name].resolution)
    assert record["data"]["test"] == test.fingerprint
    measured = accuracy(extractor, test)
    assert measured == pytest.approx(record["accuracy"]["test"]["class"], abs=0.005)  # one picture may flip
    assert measured > at_least


def test_batch_size_changes_no_feature() -> None:
    images = open_images("digits", split="test").images(slice(0, 20))
    extractor = digits_features()
    each = np.concatenate([extractor(images[i : i + 1])[0] for i in range(20)])
    np.testing.assert_allclose(extractor(images)[0], each, rtol=1e-4, atol=1e-5)


def test_real_digits_score_between_floor_and_noise() -> None:
    test = open_images("digits", split="test")
    report = evaluate(test.images(), open_images("digits", split="train"), digits_features(), metrics=["fd"])
    stick = report.yardsticks["fd_digits"]
    assert stick.floor < stick.gaussian < stick.noise
    assert report.scores["fd_digits"] < stick.gaussian / 2


def test_files_that_are_no_classifier_are_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        ClassifierFeatures(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no feature classifier"):
        ClassifierFeatures(path)
    config = ConvClassifierConfig(img_resolution=8, in_channels=1, widths=(4,), num_classes=2)
    save_file(ConvClassifier(config).state_dict(), path, classifier_header("x", replace(config, widths=(5,))))
    with pytest.raises(UserError, match="does not fit its own description"):
        ClassifierFeatures(path)


def test_augmentation_without_limits_is_the_identity_and_moves_background_in() -> None:
    still = replace(training.TRAININGS["emoji"], mirror=False, rotation=0.0, scale=0.0, shift=0.0)
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(training.augment(images, still), images, atol=1e-5, rtol=0)
    blank = torch.full((3, 3, 8, 8), 1.0)
    torch.testing.assert_close(training.augment(blank, training.TRAININGS["emoji"]), blank)


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone(tmp_path: Path, monkeypatch) -> None:
    short = replace(training.TRAININGS["digits"], epochs=1, widths=(4, 8), batch_size=32)
    monkeypatch.setitem(training.TRAININGS, "digits", short)
    monkeypatch.setattr(training, "open_images", lambda *a, **k: open_images(*a, **k).subset(range(128)))
    state = torch.random.get_rng_state()
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        (tmp_path / folder).mkdir()
        assert training.main(["digits", "--out", str(tmp_path / folder / "x.safetensors"), "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / folder / "x.safetensors").read_bytes() for folder in "abc")
    assert a == b
    assert a != c
    assert torch.equal(torch.random.get_rng_state(), state)
