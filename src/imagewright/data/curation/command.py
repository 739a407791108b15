"""What `imagewright data balance` and `data entries` do: one balanced draw of a set, written; lists of entries, made.

Captions are matched in pieces that are kept beside the result until it is there, so that the same command goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from imagewright import limits
from imagewright.data.caption_tables import read_captions, read_lists, write_tsv
from imagewright.data.captions import Pairs, curated, keep_chances, one_each
from imagewright.data.curation.balancing import Balance, Counts
from imagewright.data.curation.labelled import LABELS, balanced
from imagewright.data.curation.matching import Lists, Matcher
from imagewright.data.curation.metadata import build_metadata
from imagewright.data.edm_zip import write_edm_zip
from imagewright.data.opening import open_images
from imagewright.files import read_json, try_output, write_json, write_text
from imagewright.types import UserError

PIECE = 50_000
"""Captions that are matched at a time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Balanced:
    """What a draw left. By language: `record`'s numbers, names of entries, how often each is there before and after.

    out_of, kept: pictures.
    """

    record: Mapping[str, Any]
    names: Mapping[str, list[str]]
    before: Mapping[str, Counts]
    after: Mapping[str, Counts]
    out_of: int
    kept: int


def balance(
    source: str, out: Path, how: Balance, *, entries: Path | None, seed: int, on_progress: Progress
) -> Balanced:
    """Draw from a table of captions into a *.tsv, or from a labelled set into a *.zip; OUT.json says what was done."""
    try_output(out)
    if Path(source).suffix == ".tsv" and entries is None:
        raise UserError(f"{source} is balanced by the entries of each language: give them with --entries FILE")
    if Path(source).suffix in (".tsv", ".parquet") and Path(source).is_file() and entries is not None:
        made = _captions(Path(source), out, how, entries, seed, on_progress)
    elif entries is not None:
        raise UserError(f"{source} is no table of captions (*.tsv or *.parquet); --entries goes with one")
    else:
        made = _labels(source, out, how, seed, on_progress)
    counts = {name: {"before": made.before[name].tolist(), "after": made.after[name].tolist()} for name in made.before}
    told = {"source": source, "seed": seed, "pictures": made.out_of, "kept": made.kept}
    write_json(out.with_suffix(out.suffix + ".json"), {**told, **made.record, "names": made.names, "counts": counts})
    return made


def _labels(source: str, out: Path, how: Balance, seed: int, on_progress: Progress) -> Balanced:
    """Pictures of other splits than training's stay as they are."""
    images = open_images(source, split="all", on_progress=on_progress)
    told = np.array(["train"] * len(images) if images.splits is None else list(images.splits)) == "train"
    learnt = images.subset(np.flatnonzero(told))
    found, curation = balanced(learnt, how)
    shown = np.zeros(len(images), bool)
    shown[np.flatnonzero(told)[found.passing(np.random.default_rng(seed))]] = True
    write_edm_zip(images.subset(np.flatnonzero(shown | ~told)), out)
    classes = images.spec.num_classes
    after = np.bincount(images.labels[shown], minlength=classes)
    names = list(images.spec.class_names) or [str(k) for k in range(classes)]
    return Balanced(
        curation.as_dict(), {LABELS: names}, curation.counts, {LABELS: after}, int(told.sum()), int(shown.sum())
    )


def _captions(table: Path, out: Path, how: Balance, entries: Path, seed: int, on_progress: Progress) -> Balanced:
    if out.suffix != ".tsv":
        raise UserError(f"{out} has to end in .tsv, a table of captions")
    lists = read_lists(entries)
    pictures, captions, languages = read_captions(table)
    places = {name: i for i, name in enumerate(dict.fromkeys(pictures))}
    whole = np.array([places[name] for name in pictures], np.int64)
    order = np.argsort(whole, kind="stable")
    pairs = Pairs(whole, captions, languages, whole).at(order)
    names = [Matcher(lists).list_of(language) for language in pairs.languages]
    aside = out.with_suffix(".parts")
    matched = _matched(pairs, lists, aside, on_progress)
    curation = curated(names, matched, lists, how)
    rng = np.random.default_rng(seed)
    rows = one_each(pairs.whole, rng.random(len(pairs)))
    rows = rows[rng.random(len(pairs))[rows] < keep_chances(curation, names, matched)[rows]]
    kept = [(pictures[order[i]], pairs.captions[i], pairs.languages[i]) for i in rows.tolist()]
    write_text(out, write_tsv(kept))
    shutil.rmtree(aside, ignore_errors=True)
    after = {name: np.zeros(len(lists[name]), np.int64) for name in curation.counts}
    for row in rows.tolist():
        name = names[row]
        if name is not None:
            after[name][matched[row]] += 1
    there = {name: [i for i, n in enumerate(each) if n] for name, each in curation.counts.items()}
    record = {**curation.as_dict(), "without": sum(not each for each in matched)}
    return Balanced(
        record,
        {name: [lists[name][i] for i in some] for name, some in there.items()},
        {name: curation.counts[name][some] for name, some in there.items()},
        {name: after[name][some] for name, some in there.items()},
        len(places),
        len(kept),
    )


def _matched(pairs: Pairs, lists: Lists, aside: Path, on_progress: Progress) -> list[list[int]]:
    """Entries of each caption; pieces that an earlier start has matched are read."""
    told = sha256(json.dumps([list(pairs.captions), list(pairs.languages), lists], sort_keys=True).encode()).hexdigest()
    found: list[list[int]] = []
    for start in range(0, len(pairs), PIECE):
        part = aside / f"{told[:16]}-{start:010d}.json"
        rows = np.arange(start, min(start + PIECE, len(pairs)))
        if part.exists():
            piece: list[list[int]] = read_json(part, list[list[int]], most=limits.LOG)
        else:
            piece = pairs.at(rows).match(lists)[1]
            write_text(part, json.dumps(piece))
        found += piece
        on_progress(int(rows[-1]) + 1, len(pairs))
    return found


def entries_of(
    table: Path, out: Path, *, given: Path | None, titles: Path | None, least_pmi: float, unigrams: float
) -> dict[str, list[str]]:
    """Make lists of entries from a table's captions, one for each language, and write them as JSON.

    given: JSON of entries of each language that come first (WordNet's). titles: {language: {title: views}}.
    """
    try_output(out)
    _, captions, languages = read_captions(table)
    first = {} if given is None else read_lists(given)
    shape = dict[str, dict[str, int]]
    views: dict[str, dict[str, int]] = {} if titles is None else read_json(titles, shape, most=limits.LOG)
    lists = {}
    for language in dict.fromkeys(languages):
        texts = [text for text, of in zip(captions, languages, strict=True) if of == language]
        lists[language] = build_metadata(
            texts, language, given=first.get(language, ()), titles=views.get(language), least_pmi=least_pmi,
            unigrams=unigrams,
        )  # fmt: skip
    write_text(out, json.dumps(lists, ensure_ascii=False, indent=1) + "\n")
    return lists
