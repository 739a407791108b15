"""What the documentation shows is run."""

from __future__ import annotations

import re
from pathlib import Path

import imagewright
from imagewright.cli.main import main
from imagewright.files import read_json

DOCS = Path(__file__).parents[1] / "docs"


def test_the_worked_example_trains(tmp_path: Path) -> None:
    text = (DOCS / "architecture.md").read_text()
    (block,) = re.findall(r"```python\n(# my_run\.py\n.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"^    imagewright (train my_run\.py.*)$", text, re.MULTILINE)
    (tmp_path / "my_run.py").write_text(block)
    words = command.replace("my_run.py", str(tmp_path / "my_run.py")).split()
    small = ["--training.total-images", "64", "--network.model-channels", "8", "--out", str(tmp_path / "run")]
    main([*words, *small])
    record = read_json(tmp_path / "run/experiment.json")
    assert record["experiment"]["method"] == {"class": "SelfAveraged", "weight": 0.2, "decay": 0.99}
    assert imagewright.load(tmp_path / "run").generate(1).shape == (1, 8, 8, 1)
