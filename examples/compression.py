"""Quantize the shipped emoji model and the shipped classifier of digits, measure both, and draw what they cost.

python examples/compression.py docs/compression.json docs/images/compression.png

Rows that the file has are not measured again. Few pictures at few steps, so that it takes minutes on a CPU: distances
of 320 pictures are far above those of 10,000, and compare with each other alone.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from imagewright import pretrained
from imagewright.cli.main import main as imagewright
from imagewright.data import open_images
from imagewright.files import read_json, write_json
from imagewright.metrics import embed
from imagewright.metrics.accuracy import measure_accuracy
from imagewright.metrics.draws import frechet_of_model
from imagewright.metrics.features import digits_features, emoji_features
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.pretrained import find_model
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator

STEPS, COUNT, SEED = 6, 320, 1
PATHS = f"--steps {STEPS} --images 16"
GENERATOR = {
    "W16": "",
    "W4A8": f"--bits 4 {PATHS}",
    "W4A8, not mended": f"--bits 4 --norms none {PATHS}",
    "W8A8": f"--bits 8 {PATHS}",
    "W4A8, ranges of noise": f"--bits 4 --ranges noise {PATHS}",
    "W2A8": f"--bits 2 {PATHS}",
}
"""Rows by name, and what `tune quantize` is told; seed 0 calibrates, SEED is scored."""
ENCODER = {
    "W16": "",
    "W8A8": "--bits 8",
    "W4A8": "--bits 4",
    "W4A4": "--bits 4 --activations 4",
    "W4A4, not mended": "--bits 4 --activations 4 --norms none",
    "W2A8": "--bits 2",
    "W2A8, not mended": "--bits 2 --norms none",
}


def classifier(folder: Path) -> Path:
    """The shipped classifier of digits as a model folder."""
    images = open_images("digits", split="test")
    save_model(folder / "classifier", ModelFile(model=digits_features().encoder, spec=images.spec), half=True)
    return folder / "classifier"


def made(source: str, told: str, folder: Path) -> Path | str:
    """A quantized model's folder; the source where nothing is told."""
    if not told:
        return source
    imagewright(["tune", "quantize", source, "--out", str(folder), "--device", "cpu", *shlex.split(told)])
    return folder


def megabytes(model: Path | str) -> float:
    """Of the file of weights."""
    folder = Path(model) if Path(model).is_dir() else Path(str(pretrained.__file__)).parent / str(model)
    return (folder / "model.safetensors").stat().st_size / 1e6


def distance(model: Path | str, extractor: Any, real: Any) -> float:
    """Frechet distance to the training pictures."""
    file = find_model(model)
    return frechet_of_model(
        ImageGenerator(file.model, file.spec, Heun(num_steps=STEPS)), COUNT, extractor, real, seed=SEED
    )


def measure(path: Path) -> dict[str, Any]:
    """All rows; each is written when it is there."""
    record: dict[str, Any] = read_json(path) if path.exists() else {"emoji64-32": {}, "digits classifier": {}}
    with tempfile.TemporaryDirectory() as aside:
        source, held_out = classifier(Path(aside)), open_images("digits", split="test")
        rows = record["digits classifier"]
        for k, (name, told) in enumerate(ENCODER.items()):
            if name not in rows:
                model = made(str(source), told, Path(aside) / f"encoder{k}")
                error = 1 - measure_accuracy(load_model(Path(model)).model, held_out).top1
                rows[name] = {"MB": megabytes(model), "error": error}
                write_json(path, record)
        rows, extractor = record["emoji64-32"], emoji_features()
        real = embed(open_images("emoji64", resolution=32, split="train"), extractor).moments
        for k, (name, told) in enumerate(GENERATOR.items()):
            if name not in rows:
                model = made("emoji64-32", told, Path(aside) / f"generator{k}")
                rows[name] = {"MB": megabytes(model), "fd_emoji": distance(model, extractor, real)}
                write_json(path, record)
    return record


def draw(record: dict[str, Any], path: Path) -> None:
    """Quality over megabytes, a panel for each model; what is not mended in red."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained", dpi=110)
    panels = {
        "emoji64-32": ("fd_emoji", 1.0, f"generator emoji64-32\n{COUNT} pictures, {STEPS} Heun steps", "fd_emoji"),
        "digits classifier": ("error", 100.0, "classifier of digits\n168 held-out pictures", "wrong answers, %"),
    }
    for axes, (model, (key, factor, title, label)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, row in record[model].items():
            plain = "," not in name
            axes.plot(row["MB"], factor * row[key], "o" if plain else "x", color="C0" if plain else "C3")
            axes.annotate(
                name,
                (row["MB"], factor * row[key]),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
                color="C0" if plain else "C3",
            )
        axes.set(title=title, xlabel="MB on disk", ylabel=f"{label} (lower is better)", xscale="log")
        axes.margins(x=0.25, y=0.12)
    figure.savefig(path)


if __name__ == "__main__":
    draw(measure(Path(sys.argv[1])), Path(sys.argv[2]))
