"""Pictures with captions in several languages: a stand-in made from labelled pictures, or a table of captions.

Pairs      A picture may have several captions, each in a language; a row of the set is one pair. In every pass each
           picture comes at most once: one of its captions is chosen, evenly, and with `balance`, where only those
           that hold an entry are chosen from, kept with the probability of that caption (`curation.balancing`), by
           numbers of (seed, pass) and the pair's place alone.
           Every pass draws anew, so passes differ in length. The stand-in's pictures come again under other captions,
           as other pictures would.
Tables     *.tsv with a head, or *.parquet, of columns picture, caption and language; one row for each caption. A
           picture is called as in the set of `pictures`: a path below that folder, or a name within that zip; without
           `pictures` that is the table's own folder.
Lists      `metadata`, a JSON object of a list of entries for each language: what balancing counts.
Prompts    `prompts`, a JSON object {language: {"templates": ["a photo of a {}"], "classes": ["cat", ...]}}: what
           classes are called in each language, for zero-shot classification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright import limits
from imagewright.checks import require_number, require_whole
from imagewright.data.caption_tables import Prompt, Prompts, read_captions, read_lists, read_prompts
from imagewright.data.curation.balancing import Balance, Chances, Curation, count
from imagewright.data.curation.matching import Lists, Matcher
from imagewright.data.fitting import Fit
from imagewright.data.image_set import ImageSet
from imagewright.data.opening import open_images
from imagewright.data.pixels import from_uint8
from imagewright.data.source import DataSource
from imagewright.data.standin_captions import SOURCE, standin_captions
from imagewright.data.words import Vocabulary, WordList, encoded, vocabulary
from imagewright.types import Chance, DataSpec, Example, UserError

Rebalance = Literal["language", "global", "none"]
WORDS = 4000
"""Of a vocabulary that is made of the captions themselves."""


@dataclass(frozen=True)
class Captioned(Example):
    """Pictures with captions: images float32 [N, C, H, W] in [-1, 1], tokens int64 [N, L]."""

    images: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Texts:
    """What a captioned set gives its method: how captions become tokens, how many a caption has, names of classes."""

    vocabulary: Vocabulary
    length: int
    prompts: Prompts


@dataclass(frozen=True)
class Pairs:
    """Captions, each with its language and the place of its picture, int64 [P].

    whole: captions of one number are alternatives of one picture, int64 [P], in ascending order.
    """

    picture: npt.NDArray[np.int64]
    captions: Sequence[str]
    languages: Sequence[str]
    whole: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.captions)

    def at(self, rows: npt.NDArray[np.int64]) -> Pairs:
        """The pairs at these rows."""
        captions, languages = ([texts[i] for i in rows] for texts in (self.captions, self.languages))
        return Pairs(self.picture[rows], captions, languages, self.whole[rows])

    def match(self, lists: Lists) -> tuple[list[str | None], list[list[int]]]:
        """The list of each caption's language, and which of its entries the caption holds."""
        matcher = Matcher(lists)
        names = [matcher.list_of(language) for language in self.languages]
        return names, [matcher.match(*pair) for pair in zip(self.captions, self.languages, strict=True)]


def curated(names: Sequence[str | None], matched: Sequence[Sequence[int]], lists: Lists, how: Balance) -> Curation:
    """Counts and thresholds of captions whose entries are known."""
    of: dict[str, list[Sequence[int]]] = {name: [] for name in lists}
    for name, each in zip(names, matched, strict=True):
        if name is not None:
            of[name].append(each)
    return Curation.of({name: count(each, len(lists[name])) for name, each in of.items()}, how)


def keep_chances(curation: Curation, names: Sequence[str | None], matched: Sequence[Sequence[int]]) -> Chances:
    """Each caption's probability of being kept, float64 [P]."""
    told = zip(names, matched, strict=True)
    return np.array([curation.keep(name, each) if name is not None and each else 0.0 for name, each in told])


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedSet:
    """Pairs of picture and caption as a data set (`types.Examples`).

    keep: probability of each pair, float64 [P]; None = all are kept. curation: by which they were made.
    """

    images: ImageSet
    pairs: Pairs
    texts: Texts
    source: str
    keep: Chances | None = None
    curation: Curation | None = None

    example: ClassVar[type[Example]] = Captioned
    empty_classes: ClassVar[tuple[int, ...]] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def spec(self) -> DataSpec:
        """Of its pictures, which are of no class."""
        return replace(self.images.spec, num_classes=0, class_names=(), empty_classes=())

    @property
    def in_memory(self) -> bool:
        """Whether its pictures are."""
        return self.images.in_memory

    @property
    def offers(self) -> Mapping[str, Any]:
        """What its methods may ask for by name, beside the specification."""
        return {"texts": self.texts}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of pictures, captions, languages, probabilities and vocabulary."""
        total = sha256(self.images.fingerprint.encode())
        total.update(self.pairs.picture.astype("<i8").tobytes())
        for texts in (self.pairs.captions, self.pairs.languages):
            total.update("\0".join(texts).encode("utf-8", "surrogatepass"))
        total.update(b"" if self.keep is None else self.keep.astype("<f8").tobytes())
        total.update(repr((self.texts.vocabulary.identity, self.texts.length)).encode())
        return total.hexdigest()

    def passing(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """The pairs of one pass: of each picture's captions one, and of those what is kept."""
        return drawn(self.pairs.whole, np.ones(len(self)) if self.keep is None else self.keep, generator)

    def read(self, rows: npt.NDArray[np.int64]) -> Any:
        """Pictures, uint8 [n, H, W, C]."""
        return self.images.images(self.pairs.picture[rows])

    def batch(self, read: Any, rows: npt.NDArray[np.int64], chance: Chance) -> Captioned:
        """Pictures as they were read, and their captions' tokens."""
        captions = [self.pairs.captions[row] for row in rows]
        return Captioned(torch.from_numpy(read), encoded(self.texts.vocabulary, captions, self.texts.length))

    def prepared(self, batch: Captioned) -> Captioned:
        """Pictures in [-1, 1]."""
        return replace(batch, images=from_uint8(batch.images))


