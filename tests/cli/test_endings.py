"""How commands end where something from outside ends them: signals, disks that take nothing, schedulers' variables."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

import imagewright
from imagewright.__main__ import main as start
from imagewright.cli import console
from imagewright.cli.main import main
from imagewright.files import _left_in, replacing, try_output, write_json
from imagewright.samplers import Heun
from imagewright.training.trainer import Trainer
from imagewright.types import UserError

OWN = """
from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

from beside import LIMIT  # a file of the same folder
from imagewright.methods.edm import EDM
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Signalled(EDM):
    number: int = 0
    strength: float = 1.0

    def step(self, parts, batch, noise, clock):
        if clock.step == LIMIT and self.number:
            os.kill(os.getpid(), self.number)
        yield from super().step(parts, batch, noise, clock)


run = RECIPES["edm-digits"]()
experiment = replace(
    run,
    method=Signalled(),
    network=replace(run.network, model_channels=8, channel_mult=(1,), attn_resolutions=()),
    training=replace(run.training, total_images=32, batch=4),
)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("LIMIT = 2\n")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("number", ENDINGS, ids=lambda s: s.name)
def test_a_signal_ends_a_run_after_a_whole_step(
    own: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    before = signal.getsignal(number)
    folder = own.parent / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(own), "--method.number", str(int(number)), "--out", str(folder), "--device", "cpu"])
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"go on with: imagewright train --resume {folder}" in capsys.readouterr().out
    # Before the first snapshot: what there is can be used.
    assert json.loads((folder / "model.json").read_text())["origin"]["images_seen"] == 12
    assert imagewright.load(folder, Heun(num_steps=2)).generate(1).shape == (1, 8, 8, 1)
    # The folder alone runs no file; the user does.
    said = refused("train", "--resume", str(folder))
    assert f"names the class 'Signalled', which this version does not have; it was started by {own}" in said
    main(["train", str(own), "--method.number", str(int(number)), "--out", str(folder), "--resume"])
    assert json.loads((folder / "model.json").read_text())["origin"]["images_seen"] == 32


def test_an_ignored_signal_stays_ignored(own: Path) -> None:
    """As `nohup` asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        main(["train", str(own), "--method.number", str(int(signal.SIGHUP)), "--out", str(own.parent / "run")])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_leaves_no_half_file(tmp_path: Path) -> None:
    def write() -> None:
        with console.told_errors(), replacing(tmp_path / "whole.txt") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        write()
    assert stopped.value.code == 143 and not list(tmp_path.iterdir())


def test_a_product_that_has_not_learnt_has_no_loss_to_show() -> None:
    """While a fake network learns alone, say."""
    assert console.pace(math.nan, 6.2) == "no loss known yet  6 images/s"
    assert console.pace(0.98602, 3.0) == "loss 0.9860  3 images/s"


def test_a_lost_terminal_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    with console.bar("working", 10) as advance_to:
        for done in range(10):
            advance_to(done)


def test_a_mistyped_option_of_ones_own_file(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(own), "--method.stregnth", "2", "--out", str(own.parent / "run")])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "--method.stregnth" in told and "--method.strength" in told
    assert "Traceback" not in told


def test_ctrl_c_before_the_program_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "imagewright.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "imagewright.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        start()
    assert stopped.value.code == 130 and capsys.readouterr().err == "imagewright: interrupted\n"


def test_what_begins_a_command_is_read_at_once() -> None:
    """Before torch, whose import takes seconds, Ctrl-C is already answered."""
    look = "import sys, imagewright.__main__; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'rich')))"
    subprocess.run([sys.executable, "-c", look], check=True)


def test_a_folder_that_is_removed_under_a_run(
    own: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    run, step = own.parent / "run", Trainer.train_step

    def removing(self: Trainer) -> float:
        loss = step(self)
        if self.step_index == 2:
            shutil.rmtree(run)
        return loss

    monkeypatch.setattr(Trainer, "train_step", removing)
    assert f"{run} is gone, or its experiment.json is" in refused("train", own, "--out", run, "--device", "cpu")
    assert not run.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="it has no fork")
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Not what another still writes, nor what is of another file."""
    for name in ("it.json", "other.json"):
        child = os.fork()
        if child == 0:
            with replacing(tmp_path / name):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    left = {path.name.split(".")[1] for path in tmp_path.iterdir()}
    assert left == {"it", "other"}
    with replacing(tmp_path / "it.json") as mine:
        mine.write_text("{}")
        _left_in.cache_clear()
        write_json(tmp_path / "it.json", [])
        assert mine.exists()
    assert (tmp_path / "it.json").read_text() == "{}"
    assert {path.name.split(".")[1] for path in tmp_path.glob(".*")} == {"other"}


