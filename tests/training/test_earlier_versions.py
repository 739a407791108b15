"""What earlier versions wrote is read and gone on with: a run of each format that there was.

The folders in `earlier/` were written by the code of their time, by one recipe: four steps of a tiny network on digits,
with the checkpoint after two of them.

    two-entries   the first: checkpoint /1, its state and format as two entries; null for no augmentation
    one-entry     checkpoint /1 in one entry
    checksum      checkpoint /2: a checksum and the run's identity; the description of the model in its weights
    given         what a method asks for in one field, and how each start computed
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import imagewright
from imagewright.cli.composing import experiment_of
from imagewright.models import files
from imagewright.models.files import load_model, read_model_record
from imagewright.training import checkpoint, record
from imagewright.training.checkpoint import checkpoints, load_checkpoint, run_of
from imagewright.training.experiment import run_experiment
from imagewright.training.record import identity, read_record
from imagewright.training.trainer import Progress
from imagewright.types import UserError

EARLIER = Path(__file__).parent / "earlier"
RUNS = ("two-entries", "one-entry", "checksum", "given")


class _Died(Exception):  # noqa: N818, a power cut, not an error
    pass


@pytest.mark.parametrize("name", RUNS)
def test_its_model_draws(name: str) -> None:
    assert load_model(EARLIER / name).weights_sha256 == read_model_record(EARLIER / name)["weights_sha256"]
    assert imagewright.load(EARLIER / name).generate(2, labels=3).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("name", RUNS)
def test_its_run_goes_on(name: str, tmp_path: Path) -> None:
    """Also when it is stopped again before it has a checkpoint of this version."""
    folder = shutil.copytree(EARLIER / name, tmp_path / name)
    for file in [folder, *folder.rglob("*")]:
        file.chmod(0o755 if file.is_dir() else 0o644)

    def die(progress: Progress) -> None:
        raise _Died

    experiment = experiment_of(folder)
    with pytest.raises(_Died):
        run_experiment(experiment, folder, resume=True, on_progress=die)
    assert "run" in read_record(folder) or name in ("two-entries", "one-entry")
    run_experiment(experiment_of(folder), folder, resume=True)
    assert [path.stem for path in checkpoints(folder / "checkpoints")] == ["state-000000000032", "state-000000000064"]
    assert load_checkpoint(checkpoints(folder / "checkpoints")[-1])["step"] == 4
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in log] == [16, 32, 48, 64]
    assert imagewright.load(folder).generate(1).shape == (1, 8, 8, 1)


def test_another_runs_checkpoint_is_still_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(EARLIER / "checksum", tmp_path / "run")
    run_experiment(experiment_of(folder), folder, resume=True)
    (place,) = (path for path in checkpoints(folder / "checkpoints") if "64" in path.name)
    place.unlink()
    shutil.copyfile(checkpoints(EARLIER / "given" / "checkpoints")[0], checkpoints(folder / "checkpoints")[0])
    with pytest.raises(UserError, match=r"is of another run than the folder's experiment\.json"):
        run_experiment(experiment_of(folder), folder, resume=True)


def test_the_newest_of_them_is_in_todays_formats() -> None:
    """Where a format changes, a run of the last one is kept here."""
    newest = EARLIER / RUNS[-1]
    (state,) = checkpoints(newest / "checkpoints")
    head = checkpoint._read_head(state)
    assert head["format"] == checkpoint.FORMAT
    assert read_record(newest)["format"] == record.FORMAT
    assert read_model_record(newest)["format"] == files.FORMAT


def test_a_field_that_a_class_has_got_since_changes_the_identity_alone() -> None:
    """Else the kept name would be of no use, and `test_its_run_goes_on` would hold without it."""
    (state,) = checkpoints(EARLIER / "given" / "checkpoints")
    kept = read_record(EARLIER / "given")
    known = {name: dict(of) for name, of in kept.get("inputs", {}).items()}
    assert run_of(state) not in (None, identity(experiment_of(EARLIER / "given"), known))