def drawn(whole: npt.NDArray[np.int64], keep: Chances, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of one draw: of each picture's captions that may be kept at all one, evenly; and of those what is kept."""
    numbers, kept = generator.random(len(keep)), generator.random(len(keep))
    some = np.flatnonzero(keep > 0)
    rows = some[one_each(whole[some], numbers[some])]
    return rows[kept[rows] < keep[rows]]


def one_each(groups: npt.NDArray[np.int64], numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Of every group of neighbours one row, that with the least number: an even choice where numbers are uniform."""
    order = np.lexsort((numbers, groups))
    first = np.ones(len(groups), bool)
    first[1:] = np.diff(groups[order]) > 0
    return order[first]


def open_table(
    table: Path,
    pictures: str | None = None,
    resolution: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageSet, Pairs]:
    """The pictures of a table, and its captions.

    Other pictures may lie beside them, usable or not. Raises UserError for a damaged table, and for pictures of it that
    are absent or not usable.
    """
    names, captions, languages = read_captions(table)
    fit: Fit | None = "crop" if resolution is not None else None
    images = open_images(
        pictures or table.parent, resolution=resolution, fit=fit, labels=False, split="all", on_progress=on_progress,
        filter="bicubic" if fit else "lanczos", skip_bad=True,
    )  # fmt: skip
    places = {name: place for place, name in enumerate(images.names)}
    bad = dict(images.skipped)
    if unusable := [f"{name}: {bad[name]}" for name in dict.fromkeys(names) if name in bad]:
        raise UserError(
            f"{table} names {len(unusable)} unusable pictures: {'; '.join(unusable[:5])}; a size is that of most "
            f"pictures of {images.source}, or --data.resolution"
        )
    absent = [name for name in names if name not in places]
    if absent:
        named = ", ".join(dict.fromkeys(absent[:5]))
        raise UserError(f"{table} names {len(absent)} pictures that {images.source} does not hold: {named}")
    picture = np.array([places[name] for name in names], np.int64)
    order = np.argsort(picture, kind="stable")
    picture = picture[order]
    return images, Pairs(picture, [captions[i] for i in order], [languages[i] for i in order], picture)


def of_languages(pairs: Pairs, languages: Sequence[str]) -> Pairs:
    """The captions in some languages; () = all. Raises UserError for a language of none."""
    if not languages:
        return pairs
    there = {*pairs.languages}
    for each in languages:
        if each not in there:
            raise UserError(f"data.languages: no caption is in {each!r}; there are {', '.join(sorted(there))}")
    rows = [i for i, each in enumerate(pairs.languages) if each in languages]
    return pairs.at(np.array(rows, np.int64))


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig(DataSource):
    """Which captioned pictures to learn from, and how they are balanced."""

    source: str = SOURCE
    """"standin_captions" (captions in three languages, made from the classes of `pictures`), or a table of captions:
    a *.tsv or *.parquet with columns picture, caption and language."""
    pictures: str | None = None
    """Of the stand-in: digits (as without) or emoji64. Of a table: the folder, zip or other set that holds its
    pictures; none = the table's folder."""
    resolution: int | None = None
    """Pixels a side; none = the pictures' own."""
    languages: tuple[str, ...] = ()
    """Learn from captions of these languages alone; () = all."""
    balance: Rebalance = "language"
    """How often common things are shown: a threshold for each language, one for all (global), or all pairs (none)."""
    t: int | None = None
    """Captions up to which an entry is always kept, in the reference language; none = by `tail`."""
    tail: float | None = None
    """Share of the reference language's matches that are of such entries; none = 0.06, or what t gives."""
    reference: str = "en"
    metadata: str | None = None
    """JSON of the entries of each language, which `imagewright data entries` makes; the stand-in has its own."""
    prompts: str | None = None
    """JSON of what classes are called in each language; the stand-in has its own."""
    vocabulary: str = "words"
    """words (of the captions themselves), bytes, or a file of the `tokenizers` library."""
    length: int = 77
    """Tokens of a caption, its end included."""
    pairs: int = 4000
    """Of the stand-in: how many captions are made."""
    seed: int = 0
    """Of the stand-in."""
    zipf: float = 1.0
    """Of the stand-in: the k-th class of a language comes in proportion to k^-zipf."""

    def __post_init__(self) -> None:
        if self.balance not in get_args(Rebalance):
            raise UserError(f"data.balance is {self.balance!r}; allowed: {', '.join(get_args(Rebalance))}")
        idle = [n for n, usual in (("t", None), ("tail", None), ("reference", "en"), ("metadata", None))
                if getattr(self, n) != usual]  # fmt: skip
        if self.balance == "none" and idle:
            raise UserError(f"data.{idle[0]} has no effect with data.balance none")
        Balance(t=self.t, tail=self.tail)
        require_whole("data.length", self.length, 2, limits.CLASSES)
        require_whole("data.pairs", self.pairs, 1, 10**7)
        require_whole("data.seed", self.seed, 0, 2**62)
        require_number("data.zipf", self.zipf, 0, 10)
        if self.source == SOURCE:
            for name in ("metadata", "prompts"):
                if getattr(self, name) is not None:
                    raise UserError(f"data.{name} has no effect on {SOURCE}, which has its own")
        elif (self.pairs, self.seed, self.zipf) != (4000, 0, 1.0):
            raise UserError(f"data.pairs, data.seed and data.zipf are of {SOURCE}; {self.source} is as it is")

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> CaptionedSet:
        """Open and check pictures, captions and lists. Raises UserError for what is damaged or does not fit."""
        if self.source == SOURCE:
            made = standin_captions(self.pictures or "digits", self.resolution, self.pairs, self.seed, self.zipf)
            pairs = Pairs(made.picture, made.captions, made.languages, np.arange(len(made.captions)))
            images, source = made.images, made.source
            lists: Lists | None = made.lists
            prompts: Prompts = {language: Prompt(**told) for language, told in made.prompts.items()}  # type: ignore[typeddict-item]
        else:
            source = self.source
            images, pairs = open_table(Path(source), self.pictures and self._found(self.pictures), self.resolution,
                                       on_progress)  # fmt: skip
            lists = None if self.metadata is None else read_lists(Path(self._found(self.metadata)))
            prompts = {} if self.prompts is None else read_prompts(Path(self._found(self.prompts)))
        pairs = of_languages(pairs, self.languages)
        words = self._words(pairs)
        texts = Texts(words, self.length, prompts)
        found = CaptionedSet(images=images, pairs=pairs, texts=texts, source=source)
        if self.balance == "none":
            return found
        if lists is None:
            raise UserError("data.balance needs the entries of each language: data.metadata FILE; or say none")
        names, matched = pairs.match(lists)
        curation = curated(names, matched, lists, self.how())
        return replace(found, keep=keep_chances(curation, names, matched), curation=curation)

    def _words(self, pairs: Pairs) -> Vocabulary:
        if self.vocabulary == "words":
            return WordList.of(pairs.captions, WORDS)
        return vocabulary(self.vocabulary if self.vocabulary == "bytes" else self._found(self.vocabulary))

    def _found(self, name: str) -> str:
        """A path from here, else from the table's folder, so that a run goes on from anywhere."""
        beside = Path(self.source).parent / name
        return str(beside) if not Path(name).exists() and beside.exists() else name

    def how(self) -> Balance:
        """How captions are balanced, where they are."""
        rule = "global" if self.balance == "global" else "language"
        return Balance(t=self.t, tail=self.tail, reference=self.reference, rule=rule)  # type: ignore[arg-type]

    def held_out(self) -> ImageSet:
        """Labelled pictures that no caption is of, as many of each class. Raises UserError for a table: it has none."""
        if self.source != SOURCE:
            raise UserError(f"{self.source} has captions and no classes; name labelled pictures with --data")
        return standin_captions(self.pictures or "digits", self.resolution, 1, self.seed).held_out

    def absent(self) -> CaptionedSet | None:
        """An empty set like this one, for a dry run, where its files are not there."""
        if self.source == SOURCE or Path(self.source).exists():
            return None
        side = self.resolution or 224
        spec = DataSpec(name=Path(self.source).stem, resolution=side, channels=3)
        pixels = np.zeros((0, side, side, 3), np.uint8)
        images = ImageSet(
            spec=spec, pixels=pixels, labels=np.zeros(0, np.int64), names=(), source=self.source, digests=()
        )
        words = Unread(VOCABULARIES.get(Path(self.vocabulary).name, WORDS))
        pairs = Pairs(np.zeros(0, np.int64), (), (), np.zeros(0, np.int64))
        return CaptionedSet(images=images, pairs=pairs, texts=Texts(words, self.length, {}), source=self.source)


VOCABULARIES: Mapping[str, int] = {"xlm-v.json": 901_629}
"""Ids of the tokenizers that recipes name."""


@dataclass(frozen=True)
class Unread:
    """A vocabulary of which the size is known, and no more."""

    values: int

    @property
    def identity(self) -> dict[str, Any]:
        return {"words": self.values}

    def ids(self, text: str) -> list[int]:
        raise UserError("the tokenizer's file is not there")

    def describe(self) -> str:
        return "bytes"
