"""Trackers: what they are told, that nothing leaves the machine by itself, and that none of them can end a run."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewright.cli.train import find_experiment
from imagewright.training.config import TrainingConfig
from imagewright.training.experiment import run_experiment
from imagewright.training.log import read_log
from imagewright.training.trackers import QUIET, Tracked
from imagewright.types import UserError

GREY = np.full((4, 4, 1), 7, np.uint8)


class Calls(list[Any]):
    """A package that notes what is asked of it: (name, arguments, options)."""

    def package(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__getattr__ = lambda word: self._note(word)  # type: ignore[method-assign]
        return module

    def _note(self, word: str) -> Callable[..., Any]:
        if word.startswith("__"):
            raise AttributeError(word)

        def call(*args: Any, **options: Any) -> Any:
            self.append((word, args, options))
            return self.package("run")

        return call

    def named(self, word: str) -> list[Any]:
        return [call for call in self if call[0] == word]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Calls]:
    for variable in (*QUIET, "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, "")  # so that what is set comes back
        monkeypatch.delenv(variable)

    def make(name: str) -> Calls:
        calls = Calls()
        monkeypatch.setitem(sys.modules, name, calls.package(name))
        return calls

    return make


def tell(name: str, folder: Path) -> None:
    tracked = Tracked((name,), folder)
    tracked.numbers({"denoiser/loss": 0.5}, 32)
    tracked.picture("samples", GREY, 64)
    tracked.close()


def test_wandb_is_offline_unless_the_user_says_otherwise(
    fake: Callable[[str], Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake("wandb")
    tell("wandb", tmp_path)
    ((_, _, options),) = calls.named("init")
    assert options["mode"] == "offline" and options["dir"] == str(tmp_path) and options["save_code"] is False
    (first, second) = calls.named("log")
    assert first[1:] == (({"denoiser/loss": 0.5},), {"step": 32}) and second[2] == {"step": 64}
    assert calls.named("Image")[0][1][0].shape == (4, 4, 3) and calls.named("finish")
    monkeypatch.setenv("WANDB_MODE", "online")
    tell("wandb", tmp_path)
    assert calls.named("init")[1][2]["mode"] == "online"


def test_mlflow_keeps_a_store_of_its_own(
    fake: Callable[[str], Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake("mlflow")
    tell("mlflow", tmp_path)
    assert calls.named("set_tracking_uri")[0][1] == (f"sqlite:///{tmp_path / 'mlflow.db'}",)
    assert calls.named("log_metrics")[0][1:] == (({"denoiser/loss": 0.5},), {"step": 32})
    assert calls.named("log_image")[0][2] == {"key": "samples", "step": 64} and calls.named("end_run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    tell("mlflow", tmp_path)
    assert calls.named("set_tracking_uri")[1][1] == ("http://elsewhere",)


def test_trackio_is_told_no_space(fake: Callable[[str], Calls], tmp_path: Path) -> None:
    import os

    calls = fake("trackio")
    tell("trackio", tmp_path)
    assert calls.named("init")[0][2] == {"project": "imagewright", "name": tmp_path.name}
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio") and len(calls.named("log")) == 2
    assert all(os.environ[variable] == value for variable, value in QUIET.items())


def test_a_run_writes_its_own_log_and_shows_every_tracker_its_pictures(
    fake: Callable[[str], Calls], tiny_recipe: Path, tmp_path: Path
) -> None:
    calls = fake("wandb")
    run = find_experiment(str(tiny_recipe))
    run = replace(run, training=replace(run.training, trackers=("tensorboard", "wandb"), total_images=32))
    run_experiment(run, tmp_path / "run")
    told = [args[0] for _, args, _ in calls.named("log")]
    lines = read_log(tmp_path / "run/log.jsonl")
    assert [t for t in told if "denoiser/loss" in t] == [
        {k: v for k, v in line.items() if k not in ("step", "images")} for line in lines
    ]
    assert sum("samples" in t for t in told) == len(list((tmp_path / "run/samples").iterdir())) >= 1
    events = b"".join(p.read_bytes() for p in (tmp_path / "run").glob("events.*"))
    assert b"denoiser/loss" in events and b"samples" in events and b"PNG" in events


def test_a_tracker_that_fails_ends_nothing(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, folder: Path) -> None: ...

        def numbers(self, values: Any, images: int) -> None:
            raise ConnectionError("the service is away")

    monkeypatch.setattr("imagewright.training.trackers.TRACKERS", {"tensorboard": Broken})
    run = find_experiment(str(tiny_recipe))
    run = replace(run, training=replace(run.training, total_images=32))
    with pytest.warns(UserWarning, match="tracker tensorboard failed and is left out: the service is away") as told:
        run_experiment(run, tmp_path / "run")
    assert len([w for w in told if "tracker" in str(w.message)]) == 1
    assert read_log(tmp_path / "run/log.jsonl") and (tmp_path / "run/model.safetensors").exists()


def test_without_trackers_there_are_no_events(tiny_recipe: Path, tmp_path: Path) -> None:
    run = find_experiment(str(tiny_recipe))
    run_experiment(replace(run, training=replace(run.training, trackers=(), total_images=16)), tmp_path / "run")
    assert not list((tmp_path / "run").glob("events.*")) and read_log(tmp_path / "run/log.jsonl")


def test_names_and_packages_that_are_missing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"training\.trackers has no 'comet'; there are tensorboard, wandb, mlflow, trackio"
    ):
        TrainingConfig(total_images=1, batch=1, trackers=("comet",))
    with pytest.raises(UserError, match="no tracker may occur twice"):
        TrainingConfig(total_images=1, batch=1, trackers=("wandb", "wandb"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracker wandb needs a package: pip install 'imagewright\[wandb\]'"):
        Tracked(("wandb",), tmp_path)
