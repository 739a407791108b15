"""What the documentation shows is run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import imagewright
from imagewright.bench.claims import KEYS
from imagewright.bench.claims.ledger import read_records
from imagewright.bench.claims.origin import equal_codes
from imagewright.bench.claims.verdict import LEAST_SEEDS
from imagewright.cli import known
from imagewright.cli.composing import COMPOSED
from imagewright.cli.main import COMMANDS, main
from imagewright.errors import UserError
from imagewright.files import read_json
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.statistics import Moments
from imagewright.recipes import RECIPES

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


def test_the_worked_chain_trains(tmp_path: Path) -> None:
    text = (DOCS / "architecture.md").read_text()
    (block,) = re.findall(r"```python\n(# two_stages\.py\n.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"^    imagewright (train two_stages\.py.*)$", text, re.MULTILINE)
    (tmp_path / "two_stages.py").write_text(block)
    words = command.replace("two_stages.py", str(tmp_path / "two_stages.py")).split()
    small = [f"--{stage}.training.total-images=64" for stage in ("teacher", "student")]
    main([*words, *small, "--teacher.network.model-channels", "8", "--out", str(tmp_path / "run")])
    assert imagewright.load(tmp_path / "run").generate(1).shape == (1, 8, 8, 1)


def test_the_page_on_ones_own_pictures_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the page in its order, on smaller pictures and for fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("imagewright.cli.composing.images_per_second", lambda *_, **__: 10.0)
    page = (DOCS / "own_pictures.md").read_text()
    commands = re.findall(r"^    (imagewright|python) (.+)$", page, re.MULTILINE)
    assert [words.split()[0] for _, words in commands] == [
        *("examples/make_photos.py", "data", "train", "distill", "sample", "data"),
        *("evaluate", "evaluate", "compare", "report", "export"),
    ]
    cpu = "--device cpu --training.batch 16"
    shorter = {
        "train": f"--training.total-images 16 --network.model-channels 8 --sampler.num-steps 1 {cpu}",
        "distill": f"--training.total-images 16 {cpu}",
        "evaluate": "--n 8 --no-yardsticks --metrics fd kid --seeds 1 2 --device cpu --steps",
    }
    for program, words in commands:
        told = words.replace("--resolution 32", "--resolution 8").replace("--steps 300", "--steps 2")
        if program == "python":
            script = runpy.run_path(str(DOCS.parent / "examples/make_photos.py"))
            script["main"](Path("photos"), 16)
        elif told.startswith("report"):
            continue  # it draws hundreds; tests/report makes pages
        else:
            main([*told.split(), *shorter.get(told.split()[0], "").removesuffix(" --steps").split()])
    assert imagewright.load("model").generate(1).shape == (1, 8, 8, 3)
    assert len(list(Path("samples").glob("0*.png"))) == 16


def test_the_worked_example_of_measuring() -> None:
    real, generated = (Moments(mean=np.array([m]), cov=np.array([[v]])) for m, v in ((0, 1.0), (0.5, 4.0)))
    assert frechet_distance(real, generated) == pytest.approx(1.25)
    assert "= 1.25." in (DOCS / "measuring.md").read_text()


def test_the_readme_has_the_ledgers_verdicts() -> None:
    text = (DOCS.parent / "README.md").read_text()
    said = {key: verdict for verdict, key in re.findall(r"\| \[([a-z ]+)\]\(docs/claims\.md#(\w+)\) \|", text)}
    records = read_records(DOCS / "claims", KEYS)
    assert said == {key: records[key]["verdict"] if key in records else "not measured anew" for key in KEYS}


def test_the_ledger_is_that_of_the_records() -> None:
    page = (DOCS / "claims.md").read_text()
    for key, record in read_records(DOCS / "claims", KEYS).items():
        assert f"| [{key}](#{key}) |" in page and f"**{record['verdict'].capitalize()}.**" in page
        assert record["command"] in page, key
        assert all(entry["code"] in equal_codes(record) for entry in record["seeds"].values()), key
        assert len(record["seeds"]) >= LEAST_SEEDS, key


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Each command of the pages, once, with where it stands; what has "..." in it is no whole one."""
    pages = [
        DOCS.parent / "README.md",
        *DOCS.glob("*.md"),
        *(DOCS / "data").glob("*.md"),
        *(DOCS / "models").glob("*.md"),
    ]
    seen = set()
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        found = re.findall(r"^ {4,}(imagewright .*)$", text, re.MULTILINE) + re.findall(r"`(imagewright [^`]+)`", text)
        for one in (part.split(" #")[0].strip() for line in found for part in line.split("&&")):
            if one not in seen and "..." not in one:
                seen.add(one)
                yield f"{page.name}: {one}", shlex.split(one)[1:]


def test_the_pages_commands_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "json", SimpleNamespace(loads=cache(json.loads)))  # one table for all
    shown = list(shown_commands())
    assert len(shown) > 250
    recipes = [*RECIPES, *COMPOSED, "RECIPE"]
    for where, words in shown:
        if not words or words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, where
        try:
            known.require_known(words)
        except UserError as error:
            pytest.fail(f"{where}: {error}")
        if words[0] == "train" and words[1:] and not words[1].startswith("-") and not words[1].endswith(".py"):
            assert any(name == words[1] or name.startswith(f"{words[1]}-") for name in recipes), where
