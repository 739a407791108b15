"""Flow matching: the loss and its minimum, the couplings, what a flow may start from."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.flow_matching import FlowMatching, on_path
from imagewright.methods.noise_couplings import AnyCoupling, Independent, Stored, Transported, nearest
from imagewright.models.flow import EDMFlow, VelocityFlow
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import ExponentialTime, LogitNormal, UniformTime, UShaped
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Parts, Trained, Update, UserError

SPEC = DataSpec(name="toy", resolution=4, channels=1)
CLOCK = Clock(0, 0, 100)


def numbers(n: int, seed: int = 0) -> Tensor:
    return StepNoise(seed).normal(torch.empty(n, 1, 4, 4, dtype=torch.float64))


class Linear(nn.Module):
    """v = a(t) x + b(t), the form of the exact velocity for Gaussian data."""

    def __init__(self, mu: float, s: float) -> None:
        super().__init__()
        self.mu, self.s = mu, s
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        t = (label / 999)[:, None, None, None]
        variance = (1 - t) ** 2 * self.s**2 + t**2
        slope = (t - (1 - t) * self.s**2) / variance
        return -self.mu + slope * (x - (1 - t) * self.mu) + self.shift


def update(method: FlowMatching, flow: nn.Module, batch: Batch, seed: int = 1) -> Update:
    (event,) = method.step(Parts(flow=Trained(module=flow)), batch, StepNoise(seed), CLOCK)
    assert isinstance(event, Update)
    return event


def test_the_exact_velocity_is_where_the_loss_is_least() -> None:
    mu, s = 0.3, 0.5
    flow = VelocityFlow(Linear(mu, s))
    batch = Batch(mu + s * numbers(20_000))
    loss = update(FlowMatching(), flow, batch).loss.mean()
    (slope,) = torch.autograd.grad(loss, flow.network.shift)
    assert abs(float(slope)) < 0.01
    # E|z - x0|^2 given x_t, integrated over t: what no network can take off.
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    least = torch.trapezoid(s**2 / ((1 - t) ** 2 * s**2 + t**2), t)
    assert float(loss.detach()) == pytest.approx(float(least), rel=0.01)
    with torch.no_grad():
        flow.network.shift += 0.3
    moved = update(FlowMatching(), flow, batch).loss.mean()
    assert float(moved.detach()) == pytest.approx(float(loss.detach()) + 0.09, rel=0.02)


@pytest.mark.parametrize("law", [UniformTime(), LogitNormal(), UShaped(), ExponentialTime()])
def test_points_lie_on_the_path(law: UniformTime) -> None:
    pair = Coupling(numbers(2000, 1), numbers(2000, 2))
    point = on_path(pair, law, StepNoise(5))
    column = point.t[:, None, None, None]
    torch.testing.assert_close(point.x_t, pair.images + column * point.velocity)
    torch.testing.assert_close(point.t / (1 - point.t), point.sigma)
    want = {"UniformTime": 0.5, "LogitNormal": 0.5, "UShaped": 0.5, "ExponentialTime": 10 / 9 - 1 / 2.302585}
    assert float(point.t.mean()) == pytest.approx(want[type(law).__name__], abs=0.03)


def test_transport_is_the_best_permutation() -> None:
    images, latents = numbers(5, 1), numbers(5, 2)
    cost = {p: float((images - latents[list(p)]).square().sum()) for p in permutations(range(5))}
    assert tuple(nearest(images, latents).tolist()) == min(cost, key=cost.__getitem__)
    pair = Transported()(Batch(images), StepNoise(3))
    fresh = Independent()(Batch(images), StepNoise(3))
    assert torch.equal(pair.images, images)
    assert torch.equal(pair.latents, fresh.latents[nearest(images, fresh.latents)])


def test_stored_pairs_keep_their_own_classes() -> None:
    stored = Coupling(numbers(3, 1), numbers(3, 2), Condition(label=torch.tensor([2, 1, 0])))
    batch = Batch(numbers(3, 4), Condition(label=torch.zeros(3).long()), stored)
    assert Stored()(batch, StepNoise(0)) is stored
    assert Independent()(batch, StepNoise(0)).cond is batch.cond


def unet() -> nn.Module:
    return SongUNet(SongUNetConfig(img_resolution=4, in_channels=1, out_channels=1, model_channels=8,
                                   channel_mult=(1,), num_blocks=1, attn_resolutions=()))  # fmt: skip


def test_a_flow_starts_from_a_network_or_from_a_teacher() -> None:
    assert type(FlowMatching().parts(spec=SPEC, network=unet()).flow) is VelocityFlow
    assert type(FlowMatching(preconditioning="edm").parts(spec=SPEC, network=unet()).flow) is EDMFlow
    teacher = EDMPrecond(unet())
    flow = FlowMatching().parts(spec=SPEC, teacher=teacher).flow
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), teacher.parameters(), strict=True))
    with pytest.raises(UserError, match=r"from a network or from a teacher .*, and neither is given"):
        FlowMatching().parts(spec=SPEC)
    with pytest.raises(UserError, match="and both are given"):
        FlowMatching().parts(spec=SPEC, network=unet(), teacher=teacher)
    with pytest.raises(UserError, match="preconditioning is 'edm'; it has no effect with a teacher"):
        FlowMatching(preconditioning="edm").parts(spec=SPEC, teacher=teacher)
    with pytest.raises(UserError, match=r"dropout is 0.1; without a teacher it is network.dropout"):
        FlowMatching(dropout=0.1).parts(spec=SPEC, network=unet())


@pytest.mark.parametrize(
    ("coupling", "couplings", "message"),
    [
        (Stored(), False, "method.coupling is stored pairs: give data.couplings"),
        (Independent(), True, "method.coupling is independent; data.couplings has no effect"),
        (Transported(), True, "method.coupling is transported; data.couplings has no effect"),
    ],
)
def test_pairs_and_coupling_fit(coupling: AnyCoupling, couplings: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowMatching(coupling=coupling).parts(spec=SPEC, network=unet(), couplings=couplings)
