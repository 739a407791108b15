"""Progressive distillation in EDM's time: the two-step target, the stages, and that students draw what teachers do."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imagewright.data import ImageSet, Loader
from imagewright.methods.progressive_distillation import ProgressiveDistillation, steps_sampler, two_steps
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.samplers import Euler
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.trainer import Trainer
from imagewright.types import (
    UNCONDITIONAL,
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Follow,
    Parts,
    Trained,
    Update,
    UserError,
)

SPEC = DataSpec(name="toy", resolution=4, channels=1)
STD = 0.3
ORACLE = GaussianOracle(torch.zeros(1, 4, 4, dtype=torch.float64), std=STD)


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def images(n: int) -> Tensor:
    return STD * StepNoise(1).normal(torch.empty(n, 1, 4, 4, dtype=torch.float64))


class PerLevel(nn.Module):
    """F = w(level) x with a table of weights over ln sigma / 4, linear between its entries."""

    def __init__(self, entries: int = 65, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(entries, dtype=torch.float64))
        self.dropout = dropout

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        place = (4 * noise_label - math.log(0.002)) / math.log(80 / 0.002) * (len(self.w) - 1)
        low = place.floor().clamp(0, len(self.w) - 2).long()
        w = torch.lerp(self.w[low], self.w[low + 1], place - low)
        return nn.functional.dropout(column(w) * x, self.dropout, self.training)


def euler(denoiser: object, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return x + column((t_next - t) / t) * (x - denoiser(x, t, UNCONDITIONAL))  # type: ignore[operator]


def levels(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = torch.logspace(-2, 1.9, n, dtype=torch.float64)
    return column(t) * StepNoise(2).normal(images(n)), t, 0.7 * t, 0.2 * t


def test_one_step_with_the_target_lands_where_two_steps_do() -> None:
    x, t, t_mid, t_next = levels(9)
    aim = two_steps(ORACLE, x, t, t_mid, t_next, UNCONDITIONAL)
    landed = euler(ORACLE, euler(ORACLE, x, t, t_mid), t_mid, t_next)
    torch.testing.assert_close(x + column((t_next - t) / t) * (x - aim), landed, rtol=1e-12, atol=1e-12)


def test_down_to_zero_the_target_is_the_second_answer() -> None:
    x, t, t_mid, _ = levels(9)
    aim = two_steps(ORACLE, x, t, t_mid, torch.zeros_like(t), UNCONDITIONAL)
    torch.testing.assert_close(aim, ORACLE(euler(ORACLE, x, t, t_mid), t_mid))


def test_a_constant_answer_is_its_own_target() -> None:
    x, t, t_mid, t_next = levels(9)
    answer = StepNoise(5).normal(x)
    torch.testing.assert_close(
        two_steps(lambda x, t, cond: answer, x, t, t_mid, t_next, UNCONDITIONAL),  # type: ignore[arg-type]
        answer,
    )


def test_stages_are_the_released_ones() -> None:
    """4096 -> 1: eleven stages of 50,000 updates, then 100,000 for two steps and for one."""
    method = ProgressiveDistillation(start_steps=4096)
    assert len(method.stages) == 15
    steps = [method.steps_at(k, 750) for k in range(0, 750, 50)]
    assert steps == [4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 2, 1, 1]
    assert method.steps_at(749, 750) == method.steps_at(760, 750) == 1
    assert method.steps_at(49.99, 750) == 4096
    assert ProgressiveDistillation(start_steps=8, end_steps=4).stages == (8, 4)
    assert ProgressiveDistillation(start_steps=1).stages == (1, 1)


def learnt_parts(dropout: float = 0.0) -> Parts:
    return ProgressiveDistillation().parts(teacher=EDMPrecond(PerLevel(dropout=dropout)), spec=SPEC)


def run(method: ProgressiveDistillation, parts: Parts, clock: Clock, n: int = 64) -> list:
    return list(method.step(parts, Batch(images(n)), StepNoise(3), clock))


def test_the_teacher_changes_at_the_first_step_of_each_stage_alone() -> None:
    method, batch, total = ProgressiveDistillation(start_steps=8), 10, 600  # six shares of 100
    changes = [
        clock.images
        for clock in (Clock(k, k * batch, total) for k in range(total // batch))
        if any(isinstance(e, Follow) for e in run(method, learnt_parts(), clock, 2))
    ]
    assert changes == [100, 200, 400]
    first = run(method, learnt_parts(), Clock(10, 100, total))[0]
    assert first == Follow("teacher", "student", 0.0)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_intervals_are_those_of_the_sampler(steps: int) -> None:
    """The student learns at every level that `steps_sampler` visits; halves lie on the teacher's grid."""
    model = EDMPrecond(PerLevel())
    asked = ProgressiveDistillation()._intervals(steps, model, images(500), StepNoise(3))
    t, t_mid, t_next = (torch.unique(v).flip(0) for v in asked)
    visited = steps_sampler(steps).sigmas(model)
    torch.testing.assert_close(t, visited[:-1])
    torch.testing.assert_close(torch.cat([t[:1], t_next])[:-1], visited[:-1])
    assert t_next[-1] == pytest.approx(0.002)
    merged = torch.stack([t, t_mid], 1).flatten()
    torch.testing.assert_close(merged, steps_sampler(2 * steps).sigmas(model)[:-1])


