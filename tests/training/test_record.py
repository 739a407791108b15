"""The record of a run: it is read back whole, and tells what was given from what is given now."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewright.data.pixels import encode_png
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.record import (
    experiment_from_json,
    experiment_record,
    how_computed,
    located,
    merged,
    repeat_command,
    to_json,
)
from imagewright.types import UserError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_rebuilt_from_its_record(name: str) -> None:
    recipe = RECIPES[name]()
    text = json.dumps(to_json(recipe), allow_nan=False)
    assert experiment_from_json(json.loads(text), Path("experiment.json")) == recipe


@dataclass(frozen=True)
class Mine:
    """A method of the user's own."""

    weight: float = 1.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.update(method={"class": "Mine", "weight": 2.0}), "names the class 'Mine', which this version"),
        (lambda r: r["training"].update(strange=1), "names the field 'strange' of TrainingConfig"),
        (lambda r: r["training"].pop("batch"), "is damaged: .*batch"),
        (lambda r: r["training"].update(batch=0), "training.batch is 0"),
    ],
)
def test_what_cannot_be_rebuilt_is_said(change: Any, complaint: str) -> None:
    record = to_json(RECIPES["edm-digits"]())
    change(record)
    with pytest.raises(UserError, match=complaint):
        experiment_from_json(record, Path("runs/x/experiment.json"))


def test_commands_merge_option_by_option() -> None:
    first = [
        "edm-digits",
        "--training.batch",
        "4",
        "--data.source=a b",
        "--xs",
        "1",
        "-2",
        "--data.xflip",
        "--out",
        "x",
    ]
    assert merged(first, []) == first[:-2]
    more = ["edm-digits", "--training.batch", "8", "--no-data.xflip", "--data.no-xflip", "--resume", "--xs", "3"]
    again = merged(first, more)
    assert again.count("--training.batch") == 1 and again[again.index("--training.batch") + 1] == "8"
    assert "--data.xflip" not in again and "--data.no-xflip" in again and "--resume" not in again
    assert again[again.index("--xs") :][:2] == ["--xs", "3"]
    assert merged(merged(first, more), more) == merged(first, more)


# --- what a run is given


def pictures(folder: Path, classes: str = "ab", seed: int = 0) -> Path:
    for i in range(6):
        path = folder / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.random.default_rng(seed + i).integers(0, 256, (8, 8, 1), dtype=np.uint8)))
    return folder


def tiny(source: Path | str, images: int = 8, **more: Any) -> Experiment:
    recipe = RECIPES["edm-digits"]()
    network = replace(recipe.network, model_channels=8, channel_mult=(1,), attn_resolutions=())
    training = replace(recipe.training, total_images=images, batch=4, checkpoint_images=8, **more)
    return replace(recipe, data=replace(recipe.data, source=str(source)), network=network, training=training)


@pytest.mark.parametrize(("classes", "seed"), [("ab", 50), ("abc", 0)])
def test_changed_images_are_refused(tmp_path: Path, classes: str, seed: int) -> None:
    source = pictures(tmp_path / "set")
    run_experiment(tiny(source), tmp_path / "run")
    shutil.rmtree(source)
    pictures(source, classes, seed)
    with pytest.raises(UserError, match=r"run was trained with other data than .*set now holds: .*fingerprint was"):
        run_experiment(tiny(source, 16), tmp_path / "run", resume=True)


def test_moved_images_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    source = pictures(project / "set")
    monkeypatch.chdir(project)
    run_experiment(tiny("set"), Path("run"))
    assert json.loads((project / "run/experiment.json").read_text())["experiment"]["data"]["source"] == str(source)
    monkeypatch.chdir(tmp_path)  # a relative path, from another folder
    run_experiment(tiny("set", 12), project / "run", resume=True)
    project.rename(tmp_path / "elsewhere")  # all of it
    run_experiment(tiny(source, 16), tmp_path / "elsewhere/run", resume=True)
    (tmp_path / "elsewhere/set").rename(tmp_path / "other")  # the images alone, as the user says
    run_experiment(tiny(tmp_path / "other", 20), tmp_path / "elsewhere/run", resume=True)
    (tmp_path / "other").rename(tmp_path / "elsewhere/set")  # and back where they once were
    run_experiment(tiny(tmp_path / "other", 24), tmp_path / "elsewhere/run", resume=True)
    with pytest.raises(UserError, match="gone does not exist"):  # what the run never had
        run_experiment(tiny("gone", 24), tmp_path / "elsewhere/run", resume=True)
    (tmp_path / "elsewhere/set").rename(tmp_path / "other")
    run_experiment(tiny(tmp_path / "other", 28), tmp_path / "elsewhere/run", resume=True)
    record = json.loads((tmp_path / "elsewhere/run/experiment.json").read_text())
    assert record["experiment"]["data"]["source"] == str(tmp_path / "other")
    assert record["inputs"]["data"]["where"] == os.path.join("..", "..", "other")


