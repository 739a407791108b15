"""Tables of captions, and the JSON files beside them: entries of each language, names of classes.

A table is a *.tsv with a head, or a *.parquet, of columns picture, caption and language; one row for each caption.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from imagewright import limits
from imagewright.data.curation.matching import Lists
from imagewright.data.parquet import read_columns
from imagewright.files import read_bytes, read_json
from imagewright.types import UserError

COLUMNS = ("picture", "caption", "language")


class Prompt(TypedDict):
    """What classes are called in a language: sentences with {} in them, and a name for each class."""

    templates: list[str]
    classes: list[str]


Prompts = Mapping[str, Prompt]


def read_captions(table: Path) -> tuple[list[str], list[str], list[str]]:
    """Pictures' names, captions and languages of a table's rows. Raises UserError for a damaged one, or other files."""
    if table.suffix == ".parquet":
        columns = read_columns(table, COLUMNS)
    elif table.suffix == ".tsv":
        columns = _read_tsv(table)
    else:
        raise UserError(f"{table} is no table of captions; they end in .tsv or .parquet")
    for name, column in zip(COLUMNS, columns, strict=True):
        faults = (i for i, each in enumerate(column) if not isinstance(each, str) or not (each or name == "language"))
        bad = next(faults, None)
        if bad is not None:
            raise UserError(f"{table}: row {bad + 1} has no {name}")
    if not columns[0]:
        raise UserError(f"{table} holds no captions")
    return columns[0], columns[1], columns[2]


def _read_tsv(table: Path) -> list[list[str]]:
    """Its columns, by the names in the first line."""
    try:
        text = read_bytes(table, limits.LOG).decode()
    except UnicodeDecodeError:
        raise UserError(f"{table} is no text in UTF-8") from None
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    head = rows[0] if rows else []
    if any(head.count(name) != 1 for name in COLUMNS):
        raise UserError(
            f"{table} has columns {', '.join(head[:10]) or 'none'}; it needs {', '.join(COLUMNS)}, each once"
        )
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(head):
            raise UserError(f"{table}: line {number} has {len(row)} columns; its first line has {len(head)}")
    return [[row[head.index(name)] for row in rows[1:]] for name in COLUMNS]


def write_tsv(rows: Sequence[tuple[str, str, str]]) -> str:
    """A table of captions; what would end a column or a line becomes a space."""
    clean = [[each.translate({9: " ", 10: " ", 13: " "}) for each in row] for row in (COLUMNS, *rows)]
    return "".join("\t".join(row) + "\n" for row in clean)


def read_lists(path: Path) -> Lists:
    """Entries of each language. Raises UserError for a damaged file."""
    found: dict[str, list[str]] = read_json(path, dict[str, list[str]], most=limits.LOG)
    if not found:
        raise UserError(f"{path} holds no list of entries")
    return found


def read_prompts(path: Path) -> Prompts:
    """What classes are called in each language. Raises UserError for a damaged file."""
    found: dict[str, Prompt] = read_json(path, dict[str, Prompt])
    check_prompts(found, str(path))
    return found


def check_prompts(prompts: Prompts, where: str) -> None:
    """Raise UserError for languages with other numbers of classes, and templates without a place for the name."""
    sizes = {language: len(each["classes"]) for language, each in prompts.items()}
    if len({*sizes.values()}) > 1 or 0 in sizes.values():
        raise UserError(f"{where} has {sizes} classes; every language needs as many, and one at least")
    for language, each in prompts.items():
        if not each["templates"] or not all("{}" in template for template in each["templates"]):
            raise UserError(f"{where}: every template of {language} needs {{}} where the class is named")