def test_weight_is_the_truncated_snr() -> None:
    update = run(ProgressiveDistillation(), learnt_parts(), Clock(0, 0, 1000))[0]
    assert isinstance(update, Update) and update.at is not None
    want = torch.maximum(1 / update.at**2, torch.ones_like(update.at)) * update.parts["error"]
    torch.testing.assert_close(update.loss, want)
    assert float(update.at.min()) < 1 < float(update.at.max())


def test_the_teacher_is_asked_without_dropout_and_without_gradient() -> None:
    parts = learnt_parts(dropout=0.5)
    with torch.no_grad():
        for p in (parts.student.network.w, parts.teacher.network.w):
            p.fill_(0.5)
    parts.teacher.train()  # as the trainer leaves an average
    parts.teacher.requires_grad_(True)
    parts.student.eval()
    first, second = (run(ProgressiveDistillation(), parts, Clock(0, 0, 10))[0] for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    first.loss.sum().backward()
    assert parts.teacher.network.w.grad is None and parts.student.network.w.grad is not None


def test_parts_start_as_the_teacher() -> None:
    teacher = EDMPrecond(PerLevel())
    parts = ProgressiveDistillation().parts(teacher=teacher, spec=SPEC)
    assert isinstance(parts.roles["student"], Trained) and isinstance(parts.roles["teacher"], Average)
    assert parts.student.network.w.requires_grad and not parts.teacher.network.w.requires_grad
    assert parts.student.network.w.data_ptr() != parts.teacher.network.w.data_ptr()


@pytest.mark.parametrize("sampler", [steps_sampler(1), steps_sampler(4)])
def test_sampler_is_euler_on_the_students_grid(sampler: Euler) -> None:
    n = sampler.num_steps
    grid = [(80 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    assert sampler.levels == pytest.approx(grid) and sampler.levels[0] == 80.0 and sampler.nfe == n


def ideal_factors(steps: int) -> dict[float, float]:
    """The answers D(x, t) / x of the best student of `steps` steps, halved down from 1024 exact ones."""
    n = 1024
    factors = {t: STD**2 / (t**2 + STD**2) for t in steps_sampler(n).levels}
    while n > steps:
        grid, halved = [*steps_sampler(n).levels, 0.002], {}
        for times in zip(grid[0::2], grid[1::2], grid[2::2], strict=False):

            def before(x: Tensor, sigma: Tensor, cond: Condition, known: dict[float, float] = factors) -> Tensor:
                return known[float(sigma)] * x

            t, t_mid, t_next = (torch.tensor([v], dtype=torch.float64) for v in times)
            one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
            halved[times[0]] = float(two_steps(before, one, t, t_mid, t_next, UNCONDITIONAL))  # type: ignore[arg-type]
        factors, n = halved, n // 2
    return factors


@pytest.mark.parametrize("steps", [1, 4])
def test_ideal_students_of_gaussian_data_draw_the_flow(steps: int) -> None:
    """Halved from 1024 Euler steps, a student of few draws what 1024 draw; the teacher at as few does not."""
    factors = {round(t, 9): f for t, f in ideal_factors(steps).items()}
    start = torch.ones(1, 1, 4, 4, dtype=torch.float64)

    class Student:
        sigma_min, sigma_max = 0.002, 80.0

        def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            return factors[round(float(sigma[0]), 9)] * x

        def round_sigma(self, sigma: Tensor) -> Tensor:
            return sigma

    drawn = steps_sampler(steps)(Student(), start)
    exact = start * 80 * STD / math.hypot(80, STD)
    many = steps_sampler(1024)(ORACLE_IN_RANGE, start)
    torch.testing.assert_close(drawn, many, rtol=1e-2, atol=0)
    torch.testing.assert_close(drawn, exact, rtol=2e-2, atol=0)
    few = steps_sampler(steps)(ORACLE_IN_RANGE, start)
    assert float((few - exact).abs().max()) > 5 * float((drawn - exact).abs().max())


class InRange:
    sigma_min, sigma_max = 0.002, 80.0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return ORACLE(x, sigma, cond)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


ORACLE_IN_RANGE = InRange()


def trainer(folder: Path, dropout: float = 0.2, anneal: bool = False) -> Trainer:
    """28 steps of four images, in shares of 16 images, with a network whose table learns."""
    torch.manual_seed(0)
    method = ProgressiveDistillation(start_steps=16, anneal=anneal)
    parts = method.parts(teacher=EDMPrecond(PerLevel(dropout=dropout)).float(), spec=SPEC)
    pixels = (images(16).permute(0, 2, 3, 1).clamp(-1, 1) * 127 + 128).to(torch.uint8).numpy()
    config = TrainingConfig(
        total_images=112, batch=4, optimizer=OptimizerConfig(lr=1e-2), ema=EmaConfig(halflife_images=0)
    )
    return Trainer(method, parts, Loader(ImageSet.of(pixels), 4, 0), config, folder)


@pytest.mark.parametrize("anneal", [False, True])
@pytest.mark.parametrize("at", [4, 5, 15, 16])
def test_stopping_and_going_on_changes_no_bit(tmp_path: Path, at: int, anneal: bool) -> None:
    """Before, at and after the steps (4, 8, 12 and 20) at which the teacher changes."""
    whole, begun = trainer(tmp_path / "a", anneal=anneal), trainer(tmp_path / "b", anneal=anneal)
    for _ in range(28):
        whole.train_step()
    for _ in range(at):
        begun.train_step()
    begun.save()
    resumed = trainer(tmp_path / "b", anneal=anneal)
    assert resumed.resume() and resumed.step_index == at
    for _ in range(28 - at):
        resumed.train_step()
    for name in ("student", "teacher"):
        ours, theirs = (getattr(t.parts, name).network.w for t in (whole, resumed))
        assert torch.equal(ours, theirs)
    assert not torch.equal(whole.parts.student.network.w, whole.parts.teacher.network.w)


def test_the_rate_falls_within_every_stage() -> None:
    method = ProgressiveDistillation(start_steps=4096, anneal=True)
    places = {0: 1.0, 25: 0.5, 49: 0.02, 50: 1.0, 75: 0.5, 550: 1.0, 600: 0.5, 650: 1.0, 700: 0.5, 749: 0.01}
    for at, rate in places.items():
        assert method.rate_at(Clock(at, at, 750)) == pytest.approx(rate, abs=1e-12)
        assert ProgressiveDistillation(start_steps=4096).rate_at(Clock(at, at, 750)) == 1


@pytest.mark.parametrize("anneal", [False, True])
def test_the_optimiser_begins_anew_with_every_stage(tmp_path: Path, anneal: bool) -> None:
    run = trainer(tmp_path, anneal=anneal)
    optimizer = run.learners["student"].optimizer
    counts, rates = [], []
    for _ in range(28):
        run.train_step()
        counts.append(int(next(iter(optimizer.state.values()))["step"]))
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
    if anneal:  # four steps in the first three stages, eight in those of two steps and of one
        assert counts == [1, 2, 3, 4] * 3 + [1, 2, 3, 4, 5, 6, 7, 8] * 2
        assert rates == pytest.approx([1, 0.75, 0.5, 0.25] * 3 + [1 - k / 8 for k in range(8)] * 2)
    else:
        assert counts == list(range(1, 29)) and rates == pytest.approx([1.0] * 28)


def test_the_teacher_is_the_student_of_the_last_stage(tmp_path: Path) -> None:
    run, kept = trainer(tmp_path), {}
    for k in range(28):
        kept[k] = copy.deepcopy(run.parts.student.network.w.detach())
        run.train_step()
        before = max(b for b in (0, 4, 8, 12, 20) if b <= k)
        assert torch.equal(run.parts.teacher.network.w, kept[before])
    assert all(not torch.equal(kept[a], kept[b]) for a, b in pairwise((0, 4, 8, 12, 20)))


def test_bad_settings_get_one_sentence() -> None:
    for settings in ({"start_steps": 12, "end_steps": 5}, {"start_steps": 0}, {"end_steps": 0}, {"start_steps": 12}):
        with pytest.raises(UserError, match="end_steps must be at least 1, and start_steps that times a power of two"):
            ProgressiveDistillation(**settings)
    with pytest.raises(UserError, match=r"method\.rho is -7\.0"):
        ProgressiveDistillation(rho=-7.0)
    with pytest.raises(UserError, match="the teacher is a ConsistencyModel"):
        ProgressiveDistillation().parts(teacher=ConsistencyModel(PerLevel()), spec=SPEC)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="train longer or start from fewer steps"):
        run(ProgressiveDistillation(start_steps=1024), learnt_parts(), Clock(1, 500, 1000))
    with pytest.raises(UserError, match="steps is 0"):
        steps_sampler(0)
    with pytest.raises(UserError, match=r"sigma_min is 90\.0"):
        steps_sampler(2, sigma_min=90.0)
