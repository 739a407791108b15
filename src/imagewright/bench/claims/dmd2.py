"""DMD2: two time scales steady the matching, and only real points correct a biased teacher (2405.14867)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.bench.claims.ctm import modes
from imagewright.bench.claims.plane import PointTraining, distance, latents, point_denoiser, real_points, train
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.methods.dmd2 import DMD2
from imagewright.models.generator import FewStepGenerator
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.training.config import EmaConfig
from imagewright.types import UNCONDITIONAL, Frozen, Parts, Trained

WIDTH, DEPTH = 128, 3
SIGMA_DATA = 0.7
BIAS = 1.6
"""Factor on the variance of every component of the teacher."""
UPDATES = 400
"""Of the generator, in every arm."""
RUN = PointRun(iterations=UPDATES, batch=256, lr=1e-3, ema=EmaConfig(halflife_images=5_000, rampup_ratio=None))
GAN = DMD2(generator_gan=1.0, fake_gan=1.0)
ARMS = {
    "ratio 1": replace(GAN, fake_updates=1, generator_gan=0.0, fake_gan=0.0),
    "ratio 5": replace(GAN, generator_gan=0.0, fake_gan=0.0),
    "ratio 5, with GAN": GAN,
}


def biased(oracle: GaussianMixture) -> GaussianMixture:
    """The teacher: too wide at every mode."""
    return GaussianMixture(oracle.means, math.sqrt(BIAS) * oracle.stds, oracle.weights)


def parts_of(denoiser: EDMPrecond, teacher: GaussianMixture, method: DMD2, seed: int) -> Parts:
    """As the method makes them, but with an exact teacher."""
    fake: nn.Module = copy.deepcopy(denoiser).requires_grad_(True).train()
    if method.fake_gan:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fake = JudgingDenoiser.from_denoiser(denoiser, (2, 1, 1))
    return Parts(
        generator=Trained(module=FewStepGenerator.from_denoiser(denoiser)),
        teacher=Frozen(module=ExactTeacher(teacher)),
        fake_score=Trained(module=fake, ema=False),
    )
