"""Sizes of the parts, true and toy; made-up data and teachers of recipes whose own are not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from imagewright.data import ImageSet
from imagewright.data.config import DataConfig
from imagewright.data.couplings import Couplings
from imagewright.methods.consistency_trajectory import ConsistencyTrajectory
from imagewright.models.files import ModelFile
from imagewright.networks import DhariwalUNetConfig, PixelUNetConfig, SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.given import Sources
from imagewright.types import DataSpec


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much a part measures.

    matrix: side of the square matrices. side, classes, images: of the made-up data. batch: of a training step;
    updates: batch by recipe. sampled: images at a time.
    calls: of the longer way to sample. warm, timed: repetitions. toy: whether networks are shrunk, to run anywhere.
    """

    matrix: int
    copy_bytes: int
    side: int
    classes: int
    images: int
    batch: int
    sampled: int
    calls: int
    updates: dict[str, int]
    warm: int
    timed: int
    toy: bool = False

    def experiment(self, name: str) -> Experiment:
        """A recipe, of the size of this scale."""
        run = RECIPES[name]()
        if not self.toy:
            return run
        # The teacher's way of CTM, dozens of calls long, says nothing new after one step.
        if isinstance(run.method, ConsistencyTrajectory):
            run = replace(run, method=replace(run.method, max_steps=1))
        return replace(run, network=shrunk(run.network))

    def most(self, seconds: float) -> float:
        """Time for one measurement: none is cut short at toy size."""
        return math.inf if self.toy else seconds


FULL = Scale(
    matrix=8192,
    copy_bytes=2**32,
    side=64,
    classes=1000,
    images=2048,
    batch=128,
    sampled=64,
    calls=35,
    updates={"scd-imagenet64": 32, "dmd2-imagenet64-gan": 32, "ctm-imagenet64": 24, "md4-imagenet64": 16},
    warm=3,
    timed=10,
)
TOY = Scale(
    matrix=64,
    copy_bytes=2**16,
    side=8,
    classes=10,
    images=32,
    batch=4,
    sampled=2,
    calls=3,
    updates=dict.fromkeys(FULL.updates, 2),
    warm=0,
    timed=1,
    toy=True,
)


def shrunk(network: Any) -> Any:
    """The smallest network of the same kind that still has all of its layers."""
    match network:
        case DhariwalUNetConfig():
            return replace(network, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
        case SongUNetConfig():
            return replace(network, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
        case PixelUNetConfig():
            return replace(network, model_channels=8, num_blocks=1, transformer_depth=1, transformer_width=16,
                           transformer_heads=2)  # fmt: skip
    return network


class MadeUp(Sources):
    """Random pictures like ImageNet-64's, and untrained models of the recipes that an experiment names."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale
        draw = np.random.default_rng(0)
        self._pixels = draw.integers(0, 256, (scale.images, scale.side, scale.side, 3), dtype=np.uint8)
        self._labels = draw.integers(0, scale.classes, scale.images)

    def images(self, data: DataConfig, on_progress: Callable[[int, int], None] | None) -> ImageSet:
        """Noise, with classes where the recipe has them."""
        names = tuple(map(str, range(self.scale.classes)))
        if data.labels:
            return ImageSet.of(self._pixels, self._labels, class_names=names)
        return ImageSet.of(self._pixels)

    def given(self, role: str, name: str) -> ModelFile:
        """The model; its weights are nobody's, and noted nowhere."""
        return self.model(name)

    def model(self, name: str) -> ModelFile:
        """The product of the recipe of that name, untrained."""
        experiment = self.scale.experiment(name.rsplit("/", 1)[-1])
        made = assemble(experiment, sources=self)
        return ModelFile(model=made.parts.roles[experiment.method.product].module, spec=made.images.spec)

    def couplings(self, name: str) -> Couplings | None:
        """None."""
        return None

    def features(self, name: str | None, spec: DataSpec) -> nn.Module | None:
        """What there is; without its weights a perceptual distance is left out of the recipe."""
        return None
