"""What balancing does to captions: the figure of docs/captions.md.

python examples/curation.py captions.png                 # counts of each entry, before and after
python examples/curation.py captions.png runs/metaclip2-digits runs/metaclip2-raw     # and what runs name, measured
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
from imagewright.metrics.records import read_scores
from imagewright.training.record import get_field, read_record

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
    axis.set_ylim(bottom=5)
    axis.set_xticks(np.arange(entries), [str(k) for k in order])
    axis.set_xlabel("class")
    own, one = (each.thresholds[language] for each in ways.values())
    axis.set_title(f"{FULL[language]}: t = {own}, of one threshold {one}", fontsize=10)


def named(axis: Any, runs: list[Path]) -> None:
    """Zero-shot accuracy of runs in each language."""
    for i, run in enumerate(runs):
        found = {
            each.get("language"): each["report"]["top1"] for each in read_scores(run / "metrics.json")["accuracies"]
        }
        rule = get_field(read_record(run)["experiment"], "data.balance")
        at = np.arange(len(SHARES)) + 0.35 * (i - (len(runs) - 1) / 2)
        bars = axis.bar(at, [100 * found[language] for language in SHARES], 0.33, label=f"data.balance {rule}")
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_xticks(np.arange(len(SHARES)), list(FULL.values()))
    axis.set_ylim(0, 110)
    axis.set_ylabel("held-out digits named, %")
    axis.set_title("zero-shot", fontsize=10)
    axis.legend(fontsize=7, loc="lower center")


def main(out: Path, runs: list[Path]) -> None:
    """Draw."""
    ways = {}
    for name, rule in (("a threshold for each language", "language"), ("one threshold", "global")):
        data = CaptionsConfig(balance=rule).open()  # type: ignore[arg-type]
        assert data.curation is not None
        ways[name] = data.curation
    matched: dict[str, list[list[int]]] = {language: [] for language in SHARES}
    lists = {language: names.split() for language, names in NAMES["digits"].items()}
    names, found = data.pairs.match(lists)
    for language, each in zip(names, found, strict=True):
        if language is not None:
            matched[language].append(each)
    figure, axes = plt.subplots(1, 3 + bool(runs), figsize=(11 + 3 * bool(runs), 3.2), layout="constrained")
    for axis, language in zip(axes, SHARES, strict=False):
        counted(axis, language, ways, matched[language])
    axes[0].set_ylabel("captions that hold it")
    axes[0].legend(fontsize=7)
    if runs:
        named(axes[-1], runs)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
