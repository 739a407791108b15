"""What the examples ask for exists; they are run by hand, as they take minutes to hours."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from imagewright.recipes import RECIPES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def side_by_side() -> ModuleType:
    spec = importlib.util.spec_from_file_location("side_by_side", ROOT / "examples" / "side_by_side.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["side_by_side"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_every_row_has_a_recipe_and_a_folder(side_by_side: ModuleType) -> None:
    for setting in side_by_side.SETTINGS.values():
        folders = {side_by_side._folder_name(row) for row in setting.rows}
        assert len(folders) == len({row.name for row in setting.rows}) == len(setting.rows)
        for row in setting.rows:
            assert side_by_side.recipe_of(row, setting) in RECIPES, row.name


def test_a_setting_is_cut_short_in_a_folder_of_its_own(side_by_side: ModuleType) -> None:
    whole = side_by_side.SETTINGS["emoji64-32"]
    words = ["emoji64-32", "1", "2", "--images", "320", "--scored", "473", "--steps", "6", "--rows", "SiD", "CD"]
    folder, setting, seeds = side_by_side.chosen(words)
    assert (folder, seeds) == (Path("runs/emoji64-32-320"), [1, 2])
    assert (setting.images, setting.scored, setting.teacher_steps) == (320, 473, (6, (1,)))
    assert [row.name for row in setting.rows] == ["SiD", "CD"]
    assert side_by_side.chosen(["emoji64-32"]) == (Path("runs/emoji64-32"), whole, [0])
    assert side_by_side._product_images(setting.rows[0], setting) == 320 * 6 // 13


def test_students_share_a_rows_images_and_are_joined(side_by_side: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(side_by_side, "_command", said.append)
    _, setting, _ = side_by_side.chosen(
        ["emoji64-32", "--images", "320", "--pairs", "64", "--rows", "MSD, two students"]
    )
    (row,) = setting.rows
    side_by_side._students(row, setting, "emoji64-32", Path("runs/x/seed-0/msd"), 0)
    low, high, join = said
    assert "--out runs/x/seed-0/msd/part-0-4 " in low and "--data.classes 0-4" in low and "--data.classes 5-8" in high
    assert "--data.couplings runs/x/couplings" in low and f"total-images {160 * 6 // 11} " in low
    assert join == "join runs/x/seed-0/msd/part-0-4 runs/x/seed-0/msd/part-5-8 --out runs/x/seed-0/msd"


@pytest.mark.parametrize("words", [["emoji"], ["emoji64-32", "--rows", "SiDA"], ["emoji64-32", "x"]])
def test_what_it_does_not_know_is_refused(side_by_side: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        side_by_side.chosen(words)
    assert end.value.code == 2


@pytest.mark.parametrize("name", ["matching-digits", "matching-emoji64-32"])
def test_every_row_of_a_record_stands_in_the_documentation(name: str) -> None:
    record = json.loads((ROOT / "docs" / f"{name}.json").read_text())
    page = (ROOT / "docs" / "distribution_matching.md").read_text()
    assert all(f"| {row}" in page for row in record["students"])


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_short_soak_loses_nothing_and_keeps_memory_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 steps of the 200,000."""
    monkeypatch.setattr("imagewright.data.opening.KEEP_DECODED", 0)
    soak = loaded("soak")
    monkeypatch.setattr(soak, "FAULTS", {0: "full"})  # pytest's folders are closed to nobody

    class Dying(soak.Means):  # type: ignore[misc, name-defined]
        """Killed once, in the run that is cut: by a step and not by the clock."""

        def step(self, parts: Any, batch: Any, noise: Any, clock: Any) -> Iterator[Any]:
            if clock.step == 7 and (tmp_path / "cut").exists() and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield from super().step(parts, batch, noise, clock)

    monkeypatch.setattr(soak, "Means", Dying)
    memory, ends, same = soak.soak(tmp_path, 16, 600)
    assert same and len(memory) == 16 and max(memory[-4:]) - max(memory[:8]) < 8
    assert ends == {"full: 2": 1, "killed: -9": 1, "done": 1}


def test_growth_measures_what_it_says(tmp_path: Path) -> None:
    growth = loaded("growth")
    for name, (make, _) in growth.TABLES.items():
        make(16 if name in ("pixels", "width", "calls") else 64 if name != "weights" else 2, tmp_path / name)()
    rows = [{"size": n, "seconds": 3.0 * n**2, "megabytes": 7.0} for n in (1, 2, 4)]
    assert growth.exponent(rows, "seconds") == pytest.approx(2)
    assert growth.exponent(rows, "megabytes") == pytest.approx(0)


@pytest.mark.parametrize("data", ["digits", "emoji64-16", "emoji64-32"])
def test_every_row_of_pixel_likelihoods_is_a_recipe(data: str) -> None:
    example = loaded("pixel_likelihoods")
    assert {example.options(row, data, 64, 4).split()[0] for row in example.SMALL} <= RECIPES.keys()
