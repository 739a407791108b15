"""Constant acceleration flow: its path, its losses, draws and inversions against the official program's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.caf import ADVERSARY, ConstantAcceleration, InitialVelocityLearning, on_path
from imagewright.methods.distances import Distance
from imagewright.models.acceleration import AccelerationFlow, InitialVelocity, advanced, progress_of
from imagewright.models.description import build, describe
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.flow import VelocityFlow
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.samplers import Accelerated
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Frozen, Parts, Trained, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=0)
L2 = Distance(kind="l2")
Z = torch.tensor([[0.5, -1.0], [1.5, 0.2]], dtype=torch.float64).view(1, 1, 2, 2)
X = torch.tensor([[0.1, -0.6], [0.9, 0.3]], dtype=torch.float64).view(1, 1, 2, 2)
REAL = torch.tensor([[-0.4, 0.8], [0.3, -0.2]], dtype=torch.float64).view(1, 1, 2, 2)
BATCH = Batch(REAL, coupling=Coupling(Z, X))


class Official(nn.Module):
    """The network that the official program was run with: it sees v0 behind the image's channels, or not."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.a

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        v0 = x[:, 1:] if x.shape[1] == 2 else 0.0
        return torch.tanh(self.a * x[:, :1] + 0.3 * v0 + label[:, None, None, None])


