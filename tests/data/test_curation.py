"""Matching and balancing of captions: closed forms, word boundaries, and lists of entries made from texts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imagewright.data.curation import metadata
from imagewright.data.curation.balancing import Balance, Curation, chances, count, keeping, p_to_t, t_to_p
from imagewright.data.curation.metadata import build_metadata, information
from imagewright.types import UserError

COUNTS = np.array([1, 1, 2, 6, 10, 80])


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_a_threshold_and_its_share_by_hand() -> None:
    """Entries of fewer than 6, not of 6: (1 + 1 + 2) / 100; and 0.04 is met by the count 2."""
    assert t_to_p(COUNTS, 6) == 0.04
    assert t_to_p(COUNTS, 7) == pytest.approx(0.10)
    assert p_to_t(COUNTS, 0.04) == 2
    assert p_to_t(COUNTS, 0.0699) == 2 and p_to_t(COUNTS, 0.0701) == 6, "0.07 is as near to 0.04 as to 0.10"
    assert p_to_t(COUNTS, 1.0) == 80
    assert p_to_t(np.array([1, 1, 2, 4]), 0.375) == 1, "as near to 1/4 as to 1/2, exactly: the smaller"


def test_entries_that_nothing_holds_change_no_threshold() -> None:
    assert p_to_t(np.array([0, 0, *COUNTS]), 0.0) == 1


def test_alone_an_entry_is_kept_up_to_its_threshold() -> None:
    """Expected matches are min(c, t), and a draw of all captions agrees to 3 sigma."""
    t, rng = 6, np.random.default_rng(0)
    chance = chances(COUNTS, t)
    np.testing.assert_allclose(COUNTS * chance, np.minimum(COUNTS, t), rtol=1e-12)
    entry = np.repeat(np.arange(len(COUNTS)), COUNTS)
    kept = np.array([np.bincount(entry[rng.random(len(entry)) < chance[entry]], minlength=6) for _ in range(2000)])
    sigma = np.sqrt(COUNTS * chance * (1 - chance) / len(kept))
    assert (np.abs(kept.mean(0) - np.minimum(COUNTS, t)) <= 3 * sigma).all()
    assert sigma[-1] > 0 and (chance[:4] == 1).all()


def test_one_success_among_a_captions_entries_suffices_in_any_order() -> None:
    """1 - prod(1 - p) is how often a turn of independent draws that ends with the first success has one."""
    chance = np.array([0.1, 0.3, 0.25, 1.0])
    assert keeping(chance, [0, 1, 2]) == pytest.approx(1 - 0.9 * 0.7 * 0.75, rel=1e-12)
    assert keeping(chance, [2, 0, 1]) == pytest.approx(keeping(chance, [0, 1, 2]), rel=1e-12)
    assert keeping(chance, [0, 3]) == 1.0
    assert keeping(chance, []) == 0.0
    rng, n = np.random.default_rng(1), 40_000
    for order in ([0, 1, 2], [2, 1, 0]):
        hits = 0.0
        left = np.ones(n, bool)
        for entry in order:
            success = left & (rng.random(n) < chance[entry])
            hits, left = hits + success.sum(), left & ~success
        exact = keeping(chance, order)
        assert abs(hits / n - exact) <= 3 * math.sqrt(exact * (1 - exact) / n)


def test_every_language_has_its_own_threshold_or_all_have_one() -> None:
    counts = {"en": COUNTS, "ja": COUNTS // 2}
    own = Curation.of(counts, Balance(t=6))
    assert own.tail == 0.04 and own.thresholds == {"en": 6, "ja": 1}
    assert Curation.of(counts, Balance(t=6, rule="global")).thresholds == {"en": 6, "ja": 6}
    assert Curation.of(counts, Balance(tail=0.04)).thresholds == {"en": 2, "ja": 1}
    asked = Curation.of({"en": COUNTS, "de": np.array([0, 4, 6, 90])}, Balance(tail=0.1))
    assert asked.thresholds == {"en": 6, "de": 6}, "by the share that was asked for, not by the 0.04 that 6 leaves"
    assert asked.tail == 0.04 and asked.as_dict()["entries"] == {"en": 6, "de": 3}
    assert own.keep("ja", [5]) == pytest.approx(1 / 40)
    np.testing.assert_allclose(own.expected("en", [[5], [5, 0], [4]]), [1, 0, 0, 0, 0.6, 6 / 80 + 1])
    with pytest.raises(UserError, match=r"reference is 'en', a language without matches; there are de, ja"):
        Curation.of({"de": COUNTS, "ja": COUNTS}, Balance())
    assert Curation.of({"": COUNTS}, Balance(t=2)).thresholds == {"": 2}, "labels are of no language"
    with pytest.raises(UserError, match=r"reference is 'de'.* there are labels"):
        Curation.of({"": COUNTS}, Balance(reference="de"))
    with pytest.raises(UserError, match="no caption holds any entry"):
        Curation.of({"en": COUNTS * 0}, Balance())


@pytest.mark.parametrize("wrong", [{"t": 0}, {"tail": 1.5}, {"rule": "some"}, {"t": 3, "tail": 0.1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Balance(**wrong)  # type: ignore[arg-type]


def test_matches_are_counted_once_a_caption() -> None:
    assert count([[0, 2], [2], []], 4).tolist() == [1, 0, 2, 0]


# --- matching ---------------------------------------------------------------------------------------------------------


def test_entries_are_whole_words_but_for_scripts_without_spaces() -> None:
    pytest.importorskip("ahocorasick")
    from imagewright.data.curation.matching import Matcher

    matcher = Matcher({"en": ["cat", "dog"], "zh": ["猫", "cat"], "ja": ["ねこ", "猫"], "other": ["kat"]})
    assert matcher.match("a cat.", "en") == [0]
    assert matcher.match("concatenate", "en") == []
    assert matcher.match("cat cat dog", "en") == [0, 1], "each once"
    assert matcher.match("一只猫在这里", "zh") == [0]
    assert matcher.match("これはねこです", "ja") == [0], "kana are written without spaces, too"
    assert matcher.match("猫", "en") == [] and matcher.match("dog", "zh") == [], "in its own language alone"
    assert matcher.match("猫 cat", "zh_yue") == [0, 1] and matcher.list_of("zh-Hant") == "zh"
    assert Matcher({"zh": ["猫"], "zh_yue": ["猫"]}).list_of("zh-yue") == "zh_yue", "a variant's own list comes first"
    assert matcher.match("`cat`", "en") == [0] and matcher.match("(cat)", "en") == [], "some signs part words"
    assert matcher.match("cat\xa0", "en") == [0], "captions are stripped of all kinds of spaces"
    sided = Matcher({"zh": ["T恤", "恤T", "c#"]})
    assert sided.match("穿 T恤衫", "zh") == [0] and sided.match("白T恤衫", "zh") == [], "each side by its own character"
    assert sided.match("白恤T 衫", "zh") == [1] and sided.match("a c#b", "zh") == [2], "no space after a sign"
    rare = Matcher({"zh": ["\U0002cea1", "\U0002ebe0"]})
    assert rare.match("一\U0002cea1一\U0002ebe0一", "zh") == [0, 1], "ideographs to the end of extension F"
    assert matcher.match("a kat", "sv") == [0], "and languages without a list have one together"
    assert Matcher({"en": ["cat"]}).match("a cat", "sv") == []
    for wrong in (["cat", "cat"], ["cat", ""], ["cat", " "], ["cat "]):
        with pytest.raises(UserError, match="list of en has an entry twice, or one that is empty"):
            Matcher({"en": wrong})


# --- lists of entries -------------------------------------------------------------------------------------------------


def test_a_list_is_made_of_numbers_words_pairs_and_titles() -> None:
    texts = ["red dog runs", "red dog sits", "a cat", "a cow", "Red!"]
    made = build_metadata(texts, "en", given=["dog", "!?", "x" * 257], titles={"New York": 9, "dog": 99, "Oslo": 1},
                          least_pmi=1.0, unigrams=0.4)  # fmt: skip
    assert made[:100] == [str(n) for n in range(100)]
    words = {"red", "dog", "runs", "sits", "a", "cat", "cow", "Red"}
    assert made[100] == "dog"
    assert made[101:104] == ["a", "red", "Red"], "two fifths of eight words, and what is there already counts for none"
    pairs = made[104:-2]
    bits = {
        "red dog": information(2, 2, 2, 11),
        "dog runs": information(1, 2, 1, 11),
        "a cat": information(1, 2, 1, 11),
    }
    assert bits["red dog"] == pytest.approx(math.log2(11 * 2 / 4)) and min(bits.values()) > 1
    assert pairs == ["a cat", "a cow", "dog runs"], "three of eight words' two fifths, by information"
    assert made[-2:] == ["New York", "Oslo"] and len(words) == 8


def test_of_titles_three_quarters_are_added_and_the_longest_entry_has_256_characters() -> None:
    made = build_metadata([], "en", given=["x" * 256, "y" * 257], titles={name: k for k, name in enumerate("abcd")})
    assert made[100:] == ["x" * 256, "d", "c", "b"]


def test_information_is_of_all_words_and_has_to_be_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """log2 6 bits of b c: six words, three different ones. A pair of just the limit is none."""
    assert build_metadata(["a a a a b c"], "en", least_pmi=2.5, unigrams=0.0)[100:] == ["b c"]
    for bits, kept in ((30.0, []), (30.5, ["dog runs"])):
        monkeypatch.setattr(metadata, "information", lambda *_, found=bits: found)
        assert build_metadata(["red dog runs"], "en", unigrams=0.0)[100:] == kept


def test_words_with_a_sign_between_them_are_no_pair() -> None:
    made = build_metadata(["red, dog", "red dog", "cat. Cow", "a+b", "un، deux"], "en", least_pmi=0, unigrams=1.0)
    pairs = made[100 + len({"red", "dog", "cat", "Cow", "a", "b", "un", "deux"}) :]
    assert pairs == ["red dog"] and "¿" not in build_metadata(["a"], "es", given=["¿"])


def test_pairs_of_scripts_without_spaces_are_joined_without_one() -> None:
    made = build_metadata(["红猫", "红猫", "白狗"], "zh", least_pmi=0.5, unigrams=1.0)
    assert made[-1] == "白狗" and "红猫" not in made, "rarer words tell more; two fifths of four are one"


def test_a_limit_of_thirty_bits_keeps_no_pair_of_a_small_collection() -> None:
    made = build_metadata(["red dog runs"] * 9, "en", unigrams=1.0)
    assert set(made[100:]) == {"red", "dog", "runs"}
