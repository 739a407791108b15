"""Zero-shot editing with a flow map (Song et al. 2023, arXiv 2303.01469, algorithm 4 and appendix D).

Source     For an orthogonal A and a mask Omega of what is free: y <- A^-1[(A y)(1 - Omega)], x = f(y + t_1 z, t_1),
           then x <- A^-1[(A y)(1 - Omega) + (A x) Omega], and for every further level t_n once more from
           x + sqrt(t_n^2 - sigma_min^2) z. Only P = A^-1 (1 - Omega) A matters, the orthogonal projection onto what is
           known, and the replacement is x + P (y - x). Each task is one P:
             inpainting        A = 1, Omega the pixels to fill: P keeps the others
             colourisation     A's first axis is the luma direction (0.299, 0.587, 0.114) / norm: P keeps that share
             super-resolution  A's first axis of each block is its mean: P is the block mean, repeated
             strokes           Omega = 1, P = 0; the loop starts from the drawing at a level below the highest (SDEdit)
           Denoising is one jump from the picture's own level; interpolation jumps from between two noises, on the arc
           through both.
Departs    The last answer has its known part put back as every other has; nothing is noised after it.
Checked    P against A and Omega; known parts come out exactly; what an exact flow map does to Gaussian data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from imagewright.paths.grids import check_decreasing
from imagewright.paths.schedules import karras_sigmas
from imagewright.samplers.consistency import renoised
from imagewright.samplers.grid import per_row
from imagewright.types import UNCONDITIONAL, Condition, FlowMap, Noise, OnStep, UserError

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in a grey level (ITU-R BT.601)."""


class Known(Protocol):
    """An orthogonal projection of images [N, C, H, W] onto what an edit has to keep."""

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """Keeps pixels; keep: [H, W], true where the picture is known."""

    keep: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return images * self.keep.to(images)


@dataclass(frozen=True)
class Luma:
    """Keeps the grey level of each pixel of RGB images."""

    def __call__(self, images: Tensor) -> Tensor:
        weights = images.new_tensor(LUMA)[:, None, None]
        kept: Tensor = weights / weights.square().sum() * (weights * images).sum(1, keepdim=True)
        return kept


@dataclass(frozen=True)
class BlockMeans:
    """Keeps the mean of every block of factor x factor pixels; factor divides the image's sides."""

    factor: int

    def __call__(self, images: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(images, self.factor)
        return means.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)


@dataclass(frozen=True)
class Nothing:
    """Keeps nothing: the picture is where the loop starts, and no more."""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros_like(images)


@dataclass(frozen=True, kw_only=True)
class Editing:
    """Algorithm 4. sigmas: all levels, the first included, decreasing. clip: keep every answer of f in [-1, 1]."""

    sigmas: tuple[float, ...]
    clip: bool = True

    def __post_init__(self) -> None:
        if not self.sigmas:
            raise UserError("sigmas is (); editing needs at least one noise level")
        check_decreasing("sigmas", self.sigmas)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return len(self.sigmas)

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        picture: Tensor,
        known: Known,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """picture: [N, C, H, W] in [-1, 1], of which `known` is kept; returns the edited images, its dtype.

        Where nothing is kept the loop starts from the whole picture. Raises UserError for levels that the map does not
        know.
        """
        high, low = flow_map.sigma_max, flow_map.sigma_min
        if not low < self.sigmas[-1] <= self.sigmas[0] <= high:
            raise UserError(f"sigmas is {self.sigmas}; every level must lie between {low} and {high}")
        kept = known(picture)
        x = picture if isinstance(known, Nothing) else kept
        for step, sigma in enumerate(self.sigmas):
            # The first level is added to a picture without noise, the others to points of sigma_min.
            noisy = x + sigma * noise.normal(x) if step == 0 else renoised(flow_map, x, sigma, noise, cond)
            start = flow_map(noisy, per_row(noisy, sigma), noisy.new_zeros(len(noisy)), cond)
            start = start.clamp(-1, 1) if self.clip else start
            x = start + kept - known(start)
            if on_step is not None:
                on_step(noisy, x, sigma)
        return x


def editing_levels(flow_map: FlowMap, steps: int, highest: float | None = None, rho: float = 7.0) -> tuple[float, ...]:
    """Levels for `Editing`: EDM's grid of so many steps from the highest (default the map's own) towards sigma_min.

    Raises UserError for no steps, or a level the map does not know.
    """
    top = flow_map.sigma_max if highest is None else highest
    if steps < 1:
        raise UserError(f"steps is {steps}; editing needs at least 1")
    if not flow_map.sigma_min < top <= flow_map.sigma_max:
        raise UserError(
            f"the noise level to start from is {top}; it must lie between {flow_map.sigma_min} (excluded) and "
            f"{flow_map.sigma_max}"
        )
    return (top, *karras_sigmas(steps + 1, flow_map.sigma_min, top, rho).tolist()[1:steps])


@torch.no_grad()
def denoised(
    flow_map: FlowMap, noisy: Tensor, sigma: float, cond: Condition = UNCONDITIONAL, *, clip: bool = True
) -> Tensor:
    """The start of the trajectory through noisy = x0 + sigma eps, [N, C, H, W]: one evaluation.

    Raises UserError for a level the map does not know.
    """
    if not flow_map.sigma_min <= sigma <= flow_map.sigma_max:
        raise UserError(
            f"the picture's noise level is {sigma}; the model knows {flow_map.sigma_min} to {flow_map.sigma_max}"
        )
    start = flow_map(noisy, per_row(noisy, sigma), noisy.new_zeros(len(noisy)), cond)
    return start.clamp(-1, 1) if clip else start


def between(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Points on the arc from one noise to another: [S, C, H, W].

    first, second: standard normal [C, H, W]. shares: [S] in [0, 1]; 0 is the first, 1 the second. The points have a
    normal's length for every share, as those on the straight line between do not. Raises ValueError where the two
    are opposite, or one is zero.
    """
    cosine = torch.dot(first.flatten(), second.flatten()) / (first.norm() * second.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    a = shares.to(first)[:, None, None, None]
    if not bool(torch.isfinite(angle)) or float(torch.pi - angle) < 1e-3:
        raise ValueError("there is no one arc between opposite noises, nor from zero")
    if float(angle) < 1e-3:  # where the sines cancel; the arc is straight
        return (1 - a) * first + a * second
    return (torch.sin((1 - a) * angle) * first + torch.sin(a * angle) * second) / torch.sin(angle)
