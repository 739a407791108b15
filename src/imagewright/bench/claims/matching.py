"""What the claims about matching distributions share: their trial and parts, and what a step costs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from imagewright.bench.claims.plane import PointNetwork, PointTraining, seeded
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun
from imagewright.bench.claims.trial import BOTH as BOTH
from imagewright.bench.claims.trial import FORWARD as FORWARD
from imagewright.bench.claims.trial import Contender, Trial
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.models.generator import FewStepGenerator
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond
from imagewright.oracles import GaussianMixture
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig
from imagewright.types import Frozen, Parts, Trained

SHORT = PointRun(batch=256, iterations=1, ema=EmaConfig(halflife_images=5_000, rampup_ratio=None))
"""The pace of short trainings, whose averages must not lag."""


def passes(method: DMD | DMD2) -> float:
    """Passes per point of one step of the trainer, a mean over the generator's turns and the others."""
    if isinstance(method, DMD):
        matching = BOTH + 2 * FORWARD + BOTH  # generator; teacher and fake score; the fake score's update
        return matching + (BOTH if method.regression_weight else 0)
    turn = BOTH + 2 * FORWARD + (BOTH if method.generator_gan else 0)
    other = FORWARD
    fake = BOTH + (2 * BOTH if method.fake_gan else 0)
    return fake + (turn + (method.fake_updates - 1) * other) / method.fake_updates


def matching_trial(seed: int, oracle: GaussianMixture, width: int, warm: int, **more: Any) -> Trial:
    """A trial of small networks of depth 3; warm: updates of the denoiser that all start from."""
    return Trial(
        seed=seed, oracle=oracle, network=lambda: PointNetwork(width, 3), warm=PointTraining(iterations=warm), **more
    )


def roles(generator: FewStepGenerator, fake: nn.Module, teacher: Any, scale: float = 1.0) -> Parts:
    """As the methods make them; teacher: an exact one. scale: the fake score's rate, in units of the run's."""
    return Parts(
        generator=Trained(module=generator),
        teacher=Frozen(module=ExactTeacher(teacher)),
        fake_score=Trained(module=fake, ema=False, lr_scale=scale),
    )


def parts_of(start: EDMPrecond, teacher: GaussianMixture, contender: Contender, seed: int) -> Parts:
    """Generator and fake score from one denoiser's weights; the latter judges where the method has an adversary."""
    fake: nn.Module = copy.deepcopy(start).requires_grad_(True).train()
    if isinstance(contender.method, DMD2) and contender.method.fake_gan:
        fake = seeded(seed, lambda: JudgingDenoiser.from_denoiser(start, (2, 1, 1)))
    return roles(FewStepGenerator.from_denoiser(start), fake, teacher, contender.fake_scale)


def made(generator: FewStepGenerator, z: Tensor) -> npt.NDArray[np.float64]:
    """Points [N, 2] of latents [N, 2, 1, 1]."""
    points: npt.NDArray[np.float64] = MultistepConsistency(clip=False)(generator, z).flatten(1).double().numpy()
    return points
