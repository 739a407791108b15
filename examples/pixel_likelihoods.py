"""Models of pixels as tokens, side by side: bits of held-out pictures, cost of a wrong class, how often it is drawn.

    python examples/pixel_likelihoods.py emoji64-16 --images 12000 --batch 16             # an hour on a CPU thread
    python examples/pixel_likelihoods.py emoji64-32 --images 2400 --batch 8 --drawn 0     # as long
    python examples/pixel_likelihoods.py emoji64-16 --images 48000 --batch 16 --rows axial --drawn 450
    python examples/pixel_likelihoods.py digits --images 16000 --batch 64 --drawn 500

All rows have about as many parameters, see the same images in as many updates, and keep their recipes' rates, which
rise over the first twentieth and fall to zero over the last half. A wrong class is the right one moved by 1, 3 and 5.
The class is found by the data set's shipped classifier in pictures that are drawn, as many of each class. table.json,
and samples.png (a row a class) where any are drawn, go to runs/likelihoods-DATA-IMAGES, beside the runs; the same call
again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from imagewright import load
from imagewright.cli.main import main
from imagewright.data import from_uint8, open_images
from imagewright.files import read_json, write_json
from imagewright.noise import ImageNoise
from imagewright.pretrained import find_model
from imagewright.samplers import Ancestral
from imagewright.types import Condition

SMALL = {
    "causal": "--network.width 64 --network.depth 4",
    "sparse": "--network.width 64 --network.depth 4",
    "routing": "--network.width 64 --network.depth 4",
    "perceiver": "--network.width 64 --network.depth 3",
    "axial": "--network.width 56",
    "md4": "--network.model-channels 24",
    "genmd4": "--network.model-channels 24",
    "edm": "--network.model-channels 8 --network.num-blocks 1",
}
"""Of emoji: 0.23 to 0.31 million parameters. The recipes of digits have as many, the denoiser 0.75."""
MASKED = ("md4", "genmd4")
SHIFTS = (0, 1, 3, 5)
ROWS = 31
"""Pictures at a time."""
STEPS = 128
"""In which masked models draw."""
SHOWN = 6


def options(row: str, data: str, images: int, batch: int) -> str:
    """Of `train`, after its folder."""
    if data == "digits":
        recipe, network = f"{row}-digits", ""
    else:
        side = data.rpartition("-")[2]
        recipe = f"{row}-digits --data.source emoji64 --data.resolution {side}" if row in MASKED else f"{row}-{data}"
        network = f"{SMALL[row]} --network.dropout 0"
    return (
        f"{recipe} {network} --training.total-images {images} --training.batch {batch} --training.micro-batch none "
        f"--training.optimizer.lr-ramp-images {images // 20} --training.optimizer.lr-cooldown-images {images // 2} "
        f"--training.ema.halflife-images {images // 12} --training.log-images {images // 20} "
        f"--training.snapshot-images {images} --training.checkpoint-images {images // 4}"
    )


def told_wrongly(run: Path, n: int | None) -> dict[str, float]:
    """Bits/dim of the first n held-out pictures (None = all) with every label moved, by how much; one pass."""
    file = find_model(str(run))
    model: Any = file.model.eval()
    data = open_images(file.spec.name, resolution=file.spec.resolution, split="test")
    rows = range(len(data) if n is None else min(n, len(data)))
    labels, found = torch.as_tensor(np.asarray(data.labels)), {}
    for shift in SHIFTS:
        nats = 0.0
        for start in rows[::ROWS]:
            some = list(rows[start : start + ROWS])
            tokens = model.codec.encode(from_uint8(data.images(some)))
            # A bound takes a time for each picture: spread evenly over all of them.
            even = torch.tensor([(i + 0.5) / len(rows) for i in some], dtype=torch.float64)
            times = even if model.likelihood == "bound" else None
            cond = Condition(label=(labels[some] + shift) % file.spec.num_classes)
            with torch.inference_mode():
                nats += float(model.nll(tokens, cond, noise=ImageNoise(0, some), times=times).sum())
        found[str(shift)] = nats / len(rows) / math.prod(file.spec.shape) / math.log(2)
    return found


def measured(row: str, run: Path, data: str, n: int | None, drawn: int) -> dict[str, Any]:
    """Bits, what wrong classes cost, and how often the right one is found, of a trained run."""
    some = "" if n is None else f" --n {n}"
    way = " --passes 8" if row in MASKED else " --ode-steps 32" if row == "edm" else ""
    main(shlex.split(f"evaluate {run} --metrics bpd{way}{some} --out {run}/bits.json"))
    report = read_json(run / "bits.json")["likelihoods"][0]["report"]
    found = {"bpd": report["bpd"], "kind": report["kind"], "stderr": report["stderr"], "pictures": report["num_images"]}
    if row != "edm":
        costs = told_wrongly(run, n)
        found["a wrong class costs"] = float(np.mean([costs[str(s)] for s in SHIFTS[1:]]) - costs["0"])
    if drawn:
        features = "digits" if data == "digits" else "emoji"
        steps = f" --steps {STEPS}" if row in MASKED and data != "digits" else ""
        main(shlex.split(f"evaluate {run} --n {drawn} --features {features} --metrics accuracy --classes uniform "
                         f"--no-yardsticks{steps} "
                         f"--out {run}/accuracy.json"))  # fmt: skip
        scores = read_json(run / "accuracy.json")["reports"][0]["report"]["scores"]
        found["class found"] = scores[f"accuracy_{features}"]
    return found


def sheet(folder: Path, rows: list[str]) -> None:
    """samples.png: of each class SHOWN held-out pictures and as many of each model, from the same noise in each row."""
    spec = find_model(str(folder / rows[0])).spec
    real = open_images(spec.name, resolution=spec.resolution, split="test")
    figure = Figure(figsize=(2 + 2.2 * (len(rows) + 1), 5), layout="constrained", dpi=110)
    for axes, row in zip(figure.subplots(1, len(rows) + 1), ["held-out", *rows], strict=True):
        model = None if row == "held-out" else load(str(folder / row), Ancestral(STEPS) if row in MASKED else None)
        lines = []
        for label in range(spec.num_classes):
            if model is None:
                some = real.images(np.flatnonzero(real.labels == label)[:SHOWN])
                some = np.pad(some, ((0, SHOWN - len(some)), (0, 0), (0, 0), (0, 0)), constant_values=255)
            else:
                some = model.generate(SHOWN, labels=label, seed=1)
            framed = np.pad(some, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
            lines.append(np.concatenate(list(framed), axis=1))
        axes.imshow(np.concatenate(lines).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(row, fontsize=9)
        axes.set_xticks([])
        names = () if model else spec.class_names
        axes.set_yticks([(k + 0.5) * (spec.resolution + 2) for k in range(len(names))], names, fontsize=8)
    figure.savefig(folder / "samples.png")


def table(data: str, rows: tuple[str, ...], images: int, batch: int, n: int | None, drawn: int) -> None:
    """Train and measure what is not there yet."""
    folder = Path("runs") / f"likelihoods-{data}-{images}"
    known: dict[str, Any] = read_json(folder / "table.json") if (folder / "table.json").exists() else {}
    for row in rows:
        if row in known:
            continue
        run, line = folder / row, options(row, data, images, batch)
        main(shlex.split(f"train {line} --out {run} --resume"))
        parameters = sum(p.numel() for p in find_model(str(run)).model.parameters())
        known[row] = {"parameters": parameters, "options": line, **measured(row, run, data, n, drawn)}
        write_json(folder / "table.json", known)
    if drawn:
        sheet(folder, [row for row in rows if row in known])
    for row, found in known.items():
        print(row, {k: v for k, v in found.items() if k != "options"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "emoji64-16", "emoji64-32"))
    parser.add_argument("--images", type=int, required=True, help="of each training")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rows", nargs="+", choices=SMALL, default=list(SMALL))
    parser.add_argument("--n", type=int, help="held-out pictures that are judged; without, all")
    parser.add_argument("--drawn", type=int, default=180, help="pictures in which the class is looked for; 0 = none")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table(given.data, tuple(given.rows), given.images, given.batch, given.n, given.drawn)
