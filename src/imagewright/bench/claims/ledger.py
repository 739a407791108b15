"""The claims ledger: docs/claims.md and one figure a claim, made from the recorded JSON files alone."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from imagewright.bench.claims.claim import REPORTED_SEEDS, TUNING_SEEDS
from imagewright.bench.claims.origin import equal_codes
from imagewright.bench.claims.runner import read_claim, rows_of
from imagewright.files import replacing

COLOURS = ("#3b82f6", "#e07b00", "#12a07a", "#c2478d", "#8b6cf0", "#8a8f98")
MARKERS = "osD^vP"
HEAD = f"""# Claims

Each paper's claim as a small comparison that could fail. A check is a number computed from the rows of one seed, so
that contenders are paired; it **holds** when the 95% interval of its mean over the seeds (Student's t) lies above its
margin, **does not hold** when the interval lies at or below it, and is **undecided** otherwise. A claim holds when all
its checks do, and does not when one does not. Records are made on seeds from {REPORTED_SEEDS.start} on, settings are
chosen on seeds below {TUNING_SEEDS.stop}; the program keeps the two apart. This page is made by
`imagewright bench claims --ledger` from the records in `claims/`; what is said below a verdict was written after it.
A record belongs to the code that measured it; where a claim's files were rearranged since, `bench claims KEY
--rearranged` notes it, and only if both codes rehearse alike: equal to the bit are the rows and effects of a smoke run
of seed 0 and of a full one whose trainings are cut to three updates, and the settings of these trainings.

"""


Curves = dict[str, list[dict[str, Any]]]


def read_records(folder: Path, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records that a folder holds, by key; other files, and records of an earlier format, are passed over."""
    paths = {key: folder / f"{key}.json" for key in keys}
    records = {key: read_claim(path) for key, path in paths.items() if path.exists()}
    return {key: record for key, record in records.items() if record is not None}


def write_ledger(folder: Path, page: Path, keys: Sequence[str]) -> list[str]:
    """Write the page and a figure beside each record; returns the keys that have no record yet."""
    records = read_records(folder, keys)
    lines = [HEAD, "| claim | paper | its figure | verdict | its checks | seeds |\n|---|---|---|---|---|---|\n"]
    for key, r in records.items():
        link = f"[{r['paper']}](https://arxiv.org/abs/{r['paper']})"
        cells = [f"[{key}](#{key})", link, r["headline"], f"**{r['verdict']}**", _counted(r), str(len(r["seeds"]))]
        lines.append(f"| {' | '.join(_cell(each) for each in cells)} |\n")
    for key in keys:
        notes = folder / f"{key}.md"
        said = notes.read_text(encoding="utf-8").strip() if notes.exists() else ""
        said = said.replace("](../", "](")  # the page lies one folder up
        if key not in records:
            lines.append(f"\n## {key}\n\n**Not measured anew.**{' ' + said if said else ''}\n")
            continue
        draw_figure(records[key], folder / f"{key}.png")
        lines.append(_section(records[key], f"{folder.relative_to(page.parent).as_posix()}/{key}", said))
    with replacing(page) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
    return [key for key in keys if key not in records]


def _counted(record: dict[str, Any]) -> str:
    """How many checks came to which verdict: "3 hold, 1 does not hold"."""
    counts = Counter(check["verdict"] for check in record["checks"])
    words = {"holds": ("holds", "hold"), "does not hold": ("does not", "do not"), "undecided": ("undecided",) * 2}
    return ", ".join(f"{counts[v]} {words[v][counts[v] > 1]}" for v in words if counts[v])


def _section(record: dict[str, Any], stem: str, said: str) -> str:
    extra = list(dict.fromkeys(name for row in record["summary"] for name in row["more"]))
    head = ["", _measure(record), record["cost"], *extra]
    lines = [
        f"\n## {record['key']}\n\n{record['miniature']}\n\n",
        f"![{record['measure']} over {record['cost']}]({stem}.png)\n\n",
        f"| {' | '.join(_cell(each) for each in head)} |\n|{'---|' * len(head)}\n",
    ]
    for row in record["summary"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.2g}"
        cells = [row["name"], f"{row['mean']:.4g}{spread}", f"{row['cost']:g}"]
        cells += [f"{row['more'][name]:.4g}" if name in row["more"] else "" for name in extra]
        lines.append(f"| {' | '.join(_cell(each) for each in cells)} |\n")
    lines.append("\n| check | effect | 95% interval | margin | |\n|---|---|---|---|---|\n")
    for check in record["checks"]:
        bounds = "" if check["interval"] is None else "{:.3g} to {:.3g}".format(*check["interval"])
        times = " times" if check["scale"] == "ratio" else ""
        cells = [check["says"], f"{check['mean']:.3g}{times}", bounds, f"{check['margin']:g}{times}", check["verdict"]]
        lines.append(f"| {' | '.join(_cell(each) for each in cells)} |\n")
    lines.append(f"\n**{record['verdict'].capitalize()}.**{' ' + said if said else ''}\n\n{_made(record)}\n")
    return "".join(lines)


def _cell(text: str) -> str:
    """A text as a cell of a table, whose bars end cells."""
    return text.replace("|", "\\|")


def _measure(record: dict[str, Any]) -> str:
    better = record["better"]
    return f"{record['measure']} ({better} is better)"


def _made(record: dict[str, Any]) -> str:
    """How a record came about: command, cost, machine and code; several where its seeds differ."""
    entries = list(record["seeds"].values())
    seconds = [entry["cpu_seconds"] for entry in entries]
    versions = {f"imagewright {v['imagewright']}, torch {v['torch']}" for v in (e["versions"] for e in entries)}
    machines = {
        f"{e['versions']['platform']}, {e['machine']['threads']} of {e['machine']['processors']} processors"
        for e in entries
    }
    commits = {f"commit {e['commit'][:10]}{'+' if e['commit'].endswith('+') else ''}" for e in entries if e["commit"]}
    changed = any(e["code"] not in equal_codes(record) for e in entries)
    rearranged = [step["commit"][:10] for step in record.get("rearranged", [])]
    return (
        f"`{record['command']}`: {min(seconds):.0f} to {max(seconds):.0f} CPU seconds a seed; "
        + "; ".join(", ".join(sorted(said)) for said in (machines, versions, commits) if said)
        + "."
        + (f" The claim's code was rearranged in {', '.join(rearranged)}, at equal rows." if rearranged else "")
        + (" **The claim's code has changed since.**" if changed else "")
    )


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
    axes.set_ylabel(textwrap.fill(_measure(record), 48))
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
    _spread_out(axes, "x", [r[end] for r in record["summary"] for end in ("least", "most")])
    label = f"{_measure(record)}   [{record['cost']}]"
    axes.set_xlabel(textwrap.fill(label, 72), fontsize=8)
    axes.grid(alpha=0.2)


def _first_rows(record: dict[str, Any]) -> Sequence[Any]:
    return next(iter(rows_of(record).values())).rows


def _spread_out(axes: Any, axis: Literal["x", "y"], values: Sequence[float]) -> None:
    """Logarithmic where the numbers are positive and span more than a factor of 4; where some are not, beyond a linear
    middle as wide as these, if the largest is over a hundred times that."""
    low, high = min(values), max(values)
    set_scale, set_limits = getattr(axes, f"set_{axis}scale"), getattr(axes, f"set_{axis}lim")
    positive = [v for v in values if v > 0]
    middle = -low if low < 0 else min(positive, default=math.inf)
    if low > 0 and high > 4 * low:
        set_scale("log")
    elif low <= 0 and high > (100 if low < 0 else 16) * middle:
        set_scale("symlog", linthresh=middle)
        set_limits(1.5 * low - 0.3 * middle, 2 * high)


def _scale(axes: Any, record: dict[str, Any]) -> None:
    _spread_out(axes, "x", [r["cost"] for r in record["summary"]])
    _spread_out(axes, "y", [r[end] for r in record["summary"] for end in ("least", "most")])
    costs = sorted({round(row["cost"], 3) for row in record["summary"]})
    if len(costs) <= 12:
        axes.set_xticks(costs, [f"{cost:g}" for cost in costs])
        axes.xaxis.set_minor_locator(NullLocator())
