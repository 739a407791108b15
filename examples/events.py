"""Draw what a simulated event camera sees of moving pictures, and which patches an encoder is shown.

python examples/events.py docs/images/events.png
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from imagewright.data.event_augment import histogram, normalised, turned
from imagewright.networks.event_vit import Masking, drawn, patch_information
from imagewright.recipes import RECIPES
from imagewright.training.snapshots import coloured

ROWS = ("picture", "events", "time turned", "half, by information", "a quarter, by information", "a quarter, uniformly")
EACH = 5


def masked(frames: Tensor, share: float, way: Masking) -> Tensor:
    """Frames whose patches of 4x4 that are not kept are NaN."""
    information = patch_information(frames, 4)
    uniform = torch.rand(information.shape, generator=torch.Generator().manual_seed(0))
    count = round(share * information.shape[1])
    kept = torch.zeros_like(information).scatter(1, drawn(information, count, uniform, way), 1.0)
    side = frames.shape[2] // 4
    large = kept.view(-1, 1, side, side).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return frames.where(large > 0, torch.nan)


def column(frame: Tensor) -> np.ndarray:
    """A frame [2, S, S] as RGB; what is left out is grey."""
    levels = ((frame.nan_to_num(-1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    shown = coloured(levels)
    shown[frame[0].isnan().numpy()] = 150
    return shown


def shown(name: str) -> list[list[np.ndarray]]:
    """A row for each of ROWS, of the first test pictures with many events."""
    pairs = replace(RECIPES[name]().data, split="test", most=1 << 14).open()
    read, pictures = pairs.read(np.arange(60))
    rows = sorted(range(60), key=lambda i: -len(read[i]))[5:50:9][:EACH]
    batch = pairs.batch(([read[i] for i in rows], pictures[rows]), np.array(rows), lambda: np.zeros(EACH))
    side = pairs.spec.resolution
    frames, back = (
        normalised(histogram(e, side)) for e in (batch.events, turned(batch.events, torch.ones(EACH, dtype=torch.bool)))
    )
    kept = [masked(frames, *each) for each in ((0.5, "exact"), (0.25, "exact"), (0.25, "uniform"))]
    still = [np.broadcast_to(p, (*p.shape[:2], 3)) for p in pictures[rows]]
    return [still, *([column(f) for f in each] for each in (frames, back, *kept))]


def main(path: str) -> None:
    """Both sets side by side."""
    columns = [a + b for a, b in zip(shown("events-digits"), shown("events-emoji64-32"), strict=True)]
    figure = Figure(figsize=(10, 6), layout="constrained", facecolor="white")
    axes = figure.subplots(len(ROWS), 2 * EACH)
    for row, (name, pictures) in enumerate(zip(ROWS, columns, strict=True)):
        for at, picture in zip(axes[row], pictures, strict=True):
            at.imshow(picture, interpolation="nearest")
            at.set_xticks([])
            at.set_yticks([])
        axes[row, 0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9)
    for at, title in ((EACH // 2, "digits, 16x16 events of 8x8 pictures"), (EACH + EACH // 2, "emoji, 32x32")):
        axes[0, at].set_title(title, fontsize=10)
    figure.savefig(Path(path), dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
