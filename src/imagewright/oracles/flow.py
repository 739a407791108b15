"""The probability flow of an oracle, integrated to high accuracy: the truth for samplers and flow maps.

dx/dsigma = -sigma score(x; sigma), by SciPy's DOP853 with step-size control, on the clock u = asinh(sigma / CLOCK),
which is even in sigma near 0 and in ln sigma far from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from imagewright.types import UNCONDITIONAL, Condition

CLOCK = 0.1


class HasScore(Protocol):
    """What a flow needs to know: grad log p(x; sigma) for sigma down to 0."""

    def score(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor: ...


@dataclass(frozen=True)
class IntegratedFlowMap:
    """A `FlowMap`: jumps along the flow of an oracle, any sigma to any sigma_to >= 0, up or down.

    tolerance: relative and absolute, of the whole state of all images together in each step. Every variance of the
    oracle has to be positive where the flow goes to 0. Answers are float64; it is slow, and exact.
    """

    oracle: HasScore
    tolerance: float = 1e-9
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __call__(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, ...]; sigma, sigma_to: [N], the same for all images of a call. Returns float64 [N, ...].

        Raises ValueError when the levels differ between images, and when the integration fails.
        """
        start, end = _common(sigma), _common(sigma_to)
        if start == end:
            return x.double()

        def slope(u: float, flat: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
            level = CLOCK * math.sinh(u)
            state = torch.from_numpy(flat).reshape(x.shape)
            score = self.oracle.score(state, torch.full((len(x),), level, dtype=torch.float64), cond)
            change: np.ndarray[Any, np.dtype[np.float64]] = (-level * CLOCK * math.cosh(u) * score).flatten().numpy()
            return change

        times = [math.asinh(level / CLOCK) for level in (start, end)]
        first = x.double().cpu().flatten().numpy()
        # The step control takes the root mean square over all numbers; divided by sqrt(N), every image is that exact.
        tolerance = self.tolerance / math.sqrt(len(x))
        solution = solve_ivp(slope, times, first, method="DOP853", rtol=max(tolerance, 3e-14), atol=tolerance)
        if not solution.success:
            raise ValueError(f"the flow from {start:g} to {end:g} was not integrated: {solution.message}")
        return torch.from_numpy(np.ascontiguousarray(solution.y[:, -1])).reshape(x.shape).to(x.device)


def _common(sigma: Tensor) -> float:
    level = float(sigma.flatten()[0])
    if not bool((sigma == level).all()):
        raise ValueError("an integrated flow moves all images of a call between the same two levels")
    return level
