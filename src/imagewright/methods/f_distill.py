"""f-distill (Xu et al. 2025, arXiv 2502.15681): DMD2 whose step is weighed by h(r), for any f-divergence.

Networks   generator (trained, the product), teacher (frozen: D_real, and the features by which images are judged),
           fake_score (trained: D_fake), discriminator (trained: heads on the encoder's maps of the teacher, its middle
           alone on ImageNet, all resolutions on CIFAR-10; an optimiser of its own). No dropout.
Turns      every `every`-th step updates the generator, those before it fake score and discriminator, each on a batch of
           its own; images are made for the batch's classes. Levels: index uniform on 2 .. 998 of EDM's grid of 1000.
Generator  one level and noise for all: the step h (D_fake - D_real) / (mean |x - D_real| + 1e-6) in x, through no
           denoiser, and `gan_weight` softplus(-logit), through the teacher's encoder.
Weight     r = q / p = exp of the mean logit, within +-10, then within `ratio_bounds`. Divided by a mean of r over all
           images whose sigma is in the same of `bins` equal intervals of [0.002, 80] - a running mean of rate
           `ratio_decay` - then h(r) by the divergence, then h over its mean. Means are over the micro-batch and all
           processes. No gradient.
Fake       mean (D_fake(x + sigma eps) - x)^2, unweighted. Discriminator: softplus(logit) of the same noised images +
           softplus(-logit) of real ones, which have a level and noise of their own.
Source     NVlabs/FastGen, `methods/distribution_matching/f_distill.py` and `dmd2.py`, whose text decides.
Departs    Gradients of all parts are clipped, not the generator's alone. The reverse KL's h is 1 for each image (there
           a single number, which fails). One average of the weights (there three). Matrix products are not in
           TensorFloat-32. R1 regularisation (weight 0 there), guidance and several steps are the text and video models'
           and not built in.
Checked    h against the published formula in float64; weights 1 make it DMD2's step; means one; who learns when, and on
           what; resume bit for bit with a running mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_positive
from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    check_levels,
    diversity,
    generate,
    matching_parts,
    surrogate,
)
from imagewright.methods.pairs import column
from imagewright.models.judging import answer_and_maps, check_bottleneck, encoder_maps
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks.bottleneck_head import BottleneckHeads
from imagewright.noise import StepNoise
from imagewright.types import (
    Average,
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Parts,
    Trained,
    Update,
    UserError,
)

Divergence = Literal["rkl", "kl", "js", "softened_rkl", "neyman", "hellinger", "jeffreys"]
H: Mapping[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r.clamp(min=1e-8),
    "hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
}
"""r^2 f''(r) up to a factor, which the mean takes out: table 1 of the paper."""
SMALL = 1e-6
"""Added to whatever is divided by."""


@dataclass(frozen=True, kw_only=True)
class FDistill:
    """Make a generator's law the teacher's in an f-divergence at each noise level, corrected by real images."""

    product: ClassVar[str] = "generator"

    divergence: Divergence = "js"
    every: int = 5
    """Steps of which the last is the generator's."""
    gan_weight: float = 3e-3
    """Of the generator's adversarial loss (1e-3 on CIFAR-10)."""
    judged: Literal["middle", "all"] = "middle"
    """Where the discriminator looks into the teacher: at its bottleneck, or at the last maps of each resolution."""
    ratio_bounds: tuple[float, float] = (0.1, 20.0)
    bins: int = 10
    """Intervals of sigma whose ratios are normalised together; 0 = ratios are taken as they are."""
    ratio_decay: float = 0.0
    """Share of the past in a bin's mean (0.5 on ImageNet); 0 = this micro-batch's mean."""
    levels: KarrasLevels = KarrasLevels(first=2, last=998)
    """Noise levels at which the laws are compared, the fake score learns and images are judged."""

    def __post_init__(self) -> None:
        for name, kinds in (("divergence", get_args(Divergence)), ("judged", ("middle", "all"))):
            if getattr(self, name) not in kinds:
                raise UserError(f"method.{name} is {getattr(self, name)!r}; allowed: {', '.join(kinds)}")
        if self.every < 2:
            raise UserError(f"method.every is {self.every}; it must be at least 2, or the fake score never learns")
        require_positive("method.gan_weight", self.gan_weight)
        low, high = self.ratio_bounds
        if not 0 < low < high < float("inf"):
            raise UserError(f"method.ratio_bounds is {self.ratio_bounds}; it must be two rising, positive numbers")
        if self.bins < 0:
            raise UserError(f"method.bins is {self.bins}; it must be >= 0")
        if not 0 <= self.ratio_decay < 1:
            raise UserError(f"method.ratio_decay is {self.ratio_decay}; it must lie in [0, 1)")
        if self.ratio_decay and not self.bins:
            raise UserError(f"method.ratio_decay is {self.ratio_decay}; without method.bins it has no effect")

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser with a bottleneck; generator and fake_score start from its weights.

        Raises UserError for another.
        """
        roles = matching_parts(teacher, spec)
        check_levels(teacher, levels=self.levels)
        known = roles["teacher"].module
        check_bottleneck(known.network)
        roles["discriminator"] = Trained(module=self.heads(known, spec.shape), ema=False)
        if self.ratio_decay:
            roles["ratio_means"] = Average(module=RatioMeans(self.bins))
        return Parts(**roles)

    def heads(self, teacher: EDMPrecond, image_shape: tuple[int, int, int]) -> BottleneckHeads:
        """Untrained heads for a teacher's maps; image_shape: [C, H, W]."""
        like = next(teacher.parameters())
        with torch.no_grad():
            maps = self._looked_at(encoder_maps(teacher, like.new_zeros(1, *image_shape), like.new_ones(1)))
        return BottleneckHeads([(m.shape[1], min(m.shape[2:])) for m in maps]).to(like)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the generator, or one of the fake score and one of the discriminator."""
        cond = Condition(label=batch.cond.label)
        turn = (clock.step + 1) % self.every == 0
        latents = noise.normal(batch.images)
        with torch.set_grad_enabled(turn):
            generated = generate(parts.generator, latents, cond)
        sigma = self.levels.sample(noise, latents[:, 0, 0, 0])
        noisy = generated.images + column(sigma) * noise.normal(latents)
        if turn:
            yield self.generator_update(parts, generated, noisy, sigma)
            return
        error = parts.fake_score(noisy, sigma, cond) - generated.images
        yield Update("fake_score", error.square().flatten(1).mean(1), at=sigma)
        yield self.discriminator_update(parts, Generated(noisy, cond), sigma, batch, noise)

    def generator_update(self, parts: Any, generated: Generated, noisy: Tensor, sigma: Tensor) -> Update:
        """The weighed step and the adversary's opinion, both at one noised image each."""
        images, cond = generated
        real, maps = answer_and_maps(parts.teacher, noisy, sigma, cond)
        logits = parts.discriminator(self._looked_at(maps))
        with torch.no_grad():
            fake = parts.fake_score(noisy, sigma, cond)
            ratio, h = self.weigh(logits, sigma, getattr(parts, "ratio_means", None))
            scale = (images - real).abs().flatten(1).mean(1) + SMALL
            direction = (fake - real) * column(h / scale)
        matching, fooling = surrogate(images, direction), F.softplus(-logits).mean(1)
        numbers = {"matching": matching, "adversarial": fooling, "ratio": ratio, "h": h, "diversity": diversity(images)}
        return Update("generator", matching + self.gan_weight * fooling, parts=numbers, at=sigma)

    def discriminator_update(
        self, parts: Any, noised: Generated, sigma: Tensor, batch: Batch, noise: StepNoise
    ) -> Update:
        """Tell generated images, noised at sigma, from the batch's, noised apart."""
        level = self.levels.sample(noise, sigma)
        real = batch.images + column(level) * noise.normal(batch.images)
        with torch.no_grad():
            of_fake = self._looked_at(encoder_maps(parts.teacher, noised.images, sigma, noised.cond))
            of_real = self._looked_at(encoder_maps(parts.teacher, real, level, noised.cond))
        fake_logits, real_logits = parts.discriminator(of_fake), parts.discriminator(of_real)
        loss = F.softplus(fake_logits).mean(1) + F.softplus(-real_logits).mean(1)
        numbers = {"fake_logit": fake_logits.mean(1), "real_logit": real_logits.mean(1)}
        return Update("discriminator", loss, parts=numbers, at=sigma)

    @torch.no_grad()
    def weigh(self, logits: Tensor, sigma: Tensor, means: RatioMeans | None = None) -> tuple[Tensor, Tensor]:
        """The normalised ratio and the weight h, both [N], of logits [N, K] at sigma [N]; means: moved, if given."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        ratio = logits.to(wide).mean(1).clamp(-10, 10).exp().clamp(*self.ratio_bounds)
        if self.bins:
            ratio = ratio / ((means or RatioMeans(self.bins))(ratio, sigma, self.levels, self.ratio_decay) + SMALL)
        h = H[self.divergence](ratio)
        total = everywhere(torch.stack([h.sum(), torch.full_like(h.sum(), len(h))]))
        return ratio, h / (total[0] / total[1] + SMALL)

    def _looked_at(self, maps: list[Tensor]) -> list[Tensor]:
        return maps if self.judged == "all" else maps[-1:]


class RatioMeans(nn.Module):
    """Running means of the density ratio by noise level; they begin at 1."""

    means: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.ones(bins))

    def forward(self, ratio: Tensor, sigma: Tensor, levels: KarrasLevels, decay: float) -> Tensor:
        """Move the means by a micro-batch, ratio and sigma [N]; returns the mean [N] of each image's interval."""
        count = len(self.means)
        width = (levels.sigma_max - levels.sigma_min) / count
        place = ((sigma - levels.sigma_min) / width).floor().long().clamp(0, count - 1)
        sums = ratio.new_zeros(2, count)
        sums[0].index_add_(0, place, torch.ones_like(ratio))
        sums[1].index_add_(0, place, ratio)
        images, total = everywhere(sums)
        fresh = total / (images + SMALL)
        moved = torch.where(images > 0, decay * self.means.to(ratio) + (1 - decay) * fresh, self.means.to(ratio))
        self.means.copy_(moved)
        return moved[place]


def everywhere(numbers: Tensor) -> Tensor:
    """Sums over all processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
    return numbers
