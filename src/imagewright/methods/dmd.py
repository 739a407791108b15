"""Distribution matching distillation, DMD (Yin et al. 2024, arXiv 2311.18828), algorithm 1.

Networks   generator (trained, the product; always called at sigma_max), teacher (frozen: D_real), fake_score (trained
           on the generator's images: D_fake). Both trained ones start from the teacher's weights, without its dropout.
Time       the paper's t is an index of EDM's grid of 1000 levels (rho = 7); ours is sigma. alpha = 1.
Generator  equations 7 and 8: index uniform on 20 .. 980 of the grid, one for each image; the step in x is
           (D_fake - D_real) / mean |x - D_real|, through no denoiser. Plus `regression_weight` times the distance of
           the generator's answer to the teacher's for the noise of a coupling, as many of these as fresh noise.
Fake       equation 6: denoising of the same images, without gradient in them; index uniform on 0 .. 999; EDM's weight;
           one update after each of the generator's.
Labels     uniform for fresh noise; a coupling has its own. No real image is used.
Source     The paper; the authors' program for this method is not public. Where the paper is silent, that of its
           successor decides (tianweiy/DMD2, `main/edm/edm_guidance.py`), whose step and fake score are these.
Departs    The perceptual distance is that of the shipped classifier's maps, where the data are those that it knows;
           LPIPS (VGG) with `features="lpips"`, "lpips-average" as in its successor's regression. A step that is not
           finite, where the teacher is exactly right, is 0 (there NaN alone; infinity becomes the largest number). A
           teacher guided by its own unconditional answers (text to image) is any wrapper that is again a denoiser, and
           is not built in.
Checked    the step is the derivative of the KL divergence; no step where the denoisers agree; the surrogate's gradient;
           invariance to a factor on both differences; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from imagewright.checks import require_non_negative
from imagewright.methods.distances import Distance, Features
from imagewright.methods.distribution_matching import (
    Generated,
    KarrasLevels,
    check_levels,
    diversity,
    fake_score_loss,
    fresh_noise,
    generate,
    matching_loss,
    matching_parts,
)
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, Coupling, DataSpec, Denoiser, Event, Frozen, Parts, Update, UserError


@dataclass(frozen=True, kw_only=True)
class DMD:
    """Make a one-step generator's law, noised at every level, the teacher's; hold it to the teacher's own pairs."""

    product: ClassVar[str] = "generator"

    regression_weight: float = 0.25
    """lambda_reg of the paper (0.25; 0.5 on unconditional CIFAR-10); 0 = no regression, and no couplings are needed."""
    regression: Distance = Distance(kind="perceptual")
    """What the regression compares by."""
    levels: KarrasLevels = KarrasLevels(first=20, last=980)
    """Noise levels at which the laws are compared."""
    fake_levels: KarrasLevels = KarrasLevels()
    """Those at which the fake denoiser learns."""

    def __post_init__(self) -> None:
        require_non_negative("method.regression_weight", self.regression_weight)
        if not self.regression_weight and self.regression != Distance(kind="perceptual"):
            raise UserError("method.regression is set; it has no effect while method.regression_weight is 0")

    def parts(
        self,
        *,
        teacher: Denoiser,
        spec: DataSpec,
        student: Denoiser | None = None,
        features: Features | None = None,
        couplings: bool = True,
    ) -> Parts:
        """teacher: an EDM-preconditioned denoiser; generator and fake_score start from its weights.

        student: a denoiser from which the generator starts in the teacher's place (`methods.multi_student`).
        couplings: whether the batches will bring the teacher's pairs. Raises UserError for another teacher, where the
        regression lacks pairs or, if perceptual, its features.
        """
        if self.regression_weight and not couplings:
            raise UserError(
                f"method.regression_weight is {self.regression_weight}, which needs couplings: give data.couplings "
                "(written by `imagewright couple`), or set it to 0"
            )
        roles = matching_parts(teacher, spec, student=student)
        check_levels(teacher, levels=self.levels, fake_levels=self.fake_levels)
        if self.regression_weight and self.regression.kind == "perceptual":
            if not isinstance(features, nn.Module):
                raise UserError("method.regression.kind is 'perceptual'; it needs a feature network (give `features`)")
            roles["features"] = Frozen(module=features)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the generator, then one of the fake denoiser on the same images."""
        generated = generate(parts.generator, *fresh_noise(parts.generator, batch.images, noise))
        yield self.generator_update(parts, generated, batch.coupling, noise)
        loss, sigma = fake_score_loss(parts, generated, self.fake_levels, noise)
        yield Update("fake_score", loss, at=sigma)

    def generator_update(self, parts: Any, generated: Generated, coupling: Coupling | None, noise: StepNoise) -> Update:
        """The matching loss, and the regression on the pairs."""
        loss, sigma = matching_loss(parts, generated, self.levels, noise)
        numbers = {"matching": loss, "diversity": diversity(generated.images)}
        if self.regression_weight:
            assert coupling is not None, "parts() was told that there are couplings"
            answer = generate(parts.generator, coupling.latents, coupling.cond).images
            regression = self.regression(answer, coupling.images, getattr(parts, "features", None))
            numbers["regression"] = regression
            loss = loss + self.regression_weight * regression
        return Update("generator", loss, parts=numbers, at=sigma)
