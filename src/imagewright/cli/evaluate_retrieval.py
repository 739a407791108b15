"""`imagewright evaluate VATT`: captions that look for held-out videos, and linear probes of what the backbones make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from imagewright.cli.console import OUT, bar, say, table
from imagewright.metrics.retrieval import measure_retrieval
from imagewright.models.files import ModelFile
from imagewright.training.distributed import pick_device
from imagewright.training.record import experiment_from_json, read_record
from imagewright.types import UserError


def evaluate_retrieval(
    target: str, file: ModelFile, data: str | None, split: str, n: int | None, batch_size: int, device: str
) -> dict[str, Any]:
    """The entry of metrics.json. Raises UserError where nothing says which clips there are."""
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    if n is not None and n < 2:
        raise UserError(f"--n is {n}; retrieval needs 2 clips or more")
    folder = Path(target)
    if not (folder / "experiment.json").exists():
        raise UserError(f"{target} is no run, and does not say what shape its clips have; give its run's folder")
    config = experiment_from_json(read_record(folder)["experiment"], folder).data
    if data is not None:
        config = replace(config, source=data)
    searched = config.of_split(split).open()
    others = None if split in ("train", "all") or not searched.spec.num_classes else config.of_split("train").open()
    if n is not None and n > len(searched):
        raise UserError(f"--n is {n}; there are {len(searched)} clips in split {split}")
    model: Any = file.model
    total = sum(len(c) if n is None else min(n, len(c)) for c in (searched, others) if c is not None)
    done = 0
    with bar(f"retrieval by {target}", total) as advance_to:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            advance_to(done)

        found = measure_retrieval(
            model, searched, others, n=n, batch_size=batch_size, device=pick_device(device), on_progress=advance
        )
    return {"target": target, "report": {**found.as_dict(), "split": split}}


def show_retrieval(entry: dict[str, Any]) -> None:
    """The table on the terminal."""
    report = entry["report"]
    shares = dict(zip(("R@1", "R@5", "R@10"), report["recall"].values(), strict=True))
    if report["by_class"] is not None:
        shares |= {"of its class": report["by_class"]["p1"], "ten of its class": report["by_class"]["p10"]}
    for name, share in (report["probe"] or {}).items():
        shares[f"{name} probe"] = share
    rows = table("", *shares, "median rank")
    rows.add_row(entry["target"], *(f"{share:.1%}" for share in shares.values()), f"{report['median_rank']:g}")
    OUT.print(rows)
    say(f"captions that look for their video among {report['clips']}, split {report['split']}")
