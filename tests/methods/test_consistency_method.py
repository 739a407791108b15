"""Consistency distillation and training: exact solutions, grids and schedules, and which network gets what."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.consistency import ConsistencyDistillation, ConsistencyTraining
from imagewright.methods.distances import Distance
from imagewright.methods.pairs import heun_step
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.types import (
    UNCONDITIONAL,
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Follow,
    Frozen,
    Parts,
    Trained,
    UserError,
)
from imagewright.types import Update as UpdateEvent

SPEC = DataSpec(name="toy", resolution=4, channels=1)
STD = 0.5


class Scaled(nn.Module):
    """A network that answers w times its input, after dropout."""

    def __init__(self, w: float = 0.3, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.dropout = dropout

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return nn.functional.dropout(self.w * x, self.dropout, self.training)


class Around(nn.Module):
    """An exact denoiser as the module that `Parts` wants."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self) -> None:
        super().__init__()
        self.oracle = GaussianOracle(torch.zeros(1, 4, 4, dtype=torch.float64), std=STD)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.oracle(x, sigma, cond)


class ExactStart(nn.Module):
    """The consistency function of N(0, STD^2): x sqrt((smin^2 + s^2) / (t^2 + s^2)). Remembers what it was asked."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor]] = []

    def start(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.asked.append((x, sigma))
        factor = torch.sqrt((self.sigma_min**2 + STD**2) / (sigma**2 + STD**2))
        return factor[:, None, None, None] * x


def images(n: int) -> Tensor:
    return STD * StepNoise(1).normal(torch.empty(n, 1, 4, 4, dtype=torch.float64))


def exact_parts() -> Parts:
    return Parts(
        student=Trained(module=ExactStart()), target=Average(module=ExactStart()), teacher=Frozen(module=Around())
    )


def learnt_parts(dropout: float = 0.0) -> Parts:
    teacher = EDMPrecond(Scaled(dropout=dropout))
    return ConsistencyDistillation().parts(teacher=teacher, spec=SPEC)


def column(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None]


def run(method: ConsistencyDistillation | ConsistencyTraining, parts: Parts, n: int = 64, images_seen: int = 0) -> list:
    clock = Clock(images_seen, images_seen, 1000)
    return list(method.step(parts, Batch(images(n)), StepNoise(3), clock))  # type: ignore[arg-type]


def test_heun_step_is_third_order_in_its_length() -> None:
    x, sigma = images(4) + 2, torch.full((4,), 2.0, dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1, 0.05):
        to = sigma - h
        exact = column(((to**2 + STD**2) / (sigma**2 + STD**2)).sqrt()) * x
        errors.append(float((heun_step(Around(), x, sigma, to, UNCONDITIONAL) - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.15)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(3, abs=0.1)


def test_the_exact_consistency_function_has_a_loss_that_vanishes_with_the_grid() -> None:
    losses = []
    for points in (20, 40, 80, 160):
        events = run(ConsistencyDistillation(grid_points=points, distance=Distance(kind="l1")), exact_parts(), 512)
        losses.append(float(events[0].loss.detach().mean()))
    assert all(fine < coarse / 4 for coarse, fine in itertools.pairwise(losses))


@pytest.mark.parametrize("points", [2, 5, 18])
def test_pairs_are_neighbours_of_the_grid_and_all_occur(points: int) -> None:
    parts = exact_parts()
    run(ConsistencyDistillation(grid_points=points), parts, n=2000)
    (_, upper), (_, lower) = parts.student.asked[0], parts.target.asked[0]
    grid = torch.tensor([(80 ** (1 / 7) + i / (points - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
                         for i in range(points)], dtype=torch.float64)  # fmt: skip
    index = (upper[:, None] - grid).abs().argmin(1)
    torch.testing.assert_close(upper, grid[index])
    torch.testing.assert_close(lower, grid[index + 1])
    assert set(index.tolist()) == set(range(points - 1))


def test_training_pair_shares_one_noise() -> None:
    parts = exact_parts()
    run(ConsistencyTraining(), parts, images_seen=500)
    (x, t), (x_next, t_next) = parts.student.asked[0], parts.target.asked[0]
    assert (t > t_next).all()
    torch.testing.assert_close((x - images(64)) / column(t), (x_next - images(64)) / column(t_next), rtol=0, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_the_student_learns_and_the_target_follows(decay: float) -> None:
    parts = learnt_parts()
    update, follow = run(ConsistencyDistillation(target_decay=decay), parts)
    assert isinstance(update, UpdateEvent) and update.part == "student" and update.loss.shape == (64,)
    assert follow == Follow("target", "student", decay)
    update.loss.sum().backward()
    assert parts.student.network.w.grad is not None and parts.student.network.w.grad != 0
    assert parts.target.network.w.grad is None and parts.teacher.network.w.grad is None


def test_both_evaluations_see_the_same_dropout_mask() -> None:
    """At target_decay 0 and with neighbours that nearly coincide, the loss is small only under one mask."""
    events = run(ConsistencyDistillation(grid_points=4000), learnt_parts(dropout=0.5))
    assert float(events[0].loss.detach().mean()) < 1e-3


def test_different_dropout_masks_would_show() -> None:
    """The negative control: two masks of their own leave the loss of the test above far from zero."""
    parts = learnt_parts(dropout=0.5)
    x, sigma = 80 * images(64) / STD, torch.full((64,), 80.0, dtype=torch.float64)
    assert float((parts.student.start(x, sigma) - parts.target.start(x, sigma)).detach().square().mean()) > 1e-2


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9])
def test_training_follows_the_clock(fraction: float) -> None:
    """Grid and decay of a step are those of the schedules at that share of the run."""
    method, parts = ConsistencyTraining(s1=12), exact_parts()
    _, follow = run(method, parts, n=2000, images_seen=int(1000 * fraction))
    assert follow == Follow("target", "student", method.target_decay(fraction))
    (_, upper), (_, lower) = parts.student.asked[0], parts.target.asked[0]
    points = method.grid_points(fraction)
    levels = torch.cat([upper, lower]).unique()
    assert len(levels) == points and len(upper.unique()) == points - 1
    assert (levels[0].item(), levels[-1].item()) == pytest.approx((0.002, 80.0), rel=1e-9)


def test_no_gradient_passes_through_target_or_teacher() -> None:
    """Even where their weights would take one."""
    method, parts = ConsistencyDistillation(), learnt_parts()
    parts.target.requires_grad_(True)
    update = run(method, parts)[0]
    target_w, teacher_w = parts.target.network.w, parts.teacher.network.w
    assert torch.autograd.grad(update.loss.sum(), [target_w, teacher_w], allow_unused=True) == (None, None)


def test_perceptual_distance_uses_the_given_features() -> None:
    class Channels(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [torch.cat([x, torch.ones_like(x)], 1)]

    method, features = ConsistencyTraining(distance=Distance(kind="perceptual")), Channels()
    parts = method.parts(network=Scaled(), spec=SPEC, features=features)
    assert isinstance(parts.roles["features"], Frozen) and parts.features is features
    loss = run(method, parts)[0].loss
    assert loss.shape == (64,) and float(loss.detach().sum()) > 0
    assert "features" not in ConsistencyTraining().parts(network=Scaled(), spec=SPEC, features=features).roles


def test_training_schedules_are_the_papers() -> None:
    method = ConsistencyTraining(s0=2, s1=150, mu0=0.9)
    points = [method.grid_points(k / 1000) for k in range(1001)]
    assert (points[0], points[-1]) == (2, 151) and points == sorted(points)
    assert method.grid_points(0.5) == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) + 1 == 107
    assert method.target_decay(0.0) == pytest.approx(0.81)
    assert method.target_decay(1.0) == pytest.approx(0.9 ** (2 / 150))
    decays = [method.target_decay(k / 1000) for k in range(1001)]
    assert decays == sorted(decays) and decays[-1] < 1
    assert ConsistencyTraining(s0=2, s1=200, mu0=0.95).grid_points(1.0) == 201


def test_student_and_target_start_as_copies_of_the_teacher() -> None:
    parts = learnt_parts()
    assert isinstance(parts.student, ConsistencyModel)
    assert parts.student.network.w == parts.target.network.w == parts.teacher.network.w
    assert parts.student.network.w.data_ptr() != parts.teacher.network.w.data_ptr() != parts.target.network.w.data_ptr()
    assert parts.student.network.w.requires_grad and not parts.target.network.w.requires_grad


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ConsistencyDistillation(grid_points=1), "method.grid_points is 1; the noise grid needs at least 2"),
        (lambda: ConsistencyDistillation(rho=0.0), "method.rho is 0.0; it must be positive and finite"),
        (lambda: ConsistencyTraining(rho=math.inf), "method.rho is inf"),
        (lambda: ConsistencyDistillation(target_decay=-0.1), "method.target_decay is -0.1"),
        (lambda: ConsistencyDistillation(target_decay=math.nan), "method.target_decay is nan"),
        (lambda: ConsistencyDistillation(target_decay=1.0), r"method.target_decay is 1.0; it must lie in \[0, 1\)"),
        (lambda: ConsistencyTraining(s0=1), "method.s0 is 1"),
        (lambda: ConsistencyTraining(s0=10, s1=5), "method.s1 is 5"),
        (lambda: ConsistencyTraining(mu0=1.0), "mu0 is 1.0"),
        (lambda: ConsistencyTraining(sigma_min=90.0), "method.sigma_min is 90.0 and sigma_max is 80.0"),
        (lambda: ConsistencyTraining(sigma_min=0.0), "method.sigma_min is 0.0"),
        (lambda: ConsistencyTraining(sigma_max=math.inf), "sigma_max is inf; they must satisfy 0 < sigma_min < sigma"),
        (lambda: ConsistencyTraining(mu0=0.0), "mu0 is 0.0"),
        (lambda: ConsistencyTraining(sigma_data=0.0), "method.sigma_data is 0.0"),
        (lambda: ConsistencyTraining(sigma_data=math.nan), "method.sigma_data is nan"),
        (
            lambda: ConsistencyDistillation().parts(teacher=Around(), spec=SPEC),
            "is an Around; distillation needs a denoiser that knows every noise level",
        ),
        (
            lambda: ConsistencyDistillation().parts(teacher=ConsistencyModel(Scaled()), spec=SPEC),  # type: ignore[arg-type]
            "the teacher is a ConsistencyModel; distillation needs a denoiser that knows every noise level",
        ),
        (
            lambda: ConsistencyDistillation().parts(teacher=EDMPrecond(Scaled(), sigma_min=0.0), spec=SPEC),
            "the teacher's sigma_min is 0.0",
        ),
        (
            lambda: ConsistencyTraining(distance=Distance(kind="perceptual")).parts(network=Scaled(), spec=SPEC),
            "needs a feature network",
        ),
        (
            lambda: ConsistencyDistillation(distance=Distance(kind="perceptual")).parts(
                teacher=EDMPrecond(Scaled()), spec=SPEC
            ),
            "needs a feature network",
        ),
    ],
)
def test_bad_settings_are_told(make: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()  # type: ignore[operator]
