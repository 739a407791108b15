"""Uni-Instruct: gradients against closed forms and finite differences, the integral, the fitted discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.distribution_matching import KarrasLevels
from imagewright.methods.uni_instruct import (
    Divergence,
    UniInstruct,
    expanded,
    judge,
    ratio_along,
)
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.types import UNCONDITIONAL, Batch, Condition

M, S, SIGMA = 0.7, 0.8, 0.6
V, TAU2 = S**2 + SIGMA**2, 1 + SIGMA**2
F: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "fkl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "chi2": lambda r: (r - 1) ** 2,
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "hellinger": lambda r: (r.sqrt() - 1) ** 2,
}
KINDS = get_args(Divergence)


def images(x: Tensor) -> Tensor:
    """Numbers [N] as images of one pixel."""
    return x[:, None, None, None]


def normal(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture(torch.full((1, 1, 1, 1), mean, dtype=torch.float64), std)


TWO = GaussianMixture(images(torch.tensor([-0.6, 0.9]).double()), torch.tensor([0.5, 0.7]).double(),
                      torch.tensor([0.3, 0.7]).double())  # fmt: skip


# --- one level: the sample's path through fixed denoisers and a fixed ratio ----------------------------------------


def on_path(data: GaussianMixture, kind: Divergence, alpha: float, piece: str = "expanded") -> tuple[float, float]:
    """Gradient of the loss in mean and deviation of a normal student, whose law is M, S; in units of the theory."""
    points, sizes = gauss_hermite(80)
    z, eps = torch.cartesian_prod(points, points).T
    share = (sizes[:, None] * sizes).flatten()
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, S))
    student, sigma = normal(M, S), torch.full_like(z, SIGMA)
    clean = images(mean + std * z)
    noisy = clean + images(SIGMA * eps)
    real, fake = data(noisy, sigma), student(noisy, sigma)
    u = ((fake - real) / SIGMA**2).detach()
    log_ratio = data.log_density(noisy, sigma) - student.log_density(noisy, sigma)
    ratio = ratio_along(log_ratio.detach(), noisy, u).exp()
    h, rest = UniInstruct(divergence=kind).weights(ratio)
    if piece == "expanded":
        loss = 2 * expanded(real, fake, clean, h, rest, alpha) / SIGMA**4
    else:
        loss = h.detach() * (u * noisy).flatten(1).sum(1)
    first, second = torch.autograd.grad((share * loss).sum(), (mean, std))
    return float(first), float(second)


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Points and weights of the standard normal's quadrature."""
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return points, vectors[0] ** 2


def by_differences(function: Callable[[float, float], Tensor]) -> tuple[float, float]:
    d = 1e-5
    mean = (function(M + d, S) - function(M - d, S)) / (2 * d)
    std = (function(M, S + d) - function(M, S - d)) / (2 * d)
    return float(mean), float(std)


GRID = torch.linspace(-14, 14, 4001, dtype=torch.float64)
LEVEL = torch.full_like(GRID, SIGMA)


def integrand(data: GaussianMixture, kind: Divergence) -> Callable[[float, float], Tensor]:
    """E_p[h(r) |u|^2] at SIGMA as a function of the student, on a grid."""

    def value(mean: float, std: float) -> Tensor:
        student, x = normal(mean, std), images(GRID)
        log_p = student.log_density(x, LEVEL)
        h, _ = UniInstruct(divergence=kind).weights((data.log_density(x, LEVEL) - log_p).exp())
        u = (student.score(x, LEVEL) - data.score(x, LEVEL)).flatten()
        return torch.trapezoid(log_p.exp() * h * u**2, GRID)

    return value


def divergence(data: GaussianMixture, kind: str) -> Callable[[float, float], Tensor]:
    """D_f between the noised laws at SIGMA, on a grid."""

    def value(mean: float, std: float) -> Tensor:
        log_p = normal(mean, std).log_density(images(GRID), LEVEL)
        ratio = (data.log_density(images(GRID), LEVEL) - log_p).exp()
        return torch.trapezoid(log_p.exp() * F[kind](ratio), GRID)

    return value


