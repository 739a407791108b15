"""What a process holds of a run between two steps, replicated and sharded: the table of docs/distributed.md.

torchrun --nproc-per-node 4 examples/shares.py            # emoji at 32x32, a step of as many pictures as processes
torchrun --nproc-per-node 4 examples/shares.py edm-digits # another recipe
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from imagewright.data import Loader
from imagewright.recipes import RECIPES
from imagewright.training.config import Parallel
from imagewright.training.distributed import Processes, processes
from imagewright.training.experiment import assemble
from imagewright.training.trainer import Trainer


def held(recipe: str, way: Parallel, group: Processes) -> dict[str, float]:
    """Megabytes of each kind, after a step."""
    run = RECIPES[recipe]()
    training = replace(run.training, batch=group.world, micro_batch=1, parallel=way)
    found = assemble(run)
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(found.images, group.world, 0)
        trainer = Trainer(run.method, found.parts, loader, training, Path(folder), processes=group)
        trainer.train_step()
    moments = (v for x in trainer.learners.values() for s in x.optimizer.state.values() for v in s.values())
    return {
        "networks": megabytes(t for part in trainer.held.values() for t in part.state.values()),
        "moments": megabytes(moments),
        "averages": megabytes(t for x in trainer.learners.values() for a in x.averages for t in a.state.values()),
    }


def megabytes(tensors: Iterable[Tensor]) -> float:
    """Of all of them."""
    return round(sum(t.nbytes for t in tensors) / 1e6, 1)


if __name__ == "__main__":
    with processes() as group:
        for way in ("replicate", "shard"):
            numbers = held(sys.argv[1] if sys.argv[1:] else "edm-emoji64-32", way, group)
            if group.is_first:
                print(json.dumps({"processes": group.world, "way": way, **numbers}), flush=True)
