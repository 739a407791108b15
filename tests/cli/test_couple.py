"""`imagewright couple` end to end: killed, shared between processes, broken, and learnt from."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imagewright.cli.main import main
from imagewright.data import from_uint8, open_images
from imagewright.data.couplings import Couplings, write_shard
from imagewright.data.shards import lock_path
from imagewright.models.files import ModelFile, save_model
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import ImageNoise
from imagewright.pretrained import find_model, load
from imagewright.samplers import Heun, Straight
from imagewright.training import couple
from imagewright.training.chain import Chain, Stage
from imagewright.types import Condition, DataSpec, UserError

DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10, class_names=tuple("0123456789"))
WAY = "--steps 3 --n 26 --shard 4 --batch-size 3 --dtype float32 --seed 2"
SLOW = """
import sys, time
from imagewright.cli import couple
make = couple.Drawing.__call__
couple.Drawing.__call__ = lambda *args: (time.sleep(0.15), make(*args))[1]
couple.main(sys.argv[1:])
"""
DYING = """
import os, signal, sys
from pathlib import Path
from imagewright.cli import couple
make, out = couple.Drawing.__call__, Path(sys.argv[1])


def dying(*args):
    if len([*out.glob("shard-*")]) >= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(*args)


couple.Drawing.__call__ = dying
couple.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("couple") / "teacher"
    torch.manual_seed(0)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=8,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=())  # fmt: skip
    save_model(folder, ModelFile(model=EDMPrecond(SongUNet(config)), spec=DIGITS))
    return folder


@pytest.fixture(scope="module")
def whole(teacher: Path) -> Path:
    folder = teacher.parent / "whole"
    main(["couple", str(teacher), "--out", str(folder), *WAY.split()])
    return folder


