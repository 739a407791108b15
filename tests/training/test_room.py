"""Room for what is to come: methods with several teachers, other kinds of example, things of their own; stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.data.config import DataConfig
from imagewright.data.source import DataSource
from imagewright.methods.edm import EDM, denoising_loss
from imagewright.models.files import ModelFile
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.training.chain import Chain, Stage
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.given import Sources
from imagewright.training.record import experiment_from_json, read_record, to_json
from imagewright.types import (
    Batch,
    Chance,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Encoder,
    Event,
    Example,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
    View,
    kind_of,
)

NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=())  # fmt: skip
BASE = replace(RECIPES["edm-digits"](), sampler=Heun(num_steps=2))  # of a run's grids, which cost more than its steps
TRAINING = replace(BASE.training, total_images=32, batch=16, log_images=16, snapshot_images=32, checkpoint_images=16)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("a", "b"):
        run_experiment(replace(BASE, network=NETWORK, training=replace(TRAINING, total_images=16)), folder / name)
    return [str(folder / name) for name in ("a", "b")]


# --- a method with two teachers, and a thing of its own -------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """A list of words in a file: an input of the method's own."""

    words: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        return {"words": len(self.words), "first": self.words[0]}

    @classmethod
    def open(cls, name: str) -> Words:
        return cls(tuple(Path(name).read_text().split()))


