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

SIZES = (
    "--training.total-images", "96", "--training.micro-batch", "8", "--training.snapshot-images", "96",
    "--training.checkpoint-images", "48", "--training.optimizer.eps", "1e-3", "--device", "cpu",
)  # fmt: skip


def two_processes(*args: str, restarts: int = 0) -> None:
    """`torchrun --nproc-per-node 2 -m imagewright ...`, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launcher += ["--max-restarts", str(restarts)]
    done = subprocess.run([*launcher, "-m", "imagewright", *args], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by two."""
    folder = tmp_path_factory.mktemp("two")
    main(["train", str(tiny_recipe), "--out", str(folder / "one"), *SIZES])
    two_processes("train", str(tiny_recipe), "--out", str(folder / "two"), *SIZES)
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


def test_two_processes_go_on_with_what_one_has_begun(tiny_recipe: Path, home: Path) -> None:
    begun = home / "begun"
    args = ["train", str(tiny_recipe), "--out", str(begun), *SIZES]
    main([*args, "--training.total-images", "48"])
    two_processes(*args, "--resume", "--training.parallel", "shard")
    assert len(list((begun / "checkpoints").glob("rows-*96-*-of-0002.safetensors"))) == 2
    assert_same_weights(home / "one", begun)


DYING = """

import os, signal
from imagewright.training.trainer import Trainer

step = Trainer._step


def dying(self, updates):
    if self.step_index == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        open(__file__ + ".died", "x").close()
        os.kill(os.getpid(), signal.SIGKILL)  # between backward and the optimiser
    return step(self, updates)


Trainer._step = dying
"""


def test_a_process_that_is_killed_in_mid_step_costs_no_bit(tiny_recipe: Path, home: Path, tmp_path: Path) -> None:
    """torchrun starts both anew, and the same command goes on from the last checkpoint."""
    recipe = tmp_path / "tiny.py"
    recipe.write_text(tiny_recipe.read_text() + DYING)
    # One start would do; gloo's processes at times do not find each other on a busy machine, which costs another.
    two_processes("train", str(recipe), "--out", str(home / "elastic"), *SIZES, restarts=3)
    assert (tmp_path / "tiny.py.died").exists()  # torchrun may name the other, which ends for having lost this one
    assert [line["images"] for line in log_of(home / "elastic")] == [16, 32, 48, 64, 80, 96]
    mine, theirs = (load_file(home / run / "model.safetensors") for run in ("elastic", "two"))
    assert all(torch.equal(mine[name], value) for name, value in theirs.items()) and mine.keys() == theirs.keys()
