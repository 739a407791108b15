"""Multistep consistency models (Heek et al. 2024, arXiv 2403.06807): training and distillation, algorithms 1 to 3.

Networks   student (trained), target (average of the student), teacher (frozen; distillation only).
Time       the paper's t in [0, 1] is arctan(sigma) / arctan(sigma_max), the cosine schedule cut off at sigma_max; its z
           is x / sqrt(1 + sigma^2), so that DDIM(x_hat, x; t -> s) = x_hat + sigma_s / sigma_t (x - x_hat).
Kept       S equal segments, steps that never leave theirs; teacher steps that grow from 64 to 1280 over the first half
           (100k of 200k steps), always whole ones in a segment; aDDIM with x_var = eta |x_teacher - x|^2 / d and
           eta = 0.75, plain DDIM towards x itself without a teacher; the reference by invDDIM, so that estimates of x
           are compared; weight SNR + 1; pseudo-Huber with e = 1e-4; no boundary wrapper (`models.segments`): at
           s = t_step DDIM is the identity; one dropout mask for both evaluations; the student starts from the teacher.
Departs    The norm in the distance is the whole image's, as in the work that the paper has it from (2310.14189), taken
           per number, |r|^2 / d, or e would mean another thing at every size; the loss is that times sqrt(d). The paper
           says nothing of a target average; target_decay = 0, the student itself under stop-gradient, is the default.
           No text-to-image, and so no guided teacher; `Experiment.start` gives a student without a teacher its trained
           weights. The lowest of 1280 levels are below the usual sigma_min: there both networks extrapolate a little.
Checked    invDDIM undoes DDIM; S = 1 compares with f(z_s, s); one step a segment gives the weighted denoising loss;
           the exact flow of Gaussian data has a loss that vanishes as the teacher's steps shrink.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from imagewright.checks import require_non_negative, require_positive
from imagewright.methods.distances import Distance
from imagewright.methods.pairs import check_range, column
from imagewright.models.consistency import edm_teacher
from imagewright.models.segments import MultistepConsistencyModel, segment_boundaries
from imagewright.noise import StepNoise
from imagewright.precision import wide
from imagewright.samplers.addim import addim_step
from imagewright.types import (
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Follow,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)


class Levels(NamedTuple):
    """Noise levels [N] of a training step: t, s and t_step of the paper, upper > lower >= bottom >= 0."""

    upper: Tensor
    lower: Tensor
    bottom: Tensor


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """What training and distillation share: segments, the growing number of teacher steps, the loss."""

    product: ClassVar[str] = "student"

    segments: int = 4
    """S: also the evaluations that a sample costs."""
    first_steps: int = 64
    """Teacher steps between sigma_max and 0 at the start of training."""
    last_steps: int = 1280
    """Teacher steps once they have grown, geometrically."""
    growth: float = 0.5
    """Share of the run over which they grow, in [0, 1]; 0: last_steps from the start."""
    target_decay: float = 0.0
    """Of the target's average; 0 = the target is the student itself under stop-gradient."""
    distance: Distance = Distance(kind="pseudo_huber", huber_c=1e-4)
    """huber_c is the paper's e, per number of the image."""

    def __post_init__(self) -> None:
        segment_boundaries(self.segments)
        if not self.segments <= self.first_steps <= self.last_steps:
            raise UserError(
                f"method.first_steps is {self.first_steps} and last_steps is {self.last_steps}; they must satisfy "
                f"segments ({self.segments}) <= first_steps <= last_steps"
            )
        if not 0 <= self.growth <= 1:
            raise UserError(f"method.growth is {self.growth}; it must lie in [0, 1]")
        if not 0 <= self.target_decay < 1:
            raise UserError(f"method.target_decay is {self.target_decay}; it must lie in [0, 1)")
        if self.distance.kind == "perceptual":
            raise UserError(
                "method.distance.kind is 'perceptual'; allowed: l1, l2, norm, pseudo_huber, pseudo_huber_each"
            )

    def steps_per_segment(self, fraction: float) -> int:
        """Teacher steps in each segment at a fraction of training in [0, 1]: N(i) / S, a whole number."""
        grown = min(fraction / self.growth, 1.0) if self.growth > 0 else 1.0
        steps: float = self.first_steps * (self.last_steps / self.first_steps) ** grown
        return max(round(steps / self.segments), 1)

    def draw_levels(self, per_segment: int, sigma_max: float, noise: StepNoise, images: Tensor) -> Levels:
        """A segment, then one of its steps, each uniformly."""
        steps, like = self.segments * per_segment, images[:, 0, 0, 0]
        angles = wide(torch.arange(steps + 1, device=images.device)) / steps * math.atan(sigma_max)
        grid = angles.tan().to(images)
        bottom = noise.integers(self.segments, like) * per_segment
        upper = bottom + noise.integers(per_segment, like) + 1
        return Levels(grid[upper], grid[upper - 1], grid[bottom])

    def match(
        self, parts: Any, upper: Tensor, lower: Tensor, at: Levels, cond: Condition, noise: StepNoise
    ) -> Iterator[Event]:
        """(SNR + 1) d(x_ref, f(z_t, t)), then the target follows; upper, lower: x at the levels of those names."""
        # At the segment's end the estimate is not used; it is asked for at a level that every network can bear.
        inside = torch.where(at.lower > at.bottom, at.lower, at.upper)
        with noise.same_dropout(), torch.no_grad():
            guess = parts.target.estimate(lower, inside, cond)
            reference = self.reference(guess, upper, lower, at)
        error = self.distance(parts.student.estimate(upper, at.upper, cond), reference)
        yield Update("student", (1 / at.upper**2 + 1) * error, at=at.upper)
        yield Follow("target", "student", self.target_decay)

    @staticmethod
    def reference(guess: Tensor, upper: Tensor, lower: Tensor, at: Levels) -> Tensor:
        """x_ref: the estimate from `upper` that lands where `guess`, made at `lower`, lands at the segment's end."""
        return inverse_ddim(ddim(guess, lower, at.lower, at.bottom), upper, at.upper, at.bottom)


