"""Align Your Flow: a teacher's flow map between any two times, in continuous time (Sabour et al. 2025, 2506.14603).

Source     The authors' program (NVIDIA's FastGen, since its version 0.2) could not be had here, only its documentation;
           constants are the paper's as far as its public readings agree. Formulas are checked by identities.
Networks   student (trained: `models.aligned`), teacher and weak (frozen; weak where it guides), and for the adversarial
           finish a discriminator (trained, with a rate and momenta of its own).
Time       the paper's, of the straight path in units of the data's deviation: t = sigma / (sigma + sd), 1 is noise.
Eulerian   of w' sign(t - s) f^T df-/dt along the teacher's flow, w' = w |t - s| and f = x + (s - t) F, the gradient is
           that of |F - F- + g|^2 / 2, g = (F- - v) + r (t - s) dF-/dt, times w (t - s)^2, set to 1 / (|g| + c);
           dF-/dt is one Jacobian-vector product along (v, 1, 0), in float32 whatever the precision. s = 0 is sCM's
           tangent of this path, s -> t flow matching.
Lagrangian of w' sign(s - t) f^T (df-/ds - v(f-, s)): g = F- + r (s - t) dF-/ds - v(f-, s), the teacher asked where
           the student lands. Better in the plane, smoother pictures: an option.
Warm-up    r rises to max_r = 0.99 and stays there: a hundredth of the weight stays on F - v, which wants the flow
           straight.
Guidance   v = lambda v_strong + (1 - lambda) v_weak (autoguidance), lambda uniform in `weights`, one for each image,
           told to the student; or, for comparison, away from the unlabelled answer.
Finish     after a share of the run: fakes are one jump from pure noise to the clean image at a lambda of their own,
           reals the batch; softplus(D(real) - D(fake)) for the student, the other way round for the discriminator, with
           both |grad D(real)|^2 and |grad D(fake)|^2. The student's loss is the adversarial one plus that of the map
           times alpha |grad adversarial| / |grad map|, at the network's last layer, without gradient through it.
Start      from the teacher, with embeddings of s and lambda that change nothing yet. A teacher that is told ln(sigma)
           is better aligned first (`methods.time_alignment`), or d/dt is large near t = 1.
Departs    r multiplies the Lagrangian's derivative too. t is kept within the teacher's range of noise levels, and s at
           most t. Norms and sums are over an image, means over the batch. The discriminator is of StyleGAN's type but
           without its equalised rates, and not told the class. Both networks learn in every step of the finish.
           alpha, the penalties' weight and rates are a public reading's (0.1, 0.1).
Checked    g against finite differences of f, in t and in s; no residual of the exact map of Gaussian data, either way;
           sCM's tangent at s = 0; flow matching at r = 0; the gradient of the objective with its signs and weights;
           lambda = 1 is the teacher, and a weak model equal to it makes lambda irrelevant; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.errors import an
from imagewright.guidance import Unlabelled, guided_by, knows_no_label
from imagewright.methods.adversary import HasLastLayer, adaptive_weight, gradient_penalty, relativistic
from imagewright.methods.pairs import column, finite_tangent, shortened
from imagewright.models.aligned import AlignedFlowMap
from imagewright.models.consistency import edm_teacher
from imagewright.networks.blur_discriminator import BlurDiscriminator
from imagewright.networks.tangents import derivative
from imagewright.noise import StepNoise
from imagewright.paths.intervals import Intervals, SortedTimes
from imagewright.precision import wide
from imagewright.types import (
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)

Objective = Literal["eulerian", "lagrangian"]


@dataclass(frozen=True, kw_only=True)
class RelativisticFinish:
    """The adversarial finish and its discriminator."""

    start: float = 0.9
    """Share of the run after which it begins; published: about 3,000 steps behind 50,000."""
    alpha: float = 0.1
    """Of the map's loss, whose gradient is this share of the adversarial one's."""
    penalty: float = 0.1
    """Weight of half the sum of both squared slopes."""
    lr_scale: float = 1.0
    """The discriminator's learning rate in units of the run's."""
    betas: tuple[float, float] = (0.0, 0.99)
    width: int = 64
    """Channels of the discriminator at full resolution."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(f"adversarial.start is {self.start}; it must lie in [0, 1)")
        for name in ("alpha", "penalty", "lr_scale"):
            require_positive(f"adversarial.{name}", getattr(self, name))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"adversarial.betas is {self.betas}; both must lie in [0, 1)")
        if self.width < 1:
            raise UserError(f"adversarial.width is {self.width}; it must be at least 1")


