"""Numbers of a run: one JSON line per interval in `log.jsonl`, the same to every tracker (`trackers`)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from imagewright import limits
from imagewright.data.pixels import decode
from imagewright.files import parse_json, read_bytes, require_replaceable, write_text
from imagewright.training.trackers import Tracked
from imagewright.types import Update, UserError

SIGMA_EDGES = (0.1, 0.5, 2.0)
"""Borders of the noise-level bins in which losses are also reported."""


class Log:
    """Means since the last line, per part. With folder None it only forgets."""

    def __init__(self, folder: Path | None, trackers: Sequence[str] = ()) -> None:
        self._path = folder / "log.jsonl" if folder else None
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._trackers = Tracked((), Path())
        self._shown: Path | None = None
        if folder is not None:
            require_replaceable(folder / "log.jsonl")
            self._trackers = Tracked(trackers, folder)

    def add(self, part: str, updates: Sequence[Update], loss: float, numbers: Mapping[str, float]) -> None:
        """Note one optimiser step of a part."""
        if self._path is None:
            return
        self._sums[f"{part}/loss"].append(loss)
        for name, value in numbers.items():
            self._sums[f"{part}/{name}"].append(value)
        for update in updates:
            for name, tensor in update.parts.items():
                self._sums[f"{part}/{name}"].append(float(tensor.detach().float().mean()))
            if update.at is not None:
                for sigma, value in zip(update.at.tolist(), update.loss.detach().tolist(), strict=True):
                    self._sums[f"{part}/loss_{_bin(sigma)}"].append(value)

    def write(self, step: int, images: int, numbers: Mapping[str, float]) -> None:
        """One line: means of all that was noted since the last one."""
        if self._path is None or not self._sums:
            return
        means = {name: math.fsum(v) / len(v) for name, v in self._sums.items()} | dict(numbers)
        # JSON knows no NaN, which a method says where a number has no meaning (the diversity of a single image).
        means = {name: value for name, value in means.items() if math.isfinite(value)}
        self._sums.clear()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "images": images, **means}) + "\n")
        self._trackers.numbers(means, images)

    def picture(self, path: Path, images: int) -> None:
        """Show the trackers a picture that the run has left, where there is one; each once."""
        if self._path is not None and path.exists() and path != self._shown:
            self._shown = path
            self._trackers.picture(path.parent.name, decode(read_bytes(path, limits.PICTURE_BYTES)), images)

    def close(self) -> None:
        """Nothing more comes."""
        self._trackers.close()

    def truncate(self, step: int) -> None:
        """Drop what was written after a step: a resumed run writes it again."""
        if self._path is not None and self._path.exists():
            kept = [line for line in read_log(self._path) if line["step"] <= step]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))


def read_log(path: Path) -> list[dict[str, float]]:
    """Lines of a log; a last line cut off by a crash is left out. Raises UserError for what is no log."""
    lines: list[dict[str, float]] = []
    texts = read_bytes(path, limits.LOG).decode("utf-8", "replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text, f"{path}: line {number}", dict[str, float])
            if not {"step", "images"} <= line.keys():
                raise UserError(f"{path}: line {number} has no step and images")
        except UserError:
            if number == len(texts):
                break
            raise
        lines.append(line)
    return lines


def _bin(sigma: float) -> str:
    for low, high in pairwise([0.0, *SIGMA_EDGES, math.inf]):
        if low <= sigma < high:
            return f"sigma_{low:g}_to_{high:g}"
    return "sigma_other"
