"""The entries of metrics.json: what was measured of which weights, each measurement once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagewright.files import try_output, write_json
from imagewright.locks import changing
from imagewright.metrics.records import FORMAT, read_scores
from imagewright.types import UserError

Entry = dict[str, Any]
_PARTS = ("scores", "yardsticks", "settings")
"""What measures add to a report, each its own."""
_DEPENDS: Mapping[str, tuple[str, ...]] = {
    "reports": ("num_images", "seed", "reference", "extractor_sha256"),
    "likelihoods": ("num_images", "seed", "reference", "settings"),
    "accuracies": ("num_images", "reference"),
    "reconstructions": ("num_images", "reference", "seed", "extractor_sha256"),
    "retrievals": ("clips", "reference", "split"),
}
"""What a report of each kind depends on beside the weights and how they were asked: another one is another entry."""


def keep(new: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """Put entries into a metrics.json, by kind ("reports", "likelihoods", ...); the rest of the file stays.

    An entry takes the place of one that measured the same; scores that only the earlier one has are kept in it.
    Raises UserError where the file is no metrics.json.
    """
    with changing(path):
        record: dict[str, Any] = {"reports": [], **_found(path)}
        for kind, entries in new.items():
            merged = list(record.get(kind, []))
            for entry in entries:
                same = [e for e in merged if _same(kind, e, entry)]
                merged = [e for e in merged if not _same(kind, e, entry)]
                merged.append(_joined(same[-1], entry) if same and kind == "reports" else entry)
            record[kind] = sorted(merged, key=lambda e: e.get("nfe", 0))
        write_json(path, record)


def require_keepable(path: Path) -> None:
    """Raise UserError where entries cannot be put into a file, before the work that makes them."""
    try_output(path)
    _found(path)


def _found(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {"format": FORMAT}
    try:
        return read_scores(path)
    except UserError as error:
        raise UserError(f"{error}; choose another --out") from None


def _joined(old: Entry, new: Entry) -> Entry:
    report = dict(new["report"])
    for part in _PARTS:
        report[part] = {**old["report"].get(part, {}), **report.get(part, {})}
    report["notes"] = list(dict.fromkeys([*old["report"].get("notes", ()), *report.get("notes", ())]))
    return {**new, "report": report}


def _same(kind: str, old: Entry, new: Entry) -> bool:
    """Whether two entries measured the same; what an earlier version did not record gives way to any."""
    unknown = [name for name in ("classes", "weights_sha256") if name not in old]
    return _identity(kind, old, unknown) == _identity(kind, new, unknown)


def _identity(kind: str, entry: Entry, without: Sequence[str]) -> str:
    """As JSON, since what is read from a file has lists where what was just measured has tuples.

    The same weights under another path are the same; images of a folder are known by its path.
    """
    way = "changes" if kind == "likelihoods" else "sampler"
    of = [entry.get(name) for name in ("classes", "weights_sha256") if name not in without]
    target = None if of and of[-1] is not None else entry.get("target")
    spoken = [entry["language"]] if "language" in entry else []
    depends = [entry["report"].get(name) for name in _DEPENDS[kind]]
    return json.dumps([target, entry.get(way), *of, *spoken, *depends], sort_keys=True)
