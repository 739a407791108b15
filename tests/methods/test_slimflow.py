"""SlimFlow: both stages' losses in closed form and against the official program's numbers, and its networks' sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.dry_run import parameters
from imagewright.methods.distances import Distance
from imagewright.methods.slimflow import (
    LAST,
    AnnealingReflow,
    FlowGuidedDistillation,
    annealed,
    take_equal,
)
from imagewright.models.flow import EDMFlow, VelocityFlow
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.recipes import RECIPES
from imagewright.samplers import Straight
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=2, channels=1, num_classes=0)
L1, L2 = Distance(kind="l1"), Distance(kind="l2")
Z = torch.tensor([[0.5, -1.0], [1.5, 0.2]], dtype=torch.float64).view(1, 1, 2, 2)
X = torch.tensor([[0.1, -0.6], [0.9, 0.3]], dtype=torch.float64).view(1, 1, 2, 2)
FRESH = torch.tensor([[-0.4, 0.8], [0.3, -1.2]], dtype=torch.float64).view(1, 1, 2, 2)
BATCH = Batch(torch.zeros_like(X), coupling=Coupling(Z, X))


class Official(nn.Module):
    """The network that the official program was run with, in this library's time and direction."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        return -torch.tanh(self.a * x + (1 - label / 999)[:, None, None, None])


class Known:
    """Noise that is known."""

    def __init__(self, uniform: float) -> None:
        self.share = uniform

    def normal(self, like: Tensor) -> Tensor:
        return FRESH.to(like)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.share)


def update(method: Any, parts: Any, noise: Any, clock: Clock, batch: Batch = BATCH) -> Update:
    (event,) = method.step(parts, batch, noise, clock)
    assert isinstance(event, Update)
    return event


@pytest.mark.parametrize(
    ("method", "b", "loss", "slope"),
    [
        (AnnealingReflow(anneal_images=400), 0.75, 0.7334082982005725, 0.40160550306320775),
        (
            AnnealingReflow(anneal_images=400, schedule="exponential"),
            0.7788007830714049,
            0.7660047434839897,
            0.4261317756665382,
        ),
        (
            AnnealingReflow(anneal_images=400, schedule="cosine"),
            0.8535533905932737,
            0.8857281261180487,
            0.5141094016378569,
        ),
        (AnnealingReflow(anneal_images=0), 0.0, 0.8791352198224971, 0.7184121610854358),
    ],
)
def test_annealing_reflow_is_the_official_programs(
    method: AnnealingReflow, b: float, loss: float, slope: float
) -> None:
    clock, network = Clock(100, 100, 1000), Official(0.7)
    assert method.randomness(clock) == pytest.approx(b, abs=1e-15)
    event = update(method, method.parts(network=network, spec=SPEC), Known(0.7), clock)
    assert float(event.loss.detach()) == pytest.approx(loss, rel=1e-12)
    (found,) = torch.autograd.grad(event.loss.sum(), network.a)
    assert float(found) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize(
    ("first_step", "distance", "loss", "slope"),
    [
        ("student", L2, 0.916753855867271, 0.9844740208047994),
        ("teacher", L2, 0.9401291193542486, 1.0616755786790848),
        ("student", L1, 1.0005246630392834, 0.49594700552160764),
        ("teacher", L1, 1.010747323628493, 0.49594700552160764),
    ],
)
def test_flow_guided_distillation_is_the_official_programs(
    first_step: Any, distance: Distance, loss: float, slope: float
) -> None:
    method = FlowGuidedDistillation(distance=distance, first_step=first_step)
    parts = method.parts(flow=VelocityFlow(Official(0.4)), spec=SPEC)
    with torch.no_grad():
        parts.student.network.a.fill_(0.7)
    event = update(method, parts, Known(0.3), Clock(0, 0, 1))
    assert float(event.loss.detach()) == pytest.approx(loss, rel=1e-12)
    (found,) = torch.autograd.grad(event.loss.sum(), parts.student.network.a)
    assert float(found) == pytest.approx(slope, rel=1e-12)
    torch.testing.assert_close(event.loss, event.parts["distillation"] + event.parts["guided"])


