"""SlimFlow: one-step flows smaller than their teacher (Zhu, Liu & Liu 2024, arXiv 2407.12718). Two stages.

Networks   annealing reflow: flow (trained), of any size, from fresh weights, or with those of a teacher's tensors that
           have its names and shapes. Distillation: student (trained), from the weights of the first stage's flow;
           teacher (frozen, eval mode), that flow.
Time       t = 0 the image, 1 the noise; the paper's is 1 - t. Both stages ask up to t = 1 - 1e-3 alone.
Annealing  the noise of a pair becomes sqrt(1 - b^2) z + b eps with fresh eps, its image stays; b falls from 1
reflow     (flow matching on the teacher's images) to 0 (reflow) over `anneal_images`: 1 - k/K, exp(-k/K), or
           (1 + cos(pi k/K)) / 2. Squared velocity, the mean over an image's numbers, weight 1, t uniform.
Flow-guided   on a pair, at (1 - 1e-3) z + 1e-3 x: D(z - v, x); and on fresh noise z': D(z' - v', target), v' = v(z'),
distillation  target = two Euler steps of the teacher with a middle time uniform in [0.2, 0.8] of the way, no gradient.
           Their sum. D is of images: LPIPS, or another, or two added.
Pairs      a teacher's (`data.couplings`); with data.xflip half are mirrored, noise and image together (stage 1).
Sampling   one step from t = 1 - 1e-3.
Source     the paper; github.com/yuanzhi-zhu/SlimFlow: `reflow/reflow.py`, `reflow/losses.py`, `train.py`, `configs/`.
Which step the paper has the teacher make both of the target's Euler steps; the program's training step has the student
           make the first (`first_step`); the program's is the default.
Departs    The network is told 999 t, the program's 999 (1 - t). A pair is mirrored by a coin of its own, the program's
           by one for the batch. The student begins as the teacher's average, the program's as its raw weights. The
           program's average begins with (1 + n) / (10 + n) for its n-th step, here n^-9 as nearly (`rampup_ratio`).
           Its rate's ramp begins with a step of rate 0, and its gradients that are not finite become 0 or 1e5; here
           the ramp is a step ahead, and the trainer stops.
           One step is from 0.999 z and comes out 1e-3 shorter. Classes of fresh noise are the pairs', as there. What
           the program has and no command of its README uses is left out: weights by signal-to-noise ratio, "t1".
Checked    losses and gradients against the program's numbers, all schedules; z stays of unit variance; b = 1 and b = 0
           are the two losses they should be; a straight teacher's target is its one step; parameter counts of all six
           published networks; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.checks import require_non_negative
from imagewright.methods.distances import Distance, Features
from imagewright.methods.flow_matching import PATH
from imagewright.methods.noise_couplings import Stored, check_coupling
from imagewright.methods.pairs import column
from imagewright.models.flow import Flow, VelocityFlow, flow_of
from imagewright.noise import StepNoise
from imagewright.precision import wide
from imagewright.types import (
    Batch,
    Clock,
    Coupling,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Span,
    Trained,
    Update,
    UserError,
)

Annealing = Literal["linear", "exponential", "cosine"]
FirstStep = Literal["student", "teacher"]
LAST = 1 - 1e-3
"""The time nearest to the noise that is learnt, and from which a step is drawn."""
PERCEPTUAL = Distance(kind="perceptual")


@dataclass(frozen=True, kw_only=True)
class AnnealingReflow:
    """Reflow without a teacher's weights: from independent noise to the teacher's own, by and by."""

    product: ClassVar[str] = "flow"

    anneal_images: Span = 0.23
    """Over how many images the noise goes over to the pairs' own; 0 = plain reflow (300,000 of 1,300,000 steps)."""
    schedule: Annealing = "linear"
    """How: linear and cosine end there, exponential falls to 1 / e."""

    def __post_init__(self) -> None:
        require_non_negative("method.anneal_images", self.anneal_images)
        if self.schedule not in get_args(Annealing):
            raise UserError(f"method.schedule is {self.schedule!r}; allowed: {', '.join(get_args(Annealing))}")
        if not self.anneal_images and self.schedule != "linear":
            raise UserError(f"method.schedule is {self.schedule!r}; it has no effect with method.anneal_images 0")

    def parts(
        self, *, network: nn.Module, spec: DataSpec, teacher: Denoiser | None = None, couplings: bool = True
    ) -> Parts:
        """network: what begins afresh, but for the tensors that are equal in name and shape to a teacher's.

        Raises UserError without pairs, or for a teacher that has no such tensor.
        """
        check_coupling(Stored(), couplings)
        if teacher is not None:
            take_equal(network, getattr(teacher, "network", None))
        return Parts(flow=Trained(module=VelocityFlow(network)))

    def randomness(self, clock: Clock) -> float:
        """b: how much of the noise is fresh, in [0, 1]."""
        span = self.anneal_images
        if not span:
            return 0.0
        passed = clock.images / (span if span >= 1 else span * clock.total_images)
        match self.schedule:
            case "linear":
                return 1 - min(passed, 1.0)
            case "exponential":
                return math.exp(-passed)
            case "cosine":
                return (1 + math.cos(math.pi * min(passed, 1.0))) / 2

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the flow."""
        pair = annealed(Stored()(batch, noise), self.randomness(clock), noise)
        t = LAST * wide(noise.uniform(pair.images[:, 0, 0, 0]))
        guess = parts.flow.velocity(PATH.mix(pair.images, pair.latents, t), t, pair.cond)
        off = guess - (pair.latents - pair.images)
        yield Update("flow", off.square().flatten(1).mean(1), at=(t / (1 - t)).to(pair.images.dtype))


def annealed(pair: Coupling, b: float, noise: StepNoise) -> Coupling:
    """The images with noise that is b fresh, b in [0, 1]; of unit variance as before."""
    if b == 0:
        return pair
    mixed = (1 - b**2) ** 0.5 * pair.latents + b * noise.normal(pair.latents)
    return Coupling(mixed, pair.images, pair.cond)


def take_equal(network: nn.Module, other: nn.Module | None) -> int:
    """Copy into a network the tensors of another that have the same name and shape; how many they were.

    Raises UserError where there is none.
    """
    own = network.state_dict()
    found = {} if other is None else other.state_dict()
    equal = {name: tensor for name, tensor in found.items() if name in own and own[name].shape == tensor.shape}
    if not equal:
        raise UserError("the teacher's network has no tensor of the name and shape of one of the student's")
    network.load_state_dict(equal, strict=False)
    return len(equal)


@dataclass(frozen=True, kw_only=True)
class FlowGuidedDistillation:
    """One step of a small flow: towards its pairs' images, and towards two steps of itself from fresh noise."""

    product: ClassVar[str] = "student"

    distance: Distance = PERCEPTUAL
    """Of images."""
    beside: Distance | None = None
    """A second one, added: the program's lpips+l1 and lpips+l2."""
    guidance: float = 1.0
    """Weight of the flow's two steps; 0 = distillation alone."""
    first_step: FirstStep = "student"
    """Who makes the first of the two: the program's student, or the paper's teacher (a call more)."""
    middle: tuple[float, float] = (0.2, 0.8)
    """The range of the share of the way that the first step goes."""
    dropout: float = 0.0
    """Of the student."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "middle", tuple(float(s) for s in self.middle))
        require_non_negative("method.guidance", self.guidance)
        if self.first_step not in get_args(FirstStep):
            raise UserError(f"method.first_step is {self.first_step!r}; allowed: {', '.join(get_args(FirstStep))}")
        if len(self.middle) != 2 or not 0 < self.middle[0] <= self.middle[1] < 1:
            raise UserError(f"method.middle is {self.middle}; it must be two numbers in (0, 1), the second no smaller")

    def parts(
        self, *, flow: Denoiser, spec: DataSpec, features: Features | None = None, couplings: bool = True
    ) -> Parts:
        """flow: the first stage's, which is not the teacher that drew the pairs.

        Raises UserError for one without an exact flow, without pairs, and for a perceptual distance without features.
        """
        check_coupling(Stored(), couplings)
        roles: dict[str, Any] = {"student": Trained(module=flow_of(flow, self.dropout))}
        if self.guidance:
            guide = flow if isinstance(flow, Flow) else flow_of(flow)
            roles["teacher"] = Frozen(module=guide)  # type: ignore[arg-type]  # a flow is a module
        if any(each is not None and each.kind == "perceptual" for each in (self.distance, self.beside)):
            if not isinstance(features, nn.Module):
                raise UserError("a distance's kind is 'perceptual'; it needs a feature network (give `features`)")
            roles["features"] = Frozen(module=features)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        pair = Stored()(batch, noise)
        last = torch.full_like(pair.images[:, 0, 0, 0], LAST, dtype=wide(pair.images).dtype)
        velocity = parts.student.velocity(PATH.mix(pair.images, pair.latents, last), last, pair.cond)
        loss = distil = self._distance(parts, pair.latents - velocity, pair.images)
        told = {"distillation": distil}
        if self.guidance:
            z = noise.normal(pair.latents)
            velocity = parts.student.velocity(z, last, pair.cond)
            target = self._target(parts, z, velocity.detach(), last, pair, noise)
            told["guided"] = self._distance(parts, z - velocity, target)
            loss = distil + self.guidance * told["guided"]
        yield Update("student", loss, parts=told)

    @torch.no_grad()
    def _target(self, parts: Any, z: Tensor, own: Tensor, last: Tensor, pair: Coupling, noise: StepNoise) -> Tensor:
        """Where two Euler steps from z lead, [N, C, H, W]; own: the student's velocity there."""
        low, high = self.middle
        share = low + (high - low) * wide(noise.uniform(z[:, 0, 0, 0]))
        first = own if self.first_step == "student" else parts.teacher.velocity(z, last, pair.cond)
        between = z - column(share).to(z.dtype) * first
        left = 1 - share
        second: Tensor = parts.teacher.velocity(between, left, pair.cond)
        return between - column(left).to(z.dtype) * second

    def _distance(self, parts: Any, made: Tensor, aim: Tensor) -> Tensor:
        """[N]."""
        features = getattr(parts, "features", None)
        found = self.distance(made, aim, features)
        return found if self.beside is None else found + self.beside(made, aim, features)
