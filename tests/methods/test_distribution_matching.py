"""The step in x against the derivative of the KL divergence, its surrogate, the noise levels and the roles."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    check_levels,
    diversity,
    fake_score_loss,
    fresh_noise,
    generate,
    matching_direction,
    matching_loss,
    matching_parts,
    surrogate,
)
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.noise_levels import LogNormal
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, UserError

GRID = torch.linspace(-16, 16, 8001, dtype=torch.float64)[:, None, None, None]
DATA = GaussianMixture(
    torch.tensor([-1.0, 1.5]).double().reshape(2, 1, 1, 1), torch.tensor([0.4, 0.7]).double(), torch.tensor([1.0, 2.0])
)
SIGMA = 0.8
SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=4)


def normal(mean: float | Tensor, std: float | Tensor) -> GaussianMixture:
    return GaussianMixture(torch.as_tensor(mean, dtype=torch.float64).reshape(1, 1, 1, 1), std)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return StepNoise(seed).normal(torch.empty(shape, dtype=torch.float64))


def teacher(label_dim: int = 0, dropout: float = 0.3) -> EDMPrecond:
    torch.manual_seed(0)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=label_dim, model_channels=8,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=dropout)  # fmt: skip
    return EDMPrecond(SongUNet(config), sigma_max=40.0)


# --- the step in x --------------------------------------------------------------------------------------------------


def kl(student: GaussianMixture, data: GaussianMixture) -> Tensor:
    """KL between the laws noised to SIGMA, by the trapezoid rule."""
    sigma = torch.full_like(GRID[:, 0, 0, 0], SIGMA)
    ours, theirs = (law.log_density(GRID, sigma) for law in (student, data))
    return torch.trapezoid(ours.exp() * (ours - theirs), GRID[:, 0, 0, 0])


@pytest.mark.parametrize("data", [normal(0.0, 1.0), DATA], ids=["normal", "two modes"])
def test_the_step_is_the_derivative_of_the_kl_divergence(data: GaussianMixture) -> None:
    """A normal student x = m + s z: E[u dx/dm] and E[u dx/ds] over z and eps, u undone of its unit, both ways."""
    mean, std, h = 0.7, 0.8, 1e-4
    points, shares = _hermite(60)
    z, eps = torch.cartesian_prod(points, points).T
    share = (shares[:, None] * shares).flatten()
    clean = (mean + std * z)[:, None, None, None]
    noisy, sigma = clean + SIGMA * eps[:, None, None, None], torch.full_like(z, SIGMA)
    real, fake = data(noisy, sigma), normal(mean, std)(noisy, sigma)
    unit = (clean - real).abs().flatten(1).mean(1)
    u = matching_direction(real, fake, clean)[:, 0, 0, 0] * unit / SIGMA**2
    by_mean = (kl(normal(mean + h, std), data) - kl(normal(mean - h, std), data)) / (2 * h)
    by_std = (kl(normal(mean, std + h), data) - kl(normal(mean, std - h), data)) / (2 * h)
    torch.testing.assert_close((share * u).sum(), by_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((share * u * z).sum(), by_std, rtol=1e-5, atol=1e-7)
    if data is not DATA:
        torch.testing.assert_close((share * u).sum(), torch.tensor(mean / (1 + SIGMA**2)).double())


def _hermite(n: int) -> tuple[Tensor, Tensor]:
    """Points and weights for the standard normal (Golub and Welsch)."""
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return points, vectors[0] ** 2


def test_no_step_where_the_denoisers_agree() -> None:
    real, clean = numbers(3, 2, 4, 4), numbers(3, 2, 4, 4, seed=1)
    assert torch.equal(matching_direction(real, real, clean), torch.zeros_like(clean))
    parts = SimpleNamespace(teacher=DATA, fake_score=DATA)
    x = numbers(5, 1, 1, 1).requires_grad_()
    loss, _ = matching_loss(parts, Generated(x, UNCONDITIONAL), KarrasLevels(), StepNoise(0))
    loss.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_the_surrogate_has_the_step_for_its_gradient() -> None:
    clean, direction = numbers(3, 2, 4, 4).requires_grad_(), numbers(3, 2, 4, 4, seed=1)
    loss = surrogate(clean, direction)
    assert loss.shape == (3,)
    loss.sum().backward()
    torch.testing.assert_close(clean.grad, direction / 32)


def test_one_factor_on_both_differences_changes_nothing() -> None:
    real, fake, clean = (numbers(3, 2, 4, 4, seed=i) for i in range(3))
    factor = torch.tensor([0.01, 3.0, 700.0], dtype=torch.float64)[:, None, None, None]
    scaled = matching_direction(real, real + factor * (fake - real), real + factor * (clean - real))
    torch.testing.assert_close(scaled, matching_direction(real, fake, clean))


def test_a_teacher_that_is_exactly_right_gives_no_step() -> None:
    clean = numbers(2, 1, 2, 2)
    assert torch.equal(matching_direction(clean, clean + 1, clean), torch.zeros_like(clean))


def test_the_gradient_of_the_loss_is_the_step_at_the_noised_image() -> None:
    fake = normal(0.3, 0.5)
    parts = SimpleNamespace(teacher=DATA, fake_score=fake)
    x = numbers(6, 1, 1, 1).requires_grad_()
    loss, sigma = matching_loss(parts, Generated(x, UNCONDITIONAL), KarrasLevels(first=300, last=700), StepNoise(4))
    loss.sum().backward()
    noise = StepNoise(4)
    same = KarrasLevels(first=300, last=700).sample(noise, x[:, 0, 0, 0])
    noisy = x.detach() + same[:, None, None, None] * noise.normal(x)
    assert torch.equal(same, sigma)
    torch.testing.assert_close(x.grad, matching_direction(DATA(noisy, sigma), fake(noisy, sigma), x.detach()))


# --- the fake score -------------------------------------------------------------------------------------------------


def test_the_fake_loss_is_edms_and_leaves_the_images_alone() -> None:
    """A point mass at zero: the error of a denoiser that always answers c is c^2 and the weight is EDM's."""

    class Constant:
        sigma_data = 0.5

        def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            return torch.full_like(x, 0.3, requires_grad=True)

    images = torch.zeros(4, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    parts = SimpleNamespace(fake_score=Constant())
    loss, sigma = fake_score_loss(parts, Generated(images, UNCONDITIONAL), KarrasLevels(), StepNoise(2))
    torch.testing.assert_close(loss, 0.09 * (1 / sigma**2 + 1 / 0.25))
    loss.sum().backward()
    assert images.grad is None


# --- noise levels ---------------------------------------------------------------------------------------------------


def test_levels_are_edms_grid_from_the_quiet_end() -> None:
    levels = KarrasLevels()
    ends = levels.at(torch.tensor([0, 999]))
    torch.testing.assert_close(ends, torch.tensor([0.002, 80.0], dtype=torch.float64))
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7) * 2) / 3) ** 7
    torch.testing.assert_close(levels.at(torch.tensor(666)), torch.tensor(middle).double())