def test_one_step_is_the_official_programs_but_for_a_thousandth() -> None:
    got = Straight(times=(LAST,), order=1)(VelocityFlow(Official(0.7)), Z)
    want = torch.tensor([0.8369248352219255, -1.6031289212369852, 2.281412637753691, 0.33993289149565076])
    torch.testing.assert_close(got.flatten(), want.double(), rtol=0, atol=2e-3)


def test_annealed_noise_keeps_its_variance_and_the_image() -> None:
    z = StepNoise(1).normal(torch.empty(100_000, 2, 1, 1, dtype=torch.float64))
    for b in (0.2, 0.5, 0.9):
        pair = annealed(Coupling(z, 2 * z), b, StepNoise(2))
        both = torch.cat([pair.latents.flatten(1), z.flatten(1)], 1)
        want = torch.eye(4, dtype=torch.float64)
        want[:2, 2:] = want[2:, :2] = torch.eye(2) * math.sqrt(1 - b**2)
        torch.testing.assert_close(torch.cov(both.T), want, rtol=0, atol=0.02)
        assert torch.equal(pair.images, 2 * z)


def test_annealing_begins_with_noise_of_its_own_and_ends_with_the_pairs() -> None:
    pair = Coupling(Z, X)
    assert torch.equal(annealed(pair, 1.0, Known(0.5)).latents, FRESH)  # type: ignore[arg-type]
    assert torch.equal(annealed(pair, 0.0, Known(0.5)).latents, Z)  # type: ignore[arg-type]
    for schedule, last in (("linear", 0.0), ("cosine", 0.0), ("exponential", math.exp(-1))):
        method = AnnealingReflow(anneal_images=0.5, schedule=schedule)
        assert method.randomness(Clock(0, 0, 200)) == 1
        assert method.randomness(Clock(1, 100, 200)) == pytest.approx(last)
        assert method.randomness(Clock(1, 150, 200)) <= last


