"""Uni-Instruct: which methods are its settings, its two updates, phases and modes, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from imagewright.data.augment import Augment
from imagewright.methods.distribution_matching import Generated, matching_loss
from imagewright.methods.uni_instruct import NAMED, Divergence, UniInstruct, answer_and_judge, in_mode, judge
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import BatchNoise, StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes.uni_instruct import FAMILY
from imagewright.types import Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
KINDS = get_args(Divergence)


def images(x: Tensor) -> Tensor:
    """Numbers [N] as images of one pixel."""
    return x[:, None, None, None]


def unet(**more: Any) -> EDMPrecond:
    torch.manual_seed(5)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1, 1), num_blocks=1, attn_resolutions=(),
                            **{"dropout": 0.0, **more})  # fmt: skip
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


def test_diff_instruct_is_its_program_s() -> None:
    """pkulwj1994/diff_instruct, `di_loss.py` and the README's command: P_mean -1.2, P_std 1.2 for both, noise at 1."""
    method, parts = NAMED["diff_instruct"], learnt(NAMED["diff_instruct"])
    assert method.levels == method.fake_levels == LogNormal(mean=-1.2, std=1.2)
    assert parts.generator.sigma_max == 1.0 and method.scale == 1.0 and not method.judges


@pytest.mark.parametrize("same_masks", [True, False])
def test_the_denoisers_hide_the_same_activations(same_masks: bool) -> None:
    """Where the fake network is the teacher, they answer alike with one mask, and not as they do without any."""
    method = replace(NAMED["diff_instruct"], same_masks=same_masks)
    parts = method.parts(teacher=unet(dropout=0.5), spec=SPEC)
    parts.generator.eval()
    parts.teacher.eval().requires_grad_(False)
    answers = []
    for denoiser in (parts.teacher, parts.fake_score):
        denoiser.register_forward_hook(lambda *given: answers.append((*given[1][:2], given[2])))
    noise = BatchNoise(3, 0, range(6), 6)
    with noise.for_networks(0):
        method.generator_update(parts, batch(), noise)
    (x, sigma, real), (_, _, fake) = answers
    assert torch.equal(real, fake)
    assert not parts.teacher.training and parts.fake_score.training
    with torch.no_grad():
        assert torch.equal(real, parts.teacher(x, sigma, batch().cond)) != same_masks


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
def test_the_di_piece_weighs_the_dmd_direction_by_h(kind: Divergence) -> None:
    method = replace(NAMED["dmd"], divergence=kind)
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
    """`run_sida.sh` has --alpha 1 on every data set; 1.2 is SiD's without the adversary."""
    ours = NAMED["uni_rkl"]
    assert ours == NAMED["sida"] and ours.alpha == 1.0 and NAMED["sid"].alpha == 1.2
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
    """EDM's loss, and half the mean cross-entropies beside its sum over numbers; one noise for real and generated."""
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
    torch.testing.assert_close(update.loss, weight * (total((denoised - made) ** 2) + wrong.mean() / 2) / 64)
    grads = torch.autograd.grad(update.loss.sum(), list(parts.generator.parameters()), allow_unused=True)
    assert all(g is None for g in grads)


