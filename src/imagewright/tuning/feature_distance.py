"""The measure by which `tuning.autodiffusion` compares candidates of an image model: a Frechet distance of few images.

Departs    the published search draws new noise for every candidate from a running generator; here it follows from the
           candidate, so that it is as fresh, and the same when the candidate is asked again. Images start from sigma
           times normal noise, as everywhere here (there from x_t of unit variance, in these coordinates noise times
           sqrt(1 + sigma^2): another start where the first time is small). No classifier guides them, and estimates of
           the image are not clipped to its range at every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from imagewright.guidance.layer_skipping import LayerSkipped
from imagewright.metrics.draws import frechet_of_model
from imagewright.metrics.features import FeatureExtractor
from imagewright.metrics.statistics import Moments
from imagewright.models.latents import LatentSpace
from imagewright.noise import derive_seed
from imagewright.paths.discrete import DiscreteSchedule
from imagewright.samplers.ddim import DDIM
from imagewright.samplers.generator import ImageGenerator
from imagewright.tuning.autodiffusion import Candidate
from imagewright.types import DataSpec, UserError


@dataclass(frozen=True, kw_only=True)
class FeatureDistance:
    """A fitness for image models: Frechet distance of fresh images, with fresh classes, to real images' statistics.

    reference: moments of the real images in the extractor's features. images: how many are drawn for a candidate (the
    paper: 5000 for 4 steps, 1000 with a layer budget). Images start from sigma times normal noise, as everywhere here.
    space: the latents that the model lives in; None = it makes images.
    """

    model: nn.Module
    spec: DataSpec
    extractor: FeatureExtractor
    reference: Moments
    schedule: DiscreteSchedule = field(default_factory=DiscreteSchedule)
    images: int = 1000
    batch_size: int = 256
    seed: int = 0
    device: torch.device | str = "cpu"
    space: LatentSpace | None = None

    def __post_init__(self) -> None:
        if self.images < 2 or self.batch_size < 1:
            raise UserError(f"images is {self.images} and batch_size {self.batch_size}; they must be at least 2 and 1")

    def generator(self, candidate: Candidate) -> ImageGenerator:
        """The model as it draws with a candidate."""
        levels = candidate.levels(self.schedule, self.model)  # type: ignore[arg-type]  # a module that is a Denoiser
        model = LayerSkipped(self.model, levels) if any(levels.values()) else self.model
        return ImageGenerator(model, self.spec, DDIM(levels=tuple(levels)), self.device, space=self.space)

    def __call__(self, candidate: Candidate) -> float:
        """Noise and classes follow from the seed and the candidate: fresh for each, the same when asked again."""
        skipped = [number for ids in candidate.skips for number in (len(ids), *ids)]
        seed = derive_seed(self.seed, len(candidate.times), *candidate.times, *skipped)
        generator, size = self.generator(candidate), self.batch_size
        return frechet_of_model(generator, self.images, self.extractor, self.reference, seed=seed, batch_size=size)
