"""Consistency models that know which noise belongs to an image, and of the linear path as well as of EDM's.

Source   Silvestri et al. 2025 (VCT, arXiv 2502.18197) and its program, sony/vct (`kernels/`, `models/cm_base.py`).
Kernels  x_t = a(t) x0 + t n. "ve": a = 1, EDM's. "li": a = 1 - t / T, the straight path, T = time_max. Divided by a
         both are x0 + sigma n with sigma = t / a, in which all of this library speaks; there "li" is another clock and,
         with the boundary in the scalings, another f:

                  c_skip                                  c_out                              c_in
         ve       sd^2 / ((t - m)^2 + sd^2)               (t - m) sd / sqrt(t^2 + sd^2)      1 / sqrt(sigma^2 + sd^2)
         li       a sd^2 b / ((t - m)^2 + sd^2 b^2)       (t - m) sd / sqrt(t^2 + sd^2 a^2)  1 / sqrt(sigma^2 + sd^2)

         with m = time_min and b = 1 - (t - m) / (T - m). Without the boundary (ECM) both are EDM's own. The network is
         told ln(t) / 4.
Encoder  mean and deviation of the noise of an image, from a network of 2 C channels that is shown x0 / sd at the noise
         label 0; deviation softplus.
Departs  The linear path ends at T (1 - 1e-5), where the image is 1e-5 of the point, not at T: sigma is finite there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond, NoiseLabel, Scalings
from imagewright.types import UNCONDITIONAL, Condition, UserError

Kernel = Literal["ve", "li"]
MARGIN = 1e-5
"""How near to its end, as a share of it, the linear path is followed."""


class CoupledConsistencyModel(ConsistencyModel):
    """f(x, sigma) of a kernel, with an encoder of the noise that belongs to an image, or without one.

    time_min, time_max: ends of the path in its own time. boundary: whether f(x, time_min) = x is in the scalings;
    otherwise f(x, 0) = x is.
    """

    settings = ("time_min", "time_max", "sigma_data", "noise_label", "kernel", "boundary")
    begins_afresh: ClassVar[tuple[str, ...]] = ("encoder.",)
    """What the weights that a run starts from may lack."""

    def __init__(
        self,
        network: nn.Module,
        time_min: float = 0.002,
        time_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
        kernel: Kernel = "ve",
        boundary: bool = True,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__(network, time_min, time_max, sigma_data, noise_label)
        if kernel not in get_args(Kernel):
            raise UserError(f"kernel is {kernel!r}; allowed: {', '.join(get_args(Kernel))}")
        self.time_min, self.time_max = self.sigma_min, self.sigma_max
        self.kernel, self.boundary, self.encoder = kernel, bool(boundary), encoder
        ends = torch.tensor([self.time_min, self.latest], dtype=torch.float64, device="cpu")
        self.sigma_min, self.sigma_max = self.sigma(ends).tolist()

    @property
    def latest(self) -> float:
        """The last time of the path."""
        return self.time_max if self.kernel == "ve" else self.time_max * (1 - MARGIN)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of a time of the path in [0, latest]."""
        return t if self.kernel == "ve" else t / (1 - t / self.time_max)

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return sigma if self.kernel == "ve" else sigma / (1 + sigma / self.time_max)

    def scalings(self, sigma: Tensor) -> Scalings:
        told = self.c_noise(self.time(sigma))
        if not self.boundary:
            return EDMPrecond.scalings(self, sigma)._replace(c_noise=told)
        if self.kernel == "ve":
            return super().scalings(sigma)
        t, a, variance = self.time(sigma), 1 / (1 + sigma / self.time_max), self.sigma_data**2
        above = t - self.time_min
        b = 1 - above / (self.time_max - self.time_min)
        return Scalings(
            c_skip=a * variance * b / (above**2 + variance * b**2),
            c_out=above * self.sigma_data / (t**2 + variance * a**2).sqrt(),
            c_in=1 / (sigma**2 + variance).sqrt(),
            c_noise=told,
        )

    def encode(self, images: Tensor, cond: Condition = UNCONDITIONAL) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the noise of images [N, C, H, W], float32 or wider."""
        assert self.encoder is not None, "this model was trained without an encoder"
        label = images.new_zeros(len(images))
        dtype = next(self.encoder.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        found: Tensor = self.encoder((images / self.sigma_data).to(dtype), label.to(wide), cond).to(wide)
        mean, deviation = found.chunk(2, dim=1)
        return mean, softplus(deviation)

    def noise_of(self, images: Tensor, fresh: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.KnowsNoise`; without an encoder the fresh noise itself."""
        if self.encoder is None:
            return fresh
        mean, deviation = self.encode(images, cond)
        return (mean + deviation * fresh).to(fresh.dtype)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        encoder: Any = self.encoder
        return described if encoder is None else {**described, "encoder": encoder.describe()}
