"""Uni-Instruct: what each divergence makes of a generator that cannot fit all modes, in the plane (2505.20755)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, lower
from imagewright.bench.claims.plane import distance
from imagewright.bench.claims.rings import circle
from imagewright.bench.claims.trial import Trial
from imagewright.methods.distribution_matching import KarrasLevels
from imagewright.methods.uni_instruct import NAMED, UniInstruct
from imagewright.models.generator import FewStepGenerator
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, Event, Frozen, Parts, Trained

SIGMA_DATA, START_SIGMA = 0.7, 2.5
STD = 0.2
"""Of a mode; the modes' centres are 1.7 apart."""
START_STD = 0.7
"""Of the generator before training."""
WITHIN, REACH = 3.0, 2.0
"""A point is on a mode within 3 of its deviations, and in the generator's reach within 2 of its (86% of its points)."""
PRECISION, FORWARD, REVERSE = "precision", "KL(data, generator)", "KL(generator, data)"
UPDATES, LR = 600, 1e-2
RECIPE, WHOLE = "recipe", "whole gradient"


@dataclass(frozen=True, kw_only=True)
class Known(UniInstruct):
    """Updates of the generator alone: its own law is known."""

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        yield self.generator_update(parts, batch, noise)


def known(method: UniInstruct) -> Known:
    """A method's settings, but for its phases."""
    return Known(**{**vars(method), "fake_only_images": 0, "plain_images": 0})


DIVERGENCE: Mapping[str, Any] = {
    "normaliser": "integral",
    "scale": 1.0,
    "levels": KarrasLevels(sigma_min=0.03, sigma_max=20.0),
    "start_sigma": START_SIGMA,
}
"""The divergence itself, but for the levels below 0.03 and above 20."""
CONTENDERS: Mapping[str, Known] = {
    f"RKL, {RECIPE}": known(NAMED["uni_rkl"]),
    f"JKL, {RECIPE}": known(NAMED["uni_jkl"]),
    f"FKL, {RECIPE}": known(NAMED["uni_fkl"]),
    f"RKL, {WHOLE}": Known(alpha=0.5, **DIVERGENCE),
    f"JKL, {WHOLE}": Known(divergence="jeffreys", jeffreys=(0.4, 0.6), alpha=0.5, ratio_gradient=True, **DIVERGENCE),
    f"FKL, {WHOLE}": Known(divergence="fkl", ratio_gradient=True, **DIVERGENCE),
}


class Affine(nn.Module):
    """A network F(x) = W x + b, which makes a generator's law a normal; it starts round, at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        total = START_SIGMA**2 + SIGMA_DATA**2
        skipped = SIGMA_DATA**2 / total * START_SIGMA
        with torch.no_grad():
            self.linear.weight.copy_((START_STD - skipped) * total / (SIGMA_DATA * START_SIGMA**2) * torch.eye(2))
            self.linear.bias.zero_()

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, 2, 1, 1]; the noise label is ignored."""
        answer: Tensor = self.linear(x.flatten(1))
        return answer.reshape(x.shape)


def points_of(generator: FewStepGenerator, z: Tensor) -> Tensor:
    """Points [N, 2], float64, of latents [N, 2, 1, 1]."""
    with torch.no_grad():
        points = generator.start(START_SIGMA * z.float(), z.new_full((len(z),), START_SIGMA).float())
    return points.flatten(1).double()


def law_of(generator: FewStepGenerator) -> GaussianOracle:
    """An affine generator's law, exactly."""
    corners = points_of(generator, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).reshape(3, 2, 1, 1))
    linear = (corners[1:] - corners[0]).T
    return GaussianOracle(corners[0].reshape(2, 1, 1), cov=linear @ linear.T)


