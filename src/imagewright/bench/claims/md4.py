"""MD4: trained by its bound, in continuous time, masked diffusion has the lowest bits; the cosine grid (2406.04329)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Claim, Row, lower, times
from imagewright.bench.claims.digits import CODEC, LEVELS, trained_tokens
from imagewright.bench.claims.maskgit import TOKENS, VALUES, between_laws, mixture, token_transformer
from imagewright.bench.claims.plane import seeded
from imagewright.data import from_uint8, open_images
from imagewright.methods.autoregressive import Autoregressive
from imagewright.methods.md4 import MD4
from imagewright.metrics.bits import spread_times
from imagewright.models.causal import CausalTokenModel
from imagewright.models.masked_diffusion import MaskedDiffusionModel
from imagewright.models.tokens import PixelCodec, TokenNetworkModel
from imagewright.networks import PixelUNet, PixelUNetConfig
from imagewright.noise import StepNoise
from imagewright.oracles import ProductMixture
from imagewright.samplers import Ancestral
from imagewright.training.config import OptimizerConfig
from imagewright.types import UNCONDITIONAL, Condition

BOUND = "digits, trained by the bound"
GRIDS = ("cosine", "uniform")
STEPS = (4, 8, 16, 32, 64)
"""Of samples."""
DISCRETE = (4, 16, 64)
"""T of discrete-time bounds."""
UPDATES = 300
"""Of MD4's network."""
CAUSAL_UPDATES = 285
"""Of the causal one: as many seconds."""
OPTIMIZER = OptimizerConfig(kind="adamw", lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
CAUSAL_LR = 6e-3
"""Each contender's rate is the best of 2e-3, 3e-3, 6e-3 and 12e-3 on seed 0."""


class Conditionals(nn.Module):
    """The exact answers, as a network."""

    def __init__(self, source: ProductMixture) -> None:
        super().__init__()
        self.source = source

    def forward(self, tokens: Tensor, time: Tensor | None = None, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.source.conditionals(tokens)


def on_oracle(seed: int, count: int) -> list[Row]:
    """How far -ln p of samples is from that of the source's own, in nats, as a law: the sampler alone."""
    source = mixture(seed)
    real = -source.log_prob(source.sample(count, StepNoise(seed, 1000)))
    model = MaskedDiffusionModel(Conditionals(source), PixelCodec(4, 2, VALUES))
    unknown = torch.full((count, TOKENS), VALUES)

    def drawn(grid: str, steps: int) -> Row:
        tokens = Ancestral(num_steps=steps, grid=grid).fill(model, unknown, noise=StepNoise(seed, 1002))
        return Row(name=f"samples, {grid} grid, T = {steps}", score=between_laws(-source.log_prob(tokens), real),
                   cost=steps, curve=f"samples, {grid} grid")  # fmt: skip

    again = -source.log_prob(source.sample(count, StepNoise(seed, 1001)))
    floor = Row(name="samples, the source itself", score=between_laws(again, real), cost=0)
    return [floor, *(drawn(grid, steps) for grid in GRIDS for steps in STEPS)]


def pixel_network(seed: int) -> nn.Module:
    """The recipe md4-digits's network, one block in place of two."""
    sizes = {"img_resolution": 8, "in_channels": 1, "values": LEVELS, "label_dim": 10}
    return seeded(seed, lambda: PixelUNet(PixelUNetConfig(model_channels=32, num_blocks=1, **sizes)))


def bound(trained: nn.Module, schedule: str, steps: int | None, seed: int, passes: int) -> float:
    """The bound on held-out digits in bits per pixel: the network of a trained model, told by a schedule."""
    held = open_images("digits", split="test")
    assert isinstance(trained, TokenNetworkModel)
    model = MaskedDiffusionModel(trained.network, CODEC, schedule).eval()
    tokens, cond = model.codec.encode(from_uint8(held.images())), Condition(label=torch.as_tensor(held.labels))
    nats = 0.0
    for r in range(passes):
        times = spread_times(len(tokens), seed, r)
        with torch.no_grad():
            nats += float(model.nll(tokens, cond, noise=StepNoise(seed, r), times=times, steps=steps).mean())
    return nats / (passes * model.codec.length * math.log(2))


def likelihood(model: nn.Module) -> float:
    """The causal model's own bits per pixel of held-out digits."""
    assert isinstance(model, CausalTokenModel)
    held = open_images("digits", split="test")
    tokens = model.codec.encode(from_uint8(held.images()))
    with torch.no_grad():
        nats = model.nll(tokens, Condition(label=torch.as_tensor(held.labels)))
    return float(nats.mean()) / (model.codec.length * math.log(2))


def on_digits(seed: int, full: bool) -> list[Row]:
    """Held-out bits per pixel of both; the cost is the number of updates."""
    updates, causal_updates, passes = (UPDATES, CAUSAL_UPDATES, 16) if full else (2, 2, 2)
    ours = trained_tokens(MD4(), pixel_network(seed), seed, updates, OPTIMIZER, channels_last=True)
    network = token_transformer(seed, causal=True)  # 107 thousand parameters; the other has 149 thousand
    at_best = replace(OPTIMIZER, lr=CAUSAL_LR)
    causal = trained_tokens(Autoregressive(), network, seed, causal_updates, at_best, channels_last=True)

    def row(name: str, score: float, cost: int) -> Row:
        return Row(name=f"digits, {name}", score=score, cost=cost)

    return [
        row("trained by the bound", bound(ours, "linear", None, seed, passes), updates),
        row("the same, cosine schedule", bound(ours, "cosine", None, seed, passes), updates),
        *(row(f"the same, T = {steps}", bound(ours, "linear", steps, seed, passes), updates) for steps in DISCRETE),
        row("causal", likelihood(causal), causal_updates),
    ]


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """The sampler alone, on exact answers; then trained models' bits."""
    full = budget == "full"
    return [*on_oracle(seed, 600 if full else 50), *on_digits(seed, full)]


CLAIM = Claim(
    key="md4",
    paper="2406.04329",
    headline="bits/dim 2.75 on CIFAR-10, 3.40 on ImageNet-64, better than autoregressive models of comparable size; "
    "the weighted cross-entropy is a bound, and continuous time the tightest; the cosine grid draws best",
    miniature="First the sampler alone: a mixture of 6 products, 32 tokens of 8 values, whose exact conditionals are "
    "the network; linear schedule. Then MD4's network on the 64 pixels of digits in 5 grey levels, and a causal "
    "transformer of two layers, trained on the same images in the same order for as many seconds; each at its own best "
    "rate. Bits of held-out digits.",
    measure="transport distance between the laws of -ln p of samples and source, nats; of the digits bits per pixel",
    cost="steps; of the digits updates",
    run=run,
    checks=(
        times(
            "at T = 8 samples on the cosine grid are nearer the source than on the uniform grid",
            "samples, cosine grid, T = 8",
            "samples, uniform grid, T = 8",
        ),
        lower("a trained model's bound is lower in continuous time than at T = 16", BOUND, "digits, the same, T = 16"),
        lower(
            "and the model has fewer bits than a causal transformer trained for as many seconds",
            BOUND,
            "digits, causal",
        ),
    ),
)
