"""Continuous-time consistency models, sCM: distillation (sCD) and training (sCT) (Lu and Song 2024, 2410.11081).

Source     The authors published no program; NVIDIA's (FastGen, sCM.py and its configurations) is read beside the paper.
Networks   student (trained), weighting (trained: the loss weight w(t)), teacher (frozen; distillation only).
Time       the paper's is TrigFlow's, x_t = cos(t) x0 + sin(t) z with z ~ N(0, sd^2), t in [0, pi / 2). In our
           coordinates sigma = sd tan(t) and x = x_t / cos(t), so EDM's denoiser and f = cos(t) x_t - sin(t) sd F have
           the same scalings (`models.consistency.ContinuousConsistencyModel`; our network is -F).
Velocity   dx/dt = (cos(t) x_t - D) / sin(t) of the teacher's D, guided if asked (sCD); cos(t) z - sin(t) x0 (sCT).
Tangent    g = -cos^2(t) (sd F - dx/dt) - r cos(t) sin(t) (x_t + sd dF/dt), algorithm 1, weights under stop-gradient
           (no average), the same dropout mask; the warm-up r in front of the second term only; cos(t) sin(t) dF/dt is
           one Jacobian-vector product along (cos t sin t dx/dt, cos t sin t), in float32 whatever the precision.
           Then g / (|g| + c) per image, or clipped to [-1, 1].
Loss       e^w / sigma * |F - stopgrad(F) - g|^2 / D - w, D the number of an image's values; mean over the batch.
           Student and w take one step each along the same loss.
w          starts at its optimum. Of a loss e^w E - w that is w = -ln E, and a normalised tangent has |g| = 1 and so
           E = 1 / (sigma D): w = ln(sigma D) + v(t), with the learnt v = 0 at the start. In v the loss is
           e^v |F - stopgrad(F) - g|^2 - v: every noise level counts alike from the first step on. What v has left to
           learn is c's share, at most -2 ln(|g| / (|g| + c)).
Start      from a denoiser: the teacher (sCD), or `Experiment.start` (sCT; the paper never starts from nothing).
Networks   time t as label (EDM's `noise_label = "angle"`), positional embedding or Fourier scale 0.02, double_norm.
           A teacher whose label is ln(sigma) / 4 works too: its derivative times cos(t) sin(t) is the constant 1 / 4.
Departs    w starts at its optimum; elsewhere it starts anywhere, which hundreds of thousands of steps forget and a
           short run does not. v is linear in waves of t of its own, not in the network's time embedding. c stands
           beside |g| as the paper writes it; FastGen takes the root mean square, for which its c is sqrt(D) times as
           large. A sigma beyond the model's range (one in 6,000) is moved to its end; FastGen truncates the law, and
           sCT's at 800 (one in 16,000 is above 80). FastGen's derivative has a dropout mask of its own. The warm-up is
           a share of the run, from r = 0, where the paper has 10,000 steps. Nothing is done in float64.
Checked    g at r = 1 against central differences of f along the flow; zero tangent of the exact map of Gaussian data;
           r = 0 is the diffusion loss; the gradient is -2 g dF at the start, whatever sigma; that of v vanishes there;
           resume bit for bit with the weighting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.guidance import classifier_free
from imagewright.methods.pairs import check_range, column, finite_tangent, shortened
from imagewright.models.consistency import ContinuousConsistencyModel, edm_teacher
from imagewright.models.preconditioning import NoiseLabel
from imagewright.networks.tangents import derivative
from imagewright.networks.time_weight import TimeWeight
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
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

Stabiliser = Literal["normalise", "clip", "none"]


@dataclass(frozen=True, kw_only=True)
class _Continuous:
    """What sCD and sCT share: the law of t, the tangent and the loss."""

    product: ClassVar[str] = "student"

    noise_levels: LogNormal = field(default_factory=lambda: LogNormal(mean=-1.0, std=1.4))
    """Law of sigma = sd tan(t): log-normal, -1.0 and 1.4 on CIFAR-10, -1.0 and 1.6 on ImageNet-64."""
    warmup: float = 0.02
    """Share of the run over which r rises linearly to 1; the paper's 10,000 steps of half a million are 0.02."""
    tangent: Stabiliser = "normalise"
    """"normalise": g / (|g| + c); "clip": to [-1, 1]; "none", which diverges, for the ablation."""
    tangent_c: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(f"method.warmup is {self.warmup}; it must lie in [0, 1)")
        if self.tangent not in get_args(Stabiliser):
            raise UserError(f"method.tangent is {self.tangent!r}; allowed: {', '.join(get_args(Stabiliser))}")
        require_positive("method.tangent_c", self.tangent_c)

    def ramp(self, clock: Clock) -> float:
        """r of the paper: 0 is diffusion training, 1 consistency."""
        return min(1.0, clock.fraction / self.warmup) if self.warmup else 1.0

    def _learn(
        self, parts: Any, x: Tensor, t: Tensor, velocity: Tensor, cond: Condition, noise: StepNoise, r: float
    ) -> Iterator[Event]:
        """One step of the student and of the weighting, at x = x_t with dx/dt = velocity."""
        student = parts.student
        with noise.same_dropout(), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            g = tangent(student, x, t, velocity, cond, r)
        g = self.stabilised(finite_tangent(g, student.sigma_data * t.tan()))
        output = trig_output(student, x, t, cond).to(g.dtype)
        error = (output - output.detach() - g).square().flatten(1).sum(1)
        v = parts.weighting(t)  # w - ln(sigma D), so that e^w / (sigma D) is e^v
        yield Update("student", v.detach().exp() * error, {"error": error}, at=student.sigma_data * t.tan())
        yield Update("weighting", v.exp() * error.detach() - v)

    def stabilised(self, g: Tensor) -> Tensor:
        """The tangent [N, C, H, W], kept from exploding."""
        match self.tangent:
            case "normalise":
                return shortened(g, self.tangent_c)
            case "clip":
                return g.clamp(-1, 1)
            case "none":
                return g


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistencyDistillation(_Continuous):
    """sCD: the velocity is a teacher's."""

    guidance: float = 1.0
    """Classifier-free guidance of the teacher; 1 = none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.guidance):
            raise UserError(f"method.guidance is {self.guidance}; it must be a finite number (1 is no guidance)")

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser; the student starts from its weights."""
        known = edm_teacher(teacher)
        student = ContinuousConsistencyModel.from_denoiser(known)
        asked: nn.Module = known if self.guidance == 1 else classifier_free(known, self.guidance)
        return Parts(
            student=Trained(module=student),
            weighting=Trained(module=TimeWeight(), ema=False),
            teacher=Frozen(module=asked),
        )

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, one of the weighting."""
        sd = parts.student.sigma_data
        sigma = self.noise_levels.sample(noise, batch.images[:, 0, 0, 0])
        sigma = sigma.clamp(parts.teacher.sigma_min, parts.teacher.sigma_max)
        t, z = torch.atan(sigma / sd), sd * noise.normal(batch.images)
        x = column(t.cos()) * batch.images + column(t.sin()) * z
        with torch.no_grad():
            velocity = trig_velocity(parts.teacher, x, t, sd, batch.cond)
        yield from self._learn(parts, x, t, velocity, batch.cond, noise, self.ramp(clock))


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistencyTraining(_Continuous):
    """sCT: no teacher; the velocity is that of the one straight line through image and noise."""

    noise_label: NoiseLabel = "angle"
    """How the network is told t; that of the denoiser from which the run starts."""
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.sigma_min, self.sigma_max, "method.")

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: F(x, noise_label, cond) of `networks`; give the run a `start` to train it from a denoiser."""
        student = ContinuousConsistencyModel(network, self.sigma_min, self.sigma_max, self.sigma_data, self.noise_label)
        return Parts(student=Trained(module=student), weighting=Trained(module=TimeWeight(), ema=False))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student, one of the weighting."""
        sd = parts.student.sigma_data
        sigma = self.noise_levels.sample(noise, batch.images[:, 0, 0, 0]).clamp(self.sigma_min, self.sigma_max)
        t, z = torch.atan(sigma / sd), sd * noise.normal(batch.images)
        cos, sin = column(t.cos()), column(t.sin())
        x, velocity = cos * batch.images + sin * z, cos * z - sin * batch.images
        yield from self._learn(parts, x, t, velocity, batch.cond, noise, self.ramp(clock))


def trig_velocity(denoiser: Denoiser, x: Tensor, t: Tensor, sigma_data: float, cond: Condition) -> Tensor:
    """dx/dt of TrigFlow's probability-flow ODE at x = x_t [N, C, H, W], t [N] in (0, pi / 2)."""
    denoised = denoiser(x / column(t.cos()), sigma_data * t.tan(), cond)
    return (column(t.cos()) * x - denoised) / column(t.sin())


def trig_output(model: ContinuousConsistencyModel, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """F(x_t / sd, t) of f = cos(t) x_t - sin(t) sd F, shape of x."""
    sd = model.sigma_data
    # Not the module's call: a compiled one has no forward-mode derivative.
    answer: Tensor = model.network.forward(x / sd, model.c_noise(sd * t.tan()), cond)
    return -answer[:, : x.shape[1]]


def tangent(
    model: ContinuousConsistencyModel, x: Tensor, t: Tensor, velocity: Tensor, cond: Condition, r: float
) -> Tensor:
    """g of algorithm 1, before normalisation; at r = 1 it is cos(t) df/dt along the flow. [N, C, H, W]."""
    sd, cos, sin = model.sigma_data, column(t.cos()), column(t.sin())
    output, change = derivative(
        lambda x, t: trig_output(model, x, t, cond), (x, t), (cos * sin * velocity, t.cos() * t.sin())
    )
    g: Tensor = -(cos**2) * (sd * output - velocity) - r * (cos * sin * x + sd * change)
    return g
