"""What a distance is for images as good as real, and for images that know two moments of the pixels or none.

A bare distance of a small sample says little: it is biased upwards and in units of its own. So it is reported
between

floor      two disjoint random parts of the real images, of min(n, N // 2) images each: mean and standard
           deviation over `repeats` draws. A Frechet distance's bias falls as 1 / n + 1 / N: where generated images
           are more, or are compared with more, a perfect generator lies below by that (`at_count`).
gaussian   n draws from the Gaussian with the real images' mean and full covariance in pixel space, rounded to
           uint8: what a linear model of the data reaches.
noise      n images of independent uniform bytes.

The two ceilings are compared with all N real images, as generated images are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imagewright.metrics.features import FeatureExtractor, Images, ImageSource
from imagewright.metrics.reference import Reference
from imagewright.types import UserError

Features = npt.NDArray[np.float32]
Distance = Callable[[Features, Features], float]

CHUNK = 256
MOST_ROWS = 4096  # real images behind the Gaussian; more are subsampled to bound the memory


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """One distance's floor and ceilings. `floor_std` has divisor repeats - 1; 0 for a single repeat."""

    num_images: int
    floor: float
    floor_std: float
    floor_images: int
    floor_repeats: int
    gaussian: float
    noise: float


def at_count(stick: Yardstick, num_reference: int) -> float:
    """A Frechet distance's floor brought to n images against N: what images as good as real can be expected to have.

    To first order. Of 1892 emoji, parts of 236, 473 and 946 have 5.3, 2.7 and 1.5: within a tenth of it.
    """
    return stick.floor * (1 / stick.num_images + 1 / num_reference) * stick.floor_images / 2


def measure_yardsticks(
    reference: Reference,
    extractor: FeatureExtractor,
    n: int,
    distances: Mapping[str, Distance],
    *,
    seed: int = 0,
    repeats: int = 3,
) -> dict[str, Yardstick]:
    """Floor and ceilings of each named distance, for samples of n images; n >= 2 and at least 4 real images.

    distances: functions of (features of the judged images [n, d], features of the reference [N, d]).
    """
    half = min(n, len(reference) // 2)
    if half < 2:
        raise UserError(f"a floor needs halves of at least 2 images; there are {len(reference)} real ones, n is {n}")
    random = np.random.default_rng(seed)
    floors: dict[str, list[float]] = {name: [] for name in distances}
    for _ in range(repeats):
        order = random.permutation(len(reference))
        one, other = reference.features[order[:half]], reference.features[order[half : 2 * half]]
        for name, distance in distances.items():
            floors[name].append(distance(one, other))
    gaussian = _features(gaussian_images(reference.source, n, random), extractor)
    noise = _features(noise_images(reference.image_shape, n, random), extractor)
    return {
        name: Yardstick(
            num_images=n,
            floor=float(np.mean(floors[name])),
            floor_std=float(np.std(floors[name], ddof=1)) if repeats > 1 else 0.0,
            floor_images=half,
            floor_repeats=repeats,
            gaussian=distance(gaussian, reference.features),
            noise=distance(noise, reference.features),
        )
        for name, distance in distances.items()
    }


def gaussian_images(source: ImageSource, n: int, random: np.random.Generator) -> Iterator[Images]:
    """n draws from N(mean, cov) of the pixels, rounded and clipped to uint8, in batches.

    With X the centred images, mean + Z X / sqrt(N - 1) for standard normal Z [n, N] has exactly the unbiased
    covariance, and the pixels-by-pixels matrix is never formed.
    """
    rows = np.arange(len(source))
    if len(rows) > MOST_ROWS:
        rows = np.sort(random.choice(rows, MOST_ROWS, replace=False))
    real = source.images(rows)
    pixels = real.reshape(len(real), -1).astype(np.float32)
    mean = pixels.mean(axis=0)
    factor = (pixels - mean) / np.float32(np.sqrt(len(real) - 1))
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        draw = mean + random.standard_normal((size, len(real)), dtype=np.float32) @ factor
        yield np.clip(np.rint(draw), 0, 255).astype(np.uint8).reshape(size, *real.shape[1:])


def noise_images(shape: tuple[int, int, int], n: int, random: np.random.Generator) -> Iterator[Images]:
    """n images of independent uniform bytes, in batches."""
    for start in range(0, n, CHUNK):
        yield random.integers(0, 256, (min(CHUNK, n - start), *shape), dtype=np.uint8)


def _features(batches: Iterator[Images], extractor: FeatureExtractor) -> Features:
    return np.concatenate([extractor(batch)[0] for batch in batches])
