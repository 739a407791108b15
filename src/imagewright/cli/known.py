"""Mistyped options, told at once: a table of all options, so that neither torch nor a parser is loaded to say no.

`options.json` is made of the commands' own parsers by `python -m imagewright.cli.completion`; a test holds it to them.
What the table does not know (a user's own file, a recipe of later date) goes to the parser.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from imagewright.errors import UserError

TABLE = Path(__file__).parent / "options.json"


def require_known(args: Sequence[str]) -> None:
    """Raise UserError where a word begins like an option and is none of its command's."""
    if args[0] == "train" and args[1:2] != ["--resume"]:
        _require_no_folder_after_resume(args)
    written = [word.split("=")[0].replace("_", "-") for word in args if word.startswith("--") and word != "--"]
    if not written or "--help" in written:
        return
    known = _options(args)
    for option in written if known else ():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            command = " ".join(args[:2] if args[0] == "train" else args[:1])  # every recipe has its own
            hint = f"did you mean {near[0]}?" if near else f"`imagewright {command} --help` lists them"
            raise UserError(f"`imagewright {command}` has no option {option}; {hint}")


def _require_no_folder_after_resume(args: Sequence[str]) -> None:
    """Raise UserError for `train RECIPE --resume RUN`: after a recipe the run is that of --out."""
    for word, after in pairwise(args):
        if word == "--resume" and not after.startswith("-"):
            raise UserError(
                f"--resume {after} after {args[1]}: a run goes on with `imagewright train --resume {after}`, or with "
                f"its recipe by `--resume --out {after}`"
            )


def _options(args: Sequence[str]) -> frozenset[str]:
    """The options that may follow these first words; empty where they are not known."""
    table = json.loads(TABLE.read_text())
    for name in (" ".join(args[:2]), args[0]):
        if name in table["commands"]:
            return frozenset(table["options"][table["commands"][name]])
    return frozenset()
