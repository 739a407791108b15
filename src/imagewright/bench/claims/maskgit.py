"""MaskGIT: which masking schedule decodes best in few passes, on exact conditionals and on digits (2202.04200)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Claim, Row, lower, times
from imagewright.bench.claims.digits import CODEC, LEVELS, trained_tokens
from imagewright.bench.claims.plane import seeded
from imagewright.data import from_uint8, open_images, to_uint8
from imagewright.methods.maskgit import MaskGIT
from imagewright.metrics.features import digits_features
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.neighbours import neighbourhood
from imagewright.metrics.statistics import moments_of
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import StepNoise
from imagewright.oracles import MixtureTokens, ProductMixture
from imagewright.samplers import MaskedDecoding
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import OptimizerConfig

COMPONENTS, TOKENS, VALUES = 6, 32, 8
CONCENTRATION = 0.1
"""Of the Dirichlet law of every row: small, so that a token tells much about the component."""
PASSES = 8
STEPS = 300
"""Of the transformer's training, 32 images each."""
DRAWN = 500
"""Digits of each decoder; of the mixture twice as many."""
EXCESS, DIVERSITY, RECALL, PRECISION = "excess", "diversity", "recall", "precision"
SCHEDULES = ("cosine", "linear", "sqrt")
ON_ORACLE: Mapping[str, float] = {"cosine": 20.0, "linear": 1.0, "sqrt": 0.0}
ON_DIGITS: Mapping[str, float] = {"cosine": 0.0, "linear": 0.0, "sqrt": 0.0}
"""Each schedule's own best temperature: for the mixture of 0 to 45 on seeds 0 to 2; for digits of 0, 1 and 4.5 on
seed 0, where the distance rises with it."""
PUBLISHED = 4.5
OPTIMIZER = OptimizerConfig(kind="adamw", lr=2e-3, weight_decay=0.045)
SOURCE, SURE = "the source itself", "cosine, no Gumbel noise"


def decoders(temperatures: Mapping[str, float]) -> dict[str, MaskedDecoding]:
    """The contenders, by name."""

    def decoder(schedule: str, temperature: float) -> MaskedDecoding:
        return MaskedDecoding(num_steps=PASSES, schedule=schedule, temperature=temperature)

    found = {name: decoder(name, temperature) for name, temperature in temperatures.items()}
    found |= {f"{name}, published noise": decoder(name, PUBLISHED) for name in temperatures}
    return found | {"one pass": MaskedDecoding(num_steps=1)}


def mixture(seed: int) -> ProductMixture:
    """Six products of 32 distributions over 8 values, of equal weight."""
    rng = np.random.default_rng(seed)
    tables = torch.from_numpy(rng.dirichlet(np.full(VALUES, CONCENTRATION), (COMPONENTS, TOKENS)))
    tables = tables.clamp(min=1e-30)  # a value that underflowed to 0 would make a sequence impossible
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64)
    return ProductMixture(weights, tables / tables.sum(2, keepdim=True))


def between_laws(drawn: Tensor, real: Tensor) -> float:
    """The transport distance of two sets of as many numbers [N]: 0 where both come from one law."""
    return float((drawn.sort().values - real.sort().values).abs().mean())


def diversity(tokens: Tensor) -> float:
    """Share of places in which two samples differ, the mean over all pairs; tokens: [N, L]."""
    n = len(tokens)
    counts = nn.functional.one_hot(tokens).sum(0).double()  # [L, V]
    return float(((n**2 - counts.square().sum(1)) / (n * (n - 1))).mean())


def on_oracle(seed: int, count: int, temperatures: Mapping[str, float] = ON_ORACLE) -> list[Row]:
    """How far -ln p of drawn sequences is from that of the source's own, in nats, as a law; and in the mean."""
    source = mixture(seed)
    model = MixtureTokens(source, PixelCodec(4, 2, VALUES))
    real = model.nll(source.sample(count, StepNoise(seed, 1)))
    unknown = torch.full((count, TOKENS), VALUES)

    def row(name: str, tokens: Tensor, passes: int) -> Row:
        nats = model.nll(tokens)
        more = {EXCESS: float((nats - real).mean()), DIVERSITY: diversity(tokens)}
        return Row(name=name, score=between_laws(nats, real), cost=passes, more=more)

    more = {
        SURE: MaskedDecoding(num_steps=PASSES, temperature=0.0),
        "cosine, random places": MaskedDecoding(num_steps=PASSES, choice="random"),
    }
    rows = [row(SOURCE, source.sample(count, StepNoise(seed, 3)), 0)]
    for name, decoder in (decoders(temperatures) | more).items():
        rows.append(row(name, decoder.fill(model, unknown, noise=StepNoise(seed, 2)), decoder.num_steps))
    return rows


