"""Which held-out clips captions find: the picture of docs/words_and_sounds.md.

imagewright train vatt-standin-digits
python examples/retrieved_clips.py runs/vatt-standin-digits clips.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from imagewright.data.standin_triplets import NAMING, StandinTriplets
from imagewright.pretrained import find_model
from imagewright.training.record import experiment_from_json, read_record

SHOWN, SEARCHED = 6, 300
"""Clips of a row, and clips among which they are the nearest."""


def main(run: str, out: str, searched: int = SEARCHED) -> None:
    """Rows are captions, columns the clips nearest to them; each clip shows its first, fourth and last frame."""
    model: Any = find_model(run).model.eval()
    data = experiment_from_json(read_record(Path(run))["experiment"], Path(run)).data
    clips = data.of_split("test").open()
    assert isinstance(clips.origin, StandinTriplets)
    rows = np.arange(min(searched, len(clips))) * len(clips) // min(searched, len(clips))
    batch = clips.at(rows)
    names = clips.spec.class_names
    captions = [NAMING[k % len(NAMING)].format(name) for k, name in enumerate(names)]
    joint = model.joined(model.pooled(batch), torch.cat([clips.caption(text) for text in captions]))
    nearest = (joint.text @ joint.video_to_text.T).topk(SHOWN).indices
    figure = Figure(figsize=(1.5 + 2.4 * SHOWN, 0.95 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), SHOWN, squeeze=False)
    for k, text in enumerate(captions):
        for place, index in enumerate(nearest[k].tolist()):
            axis, film = axes[k, place], batch.video[index][:, [0, 3, -1]].permute(2, 1, 3, 0).flatten(1, 2)
            axis.imshow((film.numpy() + 1) / 2, cmap="gray", vmin=0, vmax=1)
            right = int(batch.label[index]) == k
            for side in axis.spines.values():
                side.set(color="tab:green" if right else "tab:red", linewidth=2)
            axis.set_xticks([])
            axis.set_yticks([])
            if place == 0:
                axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
            if k == 0:
                axis.set_title(f"nearest clip {place + 1}", fontsize=9)
    figure.savefig(out, dpi=70)
    found = batch.label[nearest] == torch.arange(len(names))[:, None]
    print(f"{int(found.sum())} of {found.numel()} clips are of the caption's class; {out}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
