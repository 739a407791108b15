"""`train auto` and `distill`: what is chosen for images and machine, and what comes from the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imagewright.cli import composing
from imagewright.cli.composing import experiment_of
from imagewright.cli.dry_run import StandIns
from imagewright.cli.main import main
from imagewright.data import ImageSet, write_edm_zip
from imagewright.data.config import DataConfig
from imagewright.models.files import load_model
from imagewright.recipes.composed import LEAST_IMAGES, auto, distill, lasting
from imagewright.training.distributed import Processes
from imagewright.training.experiment import assemble
from imagewright.training.pace import Opened
from imagewright.types import DataSpec, kind_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    return write_edm_zip(ImageSet.of(pixels), tmp_path / "photos.zip")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("resolution", [8, 16, 28, 33, 64, 128])
@pytest.mark.parametrize(("channels", "classes", "count"), [(1, 10, 100), (3, 0, 60_000)])
def test_every_set_has_a_run_that_can_be_built(
    device: str, resolution: int, channels: int, classes: int, count: int
) -> None:
    spec = DataSpec(name="any", resolution=resolution, channels=channels, num_classes=classes)
    run = auto(DataConfig(source="any.zip"), spec, count, device)
    empty = np.zeros((0, resolution, resolution, channels), np.uint8)
    images = ImageSet(spec=spec, pixels=empty, labels=np.zeros(0, np.int64), names=(), source="any", digests=())
    with torch.device("meta"):
        parts = assemble(run, sources=Opened(images)).parts
    assert sum(p.numel() for p in parts.denoiser.parameters()) > 100_000
    assert (run.method.augment_dim > 0) == (count < 50_000 and resolution >= 16)
    rate, total = run.training.optimizer, run.training.total_images
    assert rate.lr_ramp_images + rate.lr_cooldown_images < total


def test_the_length_is_what_there_is_time_for() -> None:
    spec = DataSpec(name="any", resolution=8, channels=3)
    run = auto(DataConfig(source="any.zip"), spec, 40, "cpu")
    assert run.training.total_images == LEAST_IMAGES and lasting(run, 1000, 100) == run
    short = lasting(run, 0.5, 17.3).training
    assert short.total_images == 31_000 and short.optimizer.lr_cooldown_images == 12_400
    assert short.ema.halflife_images == 3_100 and lasting(run, 1e-9, 1).training.total_images == run.training.batch


def test_a_folder_becomes_a_denoiser_and_that_a_generator(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command without an option that says what the data are, but the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(composing, "images_per_second", lambda *_, **__: 10.0)
    small = [
        "--network.model-channels",
        "8",
        "--network.num-blocks",
        "1",
        "--sampler.num-steps",
        "2",
        "--device",
        "cpu",
    ]
    main(["train", "auto", "--data.source", str(photos), "--hours", "0.002", "--training.batch", "24", *small])
    said = capsys.readouterr().out
    assert "6 images of 8x8x3, no classes, on cpu: SongUNet of 32 channels x (1, 2)" in said
    assert "72 images (12 times each) at 10 a second: 7 seconds" in said
    teacher = experiment_of(Path("runs/auto-photos"))
    assert teacher.training.total_images == 72 and teacher.training.batch == 24
    main(
        [
            "train",
            "auto",
            "--data.source",
            str(photos),
            *small,
            "--training.batch",
            "24",
            "--resume",
            "--hours",
            "0.002",
        ]
    )
    assert experiment_of(Path("runs/auto-photos")) == teacher  # it goes on as what it was, whatever would be chosen now
    main(["distill", "runs/auto-photos", "--device", "cpu"])
    student = experiment_of(Path("runs/distill-auto-photos"))
    assert student.data == teacher.data and student.training.total_images == 36 and student.training.batch == 24
    assert kind_of(load_model(Path("runs/distill-auto-photos")).model) == "flow_map"


@pytest.mark.parametrize("by", ["consistency", "dmd2"])
def test_a_student_of_a_shipped_model(by: str) -> None:
    words = ["distill", "--teacher", "emoji64-32", f"--by={by}"]
    run = composing.compose_distill(words, lambda args, default: default, Processes())
    assert run.experiment.data == DataConfig(source="emoji64", resolution=32)
    with torch.device("meta"):
        assert "teacher" in assemble(run.experiment, sources=StandIns()).parts.roles


def test_a_student_keeps_the_teachers_hardware_settings_and_nothing_of_its_weights() -> None:
    spec = DataSpec(name="any", resolution=64, channels=3)
    teacher = auto(DataConfig(source="any.zip", xflip=True), spec, 100, "cuda")
    teacher = replace(teacher, start="runs/other", training=replace(teacher.training, micro_batch=32, weights_images=9))
    student = distill("runs/t", teacher)
    assert student.given == {"teacher": "runs/t"} and student.network is None and student.start is None
    assert (student.training.precision, student.training.micro_batch) == ("bf16", 32)
    assert student.training.weights_images is None and student.data.xflip


def test_what_cannot_be_composed_is_said(refused: Callable[..., str], tmp_path: Path, photos: Path) -> None:
    assert "train auto needs --data.source" in refused("train", "auto")
    assert "distill needs a teacher" in refused("train", "distill")
    assert "needs the teacher first" in refused("distill", "--out", tmp_path)
    assert "is neither a folder with a model" in refused("distill", tmp_path)
    assert "--by is 'magic'; allowed: consistency, dmd2" in refused("distill", "emoji64-32", "--by", "magic")
    assert "--hours is -1" in refused("train", "auto", "--data.source", photos, "--hours", -1, "--device", "cpu")
