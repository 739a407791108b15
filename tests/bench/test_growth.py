"""How costs grow: what is counted, exponents of operations, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imagewright.bench import decoding, growth
from imagewright.bench.growth import _operations, makers
from imagewright.cli import bench_decoding
from imagewright.cli.main import main


def operations(tokens: int, name: str) -> float:
    with torch.device("meta"):
        return _operations(makers(tokens, 16)[name](), torch.empty(1, tokens, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("dense", 1.6, 2.0), ("sparse", 1.0, 1.5), ("routing", 1.0, 1.5), ("axial", 1.0, 1.5), ("perceiver", 0.4, 1.0)],
)
def test_operations_grow_as_the_papers_say(name: str, low: float, high: float) -> None:
    few, many = (operations(n, name) for n in (1024, 4096))
    power = float(torch.tensor(many / few).log2()) / 2
    assert low < power < high, power


def test_it_runs_and_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "PASSES", 1)
    monkeypatch.setattr(growth, "REPEATS", 1)
    for name, value in {"WIDTH": 16, "DEPTH": 2, "MANY": 2}.items():
        monkeypatch.setattr(decoding, name, value)
    main(["bench", "decoding", "--tokens", "16", "64", "--width", "8", "--device", "cpu", "--out", str(tmp_path / "g")])
    record = json.loads((tmp_path / "g").read_text())
    rows = record["results"]
    assert [(row["network"], row["tokens"]) for row in rows[:5]] == [(name, 16) for name in makers(16, 8)]
    assert set(record["exponents"]) == set(makers(16, 8)) and len(rows) == 10
    assert [(way["name"], way["tokens"]) for way in record["decoders"] if way["name"] == "ARPG"] == [
        ("ARPG", 16),
        ("ARPG", 64),
    ]
    for row in rows:
        assert min(row[cost] for cost in ("operations", "kept", "step", "cached", "uncached")) > 0


def test_what_does_not_fit_is_named(refused: Callable[..., str]) -> None:
    assert "--tokens is 256; it must be two powers of 4" in refused("bench", "decoding", "--tokens", 256)
    assert "--tokens is 256 1000; it must" in refused("bench", "decoding", "--tokens", 256, 1000)
    assert "--width is 6; it must be a multiple of 4" in refused("bench", "decoding", "--width", 6)


def test_either_part_is_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_decoding, "measure_growth", lambda *args: [])
    monkeypatch.setattr(bench_decoding, "measure_decoders", lambda *args, **more: [])
    held = {"growth": {"results", "exponents"}, "ways": {"decoders"}, None: {"results", "exponents", "decoders"}}
    for only, keys in held.items():
        told = [] if only is None else ["--only", only]
        main(["bench", "decoding", "--tokens", "16", "64", "--out", str(tmp_path / "g"), *told])
        assert json.loads((tmp_path / "g").read_text()).keys() & {"results", "exponents", "decoders"} == keys
