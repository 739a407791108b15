"""The claims ledger: docs/claims.md and one figure a claim, made from the recorded JSON files alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from imagewright.bench.claims.runner import rows_of
from imagewright.files import read_json, replacing

COLOURS = ("#3b82f6", "#e07b00", "#12a07a", "#c2478d", "#8b6cf0", "#8a8f98")
MARKERS = "osD^vP"
HEAD = """# Claims

Each paper's claim as a small comparison that could fail. Every row was measured on at least three seeds that nothing
was tuned on; a claim holds when each of its checks is true of every seed. Contenders are compared at equal cost.
This page is made by `imagewright bench claims --ledger` from the records in `claims/`.

"""


Curves = dict[str, list[dict[str, Any]]]


def write_ledger(folder: Path, page: Path, keys: Sequence[str]) -> list[str]:
    """Write the page and a figure beside each record; returns the keys that have no record yet."""
    records = {key: read_json(folder / f"{key}.json") for key in keys if (folder / f"{key}.json").exists()}
    lines = [HEAD, "| claim | paper | its figure | verdict |\n|---|---|---|---|\n"]
    for key, r in records.items():
        link = f"[{r['paper']}](https://arxiv.org/abs/{r['paper']})"
        lines.append(f"| [{key}](#{key}) | {link} | {r['headline']} | **{r['verdict']}** |\n")
    for key, record in records.items():
        draw_figure(record, folder / f"{key}.png")
        lines.append(_section(record, f"{folder.relative_to(page.parent).as_posix()}/{key}"))
    with replacing(page) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
    return [key for key in keys if key not in records]


def _section(record: dict[str, Any], stem: str) -> str:
    seeds = record["seeds"]
    version = next(iter(seeds.values()))["versions"]
    seconds = sum(entry["seconds"] for entry in seeds.values())
    extra = list(dict.fromkeys(name for row in record["summary"] for name in row["more"]))
    head = ["", f"{record['measure']} ({record['better']} is better)", record["cost"], *extra]
    lines = [
        f"\n## {record['key']}\n\n{record['miniature']}\n\n",
        f"![{record['measure']} over {record['cost']}]({stem}.png)\n\n",
        f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n",
    ]
    for row in record["summary"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.2g}"
        cells = [row["name"], f"{row['mean']:.4g}{spread}", f"{row['cost']:g}"]
        cells += [f"{row['more'][name]:.4g}" if name in row["more"] else "" for name in extra]
        lines.append(f"| {' | '.join(cells)} |\n")
    lines.append("\n")
    for check in record["checks"]:
        passed = sum(check["by_seed"].values())
        lines.append(f"- {check['says']}: {passed} of {len(check['by_seed'])} seeds\n")
    lines.append(f"\n**{record['verdict'].capitalize()}.**{' ' + record['tried'] if record['tried'] else ''}\n\n")
    made = f"imagewright {version['imagewright']}, torch {version['torch']}, {version['platform']}"
    lines.append(f"`{record['command']}` — {seconds:.0f} s on {record['machine']['processors']} processors, {made}.\n")
    return "".join(lines)


def draw_figure(record: dict[str, Any], path: Path) -> None:
    """Every seed as a point, the mean larger: over cost, or beside the names where cost says little."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in record["summary"]:
        curves.setdefault(row["curve"] or row["name"], []).append(row)
    scores = {row.name: [s[row.name].score for s in rows_of(record).values()] for row in _first_rows(record)}
    over_cost = any(len({row["cost"] for row in rows}) >= 3 for rows in curves.values())
    height = 4.0 if over_cost else 1.2 + 0.3 * len(record["summary"])
    figure = Figure(figsize=(6.4, height), layout="constrained", dpi=120)
    (_draw_over_cost if over_cost else _draw_names)(figure.subplots(), record, curves, scores)
    with replacing(path) as aside:
        figure.savefig(aside, format="png")


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}


def _draw_over_cost(axes: Any, record: dict[str, Any], curves: Curves, scores: dict[str, list[float]]) -> None:
    for i, (name, rows) in enumerate(curves.items()):
        rows.sort(key=lambda row: row["cost"])
        axes.plot([r["cost"] for r in rows], [r["mean"] for r in rows], label=f" {name}", lw=1.6, ms=5, **_style(i))
        for row in rows:
            values = scores[row["name"]]
            axes.scatter([row["cost"]] * len(values), values, s=10, alpha=0.45, **_style(i))
    _scale(axes, record)
    axes.set_xlabel(record["cost"])
    axes.set_ylabel(textwrap.fill(f"{record['measure']} ({record['better']} is better)", 48))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_names(axes: Any, record: dict[str, Any], curves: Curves, scores: dict[str, list[float]]) -> None:
    rows = [(row, _style(i)) for i, curve in enumerate(curves.values()) for row in curve]
    for y, (row, style) in enumerate(rows):
        values = scores[row["name"]]
        axes.scatter(values, [y] * len(values), s=14, alpha=0.5, **style)
        axes.scatter([row["mean"]], [y], s=40, **style)
    axes.set_yticks(range(len(rows)), [f"{row['name']}  [{round(row['cost'], 2):g}]" for row, _ in rows], fontsize=8)
    axes.invert_yaxis()
    least, most = (f(r[k] for r in record["summary"]) for f, k in ((min, "least"), (max, "most")))
    if least > 0 and most > 4 * least:
        axes.set_xscale("log")
    label = f"{record['measure']} ({record['better']} is better)   [{record['cost']}]"
    axes.set_xlabel(textwrap.fill(label, 72), fontsize=8)
    axes.grid(alpha=0.2)


def _first_rows(record: dict[str, Any]) -> Sequence[Any]:
    return next(iter(rows_of(record).values())).rows


def _scale(axes: Any, record: dict[str, Any]) -> None:
    """Logarithmic where the numbers are positive and span more than a factor of 4; costs beside a 0 as well."""
    for values, set_scale in (
        ([r["cost"] for r in record["summary"]], axes.set_xscale),
        ([r["least"] for r in record["summary"]], axes.set_yscale),
    ):
        positive = [v for v in values if v > 0]
        if len(positive) == len(values) and max(values) > 4 * min(values):
            set_scale("log")
        elif set_scale == axes.set_xscale and positive and max(positive) > 16 * min(positive):
            set_scale("symlog", linthresh=min(positive))
    costs = sorted({round(row["cost"], 3) for row in record["summary"]})
    if len(costs) <= 12:
        axes.set_xticks(costs, [f"{cost:g}" for cost in costs])
        axes.xaxis.set_minor_locator(NullLocator())
