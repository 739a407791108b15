"""DMD2: who learns when, on what, and where gradients go; the head's optimum; its settings that are DMD."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.bench.claims.plane import PointNetwork
from imagewright.data import Loader, open_images
from imagewright.methods.distribution_matching import KarrasLevels, fresh_noise
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import OptimizerConfig, TrainingConfig
from imagewright.training.learners import Learner
from imagewright.training.trainer import Trainer
from imagewright.types import Batch, Clock, Condition, DataSpec, Frozen, Method, Parts, Trained, Update, UserError

SPEC = DataSpec(name="digits", resolution=8, channels=1, num_classes=10)
PLAIN = DMD2(generator_gan=0.0, fake_gan=0.0, fake_updates=1)
STEPS = (5.0, 1.0)


def teacher() -> EDMPrecond:
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=8,
                            channel_mult=(1, 1), num_blocks=1, attn_resolutions=())  # fmt: skip
    return EDMPrecond(SongUNet(config))


def learnt_parts(method: DMD2 | DMD) -> Parts:
    """The fake score and the generator are moved away from the teacher."""
    parts = method.parts(teacher=teacher(), spec=SPEC)
    torch.manual_seed(6)
    for name in ("generator", "fake_score"):
        for label, p in getattr(parts, name).named_parameters():
            if "head" not in label:
                p.data += 0.05 * torch.randn_like(p)
    return parts


def run(method: DMD2, parts: Parts, step: int = 0, n: int = 4) -> list[Update]:
    images = 0.5 * StepNoise(1).normal(torch.empty(n, 1, 8, 8))
    batch = Batch(images, Condition(label=torch.full((n,), 9)))
    return [e for e in method.step(parts, batch, StepNoise(3, step), Clock(step, step, 1000)) if isinstance(e, Update)]


def trainer(method: DMD2 | DMD, parts: Parts, **settings: Any) -> Trainer:
    config = TrainingConfig(
        total_images=1000, batch=8, optimizer=OptimizerConfig(kind="adamw", lr=1e-3, clip_norm=10.0), **settings
    )
    return Trainer(cast(Method, method), parts, Loader(open_images("digits"), 8, 0), config, cast(Any, None))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- two time scales ------------------------------------------------------------------------------------------------


def test_the_generator_moves_on_every_fifth_step_alone() -> None:
    method = DMD2()
    parts = learnt_parts(method)
    running = trainer(method, parts)
    for step in range(11):
        before = weights(parts.generator), weights(parts.fake_score)
        running.train_step()
        assert same(before[0], weights(parts.generator)) == (step % 5 != 0), step
        assert not same(before[1], weights(parts.fake_score))


def test_the_order_within_a_step() -> None:
    method = DMD2(fake_updates=3)
    parts = learnt_parts(method)
    kinds = [[u.part for u in run(method, parts, step)] for step in range(4)]
    assert kinds == [["generator", "fake_score"], ["fake_score"], ["fake_score"], ["generator", "fake_score"]]


def test_the_generators_update_leaves_no_gradient_in_the_fake_score() -> None:
    """By the trainer's contract: the adversarial loss passes through the fake score's weights, and stops at none."""
    method = DMD2()
    parts = learnt_parts(method)
    updates = method.step(parts, Batch(torch.zeros(4, 1, 8, 8)), StepNoise(0), Clock(0, 0, 100))
    first = next(updates)
    assert isinstance(first, Update)
    Learner(parts.roles["generator"], TrainingConfig(total_images=8, batch=8), torch.device("cpu")).backward(  # type: ignore[arg-type]
        first.loss.sum()
    )
    assert all(p.grad is not None for p in parts.generator.parameters())
    assert all(p.grad is None for p in parts.fake_score.parameters())


def test_the_adversary_moves_the_generator() -> None:
    method = DMD2()
    parts = learnt_parts(method)
    wanted = list(parts.generator.parameters())
    update = run(method, parts)[0]
    with_adversary = torch.autograd.grad(update.loss.sum(), wanted)
    without = torch.autograd.grad(run(replace(method, generator_gan=0.0), parts)[0].loss.sum(), wanted)
    assert not same(list(with_adversary), list(without))


def test_one_batch_of_the_generator_feeds_both_updates() -> None:
    seen: list[Tensor] = []

    class Remembers(nn.Module):
        sigma_max, num_classes = 80.0, 0

        def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            seen.append(x)
            return x / 80

    method = DMD2()
    parts = learnt_parts(method)
    parts.roles["generator"] = Trained(module=Remembers())
    run(method, parts)
    assert len(seen) == 1


# --- what is DMD ----------------------------------------------------------------------------------------------------


def test_without_gan_and_with_one_scale_it_is_dmd_to_the_bit() -> None:
    dmd = DMD(regression_weight=0.0)
    states = []
    for method in (PLAIN, dmd):
        running = trainer(method, learnt_parts(method), micro_batch=4)
        losses = [running.train_step() for _ in range(4)]
        states.append((losses, weights(running.parts.generator), weights(running.parts.fake_score)))
    assert states[0][0] == states[1][0]
    assert same(states[0][1], states[1][1]) and same(states[0][2], states[1][2])


# --- backward simulation --------------------------------------------------------------------------------------------


def test_one_step_begins_at_pure_noise() -> None:
    generator = learnt_parts(PLAIN).generator
    like = torch.empty(3, 1, 8, 8)
    x, sigma, cond = PLAIN.simulate(generator, like, StepNoise(0), PLAIN.level_at(7))
    latents, classes = fresh_noise(generator, like, StepNoise(0))
    assert torch.equal(x, 80 * latents) and torch.equal(sigma, torch.full((3,), 80.0))
    assert cond.label is not None and classes.label is not None and torch.equal(cond.label, classes.label)


def test_later_levels_are_the_generators_own_answers_noised_anew() -> None:
    """The chain is that of the sampler, without its clipping, from the same noise."""
    method = DMD2(sigmas=STEPS)
    generator = learnt_parts(method).generator.double()
    generator.sigma_min = 0.0  # the sampler leaves sigma_min^2 out of what it adds
    like = torch.empty(4, 1, 8, 8).double()
    x, sigma, _ = method.simulate(generator, like, StepNoise(2), 2)
    assert not x.requires_grad and torch.equal(sigma, torch.full((4,), 1.0).double())
    noise = StepNoise(2)
    latents, classes = fresh_noise(generator, like, noise)
    calls: list[Tensor] = []
    MultistepConsistency(sigmas=STEPS, clip=False)(
        generator, latents, classes, noise=noise, on_step=lambda x, start, sigma: calls.append(x)
    )
    torch.testing.assert_close(x, calls[2])


def test_all_workers_train_one_level_and_all_levels_are_trained() -> None:
    method = DMD2(sigmas=STEPS)
    drawn = [method.level_at(step) for step in range(3000)]
    assert (torch.bincount(torch.tensor(drawn)) - 1000).abs().max() < 120
    parts, seen = learnt_parts(method), []

    class Remembers(nn.Module):
        sigma_max, num_classes = 80.0, 0

        def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            seen.append(float(sigma[0]))
            return x / (1 + sigma[:, None, None, None])

    parts.roles["generator"] = Trained(module=Remembers())
    for step in range(4):
        for worker in (0, 1):
            seen.clear()
            next(method.step(parts, Batch(torch.zeros(2, 1, 8, 8)), StepNoise(worker, step), Clock(step, 0, 1)))
            assert seen == [80.0, *STEPS][: drawn[step] + 1]


# --- the adversary --------------------------------------------------------------------------------------------------


class Judge(JudgingDenoiser):
    """Remembers what it is asked."""

    def judge(self, x: Tensor, sigma: Tensor, cond: Condition = Condition()) -> Tensor:  # noqa: B008, frozen
        self.asked: list[tuple[Tensor, Tensor, Condition]] = [*getattr(self, "asked", []), (x, sigma, cond)]
        return super().judge(x, sigma, cond)


def judged_parts(method: DMD2) -> Parts:
    parts = learnt_parts(method)
    parts.roles["fake_score"] = Trained(module=Judge.from_denoiser(parts.fake_score, SPEC.shape), ema=False)
    return parts


def test_losses_and_weights_of_the_adversary() -> None:
    method = DMD2()
    parts = judged_parts(method)
    generator, fake = run(method, parts)
    logits = [parts.fake_score.judge(*asked) for asked in parts.fake_score.asked]
    torch.testing.assert_close(generator.parts["adversarial"], F.softplus(-logits[0]))
    torch.testing.assert_close(generator.loss, generator.parts["matching"] + 3e-3 * F.softplus(-logits[0]))
    torch.testing.assert_close(fake.parts["fake_logit"], logits[1])
    torch.testing.assert_close(fake.parts["real_logit"], logits[2])
    expected = fake.parts["denoising"] + 1e-2 * (F.softplus(logits[1]) + F.softplus(-logits[2]))
    torch.testing.assert_close(fake.loss, expected)
    fake.loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.fake_score.head.parameters())
    assert all(p.grad is None for p in parts.generator.parameters())


def test_real_and_generated_images_are_noised_apart_and_keep_their_labels() -> None:
    method = DMD2()
    parts = judged_parts(method)
    run(method, parts, n=64)
    (_, _, by_generator), (x_fake, s_fake, of_fake), (x_real, s_real, of_real) = parts.fake_score.asked
    assert of_real.label is not None and (of_real.label == 9).all()
    assert of_fake.label is not None and torch.equal(of_fake.label, by_generator.label)
    assert len(of_fake.label.unique()) > 5
    images = 0.5 * StepNoise(1).normal(torch.empty(64, 1, 8, 8))
    added = (x_real - images) / s_real[:, None, None, None]
    assert abs(float(added.mean())) < 0.1 and abs(float(added.std()) - 1) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([s_fake.log(), s_real.log()]))[0, 1])) < 0.4
    flat = torch.stack([(x_fake / s_fake[:, None, None, None]).flatten(), added.flatten()])
    assert abs(float(torch.corrcoef(flat)[0, 1])) < 0.1


def test_the_head_finds_the_log_density_ratio() -> None:
    """Two normal laws, one level: the updates of the method itself, until the head has learnt."""

    class Fixed(nn.Module):
        sigma_max, num_classes = 80.0, 0

        def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
            return 0.5 * x / 80 - 0.4

    torch.manual_seed(0)
    level = KarrasLevels(first=400, last=400)
    sigma = level.at(torch.tensor([400]))
    method = DMD2(generator_gan=0.0, fake_gan=1.0, fake_updates=2, fake_levels=level)
    fake = JudgingDenoiser.from_denoiser(EDMPrecond(PointNetwork(48, 3)), (2, 1, 1)).double()
    parts = Parts(
        generator=Trained(module=Fixed()), teacher=Frozen(module=nn.Identity()), fake_score=Trained(module=fake)
    )
    real, generated = (
        GaussianMixture(torch.full((1, 2, 1, 1), mean).double(), std) for mean, std in ((0.5, 0.8), (-0.4, 0.5))
    )
    adam = torch.optim.Adam(fake.parameters(), lr=6e-3)
    steps = 300
    for step in range(1, 2 * steps, 2):
        noise = StepNoise(8, step)
        (update,) = method.step(parts, Batch(real.sample(256, noise)), noise, Clock(step, 0, 1))
        assert isinstance(update, Update)
        adam.zero_grad()
        update.loss.mean().backward()
        adam.param_groups[0]["lr"] = 6e-3 * (1 - step / (2 * steps))
        adam.step()
    clean = torch.cat([real.sample(2000, StepNoise(9)), generated.sample(2000, StepNoise(10))])
    points, at = clean + sigma * StepNoise(11).normal(clean), sigma.expand(4000)
    truth = real.log_density(points, at) - generated.log_density(points, at)
    with torch.no_grad():
        error = fake.judge(points, at) - truth
    assert truth.std() > 1.0
    assert error.square().mean().sqrt() < 0.15 * truth.std()


# --- numbers of the published program -------------------------------------------------------------------------------


class Given:
    """A `StepNoise` whose draws are handed in; indices count from the first that the law may draw."""

    def __init__(self, normals: list[Tensor], indices: list[Tensor]) -> None:
        self.normals, self.indices = normals, indices

    def normal(self, like: Tensor) -> Tensor:
        return self.normals.pop(0)

    def integers(self, high: int, like: Tensor) -> Tensor:
        return self.indices.pop(0)


class Still:
    """A generator that has made its images."""

    sigma_max, num_classes = 80.0, 0

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def start(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return self.images


class Formula(nn.Module):
    """A fake score of a formula, and logits of one."""

    sigma_data = 0.5

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return 0.9 * torch.sin(x / (1 + sigma[:, None, None, None] ** 2))

    def judge(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return 1.5 * x.sum((1, 2, 3)).sin() + 0.3 * sigma.log()


def test_losses_are_the_published_program_s() -> None:
    """Those of tianweiy/DMD2, `main/edm/edm_guidance.py`, for formulas in place of networks, float64, and its levels
    in float32; four images of 2 x 2 x 2."""
    count = torch.arange(32, dtype=torch.float64).reshape(4, 2, 2, 2)
    made, real = (0.8 * torch.sin(1.0 + count)).requires_grad_(), 0.6 * torch.cos(0.5 * count)
    one, two = torch.sin(0.7 * count + 0.3), torch.cos(0.9 * count)
    first, second = torch.tensor([40, 333, 650, 970]), torch.tensor([5, 500, 720, 999])
    teacher = lambda x, sigma, cond: 0.7 * torch.tanh(x / (1 + sigma[:, None, None, None]))  # noqa: E731
    parts = cast(Any, type("Roles", (), {"generator": Still(made), "teacher": staticmethod(teacher)}))()
    parts.fake_score = Formula()
    noise = Given([made, one, two, two, two, one], [first - 20, second, second, second, first])
    generator, fake = list(DMD2().step(parts, Batch(real), cast(Any, noise), Clock(0, 0, 1)))
    assert isinstance(generator, Update) and isinstance(fake, Update)
    matching, adversary = (generator.parts[name].mean() for name in ("matching", "adversarial"))
    assert matching.item() == pytest.approx(0.22474231775828052, rel=1e-6)
    assert adversary.item() == pytest.approx(0.343210604301358, rel=1e-6)
    assert generator.loss.mean().item() == pytest.approx(0.22474231775828052 + 3e-3 * 0.343210604301358, rel=1e-6)
    (step,) = torch.autograd.grad(matching, made, retain_graph=True)
    assert step.norm().item() == pytest.approx(0.11851748756994697, rel=1e-6)
    assert step[2, 1, 0].tolist() == pytest.approx([-0.0419253389409857, -0.03070496134999797], rel=1e-6)
    assert torch.autograd.grad(adversary, made)[0].norm().item() == pytest.approx(0.2787679458763714, rel=1e-5)
    assert fake.loss.mean().item() == pytest.approx(522.3161991719476 + 1e-2 * 2.4714387218828477, rel=1e-6)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"fake_updates": 0}, r"method\.fake_updates is 0; it must be at least 1"),
        ({"generator_gan": -1.0}, r"method\.generator_gan is -1\.0; it must be >= 0 and finite"),
        ({"fake_gan": float("inf")}, r"method\.fake_gan is inf; it must be >= 0 and finite"),
        ({"fake_gan": 0.0}, r"method\.generator_gan is 0\.003; it needs a fake_gan above 0"),
        ({"sigmas": (1.0, 2.0)}, r"method\.sigmas is \(1\.0, 2\.0\); the levels must be positive and strictly"),
        ({"sigmas": (1.0, -2.0)}, r"method\.sigmas is .* must be positive"),
    ],
)
def test_bad_settings(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DMD2(**bad)


def test_levels_outside_the_teachers_range() -> None:
    with pytest.raises(UserError, match=r"every level must lie between 0\.002 and 80"):
        DMD2(sigmas=(80.0, 1.0)).parts(teacher=teacher(), spec=SPEC)


def test_a_teacher_without_bottleneck() -> None:
    method = DMD2()
    with pytest.raises(UserError, match="network is a Linear, which has no bottleneck"):
        method.parts(teacher=EDMPrecond(nn.Linear(2, 2)), spec=SPEC)
    assert set(PLAIN.parts(teacher=EDMPrecond(nn.Linear(2, 2)), spec=SPEC).roles) == {
        "generator",
        "teacher",
        "fake_score",
    }
