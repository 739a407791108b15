"""2-rectified flow++: its premetric, where its flow begins, and the official program's numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.distances import Distance
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus, velocity_loss
from imagewright.models.flow import flow_of
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import UniformTime, UShaped
from imagewright.samplers import Straight
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
CLOCK = Clock(0, 0, 100)
L2 = Distance(kind="l2")


class Official(nn.Module):
    """The network that the official program was run with."""

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        return torch.tanh(0.7 * x + label[:, None, None, None])


Z = torch.tensor([[0.5, -1.0], [1.5, 0.2]]).view(1, 1, 2, 2)
X = torch.tensor([[0.1, -0.6], [0.9, 0.3]]).view(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("t", "want"),
    [
        (0.3, [-0.24668255, 0.43035704, -0.16802628, 0.01827071]),
        (0.9, [0.13124728, -0.95298076, 1.09554291, -0.12148121]),
        (1 - 1e-5, [0.00156771, -1.48734236, 1.00039363, -0.29761755]),
    ],
)
def test_velocities_are_the_official_programs(t: float, want: list[float]) -> None:
    got = flow_of(EDMPrecond(Official())).velocity(Z, torch.tensor([t], dtype=torch.float64))  # type: ignore[operator]
    torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("sampler", "want"),
    [
        (Straight(num_steps=3, order=1), [0.48498261, -0.50274765, 0.96457744, 0.29889050]),
        (Straight(num_steps=3, order=1, keep_noise=True), [0.46090370, -0.62957597, 0.98465812, 0.25115088]),
        (Straight(num_steps=3), [0.51492631, -0.79411244, 1.13529289, 0.24659151]),
        (Straight(num_steps=3, keep_noise=True), [0.52372217, -0.88167632, 1.18930531, 0.22573876]),
    ],
)
def test_draws_are_the_official_programs(sampler: Straight, want: list[float]) -> None:
    got = sampler(flow_of(EDMPrecond(Official())), Z)
    torch.testing.assert_close(got.float().flatten(), torch.tensor(want), rtol=1e-4, atol=1e-4)


class Given:
    """Noise that is known."""

    def normal(self, like: Tensor) -> Tensor:
        return Z.to(like)


@pytest.mark.parametrize(
    ("sampler", "want"),
    [
        (Straight(num_steps=4, order=1), [0.28561664, -0.13032214, 0.76990134, 0.40288517]),
        (Straight(num_steps=3, keep_noise=True), [0.21829732, -0.36051854, 0.96139431, 0.38947764]),
    ],
)
def test_inversions_are_the_official_programs(sampler: Straight, want: list[float]) -> None:
    got = sampler.invert(flow_of(EDMPrecond(Official())), X, noise=Given())  # type: ignore[arg-type]
    torch.testing.assert_close(got.float().flatten(), torch.tensor(want), rtol=1e-4, atol=1e-4)


def numbers(n: int, seed: int) -> Tensor:
    return StepNoise(seed).normal(torch.empty(n, 1, 8, 8, dtype=torch.float64))


def test_hubers_limits() -> None:
    d, c = 64, 0.00054 * 64
    r = numbers(3, 1).requires_grad_()
    zero = torch.zeros_like(r, requires_grad=True)
    (slope,) = torch.autograd.grad(velocity_loss("huber", zero, 0.00054).sum(), zero)
    assert float(velocity_loss("huber", zero, 0.00054).sum()) == 0 and not slope.any()
    square = r.detach().flatten(1).square().sum(1)
    small, large = (velocity_loss("huber", s * r.detach(), 0.00054) for s in (1e-5, 1e4))
    torch.testing.assert_close(small, 1e-10 * square / (2 * c * d), rtol=1e-4, atol=0)
    torch.testing.assert_close(large, (1e4 * square.sqrt() - c) / d, rtol=1e-6, atol=0)
    torch.testing.assert_close(velocity_loss("squared", r, 1.0), r.square().flatten(1).mean(1))
    torch.testing.assert_close(velocity_loss("root", r, 1.0), r.square().flatten(1).mean(1).sqrt())
    assert torch.autograd.gradcheck(lambda x: velocity_loss("huber", x, 0.05), r)


def unet() -> nn.Module:
    torch.manual_seed(3)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.3)  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network


def update(method: RectifiedFlowPlusPlus, **more: Any) -> tuple[Update, Any, Coupling]:
    parts = method.parts(teacher=EDMPrecond(unet()).double().eval(), spec=SPEC, **more)
    pair = Coupling(numbers(6, 1), 0.5 * numbers(6, 2), Condition(label=torch.arange(6) % 3))
    batch = Batch(torch.zeros(6, 1, 8, 8).double(), Condition(label=torch.zeros(6).long()), pair)
    (event,) = method.step(parts, batch, StepNoise(4), CLOCK)
    assert isinstance(event, Update)
    return event, parts, pair


@pytest.mark.parametrize("over_time", [True, False])
def test_the_loss_is_the_premetric(over_time: bool) -> None:
    event, parts, pair = update(RectifiedFlowPlusPlus(image=L2, over_time=over_time))
    assert event.at is not None
    t = event.at / (1 + event.at)
    assert torch.equal(event.at, UShaped().sample(StepNoise(4), event.at))
    column = t[:, None, None, None]
    x_t = (1 - column) * pair.images + column * pair.latents
    v = parts.flow.velocity(x_t, t, pair.cond)
    off, image = v - (pair.latents - pair.images), (x_t - column * v - pair.images).square().flatten(1).mean(1)
    want = (1 - t) * velocity_loss("huber", off, 0.00054) + (image / t if over_time else image)
    torch.testing.assert_close(event.loss, want, rtol=1e-6, atol=1e-9)
    assert set(event.parts) == {"velocity", "image"}


def test_without_an_image_distance_the_velocity_counts_alike_at_all_times() -> None:
    method = RectifiedFlowPlusPlus(image=None, velocity="squared", times=UniformTime())
    event, parts, pair = update(method)
    assert event.at is not None
    t = event.at / (1 + event.at)
    column = t[:, None, None, None]
    v = parts.flow.velocity((1 - column) * pair.images + column * pair.latents, t, pair.cond)
    torch.testing.assert_close(event.loss, (v - pair.latents + pair.images).square().flatten(1).mean(1))


def test_the_flow_begins_as_the_teachers_or_afresh() -> None:
    teacher = EDMPrecond(unet())
    same = RectifiedFlowPlusPlus(image=None, dropout=0.1).parts(teacher=teacher, spec=SPEC).flow
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), teacher.parameters(), strict=True))
    assert same.network.config.dropout == 0.1
    other = RectifiedFlowPlusPlus(image=None, start="fresh").parts(teacher=teacher, spec=SPEC).flow
    assert [p.shape for p in other.parameters()] == [p.shape for p in teacher.parameters()]
    assert not torch.equal(next(other.parameters()), next(teacher.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlowPlusPlus(velocity="l3"), "method.velocity is 'l3'; allowed: huber, squared, root, none"),
        (lambda: RectifiedFlowPlusPlus(start="x"), "method.start is 'x'; allowed: teacher, fresh"),
        (lambda: RectifiedFlowPlusPlus(huber_c=0.0), "method.huber_c is 0.0; it must be positive"),
        (lambda: RectifiedFlowPlusPlus(velocity="none", image=None), "nothing would be learnt"),
        (lambda: RectifiedFlowPlusPlus(image=None, over_time=False), "it has no effect without method.image"),
        (lambda: update(RectifiedFlowPlusPlus()), "it needs a feature network"),
        (lambda: update(RectifiedFlowPlusPlus(image=L2), couplings=False), "method.coupling is stored pairs"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_density_of_times_is_the_programs() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    got = UShaped().density(t / (1 - t)) / (1 - t) ** 2
    want = 4 * ((4 * t).exp() + (4 * (1 - t)).exp()) / (2 * (math.exp(4) - 1))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    assert replace(RectifiedFlowPlusPlus(), image=L2).times == UShaped(sharpness=4.0, margin=1e-5)
