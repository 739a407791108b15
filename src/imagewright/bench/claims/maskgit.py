"""MaskGIT: which masking schedule decodes best in few passes, on exact conditionals and on digits (2202.04200)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows
from imagewright.data import ImageSet, Loader, from_uint8, open_images, to_uint8
from imagewright.methods.maskgit import MaskGIT
from imagewright.metrics.evaluate import evaluate
from imagewright.metrics.features import digits_features
from imagewright.metrics.reference import Reference, embed
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import MixtureTokens, ProductMixture
from imagewright.samplers import MaskedDecoding
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.trainer import Trainer

COMPONENTS, TOKENS, VALUES = 6, 32, 8
CONCENTRATION = 0.1
"""Of the Dirichlet law of every row: small, so that a token tells much about the component."""
LEVELS = 5
"""Grey levels of the digits."""
PASSES = 8
DIVERSITY, RECALL, PRECISION = "diversity", "recall", "precision"
DECODERS: Mapping[str, MaskedDecoding] = {
    "cosine": MaskedDecoding(num_steps=PASSES),
    "linear": MaskedDecoding(num_steps=PASSES, schedule="linear"),
    "square root": MaskedDecoding(num_steps=PASSES, schedule="sqrt"),
    "one pass": MaskedDecoding(num_steps=1),
    "cosine, no Gumbel noise": MaskedDecoding(num_steps=PASSES, temperature=0.0),
    "cosine, random places": MaskedDecoding(num_steps=PASSES, choice="random"),
}


def mixture(seed: int) -> ProductMixture:
    """Six products of 32 distributions over 8 values, of equal weight."""
    rng = np.random.default_rng(seed)
    tables = torch.from_numpy(rng.dirichlet(np.full(VALUES, CONCENTRATION), (COMPONENTS, TOKENS)))
    tables = tables.clamp(min=1e-30)  # a value that underflowed to 0 would make a sequence impossible
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64)
    return ProductMixture(weights, tables / tables.sum(2, keepdim=True))


def diversity(tokens: Tensor) -> float:
    """Share of places in which two samples differ, the mean over all pairs; tokens: [N, L]."""
    n = len(tokens)
    counts = nn.functional.one_hot(tokens).sum(0).double()  # [L, V]
    return float(((n**2 - counts.square().sum(1)) / (n * (n - 1))).mean())


def on_oracle(seed: int, count: int) -> list[Row]:
    """-ln p of drawn sequences, less the entropy, in nats: 0 where the samples' distribution is the source's."""
    source = mixture(seed)
    model = MixtureTokens(source, PixelCodec(4, 2, VALUES))
    entropy, _ = source.entropy(50 * count, StepNoise(seed, 1))
    unknown = torch.full((count, TOKENS), VALUES)

    def row(name: str, decoder: MaskedDecoding) -> Row:
        drawn = decoder.fill(model, unknown, noise=StepNoise(seed, 2))
        excess = float(model.nll(drawn).mean()) - entropy
        return Row(name=name, score=excess, cost=decoder.nfe, more={DIVERSITY: diversity(drawn)})

    data = source.sample(count, StepNoise(seed, 3))
    true = Row(name="the source itself", score=float(model.nll(data).mean()) - entropy, cost=0,
               more={DIVERSITY: diversity(data)})  # fmt: skip
    return [true, *(row(name, decoder) for name, decoder in DECODERS.items())]


def trained(images: ImageSet, seed: int, steps: int) -> nn.Module:
    """A bidirectional transformer on the 64 tokens of the digits, its averaged weights."""
    batch = 64
    total = steps * batch
    config = TrainingConfig(
        total_images=total,
        batch=batch,
        seed=seed,
        optimizer=OptimizerConfig(
            kind="adamw", lr=2e-3, lr_ramp_images=total // 20, lr_cooldown_images=total // 2, weight_decay=0.045
        ),
        ema=EmaConfig(halflife_images=total / 40, rampup_ratio=None),
    )
    method = MaskGIT()
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        network = TokenTransformer(
            TokenTransformerConfig(
                values=LEVELS, length=64, label_dim=10, width=64, depth=3, heads=4, dropout=0.1, post_norm=False
            )
        )
        parts = method.parts(network=network, codec=PixelCodec(8, 1, LEVELS), spec=images.spec)
        trainer = Trainer(method, parts, Loader(images, batch, seed), config, Path(folder))
        for _ in range(steps):
            trainer.train_step()
    model = copy.deepcopy(trainer.learners["model"].module)
    model.load_state_dict(trainer.product_state())
    return model.eval()


def on_digits(seed: int, budget: Budget) -> list[Row]:
    """fd_digits against the digits in five levels, of one model's samples."""
    full = budget == "full"
    images = open_images("digits")
    codec, extractor = PixelCodec(8, 1, LEVELS), digits_features()
    whole = images.images()
    real = replace_pixels(images, to_uint8(codec.decode(codec.encode(from_uint8(whole)))))
    reference = embed(real, extractor)
    model = trained(images, seed, 1500 if full else 2)
    count = len(images) if full else 40

    def row(name: str, decoder: MaskedDecoding) -> Row:
        generator = ImageGenerator(model, images.spec, decoder)
        drawn = generator.generate(count, labels=images.labels[:count], seed=seed, batch_size=256)
        return measured(f"digits, {name}", drawn, reference, decoder.nfe)

    names = ("cosine", "linear", "square root", "one pass", "cosine, no Gumbel noise")
    return [row(name, DECODERS[name]) for name in names]
