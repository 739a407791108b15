"""Numbers of a run: one JSON line per interval in `log.jsonl`, the same to every tracker (`trackers`)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor

from imagewright import limits
from imagewright.data.pixels import decode
from imagewright.files import parse_json, read_bytes, require_replaceable, told_as_unwritable, write_text
from imagewright.precision import wide
from imagewright.training.trackers import Tracked
from imagewright.types import Update, UserError

Number = float | Tensor

SIGMA_EDGES = (0.1, 0.5, 2.0)
"""Borders of the noise-level bins in which losses are also reported."""


class Log:
    """Means since the last line, per part. With folder None it only forgets."""

    def __init__(self, folder: Path | None, trackers: Sequence[str] = ()) -> None:
        self._path = folder / "log.jsonl" if folder else None
        self._noted: dict[str, list[Number]] = defaultdict(list)
        self._by_level: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._trackers = Tracked((), Path())
        self._shown: Path | None = None
        if folder is not None:
            require_replaceable(folder / "log.jsonl")
            self._trackers = Tracked(trackers, folder)

    def add(self, part: str, updates: Sequence[Update], loss: Number, numbers: Mapping[str, Number]) -> None:
        """Note one optimiser step of a part. Tensors, of one number each, stay where they are until `write`."""
        if self._path is None:
            return
        self._noted[f"{part}/loss"].append(loss)
        for name, value in numbers.items():
            self._noted[f"{part}/{name}"].append(value)
        for update in updates:
            for name, tensor in update.parts.items():
                self._noted[f"{part}/{name}"].append(tensor.detach().float().mean())
            if update.at is not None:
                self._by_level[part].append((update.at.detach(), update.loss.detach()))

    def write(self, step: int, images: int, numbers: Mapping[str, float]) -> None:
        """One line: means of all that was noted since the last one."""
        if self._path is None or not self._noted:
            return
        # JSON knows no NaN, which a method says where a number has no meaning (the diversity of a single image).
        found = {name: [v for v in values if math.isfinite(v)] for name, values in self._read().items()}
        means = {name: math.fsum(v) / len(v) for name, v in found.items() if v} | dict(numbers)
        with told_as_unwritable(self._path), self._path.open("a", encoding="utf-8") as file:
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

    def _read(self) -> dict[str, list[float]]:
        """All that was noted, and forget it; a device is waited for once."""
        levels = [pair for pairs in self._by_level.values() for pair in pairs]
        tensors = [v for values in self._noted.values() for v in values if isinstance(v, Tensor)]
        tensors += [t for pair in levels for t in pair]
        flat = iter(torch.cat([wide(t).reshape(-1) for t in tensors]).tolist() if tensors else ())
        found: dict[str, list[float]] = defaultdict(list)
        for name, values in self._noted.items():
            found[name] = [next(flat) if isinstance(v, Tensor) else v for v in values]
        for part, pairs in self._by_level.items():
            for at, loss in pairs:
                sigmas, losses = list(islice(flat, len(at))), list(islice(flat, loss.numel()))
                for sigma, value in zip(sigmas, losses, strict=True):
                    found[f"{part}/loss_{_bin(sigma)}"].append(value)
        self._noted.clear()
        self._by_level.clear()
        return found

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
