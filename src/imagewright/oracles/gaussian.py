"""A Gaussian with denoiser, score, density and flow in closed form.

A `Denoiser` on tensors [N, ...] of any shape. Noised by x = x0 + sigma eps it stays a Gaussian, with sigma^2 added to
every variance; hence the formulas. Tweedie: denoiser = x + sigma^2 score. Arithmetic is in the dtype of x; the
parameters follow its dtype and device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagewright.types import UNCONDITIONAL, Condition, Noise, UserError


class GaussianOracle:
    """N(mean, std^2) or N(mean, cov) on images.

    mean: [...], the shape of one image, D numbers in all. std: a number or a tensor that broadcasts to mean's
    shape, >= 0. cov: [D, D] over the flattened image, symmetric, positive semidefinite. Exactly one of std
    and cov. Raises UserError otherwise.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __init__(self, mean: Tensor, *, std: float | Tensor | None = None, cov: Tensor | None = None) -> None:
        self.mean = mean
        self.variances: Tensor  # [D], along the columns of `basis`
        self.basis: Tensor | None = None  # [D, D], columns are the principal axes; None is the identity
        if (std is None) == (cov is None):
            raise UserError("GaussianOracle needs exactly one of std and cov")
        if cov is not None:
            if cov.shape != (mean.numel(), mean.numel()) or not torch.allclose(cov, cov.mT):
                raise UserError(
                    f"GaussianOracle.cov must be symmetric {[mean.numel()] * 2}, got shape {list(cov.shape)}"
                )
            variances, self.basis = torch.linalg.eigh(cov)
            if variances.min() < -1e-6 * variances.max():
                raise UserError(f"GaussianOracle.cov must be positive semidefinite, got eigenvalue {variances.min():g}")
            self.variances = variances.clamp(min=0)
        else:
            spread = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
            if not (spread >= 0).all():
                raise UserError(f"GaussianOracle.std must be >= 0, got {spread.min():g}")
            self.variances = (spread.expand(mean.shape) ** 2).flatten()

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """E[x0 | x], exactly. x: [N, ...]; sigma: [N], > 0 (>= 0 where every variance is positive)."""
        variances = self._variances(x)
        kept = variances / (variances + column(sigma, x) ** 2)
        return self.mean.to(x) + self._scaled(x - self.mean.to(x), kept)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x; sigma), [N, ...]."""
        return self._scaled(x - self.mean.to(x), -1 / (self._variances(x) + column(sigma, x) ** 2))

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x; sigma) of the noised distribution, natural, [N]; sigma = 0 for the data's own."""
        variances = self._variances(x) + column(sigma, x) ** 2
        coordinates = self._to_axes((x - self.mean.to(x)).flatten(1))
        return -0.5 * (coordinates**2 / variances + torch.log(2 * math.pi * variances)).sum(1)

    def sample(self, n: int, noise: Noise) -> Tensor:
        """n images of the data distribution, [n, ...], dtype and device of the mean."""
        like = self.mean.new_empty((n, *self.mean.shape))
        return self.mean + self._scaled(noise.normal(like), torch.sqrt(self._variances(like)))

    def flow_map(self) -> GaussianFlowMap:
        """The exact jump along the probability flow, a `FlowMap`."""
        return GaussianFlowMap(self)

    def _variances(self, x: Tensor) -> Tensor:
        return self.variances.to(x)[None]

    def _to_axes(self, flat: Tensor) -> Tensor:
        return flat if self.basis is None else flat @ self.basis.to(flat)

    def _scaled(self, offset: Tensor, factors: Tensor) -> Tensor:
        """basis diag(factors) basis^T offset; offset: [N, ...], factors: [N or 1, D]."""
        flat = factors * self._to_axes(offset.flatten(1))
        back = flat if self.basis is None else flat @ self.basis.to(offset).mT
        return back.reshape(offset.shape)


class GaussianFlowMap:
    """A `GaussianOracle`'s probability flow: each principal coordinate scales with its standard deviation.

    Along each axis x(sigma_to) - mean = sqrt((sigma_to^2 + var) / (sigma^2 + var)) (x(sigma) - mean).
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __init__(self, oracle: GaussianOracle) -> None:
        self.oracle = oracle

    def __call__(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, ...]; sigma, sigma_to: [N], >= 0. Returns [N, ...]."""
        variances = self.oracle._variances(x)
        ratio = (column(sigma_to, x) ** 2 + variances) / (column(sigma, x) ** 2 + variances)
        mean = self.oracle.mean.to(x)
        return mean + self.oracle._scaled(x - mean, torch.sqrt(ratio))


def column(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [N], or one number for all, as [N, 1] (or [1, 1]) in x's dtype."""
    return sigma.to(x).reshape(-1, 1)
