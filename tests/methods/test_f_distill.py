"""f-distill: the published weights, who learns when and on what, its step, the maps that it looks at, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.methods.distribution_matching import Generated, KarrasLevels, generate, matching_direction, surrogate
from imagewright.methods.f_distill import Divergence, FDistill, RatioMeans
from imagewright.models.judging import answer_and_maps, encoder_maps
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.recipes import RECIPES
from imagewright.types import Batch, Clock, Condition, DataSpec, Parts, Update, UserError

SPEC = DataSpec(name="toy", resolution=16, channels=1, num_classes=3)


def teacher() -> EDMPrecond:
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=16, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(), dropout=0.0)  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5)
    return EDMPrecond(network.double())


def learnt(method: FDistill) -> Parts:
    """Parts in float64, the fake network moved away from the teacher, nothing learning in the teacher."""
    torch.manual_seed(7)
    parts = method.parts(teacher=teacher(), spec=SPEC)
    for p in parts.fake_score.parameters():
        p.data += 0.02 * torch.randn_like(p)
    parts.teacher.eval().requires_grad_(False)
    return parts


def batch(n: int = 6) -> Batch:
    x = 0.5 * StepNoise(1).normal(torch.empty(n, 1, 16, 16, dtype=torch.float64))
    return Batch(x, Condition(label=torch.arange(n) % 3))


def run(method: FDistill, parts: Any, step: int) -> list[Update]:
    events = method.step(parts, batch(), StepNoise(3, step), Clock(step, step, 1000))
    return [e for e in events if isinstance(e, Update)]


# --- the weight -------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor(
    [[2.0, 1.0, -1.0], [-4.0, -3.0, 0.5], [0.3, 0.1, 0.0], [9.0, 5.0, 1.0], [-0.7, 0.2, 0.4], [1.2, -0.4, 0.9]]
)
SIGMA = torch.tensor([0.01, 3.0, 7.9, 20.0, 25.0, 79.0])
PUBLISHED: list[tuple[Divergence, float, list[float], list[float]]] = [
    ("js", 0.0, [1.404172, 0.210582, 1.123718, 1.087172, 1.087171, 1.087172],
     [0.30972, 1.69093, 0.482988, 1.172112, 1.172118, 1.172117]),
    ("js", 0.5, [1.310743, 0.200123, 1.053342, 1.31586, 0.994912, 1.125008],
     [0.523867, 2.213389, 0.788053, 0.051335, 1.403102, 1.020237]),
    ("kl", 0.0, [1.823193, 0.107234, 1.069569, 1.0, 0.999999, 1.0],
     [0.152233, 2.588272, 0.259497, 0.999992, 1.000001, 1.0]),
    ("softened_rkl", 0.5, [0.691318, 1.794558, 0.947008, 0.686235, 1.00505, 0.875818],
     [1.268682, 0.315274, 1.1196, 1.535335, 0.772524, 0.988577]),
    ("neyman", 0.5, [0.249099, 4.235191, 0.424615, 0.246306, 0.477106, 0.36768],
     [0.410321, 0.024134, 0.240713, 5.067373, 0.093286, 0.164173]),
    ("hellinger", 0.5, [1.315855, 0.319123, 1.007851, 1.323295, 0.950794, 1.083077],
     [0.577383, 2.380753, 0.753834, 0.164299, 1.210927, 0.912798]),
    ("jeffreys", 0.5, [1.304397, 0.502493, 0.952213, 1.314059, 0.897222, 1.029613],
     [0.605501, 2.436575, 0.686128, 0.500339, 0.994388, 0.777065]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "decay", "first", "second"), PUBLISHED)
def test_weights_are_the_published_program_s(
    kind: Divergence, decay: float, first: list[float], second: list[float]
) -> None:
    """NVlabs/FastGen, `f_distill.py`, run on these logits, then on their negatives; the means go on."""
    method, means = FDistill(divergence=kind, ratio_decay=decay), RatioMeans(10)
    for sign, wanted in ((1, first), (-1, second)):
        _, h = method.weigh(sign * LOGITS, SIGMA, means)
        torch.testing.assert_close(h, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_ratios_and_weights_have_mean_one_at_every_level_that_was_seen() -> None:
    """With no share of the past; five levels, each in an interval of its own, four images each."""
    sigma = torch.tensor([1.0, 12.0, 30.0, 41.0, 70.0]).repeat_interleave(4)
    logits = StepNoise(0).normal(torch.empty(20, 2)) + sigma[:, None] / 40
    ratio, h = FDistill(divergence="kl").weigh(logits, sigma)
    torch.testing.assert_close(ratio.reshape(5, 4).mean(1), torch.ones(5), rtol=1e-4, atol=0)
    torch.testing.assert_close(h, ratio, rtol=1e-4, atol=0)
    raw, h = FDistill(divergence="kl", bins=0).weigh(logits, sigma)
    torch.testing.assert_close(raw, logits.mean(1).exp().clamp(0.1, 20))
    torch.testing.assert_close(h, raw / raw.mean())


def test_the_reverse_divergence_weighs_nothing() -> None:
    assert torch.allclose(FDistill(divergence="rkl").weigh(LOGITS, SIGMA)[1], torch.ones(6), atol=2e-6)


def test_means_are_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process with one image at every level, of ratio 1, and 6 weights of 1 in all."""
    alone, _ = FDistill(divergence="kl").weigh(LOGITS, SIGMA)
    others = [torch.ones(2, 10), torch.tensor([6.0, 6.0])]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers: numbers.add_(others.pop(0)))
    ratio, h = FDistill(divergence="kl").weigh(LOGITS, SIGMA)
    raw = LOGITS.mean(1).clamp(-10, 10).exp().clamp(0.1, 20)
    first = (raw[:3].sum() + 1) / 4  # three images of the lowest interval here, one there
    torch.testing.assert_close(ratio[:3], raw[:3] / first, rtol=1e-5, atol=0)
    assert not torch.allclose(ratio, alone)
    torch.testing.assert_close(h, ratio / ((ratio.sum() + 6) / 12), rtol=1e-5, atol=0)


