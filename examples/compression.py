"""Quantize the shipped emoji model and the shipped classifier of digits, measure both, and draw what they cost.

python examples/compression.py docs/compression.json docs/images/compression.png [ROW]

ROW: the only row to measure. Rows that the file has are not measured again. Few pictures at few steps, so that it takes
minutes on a CPU: distances of 128 pictures are far above those of 10,000, and compare with each other alone.
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
from imagewright.precision import Drawn
from imagewright.pretrained import find_model
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator

STEPS, COUNT, SEED = 6, 128, 1
PATHS = f"--steps {STEPS} --images 8"
GENERATOR = {
    "W16": "",
    "W8A8": f"--bits 8 {PATHS}",
    "W8A8 by int8": f"--bits 8 {PATHS}",
    "W4A8": f"--bits 4 {PATHS}",
    "W4A8 by int8": f"--bits 4 {PATHS}",
    "W4A8, not mended": f"--bits 4 --norms none {PATHS}",
    "W4A8, ranges of noise": f"--bits 4 --ranges noise {PATHS}",
    "W2A8": f"--bits 2 {PATHS}",
}
"""Rows by name, and what `tune quantize` is told; seed 0 calibrates, SEED is scored.

"by int8": drawn by products of whole numbers (`networks.integers`), else by unpacked weights.
"""
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


def distance(model: Path | str, precision: Drawn, extractor: Any, real: Any) -> float:
    """Frechet distance to the training pictures."""
    file = find_model(model)
    generator = ImageGenerator(file.model, file.spec, Heun(num_steps=STEPS), precision=precision)
    return frechet_of_model(generator, COUNT, extractor, real, seed=SEED)


def measure(path: Path, only: str | None) -> dict[str, Any]:
    """All rows, or only one; each is written when it is there."""
    record: dict[str, Any] = read_json(path) if path.exists() else {"emoji64-32": {}, "digits classifier": {}}
    with tempfile.TemporaryDirectory() as aside:
        source, held_out = classifier(Path(aside)), open_images("digits", split="test")
        rows = record["digits classifier"]
        for k, (name, told) in enumerate(ENCODER.items()):
            if name not in rows and only in (None, name):
                model = made(str(source), told, Path(aside) / f"encoder{k}")
                error = 1 - measure_accuracy(load_model(Path(model)).model, held_out).top1
                rows[name] = {"MB": megabytes(model), "error": error}
                write_json(path, record)
        rows, extractor = record["emoji64-32"], emoji_features()
        real = embed(open_images("emoji64", resolution=32, split="train"), extractor).moments
        for k, (name, told) in enumerate(GENERATOR.items()):
            if name not in rows and only in (None, name):
                model = made("emoji64-32", told, Path(aside) / f"generator{k}")
                precision: Drawn = "int8" if name.endswith("int8") else "fp32"
                rows[name] = {"MB": megabytes(model), "fd_emoji": distance(model, precision, extractor, real)}
                write_json(path, record)
    return record


def _places(rows: dict[str, Any], key: str, factor: float) -> dict[tuple[float, float], list[str]]:
    """Which rows lie at a point of the figure."""
    places: dict[tuple[float, float], list[str]] = {}
    for name, row in rows.items():
        if name.endswith("int8"):  # the same file
            continue
        places.setdefault((round(row["MB"], 3), round(factor * row[key], 2)), []).append(name)
    return places


def draw(record: dict[str, Any], path: Path) -> None:
    """Quality over megabytes, a panel for each model; what is not mended in red."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained", dpi=110)
    panels = {
        "emoji64-32": ("fd_emoji", 1.0, f"generator emoji64-32\n{COUNT} pictures, {STEPS} Heun steps", "fd_emoji"),
        "digits classifier": ("error", 100.0, "classifier of digits\n168 held-out pictures", "wrong answers, %"),
    }
    for axes, (model, (key, factor, title, label)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for place, names in _places(record[model], key, factor).items():
            colour, mark = ("C3", "x") if all("," in name for name in names) else ("C0", "o")
            axes.plot(*place, mark, color=colour)
            axes.annotate("; ".join(names), place, xytext=(6, 4), textcoords="offset points", fontsize=8, color=colour)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="MB on disk", ylabel=f"{label} (lower is better)")
        axes.margins(x=0.3, y=0.12)
    figure.savefig(path)


if __name__ == "__main__":
    draw(measure(Path(sys.argv[1]), (sys.argv[3:] or [None])[0]), Path(sys.argv[2]))
