"""What the library adds to the bare operation, in CPU time, both by turns in one process.

    python examples/ratios.py       # half a minute on one core; prints rows of docs/performance.md

`imagewright bench speed` has the larger ones: a step of a U-Net, one-step sampling, the tangent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from imagewright.data import ImageSet, Loader
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig
from imagewright.training.config import TrainingConfig
from imagewright.training.trainer import Trainer
from imagewright.types import Parts, Trained, Update

Work = Callable[[], object]


def attention() -> tuple[str, Work, Work, int]:
    """From the products of a block of ADM on 32x32 to its attention's answer, and back; the fused call alone."""
    config = DhariwalUNetConfig(img_resolution=32, in_channels=3, out_channels=3, model_channels=64,
                                channel_mult=(1,), num_blocks=1, attn_resolutions=(32,))  # fmt: skip
    block = next(b for b in DhariwalUNet(config).blocks().values() if b.num_heads)
    block.norm2, block.qkv, block.proj = (nn.Identity() for _ in range(3))  # what both would do alike
    products = torch.randn(8, 3 * 64, 32, 32, requires_grad=True)
    q, k, v = torch.randn(3, 8, 1, 1024, 64).requires_grad_().unbind()
    return (
        "attention on 32x32, both passes, against the fused call alone",
        lambda: block._attend(products).sum().backward(),
        lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(),
        1,
    )


class Means:
    """Fit a linear map to nothing: as little computation as there can be in a step."""

    product = "network"

    def step(self, parts, batch, noise, clock) -> Iterator[Update]:
        x = batch.images.mean((2, 3)) + noise.normal(batch.images[:, :, 0, 0])
        yield Update("network", parts.network(x)[:, 0].square())


def loop() -> tuple[str, Work, Work, int]:
    """A step of the trainer with a trivial network; the same by a bare loop on ready pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)
    parts, training = Parts(network=Trained(module=nn.Linear(3, 1))), TrainingConfig(total_images=10**9, batch=16)
    trainer = Trainer(Means(), parts, Loader(ImageSet.of(pixels), 16, 0), training, Path())
    network, images = nn.Linear(3, 1), torch.rand(16, 3, 8, 8)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def bare() -> None:
        network(images.mean((2, 3)) + torch.randn(16, 3))[:, 0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return "a step with a trivial network, against a bare loop", trainer.train_step, bare, 50


def pictures() -> tuple[str, Work, Work, int]:
    """A batch of 64 from 2,000,000 pictures that cost nothing to decode; from 20,000."""
    one = ImageSet.of(np.zeros((1, 8, 8, 3), np.uint8))
    read = lambda rows: np.zeros((len(rows), 8, 8, 3), np.uint8)  # noqa: E731
    works = []
    for size in (2_000_000, 20_000):
        images = ImageSet(spec=one.spec, pixels=read, labels=np.full(size, -1), names=(), source="made", digests=())
        loader, places = Loader(images, 64, 0), iter(range(64, 10**9, 64))
        loader.batch(0)
        works.append(lambda loader=loader, places=places: loader.batch(next(places)))
    return "a batch of 2,000,000 pictures, against one of 20,000", works[0], works[1], 10


def seconds(work: Work, times: int) -> float:
    """Of CPU, each time."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def main(rounds: int = 15) -> None:
    """Print medians, and of the paired ratios the median, least and largest."""
    torch.set_num_threads(1)
    print("| | ms | bare, ms | ratio |\n|---|---|---|---|")
    for made in (attention, loop, pictures):
        name, ours, bare, times = made()
        seconds(ours, times), seconds(bare, times)
        pairs = [(seconds(ours, times), seconds(bare, times)) for _ in range(rounds)]
        ratios = sorted(a / b for a, b in pairs)
        a, b = (1000 * statistics.median(pair[i] for pair in pairs) for i in range(2))
        print(f"| {name} | {a:.2f} | {b:.2f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
