"""Multi-student distillation, MSD (Song et al. 2025, arXiv 2410.23274): one-step students of parts of the classes.

Partition  disjoint parts of equal size that cover all classes (`data.partition`): consecutive classes, or clusters of a
           network's embeddings. A student's run has its part in `data.classes`; nothing else is shared by students, so
           they are trained one after the other or side by side (`recipes.multi_student`).
Stages     (figure 2, section 4) DM: `methods.dmd.DMD`; labels of fresh noise, hence matching and fake score, are of the
           part alone, the regression's pairs of *all* classes. ADM: `methods.dmd2.DMD2` from DM's weights, of both
           networks, without pairs; real images are of the part. TSM, this file: what a student of another size begins
           with, in the teacher's place; the fake score has the teacher's size and weights all the same.
TSM        (section 4.3) a denoiser that learns to answer as the teacher does, at all noise levels and on the part's
           noised images: lambda(sigma) |D_student - D_teacher|^2, EDM's law of levels, weight and scalings.
Product    `training.students`: one model, in which a table of classes is the route (`models.routed`).
Source     The paper's published figures and equations as the project's notes have them; no program is public.
Departs    Errors are means over an image's numbers. Rates, lengths, batches and widths of the paper's small students
           are not known to us; recipes say what is theirs. The adversary's weights are DMD2's.
Checked    TSM's loss is 0 just where denoisers agree, its optimum on a linear Gaussian teacher; one student of all
           classes is DMD to the bit; pairs are of all classes and labels of the part; routing; resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from imagewright.methods.edm import loss_weight
from imagewright.methods.pairs import column
from imagewright.models.consistency import edm_teacher
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.types import Batch, Clock, Denoiser, Event, Frozen, Parts, Trained, Update


@dataclass(frozen=True, kw_only=True)
class TeacherScoreMatching:
    """Make a denoiser of another size answer as its teacher does, at every noise level."""

    product: ClassVar[str] = "student"

    levels: LogNormal = LogNormal(mean=-1.2, std=1.2)
    """Noise levels of training, EDM's."""

    def parts(self, *, network: nn.Module, teacher: Denoiser) -> Parts:
        """network: the student's. teacher: an EDM-preconditioned denoiser; the student has its levels and scalings."""
        known = edm_teacher(teacher)
        student = EDMPrecond(network, known.sigma_min, known.sigma_max, known.sigma_data, known.noise_label)
        return Parts(student=Trained(module=student), teacher=Frozen(module=known))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the student."""
        sigma = self.levels.sample(noise, batch.images[:, 0, 0, 0])
        noisy = batch.images + column(sigma) * noise.normal(batch.images)
        with torch.no_grad():
            aim = parts.teacher(noisy, sigma, batch.cond)
        error = (parts.student(noisy, sigma, batch.cond) - aim).square().flatten(1).mean(1)
        yield Update("student", loss_weight(sigma, parts.student.sigma_data) * error, at=sigma)