def test_a_network_of_a_family_is_found_again_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path)
    named = RECIPES["edm-digits"]().giving(vision="dinov2:net")
    placed = located(named, tmp_path / "run")
    assert placed.given["vision"] == f"dinov2:{tmp_path}/net"
    record = experiment_record(placed, None, tmp_path / "run", {"vision": {"sha256": "a"}}, {}, {})
    where = {"where": os.path.join("..", "net"), "places": [str(tmp_path / "net")]}
    assert record["inputs"]["vision"] == {"sha256": "a", **where}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/experiment.json").write_text(json.dumps(record))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert located(named, tmp_path / "run").given == placed.given
    assert located(named.giving(vision="clip:none"), tmp_path / "elsewhere").given == {"vision": "clip:none"}


def test_another_teacher_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    teachers = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(teachers):
        run_experiment(tiny("digits", seed=seed), folder)

    def student(teacher: Path, images: int) -> Experiment:
        distilled = replace(tiny("digits", images), method=ConsistencyDistillation(), network=None, sampler=None)
        return replace(distilled).giving(teacher=str(teacher))

    run_experiment(student(teachers[0], 8), tmp_path / "run")
    with pytest.raises(UserError, match=r"was trained with other teacher than .*b now holds: weights_sha256 was"):
        run_experiment(student(teachers[1], 16), tmp_path / "run", resume=True)
    shutil.move(teachers[0], tmp_path / "moved")
    run_experiment(student(tmp_path / "moved", 16), tmp_path / "run", resume=True)


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    run_experiment(tiny("digits"), tmp_path / "run")
    free: dict[str, Any] = {"checkpoint_images": 4, "log_images": 4, "snapshot_images": 4, "micro_batch": 2,
                            "keep_checkpoints": 5, "weights_images": 4}  # fmt: skip
    changed = replace(tiny("digits", 16), training=replace(tiny("digits", 16).training, **free))
    run_experiment(changed, tmp_path / "run", resume=True)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 3
    run_experiment(changed, tmp_path / "run", resume=True)  # at its end: nothing is left to do
    with pytest.raises(UserError, match=r"has seen 16 images already; training\.total_images is 12, which takes none"):
        run_experiment(tiny("digits", 12), tmp_path / "run", resume=True)
    for settings in ({"batch": 8}, {"seed": 3}):
        other = replace(changed, training=replace(changed.training, **settings))
        with pytest.raises(UserError, match=f"holds a run with another training.{next(iter(settings))};"):
            run_experiment(other, tmp_path / "run", resume=True)


def test_the_command_that_repeats_a_run_names_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "set")
    run_experiment(tiny("set"), Path("run"), command=["edm-digits", "--data.source", "set", "--training.batch", "4"])
    run_experiment(tiny("set", 16), Path("run"), resume=True, command=["edm-digits", "--data.source", "set"])
    words = repeat_command(json.loads((tmp_path / "run/experiment.json").read_text()))
    assert words == ["train", "edm-digits", "--data.source", str(tmp_path / "set")]
    assert repeat_command({"command": None}) is None


def test_the_record_says_how_every_start_computed(tmp_path: Path) -> None:
    first = how_computed(1, "cpu", "fp32")
    assert first == {"processes": 1, "threads": torch.get_num_threads(), "device": "cpu", "precision": "fp32",
                     "matmul": "highest"}  # fmt: skip
    for computed in (first, {**first, "processes": 2}, first):
        record = experiment_record(tiny("digits"), None, tmp_path, {}, {}, computed)
        (tmp_path / "experiment.json").write_text(json.dumps(record))
    assert record["computed"] == [{**first, "processes": 2}, first]