@dataclass(frozen=True, kw_only=True)
class TwoTeachers:
    """Learns the mean of what its teachers say."""

    product: ClassVar[str] = "student"

    def parts(self, *, network: nn.Module, teachers: Sequence[Denoiser], words: Words | None = None) -> Parts:
        roles: dict[str, Any] = {f"teacher{i}": Frozen(module=t) for i, t in enumerate(teachers)}
        return Parts(student=Trained(module=EDMPrecond(network)), **roles)

    def step(self, parts: Any, batch: Any, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        sigma = LogNormal(mean=-1.2, std=1.2).sample(noise, batch.images[:, 0, 0, 0])
        noisy = batch.images + sigma[:, None, None, None] * noise.normal(batch.images)
        with torch.no_grad():
            aim = (parts.teacher0(noisy, sigma, batch.cond) + parts.teacher1(noisy, sigma, batch.cond)) / 2
        yield Update("student", (parts.student(noisy, sigma, batch.cond) - aim).square().flatten(1).mean(1))


def two_teachers(*teachers: str, **given: str) -> Experiment:
    return Experiment(
        data=BASE.data, method=TwoTeachers(), network=NETWORK, training=TRAINING,
        given={"teachers": teachers, **given},
    )  # fmt: skip


def test_a_method_asks_for_several_teachers_and_a_thing_of_its_own(teachers: list[str], tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("a cat")
    folder = run_experiment(two_teachers(*teachers, words=str(words)), tmp_path / "run")
    inputs = json.loads((folder / "experiment.json").read_text())["inputs"]
    assert inputs["words"] == inputs["words"] | {"words": 2, "first": "a"}
    assert {len(inputs[f"teachers.{i}"]["weights_sha256"]) for i in (0, 1)} == {64}
    words.write_text("a cat sat")
    with pytest.raises(UserError, match=r"trained with other words than .*: words was 2 and is 3"):
        run_experiment(two_teachers(*teachers, words=str(words)), folder, resume=True)


def test_what_is_missing_unfit_or_unasked_is_told(teachers: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method EDM learns from no teacher; teacher has no effect"):
        assemble(replace(BASE, network=NETWORK).giving(teacher=teachers[0]))
    with pytest.raises(UserError, match="method EDM asks for no prior; prior has no effect"):
        assemble(replace(BASE, network=NETWORK).giving(prior=teachers[0]))
    with pytest.raises(UserError, match="this method learns from teachers; give them with --teachers RUN RUN"):
        assemble(two_teachers())
    student = RECIPES["cd-digits"]()
    with pytest.raises(UserError, match=r"teacher is .*, .*; this method takes one"):
        assemble(replace(student, given={"teacher": (teachers[0], teachers[1])}))
    with pytest.raises(UserError, match=r"makes images of resolution, channels and classes \(8, 1, 10\); the data"):
        assemble(replace(student.giving(teacher=teachers[0]), data=DataConfig(source="emoji64", resolution=8)))


def test_a_moved_teacher_is_found_again(teachers: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        Path(tmp_path / name).symlink_to(teachers["ab".index(name)])
    run = two_teachers(str(tmp_path / "a"), str(tmp_path / "b"))
    folder = run_experiment(replace(run, training=replace(TRAINING, total_images=16)), tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "c")
    run_experiment(two_teachers(str(tmp_path / "c"), str(tmp_path / "b")), folder, resume=True)


@dataclass(frozen=True, kw_only=True)
class Judged(EDM):
    """Asks for an encoder by the name that stands for a perceptual distance elsewhere."""

    def parts(self, *, network: nn.Module, features: Encoder | None = None) -> Parts:
        return Parts(denoiser=Trained(module=EDMPrecond(network)))


def test_features_may_be_an_encoder_that_lies_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(nn.Module):
        kind, view = "encoder", View(side=8, channels=1)

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    def found(self: Sources, name: str) -> ModelFile:
        assert Path(name) == tmp_path / "encoder"
        return ModelFile(model=Mean(), spec=DataSpec(name="digits", resolution=8, channels=1))

    (tmp_path / "encoder").mkdir()
    monkeypatch.setattr(Sources, "model", found)
    monkeypatch.chdir(tmp_path)
    run = Experiment(data=BASE.data, method=Judged(), network=NETWORK, training=TRAINING, given={"features": "encoder"})
    folder = run_experiment(replace(run, training=replace(TRAINING, total_images=16)), tmp_path / "run")
    features = json.loads((folder / "experiment.json").read_text())["inputs"]["features"]
    assert features["where"] == "../encoder" and len(features["weights_sha256"]) == 64


def test_what_is_given_is_texts_in_the_end() -> None:
    run = replace(BASE, given={"teachers": [Path("a"), "b"], "teacher": Path("c"), "prior": None, "judges": ()})
    assert run.given == {"teachers": ("a", "b"), "teacher": "c"}


# --- other kinds of example -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captioned(Example):
    """Pictures with captions: images [N, C, H, W], tokens int64 [N, L]."""

    images: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Pictures:
    """Made-up pictures with made-up captions."""

    n: int = 40
    source: ClassVar[str] = "made-up captions"
    in_memory: ClassVar[bool] = True
    example: ClassVar[type[Example]] = Captioned
    fingerprint: ClassVar[str] = "0"
    empty_classes: ClassVar[tuple[int, ...]] = ()
    spec: ClassVar[DataSpec] = DataSpec(name="made-up", resolution=8, channels=1)

    def __len__(self) -> int:
        return self.n

    def read(self, rows: npt.NDArray[np.int64]) -> Any:
        return np.random.default_rng(0).random((self.n, 1, 8, 8), np.float32)[rows], rows[:, None] % 7

    def batch(self, read: Any, rows: npt.NDArray[np.int64], chance: Chance) -> Captioned:
        return Captioned(torch.from_numpy(read[0]), torch.from_numpy(read[1]))

    def prepared(self, batch: Captioned) -> Captioned:
        return batch


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(DataSource):
    """Where the captions come from."""

    source: str = "made-up"
    n: int = 40

    def open(self, on_progress: Any = None) -> Pictures:
        return Pictures(self.n)


@dataclass(frozen=True, kw_only=True)
class FromCaptions:
    """Denoises pictures, counting what it is shown of captions."""

    product: ClassVar[str] = "denoiser"

    def parts(self, *, network: nn.Module) -> Parts:
        return Parts(denoiser=Trained(module=EDMPrecond(network)))

    def step(self, parts: Any, batch: Captioned, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        sigma = LogNormal(mean=-1.2, std=1.2).sample(noise, batch.images[:, 0, 0, 0])
        loss = denoising_loss(parts.denoiser, batch.images, sigma, Condition(), noise, 0.5)
        yield Update("denoiser", loss, parts={"token": batch.tokens.float().mean(1)})


def test_a_method_learns_from_another_kind_of_example(tmp_path: Path) -> None:
    run = Experiment(data=PicturesConfig(), method=FromCaptions(), network=NETWORK, training=TRAINING)
    folder = run_experiment(run, tmp_path / "run")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert 1 < log[0]["denoiser/token"] < 5
    with pytest.raises(UserError, match=r"learns from pictures with captions; digits .* holds labelled"):
        assemble(replace(run, data=BASE.data))
    with pytest.raises(UserError, match="learns from labelled pictures; made-up captions holds pictures with"):
        assemble(replace(run, method=EDM()))


# --- other kinds of product -----------------------------------------------------------------------------------


class Doubler(nn.Module):
    """Latents that are the images, times a number that is learnt."""

    latent = (1, 8, 8)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.factor = kind, nn.Parameter(torch.tensor(2.0))

    def encode(self, images: Tensor, noise: object = None) -> Tensor:
        return self.factor * images

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 2


@dataclass(frozen=True, kw_only=True)
class Doubling:
    """Learns to give back what it is shown."""

    product: ClassVar[str] = "doubler"
    kind: str = "autoencoder"

    def parts(self) -> Parts:
        return Parts(doubler=Trained(module=Doubler(self.kind)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        back = parts.doubler.decode(parts.doubler.encode(batch.images))
        yield Update("doubler", (back - batch.images).square().flatten(1).mean(1))


@pytest.mark.parametrize(("kind", "pictures"), [("autoencoder", 1), ("encoder", 0)])
def test_what_only_answers_is_exported(
    kind: str, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[ModelFile] = []
    monkeypatch.setattr("imagewright.training.experiment.save_model", lambda folder, file: saved.append(file))
    run = Experiment(data=BASE.data, method=Doubling(kind=kind), training=replace(TRAINING, total_images=16))
    run_experiment(run, tmp_path)
    assert kind_of(saved[-1].model) == kind
    assert len(list((tmp_path / "samples").glob("*.png"))) == pictures


# --- stages ---------------------------------------------------------------------------------------------------

FILE = """
from dataclasses import replace
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.training.chain import Chain, Stage

network = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=())
teacher, student = RECIPES["edm-digits"](), RECIPES["cd-digits"]()
short = dict(total_images=32, batch=16, log_images=16, snapshot_images=32, checkpoint_images=16)
experiment = Chain(
    Stage("teacher", replace(teacher, network=network, training=replace(teacher.training, **short))),
    Stage("student", replace(student.giving(teacher="stage:teacher"), training=replace(student.training, **short))),
)
"""


def weights(run: Path) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in load_file(run / "model.safetensors").items()}


def test_stages_are_one_command_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(FILE)
    main(["train", "two.py", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "stage 1 of 2: teacher" in said and "stage 2 of 2: student" in said
    made = weights(Path("runs/two/2-student"))
    (newest,) = Path("runs/two/2-student/checkpoints").glob("*32.safetensors")  # as if it had died at 16 images
    newest.unlink()
    Path("runs/two/2-student/model.safetensors").unlink()
    main(["train", "--resume", "runs/two", "--device", "cpu"])
    assert weights(Path("runs/two/2-student")) == made
    main(["sample", "runs/two", "--out", "pictures", "--n", "2", "--device", "cpu"])
    assert len(list(Path("pictures").glob("0*.png"))) == 2
    with pytest.raises(SystemExit):
        main(["train", "two.py", "--device", "cpu"])
    assert "already holds a chain" in capsys.readouterr().err


def test_a_chain_is_shown_without_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(FILE)
    main(["train", "two.py", "--dry-run"])
    said = capsys.readouterr().out
    assert "stage student:" in said and "student: trained" in said
    assert not Path("runs").exists()


def test_stages_must_come_in_order() -> None:
    run = replace(RECIPES["cd-digits"](), given={"teacher": "stage:later"})
    with pytest.raises(UserError, match="stage first names stage:later, which is no stage before it"):
        Chain(Stage("first", run), Stage("later", BASE))
    with pytest.raises(UserError, match="Python identifiers, each once"):
        Chain(Stage("a b", BASE))


def test_the_data_are_the_teachers_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(source="emoji64", resolution=8, labels=False)
    run_experiment(replace(BASE, data=data, network=NETWORK, training=replace(TRAINING, total_images=16)), Path("odd"))
    main(["train", "cd-digits", "--teacher", "odd", "--dry-run"])
    said = capsys.readouterr().out
    assert "as the teacher's: data.source emoji64; data.resolution 8; data.labels False" in said
    with pytest.raises(SystemExit):
        main(["train", "cd-digits", "--teacher", "odd", "--data.source", "digits", "--data.labels", "--dry-run"])
    assert "teacher odd makes images of" in capsys.readouterr().err


def test_what_the_command_says_of_the_data_is_not_the_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(source="digits", xflip=True)
    run_experiment(replace(BASE, data=data, network=NETWORK, training=replace(TRAINING, total_images=16)), Path("odd"))
    command = ["train", "cd-digits", "--teacher", "odd", "--dry-run"]
    main(command)
    assert "as the teacher's: data.xflip True" in capsys.readouterr().out
    main([*command, "--data.no-xflip"])
    assert "as the teacher's" not in capsys.readouterr().out


def test_a_student_of_what_a_method_of_ones_own_made_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Own(EDM):
        pass

    data = DataConfig(source="emoji64", resolution=8, labels=False)
    teacher = replace(BASE, data=data, network=NETWORK, method=Own(), training=replace(TRAINING, total_images=16))
    run_experiment(teacher, Path("own"))
    sizes = ["--training.batch", "16", "--training.total-images", "16", "--device", "cpu"]
    for resume in ([], ["--resume"]):
        main(["train", "cd-digits", "--teacher", "own", "--out", "student", *sizes, *resume])
    assert experiment_from_json(read_record(Path("student"))["experiment"], tmp_path).data.resolution == 8


# --- records --------------------------------------------------------------------------------------------------


def test_records_of_before_are_read(teachers: list[str], tmp_path: Path) -> None:
    run = replace(RECIPES["cd-digits"](), training=TRAINING).giving(teacher=teachers[0], features="digits")
    written = to_json(run)
    earlier: Mapping[str, Any] = {k: v for k, v in written.items() if k != "given"}
    record = {"format": "imagewright-experiment/1", "experiment": {**earlier, **written["given"], "tokenizer": None}}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    assert experiment_from_json(read_record(tmp_path)["experiment"], tmp_path) == run
    several = two_teachers(*teachers)
    again = experiment_from_json(to_json(replace(several, method=EDM())), tmp_path)
    assert again == replace(several, method=EDM())


def test_shares_of_a_run_move_with_its_length(tmp_path: Path) -> None:
    optimizer = replace(TRAINING.optimizer, lr_ramp_images=0.25, lr_cooldown_images=0.5)
    shares = replace(
        TRAINING, optimizer=optimizer, checkpoint_images=0.5, ema=replace(TRAINING.ema, halflife_images=0.1)
    )
    images = shares.in_images()
    assert (images.optimizer.lr_ramp_images, images.optimizer.lr_cooldown_images) == (8, 16)
    assert (images.checkpoint_images, images.ema.halflife_images) == (16, 3)
    assert replace(shares, total_images=320).in_images().optimizer.lr_ramp_images == 80
    a, b = (
        run_experiment(replace(BASE, network=NETWORK, training=t), tmp_path / n)
        for n, t in (("s", shares), ("i", images))
    )
    assert weights(a) == weights(b)
    assert read_record(a)["experiment"] == read_record(b)["experiment"]


ODD: Mapping[str, Mapping[str, Any]] = {
    "asks for no a b": {"given": {"a b": "x"}},
    "asks for no out": {"given": {"out": "x"}},
    "asks for no lambda": {"given": {"lambda": "x"}},
    "given.teacher is 5": {"given": {"teacher": 5}},
    "given is a list": {"given": ["teacher"]},
    "method is DataConfig, which is no method": {"method": to_json(BASE.data)},
    "method is NoneType": {"method": None},
    "data is EDM, which is no data": {"data": to_json(EDM())},
    "sampler is DataConfig": {"sampler": to_json(BASE.data)},
    "network is EDM, which configures none": {"network": to_json(EDM())},
}


@pytest.mark.parametrize("fault", ODD)
def test_a_record_that_no_run_could_have_is_told(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"format": "imagewright-experiment/1", "experiment": {**to_json(BASE), **ODD[fault]}}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(tmp_path), "--dry-run"])
    assert ended.value.code == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize("known", [{"places": 5}, {"places": [5]}, {"where": ["x"]}])
def test_places_that_are_none_are_told(known: Any, tmp_path: Path) -> None:
    record = {"format": "imagewright-experiment/1", "experiment": to_json(BASE), "inputs": {"data": known}}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"experiment\.json is damaged: inputs\.data\."):
        run_experiment(BASE, tmp_path, resume=True)
