"""Commands whose work several processes share: the same bits, and the first process writes and speaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.cli.main import main
from imagewright.data import write_edm_zip
from imagewright.data.image_set import ImageSet

WORKER = Path(__file__).parent / "commands.py"


@pytest.fixture(scope="module")
def home(tiny_recipe: Path, together: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same commands by one process ("one") and by two ("two"), and what the two said."""
    folder = tmp_path_factory.mktemp("shared")
    sizes = ["--training.total-images", "16", "--training.snapshot-images", "1e9", "--device", "cpu"]
    main(["train", str(tiny_recipe), "--out", str(folder / "run"), *sizes])
    for name in ("cat", "dog"):
        (folder / "pictures/train" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 11, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "pictures/train" / name / f"{i}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
    write_edm_zip(ImageSet.of(pixels, name="own"), folder / "own.zip")
    for words in of(folder, "one"):
        main(words)
    commands = [*of(folder, "two"), auto(folder)]
    (folder / "commands.json").write_text(json.dumps(commands))
    said = together(WORKER, str(folder / "commands.json"), groups=len(commands))
    (folder / "said.json").write_text(json.dumps(said))
    return folder


def of(folder: Path, out: str) -> list[list[str]]:
    run, place = str(folder / "run"), folder / out
    steps = ["--steps", "2", "--device", "cpu", "--batch-size", "4"]
    return [
        ["sample", run, "--n", "10", "--npz", "--out", str(place / "samples"), *steps],
        ["evaluate", run, "--n", "12", "--data", "digits", "--metrics", "fd", "--seeds", "1", "2", "--no-yardsticks",
         "--out", str(place / "metrics.json"), *steps],
        ["couple", run, "--n", "12", "--shard", "4", "--sampler", "heun", "--out", str(place / "pairs"), *steps],
        ["data", "downsample", str(folder / "pictures"), str(place / "small"), "--size", "4", "--preset", "edm",
         "--workers", "1"],
        ["data", "convert", str(folder / "pictures"), str(place / "pictures.zip"), "--resolution", "4", "--fit",
         "crop"],
    ]  # fmt: skip


def auto(folder: Path) -> list[str]:
    return [
        "train", "auto", "--data.source", str(folder / "own.zip"), "--hours", "0.0001", "--out", str(folder / "auto"),
        "--training.total-images", "256", "--network.model-channels", "8", "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["samples", "pairs", "small", "pictures.zip"])
def test_two_processes_write_what_one_does(what: str, home: Path) -> None:
    one, two = home / "one" / what, home / "two" / what
    files = [one, *one.rglob("*")]
    assert len(files) > 1 or one.is_file()
    assert [p.relative_to(one) for p in sorted(files)] == [p.relative_to(two) for p in sorted([two, *two.rglob("*")])]
    for path in files:
        if path.is_file() and path.suffix != ".npz":
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    if what == "samples":
        mine, theirs = np.load(one / "samples.npz"), np.load(two / "samples.npz")
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine.files)


def test_scores_are_those_of_one_process(home: Path) -> None:
    reports = [json.loads((home / name / "metrics.json").read_text())["reports"] for name in ("one", "two")]
    one, two = ([each["report"]["scores"] for each in found] for found in reports)
    assert len(one) == 2 and one == two


def test_the_first_process_speaks(home: Path) -> None:
    first, second = json.loads((home / "said.json").read_text())
    assert "10 images in" in first and "12 couplings in" in first and "images written to" in first
    assert not second.strip()


def test_all_processes_train_as_long_as_the_first_has_measured(home: Path) -> None:
    record = json.loads((home / "auto/experiment.json").read_text())
    assert record["computed"][-1]["processes"] == 2
    assert (home / "auto/model.safetensors").exists()
