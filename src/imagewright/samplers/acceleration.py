"""Steps of constant acceleration: the initial velocity is asked for once, the acceleration at every step.

Source     Park et al. 2024 (arXiv 2411.00322), algorithms 2 and 3; `sample` and `inversion` of github.com/mlvlab/CAF.
Rule       x <- x + v0 / N + (s + 1 / 2N) a(x, s, v0) / N, s = 0, 1 / N, ...: the middle of each step makes it exact
           where a is constant. N + 1 calls. Backwards v0 is asked for at the image, and the middle is s - 1 / 2N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from imagewright.precision import wide
from imagewright.samplers.grid import check_steps, per_row
from imagewright.types import UNCONDITIONAL, Condition, FlowMap, ModelKind, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class Accelerated:
    """Draw from a flow of constant acceleration."""

    model_kind: ClassVar[ModelKind] = "flow_map"

    num_steps: int = 1
    clip: bool = True
    """Keep the final image in [-1, 1]."""

    def __post_init__(self) -> None:
        check_steps(self.num_steps)

    @property
    def nfe(self) -> int:
        """Network evaluations per image: the initial velocity is one of them."""
        return self.num_steps + 1

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
        """As `types.Sampler`; returns float64. Raises UserError for another flow map."""
        x = self._through(flow_map, wide(latents), 0.0, cond, on_step)
        return x.clamp(-1, 1) if self.clip else x

    @torch.no_grad()
    def invert(
        self,
        flow_map: FlowMap,
        images: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The latents of which the flow makes images [N, C, H, W], float64; as many calls."""
        return self._through(flow_map, wide(images), 1.0, cond, None)

    def _through(self, model: Any, x: Tensor, start: float, cond: Condition, on_step: OnStep | None) -> Tensor:
        if not hasattr(model, "initial"):
            raise UserError("sampler accelerated draws from a flow of constant acceleration; this flow map is none")
        v0, n = model.initial(x, per_row(x, start), cond), self.num_steps
        step = (1 if start == 0 else -1) / n
        for i in range(n):
            s = start + i * step
            a = model.acceleration(x, per_row(x, s), v0, cond)
            if on_step is not None:
                estimate = x + (1 - s) * v0 + (1 + s) / 2 * (1 - s) * a
            x = x + step * v0 + (s + step / 2) * step * a
            if on_step is not None:
                left = 1 - (s + step)
                on_step(x, estimate, max(left, 0.0))
        return x
