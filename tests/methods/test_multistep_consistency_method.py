"""Multistep consistency: DDIM and its inverse, what is compared with what, schedules, and exact solutions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.distances import Distance
from imagewright.methods.multistep_consistency import (
    Levels,
    MultistepConsistencyDistillation,
    MultistepConsistencyTraining,
    Segmented,
    ddim,
    inverse_ddim,
)
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.segments import MultistepConsistencyModel, segment_boundaries
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianOracle
from imagewright.types import (
    UNCONDITIONAL,
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Follow,
    Frozen,
    Parts,
    Trained,
    UserError,
)
from imagewright.types import Update as UpdateEvent

SPEC = DataSpec(name="toy", resolution=4, channels=1)
STD = 0.5
L1 = Distance(kind="l1")


class Scaled(nn.Module):
    """A network that answers w times its input, after dropout."""

    def __init__(self, w: float = 0.3, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.dropout = dropout

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        assert noise_label.isfinite().all()  # never asked at sigma = 0
        return nn.functional.dropout(self.w * x, self.dropout, self.training)


class Around(nn.Module):
    """An exact denoiser as the module that `Parts` wants."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self) -> None:
        super().__init__()
        self.oracle = GaussianOracle(torch.zeros(1, 4, 4, dtype=torch.float64), std=STD)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.oracle(x, sigma, cond)


