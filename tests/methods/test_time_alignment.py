"""Teachers that are told the straight path's time: what moves, what is learnt, what is refused; laws of intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from imagewright.methods.time_alignment import TimeAlignment
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import EDM2UNet, EDM2UNetConfig, SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.paths.intervals import GapTimes, Intervals, SortedTimes
from imagewright.types import Batch, Clock, Condition, DataSpec, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
SIZES = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 3, "model_channels": 32,
         "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}  # fmt: skip


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = SongUNet(SongUNetConfig(**SIZES)) if kind == "song" else EDM2UNet(EDM2UNetConfig(**SIZES))  # type: ignore[arg-type]
    for p in made.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    return made


@pytest.mark.parametrize("kind", ["song", "edm2"])
def test_only_the_time_moves_and_the_denoiser_comes_nearer_its_teacher(kind: str) -> None:
    teacher = EDMPrecond(network(kind)).eval()
    method = TimeAlignment()
    parts = method.parts(teacher=teacher, spec=SPEC)
    before = {name: p.clone() for name, p in parts.denoiser.named_parameters()}
    images, sigmas = 0.5 * StepNoise(1).normal(torch.empty(8, 1, 8, 8)), torch.logspace(-2, 1.5, 8)
    noisy, told = (
        images + sigmas[:, None, None, None] * StepNoise(2).normal(images),
        Condition(label=torch.arange(8) % 3),
    )

    def error() -> float:
        with torch.no_grad():
            answers = [model.eval()(noisy, sigmas, told) for model in (parts.denoiser, teacher)]
        return float((answers[0] - answers[1]).norm() / answers[1].norm())

    at_first = error()
    learning = [p for p in parts.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=3e-3)
    batch = Batch(torch.zeros(256, 1, 8, 8), Condition(label=torch.arange(256) % 3))
    for step in range(60):
        [update] = method.step(parts, batch, StepNoise(3, step), Clock(step, step, 100))
        optimizer.zero_grad()
        update.loss.mean().backward()
        optimizer.step()
    moved = {name.split(".")[1] for name, p in parts.denoiser.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"map_layer0", "map_layer1"} if kind == "song" else {"emb_noise"})
    assert error() < 0.5 * at_first


def test_the_loss_is_in_units_of_what_is_aimed_at() -> None:
    """1 of an embedding that is nothing, whatever the teacher's length; 0 of the teacher's own."""
    parts = TimeAlignment().parts(teacher=EDMPrecond(network("song")).eval(), spec=SPEC)
    batch = Batch(torch.zeros(16, 1, 8, 8), Condition(label=torch.arange(16) % 3))

    def loss(scale: float) -> torch.Tensor:
        parts.denoiser.network.embed = lambda label, cond: (
            scale * parts.teacher.network.embed(parts.teacher.c_noise(sigma), cond)
        )
        [update] = TimeAlignment().step(parts, batch, StepNoise(3), Clock(0, 0, 100))
        assert update.at is not None and torch.equal(update.at, sigma)
        return update.loss

    law = TimeAlignment().noise_levels
    sigma = law.sample(StepNoise(3), batch.images[:, 0, 0, 0]).clamp(0.002, 80.0)
    for scale in (0.0, 0.9, 1.0):
        torch.testing.assert_close(loss(scale), torch.full((16,), (1 - scale) ** 2), rtol=1e-4, atol=1e-6)


def test_an_aligned_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="told the straight path's time already"):
        TimeAlignment().parts(teacher=EDMPrecond(network("song"), noise_label="time"), spec=SPEC)


def test_the_label_is_the_time_of_the_straight_path() -> None:
    denoiser = EDMPrecond(network("song"), noise_label="time")
    t = torch.tensor([0.001, 0.3, 0.99], dtype=torch.float64)
    torch.testing.assert_close(denoiser.c_noise(0.5 * t / (1 - t)), t)


@pytest.mark.parametrize("law", [GapTimes(), SortedTimes(), GapTimes(mean=1.0, std=0.5)])
def test_laws_of_intervals(law: Intervals) -> None:
    n = 40_000
    t, s = law.sample(StepNoise(1), torch.empty(n, dtype=torch.float64))
    assert bool(((s >= 0) & (s <= t) & (t < 1)).all())
    expected = torch.distributions.Normal(0.0, 1.0)
    if isinstance(law, GapTimes):
        quantile = (torch.logit(t - s) - law.mean) / law.std
        uniform = s / (1 - (t - s))
        assert abs(float(uniform.mean()) - 0.5) < 0.01 and abs(float(uniform.std()) - 12**-0.5) < 0.01
    else:
        both = torch.cat([t, s])
        quantile = (torch.logit(both) - law.mean) / law.std
        assert abs(float(torch.corrcoef(torch.stack([t, s]))[0, 1])) > 0.1  # sorted, so no longer independent
    for q in (0.1, 0.5, 0.9):
        assert abs(float((quantile < expected.icdf(torch.tensor(q))).double().mean()) - q) < 0.01


def test_laws_say_what_is_out_of_range() -> None:
    with pytest.raises(UserError, match="GapTimes"):
        GapTimes(std=0.0)
    with pytest.raises(UserError, match="must be finite"):
        replace(SortedTimes(), mean=float("inf"))
