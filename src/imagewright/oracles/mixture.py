"""Gaussian mixtures, isotropic or low-rank, with denoiser, score and density in closed form.

`Denoiser`s on tensors [N, ...] of any shape. Noised by x = x0 + sigma eps they stay mixtures, with sigma^2 added to
every variance. Tweedie: denoiser = x + sigma^2 score. Components may have classes; then a condition's label restricts
the mixture to its class (-1 does not), so that guidance has a truth too. The flow is `oracles.flow`'s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imagewright.oracles.gaussian import column
from imagewright.paths.gaussian import per_image
from imagewright.types import UNCONDITIONAL, Condition, Noise, UserError


class Mixture(ABC):
    """What mixtures share: weights, classes, and everything that follows from each component's density and posterior.

    means: [K, ...]. weights: [K], > 0, normalised here; None: equal. classes: int64 [K], >= 0, or None: conditions
    are ignored. Raises UserError on parameters outside their ranges; later ValueError on a label that no component has.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __init__(self, means: Tensor, weights: Tensor | None, classes: Tensor | None) -> None:
        count = len(means)
        self.means = means
        self.weights = means.new_full((count,), 1 / count) if weights is None else weights / weights.sum()
        self.classes = classes
        for name, value in (("weights", self.weights), ("classes", classes)):
            if value is not None and value.shape != (count,):
                raise UserError(f"{type(self).__name__}.{name} must have shape [{count}], got {list(value.shape)}")
        if not (self.weights > 0).all():
            raise UserError(f"{type(self).__name__}.weights must all be positive")

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """E[x0 | x], exactly; of the label's class where one is given. x: [N, ...]; sigma: [N], > 0."""
        return self._posterior_mean(x, sigma, self.responsibilities(x, sigma, cond))

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def score(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """grad log p(x; sigma), [N, ...]; sigma = 0 is allowed where every variance is positive."""
        return self._score(x, sigma, self.responsibilities(x, sigma, cond))

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
        return self.means[k] + self._spread(k, noise.normal(like), noise)

    @abstractmethod
    def _log_normals(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x | component; sigma), [N, K]."""

    @abstractmethod
    def _posterior_mean(self, x: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        """sum_k share_k E[x0 | x, k]; share: [N, K]."""

    @abstractmethod
    def _score(self, x: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        """sum_k share_k grad log p(x | k; sigma)."""

    @abstractmethod
    def _spread(self, k: Tensor, normal: Tensor, noise: Noise) -> Tensor:
        """Draws of components k [n] about their means, from standard normals [n, ...] (and more noise, if need be)."""

    def _log_joint(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """log P(component) + log p(x | component; sigma), [N, K]."""
        return self._log_weights(x, cond) + self._log_normals(x, sigma)

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


class GaussianMixture(Mixture):
    """sum_k weights_k N(means_k, stds_k^2 I).

    stds: a number or [K], >= 0 (0: a finite set of images). The rest is `Mixture`'s.
    """

    def __init__(
        self,
        means: Tensor,
        stds: float | Tensor,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        super().__init__(means, weights, classes)
        self.stds = torch.as_tensor(stds, dtype=means.dtype, device=means.device).expand(len(means))
        if not (self.stds >= 0).all():
            raise UserError(f"GaussianMixture.stds must be >= 0, got {self.stds.min():g}")

    def _log_normals(self, x: Tensor, sigma: Tensor) -> Tensor:
        variances = self._variances(x, sigma)
        flat, means = x.flatten(1), self.means.to(x).flatten(1)
        squares = torch.stack([((flat - mean) ** 2).sum(1) for mean in means], dim=1)  # no cancellation, no [N, K, D]
        return -0.5 * (squares / variances + flat.shape[1] * torch.log(2 * math.pi * variances))

    def _posterior_mean(self, x: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        own, sigma2 = self.stds.to(x)[None] ** 2, column(sigma, x) ** 2  # [1, K], [N, 1]
        from_x = (share * own / (own + sigma2)).sum(1)  # [N]
        from_means = (share * sigma2 / (own + sigma2)) @ self.means.to(x).flatten(1)
        return per_image(from_x, x) * x + from_means.reshape(x.shape)

    def _score(self, x: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        pull = share / self._variances(x, sigma)
        return (pull @ self.means.to(x).flatten(1)).reshape(x.shape) - per_image(pull.sum(1), x) * x

    def _spread(self, k: Tensor, normal: Tensor, noise: Noise) -> Tensor:
        return per_image(self.stds[k], normal) * normal

    def _variances(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.stds.to(x)[None] ** 2 + column(sigma, x) ** 2  # [N, K]


class LowRankMixture(Mixture):
    """sum_k weights_k N(means_k, axes_k diag(variances_k) axes_k^T + floor^2 I).

    axes: [K, D, R], orthonormal columns over the flattened image; variances: [K, R], >= 0, on top of the floor;
    floor: standard deviation in every direction, >= 0. The rest is `Mixture`'s. `from_images` fits one to a data set.
    """

    def __init__(
        self,
        means: Tensor,
        axes: Tensor,
        variances: Tensor,
        floor: float,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        super().__init__(means, weights, classes)
        count, dimension = len(means), means[0].numel()
        if axes.shape[:2] != (count, dimension) or variances.shape != (count, axes.shape[2]):
            raise UserError(
                f"LowRankMixture.axes must have shape [{count}, {dimension}, R] and variances [{count}, R], "
                f"got {list(axes.shape)} and {list(variances.shape)}"
            )
        unit = torch.eye(axes.shape[2], dtype=axes.dtype, device=axes.device)
        if not torch.allclose(axes.mT @ axes, unit.expand(count, -1, -1), atol=1e-4):
            raise UserError("LowRankMixture.axes must have orthonormal columns")
        if not ((variances >= 0).all() and floor >= 0):
            raise UserError(f"LowRankMixture.variances and floor must be >= 0, got {variances.min():g} and {floor:g}")
        self.axes, self.variances, self.floor = axes, variances, floor

    @classmethod
    def from_images(cls, images: Tensor, labels: Tensor | None = None, rank: int = 8) -> LowRankMixture:
        """One component a class: its mean, its `rank` largest principal axes, the rest averaged into the floor.

        images: [N, ...], floating point. labels: int64 [N], or None: one component. Weights are the class
        frequencies. Raises UserError when the rank is not below the smallest class's size and the dimension.
        """
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        classes, counts = torch.unique(labels, return_counts=True)
        dimension = images[0].numel()
        if not 1 <= rank < min(dimension, int(counts.min())):
            raise UserError(f"rank is {rank}; it must be at least 1 and below {min(dimension, int(counts.min()))}")
        means, axes, tops, rests = [], [], [], []
        for c in classes:
            flat = images[labels == c].flatten(1).double()
            _, singular, right = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
            spectrum = singular**2 / len(flat)
            means.append(flat.mean(0))
            axes.append(right[:rank].mT)
            tops.append(spectrum[:rank])
            rests.append(float(spectrum[rank:].sum()) / (dimension - rank))
        floor = math.sqrt(sum(r * int(n) for r, n in zip(rests, counts, strict=True)) / len(images))
        return cls(
            torch.stack(means).reshape(len(classes), *images.shape[1:]),
            torch.stack(axes),
            (torch.stack(tops) - floor**2).clamp(min=0),
            floor,
            counts.double(),
            classes,
        )

    def _log_normals(self, x: Tensor, sigma: Tensor) -> Tensor:
        flat, rest = x.flatten(1), column(sigma, x)[:, 0] ** 2 + self.floor**2  # [N]
        columns = []
        for mean, axes, own in self._components(x):
            offset = flat - mean
            along = offset @ axes  # [N, R]
            total = own + rest[:, None]
            # |offset|^2 / rest, less what the axes explain; written so that rest = 0 stays an error, not a wrong number
            square = (along**2 / total).sum(1) + (offset - along @ axes.mT).square().sum(1) / rest
            log_det = total.log().sum(1) + (flat.shape[1] - axes.shape[1]) * rest.log()
            columns.append(-0.5 * (square + log_det + flat.shape[1] * math.log(2 * math.pi)))
        return torch.stack(columns, dim=1)

    def _posterior_mean(self, x: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        return x + per_image(column(sigma, x)[:, 0] ** 2, x) * self._score(x, sigma, share)

    def _score(self, x: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        flat, rest = x.flatten(1), column(sigma, x)[:, 0] ** 2 + self.floor**2
        score = torch.zeros_like(flat)
        for k, (mean, axes, own) in enumerate(self._components(x)):
            offset = flat - mean
            along = offset @ axes
            shrunk = offset - (along * own / (own + rest[:, None])) @ axes.mT  # rest * inverse covariance * offset
            score = score - share[:, k : k + 1] * shrunk / rest[:, None]
        return score.reshape(x.shape)

    def _spread(self, k: Tensor, normal: Tensor, noise: Noise) -> Tensor:
        along = noise.normal(normal.new_empty(len(k), self.axes.shape[2]))
        low_rank = torch.einsum("ndr,nr->nd", self.axes[k], self.variances[k].sqrt() * along)
        return low_rank.reshape(normal.shape) + self.floor * normal

    def _components(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(mean [D], axes [D, R], variances [R]) of each, in x's dtype."""
        return list(zip(self.means.to(x).flatten(1), self.axes.to(x), self.variances.to(x), strict=True))
