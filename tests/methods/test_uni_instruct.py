"""Uni-Instruct: gradients against closed forms and finite differences, and what is one of its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from imagewright.data.augment import Augment
from imagewright.methods.distribution_matching import Generated, KarrasLevels, matching_loss
from imagewright.methods.uni_instruct import (
    NAMED,
    Divergence,
    UniInstruct,
    answer_and_judge,
    evaluating,
    expanded,
    judge,
    ratio_along,
)
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
CLOCK = Clock(0, 0, 1000)
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
    """h = r^2 f'' and h - r h', by autograd; f-distill's table is the same h."""
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
    method = UniInstruct(divergence=kind, alpha=0.5, ratio_gradient=True, normaliser="integral", scale=1.0,
                         levels=LEVELS, logit_limit=50.0)  # fmt: skip
    parts, noise = normals(), Quadrature(60, 150)
    update = method.generator_update(parts, Batch(images(noise.latent)), noise)  # type: ignore[arg-type]
    got = torch.autograd.grad((noise.share * update.loss).sum(), (parts.generator.mean, parts.generator.std))
    assert [float(g) for g in got] == pytest.approx(list(wanted), rel=0.005)


# --- what is a setting of it ------------------------------------------------------------------------------------------


def unet(**more: Any) -> EDMPrecond:
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1, 1), num_blocks=1, attn_resolutions=(), **{"dropout": 0.0, **more})  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5)
    return EDMPrecond(network.double())


def learnt(method: UniInstruct, **more: Any) -> Any:
    """Parts in float64, the fake network moved away from the teacher."""
    parts = method.parts(teacher=unet(**more), spec=SPEC)
    torch.manual_seed(6)
    for p in parts.fake_score.parameters():
        p.data += 0.02 * torch.randn_like(p)
    parts.teacher.eval().requires_grad_(False)
    return parts


def batch(n: int = 6) -> Batch:
    x = 0.5 * StepNoise(1).normal(torch.empty(n, 1, 8, 8, dtype=torch.float64))
    return Batch(x, Condition(label=torch.arange(n) % 3))


def gradient(parts: Any, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss.sum(), list(parts.generator.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def by_hand(method: UniInstruct, parts: Any, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """A loss of (images, D_real, D_fake) at the draws that the method's update makes from `StepNoise(3)`."""
    noise, (x, cond) = StepNoise(3), (batch().images, batch().cond)
    latents = noise.normal(x)
    start = parts.generator.sigma_max
    made = parts.generator.start(start * latents, torch.full((len(x),), start, dtype=x.dtype), cond)
    sigma = method.levels.sample(noise, x[:, 0, 0, 0])
    noisy = made + sigma[:, None, None, None] * noise.normal(x)
    return loss(made, parts.teacher(noisy, sigma, cond), parts.fake_score(noisy, sigma, cond))


