"""Which entries of its language's list a caption holds, as whole words. Needs the extra `captions` (pyahocorasick).

Words      A caption is written between spaces, with spaces around , . ; : ? ! ` too, and an entry between spaces of its
           own, so that what is found is a whole word. On a side that ends in a sign, or in a character of a script
           without spaces, an entry has none: there every place is a boundary.
Languages  A caption is matched within its own language's list alone. Languages are called as the lists are; a variant
           (zh_yue, de-AT) that has no list takes its language's, and one without any the list `other`, if there is one.
Counts     An entry counts once for each caption, however often it stands there.
Source     facebookresearch/MetaCLIP, `metaclip/curation/substr_matching.py`; that captions are stripped, its callers'.
Departs    Kana are a script without spaces (there not, so that a Japanese word of kana matches between spaces alone). A
           variant that has a list is matched by that alone (there `align_lid_to_wiki.py` joins those of zh, zh_yue and
           zh_classical into one, and takes languages that are not told apart together as `other`).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from imagewright.data.words import unspaced
from imagewright.types import UserError

SIGNS = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")
WRAPPED = ",.;:?!`"
OTHER = "other"

Lists = Mapping[str, Sequence[str]]
"""Entries by language."""


class Matcher:
    """Finds entries in captions; each language's automaton is built when it is first asked for.

    Raises UserError without the package, and on an entry that is empty, ends in spaces or stands twice in a list.
    """

    def __init__(self, lists: Lists) -> None:
        try:
            import ahocorasick
        except ImportError:
            raise UserError("matching captions needs a package: pip install 'imagewright[captions]'") from None
        for language, entries in lists.items():
            if not all(each and each == each.strip() for each in entries) or len({*entries}) < len(entries):
                named = language or "no language"
                raise UserError(f"the list of {named} has an entry twice, or one that is empty or ends in spaces")
        self.lists = lists
        self._automaton = ahocorasick.Automaton
        self._built: dict[str, Any] = {}

    def list_of(self, language: str) -> str | None:
        """The name of the list of a caption's language; None where there is none."""
        plain = language.replace("-", "_")
        names = (language, plain, plain.split("_")[0], OTHER)
        return next((name for name in names if name in self.lists), None)

    def match(self, caption: str, language: str) -> list[int]:
        """Places of the entries that a caption holds, in order, in the list of its language; [] without a list."""
        name = self.list_of(language)
        if name is None or not self.lists[name]:
            return []
        if name not in self._built:
            self._built[name] = self._build(self.lists[name])
        return sorted({place for _, place in self._built[name].iter(spaced(caption.strip()))})

    def _build(self, entries: Sequence[str]) -> Any:
        automaton = self._automaton()
        for place, entry in enumerate(entries):
            automaton.add_word(bounded(entry), place)
        automaton.make_automaton()
        return automaton


def spaced(caption: str) -> str:
    """A caption as it is looked through."""
    out = f" {caption} "
    for sign in WRAPPED:
        out = out.replace(sign, f" {sign} ")
    return out.translate({ord(c): " " for c in "\t\n\r"})


def bounded(entry: str) -> str:
    """An entry as it is looked for."""
    first, last = ("" if unspaced(c) or c in SIGNS else " " for c in (entry[0], entry[-1]))
    return f"{first}{entry}{last}"
