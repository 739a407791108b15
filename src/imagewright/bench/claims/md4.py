"""MD4: one bound for every schedule, which grid draws best in few steps, and discrete time is dearer (2406.04329)."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.bench.claims.maskgit import TOKENS, VALUES, mixture
from imagewright.data import ImageSet, Loader, from_uint8, open_images
from imagewright.methods.md4 import MD4
from imagewright.metrics.bits import spread_times
from imagewright.models.masked_diffusion import MaskedDiffusionModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import PixelUNet, PixelUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import ProductMixture
from imagewright.samplers import Ancestral
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.trainer import Trainer
from imagewright.types import UNCONDITIONAL, Condition

SCHEDULES = {"linear": 1.0, "cosine": 1.0, "geometric": 1.0, "polynomial": 3.0}
"""Powers by name."""
GRIDS = ("cosine", "uniform")
STEPS = (8, 16, 32, 64, 128, 256)
"""Of samples."""
COARSE = (2, 4, 8, 16, 32, 64)
"""Of discrete-time bounds."""
LEVELS = 5
"""Grey levels of the digits."""
ERROR = "standard error"


class Conditionals(nn.Module):
    """The exact answers, as a network."""

    def __init__(self, source: ProductMixture) -> None:
        super().__init__()
        self.source = source

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.source.conditionals(tokens)


def bound(
    model: MaskedDiffusionModel, tokens: Tensor, cond: Condition, seed: int, passes: int, steps: int | None = None
) -> tuple[Tensor, float]:
    """The bound's mean over passes for each sequence [N], in nats, and the standard error of the mean over all."""
    found = []
    for r in range(passes):
        times = spread_times(len(tokens), seed, r)
        with torch.no_grad():
            found.append(model.nll(tokens, cond, noise=StepNoise(seed, r), times=times, steps=steps))
    nats = torch.stack(found)
    return nats.mean(0), float(nats.mean(1).std()) / math.sqrt(passes)


