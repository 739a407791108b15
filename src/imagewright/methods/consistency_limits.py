"""Consistency distillation and training in the limit of infinitely many noise levels (Song et al. 2023, 2303.01469).

Source     appendix B: theorems 3 (squared l2) and 4 (l1), 5 (distillation under stop-gradient), 6 (training).
Networks   student (trained), teacher (frozen; distillation only). There is no target: f follows itself.
Time       the paper's t is our sigma. The grid has become a law: t^(1/rho) uniform, as the points of EDM's grid lie.
Velocity   dx/dt = (x - D(x, t)) / t of the teacher; in training z = (x - x0) / t, whose mean given x is the same.
Tangent    g = df/dt along the flow = df/dx dx/dt + df/dt, one Jacobian-vector product in direction (dx/dt, 1).
Derived    For neighbours h apart f(x_t, t) - f(x_t', t') = h g + O(h^2), so d = |.|^2 gives h^2 |g|^2 and
             loss without stop-gradient    |g|^2, for l1 |g|_1                         (distillation only)
           and with it only f(x_t, t) learns: the gradient 2 (f - f') df = 2 h g df is that of
             loss with stop-gradient       2 f . stopgrad(g), for l1 f . stopgrad(sign g).
           The sign is that of rising t: with the code's tangent along (-dx/dt, -1) it reads -f . stopgrad.
           h = 1 / ((N - 1) (tau^-1)'(t)) is cancelled by lambda(t) = (tau^-1)'(t)^2, or (tau^-1)'(t) where h stands
           alone: weight 1 at every t, as in the official code.
Kept       dropout 0.3, the rate 1e-3 without stop-gradient and 5e-6 with it; RAdam; starts from the denoiser (recipes).
Departs    l2 is the mean over an image's D numbers, as elsewhere here; the official code takes its root without
           stop-gradient ("norm"), and with it the sum, without the 2: ours is 2 / D of it, and the recipes' eps too.
           l1 under stop-gradient is ours; the official LPIPS (it would need the feature network's second derivatives)
           and greatest difference are not here. The tangent is float32 whatever the run's precision. A tangent that is
           not finite stops the training, where the official program leaves the image out.
Checked    losses and gradients of the official program (`tests/parity`); g and both gradients against finite
           differences and against the discrete loss on a fine grid; the exact flow map of Gaussian data has no tangent;
           training's gradient is distillation's in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.methods.pairs import check_range, column, finite_tangent
from imagewright.models.consistency import ConsistencyModel, edm_teacher
from imagewright.networks.tangents import derivative
from imagewright.noise import StepNoise
from imagewright.types import (
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)

Metric = Literal["l2", "norm", "l1"]


@dataclass(frozen=True, kw_only=True)
class _ContinuousTime:
    """What both share: the law of t, the metric, and the loss under stop-gradient."""

    product: ClassVar[str] = "student"

    metric: Metric = "l2"
    """"l2": mean square; "norm": its unsquared sum, |g|; "l1": mean absolute value."""
    rho: float = 7.0
    """Of the grid whose limit the law of t is."""

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise UserError(f"method.metric is {self.metric!r}; allowed: {', '.join(get_args(Metric))}")
        require_positive("method.rho", self.rho)

    def noise_levels(self, low: float, high: float, images: Tensor, noise: StepNoise) -> Tensor:
        """t [N] between low and high, t^(1/rho) uniform."""
        share = noise.uniform(images[:, 0, 0, 0])
        start, end = low ** (1 / self.rho), high ** (1 / self.rho)
        levels: Tensor = ((start + share * (end - start)) ** self.rho).clamp(low, high)
        return levels

    def _follow(
        self, student: ConsistencyModel, x: Tensor, t: Tensor, velocity: Tensor, cond: Condition, noise: StepNoise
    ) -> Update:
        """The loss whose gradient moves f(x, t) alone, against its own tangent."""
        with noise.same_dropout(), torch.no_grad():
            _, g = tangent(student, x, t, velocity, cond)
        g = finite_tangent(g, t)
        start = student.start(x, t, cond).to(g.dtype)
        size = self.size(g)
        match self.metric:
            case "l2":
                pull = (2 * g * start).flatten(1).mean(1)
            case "norm":
                pull = (g * start).flatten(1).sum(1) / size.clamp(min=torch.finfo(g.dtype).tiny)
            case "l1":
                pull = (g.sign() * start).flatten(1).mean(1)
        return Update("student", pull, {"tangent": size}, at=t)

    def size(self, g: Tensor) -> Tensor:
        """The metric of tangents [N, C, H, W], [N]: the loss without stop-gradient."""
        flat = g.flatten(1)
        match self.metric:
            case "l2":
                return flat.square().mean(1)
            case "norm":
                length: Tensor = torch.linalg.vector_norm(flat, dim=1)
                return length
            case "l1":
                return flat.abs().mean(1)


@dataclass(frozen=True, kw_only=True)
class ContinuousTimeDistillation(_ContinuousTime):
    """Theorems 3 to 5: the tangent along a teacher's flow shall vanish."""

    stop_gradient: bool = False
    """Whether the loss moves f(x, t) alone (theorem 5, at a smaller rate) or the tangent itself (theorems 3 and 4)."""
    dropout: float = 0.0
    """Of the student, whatever the teacher's (0.3 in the published runs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.dropout is {self.dropout}; it must lie in [0, 1)")

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser; the student starts from its weights."""
        known = edm_teacher(teacher)
        student = ConsistencyModel.from_denoiser(known, self.dropout)
        return Parts(student=Trained(module=student), teacher=Frozen(module=known))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        student, images = parts.student, batch.images
        t = self.noise_levels(student.sigma_min, student.sigma_max, images, noise)
        x = images + column(t) * noise.normal(images)
        with torch.no_grad():
            velocity = (x - parts.teacher(x, t, batch.cond)) / column(t)
        if self.stop_gradient:
            yield self._follow(student, x, t, velocity, batch.cond, noise)
            return
        _, g = tangent(student, x, t, velocity, batch.cond)
        yield Update("student", self.size(finite_tangent(g, t)), at=t)


