"""Finetuning by direct discriminative optimisation (Zheng et al. 2025, 2503.01103): a round, and rounds of self-play.

A round is given a model, `--reference`, and what it drew, `--negatives`. `self_play` makes a chain of rounds, each with
negatives of its own, of any of these recipes; in a file, for `imagewright train`:

    experiment = self_play("ddo-digits", rounds=2, n=5_000)

The published settings of the training are not known (no program of it is public): rates, lengths, alpha and beta here
are ours. Published are the networks, Heun's 18 steps on CIFAR-10 and 32 on ImageNet-64, and that a round is less than a
hundredth of the reference's own training. On ImageNet-64 the published reference is EDM2-S, whose noise levels are mean
-0.8 and std 1.6, and images for its score have classes in turn; the recipe's is EDM's own denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.config import DataConfig
from imagewright.methods.ddo import DDO
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Heun, Raster
from imagewright.training.chain import OF_STAGE, Chain, Stage
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment
from imagewright.training.self_play import DrawNegatives, KeepBest


def digits() -> Experiment:
    """A round on the run `runs/edm-digits`: a minute on one core, without the drawing."""
    return Experiment(
        data=DataConfig(source="digits"),
        method=DDO(),
        given={"reference": "runs/edm-digits", "negatives": "negatives/digits"},
        sampler=Heun(num_steps=18),
        training=TrainingConfig(
            total_images=6_400,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(lr=2e-5),
            ema=EmaConfig(halflife_images=1_000, rampup_ratio=0.1),
            log_images=640,
            snapshot_images=3_200,
            checkpoint_images=3_200,
            weights_images=1_600,
        ),
    )


def emoji64_32() -> Experiment:
    """A round on the shipped denoiser of emoji at 32x32."""
    run = digits()
    training = replace(run.training, total_images=3_200, batch=32, channels_last=False, log_images=320)
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        training=replace(training, checkpoint_images=1_600, weights_images=800),
    ).giving(reference="emoji64-32", negatives="negatives/emoji64-32")


def causal_digits() -> Experiment:
    """A round on the causal token model `runs/causal-digits`, by its exact likelihood."""
    run = digits()
    return replace(run, sampler=Raster(), training=replace(run.training, channels_last=False)).giving(
        reference="runs/causal-digits", negatives="negatives/causal-digits"
    )


def cifar10() -> Experiment:
    """CIFAR-10: a round on the run `runs/edm-cifar10`, 2,000 steps of 512."""
    return _images("cifar10-32x32.zip", "edm-cifar10", 512, 2_000, 18)


def imagenet64() -> Experiment:
    """ImageNet-64: a round on the run `runs/edm-imagenet64`, 2,000 steps of 2,048."""
    run = _images("imagenet-64x64.zip", "edm-imagenet64", 2048, 2_000, 32)
    return replace(run, training=replace(run.training, micro_batch=32, channels_last=True, precision="bf16"))


def _images(source: str, reference: str, batch: int, steps: int, calls: int) -> Experiment:
    return Experiment(
        data=DataConfig(source=source),
        method=DDO(),
        given={"reference": f"runs/{reference}", "negatives": f"negatives/{reference}"},
        sampler=Heun(num_steps=calls),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            optimizer=OptimizerConfig(lr=1e-5),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.999), rampup_ratio=None),
            log_images=50 * batch,
            snapshot_images=500 * batch,
            checkpoint_images=500 * batch,
            weights_images=250 * batch,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "ddo-digits": digits,
    "ddo-emoji64-32": emoji64_32,
    "ddo-causal-digits": causal_digits,
    "ddo-cifar10": cifar10,
    "ddo-imagenet64": imagenet64,
}


def self_play(recipe: str | Experiment, *, rounds: int, n: int = 10_000) -> Chain:
    """Rounds by one of this family's recipes: each draws `n` negatives from the model before it, learns, and hands on
    the best by its images' distance to real ones of its reference, its average and what it kept along its way.

    Stages are draw1, round1, best1, draw2, ... A stage's settings are options of its name: --round2.method.beta 0.02.
    """
    first = FAMILY[recipe]() if isinstance(recipe, str) else recipe
    reference, stages = first.given["reference"], []
    for i in range(1, rounds + 1):
        stages.append(Stage(f"draw{i}", DrawNegatives(given={"model": str(reference)}, n=n, seed=i)))
        stages.append(Stage(f"round{i}", first.giving(reference=str(reference), negatives=f"{OF_STAGE}draw{i}")))
        stages.append(Stage(f"best{i}", KeepBest(given={"run": f"{OF_STAGE}round{i}"})))
        reference = f"{OF_STAGE}best{i}"
    return Chain(*stages)
