"""EDM: its wrapper, loss weight, noise law and sampler, each against what they replaced (2206.00364), in the plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Claim, Row, lower, times
from imagewright.bench.claims.plane import PLANE, PointNetwork, PointTraining, latents, sampled, seeded, train
from imagewright.bench.claims.rings import ring
from imagewright.bench.claims.trial import Trial
from imagewright.methods.edm import loss_weight
from imagewright.models.preconditioning import EDMPrecond, Preconditioned, Scalings
from imagewright.paths.noise_levels import LogNormal, LogUniform
from imagewright.samplers import Ablation, Euler, Heun
from imagewright.training.config import EmaConfig
from imagewright.types import Denoiser, Sampler

BATCH = 256
SAMPLER = Heun(num_steps=18)


class NoisePrediction(Preconditioned):
    """The VP wrapper's scalings, told ln(sigma) / 4: the network predicts the noise, whatever its level."""

    settings = ("sigma_min", "sigma_max")

    def __init__(self, network: nn.Module, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scalings(self, sigma: Tensor) -> Scalings:
        return Scalings(
            c_skip=torch.ones_like(sigma), c_out=-sigma, c_in=(1 + sigma**2).rsqrt(), c_noise=sigma.log() / 4
        )


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is varied. inverse: weight 1 / sigma^2, that of VP and VE, in place of EDM's."""

    wrapper: Callable[[nn.Module], Preconditioned] = lambda network: EDMPrecond(network, sigma_data=PLANE)
    inverse: bool = False
    levels: LogNormal | LogUniform = LogNormal(mean=-1.2, std=1.2)
    lr: float = 0.02


DESIGNS = {
    "EDM": Design(),
    "VP's wrapper": Design(wrapper=NoisePrediction, inverse=True),
    "weight 1 / sigma^2": Design(inverse=True),
    "VE's noise law": Design(levels=LogUniform(sigma_min=0.02, sigma_max=100.0), lr=0.04),
}
"""Rates: the best of 0.01, 0.02 and 0.04 for each on seed 0 (0.02 of EDM); the wrapper's weight: the better of both."""


def trained(design: Design, trial: Trial, iterations: int) -> Preconditioned:
    """A denoiser of the ring, averaged; designs of one seed start from the same weights and see the same points."""
    config = PointTraining(
        iterations=iterations, batch=BATCH, lr=design.lr, ema=EmaConfig(halflife_images=iterations * BATCH / 20),
        seed=trial.seed, levels=design.levels,
    )  # fmt: skip
    denoiser = design.wrapper(seeded(trial.seed, lambda: PointNetwork(64, 4)))
    weight = (lambda sigma, _: sigma**-2) if design.inverse else loss_weight
    return train(denoiser, trial.points, config, weight=weight)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Energy distance of what each design draws; and how far solvers end from the exact flow's points."""
    iterations, count, noises, steps = (1500, 4000, 500, 600) if budget == "full" else (8, 64, 16, 50)
    trial = Trial(seed=seed, oracle=ring(seed, 0.05), count=count)

    def row(name: str, denoiser: Denoiser) -> Row:
        drawn = sampled(denoiser, SAMPLER, seed + 2000, count)
        return Row(name=name, score=trial.distance(drawn), cost=SAMPLER.nfe)

    rows = [row("exact denoiser", trial.oracle)]
    rows += [row(name, trained(design, trial, iterations)) for name, design in DESIGNS.items()]
    start = latents(seed + 3000, noises)
    truth = Heun(num_steps=steps)(trial.oracle, start)

    def error(name: str, sampler: Sampler, nfe: int) -> Row:
        off = float((sampler(trial.oracle, start) - truth).square().mean().sqrt())
        return Row(name=f"{name}, {nfe} calls", score=off, cost=nfe, curve=name)

    for nfe in (35, 71, 143):
        rows.append(error("Heun, rho = 7", Heun(num_steps=(nfe + 1) // 2), nfe))
        rows.append(error("Euler, rho = 7", Euler(num_steps=nfe), nfe))
        rows.append(error("Heun, uniform in sigma", Ablation(num_steps=(nfe + 1) // 2, rho=1.0), nfe))
    return rows


CLAIM = Claim(
    key="edm",
    paper="2206.00364",
    headline="CIFAR-10 FID 1.97 at 35 NFE, deterministic",
    miniature="Eight narrow modes in the plane; a small network trained for 1500 steps of 256 points, with one part of "
    "EDM replaced at a time, each at its own learning rate, and 18 Heun steps. Then the solvers alone, on the exact "
    "denoiser, from the same noise.",
    measure="energy distance x 1000; of solvers, RMS error of end points",
    cost="NFE per sample",
    run=run,
    checks=(
        lower("with EDM's wrapper it is better than with VP's", "EDM", "VP's wrapper"),
        lower("with EDM's weight it is better than with 1 / sigma^2", "EDM", "weight 1 / sigma^2"),
        lower("with EDM's noise law it is better than with VE's", "EDM", "VE's noise law"),
        times(
            "at 71 calls Heun's error is below Euler's on the same grid",
            "Heun, rho = 7, 71 calls",
            "Euler, rho = 7, 71 calls",
        ),
        times(
            "at 35 calls Heun's error on the rho = 7 grid is below that on uniform steps",
            "Heun, rho = 7, 35 calls",
            "Heun, uniform in sigma, 35 calls",
        ),
    ),
)