class Constant(nn.Module):
    """A velocity that is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.6]], dtype=torch.float64).view(1, 1, 2, 2))

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        return self.v.expand_as(x)


@pytest.mark.parametrize("first_step", ["student", "teacher"])
@pytest.mark.parametrize("middle", [(0.2, 0.8), (0.5, 0.5)])
def test_a_straight_flows_two_steps_are_its_one(first_step: Any, middle: tuple[float, float]) -> None:
    method = FlowGuidedDistillation(distance=L2, first_step=first_step, middle=middle)
    parts = method.parts(flow=VelocityFlow(Constant()), spec=SPEC)
    event = update(method, parts, StepNoise(3), Clock(0, 0, 1))
    assert float(event.parts["guided"].detach()) == pytest.approx(0, abs=1e-30)
    with torch.no_grad():
        parts.student.network.v.add_(0.1)
    event = update(method, parts, StepNoise(3), Clock(0, 0, 1))
    left = event.parts["guided"].detach() / 0.1**2
    if first_step == "teacher":  # the student is off by 0.1 everywhere, and the target is not
        torch.testing.assert_close(left, torch.ones(1, dtype=torch.float64))
    elif middle == (0.5, 0.5):  # its first step takes half of that into the target
        torch.testing.assert_close(left, torch.full((1,), 0.25, dtype=torch.float64))


def test_a_second_distance_is_added_and_guidance_weighed() -> None:
    def loss(**settings: Any) -> Tensor:
        method = FlowGuidedDistillation(**settings)
        parts = method.parts(flow=VelocityFlow(Official(0.4)), spec=SPEC)
        assert ("teacher" in parts.roles) == (method.guidance > 0)
        return update(method, parts, Known(0.3), Clock(0, 0, 1)).loss.detach()

    torch.testing.assert_close(loss(distance=L2, beside=L1), loss(distance=L2) + loss(distance=L1))
    alone = loss(distance=L2, guidance=0.0)
    torch.testing.assert_close(loss(distance=L2, guidance=0.5) - alone, (loss(distance=L2) - alone) / 2)


def test_a_denoiser_is_taken_as_its_flow() -> None:
    parts = FlowGuidedDistillation(distance=L2).parts(flow=EDMPrecond(Official(0.4)), spec=SPEC)
    assert isinstance(parts.teacher, EDMFlow) and isinstance(parts.student, EDMFlow)
    assert parts.teacher.network is not parts.student.network


def test_equal_tensors_are_taken_and_others_stay() -> None:
    torch.manual_seed(0)
    small, large = (nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, n)}) for n in (4, 8))
    before = small["b"].weight.clone()
    assert take_equal(small, large) == 2
    assert torch.equal(small["a"].weight, large["a"].weight) and torch.equal(small["b"].weight, before)


PUBLISHED = {
    "slimflow-cifar10": {(128, (1, 2, 2), 2): 27.9, (96, (1, 2, 2), 2): 15.7, (64, (1, 2, 2), 2): 7.0,
                         (64, (1, 1, 2), 1): 3.4},
    "slimflow-imagenet64": {(128, (1, 2, 2, 4), 2): 80.7, (128, (1, 2, 2, 2), 2): 44.7},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_have_the_published_sizes(name: str) -> None:
    run = RECIPES[name]()
    for (width, mult, blocks), millions in PUBLISHED[name].items():
        network = replace(run.network, model_channels=width, channel_mult=mult, num_blocks=blocks)
        assert round(parameters(replace(run, network=network)) / 1e6, 1) == millions


def test_the_published_runs_are_the_programs() -> None:
    run = RECIPES["slimflow-cifar10"]()
    training = run.training
    assert training.total_images == 128 * 1_300_000 and run.method.anneal_images == 128 * 300_000
    assert training.optimizer.clip_norm == 1 and training.optimizer.lr == 2e-4
    ramp = training.ema.rampup_ratio
    assert ramp is not None
    for n in (1000, 1_000_000):  # what a step keeps of the average
        assert 1 - 0.5 ** (1 / (n * ramp)) == pytest.approx(9 / (10 + n), rel=0.02)
    second = RECIPES["slimflow-cifar10-distil"]()
    assert second.training.optimizer.lr_ramp_images == 0 and second.given["features"] == "lpips-64"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnnealingReflow(schedule="step"), "method.schedule is 'step'; allowed: linear, exponential, cosine"),
        (lambda: AnnealingReflow(anneal_images=-1), "method.anneal_images is -1; it must be >= 0"),
        (
            lambda: AnnealingReflow(anneal_images=0, schedule="cosine"),
            "method.schedule is 'cosine'; it has no effect with method.anneal_images 0",
        ),
        (lambda: AnnealingReflow().parts(network=Constant(), spec=SPEC, couplings=False), "method.coupling is stored"),
        (
            lambda: AnnealingReflow().parts(network=Constant(), spec=SPEC, teacher=VelocityFlow(Official(1.0))),
            "no tensor of the name and shape",
        ),
        (lambda: FlowGuidedDistillation(guidance=-1), "method.guidance is -1; it must be >= 0"),
        (lambda: FlowGuidedDistillation(first_step="x"), "method.first_step is 'x'; allowed: student, teacher"),
        (lambda: FlowGuidedDistillation(middle=(0.8, 0.2)), r"method.middle is \(0.8, 0.2\); it must be two numbers"),
        (
            lambda: FlowGuidedDistillation().parts(flow=VelocityFlow(Constant()), spec=SPEC),
            "it needs a feature network",
        ),
        (
            lambda: FlowGuidedDistillation(distance=L2).parts(
                flow=VelocityFlow(Constant()), spec=SPEC, couplings=False
            ),
            "method.coupling is stored pairs",
        ),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
