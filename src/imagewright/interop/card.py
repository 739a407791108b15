"""A model card: README.md of a model folder, made from what the folder says of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagewright.files import write_text
from imagewright.metrics.records import read_scores
from imagewright.models.files import read_model_record
from imagewright.types import UserError


def write_card(folder: Path, scores: Path | None = None) -> None:
    """Write README.md beside a model. scores: a metrics.json; only those of these very weights are shown."""
    record = read_model_record(folder)
    data, model = record["data"], record["model"]
    network = model.get("network", {})
    inside = f" around a `{network['class']}`" if isinstance(network, dict) and "class" in network else ""
    classes = data.get("num_classes", 0)
    lines = [
        "---",
        "library_name: imagewright",
        "tags: [image-generation, imagewright]",
        "---",
        "",
        f"# {_plain(data['name'])}: {record['kind'].replace('_', ' ')}",
        "",
        f"A `{_plain(model['class'])}`{_plain(inside)}: {record['parameters']:,} parameters, pictures of "
        f"{data['channels']} x {data['resolution']} x {data['resolution']}, "
        f"{f'{classes} classes' if classes else 'no classes'}.",
        "",
        "    pip install imagewright",
        "    imagewright sample FOLDER --n 16",
        "",
        "```python",
        "import imagewright",
        "",
        'pictures = imagewright.load("FOLDER").generate(16)  # uint8 [16, C, H, W]',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| trained on | {_plain(data['name'])} |",
        f"| drawn by | {_code(record['sampler']) if record['sampler'] else 'the default of its kind'} |",
        f"| weights (SHA-256) | `{_plain(record['weights_sha256'])}` |",
        *(f"| {_plain(key)} | {_code(value)} |" for key, value in record["origin"].items()),
        "",
        *_scores(scores, record["weights_sha256"]),
        "The files hold numbers and their description, no code: `model.safetensors` and `model.json`.",
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _scores(path: Path | None, weights: str) -> Sequence[str]:
    """A table of scores that were measured of these weights."""
    if path is None or not path.exists():
        return ()
    try:
        rows = [row for row in read_scores(path)["reports"] if row.get("weights_sha256") == weights]
    except UserError:
        return ()
    lines = [
        f"| {_code(row['sampler'])} | {row['nfe']} | {_plain(name)} | {value:.4g} | {row['report']['num_images']:,} |"
        for row in rows
        for name, value in row["report"]["scores"].items()
    ]
    return ["| sampler | calls | score | value | images |", "|---|---|---|---|---|", *lines, ""] if lines else ()


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{_plain(text[:200])}`"


def _plain(text: str) -> str:
    """Text that no markup or table is made of, on one line."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return kept.replace("|", "/").replace("<", "(").replace(">", ")")
