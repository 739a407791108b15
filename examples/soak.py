"""A long training of a tiny network: memory has to stay flat, and a run that was cut in pieces to end as an uncut one.

    python examples/soak.py                       # 200,000 steps, hours
    python examples/soak.py --steps 2000 --cuts 4

Pictures are decoded from a zip, with accumulation, checkpoints, kept weights and a log; at each cut the run is
forgotten and resumed from its folder. Kills of commands are tested in tests/training/test_kill_and_resume.py.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from imagewright.data import ImageSet, Loader, opening, write_edm_zip
from imagewright.data.reading import Reader
from imagewright.training.config import TrainingConfig
from imagewright.training.log import Log
from imagewright.training.trainer import Trainer
from imagewright.types import Parts, Trained, Update

BATCH, MICRO, PICTURES = 16, 8, 96


class Means:
    """Fit a linear map to nothing: as little computation as there can be in a step."""

    product = "network"

    def step(self, parts, batch, noise, clock):
        x = batch.images.mean((2, 3)) + noise.normal(batch.images[:, :, 0, 0])
        yield Update("network", parts.network(x)[:, 0].square())


def resident() -> float:
    """Megabytes of this process now (Linux), else at most so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trainer(folder: Path, images: ImageSet, total: int) -> Trainer:
    """The run in a folder, resumed where there is one."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    often = max(total // 5, BATCH)
    config = TrainingConfig(
        total_images=total, batch=BATCH, micro_batch=MICRO, log_images=often, checkpoint_images=often,
        snapshot_images=often, weights_images=total // 4,
    )  # fmt: skip
    parts = Parts(network=Trained(module=nn.Linear(3, 1)))
    made = Trainer(
        Means(), parts, Loader(images, BATCH, 0, xflip=True), config, folder / "checkpoints", log=Log(folder)
    )
    made.resume()
    return made


def soak(folder: Path, steps: int, cuts: int) -> tuple[list[float], bool]:
    """Megabytes in the course of the run, and whether it ends as one without cuts, whose memory is not looked at."""
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURES, 8, 8, 3), dtype=np.uint8)
    opening.KEEP_DECODED = 0  # decode each picture each time
    images = opening.open_images(write_edm_zip(ImageSet.of(pixels), folder / "set.zip"))
    assert isinstance(images.pixels, Reader)
    total, memory = steps * BATCH, []
    for piece in range(cuts + 1):
        run = trainer(folder / "cut", images, total)
        while run.images < total * (piece + 1) // (cuts + 1):
            run.train_step()
            if run.images % (total // 40) < BATCH:
                memory.append(resident())
            if run.images % (total // 5) < BATCH:
                run.save()
        run.save()
        del run
        gc.collect()
    whole, again = trainer(folder / "whole", images, total), trainer(folder / "cut", images, total)
    whole.train()
    pairs = zip(whole.product_state().values(), again.product_state().values(), strict=True)
    return memory, all(torch.equal(a, b) for a, b in pairs)


def main() -> None:
    """Run, and say whether memory is flat and the end the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--cuts", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        memory, same = soak(Path(folder), given.steps, given.cuts)
    tenth = len(memory) // 10
    growth = max(memory[-tenth:]) - max(memory[: 2 * tenth])
    told = f"{max(memory):.0f} MB, {growth:+.1f} MB since the first fifth; same end: {same}"
    print(f"{given.steps} steps, {given.cuts} cuts: {told}")
    raise SystemExit(0 if same and growth < 8 else 1)


if __name__ == "__main__":
    main()
