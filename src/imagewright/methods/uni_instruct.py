"""Uni-Instruct (Wang et al. 2025, arXiv 2505.20755): every f-divergence by one loss; older methods are its settings.

Roles      generator (trained, the product), teacher (frozen: D_real), fake_score (trained: D_fake; the channel mean of
           its encoder's output is the discriminator's map of logits, so that no parameter is added).
Time       the paper's t is our sigma; r = q / p, data over student; e = D_real - D_fake; u = s_p - s_q = -e / sigma^2.
Expansion  D_f = int 1/2 g^2 E_p[ h(r) |u|^2 ] dt with h(r) = r^2 f''(r): equations 4 to 6. Its gradient is that of
               h e.(D_fake - x) + (1 - alpha) (h - r h') |e|^2      times 2 / sigma^4, alpha = 1/2
           along the sample's path, x_t = x + sigma eps, through both denoisers (their weights are frozen) and, with
           `ratio_gradient`, through r, whose gradient along the path is -r u. alpha = 1 is the score implicit matching
           (SIM) piece alone, which is what the published program minimises, with r held fixed.
DI piece   the divergence at each level as it is: h(r) u.dx. Expanded and summed over levels it is the same
           divergence, with the weights of the levels summed up from 0.
Settings   `NAMED`: Diff-Instruct, DMD (its direction; the regression is `methods.dmd`'s), SIM, SiD, SiDA, and the
           paper's own of five divergences. Adversarial: real images against generated ones at one noise level and one
           noise, labels and augmentation law the same.
Adversary  as the program reduces it: the *micro-batch's mean* cross-entropy, times the mean of lambda(sigma) beside the
           fake network's loss, times the mean of 1 / normaliser in the generator's. A cross-entropy weighed image by
           image is another loss, that of the few images at the lowest noise.
Phases     counted in images: fake network and discriminator alone; then the generator too, h = 1 and no adversary; all.
Kept       order (fake network, then generator, each on samples of its own); index of the level uniform on the lowest
           0.8 of Karras's grid; normaliser mean |x - D_real|, at least 1e-5 and without gradient; logits within +-10;
           generator from noise at 2.5, in eval mode where it feeds the fake network, which is in eval mode where it
           judges; the teacher's dropout; augmentation where the fake network learns, only. Diff-Instruct as its own
           program (pkulwj1994/diff_instruct) has it: one law of levels for both, noise at 1, D_fake - D_real as it is,
           both asked in training mode with the same dropout mask.
Departs    The program weighs with L / (L - 1), L = C H W times the cross-entropy over the normaliser: thousands, so
           that its weight for forward KL and Jeffreys' is 1 within a thousandth; here r is exp of the mean logit.
           Its chi-square and Jensen-Shannon branches leave out or rescale pieces; here they are the whole gradient. No
           clipping of the fake network's gradients at 1, and no removal of images or gradients that are not finite: the
           trainer stops and says so. Losses are means over numbers where the program's are sums: Adam's step is the
           same where its eps is C H W times smaller, as the recipes have it. Levels are 800 points, not an interval.
           One batch of real images, or its labels, serves both updates of a step. SiDA's program halves both terms of
           its loss once it has two. The program's reverse KL fails where the adversary comes; here h is 1. DMD's
           normaliser is its own, without 1e-5. SIM's training has no program; its paper's formula is followed, but for
           a normaliser that is held fixed as SiD's is.
Checked    gradients against closed forms and finite differences; the integral against KL; every equivalence that is
           claimed above; the adversary's reductions; h = 1 makes all divergences coincide; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_non_negative, require_positive
from imagewright.data.augment import Augment
from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    check_levels,
    diversity,
    fake_score_loss,
    generate,
    matching_direction,
    matching_parts,
    surrogate,
)
from imagewright.methods.edm import loss_weight
from imagewright.methods.pairs import column
from imagewright.models.judging import answer_and_maps, bottleneck, check_bottleneck
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.types import Batch, Clock, Condition, DataSpec, Denoiser, Event, Noise, Parts, Span, Update, UserError

Divergence = Literal["rkl", "fkl", "jeffreys", "chi2", "js", "hellinger"]
Normaliser = Literal["l1", "huber", "none", "integral"]


class Weights(NamedTuple):
    """What an f-divergence makes of the ratio r: h = r^2 f'' and rest = h - r h'."""

    h: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor], Tensor]


