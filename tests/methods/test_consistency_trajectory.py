"""Consistency trajectory models: exact solutions, laws of all draws, gradients and adaptive weights."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.adversary import adaptive_weight
from imagewright.methods.consistency_trajectory import Adversarial, ConsistencyTrajectory, Jump
from imagewright.methods.distances import Distance
from imagewright.methods.pairs import heun_step, match
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.types import (
    UNCONDITIONAL,
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)

SPEC = DataSpec(name="toy", resolution=8, channels=1)
STD = 0.5
L1 = Distance(kind="l1")
SOON = Adversarial(start=0.0, width=4)


class Told(nn.Module):
    """A small convolutional network that is told where it is and where to go."""

    def __init__(self, deaf: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 1, 3, padding=1)
        self.levels = nn.Linear(2, 6)
        self.deaf = deaf

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        there = noise_label if self.deaf or cond.destination is None else cond.destination
        told = self.levels(torch.stack([noise_label, there], 1))
        answer: Tensor = self.last(torch.tanh(self.first(x) + told[:, :, None, None]))
        return answer

    def told_destination(self) -> Told:
        told = copy.deepcopy(self)
        told.deaf = False
        return told

    @property
    def last_layer(self) -> nn.Parameter:
        return self.last.weight


class Around(nn.Module):
    """An exact denoiser as the module that `Parts` wants."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self) -> None:
        super().__init__()
        self.oracle = GaussianOracle(torch.zeros(1, 8, 8, dtype=torch.float64), std=STD)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.oracle(x, sigma, cond)


class ExactJumps(Around):
    """The exact flow map, times a weight of 1; remembers what it was asked."""

    sigma_data = STD

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.last_layer = nn.Parameter(torch.ones((), dtype=torch.float64))  # type: ignore[assignment]
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:  # type: ignore[override]
        self.asked.append((x, sigma, sigma_to))
        return self.network.last_layer * self.oracle.flow_map()(x, sigma, sigma_to.clamp(min=0.002))

    def denoiser(self) -> Any:
        return lambda x, sigma, cond: self.network.last_layer * self.oracle(x, sigma, cond)


def images(n: int, side: int = 8) -> Tensor:
    return STD * StepNoise(1).normal(torch.empty(n, 1, side, side, dtype=torch.float64))


def exact_parts() -> Parts:
    return Parts(
        student=Trained(module=ExactJumps()), target=Average(module=ExactJumps()), teacher=Frozen(module=Around())
    )


def learnt_parts(method: ConsistencyTrajectory, **more: Any) -> Parts:
    """Small networks in float64; the target is moved away from the student."""
    torch.manual_seed(0)
    parts = method.parts(teacher=EDMPrecond(Told(deaf=True)).double(), spec=SPEC, **more)
    for role in parts.roles.values():
        role.module.double()
    for p in parts.target.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return parts


def run(method: ConsistencyTrajectory, parts: Parts, n: int = 16, step: int = 1, total: int = 1000) -> list[Any]:
    return list(method.step(parts, Batch(images(n)), StepNoise(3, step), Clock(step, step, total)))


def column(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None]


# --- the consistency loss ---------------------------------------------------------------------------------------------


def test_exact_jumps_have_a_loss_that_vanishes_with_the_grid() -> None:
    losses = []
    for n in (20, 40, 80, 160):
        update = run(ConsistencyTrajectory(grid_points=n, max_steps=1, distance=L1), exact_parts(), 512)[0]
        losses.append(float(update.parts["consistency"].detach().mean()))
    assert all(fine < coarse / 3 for coarse, fine in itertools.pairwise(losses))