class ExactEstimate(nn.Module):
    """f* for N(0, STD^2): along the exact flow to the segment's lower end, then invDDIM. Notes what it was asked."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, segments: int) -> None:
        super().__init__()
        self.segments = segments
        self.asked: list[tuple[Tensor, Tensor]] = []

    def estimate(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.asked.append((x, sigma))
        bounds = torch.tensor(segment_boundaries(self.segments), dtype=torch.float64)
        low = bounds[torch.searchsorted(bounds, sigma * (1 - 1e-9)) - 1]
        landed = column(((low**2 + STD**2) / (sigma**2 + STD**2)).sqrt()) * x
        return inverse_ddim(landed, x, sigma, low)


def images(n: int) -> Tensor:
    return STD * StepNoise(1).normal(torch.empty(n, 1, 4, 4, dtype=torch.float64))


def column(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None]


def exact_parts(segments: int) -> Parts:
    student, target = ExactEstimate(segments), ExactEstimate(segments)
    return Parts(student=Trained(module=student), target=Average(module=target), teacher=Frozen(module=Around()))


def learnt_parts(segments: int = 4, dropout: float = 0.0) -> Parts:
    teacher = EDMPrecond(Scaled(dropout=dropout))
    return MultistepConsistencyDistillation(segments=segments).parts(teacher=teacher, spec=SPEC)


def run(method: Segmented, parts: Parts, n: int = 64, fraction: float = 0.0) -> list:
    clock = Clock(0, int(1000 * fraction), 1000)
    return list(method.step(parts, Batch(images(n)), StepNoise(3), clock))  # type: ignore[attr-defined]


def fixed(steps: int, **settings: object) -> MultistepConsistencyDistillation:
    """With a constant number of teacher steps."""
    return MultistepConsistencyDistillation(first_steps=steps, last_steps=steps, **settings)  # type: ignore[arg-type]


# --- algebra ----------------------------------------------------------------------------------------------------------


def test_inverse_ddim_undoes_ddim() -> None:
    clean, x = images(5), 3 * images(5).flip(0)
    sigma = torch.tensor([80.0, 80.0, 2.0, 0.5, 0.0013], dtype=torch.float64)
    to = torch.tensor([0.0, 79.5, 0.4, 0.499, 0.0], dtype=torch.float64)
    torch.testing.assert_close(inverse_ddim(ddim(clean, x, sigma, to), x, sigma, to), clean, rtol=0, atol=1e-11)


def test_ddim_is_the_papers() -> None:
    """a_s x + (s_s / s_t) (z_t - a_t x) on the variance-preserving cosine path."""
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.1, 0.0]).double()
    a_t, s_t, a_s, s_s = (f(math.pi / 2 * v) for v in (t, s) for f in (torch.cos, torch.sin))
    clean, z = images(3), images(3).flip(0)
    want = column(a_s) * clean + column(s_s / s_t) * (z - column(a_t) * clean)
    ours = ddim(clean, z / column(a_t), s_t / a_t, s_s / a_s) * column(a_s)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_ddim_to_the_same_level_is_the_identity() -> None:
    same = torch.tensor([0.0, 1.3], dtype=torch.float64)
    x = images(2)
    assert torch.equal(ddim(images(2) + 5, x, same, same), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_ddim_is_finite_where_it_has_no_answer(dtype: torch.dtype) -> None:
    level, x = torch.ones(2, dtype=dtype), images(2).to(dtype)
    assert inverse_ddim(x + 1e-3, x, level, level).isfinite().all()


# --- what is compared with what ---------------------------------------------------------------------------------------


def test_one_segment_compares_with_the_estimate_at_the_lower_level() -> None:
    """t_step = 0, so x_ref = f(z_s, s): ordinary consistency."""
    guess, upper, lower = images(3), 2 * images(3).flip(0), images(3).flip(0)
    sigma = torch.tensor([80.0, 1.0, 0.1], dtype=torch.float64)
    at = Levels(sigma, 0.9 * sigma, 0 * sigma)
    torch.testing.assert_close(Segmented.reference(guess, upper, lower, at), guess, rtol=1e-12, atol=1e-12)


def test_the_first_step_of_a_segment_compares_with_the_teacher_whatever_the_student_says() -> None:
    clean, x = images(3), 2 * images(3).flip(0)
    at = Levels(*(torch.tensor(v, dtype=torch.float64) for v in ([80.0, 1.0, 0.1], [70.0, 0.9, 0.0], [70.0, 0.9, 0.0])))
    lower = ddim(clean, x, at.upper, at.lower)
    for guess in (images(3) + 7, torch.zeros_like(x)):
        torch.testing.assert_close(Segmented.reference(guess, x, lower, at), clean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("segments", [1, 4])
def test_one_step_a_segment_is_weighted_denoising(segments: int) -> None:
    method = MultistepConsistencyTraining(
        segments=segments, first_steps=segments, last_steps=segments, distance=Distance(kind="l2")
    )
    parts = exact_parts(segments)
    update = run(method, parts)[0]
    x, sigma = parts.student.asked[0]
    error = (parts.student.estimate(x, sigma) - images(64)).square().mean((1, 2, 3))
    torch.testing.assert_close(update.loss, (1 + 1 / sigma**2) * error, rtol=1e-8, atol=0)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.75])
def test_the_exact_flow_has_a_loss_that_vanishes_with_the_teachers_steps(segments: int, eta: float) -> None:
    losses = []
    for steps in (64, 256, 1024, 4096):
        events = run(fixed(steps, segments=segments, distance=L1, eta=eta), exact_parts(segments), 1024)
        losses.append(float((events[0].loss.detach() / (1 + 1 / events[0].at ** 2)).mean()))
    assert all(fine < coarse / 2.5 for coarse, fine in itertools.pairwise(losses))


def test_comparing_points_without_the_inverse_has_another_solution() -> None:
    """The negative control of the test above: x_ref = f(z_s, s) is not solved by the flow when S > 1."""

    class Naive(MultistepConsistencyDistillation):
        @staticmethod
        def reference(guess: Tensor, upper: Tensor, lower: Tensor, at: Levels) -> Tensor:
            return guess

    losses = []
    for steps in (64, 4096):
        event = run(Naive(first_steps=steps, last_steps=steps, distance=L1), exact_parts(4), 1024)[0]
        losses.append(float((event.loss.detach() / (1 + 1 / event.at**2)).mean()))
    ours = run(fixed(4096, distance=L1), exact_parts(4), 1024)[0]
    assert losses[1] > 5 * float((ours.loss.detach() / (1 + 1 / ours.at**2)).mean())


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_steps_stay_in_their_segment_and_all_occur(segments: int) -> None:
    parts, method, per_segment = exact_parts(segments), MultistepConsistencyTraining(segments=segments), 5
    at = method.draw_levels(per_segment, 80.0, StepNoise(2), images(4000))
    steps = segments * per_segment
    time = lambda sigma: sigma.atan() / math.atan(80.0) * steps  # noqa: E731
    upper, lower, bottom = (time(v) for v in at)
    torch.testing.assert_close(upper - lower, torch.ones_like(upper), rtol=0, atol=1e-9)
    torch.testing.assert_close(bottom, (lower / per_segment + 1e-9).floor() * per_segment, rtol=0, atol=1e-9)
    counts = torch.bincount(upper.round().long() - 1, minlength=steps)
    assert len(counts) == steps and float((counts - 4000 / steps).abs().max()) < 5 * math.sqrt(4000 / steps)
    run(method, parts)  # and the network is asked inside the segments only
    assert float(parts.target.asked[0][1].min()) > 0


def test_distillation_asks_the_target_where_addim_lands() -> None:
    method, parts = fixed(8, segments=2, eta=0.75), exact_parts(2)
    run(method, parts)
    (x, upper), (lower, inside) = parts.student.asked[0], parts.target.asked[0]
    at = method.draw_levels(4, 80.0, StepNoise(3), images(64))
    torch.testing.assert_close(upper, at.upper)
    assert ((inside == at.lower) | (at.lower == at.bottom)).all()
    guess = Around()(x, upper)
    x_var = 0.75 * (guess - images(64)).square().mean((1, 2, 3))
    eps = (x - guess) / column(upper)
    length = (at.lower**2 + (1 - at.lower / upper) ** 2 * x_var / eps.square().mean((1, 2, 3))).sqrt()
    torch.testing.assert_close(lower, guess + column(length) * eps, rtol=1e-9, atol=1e-12)


def test_training_shares_one_noise() -> None:
    parts = exact_parts(4)
    method = MultistepConsistencyTraining(segments=4)
    run(method, parts)
    at = method.draw_levels(method.steps_per_segment(0.0), 80.0, StepNoise(3), images(64))
    (x, _), (lower, _) = parts.student.asked[0], parts.target.asked[0]
    z = (x - images(64)) / column(at.upper)
    torch.testing.assert_close(lower, images(64) + column(at.lower) * z, rtol=0, atol=1e-9)


# --- schedules, weights, networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 64), (0.25, 286.2), (0.4999, 1280), (0.5, 1280), (0.99, 1280)])
def test_teacher_steps_grow_geometrically(fraction: float, steps: float) -> None:
    for segments in (1, 2, 3, 4, 8):
        per_segment = MultistepConsistencyDistillation(segments=segments).steps_per_segment(fraction)
        assert abs(per_segment * segments - steps) <= segments / 2 + 0.5
    assert MultistepConsistencyDistillation(segments=64).steps_per_segment(0.0) == 1
    assert MultistepConsistencyDistillation(growth=0.0).steps_per_segment(0.0) == 320


def test_a_step_follows_the_clock() -> None:
    for fraction, steps in ((0.0, 4), (0.25, 8), (0.6, 16)):
        parts = exact_parts(2)
        run(MultistepConsistencyDistillation(segments=2, first_steps=4, last_steps=16), parts, 1000, fraction)
        assert len(parts.student.asked[0][1].unique()) == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_is_finite_at_the_smallest_level(dtype: torch.dtype) -> None:
    method, parts = fixed(1280), learnt_parts()
    event = next(method.step(parts, Batch(images(4096).to(dtype)), StepNoise(5), Clock(0, 0, 1000)))
    assert isinstance(event, UpdateEvent) and event.at is not None
    assert float(event.at.min()) == pytest.approx(math.tan(math.atan(80) / 1280), rel=1e-4)
    assert event.loss.isfinite().all() and event.loss.dtype == dtype
    event.loss.sum().backward()
    assert parts.student.network.w.grad.isfinite()


def test_the_loss_is_huber_of_the_whole_image_times_snr_plus_one() -> None:
    parts, method = exact_parts(2), fixed(8, segments=2)
    event, plain = run(method, parts)[0], run(fixed(8, segments=2, distance=Distance(kind="l2")), exact_parts(2))[0]
    weight = 1 + 1 / event.at**2
    rms = (plain.loss / weight).sqrt()
    want = weight * 4 * ((rms**2 + 1e-8).sqrt() - 1e-4)  # sqrt(d) = 4
    torch.testing.assert_close(event.loss, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_the_student_learns_and_the_target_follows(decay: float) -> None:
    parts = learnt_parts()
    parts.target.requires_grad_(True)
    update, follow = run(MultistepConsistencyDistillation(target_decay=decay), parts)
    assert update.part == "student" and update.loss.shape == (64,)
    assert follow == Follow("target", "student", decay)
    update.loss.sum().backward()
    assert parts.student.network.w.grad is not None and parts.student.network.w.grad != 0
    assert parts.target.network.w.grad is None and parts.teacher.network.w.grad is None


def test_both_evaluations_see_the_same_dropout_mask() -> None:
    """Neighbours that nearly coincide, far from the segment's end: the loss is small only under one mask."""
    method, parts = MultistepConsistencyDistillation(segments=1), learnt_parts(1, dropout=0.5)
    sigma = torch.full((64,), 3.0, dtype=torch.float64)
    at, x = Levels(sigma, sigma * (1 - 1e-6), 0 * sigma), 3 * images(64) / STD
    same = next(method.match(parts, x, x, at, UNCONDITIONAL, StepNoise(0)))
    assert isinstance(same, UpdateEvent) and float(same.loss.detach().max()) < 1e-2
    other = (parts.student.estimate(x, sigma) - parts.target.estimate(x, sigma)).square().sum((1, 2, 3)).sqrt()
    assert float(other.detach().median()) > 0.3  # some masks differ where little depends on them