def test_adversary_of_the_generator() -> None:
    """Mean cross-entropy with "real" of limited logits, over each image's normaliser."""
    method = replace(NAMED["uni_rkl"], logit_limit=0.05, gan_weight=3.0)
    parts = learnt(method)
    made = method.generator_update(parts, batch(), StepNoise(3))
    without = UniInstruct().generator_update(parts, batch(), StepNoise(3))

    def fooling(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        return total((x - real).abs()).detach() / 64

    fool = made.parts["adversarial"]
    assert ((fool > math.log(1 + math.exp(-0.05)) - 1e-9) & (fool < math.log(1 + math.exp(0.05)) + 1e-9)).all()
    torch.testing.assert_close(made.loss - without.loss, 3 * fool.mean() / by_hand(method, parts, fooling))


def test_the_normaliser_is_not_zero_where_the_teacher_is_right() -> None:
    """mean |x - D_real|, at least 1e-5, and the adversary's too."""
    method = NAMED["uni_rkl"]
    parts = learnt(method)
    parts.teacher = lambda x, sigma, cond: made
    noise = StepNoise(3)
    latents, level = noise.normal(batch().images), torch.full((6,), 2.5, dtype=torch.float64)
    made = parts.generator.start(2.5 * latents, level, batch().cond).detach()
    update = method.generator_update(parts, batch(), StepNoise(3))
    plain = method.generator_update(parts, batch(), StepNoise(3), weighted=False)
    adversary = (update.loss - plain.loss).detach()
    torch.testing.assert_close(adversary, (0.01 * update.parts["adversarial"].mean() / 1e-5).detach().expand(6))


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
    with pytest.raises(KeyError), in_mode(False, parts.generator):
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
    ({"plain_images": 5}, "method.plain_images is 5; it has no effect without method.gan_weight above 0, or a div"),
    ({"logit_limit": 3.0}, "method.logit_limit is 3.0; it has no effect without method.gan_weight above 0"),
    ({"jeffreys": (0.4, 0.6)}, "method.jeffreys is (0.4, 0.6); it has no effect without method.divergence jeffreys"),
    ({"huber_c": 0.1}, "method.huber_c is 0.1; it has no effect without method.normaliser huber"),
    ({"ratio_gradient": True}, "method.ratio_gradient is True; it has no effect without method.sim above 0 and a div"),
    ({"sim": 0.0, "di": 1.0, "alpha": 0.5}, "method.alpha is 0.5; it has no effect without method.sim above 0"),
    ({"sim": 0.0, "gan_weight": 1.0, "scale": 2.0}, "method.scale is 2.0; it has no effect without method.sim or"),
    ({"sim": 0.0, "gan_weight": 1.0, "divergence": "js"}, "method.divergence is js; it has no effect without"),
]


@pytest.mark.parametrize(("settings", "says"), BAD)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(").replace(")", r"\)")):
        UniInstruct(**settings)


def test_bad_teachers() -> None:
    with pytest.raises(UserError, match="the teacher is a ConsistencyModel"):
        UniInstruct().parts(teacher=ConsistencyModel(nn.Conv2d(1, 1, 1)), spec=SPEC)  # type: ignore[arg-type]
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


def test_recipes_have_the_published_settings() -> None:
    assert all(recipe.__doc__ and recipe().sampler.nfe == 1 for recipe in FAMILY.values())
    cifar, imagenet = FAMILY["uni-jkl-cifar10"](), FAMILY["uni-jkl-imagenet64"]()
    for run, batch, lr, halflife, augmented in ((cifar, 256, 1e-5, 0.5e6, 0.12), (imagenet, 8192, 4e-6, 2e6, 0.0)):
        method, training = run.method, run.training
        assert (training.batch, training.optimizer.lr, training.ema.halflife_images) == (batch, lr, halflife)
        assert (training.optimizer.betas, training.ema.rampup_ratio) == ((0.0, 0.999), 0.05)
        assert (method.jeffreys, method.alpha, method.scale, method.gan_weight) == ((0.4, 0.6), 1.0, 100.0, 0.01)
        assert (method.fake_only_images, method.plain_images, method.start_sigma) == (100_000, 200_000, 2.5)
        assert (method.augment.p, method.levels.last, method.levels.points) == (augmented, 799, 1000)
        numbers = 3 * (32 if augmented else 64) ** 2  # the program sums over them, and its eps stands beside that sum
        assert training.optimizer.eps == pytest.approx((1e-8 if augmented else 1e-6) / numbers)
        assert training.total_images == 300_000_000
    # The mean cross-entropy is a micro-batch's, so that its size is part of the method: the program's --batch-gpu.
    assert (cifar.training.micro_batch, imagenet.training.micro_batch) == (32, 8)
    assert imagenet.training.precision == "fp16"
    lengths = [FAMILY[f"sid-{data}"]().training.total_images for data in ("cifar10", "imagenet64")]
    assert lengths == [800_000_000, 1_000_000_000]


def test_diff_instruct_s_published_run() -> None:
    """The README's command and `di_train.py`'s defaults; its losses are sums over an image's numbers."""
    run = FAMILY["diff-instruct-cifar10"]()
    t = run.training
    assert run.method == replace(NAMED["diff_instruct"], augment=Augment(p=0.12))
    assert (run.data.labels, run.given["teacher"], run.data.xflip) == (False, "runs/edm-cifar10-uncond", False)
    assert (t.batch, t.total_images, t.optimizer.lr, t.optimizer.betas) == (128, 200_000_000, 1e-5, (0.0, 0.999))
    assert t.optimizer.eps == pytest.approx(1e-8 / 3072)
    assert (t.ema.halflife_images, t.ema.rampup_ratio, t.precision) == (500_000, 0.05, "fp32")
