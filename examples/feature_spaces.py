"""Do feature spaces rank generators alike? An exact denoiser of digits, drawn from in fewer and fewer steps.

python examples/feature_spaces.py                                  # digits against emoji: the table of docs/encoders.md
python examples/feature_spaces.py digits runs/vcmamba-digits clip:models/clip
"""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr
from torch import nn

from imagewright.data import ImageSet, from_uint8, open_images, to_uint8
from imagewright.metrics import embed, evaluate
from imagewright.metrics.extractors import named_extractor
from imagewright.noise import StepNoise
from imagewright.oracles import GaussianMixture
from imagewright.samplers.edm import Euler
from imagewright.samplers.generator import ImageGenerator

STEPS = (48, 32, 24, 16, 12, 8, 6, 5, 4, 3)
"""Of Euler's method: a generator each, and their order is known, for its error falls with the steps."""
SPREAD = 0.1
"""Standard deviation around each training picture, of pixels in [-1, 1]."""
CENTRES = 300
"""Training pictures that the exact distribution is made of."""
REAL = 2000
"""Exact samples that all are compared with."""
COUNT, SEEDS = 300, (1, 2)


class Exact(nn.Module):
    """The denoiser of the training pictures, each with a little noise."""

    sigma_min, sigma_max = 0.02, 80.0

    def __init__(self, oracle: GaussianMixture) -> None:
        super().__init__()
        self.oracle, self.round_sigma = oracle, oracle.round_sigma

    def forward(self, *args: object) -> object:
        return self.oracle(*args)  # type: ignore[arg-type]


def scores(spaces: list[str], seeds: tuple[int, ...] = SEEDS, count: int = COUNT) -> dict[str, np.ndarray]:
    """Frechet distances by space, [generators], their mean over seeds; the same pictures in all spaces."""
    real = open_images("digits", split="train", labels=False)
    exact = Exact(GaussianMixture(from_uint8(real.images(range(CENTRES))), SPREAD))
    truth = ImageSet.of(to_uint8(exact.oracle.sample(REAL, StepNoise(0))))
    judges = [named_extractor(space) for space in spaces]
    references = [embed(truth, judge) for judge in judges]
    found = {judge.name: np.zeros(len(STEPS)) for judge in judges}
    for i, steps in enumerate(STEPS):
        generator = ImageGenerator(exact, real.spec, Euler(num_steps=steps))
        for seed in seeds:
            images = generator.generate(count, seed=seed, batch_size=count)
            for judge, reference in zip(judges, references, strict=True):
                report = evaluate(images, reference, judge, metrics=["fd"], yardsticks=False)
                found[judge.name][i] += next(iter(report.scores.values())) / len(seeds)
    return found


def main(spaces: list[str]) -> None:
    """Print the table."""
    found = scores(spaces)
    print("steps " + " ".join(f"{steps:>8d}" for steps in STEPS) + "   rank correlation with the steps")
    for name, each in found.items():
        known = spearmanr(each, [-steps for steps in STEPS]).statistic
        print(f"fd_{name} " + " ".join(f"{score:8.3f}" for score in each) + f"   {known:.3f}")
    for one, other in combinations(found, 2):
        print(f"fd_{one} and fd_{other}: {spearmanr(found[one], found[other]).statistic:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits", "emoji"])
