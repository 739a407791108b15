"""Texts as token ids: bytes, words of a list, or a tokenizer's own file.

Places     0 start (no vocabulary here but a file's writes it), 1 padding, 2 end of text, 3 unknown, then what there is:
           XLM-R's and XLM-V's order, so that a text ends at the first place that holds 2, whatever the vocabulary.
Words      lower case; punctuation is left out; characters of languages that put no spaces between words (Chinese,
           Japanese, Thai, ...) are words of their own, as in MetaCLIP 2's `simple_tokenizer`.
A text that is too long loses its end, and keeps the mark of it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from imagewright import limits
from imagewright.files import read_bytes
from imagewright.shapes import brief
from imagewright.types import UserError

START, PAD, END, UNKNOWN = range(4)
SPECIAL = 4

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x2FF0, 0x2FFF),
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x4DBF),  # ideographs, this one and those below
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2EBEF),
)
"""First and last code points of scripts without spaces."""


class Vocabulary(Protocol):
    """Texts as token ids."""

    @property
    def values(self) -> int:
        """How many ids there are."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of it, JSON values."""
        ...

    def ids(self, text: str) -> list[int]:
        """One text's, without start, end and padding."""
        ...

    def describe(self) -> str | list[str]:
        """A text or a list of words, of which `vocabulary` makes the same again."""
        ...


def encoded(vocabulary: Vocabulary, texts: Sequence[str], length: int) -> Tensor:
    """Texts as int64 [N, length]: their ids, END, then PAD; cut to length - 1 ids. Raises UserError for length < 2."""
    if length < 2:
        raise UserError(f"a text of {length} tokens has no room for a word and its end")
    out = torch.full((len(texts), length), PAD)
    start = [START] if getattr(vocabulary, "starts", False) else []
    for row, text in zip(out, texts, strict=True):
        ids = [*start, *vocabulary.ids(text)][: length - 1]
        row[: len(ids) + 1] = torch.tensor([*ids, END])
    return out


def unspaced(character: str) -> bool:
    """Whether it is of a script that puts no spaces between words."""
    point = ord(character)
    return any(first <= point <= last for first, last in UNSPACED)


def words_of(text: str, *, lower: bool = True) -> Iterator[str]:
    """The words of a text, in order. lower: in lower case."""
    word = ""
    for character in text.lower() if lower else text:
        if unspaced(character) or character.isspace() or unicodedata.category(character)[0] in "PZC":
            if word:
                yield word
            word = ""
            if unspaced(character):
                yield character
        else:
            word += character
    if word:
        yield word


@dataclass(frozen=True)
class Bytes:
    """A text's bytes in UTF-8; every text can be written, and no two are alike."""

    @property
    def values(self) -> int:
        return SPECIAL + 256

    @property
    def identity(self) -> dict[str, Any]:
        return {"words": "bytes"}

    def ids(self, text: str) -> list[int]:
        return [SPECIAL + byte for byte in text.encode("utf-8", "replace")]

    def describe(self) -> str:
        return "bytes"


@dataclass(frozen=True)
class WordList:
    """Words of a list; others are unknown. Raises UserError for a list that has a word twice, or an empty one."""

    known: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(self.known) or len({*self.known}) < len(self.known):
            twice = [word for word, n in Counter(self.known).items() if n > 1 or not word]
            raise UserError(f"a list of words has {brief(twice[0])} more than once, or empty")
        object.__setattr__(self, "_places", {word: SPECIAL + i for i, word in enumerate(self.known)})

    @classmethod
    def of(cls, texts: Iterable[str], most: int = limits.CLASSES) -> WordList:
        """The most frequent words of texts, by frequency and then by the alphabet."""
        counts = Counter(word for text in texts for word in words_of(text))
        return cls(tuple(sorted(counts, key=lambda word: (-counts[word], word))[:most]))

    @property
    def values(self) -> int:
        return SPECIAL + len(self.known)

    @property
    def identity(self) -> dict[str, Any]:
        return {"words": len(self.known), "sha256": sha256("\n".join(self.known).encode()).hexdigest()}

    def ids(self, text: str) -> list[int]:
        places: Mapping[str, int] = self._places  # type: ignore[attr-defined]
        return [places.get(word, UNKNOWN) for word in words_of(text)]

    def describe(self) -> list[str]:
        return list(self.known)


class TokenizerFile:
    """A file of the `tokenizers` library (XLM-V's tokenizer.json, say). Needs the extra `words`.

    The file is JSON and runs nothing. Raises UserError for a damaged one, and for one whose end of text is not id 2 or
    whose padding is not id 1, by which networks here find a text's end.
    """

    starts: ClassVar[bool] = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        content = read_bytes(self.path, limits.LOG)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"{path} needs a package: pip install 'imagewright[words]'") from None
        try:
            self._tokenizer: Any = Tokenizer.from_str(content.decode())
        except Exception as error:  # the library answers a damaged file with a bare Exception
            raise UserError(f"{path} is no tokenizer's file: {str(error)[:200]}") from None
        names = {START: ("<s>",), PAD: ("<pad>",), END: ("</s>",)}
        for place, allowed in names.items():
            found = self._tokenizer.id_to_token(place)
            if found not in allowed:
                raise UserError(
                    f"{path} has {found!r} as id {place}; it must be {allowed[0]!r}, as in XLM-R's and XLM-V's"
                )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.values: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._sha256 = sha256(content).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        return {"words": self.values, "sha256": self._sha256}

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def describe(self) -> str:
        return located(self.path, self._sha256)


_SHA256 = " sha256:"


def located(path: Path, sha256: str) -> str:
    """A tokenizer's file as `vocabulary` takes it, which refuses another one in its place."""
    return f"{path.absolute()}{_SHA256}{sha256}"


def vocabulary(described: Any) -> Vocabulary:
    """The inverse of `describe`; also of a file's path alone. Raises UserError for anything else."""
    if described == "bytes":
        return Bytes()
    if isinstance(described, list | tuple) and all(isinstance(word, str) for word in described):
        return WordList(tuple(described))
    if not isinstance(described, str):
        raise UserError(
            f"a vocabulary is {brief(described)}; it must be 'bytes', a list of words or a tokenizer's file"
        )
    path, _, sha256 = described.partition(_SHA256)
    found = TokenizerFile(path)
    if sha256 not in ("", found.identity["sha256"]):
        raise UserError(f"{path} is another tokenizer than the one that was trained with")
    return found
