"""Reconstruction against generation: one flow in the latents of three autoencoders. Some ten minutes on one core.

    python examples/latent_tradeoff.py [--short] [--out FOLDER] [SEED ...]

Digits become 4 x 4 places of 4 channels, of 32, and of 32 that are aligned with the classifier's features; three
networks of one shape but for the width of their latents, equal updates. Then LightningDiT learns in each, again with
one network but for the width and equal updates. Wide latents give more of a picture back, and are harder to make:
tradeoff.png, samples.png, and table.json with all scores. Seeds are those of the flows (0). The same call goes on where
it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from typed import typed

from imagewright import load
from imagewright.data import from_uint8, open_images, to_uint8
from imagewright.files import read_json, write_json
from imagewright.metrics.reconstruction import given_back
from imagewright.pretrained import find_model
from imagewright.report.figures import COLOURS, MARKERS

ARMS: Mapping[str, str] = {
    "4 channels": "kl-digits --network.latent-channels 4",
    "32 channels": "kl-digits --network.latent-channels 32",
    "32 channels, aligned": "vavae-digits --network.latent-channels 32 --method.adversarial 0",
}
"""Recipe and options of each autoencoder; none has a discriminator, so that alignment alone is what differs."""
SEEN = {"psnr": "PSNR of what comes back, dB", "rfd_digits": "Frechet distance of what comes back"}
"""What a picture has on its axes: scores of held-out pictures."""
MADE = "fd_digits"


@dataclass(frozen=True, kw_only=True)
class Length:
    """Images that autoencoders and flows learn from, and what is measured of a flow."""

    pictures: int = 12_800
    latents: int = 32_000
    steps: int = 25
    drawn: int = 1000
    width: int = 32
    """Of the autoencoders."""
    more: str = ""
    """Sizes of the flows."""


SHORT = Length(
    pictures=64, latents=64, steps=1, drawn=100, width=4, more="--network.width 8 --network.depth 1 --network.heads 2"
)


def measured(out: Path, arms: Sequence[str], seeds: Sequence[int], length: Length) -> dict[str, dict[str, Any]]:
    """Train and measure what has not been: by autoencoder its scores, and `MADE` of every seed's flow."""
    found: dict[str, dict[str, Any]] = {}
    for name in arms:
        folder = folder_of(out, name)
        autoencoder, flows = folder / "autoencoder", [folder / f"flow-{seed}" for seed in seeds]
        how = f"--network.model-channels {length.width} --training.optimizer.lr 2e-3"
        typed(f"train {ARMS[name]} {how} --training.total-images {length.pictures} --out {autoencoder} --resume")
        scores = _once(autoencoder, f"evaluate {autoencoder}")
        for seed, flow in zip(seeds, flows, strict=True):
            how = f"--training.optimizer.lr 4e-3 --training.total-images {length.latents} --training.seed {seed}"
            typed(f"train lightning-dit-digits-latents --autoencoder {autoencoder} {length.more} {how} --out {flow} "
                  "--resume")  # fmt: skip
        asked = f"--n {length.drawn} --steps {length.steps} --metrics fd --no-yardsticks"
        found[name] = {**scores, MADE: [_once(flow, f"evaluate {flow} {asked}")[MADE] for flow in flows]}
    return found


def folder_of(out: Path, name: str) -> Path:
    """Of an autoencoder and its flows."""
    return out / name.replace(",", "").replace(" ", "-")


def _once(run: Path, command: str) -> dict[str, Any]:
    """The scores of a run, measured if they are not there."""
    if not (run / "metrics.json").exists():
        typed(command)
    found = read_json(run / "metrics.json")
    scores: dict[str, Any] = (found.get("reconstructions") or found["reports"])[-1]["report"]["scores"]
    return scores


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Generation against both measures of reconstruction: a mark for each autoencoder, small ones for the seeds."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained", dpi=120)
    for axes, (measure, label) in zip(figure.subplots(1, len(SEEN), sharey=True), SEEN.items(), strict=True):
        for (name, scores), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
            made = scores[MADE]
            axes.plot(scores[measure], np.mean(made), marker, color=colour, ms=9, label=name)
            axes.plot([scores[measure]] * len(made), made, marker, color=colour, ms=4, alpha=0.5)
        axes.set_xlabel(f"{label} ({'more' if measure == 'psnr' else 'less'} is better)")
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel(f"{MADE} of what a flow draws (less is better)")
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def sheet(out: Path, arms: Sequence[str], seed: int, path: Path) -> None:
    """Held-out digits; then for each autoencoder what comes back of them, and what its flow draws of each class."""
    held = open_images("digits", split="test")
    classes = range(held.spec.num_classes)
    pictures = held.images([int(np.flatnonzero(held.labels == label)[0]) for label in classes])
    shown = {"held-out digits": pictures}
    for name in arms:
        model: Any = find_model(str(folder_of(out, name) / "autoencoder")).model
        shown[f"{name}: come back"] = to_uint8(given_back(model, from_uint8(pictures)))
        flow = load(folder_of(out, name) / f"flow-{seed}")
        shown[f"{name}: drawn"] = flow.generate(len(classes), labels=list(classes), seed=0)
    figure = Figure(figsize=(8.4, 0.62 * len(shown) + 0.3), layout="constrained", dpi=120)
    grid = figure.subplots(len(shown), len(classes))
    for axes, (name, row) in zip(grid, shown.items(), strict=True):
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for place, picture in zip(axes, row, strict=True):
            place.imshow(picture.squeeze(-1), cmap="gray", vmin=0, vmax=255)
            place.set(xticks=[], yticks=[])
    for label, place in zip(classes, grid[0], strict=True):
        place.set_title(f"class {label}", fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Train, measure, and say what came out."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="a few steps in the last one, in seconds")
    options.add_argument("--out", type=Path, default=Path("runs/latent-tradeoff"))
    options.add_argument("seeds", nargs="*", type=int, help="of the flows (default: 0)")
    given = options.parse_args()
    length, seeds = SHORT if given.short else Length(), given.seeds or [0]
    arms = list(ARMS)[-1:] if given.short else list(ARMS)
    found = measured(given.out, arms, seeds, length)
    write_json(given.out / "table.json", {"seeds": seeds, "images": [length.pictures, length.latents], "scores": found})
    draw(found, given.out / "tradeoff.png")
    sheet(given.out, arms, seeds[0], given.out / "samples.png")
    for name, scores in found.items():
        print(f"{name:<22} " + "  ".join(f"{key} {np.round(value, 3)}" for key, value in scores.items()))


if __name__ == "__main__":
    main()
