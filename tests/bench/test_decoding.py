"""The benchmarks of decoding: what they count, and that they run."""

from __future__ import annotations

import json

import pytest
import torch

from imagewright.bench import decoding
from imagewright.bench.decoding import measure_cache, measure_masked_decoding, slope


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert slope([64, 144, 256], [3 * v**1.7 for v in (64, 144, 256)]) == pytest.approx(1.7, abs=1e-9)


def test_they_run_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SIDE", 4)
    monkeypatch.setattr(decoding, "SIDES", (2, 3, 4))
    cache, masked = (measure(torch.device("cpu"), 3) for measure in (measure_cache, measure_masked_decoding))
    assert cache.details["network calls of each"] == 16
    assert set(cache.details) >= {"growth cached", "growth uncached"}
    assert (masked.details["network calls"], masked.details["network calls in raster order"]) == (8, 16)
    for ratio in (cache, masked):
        assert ratio.low <= ratio.ratio <= ratio.high
        assert ratio.theirs is not None
        assert json.loads(json.dumps(ratio.as_dict()))["details"]
