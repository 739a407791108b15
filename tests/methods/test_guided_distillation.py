"""Guided distillation: both stages' targets against definitions and closed forms, steps, rates, samplers, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.guided_distillation import (
    GuidedDistillation,
    cosine_levels,
    guided_answer,
    guided_sampler,
)
from imagewright.methods.progressive_distillation import ProgressiveDistillation, two_steps
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.weighted import GuidedDenoiser, at_weight
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.recipes import RECIPES
from imagewright.samplers import DDIM, Euler
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.types import (
    UNCONDITIONAL,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Follow,
    Frozen,
    Parts,
    Restart,
    Trained,
    Update,
    UserError,
)

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=3)
LABELS = torch.tensor([0, 2, 1, 1])
NETWORK = SongUNetConfig(
    img_resolution=8,
    in_channels=1,
    out_channels=1,
    label_dim=3,
    model_channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attn_resolutions=(),
    dropout=0.0,
    label_dropout=0.1,
)


def teacher() -> EDMPrecond:
    torch.manual_seed(0)
    network = SongUNet(NETWORK)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    return EDMPrecond(network).eval()


def batch() -> Batch:
    return Batch(0.5 * StepNoise(1).normal(torch.empty(4, 1, 8, 8)), Condition(label=LABELS))


def cond(*weights: float) -> Condition:
    return Condition(label=LABELS, weight=torch.tensor(weights, dtype=torch.float64))


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def euler(x: Tensor, t: Tensor, to: Tensor, answer: Tensor) -> Tensor:
    return answer + column(to / t) * (x - answer)


# --- exact classes ----------------------------------------------------------------------------------------------------

ONE_EACH = GaussianMixture(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1), 0.4,
                           classes=torch.arange(3))  # fmt: skip
"""Every class a Gaussian, so that what is known of a class is linear in x."""
X = torch.tensor([0.3, -2.0, 5.0, 0.1], dtype=torch.float64).reshape(4, 1, 1, 1)
SIGMA = torch.tensor([0.05, 0.7, 4.0, 40.0], dtype=torch.float64)


def test_the_guided_answer_is_the_papers_and_its_noise_agrees() -> None:
    """x_w = (1 + w) x_c - w x_u, and the same of eps = (x - answer) / sigma; w = 0 is the class's own, linear in w."""
    of_class, of_none = ONE_EACH(X, SIGMA, Condition(label=LABELS)), ONE_EACH(X, SIGMA)
    for w in (0.0, 1.5, 4.0):
        found = guided_answer(ONE_EACH, X, SIGMA, cond(*[1 + w] * 4))
        torch.testing.assert_close(found, (1 + w) * of_class - w * of_none)
        eps = [(X - answer) / column(SIGMA) for answer in (found, of_class, of_none)]
        torch.testing.assert_close(eps[0], (1 + w) * eps[1] - w * eps[2])
    assert torch.equal(guided_answer(ONE_EACH, X, SIGMA, cond(1, 1, 1, 1)), of_class)
    mixed = guided_answer(ONE_EACH, X, SIGMA, cond(1, 3, 2, 5))  # one strength for each
    torch.testing.assert_close(mixed[1], (3 * of_class - 2 * of_none)[1])


def test_the_weight_is_the_larger_of_both_errors() -> None:
    """max(SNR, 1) |x error|^2 is max(|x error|^2, |eps error|^2): eps = (x_t - x) / sigma."""
    method = GuidedDistillation(start_steps=4)
    x, aim = StepNoise(2).normal(X), StepNoise(3).normal(X)
    update = method.learnt(lambda *told: x, X, SIGMA, UNCONDITIONAL, aim, 1.0)
    errors = [(x - aim).square(), ((X - x) / column(SIGMA) - (X - aim) / column(SIGMA)).square()]
    torch.testing.assert_close(update.loss, torch.maximum(*errors).flatten(1).mean(1))


