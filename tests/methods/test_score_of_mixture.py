"""Score of mixture: the divergence and its gradient, the official program's numbers, who learns when, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.cli.dry_run import StandIns
from imagewright.methods.distribution_matching import Generated, KarrasLevels, matching_direction, surrogate
from imagewright.methods.score_of_mixture import (
    ScoreOfMixtureDistillation,
    ScoreOfMixtureTraining,
    Shares,
    fooling,
    mixture_direction,
    posterior,
    telling,
)
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.networks.dhariwal_unet import DhariwalUNet, DhariwalUNetConfig
from imagewright.networks.mixture import told_share
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.recipes import RECIPES
from imagewright.training.experiment import assemble
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Parts, Update, UserError

SMT, SMD = ScoreOfMixtureTraining(), ScoreOfMixtureDistillation()
SPEC = DataSpec(name="toy", resolution=16, channels=1, num_classes=3)
GRID = torch.linspace(-12, 12, 6001, dtype=torch.float64)
LEVEL = torch.full_like(GRID, 0.6)


def normal(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture(torch.full((1, 1, 1, 1), mean, dtype=torch.float64), std)


REAL = GaussianMixture(torch.tensor([-0.6, 0.9]).double().reshape(2, 1, 1, 1), torch.tensor([0.5, 0.7]).double())


def pixel(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def densities(mean: float, std: float = 0.8) -> tuple[Tensor, Tensor]:
    """p of a normal student and q of the data at LEVEL, on GRID."""
    student = normal(mean, std).log_density(pixel(GRID), LEVEL).exp()
    return student, REAL.log_density(pixel(GRID), LEVEL).exp()


def divergence(mean: float, share: float) -> float:
    p, q = densities(mean)
    m = share * q + (1 - share) * p
    forward, reverse = (torch.trapezoid(d * (d / m).log(), GRID) for d in (p, q))
    return float(forward / share + reverse / (1 - share))


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_posteriors_make_the_score_of_the_mixture(share: float) -> None:
    student, x = normal(0.7, 0.8), torch.linspace(-2, 2, 9, dtype=torch.float64)
    sigma, a, h = torch.full_like(x, 0.6), torch.full_like(x, share), 1e-5

    def log_mixture(x: Tensor) -> Tensor:
        q, p = (law.log_density(pixel(x), sigma).exp() for law in (REAL, student))
        return (share * q + (1 - share) * p).log()

    log_ratio = REAL.log_density(pixel(x), sigma) - student.log_density(pixel(x), sigma)
    d = posterior(log_ratio, a)
    got = d * REAL.score(pixel(x), sigma).flatten() + (1 - d) * student.score(pixel(x), sigma).flatten()
    torch.testing.assert_close(got, (log_mixture(x + h) - log_mixture(x - h)) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_step_is_the_gradient_of_the_divergence(share: float) -> None:
    """For a student m + s z: dD/dm = E[S(x; 0) - S(x; a)] / a, m = share of both laws, against differences."""
    mean, h = 0.7, 1e-4
    student, (p, q) = normal(mean, 0.8), densities(mean)
    d = share * q / (share * q + (1 - share) * p)
    fake, real = (law.score(pixel(GRID), LEVEL).flatten() for law in (student, REAL))
    mixed = d * real + (1 - d) * fake
    got = float(torch.trapezoid(p * (fake - mixed), GRID)) / share
    assert got == pytest.approx((divergence(mean + h, share) - divergence(mean - h, share)) / (2 * h), rel=1e-5)


def test_divergence_at_one_half_is_four_times_jensen_shannon_and_near_zero_the_forward_kl() -> None:
    p, q = densities(0.7)
    middle = (p + q) / 2
    jensen_shannon = sum(float(torch.trapezoid(d * (d / middle).log(), GRID)) for d in (p, q)) / 2
    assert divergence(0.7, 0.5) == pytest.approx(4 * jensen_shannon, rel=1e-9)
    forward = float(torch.trapezoid(q * (q / p).log(), GRID))
    reverse = float(torch.trapezoid(p * (p / q).log(), GRID))
    assert divergence(0.7, 1e-4) == pytest.approx(forward, rel=1e-2)
    assert divergence(0.7, 1 - 1e-4) == pytest.approx(reverse, rel=1e-2)
    assert abs(forward - reverse) > 0.1 * forward


def test_small_shares_take_the_forward_direction() -> None:
    """(S(x; 0) - S(x; a)) / a -> (q / p) (s_p - s_q)."""
    log_ratio = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    share = torch.full_like(log_ratio, 1e-7)
    torch.testing.assert_close(posterior(log_ratio, share) / share, log_ratio.exp(), rtol=1e-5, atol=0)


def test_terms_of_the_adversary_and_their_ends() -> None:
    fake, real = torch.tensor([0.3, -2.0, 1.0]).double(), torch.tensor([1.3, 0.2, -0.7]).double()
    share = torch.tensor([0.2, 0.5, 0.9]).double()
    shift = (share / (1 - share)).log()
    expected = (1 - share) * F.softplus(fake + shift) + share * F.softplus(-real - shift)
    torch.testing.assert_close(telling(fake, real, share), expected)
    torch.testing.assert_close(fooling(fake, share), F.softplus(-fake - shift))
    torch.testing.assert_close(posterior(fake, share), torch.sigmoid(fake + shift))
    ends = torch.tensor([0.0, 1.0, 1.0]).double()
    fake, real = fake.requires_grad_(), real.requires_grad_()
    for value in (telling(fake, real, ends), posterior(fake, ends), fooling(fake, ends.clamp(min=0.5))):
        assert bool(value.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value.sum(), (fake, real), allow_unused=True)
                   if g is not None)  # fmt: skip
    assert torch.equal(telling(fake, real, ends), torch.zeros(3).double())
    assert torch.equal(posterior(fake, ends), ends)


# --- the official program's numbers -----------------------------------------------------------------------------------

N = 4
COUNT = torch.arange(N * 8, dtype=torch.float64)
X, Y = (COUNT.sin() * 0.7).reshape(N, 2, 2, 2), ((1.3 * COUNT).cos() * 0.6).reshape(N, 2, 2, 2)
SIGMA, SHARE, WITH_ZERO = torch.tensor(
    [[0.05, 0.4, 2.0, 9.0], [0.2, 0.5, 0.9, 1.0], [0.0, 0.5, 0.9, 1.0]], dtype=torch.float64
)
PICKED = [0, 9, 18, 27]


class Fixed:
    """A law that always draws the same."""

    first, extra, special = 1, 0.0, ()

    def __init__(self, drawn: Tensor) -> None:
        self.drawn = drawn

    def sample(self, noise: Any, like: Tensor) -> Tensor:
        return self.drawn


class Waves:
    """The noises that the program was given."""

    count = 0

    def normal(self, like: Tensor) -> Tensor:
        self.count += 1
        return (1.7 * COUNT + self.count - 1).sin().reshape(N, 2, 2, 2)


def shrunk(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + pixel(sigma))


class Score:
    """A smooth stand-in that hears everything."""

    sigma_data = 0.5

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        assert cond.share is not None
        a = pixel(cond.share)
        return shrunk(x, sigma).tanh() * (1 + 0.3 * a) + 0.1 * a**2 * x.cos()


class Fake:
    sigma_data = 0.5

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return shrunk(x, sigma).tanh()

    def judge(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return x.flatten(1).mean(1) + 0.3 * sigma.log()


def teacher(x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    return 0.8 * shrunk(x, sigma).sin() + 0.05


def fixed(method: Any, share: Tensor = SHARE) -> Any:
    law: Any = Fixed(SIGMA)
    shares: Any = Fixed(share)
    gan = {"score_gan": 0.0, "generator_gan": 0.0} if method is SMT else {}
    return replace(method, levels=law, score_levels=law, generator_shares=shares, score_shares=shares, **gan)


def of_generator(method: Any, parts: Any) -> tuple[float, list[float]]:
    """The mean loss, and some numbers of its gradient."""
    x = X.clone().requires_grad_()
    noise: Any = Waves()
    loss = fixed(method).generator_update(parts, Generated(x, UNCONDITIONAL), noise).loss.mean()
    (slope,) = torch.autograd.grad(loss, x)
    return float(loss.detach()), slope.flatten()[PICKED].tolist()


def test_smt_is_the_official_programs() -> None:
    """`main/sjsd/sjsd_guidance.py` run on these stand-ins and noises."""
    parts = SimpleNamespace(score=Score())
    loss, slope = of_generator(SMT, parts)
    assert loss == pytest.approx(0.44588434850139125, rel=1e-12)
    wanted = [-0.008642748179337668, -0.024103101273195364, 0.012870174074787206, -0.005366104732582717]
    assert slope == pytest.approx(wanted, rel=1e-11)
    noise: Any = Waves()
    update = fixed(SMT).score_update(parts, Generated(X, UNCONDITIONAL), Batch(Y), noise)
    wanted = [1.0826993856792166, 0.6483408943701745, 1.116341321449773, 3.2338726501561226]
    assert update.loss.tolist() == pytest.approx(wanted, rel=1e-12)


def test_smd_is_the_official_programs() -> None:
    """`main/sjsd_dist/sjsd_dist_guidance.py` run on these stand-ins and noises, adversary included."""
    parts = SimpleNamespace(teacher=teacher, fake_score=Fake())
    loss, slope = of_generator(SMD, parts)
    assert loss == pytest.approx(0.039832354851947964, rel=1e-12)
    wanted = [-0.006625148837472819, 0.00111788542920103, -0.010188117308928562, 0.0025623914093710898]
    assert slope == pytest.approx(wanted, rel=1e-11)
    noise: Any = Waves()
    method = fixed(SMD, WITH_ZERO)
    update = method.score_update(parts, Generated(X, UNCONDITIONAL), Batch(Y), noise)
    assert float(update.parts["denoising"].mean()) == pytest.approx(1.4828344187340252, rel=1e-12)


def test_smds_mixture_loss_is_the_official_programs() -> None:
    parts = SimpleNamespace(teacher=teacher, fake_score=Fake())

    class Late(Waves):
        count = -1  # the first draw is the denoising loss's

    noise: Any = Late()
    method = fixed(SMD, WITH_ZERO)
    update = method.score_update(parts, Generated(X, UNCONDITIONAL), Batch(Y), noise)
    wanted = 0.0020927026446870313 + 0.0011935451083168196
    assert float(update.parts["mixture"].mean()) == pytest.approx(wanted, rel=1e-11)


def test_smd_at_share_one_is_dmds_step() -> None:
    parts = SimpleNamespace(teacher=teacher, fake_score=Fake())
    one: Any = Fixed(torch.ones(N).double())
    noise: Any = Waves()
    update = replace(fixed(SMD), generator_shares=one).generator_update(parts, Generated(X, UNCONDITIONAL), noise)
    noisy = X + pixel(SIGMA) * Waves().normal(X)
    step = matching_direction(teacher(noisy, SIGMA, UNCONDITIONAL), Fake()(noisy, SIGMA, UNCONDITIONAL), X)
    torch.testing.assert_close(update.loss, surrogate(X, step), rtol=1e-13, atol=0)


def test_smt_at_share_one_has_dmds_unit() -> None:
    fake, real = (3 * COUNT).sin().reshape(X.shape), (5 * COUNT).cos().reshape(X.shape)
    step = mixture_direction(fake, real, real, X)
    torch.testing.assert_close(step, matching_direction(real, fake, X), rtol=1e-5, atol=0)
    assert torch.equal(mixture_direction(fake, fake, fake, X), torch.zeros_like(X))


# --- shares -----------------------------------------------------------------------------------------------------------


def test_laws_of_the_shares() -> None:
    like = torch.empty(20_000, dtype=torch.float64)
    drawn = {
        name: law.sample(StepNoise(i), like)
        for i, (name, law) in enumerate(
            {
                "smt": SMT.generator_shares,
                "smt score": SMT.score_shares,
                "smd": SMD.generator_shares,
                "smd score": SMD.score_shares,
            }.items()
        )
    }
    assert drawn["smt"].min() == 0.001 and drawn["smt"].max() == 1 and abs(drawn["smt"].mean() - 0.5005) < 0.01
    assert drawn["smd"].min() == 0.5 and drawn["smd"].max() == 1
    for value in (0.0, 0.5, 1.0):
        assert float((drawn["smt score"] == value).double().mean()) == pytest.approx(0.5 / 3, abs=0.01)
    assert float((drawn["smd score"] == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((drawn["smd score"] == 0.5).double().mean()) < 0.005


# --- networks ---------------------------------------------------------------------------------------------------------


def unet(resolution: int = 16) -> SongUNet:
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=resolution, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5)
    return network


def adm() -> DhariwalUNet:
    config = DhariwalUNetConfig(img_resolution=16, in_channels=1, out_channels=1, label_dim=3, model_channels=32,
                                channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip
    return DhariwalUNet(config)


@pytest.mark.parametrize("network", [unet(), adm()], ids=["song", "dhariwal"])
def test_networks_hear_the_share(network: nn.Module) -> None:
    told = told_share(network)
    shares = (None, torch.tensor([0.5, 0.1]))
    emb = [told.embed(torch.zeros(2), Condition(share=s)) for s in shares]  # type: ignore[operator]
    assert torch.equal(emb[0][0], emb[1][0])
    assert not torch.allclose(emb[0][1], emb[1][1])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # DDPM++ without labels and augmentation, and 128 x 512 more weights that hear the share's 128 waves.
        ("smt-cifar10-uncond", 55_733_891 - 9 * 128 + 128 * 512),
        ("smt-imagenet64", 295_899_267),  # Fourier features have none
    ],
)
def test_the_scores_network_has_the_published_size(name: str, count: int) -> None:
    with torch.device("meta"):
        roles = assemble(RECIPES[name](), sources=StandIns()).parts.roles
    assert sum(p.numel() for p in roles["score"].module.network.parameters()) == count


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match="network is a Linear, which cannot be told a share of real images"):
        told_share(nn.Linear(2, 2))


# --- parts and turns --------------------------------------------------------------------------------------------------


def learnt(method: Any) -> Parts:
    torch.manual_seed(1)
    parts: Parts
    if isinstance(method, ScoreOfMixtureTraining):
        parts = method.parts(network=unet().double(), spec=SPEC, warmup=EDMPrecond(unet().double()))
    else:
        parts = method.parts(teacher=EDMPrecond(unet().double()), spec=SPEC)
        parts.teacher.requires_grad_(False).eval()
    for role in parts.roles.values():
        for p in role.module.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return parts


def run(method: Any, parts: Any, step: int) -> list[Update]:
    images = 0.5 * StepNoise(1).normal(torch.empty(4, 1, 16, 16, dtype=torch.float64))
    batch = Batch(images, Condition(label=torch.arange(4) % 3))
    events = method.step(parts, batch, StepNoise(3, step), Clock(step, step, 10))
    return [e for e in events if isinstance(e, Update)]


@pytest.mark.parametrize(("method", "score"), [(SMT, "score"), (SMD, "fake_score")])
def test_who_learns_when_and_from_what(method: Any, score: str) -> None:
    parts = learnt(method)
    assert [[u.part for u in run(method, parts, step)] for step in (0, 1, 4, 5)] == [
        ["generator", score], [score], [score], ["generator", score],
    ]  # fmt: skip
    first, second = run(method, parts, 5)
    learner, judge = parts.generator, getattr(parts, score)
    inputs = list(learner.parameters())
    assert any(g is not None and g.abs().sum() > 0
               for g in torch.autograd.grad(first.loss.sum(), inputs, allow_unused=True))  # fmt: skip
    second.loss.sum().backward()
    assert all(p.grad is None for p in learner.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.head.parameters())
    assert first.rate == (pytest.approx(0.5) if method is SMT else 1.0)
    assert second.rate == 1.0


def test_the_mixtures_loss_reaches_head_and_encoder_alone() -> None:
    """S's denoisers are held fixed; what d is made of learns."""
    parts = learnt(SMD)
    (update,) = run(SMD, parts, 1)
    update.parts["mixture"].sum().backward()
    reached = {name for name, p in parts.fake_score.named_parameters() if p.grad is not None}
    assert any(name.startswith("head") for name in reached) and any(".enc." in name for name in reached)
    assert not any(".dec." in name for name in reached)


