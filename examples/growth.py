"""How time and memory grow: each size in a process of its own, and the exponent of the least-squares line of the logs.

python examples/growth.py                  # all, some minutes on one core; prints the tables of docs/performance.md
python examples/growth.py weights          # one of them
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagewright.data import ImageSet, Loader
from imagewright.metrics.neighbours import neighbourhood
from imagewright.metrics.statistics import FeatureStatistics
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.posthoc import Profile, solve
from imagewright.training.weights import combine, store
from imagewright.types import DataSpec

Work = Callable[[], Any]
DIM = 256
"""Of the features; Inception's are 2,048."""


def batch(size: int, folder: Path) -> Work:
    """A forward and backward pass of a small U-Net on 16x16 pictures."""
    config = SongUNetConfig(img_resolution=16, in_channels=3, out_channels=3, model_channels=16, channel_mult=(1, 2))
    network, x = SongUNet(config), torch.randn(size, 3, 16, 16)
    return lambda: network(x, torch.zeros(size)).square().mean().backward()


def pixels(size: int, folder: Path) -> Work:
    """The same on 8 pictures of so many pixels a side."""
    config = SongUNetConfig(img_resolution=size, in_channels=3, out_channels=3, model_channels=16, channel_mult=(1, 2))
    network, x = SongUNet(config), torch.randn(8, 3, size, size)
    return lambda: network(x, torch.zeros(8)).square().mean().backward()


def width(size: int, folder: Path) -> Work:
    """The same on 8 pictures of 16x16, of so many channels."""
    config = SongUNetConfig(img_resolution=16, in_channels=3, out_channels=3, model_channels=size, channel_mult=(1, 2))
    network, x = SongUNet(config), torch.randn(8, 3, 16, 16)
    return lambda: network(x, torch.zeros(8)).square().mean().backward()


def calls(size: int, folder: Path) -> Work:
    """8 pictures of 16x16 drawn in so many calls of a small U-Net, an odd number."""
    config = SongUNetConfig(img_resolution=16, in_channels=3, out_channels=3, model_channels=16, channel_mult=(1, 2))
    spec = DataSpec(name="growth", resolution=16, channels=3)
    generator = ImageGenerator(EDMPrecond(SongUNet(config)), spec, Heun(num_steps=(size + 1) // 2))
    return lambda: generator.generate(8)


def neighbours(size: int, folder: Path) -> Work:
    """Precision, recall, density and coverage of so many images against as many."""
    random = np.random.default_rng(0)
    real, fake = (random.standard_normal((size, DIM), dtype=np.float32) for _ in range(2))
    return lambda: neighbourhood(real, fake)


def frechet(size: int, folder: Path) -> Work:
    """Moments of the features of so many images, in batches."""
    features = np.random.default_rng(0).standard_normal((1000, DIM), dtype=np.float32)

    def work() -> None:
        statistics = FeatureStatistics(DIM)
        for _ in range(size // 1000):
            statistics.update(features)

    return work


def weights(size: int, folder: Path) -> Work:
    """A combination of so many stored sets of 2 million weights."""
    state = {f"w{i}": torch.randn(250_000) for i in range(8)}
    paths = [store(folder, "raw", i, state) for i in range(size)]
    return lambda: combine(paths, [1 / size] * size)


def posthoc(size: int, folder: Path) -> Work:
    """Coefficients of a post-hoc average from so many stored ones."""
    available = [Profile(1000 * (i // 2 + 1), (0.05, 0.1)[i % 2]) for i in range(size)]
    return lambda: solve(available, Profile(1000 * (size // 2), 0.07))


def pictures(size: int, folder: Path) -> Work:
    """100 batches of 64 from a set of so many pictures, which costs nothing to decode."""
    one = ImageSet.of(np.zeros((1, 8, 8, 3), np.uint8))
    read = lambda rows: np.zeros((len(rows), 8, 8, 3), np.uint8)  # noqa: E731
    images = ImageSet(spec=one.spec, pixels=read, labels=np.full(size, -1), names=(), source="made up", digests=())
    loader = Loader(images, 64, 0)
    loader.batch(0)
    return lambda: [loader.batch(64 * i) for i in range(1, 100)]


TABLES: dict[str, tuple[Callable[[int, Path], Work], tuple[int, ...]]] = {
    "batch": (batch, (8, 16, 32, 64)),
    "pixels": (pixels, (16, 32, 64)),
    "width": (width, (16, 32, 64, 128)),
    "calls": (calls, (9, 17, 33, 65)),
    "neighbours": (neighbours, (2000, 4000, 8000)),
    "frechet": (frechet, (4000, 16000, 64000)),
    "weights": (weights, (4, 8, 16, 32)),
    "posthoc": (posthoc, (64, 128, 256)),
    "pictures": (pictures, (20_000, 200_000, 2_000_000)),
}


def measure(name: str, size: int) -> dict[str, float]:
    """Seconds of this process's CPU (the least of three) and megabytes beyond those before the work."""
    with tempfile.TemporaryDirectory() as folder:
        work = TABLES[name][0](size, Path(folder))
        before = peak()
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return {"size": size, "seconds": min(times), "megabytes": peak() - before}


def peak() -> float:
    """Megabytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponent(rows: list[dict[str, float]], what: str) -> float:
    """Slope of ln what over ln size."""
    sizes, values = ([max(row[key], 1e-9) for row in rows] for key in ("size", what))
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main(words: list[str]) -> None:
    """Measure one size, or make tables."""
    if len(words) == 2:
        print(json.dumps(measure(words[0], int(words[1]))))
        return
    for name in words or TABLES:
        made, sizes = TABLES[name]
        rows = []
        for size in sizes:
            command = [sys.executable, __file__, name, str(size)]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"\n{made.__doc__}\n\n| {name} | seconds | MB |\n|---|---|---|")
        for row in rows:
            print(f"| {row['size']:,} | {row['seconds']:.3g} | {row['megabytes']:.0f} |")
        print(f"| exponent | {exponent(rows, 'seconds'):.2f} | {exponent(rows, 'megabytes'):.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
