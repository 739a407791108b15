"""EM distillation: Diff-Instruct to the bit, the chain against closed forms, what the M-step is made of, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.distribution_matching import KarrasLevels, generate
from imagewright.methods.em_distillation import EMDistillation
from imagewright.methods.uni_instruct import NAMED
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import RECIPES
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Parts, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1)
DIFF_INSTRUCT = replace(NAMED["diff_instruct"], same_masks=False)
ONE_STEP = EMDistillation(
    steps=1, gamma_eps=1.0, gamma_z=0.0, fake_rate=1.0, start_log_snr=0.0,
    levels=LogNormal(), fake_levels=DIFF_INSTRUCT.fake_levels,
)  # fmt: skip


def learnt_parts(method: Any, label_dim: int = 0, move: float = 0.05) -> Parts:
    """In float64; the generator and the fake score are moved away from the teacher."""
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=label_dim, model_channels=8,
                            channel_mult=(1, 1), num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5)
    parts: Parts = method.parts(teacher=EDMPrecond(network.double()), spec=SPEC)
    for name in ("generator", "fake_score"):
        for p in getattr(parts, name).parameters():
            p.data += move * torch.randn_like(p)
    parts.teacher.requires_grad_(False).eval()
    return parts


def updates(method: Any, parts: Any, n: int = 5) -> list[Update]:
    batch = Batch(torch.zeros(n, 1, 8, 8).double(), Condition(label=torch.full((n,), -1)))
    return [e for e in method.step(parts, batch, StepNoise(3), Clock(0, 0, 1000)) if isinstance(e, Update)]


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), list(module.parameters()), allow_unused=True, materialize_grads=True))


# --- Diff-Instruct ----------------------------------------------------------------------------------------------------


def test_one_step_without_latents_is_diff_instruct_to_the_bit() -> None:
    parts = learnt_parts(ONE_STEP)
    ours, theirs = updates(ONE_STEP, parts), updates(DIFF_INSTRUCT, parts)
    assert [u.part for u in ours] == [u.part for u in theirs] == ["fake_score", "generator"]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.loss, b.loss)
        assert float(a.loss.detach().min()) > 0
        module = getattr(parts, a.part)
        assert all(torch.equal(x, y) for x, y in zip(gradients(a.loss, module), gradients(b.loss, module), strict=True))


def test_the_parts_are_diff_instructs() -> None:
    ours, theirs = (learnt_parts(method, move=0.0) for method in (ONE_STEP, DIFF_INSTRUCT))
    assert ours.generator.sigma_max == theirs.generator.sigma_max == 1.0
    for name in ("generator", "fake_score"):
        for a, b in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("weight", ["sigma2", "one"])
def test_one_step_is_the_score_difference_times_the_step_size(weight: Any) -> None:
    """M-step gradient in g = w gamma_eps (s_fake - s_real), over the numbers of an image."""
    parts = exact_parts(lambda z: 0.7 * z + 0.3)
    method = replace(ONE_STEP, gamma_eps=0.16, weight=weight)
    z = numbers(6)
    images = generate(parts.generator, z, UNCONDITIONAL).images
    parts.generator.seen = None
    update = method.generator_update(parts, z, UNCONDITIONAL, StepNoise(4))
    (got,) = torch.autograd.grad(update.loss.sum(), parts.generator.seen)
    noise = StepNoise(4)
    sigma = method.levels.sample(noise, z[:, 0, 0, 0])
    noisy = images + sigma[:, None, None, None] * noise.normal(z)
    scores = parts.fake_score.score(noisy, sigma) - parts.teacher.score(noisy, sigma)
    w = sigma[:, None, None, None] ** 2 if weight == "sigma2" else 1.0
    torch.testing.assert_close(got, w * 0.16 * scores, rtol=1e-10, atol=1e-14)


# --- the chain --------------------------------------------------------------------------------------------------------


class Maker:
    """A generator g(z) = f(z), which remembers its last answer."""

    sigma_max, num_classes = 1.0, 0
    seen: Tensor | None = None

    def __init__(self, f: Any) -> None:
        self.f = f

    def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        answer: Tensor = self.f(x).requires_grad_()
        self.seen = answer
        return answer


def normal(std: float, mean: float = 0.0) -> GaussianMixture:
    return GaussianMixture(torch.full((1, 1, 1, 1), mean, dtype=torch.float64), std)


def numbers(n: int, seed: int = 0) -> Tensor:
    return StepNoise(seed).normal(torch.empty(n, 1, 1, 1, dtype=torch.float64))


def exact_parts(f: Any, real: Any = None, fake: Any = None) -> Any:
    return SimpleNamespace(generator=Maker(f), teacher=real or normal(1.3, 0.4), fake_score=fake or normal(0.7))


def chain(method: EMDistillation, parts: Any, z: Tensor, sigma: float, seed: int = 8) -> Any:
    level = torch.full_like(z[:, 0, 0, 0], sigma)
    images = parts.generator.f(z)
    return method.corrected(parts, z, images, UNCONDITIONAL, level, StepNoise(seed))


@pytest.mark.parametrize("gamma_z", [0.0, 0.02])
def test_no_drift_where_the_denoisers_agree(gamma_z: float) -> None:
    method = EMDistillation(steps=7, gamma_z=gamma_z)
    parts = exact_parts(lambda z: z.sin(), real=normal(0.7), fake=normal(0.7))
    end = chain(method, parts, numbers(50), 0.8)
    assert torch.equal(end.drift, torch.zeros_like(end.drift))
    assert torch.equal(end.latents, numbers(50)) == (gamma_z == 0)


def test_where_the_denoisers_agree_variances_settle_at_the_steps_own() -> None:
    method = EMDistillation(steps=60, gamma_eps=0.2, gamma_z=0.1)
    parts = exact_parts(lambda z: 2 * z, real=normal(0.7), fake=normal(0.7))
    end = chain(method, parts, 3 * numbers(20_000), 0.8)
    assert float((end.noise / 0.8).var()) == pytest.approx(1 / (1 - 0.2 / 2), rel=0.05)
    assert float(end.latents.var()) == pytest.approx(1 / (1 - 0.1 / 2), rel=0.05)


def test_a_linear_generators_chain_has_the_closed_forms_moments() -> None:
    """g = a z, teacher N(0, q^2): precision 1 + (1 / (q^2 + s^2) - 1 / (a^2 + s^2)) v v', v = (a, s), small steps."""
    a, q, s, gamma = 1.5, 0.5, 0.6, 0.02
    method = EMDistillation(steps=250, gamma_eps=gamma, gamma_z=gamma)
    parts = exact_parts(lambda z: a * z, real=normal(q), fake=normal(a))
    end = chain(method, parts, numbers(10_000), s)
    eps = (end.drift + end.noise) / s
    got = torch.cov(torch.stack([end.latents.flatten(), eps.flatten()]))
    v = torch.tensor([[a], [s]]).double()
    precision = torch.eye(2).double() + (1 / (q**2 + s**2) - 1 / (a**2 + s**2)) * v @ v.T
    torch.testing.assert_close(got, precision.inverse(), rtol=0.05, atol=0.03)
    assert float((got - torch.eye(2)).abs().max()) > 0.3  # the start's is another