def test_the_way_over_u_takes_n_heun_steps() -> None:
    """Every teacher step ends on the next grid point; the aim's jump begins where n of them lead."""
    method, parts = ConsistencyTrajectory(grid_points=9, denoising=0.0), exact_parts()
    n = method.steps_at(1)
    assert n > 2
    run(method, parts)
    (x_u, u, s), (x_t, t, s_too) = parts.student.asked
    grid = (80 ** (1 / 7) + torch.arange(9, dtype=torch.float64) / 8 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    start = (t[:, None] - grid).abs().argmin(1)
    x = x_t
    for k in range(n):
        x = heun_step(parts.teacher, x, grid[start + k], grid[start + k + 1], UNCONDITIONAL)
    torch.testing.assert_close(x_u, x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(u, grid[start + n])
    assert torch.equal(s, s_too)
    outer = parts.target.asked
    assert len(outer) == 2 and all(torch.equal(level, s) and not to.any() for _, level, to in outer)


def test_levels_are_uniform_where_they_may_be() -> None:
    method, parts = ConsistencyTrajectory(grid_points=6, max_steps=2, denoising=0.0), exact_parts()
    n = method.steps_at(4)
    run(method, parts, n=24_000, step=4)
    (_, u, s), (_, t, _) = parts.student.asked
    grid = torch.unique(torch.cat([t, u, s])).flip(0)
    assert len(grid) == 6
    index = {name: (level[:, None] - grid).abs().argmin(1) for name, level in (("t", t), ("u", u), ("s", s))}
    assert torch.equal(index["u"], index["t"] + n)
    starts = torch.bincount(index["t"], minlength=6) / 24_000
    torch.testing.assert_close(starts[: 6 - n], torch.full((6 - n,), 1 / (6 - n)), rtol=0, atol=0.015)
    assert not starts[6 - n :].any()
    for start in range(6 - n):
        ends = torch.bincount(index["s"][index["t"] == start], minlength=6).double()
        share = ends / ends.sum()
        torch.testing.assert_close(share[start + n :], torch.full_like(share[start + n :], 1 / (6 - n - start)),
                                   rtol=0, atol=0.03)  # fmt: skip
        assert not share[: start + n].any()


@pytest.mark.parametrize("most", [None, 5])
def test_steps_follow_their_law(most: int | None) -> None:
    method = ConsistencyTrajectory(grid_points=18, max_steps=most)
    draws = [method.steps_at(step) for step in range(8000)]
    top = most or 17
    shares = torch.bincount(torch.tensor(draws), minlength=18) / 8000
    law = torch.arange(18.0) * (torch.arange(18) <= top)
    torch.testing.assert_close(shares, law / law.sum(), rtol=0, atol=0.015)


def test_all_micro_batches_share_the_steps() -> None:
    """Noise of another micro-batch or seed; the number of the teacher's steps is the same."""

    class Counting(Around):
        calls = 0

        def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            self.calls += 1
            return super().forward(x, sigma, cond)

    method, counts = ConsistencyTrajectory(grid_points=12, denoising=0.0), []
    for key in ((0, 5, 0), (0, 5, 1), (9, 5, 0)):
        parts = exact_parts()
        parts.roles["teacher"] = Frozen(module=Counting())
        list(method.step(parts, Batch(images(4)), StepNoise(*key), Clock(5, 5, 100)))
        counts.append(parts.teacher.calls)
    assert counts == [2 * method.steps_at(5)] * 3


def test_straight_to_the_start_in_one_step_is_consistency_distillation() -> None:
    """s = sigma_min and n = 1: both outer jumps are identities, and what is left is algorithm 2 with mu = 0."""

    @dataclass(frozen=True, kw_only=True)
    class Straight(ConsistencyTrajectory):
        def _jump(self, *args: Any) -> Jump:
            jump = super()._jump(*args)
            pairs.append(jump)
            return replace(jump, s=torch.full_like(jump.s, 0.002))

    class Start(nn.Module):
        def __init__(self, model: TrajectoryModel) -> None:
            super().__init__()
            self.model = model

        def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            return self.model(x, sigma, torch.zeros_like(sigma), cond)  # type: ignore[no-any-return]

    pairs: list[Jump] = []
    method = Straight(grid_points=10, max_steps=1, denoising=0.0)
    parts = learnt_parts(method)
    update = run(method, parts)[0]
    (jump,) = pairs
    twins = Parts(student=Trained(module=Start(parts.student)), target=Average(module=Start(parts.student)))
    lower = heun_step(parts.teacher, jump.x, jump.t, jump.u, UNCONDITIONAL)
    known = next(match(twins, (jump.x, jump.t), (lower, jump.u), UNCONDITIONAL, StepNoise(1), Distance(), 0.0))
    assert isinstance(known, Update)
    torch.testing.assert_close(update.loss, known.loss, rtol=1e-9, atol=1e-15)
    weights = list(parts.student.parameters())
    for found, wanted in zip(*(torch.autograd.grad(u.loss.sum(), weights) for u in (update, known)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


def test_gradient_passes_through_the_frozen_outer_jump() -> None:
    """It is that of finite differences, with the target's and the aim's weights held fixed."""
    method = ConsistencyTrajectory(grid_points=6, denoising=0.0)
    parts = learnt_parts(method)
    update = run(method, parts, n=4)[0]
    weight = parts.student.network.last_layer
    (found,) = torch.autograd.grad(update.loss.sum(), weight)
    aside = copy.deepcopy(parts.student)

    class Split(nn.Module):
        """Asked first for the aim, by the weights as they were; then for the estimate, by the changed ones."""

        sigma_min, sigma_max, network = 0.002, 80.0, parts.student.network

        def __init__(self) -> None:
            super().__init__()
            self.asked = 0

        def forward(self, *args: Any) -> Tensor:
            self.asked += 1
            return (aside if self.asked == 1 else parts.student)(*args)  # type: ignore[no-any-return]

    def loss_at(change: float) -> float:
        with torch.no_grad():
            weight[0, 2, 1, 1] += change
            split = Parts(student=Trained(module=Split()), target=parts.roles["target"], teacher=parts.roles["teacher"])
            loss = float(run(method, split, n=4)[0].loss.sum())
            weight[0, 2, 1, 1] -= change
        return loss

    assert float(found[0, 2, 1, 1]) == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-5)


def test_only_the_student_takes_a_gradient() -> None:
    method = ConsistencyTrajectory()
    parts = learnt_parts(method)
    for name in ("target", "teacher"):
        parts.roles[name].module.requires_grad_(False)
    run(method, parts)[0].loss.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parts.student.parameters())
    assert all(p.grad is None for name in ("target", "teacher") for p in parts.roles[name].module.parameters())


# --- the denoising loss, and adaptive weights -------------------------------------------------------------------------


def test_halves_of_the_denoising_levels() -> None:
    method, like = ConsistencyTrajectory(), torch.empty(20_000, dtype=torch.float64)
    sigma = method.denoising_levels(StepNoise(1), like, 0.002, 80.0)
    halves = [sigma[::2], sigma[1::2]]
    usual, noisy = sorted(halves, key=lambda half: float(half.log().mean()))
    assert float(usual.log().mean()) == pytest.approx(-1.2, abs=0.04)
    assert float(usual.log().std()) == pytest.approx(1.2, abs=0.04)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    share = (high - noisy ** (1 / 7)) / (high - low)
    assert share.min() >= 0 and share.max() <= 0.7
    torch.testing.assert_close(torch.quantile(share, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)),
                               torch.tensor([0.175, 0.35, 0.525], dtype=torch.float64), rtol=0, atol=0.01)  # fmt: skip


def test_single_images_get_either_half() -> None:
    method, like = ConsistencyTrajectory(), torch.empty(1, dtype=torch.float64)
    above = sum(float(method.denoising_levels(StepNoise(k), like, 0.002, 80.0)) > 3 for k in range(400))
    assert 120 < above < 240  # nearly all of 62% of the high half (3 is at 0.39 of the range) and of none of the other


def test_denoising_loss_is_edms_on_the_contained_denoiser() -> None:
    """The exact denoiser has the posterior variance as its error: weight * var = 1 / sd^2 * sd^2 for sd = STD."""
    update = run(ConsistencyTrajectory(), exact_parts(), n=4000)[0]
    assert float(update.parts["denoising"].detach().mean()) == pytest.approx(1.0, abs=0.02)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    loss, other = (layer * torch.ones(5, 2)).sum(1), 0.01 * layer.square().sum() * torch.ones(5)
    assert float(adaptive_weight(loss, other, layer)) == pytest.approx(math.sqrt(2) / (0.02 * 5 + 1e-4), rel=1e-9)
    assert float(adaptive_weight(loss, 0 * other, layer)) == 1e4
    assert not adaptive_weight(loss, other, layer).requires_grad
    layer.to_local = lambda: layer  # type: ignore[attr-defined]  # as FSDP's have
    with pytest.raises(UserError, match=r"--training\.parallel is shard; .* give --training\.parallel replicate"):
        adaptive_weight(loss, other, layer)


def test_adaptive_weight_cancels_a_factor() -> None:
    """Ten times the denoising loss: its weighted gradient at the layer keeps its norm, that of the consistency loss."""
    method = ConsistencyTrajectory()
    parts = learnt_parts(method)
    update = run(method, parts, n=16)[0]
    consistency, dsm = update.parts["consistency"], update.parts["denoising"]
    layer, norms = parts.student.network.last_layer, []
    for factor in (1.0, 10.0):
        weighted = adaptive_weight(consistency, factor * dsm, layer) * factor * dsm
        norms.append(float(torch.autograd.grad(weighted.mean(), layer, retain_graph=True)[0].norm()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    wanted = float(torch.autograd.grad(consistency.mean(), layer, retain_graph=True)[0].norm())
    assert norms[1] == pytest.approx(wanted, rel=1e-3)
    torch.testing.assert_close(update.loss, consistency + update.parts["denoising_weight"] * dsm)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_student_and_target_start_as_the_teacher_without_dropout() -> None:
    network = SongUNet(SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8,
                                      channel_mult=(1,), num_blocks=1, dropout=0.5))  # fmt: skip
    parts = ConsistencyTrajectory().parts(teacher=EDMPrecond(network), spec=SPEC)
    assert isinstance(parts.student, TrajectoryModel) and parts.student.network.config.dropout == 0
    x, t = images(3).float(), torch.tensor([0.1, 1.0, 9.0])
    known = parts.teacher.eval()(x, t)
    for model in (parts.student, parts.target):
        torch.testing.assert_close(model.train().towards(x, t, 0.5 * t), known, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in parts.target.parameters())
    assert "discriminator" not in parts.roles and "features" not in parts.roles


def test_dropout_is_the_methods_own() -> None:
    """The published CIFAR-10 runs leave 0.13 on in student and target, whose masks differ."""
    network = SongUNet(SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, label_dim=3,
                                      channel_mult=(1,), num_blocks=1, dropout=0.5, label_dropout=0.2))  # fmt: skip
    parts = ConsistencyTrajectory(dropout=0.13).parts(teacher=EDMPrecond(network), spec=SPEC)
    for part in (parts.student, parts.target):
        assert (part.network.config.dropout, part.network.config.label_dropout) == (0.13, 0.0)
    assert parts.teacher.network.config.dropout == 0.5  # asked without any, in eval mode


def test_perceptual_distance_uses_the_given_features() -> None:
    class Channels(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [torch.cat([x, torch.ones_like(x)], 1)]

    method, features = ConsistencyTrajectory(grid_points=4, distance=Distance(kind="perceptual")), Channels()
    parts = learnt_parts(method, features=features)
    assert isinstance(parts.roles["features"], Frozen) and parts.features is features
    assert float(run(method, parts)[0].parts["consistency"].detach().sum()) > 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ConsistencyTrajectory(grid_points=1), "method.grid_points is 1; the noise grid needs at least 2"),
        (lambda: ConsistencyTrajectory(rho=0.0), "method.rho is 0.0"),
        (lambda: ConsistencyTrajectory(max_steps=0), r"method.max_steps is 0; it must lie in 1 .. 17"),
        (lambda: ConsistencyTrajectory(max_steps=18), "method.max_steps is 18"),
        (lambda: ConsistencyTrajectory(target_decay=1.0), r"method.target_decay is 1.0; it must lie in \[0, 1\)"),
        (lambda: ConsistencyTrajectory(denoising=-1.0), "method.denoising is -1.0"),
        (lambda: ConsistencyTrajectory(denoising=math.nan), "method.denoising is nan"),
        (lambda: ConsistencyTrajectory(dropout=1.0), r"method.dropout is 1.0; it must lie in \[0, 1\)"),
        (
            lambda: ConsistencyTrajectory(dropout=0.1).parts(teacher=EDMPrecond(Told()), spec=SPEC),
            "method.dropout is 0.1; the teacher's network, a Told, has no dropout to set",
        ),
        (lambda: ConsistencyTrajectory(high_noise_share=0.0), "method.high_noise_share is 0.0"),
        (lambda: Adversarial(start=1.0), r"adversarial.start is 1.0; it must lie in \[0, 1\)"),
        (lambda: Adversarial(least_weight=11.0), "adversarial.least_weight is 11.0 and most_weight 10.0"),
        (lambda: Adversarial(most_weight=math.inf), "most_weight inf"),
        (lambda: Adversarial(lr_scale=0.0), "adversarial.lr_scale is 0.0"),
        (lambda: Adversarial(betas=(0.5, 1.0)), r"adversarial.betas is \(0.5, 1.0\)"),
        (lambda: Adversarial(width=0), "adversarial.width is 0"),
        (lambda: Adversarial(feature_size=0), "adversarial.feature_size is 0; it must be at least 1"),
        (
            lambda: ConsistencyTrajectory().parts(teacher=ConsistencyModel(Told()), spec=SPEC),  # type: ignore[arg-type]
            "the teacher is a ConsistencyModel; distillation needs a denoiser that knows every noise level",
        ),
        (
            lambda: ConsistencyTrajectory().parts(teacher=EDMPrecond(nn.Conv2d(1, 1, 1)), spec=SPEC),
            "is a Conv2d, which cannot be told where to go",
        ),
        (
            lambda: ConsistencyTrajectory(distance=Distance(kind="perceptual")).parts(
                teacher=EDMPrecond(Told()), spec=SPEC
            ),
            "needs a feature network",
        ),
        (
            lambda: ConsistencyTrajectory(adversarial=SOON).parts(
                teacher=EDMPrecond(Told()), spec=replace(SPEC, resolution=4)
            ),
            "resolution must be at least 8",
        ),
    ],
)
def test_bad_settings_are_told(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_network_without_a_last_layer_is_refused() -> None:
    class Nameless(nn.Conv2d):
        def told_destination(self) -> Nameless:
            return self

    with pytest.raises(UserError, match="the teacher's network is a Nameless, which has no last_layer"):
        ConsistencyTrajectory().parts(teacher=EDMPrecond(Nameless(1, 1, 1)), spec=SPEC)
