"""A learned weight of the loss by noise level: v(t) of exp(v) * loss - v, at whose best all levels count alike.

Source   Kendall et al. 2018 (1705.07115) for the loss; Karras et al. 2024 (EDM2, 2312.02696), appendix B.2, and Lu and
         Song 2024 (sCM, 2410.11081), section 4.2, for its dependence on the noise level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeWeight(nn.Module):
    """v(t), 0 everywhere until it is trained: a method that knows the best weight adds it. forward: [N] -> [N].

    A linear layer on cosines and sines of the argument at `frequencies` speeds from 1 / 8 upwards by factors of two.
    """

    speeds: Tensor

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("speeds", 2.0 ** torch.arange(frequencies) / 8, persistent=False)
        self.linear = nn.Linear(2 * frequencies + 1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.speeds.to(t.dtype) * math.pi
        weight: Tensor = self.linear(
            torch.cat([t[:, None], angles.cos(), angles.sin()], 1).to(self.linear.weight.dtype)
        )
        return weight[:, 0]
