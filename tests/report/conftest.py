"""A tiny run, really trained: 16 digits' worth of steps, seconds in all. Shared by the tests of the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from imagewright.data.config import DataConfig
from imagewright.methods.edm import EDM
from imagewright.networks import SongUNetConfig
from imagewright.samplers import Heun
from imagewright.training.config import TrainingConfig
from imagewright.training.experiment import Experiment, run_experiment


def _report(images: int, fd: float) -> dict[str, object]:
    return {
        "scores": {
            "fd_digits": fd,
            "kd_digits": 0.5,
            "kd_digits_std": 0.04,
            "kd_digits_stderr": 0.01,
            "precision": 0.75,
            "recall": 0.5,
            "density": 1.1,
            "coverage": 0.25,
        },
        "yardsticks": {
            "fd_digits": {
                "floor": 1.5,
                "floor_std": 0.1,
                "gaussian": 90.0,
                "noise": 800.0,
                "num_images": images,
            }
        },
        "num_images": images,
        "num_reference": 1797,
        "reference": "images:abc",
        "extractor_sha256": "0" * 64,
        "notes": [f"fd_digits of {images} images is <biased>"],
    }


def _write_metrics(folder: Path, images: int = 64) -> None:
    entries = [
        {
            "target": str(folder),
            "sampler": {"class": "heun", "num_steps": steps},
            "nfe": 2 * steps - 1,
            "seconds": 0.5 * steps,
            "report": _report(images, 100.0 / steps),
        }
        for steps in (18, 2, 5)
    ]
    (folder / "metrics.json").write_text(json.dumps({"format": "imagewright-metrics/1", "reports": entries}))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two snapshots and a log, and no measures."""
    folder = tmp_path_factory.mktemp("runs") / "tiny<b>run"
    experiment = Experiment(
        data=DataConfig(source="digits"),
        method=EDM(),
        network=SongUNetConfig(
            img_resolution=8,
            in_channels=1,
            out_channels=1,
            model_channels=8,
            channel_mult=(1,),
            num_blocks=1,
            attn_resolutions=(),
            dropout=0.0,
        ),
        sampler=Heun(num_steps=14),
        training=TrainingConfig(total_images=32, batch=8, log_images=8, snapshot_images=16, checkpoint_images=32),
    )
    return run_experiment(experiment, folder, command=["a b/tiny.py", "--resume", "--out", "elsewhere"])


@pytest.fixture(scope="session")
def measured_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with a metrics.json of three numbers of steps."""
    folder = tmp_path_factory.mktemp("measured") / "second"
    shutil.copytree(tiny_run, folder)
    _write_metrics(folder)
    return folder