@pytest.mark.parametrize("direction", ["sample", "encode"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_one_step_with_the_target_lands_where_two_do(direction: str, stochastic: bool) -> None:
    """Of the guided oracle at one strength; and the steps of each stage are where they belong."""
    if stochastic and direction == "encode":
        pytest.skip("an encoder draws no noise")
    steps = 4
    method = GuidedDistillation(start_steps=steps, direction=direction, stochastic=stochastic)  # type: ignore[arg-type]
    model = EDMPrecond(nn.Identity())
    images = torch.zeros(400, 1, 1, 1, dtype=torch.float64)
    t, mid, to = method._intervals(steps, model, images, StepNoise(4))
    times = [(value.atan() / math.atan(80) * steps) for value in (t, mid, to)]
    assert {round(float(v), 1) for v in times[0]} == ({1, 2, 3, 4} if direction == "sample" else {0, 1, 2, 3})
    far = {round(float(a - b), 1) for a, b in zip(times[0], times[2], strict=True)}
    assert far == ({2, 1} if stochastic else {1} if direction == "sample" else {-1})
    half = {round(float(a - b), 1) for a, b in zip(times[0], times[1], strict=True)}
    assert half == ({1, 0.5} if stochastic else {0.5} if direction == "sample" else {-0.5})
    told = Condition(label=LABELS[:1].expand(400), weight=torch.full((400,), 2.5, dtype=torch.float64))

    def ask(x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return guided_answer(ONE_EACH, x, sigma, cond)

    x = column(t) * StepNoise(5).normal(images)
    aim = two_steps(ask, x, t, mid, to, told)  # type: ignore[arg-type]
    first = euler(x, t, mid, ask(x, t, told))
    second = euler(first, mid, to, ask(first, mid, told))
    torch.testing.assert_close(euler(x, t, to, aim), second, rtol=1e-9, atol=1e-9)
    clean = to == 0
    if direction == "sample":  # of the last step the target is the second answer
        assert bool(clean.any())
        torch.testing.assert_close(aim[clean], ask(first, mid, told)[clean])


def test_the_best_student_of_gaussian_classes_is_the_product_of_the_teachers_steps() -> None:
    """At w = 0 every step scales x - mean by a factor; so does the target's, by the product of two."""
    t, mid, to = (torch.full((4,), v, dtype=torch.float64) for v in (2.0, 1.1, 0.4))

    def factor(start: Tensor, end: Tensor) -> Tensor:
        kept = 0.16 / (0.16 + start**2)
        return kept + end / start * (1 - kept)

    told = Condition(label=LABELS)
    aim = two_steps(ONE_EACH, X, t, mid, to, told)
    mean = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)[LABELS].reshape(4, 1, 1, 1)
    landed = euler(X, t, to, aim) - mean
    torch.testing.assert_close(landed, column(factor(t, mid) * factor(mid, to)) * (X - mean))


# --- steps ------------------------------------------------------------------------------------------------------------


def events(method: GuidedDistillation, parts: Parts, clock: Clock) -> list[Any]:
    return list(method.step(parts, batch(), StepNoise(3), clock))


def test_stage_one_then_halvings_each_begun_anew() -> None:
    method = GuidedDistillation(start_steps=4, first=0.5)
    assert method.stages == (4, 2, 2, 1, 1)
    seen = [method.steps_at(images, 100) for images in (0, 49, 50, 59, 60, 79, 80, 99)]
    assert seen == [8, 8, 4, 4, 2, 2, 1, 1]
    parts = method.parts(teacher=teacher(), spec=SPEC)
    kinds = []
    for step in range(10):
        kinds.append([type(e).__name__ for e in events(method, parts, Clock(step, 10 * step, 100))])
    begun = ["Follow", "Restart", "Update"]
    assert [k for k in kinds if k != ["Update"]] == [begun] * 3 and kinds[5] == kinds[6] == kinds[8] == begun
    [follow, restart, _] = events(method, parts, Clock(5, 50, 100))
    assert follow == Follow("teacher", "student", 0.0) and restart == Restart("student")


def test_rates_fall_within_each_stage() -> None:
    method = GuidedDistillation(start_steps=4, first=0.5, halving_rate=0.2)
    rates = [method.rate_at(Clock(0, images, 100)) for images in (0, 25, 50, 55, 60, 70, 80)]
    assert rates == pytest.approx([1, 0.5, 0.2, 0.1, 0.2, 0.1, 0.2])
    assert GuidedDistillation(start_steps=4, anneal=False).rate_at(Clock(0, 49, 100)) == 1


def test_stage_one_learns_the_guided_answer_at_a_strength_for_each_image() -> None:
    method = GuidedDistillation(start_steps=4)
    known = teacher()
    parts = method.parts(teacher=known, spec=SPEC)
    asked: list[Condition] = []
    parts.student.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[2]))
    [update] = events(method, parts, Clock(0, 0, 100))
    weight = asked[0].weight
    assert weight is not None and len(set(weight.tolist())) == 4 and bool(((weight >= 1) & (weight <= 5)).all())
    # The student starts as the conditional teacher, so at w = 0 its loss would be nothing.
    assert float(update.loss.detach().mean()) > 1e-4
    alone = replace(method, weights=(1.0, 1.0 + 1e-9))
    [update] = events(alone, alone.parts(teacher=known, spec=SPEC), Clock(0, 0, 100))
    assert float(update.loss.detach().max()) < 1e-10


