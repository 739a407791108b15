"""Distillation of guided diffusion models, both stages in one run (Meng et al. 2022, arXiv 2210.03142).

Source     No program was published; the halvings are those of progressive distillation (Salimans and Ho 2022,
           2202.00512), to which the paper refers, in `methods.progressive_distillation`.
Networks   student (trained: `models.weighted.GuidedDenoiser`), guided (frozen: the teacher, asked with its class and
           without), teacher (the student as it was at the last halving).
Strength   one for each image and step, uniform in `weights`, told to the student in both stages. Ours is 1 + the
           paper's w, so that --weight means the same for the student as --guidance cfg --weight for its teacher.
Levels     the paper's time t in [0, 1] of the cosine schedule is arctan(sigma) / arctan(sigma_max), and DDIM is Euler's
           step in sigma. Stage 1 draws t uniformly; the steps of stage 2 lie between t = i / N.
Stage 1    over the share `first` of the run: the student learns x_w = x_u + (1 + w) (x_c - x_u) without gradient.
Stage 2    N = start_steps, halved until end_steps are left: one step learns what two of the teacher do at the same
           strength; optimiser and rate begin anew at every halving.
Loss       max(SNR, 1) |x - target|^2, SNR = 1 / sigma^2, mean over an image's numbers, in both stages.
Stochastic the student of N steps goes two of them at once, from t = i / N to (i - 2) / N, and learns it from two such
           steps of the teacher's, half as long; the last single step, from 1 / N to 0, as otherwise. Made for the
           sampler `DDIM(overshoot=True)`, which noises back by one step after each.
Encoder    `direction = "encode"`: the same of the steps upwards, from sigma_min; a second student, whose inversion by
           `Euler.invert` turns an image into its noise, at a strength of its own.
Departs    The teacher has EDM's scalings; levels reach from its sigma_min to its sigma_max, where the paper's logSNR is
           cut at -20 and 20. The rate falls to 0 in stage 1, too. The first level upwards is sigma_min, not 0.
           Text and latents are not here.
Checked    stage 1's target against the definition; w = 0 is ordinary distillation; one step with the target lands where
           two do, in both directions; Gaussian classes, whose best student is the product of the teacher's factors; the
           weight is max(x-error, eps-error); calls; stopping within each stage and going on changes no bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imagewright.guidance import Unlabelled, guided_by, knows_no_label
from imagewright.methods.align_your_flow import check_weights, with_weight
from imagewright.methods.pairs import column
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.models.consistency import edm_teacher
from imagewright.models.segments import segment_boundaries
from imagewright.models.weighted import GuidedDenoiser
from imagewright.noise import StepNoise
from imagewright.precision import wide
from imagewright.samplers import DDIM, Euler
from imagewright.types import (
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Trained,
    UserError,
)

Direction = Literal["sample", "encode"]


@dataclass(frozen=True, kw_only=True)
class GuidedDistillation(ProgressiveDistillation):
    """One student of guided images in few steps, told the strength."""

    start_steps: int = 512
    anneal: bool = True
    weights: tuple[float, float] = (1.0, 5.0)
    """Range of the strength; the paper's w in [0, 4]."""
    first: float = 0.5
    """Share of the run for stage 1; 0 for a teacher that has it behind it, a `GuidedDenoiser`."""
    halving_rate: float = 1.0
    """Learning rate at the start of every halving, in units of the run's."""
    stochastic: bool = False
    direction: Direction = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights)
        if not 0 <= self.first < 1:
            raise UserError(f"method.first is {self.first}; it must lie in [0, 1)")
        if not 0 < self.halving_rate < float("inf"):
            raise UserError(f"method.halving_rate is {self.halving_rate}; it must be positive and finite")
        if self.direction not in get_args(Direction):
            raise UserError(f"method.direction is {self.direction!r}; allowed: {', '.join(get_args(Direction))}")
        if self.stochastic and self.direction == "encode":
            raise UserError("method.stochastic has no effect on an encoder, whose steps draw no noise")

    def steps_at(self, images: float, total_images: int | float) -> int:
        """As before; of stage 1, twice those of the first halving."""
        begun = images - self.first * total_images
        return 2 * self.start_steps if begun < 0 else super().steps_at(begun, total_images * (1 - self.first))

    def rate_left(self, images: float, total_images: float) -> float:
        begun = images - self.first * total_images
        if begun >= 0:
            return self.halving_rate * super().rate_left(begun, total_images * (1 - self.first))
        return 1 - images / (self.first * total_images) if self.anneal else 1.0

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser that knows images with and without their class, or a guided student.

        Raises UserError for another, and for a stage 1 that it has behind it or lacks.
        """
        known = edm_teacher(teacher)
        if (self.first == 0) is not isinstance(known, GuidedDenoiser):
            raise UserError(
                f"method.first is {self.first}; it must be 0 for a teacher that is told the strength of guidance, and "
                "above 0 for another"
            )
        if isinstance(known, GuidedDenoiser):
            if known.weights != self.weights:
                raise UserError(f"method.weights is {self.weights}; the teacher was trained for {known.weights}")
            student = copy.deepcopy(known).train().requires_grad_(True)
            return Parts(student=Trained(module=student), teacher=Average(module=known.requires_grad_(False)))
        if not (spec.num_classes and knows_no_label(known)):
            raise UserError(
                "guided distillation learns from a denoiser with classes that was trained with "
                "--network.label-dropout above 0"
            )
        student = GuidedDenoiser.from_denoiser(known, self.weights)
        before = copy.deepcopy(student).requires_grad_(False)
        return Parts(
            student=Trained(module=student), guided=Frozen(module=known), teacher=Average(module=before, of="student")
        )

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        cond = with_weight(batch.cond, self.weights, noise, batch.images[:, 0, 0, 0])
        if self.steps_at(clock.images, clock.total_images) <= self.start_steps:
            yield from super().step(parts, replace(batch, cond=cond), noise, clock)
            return
        sigma = self._levels(parts.student, batch.images, noise)
        x = batch.images + column(sigma) * noise.normal(batch.images)
        with torch.no_grad():
            aim = guided_answer(parts.guided, x, sigma, cond)
        yield self.learnt(parts.student, x, sigma, cond, aim, self.rate_at(clock))

    def _levels(self, model: Any, images: Tensor, noise: StepNoise) -> Tensor:
        """Noise levels of a uniform time, [N]."""
        like = images[:, 0, 0, 0]
        highest = math.atan(model.sigma_max)
        return (highest * (1 - wide(noise.uniform(like)))).tan().clamp(model.sigma_min, model.sigma_max).to(like)

    def _intervals(self, steps: int, model: Any, images: Tensor, noise: StepNoise) -> tuple[Tensor, Tensor, Tensor]:
        ends = (model.sigma_min, model.sigma_max)
        levels = cosine_levels(2 * steps, *ends, self.direction == "encode", images.device, images.dtype)
        index = 1 + noise.integers(steps, images[:, 0, 0, 0])  # of the steps' upper ends, 1 .. steps
        if self.direction == "encode":
            return levels[2 * index - 2], levels[2 * index - 1], levels[2 * index]
        if self.stochastic:
            last = index == 1
            return levels[2 * index], levels[2 * index - 2 + last.long()], levels[(2 * index - 4).clamp(min=0)]
        return levels[2 * index], levels[2 * index - 1], levels[2 * index - 2]


@lru_cache
def cosine_levels(
    steps: int, sigma_min: float, sigma_max: float, upwards: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Noise levels at t = i / steps, i = 0 .. steps; all but the clean image's within the model's range.

    upwards: the first is sigma_min. On a device, sent there once: sending makes the host wait. Not to be changed in
    place.
    """
    with torch.inference_mode(False):
        levels = torch.tensor(segment_boundaries(steps, sigma_max), dtype=torch.float64)
        lowest = sigma_min * torch.linspace(1, 1 + 1e-3, steps + 1, dtype=torch.float64)  # each above the last
        levels[1:] = torch.maximum(levels[1:], lowest[1:])
        if upwards:
            levels[0] = sigma_min
        return levels.to(device, dtype)


def guided_answer(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """x_w of classifier-free guidance at the condition's strengths: two calls."""
    assert cond.weight is not None
    return guided_by(denoiser, Unlabelled(denoiser), x, sigma, replace(cond, weight=None), cond.weight)


def guided_sampler(steps: int, sigma_max: float = 80.0, *, stochastic: bool = False) -> Euler | DDIM:
    """The sampler for which a student of so many steps was made; its calls are the steps."""
    levels = segment_boundaries(steps, sigma_max)[:0:-1]
    return DDIM(levels=levels, overshoot=True) if stochastic else Euler(levels=levels)
