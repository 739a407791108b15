"""Numbers of a run."""

from pathlib import Path

import torch

from imagewright.training.log import Log, read_log
from imagewright.types import Update


def test_a_line_has_the_means_since_the_last_one_and_no_number_without_meaning(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for value in (1.0, 3.0):
        parts = {"weight": torch.tensor([value]), "undefined": torch.tensor(float("nan"))}
        log.add("student", [Update("student", torch.tensor([value]), parts=parts)], value, {})
    log.write(2, 8, {})
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line == {"step": 2, "images": 8, "student/loss": 2.0, "student/weight": 2.0}


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "images": 4}\n{"step": 2, "ima', encoding="utf-8")
    assert read_log(path) == [{"step": 1, "images": 4}]
