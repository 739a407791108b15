"""Complete runs as functions: paper x data set, with their hyper-parameters. `imagewright train NAME`."""

from collections.abc import Callable

from imagewright.recipes import consistency, edm
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
}
"""Every recipe by its name on the command line."""

__all__ = ["RECIPES"]