def total(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def test_dmd_is_the_family_s_direction() -> None:
    method = NAMED["dmd"]
    parts = learnt(method)
    noise = StepNoise(3)
    latents = noise.normal(batch().images)
    assert parts.generator.sigma_max == 80.0
    level = torch.full((6,), 80.0, dtype=torch.float64)
    made = Generated(parts.generator.start(80 * latents, level, batch().cond), batch().cond)
    wanted, sigma = matching_loss(parts, made, method.levels, noise)
    got = method.generator_update(parts, batch(), StepNoise(3))
    assert got.at is not None and torch.equal(got.at, sigma)
    assert torch.equal(got.loss, wanted)
    assert torch.equal(gradient(parts, got.loss), gradient(parts, wanted))


def test_diff_instruct_moves_along_the_difference_of_denoisers() -> None:
    method = NAMED["diff_instruct"]
    parts = learnt(method)
    got = gradient(parts, method.generator_update(parts, batch(), StepNoise(3)).loss)
    wanted = by_hand(method, parts, lambda x, real, fake: total(x * (fake - real).detach()) / 64)
    torch.testing.assert_close(got, gradient(parts, wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid(alpha: float) -> None:
    """(D_real - D_fake).((D_real - x) - alpha (D_real - D_fake)) over mean |x - D_real|, through both networks."""
    method = replace(NAMED["sid"], alpha=alpha)
    parts = learnt(method)

    def sid(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        scale = total((x - real).abs()).detach() / 64
        return 100 * total((real - fake) * ((real - x) - alpha * (real - fake))) / 64 / scale

    got, wanted = method.generator_update(parts, batch(), StepNoise(3)).loss, by_hand(method, parts, sid)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient(parts, got), gradient(parts, wanted), rtol=1e-9, atol=1e-9)


def test_sim_has_the_gradient_of_its_distance() -> None:
    """-d'(y).(s_p - s(x_t | x)) with d(y) = sqrt(|y|^2 + c^2), here of y = D_fake - D_real, means over numbers."""
    method = NAMED["sim"]
    parts = learnt(method)

    def sim(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        y = (fake - real).detach().requires_grad_()
        (slope,) = torch.autograd.grad((total(y**2) / 64 + 0.00054**2).sqrt().sum(), y)
        scale = (slope / y).detach()  # the factor that d' puts before y
        return -100 * total(scale * (fake - real) * (fake - x))

    got, wanted = method.generator_update(parts, batch(), StepNoise(3)).loss, by_hand(method, parts, sim)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient(parts, got), gradient(parts, wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_f_distill_weighs_the_dmd_direction_by_h(kind: Divergence) -> None:
    method = replace(NAMED["f_distill"], divergence=kind, gan_weight=0.0, batch_ratio=False)
    parts, plain = learnt(method), NAMED["dmd"]
    got = method.generator_update(parts, batch(), StepNoise(3))
    wanted = plain.generator_update(parts, batch(), StepNoise(3))
    if kind == "rkl":
        assert torch.equal(got.loss, wanted.loss)
        return
    h = got.parts["h"].detach()
    assert h.std() > 0
    torch.testing.assert_close(h, method.weights(got.parts["ratio"].detach())[0])
    torch.testing.assert_close(gradient(parts, got.loss), gradient(parts, h * wanted.loss), rtol=1e-9, atol=1e-12)


def test_paper_s_reverse_divergence_is_sid_with_alpha_one_and_an_adversary() -> None:
    ours, sida = NAMED["uni_rkl"], replace(NAMED["sida"], alpha=1.0)
    assert ours == sida
    parts = learnt(ours)
    plain = ours.generator_update(parts, batch(), StepNoise(3), weighted=False).loss
    assert torch.equal(plain, replace(NAMED["sid"], alpha=1.0).generator_update(parts, batch(), StepNoise(3)).loss)


@pytest.mark.parametrize("name", ["uni_rkl", "uni_fkl", "uni_jkl"])
def test_the_divergences_coincide_where_h_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator that cannot tell makes r = 1; before `plain_images` h is 1 by definition."""
    method = NAMED[name]
    parts, first = learnt(method), NAMED["uni_rkl"]
    monkeypatch.setattr(
        "imagewright.methods.uni_instruct.answer_and_judge",
        lambda denoiser, x, sigma, cond: (denoiser(x, sigma, cond), torch.zeros(len(x), 16, dtype=x.dtype)),
    )
    for weighted in (True, False):
        got, wanted = (m.generator_update(parts, batch(), StepNoise(3), weighted=weighted) for m in (method, first))
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(parts, got.loss), gradient(parts, wanted.loss), rtol=1e-9, atol=1e-12)


# --- the discriminator, the phases, the modes -------------------------------------------------------------------------


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


def test_logits_are_the_channel_mean_of_the_encoder() -> None:
    model, x, sigma = unet(), batch().images, torch.linspace(0.1, 3, 6, dtype=torch.float64)
    answer, logits = answer_and_judge(model, x, sigma, batch().cond)
    assert torch.equal(answer, model(x, sigma, batch().cond))
    s = model.scalings(sigma)
    emb = model.network.embed(s.c_noise, batch().cond)
    hidden, _ = model.network.encode(x * images(s.c_in), emb)
    torch.testing.assert_close(logits, hidden.mean(1).flatten(1))
    assert logits.shape == (6, 16) and torch.equal(judge(model, x, sigma, batch().cond), logits)


def test_fake_update() -> None:
    """EDM's loss, and half the cross-entropies beside its sum over numbers; real and generated share the noise."""
    method = NAMED["uni_fkl"]
    parts, noise, given = learnt(method), StepNoise(3), batch()
    update = method.fake_update(parts, given, StepNoise(3))
    latents = noise.normal(given.images)
    with torch.no_grad():
        made = parts.generator.start(2.5 * latents, torch.full((6,), 2.5, dtype=torch.float64), given.cond)
    sigma = method.fake_levels.sample(noise, latents[:, 0, 0, 0])
    disturbance = images(sigma) * noise.normal(latents)
    denoised, fake_logits = answer_and_judge(parts.fake_score, made + disturbance, sigma, given.cond)
    real_logits = judge(parts.fake_score, given.images + disturbance, sigma, given.cond)
    wrong = -torch.sigmoid(real_logits).log().mean(1) - torch.sigmoid(-fake_logits).log().mean(1)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(update.loss, weight * (total((denoised - made) ** 2) + wrong / 2) / 64)
    grads = torch.autograd.grad(update.loss.sum(), list(parts.generator.parameters()), allow_unused=True)
    assert all(g is None for g in grads)


def test_adversary_of_the_generator() -> None:
    """Cross-entropy with "real" of limited logits, over the normaliser."""
    method = replace(NAMED["uni_rkl"], logit_limit=0.05, gan_weight=3.0)
    parts = learnt(method)
    made = method.generator_update(parts, batch(), StepNoise(3))
    without = replace(method, gan_weight=0.0).generator_update(parts, batch(), StepNoise(3))

    def fooling(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        return total((x - real).abs()).detach() / 64

    fool = made.parts["adversarial"]
    assert ((fool > math.log(1 + math.exp(-0.05)) - 1e-9) & (fool < math.log(1 + math.exp(0.05)) + 1e-9)).all()
    torch.testing.assert_close(made.loss - without.loss, 3 * fool / by_hand(method, parts, fooling))


def test_phases() -> None:
    method = replace(NAMED["uni_fkl"], fake_only_images=100, plain_images=200)
    parts = learnt(method)

    def at(seen: int) -> list[Update]:
        return list(method.step(parts, batch(), StepNoise(3, seen), Clock(seen, seen, 1000)))  # type: ignore[arg-type]

    assert [u.part for u in at(99)] == ["fake_score"]
    plain, whole = at(100), at(200)
    assert [u.part for u in plain] == [u.part for u in whole] == ["fake_score", "generator"]
    assert plain[1].parts.keys() == {"diversity"} and "adversarial" in whole[1].parts
    assert all("discriminator" in u[0].parts for u in (plain, whole, at(0)))


def test_modes_while_others_learn() -> None:
    """The generator is in eval mode where it feeds the fake network, the fake network where it judges."""
    seen: list[tuple[str, bool]] = []
    parts = learnt(NAMED["uni_fkl"], dropout=0.13)
    parts.generator.train(), parts.fake_score.train()
    for role in ("generator", "fake_score"):
        network = getattr(parts, role).network
        network.map_layer0.register_forward_hook(lambda m, i, o, r=role, n=network: seen.append((r, n.training)))
    events = NAMED["uni_fkl"].step(parts, batch(), StepNoise(3), Clock(0, 300_000, 1_000_000))
    next(events)
    assert set(seen) == {("generator", False), ("fake_score", True)}
    assert parts.generator.training and parts.fake_score.training
    seen.clear()
    next(events)
    assert set(seen) == {("generator", True), ("fake_score", False)}
    assert parts.fake_score.training and parts.fake_score.network.config.dropout == 0.13
    with pytest.raises(KeyError), evaluating(parts.generator):
        raise KeyError
    assert parts.generator.training


def test_augmentation_is_the_fake_network_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    augment = Augment(p=1.0)
    method = replace(NAMED["uni_fkl"], augment=augment)
    parts, told = learnt(method, augment_dim=augment.augment_dim), []
    embed = type(parts.fake_score.network).embed

    def spy(self: Any, noise_label: Tensor, cond: Condition) -> Tensor:
        told.append(cond.augment is not None)
        return embed(self, noise_label, cond)

    monkeypatch.setattr(type(parts.fake_score.network), "embed", spy)
    method.fake_update(parts, batch(), StepNoise(3))
    assert told == [False, True, True]  # generator; generated images; real ones
    told.clear()
    method.generator_update(parts, batch(), StepNoise(3))
    assert not any(told)


def test_batch_ratio_has_mean_one() -> None:
    method = replace(NAMED["uni_fkl"], batch_ratio=True)
    update = method.generator_update(learnt(method), batch(), StepNoise(3))
    assert float(update.parts["ratio"].mean()) == pytest.approx(1)
    assert not update.parts["ratio"].requires_grad


BAD: Sequence[tuple[dict[str, Any], str]] = [
    ({"divergence": "kl"}, "method.divergence is 'kl'; allowed: rkl, fkl"),
    ({"normaliser": "l2"}, "method.normaliser is 'l2'"),
    ({"sim": -1.0}, "method.sim is -1.0; it must be >= 0"),
    ({"sim": 0.0}, "sim, di and gan_weight are all 0"),
    ({"gan_weight": math.inf}, "method.gan_weight is inf"),
    ({"scale": 0.0}, "method.scale is 0.0; it must be positive"),
    ({"alpha": math.nan}, "method.alpha is nan"),
    ({"start_sigma": -2.5}, "method.start_sigma is -2.5"),
    ({"jeffreys": (1.0, 0.0)}, "method.jeffreys is"),
    ({"logit_limit": 0.0}, "method.logit_limit is 0.0"),
    ({"plain_images": -1}, "method.plain_images is -1"),
]


@pytest.mark.parametrize(("settings", "says"), BAD)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
        UniInstruct(**settings)


def test_bad_teachers() -> None:
    with pytest.raises(UserError, match="the teacher is a Exact"):
        UniInstruct().parts(teacher=Exact(TWO, TWO), spec=SPEC)  # type: ignore[arg-type]
    plain = EDMPrecond(nn.Conv2d(1, 1, 1))
    assert set(UniInstruct().parts(teacher=plain, spec=SPEC).roles) == {"generator", "teacher", "fake_score"}
    with pytest.raises(UserError, match="network is a Conv2d, which has no bottleneck"):
        NAMED["uni_fkl"].parts(teacher=plain, spec=SPEC)
    with pytest.raises(UserError, match=r"method\.augment has labels of 9 numbers; the teacher's network takes 0"):
        UniInstruct(augment=Augment(p=0.12)).parts(teacher=unet(), spec=SPEC)


def test_generator_starts_as_the_teacher() -> None:
    parts = UniInstruct().parts(teacher=unet(), spec=SPEC)
    assert isinstance(parts.generator, FewStepGenerator) and parts.generator.sigma_max == 2.5
    for ours, theirs in zip(parts.generator.parameters(), parts.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs
