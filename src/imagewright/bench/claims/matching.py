"""What the claims about matching distributions share: their parts, what a step costs, and a start for all contenders.

Cost is counted in passes of a network over one point: 1 forward, 3 with backward. It covers generator, fake score,
judging encoder and teacher, whatever is trained, so contenders of equal cost may differ in their updates.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.bench.claims.plane import PointTraining, point_denoiser, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.models.generator import FewStepGenerator
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers import MultistepConsistency
from imagewright.types import UNCONDITIONAL, Coupling, Frozen, Parts, Trained

FORWARD, BOTH = 1, 3
"""Passes of a forward call, and of one that is followed by a backward."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with what a search chose for it. fake_scale: the fake score's learning rate, in units of the run's."""

    method: DMD | DMD2
    lr: float
    fake_scale: float = 1.0


def passes(method: DMD | DMD2) -> float:
    """Passes per point of one step of the trainer, a mean over the generator's turns and the others."""
    if isinstance(method, DMD):
        matching = BOTH + 2 * FORWARD + BOTH  # generator; teacher and fake score; the fake score's update
        return matching + (BOTH if method.regression_weight else 0)
    turn = BOTH + 2 * FORWARD + (BOTH if method.generator_gan else 0)
    other = FORWARD
    fake = BOTH + (2 * BOTH if method.fake_gan else 0)
    return fake + (turn + (method.fake_updates - 1) * other) / method.fake_updates


def on_a_circle(seed: int) -> Tensor:
    """Three centres [3, 2, 1, 1] on the unit circle, turned by a random angle."""
    turn = StepNoise(seed, 4).uniform(torch.empty(1, dtype=torch.float64))[0]
    angles = (torch.arange(3, dtype=torch.float64) + turn) * 2 * math.pi / 3
    return torch.stack([angles.cos(), angles.sin()], 1).reshape(3, 2, 1, 1)


def steps_for(budget: float, step: float, every: int = 1) -> int:
    """How many steps of a cost a budget affords: a multiple of `every`, at least one."""
    return max(int(budget / step / every), 1) * every


def start_of(
    teacher: GaussianMixture, width: int, depth: int, seed: int, iterations: int, sigma_data: float
) -> EDMPrecond:
    """A denoiser trained on the teacher's points, from which generators and fake scores start: an oracle has no
    weights."""
    denoiser = point_denoiser(width, depth, seed, sigma_data=sigma_data)
    training = PointTraining(iterations=iterations, seed=seed, sigma_data=sigma_data)
    return train(denoiser, lambda n, noise: (teacher.sample(n, noise).float(), UNCONDITIONAL), training)


def parts_of(denoiser: EDMPrecond, teacher: GaussianMixture, contender: Contender, seed: int) -> Parts:
    """As the methods make them, but with an exact teacher."""
    fake: nn.Module = copy.deepcopy(denoiser).requires_grad_(True).train()
    if isinstance(contender.method, DMD2) and contender.method.fake_gan:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fake = JudgingDenoiser.from_denoiser(denoiser, (2, 1, 1))
    return Parts(
        generator=Trained(module=FewStepGenerator.from_denoiser(denoiser)),
        teacher=Frozen(module=ExactTeacher(teacher)),
        fake_score=Trained(module=fake, ema=False, lr_scale=contender.fake_scale),
    )


def taught(
    contender: Contender,
    start: EDMPrecond,
    teacher: GaussianMixture,
    data: GaussianMixture,
    run: PointRun,
    pairs: Coupling | None = None,
) -> FewStepGenerator:
    """A generator that a contender taught for `run.iterations` steps at its own rate."""
    pace = replace(run, lr=contender.lr)
    parts = parts_of(start, teacher, contender, run.seed)
    generator = distil(contender.method, parts, mixture_points(data), pace, pairs)
    assert isinstance(generator, FewStepGenerator)
    return generator


def made(generator: FewStepGenerator, z: Tensor) -> npt.NDArray[np.float64]:
    """Points [N, 2] of latents [N, 2, 1, 1]."""
    points: npt.NDArray[np.float64] = MultistepConsistency(clip=False)(generator, z).flatten(1).double().numpy()
    return points