def test_every_index_between_the_ends_is_drawn_alike() -> None:
    levels = KarrasLevels(first=20, last=29)
    drawn = levels.sample(StepNoise(0), torch.empty(20_000, dtype=torch.float64))
    values, counts = drawn.unique(return_counts=True)
    torch.testing.assert_close(values, levels.at(torch.arange(20, 30)))
    assert (counts.double() / 20_000 - 0.1).abs().max() < 4 * math.sqrt(0.09 / 20_000)


@pytest.mark.parametrize(
    "bad",
    [{"first": 5, "last": 4}, {"last": 1000}, {"first": -1}, {"sigma_min": 0.0}, {"sigma_max": 0.001}, {"rho": 0.0}],
)
def test_bad_levels(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"levels\.(first|sigma_min) is"):
        KarrasLevels(**bad)


# --- roles ----------------------------------------------------------------------------------------------------------


def test_generator_and_fake_score_are_the_teacher_without_dropout() -> None:
    known = teacher()
    roles = matching_parts(known, SPEC)
    x, sigma = numbers(3, 1, 8, 8).float(), torch.tensor([0.1, 1.0, 40.0])
    with torch.no_grad():
        expected = known.eval()(x, sigma)
        for name in ("generator", "fake_score"):
            module = roles[name].module
            assert module.training
            answer = module.start(x, sigma) if name == "generator" else module(x, sigma)
            torch.testing.assert_close(answer, expected)
    assert roles["generator"].ema and not roles["fake_score"].ema
    weights = [{p.data_ptr() for p in r.module.parameters()} for r in roles.values()]
    assert not (weights[0] & weights[1] or weights[0] & weights[2] or weights[1] & weights[2])


def test_another_kind_of_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="distillation needs a denoiser that knows every noise level"):
        matching_parts(FewStepGenerator.from_denoiser(teacher()), SPEC)


def test_fresh_noise_asks_for_every_class() -> None:
    like = torch.empty(3000, 1, 8, 8)
    generator = matching_parts(teacher(label_dim=4), SPEC)["generator"].module
    latents, cond = fresh_noise(generator, like, StepNoise(0))
    assert latents.shape == like.shape and cond.label is not None
    assert abs(float(latents.std()) - 1) < 0.01
    assert (torch.bincount(cond.label, minlength=4) - 750).abs().max() < 100
    assert fresh_noise(matching_parts(teacher(), SPEC)["generator"].module, like, StepNoise(0))[1] == UNCONDITIONAL


def test_the_generator_is_asked_at_pure_noise() -> None:
    generator = matching_parts(teacher(label_dim=4), SPEC)["generator"].module
    latents, cond = numbers(2, 1, 8, 8).float(), Condition(label=torch.tensor([1, 3]))
    generated = generate(generator, latents, cond)
    assert generated.cond is cond
    torch.testing.assert_close(generated.images, generator.start(40.0 * latents, torch.tensor([40.0, 40.0]), cond))


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    images = torch.tensor([0.0, 1.0, 4.0])[:, None, None, None].expand(3, 2, 5, 5)
    torch.testing.assert_close(diversity(images), torch.tensor(8 / 3))
    assert diversity(torch.ones(4, 1, 2, 2)) == 0


def test_levels_that_the_teacher_does_not_know_are_refused() -> None:
    teacher = SimpleNamespace(sigma_min=0.002, sigma_max=80.0)
    check_levels(teacher, levels=KarrasLevels(), fake_levels=LogNormal(mean=-1.2, std=1.2))
    with pytest.raises(UserError, match=r"method\.levels go from 0\.002 to 2000; the teacher knows .* 0\.002 to 80"):
        check_levels(teacher, levels=KarrasLevels(sigma_max=2000.0))
