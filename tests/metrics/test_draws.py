"""Classes of what is drawn for a score: the reference's shares, from (seed, i) alone, or uniform where asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.data import ImageSet
from imagewright.metrics.draws import class_shares, draw_for_score, frechet_of_model
from imagewright.metrics.features import Images
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.reference import embed
from imagewright.metrics.statistics import load_moments, moments_of, save_moments
from imagewright.samplers import Euler
from imagewright.samplers.generator import ImageGenerator
from imagewright.tuning.autodiffusion import Candidate
from imagewright.tuning.feature_distance import FeatureDistance
from imagewright.types import UNCONDITIONAL, Condition, DataSpec

GREYS = (10, 90, 170, 250)
COUNTS = (500, 0, 300, 200)


class OneGrey(nn.Module):
    """The exact denoiser of classes that are one picture each; the first, where no class is asked for."""

    sigma_min, sigma_max = 0.0, math.inf

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        label = torch.zeros(len(x), dtype=torch.int64) if cond.label is None else cond.label
        grey = torch.tensor(GREYS)[label] / 127.5 - 1
        return grey[:, None, None, None].expand(x.shape).to(x)


class Mean:
    """The mean pixel as the one feature."""

    name, sha256, dim, num_classes = "mean", "0" * 64, 1, 1

    def __call__(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        feature = images.reshape(len(images), -1).mean(axis=1, keepdims=True).astype(np.float32)
        return feature, feature * 0


def real(labels: bool = True) -> ImageSet:
    """1000 pictures, COUNTS of each class."""
    index = np.repeat(np.arange(4), COUNTS)
    pixels = np.array(GREYS, dtype=np.uint8)[index][:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return ImageSet.of(pixels, index if labels else None, class_names=tuple("abcd") if labels else ())


def generator(num_classes: int = 4) -> ImageGenerator:
    spec = DataSpec(name="greys", resolution=2, channels=1, num_classes=num_classes)
    return ImageGenerator(OneGrey(), spec, Euler(num_steps=1))


def greys(images: Images) -> list[int]:
    return np.bincount(np.searchsorted(GREYS, images[:, 0, 0, 0]), minlength=4).tolist()


def test_classes_come_as_often_as_in_the_reference() -> None:
    reference = embed(real(), Mean())
    assert reference.moments.class_counts == COUNTS
    drawn = greys(np.concatenate(list(draw_for_score(generator(), 4000, reference, seed=2, batch_size=1000))))
    assert drawn[1] == 0
    assert np.abs(np.array(drawn) / 4000 - np.array(COUNTS) / 1000).max() < 0.03  # 4 sqrt(.25 / 4000)


def test_a_perfect_model_is_not_charged_for_its_classes() -> None:
    moments = embed(real(), Mean()).moments
    fair = frechet_of_model(generator(), 4000, Mean(), moments, seed=1)
    alike = frechet_of_model(generator(), 4000, Mean(), replace(moments, class_counts=None), seed=1)
    # Mean 106 and standard deviation 95.9 of the real greys, 130 and 89.4 of equally many: 24^2 + 6.5^2 = 618.
    assert fair < 10 and alike == pytest.approx(618, rel=0.1)


def test_a_search_over_images_draws_the_reference_s_classes() -> None:
    moments = replace(embed(real(), Mean()).moments, class_counts=(0, 0, 0, 7))
    measure = FeatureDistance(
        model=OneGrey(), spec=generator().spec, extractor=Mean(), reference=moments, images=16, batch_size=16
    )
    lightest = moments_of(np.full((16, 1), GREYS[3], dtype=np.float32))
    assert measure(Candidate.of((300, 800))) == pytest.approx(frechet_distance(lightest, moments), rel=1e-6)


def test_an_image_depends_on_the_seed_and_its_number_alone() -> None:
    made, shares = generator(), np.array([0.5, 0.0, 0.3, 0.2])
    labels = made.labels(200, 3, shares=shares)
    assert labels is not None and labels.dtype == np.int64
    assert np.array_equal(made.labels(50, 3, first=20, shares=shares), labels[20:70])
    assert not np.array_equal(made.labels(200, 4, shares=shares), labels)
    assert np.array_equal(made.labels(200, 3, shares=np.full(4, 0.25)), made.labels(200, 3))
    whole, cut = (
        np.concatenate(list(draw_for_score(made, 20, embed(real(), Mean()), seed=3, batch_size=size)))
        for size in (20, 3)
    )
    assert np.array_equal(whole, cut)


def test_uniform_on_request_or_where_the_reference_cannot_say() -> None:
    spec, reference = generator().spec, embed(real(), Mean())
    assert class_shares(spec, reference)[0] == "reference"
    law, shares = class_shares(spec, reference, "uniform")
    assert law == "uniform" and shares is not None and shares.tolist() == [0.25] * 4
    unseen = class_shares(replace(spec, empty_classes=(1,)), reference, "uniform")[1]  # by the model
    assert unseen is not None and unseen.tolist() == [1 / 3, 0, 1 / 3, 1 / 3]
    for unknown in (embed(real(labels=False), Mean()), moments_of(np.eye(3))):
        assert class_shares(spec, unknown)[0] == "uniform"
    assert class_shares(generator(5).spec, reference)[0] == "uniform"
    drawn = greys(np.concatenate(list(draw_for_score(generator(), 400, reference, classes="uniform", batch_size=400))))
    assert min(drawn) > 65  # of 100, 4 standard deviations


def test_a_model_without_classes_is_told_none() -> None:
    reference = embed(real(), Mean())
    assert class_shares(generator(0).spec, reference) == (None, None)
    images = np.concatenate(list(draw_for_score(generator(0), 10, reference)))
    assert np.array_equal(images, generator(0).generate(10)) and greys(images) == [10, 0, 0, 0]


def test_counts_stay_with_stored_moments(tmp_path: Path) -> None:
    moments = embed(real(), Mean()).moments
    save_moments(tmp_path / "m.npz", moments)
    assert load_moments(tmp_path / "m.npz").class_counts == COUNTS
    save_moments(tmp_path / "n.npz", replace(moments, class_counts=None))
    assert load_moments(tmp_path / "n.npz").class_counts is None
