"""What several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from imagewright.cli.main import main
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.trainer import Progress

# One thread for each worker and the processes it starts: on two cores, two workers of two threads take twice as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

TINY = """
import dataclasses
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun

run = RECIPES["edm-digits"]()
experiment = dataclasses.replace(
    run,
    sampler=Heun(num_steps=4),  # of a run's grids, which cost more than its steps
    network=SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                           num_blocks=1, attn_resolutions=(), dropout=0.1),
    training=dataclasses.replace(run.training, total_images=64, batch=16, log_images=16, snapshot_images=32,
                                 checkpoint_images=32),
)
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart() -> None:
    """What a module of tests draws as it is read is the same whichever modules are read before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws its random numbers from one state, whichever tests its worker has run before."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """What several tests share is the same whichever asks for it first, and changes nothing for the one that does."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the package keeps for another time is not the user's, nor that of an earlier session."""
    os.environ["IMAGEWRIGHT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file for `imagewright train`: four steps of a tiny network with dropout on digits."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(TINY)
    return path


class Died(Exception):  # noqa: N818, a power cut, not an error
    pass


@pytest.fixture
def resumed_run(tmp_path: Path) -> Callable[[Experiment], Path]:
    """Trains an experiment whole, and again with a death at two thirds: the same bits must come out.

    Its length must be three times that between checkpoints, and a snapshot at the end. Returns the folder of the run.
    """

    def run(experiment: Experiment) -> Path:
        total, each = experiment.training.total_images, experiment.training.checkpoint_images
        assert total == 3 * each == experiment.training.snapshot_images

        def die(progress: Progress) -> None:
            if progress.images == 2 * each:  # the checkpoint of this moment is not written yet
                raise Died

        run_experiment(experiment, tmp_path / "whole")
        with pytest.raises(Died):
            run_experiment(experiment, tmp_path / "died", on_progress=die)
        left = [p.name for p in (tmp_path / "died/checkpoints").iterdir()]
        assert left == [f"state-{each:012d}.safetensors"]
        run_experiment(experiment, tmp_path / "died", resume=True)
        for file in ("model.safetensors", f"checkpoints/state-{total:012d}.safetensors", f"samples/{total:012d}.png"):
            if file.startswith("samples") and not (tmp_path / "whole" / file).exists():
                continue  # what has no pictures to show leaves none
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "died" / file).read_bytes(), file
        return tmp_path / "whole"

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as a user's mistake; returns what it says, on one line."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return " ".join(told.split())

    return run
