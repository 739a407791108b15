"""How fast a run trains here, from a few of its own steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from imagewright.data import ImageSet, Loader
from imagewright.data.config import DataConfig
from imagewright.precision import tf32
from imagewright.training.distributed import Processes
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.given import Sources
from imagewright.training.trainer import Trainer

LONGEST = 20
"""Steps that are timed at the most."""


class Opened(Sources):
    """Sources whose images are open already."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__()
        self._images = images

    def images(self, data: DataConfig, on_progress: Callable[[int, int], None] | None) -> ImageSet:
        """The set that was given."""
        return self._images


def images_per_second(
    run: Experiment,
    images: ImageSet,
    device: torch.device | str = "cpu",
    seconds: float = 3.0,
    processes: Processes | None = None,
) -> float:
    """Images a second of all processes, over steps that take `seconds` together, after one that is not timed.

    The same number in all of them, by the first one's clock.
    """
    processes = processes or Processes()
    assembled = assemble(run, sources=Opened(images))
    loader = Loader(images, run.training.batch, run.training.seed, run.data.xflip)
    with tempfile.TemporaryDirectory() as folder, tf32(run.training.tf32):
        trainer = Trainer(
            run.method, assembled.parts, loader, run.training, Path(folder), device=device, processes=processes
        )
        trainer.train_step()
        trainer.watch.look()  # which waits for the device, as no step does
        started = time.perf_counter()
        steps, passed = 0, 0.0
        while steps < LONGEST and not processes.from_first(passed >= seconds):
            trainer.train_step()
            steps, passed = steps + 1, time.perf_counter() - started
        trainer.watch.look()
        passed = time.perf_counter() - started
    return processes.from_first(steps * run.training.batch / passed)
