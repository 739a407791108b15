"""One-step and multistep sampling of a flow map (Song et al. 2023, arXiv 2303.01469, algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imagewright.paths.grids import check_decreasing, check_stops
from imagewright.samplers.grid import per_row
from imagewright.types import UNCONDITIONAL, Condition, FlowMap, KnowsNoise, ModelKind, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class MultistepConsistency:
    """Jump to the clean image, then for every further level: noise it again up to that level, and jump.

    sigmas: the further noise levels, decreasing; () = one step. Published two-step levels: 1.382 (CD), 1.913 (CT) and
    1.526 (iCT) on ImageNet-64, 0.821 (iCT) on CIFAR-10; their recipes sample so. clip: keep every estimate in [-1, 1].
    """

    model_kind: ClassVar[ModelKind] = "flow_map"

    sigmas: tuple[float, ...] = ()
    clip: bool = True

    def __post_init__(self) -> None:
        check_decreasing("sampler.sigmas", self.sigmas)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return 1 + len(self.sigmas)

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As `types.Sampler`; returns the dtype of the latents."""
        if self.sigmas and noise is None:
            raise UserError(f"sampler.sigmas is {self.sigmas}; sampling in several steps needs a noise source")
        high, low = flow_map.sigma_max, flow_map.sigma_min
        check_stops("sampler.sigmas", self.sigmas, low, high)
        x = self._jump(flow_map, latents * high, high, cond, on_step)
        for sigma in self.sigmas:
            assert noise is not None
            x = self._jump(flow_map, renoised(flow_map, x, sigma, noise, cond), sigma, cond, on_step)
        return x

    def _jump(self, flow_map: FlowMap, x: Tensor, sigma: float, cond: Condition, on_step: OnStep | None) -> Tensor:
        start = flow_map(x, per_row(x, sigma), x.new_zeros(len(x)), cond)
        start = start.clamp(-1, 1) if self.clip else start
        if on_step is not None:
            on_step(x, start, sigma)
        return start


def renoised(flow_map: FlowMap, x: Tensor, sigma: float, noise: Noise, cond: Condition) -> Tensor:
    """Images [N, C, H, W] with noise up to a level again.

    They stand for points at sigma_min (2303.01469, algorithm 1); a map that knows which noise belongs to an image says
    it, and takes them as clean (Silvestri et al. 2025, arXiv 2502.18197).
    """
    fresh = noise.normal(x)
    if isinstance(flow_map, KnowsNoise):
        return x + sigma * flow_map.noise_of(x, fresh, cond)
    return x + math.sqrt(sigma**2 - flow_map.sigma_min**2) * fresh