def test_closed_forms_of_sid() -> None:
    """The whole gradient of E|u|^2 at alpha = 1/2, the SIM piece alone at alpha = 1."""
    assert on_path(normal(0, 1), "rkl", 0.5)[0] == pytest.approx(2 * M / TAU2**2, rel=1e-10)
    assert on_path(normal(0, 1), "rkl", 1.0)[0] == pytest.approx(2 * M / (TAU2 * V), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [normal(0, 1), TWO], ids=["normal", "mixture"])
def test_whole_gradient_against_differences(data: GaussianMixture, kind: Divergence) -> None:
    wanted = by_differences(integrand(data, kind))
    assert on_path(data, kind, 0.5) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_the_pieces_alone_are_not_the_gradient() -> None:
    """What the test above would miss if it could not fail: SIM alone is another direction but for forward KL."""
    wanted = by_differences(integrand(TWO, "js"))
    assert on_path(TWO, "js", 1.0) != pytest.approx(wanted, rel=1e-2)
    assert on_path(TWO, "fkl", 1.0) == pytest.approx(by_differences(integrand(TWO, "fkl")), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_di_piece_is_the_gradient_at_one_level(kind: Divergence) -> None:
    assert on_path(TWO, kind, 1.0, "di") == pytest.approx(by_differences(divergence(TWO, kind)), rel=1e-5, abs=1e-8)


def test_di_piece_on_normals() -> None:
    assert on_path(normal(0, 1), "rkl", 1.0, "di")[0] == pytest.approx(M / TAU2, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_f(kind: Divergence) -> None:
    """h = r^2 f'' and h - r h', by autograd; a table of the same h."""
    r = torch.tensor([0.01, 0.4, 1.0, 3.0, 50.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F[kind](r).sum(), r, create_graph=True)
    h = r**2 * torch.autograd.grad(slope.sum(), r, create_graph=True)[0]
    (h_slope,) = torch.autograd.grad(h.sum(), r)
    got_h, got_rest = UniInstruct(divergence=kind).weights(r)
    torch.testing.assert_close(got_h, h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_rest, h - r * h_slope, rtol=1e-9, atol=1e-9)
    table = {"rkl": r**0, "fkl": r, "js": r / (1 + r), "jeffreys": 1 + r, "chi2": 2 * r**2, "hellinger": r.sqrt() / 2}
    torch.testing.assert_close(got_h, table[kind])


def test_jeffreys_is_a_weighted_sum() -> None:
    r = torch.tensor([0.3, 2.0])
    h, rest = UniInstruct(divergence="jeffreys", jeffreys=(0.4, 0.6)).weights(r)
    torch.testing.assert_close(h, 0.4 * r + 0.6)
    torch.testing.assert_close(rest, torch.full_like(r, 0.6))


@pytest.mark.parametrize("kind", ["fkl", "rkl"])
def test_time_expansion_is_the_divergence(kind: Divergence) -> None:
    """int 1/2 g^2 E_p[h u^2] dt = int sigma E_p[h u^2] d sigma of normals, against the closed form."""
    log_sigma = torch.linspace(-7, 7, 1201, dtype=torch.float64)
    sigma = log_sigma.exp()
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)[:, None] * (1 + sigma**2).sqrt()
    v, tau2 = S**2 + sigma**2, 1 + sigma**2
    log_p = -0.5 * ((x - M) ** 2 / v + (2 * math.pi * v).log())
    log_q = -0.5 * (x**2 / tau2 + (2 * math.pi * tau2).log())
    h, _ = UniInstruct(divergence=kind).weights((log_q - log_p).exp())
    each = torch.trapezoid(log_p.exp() * h * (x / tau2 - (x - M) / v) ** 2, x, dim=0)
    total = float(torch.trapezoid(sigma**2 * each, log_sigma))
    a, b = ((M, S**2), (0.0, 1.0)) if kind == "rkl" else ((0.0, 1.0), (M, S**2))
    kl = 0.5 * (a[1] / b[1] + (a[0] - b[0]) ** 2 / b[1] - 1 - math.log(a[1] / b[1]))
    assert total == pytest.approx(kl, rel=1e-4)


# --- the whole update on normals: every random number is a point of a quadrature --------------------------------------


class Shifted(nn.Module):
    """A generator: mean + deviation z, whatever the level."""

    num_classes, sigma_max = 0, 2.0

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(M, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(S, dtype=torch.float64))

    def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return self.mean + self.std * x / self.sigma_max


class Exact(nn.Module):
    """The student's denoiser, and its log density ratio to the data as the only logit."""

    def __init__(self, student: GaussianMixture, data: GaussianMixture) -> None:
        super().__init__()
        self.student, self.data = student, data

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.student(x, sigma)

    def answer_and_judge(self, x: Tensor, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        logit = self.data.log_density(x, sigma) - self.student.log_density(x, sigma)
        return self.student(x, sigma), logit[:, None]


class Quadrature:
    """A `StepNoise` whose draws are all combinations of a grid: latent, level, disturbance, in this order."""

    def __init__(self, normals: int, levels: int) -> None:
        points, sizes = gauss_hermite(normals)
        indices = torch.arange(levels, dtype=torch.float64)
        self.latent, self.level, self.disturbance = torch.cartesian_prod(points, indices, points).T
        self.share = torch.cartesian_prod(sizes, torch.full_like(indices, 1 / levels), sizes).prod(1)
        self.left = [self.latent, self.disturbance]

    def normal(self, like: Tensor) -> Tensor:
        return images(self.left.pop(0))

    def integers(self, high: int, like: Tensor) -> Tensor:
        return self.level.long()


class Roles:
    def __init__(self, **roles: Any) -> None:
        self.__dict__.update(roles)


def normals(data: GaussianMixture | None = None) -> Any:
    data = data or normal(0, 1)
    return Roles(generator=Shifted(), teacher=data, fake_score=Exact(normal(M, S), data))


LEVELS = KarrasLevels(first=0, last=149, points=150, sigma_min=0.01, sigma_max=60.0)


@pytest.mark.parametrize(
    ("kind", "wanted"), [("rkl", (M, S - 1 / S)), ("fkl", (M / S**2, (1 - (1 + M**2) / S**2) / S))]
)
def test_update_is_the_gradient_of_kl(
    kind: Divergence, wanted: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the integral's weights, the mean over levels is the divergence between the clean laws itself."""
    monkeypatch.setattr("imagewright.methods.uni_instruct.diversity", lambda images: images.std())  # of half a million
    whole: dict[str, Any] = {"alpha": 0.5} if kind == "rkl" else {"ratio_gradient": True, "logit_limit": 50.0}
    method = UniInstruct(divergence=kind, normaliser="integral", scale=1.0, levels=LEVELS, **whole)
    parts, noise = normals(), Quadrature(60, 150)
    update = method.generator_update(parts, Batch(images(noise.latent)), noise)  # type: ignore[arg-type]
    got = torch.autograd.grad((noise.share * update.loss).sum(), (parts.generator.mean, parts.generator.std))
    assert [float(g) for g in got] == pytest.approx(list(wanted), rel=0.005)


# --- the discriminator -----------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """A network whose bottleneck's channel mean is a quadratic function of the noised number."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return torch.cat([x**0, x, x**2], 1) * self.factors[:, None, None]

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return torch.zeros_like(x)


def test_the_fitted_discriminator_is_the_log_ratio() -> None:
    """Minimising the fake network's loss gives log q / p of the noised laws of two normals."""
    n = 200_000
    fake = EDMPrecond(Quadratic())
    parts = Roles(generator=Shifted(), teacher=normal(0, 1), fake_score=fake)
    only = KarrasLevels(first=1, last=1, points=3, sigma_min=0.1, sigma_max=2.0)
    method = UniInstruct(divergence="fkl", fake_levels=only)
    real = Batch(images(StepNoise(8).normal(torch.empty(n, dtype=torch.float64))))
    optimizer = torch.optim.LBFGS(fake.parameters(), max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = method.fake_update(parts, real, StepNoise(9)).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    x = images(torch.linspace(-2, 2, 9, dtype=torch.float64))
    sigma = only.at(torch.ones(9))
    wanted = normal(0, 1).log_density(x, sigma) - normal(M, S).log_density(x, sigma)
    torch.testing.assert_close(judge(fake, x, sigma, UNCONDITIONAL)[:, 0].detach(), wanted, rtol=0, atol=0.03)


# --- numbers of the published program -------------------------------------------------------------------------------


class Given:
    """A `StepNoise` whose normal draws are handed in, and whose indices need not be whole."""

    def __init__(self, *normals: Tensor, index: Tensor | None = None) -> None:
        self.normals, self.index = list(normals), index

    def normal(self, like: Tensor) -> Tensor:
        return self.normals.pop(0)

    def integers(self, high: int, like: Tensor) -> Tensor:
        assert self.index is not None
        return self.index


class Still(nn.Module):
    """A generator that hands back what it is given."""

    num_classes, sigma_max, training = 0, 2.5, True

    def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return x / 2.5


class Formula(nn.Module):
    """A fake network of a formula: D = 0.9 sin(x / (1 + sigma^2)) and one logit a place."""

    sigma_data = 0.5

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return 0.9 * torch.sin(x / (1 + images(sigma) ** 2))

    def logits(self, x: Tensor) -> Tensor:
        return (1.5 * x.sum(1).sin() + 0.3 * x.mean(1)).flatten(1)

    def answer_and_judge(self, x: Tensor, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        return self(x, sigma), self.logits(x)


def test_reductions_are_the_published_program_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of a-little-hoof/Uni_Instruct, `fsim_training/fsim_loss.py` and its loop's factors, for
    formulas in place of networks, float64, four images of 2 x 2 x 2; ours are means over eight numbers."""
    monkeypatch.setattr("imagewright.methods.uni_instruct.judge", lambda fake, x, sigma, cond: fake.logits(x))
    index = torch.arange(32, dtype=torch.float64).reshape(4, 2, 2, 2)
    made, real, disturbance = 0.8 * torch.sin(1.0 + index), 0.6 * torch.cos(0.5 * index), torch.sin(0.7 * index + 0.3)
    teacher = lambda x, sigma, cond: 0.7 * torch.tanh(x / (1 + images(sigma)))  # noqa: E731
    parts = Roles(generator=Still(), teacher=teacher, fake_score=Formula())
    method = UniInstruct(gan_weight=0.01)

    level = torch.tensor([-2.0, -0.5, 0.4, 1.5], dtype=torch.float64)
    update = method.fake_update(parts, Batch(real), Given(made, level, disturbance))  # type: ignore[arg-type]
    assert float(8 * update.loss.mean()) == pytest.approx(37.154075566072166 + 266.68416071004685, rel=1e-12)

    x = made.clone().requires_grad_()
    share = torch.tensor([0.1, 0.45, 0.7, 0.95], dtype=torch.float64)
    noise = Given(x, disturbance, index=0.8 * 999 * share)
    loss = 8 * method.generator_update(parts, Batch(real), noise).loss.mean()  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(-3.259166282750414 + 0.12145787554165877, rel=1e-12)
    noise = Given(x, disturbance, index=0.8 * 999 * share)
    without = 8 * UniInstruct().generator_update(parts, Batch(real), noise).loss.mean()  # type: ignore[arg-type]
    assert without.item() == pytest.approx(-3.259166282750414, rel=1e-12)
    (whole,), (plain,) = torch.autograd.grad(loss, x), torch.autograd.grad(without, x)
    assert float(plain.norm()) == pytest.approx(68.90840314209908, rel=1e-10)
    adversary = whole - plain
    assert float(adversary.norm()) == pytest.approx(0.04979676406769533, rel=1e-9)
    assert adversary[0, 0, 0].tolist() == pytest.approx([-0.013368035034329198, -0.006843810776396431], rel=1e-9)
    assert adversary[3, 1, 1].tolist() == pytest.approx([-0.009376379182397717, -0.0025567740728038688], rel=1e-9)


def test_sid_is_the_published_program_s() -> None:
    """Loss and gradient of mingyuanzhou/SiD, `training/sid_loss.py`, at alpha 1.2, as above."""
    index = torch.arange(32, dtype=torch.float64).reshape(4, 2, 2, 2)
    x = (0.8 * torch.sin(1.0 + index)).requires_grad_()
    noise = Given(
        x, torch.sin(0.7 * index + 0.3), index=0.8 * 999 * torch.tensor([0.1, 0.45, 0.7, 0.95], dtype=torch.float64)
    )
    teacher = lambda x, sigma, cond: 0.7 * torch.tanh(x / (1 + images(sigma)))  # noqa: E731
    parts = Roles(generator=Still(), teacher=teacher, fake_score=Formula())
    loss = 8 * UniInstruct(alpha=1.2).generator_update(parts, Batch(x.detach()), noise).loss.mean()  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(-21.033018294171917, rel=1e-12)
    assert torch.autograd.grad(loss, x)[0].norm().item() == pytest.approx(68.07411129325709, rel=1e-10)