def test_smts_generator_starts_warm_or_untrained() -> None:
    warm, network = EDMPrecond(unet()), unet()
    parts = SMT.parts(network=network, spec=SPEC, warmup=warm)
    assert all(torch.equal(a, b) for a, b in zip(parts.generator.parameters(), warm.parameters(), strict=True))
    cold = SMT.parts(network=network, spec=SPEC)
    assert all(torch.equal(a, b) for a, b in zip(cold.generator.parameters(), network.parameters(), strict=True))
    assert isinstance(parts.score, JudgingDenoiser) and parts.roles["score"].lr_scale == 5
    alone = replace(SMT, generator_gan=0.0, score_gan=0.0).parts(network=network, spec=SPEC)
    assert not hasattr(alone.score, "head")


# --- recipes and bad input --------------------------------------------------------------------------------------------


def test_recipes_have_the_published_settings() -> None:
    """`experiments/`: the four scripts; seven processes of 40 images."""
    for name, lr, score_rate in (("smt-cifar10-uncond", 1e-4, 5), ("smt-imagenet64", 5e-6, 10)):
        run = RECIPES[name]()
        assert run.method == replace(SMT, score_rate=score_rate)
        assert (run.training.optimizer.lr, run.network.dropout) == (lr, 0.13 if "cifar10" in name else 0.0)
    for name, lr in (("smd-cifar10-uncond", 5e-5), ("smd-imagenet64", 2e-6)):
        run = RECIPES[name]()
        assert (run.method, run.training.optimizer.lr) == (SMD, lr)
    for name in ("smt-cifar10-uncond", "smt-imagenet64", "smd-cifar10-uncond", "smd-imagenet64"):
        t = RECIPES[name]().training
        assert RECIPES[name]().data.xflip == ("cifar10" in name)  # main/data/*_dataset.py
        assert (t.batch, t.micro_batch, t.total_images, t.precision) == (280, 40, 280 * 400_000, "bf16")
        assert (t.optimizer.kind, t.optimizer.weight_decay, t.optimizer.clip_norm) == ("adamw", 0.01, 10.0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: Shares(first=5, last=2), r"shares\.first is 5 and last is 2; they must satisfy 0 <= first <= last"),
        (lambda: Shares(extra=2.0), r"shares\.extra is 2\.0 .* must lie from 0 to 1"),
        (lambda: Shares(special=()), r"special is \(\); they must lie"),
        (lambda: replace(SMT, score_updates=0), r"method\.score_updates is 0; it must be a whole number >= 1"),
        (lambda: replace(SMD, generator_gan=-1.0), r"method\.generator_gan is -1\.0; it must be >= 0"),
        (lambda: replace(SMT, score_gan=0.0), r"generator_gan is 0\.003; it needs a score_gan above 0"),
        (lambda: replace(SMT, score_rate=math.nan), r"method\.score_rate is nan; it must be positive"),
        (lambda: replace(SMD, generator_shares=Shares()), r"generator_shares reach 0, at which there is no step"),
        (lambda: replace(SMT, generator_shares=Shares(first=1, extra=0.5)), r"generator_shares reach 0"),
    ],
)
def test_bad_settings(bad: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        bad()


def test_levels_that_the_warm_up_does_not_know() -> None:
    method = replace(SMT, score_levels=KarrasLevels(sigma_max=90.0))
    with pytest.raises(UserError, match=r"method\.score_levels go from 0\.002 to 90"):
        method.parts(network=unet(), spec=SPEC)
