"""Uni-Instruct: nearer than the methods that it contains, and what each divergence makes of a generator that cannot fit
all modes (2505.20755)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Effect, Row, how_many_times
from imagewright.bench.claims.matching import (
    Contender,
    made,
    on_a_circle,
    passes,
    start_of,
    steps_for,
    taught,
    wide_modes,
    widened,
)
from imagewright.bench.claims.plane import distance, latents, real_points
from imagewright.bench.claims.plane_training import ExactTeacher, PointRun, distil, mixture_points
from imagewright.methods.distribution_matching import KarrasLevels
from imagewright.methods.uni_instruct import NAMED, UniInstruct
from imagewright.models.generator import FewStepGenerator
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture, GaussianOracle
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, Event, Frozen, Parts, Trained

# --- the contest: networks that learn ---------------------------------------------------------------------------------

WIDTH, DEPTH = 64, 3
SIGMA_DATA = 0.85
BIAS = 1.6
"""Factor on the variance of every component of the teacher."""
PASSES = 5_000
"""Of networks over one point, times the batch: what each contender may spend."""
BATCH = 256
BETAS = (0.0, 0.999)
TEACHER = "teacher, 40 Heun steps"
NAMES = {
    "diff_instruct": "Diff-Instruct",
    "sim": "SIM",
    "sid": "SiD",
    "uni_rkl": "Uni-Instruct, RKL",
    "uni_jkl": "Uni-Instruct, JKL",
    "uni_fkl": "Uni-Instruct, FKL",
}
CONTENDERS: Mapping[str, Contender] = {
    name: Contender(method=NAMED[key], lr=1e-3, betas=BETAS) for key, name in NAMES.items()
}


def contest(seed: int, afford: float, warm: int, count: int, contenders: Mapping[str, Contender]) -> list[Row]:
    """Energy distance to the truth of generators that a biased teacher taught, at equal cost."""
    oracle = wide_modes(seed)
    teacher = widened(oracle, BIAS)
    start = start_of(teacher, WIDTH, DEPTH, seed, warm, SIGMA_DATA)
    truth, z = real_points(oracle, seed + 1000, 2 * count), latents(seed + 2000, count)
    drawn = Heun(num_steps=40)(teacher, z).flatten(1).numpy()
    rows = [
        Row(name="real points", score=distance(real_points(oracle, seed + 3000, count), truth), cost=0),
        Row(name=TEACHER, score=distance(drawn, truth), cost=0),
    ]
    for name, contender in contenders.items():
        method = contender.method
        assert isinstance(method, UniInstruct)
        step = passes(method)
        steps = steps_for(afford, step)
        total = steps * BATCH
        if method.plain_images:  # the recipes' shares of a run
            method = replace(method, fake_only_images=total // 10, plain_images=total // 5)
        pace = PointRun(
            batch=BATCH, iterations=steps, seed=seed, ema=EmaConfig(halflife_images=total / 10, rampup_ratio=0.1)
        )
        generator = taught(replace(contender, method=method), start, teacher, oracle, pace)
        rows.append(Row(name=name, score=distance(made(generator, z), truth), cost=steps * step))
    return rows


# --- the divergences: an affine generator, and a fake network and a ratio that are always right

FIT, START_SIGMA = 0.7, 2.5
STD = 0.2
"""Of a mode; the modes' centres are 1.7 apart."""
START_STD = 0.7
"""Of the generator before training."""
WITHIN, REACH = 3.0, 2.0
"""A point is on a mode within 3 of its deviations, and in the generator's reach within 2 of its (86% of its points)."""
RECALL, PRECISION, FORWARD, REVERSE = "recall", "precision", "KL(data, generator)", "KL(generator, data)"


@dataclass(frozen=True, kw_only=True)
class Known(UniInstruct):
    """Updates of the generator alone: its own law is known."""

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        yield self.generator_update(parts, batch, noise)


def known(method: UniInstruct) -> Known:
    """A method's settings, but for its phases."""
    settings = {**vars(method), "fake_only_images": 0, "plain_images": 0}
    return Known(**settings)


WHOLE: Mapping[str, Any] = {
    "normaliser": "integral",
    "scale": 1.0,
    "levels": KarrasLevels(sigma_min=0.03, sigma_max=20.0),
    "start_sigma": START_SIGMA,
}
"""The divergence itself, but for the levels below 0.03 and above 20."""
AFFINE: Mapping[str, Known] = {
    "affine, RKL": known(NAMED["uni_rkl"]),
    "affine, JKL": known(NAMED["uni_jkl"]),
    "affine, FKL": known(NAMED["uni_fkl"]),
    "affine, RKL, whole gradient": Known(alpha=0.5, **WHOLE),
    "affine, JKL, whole gradient": Known(
        divergence="jeffreys", jeffreys=(0.4, 0.6), alpha=0.5, ratio_gradient=True, **WHOLE
    ),
    "affine, FKL, whole gradient": Known(divergence="fkl", ratio_gradient=True, **WHOLE),
}


