"""Fast sampling by operator learning, DSNO (Zheng et al. 2023, arXiv 2211.13449).

Source     the program devzhk/DSNO-pytorch (`train_cifar.py`, `train_imagenet.py`, `utils/loss.py`, `configs/`).
Networks   student (trained: `models.operator`), from a denoiser's weights, in any of our U-Nets. The teacher is not
           asked: its trajectories are in the couplings, with points (`imagewright couple ... --times`).
Times      of the cosine schedule, log SNR cut to [-20, 20]: sigma = tan(c t + d), d = arctan(e^-10), c = pi/2 - 2 d.
           T = 4: "quad", t = (j/4)^2 for j = 3 .. 0, as on CIFAR-10; "uniform", t = 3/4 .. 0, as on ImageNet-64.
Loss       mean over the times of w_t d(prediction, x_t), w_t = sqrt(SNR) between 1 and 1e4: the image itself, at t = 0,
           counts most. d: mean absolute difference (ImageNet-64) or VGG's features (CIFAR-10, `--features vgg`).
Sampling   one call on pure noise; the last point is the image.
Departs    The teacher is EDM's, whose network answers with unit variance, where the program's predicts the image. The
           lowest level that the network is told is the teacher's sigma_min, 0.002, not e^-10. Pairs start at
           sigma_max = 80 and are stored in 16 bits unless asked otherwise. Fourier continuation (`num_pad`) is left
           out: no published run has it.
Checked    the program's layer, times, weights and loss on small tensors; linear-Gaussian teacher; parameter counts of
           both published networks; without layers over time T separate answers; gradients; resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.methods.distances import Distance, Features
from imagewright.methods.noise_couplings import Stored, check_coupling
from imagewright.models.consistency import edm_teacher
from imagewright.models.operator import TrajectoryOperator
from imagewright.noise import StepNoise
from imagewright.types import (
    Batch,
    Clock,
    Coupling,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    Trained,
    Update,
    UserError,
)

Spacing = Literal["quad", "uniform"]
Weights = Literal["snr", "equal"]
LEAST = math.exp(-10)
"""sigma at log SNR 20; its inverse is that at -20."""
MOST = 1e4
CLOSE = 2e-3
"""How far a store's times may be from what is wanted: they are given by hand."""


@dataclass(frozen=True, kw_only=True)
class OperatorDistillation:
    """Regression on whole trajectories of a teacher."""

    product: ClassVar[str] = "student"

    slots: int = 4
    """T: points of the trajectory, the image among them."""
    spacing: Spacing = "quad"
    """Of their times."""
    modes: int = 2
    """Lowest Fourier modes over time that are mixed; 0 = none: T separate regressions."""
    weights: Weights = "snr"
    """Of the times' losses."""
    distance: Distance = Distance(kind="l1")
    dropout: float = 0.0
    """Of the student (0.2 on CIFAR-10, 0.1 on ImageNet-64)."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UserError(f"method.slots is {self.slots}; it must be at least 1")
        if self.modes < 0:
            raise UserError(f"method.modes is {self.modes}; it must be at least 0")
        if self.spacing not in get_args(Spacing):
            raise UserError(f"method.spacing is {self.spacing!r}; allowed: {', '.join(get_args(Spacing))}")
        if self.weights not in get_args(Weights):
            raise UserError(f"method.weights is {self.weights!r}; allowed: {', '.join(get_args(Weights))}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.dropout is {self.dropout}; it must lie in [0, 1)")

    @property
    def cosine_times(self) -> tuple[float, ...]:
        """Times of the cosine schedule, decreasing to 0."""
        shares = [j / self.slots for j in range(self.slots - 1, -1, -1)]
        return tuple(s**2 for s in shares) if self.spacing == "quad" else tuple(shares)

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels of the points, decreasing; the last, of the image itself, is 0."""
        return (*(cosine_level(t) for t in self.cosine_times[:-1]), 0.0)

    @property
    def path_times(self) -> tuple[float, ...]:
        """Times of the straight path at which the couplings have to hold points: `imagewright couple --times`."""
        return tuple(level / (1 + level) for level in self.levels[:-1])

    @property
    def slot_weights(self) -> tuple[float, ...]:
        """w_t of each point."""
        if self.weights == "equal":
            return (1.0,) * self.slots
        return tuple(min(max(1 / cosine_level(t), 1.0), MOST) for t in self.cosine_times)

    def parts(
        self, *, teacher: Denoiser, spec: DataSpec, features: Features | None = None, couplings: bool = True
    ) -> Parts:
        """teacher: an EDM-preconditioned denoiser, from whose weights the student starts.

        Raises UserError without pairs, for a teacher of another kind or network, and for a perceptual distance without
        features.
        """
        check_coupling(Stored(), couplings)
        student = TrajectoryOperator.from_denoiser(edm_teacher(teacher), self.levels, self.modes, self.dropout)
        roles: dict[str, Trained | Frozen] = {"student": Trained(module=student)}
        if self.distance.kind == "perceptual":
            if not isinstance(features, nn.Module):
                raise UserError("method.distance.kind is 'perceptual'; it needs a feature network (give `features`)")
            roles["features"] = Frozen(module=features)
        return Parts(**roles)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        pair = Stored()(batch, noise)
        if clock.step == 0:
            self._require_points(pair)
        aims = states(pair)
        made = parts.student.trajectory(pair.latents, pair.cond)
        errors = self.distance(made.flatten(0, 1), aims.to(made.dtype).flatten(0, 1), getattr(parts, "features", None))
        each = errors.reshape(made.shape[:2])  # [N, T]
        weights = torch.tensor(self.slot_weights, dtype=each.dtype, device=each.device)
        yield Update("student", (weights * each).mean(1), parts={"image": each[:, -1], "first": each[:, 0]})

    def _require_points(self, pair: Coupling) -> None:
        """Raise UserError unless the pairs have points at the times that are wanted; once a run, as a GPU waits."""
        wanted, found = self.path_times, () if pair.times is None else tuple(pair.times[0].tolist())
        if len(found) != len(wanted) or any(abs(a - b) > CLOSE for a, b in zip(found, wanted, strict=True)):
            said = " ".join(f"{t:.4f}" for t in wanted) or "(none)"
            have = " ".join(f"{t:.4f}" for t in found) or "none"
            raise UserError(
                f"data.couplings has points at the times {have}; {self.slots} {self.spacing} slots learn from points "
                f"at {said}: draw them with imagewright couple TEACHER --times {said}"
            )


def cosine_level(t: float) -> float:
    """Noise level of a time in [0, 1] of the cosine schedule whose log SNR goes from 20 to -20."""
    first = math.atan(LEAST)
    return math.tan((math.atan(1 / LEAST) - first) * t + first)


def states(pair: Coupling) -> Tensor:
    """A pair's points and its image on the variance-preserving path, [N, T, C, H, W]."""
    image = pair.images[:, None]
    if pair.points is None or pair.times is None:
        return image
    # A point of the straight path is (1 - t) (x0 + sigma n).
    t = pair.times[:, :, None, None, None].to(pair.points)
    scale = 1 / ((1 - t) ** 2 + t**2).sqrt()
    return torch.cat([scale * pair.points, image], 1)
