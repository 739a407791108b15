"""`imagewright bench speed`: what is kept of a run that is cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagewright.bench.speed import Ratio
from imagewright.cli import bench
from imagewright.cli.main import main


def test_what_was_measured_before_an_interruption_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*args: Any) -> Ratio:
        raise KeyboardInterrupt

    one = Ratio("a", 3.0, "b", 2.0, 1.5, 1.4, 1.6)
    monkeypatch.setattr(bench, "MEASURES", {"sampling": lambda *args: one, "loop": cut_off})
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["bench", "speed", "--device", "cpu", "--out", str(tmp_path / "s.json")])
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["measured"] == ["sampling"] and record["results"] == [one.as_dict()]
