"""Flow maps that know one destination, the clean image: the base of consistency models and one-step generators."""

from __future__ import annotations

import torch
from torch import Tensor

from imagewright.errors import an
from imagewright.models.preconditioning import EDMPrecond
from imagewright.types import UNCONDITIONAL, Condition


class StartMap(EDMPrecond):
    """EDM's wrapper as a `FlowMap` that answers for sigma_to = 0 alone."""

    kind = "flow_map"

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0 = none."""
        return int(getattr(getattr(self.network, "config", None), "label_dim", 0))

    def start(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """The image [N, C, H, W] that x, at noise level sigma [N], is sent to."""
        return super().forward(x, sigma, cond)

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`; raises ValueError for a sigma_to other than 0 (on the CPU: no device is waited for)."""
        to = torch.as_tensor(sigma_to)
        if to.device.type == "cpu" and torch.any(to != 0):
            raise ValueError(f"{an(type(self).__name__)} only goes to sigma_to = 0")
        return self.start(x, sigma, cond)
