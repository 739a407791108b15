"""The velocity direction loss: its value at the start, where it is least, and when it counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imagewright.methods.flow_matching import FlowMatching, off_course
from imagewright.models.flow import VelocityFlow
from imagewright.networks import DiT, DiTConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogitNormal, UniformTime, UShaped
from imagewright.types import Batch, Clock, Condition, DataSpec, Parts, Trained, Update, UserError

SPEC = DataSpec(name="toy", resolution=4, channels=3)
CLOCK = Clock(0, 0, 100)
METHOD = FlowMatching(times=LogitNormal(), direction=1.0, time_scale=1.0)


def fresh() -> VelocityFlow:
    config = DiTConfig(img_resolution=4, in_channels=3, out_channels=3, width=16, depth=1, heads=2)
    return VelocityFlow(DiT(config).double(), time_scale=1.0)


def update(method: FlowMatching, flow: VelocityFlow, clock: Clock = CLOCK, n: int = 8) -> Update:
    batch = Batch(StepNoise(7).normal(torch.empty(n, 3, 4, 4, dtype=torch.float64)))
    (event,) = method.step(Parts(flow=Trained(module=flow)), batch, StepNoise(1), clock)
    assert isinstance(event, Update)
    return event


def test_at_the_start_the_loss_is_the_mean_square_and_one() -> None:
    event, plain = update(METHOD, fresh()), update(replace(METHOD, direction=0.0), fresh())
    torch.testing.assert_close(event.loss, plain.loss + 1, rtol=1e-12, atol=0)
    quarter = update(replace(METHOD, direction=0.25), fresh()).loss
    torch.testing.assert_close(quarter, plain.loss + 0.25, rtol=1e-12, atol=0)
    images, z = (StepNoise(k).normal(torch.empty(8, 3, 4, 4, dtype=torch.float64)) for k in (7, 1))
    torch.testing.assert_close(plain.loss, (z - images).square().flatten(1).mean(1), rtol=1e-12, atol=0)


def test_it_is_the_angle_over_channels_whatever_the_length() -> None:
    v, u = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    cosine = (v * u).sum(1) / (v.norm(dim=1) * u.norm(dim=1))
    torch.testing.assert_close(off_course(v, u), 1 - cosine.mean((1, 2)))
    torch.testing.assert_close(off_course(3 * v, 0.2 * u), off_course(v, u))
    torch.testing.assert_close(off_course(-u, u), torch.full((5,), 2.0, dtype=torch.float64))


def test_its_first_gradient_is_huge() -> None:
    """At a guess of zero it is 1 / 1e-8 in length, per pixel, as the released program's."""
    u = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    v = torch.zeros_like(u, requires_grad=True)
    (slope,) = torch.autograd.grad(off_course(v, u).sum(), v)
    torch.testing.assert_close(slope, -u / u.norm() * 1e8)


def test_the_law_of_time_changes_in_the_middle() -> None:
    method = replace(METHOD, uniform_from_images=0.5)
    assert method.times_at(Clock(0, 49, 100)) == LogitNormal() and method.times_at(Clock(0, 50, 100)) == UniformTime()
    counted = replace(METHOD, uniform_from_images=30)
    assert counted.times_at(Clock(0, 29, 100)) == LogitNormal() and counted.times_at(Clock(0, 30, 100)) == UniformTime()
    early, late = (update(method, fresh(), Clock(0, images, 100), n=2000).at for images in (0, 50))
    assert early is not None and late is not None
    variance = [float((s / (1 + s)).var()) for s in (early, late)]
    assert variance[0] == pytest.approx(0.0433, rel=0.1) and variance[1] == pytest.approx(1 / 12, rel=0.1)


