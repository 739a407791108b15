"""Easy consistency tuning, ECM (Geng et al. 2024, arXiv 2406.14548): a denoiser becomes a consistency model.

Source     the program locuslab/ect (`training/loss.py`, `training/networks.py`, `run_ecm.sh`).
Networks   student (trained), from a denoiser's weights (`start`); the target is the student under stop-gradient.
Levels     ln t ~ N(-1.1, 2.0^2), continuous;  r = max(0, t (1 - q^-(stage + 1) n(t))),  n(t) = 1 + k sigmoid(-b t); the
           stage grows by one in equal shares of the run. In the first many r are 0, where the image itself is aimed at:
           the loss is a denoiser's there, and stage by stage becomes a consistency model's.
Loss       |f(x_t) - f(x_r)|, the root of the summed squares (or the pseudo-Huber distance, c = 0.06 on ImageNet-64),
           times 1 / (t - r), or EDM's weight; the mean over the batch.
Scalings   EDM's own, f(x, 0) = x; one dropout mask for both evaluations.
Departs    At drawing the scalings are those of training; the program has the boundary's then, with sigma_min = 0.003
           (which moves an image by 0.4% of itself at 0.821, by nothing at 80). A stage is a share of the images, not a
           whole number of its ticks. A gradient that is not finite stops the training; there it becomes 0 or 1e5. A
           teacher's layer for augmentation is kept, and told nothing; there it is left out.
Checked    losses and gradients of the program on small weights; r < t, and 0 where it is cut; stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.methods.distances import Distance, Features
from imagewright.methods.edm import loss_weight
from imagewright.methods.pairs import Neighbours, check_range, column, consistency_parts, match
from imagewright.models.consistency import ContinuousConsistencyModel
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.precision import wide
from imagewright.types import Batch, Clock, DataSpec, Event, Parts, UserError

Weighting = Literal["gap", "edm"]


@dataclass(frozen=True, kw_only=True)
class EasyConsistencyTuning:
    """One image under one noise at t and at r(t), which comes nearer to t stage by stage."""

    product: ClassVar[str] = "student"

    noise_levels: LogNormal = LogNormal(mean=-1.1, std=2.0)
    """Law of t."""
    q: float = 2.0
    """The gap t - r shrinks by this factor at every stage."""
    k: float = 8.0
    """How much wider than at high levels the gap is at low ones."""
    b: float = 1.0
    """How soon it is as at high levels."""
    stages: int = 8
    """Equal shares of the run."""
    weighting: Weighting = "gap"
    """1 / (t - r), or EDM's (t^2 + sd^2) / (t sd)^2."""
    distance: Distance = Distance(kind="norm")
    sigma_data: float = 0.5
    sigma_min: float = 0.003
    """Below it nothing is drawn; training goes down to 0."""
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max, "method.")
        for name in ("sigma_data", "b"):
            require_positive(f"method.{name}", getattr(self, name))
        if not 1 < self.q < math.inf:
            raise UserError(f"method.q is {self.q}; it must be above 1, and finite")
        if not 0 <= self.k < math.inf:
            raise UserError(f"method.k is {self.k}; it must be at least 0, and finite")
        if self.stages < 1:
            raise UserError(f"method.stages is {self.stages}; it must be at least 1")
        if self.weighting not in get_args(Weighting):
            raise UserError(f"method.weighting is {self.weighting!r}; allowed: {', '.join(get_args(Weighting))}")

    def parts(self, *, network: nn.Module, spec: DataSpec, features: Features | None = None) -> Parts:
        """network: F(x, noise_label, cond) of `networks`, which is given a denoiser's weights by `start`."""
        student = ContinuousConsistencyModel(network, self.sigma_min, self.sigma_max, self.sigma_data)
        return consistency_parts(student, features, self.distance)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        t, r, weight = self.neighbours(clock.fraction, noise, batch.images[:, 0, 0, 0])
        z = noise.normal(batch.images)
        pair = (batch.images + column(t) * z, t), (batch.images + column(r) * z, r)
        yield from match(parts, *pair, batch.cond, noise, self.distance, 0.0, weight)

    def neighbours(self, fraction: float, noise: StepNoise, like: Tensor, most: float = math.inf) -> Neighbours:
        """t, cut at `most`, r and the weights of the losses at a fraction of training in [0, 1]; like: [N]."""
        t = self.noise_levels.sample(noise, like).clamp(max=most)
        r = self.lower(t, fraction)
        weight = 1 / (t - r) if self.weighting == "gap" else loss_weight(t, self.sigma_data)
        return Neighbours(t, r, weight)

    def stage(self, fraction: float) -> int:
        """0 .. stages - 1."""
        return min(int(fraction * self.stages), self.stages - 1)

    def lower(self, t: Tensor, fraction: float) -> Tensor:
        """r(t) at a fraction of training, any shape: in [0, t)."""
        gap = self.q ** -(self.stage(fraction) + 1) * (1 + self.k * torch.sigmoid(-self.b * t))
        return (t * (1 - gap)).clamp(min=0)

    def last_weight(self, fraction: float) -> float:
        """The weight of the pair whose upper level is sigma_max; 1 with EDM's weights."""
        if self.weighting == "edm":
            return 1.0
        top = wide(torch.tensor(self.sigma_max))
        return 1 / float(top - self.lower(top, fraction))
