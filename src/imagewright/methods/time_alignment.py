"""A denoiser whose network is told the straight path's time in place of ln(sigma): a teacher for Align Your Flow.

Source     Sabour et al. 2025 (arXiv 2506.14603): EDM2's time embedding is fine-tuned to take t directly, so that a
           student and its derivative in t begin in coordinates in which the flow is smooth; d ln(sigma) / dt is
           1 / (t (1 - t)).
Networks   denoiser (trained: its layers of the noise level alone), teacher (frozen).
Loss       |e(t, class) - e_teacher(ln(sigma) / 4, class)|^2 of the vectors that all blocks are told, in units of their
           mean square: 0.01 is a tenth of their length. Nothing else of the network is run.
Departs    The paper does not say what the fine-tune minimises: the embedding's own distance needs no image, and its
           error bounds the network's. The law of noise levels is log-normal and wide, so that both ends are learnt.
Checked    only the time's layers move; the denoiser's error falls; one that is told t is refused; resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.consistency import edm_teacher
from imagewright.models.preconditioning import EDMPrecond, student_network
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


@runtime_checkable
class Embeds(Protocol):
    """A network whose embedding can be asked and trained alone; see `networks.UNet`."""

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor: ...

    def time_layers(self) -> list[nn.Module]: ...


@dataclass(frozen=True, kw_only=True)
class TimeAlignment:
    """Tell a denoiser's network t = sigma / (sigma + sd), and teach its embedding to mean the same."""

    product: ClassVar[str] = "denoiser"

    noise_levels: LogNormal = field(default_factory=lambda: LogNormal(mean=-0.5, std=2.5))

    def parts(self, *, teacher: Denoiser, spec: DataSpec) -> Parts:
        """teacher: an EDM-preconditioned denoiser. Raises UserError for one that is aligned already."""
        known = edm_teacher(teacher)
        if known.noise_label == "time":
            raise UserError("the teacher is told the straight path's time already; there is nothing to align")
        if not isinstance(known.network, Embeds):
            raise UserError(f"the teacher's network is {an(type(known.network).__name__)}, which has no time_layers()")
        return Parts(denoiser=Trained(module=aligned(known)), teacher=Frozen(module=known))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the time's layers."""
        low, high = parts.teacher.sigma_min, parts.teacher.sigma_max
        sigma = self.noise_levels.sample(noise, batch.images[:, 0, 0, 0]).clamp(low, high)
        told = Condition(label=batch.cond.label)
        with torch.no_grad():
            aim = parts.teacher.network.embed(parts.teacher.c_noise(sigma), told)
        found = parts.denoiser.network.embed(parts.denoiser.c_noise(sigma), told)
        yield Update("denoiser", (found - aim).square().mean(1) / aim.square().mean(1), at=sigma)


def aligned(teacher: EDMPrecond) -> EDMPrecond:
    """The same weights, told the time; only the layers of the time learn."""
    network: Any = student_network(teacher).requires_grad_(False)
    for layer in network.time_layers():
        layer.requires_grad_(True)
    return EDMPrecond(network, teacher.sigma_min, teacher.sigma_max, teacher.sigma_data, "time").train()
