"""One-step generators by matching distributions (Wang et al. 2025, 2505.20755, and methods that it contains).

CIFAR-10 and ImageNet-64: as in the published scripts of Uni-Instruct, SiD and Diff-Instruct. The best figures are of
FKL from a generator that RKL has trained, `--start runs/uni-rkl-cifar10`, in the scripts SiD's. Their losses are sums
over an image's numbers, ours means: Adam's eps is smaller by as much, so that its steps are the same.
Departs    With `--start` the fake network comes along; theirs starts as the teacher and learns in the first phase. fp16
           is autocast with a loss scale that is divided out again; theirs casts the networks and scales nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.data.augment import Augment
from imagewright.data.config import DataConfig
from imagewright.methods.uni_instruct import NAMED
from imagewright.recipes.published import eps_of_mean
from imagewright.samplers import MultistepConsistency
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

BETAS = (0.0, 0.999)


def digits(name: str) -> Experiment:
    """One-step digits from the run `runs/edm-digits`: about three minutes on one core."""
    method = NAMED[name]
    phased = method.plain_images > 0
    return Experiment(
        data=DataConfig(source="digits"),
        method=replace(method, fake_only_images=1_000, plain_images=2_000) if phased else method,
        given={"teacher": "runs/edm-digits"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=10_000,
            batch=64,
            channels_last=True,
            optimizer=_adam(3e-4, 8 * 8, lr_cooldown_images=4_000),
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
        training=replace(
            run.training,
            total_images=40_000,
            batch=32,
            channels_last=False,
            optimizer=_adam(1e-4, 3 * 32 * 32, lr_cooldown_images=15_000),
            ema=EmaConfig(halflife_images=4_000, rampup_ratio=0.1),
            log_images=1_600,
            snapshot_images=8_000,
            checkpoint_images=8_000,
        ),
    ).giving(teacher="emoji64-32")


def cifar10(name: str) -> Experiment:
    """CIFAR-10, class-conditional, as published (`--data.no-labels`, and such a teacher, for the other runs)."""
    return Experiment(
        data=DataConfig(source="cifar10-32x32.zip"),
        method=replace(NAMED[name], augment=Augment(p=0.12)),
        given={"teacher": "runs/edm-cifar10"},
        sampler=MultistepConsistency(),
        training=TrainingConfig(
            total_images=800_000_000 if name == "sid" else 300_000_000,
            batch=256,
            micro_batch=32,  # of which the adversary's mean is taken
            optimizer=_adam(1e-5, 3 * 32 * 32),
            ema=EmaConfig(halflife_images=500_000, rampup_ratio=0.05),
            log_images=50_000,
            snapshot_images=500_000,
            checkpoint_images=2_000_000,
        ),
    )


def cifar10_without_classes(name: str) -> Experiment:
    """CIFAR-10 without classes, as published: FID 4.5 or less, says its README."""
    run = cifar10(name)
    return replace(
        run,
        data=replace(run.data, labels=False),
        training=replace(run.training, total_images=200_000_000, batch=128, micro_batch=None),
    ).giving(teacher="runs/edm-cifar10-uncond")


def imagenet64(name: str) -> Experiment:
    """ImageNet-64, as published: no augmentation, half precision."""
    run = cifar10(name)
    return replace(
        run,
        data=DataConfig(source="imagenet-64x64.zip"),
        method=NAMED[name],
        training=replace(
            run.training,
            total_images=1_000_000_000 if name == "sid" else 300_000_000,
            batch=8192,
            micro_batch=8,
            channels_last=True,
            precision="fp16",
            optimizer=_adam(4e-6, 3 * 64 * 64, eps=1e-6),
            ema=EmaConfig(halflife_images=2_000_000, rampup_ratio=0.05),
        ),
    ).giving(teacher="runs/edm-imagenet64")


def _adam(lr: float, numbers: int, *, eps: float = 1e-8, lr_cooldown_images: int = 0) -> OptimizerConfig:
    """numbers: of an image. eps: beside a loss that is summed over them."""
    eps = eps_of_mean(numbers, eps=eps)
    return OptimizerConfig(lr=lr, betas=BETAS, eps=eps, lr_cooldown_images=lr_cooldown_images)


SMALL: Mapping[str, str] = {
    "diff_instruct": "Diff-Instruct",
    "sim": "Score implicit matching, SIM",
    "sid": "Score identity distillation, SiD, alpha 1.2",
    "uni_rkl": "Uni-Instruct: reverse KL, with an adversary",
    "uni_fkl": "Uni-Instruct: forward KL, with an adversary",
    "uni_jkl": "Uni-Instruct: Jeffreys' divergence, with an adversary",
}
"""Methods of `NAMED` that have recipes for the embedded data sets, in words."""
PUBLISHED = ("sid", "uni_rkl", "uni_fkl", "uni_jkl")
"""Those that have them for CIFAR-10 and ImageNet-64; Diff-Instruct's program has CIFAR-10 without classes."""


def _table() -> dict[str, Callable[[], Experiment]]:
    recipes: dict[str, Callable[[], Experiment]] = {}
    for data, make, names in (
        ("digits", digits, SMALL),
        ("emoji64-32", emoji64_32, SMALL),
        ("cifar10", cifar10, PUBLISHED),
        ("cifar10", cifar10_without_classes, ("diff_instruct",)),
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
