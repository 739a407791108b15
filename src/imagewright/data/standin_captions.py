"""A stand-in for captions from the web: sentences in three languages, made from the classes of digits or emoji64.

Shares     English 44 %, German 45 %, Japanese, which puts no spaces between words, 11 %: four times rarer.
Classes    In each language the k-th class comes in proportion to k^-zipf, in an order of that language's own.
Sentences  A few of a language. One caption in ten names nothing; one in ten names two classes, and shows the first.
Pictures   One of the class, of those in training: two thirds of the set, by the picture's own hash. The others, as many
           of each class, are the test, for every language alike.
Each caption is a function of (seed, its number). It does not show real alt-texts' noise, nor errors of language
identification, and its lists of entries are the classes' names and the numbers from 0 to 99.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from imagewright.data.image_set import ImageSet
from imagewright.data.opening import open_images
from imagewright.types import UserError

SOURCE = "standin_captions"
SHARES: Mapping[str, float] = {"en": 0.44, "de": 0.448, "ja": 0.112}
NONE, TWO = 0.1, 0.1
"""Shares of captions that name nothing, and two classes."""
HELD_OUT = 1 / 3

NAMES: Mapping[str, Mapping[str, str]] = {
    "digits": {
        "en": "zero one two three four five six seven eight nine",
        "de": "null eins zwei drei vier fünf sechs sieben acht neun",
        "ja": "零 一 二 三 四 五 六 七 八 九",
    },
    "emoji64": {
        "en": "face person animal food place sport tool sign flag",
        "de": "Gesicht Mensch Tier Essen Ort Sport Werkzeug Zeichen Flagge",
        "ja": "顔 人 動物 食物 場所 運動 道具 記号 旗",
    },
}
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "en": ("a photo of a {}", "this is a {}.", "{}, small"),
    "de": ("ein Foto: {}", "das hier ist {}.", "{}, klein"),
    "ja": ("{}の写真", "これは{}です。", "小さな{}"),
}
BOTH: Mapping[str, str] = {"en": "a {} and a {}", "de": "{} und {}", "ja": "{}と{}"}
NOTHING: Mapping[str, tuple[str, ...]] = {
    "en": ("someone took this picture", "click here to see more"),  # "one" is within "someone", and no word of it
    "de": ("einsam und allein", "hier klicken für mehr"),
    "ja": ("ここをクリック", "詳しくはこちら"),
}


@dataclass(frozen=True, kw_only=True)
class Standin:
    """Captions with their languages and the places of their pictures; and the rest.

    concept: the class that a caption shows, int64 [P], -1 where it names none. order: classes of each language, the
    most frequent first.
    """

    images: ImageSet
    held_out: ImageSet
    picture: npt.NDArray[np.int64]
    captions: list[str]
    languages: list[str]
    concept: npt.NDArray[np.int64]
    order: Mapping[str, npt.NDArray[np.int64]]
    lists: Mapping[str, list[str]]
    prompts: Mapping[str, dict[str, list[str]]]
    source: str


def standin_captions(pictures: str, resolution: int | None, pairs: int, seed: int, zipf: float = 1.0) -> Standin:
    """pictures: digits or emoji64. Raises UserError for other ones."""
    if pictures not in NAMES:
        raise UserError(f"data.pictures is {pictures!r}; {SOURCE} makes captions of {' or '.join(NAMES)}")
    whole = open_images(pictures, resolution=resolution, split="all")
    test = np.array([int.from_bytes(d[:8]) < HELD_OUT * 2**64 for d in whole.digests])
    images = whole.subset(np.flatnonzero(~test))
    names = {language: told.split(" ") for language, told in NAMES[pictures].items()}
    classes = len(names["en"])
    of_class = [np.flatnonzero(images.labels == k) for k in range(classes)]
    order = {language: np.random.default_rng((seed, 1, i)).permutation(classes) for i, language in enumerate(SHARES)}
    law = np.arange(1, classes + 1) ** -zipf
    made = [_caption(seed, i, names, order, of_class, law / law.sum()) for i in range(pairs)]
    return Standin(
        images=replace(images, splits=None),
        held_out=_even(whole.subset(np.flatnonzero(test)), classes),
        picture=np.array([each[0] for each in made], np.int64),
        captions=[each[1] for each in made],
        languages=[each[2] for each in made],
        concept=np.array([each[3] for each in made], np.int64),
        order=order,
        lists={language: [*told, *map(str, range(100))] for language, told in names.items()},
        prompts={k: {"templates": list(TEMPLATES[k]), "classes": list(told)} for k, told in names.items()},
        source=f"{SOURCE} of {pictures} (made-up captions in {', '.join(SHARES)})",
    )


def _caption(
    seed: int,
    number: int,
    names: Mapping[str, Sequence[str]],
    order: Mapping[str, npt.NDArray[np.int64]],
    of_class: Sequence[npt.NDArray[np.int64]],
    law: npt.NDArray[np.float64],
) -> tuple[int, str, str, int]:
    """Picture, caption, language and class of one number."""
    rng = np.random.default_rng((seed, 0, number))
    language = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    first, second = (int(k) for k in order[language][rng.choice(len(law), 2, replace=False, p=law)])
    picture = int(rng.choice(of_class[first]))
    kind, which = rng.random(), rng.random()
    told = names[language]
    if kind < NONE:
        sentences = NOTHING[language]
        return picture, sentences[int(which * len(sentences))], language, -1
    if kind < NONE + TWO:
        return picture, BOTH[language].format(told[first], told[second]), language, first
    sentences = TEMPLATES[language]
    return picture, sentences[int(which * len(sentences))].format(told[first]), language, first


def _even(images: ImageSet, classes: int) -> ImageSet:
    """As many pictures of each class, the first ones."""
    rows = [np.flatnonzero(images.labels == k) for k in range(classes)]
    least = min(map(len, rows))
    return replace(images.subset(np.sort(np.concatenate([each[:least] for each in rows]))), splits=None)
