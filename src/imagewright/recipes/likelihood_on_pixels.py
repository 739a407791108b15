"""Likelihood on pixels with less than all pairs of places: Axial (1912.12180), Sparse (1904.10509) and Routing
Transformer (2003.05997), Perceiver AR (2202.07765).

The small recipes differ in network and loss alone, and are those of the causal baseline in data, length and batch. The
published ones have the released programs' settings; where a program leaves out how long it ran, that is said.
ImageNet-64 is the old set (docs/tokens.md), without classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.data.config import DataConfig
from imagewright.methods.autoregressive import Autoregressive
from imagewright.methods.axial_transformer import AxialLikelihood
from imagewright.methods.perceiver_ar import PerceiverLikelihood
from imagewright.methods.routing_transformer import RoutingLikelihood
from imagewright.networks import (
    AxialTransformerConfig,
    PerceiverARConfig,
    RoutingTransformerConfig,
    SparseTransformerConfig,
)
from imagewright.networks.config import NetworkConfig
from imagewright.recipes import autoregressive
from imagewright.recipes.published import halflife_images
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

TOKENS: dict[str, Any] = {**autoregressive.FROM_DATA}
DIGITS: dict[str, Any] = {**TOKENS, "width": 64, "depth": 4, "heads": 4, "dropout": 0.1}
EMOJI: dict[str, Any] = {**TOKENS, "width": 128, "depth": 6, "heads": 4, "dropout": 0.1}
IMAGENET = 1_281_149
"""Training images of the old ImageNet-64."""


# --- small ------------------------------------------------------------------------------------------------------------


def _like(baseline: Experiment, method: Any, network: NetworkConfig) -> Experiment:
    return replace(baseline, method=method, network=network)


def axial_digits() -> Experiment:
    """Rows and columns of 8; minutes on one CPU thread, as all four."""
    sizes = {**DIGITS, "depth": 2, "mlp_ratio": 4.0, "encoder_depth": 0}
    return _like(autoregressive.digits(), AxialLikelihood(), AxialTransformerConfig(**sizes))


def sparse_digits() -> Experiment:
    """A row of 8 pixels is the stride."""
    network = SparseTransformerConfig(**DIGITS, layers=("strided", "local"))
    return _like(autoregressive.digits(), Autoregressive(), network)


def routing_digits() -> Experiment:
    """Two of four heads route, among 4 clusters of 16; local blocks of 8."""
    network = RoutingTransformerConfig(**DIGITS, routing_heads=2, clusters=4, block=8, decay=0.99)
    run = _like(autoregressive.digits(), RoutingLikelihood(), network)
    return replace(run, training=replace(run.training, optimizer=replace(run.training.optimizer, lr=1e-3)))


def perceiver_digits() -> Experiment:
    """16 latents of 64 places; one block of cross-attention and three of self-attention."""
    network = PerceiverARConfig(**{**DIGITS, "depth": 3}, latents=16)
    return _like(autoregressive.digits(), PerceiverLikelihood(), network)


def axial_emoji64_16() -> Experiment:
    """Channels one after the other, each of 16 x 16; hours on a CPU, as all four."""
    sizes = {**EMOJI, "depth": 2, "mlp_ratio": 4.0}
    return _like(autoregressive.emoji64_16(), AxialLikelihood(), AxialTransformerConfig(**sizes))


def sparse_emoji64_16() -> Experiment:
    """768 tokens, a row of 48 the stride."""
    network = SparseTransformerConfig(**EMOJI, layers=("strided", "local"))
    return _like(autoregressive.emoji64_16(), Autoregressive(), network)


def routing_emoji64_16() -> Experiment:
    """768 tokens, 16 clusters of 48, local blocks of 48."""
    network = RoutingTransformerConfig(**EMOJI, routing_heads=2, clusters=16, block=48, decay=0.99)
    return _like(autoregressive.emoji64_16(), RoutingLikelihood(), network)


def perceiver_emoji64_16() -> Experiment:
    """192 latents of 768 places."""
    network = PerceiverARConfig(**{**EMOJI, "depth": 5}, latents=192)
    return _like(autoregressive.emoji64_16(), PerceiverLikelihood(), network)


def _larger(run: Experiment, **network: Any) -> Experiment:
    """The same at 32x32: 3,072 tokens; a GPU's work."""
    base = autoregressive.emoji64_32()
    return replace(run, data=base.data, network=replace(run.network, **network), training=base.training)


