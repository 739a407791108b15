"""`evaluate` against torch-fidelity, whose functions gave the numbers below for these very features and logits.

Made with its metric_isc, metric_kid, metric_prc and metric_fid at commit 5e211a9, defaults (rng_seed 2020, shuffled)
but for the size of subsets: `evaluate` takes that of the smaller set, 150. Its kernels and distances are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from imagewright.metrics.evaluate import evaluate
from imagewright.metrics.features import Images
from imagewright.metrics.inception import WEIGHTS_SHA256


def waves(n: int, d: int, phase: float) -> np.ndarray:
    """float32 [n, d], no randomness."""
    i, j = np.arange(n)[:, None], np.arange(d)[None]
    return (np.sin(0.37 * i * i * (j + 1) + phase) + 0.3 * phase).astype(np.float32)


@dataclass(frozen=True)
class Looked:
    """Images that carry their own row's number in their first two bytes; row -> features and logits."""

    name: str = "inception-2015-12-05"
    sha256: str = WEIGHTS_SHA256
    dim: int = 5
    num_classes: int = 7

    def __call__(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        flat = images.reshape(len(images), -1).astype(int)
        row, real = flat[:, 0] * 256 + flat[:, 1], flat[0, 2] == 1
        features = waves(150, 5, 0.4) if real else waves(203, 5, 0.0)
        return features[row % len(features)], (waves(203, 7, 0.0) * 3)[row % 203]


@dataclass(frozen=True)
class Numbered:
    n: int
    real: bool
    fingerprint: str = "waves"

    def __len__(self) -> int:
        return self.n

    def images(self, indices: object) -> Images:
        rows = np.arange(self.n)[indices]
        return np.stack([rows // 256, rows % 256, rows * 0 + self.real], axis=1).astype(np.uint8).reshape(-1, 1, 1, 3)


FAKE, REAL = Numbered(203, False), Numbered(150, True)


@pytest.mark.parametrize("seed", [0, 7])
def test_equal_features_have_its_scores_whatever_the_images_seed(seed: int) -> None:
    batches = [FAKE.images(slice(k, k + 64)) for k in range(0, 203, 64)]
    scores = evaluate(batches, REAL, Looked(), seed=seed, yardsticks=False).scores
    assert scores["is"] == pytest.approx(1.930063309847649, rel=1e-12)
    assert scores["is_std"] == pytest.approx(0.11289712806281335, rel=1e-9)
    assert scores["fid"] == pytest.approx(0.07130077298456872, rel=1e-7)
    assert scores["kid"] == pytest.approx(0.020936920642852783, abs=1e-7)
    assert scores["kid_std"] == pytest.approx(0.009852693467729193, abs=1e-7)
    assert scores["precision"] == pytest.approx(0.6798029541969299, abs=1e-6)
    assert scores["recall"] == pytest.approx(0.4533333480358124, abs=1e-6)


def test_the_seeds_of_subsets_splits_and_yardsticks_are_fixed_and_recorded() -> None:
    one, other = (evaluate(FAKE.images(slice(None)), REAL, Looked(), seed=seed) for seed in (3, 4))
    assert one.scores == other.scores and one.yardsticks == other.yardsticks
    assert (one.seed, other.seed) == (3, 4)
    assert {name: one.settings[name]["seed"] for name in ("kid", "is", "yardsticks")} == dict.fromkeys(
        ("kid", "is", "yardsticks"), 2020
    )
