"""A run killed at any moment and resumed ends with the bits of one that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imagewright.cli.main import main
from imagewright.training.distributed import Processes
from imagewright.training.locking import LOCK, sole_trainer

SIZES = (
    "--training.total-images", "192", "--training.batch", "16", "--training.micro-batch", "8",
    "--training.log-images", "16", "--training.snapshot-images", "96", "--training.checkpoint-images", "32",
    "--device", "cpu",
)  # fmt: skip
DYING = """
import os, signal, sys
import imagewright.training.trainer as trainer
from imagewright.cli.main import main

step, after = trainer.Trainer.train_step, int(sys.argv[1])


def dying(self):
    if self.step_index == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)


trainer.Trainer.train_step = dying
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def home(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was never killed; the others learn from it or are compared with it."""
    folder = tmp_path_factory.mktemp("killed")
    main(arguments("edm", folder / "edm-whole", tiny_recipe))
    return folder


def arguments(name: str, run: Path, recipe: Path) -> list[str]:
    """The command line that trains a denoiser, or its student, into a folder."""
    what = [str(recipe)] if name == "edm" else ["cd-digits", "--teacher", str(run.parent / "edm-whole")]
    return ["train", *what, "--out", str(run), *SIZES]


def train_and_kill(args: list[str], run: Path, after: int) -> None:
    """Start a process that trains and is killed (SIGKILL) after so many steps; its checkpoint may be half written."""
    # Sums on a CPU depend on the number of threads that share them: both processes use as many as this one.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-c", DYING, str(after), *args]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(log_of(run)) == after


@pytest.mark.parametrize(("name", "after"), [("edm", 5), ("cd", 4)])
def test_a_killed_run_ends_with_the_same_bits(home: Path, tiny_recipe: Path, name: str, after: int) -> None:
    whole, killed = home / f"{name}-whole", home / f"{name}-killed"
    if not whole.exists():
        main(arguments(name, whole, tiny_recipe))
    train_and_kill(arguments(name, killed, tiny_recipe), killed, after)
    assert not (killed / "model.safetensors").exists() or not (killed / "samples" / "000000000192.png").exists()
    main(["train", "--resume", str(killed)])
    for file in ("model.safetensors", "checkpoints/state-000000000192.safetensors", "samples/000000000192.png"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert [line["step"] for line in log_of(killed)] == list(range(1, 13))
    assert [strip(line) for line in log_of(killed)] == [strip(line) for line in log_of(whole)]


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def strip(line: dict[str, float]) -> dict[str, float]:
    """What a step computed, without its pace."""
    return {k: v for k, v in line.items() if k != "images_per_second"}


def test_a_run_that_never_reached_a_checkpoint_starts_again(home: Path, tiny_recipe: Path) -> None:
    killed = home / "edm-early"
    train_and_kill(arguments("edm", killed, tiny_recipe), killed, after=1)
    for path in (killed / "checkpoints").glob("state-*"):
        path.unlink()
    main(["train", "--resume", str(killed)])
    assert (killed / "model.safetensors").read_bytes() == (home / "edm-whole" / "model.safetensors").read_bytes()
    assert [line["step"] for line in log_of(killed)] == list(range(1, 13))


# --- one folder, one trainer


def test_a_run_is_trained_by_one_command_at_a_time(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", str(tiny_recipe), "--out", str(run), "--training.total-images", "16", "--device", "cpu"]
    with sole_trainer(run, Processes()):
        for resume in ([], ["--resume"]):
            with pytest.raises(SystemExit) as stopped:
                main([*words, *resume])
            assert stopped.value.code == 2
            assert f"{run} is being trained by another command" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [LOCK]
    assert not run.exists()  # what stayed empty is not left
    run.mkdir()
    (run / LOCK).touch()  # of a process that was killed: nobody holds it
    main(words)
    assert not (run / LOCK).exists() and (run / "model.safetensors").exists()
