"""EM distillation, EMD (Xie et al. 2024, arXiv 2405.16852): maximum likelihood of a one-step generator, algorithm 1.

Networks   generator g (trained, the product), teacher (frozen: D_real), fake_score (trained: D_fake). All start from
           the teacher's weights, without its dropout.
Time       the paper's t is our sigma; alpha = 1. In the chain's coordinates (eps, z) nothing depends on alpha.
E-step     pairs of noise and latent, from the student's own, by `steps` of Langevin dynamics on the density
           q(x_t) / p(x_t) N(eps) N(z), x_t = g(z) + sigma eps (section 3.2), with d = (D_real - D_fake) / sigma^2:
               eps <- eps + gamma_eps (sigma d - eps) + sqrt(2 gamma_eps) n,
               z <- z + gamma_z (J_g(z)^T d - z) + sqrt(2 gamma_z) n',    both at once, d without gradient.
Cancelled  (3.3) what is left of the injected noise, that of the start included, is taken out of eps before the M-step.
           eps is held as two sums, of drifts and of noise, so that the difference is exact and not one of two numbers.
M-step     w / (2 sigma^2) |g(z_K) + sigma (eps_K - noise) - g(z_K)|^2, the first in it held fixed: the step in g's
           answer at the corrected latents is -(w / sigma) (eps_K - noise).
Fake       denoising of g(z), uncorrected; one update before each of the generator's, on samples of its own.
Start      g(z) = D(sigma* z; sigma*) at the log-SNR `start_log_snr` = -2 ln sigma*; classes uniform; no real image.
Source     The paper; no program is public. Its tables' step sizes, rates, betas and K, as the recipes have them, are
           known to us at second hand, and so are w, that noise in z stays, and that eps and z move at once.
Departs    Errors are means over an image's numbers, where the paper has sums; Adam's eps is as much smaller.
           Levels are those of EDM's grid, the paper's of its teacher's cosine schedule. The generator's input is
           sigma* z, in the paper's coordinates a part in 800 short of unit variance at -6. One average of the weights.
Checked    one step without z is Diff-Instruct to the bit; no drift where the denoisers agree, whatever z does; there
           the chain's variance is 1 / (1 - gamma / 2); moments of a linear generator's chain against their closed
           form; the update of z against finite differences; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from imagewright.checks import require_non_negative, require_positive, require_whole
from imagewright.methods.distribution_matching import (
    KarrasLevels,
    check_levels,
    diversity,
    fake_score_loss,
    fresh_noise,
    generate,
    matching_parts,
    surrogate,
)
from imagewright.methods.pairs import column
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.types import Batch, Clock, Condition, DataSpec, Denoiser, Event, Parts, Update, UserError

Weight = Literal["sigma2", "one"]


class Corrected(NamedTuple):
    """Where the chain ends, [N, C, H, W] each, in units of the image: noise and drift add up to sigma eps.

    latents: standard normal units. drift: what the scores and the prior did. noise: what is left of what was injected.
    """

    latents: Tensor
    drift: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class EMDistillation:
    """Fit a generator to a teacher by expectation maximisation, which covers its modes."""

    product: ClassVar[str] = "generator"

    steps: int = 16
    """K: Langevin steps of the E-step (1 to 16 in the paper); each costs two denoisers' answers, and with gamma_z a
    vector-Jacobian product of the generator."""
    gamma_eps: float = 0.16
    """Step size of the noise, at most 1 (0.4^2 on ImageNet-64)."""
    gamma_z: float = 1.6e-5
    """Step size of the latents, below 1 (0.004^2 on ImageNet-64); 0 = they stay."""
    cancel_noise: bool = True
    """Take the injected noise out before the M-step."""
    weight: Weight = "sigma2"
    """w: sigma^2 (alpha = 1), with which the step of K = 1 is gamma_eps (D_fake - D_real); or 1."""
    start_log_snr: float | None = -6.0
    """lambda*: log-SNR of the generator's one level; None = that of the teacher's sigma_max."""
    fake_rate: float = 5.0
    """Learning rate of the fake score, in units of the run's (1e-5 beside 2e-6 on ImageNet-64)."""
    levels: KarrasLevels | LogNormal = KarrasLevels(first=20, last=980)
    """Noise levels of the chain."""
    fake_levels: KarrasLevels | LogNormal = KarrasLevels()
    """Those at which the fake score learns."""

    def __post_init__(self) -> None:
        require_whole("method.steps", self.steps, 1)
        require_positive("method.fake_rate", self.fake_rate)
        require_positive("method.gamma_eps", self.gamma_eps)
        require_non_negative("method.gamma_z", self.gamma_z)
        if self.gamma_eps > 1 or self.gamma_z >= 1:
            raise UserError(
                f"method.gamma_eps is {self.gamma_eps} and gamma_z is {self.gamma_z}; "
                "they must be at most 1 and below 1, or the chain does not contract"
            )
        if self.weight not in get_args(Weight):
            raise UserError(f"method.weight is {self.weight!r}; allowed: {', '.join(get_args(Weight))}")
        if self.start_log_snr is not None and not math.isfinite(self.start_log_snr):
            raise UserError(f"method.start_log_snr is {self.start_log_snr}; it must be finite, or none")

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser; generator and fake_score start from its weights.

        Raises UserError for another teacher, and for levels that it does not know.
        """
        start = None if self.start_log_snr is None else math.exp(-self.start_log_snr / 2)
        if start is not None and not teacher.sigma_min < start <= teacher.sigma_max:
            raise UserError(
                f"method.start_log_snr is {self.start_log_snr}, sigma {start:.3g}; "
                f"the teacher knows noise levels from {teacher.sigma_min:g} to {teacher.sigma_max:g}"
            )
        roles = matching_parts(teacher, spec, sigma_max=start)
        check_levels(teacher, levels=self.levels, fake_levels=self.fake_levels)
        roles["fake_score"] = replace(roles["fake_score"], lr_scale=self.fake_rate)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the fake score, then one of the generator, each on samples of its own."""
        with torch.no_grad():
            generated = generate(parts.generator, *fresh_noise(parts.generator, batch.images, noise))
        loss, sigma = fake_score_loss(parts, generated, self.fake_levels, noise)
        yield Update("fake_score", loss, at=sigma)
        yield self.generator_update(parts, *fresh_noise(parts.generator, batch.images, noise), noise)

    def generator_update(self, parts: Any, latents: Tensor, cond: Condition, noise: StepNoise) -> Update:
        """The M-step at the end of the E-step's chain."""
        images = generate(parts.generator, latents, cond).images
        sigma = self.levels.sample(noise, latents[:, 0, 0, 0])
        end = self.corrected(parts, latents, images.detach(), cond, sigma, noise)
        if self.gamma_z:
            images = generate(parts.generator, end.latents, cond).images
        moved = end.drift if self.cancel_noise else end.drift + end.noise
        loss = surrogate(images, -moved if self.weight == "sigma2" else -moved / column(sigma) ** 2)
        numbers = {"diversity": diversity(images), "drift": end.drift.square().flatten(1).mean(1).sqrt()}
        return Update("generator", loss, parts=numbers, at=sigma)

    def corrected(
        self, parts: Any, latents: Tensor, images: Tensor, cond: Condition, sigma: Tensor, noise: StepNoise
    ) -> Corrected:
        """The E-step's chain, from latents [N, C, H, W] and fresh noise at sigma [N]; images: g(latents)."""
        level, z = column(sigma), latents
        injected, drift = level * noise.normal(latents), torch.zeros_like(latents)
        for _ in range(self.steps):
            if self.gamma_z:
                z = z.detach().requires_grad_()
                with torch.enable_grad():
                    seen = generate(parts.generator, z, cond).images
            else:
                seen = images
            with torch.no_grad():
                noisy = seen + injected + drift
                pull = parts.teacher(noisy, sigma, cond) - parts.fake_score(noisy, sigma, cond)
                drift = (1 - self.gamma_eps) * drift + self.gamma_eps * pull
                fresh = level * noise.normal(latents)
                injected = (1 - self.gamma_eps) * injected + math.sqrt(2 * self.gamma_eps) * fresh
            if self.gamma_z:
                (slope,) = torch.autograd.grad(seen, z, pull / level**2)
                z = z + self.gamma_z * (slope - z) + math.sqrt(2 * self.gamma_z) * noise.normal(latents)
        return Corrected(z.detach(), drift, injected)