def test_steps_are_repeatable() -> None:
    """All randomness is the given noise's, so a resumed run takes the same steps."""
    first, again = (run(MultistepConsistencyDistillation(), learnt_parts())[0].loss for _ in range(2))
    assert torch.equal(first, again)


def test_student_and_target_start_as_copies_of_the_teacher() -> None:
    parts = learnt_parts(segments=2)
    assert isinstance(parts.student, MultistepConsistencyModel) and parts.student.segments == 2
    assert parts.student.network.w == parts.target.network.w == parts.teacher.network.w
    assert parts.student.network.w.data_ptr() != parts.teacher.network.w.data_ptr() != parts.target.network.w.data_ptr()
    assert parts.student.network.w.requires_grad and not parts.target.network.w.requires_grad


def test_training_makes_its_student_of_the_network() -> None:
    method = MultistepConsistencyTraining(segments=3, sigma_data=0.7, sigma_min=0.01, sigma_max=50.0)
    student = method.parts(network=Scaled(), spec=SPEC).student
    assert (student.segments, student.sigma_min, student.sigma_max, student.sigma_data) == (3, 0.01, 50.0, 0.7)


Distillation, Training = MultistepConsistencyDistillation, MultistepConsistencyTraining


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Distillation(segments=0), "segments is 0; it must be a whole number of at least 1"),
        (lambda: Training(segments=100), r"first_steps is 64 .*; they must satisfy segments \(100\) <= first_steps"),
        (lambda: Distillation(last_steps=63), "last_steps is 63"),
        (lambda: Distillation(growth=1.5), r"method.growth is 1.5; it must lie in \[0, 1\]"),
        (lambda: Distillation(growth=math.nan), "method.growth is nan"),
        (lambda: Distillation(target_decay=1.0), r"method.target_decay is 1.0; it must lie in \[0, 1\)"),
        (lambda: Distillation(eta=-0.1), "method.eta is -0.1; it must be >= 0 and finite"),
        (lambda: Distillation(eta=math.inf), "method.eta is inf"),
        (
            lambda: Training(distance=Distance(kind="perceptual")),
            "is 'perceptual'; allowed: l1, l2, norm, ",
        ),
        (lambda: Training(sigma_data=0.0), "method.sigma_data is 0.0; it must be positive and finite"),
        (lambda: Training(sigma_min=0.0), "method.sigma_min is 0.0"),
        (lambda: Distillation().parts(teacher=Around(), spec=SPEC), "is an Around; distillation needs a denoiser that"),
        (
            lambda: Distillation().parts(teacher=ConsistencyModel(Scaled()), spec=SPEC),  # type: ignore[arg-type]
            "the teacher is a ConsistencyModel",
        ),
    ],
)
def test_bad_settings_are_told(make: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()  # type: ignore[operator]
