"""Denoisers with learned discrete latents, DisCo-Diff (Xu et al. 2024, 2407.03300): the denoiser with its encoder, then
the prior of its latents, whose run makes one whole model of both.

Two runs, the second given the first (`--teacher runs/disco-digits`), or one chain of them, in a file:

    from imagewright.recipes.disco_diff import two_stages

    experiment = two_stages("disco-digits")

ImageNet-64: sizes, number of latents, dropout and the denoiser that it begins as are the paper's, as are EDM's
optimiser, noise levels and average. How long it is trained, and of the prior all but its sizes and Adam, the paper does
not say: a tenth of EDM's own length, and the prior's rate of 3e-4, dropout of 0.1, length and average are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.disco_diff import DiscoDiff, LatentPrior, Transformer
from imagewright.networks import TokenTransformerConfig
from imagewright.recipes import edm
from imagewright.samplers import Heun
from imagewright.training.chain import OF_STAGE, Chain, Stage
from imagewright.training.config import EmaConfig, OptimizerConfig
from imagewright.training.experiment import Experiment

SMALL = DiscoDiff(
    latents=4, values=16, patch=4, batch_norm=True, encoder=Transformer(width=64, depth=2, heads=2),
    told=Transformer(width=48, depth=2, heads=2),
)  # fmt: skip
FROM_DATA = {"values": 100, "length": 10, "channels": 10}
"""Placeholders: a run takes these from the latents."""


def digits() -> Experiment:
    """8x8 handwritten digits, four latents of 16 values: a few minutes on one core."""
    return replace(edm.digits(), method=SMALL)


def digits_prior() -> Experiment:
    """The prior of `runs/disco-digits`: under a minute."""
    return _prior(digits(), "runs/disco-digits", width=64, depth=2, heads=2, images=20_000)


def emoji64_32() -> Experiment:
    """Emoji at 32x32, ten latents of 32 values, from the shipped denoiser."""
    run = edm.emoji64_32()
    training = replace(
        run.training, total_images=64_000,
        optimizer=replace(run.training.optimizer, lr_decay_images=None, lr_cooldown_images=30_000),
    )  # fmt: skip
    method = replace(
        SMALL, latents=10, values=32, encoder=Transformer(width=128, depth=4, heads=4),
        told=Transformer(width=96, depth=2, heads=4),
    )  # fmt: skip
    return replace(run, method=method, training=training, start="emoji64-32")


def emoji64_32_prior() -> Experiment:
    """The prior of `runs/disco-emoji64-32`."""
    return _prior(emoji64_32(), "runs/disco-emoji64-32", width=128, depth=4, heads=4, images=100_000)


def imagenet64() -> Experiment:
    """ImageNet-64, from `runs/edm-imagenet64`: ten latents of 100 values, 109 M parameters more than ADM's."""
    return _published(edm.imagenet64(), DiscoDiff())


def imagenet64_hierarchical() -> Experiment:
    """The same with three groups of ten latents, one for each resolution with attention on the way up."""
    return _published(edm.imagenet64(), DiscoDiff(latents=30, groups=3))


def imagenet64_prior() -> Experiment:
    """The prior of `runs/disco-imagenet64`: 12 layers, 8 heads, width 512."""
    run = _prior(imagenet64(), "runs/disco-imagenet64", width=512, depth=12, heads=8, images=200_000_000)
    optimizer = OptimizerConfig(lr=3e-4, lr_ramp_images=1_000_000)
    return replace(run, training=replace(run.training, optimizer=optimizer, ema=edm.imagenet64().training.ema))


def imagenet64_hierarchical_prior() -> Experiment:
    """The prior of `runs/disco-imagenet64-hierarchical`."""
    return imagenet64_prior().giving(teacher="runs/disco-imagenet64-hierarchical")


def two_stages(recipe: str) -> Chain:
    """Both stages of one of this family's recipes; the second's model is the whole. Options: --prior.training.batch."""
    first = FAMILY[recipe]()
    prior = FAMILY[f"{recipe}-prior"]().giving(teacher=f"{OF_STAGE}denoiser")
    return Chain(Stage("denoiser", first), Stage("prior", prior))


def _published(run: Experiment, method: DiscoDiff) -> Experiment:
    training = replace(run.training, total_images=run.training.total_images // 10)
    return replace(run, method=method, sampler=Heun(num_steps=40), training=training, start="runs/edm-imagenet64")


def _prior(run: Experiment, teacher: str, *, width: int, depth: int, heads: int, images: int) -> Experiment:
    network = TokenTransformerConfig(
        **FROM_DATA, width=width, depth=depth, heads=heads, causal=True, post_norm=False, told_blocks=-1, dropout=0.1,
    )  # fmt: skip
    training = replace(
        run.training,
        total_images=images,
        channels_last=False,
        optimizer=OptimizerConfig(lr=2e-3, lr_ramp_images=0.05, lr_cooldown_images=0.5),
        ema=EmaConfig(halflife_images=images // 20, rampup_ratio=0.1),
        snapshot_images=images / 2,
        checkpoint_images=images / 2,
    )
    prior = replace(run, method=LatentPrior(), network=network, training=training, start=None)
    return prior.giving(teacher=teacher)


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "disco-digits": digits,
    "disco-digits-prior": digits_prior,
    "disco-emoji64-32": emoji64_32,
    "disco-emoji64-32-prior": emoji64_32_prior,
    "disco-imagenet64": imagenet64,
    "disco-imagenet64-prior": imagenet64_prior,
    "disco-imagenet64-hierarchical": imagenet64_hierarchical,
    "disco-imagenet64-hierarchical-prior": imagenet64_hierarchical_prior,
}