@dataclass(frozen=True, kw_only=True)
class MultistepConsistencyDistillation(Segmented):
    """Points a step of aDDIM apart on the teacher's trajectory lead to the same point at the segment's end."""

    eta: float = 0.75
    """x_var = eta |x_teacher - x|^2 / d: share of the teacher's error that aDDIM puts back as variance; >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_non_negative("method.eta", self.eta)

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser; student and target start from its weights."""
        known = edm_teacher(teacher)
        student = MultistepConsistencyModel.from_denoiser(known, self.segments)
        return segmented_parts(student, teacher=Frozen(module=known))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, then of the target."""
        images, per_segment = batch.images, self.steps_per_segment(clock.fraction)
        at = self.draw_levels(per_segment, parts.student.sigma_max, noise, images)
        upper = images + column(at.upper) * noise.normal(images)
        with torch.no_grad():
            guess = parts.teacher(upper, at.upper, batch.cond)
            x_var = self.eta * (guess - images).flatten(1).square().mean(1)
            lower = addim_step(upper, guess, at.upper, at.lower, x_var)
        yield from self.match(parts, upper, lower, at, batch.cond, noise)


@dataclass(frozen=True, kw_only=True)
class MultistepConsistencyTraining(Segmented):
    """No teacher: the image itself stands for the teacher's estimate, and the pair shares one noise."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.sigma_min, self.sigma_max, "method.")
        require_positive("method.sigma_data", self.sigma_data)

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: F(x, noise_label, cond) of `networks`, untrained or trained."""
        sizes = self.sigma_min, self.sigma_max, self.sigma_data
        return segmented_parts(MultistepConsistencyModel(network, *sizes, segments=self.segments))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, then of the target."""
        images, per_segment = batch.images, self.steps_per_segment(clock.fraction)
        at = self.draw_levels(per_segment, parts.student.sigma_max, noise, images)
        upper = images + column(at.upper) * noise.normal(images)
        yield from self.match(parts, upper, ddim(images, upper, at.upper, at.lower), at, batch.cond, noise)


def segmented_parts(student: MultistepConsistencyModel, **more: Frozen) -> Parts:
    """Student, its target, and what else there is."""
    target = copy.deepcopy(student).requires_grad_(False)
    return Parts(student=Trained(module=student), target=Average(module=target, of="student"), **more)


def ddim(clean: Tensor, x: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """From x at sigma [N] to sigma_to [N] <= sigma if the image is `clean`; the identity where the levels are equal."""
    landed = clean + column(sigma_to / sigma) * (x - clean)
    return torch.where(column(sigma_to < sigma), landed, x)  # equal levels may both be 0


def inverse_ddim(landed: Tensor, x: Tensor, sigma: Tensor, sigma_to: Tensor) -> Tensor:
    """The clean image with which `ddim` goes from x to `landed`; sigma_to [N] < sigma [N]."""
    # Equal levels have no answer; the least difference that the numbers can show keeps it finite.
    gap = (1 - sigma_to / sigma).clamp(min=torch.finfo(sigma.dtype).eps)
    return x + (landed - x) / column(gap)
