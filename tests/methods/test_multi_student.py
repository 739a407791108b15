"""Multi-student distillation: a student's part, its beginning, and one model of all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.cli.scoring import real_images
from imagewright.methods.distances import Distance
from imagewright.methods.distribution_matching import fresh_noise
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.edm import loss_weight
from imagewright.methods.multi_student import TeacherScoreMatching
from imagewright.models.files import load_model
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.recipes import RECIPES, multi_student
from imagewright.recipes.multi_student import alike, student, students
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.students import joined
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, Coupling, DataSpec, Update, UserError

PART = DataSpec(name="toy", resolution=8, channels=1, num_classes=5, empty_classes=(0, 2, 4))
WHOLE = replace(PART, empty_classes=())
CLOCK = Clock(0, 0, 1000)


def denoiser(seed: int = 0, channels: int = 8, **changes: Any) -> EDMPrecond:
    torch.manual_seed(seed)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=5, model_channels=channels,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return EDMPrecond(network, **changes)


def numbers(n: int, seed: int = 0) -> Tensor:
    return StepNoise(seed).normal(torch.empty(n, 1, 8, 8))


# --- a part of the classes --------------------------------------------------------------------------------------------


def test_fresh_labels_are_of_the_part_and_pairs_of_all() -> None:
    method = DMD(regression=Distance(kind="l2"))
    parts: Any = method.parts(teacher=denoiser(), spec=PART)
    _, cond = fresh_noise(parts.generator, torch.empty(3000, 1, 8, 8), StepNoise(0))
    assert cond.label is not None
    counts = torch.bincount(cond.label, minlength=5)
    assert counts[[0, 2, 4]].sum() == 0 and abs(int(counts[1]) - 1500) < 150
    seen: list[list[int]] = []
    heard = parts.generator.start
    parts.generator.start = lambda x, sigma, cond: (seen.append(cond.label.tolist()), heard(x, sigma, cond))[1]
    pairs = Coupling(numbers(5), numbers(5, 1), Condition(label=torch.arange(5)))
    next(iter(method.step(parts, Batch(numbers(5), Condition(label=torch.ones(5).long()), pairs), StepNoise(1), CLOCK)))
    assert set(seen[0]) <= {1, 3} and seen[1] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", [DMD(regression_weight=0.0), DMD2(fake_updates=1)])
def test_one_student_of_all_classes_is_the_method_itself(method: Any) -> None:
    def losses(spec: DataSpec, **more: Any) -> list[Tensor]:
        parts: Any = method.parts(teacher=denoiser(), spec=spec, **more)
        torch.manual_seed(1)
        for p in parts.fake_score.parameters():  # at the start nothing is to be learnt
            p.data += 0.1 * torch.randn_like(p)
        batch = Batch(numbers(4), Condition(label=torch.arange(4)))
        return [e.loss.detach() for e in method.step(parts, batch, StepNoise(2), CLOCK) if isinstance(e, Update)]

    base = losses(WHOLE)
    assert all(torch.equal(a, b) for a, b in zip(losses(WHOLE, student=denoiser()), base, strict=True))
    assert not torch.equal(losses(PART)[0], base[0])


def test_a_small_student_begins_with_its_own_weights_and_the_fake_score_with_the_teachers() -> None:
    small = denoiser(3, channels=4)
    parts: Any = DMD(regression_weight=0.0).parts(teacher=denoiser(), spec=PART, student=small)
    assert all(torch.equal(a, b) for a, b in zip(parts.generator.parameters(), small.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parts.fake_score.parameters(), denoiser().parameters(), strict=True))
    with pytest.raises(UserError, match=r"student has sigma_max 40, .* the teacher has 80"):
        DMD(regression_weight=0.0).parts(teacher=denoiser(), spec=PART, student=denoiser(sigma_max=40.0))


# --- the teacher's scores ---------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighed_difference_of_the_answers() -> None:
    method = TeacherScoreMatching()
    parts: Any = method.parts(network=denoiser(3, channels=4).network, teacher=denoiser(sigma_data=0.7))
    assert parts.student.sigma_data == 0.7
    batch = Batch(numbers(4), Condition(label=torch.arange(4)))
    (update,) = method.step(parts, batch, StepNoise(2), CLOCK)
    assert isinstance(update, Update) and update.at is not None
    noise = StepNoise(2)
    sigma = method.levels.sample(noise, batch.images[:, 0, 0, 0])
    noisy = batch.images + sigma[:, None, None, None] * noise.normal(batch.images)
    apart = parts.student(noisy, sigma, batch.cond) - parts.teacher(noisy, sigma, batch.cond)
    torch.testing.assert_close(update.loss, loss_weight(sigma, 0.7) * apart.square().flatten(1).mean(1))
    update.loss.sum().backward()
    assert all(p.grad is None for p in parts.teacher.parameters())
    same: Any = method.parts(network=denoiser().network, teacher=denoiser())
    (agreed,) = method.step(same, batch, StepNoise(2), CLOCK)
    assert isinstance(agreed, Update) and float(agreed.loss.detach().max()) == 0


class Linear(nn.Module):
    """F of a denoiser that is linear in x: what is learnt are its slope and offset at one noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.slope * x + self.offset


