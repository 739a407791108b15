"""Reports: scores equal their modules' values, carry what they depend on, and stand between yardsticks."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from imagewright.data import open_images
from imagewright.metrics.evaluate import evaluate
from imagewright.metrics.features import Images, digits_features, emoji_features
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.inception import WEIGHTS_SHA256
from imagewright.metrics.inception_score import inception_score
from imagewright.metrics.kernel import kernel_distance
from imagewright.metrics.memorisation import nearest
from imagewright.metrics.neighbours import neighbourhood
from imagewright.metrics.reference import embed
from imagewright.metrics.statistics import moments_of
from imagewright.metrics.yardsticks import gaussian_images, measure_yardsticks, noise_images
from imagewright.types import UserError


@dataclass(frozen=True)
class Pixels:
    """Pixels as features, four fixed projections as logits."""

    name: str = "pixels"
    sha256: str = "0" * 64
    dim: int = 12
    num_classes: int = 4

    def __call__(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        features = (images.reshape(len(images), -1) / 255).astype(np.float32)
        return features, (features @ np.random.default_rng(9).normal(0, 3, (12, 4))).astype(np.float32)


@dataclass(frozen=True)
class Arrays:
    """Images in memory as an image source."""

    array: Images
    fingerprint: str = "f00d"

    def __len__(self) -> int:
        return len(self.array)

    def images(self, indices: object) -> Images:
        return self.array[indices]


def pictures(n: int, seed: int, middle: float = 120) -> Images:
    """Correlated uint8 images [n, 2, 2, 3]."""
    random = np.random.default_rng(seed)
    values = middle + 20 * random.normal(size=(n, 1, 1, 3)) + 10 * random.normal(size=(n, 2, 2, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


REAL = Arrays(pictures(300, 0))
FAKE = pictures(200, 1, middle=140)


def test_scores_are_those_of_their_modules() -> None:
    report = evaluate(FAKE, REAL, Pixels(), seed=5, yardsticks=False)
    real, fake = Pixels()(REAL.array)[0], Pixels()(FAKE)[0]
    assert report.scores["fd_pixels"] == pytest.approx(frechet_distance(moments_of(fake), moments_of(real)), rel=1e-9)
    assert report.scores["kd_pixels"] == kernel_distance(fake, real, subset_size=200).value
    found = neighbourhood(real, fake)
    for name in ("precision", "recall", "density", "coverage"):
        assert report.scores[name] == getattr(found, name)
    assert report.scores["is_pixels"] == inception_score(Pixels()(FAKE)[1]).value
    assert report.settings["kid"] == {"subsets": 100, "subset_size": 200, "seed": 2020}


def test_batches_do_not_matter() -> None:
    whole = evaluate(FAKE, REAL, Pixels(), yardsticks=False)
    cut = evaluate(iter(np.array_split(FAKE, 9)), REAL, Pixels(), yardsticks=False)
    assert cut.scores == pytest.approx(whole.scores, rel=1e-9)


def test_a_report_carries_what_its_scores_depend_on() -> None:
    report = evaluate(FAKE, REAL, Pixels())
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (plain["num_images"], plain["num_reference"], plain["image_shape"]) == (200, 300, [2, 2, 3])
    assert (plain["extractor"], plain["extractor_sha256"]) == ("pixels", "0" * 64)
    assert plain["reference"] == "images:f00d"
    assert {"torch", "numpy", "python", "imagewright"} <= set(plain["versions"])
    assert set(plain["yardsticks"]) == {"fd_pixels", "kd_pixels"}


def test_only_the_official_network_makes_a_fid() -> None:
    official = evaluate(FAKE, REAL, Pixels(sha256=WEIGHTS_SHA256), yardsticks=False)
    assert {"fid", "kid", "is"} <= set(official.scores)
    assert any("not comparable" in note for note in official.notes)


def test_few_images_are_noted_and_too_few_refused() -> None:
    report = evaluate(FAKE[:12], REAL, Pixels(), yardsticks=False)
    assert any("fd_pixels of 12 images in 12 dimensions" in note for note in report.notes)
    assert not any("fd_pixels" in note for note in evaluate(FAKE, REAL, Pixels(), yardsticks=False).notes)
    with pytest.raises(UserError, match="fd needs at least 2 images and 2 real ones, and there are 1 and 300"):
        evaluate(FAKE[:1], REAL, Pixels(), metrics=["fd"])
    report = evaluate(FAKE[:3], REAL, Pixels(), yardsticks=False)
    assert "prdc needs at least 4 images and 6 real ones, and there are 3 and 300" in report.notes
    assert "fd_pixels" in report.scores and "precision" not in report.scores
    with pytest.raises(UserError, match="no images"):
        evaluate([], REAL, Pixels())
    with pytest.raises(UserError, match="prdc needs at least 4 images"):
        evaluate(FAKE[:3], REAL, Pixels(), metrics=["prdc"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="no 'fidd'"):
        evaluate(FAKE, REAL, Pixels(), metrics=["fidd"])
    with pytest.raises(UserError, match="metrics is empty"):
        evaluate(FAKE, REAL, Pixels(), metrics=[])
    with pytest.raises(UserError, match=r"\[4, 4, 3\].*expected \[2, 2, 3\]"):
        evaluate(np.zeros((5, 4, 4, 3), np.uint8), REAL, Pixels())
    with pytest.raises(UserError, match="float64"):
        evaluate(FAKE / 255, REAL, Pixels())
    with pytest.raises(UserError, match="another feature extractor"):
        evaluate(FAKE, embed(REAL, Pixels(sha256="1")), Pixels())


def test_stored_moments_are_a_reference_for_the_distance_alone() -> None:
    moments = embed(REAL, Pixels()).moments
    report = evaluate(FAKE, moments, Pixels(), metrics=["fd"])
    assert report.scores == evaluate(FAKE, REAL, Pixels(), metrics=["fd"]).scores
    assert (report.num_reference, report.yardsticks) == (300, {})
    with pytest.raises(UserError, match="'kid' needs the real images"):
        evaluate(FAKE, moments, Pixels(), metrics=["kid"])


def test_yardsticks_frame_the_distance() -> None:
    good = evaluate(pictures(150, 2), REAL, Pixels(), metrics=["fd"])
    stick = good.yardsticks["fd_pixels"]
    assert (stick.num_images, stick.floor_images, stick.floor_repeats) == (150, 150, 3)
    assert stick.floor < stick.noise
    assert good.scores["fd_pixels"] < 2 * stick.floor
    assert stick.floor_std > 0
    assert any(f"as good as real would have a fd_pixels of about {0.75 * stick.floor:.2g}" in n for n in good.notes)
    # These pictures are Gaussian but for rounding, so their Gaussian is as good as they are.
    assert stick.gaussian < 2 * stick.floor


def test_yardsticks_are_a_function_of_the_seed() -> None:
    reference = embed(REAL, Pixels())
    distances = {"mean": lambda a, b: float(abs(a.mean() - b.mean()))}
    one, again = (measure_yardsticks(reference, Pixels(), 40, distances, seed=3) for _ in range(2))
    assert one == again
    assert one != measure_yardsticks(reference, Pixels(), 40, distances, seed=4)
    with pytest.raises(UserError, match="at least 2 images"):
        measure_yardsticks(reference, Pixels(), 1, distances)


def test_gaussian_images_have_the_pixels_moments() -> None:
    drawn = np.concatenate(list(gaussian_images(REAL, 20_000, np.random.default_rng(0))))
    got, want = moments_of(drawn.reshape(len(drawn), -1)), moments_of(REAL.array.reshape(300, -1))
    # Standard errors of 20000 draws: 24 / sqrt(20000) = 0.17 in the mean, 600 sqrt(2 / 20000) = 6 in the
    # covariance.
    np.testing.assert_allclose(got.mean, want.mean, atol=0.8)
    np.testing.assert_allclose(got.cov, want.cov, atol=28)


def test_noise_images_are_uniform_bytes() -> None:
    drawn = np.concatenate(list(noise_images((4, 4, 3), 1000, np.random.default_rng(0))))
    assert drawn.shape == (1000, 4, 4, 3)
    counts = np.bincount(drawn.ravel(), minlength=256)
    assert abs(counts - 187.5).max() < 6 * np.sqrt(187.5)


@pytest.mark.parametrize("extractor", [None, Pixels()])
def test_copies_are_their_own_nearest_neighbours(extractor: Pixels | None) -> None:
    many = Arrays(pictures(2500, 3))
    rows = [5, 1030, 2499]
    indices, distances = nearest(many.array[rows], many, extractor, k=3)
    assert distances.shape == (3, 3)
    assert (distances[:, 0] < 1e-6).all()
    assert (np.diff(distances, axis=1) >= 0).all()
    np.testing.assert_array_equal(many.array[indices[:, 0]], many.array[rows])


def test_pixel_distance_by_hand() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    indices, distances = nearest(black, Arrays(np.concatenate([white, black])), k=2)
    np.testing.assert_array_equal(indices, [[1, 0]])
    np.testing.assert_allclose(distances, [[0, np.sqrt(12 * 4)]])
    with pytest.raises(UserError, match=r"1\.\.2"):
        nearest(black, Arrays(np.concatenate([white, black])), k=3)


def test_accuracy_is_the_share_of_images_of_the_class_that_was_asked_for() -> None:
    images = open_images("digits", split="test")
    asked = images.labels.copy()
    asked[::4] = (asked[::4] + 1) % 10
    report = evaluate(images.images(), images, digits_features(), metrics=["accuracy"], labels=asked)
    (name, told) = report.scores
    assert (name, told) == ("accuracy_digits", "accuracy_digits_stderr")
    assert report.scores[name] == pytest.approx(0.75 * 0.985, abs=0.02)
    assert report.scores[told] == pytest.approx((0.74 * 0.26 / len(images)) ** 0.5, rel=0.05)
    with pytest.raises(UserError, match="accuracy needs images of classes that were asked for"):
        evaluate(images.images(), images, digits_features(), metrics=["accuracy"])
    with pytest.raises(UserError, match="accuracy needs the 10 classes, and emoji names 9"):
        evaluate(None, images, emoji_features(), metrics=["accuracy"], labels=asked)  # before anything is drawn
    with pytest.raises(UserError, match="there are 3 labels for"):
        evaluate(images.images(), images, digits_features(), metrics=["accuracy"], labels=asked[:3])


def test_parts_of_a_class_count_for_the_class() -> None:
    images = open_images("emoji64", split="test", resolution=32)
    some = images.subset(range(0, len(images), 8))
    report = evaluate(some.images(), some, emoji_features(), metrics=["accuracy"], labels=some.labels)
    named = emoji_features()(some.images())[1].argmax(1)
    group = np.array(emoji_features().group_of)[named] == some.labels
    assert abs(report.scores["accuracy_emoji"] - group.mean()) < 0.1 and report.scores["accuracy_emoji"] > 0.5
