"""A Gaussian and a mixture of isotropic Gaussians with denoiser, score, density and flow in closed form.

Both are `Denoiser`s on tensors [N, ...] of any shape. Noised by x = x0 + sigma eps they stay of their own
kind, with sigma^2 added to every variance; hence the formulas. Tweedie: denoiser = x + sigma^2 score.
Arithmetic is in the dtype of x; the parameters follow its dtype and device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagewright.paths.gaussian import per_image
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
        kept = variances / (variances + _column(sigma, x) ** 2)
        return self.mean.to(x) + self._scaled(x - self.mean.to(x), kept)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x; sigma), [N, ...]."""
        return self._scaled(x - self.mean.to(x), -1 / (self._variances(x) + _column(sigma, x) ** 2))

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x; sigma) of the noised distribution, natural, [N]; sigma = 0 for the data's own."""
        variances = self._variances(x) + _column(sigma, x) ** 2
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
        ratio = (_column(sigma_to, x) ** 2 + variances) / (_column(sigma, x) ** 2 + variances)
        mean = self.oracle.mean.to(x)
        return mean + self.oracle._scaled(x - mean, torch.sqrt(ratio))


class GaussianMixture:
    """sum_k weights_k N(means_k, stds_k^2 I), and optionally a class for each component.

    means: [K, ...]. stds: a number or [K], >= 0 (0: a finite set of images). weights: [K], > 0, normalised
    here; None: equal. classes: int64 [K], >= 0; with them a condition's label restricts the mixture to its
    class (-1 does not), so that guidance has a truth too; without them conditions are ignored. Raises
    UserError on parameters outside their ranges, ValueError on a label that no component has.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __init__(
        self,
        means: Tensor,
        stds: float | Tensor,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        count = len(means)
        self.means = means
        self.stds = torch.as_tensor(stds, dtype=means.dtype, device=means.device).expand(count)
        self.weights = means.new_full((count,), 1 / count) if weights is None else weights / weights.sum()
        self.classes = classes
        for name, value in (("weights", self.weights), ("classes", classes)):
            if value is not None and value.shape != (count,):
                raise UserError(f"GaussianMixture.{name} must have shape [{count}], got {list(value.shape)}")
        if not (self.stds >= 0).all():
            raise UserError(f"GaussianMixture.stds must be >= 0, got {self.stds.min():g}")
        if not (self.weights > 0).all():
            raise UserError("GaussianMixture.weights must all be positive")

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """E[x0 | x], exactly; of the label's class where one is given. x: [N, ...]; sigma: [N], > 0."""
        variances, sigma2 = self.stds.to(x)[None] ** 2, _column(sigma, x) ** 2  # [1, K], [N, 1]
        share = self.responsibilities(x, sigma, cond)
        from_x = (share * variances / (variances + sigma2)).sum(1)  # [N]
        from_means = (share * sigma2 / (variances + sigma2)) @ self.means.to(x).flatten(1)
        return per_image(from_x, x) * x + from_means.reshape(x.shape)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def score(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """grad log p(x; sigma), [N, ...]."""
        pull = self.responsibilities(x, sigma, cond) / (self.stds.to(x)[None] ** 2 + _column(sigma, x) ** 2)
        return (pull @ self.means.to(x).flatten(1)).reshape(x.shape) - per_image(pull.sum(1), x) * x

    def log_density(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """log p(x; sigma) of the noised mixture, natural, [N]; sigma = 0 for the data's own."""
        return torch.logsumexp(self._log_joint(x, sigma, cond), dim=1)

    def responsibilities(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """P(component | x), [N, K]."""
        return torch.softmax(self._log_joint(x, sigma, cond), dim=1)

    def sample(self, n: int, noise: Noise, cond: Condition = UNCONDITIONAL) -> Tensor:
        """n images of the data (each of its label's class), [n, ...], dtype and device of the means."""
        like = self.means.new_empty((n, *self.means.shape[1:]))
        below = self._log_weights(like, cond).exp().cumsum(1)  # [n, K]
        uniform = noise.uniform(like.new_empty(n, 1)) * below[:, -1:]
        k = (uniform >= below).sum(1).clamp(max=len(self.means) - 1)
        return self.means[k] + per_image(self.stds[k], like) * noise.normal(like)

    def _log_joint(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """log P(component) + log p(x | component; sigma), [N, K]."""
        variances = self.stds.to(x)[None] ** 2 + _column(sigma, x) ** 2
        flat, means = x.flatten(1), self.means.to(x).flatten(1)
        squares = torch.stack([((flat - mean) ** 2).sum(1) for mean in means], dim=1)  # no cancellation, no [N, K, D]
        log_normal = -0.5 * (squares / variances + flat.shape[1] * torch.log(2 * math.pi * variances))
        return self._log_weights(x, cond) + log_normal

    def _log_weights(self, x: Tensor, cond: Condition) -> Tensor:
        """log P(component), [N, K]; -inf outside the label's class."""
        log_weights = self.weights.to(x).log().expand(len(x), -1)
        if self.classes is None or cond.label is None:
            return log_weights
        label = cond.label.to(x.device)[:, None]
        allowed = (label < 0) | (label == self.classes.to(x.device))
        if not allowed.any(1).all():
            raise ValueError(f"no component has class {int(cond.label[~allowed.any(1).to(cond.label.device)][0])}")
        return torch.log_softmax(log_weights.masked_fill(~allowed, -math.inf), dim=1)


def _column(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [N], or one number for all, as [N, 1] (or [1, 1]) in x's dtype."""
    return sigma.to(x).reshape(-1, 1)
