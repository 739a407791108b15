"""A flow map from pure noise to several points of its trajectory at once: one call, T times side by side.

Source   Zheng et al. 2023 (DSNO, arXiv 2211.13449): a denoiser's network is shown the noise alone, T times beside each
         other, told another noise level in each, and answers with the trajectory's points there themselves, as the
         variance-preserving path has them, x_t = (x0 + sigma n) / sqrt(1 + sigma^2). `networks.temporal` ties the T.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import EDMPrecond, NoiseLabel, student_network
from imagewright.networks import UNet
from imagewright.networks.temporal import TimeLayers
from imagewright.types import UNCONDITIONAL, Condition, UserError

TOLERANCE = 1e-3
"""Of a noise level, relative, when it is looked up among those that the model knows."""


class TrajectoryOperator(EDMPrecond):
    """The points at `levels` of the trajectory that starts at sigma_max. levels: noise levels, decreasing to 0.

    modes: lowest Fourier modes over time that are mixed; 0 = none, and every point is answered for by itself.
    Raises UserError for levels out of order or range, modes below 0, and a network that is none of the U-Nets.
    """

    kind = "flow_map"
    settings = (*EDMPrecond.settings, "levels", "modes")

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
        levels: tuple[float, ...] = (0.0,),
        modes: int = 2,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, noise_label)
        self.levels, self.modes = checked_levels(levels, self.sigma_max), modes
        if not isinstance(modes, int) or modes < 0:
            raise UserError(f"modes is {modes!r}; it must be a whole number of at least 0")
        if not isinstance(network, UNet):
            raise UserError(f"the network is {an(type(network).__name__)}; layers over time go into U-Nets alone")
        self.mixing = TimeLayers(network, modes)

    @property
    def rows(self) -> int:
        """Rows of its network's batch that an image takes in a call."""
        return len(self.levels)

    def trajectory(self, latents: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """latents: standard normal [N, C, H, W]. Returns the points x_t [N, T, C, H, W], float32 or wider; one call."""
        network = cast(UNet, self.network)
        times, parameter = len(self.levels), next(network.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        told = self.c_noise(torch.tensor(self.levels, dtype=dtype, device=latents.device).clamp(min=self.sigma_min))
        rows = latents.to(parameter.dtype).repeat_interleave(times, 0)
        spread = cond.map(lambda each: each.repeat_interleave(times, 0))
        found = self.mixing.of(network, times)(rows, told.repeat(len(latents)), spread)[:, : latents.shape[1]]
        return found.to(dtype).reshape(len(latents), times, *latents.shape[1:])

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`, from sigma_max to one of the levels; UserError (a ValueError) otherwise, on the CPU."""
        levels = torch.tensor(self.levels, dtype=sigma_to.dtype, device=sigma_to.device)
        away = (sigma_to[:, None] - levels).abs() / levels.clamp(min=self.sigma_min)
        slot = away.argmin(1)
        if sigma.device.type == "cpu":
            self._require_known(sigma, sigma_to, away.amin(1))
        points = self.trajectory(x / self.sigma_max, cond)
        chosen = points[torch.arange(len(x), device=x.device), slot]
        scale = (1 + levels[slot].to(chosen) ** 2).sqrt()[:, None, None, None]
        return (scale * chosen).to(x.dtype)

    def _require_known(self, sigma: Tensor, sigma_to: Tensor, away: Tensor) -> None:
        elsewhere = (sigma / self.sigma_max - 1).abs() > TOLERANCE
        wrong = elsewhere | (away > TOLERANCE)
        if wrong.any():
            start, end = (float(s[wrong.nonzero()[0, 0]]) for s in (sigma, sigma_to))
            known = ", ".join(f"{level:.4g}" for level in self.levels)
            raise UserError(
                f"a jump from {start:g} to {end:g}; this model goes from {self.sigma_max:g} to {known} only"
            )

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, levels: tuple[float, ...], modes: int, dropout: float = 0.0) -> Self:
        """A model that starts from a denoiser's weights, noise range and label."""
        network, d = student_network(denoiser, dropout), denoiser
        return cls(network, d.sigma_min, d.sigma_max, d.sigma_data, d.noise_label, levels, modes).train()


def checked_levels(levels: Any, sigma_max: float) -> tuple[float, ...]:
    """Noise levels as a tuple. Raises UserError unless they decrease from below sigma_max to 0."""
    found = tuple(float(level) for level in levels)
    if not found or found[-1] != 0 or found[0] >= sigma_max or list(found) != sorted(set(found), reverse=True):
        raise UserError(f"levels is {found}; they must decrease from below sigma_max ({sigma_max:g}) to 0")
    return found