@dataclass(frozen=True, kw_only=True)
class ContinuousTimeTraining(_ContinuousTime):
    """Theorem 6: no teacher; always under stop-gradient, where the noise's own velocity is as good as the flow's."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.sigma_min, self.sigma_max, "method.")
        if self.metric != "l2":
            raise UserError(
                f"method.metric is {self.metric!r}; training without a teacher allows l2 alone, whose gradient is "
                "linear in the tangent"
            )
        require_positive("method.sigma_data", self.sigma_data)

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: F(x, noise_label, cond) of `networks`; give the run a `start` to train it from a denoiser."""
        return Parts(student=Trained(module=ConsistencyModel(network, self.sigma_min, self.sigma_max, self.sigma_data)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        t = self.noise_levels(self.sigma_min, self.sigma_max, batch.images, noise)
        z = noise.normal(batch.images)
        yield self._follow(parts.student, batch.images + column(t) * z, t, z, batch.cond, noise)


def tangent(
    student: ConsistencyModel, x: Tensor, t: Tensor, velocity: Tensor, cond: Condition
) -> tuple[Tensor, Tensor]:
    """f(x, t) and g = df/dt along dx/dt = velocity, each [N, C, H, W].

    Differentiable in the student's weights where gradients are enabled; where not, by the cheaper rules of `tangents`.
    """
    # The network's own forward, not the module's call: a compiled one has no forward-mode derivative.
    network = student.network.forward

    def start(x: Tensor, t: Tensor) -> Tensor:
        return student.through(network, x, t, cond)

    with torch.autocast(x.device.type, enabled=False):
        jvp = torch.func.jvp if torch.is_grad_enabled() else derivative
        both: Any = jvp(start, (x, t), (velocity, torch.ones_like(t)))
    f, g = both
    return f, g
