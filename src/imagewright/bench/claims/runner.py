"""Run a claim over seeds, keep every seed's rows as they come, and judge.

The record (one JSON file a claim) holds rows, effects and intervals of the checks, the verdict, the command, and of
every seed its seconds, machine, versions, commit and the hash of the claim's code. A run that was interrupted goes on
with the seeds that are missing; a record is written only when a seed was measured, and never mixes two codes.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from imagewright.bench.claims.claim import REPORTED_SEEDS, TUNING_SEEDS, Budget, Claim, Row, Rows
from imagewright.bench.claims.origin import code_hash, commit
from imagewright.bench.claims.verdict import interval, judge, together
from imagewright.files import read_json, write_json
from imagewright.types import UserError
from imagewright.version import versions

FORMAT = "imagewright-claim/2"


def run_claim(
    claim: Claim,
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    budget: Budget = "full",
    fresh: bool = False,
    on_seed: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the seeds that `out` does not hold yet; returns the record of all seeds that it then holds.

    out: JSON file, written after every seed that was measured, with the full budget on reported seeds only; tuning
    seeds are measured and forgotten. fresh: forget what the file holds. Raises UserError when it holds another claim
    or rows of other code, and on seeds of both ranges or none.
    """
    keep = check_seeds(seeds) and budget == "full" and out is not None
    found = _earlier(out, claim) if out is not None and keep and not fresh else {}
    for done, seed in enumerate(seeds):
        on_seed(done, len(seeds))
        if str(seed) in found:
            continue
        found[str(seed)] = _measure(claim, seed, budget)
        if out is not None and keep:
            write_json(out, _record(claim, found))
    on_seed(len(seeds), len(seeds))
    return _record(claim, found)


def check_seeds(seeds: Sequence[int]) -> bool:
    """Whether the seeds are reported ones (True) or tuning ones (False). Raises UserError on any other list."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise UserError(f"--seeds is {tuple(seeds)}; they must be different numbers")
    for seeds_of, reported in ((REPORTED_SEEDS, True), (TUNING_SEEDS, False)):
        if all(seed in seeds_of for seed in seeds):
            return reported
    raise UserError(
        f"--seeds is {tuple(seeds)}; all must lie in {REPORTED_SEEDS.start}..{REPORTED_SEEDS.stop - 1} (recorded) or "
        f"all in {TUNING_SEEDS.start}..{TUNING_SEEDS.stop - 1} (for tuning, not recorded)"
    )


def rows_of(record: dict[str, Any]) -> dict[int, Rows]:
    """Rows of every seed of a record."""
    return {int(seed): Rows([Row(**row) for row in entry["rows"]]) for seed, entry in record["seeds"].items()}


def _measure(claim: Claim, seed: int, budget: Budget) -> dict[str, Any]:
    wall, cpu = time.monotonic(), time.process_time()
    rows = [asdict(row) for row in claim.run(seed, budget)]
    return {
        "rows": rows,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.monotonic() - wall, 1),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "commit": commit(),
        "code": code_hash(claim.key),
    }


def _record(claim: Claim, seeds: dict[str, Any]) -> dict[str, Any]:
    seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
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
        "seeds": seeds,
    }
    measured = rows_of(record)
    record["summary"] = _summary(list(measured.values()))
    record["checks"] = []
    for check in claim.checks:
        effects = {str(seed): float(check.effect(rows)) for seed, rows in measured.items()}
        mean, low, high = interval(list(effects.values()), check.scale)
        bounds = None if len(effects) < 2 else [low, high]
        record["checks"].append(
            {
                "says": check.says,
                "scale": check.scale,
                "margin": check.least,
                "effects": effects,
                "mean": mean,
                "interval": bounds,
                "verdict": judge(check, list(effects.values())),
            }
        )
    record["verdict"] = together([check["verdict"] for check in record["checks"]])
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


def _earlier(out: Path, claim: Claim) -> dict[str, Any]:
    if not out.exists():
        return {}
    record = read_json(out)
    if record.get("format") != FORMAT or record.get("key") != claim.key:
        raise UserError(f"{out} is not a record of claim {claim.key!r}; choose another --out")
    seeds: dict[str, Any] = record["seeds"]
    if any(entry["code"] != code_hash(claim.key) for entry in seeds.values()):
        raise UserError(f"{out} was measured by other code of claim {claim.key!r}; --fresh measures it anew")
    return seeds