class Point(NamedTuple):
    """Where a map learns: x_t [N, C, H, W] in units of sd, times t >= s [N], what is known and the strength."""

    x: Tensor
    t: Tensor
    s: Tensor
    cond: Condition


@dataclass(frozen=True, kw_only=True)
class AlignYourFlow:
    """Distil a denoiser into a map between any two noise levels."""

    product: ClassVar[str] = "student"

    objective: Objective = "eulerian"
    intervals: Intervals = SortedTimes()
    """Law of (t, s); public readings disagree, and this one did better in the plane."""
    warmup: float = 0.2
    """Share of the run over which r rises; published: about 10,000 of 50,000 steps."""
    max_r: float = 0.99
    tangent_c: float = 0.1
    weights: tuple[float, float] = (1.0, 3.0)
    """Range of lambda, where the teacher is guided."""
    classifier_free: bool = False
    """Guide away from the teacher's own unlabelled answer; without this, and without `weak`, nothing guides."""
    adversarial: RelativisticFinish | None = None

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise UserError(f"method.objective is {self.objective!r}; allowed: {', '.join(get_args(Objective))}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"method.warmup is {self.warmup}; it must lie in [0, 1)")
        if not 0 <= self.max_r <= 1:
            raise UserError(f"method.max_r is {self.max_r}; it must lie in [0, 1]")
        require_positive("method.tangent_c", self.tangent_c)
        check_weights(self.weights)

    def parts(self, *, teacher: Denoiser, spec: DataSpec, weak: Denoiser | None = None) -> Parts:
        """teacher: an EDM-preconditioned denoiser, from whose weights the student starts. weak: what guides it.

        Raises UserError for another teacher, and for settings that have no effect on it.
        """
        known = edm_teacher(teacher)
        guide = self._guide(known, weak)
        student = AlignedFlowMap.from_teacher(known, None if guide is None else self.weights)
        more: dict[str, Trained | Frozen] = {} if guide is None else {"weak": Frozen(module=guide)}
        if self.adversarial is not None:
            if not isinstance(student.network, HasLastLayer):
                raise UserError(
                    f"the teacher's network is {an(type(student.network).__name__)}, which has no last_layer"
                )
            a = self.adversarial
            judge = BlurDiscriminator(spec.resolution, spec.channels, a.width, "image")
            more["discriminator"] = Trained(module=judge, ema=False, lr_scale=a.lr_scale, betas=a.betas)
        return Parts(student=Trained(module=student), teacher=Frozen(module=known), **more)

    def _guide(self, teacher: Any, weak: Any) -> Any:
        """What guides the teacher; None for nothing."""
        if self.classifier_free and weak is not None:
            raise UserError("method.classifier_free is on and weak is given; one guide is all that there can be")
        if self.classifier_free:
            if not knows_no_label(teacher):
                raise UserError("method.classifier_free needs a teacher trained with --network.label-dropout above 0")
            return Unlabelled(teacher)
        if weak is None and self.weights != AlignYourFlow.weights:
            raise UserError(
                f"method.weights is {self.weights}; it has no effect without a guide: --weak RUN or "
                "--method.classifier-free"
            )
        return weak

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, and in the finish one of the discriminator."""
        student, finish = parts.student, self.adversarial
        point = self._point(student, batch, noise)
        with noise.same_dropout(), torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            g = self.tangent(parts, point, self.ramp(clock))
        sigma = student.sigma_data * point.t / (1 - point.t)
        g = shortened(finite_tangent(g, sigma), self.tangent_c)
        answer = student.mean_velocity(*point).to(g.dtype)
        error = (answer - answer.detach() + g).square().flatten(1).sum(1)
        if finish is None or clock.fraction < finish.start:
            yield Update("student", error, {"map": error}, at=sigma)
            return
        fake = self._fake(student, batch, noise)
        fooled = relativistic(parts.discriminator(fake), parts.discriminator(batch.images))
        weight = finish.alpha * adaptive_weight(fooled, error, student.network.last_layer)
        numbers = {"map": error, "adversarial": fooled, "map_weight": weight}
        yield Update("student", fooled + weight * error, numbers, at=sigma)
        yield self._discriminate(parts.discriminator, batch.images, fake.detach(), finish)

    def ramp(self, clock: Clock) -> float:
        """r: 0 is flow matching, max_r distillation."""
        return self.max_r * (min(1.0, clock.fraction / self.warmup) if self.warmup else 1.0)

    def tangent(self, parts: Any, point: Point, r: float) -> Tensor:
        """g before it is shortened, [N, C, H, W]."""
        student, (x, t, s, cond) = parts.student, point
        if self.objective == "eulerian":
            velocity = teacher_velocity(parts, x, t, cond)
            output, change = derivative(
                lambda x, t: student.mean_velocity(x, t, s, cond), (x, t), (velocity, torch.ones_like(t))
            )
            return output - velocity + r * column(t - s) * change
        output, change = derivative(lambda s: student.mean_velocity(x, t, s, cond), (s,), (torch.ones_like(s),))
        landed = x + column(s - t) * output
        return output + r * column(s - t) * change - teacher_velocity(parts, landed, s, cond)

    def _point(self, student: AlignedFlowMap, batch: Batch, noise: StepNoise) -> Point:
        """Images on the straight path, at times within the model's range, and the strength of each."""
        like = batch.images[:, 0, 0, 0]
        low, high = (float(student.time_of(sigma)) for sigma in (student.sigma_min, student.sigma_max))
        t, s = (time.clamp(max=high).to(like) for time in self.intervals.sample(noise, like))
        t = t.clamp(min=low)
        x = column(1 - t) * batch.images / student.sigma_data + column(t) * noise.normal(batch.images)
        return Point(x, t, s, with_weight(batch.cond, student.weights, noise, like))

    def _fake(self, student: AlignedFlowMap, batch: Batch, noise: StepNoise) -> Tensor:
        """Clean images by one jump from pure noise."""
        like = batch.images[:, 0, 0, 0]
        cond = with_weight(batch.cond, student.weights, noise, like)
        start = torch.full_like(like, student.sigma_max)
        clean: Tensor = student(student.sigma_max * noise.normal(batch.images), start, torch.zeros_like(like), cond)
        return clean

    def _discriminate(self, judge: Any, images: Tensor, fakes: Tensor, finish: RelativisticFinish) -> Update:
        """The discriminator's loss of pairs, and both its penalties."""
        real, fake = (images.detach().requires_grad_(True) for images in (images, fakes))
        on_real, on_fake = judge(real), judge(fake)
        told_apart = relativistic(on_real, on_fake)
        penalties = {"r1": gradient_penalty(on_real, real), "r2": gradient_penalty(on_fake, fake)}
        loss = told_apart + finish.penalty / 2 * (penalties["r1"] + penalties["r2"])
        return Update("discriminator", loss, {"told_apart": told_apart, **penalties})


def teacher_velocity(parts: Any, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """dx_t/dt of the (guided) teacher at x_t in units of sd; t in (0, 1), as small as the student's lowest level."""
    student = parts.student
    sd, t = student.sigma_data, t.clamp(min=float(student.time_of(student.sigma_min)))
    sigma = sd * t / (1 - t)
    noisy = sd * x / column(1 - t)
    if "weak" in parts.roles:
        assert cond.weight is not None
        denoised = guided_by(parts.teacher, parts.weak, noisy, sigma, replace(cond, weight=None), cond.weight)
    else:
        denoised = parts.teacher(noisy, sigma, cond)
    velocity: Tensor = (x - denoised / sd) / column(t)
    return velocity


def with_weight(cond: Condition, weights: tuple[float, float] | None, noise: StepNoise, like: Tensor) -> Condition:
    """The condition with a strength of guidance for each image, uniform in a range; as it is where there is none."""
    if weights is None:
        return cond
    low, high = weights
    return replace(cond, weight=(low + (high - low) * wide(noise.uniform(like))).float().clamp(low, high))


def check_weights(weights: tuple[float, float]) -> None:
    """Raise UserError unless it is a range of strengths from 0 on."""
    low, high = weights
    if not 0 <= low < high < float("inf"):
        raise UserError(f"method.weights is {weights}; it must be two finite numbers, 0 <= lower < higher (1 is none)")
