"""Run a claim over seeds, keep every seed's rows as they come, and judge.

The record (one JSON file a claim) holds rows, effects and intervals of the checks, the verdict, the command, and of
every seed its seconds, machine, versions, commit and the hash of the claim's code. A run that was interrupted goes on
with the seeds that are missing; a record is written only when a seed was measured, and never mixes two codes. No seed
is lost: several runs may add to one record at once, and a fresh record takes an earlier one's place when it is whole.
Code that was rearranged is the same code where `rearranging` has noted a proof of it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from imagewright.bench.claims.claim import REPORTED_SEEDS, TUNING_SEEDS, Budget, Claim, Row, Rows
from imagewright.bench.claims.origin import code_hash, commit, equal_codes
from imagewright.bench.claims.verdict import interval, judge, together
from imagewright.files import read_json, write_json
from imagewright.locks import changing
from imagewright.shapes import misfit
from imagewright.types import UserError
from imagewright.version import versions

FORMAT = "imagewright-claim/2"


class _Row(TypedDict):
    name: str
    score: float
    cost: float
    curve: str | None
    more: dict[str, float]


class _Machine(TypedDict):
    processors: int | None
    threads: int


class _Versions(TypedDict):
    imagewright: str
    torch: str
    platform: str


class _Seed(TypedDict):
    rows: list[_Row]
    cpu_seconds: float
    machine: _Machine
    versions: _Versions
    commit: str | None
    code: str | None


class _Summary(TypedDict):
    name: str
    curve: str | None
    mean: float
    std: float | None
    cost: float
    more: dict[str, float]


class _Check(TypedDict):
    says: str
    scale: str
    margin: float
    effects: dict[str, float]
    mean: float
    interval: tuple[float, float] | None
    verdict: str


_Rearranged = TypedDict("_Rearranged", {"commit": str, "from": str, "to": str, "before": str, "proof": str})
"""commit, before: whose files have the hashes `to` and `from`."""


class ClaimRecord(TypedDict):
    """What a record holds, as far as it is read."""

    key: str
    paper: str
    headline: str
    miniature: str
    measure: str
    better: str
    cost: str
    command: str
    seeds: dict[str, _Seed]
    summary: list[_Summary]
    checks: list[_Check]
    verdict: str
    rearranged: NotRequired[list[_Rearranged]]


def read_claim(path: Path) -> dict[str, Any] | None:
    """A record; None for JSON of another format. Raises UserError where it is damaged."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    fault = misfit(record, ClaimRecord)
    if fault is None and not (record["seeds"] and all(s.isascii() and s.isdigit() for s in record["seeds"])):
        fault = "its seeds must be numbers, at least one"
    if fault is not None:
        raise UserError(f"{path} is damaged: {fault}")
    return record


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
    seeds are measured and forgotten. fresh: forget what the file holds, once all seeds are measured; till then they are
    kept beside it, and the same call goes on. Raises UserError when the file holds another claim or rows of other code,
    and on seeds of both ranges or none.
    """
    keep = check_seeds(seeds) and budget == "full" and out is not None
    place = out.with_name(f"{out.stem}.fresh.json") if out is not None and fresh else out
    found = _earlier(place, claim, fresh) if place is not None and keep else {}
    for done, seed in enumerate(seeds):
        on_seed(done, len(seeds))
        if str(seed) in found:
            continue
        found[str(seed)] = _measure(claim, seed, budget)
        if place is not None and keep:
            with changing(place):
                found |= _earlier(place, claim, fresh) | {str(seed): found[str(seed)]}
                write_json(place, _record(claim, found, _rearranged(place)))
    if out is not None and place is not None and keep and fresh:
        place.replace(out)
    on_seed(len(seeds), len(seeds))
    return _record(claim, found, _rearranged(place) if place is not None and keep and not fresh else [])


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


def _record(claim: Claim, seeds: dict[str, Any], rearranged: Sequence[Any]) -> dict[str, Any]:
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
    return record | ({"rearranged": list(rearranged)} if rearranged else {})


def _rearranged(place: Path) -> list[Any]:
    """What a record holds of its code's rearrangements."""
    record = read_claim(place) if place.exists() else None
    return [] if record is None else list(record.get("rearranged", []))


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


def _earlier(out: Path, claim: Claim, fresh: bool) -> dict[str, Any]:
    """The seeds that a record holds. fresh: none where they are of other code by now."""
    if not out.exists():
        return {}
    record = read_claim(out)
    if record is None or record["key"] != claim.key:
        raise UserError(f"{out} is not a record of claim {claim.key!r}; choose another --out")
    seeds: dict[str, Any] = record["seeds"]
    if any(entry["code"] not in equal_codes(record) for entry in seeds.values()):
        if fresh:
            return {}
        raise UserError(f"{out} was measured by other code of claim {claim.key!r}; --fresh measures it anew")
    return seeds
