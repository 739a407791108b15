"""Add a method: a class in a file of your own, trained, resumed, sampled and measured like any other.

    python examples/add_a_method.py [--short] [--out FOLDER]

The method is a denoiser that learns by a distance which grows linearly for large errors (pseudo-Huber) in place of the
square, beside EDM's own at equal updates. Nothing in the package is changed. About a minute on one core.
`imagewright train examples/add_a_method.py --training.batch 32` takes this very file, with every field an option.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from imagewright.models.preconditioning import EDMPrecond
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import RECIPES
from imagewright.types import Batch, Clock, Event, Parts, Trained, Update


@dataclass(frozen=True, kw_only=True)
class HuberDenoising:
    """EDM's denoiser by sqrt(e^2 + c^2) - c of the weighted error e of each image, root mean square over its values."""

    product: ClassVar[str] = "denoiser"  # the part that gets exported
    c: float = 0.3

    def parts(self, *, network: nn.Module) -> Parts:
        """network: what the experiment configures."""
        return Parts(denoiser=Trained(module=EDMPrecond(network)))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update."""
        sigma = LogNormal(mean=-1.2, std=1.2).sample(noise, batch.images[:, 0, 0, 0])
        level = sigma[:, None, None, None]
        guess = parts.denoiser(batch.images + level * noise.normal(batch.images), sigma, batch.cond)
        weighted = (guess - batch.images) * (level**2 + 0.25).sqrt() / (0.5 * level)
        loss = (weighted.square().flatten(1).mean(1) + self.c**2).sqrt() - self.c
        yield Update("denoiser", loss, at=sigma)


experiment = replace(RECIPES["edm-digits"](), method=HuberDenoising())


def main() -> None:
    """Train it and EDM, and set them side by side."""
    from typed import typed  # beside this file, which `imagewright train` may be given alone

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="a few steps of everything, in seconds")
    options.add_argument("--out", type=Path, default=Path("runs/add-a-method"))
    given = options.parse_args()
    images, steps, n = (128, 2, 32) if given.short else (10_000, 9, 500)
    length = f"--training.total-images {images} --sampler.num-steps {steps}"
    for name, what in (("mine", __file__), ("edm", "edm-digits")):
        typed(f"train {what} {length} --out {given.out}/{name} --resume")
        typed(f"evaluate {given.out}/{name} --n {n} --no-yardsticks --metrics fd")
    typed(f"compare {given.out}/mine {given.out}/edm")


if __name__ == "__main__":
    main()
