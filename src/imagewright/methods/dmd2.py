"""Improved distribution matching distillation, DMD2 (Yin et al. 2024, arXiv 2405.14867), algorithm 1.

Networks   generator (trained, the product), teacher (frozen: D_real), fake_score (trained: D_fake, with the
           discriminator's head on its bottleneck, `models.judging`; one optimiser for both).
Matching   as `methods.dmd`, without pairs and regression (section 4.1).
Two time scales   (4.2) every step updates the fake score, every `fake_updates`-th the generator too, before it; on
           the others the generator only draws. The batch that was drawn in a step feeds both of its updates.
GAN        (4.3) real images are the batch's, with its labels, generated ones have their own; each is noised at an index
           of its own, uniform on 0 .. 999. Losses are softplus(-fake) for the generator, and softplus(fake) +
           softplus(-real) for the head, through which the fake score's encoder learns too.
Several steps   (4.4, 4.5) further levels `sigmas`; the generator's input at a level is its own answer at the levels
           before, noised anew, without gradient: one level for the whole step, on all micro-batches and processes.
Gradients  an update's go to its own part alone, by the trainer's contract: the adversarial loss leaves none in the fake
           score, which the paper's program has to clear.
           Which level is a function of the step alone, the same for all seeds.
Source     tianweiy/DMD2, `main/edm` (ImageNet-64) and `main/sd_unified_model.py` (several steps).
Departs    Images for evaluation have classes drawn uniformly; the paper's go through the 1,000 in order. A step that is
           not finite is 0 (there NaN alone). Under bf16 the head runs in it too (there the networks alone). The rates
           of a warm-up are one step ahead of the program's, whose first is 0. Guidance of the teacher, and a latent
           decoder, are the text models' and not built in here.
Checked    generator unmoved on the other steps, no gradient left in the fake score; without GAN at ratio 1 it is DMD
           without regression to the bit; one step has pure noise for input; the head finds the log density ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from imagewright.checks import require_non_negative
from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    check_levels,
    diversity,
    fake_score_loss,
    fresh_noise,
    matching_loss,
    matching_parts,
)
from imagewright.models.judging import JudgingDenoiser
from imagewright.noise import StepNoise
from imagewright.paths.grids import check_decreasing, check_stops
from imagewright.types import Batch, Clock, Condition, DataSpec, Denoiser, Event, Parts, Trained, Update, UserError

SHARED = 0xD2
"""Sets the draw that a whole step shares apart from all others."""


@dataclass(frozen=True, kw_only=True)
class DMD2:
    """Make a generator's law, noised at every level, the teacher's, and let real images correct it."""

    product: ClassVar[str] = "generator"

    fake_updates: int = 5
    """Updates of the fake score for each of the generator's (5 on ImageNet, 10 for Stable Diffusion)."""
    generator_gan: float = 3e-3
    """Weight of the generator's adversarial loss; 0 = none."""
    fake_gan: float = 1e-2
    """Weight of the head's loss, beside the denoising loss; 0 = none."""
    sigmas: tuple[float, ...] = ()
    """The generator's levels below sigma_max, decreasing, as the sampler's; () = one step."""
    levels: KarrasLevels = KarrasLevels(first=20, last=980)
    """Noise levels at which the laws are compared."""
    fake_levels: KarrasLevels = KarrasLevels()
    """Those at which the fake score learns, and images are judged."""

    def __post_init__(self) -> None:
        if self.fake_updates < 1:
            raise UserError(f"method.fake_updates is {self.fake_updates}; it must be at least 1")
        for name in ("generator_gan", "fake_gan"):
            require_non_negative(f"method.{name}", getattr(self, name))
        if self.generator_gan and not self.fake_gan:
            raise UserError(
                f"method.generator_gan is {self.generator_gan}; it needs a fake_gan above 0, or no head learns"
            )
        check_decreasing("method.sigmas", self.sigmas)

    def parts(self, *, teacher: Denoiser, spec: DataSpec, student: Denoiser | None = None) -> Parts:
        """teacher: an EDM-preconditioned denoiser. student: as `methods.dmd.DMD.parts`.

        Raises UserError for another, and for sigmas outside its range."""
        roles = matching_parts(teacher, spec, student=student)
        check_levels(teacher, levels=self.levels, fake_levels=self.fake_levels)
        check_stops("method.sigmas", self.sigmas, teacher.sigma_min, teacher.sigma_max)
        if self.fake_gan:
            fake = JudgingDenoiser.from_denoiser(roles["fake_score"].module, spec.shape)
            roles["fake_score"] = Trained(module=fake, ema=False)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """Draw; update the generator if it is its turn; update the fake score on what was drawn, and on real images."""
        turn = clock.step % self.fake_updates == 0
        x, sigma, cond = self.simulate(parts.generator, batch.images, noise, self.level_at(clock.step))
        with nullcontext() if turn else torch.no_grad():
            generated = Generated(parts.generator.start(x, sigma, cond), cond)
        if turn:
            loss, at = matching_loss(parts, generated, self.levels, noise)
            numbers = {"matching": loss, "diversity": diversity(generated.images)}
            if self.generator_gan:
                numbers["adversarial"] = F.softplus(-self.judged(parts, generated, noise))
                loss = loss + self.generator_gan * numbers["adversarial"]
            yield Update("generator", loss, parts=numbers, at=at)
        generated = Generated(generated.images.detach(), cond)
        loss, at = fake_score_loss(parts, generated, self.fake_levels, noise)
        numbers = {"denoising": loss}
        if self.fake_gan:
            fake, real = (self.judged(parts, g, noise) for g in (generated, Generated(batch.images, batch.cond)))
            loss = loss + self.fake_gan * (F.softplus(fake) + F.softplus(-real))
            numbers |= {"fake_logit": fake, "real_logit": real}
        yield Update("fake_score", loss, parts=numbers, at=at)

    @torch.no_grad()
    def simulate(self, generator: Any, like: Tensor, noise: StepNoise, level: int) -> tuple[Tensor, Tensor, Condition]:
        """The generator's input x, sigma [N] and classes at one of its levels: what it will be given when it samples.

        like: [N, C, H, W], the shape. level: 0 is sigma_max, hence pure noise; 1, 2, ... are those of `sigmas`.
        """
        latents, cond = fresh_noise(generator, like, noise)
        x, sigma = generator.sigma_max * latents, torch.full_like(like[:, 0, 0, 0], generator.sigma_max)
        for lower in self.sigmas[:level]:
            clean = generator.start(x, sigma, cond)
            x, sigma = clean + lower * noise.normal(clean), torch.full_like(sigma, lower)
        return x, sigma, cond

    def level_at(self, step: int) -> int:
        """Which of the generator's levels a step of the run trains: uniform, and the same for all workers."""
        draw = StepNoise(step, SHARED).integers(1 + len(self.sigmas), torch.empty(1))
        return int(draw)

    def judged(self, parts: Any, images: Generated, noise: StepNoise) -> Tensor:
        """The head's logits [N] of images, each noised at a level of its own."""
        sigma = self.fake_levels.sample(noise, images.images[:, 0, 0, 0])
        noisy = images.images + sigma[:, None, None, None] * noise.normal(images.images)
        logits: Tensor = parts.fake_score.judge(noisy, sigma, images.cond)
        return logits
