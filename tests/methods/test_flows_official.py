"""The official programs' losses and gradients of batches: 2-rectified flow++, SlimFlow and constant acceleration flow.

Numbers are those of the programs themselves, run on these three pairs with a network of two weights and, for LPIPS,
another distance of the enlarged images: reductions over images, enlarging and all factors are theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.methods.caf import ADVERSARY, ConstantAcceleration, InitialVelocityLearning
from imagewright.methods.distances import Distance
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus
from imagewright.methods.slimflow import AnnealingReflow, FlowGuidedDistillation
from imagewright.models.acceleration import AccelerationFlow, InitialVelocity
from imagewright.models.flow import VelocityFlow
from imagewright.samplers import Accelerated
from imagewright.samplers.straight import straightness
from imagewright.types import Batch, Clock, Condition, Coupling

PLACES = torch.arange(96, dtype=torch.float64).view(3, 2, 4, 4)
X, Z = torch.sin(PLACES), 1.5 * torch.cos(1.7 * PLACES)


class Network(nn.Module):
    """tanh(a x + b t + 0.3 v0), where there is a v0; turned: in the time and direction of programs with noise at 0."""

    def __init__(self, a: float = 0.6, b: float = -0.2, *, turned: bool = False) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in (a, b))
        self.turned = turned

    @property
    def last_layer(self) -> nn.Parameter:
        return self.a

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        t = (1 - label if self.turned else label)[:, None, None, None]
        made = torch.tanh(self.a * x[:, :2] + self.b * t + (0.3 * x[:, 2:] if x.shape[1] == 4 else 0))
        return -made if self.turned else made


class Compares(nn.Module):
    """In LPIPS's place: a multiple of the squared difference of enlarged images."""

    def __init__(self, factor: float, side: int, corners: bool | None, scale: float) -> None:
        super().__init__()
        self.factor, self.side, self.corners, self.scale = factor, side, corners, scale

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        size = (self.side, self.side)
        off = (F.interpolate(each, size=size, mode="bilinear", align_corners=self.corners) for each in (a, b))
        return self.factor * torch.sub(*(self.scale * each for each in off)).square().mean((1, 2, 3))


class Draws:
    """Draws that are known."""

    def __init__(self, uniform: Tensor) -> None:
        self.known = uniform

    def uniform(self, like: Tensor) -> Tensor:
        return self.known

    def normal(self, like: Tensor) -> Tensor:
        return 1.5 * torch.sin(2.3 * PLACES + 1)