def test_a_linear_student_learns_the_gaussians_posterior_mean() -> None:
    """m + v / (v + sigma^2) (x - m) of N(m, v) data, by two steps of Newton's on the mean loss at one level."""
    mean, variance, level = 0.3, 0.5, 0.8

    class Exact(EDMPrecond):
        def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            return mean + variance / (variance + level**2) * (x - mean)

    class OneLevel:
        def sample(self, noise: Any, like: Tensor) -> Tensor:
            return torch.full_like(like, level)

    method = TeacherScoreMatching(levels=OneLevel())  # type: ignore[arg-type]
    parts: Any = method.parts(network=Linear(), teacher=Exact(Linear()))
    batch = Batch(mean + variance**0.5 * numbers(64).double())
    wanted = list(parts.student.parameters())
    for _ in range(2):
        (update,) = method.step(parts, batch, StepNoise(2), CLOCK)
        assert isinstance(update, Update)
        slopes = torch.autograd.grad(update.loss.mean(), wanted, create_graph=True)
        rows = [torch.cat(torch.autograd.grad(s, wanted, retain_graph=True)) for s in slopes]
        change = torch.linalg.solve(torch.stack(rows), torch.cat([s.detach() for s in slopes]))
        for p, d in zip(wanted, change, strict=True):
            p.data -= d
    x, sigma = numbers(3, 5).double(), torch.full((3,), level, dtype=torch.float64)
    torch.testing.assert_close(parts.student(x, sigma), parts.teacher(x, sigma))


# --- all of it --------------------------------------------------------------------------------------------------------


def test_stages_follow_each_other() -> None:
    stages = {stage.name: stage.work for stage in students("digits", 3, small=True).stages}
    assert list(stages) == [*(f"{s}{k}" for k in (1, 2, 3) for s in ("tsm", "dm", "adm")), "join"]
    second: Any = stages["dm2"]
    assert second.data.classes == ("4-6",) and second.given["student"] == "stage:tsm2"
    assert second.data.couplings and not stages["adm2"].data.couplings  # type: ignore[union-attr]
    third: Any = stages["adm3"]
    assert third.start == "stage:dm3" and third.given["student"] == "stage:tsm3" and third.data.classes == ("7-9",)
    assert dict(stages["join"].given) == {f"student{k}": f"stage:adm{k}" for k in (1, 2, 3)}
    assert [s.name for s in student("emoji64-32", (0, 8), adversary=False).stages] == ["dm"]
    with pytest.raises(UserError, match="there are those of digits, emoji64-32, cifar10, imagenet64"):
        students("moons", 2)


def test_parts_may_be_of_classes_that_the_teacher_finds_alike() -> None:
    parts = alike("emoji64-32", 2)
    assert sorted(len(part) for part in parts) == [4, 5] and sorted(k for p in parts for k in p) == list(range(9))


SIZES: dict[str, Any] = {"total_images": 32, "batch": 16, "log_images": 16, "snapshot_images": 64,
                         "checkpoint_images": 16}  # fmt: skip
