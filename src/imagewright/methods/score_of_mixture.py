"""Score-of-mixture training and distillation, SMT and SMD (Jayashankar et al. 2025, arXiv 2502.09609).

Divergence   of shares a in (0, 1): KL(p | m) / a + KL(q | m) / (1 - a), m = a q + (1 - a) p; q real, p generated, both
           noised at every level; a -> 0 is the forward KL, 1/2 four times Jensen-Shannon, 1 the reverse KL. Its
           gradient in a generated x is (S(x; 0) - S(x; a)) / a, S the score of m (`Condition.share` is a).
Networks   SMT: generator (trained, the product; from a denoiser's weights where a warm-up is given), score (trained:
           the run's network, told the share, untrained; with a head on its bottleneck, `models.judging`). SMD:
           generator, teacher (frozen), fake_score (trained, with the head); both trained ones start as the teacher,
           without its dropout, as SMT's generator does.
Score      SMT: D(.; a, sigma) denoises real images with weight a and generated ones with 1 - a, at one sigma and one a
           for both, noise and labels of their own. SMD: S(.; a) = d_a s_real + (1 - d_a) s_fake with d_a =
           sigmoid(l + logit a), l the head's logit, about log q / p: the fake score denoises generated images, and l
           learns to make S right: (1 - a) |S - D_fake|^2 on generated and a |S - D_real|^2 on real images, one noise
           for both, only d_a with gradient, through head and encoder. EDM's weight in all.
Generator  SMT: with e_a = x - D(x_t; a) the step (e_a - e_0) / (mean|e_1| sqrt(mean (e_a - e_0)^2 /
           mean((e_1 - e_0)^2 + 1e-6))); 1/a cancels. SMD: (d_a / a) (D_fake - D_real) / mean|x - D_real|.
GAN        L = l + logit a; of the generator softplus(-L): SMT at a level, noise and share of its own, SMD at those of
           its step. The head's own loss in SMT: (1 - a) softplus(L) + a softplus(-L), real and generated images each at
           a level of its own; none in SMD.
Shares     multiples of 1/1000. SMT: the generator's above 0; the score's all, and half of the time one of 0, 1/2, 1.
           SMD: the generator's from 1/2; the mixture's all, and a quarter of the time 0.
Turns      every step updates the score, every `score_updates`-th the generator too, before it. Classes: SMT the
           batch's, SMD uniform. Levels as DMD2's: index 20 .. 980 of 1000 for the generator's step, else 0 .. 999.
Source     tkj516/score-of-mixture-training, `main/sjsd` and `main/sjsd_dist`, whose text decides (the paper's SMT has
           a quarter of zeros among the score's shares, and so on), but for SMT's head: its functions are called with
           arguments that they do not take and leave logit a out; there the paper's formula stands.
Departs    SMT's falling cosine of the generator's rate spans the run; the program's counts each of its seven processes,
           ends after a seventh of the run and rises again. In SMT's GAN each image has its own class, and a share of
           its own. A step that is not finite is 0 (there NaN alone). bf16 as everywhere, head included. The fake score
           is asked once where the program asks it twice for the same.
Checked    S against finite differences of log m; the divergence's gradient against finite differences in the plane of
           a normal's mean; a = 1 is DMD's step; a -> 0 the forward KL's; D_1/2 is four times Jensen-Shannon; both
           updates by hand; parameters of the networks; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.checks import require_non_negative, require_positive, require_whole
from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    check_levels,
    diversity,
    fake_score_loss,
    fresh_noise,
    generate,
    matching_parts,
    surrogate,
    with_network,
)
from imagewright.methods.edm import loss_weight
from imagewright.methods.pairs import column
from imagewright.models.consistency import edm_teacher
from imagewright.models.generator import FewStepGenerator
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond, student_network
from imagewright.networks.mixture import told_share
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Condition, DataSpec, Denoiser, Event, Parts, Trained, Update, UserError

POINTS = 1000
SMALL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of real images: uniform on first .. last thousandths; with probability `extra` one of `special`."""

    first: int = 0
    last: int = POINTS
    extra: float = 0.0
    special: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= POINTS:
            raise UserError(
                f"shares.first is {self.first} and last is {self.last}; "
                f"they must satisfy 0 <= first <= last <= {POINTS}"
            )
        if not 0 <= self.extra <= 1 or not self.special or not all(0 <= s <= 1 for s in self.special):
            raise UserError(
                f"shares.extra is {self.extra} and special is {self.special}; "
                "they must lie from 0 to 1, and special must hold one number at least"
            )

    def sample(self, noise: StepNoise, like: Tensor) -> Tensor:
        """Draw shares [N], dtype and device of `like` [N]."""
        drawn = (self.first + noise.integers(self.last - self.first + 1, like)).to(like) / POINTS
        if not self.extra:
            return drawn
        special = torch.tensor(self.special).to(like)[noise.integers(len(self.special), like)]
        return torch.where(noise.uniform(like) < self.extra, special, drawn)


