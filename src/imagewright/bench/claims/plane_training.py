"""Any method on points in the plane: the real trainer, fed from memory, and exact denoisers as teachers.

A claim makes the `Parts` itself, as a method's own `parts` does, with a `PointNetwork` in the student and, where the
method distils, `Frozen(module=ExactTeacher(oracle, ...))`; then `distil` trains and returns the averaged product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from imagewright.data import Loader
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.training.config import EmaConfig, OptimizerConfig, OptimizerKind, TrainingConfig
from imagewright.training.trainer import Trainer
from imagewright.types import UNCONDITIONAL, Batch, Condition, Coupling, Method, Parts

Draw = Callable[[int, StepNoise], tuple[Tensor, Condition]]
"""(n, noise) -> n training points [n, 2, 1, 1] and what is known of them."""


@dataclass(frozen=True, kw_only=True)
class PointRun:
    """Length and pace of a run on points; the half-life and the cooldown are counted in points seen."""

    iterations: int
    batch: int = 512
    lr: float = 1e-3
    kind: OptimizerKind = "adam"
    cooldown: bool = True
    """Lower the rate linearly to zero over the run."""
    ema: EmaConfig = EmaConfig(halflife_images=50_000)
    seed: int = 0


def distil(method: Method, parts: Parts, draw: Draw, run: PointRun, couplings: Coupling | None = None) -> nn.Module:
    """Train `parts` by the method for `run.iterations` steps; returns the product's average, in eval mode.

    couplings: pairs [M] of which each batch gets as many as it has points, with replacement. The parts are trained in
    place, targets included. Points are float32 whatever `draw` gives. Deterministic in run and parts; torch's global
    generator is left as it was. Raises UserError when a loss stops being finite.
    """
    total = run.iterations * run.batch
    config = TrainingConfig(
        total_images=total,
        batch=run.batch,
        seed=run.seed,
        optimizer=OptimizerConfig(kind=run.kind, lr=run.lr, lr_cooldown_images=total if run.cooldown else 0),
        ema=run.ema,
    )
    with torch.random.fork_rng(devices=[]):  # the trainer seeds the global generator, for dropout
        # Nothing is written: only `train` saves, and the steps are made here one by one.
        trainer = Trainer(method, parts, cast(Loader, _Points(draw, run.seed, couplings)), config, Path())
        for _ in range(run.iterations):
            trainer.train_step()
    product = copy.deepcopy(trainer.learners[method.product].module)
    product.load_state_dict(trainer.product_state())
    return product.eval()


def mixture_points(oracle: GaussianMixture) -> Draw:
    """Fresh points of an oracle, without labels."""
    return lambda n, noise: (oracle.sample(n, noise), UNCONDITIONAL)


class ExactTeacher(nn.Module):
    """An oracle as the module that `Frozen` wants: a denoiser for the noise levels from sigma_min to sigma_max."""

    def __init__(self, oracle: GaussianMixture, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        self.oracle, self.sigma_min, self.sigma_max = oracle, sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """E[x0 | x], exactly, in the dtype of x; x: [N, 2, 1, 1]; sigma: [N], > 0."""
        return self.oracle(x, sigma, cond)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The identity."""
        return sigma


class _Points:
    """The part of a `Loader` that the trainer asks for, on points that are drawn anew for every position."""

    def __init__(self, draw: Draw, seed: int, couplings: Coupling | None) -> None:
        self.draw, self.seed, self.couplings = draw, seed, couplings

    def follow(self, turns: object, device: object) -> None:
        """What comes need not be known beforehand."""

    def batch(self, position: int, size: int) -> Batch:
        points, cond = self.draw(size, StepNoise(self.seed, position, 0, 1))
        if self.couplings is None:
            return Batch(points.float(), cond)
        pairs = self.couplings
        rows = StepNoise(self.seed, position, 0, 2).integers(len(pairs.latents), torch.empty(size))
        chosen = Coupling(pairs.latents[rows].float(), pairs.images[rows].float(), pairs.cond[rows])
        return Batch(points.float(), cond, chosen)