FILE = """
from dataclasses import replace
from imagewright.methods.distances import Distance
from imagewright.methods.dmd import DMD
from imagewright.recipes.multi_student import students
from imagewright.training.chain import Chain, Stage

def small(work):
    if not hasattr(work, "training"):
        return work
    run = replace(work, data=replace(work.data, couplings="pairs"), method=DMD(regression=Distance(kind="l2")))
    return replace(run, training=replace(run.training, **{sizes})).giving(teacher="teacher")

chain = students("digits", [(0, 1, 2, 9), range(3, 9)], adversary=False)
experiment = Chain(*(Stage(stage.name, small(stage.work)) for stage in chain.stages))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its pairs, and a file of two small students of it."""
    folder = tmp_path_factory.mktemp("students")
    base = RECIPES["edm-digits"]()
    network = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                             num_blocks=1, attn_resolutions=())  # fmt: skip
    run = replace(base, network=network, training=replace(base.training, **SIZES))
    run_experiment(run, folder / "teacher")
    main(["couple", str(folder / "teacher"), "--out", str(folder / "pairs"), "--n", "16", "--steps", "2"])
    (folder / "both.py").write_text(FILE.replace("{sizes}", repr(SIZES)))
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The same folder, with the students in whole/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        main(["train", "both.py", "--device", "cpu", "--out", "whole"])
    return home


def test_students_are_one_command_that_goes_on_where_it_was_stopped(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(trained)
    calls: list[str] = []
    real = run_experiment

    def stopped(experiment: Experiment, folder: Path, **more: Any) -> Path:
        calls.append(folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(experiment, folder, **more)

    with monkeypatch.context() as patch:
        patch.setattr("imagewright.cli.train.run_experiment", stopped)
        with pytest.raises(SystemExit):
            main(["train", "both.py", "--device", "cpu", "--out", "cut"])
    assert calls == ["1-dm1", "2-dm2"] and not Path("cut/3-join").exists()
    main(["train", "--resume", "cut", "--device", "cpu"])
    whole = load_model(Path("whole/3-join"))
    assert whole.weights_sha256 == load_model(Path("cut/3-join")).weights_sha256
    model: Any = whole.model
    assert model.table == (0, 0, 0, 1, 1, 1, 1, 1, 1, 0) and whole.spec.empty_classes == ()
    one = load_model(Path("whole/1-dm1"))
    assert one.spec.known_classes == (0, 1, 2, 9)
    assert {*real_images("whole/1-dm1", None, one.spec, "all").labels.tolist()} == {0, 1, 2, 9}
    assert {*real_images("whole/1-dm1", "digits", one.spec, "all").labels.tolist()} == {*range(10)}
    assert whole.origin["students"][0]["weights_sha256"] == one.weights_sha256
    capsys.readouterr()
    main(["sample", "whole", "--n", "4", "--out", "drawn.png", "--device", "cpu"])
    main(["export", "whole", "--out", "exported"])
    assert load_model(Path("exported")).weights_sha256 == whole.weights_sha256
    main(["join", "whole/1-dm1", "whole/2-dm2", "--out", "joined"])
    assert load_model(Path("joined")).weights_sha256 == whole.weights_sha256
    assert json.loads(Path("joined/model.json").read_text())["model"]["table"] == list(model.table)


def test_what_does_not_go_together_is_refused(trained: Path, refused: Any) -> None:
    first, second = str(trained / "whole/1-dm1"), str(trained / "whole/2-dm2")
    assert "both make class 0" in refused("join", first, first, "--out", trained / "x")
    assert "needs at least two" in refused("join", first, "--out", trained / "x")
    assert "no one-step generator" in refused("join", first, trained / "teacher", "--out", trained / "x")
    with pytest.raises(UserError, match="no one-step generator"):
        joined(["emoji64-32", second])


def test_every_recipe_is_of_the_first_part() -> None:
    for name, recipe in multi_student.FAMILY.items():
        run = recipe()
        assert run.data.classes == ("0-249",) if "imagenet" in name else ("0-4",), name
        assert bool(run.data.couplings) == (not name.endswith(("-gan", "-small")))