def log_share(log_ratio: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """ln(a r) and ln(a r + 1 - a), [N] each, of ln r and a [N] in [0, 1]; no NaN at the ends."""
    real = log_ratio + share.log()
    return real, torch.logaddexp(real, (1 - share).log())


def posterior(log_ratio: Tensor, share: Tensor) -> Tensor:
    """d_a = a r / (a r + 1 - a), [N]: how probable it is that what is seen is real."""
    real, total = log_share(log_ratio, share)
    probability: Tensor = (real - total).exp()
    return probability


def fooling(log_ratio: Tensor, share: Tensor) -> Tensor:
    """softplus(-(ln r + logit a)) [N], a > 0: 0 at share 1."""
    real, total = log_share(log_ratio, share)
    return total - real


def telling(fake: Tensor, real: Tensor, share: Tensor) -> Tensor:
    """(1 - a) softplus(L) of generated images' ln r + a softplus(-L) of real ones', [N], with its limits at 0 and 1."""
    of_fake, of_real = log_share(fake, share)[1], log_share(real, share)[1] - real
    entropy = torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share)
    told: Tensor = (1 - share) * of_fake + share * of_real - entropy
    return told


@dataclass(frozen=True, kw_only=True)
class ScoreOfMixtureTraining:
    """Train a one-step generator from images alone: one score of all mixtures of real and generated images."""

    product: ClassVar[str] = "generator"

    score_updates: int = 5
    """Updates of the score for each of the generator's."""
    generator_gan: float = 3e-3
    """Weight of the generator's adversarial loss; 0 = none."""
    score_gan: float = 1e-2
    """Weight of the head's loss, beside the denoising loss; 0 = none."""
    score_rate: float = 5.0
    """Learning rate of the score, in units of the run's (10 on ImageNet-64)."""
    cosine: bool = True
    """Let the generator's rate fall to 0 over the run, along half a cosine."""
    generator_shares: Shares = Shares(first=1)
    score_shares: Shares = Shares(extra=0.5, special=(0.0, 0.5, 1.0))
    levels: KarrasLevels = KarrasLevels(first=20, last=980)
    """Noise levels at which the laws are compared."""
    score_levels: KarrasLevels = KarrasLevels()
    """Those at which the score learns, and images are judged."""

    def __post_init__(self) -> None:
        _check(self)
        require_non_negative("method.score_gan", self.score_gan)
        require_positive("method.score_rate", self.score_rate)
        if self.generator_gan and not self.score_gan:
            raise UserError(
                f"method.generator_gan is {self.generator_gan}; it needs a score_gan above 0, or no head learns"
            )

    def parts(self, *, network: nn.Module, spec: DataSpec, warmup: Denoiser | None = None) -> Parts:
        """network: of the score, which is told the share beside it. warmup: the denoiser that the generator begins as.

        Without one the generator begins as the network, untrained. Raises UserError for a network that cannot be told
        a share, for a warm-up that is no EDM-preconditioned denoiser, and where its levels are others.
        """
        known = EDMPrecond(network) if warmup is None else edm_teacher(warmup)
        check_levels(known, levels=self.levels, score_levels=self.score_levels)
        start = with_network(known, student_network(known))
        score = EDMPrecond(told_share(network), start.sigma_min, start.sigma_max, start.sigma_data)
        if self.score_gan:
            score = JudgingDenoiser.from_denoiser(score, spec.shape)
        return Parts(
            generator=Trained(module=FewStepGenerator.from_denoiser(start)),
            score=Trained(module=score.requires_grad_(True).train(), ema=False, lr_scale=self.score_rate),
        )

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """Draw; update the generator if it is its turn; update the score on what was drawn, and on real images."""
        turn = clock.step % self.score_updates == 0
        cond = Condition(label=batch.cond.label)
        with nullcontext() if turn else torch.no_grad():
            generated = generate(parts.generator, noise.normal(batch.images), cond)
        if turn:
            rate = (1 + math.cos(math.pi * clock.fraction)) / 2 if self.cosine else 1.0
            yield replace(self.generator_update(parts, generated, noise), rate=rate)
        yield self.score_update(parts, Generated(generated.images.detach(), cond), batch, noise)

    def generator_update(self, parts: Any, generated: Generated, noise: StepNoise) -> Update:
        """The step towards smaller divergence at one share and level for each image, and the head's opinion."""
        images, cond = generated
        sigma = self.levels.sample(noise, images[:, 0, 0, 0])
        share = self.generator_shares.sample(noise, sigma)
        with torch.no_grad():
            noisy = images + column(sigma) * noise.normal(images)
            asked = (torch.zeros_like(share), share, torch.ones_like(share))
            fake, mixed, real = (parts.score(noisy, sigma, replace(cond, share=a)) for a in asked)
            direction = mixture_direction(fake, mixed, real, images)
        loss = surrogate(images, direction)
        numbers = {"matching": loss, "diversity": diversity(images)}
        if self.generator_gan:
            share = self.generator_shares.sample(noise, sigma)
            numbers["adversarial"] = fooling(self.judged(parts, generated, noise), share)
            loss = loss + self.generator_gan * numbers["adversarial"]
        return Update("generator", loss, parts=numbers, at=sigma)

    def score_update(self, parts: Any, generated: Generated, batch: Batch, noise: StepNoise) -> Update:
        """Denoise both halves of the mixture, and tell them apart."""
        sigma = self.score_levels.sample(noise, batch.images[:, 0, 0, 0])
        share = self.score_shares.sample(noise, sigma)
        real = Generated(batch.images, Condition(label=batch.cond.label))
        errors = []
        for images, cond in (generated, real):
            noisy = images + column(sigma) * noise.normal(images)
            answer = parts.score(noisy, sigma, replace(cond, share=share))
            errors.append((answer - images).square().flatten(1).mean(1))
        weight = loss_weight(sigma, parts.score.sigma_data)
        loss = weight * ((1 - share) * errors[0] + share * errors[1])
        numbers = {"denoising": loss}
        if self.score_gan:
            of_fake, of_real = (self.judged(parts, half, noise) for half in (generated, real))
            loss = loss + self.score_gan * telling(of_fake, of_real, self.generator_shares.sample(noise, sigma))
            numbers |= {"fake_logit": of_fake, "real_logit": of_real}
        return Update("score", loss, parts=numbers, at=sigma)

    def judged(self, parts: Any, images: Generated, noise: StepNoise) -> Tensor:
        """The head's logits [N] of images, each noised at a level of its own; the encoder is told the share 1/2."""
        sigma = self.score_levels.sample(noise, images.images[:, 0, 0, 0])
        noisy = images.images + column(sigma) * noise.normal(images.images)
        logits: Tensor = parts.score.judge(noisy, sigma, images.cond)
        return logits


