"""A long training of a tiny network that is killed every few seconds: it has to lose nothing, and memory to stay flat.

    python examples/soak.py                       # 200,000 steps twice, a quarter of an hour and more on one core
    python examples/soak.py --steps 2000 --seconds 1

Pictures are decoded from a zip, with accumulation, checkpoints, kept weights and a log. One process trains without a
stop and looks at its memory. Others train the same run, each going on from the folder that the one before left: after a
few seconds each is killed (SIGKILL); of every ten one meets a disk that takes nothing more, and one a folder that it
may not write to. Needs a system that forks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from imagewright.data import ImageSet, Loader, opening, write_edm_zip
from imagewright.data.reading import Reader
from imagewright.training.config import TrainingConfig
from imagewright.training.log import Log, read_log
from imagewright.training.trainer import Progress, Trainer
from imagewright.types import Parts, Trained, Update, UserError

BATCH, MICRO, PICTURES = 4, 2, 96
NOBODY = 65534
FAULTS = {3: "full", 7: "read-only"}
"""Of every ten pieces."""
LOOKS = 40
"""At memory, in the uncut run."""


class Means:
    """Fit a linear map to noise, which has no end: as little computation as there can be in a step."""

    product = "network"

    def step(self, parts, batch, noise, clock):
        x = batch.images.mean((2, 3)) + noise.normal(batch.images[:, :, 0, 0])
        yield Update("network", (parts.network(x)[:, 0] - noise.normal(x[:, 0])).square())


def resident() -> float:
    """Megabytes of this process now (Linux), else at most so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pictures(folder: Path) -> ImageSet:
    """A zip of small ones, each of which is decoded each time."""
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURES, 8, 8, 3), dtype=np.uint8)
    opening.KEEP_DECODED = 0
    images = opening.open_images(write_edm_zip(ImageSet.of(pixels), folder / "set.zip"))
    assert isinstance(images.pixels, Reader)
    return images


def trainer(folder: Path, images: ImageSet, steps: int) -> tuple[Trainer, list[float]]:
    """The run in a folder, resumed where there is one, and its megabytes in the course of time."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    total, memory = steps * BATCH, []
    often = max(total // 200, BATCH)
    config = TrainingConfig(
        total_images=total, batch=BATCH, micro_batch=MICRO, log_images=often, checkpoint_images=often,
        snapshot_images=often, weights_images=total // 4, trackers=(),
    )  # fmt: skip

    def look(progress: Progress) -> None:
        if progress.images % (total // LOOKS) < BATCH:
            memory.append(resident())

    parts, loader = Parts(network=Trained(module=nn.Linear(3, 1))), Loader(images, BATCH, 0, xflip=True)
    made = Trainer(Means(), parts, loader, config, folder / "checkpoints", log=Log(folder), on_progress=look)
    made.resume()
    return made, memory


def piece(folder: Path, images: ImageSet, steps: int, fault: str | None) -> int:
    """Train, in another process whose number is returned; it ends with 0 where all is done, with 2 as a command would.

    fault: "full": no file may be written to; "read-only": nor the folder, by one who is nobody.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if fault == "read-only" and os.geteuid() == 0:  # who may write anywhere
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        run, memory = trainer(folder, images, steps)
        run.train()
        if memory:
            (folder / "memory.json").write_text(json.dumps(memory))
        code = 0
    except UserError as error:
        code = 2 if "cannot be written" in str(error) else 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def cut(folder: Path, images: ImageSet, steps: int, seconds: float) -> Counter[str]:
    """The run in pieces; how many ended in which way."""
    ends: Counter[str] = Counter()
    chance, done = random.Random(0), False
    while not done:
        fault = FAULTS.get(sum(ends.values()) % 10)
        for each in (folder / "checkpoints", folder):
            each.mkdir(parents=True, exist_ok=True)
            each.chmod(0o555 if fault == "read-only" else 0o755)
        child = piece(folder, images, steps, fault)
        until = time.monotonic() + seconds * chance.uniform(0.2, 1.8)
        ended, status = 0, 0
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        ends[f"{fault or 'killed'}: {code}" if code else "done"] += 1
        if code not in (0, 2, -signal.SIGKILL) or (code == 2 and fault is None):
            raise SystemExit(f"a piece ({fault}) ended with {code}")
        done = code == 0
    return ends


def soak(folder: Path, steps: int, seconds: float) -> tuple[list[float], Counter[str], bool]:
    """Megabytes in the course of an uncut run; ends of the pieces of a cut one; whether both left the same.

    What is the same: weights, averages and moments to the last bit, the log but for speeds, and kept weights.
    """
    torch.set_num_threads(1)
    folder.chmod(0o755)
    images = pictures(folder)
    warm, _ = trainer(folder / "warm", ImageSet.of(images.images()), LOOKS)  # all that a piece imports, before it forks
    warm.train()
    if os.waitpid(piece(folder / "whole", images, steps, None), 0)[1]:
        raise SystemExit("the uncut run did not end well")
    ends = cut(folder / "cut", images, steps, seconds)
    left = [_left(folder / name) for name in ("whole", "cut")]
    return json.loads((folder / "whole" / "memory.json").read_text()), ends, left[0] == left[1]


def _left(folder: Path) -> tuple[object, ...]:
    """What a run has left."""
    files = sorted((*folder.glob("checkpoints/*"), *folder.glob("weights/*")))
    log = [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_log(folder / "log.jsonl")]
    return [(p.name, p.read_bytes()) for p in files], log


def main() -> None:
    """Run, and say whether memory is flat and the end the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=4.0, help="after which a piece is killed, in the mean")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        memory, ends, same = soak(Path(folder), given.steps, given.seconds)
    growth = max(memory[-LOOKS // 10 :]) - max(memory[: LOOKS // 5])
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{given.steps} steps; {told}; same end: {same}")
    print(f"{max(memory):.0f} MB, {growth:+.1f} MB since the first fifth")
    raise SystemExit(0 if same and growth < 8 else 1)


if __name__ == "__main__":
    main()
