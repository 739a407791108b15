"""RAdam (Liu et al. 2020, arXiv 1908.03265) by Adam's fused kernel, which minds a flag on the device.

Once the second moment's variance can be told (from the 6th step on with a decay of 0.999), a step of RAdam is one of
Adam with another rate and eps. Before that torch's own runs, which minds no flag.
"""

from __future__ import annotations

import math
from typing import Any

import torch

WITHOUT_FLAG = 5.0
"""Length of the approximated moving average up to which the second moment is left out."""


class FusedRAdam(torch.optim.RAdam):
    """`torch.optim.RAdam`, with its state, up to rounding.

    found_inf: a flag, float32 []; where it is 1 nothing moves.
    """

    found_inf: torch.Tensor | None = None

    @property
    def minds(self) -> bool:
        """Whether the next step minds the flag."""
        return all(self._rectified(group) is not None for group in self._groups())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all groups."""
        if closure is not None or not self.minds:
            super().step(closure)
            return
        for group in self._groups():
            rates = self._rectified(group)
            assert rates is not None
            rect, unbiased, count = rates
            given = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in given]
            count_there = torch.full((), count, dtype=torch.float32, device=given[0].device)
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                given,
                [p.grad for p in given],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [count_there] * len(given),
                lr=group["lr"] * rect,
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"] / unbiased,
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=self.found_inf,
            )
            for state in states:
                state["step"].fill_(count)

    def _groups(self) -> list[dict[str, Any]]:
        """Those of which anything has a gradient."""
        return [g for g in self.param_groups if any(p.grad is not None for p in g["params"])]

    def _rectified(self, group: dict[str, Any]) -> tuple[float, float, float] | None:
        """Of the next step: what its rate is multiplied by, sqrt(1 - beta2^t), and t; None where it needs torch's own.

        That is also where parameters have been stepped differently often.
        """
        counts = {
            float(self.state[p]["step"]) if p in self.state else 0.0 for p in group["params"] if p.grad is not None
        }
        if len(counts) != 1:
            return None
        count, beta2 = counts.pop() + 1, group["betas"][1]
        most = 2 / (1 - beta2) - 1
        length = most - 2 * count * beta2**count / (1 - beta2**count)
        if length <= WITHOUT_FLAG:
            return None
        rect = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
        return rect, math.sqrt(1 - beta2**count), count