def posterior(x_t: Tensor, t: float, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """Velocities that lead from x_t [C] back to each of some images [K, C], and how probable each is."""
    velocities = (x_t - atoms) / t
    weight = torch.softmax(-0.5 * ((x_t - (1 - t) * atoms) / t).square().sum(1), 0)
    return velocities, weight


@pytest.mark.parametrize("t", [0.4, 0.8])
def test_alone_it_is_least_at_the_mean_of_directions_and_that_is_not_the_means(t: float) -> None:
    """Exact check of the paper's notes: E[u / |u|], found by descent on the loss itself."""
    atoms = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.3, -0.4, 1.0]], dtype=torch.float64)
    velocities, weight = posterior(torch.tensor([0.4, 0.5, 0.2], dtype=torch.float64), t, atoms)
    v = torch.ones(3, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([v], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        descent.zero_grad()
        loss = (weight * off_course(v.expand(3, 3)[..., None, None], velocities[..., None, None])).sum()
        loss.backward()
        return loss

    descent.step(closure)
    found = v.detach() / v.detach().norm()
    directions = (weight[:, None] * velocities / velocities.norm(dim=1, keepdim=True)).sum(0)
    torch.testing.assert_close(found, directions / directions.norm(), rtol=1e-5, atol=1e-6)
    mean = (weight[:, None] * velocities).sum(0)
    assert angle(directions, mean) > 2.0


def angle(a: Tensor, b: Tensor) -> float:
    """In degrees."""
    return math.degrees(math.acos(min(float((a @ b) / (a.norm() * b.norm())), 1.0)))


def bias(t: float, weight: float) -> tuple[float, float]:
    """How far the velocity at which squares plus `weight` times the direction's loss are least is from E[u], and how
    far u itself is: root mean squares over points at a time, of 8 modes on a ring, in two channels.
    """
    ring = torch.arange(8, dtype=torch.float64) * math.pi / 4
    oracle, noise = GaussianMixture(torch.stack([ring.cos(), ring.sin()], 1), 0.1), StepNoise(3)
    atoms, x0 = oracle.sample(1000, StepNoise(4)), oracle.sample(100, noise)
    x_t = (1 - t) * x0 + t * noise.normal(x0)
    velocities, share = zip(*(posterior(x, t, atoms) for x in x_t), strict=True)
    u, p = torch.stack(velocities), torch.stack(share)[..., None]  # [100, 1000, 2 or 1]
    mean, towards = (p * u).sum(1), (p * u / u.norm(dim=2, keepdim=True)).sum(1)
    # At a direction d the squares, halved by the two channels, have their best length in closed form: E[u] along d.
    angles = torch.arange(3600, dtype=torch.float64) * math.pi / 1800
    d = torch.stack([angles.cos(), angles.sin()], 1)
    along = (mean @ d.mT).clamp(min=0)
    best = (along**2 / 2 + weight * towards @ d.mT).argmax(1)
    found = along.gather(1, best[:, None]) * d[best]
    spread = (p * (u - mean[:, None]).square()).sum((1, 2)).mean().sqrt()
    return float((found - mean).square().sum(1).mean().sqrt()), float(spread)


def test_how_far_off_it_is_on_an_oracle() -> None:
    """Beside the squares it moves their minimum by 2 to 9 % of what the velocities of a point scatter, most in the
    middle, where the mean of many directions is short: a bias, which the squares alone have not.
    """
    moved = {t: bias(t, 1.0) for t in (0.2, 0.5, 0.8)}
    share = {t: apart / spread for t, (apart, spread) in moved.items()}
    assert share[0.2] == pytest.approx(0.022, abs=0.01) and share[0.8] == pytest.approx(0.016, abs=0.01)
    assert share[0.5] == pytest.approx(0.093, abs=0.03)
    assert bias(0.5, 0.0)[0] < 2e-3  # the angles' steps


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match="one channel"):
        METHOD.parts(spec=replace(SPEC, channels=1), network=torch.nn.Identity())
    for settings, says in (
        ({"uniform_from_images": 10}, "uniform times"),
        ({"time_scale": 1.0, "preconditioning": "edm"}, "EDM's preconditioning"),
        ({"direction": -1.0}, "must be >= 0"),
        ({"times": UShaped(), "uniform_from_images": -1}, "must be >= 0"),
    ):
        with pytest.raises(UserError, match=says):
            FlowMatching(**settings)  # type: ignore[arg-type]
    teacher = fresh()
    with pytest.raises(UserError, match="time_scale"):
        FlowMatching(time_scale=1.0).parts(spec=SPEC, teacher=teacher)


def test_it_learns_a_flow_that_is_told_the_time_as_it_is() -> None:
    flow = METHOD.parts(spec=SPEC, network=fresh().network).flow
    assert flow.time_scale == 1.0 and not flow.from_noise
    told: list[Tensor] = []
    flow.network.forward = lambda x, label, cond: told.append(label) or x
    flow.velocity(torch.zeros(2, 3, 4, 4), torch.tensor([0.25, 0.5]), Condition())
    assert told[0].tolist() == [0.25, 0.5]
