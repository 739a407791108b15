"""Texts as token ids, by each kind of vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagewright.data.words import (
    END,
    PAD,
    SPECIAL,
    START,
    UNKNOWN,
    Bytes,
    TokenizerFile,
    WordList,
    encoded,
    vocabulary,
    words_of,
)
from imagewright.types import UserError


def test_words_are_split_at_spaces_and_signs_and_around_every_ideograph() -> None:
    assert list(words_of("A cat's 2nd «Haus», 零の画像 ok")) == ["a", "cat", "s", "2nd", "haus", *"零の画像", "ok"]


def test_a_list_has_the_most_frequent_words_and_knows_no_others() -> None:
    words = WordList.of(["b a a", "c b a", "d"], most=3)
    assert words.known == ("a", "b", "c") and words.values == SPECIAL + 3
    assert words.ids("c x A") == [SPECIAL + 2, UNKNOWN, SPECIAL]
    assert vocabulary(json.loads(json.dumps(words.describe()))) == words
    with pytest.raises(UserError, match="'a' more than once"):
        WordList(("a", "a"))


def test_bytes_write_every_text() -> None:
    assert Bytes().ids("né") == [SPECIAL + b for b in "né".encode()]
    assert vocabulary("bytes") == Bytes()


def test_a_text_ends_with_its_mark_however_it_is_cut() -> None:
    words = WordList(("a", "b"))
    made = encoded(words, ["a b", "a b a b a", ""], 4)
    assert made.tolist() == [[4, 5, END, PAD], [4, 5, 4, END], [END, PAD, PAD, PAD]]
    with pytest.raises(UserError, match="no room"):
        encoded(words, ["a"], 1)


def test_a_tokenizers_file_is_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    known = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "haus": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    words = vocabulary(str(path))
    assert isinstance(words, TokenizerFile) and words.values == 6
    assert encoded(words, ["cat haus dog"], 6).tolist() == [[START, 4, 5, 3, END, PAD]]
    again = words.describe()
    assert vocabulary(again).identity == words.identity
    with pytest.raises(UserError, match="another tokenizer"):
        vocabulary(f"{again[:-1]}x")
    path.write_text(path.read_text().replace('"</s>":2', '"</s>":9').replace('"</s>": 2', '"</s>": 9'))
    with pytest.raises(UserError, match="as id 2"):
        TokenizerFile(path)
    path.write_text("{")
    with pytest.raises(UserError, match="no tokenizer's file"):
        TokenizerFile(path)
    with pytest.raises(UserError, match="does not exist"):
        TokenizerFile(tmp_path / "none.json")


@pytest.mark.parametrize("what", [None, 3, [1], {}])
def test_what_is_no_vocabulary_is_told(what: object) -> None:
    with pytest.raises(UserError, match="a vocabulary is"):
        vocabulary(what)