@dataclass(frozen=True, kw_only=True)
class ScoreOfMixtureDistillation:
    """Distil a teacher to one step: its score and the generator's make those of all mixtures, by a discriminator."""

    product: ClassVar[str] = "generator"

    score_updates: int = 5
    """Updates of the fake score for each of the generator's."""
    generator_gan: float = 3e-3
    """Weight of the generator's adversarial loss; 0 = none."""
    generator_shares: Shares = Shares(first=POINTS // 2)
    score_shares: Shares = Shares(extra=0.25)
    levels: KarrasLevels = KarrasLevels(first=20, last=980)
    """Noise levels at which the laws are compared."""
    score_levels: KarrasLevels = KarrasLevels()
    """Those at which the fake score and its head learn."""

    def __post_init__(self) -> None:
        _check(self)

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser with a bottleneck. Raises UserError for another."""
        roles = matching_parts(teacher, spec)
        check_levels(teacher, levels=self.levels, score_levels=self.score_levels)
        fake = JudgingDenoiser.from_denoiser(roles["fake_score"].module, spec.shape)
        roles["fake_score"] = Trained(module=fake, ema=False)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """Draw; update the generator if it is its turn; update the fake score and its head."""
        turn = clock.step % self.score_updates == 0
        with nullcontext() if turn else torch.no_grad():
            generated = generate(parts.generator, *fresh_noise(parts.generator, batch.images, noise))
        if turn:
            yield self.generator_update(parts, generated, noise)
        yield self.score_update(parts, Generated(generated.images.detach(), generated.cond), batch, noise)

    def generator_update(self, parts: Any, generated: Generated, noise: StepNoise) -> Update:
        """The step towards smaller divergence, and the head's opinion, at one share and level for each image."""
        images, cond = generated
        sigma = self.levels.sample(noise, images[:, 0, 0, 0])
        share = self.generator_shares.sample(noise, sigma)
        noisy = images + column(sigma) * noise.normal(images)
        logits = parts.fake_score.judge(noisy, sigma, cond)
        with torch.no_grad():
            real, fake = parts.teacher(noisy, sigma, cond), parts.fake_score(noisy, sigma, cond)
            scale = (images - real).abs().flatten(1).mean(1)
            direction = finite(column(posterior(logits, share) / share / scale) * (fake - real))
        loss = surrogate(images, direction)
        numbers = {"matching": loss, "diversity": diversity(images), "adversarial": fooling(logits, share)}
        return Update("generator", loss + self.generator_gan * numbers["adversarial"], parts=numbers, at=sigma)

    def score_update(self, parts: Any, generated: Generated, batch: Batch, noise: StepNoise) -> Update:
        """Denoise generated images; then let the head make the mixture's score right, on generated and real ones."""
        denoising, at = fake_score_loss(parts, generated, self.score_levels, noise)
        eps = noise.normal(batch.images)
        sigma = self.score_levels.sample(noise, batch.images[:, 0, 0, 0])
        share = self.score_shares.sample(noise, sigma)
        apart, logits = [], []
        for images, cond in (generated, Generated(batch.images, Condition(label=batch.cond.label))):
            noisy = images + column(sigma) * eps
            with torch.no_grad():
                gap = parts.teacher(noisy, sigma, cond) - parts.fake_score(noisy, sigma, cond)
            apart.append(gap.square().flatten(1).mean(1))
            logits.append(parts.fake_score.judge(noisy, sigma, cond))
        on_fake, on_real = (posterior(each, share) for each in logits)
        # S - D_fake is d (D_real - D_fake), and S - D_real its remainder.
        mixture = (1 - share) * on_fake**2 * apart[0] + share * (1 - on_real) ** 2 * apart[1]
        mixture = loss_weight(sigma, parts.fake_score.sigma_data) * mixture
        numbers = {"denoising": denoising, "mixture": mixture, "fake_logit": logits[0], "real_logit": logits[1]}
        return Update("fake_score", denoising + mixture, parts=numbers, at=at)


def mixture_direction(fake: Tensor, mixed: Tensor, real: Tensor, clean: Tensor) -> Tensor:
    """SMT's step in `clean` from the score's answers at shares 0, a and 1; all [N, C, H, W]; no gradient."""
    squares = [(d - fake).square().flatten(1).mean(1) for d in (mixed, real)]
    ratio = (squares[0] / (squares[1] + SMALL)).sqrt()
    scale = (clean - real).abs().flatten(1).mean(1) * ratio
    return finite((fake - mixed) / column(scale))


def finite(direction: Tensor) -> Tensor:
    """A step whose entries that are not finite are 0."""
    return torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0)


def _check(method: ScoreOfMixtureTraining | ScoreOfMixtureDistillation) -> None:
    require_whole("method.score_updates", method.score_updates, 1)
    require_non_negative("method.generator_gan", method.generator_gan)
    if method.generator_shares.first == 0 or (method.generator_shares.extra and 0 in method.generator_shares.special):
        raise UserError("method.generator_shares reach 0, at which there is no step; they must be above it")
