"""DMD: what each update is made of, what it needs, and where gradients go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.distances import Distance
from imagewright.methods.distribution_matching import KarrasLevels, fresh_noise, generate, matching_loss
from imagewright.methods.dmd import DMD
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Condition, Coupling, DataSpec, Parts, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
CLOCK = Clock(0, 0, 1000)
ALONE = DMD(regression_weight=0.0)
L2 = Distance(kind="l2")


def numbers(n: int, seed: int = 0) -> Tensor:
    return StepNoise(seed).normal(torch.empty(n, 1, 8, 8, dtype=torch.float64))


def learnt_parts(method: DMD, **more: Any) -> Parts:
    """In float64; the fake score and the generator are moved away from the teacher."""
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1, 1), num_blocks=1, attn_resolutions=())  # fmt: skip
    parts = method.parts(teacher=EDMPrecond(SongUNet(config)).double(), spec=SPEC, **more)
    for name in ("generator", "fake_score"):
        for p in getattr(parts, name).parameters():
            p.data += 0.05 * torch.randn_like(p)
    parts.teacher.requires_grad_(False).eval()
    return parts


def coupling(n: int) -> Coupling:
    return Coupling(numbers(n, 7), 0.5 * numbers(n, 8), Condition(label=torch.arange(n) % 3))


def run(method: DMD, parts: Parts, pairs: Coupling | None = None, n: int = 6) -> list[Update]:
    images = Batch(torch.zeros(n, 1, 8, 8).double(), Condition(label=torch.zeros(n).long()), pairs)
    return [e for e in method.step(parts, images, StepNoise(3), CLOCK) if isinstance(e, Update)]


def test_the_fake_score_learns_once_for_each_update_of_the_generator() -> None:
    parts = learnt_parts(ALONE)
    updates = run(ALONE, parts)
    assert [u.part for u in updates] == ["generator", "fake_score"]
    assert all(u.loss.shape == (6,) and u.loss.dtype == torch.float64 for u in updates)
    assert updates[0].parts.keys() == {"matching", "diversity"}


def test_gradients_stay_in_the_part_that_learns() -> None:
    parts = learnt_parts(ALONE)
    first, second = run(ALONE, parts)
    first.loss.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.generator.parameters())
    assert all(p.grad is None for p in parts.fake_score.parameters())
    parts.generator.zero_grad()
    second.loss.sum().backward()
    assert all(p.grad is None for p in parts.generator.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.fake_score.parameters())


def test_the_loss_is_matching_plus_weighted_regression() -> None:
    method = DMD(regression=L2)
    parts, pairs = learnt_parts(method), coupling(6)
    update = run(method, parts, pairs)[0]
    noise = StepNoise(3)
    like = torch.empty(6, 1, 8, 8).double()
    matching, sigma = matching_loss(
        parts, generate(parts.generator, *fresh_noise(parts.generator, like, noise)), method.levels, noise
    )
    regression = L2(generate(parts.generator, pairs.latents, pairs.cond).images, pairs.images)
    torch.testing.assert_close(update.loss, matching + 0.25 * regression)
    torch.testing.assert_close(update.parts["regression"], regression)
    assert update.at is not None and torch.equal(update.at, sigma)


def test_pairs_that_the_generator_has_met_pull_nowhere() -> None:
    method = DMD(regression=L2, regression_weight=3.0)
    parts, pairs = learnt_parts(method), coupling(6)
    met = replace(pairs, images=generate(parts.generator, pairs.latents, pairs.cond).images.detach())
    with_pairs, without = run(method, parts, met)[0], run(ALONE, parts)[0]
    torch.testing.assert_close(with_pairs.loss, without.loss)
    grads = [torch.autograd.grad(u.loss.sum(), list(parts.generator.parameters())) for u in (with_pairs, without)]
    torch.testing.assert_close(grads[0], grads[1])


def test_a_perceptual_regression_looks_through_its_features() -> None:
    class Twice(nn.Module):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [images.tile(1, 2, 1, 1) + torch.tensor([0.0, 1.0])[None, :, None, None]]

    method = DMD()
    parts, pairs = learnt_parts(method, features=Twice()), coupling(6)
    update = run(method, parts, pairs)[0]
    expected = Distance(kind="perceptual")(
        generate(parts.generator, pairs.latents, pairs.cond).images, pairs.images, Twice()
    )
    torch.testing.assert_close(update.parts["regression"], expected)


def test_noise_levels_are_those_of_the_paper() -> None:
    method = DMD(regression_weight=0.0)
    parts = learnt_parts(method)
    grid, every = method.levels, KarrasLevels()
    assert (grid.first, grid.last, method.fake_levels) == (20, 980, every)
    updates = run(method, parts, n=600)
    low, high = grid.at(torch.tensor([20, 980]))
    assert updates[0].at is not None and updates[1].at is not None
    assert low <= updates[0].at.min() and updates[0].at.max() <= high
    assert updates[1].at.min() < grid.at(torch.tensor(30)) and updates[1].at.max() > grid.at(torch.tensor(970))


def test_no_regression_needs_neither_couplings_nor_features() -> None:
    parts = learnt_parts(ALONE)
    assert set(parts.roles) == {"generator", "teacher", "fake_score"}
    assert len(run(ALONE, parts)) == 2


def test_missing_couplings_are_told() -> None:
    with pytest.raises(UserError, match=r"regression_weight is 0\.25, which needs couplings: give data\.couplings"):
        learnt_parts(DMD(regression=L2), couplings=False)


def test_missing_features_are_told() -> None:
    with pytest.raises(UserError, match=r"method\.regression\.kind is 'perceptual'; it needs a feature network"):
        learnt_parts(DMD())


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_bad_weight(weight: float) -> None:
    with pytest.raises(UserError, match=r"method\.regression_weight is .*; it must be >= 0 and finite"):
        DMD(regression_weight=weight)


def test_a_distance_that_nothing_is_compared_by_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.regression is set; it has no effect while method\.regression_weight"):
        DMD(regression_weight=0.0, regression=Distance(kind="l2"))
