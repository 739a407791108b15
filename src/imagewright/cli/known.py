"""Mistyped options, told at once: a table of all options, so that neither torch nor a parser is loaded to say no.

`options.json` is made of the commands' own parsers by `python -m imagewright.cli.completion`; a test holds it to them.
What the table does not know (a user's own file, a recipe of later date) goes to the parser.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from imagewright.errors import UserError

TABLE = Path(__file__).parent / "options.json"


def require_known(args: Sequence[str]) -> None:
    """Raise UserError where a word begins like an option and is none of its command's."""
    written = [word.split("=")[0].replace("_", "-") for word in args if word.startswith("--") and word != "--"]
    if not written or "--help" in written:
        return
    known = _options(args)
    for option in written if known else ():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"`imagewright {args[0]} --help` lists them"
            raise UserError(f"`imagewright {args[0]}` has no option {option}; {hint}")


def _options(args: Sequence[str]) -> frozenset[str]:
    """The options that may follow these first words; empty where they are not known."""
    table = json.loads(TABLE.read_text())
    for name in (" ".join(args[:2]), args[0]):
        if name in table["commands"]:
            return frozenset(table["options"][table["commands"][name]])
    return frozenset()
