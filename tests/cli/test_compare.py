"""Scores of several seeds, and of two runs: side by side only where measured alike, and of present weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imagewright.cli.compare import mismatches
from imagewright.cli.evaluate import seed_spread
from imagewright.cli.main import main
from imagewright.cli.train import find_experiment
from imagewright.files import read_json
from imagewright.training.experiment import run_experiment


@pytest.fixture(scope="module")
def runs(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name in "ab":
        run_experiment(find_experiment(str(tiny_recipe)), folder / name)
    for name in "ab":
        words = ["--n", "24", "--metrics", "fd", "fd_inf", "--steps", "2", "--seeds", "1", "2", "--no-yardsticks"]
        main(["evaluate", str(folder / name), *words, "--device", "cpu"])
    return folder / "a", folder / "b"


def test_seeds_are_entries_and_their_spread_is_shown(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    entries = read_json(runs[0] / "metrics.json")["reports"]
    assert [e["report"]["seed"] for e in entries] == [1, 2]
    assert all(e["weights_sha256"] and e["images_seen"] == 64 for e in entries)
    assert {"fd_digits", "fd_inf_digits", "fd_inf_digits_stderr"} <= set(entries[0]["report"]["scores"])
    assert seed_spread([{"x": 1.0}, {"x": 3.0}], ["x"]) == ["2 ± 1.4"]
    main(["compare", *map(str, runs)])
    said = capsys.readouterr().out
    values = [e["report"]["scores"]["fd_digits"] for e in entries]
    assert f"{np.mean(values):.4g}" in said and "2 seeds" in said and "64 images seen, 3 calls an image" in said


def test_what_was_measured_otherwise_is_refused(
    runs: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    record = read_json(runs[0] / "metrics.json")
    for entry in record["reports"]:
        entry["report"] |= {"num_images": 50, "extractor_sha256": "another"}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    told = refused("compare", runs[0], tmp_path / "metrics.json")
    assert "do not compare: feature extractor" in told and "number of images 24 against 50" in told
    assert "holds no scores of images at 7 calls" in refused("compare", *runs, "--nfe", 7)


def test_scores_of_other_weights_are_not_shown_beside_newer_ones(
    runs: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    for name in ("model.json", "model.safetensors", "experiment.json"):
        (tmp_path / name).write_bytes((runs[0] / name).read_bytes())
    record = read_json(runs[0] / "metrics.json")
    for entry in record["reports"]:
        entry["weights_sha256"] = "0" * 64
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert "was measured with other weights than it has now" in refused("compare", tmp_path, runs[1])


def test_settings_count_only_where_both_measured_them() -> None:
    a = {"num_images": 5, "settings": {"kid": {"subset_size": 5}, "is": {"splits": 10}}}
    b = {"num_images": 5, "settings": {"kid": {"subset_size": 6}}}
    assert mismatches(a, b) == ["settings of kid {'subset_size': 5} against {'subset_size': 6}"]
    assert mismatches(a, {"num_images": 5, "settings": {}}) == []


def test_seed_and_seeds_exclude_each_other(runs: tuple[Path, Path], refused: Callable[..., str]) -> None:
    assert "give --seed or --seeds" in refused("evaluate", runs[0], "--seed", 3, "--seeds", 1, 2)
    assert "give --seed or --seeds, and each of these once" in refused("evaluate", runs[0], "--seeds", 1, 1)
