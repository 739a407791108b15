"""Align Your Flow: the map, both objectives against finite differences and closed forms, guidance, the finish."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.adversary import adaptive_weight, gradient_penalty, relativistic
from imagewright.methods.align_your_flow import AlignYourFlow, Point, RelativisticFinish, teacher_velocity
from imagewright.methods.continuous_consistency import tangent as scm_tangent
from imagewright.methods.pairs import column, shortened
from imagewright.models.aligned import AlignedFlowMap
from imagewright.models.consistency import ContinuousConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import (
    ADMUNet,
    ADMUNetConfig,
    DhariwalUNet,
    DhariwalUNetConfig,
    EDM2UNet,
    EDM2UNetConfig,
    SongUNet,
    SongUNetConfig,
)
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.paths.intervals import Intervals, SortedTimes
from imagewright.recipes import RECIPES
from imagewright.samplers import Jumps
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Frozen, Parts, Trained, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
SD = 0.5
COND = Condition(label=torch.tensor([0, 2, -1, 1]))
T = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
S = torch.tensor([0.02, 0.1, 0.6, 0.3], dtype=torch.float64)
KINDS = {
    "song": (SongUNet, SongUNetConfig),
    "adm": (DhariwalUNet, DhariwalUNetConfig),
    "guided-diffusion": (ADMUNet, ADMUNetConfig),
    "edm2": (EDM2UNet, EDM2UNetConfig),
}


def shaken(network: nn.Module) -> nn.Module:
    """With weights that are nowhere near zero, in float64."""
    torch.manual_seed(1)
    for p in network.parameters():
        nn.init.normal_(p, std=0.5 if p.dim() < 2 else p[0].numel() ** -0.5)
    return network.double()


def teacher(kind: str = "song", label: str = "time", **more: Any) -> EDMPrecond:
    network, config = KINDS[kind]
    torch.manual_seed(0)
    made = network(
        config(img_resolution=8, in_channels=1, out_channels=1, label_dim=3, attn_resolutions=(8,), dropout=0.0,
               model_channels=8 if kind == "song" else 32, channel_mult=(1,), num_blocks=1, **more)  # type: ignore[arg-type]
    )  # fmt: skip
    return EDMPrecond(shaken(made), 0.002, 80.0, SD, label).eval()  # type: ignore[arg-type]


def x_t(seed: int = 1) -> Tensor:
    return StepNoise(seed).normal(torch.empty(4, 1, 8, 8, dtype=torch.float64))


def student_of(
    denoiser: EDMPrecond, weights: tuple[float, float] | None = None, *, moved: bool = True
) -> AlignedFlowMap:
    student = AlignedFlowMap.from_teacher(denoiser, weights).eval()
    if moved:
        shaken(student.network)
    return student


def told(cond: Condition = COND, weight: float | None = None) -> Condition:
    return cond if weight is None else replace(cond, weight=torch.full((4,), weight))


def jump(model: Any, x: Tensor, t: Tensor, s: Tensor, cond: Condition = COND) -> Tensor:
    """f in the paper's coordinates, through the model's own face in ours."""
    landed: Tensor = model(SD * x / column(1 - t), SD * t / (1 - t), SD * s / (1 - s), cond)
    return column(1 - s) * landed / SD


@pytest.mark.parametrize("label", ["log", "time"])
def test_the_map_is_a_straight_line_of_its_mean_velocity(label: str) -> None:
    model, x = student_of(teacher(label=label)), x_t()
    for start, end in ((T, S), (S, T), (T, torch.full_like(T, 1e-12))):  # down, up, and to the clean image
        with torch.no_grad():
            f = x + column(end - start) * model.mean_velocity(x, start, end, COND)
            torch.testing.assert_close(jump(model, x, start, end), f, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(jump(model, x, start, start), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_starts_as_its_teacher_wherever_it_goes_and_however_strongly(kind: str) -> None:
    denoiser = teacher(kind)
    student = student_of(denoiser, (1.0, 3.0), moved=False)
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    x = x_t()
    with torch.no_grad():
        velocity = teacher_velocity(parts, x, T, COND)
        for s, weight in ((S, 1.0), (T, 3.0)):
            found = student.mean_velocity(x, T, s, told(weight=weight))
            torch.testing.assert_close(found, velocity, rtol=1e-8, atol=1e-8)
    shaken(student.network)
    with torch.no_grad():
        answers = [student.mean_velocity(x, T, s, told(weight=w)) for s, w in ((S, 1.0), (T, 1.0), (S, 3.0))]
    assert min(float((answers[0] - other).abs().max()) for other in answers[1:]) > 1e-3  # both are heard once trained


@pytest.mark.parametrize(("kind", "label"), [("song", "time"), ("song", "log"), ("adm", "time"), ("edm2", "time")])
def test_the_eulerian_tangent_is_minus_the_derivative_of_f_along_the_flow(kind: str, label: str) -> None:
    denoiser = teacher(kind, label)
    student, x, h = student_of(denoiser), x_t(), 1e-5
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    with torch.no_grad():
        g = AlignYourFlow().tangent(parts, Point(x, T, S, COND), r=1.0)
        v = teacher_velocity(parts, x, T, COND)
        ahead, behind = (jump(student, x + d * h * v, T + d * h, S) for d in (1, -1))
    for ours, theirs in zip(g, -(ahead - behind) / (2 * h), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_the_lagrangian_residual_is_df_ds_less_the_teacher_where_the_student_lands() -> None:
    denoiser = teacher()
    student, x, h = student_of(denoiser), x_t(), 1e-5
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    with torch.no_grad():
        g = AlignYourFlow(objective="lagrangian").tangent(parts, Point(x, T, S, COND), r=1.0)
        slope = (jump(student, x, T, S + h) - jump(student, x, T, S - h)) / (2 * h)
        expected = slope - teacher_velocity(parts, jump(student, x, T, S), S, COND)
    for ours, theirs in zip(g, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


class ExactMap(AlignedFlowMap):
    """The flow map of N(0, c^2) in units of sd."""

    def __init__(self, c: float) -> None:
        super().__init__(nn.Identity(), sigma_data=SD)
        self.c = c / SD

    def mean_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        ratio = ((s**2 + (1 - s) ** 2 * self.c**2) / (t**2 + (1 - t) ** 2 * self.c**2)).sqrt()
        return column((ratio - 1) / (s - t)) * x_t


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
@pytest.mark.parametrize("c", [0.5, 0.2, 1.3])
def test_the_exact_map_of_gaussian_data_leaves_nothing(objective: str, c: float) -> None:
    oracle = GaussianOracle(torch.zeros(1, 8, 8, dtype=torch.float64), std=c)
    exact = ExactMap(c)
    parts = Parts(student=Trained(module=exact), teacher=Frozen(module=oracle))  # type: ignore[arg-type]
    x, method = x_t(), AlignYourFlow(objective=objective)  # type: ignore[arg-type]
    assert float(method.tangent(parts, Point(x, T, S, UNCONDITIONAL), r=1.0).abs().max()) < 1e-10
    assert float(method.tangent(parts, Point(x, T, S, UNCONDITIONAL), r=0.5).abs().max()) > 1e-3  # it can fail
    middle = (T + S) / 2
    far, near = (x + column(b - a) * exact.mean_velocity(x, a, b) for a, b in ((T, S), (T, middle)))
    torch.testing.assert_close(near + column(S - middle) * exact.mean_velocity(near, middle, S), far)
    sigma, to = SD * T / (1 - T), SD * S / (1 - S)  # which is the oracle's own map
    ours = SD * far / column(1 - S)
    torch.testing.assert_close(oracle.flow_map()(SD * x / column(1 - T), sigma, to), ours)


def test_at_the_clean_image_the_tangent_is_that_of_a_consistency_model() -> None:
    """sCM's g is cos(theta) df/dtheta in data units; tan(theta) = t / (1 - t), so dtheta/dt = cos^2 / (1 - t)^2."""
    denoiser = teacher(label="angle")
    student = student_of(denoiser, moved=False)  # deaf to s, so that f(x, t, 0) is the consistency model's
    model = ContinuousConsistencyModel.from_denoiser(denoiser).eval()
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    x, theta = x_t(), torch.atan(T / (1 - T))
    cos = theta.cos()
    in_trig = SD * column(cos / (1 - T)) * x
    sigma = SD * theta.tan()
    with torch.no_grad():
        g = AlignYourFlow().tangent(parts, Point(x, T, torch.zeros_like(T), COND), r=1.0)
        denoised = 0.6 * denoiser(in_trig / column(cos), sigma, COND)  # another flow than the student's own
        velocity = (column(cos) * in_trig - denoised) / column(theta.sin())
        theirs = scm_tangent(model, in_trig, theta, velocity, COND, r=1.0)
        parts = Parts(student=Trained(module=student), teacher=Frozen(module=Scaled(denoiser)))
        g = AlignYourFlow().tangent(parts, Point(x, T, torch.zeros_like(T), COND), r=1.0)
    torch.testing.assert_close(-SD * g, theirs / column(cos) * column(cos**2 / (1 - T) ** 2), rtol=1e-6, atol=1e-8)