def test_the_latents_follow_the_gradient_of_the_joint_density() -> None:
    """One step of z, less its noise and prior drift, against finite differences of log q - log p."""
    gamma, sigma, h = 0.01, 0.7, 1e-5
    method = EMDistillation(steps=1, gamma_z=gamma)
    parts = exact_parts(lambda z: z.tanh() + 0.2 * z)
    z, noise = numbers(9), StepNoise(8)
    eps, _, fresh = (noise.normal(z) for _ in range(3))

    def log_ratio(z: Tensor) -> Tensor:
        x, level = z.tanh() + 0.2 * z + sigma * eps, torch.full_like(z[:, 0, 0, 0], sigma)
        return parts.teacher.log_density(x, level) - parts.fake_score.log_density(x, level)

    slope = (log_ratio(z + h) - log_ratio(z - h))[:, None, None, None] / (2 * h)
    expected = z + gamma * (slope - z) + math.sqrt(2 * gamma) * fresh
    torch.testing.assert_close(chain(method, parts, z, sigma).latents, expected, rtol=1e-7, atol=1e-9)


def test_cancelling_takes_out_what_the_noise_left() -> None:
    """By the paper's own recursion: eps as one number, and the noise's share beside it."""
    method, sigma = EMDistillation(steps=4, gamma_eps=0.3, gamma_z=0.0), 0.9
    parts, z, noise = exact_parts(lambda z: 0.8 * z), numbers(9), StepNoise(8)
    eps = share = noise.normal(z)
    level = torch.full_like(z[:, 0, 0, 0], sigma)
    for _ in range(4):
        x = 0.8 * z + sigma * eps
        d = parts.teacher.score(x, level) - parts.fake_score.score(x, level)
        fresh = math.sqrt(2 * 0.3) * noise.normal(z)
        eps, share = eps + 0.3 * (sigma * d - eps) + fresh, 0.7 * share + fresh
    end = chain(method, parts, z, sigma)
    torch.testing.assert_close(end.drift, sigma * (eps - share))
    torch.testing.assert_close(end.noise, sigma * share)