def token_transformer(seed: int, causal: bool, **more: Any) -> nn.Module:
    """A transformer of two layers on the 64 tokens of the digits, untrained."""
    sizes = {"values": LEVELS, "length": 64, "label_dim": 10, "width": 64, "depth": 2, "heads": 4}
    config = TokenTransformerConfig(dropout=0.0, causal=causal, post_norm=False, **sizes, **more)
    return seeded(seed, lambda: TokenTransformer(config))


def on_digits(seed: int, budget: Budget, temperatures: Mapping[str, float] = ON_DIGITS) -> list[Row]:
    """fd_digits of one model's samples, against the digits in five levels."""
    updates, count = (STEPS, DRAWN) if budget == "full" else (2, 40)
    images, extractor = open_images("digits"), digits_features()
    real, _ = extractor(to_uint8(CODEC.decode(CODEC.encode(from_uint8(images.images())))))
    network = token_transformer(seed, causal=False, mlp_ratio=2.0)
    model = trained_tokens(MaskGIT(), network, seed, updates, OPTIMIZER)

    def row(name: str, decoder: MaskedDecoding) -> Row:
        generator = ImageGenerator(model, images.spec, decoder)
        drawn = generator.generate(count, labels=images.labels[:count], seed=seed, batch_size=250)
        features, _ = extractor(drawn)
        found = neighbourhood(real, features)
        distance = frechet_distance(moments_of(features), moments_of(real))
        return Row(name=f"digits, {name}", score=distance, cost=decoder.nfe,
                   more={PRECISION: found.precision, RECALL: found.recall})  # fmt: skip

    return [row(name, decoder) for name, decoder in decoders(temperatures).items()]


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """The decoder alone, on exact conditionals; then with a trained model."""
    return [*on_oracle(seed, 2 * DRAWN if budget == "full" else 100), *on_digits(seed, budget)]


CLAIM = Claim(
    key="maskgit",
    paper="2202.04200",
    headline="ImageNet-256 FID 6.18 in 8 passes (VQGAN 15.8 in 256); concave masking schedules, cosine best, above "
    "linear and convex ones",
    miniature="First the decoder alone: a mixture of 6 products, 32 tokens of 8 values, whose exact conditionals are "
    "the network. Then a transformer of two layers on the 64 pixels of digits in 5 grey levels, the same weights for "
    "every decoder. Each schedule has its own best temperature of the noise on the confidence; published is 4.5. "
    "Diversity: the share of places in which two samples differ; excess: mean -ln p over that of the source.",
    measure="transport distance between the laws of -ln p of samples and source, nats; of the digits fd_digits",
    cost="NFE per sample",
    run=run,
    checks=(
        times(
            "on exact conditionals at 8 passes the cosine is nearer the source than linear masking", "cosine", "linear"
        ),
        times("and linear masking nearer than the square root, a convex schedule", "linear", "sqrt"),
        times("and keeping the surest tokens nearer than keeping random ones", "cosine", "cosine, random places"),
        lower(
            "without Gumbel noise samples are more probable than the source's, by a nat",
            SURE,
            SOURCE,
            of=EXCESS,
            by=1.0,
        ),
        lower("and less diverse", SURE, SOURCE, of=DIVERSITY),
        lower("on digits the cosine's distance is below that of linear masking", "digits, cosine", "digits, linear"),
        lower("and that of linear masking below the square root's", "digits, linear", "digits, sqrt"),
        lower("and the cosine's recall above the square root's", "digits, sqrt", "digits, cosine", of=RECALL),
        times("and the cosine's distance below a quarter of one pass's", "digits, cosine", "digits, one pass", by=4.0),
    ),
)