def test_a_halving_asks_student_and_teacher_at_one_strength_for_each_image() -> None:
    method = GuidedDistillation(start_steps=4)
    parts = method.parts(teacher=teacher(), spec=SPEC)
    asked: list[Tensor] = []
    for model in (parts.student, parts.teacher):
        model.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[2].weight))
    events(method, parts, Clock(1, 55, 100))
    assert len(asked) == 3 and len(set(asked[0].tolist())) == 4
    assert all(torch.equal(weight, asked[0]) for weight in asked)


@pytest.mark.parametrize("images", [10, 55])
def test_both_stages_steps_are_at_the_rate_that_is_left(images: int) -> None:
    method = GuidedDistillation(start_steps=4, halving_rate=0.5)
    clock = Clock(1, images, 100)
    update = events(method, method.parts(teacher=teacher(), spec=SPEC), clock)[-1]
    assert update.rate == method.rate_at(clock) and update.rate not in (0.5, 1.0)


@pytest.mark.parametrize("upwards", [False, True])
def test_levels_are_the_cosine_schedules_within_the_models_range(upwards: bool) -> None:
    """At 1,024 steps the lowest would be below sigma_min; every one is above the last."""
    levels = cosine_levels(1024, 0.002, 80.0, upwards, torch.device("cpu"), torch.float64)
    share = torch.arange(1025, dtype=torch.float64) / 1024
    plain = (share * math.atan(80)).tan()
    assert float(levels[0]) == (0.002 if upwards else 0.0) and float(plain[1]) < 0.002
    assert bool((levels[1:] >= 0.002).all()) and bool((levels.diff() > 0).all())
    torch.testing.assert_close(levels[2:], plain[2:], rtol=1e-6, atol=0)


def test_stage_one_draws_the_cosine_schedules_time_uniformly() -> None:
    method, like = GuidedDistillation(start_steps=4), torch.zeros(20_000, 1, 1, 1, dtype=torch.float64)
    levels = method._levels(teacher(), like, StepNoise(1))
    assert bool(((levels >= 0.002) & (levels <= 80)).all())
    time = levels.atan() / math.atan(80)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(float((time < share).double().mean()) - share) < 0.012


@pytest.mark.parametrize(("name", "batch", "rate"), [("guided-cifar10", 128, 5e-5), ("guided-imagenet64", 2048, 1e-4)])
def test_published_runs(name: str, batch: int, rate: float) -> None:
    """Halvings as released: 50,000 steps each, twice as many to two and to one; a loss that is a mean, with its eps."""
    run = RECIPES[name]()
    t, o, m = run.training, run.training.optimizer, run.method
    assert (t.batch, o.kind, o.lr, o.betas, o.eps, o.clip_norm) == (batch, "adam", 3e-4, (0.9, 0.999), 1e-8, 1.0)
    assert o.lr * m.halving_rate == pytest.approx(rate) and m.anneal and m.weights == (1.0, 5.0)
    assert (m.stages[0], m.stages[-5:], len(m.stages)) == (512, (4, 2, 2, 1, 1), 12) and m.first == 0.5
    assert t.total_images == 2 * 12 * 50_000 * batch and run.data.xflip
    assert 0.5 ** (batch / t.ema.halflife_images) == pytest.approx(0.9999)
    assert RECIPES[f"{name}-teacher"]().network.label_dropout == 0.1


