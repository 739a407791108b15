"""Progressive distillation in EDM's time: the baseline of Song et al. 2023 (2303.01469), section 6.1.

Source     Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2, carried over to x = x0 + sigma eps.
Networks   student (trained), teacher (the student as it was at the last halving; it starts as the run's teacher).
Grid       of N steps: t_i^(1/rho) even between sigma_max and sigma_min, i = 0 .. N, drawn uniformly.
Target     two Euler steps of the teacher, t -> t_mid -> t', must be one of the student's. Solved for its answer,
               D* = w D(x, t) + (1 - w) D(x_mid, t_mid),   w = t' (t - t_mid) / (t_mid (t - t')),
           which holds no difference of noisy images. The teacher is in eval mode.
Loss       max(1 / t^2, 1) |D(x, t) - D*|^2: the truncated SNR weight; the mean over an image's numbers, as officially.
Stages     N = start_steps, start_steps / 2, ..., end_steps, in equal shares of the run, those of 2 and 1 steps twice as
           long. At the first step of each the student's weights, not their average, become the teacher. `anneal`: the
           rate falls to 0 within every stage and the optimiser begins anew, as published.
Product    a denoiser for just these steps: `steps_sampler(end_steps)` is Euler on its grid. At other numbers of steps
           it is no denoiser worth the name.
Departs    `anneal` is off unless asked for: the run's own schedule is then the only one. The sampler's last step goes
           on along its line from sigma_min to 0, where the official one stops. The released run trains its 1-step stage
           for 150,000 steps, the last 50,000 of them at rate 0, which are left out here. The program for ImageNet-64
           takes RAdam and begins its average anew in every stage; that for CIFAR-10, followed here, has Adam and none.
           No LPIPS.
Checked    losses and gradients of the official program (`tests/parity`); D* is the two steps; it is the mean for
           teachers of constant answer; stages against the released counts; stopping at a halving and going on changes
           no bit; Gaussian data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.methods.pairs import check_range, column
from imagewright.models.consistency import edm_teacher
from imagewright.models.preconditioning import EDMPrecond, student_network
from imagewright.noise import StepNoise
from imagewright.paths.schedules import karras_grid, karras_sigmas
from imagewright.samplers import Euler
from imagewright.types import (
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Follow,
    Parts,
    Restart,
    Trained,
    Update,
    UserError,
)


@dataclass(frozen=True, kw_only=True)
class ProgressiveDistillation:
    """Halve the number of steps until end_steps are left."""

    product: ClassVar[str] = "student"

    start_steps: int = 1024
    """Steps of the first student, which learns from twice as many of the teacher's (4096 on CIFAR-10)."""
    end_steps: int = 1
    rho: float = 7.0
    anneal: bool = False
    """Whether the rate falls to 0 within every stage and the optimiser begins anew (the published runs)."""

    def __post_init__(self) -> None:
        ratio = self.start_steps / self.end_steps if self.end_steps >= 1 else 0.0
        if ratio < 1 or not math.log2(ratio).is_integer():
            raise UserError(
                f"method.start_steps is {self.start_steps} and end_steps is {self.end_steps}; end_steps must be at "
                "least 1, and start_steps that times a power of two"
            )
        require_positive("method.rho", self.rho)

    @property
    def stages(self) -> tuple[int, ...]:
        """Steps of the student in each stage, falling; stages of one and two steps stand twice."""
        halvings = round(math.log2(self.start_steps / self.end_steps))
        steps = [self.start_steps >> k for k in range(halvings + 1)]
        return tuple(n for n in steps for _ in range(2 if n <= 2 else 1))

    def steps_at(self, images: float, total_images: float) -> int:
        """Steps of the student after `images` of a run's `total_images`."""
        shares = self.stages
        return shares[min(int(images * len(shares) / total_images), len(shares) - 1)]

    def rate_at(self, clock: Clock) -> float:
        """The learning rate of a step, in units of the run's."""
        return self.rate_left(clock.images, clock.total_images)

    def rate_left(self, images: float, total_images: float) -> float:
        """What is left of the rate within the stage: from 1 down to 0 in a straight line."""
        if not self.anneal:
            return 1.0
        shares, place = self.stages, images * len(self.stages) / total_images
        steps = shares[min(int(place), len(shares) - 1)]
        return 1 - (place - shares.index(steps)) / shares.count(steps)

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser; the student starts from its weights."""
        known = edm_teacher(teacher)
        scalings = known.sigma_min, known.sigma_max, known.sigma_data, known.noise_label
        student = EDMPrecond(student_network(known), *scalings).train()
        return Parts(student=Trained(module=student), teacher=Average(module=known.requires_grad_(False)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student; at the first step of a stage the teacher first becomes what it has learnt."""
        steps = self.steps_at(clock.images, clock.total_images)
        if self._is_new(steps, clock):
            yield Follow("teacher", "student", 0.0)
            if self.anneal:
                yield Restart("student")
        t, t_mid, t_next = self._intervals(steps, parts.student, batch.images, noise)
        x = batch.images + column(t) * noise.normal(batch.images)
        with torch.no_grad():
            aim = two_steps(parts.teacher.eval(), x, t, t_mid, t_next, batch.cond)
        yield self.learnt(parts.student, x, t, batch.cond, aim, self.rate_at(clock))

    def learnt(self, student: Any, x: Tensor, t: Tensor, cond: Condition, aim: Tensor, rate: float) -> Update:
        """The student's step towards an answer, by the truncated SNR weight."""
        error = (student(x, t, cond) - aim).square().flatten(1).mean(1)
        return Update("student", (1 / t**2).clamp(min=1) * error, {"error": error}, at=t, rate=rate)

    def _is_new(self, steps: int, clock: Clock) -> bool:
        """Whether the step before had more steps to learn. Raises UserError where it had more than twice as many."""
        if clock.step == 0:
            return False
        before = self.steps_at(clock.images * (clock.step - 1) / clock.step, clock.total_images)
        if before > 2 * steps:
            raise UserError(
                f"method.start_steps is {self.start_steps}; {len(self.stages)} shares of the run are less than one "
                "training step each: train longer or start from fewer steps"
            )
        return before != steps

    def _intervals(self, steps: int, model: Any, images: Tensor, noise: StepNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Start, middle and end, each [N], of intervals drawn uniformly from the grid of `steps` steps."""
        grid = karras_grid(2 * steps + 1, model.sigma_min, model.sigma_max, self.rho, images.device, images.dtype)
        first = 2 * noise.integers(steps, images[:, 0, 0, 0])
        return grid[first], grid[first + 1], grid[first + 2]


def two_steps(denoiser: Denoiser, x: Tensor, t: Tensor, t_mid: Tensor, t_next: Tensor, cond: Condition) -> Tensor:
    """The answer at (x, t) with which one Euler step to t_next lands where the denoiser's own two steps do.

    x: [N, C, H, W]; t > t_mid > t_next >= 0: [N]. Two calls.
    """
    first = denoiser(x, t, cond)
    second = denoiser(first + column(t_mid / t) * (x - first), t_mid, cond)
    weight = column(t_next * (t - t_mid) / (t_mid * (t - t_next)))
    return second + weight * (first - second)


def steps_sampler(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Euler:
    """The sampler for which a student of so many steps was made; its noise range is the teacher's."""
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1")
    check_range(sigma_min, sigma_max, "")
    levels = karras_sigmas(steps + 1, sigma_min, sigma_max, rho).tolist()
    return Euler(levels=(sigma_max, *levels[1:steps]))
