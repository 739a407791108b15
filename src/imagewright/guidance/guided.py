"""Guidance: away from a worse answer to the same question (autoguidance), or from the unlabelled one (classifier-free).

    D_w(x; sigma, c) = D_guide + w (D_main - D_guide);   w = 1 is the main model alone

Autoguidance   Karras et al. 2024 (arXiv 2406.02507), eq. 3, w in its convention: the guide is smaller or less trained.
Classifier-free   Ho and Salimans 2022 (2207.12598), whose w is ours minus 1.
Interval   Kynkaanniemi et al. 2024 (2404.07724): w = 1 outside sigma_low < sigma <= sigma_high, guide unasked.
Channels   DiT's program guides the first three channels alone, and LightningDiT's (Yao et al. 2025, 2501.01423) of its
           latents' 32, too: `channels`.
SIMS       Alemohammad et al. 2024 (2408.16333): omega = w - 1, and the guide was trained on the main model's samples.
Departs    from NVlabs/edm2, generate_images.py: the sampler's state is float64 (there float32); the unlabelled answer
           may come from the main model itself (there always from a small unconditional network, given as the guide).
           EDM2's networks and its loss with a learnt variance are not in the library, so neither are the presets: main
           model, guide, their averages (`training.posthoc`) and w are the user's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.checks import require_whole
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, UserError


class Guided(nn.Module):
    """Two denoisers as one `Denoiser`. Both see the same x, sigma and condition.

    weight: w, finite. interval: (sigma_low, sigma_high) in which to guide. channels: how many of the image's, from the
    first, are guided; None = all. The noise range is where both are defined.
    Raises UserError for a guide of another noise range with nothing in common, or an empty interval.
    """

    def __init__(
        self,
        main: Denoiser,
        guide: Denoiser,
        weight: float,
        interval: tuple[float, float] = (0.0, math.inf),
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise UserError(f"guidance weight is {weight}; it must be a finite number (1 is no guidance)")
        low, high = interval
        if not 0 <= low < high:
            raise UserError(f"guidance interval is {low:g} to {high:g}; it must satisfy 0 <= low < high")
        if channels is not None:
            require_whole("guided channels", channels, 1)
        self.main, self.guide, self.weight, self.interval, self.channels = main, guide, weight, (low, high), channels
        self.sigma_min = max(main.sigma_min, guide.sigma_min)
        self.sigma_max = min(main.sigma_max, guide.sigma_max)
        if not self.sigma_min < self.sigma_max:
            raise UserError(
                f"the guide knows the noise levels {guide.sigma_min:g} to {guide.sigma_max:g}, "
                f"the model {main.sigma_min:g} to {main.sigma_max:g}; they have none in common"
            )
        if not (high > self.sigma_min and low < self.sigma_max):
            raise UserError(
                f"guidance interval is {low:g} to {high:g}; "
                f"the noise range of the models is {self.sigma_min:g} to {self.sigma_max:g}"
            )

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`; asks the guide for those images alone whose level lies in the interval."""
        answer = self.main(x, sigma, cond)
        inside = self._inside(sigma)
        if self.weight == 1 or not bool(inside.any()):
            return answer
        if bool(inside.all()):
            return self._away(self.guide(x, sigma, cond), answer)
        guided = answer.clone()
        guided[inside] = self._away(self.guide(x[inside], sigma[inside], cond[inside]), answer[inside])
        return guided

    def _away(self, guide: Tensor, answer: Tensor) -> Tensor:
        guided = torch.lerp(guide, answer, self.weight)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], answer[:, self.channels :]], 1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The main model's."""
        return self.main.round_sigma(sigma)

    def evaluations(self, sigma: float) -> int:
        """Network evaluations of one call at this level."""
        asked = self.weight != 1 and bool(self._inside(torch.tensor(sigma)))
        return evaluations(self.main, sigma) + (evaluations(self.guide, sigma) if asked else 0)

    def _inside(self, sigma: Tensor) -> Tensor:
        return (sigma > self.interval[0]) & (sigma <= self.interval[1])


class Untold(nn.Module):
    """A denoiser asked without a part of its condition, such as "label"."""

    def __init__(self, denoiser: Denoiser, part: str) -> None:
        super().__init__()
        self.denoiser, self.part = denoiser, part
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`; that part is not passed on."""
        return self.denoiser(x, sigma, replace(cond, **{self.part: None}))

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The denoiser's."""
        return self.denoiser.round_sigma(sigma)


class Unlabelled(Untold):
    """A conditional denoiser asked without its label: the guide of classifier-free guidance."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, "label")


def classifier_free(
    denoiser: Denoiser,
    weight: float,
    interval: tuple[float, float] = (0.0, math.inf),
    channels: int | None = None,
) -> Guided:
    """Guide a conditional model by itself without the label; it has to be trained with `network.label_dropout` > 0."""
    return Guided(denoiser, Unlabelled(denoiser), weight, interval, channels)


def latent_guidance(
    denoiser: Denoiser,
    weight: float,
    interval: tuple[float, float] = (0.0, math.inf),
    channels: int | None = None,
) -> Guided:
    """Guide a model with discrete latents by itself without them (DisCo-Diff, 2407.03300); the paper's s is w - 1."""
    return Guided(denoiser, Untold(denoiser, "latents"), weight, interval, channels)


def guided_by(main: Denoiser, guide: Denoiser, x: Tensor, sigma: Tensor, cond: Condition, weight: Tensor) -> Tensor:
    """D_w of two denoisers at a strength of its own for each image, [N]; what a guided student learns. Two calls."""
    answer = main(x, sigma, cond)
    return torch.lerp(guide(x, sigma, cond), answer, weight[:, None, None, None].to(answer))


def knows_no_label(model: object) -> bool:
    """Whether a model's network was shown images without their class, so that it can guide by its unlabelled answer."""
    config = getattr(getattr(model, "network", None), "config", None)
    return bool(getattr(config, "label_dim", 0) and getattr(config, "label_dropout", 0))


def sims(base: Denoiser, auxiliary: Denoiser, omega: float) -> Guided:
    """D_base + omega (D_base - D_auxiliary): omega = 0 is the base model, -1 the auxiliary, trained on its samples."""
    return Guided(base, auxiliary, 1 + omega)


def evaluations(model: Any, sigma: float) -> int:
    """Network evaluations of one call of a model at a noise level: 1, or what a wrapper says."""
    count = getattr(model, "evaluations", None)
    return int(count(sigma)) if count is not None else 1