def started(program: str, *words: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", program, *map(str, words), *WAY.split()]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_pairs_are_what_the_sampler_draws(teacher: Path, whole: Path) -> None:
    pairs = Couplings(whole)
    assert len(pairs) == 26 and len(list(whole.glob("shard-*.safetensors"))) == 7
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["origin"]["sampler"]["class"] == "heun" and manifest["origin"]["nfe"] == 5
    generator = load(teacher)
    labels = generator.labels(26, 2)
    read = pairs.read(range(26))
    assert labels is not None and read.cond.label is not None and read.cond.label.tolist() == labels.tolist()
    drawn = load(teacher, Heun(num_steps=3)).drawn(list(range(26)), labels=labels, seed=2)
    torch.testing.assert_close(read.images, drawn.float(), rtol=0, atol=1e-5)


def test_a_killed_writer_loses_and_doubles_nothing(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    assert started(DYING, out, teacher, "--out", out).wait() == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert 2 <= len(before) < 7
    (out / ".shard-000006.safetensors.abcdefgh.partial").write_bytes(b"half")
    main(["couple", str(teacher), "--out", str(out), *WAY.split()])
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    assert contents(out) == contents(whole)


def test_two_processes_share_the_work(
    teacher: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shared"
    other = started(SLOW, teacher, "--out", out)
    main(["couple", str(teacher), "--out", str(out), *WAY.split()])
    assert other.wait(timeout=600) == 0
    assert contents(out) == contents(whole)


def test_broken_shards_are_named_and_made_anew(
    teacher: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "broken"
    out.mkdir()
    for name, data in contents(whole).items():
        (out / name).write_bytes(data)
    (out / "shard-000001.safetensors").unlink()
    short = out / "shard-000003.safetensors"
    short.write_bytes(short.read_bytes()[:-5])
    data = bytearray((out / "shard-000005.safetensors").read_bytes())
    data[-3] ^= 4
    (out / "shard-000005.safetensors").write_bytes(data)
    main(["couple", str(teacher), "--out", str(out), *WAY.split()])
    said = " ".join("".join(capsys.readouterr()).split())
    assert re.search(r"shard-000003\.safetensors is not whole", said) and "of which 2 made now" in said
    main(["couple", str(teacher), "--out", str(out), *WAY.split(), "--verify"])
    said = " ".join("".join(capsys.readouterr()).split())
    assert re.search(r"shard-000005\.safetensors does not have the checksum", said) and "of which 1 made now" in said
    assert contents(out) == contents(whole)


def test_more_pairs_are_added(teacher: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    main(["couple", str(teacher), "--out", str(out), *WAY.replace("--n 26", "--n 5").split()])
    main(["couple", str(teacher), "--out", str(out), *WAY.split()])
    assert contents(out) == contents(whole)


def test_a_writer_of_fewer_pairs_leaves_a_finished_store_whole(
    teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fill, overtaken = tmp_path / "overtaken", couple._fill, []

    def overtaking(*args: Any) -> int:
        if args[1].n == 5:  # it has written its manifest; before its first shard another makes all 26 pairs
            main(["couple", str(teacher), "--out", str(out), *WAY.split()])
            overtaken.append(contents(out) == contents(whole))
        return fill(*args)

    monkeypatch.setattr(couple, "_fill", overtaking)
    main(["couple", str(teacher), "--out", str(out), *WAY.replace("--n 26", "--n 5").split()])
    assert overtaken == [True] and contents(out) == contents(whole)


@pytest.mark.parametrize("spelling", ["{0}/", "{0}/../{0.name}", "{1}"])
def test_the_same_weights_may_be_named_by_another_path(
    spelling: str, teacher: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher, tmp_path / "copy")
    before = contents(whole)
    main(["couple", spelling.format(teacher, tmp_path / "copy"), "--out", str(whole), *WAY.split()])
    assert "of which 0 made now" in " ".join("".join(capsys.readouterr()).split()) and contents(whole) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [("--steps 4", "couplings with another origin"), ("--n 3", "must be no less"), ("--dtype int8", "allowed")],
)
def test_mistakes_take_one_sentence(
    teacher: Path, whole: Path, options: str, words: str, refused: Callable[..., str]
) -> None:
    assert words in refused("couple", teacher, "--out", whole, *WAY.split(), *options.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--sampler heun --set S_churn=10", "sampler Heun draws at random on its way"),
        ("--sampler restart", "sampler Restart draws at random on its way"),
    ],
)
def test_images_that_are_no_function_of_their_noise_are_refused(
    teacher: Path, tmp_path: Path, options: str, words: str, refused: Callable[..., str]
) -> None:
    assert words in refused("couple", teacher, "--out", tmp_path / "new", "--n", 2, *options.split())
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(teacher: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    assert "is a file; couplings need a folder" in refused("couple", teacher, "--out", tmp_path / "file", *WAY.split())


def test_a_file_system_without_locks_will_do(
    teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    main(["couple", str(teacher), "--out", str(tmp_path / "new"), *WAY.split()])
    pairs = {name: data for name, data in contents(tmp_path / "new").items() if not name.endswith(".lock")}
    assert pairs == contents(whole)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("dmd-emoji64-32", "are of resolution, channels and classes (8, 1, 10); the data have (32, 3, 9)"),
        ("edm-digits", "method EDM learns from no pairs; data.couplings has no effect"),
    ],
)
def test_training_refuses_pairs_of_other_images_or_for_other_methods(
    recipe: str, says: str, whole: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert says in refused("train", recipe, "--data.couplings", whole, "--out", tmp_path / "run")


def test_training_takes_the_teacher_s_own_pairs_alone(
    teacher: Path, whole: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = find_model(teacher)
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    save_model(tmp_path / "other", other)
    shutil.copytree(teacher, tmp_path / "copy")
    sizes = ["--training.total-images", "2", "--training.batch", "2", "--training.snapshot-images", "2"]
    train = ["train", "dmd-digits", "--data.couplings", str(whole), *sizes]
    told = refused(*train, "--teacher", tmp_path / "other", "--out", tmp_path / "refused")
    assert f"couplings {whole} were drawn from {teacher}, whose weights are not those of the teacher" in told
    main([*train, "--teacher", str(tmp_path / "copy"), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "model.json").exists()


# --- inverted images, points of trajectories, mixed stores, a stage of a chain --------------------------------------


def test_real_images_are_inverted_by_the_backward_flow(teacher: Path, tmp_path: Path) -> None:
    way = "--invert digits --sampler heun --steps 30 --n 10 --shard 4 --batch-size 3 --dtype float32"
    main(["couple", str(teacher), "--out", str(tmp_path / "a"), *way.split()])
    pairs, digits = Couplings(tmp_path / "a"), open_images("digits")
    assert pairs.manifest.inverted and pairs.manifest.origin["nfe"] == 58
    assert pairs.identity["inverted"]["fingerprint"] == digits.fingerprint
    read = pairs.read([7, 2])
    assert torch.equal(read.images, from_uint8(torch.from_numpy(digits.images([7, 2]))))
    assert read.cond.label is not None and read.cond.label.tolist() == digits.labels[[7, 2]].tolist()
    back = Heun(num_steps=60)(find_model(teacher).model.eval(), read.latents, Condition(label=read.cond.label))
    torch.testing.assert_close(back.float(), read.images, rtol=0, atol=0.05)
    # Shards are made one by one, and anew with the same bytes.
    before = contents(tmp_path / "a")
    (tmp_path / "a" / "shard-000001.safetensors").unlink()
    main(["couple", str(teacher), "--out", str(tmp_path / "a"), *way.split()])
    assert contents(tmp_path / "a") == before


def test_latents_of_another_noise_convention_are_refused(teacher: Path, tmp_path: Path) -> None:
    """EDM's, which has the largest level in them."""
    way = "--invert digits --n 2 --steps 2 --batch-size 2"
    main(["couple", str(teacher), "--out", str(tmp_path), *way.split()])
    pairs = Couplings(tmp_path)
    read = pairs.read([0, 1])
    assert read.cond.label is not None
    latents = 80 * torch.randn(read.latents.shape)
    write_shard(tmp_path, pairs.manifest, 0, read.images, read.cond.label, latents=latents)
    with pytest.raises(UserError, match=r"holds latents of deviation .*; noise here has 1"):
        Couplings(tmp_path).read([0])


@pytest.mark.parametrize("way", ["--times 0.5", "--invert digits", "--invert digits --times 0.5"])
def test_the_precision_is_that_of_every_call(
    way: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    own = SongUNet.forward

    def forward(self: SongUNet, *given: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return own(self, *given)

    monkeypatch.setattr(SongUNet, "forward", forward)
    way = f"{way} --precision bf16 --n 2 --steps 3"
    main(["couple", str(teacher), *way.split(), "--out", str(tmp_path / "pairs")])
    assert seen and all(seen)


@pytest.mark.parametrize("sampler", ["heun", "straight"])
@pytest.mark.parametrize("inverted", [False, True])
def test_points_are_those_of_the_trajectories(teacher: Path, tmp_path: Path, sampler: str, inverted: bool) -> None:
    way = f"--sampler {sampler} --steps 4 --n 3 --batch-size 3 --dtype float32 --times 0.7 0.25".split()
    way += ["--invert", "digits"] if inverted else []
    main(["couple", str(teacher), "--out", str(tmp_path / "p"), *way])
    pairs = Couplings(tmp_path / "p")
    read, used = pairs.read(range(3)), pairs.manifest.origin["sampler"]
    assert read.points is not None and read.points.shape == (3, 2, 1, 8, 8) and read.times is not None
    assert read.times.tolist() == [[pytest.approx(0.7), 0.25]] * 3
    at = {"levels": tuple(used["levels"])} if sampler == "heun" else {"times": tuple(used["times"])}
    same = Heun(**at) if sampler == "heun" else Straight(**at)  # type: ignore[arg-type]
    seen: dict[float, torch.Tensor] = {}
    model, cond = find_model(teacher).model.eval(), Condition(label=read.cond.label)

    def keep(x: torch.Tensor, _: torch.Tensor, sigma: float) -> None:
        seen[round(sigma / (1 + sigma), 6)] = x / (1 + sigma)

    if inverted:
        same.invert(model, read.images, cond, noise=ImageNoise(0, range(3)), on_step=keep)
    else:
        same(model, read.latents, cond, on_step=keep)
    torch.testing.assert_close(read.points, torch.stack([seen[0.7], seen[0.25]], 1).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--invert digits --split test", "images that are held out for measuring are not to be learnt from"),
        ("--invert digits --sampler ddim", "sampler DDIM cannot be run backwards; --sampler heun, euler and straight"),
        ("--invert emoji64", "has images of resolution, channels and classes (8, 3, 9); the model makes (8, 1, 10)"),
        ("--invert digits --n 99999", "n is 99999; "),
        ("--times 1.5", "times is 1.5; it must be a finite number from"),
        ("--times 0.2 0.5", "times is (0.2, 0.5); they must lie between 0 and 1, and decrease"),
        ("--times 0.999", "times is (0.999,); the sampler goes through times between 0.002, 0.988"),
        ("--times 0.5 --sampler bespoke", "sampler Bespoke has no levels to stop at"),
    ],
)
def test_what_cannot_be_coupled_is_told(
    teacher: Path, tmp_path: Path, options: str, words: str, refused: Callable[..., str]
) -> None:
    assert words in refused("couple", teacher, "--out", tmp_path / "new", *options.split())


def test_pairs_are_a_stage_of_a_chain(teacher: Path, tmp_path: Path) -> None:
    chain = Chain(Stage("pairs", couple.Couple(model=str(teacher), n=5, shard=4, sampler=Heun(num_steps=2))))
    chain.run(tmp_path, lambda *_: None, "cpu")
    assert len(Couplings(tmp_path / "1-pairs")) == 5
    with pytest.raises(UserError, match="stage pairs names stage:teacher, which is no stage before it"):
        Chain(Stage("pairs", couple.Couple(model="stage:teacher")))


FILE = """
from dataclasses import replace
from imagewright.methods.flow_matching import FlowMatching
from imagewright.methods.noise_couplings import Stored
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.training.chain import Chain, Stage
from imagewright.training.couple import Couple

network = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=())
edm, flow = RECIPES["edm-digits"](), RECIPES["flow-digits-from-edm"]()
short = dict(total_images=32, batch=16, log_images=16, snapshot_images=32, checkpoint_images=16)
heun = Heun(num_steps=2)
experiment = Chain(
    Stage("teacher", replace(edm, network=network, training=replace(edm.training, **short))),
    Stage("pairs", Couple(model="stage:teacher", n=24, sampler=heun)),
    Stage("real", Couple(model="stage:teacher", n=12, sampler=heun, invert="digits")),
    Stage("flow", replace(
        flow.giving(teacher="stage:teacher"), method=FlowMatching(coupling=Stored()),
        data=replace(flow.data, couplings=("stage:pairs", "stage:real"), coupling_weights=(0.75, 0.25), xflip=True),
        training=replace(flow.training, **short),
    )),
)
"""


def test_teacher_pairs_and_reflow_are_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reflow.py").write_text(FILE)
    main(["train", "reflow.py", "--dry-run"])
    main(["train", "reflow.py", "--device", "cpu"])
    assert (len(Couplings("runs/reflow/2-pairs")), len(Couplings("runs/reflow/3-real"))) == (24, 12)
    inputs = json.loads(Path("runs/reflow/4-flow/experiment.json").read_text())["inputs"]
    assert inputs["couplings.0"]["pairs"] == 24 and inputs["couplings.1"]["inverted"]["source"].startswith("digits")
    made = Path("runs/reflow/4-flow/model.safetensors").read_bytes()
    main(["train", "--resume", "runs/reflow", "--device", "cpu"])
    assert Path("runs/reflow/4-flow/model.safetensors").read_bytes() == made


def test_a_shard_is_written_while_the_next_is_drawn(
    teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, drawing, write = [threading.Event() for _ in range(8)], itertools.count(), couple.write_shard
    held: list[bool] = []

    def draw(self: Any, *args: Any) -> Any:
        drawn[next(drawing)].set()
        return make(self, *args)

    def waits(folder: Path, manifest: Any, index: int, **pairs: Any) -> None:
        if index < 6:  # the last has no next
            assert drawn[index + 1].wait(600), "the next shard is not drawn before this one is written"
        held.append(lock_path(folder, index).exists())
        write(folder, manifest, index, **pairs)

    make = couple.Drawing.__call__
    monkeypatch.setattr(couple.Drawing, "__call__", draw)
    monkeypatch.setattr(couple, "write_shard", waits)
    main(["couple", str(teacher), "--out", str(tmp_path / "pairs"), *WAY.split()])
    assert held == [True] * 7 and not list((tmp_path / "pairs").glob(".shard*"))
    assert contents(tmp_path / "pairs") == contents(whole)


def test_what_stops_the_writing_stops_the_drawing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(couple, "write_shard", full)
    with pytest.raises(UserError, match="the disk is full"):
        couple.Couple(model=str(teacher), n=26, shard=4, sampler=Heun(num_steps=2))(tmp_path / "pairs", {}, "cpu")
    assert not list((tmp_path / "pairs").glob(".shard*"))