class Given:
    """Times that are known."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    def sample(self, noise: Any, like: Tensor) -> Tensor:
        return self.t / (1 - self.t)


def update(
    method: Any, roles: dict[str, Any], draws: Any = None, *, clock: Clock | None = None, real: Tensor = X
) -> Any:
    parts = type("Parts", (), roles)
    batch = Batch(real, coupling=Coupling(Z, 1.2 * X if isinstance(method, CAF) else X))
    (event,) = method.step(parts, batch, draws, clock or Clock(0, 0, 10))
    return event


CAF = (InitialVelocityLearning, ConstantAcceleration)


def close(event: Any, weights: list[nn.Parameter], loss: float | None, gradient: list[float]) -> None:
    if loss is not None:
        assert float(event.loss.detach().mean()) == pytest.approx(loss, rel=1e-12)
    found = torch.autograd.grad(event.loss.mean(), weights)
    torch.testing.assert_close(torch.stack(found), torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "gradient"),
    [
        ({"image": None}, [-0.009468632171030889, -0.011151781261833471]),
        ({"image": None, "velocity": "squared"}, [0.018136676566801957, -0.12696024820247487]),
        ({"image": None, "velocity": "root"}, [-0.05356324849355509, -0.06308429627913684]),
        ({}, [-0.35271279597687444, -0.1658696361096355]),
        ({"over_time": False}, [-0.3138487001498095, -0.13989649839597526]),
        ({"velocity": "none"}, [-0.36697913543074867, -0.1638125455706109]),
    ],
)
def test_rectified_flow_pp(settings: Any, gradient: list[float]) -> None:
    network = Network()
    roles = {"flow": VelocityFlow(network, time_scale=1.0), "features": Compares(7, 224, None, 0.5)}
    times: Any = Given(torch.tensor([0.07, 0.55, 0.93], dtype=torch.float64))
    close(update(RectifiedFlowPlusPlus(times=times, **settings), roles), [network.a, network.b], None, gradient)


@pytest.mark.parametrize(
    ("schedule", "loss", "gradient"),
    [
        ("linear", 2.0453793447048008, [0.5387573503743063, -0.20062411758568077]),
        ("exponential", 2.044409179618975, [0.542821335300731, -0.2009219679077494]),
        ("cosine", 2.0422079876127683, [0.5638590446703646, -0.1994361392323789]),
    ],
)
def test_annealing_reflow(schedule: Any, loss: float, gradient: list[float]) -> None:
    network = Network(turned=True)
    draws = Draws(1 - torch.tensor([0.11, 0.62, 0.97], dtype=torch.float64))
    method = AnnealingReflow(anneal_images=1200, schedule=schedule)
    event = update(method, {"flow": VelocityFlow(network, time_scale=1.0)}, draws, clock=Clock(100, 300, 10_000))
    close(event, [network.a, network.b], loss, gradient)


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({}, 8.766092021153257, [6.083179655798213, -0.00024982788965502835]),
        ({"beside": Distance(kind="l1")}, 10.34601683181597, [7.170024255180222, -0.0004562356230364209]),
        (
            {"beside": Distance(kind="l2"), "guidance": 0.0},
            11.86522453471054,
            [8.044432824979623, -0.00014768853948199276],
        ),
    ],
)
def test_flow_guided_distillation(settings: Any, loss: float, gradient: list[float]) -> None:
    network = Network(turned=True)
    student, teacher = (VelocityFlow(n, time_scale=1.0) for n in (network, Network(0.4, 0.1, turned=True)))
    roles = {"student": student, "teacher": teacher, "features": Compares(5, 64, True, 1.0)}
    draws = Draws(torch.tensor([0.3, 0.05, 0.8], dtype=torch.float64))
    close(update(FlowGuidedDistillation(**settings), roles, draws), [network.a, network.b], loss, gradient)


S = Draws(torch.tensor([0.0, 0.3, 0.9999], dtype=torch.float64))
"""On a thousand intervals and on ten: 0, 0.3 and 1."""


@pytest.mark.parametrize(
    ("settings", "velocity", "acceleration"),
    [
        (
            {"image": None, "regression": "squared"},
            (4.708390571434454, [1.0407334026595731, -0.2128097040288226]),
            (15.435417228885356, [2.1056579060078375, 0.028405176846102914]),
        ),
        (
            {"image": None},
            (0.37981268023627485, [0.0348842257875795, -0.010355593803833572]),
            (0.6926588977745385, [0.04342832844009988, 0.0007276522375710027]),
        ),
        (
            {},
            (1.715877767535034, [0.6536394347059803, -0.008903246572955869]),
            (3.628393750252542, [0.8348098843924135, -0.0017543181789909609]),
        ),
    ],
)
def test_constant_acceleration(settings: Any, velocity: Any, acceleration: Any) -> None:
    first, second, features = Network(), Network(0.5, 0.25), Compares(7, 224, None, 0.5)
    event = update(InitialVelocityLearning(**settings), {"flow": InitialVelocity(first), "features": features}, S)
    close(event, [first.a, first.b], *velocity)
    flow = AccelerationFlow(InitialVelocity(first), second)
    event = update(ConstantAcceleration(**settings), {"flow": flow, "features": features}, S)
    close(event, [second.a, second.b], *acceleration)


class Judge(nn.Module):
    """A discriminator of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return (self.w * images - 0.2).flatten(1)


def test_constant_acceleration_against_an_adversary() -> None:
    augment: Any = lambda images, noise: images  # noqa: E731
    method = ConstantAcceleration(image=None, intervals=10, adversarial=replace(ADVERSARY, augment=augment))
    second, judge = Network(0.5, 0.25), Judge()
    roles = {"flow": AccelerationFlow(InitialVelocity(Network()), second), "discriminator": judge}
    real = torch.sin(0.7 * PLACES)
    event = update(method, roles, S, real=real)
    assert float(event.parts["adversarial_weight"]) == 10
    close(event, [second.a, second.b], 2.720052851597433, [0.05224012018800328, 0.0007276522375710027])
    event = update(method, roles, S, clock=Clock(1, 1, 10), real=real)
    close(event, [judge.w], 2.713941204989303, [0.9177752858892076])


def test_draws_and_inversions_of_constant_acceleration() -> None:
    flow, five = AccelerationFlow(InitialVelocity(Network()), Network(0.5, 0.25)), Accelerated(num_steps=5)
    want = torch.tensor([1.0, -0.3234987179137705, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(five(flow, Z[:1]).flatten()[:6], want)
    want = torch.tensor([0.12840786806256646, 0.32293124338056445, 0.32293124338056445, 0.15369931172247828])
    got = five.invert(flow, (1.2 * X[:1]).clamp(-1, 1)).flatten()[:4]
    torch.testing.assert_close(got, want.double(), rtol=1e-6, atol=0)
    # The program's three steps begin at 0, 0.333 and 0.666.
    thirds = Accelerated(num_steps=3)(flow, Z[:1]).flatten()[1]
    assert float(thirds) == pytest.approx(-0.3312899249233579, abs=1e-4)


def test_straightness() -> None:
    z = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64).view(1, 1, 2, 2)
    flow = VelocityFlow(Network(), time_scale=1.0)
    assert float(straightness(flow, z, num_steps=8)) == pytest.approx(0.005274022435539365, rel=3e-4)