def on_oracle(seed: int, count: int, passes: int) -> list[Row]:
    """Bounds less the exact -ln p of the same sequences; -ln p of samples less the entropy; nats."""
    source = mixture(seed)
    codec = PixelCodec(4, 2, VALUES)
    data = source.sample(count, StepNoise(seed, 1000))
    exact = -source.log_prob(data)
    entropy, _ = source.entropy(20 * count, StepNoise(seed, 1001))

    def excess(schedule: str, steps: int | None) -> Row:
        model = MaskedDiffusionModel(Conditionals(source), codec, schedule, SCHEDULES[schedule])
        nats, error = bound(model, data, UNCONDITIONAL, seed, passes, steps)
        name = f"bound, {schedule}" + ("" if steps is None else f", T = {steps}")
        return Row(name=name, score=float((nats - exact).mean()), cost=steps or 0, more={ERROR: error},
                   curve=None if steps is None else "bound")  # fmt: skip

    def drawn(grid: str, steps: int) -> Row:
        model = MaskedDiffusionModel(Conditionals(source), codec)
        unknown = torch.full((count // 2, TOKENS), VALUES)
        nats = -source.log_prob(Ancestral(num_steps=steps, grid=grid).fill(model, unknown, noise=StepNoise(seed, 1002)))
        error = float(nats.std()) / math.sqrt(len(nats))
        return Row(name=f"samples, {grid} grid, T = {steps}", score=float(nats.mean()) - entropy, cost=steps,
                   curve=f"samples, {grid} grid", more={ERROR: error})  # fmt: skip

    continuous = [excess(schedule, None) for schedule in SCHEDULES]
    discrete = [excess("linear", steps) for steps in COARSE]
    return [*continuous, *discrete, *(drawn(grid, steps) for grid in GRIDS for steps in STEPS)]


def trained(images: ImageSet, seed: int, updates: int) -> MaskedDiffusionModel:
    """MD4's network on the 64 tokens of the digits, its averaged weights."""
    batch = 64
    total = updates * batch
    config = TrainingConfig(
        total_images=total,
        batch=batch,
        seed=seed,
        channels_last=True,
        optimizer=OptimizerConfig(
            kind="adamw", lr=3e-3, lr_ramp_images=total // 20, lr_cooldown_images=total // 2, betas=(0.9, 0.99),
            weight_decay=0.01,
        ),
        ema=EmaConfig(halflife_images=total / 40, rampup_ratio=None),
    )  # fmt: skip
    method = MD4()
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        network = PixelUNet(
            PixelUNetConfig(
                img_resolution=8, in_channels=1, values=LEVELS, label_dim=10, model_channels=32, num_blocks=1
            )
        )
        parts = method.parts(network=network, codec=PixelCodec(8, 1, LEVELS), spec=images.spec)
        trainer = Trainer(method, parts, Loader(images, batch, seed), config, Path(folder))
        for _ in range(updates):
            trainer.train_step()
    model = copy.deepcopy(trainer.learners["model"].module)
    model.load_state_dict(trainer.product_state())
    assert isinstance(model, MaskedDiffusionModel)
    return model.eval()


def on_digits(seed: int, updates: int, passes: int) -> list[Row]:
    """Bounds of one trained model on held-out digits, in nats an image; most passes where two rows are compared."""
    model = trained(open_images("digits"), seed, updates)
    held = open_images("digits", split="test")
    tokens = model.codec.encode(from_uint8(held.images()))
    cond = Condition(label=torch.as_tensor(held.labels))

    def row(schedule: str, steps: int | None, passes: int) -> Row:
        told = MaskedDiffusionModel(model.network, PixelCodec(8, 1, LEVELS), schedule).eval()
        nats, error = bound(told, tokens, cond, seed, passes, steps)
        name = f"digits, {schedule}, " + ("continuous" if steps is None else f"T = {steps}")
        return Row(name=name, score=float(nats.mean()), cost=steps or 0, more={ERROR: error})

    return [row("linear", None, 3 * passes), row("linear", 16, 2 * passes), row("cosine", None, passes)]


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """The bound and the sampler alone, on exact answers; then a trained model's."""
    full = budget == "full"
    on_exact = on_oracle(seed, 4000 if full else 50, 25 if full else 2)
    return [*on_exact, *on_digits(seed, 300 if full else 2, 60 if full else 2)]


def near(rows: Rows, a: str, b: str | None = None) -> bool:
    """Whether two scores (or one and 0) differ by less than four standard errors."""
    one, error = rows[a].score, rows[a].more[ERROR]
    if b is not None:
        one, error = one - rows.score(b), math.hypot(error, rows[b].more[ERROR])
    return abs(one) < 4 * error


def falls(rows: Rows) -> bool:
    """Whether every doubling of T lowers the bound, and none goes below the exact value by more than chance."""
    scores = [rows[f"bound, linear, T = {steps}"] for steps in COARSE]
    return all(b.score < a.score for a, b in pairwise(scores)) and scores[-1].score > -4 * scores[-1].more[ERROR]


CLAIM = Claim(
    key="md4",
    paper="2406.04329",
    headline="bits/dim 2.75 on CIFAR-10, 3.40 on ImageNet-64 from a bound that is the same for every schedule; the "
    "cosine grid draws best with the linear schedule",
    miniature="First bound and sampler alone: a mixture of 6 products, 32 tokens of 8 values, whose exact conditionals "
    "are the network. Then MD4's network on the 64 pixels of digits in 5 grey levels, the same weights in every row; "
    "held-out digits.",
    measure="excess in nats: of bounds over the exact -ln p, of samples' -ln p over the entropy; of the digits the "
    "bound itself",
    cost="steps T; 0 = continuous time",
    run=run,
    checks=(
        Check(
            says="with exact answers the continuous-time bound is -ln p for every schedule, within 4 standard errors",
            holds=lambda r: all(near(r, f"bound, {schedule}") for schedule in SCHEDULES),
        ),
        Check(says="the discrete-time bound falls with every doubling of T, and not below -ln p", holds=falls),
        Check(
            says="at T = 8 samples on the cosine grid are nearer the entropy than on the uniform grid",
            holds=lambda r: abs(r.score("samples, cosine grid, T = 8")) < abs(r.score("samples, uniform grid, T = 8")),
        ),
        Check(
            says="and at T = 256 each grid's distance is below a tenth of its own at T = 8",
            holds=lambda r: all(
                abs(r.score(f"samples, {grid} grid, T = 256")) < 0.1 * r.score(f"samples, {grid} grid, T = 8")
                for grid in GRIDS
            ),
        ),
        Check(
            says="a trained model's continuous-time bound is below its own discrete one at T = 16",
            holds=lambda r: r.score("digits, linear, continuous") < r.score("digits, linear, T = 16"),
        ),
        Check(
            says="and the same for the cosine schedule, within 4 standard errors",
            holds=lambda r: near(r, "digits, linear, continuous", "digits, cosine, continuous"),
        ),
    ),
)