class Affine(nn.Module):
    """A network F(x) = W x + b, which makes a generator's law a normal; it starts round, at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        total = START_SIGMA**2 + FIT**2
        skipped = FIT**2 / total * START_SIGMA
        with torch.no_grad():
            self.linear.weight.copy_((START_STD - skipped) * total / (FIT * START_SIGMA**2) * torch.eye(2))
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


def measured(name: str, generator: FewStepGenerator, oracle: GaussianMixture, seed: int, count: int) -> Row:
    """Energy distance, recall, precision and both divergences of a generator."""
    law, none = law_of(generator), torch.zeros(count, dtype=torch.float64)
    points, real = points_of(generator, latents(seed + 2000, count)), oracle.sample(count, StepNoise(seed + 1000, 2))
    drawn = points.reshape(count, 2, 1, 1)
    on_mode = torch.cdist(points, oracle.means.flatten(1)) < WITHIN * STD
    # In a normal law's density the distance from its centre, in its own deviations, can be read.
    top = law.log_density(law.mean[None], none[:1])
    reached = (2 * (top - law.log_density(real, none))).sqrt() < REACH
    more = {
        RECALL: float(reached.double().mean()),
        PRECISION: float(on_mode.any(1).double().mean()),
        FORWARD: float((oracle.log_density(real, none) - law.log_density(real, none)).mean()),
        REVERSE: float((law.log_density(drawn, none) - oracle.log_density(drawn, none)).mean()),
    }
    return Row(name=name, score=distance(points.numpy(), real.flatten(1).numpy()), cost=0, more=more)


def divergences(seed: int, iterations: int, count: int, methods: Mapping[str, Known], lr: float = 1e-2) -> list[Row]:
    """What every divergence makes of an affine generator and three narrow modes of weights 0.5, 0.3 and 0.2."""
    oracle, rows = GaussianMixture(on_a_circle(seed), STD, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)), []
    for name, method in methods.items():
        generator = FewStepGenerator(Affine(), sigma_max=START_SIGMA, sigma_data=FIT)
        parts = Parts(
            generator=Trained(module=generator),
            teacher=Frozen(module=ExactTeacher(oracle)),
            fake_score=Frozen(module=ExactFake(generator, oracle)),
        )
        product = distil(
            method, parts, mixture_points(oracle), PointRun(iterations=iterations, batch=256, lr=lr, seed=seed)
        )
        assert isinstance(product, FewStepGenerator)
        rows.append(measured(name, product, oracle, seed, count))
    return rows


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Both halves of the claim."""
    if budget == "smoke":
        return [*contest(seed, 40, 3, 50, CONTENDERS), *divergences(seed, 3, 200, AFFINE)]
    return [*contest(seed, PASSES, 250, 4000, CONTENDERS), *divergences(seed, 300, 4000, AFFINE)]


def higher(number: str, ours: str, theirs: str) -> Effect:
    """The effect "a further number of ours minus theirs"."""
    return lambda rows: rows[ours].more[number] - rows[theirs].more[number]


BEST = NAMES["uni_jkl"]
CLAIM = Claim(
    key="uni_instruct",
    paper="2505.20755",
    headline="CIFAR-10 FID 1.46 without labels (Jeffreys; SiD 1.92, Diff-Instruct 4.53), ImageNet-64 1.02, at 1 NFE "
    "(teachers 1.97 and 2.35 at 79 NFE)",
    miniature="First half: three wide modes in the plane, an exact teacher whose modes have 1.6 times the truth's "
    "variance, one-step generators from one start, the recipes' settings, equal cost in passes of all networks; rates "
    "searched for each on tuning seeds. Second half: three modes of weights 0.5, 0.3 and 0.2 and an affine generator, "
    "which cannot fit them; fake network and density ratio are exact at each update; the recipes' loss, and the whole "
    "gradient of the divergence. Recall: share of real points within 2 deviations of the generator's law; precision: "
    "share of its points within 3 deviations of a mode.",
    measure="energy distance to the truth x 1000",
    cost="passes of networks per point",
    run=run,
    checks=(
        *(
            Check(
                says=f"Uni-Instruct, JKL, is nearer to the truth than {NAMES[key]}",
                effect=how_many_times(BEST, NAMES[key]),
                scale="ratio",
            )
            for key in ("diff_instruct", "sim", "sid")
        ),
        Check(says="and than its teacher in 40 steps", effect=how_many_times(BEST, TEACHER), scale="ratio"),
        *(
            Check(says=f"affine, {what}: {number} is higher with {ours} than with {theirs}", effect=effect)
            for suffix, what in (("", "the recipes' loss"), (", whole gradient", "the whole gradient"))
            for number, ours, theirs in ((RECALL, "FKL", "RKL"), (PRECISION, "RKL", "FKL"))
            for effect in (higher(number, f"affine, {ours}{suffix}", f"affine, {theirs}{suffix}"),)
        ),
    ),
)
