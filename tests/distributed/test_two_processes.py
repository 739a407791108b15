"""Two processes on one machine (gloo) train what one does, and resume what one has begun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagewright.cli.main import main

TINY = """
import dataclasses
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES

run = RECIPES["edm-digits"]()
experiment = dataclasses.replace(
    run,
    network=SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                           num_blocks=1, attn_resolutions=(), dropout=0.1),
    training=dataclasses.replace(run.training, total_images=96, batch=16, micro_batch=8, log_images=16,
                                 snapshot_images=96, checkpoint_images=48,
                                 optimizer=dataclasses.replace(run.training.optimizer, eps=1e-3)),
)
"""


def two_processes(*args: str) -> None:
    """`torchrun --nproc-per-node 2 -m imagewright ...`, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*launcher, "-m", "imagewright", *args], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by two."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "tiny.py").write_text(TINY)
    main(["train", str(folder / "tiny.py"), "--out", str(folder / "one"), "--device", "cpu"])
    two_processes("train", str(folder / "tiny.py"), "--out", str(folder / "two"), "--device", "cpu")
    return folder


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_train_what_one_does(home: Path) -> None:
    """Up to the order in which gradients are added; Adam's eps is large, so that it magnifies no rounding."""
    assert_same_weights(home / "one", home / "two")
    losses = [[line["denoiser/loss"] for line in log_of(home / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [line["images"] for line in log_of(home / "two")] == [16, 32, 48, 64, 80, 96]


def test_only_the_first_process_writes(home: Path) -> None:
    files = sorted(p.name for p in (home / "two").rglob("*") if p.is_file() and not p.name.startswith("events"))
    assert files == sorted(p.name for p in (home / "one").rglob("*") if p.is_file() and not p.name.startswith("events"))
    assert len(list((home / "two").glob("events*"))) == 1


def test_two_processes_go_on_with_what_one_has_begun(home: Path) -> None:
    begun = home / "begun"
    args = ["train", str(home / "tiny.py"), "--out", str(begun), "--device", "cpu"]
    main([*args, "--training.total-images", "48"])
    two_processes(*args, "--resume")
    assert_same_weights(home / "one", begun)