class Scaled(nn.Module):
    def __init__(self, denoiser: EDMPrecond) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return 0.6 * self.denoiser(x, sigma, cond)


def gradients(model: AlignedFlowMap, loss: Tensor) -> list[Tensor]:
    return [
        g
        for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
        if g is not None
    ]


@pytest.mark.parametrize(("start", "end"), [(T, S), (S, T)])
def test_the_working_form_is_the_objective_with_its_sign_and_weight(start: Tensor, end: Tensor) -> None:
    denoiser = teacher()
    student, x = student_of(denoiser), x_t()
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    with torch.no_grad():
        g = AlignYourFlow().tangent(parts, Point(x, start, end, COND), r=1.0)
    gap = column(start - end)
    f = jump(student, x, start, end)
    objective = gap.sign() * gap.abs() * f * -g  # w' = |t - s|, and df-/dt = -g
    answer = student.mean_velocity(x, start, end, COND)
    working = gap**2 * (answer - answer.detach() + g).square() / 2
    for ours, theirs in zip(gradients(student, working.sum()), gradients(student, objective.sum()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_without_warm_up_done_it_is_flow_matching() -> None:
    denoiser = teacher()
    student, x = student_of(denoiser), x_t()
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    with torch.no_grad():
        g = AlignYourFlow().tangent(parts, Point(x, T, S, COND), r=0.0)
        v = teacher_velocity(parts, x, T, COND)
        short = shortened(g, 0.1)
    answer = student.mean_velocity(x, T, S, COND)
    ours = gradients(student, (answer - answer.detach() + short).square().sum())
    factor = 1 / (column(g.flatten(1).norm(dim=1)) + 0.1)
    theirs = gradients(student, (factor * (answer - v).square()).sum())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_warm_up_stops_below_one() -> None:
    method = AlignYourFlow(warmup=0.5)
    assert [method.ramp(Clock(0, images, 100)) for images in (0, 25, 50, 99)] == [0.0, 0.495, 0.99, 0.99]
    assert AlignYourFlow(warmup=0.0).ramp(Clock(0, 0, 100)) == 0.99


def test_strength_one_is_the_teacher_and_an_equal_guide_says_nothing() -> None:
    strong, weak = teacher(), teacher(label="log")
    student, x = student_of(strong, (1.0, 3.0)), x_t()

    def velocity(guide: EDMPrecond | None, weight: float) -> Tensor:
        more = {} if guide is None else {"weak": Frozen(module=guide)}
        parts = Parts(student=Trained(module=student), teacher=Frozen(module=strong), **more)
        with torch.no_grad():
            return teacher_velocity(parts, x, T, told(weight=weight))

    alone = velocity(None, 2.0)
    assert torch.equal(velocity(weak, 1.0), alone)
    assert torch.equal(velocity(strong, 2.7), alone)
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=weak))
    with torch.no_grad():
        of_weak = teacher_velocity(parts, x, T, told(weight=1.0))
    torch.testing.assert_close(velocity(weak, 2.5), 2.5 * alone - 1.5 * of_weak, rtol=1e-7, atol=1e-7)


