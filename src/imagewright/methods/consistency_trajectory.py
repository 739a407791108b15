"""Consistency trajectory models, CTM: distillation (Kim et al. 2024, arXiv 2310.02279), algorithms 1 and 2.

Source     The programs decide where the paper is silent: Kim-Dongjun/ctm-cifar10 and sony/ctm (ImageNet-64).
Networks   student (trained: `models.trajectory`), target (average of the student), teacher (frozen), and with the
           adversarial term a discriminator (trained, with a rate and momenta of its own). DDPM++ is told the class
           beside the destination too, ADM beside the present level alone, as in the two programs.
Time       the paper's t is our sigma; the grid is EDM's (rho = 7); the paper's 0 is sigma_min.
Jumps      n teacher steps lead from t to u; s lies on the grid, anywhere from u down. Compared are the two ways to the
           clean image:  target(student(x_t, t, s), s, 0)  and  target(stopgrad student(Heun_n(x_t), u, s), s, 0). The
           gradient passes through the frozen target into the student's jump. No weight by noise level.
n          P(n) proportional to n. One n for the whole step: it is a function of the clock's step alone, so that
           all micro-batches, processes and seeds draw the same.
Denoising  E|x0 - g(x_t, t, t)|^2, mean over pixels, with EDM's weight; half of the noise levels log-normal, half even
           in t^(1/rho) over the noisiest 70% of the range.
Weights    lambda = |grad_L consistency| / (|grad_L other| + 1e-4), at most 1e4, for the denoising and the adversarial
           term; L is the network's `last_layer`; no gradient through lambda. Each micro-batch has its own.
GAN        after a share of the run: hinge loss, real = data, fake = the first of the two ways above, the very image of
           the consistency loss in the student's steps; differentiable augmentation; lambda kept in [0.01, 10]. Student
           and discriminator learn in turns, one step each. The discriminator is not told the class.
Networks of the discriminator   `networks.discriminator.ConvDiscriminator`, which needs no downloaded weights, unless
           `parts(..., projections=[...])` gives frozen feature networks for the published, projected one: modules that
           turn images in [-1, 1] into lists of feature maps, the paper's being DeiT-base-distilled and
           EfficientNet-lite0 (weights from the user; `ProjectedDiscriminator` brings images to 224).
           `features=` is the distance's, such as LPIPS's network with its own resizing to 224.
Departs    c_noise is EDM's ln(sigma) / 4 where the published ImageNet networks take 250 ln(sigma), so that a teacher's
           weights mean the same to the student. The blocks start deaf to the destination, so that the student starts
           as its teacher; the programs draw those layers at random. Denoising levels alternate between the halves,
           beginning with either; in the programs the second half has one more where a micro-batch is odd. One draw of
           the augmentation serves all feature networks, and logits are averaged over all their places; the programs
           draw for each network and average within it first. The programs have an option for fakes at a (t, n, s) of
           their own (`gan_specific_time`); their ImageNet command sets it, but as both kinds of its fakes are those of
           the consistency loss, the images of that loss are used all the same. Not in this file: classifier rejection
           of samples, training without a teacher, and the projected features as the distance.
Checked    jumps, losses, lambda and gradients of the published program on small weights; exact jumps of Gaussian data
           have a loss that vanishes as the grid gets finer; s = sigma_min and n = 1 is consistency distillation; lambda
           cancels a factor on a loss; laws of n, s and sigma; resume bit for bit.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_non_negative, require_positive
from imagewright.errors import an
from imagewright.methods.adversary import HasLastLayer, adaptive_weight
from imagewright.methods.diff_augment import DiffAugment
from imagewright.methods.distances import Distance, Features
from imagewright.methods.edm import denoising_loss
from imagewright.methods.pairs import check_grid, column, heun_step
from imagewright.models.consistency import edm_teacher
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks.discriminator import ConvDiscriminator, ProjectedDiscriminator
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.paths.schedules import karras_grid
from imagewright.precision import wide
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

SHARED = 0xC7
"""Sets the draws that a whole step shares apart from all others."""


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The adversarial term and its discriminator."""

    start: float = 0.5
    """Share of the run after which the term is adopted, and student and discriminator learn in turns."""
    least_weight: float = 0.01
    most_weight: float = 10.0
    lr_scale: float = 5.0
    """The discriminator's learning rate in units of the run's (published: 2e-3, whatever the student's)."""
    betas: tuple[float, float] = (0.5, 0.9)
    width: int = 64
    """Channels of the discriminator at full resolution (convolutional), or at the finest scale (projected)."""
    feature_size: int | None = 224
    """Side to which a projected discriminator brings images; None = their own."""
    augment: DiffAugment = DiffAugment()

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(f"adversarial.start is {self.start}; it must lie in [0, 1)")
        if not 0 <= self.least_weight <= self.most_weight < math.inf:
            raise UserError(
                f"adversarial.least_weight is {self.least_weight} and most_weight {self.most_weight}; "
                "they must satisfy 0 <= least_weight <= most_weight, both finite"
            )
        require_positive("adversarial.lr_scale", self.lr_scale)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"adversarial.betas is {self.betas}; both must lie in [0, 1)")
        for name in ("width", "feature_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"adversarial.{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Jump:
    """Noisy images x [N, C, H, W] at t, and where to go; noise levels t, u >= s, each [N]."""

    x: Tensor
    t: Tensor
    u: Tensor
    s: Tensor
    path: Tensor
    """[n + 1, N]: the grid's levels from t down to u."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyTrajectory:
    """Two ways along a teacher's trajectory lead to the same image, from any level over any other."""

    product: ClassVar[str] = "student"

    grid_points: int = 18
    """Points of the noise grid (18 on CIFAR-10, 40 on ImageNet-64)."""
    max_steps: int | None = None
    """Most teacher steps n of one update; None = all intervals of the grid (20 in the published ImageNet GAN stage)."""
    rho: float = 7.0
    target_decay: float = 0.999
    distance: Distance = Distance()
    denoising: float = 1.0
    """Factor on the denoising loss, besides its adaptive weight; 0 = without it, and g(x, t, t) is no denoiser."""
    noise_levels: LogNormal = LogNormal(mean=-1.2, std=1.2)
    dropout: float = 0.0
    """Of student and target, each with masks of its own (the published CIFAR-10 runs leave DDPM++'s 0.13 on)."""
    high_noise_share: float = 0.7
    """Half of the denoising loss's levels lie in this share of the range of t^(1/rho), from sigma_max down."""
    adversarial: Adversarial | None = None

    def __post_init__(self) -> None:
        check_grid("grid_points", self.grid_points, self.rho)
        if self.max_steps is not None and not 1 <= self.max_steps < self.grid_points:
            raise UserError(
                f"method.max_steps is {self.max_steps}; it must lie in 1 .. {self.grid_points - 1}, "
                "one less than grid_points, or none"
            )
        if not 0 <= self.target_decay < 1:
            raise UserError(f"method.target_decay is {self.target_decay}; it must lie in [0, 1)")
        require_non_negative("method.denoising", self.denoising)
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.dropout is {self.dropout}; it must lie in [0, 1)")
        if not 0 < self.high_noise_share <= 1:
            raise UserError(f"method.high_noise_share is {self.high_noise_share}; it must lie in (0, 1]")

    def parts(
        self,
        *,
        teacher: Denoiser,
        spec: DataSpec,
        features: Features | None = None,
        projections: Sequence[nn.Module] = (),
    ) -> Parts:
        """teacher: an EDM-preconditioned denoiser; student and target start from its weights.

        features: of a perceptual distance. projections: frozen networks through which the discriminator looks.
        Raises UserError for another teacher, and where the distance lacks its features.
        """
        known = edm_teacher(teacher)
        student = TrajectoryModel.from_denoiser(known, self.dropout)
        if not isinstance(student.network, HasLastLayer):
            raise UserError(f"the teacher's network is {an(type(student.network).__name__)}, which has no last_layer")
        more: dict[str, Trained | Frozen] = {"teacher": Frozen(module=known)}
        if self.distance.kind == "perceptual":
            if not isinstance(features, nn.Module):
                raise UserError("method.distance.kind is 'perceptual'; it needs a feature network (give `features`)")
            more["features"] = Frozen(module=features)
        if self.adversarial is not None:
            more["discriminator"] = discriminator_part(self.adversarial, spec, projections)
        target = copy.deepcopy(student).requires_grad_(False)
        return Parts(student=Trained(module=student), target=Average(module=target, of="student"), **more)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, then of the target; once there is an adversary, every other step is its own."""
        adversary = self.adversarial if self.adversarial and clock.fraction >= self.adversarial.start else None
        if adversary and clock.step % 2:
            yield self._discriminate(parts, batch, noise, clock, adversary)
        else:
            yield self._learn(parts, batch, noise, clock, adversary)
            yield Follow("target", "student", self.target_decay)

    def steps_at(self, step: int) -> int:
        """Teacher steps n of a step of the run: shared by all workers."""
        draw = float(StepNoise(step, SHARED).uniform(torch.empty(1)))
        law = list(accumulate(range(1, (self.max_steps or self.grid_points - 1) + 1)))
        return bisect_right([share / law[-1] for share in law], draw) + 1

    def denoising_levels(self, noise: StepNoise, like: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
        """Noise levels [N] of the denoising loss; the halves alternate, beginning with either. like: [N]."""
        usual = self.noise_levels.sample(noise, like)
        low, high = sigma_min ** (1 / self.rho), sigma_max ** (1 / self.rho)
        share = self.high_noise_share * noise.uniform(wide(like))
        noisy = (high + share * (low - high)).pow(self.rho).to(like)
        first = noise.common(like.new_empty(1)) < 0.5
        even = noise.places(like)[0] % 2 == 0
        return torch.where(even == first, usual, noisy)

    def _learn(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock, adversary: Adversarial | None) -> Update:
        """The student's loss: consistency, denoising, and the adversary's opinion."""
        jump = self._jump(parts, batch.images, noise.normal(batch.images), self.steps_at(clock.step), noise)
        aim = self._aim(parts, jump, batch.cond)
        estimate = _by_one_jump(parts, jump, batch.cond)
        consistency = self.distance(estimate, aim, getattr(parts, "features", None))
        loss, layer = consistency, parts.student.network.last_layer
        numbers = {"consistency": consistency}
        if self.denoising > 0:
            student = parts.student
            sigma = self.denoising_levels(noise, jump.t, student.sigma_min, student.sigma_max)
            dsm = denoising_loss(student.denoiser(), batch.images, sigma, batch.cond, noise, student.sigma_data)
            weight = adaptive_weight(consistency, dsm, layer)
            loss = loss + self.denoising * weight * dsm
            numbers |= {"denoising": dsm, "denoising_weight": weight}
        if adversary is not None:
            fooled = -parts.discriminator(adversary.augment(estimate, noise)).mean(1)
            weight = adaptive_weight(consistency, fooled, layer).clamp(adversary.least_weight, adversary.most_weight)
            loss = loss + weight * fooled
            numbers |= {"adversarial": fooled, "adversarial_weight": weight}
        return Update("student", loss, parts=numbers, at=jump.t)

    def _discriminate(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock, adversary: Adversarial) -> Update:
        """The discriminator's hinge loss on data and on the student's jumps."""
        with torch.no_grad():
            jump = self._jump(parts, batch.images, noise.normal(batch.images), self.steps_at(clock.step), noise)
            fake = _by_one_jump(parts, jump, batch.cond)
        real_logits, fake_logits = (
            parts.discriminator(adversary.augment(images, noise)) for images in (batch.images, fake)
        )
        real, fake = F.relu(1 - real_logits).mean(1), F.relu(1 + fake_logits).mean(1)
        return Update("discriminator", real + fake, parts={"real": real, "fake": fake}, at=jump.t)

    def _jump(self, parts: Any, images: Tensor, z: Tensor, n: int, noise: StepNoise) -> Jump:
        """t uniform on the grid's points with n below them, s uniform on those from u = n points below t downwards."""
        model, like = parts.student, images[:, 0, 0, 0]
        grid = karras_grid(self.grid_points, model.sigma_min, model.sigma_max, self.rho, images.device, images.dtype)
        start = noise.integers(self.grid_points - n, like)
        left = self.grid_points - (start + n)  # points that s may be
        end = start + n + (noise.uniform(wide(like)) * left).floor().long()
        path = grid[start + torch.arange(n + 1, device=images.device)[:, None]]
        return Jump(images + column(path[0]) * z, path[0], path[-1], grid[end], path)

    def _aim(self, parts: Any, jump: Jump, cond: Condition) -> Tensor:
        """The way over u: the teacher's n steps, the student's own jump, the target's; without gradient."""
        with torch.no_grad():
            x = jump.x
            for t, t_next in zip(jump.path[:-1], jump.path[1:], strict=True):
                x = heun_step(parts.teacher, x, t, t_next, cond)
            return _by_one_jump(parts, replace(jump, x=x, t=jump.u), cond)


def _by_one_jump(parts: Any, jump: Jump, cond: Condition) -> Tensor:
    """The student jumps from t to s, the target from there to the clean image."""
    landed = parts.student(jump.x, jump.t, jump.s, cond)
    clean: Tensor = parts.target(landed, jump.s, torch.zeros_like(jump.s), cond)
    return clean


def discriminator_part(settings: Adversarial, spec: DataSpec, projections: Sequence[nn.Module]) -> Trained:
    """A discriminator that looks at images themselves, or through frozen networks."""
    module: nn.Module
    if projections:
        module = ProjectedDiscriminator(projections, spec.shape, size=settings.feature_size, width=settings.width)
    else:
        module = ConvDiscriminator(spec.resolution, spec.channels, width=settings.width)
    return Trained(module=module, ema=False, lr_scale=settings.lr_scale, betas=settings.betas)
