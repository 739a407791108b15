"""Simple ReFlow: the weight that makes every loss one, the filter, and how they come together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.simple_reflow import HighPass, SimpleReflow, weighted
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import ExponentialTime
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1)
CLOCK = Clock(0, 0, 100)
PLAIN = HighPass(share=1.0)


def numbers(n: int, seed: int, channels: int = 1) -> Tensor:
    return StepNoise(seed).normal(torch.empty(n, channels, 8, 8, dtype=torch.float64))


def update(method: SimpleReflow) -> tuple[Update, Any, Coupling]:
    torch.manual_seed(1)
    network = SongUNet(SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8,
                                      channel_mult=(1,), num_blocks=1, attn_resolutions=()))  # fmt: skip
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    parts = method.parts(teacher=EDMPrecond(network).double().eval(), spec=SPEC)
    pair = Coupling(numbers(5, 1), 0.5 * numbers(5, 2))
    (event,) = method.step(parts, Batch(pair.images, coupling=pair), StepNoise(4), CLOCK)
    assert isinstance(event, Update)
    return event, parts, pair


def gradient(event: Update, parts: Any) -> Tensor:
    found = torch.autograd.grad(event.loss.sum(), list(parts.flow.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_one_over_its_own_loss_is_the_logarithms_gradient() -> None:
    event, parts, _ = update(SimpleReflow(metric=PLAIN))
    assert torch.equal(event.loss, torch.ones(5).double())
    plain, same, _ = update(SimpleReflow(metric=PLAIN, weight="one"))
    log = Update("flow", plain.loss.log())
    torch.testing.assert_close(gradient(event, parts), gradient(log, same))


def test_the_metrics_scale_drops_out_under_that_weight_alone() -> None:
    distance = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    for weight, same in (("loss", True), ("one", False)):
        a, b = (
            torch.autograd.grad(weighted(c * distance, distance.detach(), weight).sum(), distance)[0]  # type: ignore[arg-type]
            for c in (1.0, 9.0)
        )
        assert torch.allclose(a, b) is same


@pytest.mark.parametrize(("weight", "power"), [("one", 0), ("time", 1), ("velocity", 2)])
def test_the_loss_is_the_weighted_distance(weight: Any, power: int) -> None:
    event, parts, pair = update(SimpleReflow(weight=weight, metric=HighPass(share=0.4)))
    assert event.at is not None and torch.equal(event.at, ExponentialTime().sample(StepNoise(4), event.at))
    t = event.at / (1 + event.at)
    column = t[:, None, None, None]
    x = (1 - column) * pair.images + column * pair.latents
    answer = parts.flow(x / (1 - column), event.at, Condition())
    distance = HighPass(share=0.4)(answer - pair.images).square().flatten(1).mean(1)
    torch.testing.assert_close(event.loss, distance / t**power, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("side", [7, 8])
def test_the_filter_multiplies_frequencies(side: int) -> None:
    phi = HighPass(share=0.3)
    images = numbers(2, 3, 3)[:, :, :side, :side]
    want = torch.fft.ifft2(torch.fft.fft2(images) * phi.transfer(side)).real
    torch.testing.assert_close(phi(images), want)
    if side == 8:
        assert float(phi.transfer(8).max() / phi.transfer(8).min()) == pytest.approx(phi.condition)
    matrix = phi(torch.eye(side * side).double().view(-1, 1, side, side)).view(side * side, -1)
    assert float(torch.linalg.cond(matrix)) <= phi.condition + 1e-9
    assert PLAIN(images) is images


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"method.metric.share is 0.0; it must lie in .* a zero at frequency 0"):
        HighPass(share=0.0)
    with pytest.raises(UserError, match=r"method.weight is 'snr'; allowed: loss, time, velocity, one"):
        SimpleReflow(weight="snr")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stored pairs"):
        SimpleReflow().parts(teacher=EDMPrecond(nn.Identity()), spec=SPEC, couplings=False)