class Judge(nn.Module):
    """The discriminator that it was run with."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return (self.w * images - 0.2).flatten(1)


class Third:
    """The draw that gives s = 0.3 on ten intervals or on a thousand."""

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(like, 0.3001)


def stage(velocity: float = 0.4, acceleration: float = 0.7, **more: Any) -> Parts:
    flow = AccelerationFlow(InitialVelocity(Official(velocity)), Official(acceleration))
    return Parts(flow=Trained(module=flow), **more)


def update(method: Any, parts: Parts, step: int = 0, noise: Any = None) -> Update:
    (event,) = method.step(parts, BATCH, noise or Third(), Clock(step, step, 10))
    assert isinstance(event, Update)
    return event


def slope(event: Update, network: nn.Module) -> float:
    (found,) = torch.autograd.grad(event.loss.sum(), network.a, retain_graph=True)  # type: ignore[arg-type]
    return float(found)


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({"image": None}, 0.5600353557000631, 0.18951574605396515),
        ({"image": None, "regression": "squared"}, 1.2569777512730091, 0.8499028540397148),
        ({"image": L2}, 0.7916884922363185, 0.3591660964855567),
    ],
)
def test_the_velocitys_loss_is_the_official_programs(settings: Any, loss: float, gradient: float) -> None:
    network = Official(0.7)
    method = InitialVelocityLearning(**settings)
    event = update(method, method.parts(network=network, spec=SPEC))
    assert float(event.loss.detach()) == pytest.approx(loss, rel=1e-12)
    assert slope(event, network) == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({"image": None}, 1.0549865276269863, 0.18226775179874943),
        ({"image": None, "regression": "squared"}, 4.456543835697132, 1.5391075772360914),
        ({"image": L2}, 1.977602515212185, 0.5009014979760511),
    ],
)
def test_the_accelerations_loss_is_the_official_programs(settings: Any, loss: float, gradient: float) -> None:
    parts = stage()
    event = update(ConstantAcceleration(**settings), parts)
    assert float(event.loss.detach()) == pytest.approx(loss, rel=1e-12)
    assert slope(event, parts.flow.network) == pytest.approx(gradient, rel=1e-12)
    assert all(not p.requires_grad for p in parts.flow.velocity.parameters())


class Unaltered:
    """No augmentation."""

    def __call__(self, images: Tensor, noise: Any) -> Tensor:
        return images


def adversary(**settings: Any) -> Any:
    return replace(ADVERSARY, augment=Unaltered(), **settings)


def test_the_adversarys_weight_and_losses_are_the_official_programs() -> None:
    method = ConstantAcceleration(image=None, intervals=10, adversarial=adversary())
    parts = stage(discriminator=Trained(module=Judge(), ema=False))
    event = update(method, parts)
    assert event.part == "flow"
    assert float(event.parts["adversarial_weight"]) == pytest.approx(4.309532597337194, rel=1e-12)
    assert float(event.loss.detach()) == pytest.approx(1.0549865276269863 - 1.9281842949789223, rel=1e-12)
    assert slope(event, parts.flow.network) == pytest.approx(-0.18183679853901574, rel=1e-12)
    other = update(method, parts, step=1)
    assert other.part == "discriminator"
    assert float(other.loss.detach()) == pytest.approx(2.842571144435531, rel=1e-12)


def test_the_adversarys_weight_is_clipped_and_it_begins_when_told() -> None:
    parts = stage(discriminator=Trained(module=Judge(), ema=False))
    low = ConstantAcceleration(image=None, intervals=10, adversarial=adversary(most_weight=0.5))
    assert float(update(low, parts).parts["adversarial_weight"]) == 0.5
    late = ConstantAcceleration(image=None, intervals=10, adversarial=adversary(start=0.5))
    assert update(late, parts, step=1).part == "flow" and "adversarial" not in update(late, parts).parts
    assert update(late, parts, step=5).part == "discriminator"


DRAWN = {
    1: [0.891277270117449, -1.0, 1.0, 0.3610775755308551],
    2: [1.0, -1.0, 1.0, 0.5282280759341139],
    4: [1.0, -1.0, 1.0, 0.5909543379375454],
}
INVERTED = {
    1: [-1.1091817053594162, -1.5652160890146822, -0.4542065865578503, -0.9556393925939837],
    2: [-1.0383065880259168, -1.4689785771112769, -0.42016903923212345, -0.8947441512286396],
    4: [-0.9961783222318715, -1.4091221436996917, -0.39803301911884, -0.858116468267356],
}


@pytest.mark.parametrize("steps", DRAWN)
def test_draws_and_inversions_are_the_official_programs(steps: int) -> None:
    flow, sampler = stage().flow, Accelerated(num_steps=steps)
    torch.testing.assert_close(sampler(flow, Z).flatten(), torch.tensor(DRAWN[steps], dtype=torch.float64))
    got = sampler.invert(flow, X).flatten()
    torch.testing.assert_close(got, torch.tensor(INVERTED[steps], dtype=torch.float64))


class True_(nn.Module):
    """Answers what it was given, whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
        return self.answer.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 1.9])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_any_number_of_steps_is_exact_with_the_true_velocity_and_acceleration(alpha: float, steps: int) -> None:
    v0 = alpha * (X - Z)
    flow = AccelerationFlow(InitialVelocity(True_(v0), alpha=alpha), True_(2 * (X - Z) - 2 * v0))
    sampler = Accelerated(num_steps=steps, clip=False)
    torch.testing.assert_close(sampler(flow, Z), X, rtol=0, atol=1e-12)
    torch.testing.assert_close(sampler.invert(flow, X), Z, rtol=0, atol=1e-12)
    seen: list[Tensor] = []
    sampler(flow, Z, on_step=lambda x, x0, sigma: seen.append(x0))
    torch.testing.assert_close(torch.stack(seen), X.expand(steps, 1, 1, 2, 2), rtol=0, atol=1e-12)
    # The same as a map between noise levels.
    levels = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    at, to = (X + level * Z for level in levels)
    torch.testing.assert_close(flow(at, *levels), to, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_the_path_ends_at_the_pair_and_is_the_straight_line_at_another_pace(alpha: float) -> None:
    pair, one = Coupling(Z, X), torch.ones(1, dtype=torch.float64)
    for v0 in (Z, alpha * (X - Z)):
        torch.testing.assert_close(on_path(pair, v0, 0 * one), Z)
        torch.testing.assert_close(on_path(pair, v0, one), X)
        s = 0.37 * one
        end = advanced(on_path(pair, v0, s), v0, 2 * (X - Z) - 2 * v0, s, one)
        torch.testing.assert_close(end, X, rtol=0, atol=1e-12)
    b = alpha * 0.37 + (1 - alpha) * 0.37**2
    torch.testing.assert_close(on_path(pair, alpha * (X - Z), 0.37 * one), (1 - b) * Z + b * X)
    torch.testing.assert_close(progress_of(one * (1 - b) / b, alpha), 0.37 * one)


def test_with_alpha_1_the_velocity_is_a_flow() -> None:
    class Turned(Official):
        def forward(self, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
            return -super().forward(x, 1 - label, cond)

    sigma = torch.tensor([0.7], dtype=torch.float64)
    ours, flow = InitialVelocity(Official(0.7), alpha=1.0), VelocityFlow(Turned(0.7), time_scale=1.0)
    torch.testing.assert_close(ours(Z, sigma), flow(Z, sigma))
    torch.testing.assert_close(
        ours.velocity(Z, torch.tensor([0.3], dtype=torch.float64)),
        flow.velocity(Z, torch.tensor([0.3], dtype=torch.float64)),
    )


def unet(channels: int = 1) -> SongUNet:
    return SongUNet(SongUNetConfig(img_resolution=8, in_channels=channels, out_channels=1, model_channels=8,
                                   channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.5))  # fmt: skip


def test_the_stages_fit_together_and_are_kept(tmp_path: Path) -> None:
    first = InitialVelocityLearning(image=L2, alpha=1.2).parts(network=unet(), spec=SPEC).flow
    parts = ConstantAcceleration(image=L2, adversarial=ADVERSARY).parts(network=unet(), velocity=first, spec=SPEC)
    flow = parts.flow
    assert flow.network.config.in_channels == 2 and flow.velocity.alpha == 1.2
    flow.train()
    assert flow.network.training and not flow.velocity.training  # or dropout would be in what it is shown
    again = build(describe(flow))
    again.load_state_dict(flow.state_dict())
    generator = ImageGenerator(again, SPEC, Accelerated(num_steps=3))
    assert generator.nfe == 4 and generator.inversion_nfe == 4 and generator.generate(2).shape == (2, 8, 8, 1)
    assert ImageGenerator(again, SPEC).sampler == Accelerated()
    assert list(parts.roles) == ["flow", "discriminator"]
    save_model(tmp_path, ModelFile(model=flow, spec=SPEC))
    kept = load_model(tmp_path).model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in flow.state_dict().items())


def test_times_lie_on_their_intervals() -> None:
    like = torch.empty(20_000)
    s = ConstantAcceleration(image=None, intervals=10).times(StepNoise(1), like)
    counts = torch.bincount((10 * s).round().long())
    assert torch.equal(s, (10 * s).round() / 10) and len(counts) == 11
    assert counts.min() > 1600 and counts.max() < 2050  # of 1818: the ends are as likely as the rest
    ends = ConstantAcceleration(image=None, towards_ends=True).times(StepNoise(1), like)
    assert float((ends < 0.1).double().mean()) > 0.15 and float((ends > 0.9).double().mean()) > 0.15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InitialVelocityLearning(alpha=2.0), r"method.alpha is 2.0; it must lie in \(0, 2\)"),
        (lambda: ConstantAcceleration(regression="l3"), "method.regression is 'l3'; allowed: huber, squared"),
        (lambda: ConstantAcceleration(intervals=0), "method.intervals is 0"),
        (lambda: ConstantAcceleration(intervals=5, towards_ends=True), "method.intervals is 5; it has no effect"),
        (lambda: InitialVelocityLearning().parts(network=unet(), spec=SPEC), "it needs a feature network"),
        (
            lambda: InitialVelocityLearning(image=None).parts(network=unet(), spec=SPEC, couplings=False),
            "method.coupling is stored pairs",
        ),
        (
            lambda: ConstantAcceleration(image=None).parts(network=unet(), velocity=VelocityFlow(unet()), spec=SPEC),
            "velocity is a VelocityFlow; this method takes what InitialVelocityLearning has made",
        ),
        (
            lambda: ConstantAcceleration(image=None).parts(
                network=Official(1.0), velocity=InitialVelocity(unet()), spec=SPEC
            ),
            "the network is an Official, whose number of channels cannot be doubled",
        ),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_frozen_features_are_a_part() -> None:
    class Maps(nn.Module):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [images]

    parts = InitialVelocityLearning().parts(network=unet(), spec=SPEC, features=Maps())
    assert isinstance(parts.roles["features"], Frozen)