class ExactFake(nn.Module):
    """A fake network that is always right about the generator as it is now, and a discriminator that knows log r."""

    def __init__(self, generator: FewStepGenerator, oracle: GaussianMixture) -> None:
        super().__init__()
        self.pair = generator, oracle  # in a tuple: the generator is no part of this module

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`."""
        return law_of(self.pair[0])(x.double(), sigma.double()).to(x)

    def answer_and_judge(self, x: Tensor, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """As `methods.uni_instruct.answer_and_judge`, with one logit [N, 1]."""
        law, point, level = law_of(self.pair[0]), x.double(), sigma.double()
        ratio = self.pair[1].log_density(point, level) - law.log_density(point, level)
        return law(point, level).to(x), ratio[:, None].to(x)


def measured(name: str, generator: FewStepGenerator, trial: Trial, real: Tensor) -> Row:
    """Recall, precision, both divergences and the energy distance of a generator."""
    law, oracle, count = law_of(generator), trial.oracle, len(real)
    none = torch.zeros(count, dtype=torch.float64)
    points = points_of(generator, trial.z)
    drawn = points.reshape(count, 2, 1, 1)
    on_mode = torch.cdist(points, oracle.means.flatten(1)) < WITHIN * STD
    # In a normal law's density the distance from its centre, in its own deviations, can be read.
    top = law.log_density(law.mean[None], none[:1])
    reached = (2 * (top - law.log_density(real, none))).sqrt() < REACH
    more = {
        PRECISION: float(on_mode.any(1).double().mean()),
        FORWARD: float((oracle.log_density(real, none) - law.log_density(real, none)).mean()),
        REVERSE: float((law.log_density(drawn, none) - oracle.log_density(drawn, none)).mean()),
        "energy distance x 1000": distance(points.numpy(), real.flatten(1).numpy()),
    }
    return Row(name=name, score=float(reached.double().mean()), cost=UPDATES, more=more)


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Every setting after equally many updates from the same start, on the same noise."""
    updates, count = (UPDATES, 4000) if budget == "full" else (3, 200)
    oracle = GaussianMixture(circle(seed, 3), STD, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    trial, rows = Trial(seed=seed, oracle=oracle, count=count), []
    real = oracle.sample(count, StepNoise(seed + 1000, 2))
    for name, method in CONTENDERS.items():
        generator = FewStepGenerator(Affine(), sigma_max=START_SIGMA, sigma_data=SIGMA_DATA)
        fake = Frozen(module=ExactFake(generator, oracle))
        parts = Parts(generator=Trained(module=generator), teacher=trial.teacher, fake_score=fake)
        rows.append(measured(name, trial.trained(method, parts, updates, LR), trial, real))
    return rows


def checks_of(form: str, what: str) -> tuple[Check, ...]:
    """What is said of the divergences in a form of the loss."""
    forward, reverse = f"FKL, {form}", f"RKL, {form}"
    return (
        lower(f"{what}: recall is higher with forward than with reverse KL", reverse, forward),
        lower(f"{what}: precision is higher with reverse than with forward KL", forward, reverse, of=PRECISION),
        lower(f"{what}: forward KL ends lower where it is minimised", forward, reverse, of=FORWARD),
        lower(f"{what}: reverse KL ends lower where it is minimised", reverse, forward, of=REVERSE),
    )


CLAIM = Claim(
    key="uni_instruct",
    paper="2505.20755",
    headline="forward KL covers modes, reverse KL seeks them, Jeffreys' lies between; CIFAR-10 FID 1.46 without labels "
    "(Jeffreys), 1.38 with (forward KL), ImageNet-64 1.02, at 1 NFE (teachers 1.97, 1.79, 2.35 at 79 NFE)",
    miniature="Three modes of weights 0.5, 0.3 and 0.2 in the plane and an affine generator, whose law is a normal. "
    "Fake network and density ratio are exact for the generator as it is at each update. Reverse KL, Jeffreys' (0.4 "
    "forward, 0.6 reverse) and forward KL, each by the recipes' loss (the SIM piece, the ratio held fixed, mean "
    "|x - D_real| as normaliser, adversary) and by the whole gradient of the divergence; same start, noise, rate and "
    "number of updates. Recall: share of real points within 2 deviations of the generator's law; precision: share of "
    "its points within 3 deviations of a mode.",
    measure="recall",
    cost="generator updates",
    better="higher",
    run=run,
    checks=(*checks_of(RECIPE, "recipes' loss"), *checks_of(WHOLE, "whole gradient")),
)
