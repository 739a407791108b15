"""Chains against the unlucky and the hostile: other options, several processes, folders and records of other things."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from imagewright.cli.main import main
from imagewright.cli.scoring import training_data
from imagewright.cli.train import _as_the_teachers
from imagewright.cli.tune_common import tuned_path
from imagewright.files import read_json
from imagewright.networks import SongUNetConfig
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.training.chain import Chain, Stage, read_chain
from imagewright.training.config import TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.record import to_json
from imagewright.types import UserError

NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=())  # fmt: skip
BASE = replace(RECIPES["edm-digits"](), sampler=Heun(num_steps=2))  # of a run's grids, which cost more than its steps
RUN = replace(BASE, network=NETWORK, training=TrainingConfig(total_images=16, batch=16, log_images=16))
FILE = """
from dataclasses import replace
from imagewright.recipes import RECIPES
from imagewright.training.chain import Chain, Stage

experiment = Chain(Stage("first", RECIPES["edm-digits"]()), Stage("second", RECIPES["edm-digits"]()))
"""


@dataclass(frozen=True)
class Note:
    """Writes a line."""

    text: str = "a"

    def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
        folder.mkdir(exist_ok=True)
        with (folder / "notes").open("a") as file:
            file.write(f"{self.text} {sorted(stages)}\n")


def train(name: str, experiment: Experiment, folder: Path) -> None:
    run_experiment(experiment, folder, resume=True)


def never(name: str, experiment: Experiment, folder: Path) -> None:
    raise AssertionError("a stage was trained")


def test_a_stage_may_be_other_work_which_is_said_and_done_again(tmp_path: Path) -> None:
    said: list[tuple[int, str]] = []
    chain = Chain(Stage("run", RUN), Stage("note", Note()))
    for resume in (False, True):
        chain.run(tmp_path / "c", train, "cpu", resume=resume, on_stage=lambda *which: said.append(which))
    assert said == [(1, "run"), (2, "note")] * 2
    assert (tmp_path / "c" / "2-note" / "notes").read_text() == "a ['note', 'run']\n" * 2


def test_what_options_change_is_recorded_and_a_begun_stage_keeps_its_own(tmp_path: Path) -> None:
    longer = replace(RUN, training=replace(RUN.training, total_images=32))
    other = replace(RUN, training=replace(RUN.training, batch=8))
    Chain(Stage("run", RUN)).run(tmp_path, train, "cpu")
    Chain(Stage("run", longer)).run(tmp_path, train, "cpu", resume=True, command=["x.py"])
    record = read_chain(tmp_path)
    assert record["stages"][0]["work"] == json.loads(json.dumps(to_json(longer)))
    with pytest.raises(UserError, match=r"1-run holds a run with another training\.batch"):
        Chain(Stage("run", other)).run(tmp_path, never, "cpu", resume=True)
    assert read_chain(tmp_path) == record
    Chain(Stage("run", longer)).run(tmp_path, train, "cpu", resume=True)


def test_other_work_keeps_its_settings(tmp_path: Path) -> None:
    Chain(Stage("note", Note())).run(tmp_path, never, "cpu")
    with pytest.raises(UserError, match="1-note was made with other settings"):
        Chain(Stage("note", Note(text="b"))).run(tmp_path, never, "cpu", resume=True)


def test_a_chain_and_a_run_do_not_share_a_folder(tmp_path: Path) -> None:
    chain = Chain(Stage("run", RUN))
    run_experiment(RUN, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run, which is no chain"):
        chain.run(tmp_path / "run", never, "cpu")
    chain.run(tmp_path / "chain", train, "cpu")
    with pytest.raises(UserError, match="holds a chain of runs; choose another --out"):
        run_experiment(RUN, tmp_path / "chain")
    (tmp_path / "chain" / "chain.json").unlink()
    with pytest.raises(UserError, match="1-run already holds a run; add --resume"):
        chain.run(tmp_path / "chain", never, "cpu")
    assert not (tmp_path / "chain" / "chain.json").exists()


@dataclass(frozen=True)
class Second(Processes):
    """The second of two processes; what it does while it waits for the first."""

    rank: int = 1
    world: int = 2
    meanwhile: list[Callable[[], None]] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        return flag

    def wait(self) -> None:
        if self.meanwhile:
            self.meanwhile.pop(0)()


def test_of_several_processes_the_first_writes_and_works(tmp_path: Path) -> None:
    chain = Chain(Stage("note", Note()))

    def first() -> None:  # is ahead
        (tmp_path / "chain.json").write_text(json.dumps(chain.record(None)))

    chain.run(tmp_path, never, "cpu", processes=Second(meanwhile=[first]))
    assert [path.name for path in tmp_path.iterdir()] == ["chain.json"]


def test_two_commands_do_not_train_one_chain(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Meddler:
        def __call__(self, folder: Path, stages: Mapping[str, Path], device: Any) -> None:
            Chain(Stage("meddler", Note())).run(tmp_path, never, "cpu", resume=True)

    with pytest.raises(UserError, match="is being trained by another command"):
        Chain(Stage("meddler", Meddler())).run(tmp_path, never, "cpu")


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ([("a", to_json(BASE.method))], "stage a is EDM; it must be an Experiment, or a dataclass with __call__"),
        ([("a", to_json(RECIPES["cd-digits"]().sampler))], "stage a is MultistepConsistency; it must be"),
        ([("../x", to_json(RUN))], "no stage can be called '../x'"),
        ([("class", to_json(RUN))], "no stage can be called 'class'"),
        ([("out", to_json(RUN))], "stage out: the chain itself has an option of that name"),
        ([("a", {"class": "Mine"})], "x.py, go on with: imagewright train x.py --out c --resume"),
    ],
)
def test_records_of_strangers_are_told(
    stages: list[tuple[str, Any]],
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c").mkdir()
    record = [{"name": name, "work": work} for name, work in stages]
    Path("c/chain.json").write_text(
        json.dumps({"format": "imagewright-chain/1", "command": ["x.py"], "stages": record})
    )
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", "c", "--device", "cpu"])
    assert ended.value.code == 2
    assert fault in capsys.readouterr().err


def test_a_stage_is_put_in_proportion_to_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(FILE)
    half = str(BASE.training.total_images // 2)
    main(["train", "two.py", "--second.training.total-images", half, "--dry-run"])
    said = capsys.readouterr().out
    assert f"stage second: in proportion to {int(half):,} of the recipe's" in said
    assert "stage first: in proportion" not in said


def test_the_tenth_stage_comes_after_the_second(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text("{}")
    for number, seed in ((2, 0), (10, 1)):
        run_experiment(replace(RUN, training=replace(RUN.training, seed=seed)), tmp_path / f"{number}-x")
    assert find_model(tmp_path).origin["seed"] == 1


def test_a_chains_folder_means_its_last_run_to_every_command(tmp_path: Path, refused: Callable[..., str]) -> None:
    """It is no set of images, though there are pictures in it; scores go where the model is."""
    (tmp_path / "chain.json").write_text("{}")
    told = refused("evaluate", tmp_path, "--data", "digits")
    assert "is neither a folder with a model.safetensors nor a shipped model" in told
    run_experiment(RUN, tmp_path / "1-x")
    (tmp_path / "1-x/samples").mkdir(exist_ok=True)
    few = ["--n", "16", "--steps", "1", "--metrics", "fd", "--no-yardsticks", "--device", "cpu"]
    main(["evaluate", str(tmp_path), *few])
    (entry,) = read_json(tmp_path / "1-x/metrics.json")["reports"]
    assert entry["target"] == str(tmp_path / "1-x") and not (tmp_path / "metrics.json").exists()
    main(["compare", str(tmp_path), str(tmp_path / "1-x")])
    main(["export", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "fd_digits" in (tmp_path / "out/README.md").read_text()
    spec = find_model(tmp_path).spec
    assert training_data(str(tmp_path), replace(spec, name="another")) == "digits"
    assert tuned_path(str(tmp_path), "bespoke") == tmp_path / "1-x/tuned/bespoke.json"
    run = RECIPES["cd-digits"]().giving(teacher=str(tmp_path))
    assert _as_the_teachers(run, ["teacher"]).data == replace(run.data, xflip=RUN.data.xflip)
