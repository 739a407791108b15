"""Our augmentation against numbers of the published one (Karras et al. 2022, training/augment.py).

data/edm_augment.json holds the operations, the rule that makes images and draws, and the official pipe's images and
labels. Both ask for their random numbers in the same order. Bar: 2e-5, of float32 warps (they differ by 5e-6).
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.data.augment import LABEL_WIDTHS, Augment

REFERENCE = json.loads((Path(__file__).parent / "data" / "edm_augment.json").read_text())
COUNT, SIZE = 4, 8


def generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))


class Ruled:
    """The rule's draws, number by number."""

    def __init__(self, run: str) -> None:
        self.run, self.drawn = run, 0

    def _next(self) -> np.random.Generator:
        self.drawn += 1
        return generator(f"{self.run}/{self.drawn - 1}")

    def normal(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self._next().standard_normal(like.shape).astype(np.float32))

    def uniform(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self._next().random(like.shape).astype(np.float32))


@pytest.mark.parametrize("run", ["edm", "all"])
def test_images_and_labels_are_the_official_ones(run):
    settings = dict.fromkeys(LABEL_WIDTHS, 0.0) | REFERENCE[run]["operations"]
    images = torch.from_numpy(generator(f"{run}/images").standard_normal((COUNT, 1, SIZE, SIZE)).astype(np.float32))
    augmented, labels = Augment(**settings)(images, Ruled(run))
    expected = torch.tensor(REFERENCE[run]["images"]).reshape(images.shape)
    assert (augmented - expected).abs().max() < 2e-5
    assert (labels - torch.tensor(REFERENCE[run]["labels"]).reshape(COUNT, -1)).abs().max() < 1e-6
    assert (augmented - images).flatten(1).abs().amax(1).min() > 0.5  # something happened to every image
