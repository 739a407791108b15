"""Some of a set's classes, and all of them in parts."""

from __future__ import annotations

import numpy as np
import pytest

from imagewright.data import ImageSet
from imagewright.data.config import DataConfig
from imagewright.data.partition import clustered, consecutive, numbered, of_classes, spelled
from imagewright.types import UserError

NAMES = ("cat", "cow", "dog", "eel", "fox")


def images() -> ImageSet:
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return ImageSet.of(pixels, [0, 1, 2, 3, 4, 4, 3, 2, 1, 0], class_names=NAMES)


@pytest.mark.parametrize(("classes", "parts"), [(10, 2), (9, 2), (1000, 7), (3, 3)])
def test_every_class_is_in_one_part_and_parts_are_of_a_size(classes: int, parts: int) -> None:
    rng = np.random.default_rng(0)
    for divided in (consecutive(classes, parts), clustered(rng.normal(size=(classes, 3)), parts)):
        assert sorted(k for part in divided for k in part) == list(range(classes))
        sizes = [len(part) for part in divided]
        assert len(sizes) == parts and max(sizes) - min(sizes) <= 1
    assert all(part == tuple(range(part[0], part[-1] + 1)) for part in consecutive(classes, parts))


def test_clusters_are_found_wherever_their_classes_stand() -> None:
    rng = np.random.default_rng(1)
    whose = np.array([0, 1, 2] * 4)
    embeddings = 10.0 * np.eye(3)[whose] + rng.normal(size=(12, 3))
    for seed in range(5):
        assert clustered(embeddings, 3, seed) == [tuple(range(k, 12, 3)) for k in range(3)]
    assert clustered(np.zeros((4, 2)), 2)  # equal points are no reason to fail


@pytest.mark.parametrize("parts", [0, 6])
def test_no_part_is_empty(parts: int) -> None:
    with pytest.raises(UserError, match=f"parts is {parts}; there are 5 classes"):
        consecutive(5, parts)


def test_classes_are_named_by_number_range_and_name() -> None:
    assert numbered(["3", "0-1", "fox", "1"], images().spec) == (0, 1, 3, 4)
    assert spelled((4, 0, 1, 2)) == ("0-2", "4")
    assert numbered(spelled((0, 2, 3)), images().spec) == (0, 2, 3)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("5", "5 is none of the set's 5 classes"),
        ("3-1", "3-1 is none"),
        ("cut", "no class is called 'cut'; did you"),
    ],
)
def test_what_is_no_class_is_refused(wanted: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        numbered([wanted], images().spec)


def test_a_part_keeps_the_numbers_of_its_classes() -> None:
    part = of_classes(images(), ["2-3"])
    assert part.labels.tolist() == [2, 3, 3, 2] and part.images()[:, 0, 0, 0].tolist() == [2, 3, 6, 7]
    assert part.spec.num_classes == 5 and part.empty_classes == part.spec.empty_classes == (0, 1, 4)
    assert part.fingerprint != images().fingerprint
    assert of_classes(images(), []).spec == images().spec
    with pytest.raises(UserError, match="has no pictures of cat"):
        of_classes(part, ["cat"])


def test_a_run_learns_from_its_part() -> None:
    opened = DataConfig(source="digits", classes=("7-9",)).open()
    assert set(opened.labels.tolist()) == {7, 8, 9} and opened.spec.num_classes == 10
    with pytest.raises(UserError, match=r"data\.classes chooses among labels"):
        DataConfig(source="digits", classes=("1",), labels=False)