# --- where nothing can be written


def test_a_file_in_the_way(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    inside = tmp_path / "file" / "out"
    for words in (
        ("sample", "emoji64-32", "--n", "1", "--steps", "1", "--out", inside),
        ("train", "edm-digits", "--training.total-images", "64", "--out", inside),
        ("export", "emoji64-32", "--out", inside),
        ("evaluate", "emoji64-32", "--n", "4", "--out", inside),
        ("couple", "emoji64-32", "--n", "1", "--out", inside),
        ("data", "convert", "digits", tmp_path / "file" / "out.zip"),
        ("bench", "speed", "--out", inside),
        ("bench", "orders", "--out", inside),
        ("report", tmp_path, "--out", inside),
    ):
        said = refused(*words)
        assert f"{tmp_path / 'file'}" in said and "cannot be written: a file is in the way" in said, said
    try_output(tmp_path / "new" / "folder" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_folder_is_followed_and_one_to_a_file_is_not(tmp_path: Path, refused: Callable[..., str]) -> None:
    """So that runs may lie on another disk; what a link to a file leads to is never replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    main(["export", "emoji64-32", "--out", str(tmp_path / "out" / "model")])
    assert imagewright.load(tmp_path / "disk" / "model").spec.resolution == 32
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.zip").symlink_to(tmp_path / "mine")
    (tmp_path / "nowhere.zip").symlink_to(tmp_path / "gone")
    for name in ("out.zip", "nowhere.zip"):
        assert "is a link, which is never replaced" in refused("data", "convert", "digits", tmp_path / name)
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "gone").exists()


def test_what_the_parser_says_of_an_argument_is_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["sample", "emoji64-32", "--n", "\x1b[31mred"],
        ["train", "edm-digits", "--training.batch", "\r\ufeff"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        said = capsys.readouterr()
        assert not {c for c in said.out + said.err if not c.isprintable()} - {"\n"}
        assert "\\x1b[31mred" in said.err or "\\r\\ufeff" in said.err


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"x cannot be written: Is a directory"):
        write_json(tmp_path / "x", {})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"whole.txt cannot be written: No space left on device"),
        replacing(tmp_path / "whole.txt"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x" * 100_000)
    assert not list(tmp_path.iterdir())


def test_other_files_errors_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out"):
        (tmp_path / "in").read_text()


def test_any_other_word_of_the_system_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, console.told_errors():
        Path("/no/such/file").read_text()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == "imagewright: /no/such/file: No such file or directory"


def test_names_that_no_terminal_can_show(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(os.fsdecode(b"caf\xe9"))
    assert capsys.readouterr().out == "caf\\xe9\n"


def test_an_output_that_takes_ascii_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from imagewright.cli.console import say; say('\u00e9 \u2264 ' + chr(0xDCFF))"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "\\xe9 \\u2264 \\xff\n"


# --- what a scheduler says


@pytest.mark.parametrize("value", ["", " ", "1"])
def test_one_process_by_any_word(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    main(["train", "edm-digits", "--dry-run"])


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("two", "WORLD_SIZE is 'two' in the environment; it must be a whole number >= 1"),
        ("0", "WORLD_SIZE is '0'"),
        ("-2", "WORLD_SIZE is '-2'"),
        ("1.5", "WORLD_SIZE is '1.5'"),
        ("2", "WORLD_SIZE is 2 in the environment without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_world_without_places(
    value: str, complaint: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert complaint in refused("train", "edm-digits", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("RANK", "2", "RANK is '2' in the environment; it must be a whole number from 0 to 1"),
        ("RANK", "first", "RANK is 'first'"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK is '-1' in the environment; it must be a whole number >= 0"),
        (
            "MASTER_PORT",
            "70000",
            "MASTER_PORT is '70000' in the environment; it must be a whole number from 0 to 6",
        ),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE is '999"),
        ("MASTER_ADDR", "no such place", "the processes that train together have lost each other"),
    ],
)
def test_places_that_are_none(
    name: str, value: str, complaint: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], tmp_path: Path
) -> None:
    places = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, usual in (places | {name: value}).items():
        monkeypatch.setenv(key, usual)
    if name == "MASTER_ADDR":
        monkeypatch.setattr("torch.distributed.init_process_group", unreachable)
    assert complaint in refused("train", "edm-digits", "--out", tmp_path / "run")


def unreachable(*_: object) -> None:
    raise DistNetworkError("the address cannot be resolved\nsecond line")