def test_without_guidance_it_is_ordinary_distillation() -> None:
    """At strength 1, of a student that is its teacher still, a halving's loss is that of progressive distillation."""
    method = replace(GuidedDistillation(start_steps=4), weights=(1.0, 1.0 + 1e-9))
    known = teacher()
    parts = method.parts(teacher=known, spec=SPEC)
    update = events(method, parts, Clock(1, 55, 100))[-1]

    class OnCosine(ProgressiveDistillation):
        _intervals = GuidedDistillation._intervals
        direction, stochastic = "sample", False

    plain = OnCosine(start_steps=4)
    told = plain.parts(teacher=known, spec=SPEC)
    noise = StepNoise(3)
    noise.uniform(batch().images[:, 0, 0, 0])  # the strength's draw
    theirs = list(plain.step(told, batch(), noise, Clock(0, 0, 100)))[-1]
    assert isinstance(theirs, Update)
    torch.testing.assert_close(update.loss, theirs.loss)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"first": 1.0}, r"method.first is 1.0; it must lie in \[0, 1\)"),
        ({"halving_rate": 0.0}, "method.halving_rate is 0.0"),
        ({"weights": (2.0, 1.0)}, "method.weights is"),
        ({"direction": "up"}, "method.direction is 'up'; allowed: sample, encode"),
        ({"direction": "encode", "stochastic": True}, "method.stochastic has no effect"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        GuidedDistillation(**settings)


def test_a_teacher_that_always_saw_its_label_is_refused() -> None:
    always = EDMPrecond(SongUNet(replace(NETWORK, label_dropout=0.0)))
    with pytest.raises(UserError, match="label-dropout above 0"):
        GuidedDistillation().parts(teacher=always, spec=SPEC)


def test_a_guided_student_can_be_halved_further() -> None:
    known = GuidedDenoiser.from_denoiser(teacher(), (1.0, 5.0))
    method = GuidedDistillation(start_steps=2, first=0.0)
    parts = method.parts(teacher=known, spec=SPEC)
    assert isinstance(parts.student, GuidedDenoiser) and parts.student is not parts.teacher is known
    assert [type(e).__name__ for e in events(method, parts, Clock(0, 0, 100))] == ["Update"]
    with pytest.raises(UserError, match="it must be 0 for a teacher that is told"):
        GuidedDistillation().parts(teacher=known, spec=SPEC)
    with pytest.raises(UserError, match="it must be 0 for a teacher that is told"):
        method.parts(teacher=teacher(), spec=SPEC)
    with pytest.raises(UserError, match="the teacher was trained for"):
        replace(method, weights=(1.0, 2.0)).parts(teacher=known, spec=SPEC)


# --- drawing ----------------------------------------------------------------------------------------------------------


class Exact(GuidedDenoiser):
    """The oracle as a student, of one class."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return ONE_EACH(x, sigma, Condition(label=torch.ones(len(x), dtype=torch.int64)))


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_student_costs_its_steps_and_no_second_call(stochastic: bool) -> None:
    student = GuidedDenoiser.from_denoiser(teacher(), (1.0, 5.0))
    generator = ImageGenerator(at_weight(student, 2.0), SPEC, guided_sampler(4, stochastic=stochastic))
    calls: list[Tensor | None] = []
    student.network.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[2].weight))
    generator.generate(2, labels=1)
    assert generator.nfe == len(calls) == 4
    assert all(w is not None and w.tolist() == [2.0, 2.0] for w in calls)
    assert generator.deterministic is not stochastic


def test_the_stochastic_sampler_goes_two_steps_and_noises_back_by_one() -> None:
    levels = (8.0, 3.0, 1.0)
    noise = StepNoise(1)
    latents = StepNoise(2).normal(torch.empty(5, 1, 1, 1, dtype=torch.float64))
    drawn = DDIM(levels=levels, overshoot=True)(Exact(), latents, noise=noise)
    noise, x = StepNoise(1), 8 * latents
    for sigma, back, to in ((8.0, 3.0, 1.0), (3.0, 1.0, 0.0)):
        level = torch.full((5,), sigma, dtype=torch.float64)
        x = euler(x, level, torch.full_like(level, to), Exact()(x, level))
        x = x + math.sqrt(back**2 - to**2) * noise.normal(x)
    torch.testing.assert_close(drawn, Exact()(x, torch.ones(5, dtype=torch.float64)))
    with pytest.raises(UserError, match="no effect with sampler"):
        DDIM(eta=1.0, overshoot=True)
    with pytest.raises(UserError, match="needs a noise source"):
        DDIM(overshoot=True)(Exact(), latents)


def test_the_reverse_process_encodes_what_the_sampler_decodes() -> None:
    latents = StepNoise(2).normal(torch.empty(5, 1, 1, 1, dtype=torch.float64))
    sampler = guided_sampler(512)
    assert isinstance(sampler, Euler)
    images = sampler(Exact(), latents)
    back = replace(sampler, levels=(*sampler.levels, 0.002))
    torch.testing.assert_close(back.invert(Exact(), images), latents, rtol=0.03, atol=0.03)


# --- runs -------------------------------------------------------------------------------------------------------------

BASE = RECIPES["edm-digits"]()
TRAINING = replace(
    BASE.training, total_images=96, batch=16, micro_batch=8, log_images=16, snapshot_images=96, checkpoint_images=32
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = replace(BASE, network=NETWORK, training=replace(TRAINING, total_images=16))
    return run_experiment(experiment, tmp_path_factory.mktemp("guided") / "teacher")


@pytest.mark.parametrize("first", [0.2, 0.8])
def test_resuming_changes_no_bit(run: Path, first: float, resumed_run: Callable[[Experiment], Path]) -> None:
    """With a death in a halving, and in stage 1."""
    method = GuidedDistillation(start_steps=2, end_steps=2, first=first, anneal=True)
    experiment = Experiment(
        data=BASE.data, method=method, given={"teacher": str(run)}, sampler=guided_sampler(2), training=TRAINING
    )
    resumed_run(experiment)


def test_parts_are_what_the_head_says() -> None:
    parts = GuidedDistillation().parts(teacher=teacher(), spec=SPEC)
    assert isinstance(parts.roles["student"], Trained) and isinstance(parts.roles["guided"], Frozen)
    assert parts.student.weights == (1.0, 5.0) and parts.student.weight == 1.0
