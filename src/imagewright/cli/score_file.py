"""The entries of metrics.json: what was measured of which weights, each measurement once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagewright.files import write_json
from imagewright.locks import changing
from imagewright.metrics.records import FORMAT, read_scores
from imagewright.types import UserError

Entry = dict[str, Any]
_PARTS = ("scores", "yardsticks", "settings")
"""What measures add to a report, each its own."""


def keep(new: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """Put entries into a metrics.json, by kind ("reports", "likelihoods", ...); the rest of the file stays.

    An entry takes the place of one that measured the same; scores that only the earlier one has are kept in it.
    Raises UserError where the file is no metrics.json.
    """
    with changing(path):
        found: Mapping[str, Any] = {"format": FORMAT}
        if path.exists():
            try:
                found = read_scores(path)
            except UserError as error:
                raise UserError(f"{error}; choose another --out") from None
        record: dict[str, Any] = {"reports": [], **found}
        for kind, entries in new.items():
            merged = list(record.get(kind, []))
            for entry in entries:
                same = [e for e in merged if _same(e, entry)]
                merged = [e for e in merged if not _same(e, entry)]
                merged.append(_joined(same[-1], entry) if same and kind == "reports" else entry)
            record[kind] = sorted(merged, key=lambda e: e.get("nfe", 0))
        write_json(path, record)


def _joined(old: Entry, new: Entry) -> Entry:
    report = dict(new["report"])
    for part in _PARTS:
        report[part] = {**old["report"].get(part, {}), **report.get(part, {})}
    report["notes"] = list(dict.fromkeys([*old["report"].get("notes", ()), *report.get("notes", ())]))
    return {**new, "report": report}


def _same(old: Entry, new: Entry) -> bool:
    """Whether two entries measured the same; what an earlier version did not record gives way to any."""
    unknown = [name for name in ("classes", "weights_sha256") if name not in old]
    return _identity(old, unknown) == _identity(new, unknown)


def _identity(entry: Entry, without: Sequence[str]) -> str:
    """As JSON, since what is read from a file has lists where what was just measured has tuples.

    The same weights under another path are the same; images of a folder are known by its path.
    """
    report = entry["report"]
    way = "changes" if "bpd" in report else "sampler"
    depends: tuple[str, ...] = (
        "num_images",
        "seed",
        "reference",
        "settings" if "bpd" in report else "extractor_sha256",
    )
    if "top1" in report:
        way, depends = "sampler", ("num_images", "reference")
    if "latent" in report:
        way, depends = "sampler", ("num_images", "reference", "seed", "extractor_sha256")
    of = [entry.get(name) for name in ("classes", "weights_sha256") if name not in without]
    target = None if of and of[-1] is not None else entry["target"]
    spoken = [entry["language"]] if "language" in entry else []
    return json.dumps([target, entry.get(way), *of, *spoken, *(report[name] for name in depends)], sort_keys=True)
