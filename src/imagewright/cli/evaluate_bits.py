"""`imagewright evaluate MODEL --metrics bpd`: bits per dimension of real images, beside lossless files of the same."""

from __future__ import annotations

from typing import Any

from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.sampling import Changes
from imagewright.cli.scoring import real_images
from imagewright.metrics.bits import USUAL_PASSES, BitsSettings, measure_bits, scorer
from imagewright.metrics.lossless import CODECS, codec_bits
from imagewright.models.files import ModelFile
from imagewright.training.distributed import pick_device
from imagewright.types import UserError


def evaluate_bits(
    target: str,
    file: ModelFile,
    data: str | None,
    split: str,
    n: int | None,
    seed: int,
    settings: BitsSettings,
    changes: Changes,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """The entry of metrics.json. Raises UserError for a model without a likelihood, before anything is measured."""
    if file.space is not None:
        raise UserError(f"{target} lives in an autoencoder's latents; how probable it finds images has no measure")
    model = changes.apply(file)
    scored = scorer(model)
    if batch_size < 1 or seed < 0:
        raise UserError(f"--batch-size is {batch_size} and --seed {seed}; they must be at least 1 and 0")
    images = real_images(target, data, file.spec, split)
    if n is not None:
        if not 1 <= n <= len(images):
            raise UserError(f"--n is {n}; there are {len(images)} images in split {split}, so it must be 1 to that")
        images = images.subset([i * len(images) // n for i in range(n)])
    passes = USUAL_PASSES[scored.kind] if settings.passes is None else settings.passes
    with bar(f"bits per dimension of {target}", len(images) * passes) as advance_to:
        report = measure_bits(
            model,
            file.spec,
            images,
            split=split,
            settings=settings,
            seed=seed,
            batch_size=batch_size,
            device=pick_device(device),
            on_progress=lambda done, total: advance_to(done, total=total),
        )
    with bar("lossless files", len(images)) as advance_to:
        codecs = codec_bits(images.images(), advance_to)
    return {"target": target, "changes": changes.record(), "report": {**report.as_dict(), "codecs": codecs}}


def show_bits(entry: dict[str, Any]) -> None:
    """The table on the terminal."""
    report = entry["report"]
    rows = table("", "bits/dim", "±", "what it is")
    error = "" if report["stderr"] is None else f"{report['stderr']:.2g}"
    rows.add_row(entry["target"], f"{report['bpd']:.4f}", error, report["kind"])
    for name, words in CODECS.items():
        rows.add_row(words, f"{report['codecs'][name]:.4f}", "", "lossless file", style="dim")
    OUT.print(rows)
    spread = "" if report["spread"] is None else f"; standard error over images {report['spread']:.2g}"
    say(f"{report['num_images']} images, split {report['split']}, {report['preprocessing']}{spread}")
    if report["settings"]:
        say(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in report["settings"].items()))
    for note in report["notes"]:
        say(f"note: {note}")
