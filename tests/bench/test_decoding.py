"""The benchmarks of decoding: what they count, and that they run."""

from __future__ import annotations

import json

import pytest
import torch

from imagewright.bench import decoding
from imagewright.bench.decoding import (
    measure_cache,
    measure_decoders,
    measure_masked_decoding,
    measure_parallel_decoding,
    slope,
)


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert slope([64, 144, 256], [3 * v**1.7 for v in (64, 144, 256)]) == pytest.approx(1.7, abs=1e-9)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "DEPTH": 2, "MANY": 2}.items():
        monkeypatch.setattr(decoding, name, value)


def test_they_run_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SIDE", 4)
    monkeypatch.setattr(decoding, "SIDES", (2, 3, 4))
    cache, masked = (measure(torch.device("cpu"), 3) for measure in (measure_cache, measure_masked_decoding))
    assert cache.details["network calls of each"] == 16
    assert set(cache.details) >= {"growth cached", "growth uncached"}
    assert (masked.details["network calls"], masked.details["network calls in raster order"]) == (8, 16)
    own, maskgit, raster = measure_parallel_decoding(torch.device("cpu"), 1)
    assert [r.details["of the other"] for r in (own, maskgit, raster)] == [64, 16, 64]
    assert own.details["network calls"] == 16
    for ratio in (cache, masked, own, maskgit, raster):
        assert ratio.low <= ratio.ratio <= ratio.high
        assert ratio.theirs is not None
        assert json.loads(json.dumps(ratio.as_dict()))["details"]


def test_ways_to_draw_are_counted() -> None:
    ways = {way.name: way for way in measure_decoders(torch.device("cpu"), 16, rounds=1)}
    calls = {name: way.passes for name, way in ways.items()}
    assert calls == {
        "raster order, cached": 16, "raster order, no cache": 16, "MaskGIT": 8, "MaskGIT, more passes": 16, "MD4": 64,
        "ARPG": 16, "ARPG, more passes": 16, "analog bits": 25,
    }  # fmt: skip
    for way in ways.values():
        assert min(way.seconds, way.together, way.memory) > 0
    assert ways["raster order, cached"].memory < ways["raster order, no cache"].memory
