"""Lists of entries of a language, made from its texts: numbers, given entries, frequent words, pairs of words, titles.

Order      "0" .. "99"; what was given (WordNet's synsets, say, of a file: the package brings none); unigrams by
           frequency, a tenth of all, at most 251,465; bigrams by pointwise mutual information, those above 30 bits, at
           most 100,646 and as many as 40 % of the language's unigrams; titles by views, 76 % of all, at most 61,235.
           An entry that is there already counts for none of these shares. Signs alone, and entries of over 256
           characters, are left out. Words with a sign between them are no pair.
PMI        log2(c(a b) N / (c(a) c(b))) with N the number of words, as NLTK has it. 30 bits are for texts of 10^9 words
           and more, the only ones that reach it: smaller collections give a limit of their own.
Unspaced   Languages without spaces have their pairs joined without one.
Source     facebookresearch/MetaCLIP, `metaclip/metadata/build_ngram.py` and `build_metadata.py`. Its program caps
           bigrams at 100,646 alone; its guide says 40 % of the unigrams too, and the guide is followed.
Departs    Words are `words.words_of`'s, where every ideograph is one (there a segmenter for each language without
           spaces), and signs of all scripts end them (there those of `SIGNS`). No pair goes from one caption to the
           next (there on through a file). English is made as the others are (there the first MetaCLIP's list, which
           here `given` may be).
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from imagewright.checks import require_number
from imagewright.data.curation.matching import SIGNS
from imagewright.data.words import words_of

NO_SPACES = frozenset({"bo", "dz", "ja", "km", "lo", "my", "ryu", "th", "zh", "zh_classical", "zh_yue"})
UNIGRAMS, BIGRAMS, TITLES = (0.1, 251_465), (0.4, 100_646), (0.76, 61_235)
"""Share and most."""
LONGEST = 256
PMI = 30.0


def build_metadata(
    texts: Iterable[str],
    language: str,
    *,
    given: Sequence[str] = (),
    titles: Mapping[str, int] | None = None,
    least_pmi: float = PMI,
    unigrams: float = UNIGRAMS[0],
) -> list[str]:
    """The entries of a language, each once, in the order above. least_pmi: in bits. unigrams: share of all words."""
    require_number("unigrams", unigrams, 0, 1)
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for text in texts:
        for said in _phrases(text):
            words.update(said)
            pairs.update(pairwise(said))
    entries: dict[str, None] = {str(n): None for n in range(100)}
    _add(entries, given, len(given))
    by_count = sorted(words, key=lambda word: (-words[word], word))
    many = min(UNIGRAMS[1], int(len(words) * unigrams))
    _add(entries, by_count, many)
    bits = {pair: information(pairs[pair], words[pair[0]], words[pair[1]], words.total()) for pair in pairs}
    between = "" if language in NO_SPACES else " "
    kept = sorted((pair for pair in bits if bits[pair] > least_pmi), key=lambda pair: (-bits[pair], pair))
    _add(entries, [between.join(pair) for pair in kept], min(BIGRAMS[1], int(BIGRAMS[0] * len(words))))
    views = titles or {}
    by_views = sorted(views, key=lambda title: (-views[title], title))
    _add(entries, by_views, min(TITLES[1], int(TITLES[0] * len(views))))
    return list(entries)


def _phrases(text: str) -> Iterator[list[str]]:
    """The words between two signs."""
    cut = "".join("\0" if c in SIGNS or unicodedata.category(c)[0] == "P" else c for c in text)
    return (list(words_of(each, lower=False)) for each in cut.split("\0"))


def information(both: int, first: int, second: int, words: int) -> float:
    """Pointwise mutual information of a pair, in bits."""
    return math.log2(both * words) - math.log2(first * second)


def _add(entries: dict[str, None], candidates: Iterable[str], most: int) -> None:
    """Add candidates in order until so many new ones are there."""
    added = 0
    for each in candidates:
        if added >= most:
            return
        entry = each.strip()
        if entry and len(entry) <= LONGEST and entry not in entries and not all(c in SIGNS or c == "¿" for c in entry):
            entries[entry] = None
            added += 1