# --- the updates ------------------------------------------------------------------------------------------------------


def test_one_step_in_five_is_the_generator_s_alone() -> None:
    """The fifth: the program counts its steps from 1, so that nobody learns from heads that have learnt nothing."""
    method = FDistill()
    parts = learnt(method)
    kinds = [[u.part for u in run(method, parts, step)] for step in range(10)]
    others = ["fake_score", "discriminator"]
    assert kinds == [others, others, others, others, ["generator"]] * 2


def by_hand(method: FDistill, parts: Any, step: int) -> tuple[Generated, Tensor, Tensor, Any]:
    """What a step draws: images, noised images, their levels, and the noise that goes on."""
    noise, given = StepNoise(3, step), batch()
    latents = noise.normal(given.images)
    made = generate(parts.generator, latents, given.cond)
    sigma = method.levels.sample(noise, latents[:, 0, 0, 0])
    return made, made.images + sigma[:, None, None, None] * noise.normal(latents), sigma, noise


@pytest.mark.parametrize("judged", ["middle", "all"])
def test_generator_update(judged: Any) -> None:
    """The weighed step, and the adversary on the same noised images, beside it and not over its unit."""
    method = FDistill(judged=judged, gan_weight=0.7)
    parts = learnt(method)
    (update,) = run(method, parts, 4)
    made, noisy, sigma, _ = by_hand(method, parts, 4)
    real, maps = answer_and_maps(parts.teacher, noisy, sigma, made.cond)
    logits = parts.discriminator(maps if judged == "all" else maps[-1:])
    assert logits.shape == (6, 3 if judged == "all" else 1)
    direction = matching_direction(real, parts.fake_score(noisy, sigma, made.cond), made.images)
    h = method.weigh(logits, sigma)[1][:, None, None, None]
    assert h.std() > 1e-3
    wanted = surrogate(made.images, h * direction) + 0.7 * F.softplus(-logits).mean(1)
    torch.testing.assert_close(update.loss, wanted, rtol=1e-4, atol=1e-8)
    matching = surrogate(made.images, h * direction)
    got, expected, alone = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss.sum(), list(parts.generator.parameters()), retain_graph=True)
            ]
        )
        for loss in (update.loss, wanted, matching)
    )
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    assert float((alone - expected).norm() / expected.norm()) > 0.01  # the adversary's is in it


def test_fake_score_and_discriminator_updates() -> None:
    method = FDistill(judged="all")
    parts = learnt(method)
    of_fake, of_heads = run(method, parts, 1)
    made, noisy, sigma, noise = by_hand(method, parts, 1)
    error = (parts.fake_score(noisy, sigma, made.cond) - made.images).square().flatten(1).mean(1)
    torch.testing.assert_close(of_fake.loss, error)
    level = method.levels.sample(noise, sigma)
    real = batch().images + level[:, None, None, None] * noise.normal(noisy)
    fake_logits, real_logits = (
        parts.discriminator(encoder_maps(parts.teacher, x, at, made.cond)) for x, at in ((noisy, sigma), (real, level))
    )
    assert not torch.equal(sigma, level)
    torch.testing.assert_close(of_heads.loss, F.softplus(fake_logits).mean(1) + F.softplus(-real_logits).mean(1))
    of_heads.loss.sum().backward()
    assert all(p.grad is not None for p in parts.discriminator.parameters())
    assert all(p.grad is None for role in ("generator", "teacher") for p in getattr(parts, role).parameters())


