"""What balancing does to captions: the figure of docs/captions.md.

python examples/curation.py captions.png                               # counts of each entry, before and after
python examples/curation.py captions.png docs/claims/metaclip2.json    # and what the claim's models name
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from imagewright.data.captions import CaptionsConfig
from imagewright.data.curation.balancing import Curation
from imagewright.data.standin_captions import NAMES, SHARES
from imagewright.files import read_json

OWN, ONE = "a threshold for each language", "one threshold"
FULL = {"en": "English", "de": "German", "ja": "Japanese"}


def before_and_after(curation: Curation, language: str, matched: list[list[int]]) -> tuple[Any, Any]:
    """How many captions hold each entry, and how many of those are kept in the mean of one pass."""
    return curation.counts[language], curation.expected(language, matched)


def counted(axis: Any, language: str, ways: dict[str, Curation], matched: list[list[int]]) -> None:
    """Bars of one language's entries, the most frequent first."""
    entries = len(NAMES["digits"]["en"].split())
    order = np.argsort(-next(iter(ways.values())).counts[language][:entries], kind="stable")
    for i, (name, curation) in enumerate(ways.items()):
        before, after = before_and_after(curation, language, matched)
        if not i:
            axis.bar(np.arange(entries) - 0.3, before[order], 0.3, label="all captions", color="#bbbbbb")
        axis.bar(np.arange(entries) + 0.3 * i, after[order], 0.3, label=name)
    axis.set_yscale("log")
    axis.set_ylim(bottom=1)
    axis.set_xticks(np.arange(entries), [str(k) for k in order])
    axis.set_xlabel("class")
    own, one = (each.thresholds[language] for each in ways.values())
    axis.set_title(f"{FULL[language]}: t = {own}, of one threshold {one}", fontsize=10)


def named(axis: Any, record: Path) -> None:
    """Zero-shot accuracy in each language, of the claim's contenders: mean and range over its seeds."""
    seeds = [{row["name"]: row for row in seed["rows"]} for seed in read_json(record)["seeds"].values()]
    for i, (name, colour) in enumerate((("not balanced", "#bbbbbb"), (OWN, "C0"), (ONE, "C1"))):
        right = np.array([[100 * (1 - rows[name]["more"][language]) for language in SHARES] for rows in seeds])
        mean = right.mean(0)
        spread = np.stack([mean - right.min(0), right.max(0) - mean])
        axis.bar(np.arange(len(SHARES)) + 0.3 * (i - 1), mean, 0.3, yerr=spread, color=colour, capsize=2)
    axis.set_xticks(np.arange(len(SHARES)), list(FULL.values()))
    axis.set_ylim(0, 100)
    axis.set_ylabel("held-out digits named, %")
    axis.set_title(f"zero-shot, {len(seeds)} seeds", fontsize=10)


def main(out: Path, record: Path | None) -> None:
    """Draw."""
    ways = {}
    for name, rule in ((OWN, "language"), (ONE, "global")):
        data = CaptionsConfig(balance=rule, zipf=2.0).open()  # type: ignore[arg-type]
        assert data.curation is not None
        ways[name] = data.curation
    matched: dict[str, list[list[int]]] = {language: [] for language in SHARES}
    lists = {language: names.split() for language, names in NAMES["digits"].items()}
    names, found = data.pairs.match(lists)
    for language, each in zip(names, found, strict=True):
        if language is not None:
            matched[language].append(each)
    figure, axes = plt.subplots(1, 3 + bool(record), figsize=(11 + 3 * bool(record), 3.2), layout="constrained")
    for axis, language in zip(axes, SHARES, strict=False):
        counted(axis, language, ways, matched[language])
    axes[0].set_ylabel("captions that hold it")
    axes[0].legend(fontsize=7)
    if record is not None:
        named(axes[-1], record)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
