"""One-step generators by matching distributions (Wang et al. 2025, 2505.20755, and methods that it contains).

CIFAR-10 and ImageNet-64: as in the paper's appendix and its published script. The best figures are of FKL from a
generator that RKL has trained: `--start runs/uni-rkl-cifar10`; the fake network learns it in the first phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.augment import Augment
from imagewright.methods.uni_instruct import NAMED
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import DataConfig, Experiment

BETAS = (0.0, 0.999)


def digits(name: str) -> Experiment:
    """One-step digits from the run `runs/edm-digits`: about three minutes on one core."""
    method = NAMED[name]
    phased = method.plain_images > 0
    return Experiment(
        data=DataConfig(source="digits"),
        method=replace(method, fake_only_images=1_000, plain_images=2_000) if phased else method,
        teacher="runs/edm-digits",
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=10_000,
            batch=64,
            channels_last=True,
            optimizer=OptimizerConfig(lr=3e-4, betas=BETAS, lr_cooldown_images=4_000),
            ema=EmaConfig(halflife_images=1_000, rampup_ratio=0.1),
            log_images=640,
            snapshot_images=2_500,
            checkpoint_images=5_000,
        ),
    )


def emoji64_32(name: str) -> Experiment:
    """One-step emoji at 32x32 from the shipped denoiser."""
    run = digits(name)
    method = NAMED[name]
    phased = method.plain_images > 0
    return replace(
        run,
        data=DataConfig(source="emoji64", resolution=32),
        method=replace(method, fake_only_images=2_000, plain_images=4_000) if phased else method,
        teacher="emoji64-32",
        training=replace(
            run.training,
            total_images=40_000,
            batch=32,
            channels_last=False,
            optimizer=OptimizerConfig(lr=1e-4, betas=BETAS, lr_cooldown_images=15_000),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
            log_images=1_600,
            snapshot_images=8_000,
            checkpoint_images=8_000,
        ),
    )


def cifar10(name: str) -> Experiment:
    """CIFAR-10, class-conditional, as published (`--data.no-labels`, and such a teacher, for the other runs)."""
    return Experiment(
        data=DataConfig(source="cifar10-32x32.zip"),
        method=replace(NAMED[name], augment=Augment(p=0.12)),
        teacher="edm-cifar10",
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=300_000_000,
            batch=256,
            optimizer=OptimizerConfig(lr=1e-5, betas=BETAS),
            ema=EmaConfig(halflife_images=500_000, rampup_ratio=0.05),
            log_images=50_000,
            snapshot_images=500_000,
            checkpoint_images=2_000_000,
        ),
    )


def imagenet64(name: str) -> Experiment:
    """ImageNet-64, as published: no augmentation, half precision."""
    run = cifar10(name)
    return replace(
        run,
        data=DataConfig(source="imagenet-64x64.zip"),
        method=NAMED[name],
        teacher="edm-imagenet64",
        training=replace(
            run.training,
            batch=8192,
            micro_batch=32,
            precision="fp16",
            optimizer=OptimizerConfig(lr=4e-6, betas=BETAS, eps=1e-6),
            ema=EmaConfig(halflife_images=2_000_000, rampup_ratio=0.05),
        ),
    )


SMALL: Mapping[str, str] = {
    "diff_instruct": "Diff-Instruct",
    "sim": "Score implicit matching, SIM",
    "sid": "Score identity distillation, SiD, alpha 1.2",
    "f_distill": "The f-distill method: Jensen-Shannon, with an adversary",
    "uni_rkl": "Uni-Instruct: reverse KL, with an adversary",
    "uni_fkl": "Uni-Instruct: forward KL, with an adversary",
    "uni_jkl": "Uni-Instruct: Jeffreys' divergence, with an adversary",
}
"""Methods of `NAMED` that have recipes for the embedded data sets, in words."""
PUBLISHED = ("sid", "uni_rkl", "uni_fkl", "uni_jkl")
"""Those that have them for CIFAR-10 and ImageNet-64."""


def _table() -> dict[str, Callable[[], Experiment]]:
    recipes: dict[str, Callable[[], Experiment]] = {}
    for data, make, names in (
        ("digits", digits, SMALL),
        ("emoji64-32", emoji64_32, SMALL),
        ("cifar10", cifar10, PUBLISHED),
        ("imagenet64", imagenet64, PUBLISHED),
    ):
        for name in names:
            recipes[f"{name.replace('_', '-')}-{data}"] = _named(make, name)
    return recipes


def _named(make: Callable[[str], Experiment], name: str) -> Callable[[], Experiment]:
    def recipe() -> Experiment:
        return make(name)

    assert make.__doc__ is not None
    recipe.__doc__ = f"{SMALL[name]}. {make.__doc__}"
    return recipe


FAMILY = _table()
"""Recipes by their names on the command line: method, data set."""