def test_the_means_of_a_run_are_a_part_that_moves_with_the_generator() -> None:
    method = FDistill(ratio_decay=0.5)
    parts = learnt(method)
    assert "ratio_means" not in learnt(FDistill()).roles
    run(method, parts, 1)
    assert torch.equal(parts.ratio_means.means, torch.ones(10))
    run(method, parts, 4)
    assert not torch.equal(parts.ratio_means.means, torch.ones(10))


def test_maps_are_the_last_of_each_resolution() -> None:
    model, x, sigma = teacher(), batch().images, torch.linspace(0.1, 3, 6, dtype=torch.float64)
    answer, maps = answer_and_maps(model, x, sigma, batch().cond)
    assert torch.equal(answer, model(x, sigma, batch().cond))
    assert [m.shape[1:] for m in maps] == [(8, 16, 16), (16, 8, 8), (16, 4, 4)]
    s = model.scalings(sigma)
    emb = model.network.embed(s.c_noise, batch().cond)
    hidden, skips = model.network.encode(x * s.c_in[:, None, None, None], emb)
    # Of each resolution: a convolution (or a halving), then two blocks.
    for got, wanted in zip(maps, (skips[2], skips[5], hidden), strict=True):
        torch.testing.assert_close(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(encoder_maps(model, x, sigma, batch().cond), maps, strict=True))


def test_recipes_have_the_published_settings() -> None:
    """`config_f_distill_cifar10.py` and `config_f_distill_in64.py`."""
    cifar, imagenet = RECIPES["f-distill-cifar10"](), RECIPES["f-distill-imagenet64"]()
    levels = KarrasLevels(first=2, last=998)
    assert cifar.method == FDistill(divergence="kl", gan_weight=1e-3, judged="all", levels=levels)
    assert imagenet.method == FDistill(divergence="js", gan_weight=3e-3, ratio_decay=0.5, levels=levels)
    for run, size, micro, steps, lr in ((cifar, 2048, 256, 100_000, 1e-4), (imagenet, 512, 32, 600_000, 2e-6)):
        t = run.training
        assert (t.batch, t.micro_batch, t.total_images, t.optimizer.lr) == (size, micro, size * steps, lr)
        assert (t.optimizer.kind, t.optimizer.weight_decay, t.optimizer.lr_ramp_images) == ("adamw", 0.01, 0)
        assert 0.5 ** (t.batch / t.ema.halflife_images) == pytest.approx(0.9999**5)
        assert math.isclose(t.optimizer.eps, 1e-8) and t.ema.rampup_ratio is None


def test_dmd2_s_warm_up_is_counted_on_each_of_seven_processes() -> None:
    for name in ("dmd2-imagenet64", "dmd2-imagenet64-gan"):
        training = RECIPES[name]().training
        # The trainer asks with the batch at hand counted: the first step's rate is the program's second, and never 0.
        rates = [training.optimizer.lr_at(step * training.batch, training.total_images) for step in (1, 10, 71, 72)]
        assert rates[3] == training.optimizer.lr
        assert rates[:3] == pytest.approx([training.optimizer.lr * 7 * step / 500 for step in (1, 10, 71)])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"divergence": "fkl"}, r"method\.divergence is 'fkl'; allowed: rkl, kl, js"),
        ({"judged": "first"}, r"method\.judged is 'first'; allowed: middle, all"),
        ({"every": 1}, r"method\.every is 1; it must be at least 2"),
        ({"gan_weight": 0.0}, r"method\.gan_weight is 0\.0; it must be positive"),
        ({"ratio_bounds": (2.0, 1.0)}, r"method\.ratio_bounds is \(2\.0, 1\.0\); it must be two rising"),
        ({"bins": -1}, r"method\.bins is -1; it must be >= 0"),
        ({"ratio_decay": 1.0}, r"method\.ratio_decay is 1\.0; it must lie in \[0, 1\)"),
        ({"ratio_decay": 0.5, "bins": 0}, r"method\.ratio_decay is 0\.5; without method\.bins it has no effect"),
    ],
)
def test_bad_settings(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(FDistill(), **bad)


def test_a_teacher_without_bottleneck() -> None:
    with pytest.raises(UserError, match="network is a Conv2d, which has no bottleneck"):
        FDistill().parts(teacher=EDMPrecond(nn.Conv2d(1, 1, 1)), spec=SPEC)
