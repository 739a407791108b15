"""Complete runs as functions: paper x data set, with their hyper-parameters. `imagewright train NAME`."""

from collections.abc import Callable

from imagewright.recipes import consistency, edm, improved_consistency
from imagewright.recipes import continuous_consistency as continuous
from imagewright.training.experiment import Experiment

RECIPES: dict[str, Callable[[], Experiment]] = {
    "edm-digits": edm.digits,
    "edm-emoji64-16": edm.emoji64_16,
    "edm-emoji64-32": edm.emoji64_32,
    "edm-cifar10": edm.cifar10,
    "edm-imagenet64": edm.imagenet64,
    "cd-digits": consistency.cd_digits,
    "cd-emoji64-32": consistency.cd_emoji64_32,
    "cd-cifar10": consistency.cd_cifar10,
    "cd-imagenet64": consistency.cd_imagenet64,
    "ct-digits": consistency.ct_digits,
    "ct-cifar10": consistency.ct_cifar10,
    "ct-imagenet64": consistency.ct_imagenet64,
    "ict-digits": improved_consistency.digits,
    "ict-cifar10": improved_consistency.cifar10,
    "ict-imagenet64": improved_consistency.imagenet64,
    "trigflow-digits": continuous.trigflow_digits,
    "trigflow-cifar10": continuous.trigflow_cifar10,
    "trigflow-imagenet64": continuous.trigflow_imagenet64,
    "scd-digits": continuous.scd_digits,
    "scd-emoji64-32": continuous.scd_emoji64_32,
    "scd-cifar10": continuous.scd_cifar10,
    "scd-imagenet64": continuous.scd_imagenet64,
    "sct-digits": continuous.sct_digits,
    "sct-cifar10": continuous.sct_cifar10,
    "sct-imagenet64": continuous.sct_imagenet64,
}
"""Every recipe by its name on the command line."""

__all__ = ["RECIPES"]
