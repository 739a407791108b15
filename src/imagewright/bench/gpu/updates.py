"""Part d: what one update of a product costs at ImageNet-64 size, with all that it takes of other networks."""

from __future__ import annotations

from pathlib import Path

import torch

from imagewright.bench.gpu.scale import MadeUp, Scale
from imagewright.bench.gpu.timing import Deadline, Numbers, aside, forget, kernels, out_of_memory, peak_bytes, timed
from imagewright.bench.updates import Updates
from imagewright.precision import tf32

COUNT = 2
"""Updates that are timed of each: a few say enough where one takes a second."""
MOST = 40.0
"""Seconds for one recipe."""


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """Recipes in their own precision, at the largest batch that fits of the scale's, its half, and so on.

    float32 is exact, as on the command line. What is float32 (MD4, and sCD's tangent) is measured rounded to TF32 too:
    MD4's published runs, on TPUs, round the factors of float32 products further, to bf16.
    """
    sources = MadeUp(scale)
    for name, batch in scale.updates.items():
        rounded = name.startswith(("scd", "md4")) and not scale.toy
        for key, allowed in ((name, False), (f"{name}, tf32", True))[: 2 if rounded else 1]:
            with aside(own, key, deadline, scale.most(MOST)) as found, tf32(allowed):
                found |= _largest(name, batch, sources, scale, device, deadline)


def _largest(name: str, batch: int, sources: MadeUp, scale: Scale, device: torch.device, deadline: Deadline) -> Numbers:
    found: Numbers = {}
    while True:
        deadline.check()
        forget(device)
        try:
            return found | _measured(name, batch, sources, scale, device)
        except RuntimeError as error:
            if not out_of_memory(error) or batch <= 2:
                return found | {"error": str(error)[:500]}
            found.setdefault("too_large", []).append(batch)
        batch //= 2


def _measured(name: str, batch: int, sources: MadeUp, scale: Scale, device: torch.device) -> Numbers:
    experiment = scale.experiment(name)
    with torch.device(device):
        updates = Updates(experiment, device, batch, sources)
    found = timed(updates, device, 0, min(COUNT, scale.timed))
    return found | {
        "kernels": kernels(updates, device),
        "batch": batch,
        "images_per_second": batch / found["seconds"],
        "precision": experiment.training.precision,
        "updates": dict(updates.updates),
        "learning": updates.learning,
        "frozen": updates.frozen,
        "peak_bytes": peak_bytes(device),
    }