def axial_emoji64_32() -> Experiment:
    """Channels one after the other, each of 32 x 32; a GPU's work, as all four."""
    return _larger(axial_emoji64_16())


def sparse_emoji64_32() -> Experiment:
    """3,072 tokens, a row of 96 the stride."""
    return _larger(sparse_emoji64_16())


def routing_emoji64_32() -> Experiment:
    """3,072 tokens, 32 clusters of 96, local blocks of 96."""
    return _larger(routing_emoji64_16(), clusters=32, block=96)


def perceiver_emoji64_32() -> Experiment:
    """384 latents of 3,072 places."""
    return _larger(perceiver_emoji64_16(), latents=384)


# --- as published -----------------------------------------------------------------------------------------------------


def _published(
    source: str, method: Any, network: NetworkConfig, total: int, batch: int, optimizer: OptimizerConfig,
    decay: float = 0.0, **training: Any,
) -> Experiment:  # fmt: skip
    return Experiment(
        data=DataConfig(source=source, labels=False),
        method=method,
        network=network,
        training=TrainingConfig(
            total_images=total,
            batch=batch,
            optimizer=optimizer,
            ema=EmaConfig(halflife_images=halflife_images(batch, decay) if decay else 0, rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=10_000 * batch,
            checkpoint_images=5_000 * batch,
            **training,
        ),
    )


def axial_imagenet64() -> Experiment:
    """ImageNet-64 as published, 3.44 bits/dim; the program does not say for how long: half a million steps here."""
    batch = 64
    return _published(
        "imagenet-64x64.zip",
        AxialLikelihood(),
        AxialTransformerConfig(**TOKENS, width=2048, depth=8, heads=16),
        500_000 * batch,
        batch,
        OptimizerConfig(lr=2e-4, lr_ramp_images=5_000 * batch, clip_norm=1.0),
        decay=0.99995,
    )


def axial_imagenet32() -> Experiment:
    """ImageNet-32 as published, 3.76 bits/dim; half a million steps, which the program leaves open."""
    run = axial_imagenet64()
    return replace(
        run,
        data=DataConfig(source="imagenet-32x32", labels=False),
        network=replace(run.network, width=1536, dropout=0.04),
        training=replace(run.training, optimizer=replace(run.training.optimizer, lr=1e-4)),
    )


def _sparse_optimizer(lr: float, decay: float, batch: int, total: int) -> OptimizerConfig:
    ramp = 15_000 * batch
    return OptimizerConfig(
        kind="adamw", lr=lr, lr_ramp_images=ramp, lr_cooldown_images=total - ramp, lr_cooldown_shape="cosine",
        weight_decay=decay, clip_norm=1.0,
    )  # fmt: skip


def sparse_cifar10() -> Experiment:
    """CIFAR-10 as released (c10-58m), 59 M parameters, 2.80 bits/dim; 8 cards of 2 images there.

    As many updates as 140 passes over the 48,000 images that the program learns from; it keeps 2,000 for validation.
    """
    batch, total = 16, 140 * 48_000
    network = SparseTransformerConfig(
        **TOKENS, width=256, depth=128, heads=2, mlp_ratio=2.0, key_ratio=0.5, dropout=0.25
    )
    optimizer = _sparse_optimizer(3.5e-4, 0.01, batch, total)
    return _published(
        "cifar10-32x32.zip",
        Autoregressive(),
        network,
        total,
        batch,
        optimizer,
        decay=0.999,
        precision="bf16",
        recompute=True,
    )


def sparse_imagenet64() -> Experiment:
    """ImageNet-64 as released (i64_150m), 152 M parameters, 3.44 bits/dim; the paper's 70 epochs, 32 cards of 4.

    The program keeps 50,000 of the training images for validation, and leaves its end open (10,000 epochs).
    """
    batch, total = 128, 70 * IMAGENET
    network = SparseTransformerConfig(
        **TOKENS, width=512, depth=48, heads=16, dropout=0.005, stride=128,
        layers=("local", "strided", "local", "local"),
    )  # fmt: skip
    optimizer = _sparse_optimizer(1.5e-4, 0.001, batch, total // batch * batch)
    return _published(
        "imagenet-64x64.zip", Autoregressive(), network, total // batch * batch, batch, optimizer, decay=0.999,
        precision="bf16", recompute=True,
    )  # fmt: skip


def _routing(source: str, network: RoutingTransformerConfig, batch: int) -> Experiment:
    # The program's "warm-up" of 10,000 steps is where its inverse square root begins: nothing rises before.
    optimizer = OptimizerConfig(kind="adafactor", lr=0.01, lr_decay_images=10_000 * batch)
    return _published(source, RoutingLikelihood(), network, 500_000 * batch, batch, optimizer)


def routing_cifar10() -> Experiment:
    """CIFAR-10 as released (cifar10_local_cluster); a batch of 16 and half a million steps are ours."""
    network = RoutingTransformerConfig(
        **TOKENS, width=1024, depth=12, heads=8, mlp_ratio=2.0, dropout=0.3, embedding_dropout=0.3, routing_heads=4,
        clusters=6, window=512, block=256,
    )  # fmt: skip
    return _routing("cifar10-32x32.zip", network, 16)


def routing_imagenet64() -> Experiment:
    """ImageNet-64 as released (imagenet_local_cluster), 3.43 bits/dim; the batch and half a million steps are ours."""
    network = RoutingTransformerConfig(
        **TOKENS, width=1024, depth=24, heads=16, mlp_ratio=2.0, dropout=0.3, embedding_dropout=0.3, routing_heads=4,
        clusters=8, window=2048, block=256,
    )  # fmt: skip
    return _routing("imagenet-64x64.zip", network, 128)


def perceiver_imagenet64() -> Experiment:
    """ImageNet-64 as released (imagenet_w_positions), 770 M parameters, 3.40 bits/dim.

    The paper's 750,000 steps; that the last 50,000 follow a cosine is a remark in the program.
    """
    batch, steps = 2048, 750_000
    network = PerceiverARConfig(**TOKENS, width=1024, depth=60, heads=16, dropout=0.1, latents=1024, stride=512)
    optimizer = OptimizerConfig(
        lr=3e-4, lr_ramp_images=10_000 * batch, lr_cooldown_images=50_000 * batch, lr_cooldown_shape="cosine",
        clip_norm=1.0,
    )  # fmt: skip
    return _published(
        "imagenet-64x64.zip",
        PerceiverLikelihood(),
        network,
        steps * batch,
        batch,
        optimizer,
        precision="bf16",
        recompute=True,
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "axial-digits": axial_digits,
    "axial-emoji64-16": axial_emoji64_16,
    "axial-emoji64-32": axial_emoji64_32,
    "axial-imagenet32": axial_imagenet32,
    "axial-imagenet64": axial_imagenet64,
    "sparse-digits": sparse_digits,
    "sparse-emoji64-16": sparse_emoji64_16,
    "sparse-emoji64-32": sparse_emoji64_32,
    "sparse-cifar10": sparse_cifar10,
    "sparse-imagenet64": sparse_imagenet64,
    "routing-digits": routing_digits,
    "routing-emoji64-16": routing_emoji64_16,
    "routing-emoji64-32": routing_emoji64_32,
    "routing-cifar10": routing_cifar10,
    "routing-imagenet64": routing_imagenet64,
    "perceiver-digits": perceiver_digits,
    "perceiver-emoji64-16": perceiver_emoji64_16,
    "perceiver-emoji64-32": perceiver_emoji64_32,
    "perceiver-imagenet64": perceiver_imagenet64,
}