WEIGHTS: Mapping[str, Weights] = {
    "rkl": Weights(torch.ones_like, torch.ones_like),  # f = -log r
    "fkl": Weights(lambda r: r, torch.zeros_like),  # r log r
    "chi2": Weights(lambda r: 2 * r**2, lambda r: -2 * r**2),  # (r - 1)^2
    "js": Weights(lambda r: r / (1 + r), lambda r: (r / (1 + r)) ** 2),  # r log r - (1 + r) log((1 + r) / 2)
    "hellinger": Weights(lambda r: r.sqrt() / 2, lambda r: r.sqrt() / 4),  # (sqrt(r) - 1)^2
}
"""Section 3.2 of the paper; Jeffreys' is the first two's sum."""


@dataclass(frozen=True, kw_only=True)
class UniInstruct:
    """Make a generator's law the teacher's, in one f-divergence over all noise levels."""

    product: ClassVar[str] = "generator"

    divergence: Divergence = "rkl"
    jeffreys: tuple[float, float] = (1.0, 1.0)
    """Weights of the forward and the reverse divergence in Jeffreys' (0.4 and 0.6 in the paper's runs)."""
    sim: float = 1.0
    """Weight of the expanded divergence: score implicit matching."""
    di: float = 0.0
    """Weight of the divergence at each level as it is: Diff-Instruct."""
    alpha: float = 1.0
    """SiD's alpha: 1 = the SIM piece alone, 0.5 = the whole gradient (with `ratio_gradient`, where h depends on r)."""
    ratio_gradient: bool = False
    """Let the gradient pass through the ratio along the sample's path too."""
    normaliser: Normaliser = "l1"
    """l1: loss over mean |x - D_real|. huber: over sqrt(mean |e|^2 + c^2), SIM's distance. none. integral: what the
    theory has, so that the mean over levels is the divergence, over C H W (expanded), or the sum of theirs (di)."""
    huber_c: float = 0.00054
    scale: float = 100.0
    """Factor on the generator's loss, beside `gan_weight`."""
    gan_weight: float = 0.0
    """Of the generator's adversarial loss, a mean over images times the mean of 1 / normaliser; 0 = none."""
    logit_limit: float = 10.0
    """Logits that the generator sees lie within +- this."""
    start_sigma: float | None = 2.5
    """The generator's level of pure noise; None = the teacher's sigma_max."""
    levels: KarrasLevels | LogNormal = KarrasLevels(last=799)
    """Noise levels at which the laws are compared: up to 0.8 of the grid."""
    fake_levels: LogNormal | KarrasLevels = LogNormal(mean=-1.2, std=1.2)
    """Those at which the fake network and the discriminator learn."""
    same_masks: bool = False
    """Compare the denoisers in training mode, the same dropout mask in both, in place of eval mode."""
    augment: Augment = Augment(p=0.0)
    """Of the images on which they learn; p = 0: none."""
    fake_only_images: Span = 0
    """Images until the generator begins to learn (100,000 in the paper's runs)."""
    plain_images: Span = 0
    """Images until ratio and adversary enter its loss (200,000)."""

    def __post_init__(self) -> None:
        for name, kinds in (("divergence", get_args(Divergence)), ("normaliser", get_args(Normaliser))):
            if getattr(self, name) not in kinds:
                raise UserError(f"method.{name} is {getattr(self, name)!r}; allowed: {', '.join(kinds)}")
        for name in ("sim", "di", "gan_weight", "fake_only_images", "plain_images"):
            require_non_negative(f"method.{name}", getattr(self, name))
        for name in ("scale", "huber_c", "logit_limit"):
            require_positive(f"method.{name}", getattr(self, name))
        if not self.sim + self.di + self.gan_weight:
            raise UserError("method.sim, di and gan_weight are all 0; at least one must be positive")
        if len(self.jeffreys) != 2 or not all(0 < w < math.inf for w in self.jeffreys):
            raise UserError(f"method.jeffreys is {self.jeffreys}; it must be two positive, finite weights")
        if not math.isfinite(self.alpha):
            raise UserError(f"method.alpha is {self.alpha}; it must be finite")
        if self.start_sigma is not None and not 0 < self.start_sigma < math.inf:
            raise UserError(f"method.start_sigma is {self.start_sigma}; it must be positive and finite, or none")
        self._refuse_what_does_nothing()

    def _refuse_what_does_nothing(self) -> None:
        """Raise UserError for a setting that was changed and has no effect beside the others."""
        matches, fixed = bool(self.sim or self.di), self.divergence == "rkl"
        for name, works, needs in (
            ("divergence", matches, "method.sim or method.di above 0"),
            ("jeffreys", self.divergence == "jeffreys", "method.divergence jeffreys"),
            ("alpha", self.sim > 0 and self.divergence != "fkl", "method.sim above 0 and a divergence other than fkl"),
            ("ratio_gradient", self.sim > 0 and not fixed, "method.sim above 0 and a divergence whose h depends on r"),
            ("huber_c", self.normaliser == "huber", "method.normaliser huber"),
            ("scale", matches, "method.sim or method.di above 0"),
            ("same_masks", matches, "method.sim or method.di above 0"),
            ("logit_limit", self.judges, "method.gan_weight above 0, or a divergence other than rkl"),
            ("plain_images", self.judges, "method.gan_weight above 0, or a divergence other than rkl"),
        ):
            value = getattr(self, name)
            if not works and value != _DEFAULTS[name]:
                raise UserError(f"method.{name} is {value}; it has no effect without {needs}")

    @property
    def judges(self) -> bool:
        """Whether a discriminator is learnt: for the ratio, or as an adversary."""
        return self.gan_weight > 0 or self.divergence != "rkl"

    def weights(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """h(r) and h(r) - r h'(r), of any shape; r >= 0."""
        if self.divergence == "jeffreys":
            forward, reverse = self.jeffreys
            return forward * ratio + reverse, torch.full_like(ratio, reverse)
        h, rest = WEIGHTS[self.divergence]
        return h(ratio), rest(ratio)

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser; generator and fake_score start from its weights.

        Raises UserError for another teacher, for a network without a bottleneck where there is a discriminator, and for
        one that does not take this augmentation's labels.
        """
        roles = matching_parts(teacher, spec, sigma_max=self.start_sigma, dropout=True)
        check_levels(teacher, levels=self.levels, fake_levels=self.fake_levels)
        network = roles["fake_score"].module.network
        if self.judges:
            check_bottleneck(network)
        takes = getattr(getattr(network, "config", None), "augment_dim", 0)
        if self.augment.p > 0 and takes != self.augment.augment_dim:
            raise UserError(
                f"method.augment has labels of {self.augment.augment_dim} numbers; the teacher's network takes {takes}"
            )
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the fake network with its discriminator, then one of the generator, once it is its turn."""
        yield self.fake_update(parts, batch, noise)
        if clock.images >= self.fake_only_images:
            yield self.generator_update(parts, batch, noise, weighted=clock.images >= self.plain_images)

    def fake_update(self, parts: Any, batch: Batch, noise: StepNoise) -> Update:
        """Denoise generated images, and tell them from the batch's."""
        with torch.no_grad(), in_mode(False, parts.generator):
            generated = self._augmented(_draw(parts, batch, noise), noise)
        if not self.judges:
            loss, sigma = fake_score_loss(parts, generated, self.fake_levels, noise)
            return Update("fake_score", loss, at=sigma)
        fake, real = parts.fake_score, self._augmented(Generated(batch.images, batch.cond), noise)
        sigma = self.fake_levels.sample(noise, batch.images[:, 0, 0, 0])
        disturbance = column(sigma) * noise.normal(batch.images)
        denoised, fake_logits = answer_and_judge(fake, generated.images + disturbance, sigma, generated.cond)
        real_logits = judge(fake, real.images + disturbance, sigma, real.cond)
        denoising = (denoised - generated.images).square().flatten(1).mean(1)
        told_apart = (F.softplus(-real_logits).mean(1) + F.softplus(fake_logits).mean(1)) / 2
        # Not image by image: lambda reaches 10^4, and the few images that have it would be all that is learnt from.
        each = told_apart.mean() / generated.images[0].numel()
        loss = loss_weight(sigma, fake.sigma_data) * (denoising + each)
        numbers = {"real_logit": real_logits.mean(1), "fake_logit": fake_logits.mean(1), "discriminator": told_apart}
        return Update("fake_score", loss, parts=numbers, at=sigma)

    def generator_update(self, parts: Any, batch: Batch, noise: StepNoise, *, weighted: bool = True) -> Update:
        """The divergence and the adversary's opinion; weighted: False = h is 1 and there is no adversary."""
        images, cond = _draw(parts, batch, noise)
        sigma = self.levels.sample(noise, images[:, 0, 0, 0])
        noisy = images + column(sigma) * noise.normal(images)
        judged = self.judges and weighted
        with in_mode(self.same_masks, parts.fake_score, *([parts.teacher] if self.same_masks else [])):
            with _gradients(self.sim > 0), noise.same_dropout() if self.same_masks else nullcontext():
                real = parts.teacher(noisy, sigma, cond)
            if judged:
                with _gradients(self.sim > 0 or self.gan_weight > 0):
                    fake, logits = answer_and_judge(parts.fake_score, noisy, sigma, cond)
            else:
                with _gradients(self.sim > 0):
                    fake, logits = parts.fake_score(noisy, sigma, cond), None
        h = rest = torch.ones_like(sigma)
        numbers = {"diversity": diversity(images)}
        if logits is not None:
            ratio = self._ratio(logits, noisy, (fake - real).detach() / column(sigma) ** 2)
            h, rest = self.weights(ratio)
            numbers |= {"ratio": ratio, "h": h}
        scale = self._scale(images, real, fake, sigma)
        loss = torch.zeros_like(sigma)
        if self.sim:
            loss = loss + self.scale * self.sim * expanded(real, fake, images, h, rest, self.alpha) / scale
        if self.di:
            direction = self._direction(images, real, fake, sigma, scale)
            loss = loss + self.scale * self.di * surrogate(images, column(h.detach()) * direction)
        if self.gan_weight and logits is not None:
            fooling = F.softplus(-self._limited(logits)).mean(1)
            numbers["adversarial"] = fooling
            loss = loss + self.gan_weight * fooling.mean() / (1.0 if self.normaliser == "integral" else scale)
        return Update("generator", loss, parts=numbers, at=sigma)

    def _ratio(self, logits: Tensor, noisy: Tensor, u: Tensor) -> Tensor:
        """r [N] of logits [N, K], with -r u as its gradient in the noisy images, or with none."""
        log_ratio = self._limited(logits.detach().mean(1))
        return (ratio_along(log_ratio, noisy, u) if self.ratio_gradient else log_ratio).exp()

    def _limited(self, logits: Tensor) -> Tensor:
        return logits.clamp(-self.logit_limit, self.logit_limit)

    def _scale(self, images: Tensor, real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
        """What the expanded loss is divided by, [N], without gradient."""
        with torch.no_grad():
            if self.normaliser == "l1":
                return (images - real).abs().flatten(1).mean(1).clamp(min=1e-5)
            if self.normaliser == "huber":
                return ((real - fake).square().flatten(1).mean(1) + self.huber_c**2).sqrt()
            if self.normaliser == "integral":
                return sigma**3 / (2 * _spacing(self.levels, sigma))
            return torch.ones_like(sigma)

    def _direction(self, images: Tensor, real: Tensor, fake: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
        """u dx, in the chosen unit: as `matching_direction`, over the scale, or in the score's."""
        if self.normaliser == "l1":
            return matching_direction(real, fake, images)
        return (fake - real).detach() / column(sigma**2 if self.normaliser == "integral" else scale)

    def _augmented(self, generated: Generated, noise: Noise) -> Generated:
        if self.augment.p == 0:
            return generated
        images, parameters = self.augment(generated.images, noise)
        return Generated(images, replace(generated.cond, augment=parameters))


def expanded(real: Tensor, fake: Tensor, clean: Tensor, h: Tensor, rest: Tensor, alpha: float) -> Tensor:
    """h e.(D_fake - x) + (1 - alpha) rest |e|^2, means over C H W: [N]; the others [N, C, H, W], h and rest [N].

    With h = rest = 1 it is SiD's e.(D_real - x - alpha e).
    """
    e = real - fake
    sim = (e * (fake - clean)).flatten(1).mean(1)
    return h * sim + (1 - alpha) * rest * e.square().flatten(1).mean(1)


def ratio_along(log_ratio: Tensor, noisy: Tensor, u: Tensor) -> Tensor:
    """log r [N] whose gradient in `noisy` [N, C, H, W] is -u, which is the true one: u = s_p - s_q, detached."""
    return log_ratio - (u * (noisy - noisy.detach())).flatten(1).sum(1)


def answer_and_judge(denoiser: Any, x: Tensor, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """E[x0 | x]: [N, C, H, W], and logits [N, K]: the channel mean of the encoder's output at its K places.

    A U-Net's encoder runs once for both. A denoiser may have this function as a method of its own.
    """
    if hasattr(denoiser, "answer_and_judge"):
        answer: tuple[Tensor, Tensor] = denoiser.answer_and_judge(x, sigma, cond)
        return answer
    denoised, maps = answer_and_maps(denoiser, x, sigma, cond)
    return denoised, _logits(maps[-1])


def judge(denoiser: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """The logits of `answer_and_judge`; the decoder is not run."""
    return _logits(bottleneck(denoiser, x, sigma, cond))


def _logits(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).mean(1).flatten(1)


def _draw(parts: Any, batch: Batch, noise: StepNoise) -> Generated:
    """Fresh images of the generator, of the batch's classes: real and generated images then differ in nothing else."""
    return generate(parts.generator, noise.normal(batch.images), Condition(label=batch.cond.label))


def _gradients(on: bool) -> AbstractContextManager[Any]:
    return nullcontext() if on else torch.no_grad()


def _spacing(levels: KarrasLevels | LogNormal, sigma: Tensor) -> Tensor:
    """One over the density of a drawn sigma."""
    return levels.spacing(sigma) if isinstance(levels, KarrasLevels) else 1 / levels.density(sigma)


@contextmanager
def in_mode(training: bool, *modules: nn.Module) -> Iterator[None]:
    """Run the body with modules in training or in eval mode."""
    before = [module.training for module in modules]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.train(mode)


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(UniInstruct)}
PUBLISHED = UniInstruct(gan_weight=0.01, fake_only_images=100_000, plain_images=200_000)
"""What the paper's own runs share."""
WHOLE: Mapping[str, Any] = {"alpha": 0.5, "ratio_gradient": True}
"""What makes the update the whole gradient, where h depends on r and h - r h' is not 0."""
AS_DMD = UniInstruct(
    sim=0.0, di=1.0, scale=1.0, start_sigma=None, levels=KarrasLevels(first=20, last=980), fake_levels=KarrasLevels()
)
NAMED: Mapping[str, UniInstruct] = {
    "diff_instruct": UniInstruct(
        sim=0.0, di=1.0, scale=1.0, normaliser="none", start_sigma=1.0, levels=LogNormal(), same_masks=True
    ),
    "dmd": AS_DMD,
    "sim": UniInstruct(normaliser="huber"),
    "sid": UniInstruct(alpha=1.2),
    "sida": PUBLISHED,
    "uni_rkl": PUBLISHED,
    "uni_fkl": replace(PUBLISHED, divergence="fkl"),
    "uni_jkl": replace(PUBLISHED, divergence="jeffreys", jeffreys=(0.4, 0.6)),
    "uni_chi2": replace(PUBLISHED, divergence="chi2", **WHOLE),
    "uni_js": replace(PUBLISHED, divergence="js", **WHOLE),
}
"""The methods of the paper's table 1 that need a teacher and no more, and its own, with their published settings."""