# --- a step -----------------------------------------------------------------------------------------------------------


def small() -> EDMPrecond:
    return teacher().float()


def batch(n: int = 4) -> Batch:
    return Batch(SD * x_t(7)[:n].float(), COND)


def events(method: AlignYourFlow, parts: Parts, fraction: float = 0.95) -> list[Any]:
    found = []
    for event in method.step(parts, batch(), StepNoise(3), Clock(5, int(1000 * fraction), 1000)):
        found.append(event)
    return found


def test_every_image_has_a_strength_of_its_own_and_the_student_is_told_it() -> None:
    method = AlignYourFlow()
    parts = method.parts(teacher=small(), spec=SPEC, weak=small())
    point = method._point(parts.student, batch(), StepNoise(3))
    assert point.cond.weight is not None and len(set(point.cond.weight.tolist())) == 4
    assert bool(((point.cond.weight >= 1) & (point.cond.weight <= 3)).all()) and parts.student.weights == (1.0, 3.0)
    assert bool((point.t > point.s).all()) and "weak" in parts.roles
    alone = AlignYourFlow().parts(teacher=small(), spec=SPEC)
    assert alone.student.weights is None and "weak" not in alone.roles
    assert method._point(alone.student, batch(), StepNoise(3)).cond.weight is None


@pytest.mark.parametrize("law", [SortedTimes(), SortedTimes(mean=12.0), SortedTimes(mean=-12.0)])
def test_a_point_lies_on_the_straight_path_in_units_of_the_data_and_within_the_teachers_levels(law: Intervals) -> None:
    method, given = AlignYourFlow(intervals=law), Batch(SD * x_t(7), COND)
    student = AlignYourFlow().parts(teacher=teacher(), spec=SPEC).student
    low, high = 0.002 / 0.502, 80 / 80.5
    point, noise = method._point(student, given, StepNoise(3)), StepNoise(3)
    t, s = law.sample(noise, given.images[:, 0, 0, 0])
    torch.testing.assert_close(point.t, t.clamp(low, high), rtol=1e-12, atol=0)
    torch.testing.assert_close(point.s, s.clamp(max=high), rtol=1e-12, atol=0)
    of_noise = (point.x - column(1 - point.t) * given.images / SD) / column(point.t)
    torch.testing.assert_close(of_noise, noise.normal(given.images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_a_step_is_the_shortened_tangent_of_its_warm_up(objective: Any) -> None:
    """The loss is |g|^2 / (|g| + c)^2, its gradient 2 g dF / (|g| + c): sums over an image."""
    method = AlignYourFlow(objective=objective, warmup=0.5)
    parts = method.parts(teacher=small(), spec=SPEC)
    shaken(parts.student.network).float()
    point = method._point(parts.student, batch(), StepNoise(3))
    for fraction, r in ((0.1, 0.198), (0.5, 0.99)):
        [update] = events(method, parts, fraction)
        with torch.no_grad():
            g = method.tangent(parts, point, r)
            g = g / (column(g.flatten(1).norm(dim=1)) + 0.1)
        torch.testing.assert_close(update.loss, g.square().flatten(1).sum(1), rtol=1e-4, atol=0)
        found = gradients(parts.student, update.loss.sum())
        answer = parts.student.mean_velocity(*point)
        for ours, theirs in zip(found, gradients(parts.student, (2 * g * answer).sum()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_lagrangians_derivative_is_warmed_up_too() -> None:
    denoiser = teacher()
    student, x = student_of(denoiser), x_t()
    parts = Parts(student=Trained(module=student), teacher=Frozen(module=denoiser))
    with torch.no_grad():
        g = [AlignYourFlow(objective="lagrangian").tangent(parts, Point(x, T, S, COND), r) for r in (0.0, 0.3, 1.0)]
        f = student.mean_velocity(x, T, S, COND)
        v = teacher_velocity(parts, x + column(S - T) * f, S, COND)
    torch.testing.assert_close(g[0], f - v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g[1], 0.7 * g[0] + 0.3 * g[2], rtol=1e-9, atol=1e-9)


def test_every_fake_has_a_strength_of_its_own() -> None:
    student, asked = student_of(teacher(), (1.0, 3.0)), []
    student.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[3].weight))
    AlignYourFlow()._fake(student, Batch(SD * x_t(7), COND), StepNoise(5))
    assert len(set(asked[0].tolist())) == 4 and bool(((asked[0] >= 1) & (asked[0] <= 3)).all())


def test_the_penalty_is_the_square_of_the_slope_of_the_mean_logit() -> None:
    images, slopes = x_t().requires_grad_(True), torch.tensor([1.0, 3.0], dtype=torch.float64)
    logits = images.square().flatten(1).sum(1)[:, None] * slopes
    expected = 16 * images.detach().square().flatten(1).sum(1)  # of 2 x^2
    torch.testing.assert_close(gradient_penalty(logits, images), expected)


def test_fakes_are_one_jump_from_pure_noise_to_the_clean_image() -> None:
    student, given = student_of(teacher()), Batch(SD * x_t(7), COND)
    t = torch.full_like(T, 80 / 80.5)
    x = column(1 - t) * 80 * StepNoise(5).normal(given.images) / SD
    with torch.no_grad():
        clean = SD * (x - column(t) * student.mean_velocity(x, t, torch.zeros_like(t), COND))
        fake = AlignYourFlow()._fake(student, given, StepNoise(5))
    torch.testing.assert_close(fake, clean, rtol=1e-9, atol=1e-9)


def test_the_discriminator_learns_at_a_rate_and_momenta_of_its_own() -> None:
    finish = RelativisticFinish(width=8, lr_scale=0.3, betas=(0.5, 0.9))
    judge = AlignYourFlow(adversarial=finish).parts(teacher=small(), spec=SPEC).roles["discriminator"]
    assert isinstance(judge, Trained) and (judge.lr_scale, judge.betas, judge.ema) == (0.3, (0.5, 0.9), False)


def test_the_finish_pairs_fakes_with_reals_and_weighs_the_map_by_the_ratio_of_gradients() -> None:
    finish = RelativisticFinish(start=0.5, width=8, alpha=0.3)
    method = AlignYourFlow(adversarial=finish)
    parts = method.parts(teacher=small(), spec=SPEC)
    shaken(parts.student.network).float()
    assert [e.part for e in events(method, parts, 0.4)] == ["student"]
    update, judged = events(method, parts)
    assert (update.part, judged.part) == ("student", "discriminator")
    layer = parts.student.network.last_layer
    fooled, found = update.parts["adversarial"], update.parts["map"]
    expected = finish.alpha * adaptive_weight(fooled, found, layer)
    torch.testing.assert_close(update.parts["map_weight"], expected)
    torch.testing.assert_close(update.loss, fooled + expected * found)
    of_map, of_fooled = (torch.autograd.grad(e.mean(), layer, retain_graph=True)[0].norm() for e in (found, fooled))
    torch.testing.assert_close(expected * of_map, finish.alpha * of_fooled, rtol=1e-3, atol=0)
    penalty = judged.parts["r1"] + judged.parts["r2"]
    torch.testing.assert_close(judged.loss, judged.parts["told_apart"] + 0.05 * penalty)
    assert all(bool((judged.parts[name] > 0).all()) for name in ("r1", "r2"))
    # A pair is one image and its partner: the student's loss is the discriminator's turned round.
    torch.testing.assert_close(fooled, torch.log1p(torch.expm1(judged.parts["told_apart"]).reciprocal()))


def test_losses_of_pairs() -> None:
    more, less = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[-1.0, 1.0], [5.0, 5.0]])
    torch.testing.assert_close(
        relativistic(more, less), torch.tensor([math.log1p(math.exp(-2)), math.log1p(math.exp(5))])
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "euler"}, "method.objective is 'euler'; allowed: eulerian, lagrangian"),
        ({"warmup": 1.0}, r"method.warmup is 1.0; it must lie in \[0, 1\)"),
        ({"max_r": 1.5}, r"method.max_r is 1.5; it must lie in \[0, 1\]"),
        ({"weights": (3.0, 1.0)}, r"method.weights is \(3.0, 1.0\)"),
        ({"tangent_c": 0.0}, "method.tangent_c is 0.0"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        AlignYourFlow(**settings)


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(UserError, match="it has no effect without a guide"):
        AlignYourFlow(weights=(1.0, 2.0)).parts(teacher=small(), spec=SPEC)
    with pytest.raises(UserError, match="one guide is all"):
        AlignYourFlow(classifier_free=True).parts(teacher=small(), spec=SPEC, weak=small())
    with pytest.raises(UserError, match="label-dropout above 0"):
        AlignYourFlow(classifier_free=True).parts(teacher=small(), spec=SPEC)


@pytest.mark.parametrize(
    ("name", "batch", "kind", "given"),
    [
        ("ayf-cifar10", 512, "radam", {"teacher": "runs/align-cifar10"}),
        ("ayf-imagenet64", 2048, "adam", {"teacher": "runs/align-imagenet64", "weak": "runs/edm2-imagenet64-xs"}),
    ],
)
def test_published_runs(name: str, batch: int, kind: str, given: dict[str, str]) -> None:
    """50,000 steps, r rising over 10,000, and 3,000 with the adversary."""
    run = RECIPES[name]()
    t, o, m = run.training, run.training.optimizer, run.method
    assert (t.batch, t.total_images, o.kind, o.lr, o.betas) == (batch, 53_000 * batch, kind, 1e-4, (0.9, 0.99))
    assert (o.lr_decay_images, o.lr_ramp_images, o.lr_cooldown_images, o.clip_norm) == (None, 0, 0, None)
    assert [m.ramp(Clock(0, k, 53_000)) for k in (5_000, 10_000, 53_000)] == pytest.approx([0.495, 0.99, 0.99])
    assert m.adversarial.start * 53_000 == pytest.approx(50_000)
    assert (m.objective, m.weights, m.tangent_c, run.given) == ("eulerian", (1.0, 3.0), 0.1, given)
    assert 0.5 ** (batch / t.ema.halflife_images) == pytest.approx(0.9999)


# --- runs -------------------------------------------------------------------------------------------------------------

BASE = RECIPES["edm-digits"]()
NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=(), dropout=0.1)  # fmt: skip
TRAINING = replace(
    BASE.training, total_images=48, batch=16, micro_batch=8, log_images=16, snapshot_images=48, checkpoint_images=16
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = replace(TRAINING, total_images=16)
    return run_experiment(replace(BASE, network=NETWORK, training=training), tmp_path_factory.mktemp("ayf") / "teacher")


@pytest.mark.parametrize("finish", [False, True])
def test_resuming_changes_no_bit(run: Path, finish: bool, resumed_run: Callable[[Experiment], Path]) -> None:
    method = AlignYourFlow(adversarial=RelativisticFinish(start=0.3, width=4) if finish else None)
    given = {"teacher": str(run)} | ({} if finish else {"weak": str(run)})
    experiment = Experiment(
        data=BASE.data, method=method, given=given, sampler=Jumps(num_steps=2, gamma=0.5), training=TRAINING
    )
    resumed_run(experiment)
