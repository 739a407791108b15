"""Bits per dimension on the page: of one run or of several, beside lossless files of the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagewright.metrics.lossless import CODECS
from imagewright.report.markup import Child, Html, card, el, table

Named = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
"""Runs by name, with their entries of metrics.json (`RunSection.likelihoods`)."""


def likelihood_card(named: Named) -> Html | None:
    """A table of all entries, and of the lossless files of their images; None where nothing was measured."""
    entries = [(name, entry) for name, found in named for entry in found]
    if not entries:
        return None
    reports = [entry["report"] for _, entry in entries]
    several = len(named) > 1
    rows = [_row(name if several else "model", entry) for name, entry in entries]
    for report in _different(reports):
        rows += [_codec_row(words, report["codecs"][name], report) for name, words in CODECS.items()]
    head = ["", "bits/dim", "what it is", "images", "split", "preprocessing"]
    caption = (
        "Lower is better. The number after ± is the standard error of what was drawn at random, given these images. A"
        " bound, and the probability flow's value, are no less than the model's own bits per dimension."
    )
    notes = dict.fromkeys(note for report in reports for note in report["notes"])
    listed = el("ul", *(el("li", note) for note in notes), class_="quiet") if notes else None
    return card("Likelihood", table(head, rows, caption), _comparability(reports), listed)


def _row(name: str, entry: Mapping[str, Any]) -> list[Child]:
    report = entry["report"]
    error = "" if report["stderr"] is None else f" ± {report['stderr']:.2g}"
    how = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report["settings"].items())
    changed = ", ".join(f"{key} {value}" for key, value in entry["changes"].items())
    what = ": ".join(part for part in (report["kind"], how) if part) + (f"; with {changed}" if changed else "")
    return [name, f"{report['bpd']:.4f}{error}", what, *_images(report)]


def _codec_row(words: str, bits: float, report: Mapping[str, Any]) -> list[Child]:
    return [f"yardstick: {words}", f"{bits:.4f}", "lossless file", *_images(report)]


def _images(report: Mapping[str, Any]) -> list[Child]:
    return [f"{report['num_images']:,}", report["split"], report["preprocessing"]]


def _different(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One report for each set of images."""
    return list({report["reference"]: report for report in reversed(reports)}.values())[::-1]


def _comparability(reports: Sequence[Mapping[str, Any]]) -> Html | None:
    """A warning where the images are not the same."""
    if len(_different(reports)) < 2:
        return None
    return el("p", "These bits per dimension do not all compare: they are of different images.", class_="warning")