def test_the_m_step_is_taken_at_the_corrected_latents() -> None:
    method = EMDistillation(steps=3, gamma_eps=0.3, gamma_z=0.1, weight="one", levels=LogNormal(std=0.3))
    parts, z = exact_parts(lambda z: 0.8 * z), numbers(9)
    for cancel in (True, False):
        noise = StepNoise(4)
        sigma = method.levels.sample(noise, z[:, 0, 0, 0])
        end = method.corrected(parts, z, 0.8 * z, UNCONDITIONAL, sigma, noise)
        parts.generator.seen = None
        update = replace(method, cancel_noise=cancel).generator_update(parts, z, UNCONDITIONAL, StepNoise(4))
        assert parts.generator.seen is not None
        torch.testing.assert_close(parts.generator.seen.detach(), 0.8 * end.latents)
        (got,) = torch.autograd.grad(update.loss.sum(), parts.generator.seen)
        moved = end.drift if cancel else end.drift + end.noise
        torch.testing.assert_close(got, -moved / sigma[:, None, None, None] ** 2)


# --- parts, recipes, bad input ----------------------------------------------------------------------------------------


def test_gradients_stay_in_the_part_that_learns_and_classes_are_drawn() -> None:
    parts = learnt_parts(EMDistillation(steps=2), label_dim=3)
    first, second = updates(EMDistillation(steps=2), parts)
    second.loss.sum().backward()
    assert all(p.grad is None for p in parts.fake_score.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.generator.parameters())
    parts.generator.zero_grad()
    first.loss.sum().backward()
    assert all(p.grad is None for p in parts.generator.parameters())


def test_the_generator_starts_at_its_log_snr_and_the_fake_score_learns_faster() -> None:
    parts = learnt_parts(EMDistillation())
    assert isinstance(parts.generator, FewStepGenerator)
    assert -2 * math.log(parts.generator.sigma_max) == pytest.approx(-6)
    assert parts.roles["fake_score"].lr_scale == 5
    assert learnt_parts(EMDistillation(start_log_snr=None)).generator.sigma_max == 80


def test_recipe_has_the_papers_settings() -> None:
    run = RECIPES["em-distillation-imagenet64"]()
    assert run.method == EMDistillation(steps=16, gamma_eps=0.16, gamma_z=1.6e-5, start_log_snr=-6.0, fake_rate=5.0)
    t = run.training
    assert (t.batch, t.optimizer.lr, t.optimizer.betas) == (128, 2e-6, (0.0, 0.99))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"steps": 0}, r"method\.steps is 0; it must be a whole number >= 1"),
        ({"gamma_eps": 0.0}, r"method\.gamma_eps is 0\.0; it must be positive"),
        ({"gamma_eps": 1.5}, r"method\.gamma_eps is 1\.5 and gamma_z is 1\.6e-05; they must be at most 1 and below 1"),
        ({"gamma_z": 1.0}, r"gamma_z is 1\.0; they must be at most 1 and below 1"),
        ({"gamma_z": -1.0}, r"method\.gamma_z is -1\.0; it must be >= 0"),
        ({"weight": "snr"}, r"method\.weight is 'snr'; allowed: sigma2, one"),
        ({"start_log_snr": math.inf}, r"method\.start_log_snr is inf; it must be finite, or none"),
        ({"fake_rate": 0.0}, r"method\.fake_rate is 0\.0; it must be positive"),
    ],
)
def test_bad_settings(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EMDistillation(**bad)


def test_levels_that_the_teacher_does_not_know() -> None:
    with pytest.raises(UserError, match=r"method\.start_log_snr is -10\.0, sigma 148; the teacher knows .* to 80"):
        learnt_parts(EMDistillation(start_log_snr=-10.0))
    with pytest.raises(UserError, match=r"method\.levels go from 0\.002 to 90; the teacher knows"):
        learnt_parts(EMDistillation(levels=KarrasLevels(sigma_max=90.0)))
