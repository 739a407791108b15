"""Draw docs/images/discrete-latents.png from a model with discrete latents, and print how curved its paths are.

python examples/discrete_latents.py runs/disco_chain docs/images/discrete-latents.png [LABEL]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from imagewright.noise import ImageNoise
from imagewright.pretrained import find_model
from imagewright.samplers import Heun
from imagewright.samplers.curvature import excess_length
from imagewright.samplers.latents_first import STREAM, draw_latents, latents_first
from imagewright.types import Condition

SIDE = 8
SEED = 0
SAMPLER = Heun(num_steps=18)


def sheet(model: Any, noise: Tensor, tokens: Tensor, label: int | None) -> Tensor:
    """A picture for each row of latents and each column of noise, [rows, columns, C, H, W]."""
    rows, columns = len(tokens), len(noise)
    told, z = tokens.repeat_interleave(columns, 0), noise.repeat(rows, 1, 1, 1)
    cond = Condition() if label is None else Condition(label=torch.full((rows * columns,), label))
    drawn: Tensor = SAMPLER(model, z, model.with_latents(cond, told))
    return drawn.unflatten(0, (rows, columns))  # type: ignore[no-untyped-call, no-any-return]


def spread(pictures: Tensor) -> tuple[float, float]:
    """Root mean squared difference from the mean of a row, and of a column, in units of the colour range, 2."""
    return tuple(float((pictures - pictures.mean(k, keepdim=True)).square().mean().sqrt()) / 2 for k in (1, 0))  # type: ignore[return-value]


def main(folder: str, path: Path, label: int | None) -> None:
    """One sheet: along a row the latents stay and the noise changes, along a column the other way round."""
    file = find_model(folder)
    model: Any = file.model
    label = label if label is not None or not file.spec.num_classes else 3
    indices = range(SIDE)
    noise = ImageNoise(SEED, indices).normal(torch.empty(SIDE, *file.spec.shape))
    cond = Condition() if label is None else Condition(label=torch.full((SIDE,), label))
    with torch.no_grad():
        tokens = draw_latents(model, SIDE, cond, ImageNoise(SEED, indices, STREAM))
        pictures = sheet(model, noise, tokens, label)
    figure = Figure(figsize=(6.4, 6.2), layout="constrained", dpi=110)
    axes = figure.subplots(SIDE, SIDE)
    for i, row in enumerate(axes):
        for j, place in enumerate(row):
            pixels = ((pictures[i, j].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()
            place.imshow(np.squeeze(pixels), cmap="gray", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
        row[0].set_ylabel(" ".join(map(str, tokens[i].tolist()[:10])), rotation=0, ha="right", va="center", fontsize=8)
    for j, place in enumerate(axes[0]):
        place.set_title(f"noise {j}", fontsize=8)
    name = "" if label is None else f", class {file.spec.class_names[label] if file.spec.class_names else label}"
    figure.suptitle(f"along a row: same latents, other noise; along a column: the other way round{name}", fontsize=9)
    figure.savefig(path)
    along_row, along_column = spread(pictures)
    print(f"root mean squared change: other noise {along_row:.3f}, other latents {along_column:.3f}")
    many = range(128)
    z, labels = ImageNoise(1, many).normal(torch.empty(128, *file.spec.shape)), torch.arange(128)
    told = Condition(label=labels % file.spec.num_classes) if file.spec.num_classes else Condition()
    with torch.no_grad():
        first = latents_first(model, 128, told, ImageNoise(1, many, STREAM))
    for what, each in (("with latents", first), ("without", told)):
        bent = excess_length(Heun(num_steps=32), model, z, each)
        print(f"length of paths over distance, minus 1, {what}: {float(bent.mean()):.6f}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
