"""Run a claim over seeds, keep every seed's rows as they come, and judge.

The record (one JSON file a claim) holds rows, spread, checks seed by seed, verdict, command, machine and versions.
A run that was interrupted goes on with the seeds that are missing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from imagewright.bench.claims.claim import Budget, Claim, Row, Rows
from imagewright.files import read_json, write_json
from imagewright.types import UserError
from imagewright.version import versions

FORMAT = "imagewright-claim/1"
LEAST_SEEDS = 3
"""Fewer show no spread, and decide nothing."""


def run_claim(
    claim: Claim,
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    budget: Budget = "full",
    on_seed: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the seeds that `out` does not hold yet; returns the record, and writes it after every seed.

    out: JSON file, only for the full budget. Raises UserError when it holds another claim.
    """
    found = _earlier(out, claim) if out is not None and budget == "full" else {}
    for done, seed in enumerate(seeds):
        on_seed(done, len(seeds))
        if str(seed) not in found:
            started = time.monotonic()
            rows = [asdict(row) for row in claim.run(seed, budget)]
            found[str(seed)] = {"rows": rows, "seconds": round(time.monotonic() - started, 1), "versions": versions()}
        if out is not None and budget == "full":
            write_json(out, _record(claim, {str(s): found[str(s)] for s in seeds if str(s) in found}))
    on_seed(len(seeds), len(seeds))
    return _record(claim, {str(s): found[str(s)] for s in seeds})


def rows_of(record: dict[str, Any]) -> dict[int, Rows]:
    """Rows of every seed of a record."""
    return {int(seed): Rows([Row(**row) for row in entry["rows"]]) for seed, entry in record["seeds"].items()}


def _record(claim: Claim, seeds: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "format": FORMAT,
        "key": claim.key,
        "paper": claim.paper,
        "headline": claim.headline,
        "miniature": claim.miniature,
        "measure": claim.measure,
        "better": claim.better,
        "cost": claim.cost,
        "command": f"imagewright bench claims {claim.key} --seeds {' '.join(seeds)}",
        "machine": {"processors": os.cpu_count(), "threads": torch.get_num_threads()},
        "seeds": seeds,
    }
    measured = rows_of(record)
    checks = [
        {"says": check.says, "by_seed": {str(seed): bool(check.holds(rows)) for seed, rows in measured.items()}}
        for check in claim.checks
    ]
    record["summary"] = _summary(list(measured.values()))
    record["checks"] = checks
    record["verdict"] = _verdict([list(c["by_seed"].values()) for c in checks])  # type: ignore[attr-defined]
    record["tried"] = claim.tried
    return record


def _summary(seeds: Sequence[Rows]) -> list[dict[str, Any]]:
    """Mean, standard deviation and extremes of each row over the seeds."""
    summary = []
    for first in seeds[0].rows if seeds else ():
        rows = [s[first.name] for s in seeds]
        scores = [r.score for r in rows]
        summary.append(
            {
                "name": first.name,
                "curve": first.curve,
                "mean": statistics.fmean(scores),
                "std": statistics.stdev(scores) if len(scores) > 1 else None,
                "least": min(scores),
                "most": max(scores),
                "cost": statistics.fmean(r.cost for r in rows),
                "more": {k: statistics.fmean(r.more[k] for r in rows) for k in first.more},
            }
        )
    return summary


def _verdict(checks: Sequence[Sequence[bool]]) -> str:
    if not checks or any(len(by_seed) < LEAST_SEEDS for by_seed in checks):
        return "undecided"
    return "holds" if all(all(by_seed) for by_seed in checks) else "does not hold"


def _earlier(out: Path, claim: Claim) -> dict[str, Any]:
    if not out.exists():
        return {}
    record = read_json(out)
    if record.get("format") != FORMAT or record.get("key") != claim.key:
        raise UserError(f"{out} is not a record of claim {claim.key!r}; choose another --out")
    seeds: dict[str, Any] = record["seeds"]
    return seeds
